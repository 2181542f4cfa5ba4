"""`replay`: dead letters of a topic or a file once more, under their first key; all else stays."""
import base64
import contextlib
import fcntl
import json
import math
import os
import re
import resource
import signal
import sqlite3
import stat
import threading
import time

import pytest

import servers
from flows import CHANNEL, DEAD, RELAXED, REPLAY, STRICT, TOPIC, bury, unfit
from servers import wait_until
from xmsrv import append_durably

CUT = [b'{"cut', b'[7', b'{"id": 1}}']   # these fit nothing


def letter(**members):
    """A dead letter as somebody else would publish it."""
    header = {'reason': 'schema', 'detail': 'x', 'id': '0123456789abcdef', 'timestamp': '5', 'attempts': 1, **members}
    return json.dumps(header).encode() + b'\n{"id": 1}'


def ids(program):
    """The `id` of each record, in order: twice in the list where a message became two records."""
    return sorted(int(bins['id']) for _, _, bins, _ in program.rows())


# ----------------------------------------------------------------------------------------------------------- of a topic

def test_replay_stores_under_the_key_of_the_first_delivery(nsqd, program, workdir):
    """Another channel of the topic gets the same messages, and is read with the relaxed schema from the start."""
    for channel in (CHANNEL, 'other'):
        nsqd.create(TOPIC, channel)
    bury(program, nsqd, unfit(50))
    program.configure(nsqd, message=RELAXED)
    count = servers.summary(program.run('replay').stderr)
    assert (count['received'], count['stored'], count['requeued']) == (50, 50, 0)
    assert (nsqd.left(DEAD, REPLAY), nsqd.left(TOPIC, CHANNEL)) == (0, 0)
    replayed = program.records()
    assert ids(program) == list(range(50))
    program.database = workdir / 'other.sqlite'
    program.once(nsqd, channel='other', message=RELAXED)
    assert program.records() == replayed


def test_replay_killed_in_the_middle_and_run_again_leaves_one_record_each(nsqds, program):
    """What the killed one held comes back after msg-timeout and is stored under the same key."""
    nsqd, = nsqds(1, '--msg-timeout=1s')
    bury(program, nsqd, unfit(3000))
    nsqd.restart()   # it looks for timeouts in a new channel only after 5 s, in one that it starts with at once
    execute(program, '''
        CREATE VIEW burn AS
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT i FROM n;
        CREATE TRIGGER slow BEFORE INSERT ON records WHEN (SELECT max(i) FROM burn) > 0 BEGIN SELECT 1; END''')
    program.configure(nsqd, message=RELAXED)
    process = program.start('replay')
    wait_until(program.rows, 'a first batch is stored', 30)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(program.rows()) < 3000
    execute(program, 'DROP TRIGGER slow')
    wait_until(lambda: not nsqd.stats(DEAD, REPLAY)['in_flight_count'], 'nsqd takes back what the dead one held')
    program.run('replay')
    assert ids(program) == list(range(3000))
    assert nsqd.left(DEAD, REPLAY) == 0


def execute(program, script):
    """A script in the test's own connection to the store."""
    with contextlib.closing(sqlite3.connect(program.database, timeout=60)) as connection:
        connection.executescript(script)


def test_what_fails_again_stays_a_dead_letter_and_is_reported(nsqd, program):
    """Held to the end of the pass, so that it comes round once; then back in the channel at once."""
    still = [b'{"cut', b'[7]', b'caf\xe9']
    bury(program, nsqd, [*still, *unfit(6)])
    program.configure(nsqd, message=RELAXED)
    ran = program.run('replay')
    count = servers.summary(ran.stderr)
    assert (count['received'], count['stored'], count['requeued']) == (9, 6, 3)
    now = nsqd.stats(DEAD, REPLAY)
    assert (now['depth'], now['in_flight_count'], now['requeue_count']) == (3, 0, 3)
    listed = [json.loads(line)['id'] for line in program.run('replay', '--list', '--json').stdout.splitlines()]
    assert sorted(re.findall('([0-9a-f]{16}) stays a dead letter', ran.stderr)) == sorted(listed)
    assert sorted(body for _, body in nsqd.letters(DEAD)) == sorted(still)
    assert ids(program) == list(range(6))


