"""What an operator reads afterwards: the journal and its fields, a fault that repeats, and the story that -v tells."""
import contextlib
import json
import logging
import os
import re
import socket
import struct
import sys
import threading

import pytest

import proxies
import servers
import xmsrv as module
from flows import passed

TOPIC, CHANNEL = 'orders', 'x-msrv'


def good(number):
    """Messages that become records."""
    return [json.dumps({'id': n}) for n in range(number)]


# ------------------------------------------------------------------------------------------------------------- a notice

def test_a_window_of_nothing_is_told_of_with_v_alone(nsqd, program, workdir):
    """A timer makes thousands of them a day. They are counted."""
    path = workdir / 'x.prom'
    for arguments in (['once'], ['-q', 'once']):
        program.configure(nsqd, metrics={'textfile': path})
        assert program.run(*arguments).stderr == ''
    assert re.search(r'^xmsrv_windows_total\{.*result="done".*\} 2.0$', path.read_text(), re.MULTILINE)


def test_a_daemon_says_nothing_of_windows_of_nothing(nsqd, program):
    """Not a line, while windows come and go."""
    program.configure(nsqd, period='50ms', idle_timeout='50ms')
    running = program.start('daemon')
    servers.wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it is subscribed')
    servers.wait_until(passed(1), 'several windows are over')
    assert program.log.read_text() == ''
    nsqd.publish(TOPIC, good(1))
    servers.wait_until(lambda: ' received 1, stored 1, ' in program.log.read_text(),
                       'one that has something is told of')
    running.terminate()
    assert running.wait(timeout=10) == 0 and len(program.log.read_text().splitlines()) == 1


def test_a_replay_of_nothing_is_told_of(nsqd, program):
    """Somebody asked for it."""
    program.configure(nsqd)
    assert ' received 0, ' in program.run('replay').stderr


@pytest.mark.parametrize('number, level', [(3, 'notice'), (0, 'debug')])
def test_the_summary_is_a_notice_where_something_came(nsqd, program, number, level):
    """An empty queue is no news. It has its outcome, and each line says of which pipeline it is."""
    nsqd.publish(TOPIC, good(number))
    lines = map(json.loads, program.once(nsqd, log_format='json', args=['-v']).stderr.splitlines())
    line, = (line for line in lines if 'received' in line)
    assert (line['level'], line['outcome'], line['stored']) == (level, 'done', number)
    assert (line['topic'], line['channel']) == (TOPIC, CHANNEL)


def test_the_summary_of_a_window_that_failed_says_so(nsqds, program):
    nsqd, = nsqds(1, '--max-msg-size=2000')
    refused_letter(nsqd)
    lines = program.once(nsqd, log_format='json', expect=os.EX_TEMPFAIL).stderr.splitlines()
    failed = [line for line in map(json.loads, lines) if line.get('outcome') == 'failed']
    assert [line['level'] for line in failed] == ['notice', 'error']
    assert {line['topic'] for line in map(json.loads, lines)} == {TOPIC}


def refused_letter(nsqd):
    """A message whose dead letter is too large for an nsqd of --max-msg-size=2000."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, json.dumps(['x' * 1900]))


# ---------------------------------------------------------------------------------------------------------- the journal

# Not the path of the machine's own journal, which is there or not.
START = 'import sys, xmsrv; xmsrv.JOURNAL_SOCKET = sys.argv.pop(1); sys.exit(xmsrv.main())'


class Journal(proxies.Thread):
    """A socket at `path`, as the journal has one. `entries`: the fields of each record that came; `files`: how many of
    them came as a file."""

    def __init__(self, path):
        self.entries, self.files = [], 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.1)
        super().__init__()

    def _serve(self):
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
                self.files += len(fds)
                self.entries.append(decoded(contents(*fds) if fds else data))
        self._socket.close()

    def wait_for(self, condition):
        """The first entry for which the condition holds."""
        return servers.wait_until(lambda: next(filter(condition, list(self.entries)), None), 'the journal has it')


def contents(fd):
    """The bytes of the file that came along, which nobody can change any more."""
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b'more', 0)
        return os.pread(fd, 1 << 24, 0)
    finally:
        os.close(fd)


def decoded(data):
    """The fields of an entry: systemd.io/JOURNAL_NATIVE_PROTOCOL."""
    fields = {}
    while data:
        line, _, data = data.partition(b'\n')
        name, equals, value = line.partition(b'=')
        if not equals:
            size, = struct.unpack_from('<Q', data)
            value, end, data = data[8:8 + size], data[8 + size:9 + size], data[9 + size:]
            assert end == b'\n'
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journal(workdir):
    """The test's own."""
    with Journal(workdir / 'socket') as made:
        yield made


