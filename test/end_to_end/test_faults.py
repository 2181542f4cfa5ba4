"""What fails while messages are on their way. At the end of each test every message is accounted for: it is exactly
one record, or one dead letter, or it is still in the queue."""
import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest

import servers
from flows import CHANNEL, DEAD, SHORT, TOPIC, bodies, ended, fill, numbers, passed, publish_at_once, received
from servers import wait_until


def prepared(program, nsqd, slow=0, **settings):
    """A window on an empty queue makes channel and table; then, if `slow`, each row costs `slow` steps to insert.

    nsqd looks for timeouts in a new channel only after 5 s, in one that is there when it starts at once.
    """
    program.once(nsqd, **{**settings, 'idle_timeout': '50ms'})
    if SHORT in nsqd.args:
        nsqd.restart()
    program.configure(nsqd, **settings)
    if slow:
        execute(program, f'''
            CREATE VIEW burn AS
                WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {slow}) SELECT i FROM n;
            CREATE TRIGGER slow BEFORE INSERT ON records WHEN (SELECT max(i) FROM burn) > 0 BEGIN SELECT 1; END''')


def execute(program, script):
    """A script in the test's own connection to the store."""
    with contextlib.closing(sqlite3.connect(program.database, timeout=60)) as connection:
        connection.executescript(script)


def stored(program):
    """The number of records."""
    return len(program.rows())


def in_log(program, words):
    """Whether the log has `words`."""
    return words in program.log.read_text()


# --------------------------------------------------------------------------------------------------- ends that we bring

@pytest.mark.parametrize('part', range(5))
def test_killed_at_random_moments_each_message_is_one_record(nsqds, program, part):
    """Six kills with a slow store, then a window that runs to its end: five times, so 30 kills."""
    nsqd, = nsqds(1, SHORT)
    prepared(program, nsqd, slow=3000, timeout='60s')   # which the last window may need where others use the processors
    nsqd.publish(TOPIC, bodies(25000))
    draw = random.Random()
    for subscribed in [False, True] * 3:   # any moment from the start on, or one at which it has something to lose
        process = program.start('once')
        if subscribed:
            wait_until(lambda process=process: holds(nsqd, process), 'it holds messages', 30)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0, 1.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, 'it ended before it was killed: publish more'
        wait_until(lambda: not nsqd.clients(TOPIC, CHANNEL), 'nsqd has seen it go')
    execute(program, 'DROP TRIGGER slow')
    wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['in_flight_count'], 'nsqd takes back what the dead one held')
    assert nsqd.stats(TOPIC, CHANNEL)['timeout_count'] > 0
    program.run('once')
    assert numbers(program) == list(range(25000))
    assert nsqd.left(TOPIC, CHANNEL) == 0


def holds(nsqd, process):
    """Whether a consumer has messages in flight."""
    assert process.poll() is None
    return any(client['in_flight_count'] for client in nsqd.clients(TOPIC, CHANNEL))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_window_finishes_what_is_being_stored_and_hands_back_the_rest(nsqd, program, number):
    """nsqd's msg-timeout is a minute, so nothing but REQ brings a held message back at once."""
    prepared(program, nsqd, slow=3000, timeout='60s')
    fill(nsqd, 20000)
    process = program.start('once')
    wait_until(lambda: stored(program), 'a first batch is stored', 30)
    process.send_signal(number)
    ended(process)
    now = nsqd.stats(TOPIC, CHANNEL)
    assert now['in_flight_count'] == now['timeout_count'] == 0
    count = servers.summary(program.log.read_text())
    assert stored(program) == count['stored'] == 20000 - now['depth']
    assert count['requeued'] == count['received'] - count['stored'] > 0
    execute(program, 'DROP TRIGGER slow')
    program.run('once')
    assert numbers(program) == list(range(20000))


def test_a_signal_under_full_load_leaves_nothing_in_flight(nsqd, program):
    """With a fast store there are always messages on the wire when RDY falls: these go back as well."""
    prepared(program, nsqd, timeout='60s')
    fill(nsqd, 150000)
    process = program.start('once')
    wait_until(lambda: stored(program), 'the window is under way', 30)
    process.terminate()
    ended(process)
    wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['in_flight_count'], 'nsqd has read all answers')
    now = nsqd.stats(TOPIC, CHANNEL)
    assert now['timeout_count'] == 0
    assert 0 < stored(program) == 150000 - now['depth'] < 150000


def test_a_signal_while_connecting_ends_it(program):
    """An nsqd that takes the connection and says nothing."""
    with socket.create_server(('127.0.0.1', 0)) as silent:
        silent.settimeout(20)
        program.configure(nsq={'nsqd-tcp-address': f'127.0.0.1:{silent.getsockname()[1]}'})
        process = program.start('once')
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(4) == b'  V2'
            process.terminate()
            ended(process)
    assert program.rows() == []


