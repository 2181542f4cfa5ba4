"""What a person sees: the summary line, the log in its formats, the exit status, and what `check --connect` finds."""
import contextlib
import datetime
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios

import pytest
import trustme

import proxies
import servers
from flows import in_use, passed
from servers import wait_until

TOPIC, CHANNEL, DEAD, REPLAY = 'orders', 'x-msrv', 'orders.dead', 'x-msrv-replay'
STRICT = {'fields': {'id': 'integer, required'}}
SUMMARY = re.compile(r'\[orders/x-msrv\] received \d+, stored \d+, deleted \d+, duplicate \d+, '
                     r'stale \d+, dead \d+, requeued \d+, late \d+ in \d+\.\d\d s')


def good(number):
    """Messages that fit STRICT."""
    return [json.dumps({'id': n}) for n in range(number)]


# ---------------------------------------------------------------------------------------------------------- the summary

def test_a_clean_window_says_one_line(nsqd, program):
    """The summary, on stderr, with every count."""
    nsqd.publish(TOPIC, [*good(8), '[]', '{'])
    ran = program.once(nsqd)
    line, = ran.stderr.splitlines()
    assert SUMMARY.fullmatch(line)
    assert line.startswith('[orders/x-msrv] received 10, stored 8, deleted 0, duplicate 0, stale 0, dead 2, '
                           'requeued 0, late 0 ')
    assert ran.stdout == ''


@pytest.mark.parametrize('option', ['-q', '--quiet'])
@pytest.mark.parametrize('place', ['before', 'after'])
def test_quiet_says_nothing_of_a_clean_window(nsqd, program, option, place):
    """Wherever the option stands."""
    nsqd.publish(TOPIC, good(3))
    program.configure(nsqd)
    ran = program.run(*([option, 'once'] if place == 'before' else ['once', option]))
    assert (ran.stdout, ran.stderr) == ('', '')
    assert len(program.records()) == 3


def test_quiet_still_says_what_failed(nsqds, program):
    """A dead letter that can't be kept."""
    refused_letter(*nsqds(1, '--max-msg-size=2000'), program)
    assert 'could not be kept' in program.run('-q', 'once', expect=os.EX_TEMPFAIL).stderr


def test_verbose_says_more_and_the_summary_too(nsqd, program):
    """Which message became a dead letter, and why."""
    nsqd.publish(TOPIC, '[]')
    lines = program.once(nsqd, args=['-v']).stderr.splitlines()
    assert len(lines) > 1
    assert any('not-an-object' in line for line in lines)
    assert sum(bool(SUMMARY.fullmatch(line)) for line in lines) == 1


@pytest.mark.parametrize('loud', [[], ['-v']])
def test_the_log_as_json_is_an_object_a_line(nsqds, program, loud):
    """The counts of the summary are members, and so are level and time of each line."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    refused_letter(nsqd, program, log_format='json')
    nsqd.publish(TOPIC, [*good(4), '[]'])
    lines = [json.loads(line) for line in program.run(*loud, 'once', expect=os.EX_TEMPFAIL).stderr.splitlines()]
    assert all({'time', 'level', 'message'} <= set(line) for line in lines)
    found, = (line for line in lines if 'received' in line)
    counts = {'received': 6, 'stored': 4, 'deleted': 0, 'duplicate': 0, 'stale': 0, 'dead': 1, 'requeued': 1,
              'late': 0}
    assert {name: found[name] for name in counts} == counts
    assert (found['topic'], found['channel'], found['level']) == (TOPIC, CHANNEL, 'notice')
    assert isinstance(found['seconds'], float)
    assert {'warning', 'error', 'notice'} <= {line['level'] for line in lines}
    assert datetime.datetime.fromisoformat(found['time'].replace('Z', '+00:00')).tzinfo


def refused_letter(nsqd, program, **settings):
    """A message that becomes a dead letter too large for an nsqd of --max-msg-size=2000, which has no file to go to."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, json.dumps(['x' * 1900]))
    program.configure(nsqd, **settings)


# ----------------------------------------------------------------------------------------- bodies are no log's business