def under(workdir, program, *arguments, ours=True, path='socket'):
    """Run the command with stderr in a file that JOURNAL_STREAM names, or not: its status, and the lines there."""
    with (workdir / 'stderr').open('w+') as stderr, (workdir / 'other').open('w') as other:
        stream = os.fstat((stderr if ours else other).fileno())
        process = servers.spawn([sys.executable, '-c', START, workdir / path, '-c', program.path, *arguments],
                                stderr=stderr, env={**os.environ, 'JOURNAL_STREAM': f'{stream.st_dev}:{stream.st_ino}'})
        return process.wait(timeout=30), (workdir / 'stderr').read_text().splitlines()


def test_the_journal_gets_fields(nsqds, program, workdir, journal):
    """Priority, pipeline, outcome and counts; nothing is left for stderr."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    refused_letter(nsqd)
    nsqd.publish(TOPIC, good(4))
    program.configure(nsqd)
    assert under(workdir, program, '-v', 'once') == (os.EX_TEMPFAIL, [])
    found = journal.wait_for(lambda entry: entry['MESSAGE'].startswith('requeued'))
    assert (found['PRIORITY'], found['XMSRV_OUTCOME']) == ('3', 'failed')
    found = journal.wait_for(lambda entry: 'XMSRV_RECEIVED' in entry)
    assert found['MESSAGE'].startswith('[orders/x-msrv] received 5, stored 4, ')
    assert (found['PRIORITY'], found['XMSRV_OUTCOME']) == ('5', 'failed')
    assert (found['XMSRV_RECEIVED'], found['XMSRV_STORED'], found['XMSRV_REQUEUED']) == ('5', '4', '1')
    assert float(found['XMSRV_SECONDS']) >= 0
    assert {entry['PRIORITY'] for entry in journal.entries} == {'3', '4', '5', '7'}
    for entry in journal.entries:
        assert (entry['SYSLOG_IDENTIFIER'], entry['XMSRV_TOPIC'], entry['XMSRV_CHANNEL']) == ('x-msrv', TOPIC, CHANNEL)


@pytest.mark.parametrize('lines', [3, 30000], ids=['as bytes', 'as a file'])
def test_the_journal_gets_lines_that_belong_together_as_one(workdir, journal, monkeypatch, lines):
    """One that is too large for the socket comes whole as well."""
    monkeypatch.setattr('xmsrv.JOURNAL_SOCKET', str(workdir / 'socket'))
    text = '\n'.join(f'fault {n}' for n in range(lines))
    handler = module.JournalHandler({'topic': TOPIC, 'channel': CHANNEL})
    handler.handle(logging.makeLogRecord({'msg': text, 'levelname': 'ERROR', 'levelno': logging.ERROR}))
    entry = journal.wait_for(lambda entry: True)
    assert (entry['MESSAGE'], entry['PRIORITY'], entry['XMSRV_TOPIC']) == (text, '3', TOPIC)
    assert journal.files == (lines > 3)


def test_what_ends_the_program_goes_by_way_of_stderr(nsqd, program, workdir, journal):
    """Of a datagram from a process that has ended the journal no longer finds the unit, and `systemctl status` shows
    nothing: that is for faults in the file, and for an end that is out of reach."""
    program.configure(nsq={'nonsense': 1})
    status, lines = under(workdir, program, 'check')
    assert status == os.EX_CONFIG and len(lines) > 1 and all(line.startswith('<3>') for line in lines)
    nsqd.stop()
    program.configure(nsqd)
    status, lines = under(workdir, program, 'once')
    assert status == os.EX_UNAVAILABLE and lines[-1].startswith('<3>no nsqd can be reached')
    assert all(entry['PRIORITY'] == '4' for entry in journal.entries)


def test_the_journal_is_only_for_text(nsqd, program, workdir, journal):
    """Who asks for JSON gets it, on stderr."""
    nsqd.publish(TOPIC, good(1))
    program.configure(nsqd, log_format='json')
    status, lines = under(workdir, program, 'once')
    assert status == 0 and json.loads(lines[-1])['channel'] == CHANNEL and not journal.entries


@pytest.mark.parametrize('path', ['nowhere', 'stderr'])
def test_stderr_has_priorities_where_the_journal_is_out_of_reach(nsqds, program, workdir, path):
    """Its socket is not there, or is none."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    refused_letter(nsqd)
    program.configure(nsqd)
    status, lines = under(workdir, program, '-v', 'once', path=path)
    assert status == os.EX_TEMPFAIL and {line[:3] for line in lines} == {'<3>', '<4>', '<5>', '<7>'}
    assert any(line.startswith('<5>[orders/x-msrv] received 1, ') for line in lines)