def test_a_signal_while_the_store_opens_ends_it_and_takes_nothing(nsqd, program):
    """The lock is there before the program is."""
    prepared(program, nsqd)
    fill(nsqd, 10)
    with program.locked():
        process = program.start('once')
        wait_until(lambda: f'{program.database.name}-wal' in opened_files(process), 'it has opened the database')
        process.terminate()
        ended(process)
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['depth'], now['requeue_count']) == (10, 0)


def opened_files(process):
    """The names of the files that a process has open."""
    directory = f'/proc/{process.pid}/fd'
    names = []
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                names.append(os.path.basename(os.readlink(f'{directory}/{fd}')))
    return names


def test_a_signal_while_the_store_is_locked_hands_back_all(nsqd, program):
    """Nothing was stored, so all of it is in the queue, at once and not in flight."""
    prepared(program, nsqd, idle_timeout='60s', timeout='60s')
    process = program.start('-v', 'once')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it has subscribed')
    with program.locked():
        nsqd.publish(TOPIC, bodies(300))
        wait_until(lambda: received(program) == 300, 'it holds all')
        process.terminate()
        ended(process)
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['depth'], now['in_flight_count'], stored(program)) == (300, 0, 0)
    assert servers.summary(program.log.read_text())['requeued'] == 300
    program.run('--set', 'idle-timeout=100ms', 'once')
    assert numbers(program) == list(range(300))


def test_what_was_on_its_way_at_the_end_goes_back_at_once(nsqd, program):
    """nsqd has sent it, and the program has not read it yet: it stands still when the signal and the messages come."""
    prepared(program, nsqd, idle_timeout='60s', timeout='60s')
    process = program.start('once')
    wait_until(lambda: any(each['ready_count'] for each in nsqd.clients(TOPIC, CHANNEL)), 'it is ready')
    process.send_signal(signal.SIGSTOP)
    nsqd.publish(TOPIC, bodies(300))
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['in_flight_count'] == 300, 'nsqd has sent all')
    process.terminate()
    process.send_signal(signal.SIGCONT)
    ended(process)
    wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['in_flight_count'], 'nsqd has read all answers')
    now = nsqd.stats(TOPIC, CHANNEL)
    assert now['depth'] == 300 - stored(program)
    assert now['timeout_count'] == 0


# ------------------------------------------------------------------------------------------------- outages of the store

@pytest.mark.slow
def test_an_outage_longer_than_msg_timeout_is_survived_within_the_window(nsqds, program):
    """What is held is kept alive with TOUCH, nothing more is taken, and all is stored when the store is back."""
    nsqd, = nsqds(1, SHORT)
    prepared(program, nsqd, idle_timeout='1s', timeout='60s')
    process = program.start('once')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it has subscribed')
    with program.locked():
        nsqd.publish(TOPIC, bodies(50))
        wait_until(lambda: in_log(program, 'retrying'), 'it has seen that the store is down', 20)
        wait_until(lambda: [each['ready_count'] for each in nsqd.clients(TOPIC, CHANNEL)] == [0], 'RDY is 0')
        nsqd.publish(TOPIC, bodies(50, first=50))
        wait_until(passed(2), 'the outage goes on for twice msg-timeout')
        now = nsqd.stats(TOPIC, CHANNEL)
        assert (now['depth'], now['in_flight_count'], now['timeout_count']) == (50, 50, 0)
    ended(process)
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['timeout_count'], now['requeue_count'], nsqd.left(TOPIC, CHANNEL)) == (0, 0, 0)
    assert numbers(program) == list(range(100))
    log = program.log.read_text()
    assert log.count('locked') == log.count('retrying') == log.count('recovered after') == 1


def test_an_outage_to_the_end_hands_all_back_with_75(nsqd, program):
    """The next window, with the store back, stores each once."""
    prepared(program, nsqd, idle_timeout='60s', timeout='4s')
    process = program.start('once')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it has subscribed')
    with program.locked():
        nsqd.publish(TOPIC, bodies(100))
        ended(process, os.EX_TEMPFAIL)
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['depth'], now['in_flight_count'], stored(program)) == (100, 0, 0)
    assert servers.summary(program.log.read_text())['requeued'] == 100
    program.run('--set', 'idle-timeout=100ms', 'once')
    assert numbers(program) == list(range(100))


def test_a_store_locked_from_the_start_is_69_and_nothing_is_taken(nsqd, program):
    """Not even a subscription."""
    prepared(program, nsqd)
    fill(nsqd, 10)
    with program.locked():
        assert 'locked' in program.run('once', expect=os.EX_UNAVAILABLE).stderr
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['depth'], now['requeue_count'], now['timeout_count']) == (10, 0, 0)