MARKER = 'secret' * 50


@pytest.mark.parametrize('log_format', ['text', 'json'])
@pytest.mark.parametrize('body', [
    {'id': 1, 'text': MARKER}, {'id': MARKER}, {MARKER: 1}, {'id': 1, 'text': {MARKER: '\0'}},
    {'id': 1, 'key': [MARKER]}, [MARKER], MARKER, f'{{"id": "{MARKER}", cut',
    f'{{"id": 1, "{MARKER}": 1, "{MARKER}": 2}}',
], ids=['fine', 'schema', 'bin name', 'unsupported', 'key', 'list', 'string', 'cut', 'name twice'])
def test_a_body_is_never_in_the_log_whole(nsqd, program, log_format, body):
    """Neither where it is stored, nor where it becomes a dead letter, nor in replay; the list shows its beginning."""
    nsqd.publish(TOPIC, body if isinstance(body, str) else json.dumps(body))
    settings = {'log_format': log_format, 'message': STRICT, 'record': {'key': 'key'}}
    runs = [program.once(nsqd, args=['-v'], **settings), program.run('replay', '--list'), program.run('-v', 'replay')]
    assert servers.summary(runs[0].stderr)['received'] == servers.summary(runs[0].stderr)['dead'] == 1
    for ran in runs:
        assert MARKER not in ran.stdout + ran.stderr
        assert MARKER[:250] not in ran.stdout + ran.stderr


def test_a_body_is_not_in_the_log_when_it_is_stored(nsqd, program):
    """With -v."""
    nsqd.publish(TOPIC, json.dumps({'text': MARKER}))
    assert MARKER[:60] not in program.once(nsqd, args=['-v']).stderr
    assert [bins['text'] for bins in program.records().values()] == [MARKER]