@pytest.mark.parametrize('letter', [
    b'{"id": 1}', b'no letter at all', b'{"reason": "schema", "id": "0123456789abcdef"}\n{"id": 1}', b'[]\n[]',
    b'\xff\n{}', b'[' * 200_000, letter(timestamp=math.inf), letter(timestamp='9' * 400),
    letter(timestamp='-1' + '0' * 30), letter(reason='no such reason'), letter(reason=['schema']),
    letter(attempts=None),
], ids=lambda letter: ascii(letter[:40]))
def test_a_letter_that_cannot_be_read_stays_and_is_reported(nsqd, program, letter):
    """It may be anybody's; the one beside it is replayed."""
    bury(program, nsqd, unfit(1))
    nsqd.publish(DEAD, letter)
    program.configure(nsqd, message=RELAXED)
    listed = program.run('replay', '--list').stdout
    assert 'unreadable' in listed and 'first 2 of depth 2' in listed
    ran = program.run('replay')
    assert 'stays a dead letter' in ran.stderr and 'not a dead letter of x-msrv' in ran.stderr
    assert ids(program) == [0]
    assert nsqd.drain(DEAD, REPLAY) == [letter]


@pytest.mark.parametrize('order', ['letter first', 'letter last'])
def test_replay_never_puts_an_old_message_over_a_newer_record(nsqd, program, order):
    """With a field as key the newest wins, by the time at which it was first published."""
    record = {'key': 'order'}
    bad, fine = b'{"order": 1, "id": "bad"}', b'{"order": 1, "id": 5}'
    for body in [bad, fine] if order == 'letter first' else [fine, bad]:
        nsqd.publish(TOPIC, body)
        program.once(nsqd, message=STRICT, record=record)
    assert {key: bins['id'] for key, bins in program.records().items()} == {1: 5}
    program.configure(nsqd, message=RELAXED, record=record)
    count = servers.summary(program.run('replay').stderr)
    expected = (0, 1, 5) if order == 'letter first' else (1, 0, 'bad')
    assert (count['stored'], count['stale'], program.records()[1]['id']) == expected
    assert nsqd.left(DEAD, REPLAY) == 0


def test_what_anybody_wrote_reaches_no_terminal_as_it_is(nsqd, program):
    """Neither escape sequences nor lines of its own."""
    bury(program, nsqd, unfit(1))
    nsqd.publish(DEAD, letter(detail='\x1b[2J\nfirst 9 of depth 9 \ud800', id='\x1b[31m'))
    listed = program.run('replay', '--list').stdout
    assert len(listed.splitlines()) == 3
    assert listed.isascii() and listed.replace('\n', '').isprintable()


def test_the_list_shows_as_many_as_it_says_whatever_their_size(nsqd, program):
    """Those that it holds are in flight to the end: RDY has to be so much higher."""
    bury(program, nsqd, unfit(25, text='x' * 200_000), nsq={'max-in-flight': 3})
    assert program.run('replay', '--list').stdout.splitlines()[-1] == f'first 20 of depth 25 in {DEAD}'


@pytest.mark.parametrize('outage', ['queue', 'store'])
def test_replay_ends_when_nothing_moves_for_timeout(nsqd, program, outage):
    """Its letters stay where they are."""
    bury(program, nsqd, unfit(5))
    nsqd.pause(DEAD, REPLAY)
    program.configure(nsqd, message=RELAXED, timeout='2s', idle_timeout='60s')
    running = program.start('replay')
    wait_until(lambda: nsqd.stats(DEAD, REPLAY)['clients'], 'replay is subscribed, its store open')
    if outage == 'queue':
        nsqd.kill()
        assert running.wait(timeout=20) == 0
        return
    with program.locked():
        nsqd.unpause(DEAD, REPLAY)
        assert running.wait(timeout=30) == os.EX_TEMPFAIL
    assert (program.rows(), nsqd.left(DEAD, REPLAY)) == ([], 5)


def test_the_list_shows_each_letter_and_changes_nothing(nsqd, program):
    """Reason, detail, id and the first bytes of the body; every letter is in the channel as before."""
    bodies = [b'{"cut', *unfit(3), b'[' + b'1,' * 500 + b'1]']
    bury(program, nsqd, bodies)
    for path in program.directory.glob('records.sqlite*'):
        path.unlink()
    listed = program.run('replay', '--list').stdout.splitlines()
    assert listed[-1] == f'first 5 of depth 5 in {DEAD}'
    assert not program.database.exists()
    now = nsqd.stats(DEAD, REPLAY)
    assert (now['depth'], now['in_flight_count']) == (5, 0)
    for header, body in nsqd.letters(DEAD):
        line, = (each for each in listed if each.startswith(header['id']))
        assert f"{header['reason']}: {header['detail']}" in line
        assert body[:40].decode() in line
        assert len(line) < 200


def test_the_list_ends_at_its_limit(nsqd, program):
    """And says how many there are."""
    bury(program, nsqd, unfit(10))
    listed = program.run('replay', '--list', '--limit', '3').stdout.splitlines()
    assert len(listed) == 4
    assert listed[-1] == f'first 3 of depth 10 in {DEAD}'
    now = nsqd.stats(DEAD, REPLAY)
    assert (now['depth'], now['in_flight_count']) == (10, 0)