def test_bad_messages_are_kept_while_the_store_is_down(nsqd, program):
    """Good and bad together in an outage to the end: the dead letters are kept, the good ones go back."""
    prepared(program, nsqd, idle_timeout='60s', timeout='4s')
    process = program.start('once')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it has subscribed')
    with program.locked():
        nsqd.publish(TOPIC, [*bodies(20), '{"cut'])
        ended(process, os.EX_TEMPFAIL)
    assert [body for _, body in nsqd.letters(DEAD)] == [b'{"cut']
    assert sorted(nsqd.drain(TOPIC, CHANNEL)) == sorted(body.encode() for body in bodies(20))


# ------------------------------------------------------------------------------------------------ failures of the queue

def test_nsqd_killed_and_restarted_in_mid_window(nsqds, program):
    """What was held is stored though its nsqd is gone, the rest comes from its disk; what comes twice is one record."""
    nsqd, = nsqds(1, '--mem-queue-size=0', '--sync-timeout=50ms', SHORT)
    prepared(program, nsqd, idle_timeout='5s', timeout='60s', nsq={'max-in-flight': 200})
    process = program.start('-v', 'once')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it has subscribed')
    with program.locked():
        nsqd.publish(TOPIC, bodies(3000))
        wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] == 2800, 'all are in the channel, on disk')
        wait_until(lambda: received(program) == 200, 'it holds as many as it may')
        nsqd.kill()
        nsqd.restart()
    ended(process, seconds=60)
    assert numbers(program) == list(range(3000))
    assert nsqd.left(TOPIC, CHANNEL) == 0
    assert servers.summary(program.log.read_text())['late'] >= 200


def test_nsqd_that_stands_still_for_a_while(nsqds, program):
    """It is stopped for longer than its msg-timeout, and delivers again what it had no answer for. The window is ended
    by a signal: it must not end as idle meanwhile."""
    nsqd, = nsqds(1, SHORT)
    prepared(program, nsqd, idle_timeout='60s', timeout='90s', slow=500)
    nsqd.publish(TOPIC, bodies(5000))
    process = program.start('-v', 'once')
    wait_until(lambda: stored(program), 'it is under way', 20)
    nsqd.suspend()
    still = passed(2)
    wait_until(lambda: still() and stored(program) == received(program), 'all that had come is stored', 30)
    assert stored(program) < 5000
    nsqd.resume()
    wait_until(lambda: stored(program) == 5000 and not nsqd.left(TOPIC, CHANNEL), 'all are stored and finished', 60)
    process.terminate()
    ended(process)
    assert numbers(program) == list(range(5000))


@pytest.mark.slow
def test_one_of_two_consumers_is_killed(nsqds, program):
    """What the dead one held comes back after msg-timeout and is the other's."""
    nsqd, = nsqds(1, SHORT)
    prepared(program, nsqd, idle_timeout='8s', timeout='60s', slow=3000, nsq={'max-in-flight': 500})
    first = program.start('once')
    program.copy()
    second = program.start('once')
    wait_until(lambda: len(nsqd.clients(TOPIC, CHANNEL)) == 2, 'both are subscribed')
    nsqd.publish(TOPIC, bodies(6000))
    wait_until(lambda: [bool(each['in_flight_count']) for each in nsqd.clients(TOPIC, CHANNEL)] == [True, True],
               'both hold messages', 20)
    first.kill()
    ended(second, seconds=60)
    assert numbers(program) == list(range(6000))
    assert nsqd.left(TOPIC, CHANNEL) == 0


def test_two_nsqds_of_one_node_id_give_a_record_for_each_message(nsqds, program):
    """Published to at the same time they give equal ids to different messages, which then are in flight together."""
    pair, ids = nsqds(2, node_id=7), []
    while len(ids) == len(set(ids)):   # where the two never ran in the same millisecond, nothing was shown yet
        assert len(ids) < 500000, 'no two ids were equal'
        program.database.unlink(missing_ok=True)
        publish_at_once(pair, 50000, 2000)
        assert servers.summary(program.once(pair, timeout='60s').stderr)['stored'] == 100000
        assert numbers(program) == list(range(100000))
        ids += [key.partition('-')[0] for key in program.records()]


def test_a_message_that_was_handed_back_before_is_one_record_under_the_same_key(nsqd, program):
    """Stored once, delivered again on another channel and after a REQ: the key is the same each time."""
    for channel in (CHANNEL, 'other'):
        nsqd.create(TOPIC, channel)
    nsqd.publish(TOPIC, [*bodies(3), '[]'])
    program.once(nsqd)
    keys = set(program.records())
    nsqd.requeue(TOPIC, 'other', 4)
    assert servers.summary(program.once(nsqd, nsq={'channel': 'other'}).stderr)['stored'] == 3
    assert set(program.records()) == keys and len(keys) == 3
    letters = [header for header, _ in nsqd.letters(DEAD, expected=2)]
    assert sorted(header['attempts'] for header in letters) == [1, 2]
    assert len({header['key'] for header in letters}) == 1