def test_a_body_is_not_in_the_log_when_its_letter_is_refused(nsqds, program, workdir):
    """By nsqd, and by the file."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    nsqd.publish(TOPIC, json.dumps([MARKER * 6]))
    with in_use(workdir / 'dead.json') as path:
        ran = program.once(nsqd, args=['-v'], dead_letter={'file': path}, expect=os.EX_TEMPFAIL)
    assert MARKER[:60] not in ran.stderr


def test_a_body_is_not_in_the_log_when_the_store_fails(nsqd, program):
    """An outage to the end of the window."""
    program.once(nsqd, idle_timeout='50ms')
    program.configure(nsqd, idle_timeout='60s', timeout='4s')
    process = program.start('-v', 'once')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it has subscribed')
    with program.locked():
        nsqd.publish(TOPIC, json.dumps({'text': MARKER}))
        assert process.wait(timeout=30) == os.EX_TEMPFAIL
    assert MARKER[:60] not in program.log.read_text()


# --------------------------------------------------------------------------------------------------------- the terminal

def on_a_terminal(program, *arguments, stream='stderr', **variables):
    """What the command writes to a terminal that is its stderr, or its stdout, until it ends with 0."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))
    process = servers.spawn([servers.PROGRAM, '-c', program.path, *arguments],
                            env={**os.environ, 'TERM': 'xterm', **variables},
                            **{'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL, stream: slave})
    os.close(slave)
    seen = b''
    with contextlib.suppress(OSError):   # EIO: the other end is closed
        while data := os.read(master, 65536):
            seen += data
    os.close(master)
    assert process.wait(timeout=30) == 0
    return seen.decode()


@pytest.mark.parametrize('limit', [0, 12])
def test_a_terminal_shows_progress_of_a_long_window(nsqd, program, limit):
    """How many of how many, where there is a limit; the summary stands on a line of its own."""
    nsqd.publish(TOPIC, good(10))
    program.configure(nsqd, idle_timeout='2s', nsq={'max-messages': limit})
    seen = on_a_terminal(program, 'once')
    assert ('10/12' if limit else '10msg') in seen
    assert SUMMARY.fullmatch(re.split(r'[\r\n]+', seen.strip())[-1])


@pytest.mark.parametrize('idle, arguments', [('100ms', ['once']), ('2s', ['-q', 'once'])])
def test_a_terminal_shows_no_progress_of_a_short_window_nor_with_quiet(nsqd, program, idle, arguments):
    """Nothing but the summary, or nothing at all."""
    nsqd.publish(TOPIC, good(10))
    program.configure(nsqd, idle_timeout=idle)
    seen = on_a_terminal(program, *arguments)
    assert SUMMARY.fullmatch(seen.strip()) if idle == '100ms' else seen == ''


@pytest.mark.parametrize('where', ['topic', 'file'])
def test_a_terminal_shows_progress_of_replay(nsqd, program, workdir, where):
    """The same bar."""
    letters = {} if where == 'topic' else {'topic': '', 'file': workdir / 'dead.json'}
    nsqd.publish(TOPIC, ['{"id": "1"}', '{"id": "2"}', '{"id": "3"}'])
    program.once(nsqd, message=STRICT, dead_letter=letters)
    program.configure(nsqd, idle_timeout='2s', dead_letter=letters)
    assert '3msg' in on_a_terminal(program, 'replay', '--rate', '1')


# ------------------------------------------------------------------------------------------------------ the exit status

@pytest.mark.parametrize('arguments', [[], ['fetch'], ['--loud', 'once'], ['once', 'twice'], ['-v', '-q', 'once'],
                                       ['replay', '--limit', '0'], ['replay', '--limit', 'all']])
def test_64_is_a_command_line_that_is_wrong(nsqd, program, arguments):
    """One line says so."""
    program.configure(nsqd)
    line, = program.run(*arguments, expect=os.EX_USAGE).stderr.splitlines()
    assert line.startswith('x-msrv') and '--help' in line


def test_130_is_an_interrupted_check_without_a_word(program):
    with proxies.Says() as silent:
        program.configure(nsq={'nsqd-tcp-address': silent.address})
        running = program.start('check', '--connect')
        servers.wait_until(lambda: silent.taken, 'it is connected')
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=10) == 130
    assert 'Traceback' not in program.log.read_text()


@pytest.mark.parametrize('number, command, status', [
    (signal.SIGTERM, ['once'], 0), (signal.SIGTERM, ['daemon'], 0), (signal.SIGTERM, ['check'], 143),
    (signal.SIGINT, ['once'], 0), (signal.SIGINT, ['replay'], 0), (signal.SIGINT, ['config', '--sample'], 130)])
def test_a_signal_that_comes_before_all_else_is_heard(nsqd, program, workdir, monkeypatch, number, command, status):
    """While it is still importing: here for long. Not a word is said."""
    running = importing(nsqd, program, workdir, monkeypatch, command)
    running.send_signal(number)
    assert (running.wait(timeout=10), program.log.read_text()) == (status, '')


def test_a_hangup_that_comes_before_all_else_does_not_end_a_daemon(nsqd, program, workdir, monkeypatch):
    """It is about to read its file anyway."""
    running = importing(nsqd, program, workdir, monkeypatch, ['daemon'])
    running.send_signal(signal.SIGHUP)
    running.send_signal(signal.SIGTERM)
    assert (running.wait(timeout=10), program.log.read_text()) == (0, '')


def importing(nsqd, program, workdir, monkeypatch, command):
    """A process of the program that is importing, for as long as it lives."""
    (workdir / 'voluptuous.py').write_text('import threading\nopen("importing", "w")\nwhile True:\n'
                                           '    threading.Event().wait(0.1)\n')
    monkeypatch.setenv('PYTHONPATH', str(workdir))
    program.configure(nsqd)
    running = program.start(*command)
    wait_until((workdir / 'importing').exists, 'it is importing')
    return running


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_after_all_else_changes_nothing(nsqd, program, workdir, changed, number):
    """While the textfile is written: here for long."""
    changed('import threading, xmsrv\nwrite = xmsrv.write_textfile\ndef slow(*arguments):\n    open("writing", "w")\n'
            '    threading.Event().wait(1)\n    write(*arguments)\nxmsrv.write_textfile = slow\n')
    nsqd.publish(TOPIC, good(3))
    program.configure(nsqd, metrics={'textfile': workdir / 'x.prom'})
    running = program.start('once')
    wait_until((workdir / 'writing').exists, 'it is at its end')
    running.send_signal(number)
    assert running.wait(timeout=10) == 0 and (workdir / 'x.prom').exists()
    assert 'Traceback' not in program.log.read_text()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_ends_once_with_0(nsqd, program, number):
    """From the first handler to the window."""
    nsqd.create(TOPIC, CHANNEL)
    program.configure(nsqd, timeout='60s', idle_timeout='60s')
    for moment in range(0, 400, 40):
        running = program.start('once')
        wait_until(lambda running=running: servers.handles(running, signal.SIGTERM), 'it has its first handler')
        wait_until(passed(moment / 1000), 'it is somewhat further')
        running.send_signal(number)
        assert running.wait(timeout=10) == 0
    assert 'Traceback' not in program.log.read_text()


def test_a_closed_stderr_is_no_fault(nsqd, program):
    program.configure(nsqd)
    command = ['sh', '-c', f'exec {servers.PROGRAM} -c {program.path} once 2>&-']
    assert subprocess.run(command, check=False, timeout=30).returncode == 0


@pytest.mark.parametrize('where', ['file', '-'])
def test_65_is_a_message_that_is_no_record(program, workdir, where):
    """Reason and detail on stderr, as its dead letter would have them; nothing on stdout."""
    program.configure(nsq={'nsqd-tcp-address': '127.0.0.1:9'}, message=STRICT)
    ran = checked(program, workdir, where, b'{"id": "1"}', expect=os.EX_DATAERR)
    assert (ran.stdout, ran.stderr) == ('', 'error: schema: id: not an integer\n')


@pytest.mark.parametrize('command', [['once'], ['replay'], ['replay', '--list'], ['check', '--connect']])
def test_69_is_a_queue_out_of_reach(nsqd, program, command):
    """It says which."""
    nsqd.kill()
    program.configure(nsqd)
    assert f'nsqd {nsqd.tcp}' in program.run(*command, expect=os.EX_UNAVAILABLE).stderr.replace('reached: ', 'nsqd ')


@pytest.mark.parametrize('command', [['once'], ['replay'], ['check', '--connect']])
def test_69_is_a_store_out_of_reach(nsqd, program, workdir, command):
    """Its directory is a file. Nothing was taken."""
    (workdir / 'file').touch()
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, good(3))
    program.configure(nsqd, sqlite={'path': workdir / 'file' / 'records.sqlite'})
    assert 'records.sqlite' in program.run(*command, expect=os.EX_UNAVAILABLE).stderr
    assert nsqd.stats(TOPIC, CHANNEL)['depth'] == 3