def test_each_line_of_several_has_its_priority(program, workdir):
    """All faults of a file are one message."""
    program.configure(nsq={'topik': 'a', 'max-messages': 'many'})
    status, lines = under(workdir, program, 'check', path='nowhere')
    assert status == os.EX_CONFIG and len(lines) >= 2 and all(line.startswith('<3>') for line in lines)


def test_a_journal_that_is_not_ours_gets_nothing(nsqd, program, workdir, journal):
    """JOURNAL_STREAM, inherited by a process with another stderr, means nothing."""
    nsqd.publish(TOPIC, good(3))
    program.configure(nsqd)
    status, lines = under(workdir, program, 'once', ours=False)
    assert status == 0 and lines[-1].startswith('[orders/x-msrv] received 3, ') and not journal.entries


def test_text_that_is_no_utf8_reaches_the_journal(workdir, program, journal, monkeypatch):
    """A file name of any bytes, by both ways."""
    monkeypatch.setattr('xmsrv.JOURNAL_SOCKET', str(workdir / 'socket'))
    name = os.fsdecode(b'\xff.conf')
    record = logging.makeLogRecord({'msg': f'{name}: gone', 'levelname': 'ERROR', 'levelno': logging.ERROR})
    module.JournalHandler({'topic': TOPIC}).handle(record)
    assert r'\udcff.conf' in journal.wait_for(lambda entry: True)['MESSAGE']
    program.path = workdir / name
    status, lines = under(workdir, program, 'check')
    assert status == os.EX_UNAVAILABLE and r'\udcff.conf' in lines[-1]


# ------------------------------------------------------------------------------------------------- a fault that repeats