# ------------------------------------------------------------------------------------------------- bad, large, and many

BAD = {
    b'{"id": 1, "msg": "cut sho': 'invalid-json',
    b'': 'invalid-json',
    b'{"id": 1, "msg": "caf\xe9"}': 'invalid-json',
    b'{"id": 1, "msg": "a", "msg": "b"}': 'invalid-json',
    b'{"id": 1, "price": NaN}': 'invalid-json',
    b'[1, "amber"]': 'not-an-object',
    b'{"msg": "no id"}': 'schema',
    b'{"id": "1"}': 'schema',
    b'{"id": 1, "count": 9223372036854775808}': 'unsupported-value',
    b'{"id": 1, "price": 1e999}': 'unsupported-value',
    b'{"id": 1, "msg": "\\ud800"}': 'unsupported-value',
    b'{"id": 1, "msg": "a\\u0000b"}': 'unsupported-value',
    b'{"id": 1, "deep": ' + b'[' * 100 + b']' * 100 + b'}': 'unsupported-value',
    b'{"id": 1, "a name that is too long": 1}': 'bin-name',
    b'{"id": 1, "gid": "mine"}': 'bin-name',
}


def test_one_in_ten_is_bad_and_none_is_missing(nsqd, program):
    """10,000 messages, 1,000 of them bad, of each kind: these are dead letters with their reason, the rest records."""
    nsqd.create(TOPIC, CHANNEL)
    kinds = [kind for kind in BAD if kind]   # nsqd takes no empty message
    bad = [kinds[place % len(kinds)] for place in range(1000)]
    good = [json.dumps({'id': n, 'n': n}) for n in range(9000)]
    mixed = [*bad, *good]
    random.Random().shuffle(mixed)
    nsqd.publish(TOPIC, mixed)
    ran = program.once(nsqd, timeout='60s', message={'fields': {'id': 'integer, required', 'msg': 'string'}})
    count = servers.summary(ran.stderr)
    assert (count['received'], count['stored'], count['dead'], count['requeued']) == (10000, 9000, 1000, 0)
    assert numbers(program) == list(range(9000))
    letters = nsqd.letters(DEAD)
    assert collections.Counter(body for _, body in letters) == collections.Counter(bad)
    assert {(body, header['reason']) for header, body in letters} == {(kind, BAD[kind]) for kind in kinds}
    assert nsqd.left(TOPIC, CHANNEL) == 0


def test_a_message_of_the_largest_size_reads_back_whole(nsqd, program):
    """1 MiB, nsqd's --max-msg-size as it comes."""
    value = 'x' * ((1 << 20) - len('{"n":0,"text":""}'))
    nsqd.publish(TOPIC, json.dumps({'n': 0, 'text': value}, separators=(',', ':')))
    program.once(nsqd, record={'id-bin': ''})
    assert list(program.records().values()) == [{'n': 0, 'text': value}]
    assert nsqd.left(TOPIC, CHANNEL) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_stays_bounded_with_large_messages(nsqd, program):
    """2,000 messages of 300 KiB are 600 MB. Held are 32 MiB (max-held) and what one read brings beyond it, of which
    each batch in the store (8 MiB) is there as body, decoded and encoded: with 35 MiB for the interpreter and what
    the allocator does not give back that is below 250 MiB, and far below the 600 MB."""
    nsqd.create(TOPIC, CHANNEL)
    program.configure(nsqd, timeout='250s', idle_timeout='5s')
    process = program.start('once')
    for first in range(0, 2000, 200):   # always more than it may hold, and never so much that nsqd's memory is the test
        nsqd.publish(TOPIC, [json.dumps({'n': n, 'text': 'x' * 300 * 1024}) for n in range(first, first + 200)])
        wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] < 120, 'there is room for more', 100)
    wait_until(lambda: not nsqd.left(TOPIC, CHANNEL), 'all are answered', 100)
    # Until it is idle for 5 s, it runs. Not ru_maxrss of wait4(): that has the memory of this process at the fork, too.
    peak = re.search(r'VmHWM:\s+(\d+) kB', Path(f'/proc/{process.pid}/status').read_text())[1]
    ended(process, 0, 60)
    assert servers.summary(program.log.read_text())['stored'] == 2000
    with contextlib.closing(sqlite3.connect(program.database)) as connection:
        lengths = connection.execute('SELECT bins ->> "n", length(bins ->> "text") FROM records ORDER BY 1').fetchall()
    assert lengths == [(n, 300 * 1024) for n in range(2000)]
    assert int(peak) < 250 * 1024, 'KiB'