@pytest.mark.parametrize('loud', [[], ['-v']])
def test_70_is_what_nobody_foresaw(program, changed, loud):
    """A line says what it was; the traceback is for -v."""
    changed('import xmsrv\nxmsrv.sample_config = lambda: 1 / 0\n')
    said = program.run(*loud, 'config', '--sample', expect=os.EX_SOFTWARE).stderr
    assert said.startswith('error: internal error: ZeroDivisionError: ')
    assert ('Traceback' in said) == bool(loud)


PRINTING = [['--help'], ['replay', '--help'], ['--version'], ['config', '--sample'], ['config'], ['completion', 'bash'],
            ['completion', 'zsh'], ['check'], ['check', '--connect'], ['check', '--message', 'message'],
            ['replay', '--list'], ['replay', '--dry-run', '--json']]


@pytest.fixture(params=['1', ''], ids=['unbuffered', 'buffered'])
def printing(request, nsqd, program, workdir, monkeypatch):
    """A configuration and a dead letter, so that each of PRINTING has something to print, by both modes of stdout."""
    monkeypatch.setenv('PYTHONUNBUFFERED', request.param)
    nsqd.publish(TOPIC, '[]')
    program.once(nsqd)
    (workdir / 'message').write_text('{"id": 1}')
    return program