@pytest.mark.parametrize('arguments', [('replay',), ('replay', '--list')])
@pytest.mark.parametrize('topic', ['empty', 'not there'])
def test_replay_of_nothing_ends_soon(nsqd, program, arguments, topic):
    """Long before its window would."""
    if topic == 'empty':
        nsqd.create(DEAD, REPLAY)
    program.configure(nsqd, timeout='120s')
    program.run(*arguments, timeout=30)
    assert program.rows() == []

# -------------------------------------------------------------------------------------- of a topic, some of the letters

def left_out(stderr):
    """How many letters a pass says it left out."""
    found = re.findall(r'^(\d+) of them were excluded', stderr, re.MULTILINE)
    return int(found[0]) if found else 0


def test_only_letters_of_a_reason(nsqd, program):
    """The others stay, and are no failures."""
    bury(program, nsqd, [*CUT, *unfit(6)])
    nsqd.publish(DEAD, b'no letter')
    program.configure(nsqd, message=RELAXED)
    ran = program.run('replay', '--reason', 'schema', '--reason', 'key')
    count = servers.summary(ran.stderr)
    assert (count['received'], count['stored'], count['requeued'], left_out(ran.stderr)) == (10, 6, 4, 4)
    assert 'stays a dead letter' not in ran.stderr and 'max-in-flight' in ran.stderr
    assert (ids(program), nsqd.left(DEAD, REPLAY)) == (list(range(6)), 4)


def test_only_letters_of_late(nsqd, program):
    """By the time at which the message was published first."""
    bury(program, nsqd, unfit(3, first=2))
    nsqd.publish(DEAD, [letter(), letter(timestamp=str(time.time_ns() - 7200 * 10 ** 9), id='fedcba9876543210')])
    program.configure(nsqd, message=RELAXED)
    ran = program.run('replay', '--since', '1h')
    assert (ids(program), left_out(ran.stderr)) == ([2, 3, 4], 2)
    assert servers.summary(program.run('replay', '--since', '3h').stderr)['stored'] == 1
    assert nsqd.drain(DEAD, REPLAY) == [letter()]


def test_at_most_so_many(nsqd, program):
    """Exactly, and the rest is not even delivered."""
    bury(program, nsqd, unfit(50))
    program.configure(nsqd, message=RELAXED)
    count = servers.summary(program.run('replay', '--limit', '7').stderr)
    assert (count['received'], count['stored'], nsqd.left(DEAD, REPLAY)) == (7, 7, 43)
    assert sorted(nsqd.attempts(DEAD, REPLAY)) == [1] * 43


def test_at_most_so_many_of_those_that_were_asked_for(nsqd, program):
    """What is left out does not count."""
    bury(program, nsqd, CUT * 10)
    bury(program, nsqd, unfit(5))
    program.configure(nsqd, message=RELAXED)
    ran = program.run('replay', '--limit', '3', '--reason', 'schema')
    assert (len(ids(program)), nsqd.left(DEAD, REPLAY)) == (3, 32)
    assert left_out(ran.stderr) >= 1


def test_a_filter_looks_at_as_many_as_may_be_held(nsqd, program):
    """And ends then, long before its timeout; it says how many that are."""
    bury(program, nsqd, CUT * 10)
    bury(program, nsqd, unfit(5))
    program.configure(nsqd, message=RELAXED, nsq={'max-in-flight': 10}, timeout='50s')
    ran = program.run('replay', '--reason', 'schema', timeout=30)
    count = servers.summary(ran.stderr)
    assert count['received'] - count['stored'] == left_out(ran.stderr) == 10
    assert 'max-in-flight = 10' in ran.stderr
    assert nsqd.left(DEAD, REPLAY) == 35 - count['stored']


def test_at_most_so_many_a_second(nsqd, program):
    """From the first batch on; each is stored."""
    bury(program, nsqd, unfit(10))
    program.configure(nsqd, message=RELAXED, timeout='1s')
    count = servers.summary(program.run('replay', '--rate', '5').stderr)
    assert (ids(program), nsqd.left(DEAD, REPLAY)) == (list(range(10)), 0)
    assert 9 / 5 <= count['seconds'] < 6


@pytest.mark.parametrize('where', ['topic', 'file'])
def test_a_signal_ends_it_and_the_rest_can_be_run_again(nsqd, program, workdir, where):
    """At once, with 0."""
    path = workdir / 'dead.json'
    settings = {} if where == 'topic' else in_file(path)
    bury(program, nsqd, unfit(10), **settings)
    program.configure(nsqd, message=RELAXED, **settings)
    running = program.start('replay', '--rate', '1')
    wait_until(program.rows, 'a letter is stored', 30)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=5) == 0
    stored = len(program.rows())
    assert 1 <= stored < 10
    if where == 'topic':
        now = nsqd.stats(DEAD, REPLAY)
        assert (now['depth'], now['in_flight_count']) == (10 - stored, 0)
    else:
        assert len(path.read_bytes().splitlines()) == 10 - stored
    program.run('replay')
    assert ids(program) == list(range(10))