class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said(monkeypatch, clock):
    """The lines of the log, in this process, behind a filter of its own that goes by `clock`."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f'{record.levelname.lower()}: {record.getMessage()}')
    monkeypatch.setattr(module, 'rate_limit_filter', module.RateLimitFilter(clock))
    for name, value in (('handlers', [handler]), ('filters', [module.rate_limit_filter]), ('propagate', False)):
        monkeypatch.setattr(module.log, name, value)
    before = module.log.level
    module.log.setLevel(logging.INFO)
    yield lines
    module.log.setLevel(before)


def test_a_fault_that_repeats_is_counted(said, clock):
    """The first few are said; when the minute is over so is how many more there were, and it begins anew."""
    for number in range(20):
        module.log.warning('nsqd %d: gone', number)
    few = [f'warning: nsqd {number}: gone' for number in range(module.REPEATS_LOGGED)]
    assert said == few
    clock.now += module.REPEATS_INTERVAL
    module.log.warning('nsqd %d: gone', 99)
    assert said[len(few):] == ['warning: 15 more like this in the last minute: nsqd 19: gone', 'warning: nsqd 99: gone']


def test_a_count_is_said_at_the_end(said):
    """And no count of what was said whole."""
    for _ in range(module.REPEATS_LOGGED + 1):
        module.log.error('lost')
    module.log.warning('just once')
    module.rate_limit_filter.log_counts()
    assert said[-2:] == ['warning: just once', 'error: 1 more like this in the last minute: lost']
    module.rate_limit_filter.log_counts()
    assert len(said) == module.REPEATS_LOGGED + 2


def test_a_count_is_said_in_time_though_nothing_else_is(said, clock, monkeypatch):
    monkeypatch.setattr(module, 'REPEATS_INTERVAL', 0.2)
    for _ in range(module.REPEATS_LOGGED + 3):
        module.log.warning('lost')
    clock.now += 1
    servers.wait_until(lambda: said[-1] == 'warning: 3 more like this in the last minute: lost', 'the count')


def test_one_fault_hides_no_other(said):
    """Neither another template, nor another text where the template has no words of its own."""
    for number in range(20):
        module.log.warning('lost')
        module.log.error('%s', f'fault {number}')
    module.log.warning('another')
    assert [line for line in said if line.startswith('error')] == [f'error: fault {number}' for number in range(20)]
    assert said[-1] == 'warning: another' and said.count('warning: lost') == module.REPEATS_LOGGED


@pytest.mark.parametrize('level', [logging.INFO, module.NOTICE])
def test_what_is_no_fault_is_never_held_back(said, level):
    """The summary of window after window."""
    for _ in range(100):
        module.log.log(level, 'received 1')
    assert len(said) == 100


def test_verbose_shows_each(said):
    module.log.setLevel(logging.DEBUG)
    for _ in range(100):
        module.log.warning('lost')
    assert len(said) == 100


def test_faults_of_many_threads_are_counted_right(said):
    def fail():
        for _ in range(200):
            module.log.warning('lost')
    threads = [threading.Thread(target=fail) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    module.rate_limit_filter.log_counts()
    assert len(said) == module.REPEATS_LOGGED + 1
    assert said[-1] == f'warning: {8 * 200 - module.REPEATS_LOGGED} more like this in the last minute: lost'


def test_an_nsqd_that_comes_and_goes_does_not_fill_the_log(nsqd, program):
    """Eight times; then it stays."""
    def cut(event):
        if event.name == 'RDY' and event.connection < 8:
            raise ConnectionError
        return True
    nsqd.publish(TOPIC, good(3))
    with proxies.Proxy(nsqd, judge=cut) as proxy:
        done = program.once(timeout='30s', nsq={'nsqd-tcp-address': proxy.addresses})
    lost = (f'warning: queue unavailable (nsqd {proxy.addresses[0]}: the connection was closed): retrying, '
            'consumption paused')
    assert servers.summary(done.stderr)['stored'] == 3
    assert done.stderr.splitlines().count(lost) == module.REPEATS_LOGGED == 5
    assert done.stderr.splitlines()[-1] == lost.replace(': ', ': 3 more like this in the last minute: ', 1)


# ------------------------------------------------------------------------------------------------------------ the story

STORY = r"""
sqlite \S+: open
nsqd A: connected, version 1.3.0, RDY at most 2500, msg-timeout 60 s
window: begins, at most 4 messages, 60 s, idle 30 s, 2500 in flight
nsqd A: RDY 0 -> \d+
nsqd A: \d+ messages
store: batch of \d+, \d+ bytes, in \d+ ms: retry \d+
store unavailable \(sqlite \S+: database is locked\): retrying, consumption paused
store: next try in 0\.\d s, \d+ messages pending
nsqd A: RDY \d+ -> 0
store: batch of \d+, \d+ bytes, in \d+ ms: stored \d+
store recovered after \d+\.\d s
nsqd A: connected, for dead letters in orders.dead
dead letters: batch of 1, 2 bytes, in \d+ ms: dead 1
window: ends after \d+\.\d\d s, full; 4 taken, 0 under way
nsqd A: disconnected
\[orders/x-msrv\] received 4, stored 3, deleted 0, duplicate 0, stale 0, dead 1, .*
""".strip().splitlines()


def test_verbose_tells_the_story(nsqds, program):
    """Of two nsqds, an outage of the store and a dead letter: a line for each thing that happens, with its time."""
    pair = nsqds(2)
    program.once(pair, idle_timeout='50ms')
    program.configure(pair, timeout='60s', idle_timeout='30s', nsq={'max-messages': 4})
    process = program.start('-v', 'once')
    servers.wait_until(lambda: all(nsqd.clients(TOPIC, CHANNEL) for nsqd in pair), 'both are connected')
    with program.locked():
        pair[0].publish(TOPIC, good(1))
        servers.wait_until(lambda: 'retrying' in program.log.read_text(), 'the store is down', 20)
    pair[1].publish(TOPIC, [*good(2), '[]'])
    assert process.wait(timeout=30) == 0
    lines = program.log.read_text().splitlines()
    lines = [re.sub(r'^(debug: \d+\.\d{3}|warning:) ', '', line) for line in lines]
    told = iter([line.replace(pair[0].tcp, 'A').replace(pair[1].tcp, 'A') for line in lines])
    missing = [pattern for pattern in STORY if not any(re.fullmatch(pattern, line) for line in told)]
    assert not missing, (missing[0], lines)
    for nsqd in pair:
        follows_on(re.findall(rf'nsqd {nsqd.tcp}: RDY (\d+) -> (\d+)', '\n'.join(lines)))


def follows_on(changes):
    """Each RDY is told as what the last one was, and it was another."""
    rdy = '0'
    for before, after in changes:
        assert before == rdy != after, changes
        rdy = after


def test_the_time_of_a_line_does_not_follow_the_clock():
    """Somebody sets the clock back by a day."""
    record = logging.makeLogRecord({'msg': 'told', 'levelname': 'DEBUG', 'levelno': logging.DEBUG,
                                    'relativeCreated': -86400e3})
    seconds = module.TextFormatter().format(record).split()[1]
    assert 0 <= float(seconds) < 3600


def test_verbose_tells_of_an_nsqd_that_is_away(nsqds, program):
    """When it is tried again."""
    up, down = nsqds(2)
    down.kill()
    program.configure([up, down], timeout='2s', idle_timeout='1s')
    lines = program.run('-v', 'once').stderr.splitlines()
    told = [line.partition(f'nsqd {down.tcp}: ')[2] for line in lines if down.tcp in line]
    assert 'Connection refused' in told
    assert [line for line in told if re.fullmatch(r'connecting again in \d\.\d s', line)]
    assert [line for line in lines if re.search(r' window: ends after .*, the queue is idle; 0 taken, 0 under', line)]


def test_verbose_says_why_the_window_ended(nsqd, program):
    """Here a signal."""
    program.configure(nsqd, timeout='60s', idle_timeout='60s')
    process = program.start('-v', 'once')
    servers.wait_until(lambda: 'window: begins, at most any number of' in program.log.read_text(), 'it runs')
    process.terminate()
    assert process.wait(timeout=10) == 0
    assert re.search(r'window: ends after \d\.\d\d s, stopped; 0 taken', program.log.read_text())