@pytest.mark.parametrize('arguments', PRINTING, ids=' '.join)
def test_74_is_a_full_disk_behind_stdout(nsqd, printing, arguments):
    """One line says so, whatever prints; the dead letters that were to be listed are still there."""
    with open('/dev/full', 'w') as full:
        process = printing.popen(*arguments, stdout=full, stderr=subprocess.PIPE)
        said = process.communicate(timeout=30)[1]
    faults = [line for line in said.splitlines() if ' would be stored, ' not in line]   # that count is for stderr
    assert (process.returncode, faults) == (os.EX_IOERR, ['error: standard output: No space left on device'])
    wait_until(lambda: nsqd.stats(DEAD, REPLAY)['in_flight_count'] == 0, 'none is held')
    assert nsqd.left(DEAD, REPLAY) == 1


def without(descriptors, program, *arguments):
    """The CompletedProcess of a command that has these of its three standard descriptors closed."""
    closed = ' '.join(f'{fd}{"<" if fd == 0 else ">"}&-' for fd in descriptors)
    return subprocess.run(['sh', '-c', f'exec "$@" {closed}', 'sh', servers.PROGRAM, '-c', program.path, *arguments],
                          cwd=program.directory, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize('arguments', PRINTING, ids=' '.join)
def test_74_is_a_stdout_that_is_closed(nsqd, printing, arguments):
    """As on a full disk: who asked would take nothing for the answer."""
    ran = without([1], printing, *arguments)
    faults = [line for line in ran.stderr.splitlines() if ' would be stored, ' not in line]
    assert (ran.returncode, faults) == (os.EX_IOERR, ['error: standard output: Bad file descriptor'])
    wait_until(lambda: nsqd.stats(DEAD, REPLAY)['in_flight_count'] == 0, 'none is held')
    assert nsqd.left(DEAD, REPLAY) == 1


@pytest.mark.parametrize('descriptors', [[1], [2], [0, 1, 2]], ids=str)
def test_no_file_gets_the_number_of_a_closed_standard_descriptor(nsqd, program, workdir, changed, descriptors):
    """What a library writes to 1 or 2 would land in the database. A command that prints nothing does not fail."""
    changed('import os, xmsrv\nopens = xmsrv.SqliteStore.open\ndef opened(self):\n    opens(self)\n'
            '    open("files", "w").write("\\n".join(os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)))\n'
            'xmsrv.SqliteStore.open = opened\n')
    nsqd.publish(TOPIC, good(3))
    program.configure(nsqd)
    assert without(descriptors, program, 'once').returncode == 0
    files = (workdir / 'files').read_text().splitlines()
    assert [files[fd] for fd in descriptors] == [os.devnull] * len(descriptors)
    assert len(program.rows()) == 3


@pytest.mark.parametrize('arguments', PRINTING, ids=' '.join)
def test_0_is_a_reader_that_has_gone(printing, arguments):
    """As with `| head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    process = printing.popen(*arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert 'error' not in process.communicate(timeout=30)[1] and process.returncode == 0


@pytest.mark.parametrize('command', [['once'], ['check'], ['config', '--sample']])
def test_a_full_disk_behind_stderr_changes_no_status(nsqd, program, command):
    """What is said is lost; what is done is done."""
    nsqd.publish(TOPIC, good(3))
    program.configure(nsqd)
    with open('/dev/full', 'w') as full:
        assert program.popen('-v', *command, stdout=subprocess.DEVNULL, stderr=full).wait(timeout=30) == 0
    assert len(program.rows()) == (3 if command == ['once'] else 0)


ASCII = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}


def test_what_is_printed_to_a_pipe_is_utf8(nsqd, program, monkeypatch):
    """Whatever the locale: it is how a configuration is read, and this one can be read again."""
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    program.configure(nsqd, sqlite={'set': 'S\u00e3o Paulo \u6771\u4eac'})
    process = program.popen('config', stdout=subprocess.PIPE, encoding='utf-8')
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and 'S\u00e3o Paulo \u6771\u4eac' in printed
    program.write(printed)
    program.run('check')


def test_what_the_encoding_of_a_terminal_lacks_is_escaped(nsqd, program):
    program.configure(nsqd, sqlite={'set': 'S\u00e3o Paulo'})
    seen = on_a_terminal(program, 'config', stream='stdout', **ASCII)
    assert r'S\xe3o Paulo' in seen


def test_a_name_that_is_no_utf8_can_be_printed(nsqd, program, workdir):
    """That of the file itself."""
    program.path = workdir / os.fsdecode(b'\xff.conf')
    program.configure(nsqd)
    assert program.run('check').stdout == f'{workdir}/\\udcff.conf: no fault found\n'


def test_75_is_a_dead_letter_that_nobody_keeps(nsqds, program):
    """The last line says how many messages went back, and why."""
    refused_letter(*nsqds(1, '--max-msg-size=2000'), program)
    last = program.run('once', expect=os.EX_TEMPFAIL).stderr.splitlines()[-1]
    assert last == 'error: requeued 1 messages: 1 dead letters could not be kept'


@pytest.mark.parametrize('command', [['once'], ['replay'], ['check'], ['config']])
def test_78_is_a_fault_in_the_configuration(nsqd, program, command):
    """Each line names the file, the option, the value and the rule."""
    program.configure(nsqd, nsq={'max-messages': 'many'})
    line, = program.run(*command, expect=os.EX_CONFIG).stderr.splitlines()
    assert line == f'error: {program.path}: [nsq] max-messages = many: not a whole number'


@pytest.mark.parametrize('command', [['once'], ['daemon'], ['replay'], ['check'], ['check', '--message', '-'],
                                     ['config']])
@pytest.mark.parametrize('path, fault', [('nowhere/x.conf', 'No such file or directory'), ('.', 'Is a directory')])
def test_69_is_a_configuration_file_that_cannot_be_read(program, workdir, command, path, fault):
    """It may be there at the next try; 78 would keep systemd from one."""
    program.path = workdir / path
    assert program.run(*command, expect=os.EX_UNAVAILABLE).stderr == f'error: {program.path}: {fault}\n'


@pytest.mark.parametrize('arguments', [['--help'], ['--version'], ['config', '--sample'], ['replay', '--help']])
def test_0_is_a_question_answered(program, arguments):
    """Without any configuration."""
    ran = program.run(*arguments)
    assert ran.stdout and not ran.stderr


# ------------------------------------------------------------------------------------------------------ check --message

def checked(program, workdir, where, body, expect=0):
    """`check --message` of a body in a file or on standard input; it needs neither queue nor store."""
    (workdir / 'message').write_bytes(body)
    with (workdir / 'message').open('rb') as file:
        name = '-' if where == '-' else file.name
        ran = subprocess.run([servers.PROGRAM, '-c', program.path, 'check', '--message', name], stdin=file,
                             capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == expect, ran.stderr
    return ran


@pytest.mark.parametrize('where', ['file', '-'])
def test_check_shows_the_record_of_a_message(program, workdir, where):
    """Key, set, and the bins with the types that Aerospike has for them."""
    body = {'id': 8, 'msg': 'gr\u00fc\u00df \x1b[2J', 'f': 1.0, 'yes': True, 'l': [1, None], 'm': {'a': {}}, 'no': None}
    program.configure(nsq={'nsqd-tcp-address': '127.0.0.1:9'}, record={'bins': {'msg': 'text'}})
    ran = checked(program, workdir, where, json.dumps(body, ensure_ascii=False).encode() + b'\n')
    assert ran.stderr == ''
    assert ran.stdout.splitlines() == [
        'set   orders', 'key   string  $id (made by nsqd)', 'bin   id    integer  8',
        'bin   text  string   "gr\\u00fc\\u00df \\u001b[2J"', 'bin   f     float    1.0', 'bin   yes   boolean  true',
        'bin   l     list     [1, null]', 'bin   m     map      {"a": {}}', 'bin   gid   string   $id (made by nsqd)']
    assert not program.database.exists()


def test_check_shows_a_key_and_a_time_of_the_message(program, workdir):
    """In the set of the store that is chosen; a time that nsqd makes can't be known before."""
    settings = {'nsq': {'nsqd-tcp-address': '127.0.0.1:9'}, 'store': 'aerospike',
                'aerospike': {'hosts': '127.0.0.1:9', 'namespace': 'test', 'set': 'shop'}}
    for time, bin_of_time in (('$timestamp', '$timestamp (made by nsqd)'), ('at', '77')):
        program.configure(**settings, record={'key': 'order', 'id-bin': '', 'time': time})
        lines = checked(program, workdir, '-', b'{"order": 5, "at": 77}').stdout.splitlines()
        assert lines == ['set   shop', 'key   integer  5', 'bin   order  integer  5', 'bin   at     integer  77',
                         f'bin   gts    integer  {bin_of_time}']


def test_64_is_a_message_from_a_stdin_that_is_closed(nsqd, program):
    program.configure(nsqd)
    ran = without([0], program, 'check', '--message', '-')
    assert (ran.returncode, ran.stderr) == (os.EX_USAGE, 'error: --message -: Bad file descriptor\n')


@pytest.mark.parametrize('arguments', [['--message', '/nonexistent'], ['--message', '/'], ['--message'],
                                       ['--message', '-', '--connect']])
def test_64_is_a_message_that_cannot_be_read_or_one_too_many_questions(nsqd, program, arguments):
    program.configure(nsqd)
    line, = program.run('check', *arguments, expect=os.EX_USAGE).stderr.splitlines()
    assert '--message' in line


# ------------------------------------------------------------------------------------------------------ check --connect

def test_check_says_what_it_found_and_makes_nothing(nsqd, program):
    """Version and depth; no topic, no channel, no message touched."""
    program.configure(nsqd)
    ran = program.run('check', '--connect')
    assert f'nsqd {nsqd.tcp}: version 1.3.0' in ran.stdout and 'depth of orders/x-msrv 0' in ran.stdout
    assert str(program.database) in ran.stdout and ' 0 records' in ran.stdout
    assert not json.loads(nsqd.request('GET', '/stats', format='json'))['topics']


@pytest.mark.parametrize('way', ['nsqd', 'lookupd'])
def test_check_says_the_depth(nsqds, nsqlookupd, program, way):
    """Of each nsqd, named or found."""
    pair = nsqds(2, lookupd=[nsqlookupd])
    for number, nsqd in enumerate(pair, 1):
        nsqd.create(TOPIC, CHANNEL)
        nsqd.publish(TOPIC, good(number))
    wait_until(lambda: [nsqd.stats(TOPIC, CHANNEL)['depth'] for nsqd in pair] == [1, 2], 'all are in the channel')
    wait_until(lambda: len(nsqlookupd.producers(TOPIC)) == 2, 'both are known')
    program.configure(pair if way == 'nsqd' else nsqlookupd)
    lines = [line for line in program.run('check', '--connect').stdout.splitlines() if 'depth of' in line]
    assert sorted(re.search(r'depth of orders/x-msrv (\d+) ', line)[1] for line in lines) == ['1', '2']
    assert {line.split()[1].rstrip(':') for line in lines} == {nsqd.tcp for nsqd in pair}


def test_check_says_what_waits_in_a_topic_for_a_channel_that_is_not_made_yet(nsqd, program):
    nsqd.create(TOPIC)
    nsqd.publish(TOPIC, good(37))
    program.configure(nsqd)
    assert 'depth of orders/x-msrv 37 (topic 37, which the channel gets' in program.run('check', '--connect').stdout
    stats, = json.loads(nsqd.request('GET', '/stats', format='json'))['topics']
    assert (stats['depth'], stats['channels']) == (37, [])


def test_check_says_what_is_paused_and_who_is_connected(nsqd, program):
    """Four messages have gone on to the channel before the topic was paused, too; a daemon is subscribed."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.pause(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, good(4))
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] == 4, 'they are in the channel')
    program.configure(nsqd, period='0')
    program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'the daemon is subscribed')
    assert described(program) == 'depth of orders/x-msrv 4 (topic 0, channel 4), clients 1, channel paused'
    nsqd.pause(TOPIC)
    nsqd.publish(TOPIC, good(3))
    assert (described(program)
            == 'depth of orders/x-msrv 7 (topic 3, channel 4), clients 1, topic paused, channel paused')
    nsqd.unpause(TOPIC, CHANNEL)
    wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['depth'], 'the daemon has taken them')
    assert described(program) == 'depth of orders/x-msrv 3 (topic 3, channel 0), clients 1, topic paused'


def described(program):
    """What check says of the topic and the channel."""
    return re.search(r'depth of .*', program.run('check', '--connect').stdout)[0]


def test_check_says_protocol_and_days_of_the_certificate(nsqds, program, workdir):
    """30 days from now, less what has gone by."""
    authority = trustme.CA()
    expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30, hours=1)
    issued = authority.issue_cert('127.0.0.1', not_after=expiry)
    authority.cert_pem.write_to_path(workdir / 'ca.pem')
    issued.cert_chain_pems[0].write_to_path(workdir / 'cert.pem')
    issued.private_key_pem.write_to_path(workdir / 'key.pem')
    nsqd, = nsqds(1, tls=(workdir / 'cert.pem', workdir / 'key.pem'))
    program.configure(nsqd, nsq={'tls': {'ca-file': workdir / 'ca.pem'}})
    ran = program.run('check', '--connect')
    assert 'TLSv1.3, certificate valid for 30 days' in ran.stdout


def test_check_reports_each_end_that_is_down(nsqds, program, workdir):
    """The store, and one of two nsqds; what is up is still told of."""
    up, down = nsqds(2)
    down.kill()
    (workdir / 'file').touch()
    program.configure([up, down], sqlite={'path': workdir / 'file' / 'records.sqlite'})
    ran = program.run('check', '--connect', expect=os.EX_UNAVAILABLE)
    assert f'nsqd {up.tcp}: version' in ran.stdout
    assert f'error: nsqd {down.tcp}: ' in ran.stderr and 'records.sqlite' in ran.stderr


def check_in_order(program):
    """(status, lines) of check --connect: both streams, as a terminal shows them."""
    process = program.popen('check', '--connect', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    told = process.communicate(timeout=30)[0]
    return process.returncode, told.splitlines()


def test_check_says_that_there_is_no_fault_once_each_end_has_answered(nsqds, program):
    """What was checked, each end with its result, and the verdict last."""
    pair = nsqds(2)
    program.configure(pair)
    status, lines = check_in_order(program)
    first, store, *ends, last = lines
    assert (status, first, last) == (0, f'{program.path}: valid', f'{program.path}: no fault found')
    assert store.startswith(f'sqlite {program.database}: 0 records')
    assert [end.partition(': version')[0] for end in ends] == [f'nsqd {nsqd.tcp}' for nsqd in pair]


@pytest.mark.parametrize('down', ['nsqd', 'store', 'path'])
def test_check_finds_no_file_faultless_whose_ends_fail(nsqds, program, workdir, down):
    """Each end has its line in the order of the others, also where it fails."""
    first, second = nsqds(2)
    settings = {}
    if down == 'nsqd':
        first.kill()
    elif down == 'store':
        program.database.write_text('no database; ' * 10)
    else:
        settings = {'state_dir': workdir / 'file' / 'state'}
        (workdir / 'file').touch()
    program.configure([first, second], **settings)
    status, lines = check_in_order(program)
    expected = [f'{program.path}: valid', f'sqlite {program.database}: ', f'nsqd {first.tcp}: ', f'nsqd {second.tcp}: ']
    failing = {'store': 1, 'nsqd': 2}.get(down, 1)
    if down == 'path':
        expected.insert(1, f'{program.path}: state-dir = ')
    expected[failing] = 'error: ' + expected[failing]
    assert status == os.EX_UNAVAILABLE
    assert [line[:len(start)] for line, start in zip(lines, expected, strict=True)] == expected, lines


def test_check_reports_lookupds_that_are_down(nsqlookupd, program):
    """All of them."""
    nsqlookupd.kill()
    program.configure(nsqlookupd)
    assert nsqlookupd.http in program.run('check', '--connect', expect=os.EX_UNAVAILABLE).stderr