def test_a_dry_run_says_what_would_become_of_each(nsqd, program):
    """By today's schema; nothing is stored, and all is handed back."""
    bury(program, nsqd, [*CUT, *unfit(6)])
    nsqd.publish(DEAD, b'no letter')
    for path in program.directory.glob('records.sqlite*'):
        path.unlink()
    for message, passes, why in ((RELAXED, 6, 'invalid-json: '), (STRICT, 0, 'schema: id: not an integer')):
        program.configure(nsqd, message=message)
        lines = program.run('replay', '--dry-run').stdout.splitlines()
        assert sum(line.endswith('would be stored') for line in lines) == passes
        assert any(f'would stay: {why}' in line for line in lines)
        assert lines[-1] == f'{passes} would be stored, {10 - passes} would stay; first 10 of depth 10 in {DEAD}'
        told = jsons(program.run('replay', '--dry-run', '--json', '--reason', 'schema'))
        assert {each['passes'] for each in told} == {bool(passes)} and len(told) == 6
        assert all(('why' in each) != each['passes'] for each in told)
    now = nsqd.stats(DEAD, REPLAY)
    assert (now['depth'], now['in_flight_count'], program.database.exists()) == (10, 0, False)


def jsons(ran):
    """What a command printed, as the object that each line is."""
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize('where', ['topic', 'file'])
def test_the_list_as_json_has_all_that_is_known(nsqd, program, workdir, where):
    """An object a letter, and on stdout nothing else."""
    settings = {} if where == 'topic' else in_file(workdir / 'dead.json')
    body = b'{"id": "' + b'x' * 500 + b'"}'
    bury(program, nsqd, [body], **settings)
    ran = program.run('replay', '--list', '--json')
    told, = jsons(ran)
    assert set(told) == {'reason', 'detail', 'age', 'key', 'id', 'nsqd', 'attempts', 'timestamp', 'body'}
    assert (told['reason'], told['detail'], told['nsqd'], told['attempts']) == (
        'schema', 'id: not an integer', nsqd.tcp, 1)
    assert told['key'].startswith(f"{told['id']}-{int(told['timestamp']):x}-")
    assert 0 <= told['age'] < 60
    assert told['body'].startswith('{"id": "xxx') and len(told['body']) == 60
    assert 'first 1 of depth 1' in ran.stderr


def test_the_list_can_be_narrowed(nsqd, program):
    """It says of how many."""
    bury(program, nsqd, [*CUT, *unfit(3)])
    *lines, last = program.run('replay', '--list', '--reason', 'invalid-json', '--since', '1h').stdout.splitlines()
    assert len(lines) == 3 and all('invalid-json' in line for line in lines)
    assert last == f'3 of the first 6 of depth 6 in {DEAD}'


@pytest.mark.parametrize('arguments', [
    ['--json'], ['--list', '--dry-run'], ['--list', '--rate', '5'], ['--dry-run', '--rate', '5'],
    ['--reason', 'bad'], ['--since', 'yesterday'], ['--since', '5'], ['--rate', '0'], ['--limit', '0'],
    ['--file', '/nonexistent/dead.json'], ['--file', '/dev/null'], ['--file', '/']])
def test_options_that_make_no_sense_are_errors_of_usage(nsqd, program, arguments):
    program.configure(nsqd)
    line, = program.run('replay', *arguments, expect=os.EX_USAGE).stderr.splitlines()
    assert 'replay' in line


# ------------------------------------------------------------------------------------------------------------ of a file

def in_file(path, **more):
    """Settings by which dead letters go to a file alone."""
    return {'dead_letter': {'topic': '', 'file': path}, **more}


def lines_of(path):
    """The letters in a file, each as a dict, with the body as bytes."""
    letters = [json.loads(line) for line in path.read_bytes().splitlines()]
    for each in letters:
        each['body'] = each['body'].encode() if 'body' in each else base64.b64decode(each.pop('body_base64'))
    return letters


@pytest.fixture
def dead(nsqd, program, workdir):
    """A function that buries messages in a file, and gives its path; the configuration is RELAXED after that."""
    path = workdir / 'dead.json'

    def fill(bodies, **settings):
        settings = in_file(path, **settings)
        bury(program, nsqd, bodies, **settings)
        program.configure(nsqd, message=RELAXED, **settings)
        return path
    return fill


def test_a_file_is_replayed_under_the_first_keys(program, dead):
    """It is the default without a topic. What was stored leaves it."""
    path = dead(unfit(50, text='gr\u00fc\u00df dich'))
    keys = {line['key'] for line in lines_of(path)}
    count = servers.summary(program.run('replay').stderr)
    assert (count['received'], count['stored'], count['requeued']) == (50, 50, 0)
    assert (ids(program), set(program.records()), path.read_bytes()) == (list(range(50)), keys, b'')
    assert servers.summary(program.run('replay').stderr)['received'] == 0


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir], ids=['FIFO', 'directory'])
def test_something_in_the_place_of_the_new_file_is_69_and_costs_no_letter(program, dead, make):
    path = dead(unfit(5))
    there, new = path.read_bytes(), path.with_name(f'{path.name}.replay')
    make(new)
    assert f'{new}: not a regular file' in program.run('replay', expect=os.EX_UNAVAILABLE).stderr
    assert path.read_bytes() == there and new.exists() and not new.is_file()


@pytest.mark.parametrize('named', [True, False])
def test_a_file_beside_a_topic_is_asked_for(nsqd, program, workdir, named):
    """By its name, or without one."""
    bury(program, nsqd, unfit(2))
    bury(program, nsqd, unfit(2, first=2), **in_file(workdir / 'dead.json'))
    program.configure(nsqd, message=RELAXED, dead_letter={} if named else {'file': workdir / 'dead.json'})
    program.run('replay', '--file', *([workdir / 'dead.json'] if named else []))
    assert (ids(program), nsqd.left(DEAD, REPLAY)) == ([2, 3], 2)


@pytest.mark.parametrize('arguments, settings', [([], {'topic': '', 'discard': 'yes'}), (['--file'], {})])
def test_nothing_to_replay_is_a_fault(nsqd, program, arguments, settings):
    """No topic and no file, or no file."""
    program.configure(nsqd, dead_letter=settings)
    assert '[dead-letter]' in program.run('replay', *arguments, expect=os.EX_CONFIG).stderr


@pytest.mark.parametrize('arguments', [[], ['--list'], ['--dry-run']])
def test_a_file_that_is_not_there_yet_is_no_fault(nsqd, program, workdir, arguments):
    """It comes with the first dead letter, and not by replay."""
    program.configure(nsqd, **in_file(workdir / 'dead.json'))
    assert 'no dead letter to replay' in program.run('replay', *arguments).stderr
    assert not list(workdir.glob('dead.json*'))


def test_what_fails_again_stays_in_the_file_with_its_history(program, dead):
    """Body and all as before; bodies that are no text too."""
    still = [b'{"cut', b'caf\xe9']
    path = dead([*still, *unfit(3)])
    first = {line['body']: line for line in lines_of(path)}
    for times in (1, 2):
        ran = program.run('replay')
        assert ran.stderr.count('stays a dead letter: invalid-json') == 2
        assert all(f'{line["id"]} stays' in ran.stderr for line in lines_of(path))
        assert servers.summary(ran.stderr)['requeued'] == 2
        assert ids(program) == [0, 1, 2]
        now = {line['body']: line for line in lines_of(path)}
        assert set(now) == set(still)
        for body, line in now.items():
            assert len(line['history']) == times
            assert line['history'][0] == {name: first[body][name] for name in ('time', 'reason', 'detail')}
            assert all(set(entry) == {'time', 'reason', 'detail'} for entry in line['history'])
            assert line['time'] > line['history'][-1]['time'] >= line['history'][0]['time']
            assert {name: line[name] for name in ('key', 'id', 'timestamp')} == {
                name: first[body][name] for name in ('key', 'id', 'timestamp')}


def test_the_reason_is_todays_and_a_long_history_loses_its_oldest(nsqd, program, workdir):
    """20 former failures are kept."""
    path = workdir / 'dead.json'
    entry = {'time': 't', 'reason': 'schema', 'detail': 'd'}
    path.write_text(line_of(b'{"id": 1}', reason='key', detail='old', history=[entry] * 30) + '\n')
    program.configure(nsqd, message={'fields': {'id': 'string'}}, **in_file(path))
    program.run('replay')
    line, = lines_of(path)
    assert (line['reason'], line['detail'], len(line['history'])) == ('schema', 'id: not a string', 20)
    assert (line['history'][0], line['history'][-1]['reason'], line['history'][-1]['detail']) == (entry, 'key', 'old')


def line_of(text, **members):
    """A line of a file as somebody else would write it."""
    return json.dumps({'reason': 'schema', 'detail': 'x', 'id': '0123456789abcdef', 'timestamp': '5', 'attempts': 1,
                       'body': text.decode(), **members})


FOREIGN = ['no letter', '[1]', '{"reason": "schema"}', line_of(b'{}', timestamp='x'), line_of(b'{}', reason='none'),
           line_of(b'{}', body=5), line_of(b'{}', body='\ud800'), '\x00\x01', '[' * 10000,
           json.dumps({**json.loads(line_of(b'{}', id='1')), 'body': None, 'body_base64': 'e30=!'})]


@pytest.mark.parametrize('torn', ['', '{"reason": "sche', line_of(b'{"id": 7}')])
def test_foreign_and_torn_lines_stay_as_they_are(nsqd, program, workdir, torn):
    """Each is reported; the letters beside them are stored, and so is one that lacks nothing but the line's end."""
    path = workdir / 'dead.json'
    lines = [FOREIGN[0], line_of(b'{"id": 1}'), *FOREIGN[1:], '', line_of(b'{"id": 2}', id='1'), torn]
    path.write_text('\n'.join(lines))
    program.configure(nsqd, message=RELAXED, **in_file(path))
    ran = program.run('replay')
    whole = torn.endswith('}')
    assert ids(program) == [1, 2, *([7] if whole else [])]
    kept = [*FOREIGN, *([torn] if torn and not whole else [])]
    assert [line for line in path.read_text().split('\n') if line] == kept
    assert len(re.findall(r'line \d+ stays a dead letter: .* not a dead letter', ran.stderr)) == len(kept)
    bury(program, nsqd, unfit(1), **in_file(path))
    assert json.loads(path.read_text().splitlines()[-1])['body'] == unfit(1)[0].decode()


@pytest.mark.parametrize('order', ['letter first', 'letter last'])
def test_a_file_never_puts_an_old_message_over_a_newer_record(nsqd, program, workdir, order):
    """By the time at which it was first published."""
    settings = in_file(workdir / 'dead.json', record={'key': 'order'})
    bad, fine = b'{"order": 1, "id": "bad"}', b'{"order": 1, "id": 5}'
    for body in [bad, fine] if order == 'letter first' else [fine, bad]:
        nsqd.publish(TOPIC, body)
        program.once(nsqd, message=STRICT, **settings)
    program.configure(nsqd, message=RELAXED, **settings)
    count = servers.summary(program.run('replay').stderr)
    expected = (0, 1, 5) if order == 'letter first' else (1, 0, 'bad')
    assert (count['stored'], count['stale'], program.records()[1]['id']) == expected
    assert (workdir / 'dead.json').read_bytes() == b''


def test_some_of_a_file(program, dead):
    """By reason, time and number; the other lines stay byte for byte, and in their order."""
    path = dead([*CUT, *unfit(6)])
    with path.open('a') as file:
        file.write(line_of(b'{"id": 9}') + '\n')
    before = path.read_bytes().splitlines()
    ran = program.run('replay', '--reason', 'schema', '--since', '1h', '--limit', '4')
    assert servers.summary(ran.stderr)['stored'] == 4
    assert 'max-in-flight' not in ran.stderr and 'stays a dead letter' not in ran.stderr
    after = path.read_bytes().splitlines()
    assert len(after) == 6 and [line for line in before if line in after] == after
    ran = program.run('replay', '--reason', 'schema', '--rate', '100')
    assert (servers.summary(ran.stderr)['stored'], left_out(ran.stderr)) == (3, 3)
    assert [line['reason'] for line in lines_of(path)] == ['invalid-json'] * 3


@pytest.mark.parametrize('arguments, last', [
    (['--list'], 'first 20 of depth 25'), (['--list', '--limit', '3'], 'first 3 of depth 25'),
    (['--list', '--reason', 'invalid-json'], '3 of the first 25 of depth 25'),
    (['--dry-run'], '22 would be stored, 3 would stay; first 25 of depth 25')])
def test_a_look_at_a_file_changes_nothing(program, dead, arguments, last):
    """Nor does it make one; it needs no store."""
    path = dead([*CUT, *unfit(22)])
    for each in program.directory.glob('records.sqlite*'):
        each.unlink()
    before = path.read_bytes(), path.stat()
    assert program.run('replay', *arguments).stdout.splitlines()[-1] == f'{last} in {path}'
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == (
        before[0], before[1].st_mtime_ns, before[1].st_ino)
    assert list(path.parent.glob('dead.json*')) == [path] and not program.database.exists()


def test_the_new_file_has_mode_owner_and_place_of_the_old_one(program, dead, workdir):
    """Also where the path is a link to it."""
    path = dead([*CUT, *unfit(2)])
    real = workdir / 'elsewhere' / 'real.json'
    real.parent.mkdir()
    path.rename(real)
    path.symlink_to(real)
    real.chmod(0o604)
    os.chown(real, 4711, 4712)
    program.run('replay')
    now = real.stat()
    assert (stat.S_IMODE(now.st_mode), now.st_uid, now.st_gid) == (0o604, 4711, 4712)
    assert path.is_symlink() and list(real.parent.iterdir()) == [real]
    assert len(lines_of(path)) == 3


def test_what_is_appended_meanwhile_stays(program, dead):
    """By a writer that knows nothing of the replay."""
    path = dead(unfit(3))
    running = program.start('replay', '--rate', '1')
    wait_until(program.rows, 'a letter is stored', 30)
    append_durably(path, [b'{"new": 1}\n', b'{"new": 2}\n'])
    assert running.wait(timeout=30) == 0
    assert path.read_bytes() == b'{"new": 1}\n{"new": 2}\n'
    assert ids(program) == [0, 1, 2]


def test_a_writer_that_waits_for_the_lock_does_not_write_into_an_orphan(workdir):
    """It has opened the old file before another took its place."""
    path, new = workdir / 'dead.json', workdir / 'new'
    path.write_bytes(b'old\n')
    new.write_bytes(b'kept\n')
    with path.open('rb') as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        writer = threading.Thread(target=append_durably, args=(path, [b'mine\n']))
        writer.start()
        inode = old.fileno()
        wait_until(lambda: openers(os.fstat(inode)) == 2, 'the writer has opened the old file')
        new.rename(path)
    writer.join(timeout=10)
    assert not writer.is_alive()
    assert path.read_bytes() == b'kept\nmine\n'


def openers(status):
    """How many descriptors of this process are of one file."""
    number = 0
    for fd in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):
            number += os.path.samestat(os.fstat(int(fd)), status)
    return number


def test_writers_and_replays_at_the_same_time_lose_nothing(nsqd, program, workdir):
    """At the end each letter is one record, or one line."""
    path = workdir / 'dead.json'
    program.configure(nsqd, message=RELAXED, **in_file(path))
    failures = []

    def write(number):
        try:
            for n in range(number, number + 300):
                append_durably(path, [(line_of(b'{"id": %d}' % n, id=f'{n}') + '\n').encode()])
        except OSError as error:
            failures.append(error)
    writers = [threading.Thread(target=write, args=(number,)) for number in (0, 1000, 2000)]
    for writer in writers:
        writer.start()
    wait_until(path.exists, 'a first line is written')
    while any(writer.is_alive() for writer in writers):
        program.run('replay')
    lines = [int(json.loads(line['body'])['id']) for line in lines_of(path)]
    assert not failures
    assert sorted(ids(program) + lines) == [n for number in (0, 1000, 2000) for n in range(number, number + 300)]
    program.run('replay')
    assert (len(ids(program)), path.read_bytes()) == (900, b'')


def big(number):
    """Letters of a file that takes a while to be written, every other of which fails again."""
    bodies = [json.dumps({'id': n, 'text': 'x' * 5000}).encode() for n in range(number)]
    return ''.join(line_of(body if n % 2 else body[:-1], id=f'{n}') + '\n' for n, body in enumerate(bodies))


@pytest.mark.parametrize('moment', ['storing', 'writing anew', 'in place'])
def test_killed_and_run_again_each_letter_is_one_record_or_one_line(nsqd, program, workdir, moment):
    """In the middle of storing, of writing the new file, or when that has just been put into place."""
    path, new = workdir / 'dead.json', workdir / 'dead.json.replay'
    path.write_text(big(4000))
    inode = path.stat().st_ino
    program.configure(nsqd, message=RELAXED, **in_file(path))
    running = program.start('-q', 'replay')
    conditions = {'storing': program.rows, 'in place': lambda: path.stat().st_ino != inode,
                  'writing anew': lambda: not new.exists() and program.rows() or new.exists() and new.stat().st_size}
    wait_until(conditions[moment], f'it is {moment}', 30)
    running.kill()
    running.wait()
    assert sorted({line['id'] for line in lines_of(path)} | {f"{bins['id']}" for _, _, bins, _ in program.rows()},
                  key=int) == [f'{n}' for n in range(4000)]
    program.run('-q', 'replay')
    assert ids(program) == list(range(1, 4000, 2))
    assert [int(line['id']) for line in lines_of(path)] == list(range(0, 4000, 2))
    assert not new.exists()


def test_a_second_replay_of_the_same_file_keeps_out(program, dead):
    """It says why, and takes nothing. To look is free. The first has letters for two minutes, however slow the others
    start; then it is told to end."""
    path = dead(unfit(120))
    running = program.start('replay', '--rate', '1')
    wait_until(program.rows, 'a letter is stored', 30)
    assert f'{path}: another replay has locked it' in program.run('replay', expect=os.EX_UNAVAILABLE).stderr
    assert 'first 20 of depth 120' in program.run('replay', '--list').stdout
    running.terminate()
    assert running.wait(timeout=30) == 0
    stored = ids(program)
    assert (stored, len(lines_of(path))) == (list(range(len(stored))), 120 - len(stored))
    program.run('replay')
    assert (ids(program), path.read_bytes()) == (list(range(120)), b'')


def test_an_outage_leaves_the_rest_in_the_file(program, dead):
    """After the timeout, with 75; what was stored before has left."""
    path = dead(unfit(4), timeout='2s')
    running = program.start('replay', '--rate', '1')
    wait_until(program.rows, 'a letter is stored', 30)
    with program.locked():
        assert running.wait(timeout=30) == os.EX_TEMPFAIL
    assert 'error: requeued' in program.log.read_text()
    assert len(program.rows()) + len(lines_of(path)) == 4
    program.run('replay')
    assert (ids(program), path.read_bytes()) == ([0, 1, 2, 3], b'')


@pytest.mark.slow
def test_a_short_outage_is_waited_for(program, dead):
    """With backoff, as in a window."""
    path = dead(unfit(4), timeout='30s')
    running = program.start('replay', '--rate', '1')
    wait_until(program.rows, 'a letter is stored', 30)
    with program.locked():
        wait_until(lambda: 'retrying' in program.log.read_text(), 'it has met the lock', 20)
    assert running.wait(timeout=30) == 0
    assert (ids(program), path.read_bytes()) == ([0, 1, 2, 3], b'')


@pytest.mark.parametrize('where', ['topic', 'file'])
def test_an_answer_that_stops_a_window_stops_a_replay(nsqd, program, standin, workdir, where):
    """Nothing leaves its place, 75; then the cluster has room again."""
    path = workdir / 'dead.json'
    settings = {**standin.settings(), **({} if where == 'topic' else in_file(path))}
    nsqd.publish(TOPIC, unfit(5))
    program.once(nsqd, message=STRICT, **settings)
    program.configure(nsqd, message=RELAXED, **settings)
    standin.server.judge = lambda write: 8
    ran = program.run('replay', expect=os.EX_TEMPFAIL)
    assert 'make room' in ran.stderr and servers.summary(ran.stderr)['requeued'] == 5
    assert (nsqd.left(DEAD, REPLAY) if where == 'topic' else len(lines_of(path))) == 5
    standin.server.judge = None
    program.run('replay')
    assert standin.stored() == 5
    assert (nsqd.left(DEAD, REPLAY) if where == 'topic' else len(lines_of(path))) == 0


def test_a_disk_that_is_full_leaves_the_old_file(nsqd, program, workdir):
    """The limit on the size of a file stands for the disk. 75; the next replay stores the same records again."""
    path = workdir / 'dead.json'
    path.write_text(big(400))
    before = path.read_bytes()
    program.configure(nsqd, message=RELAXED, **in_file(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        running = program.start('-q', 'replay', '--limit', '50')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert running.wait(timeout=30) == os.EX_TEMPFAIL
    assert 'the next replay may take its letters again: File too large' in program.log.read_text()
    assert path.read_bytes() == before and list(workdir.glob('dead.json*')) == [path]
    program.run('-q', 'replay')
    assert (len(ids(program)), len(lines_of(path))) == (200, 200)


def test_a_file_that_somebody_moves_away_is_left_to_them(program, dead, workdir):
    """As a rotation of logs would. Nothing is lost: 75."""
    path = dead(unfit(3))
    running = program.start('replay', '--rate', '1')
    wait_until(program.rows, 'a letter is stored', 30)
    path.rename(workdir / 'moved')
    append_durably(path, [b'{"new": 1}\n'])
    assert running.wait(timeout=30) == os.EX_TEMPFAIL
    assert 'replaced or truncated' in program.log.read_text()
    assert (path.read_bytes(), len(lines_of(workdir / 'moved'))) == (b'{"new": 1}\n', 3)


def test_a_file_of_many_letters_lasts_longer_than_a_window(nsqd, program, workdir):
    """`timeout` counts from the last letter, of which there are five a second; the unit floor has those left out."""
    path = workdir / 'dead.json'
    path.write_text(''.join(line_of(b'{"id": %d}' % n, id=f'{n}') + '\n' for n in range(20)))
    program.configure(nsqd, message=RELAXED, timeout='2s', **in_file(path))
    count = servers.summary(program.run('replay', '--reason', 'key').stderr)
    assert (count['received'], count['requeued']) == (20, 20)
    count = servers.summary(program.run('replay', '--rate', '5').stderr)
    assert (count['received'], count['stored'], path.read_bytes()) == (20, 20, b'')
    assert count['seconds'] > 3
