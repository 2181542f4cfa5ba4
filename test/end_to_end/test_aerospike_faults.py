"""Real nsqds, and an Aerospike that fails in every way it can. At the end of each test every message is accounted for:
it is exactly one record, or one dead letter, or it is still in the queue."""
import contextlib
import json
import os
import random
import signal
import subprocess

import pytest

import servers
from aerospike_server import Lost
from flows import CHANNEL, DEAD, SHORT, TOPIC, bodies, ended, fill, passed, publish_at_once, received
from servers import wait_until

QUICK = {'total-timeout': '300ms'}   # of a call, where a test has to wait for it


def timed(nsqd):
    """A channel in which a message's time runs out when it should: see Nsqd.lapse."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.lapse(TOPIC, CHANNEL)
    return nsqd


def warnings(program, word):
    """The warnings and errors with a word."""
    lines = program.log.read_text().splitlines()
    return [line for line in lines if line.startswith(('warning', 'error')) and word in line]


def in_flight(nsqd):
    return nsqd.stats(TOPIC, CHANNEL)['in_flight_count']


def subscribed(nsqd):
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'x-msrv is subscribed, its store open')


def slow(cluster, seconds=0.05):
    """From now on each call takes so long."""
    cluster.server.delay = seconds


# --------------------------------------------------------------------------------------------------- ends that we bring

@pytest.mark.slow
@pytest.mark.parametrize('part', range(5))
def test_killed_at_random_moments_each_message_is_one_record(nsqds, program, standin, part):
    """Ten kills under load, then a window that runs to its end: five times, so 50 kills."""
    nsqd = timed(nsqds(1, SHORT)[0])
    slow(standin)
    fill(nsqd, 60000)
    program.configure(nsqd, timeout='60s', **standin.settings())
    draw = random.Random()
    for at_once in [False, True] * 5:   # any moment from the start on, or one at which it has something to lose
        process = program.start('once')
        if at_once:
            wait_until(lambda: in_flight(nsqd), 'it holds messages', 30)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0, 0.3 if at_once else 0.8))
        process.kill()
        assert process.wait() == -signal.SIGKILL, 'it ended before it was killed: publish more'
        wait_until(lambda: not nsqd.clients(TOPIC, CHANNEL), 'nsqd has seen it go')
    slow(standin, 0)
    wait_until(lambda: not in_flight(nsqd), 'nsqd takes back what the dead one held')
    assert nsqd.stats(TOPIC, CHANNEL)['timeout_count'] > 1
    program.run('once', timeout=100)
    assert standin.numbers() == list(range(60000))
    assert nsqd.left(TOPIC, CHANNEL) == 0


def test_a_signal_under_load_finishes_what_is_being_stored_and_hands_back_the_rest(nsqd, program, standin):
    slow(standin)
    fill(nsqd, 40000)
    program.configure(nsqd, timeout='60s', **standin.settings())
    process = program.start('once')
    wait_until(standin.stored, 'a first batch is stored', 30)
    process.terminate()
    ended(process, seconds=5)
    wait_until(lambda: not in_flight(nsqd), 'nsqd has read all answers')
    now = nsqd.stats(TOPIC, CHANNEL)
    assert now['timeout_count'] == 0
    assert standin.stored() == servers.summary(program.log.read_text())['stored'] == 40000 - now['depth'] > 0
    slow(standin, 0)
    program.run('once')
    assert standin.numbers() == list(range(40000))


def test_a_signal_while_the_cluster_hangs_ends_it_in_its_time(nsqd, program, standin):
    """At most total-timeout and 2 s, the messages are back in the queue at once."""
    program.configure(nsqd, timeout='60s', idle_timeout='60s', **standin.settings(**{'total-timeout': '1s'}))
    process = program.start('-v', 'once')
    subscribed(nsqd)
    standin.server.hang()
    nsqd.publish(TOPIC, bodies(300))
    wait_until(lambda: received(program) == 300, 'it holds all')
    process.terminate()
    ended(process, seconds=3)
    assert (nsqd.stats(TOPIC, CHANNEL)['depth'], in_flight(nsqd)) == (300, 0)
    standin.server.resume()
    program.run('--set', 'idle-timeout=500ms', 'once')
    assert standin.numbers() == list(range(300))


# ----------------------------------------------------------------------------------------------- outages of the cluster

def test_dead_at_the_start_is_69_and_nothing_is_taken(nsqd, program, standin):
    fill(nsqd, 10)
    standin.server.refuse()
    program.configure(nsqd, **standin.settings())
    assert standin.address in program.run('once', expect=os.EX_UNAVAILABLE, timeout=15).stderr
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['depth'], now['requeue_count'], now['timeout_count'], now['clients']) == (10, 0, 0, 0)


@contextlib.contextmanager
def dead(server):
    """Its port refuses, its data stay."""
    server.refuse()
    yield
    server.listen()


@contextlib.contextmanager
def hung(server):
    """Connections stay up and silent."""
    server.hang()
    yield
    server.resume()


@contextlib.contextmanager
def overloaded(server):
    """Every write is answered with 18."""
    server.judge = lambda write: 18
    yield
    server.judge = lambda write: None


@pytest.mark.slow
@pytest.mark.parametrize('outage', [dead, hung, overloaded])
def test_an_outage_longer_than_msg_timeout_is_survived_within_the_window(nsqds, program, standin, outage):
    """What is held is kept alive with TOUCH, nothing more is taken, and all is stored when the cluster is back."""
    nsqd = timed(nsqds(1, SHORT)[0])
    program.configure(nsqd, idle_timeout='1s', timeout='60s', **standin.settings(**QUICK))
    process = program.start('once')
    subscribed(nsqd)
    with outage(standin.server):
        nsqd.publish(TOPIC, bodies(50))
        wait_until(lambda: warnings(program, 'retrying'), 'it has seen that the cluster is down', 20)
        wait_until(lambda: [each['ready_count'] for each in nsqd.clients(TOPIC, CHANNEL)] == [0], 'RDY is 0')
        nsqd.publish(TOPIC, bodies(50, first=50))
        wait_until(passed(2.5), 'the outage goes on for more than twice msg-timeout')
        now = nsqd.stats(TOPIC, CHANNEL)
        assert (now['depth'], now['in_flight_count'], now['timeout_count']) == (50, 50, 1)
    ended(process)
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['timeout_count'], now['requeue_count'], nsqd.left(TOPIC, CHANNEL)) == (1, 0, 0)
    assert standin.numbers() == list(range(100))
    assert len(warnings(program, 'retrying')) == len(warnings(program, 'recovered after')) == 1


def test_an_outage_under_load_loses_nothing(nsqd, program, standin):
    """It dies in the middle of batches, twice, and comes back."""
    fill(nsqd, 30000)
    slow(standin, 0.02)
    program.configure(nsqd, timeout='60s', **standin.settings(**QUICK))
    process = program.start('once')
    for least in (2000, 10000):
        wait_until(lambda least=least: standin.stored() >= least, 'it is under way', 30)
        with dead(standin.server):
            still = passed(0.5)
            wait_until(lambda still=still: still() and warnings(program, 'retrying'), 'it has seen it', 20)
    ended(process, seconds=60)
    assert standin.numbers() == list(range(30000))
    assert nsqd.left(TOPIC, CHANNEL) == 0
    assert nsqd.stats(TOPIC, CHANNEL)['requeue_count'] == 0


@pytest.mark.parametrize('outage', [dead, hung, overloaded])
def test_an_outage_to_the_end_hands_all_back_with_75(nsqd, program, standin, outage):
    program.configure(nsqd, idle_timeout='60s', timeout='4s', **standin.settings(**QUICK))
    process = program.start('once')
    subscribed(nsqd)
    with outage(standin.server):
        nsqd.publish(TOPIC, [*bodies(100), '{"cut'])
        ended(process, os.EX_TEMPFAIL)
        assert standin.stored() == 0   # one that hangs may still store them later: hence the same keys each time
    wait_until(lambda: not in_flight(nsqd), 'nsqd has read all answers')
    now = nsqd.stats(TOPIC, CHANNEL)
    assert (now['depth'], now['timeout_count']) == (100, 0)
    told = servers.summary(program.log.read_text())
    assert (told['received'], told['requeued'], told['dead']) == (101, 100, 1)
    program.run('--set', 'idle-timeout=500ms', 'once')
    assert standin.numbers() == list(range(100))


@pytest.mark.parametrize('code', [8, 20, 22, 81])
def test_an_answer_that_will_not_change_stops_the_window_at_once(nsqd, program, standin, code):
    fill(nsqd, 5000)
    standin.server.judge = lambda write: code
    done = program.once(nsqd, timeout='30s', expect=os.EX_TEMPFAIL, **standin.settings(), within=15)
    assert (nsqd.stats(TOPIC, CHANNEL)['depth'], in_flight(nsqd), standin.stored()) == (5000, 0, 0)
    assert [f'answer {code} ' in line for line in done.stderr.splitlines() if 'the window ends' in line] == [True]
    assert servers.summary(done.stderr)['seconds'] < 10


# ----------------------------------------------------------------------------------------- answers that are bad or lost

def test_answers_lost_after_the_write_make_no_second_record(nsqd, program, standin):
    fill(nsqd, 20000)
    program.configure(nsqd, timeout='60s', **standin.settings(**QUICK))
    process = program.start('once')
    for least in (500, 5000, 10000, 15000):
        wait_until(lambda least=least: standin.stored() >= least, 'it is under way', 30)
        standin.server.drop_answers = 3
    ended(process, seconds=60)
    assert standin.numbers() == list(range(20000))
    assert nsqd.left(TOPIC, CHANNEL) == 0
    assert servers.summary(program.log.read_text())['stored'] == 20000


@pytest.mark.parametrize('answer', [18, 9, Lost(9), 14], ids=repr)
def test_a_share_of_bad_answers_costs_only_time(nsqd, program, standin, answer):
    """5 % of all writes."""
    fill(nsqd, 20000)
    draw = random.Random(5)
    standin.server.judge = lambda write: answer if draw.random() < 0.05 else None
    program.configure(nsqd, timeout='90s', **standin.settings())
    process = program.start('once')
    ended(process, seconds=100)
    assert standin.numbers() == list(range(20000))
    assert nsqd.left(TOPIC, CHANNEL) == nsqd.stats(TOPIC, CHANNEL)['requeue_count'] == 0
    told = servers.summary(program.log.read_text())
    assert (told['stored'], told['dead']) == (20000, 0)
    # The client gives up the whole batch where one node says that it is too late (9): that looks like an outage.
    assert len(warnings(program, 'retrying')) <= {14: 0, 18: 1}.get(answer, 5)


BAD = {
    b'{"n": 1, "msg": "cut sho': 'invalid-json', b'[1]': 'not-an-object', b'{"msg": "no n"}': 'schema',
    b'{"n": 9223372036854775808}': 'unsupported-value', b'{"n": 1, "s": "\\u0000"}': 'unsupported-value',
    b'{"n": 1, "s": "\\ud800"}': 'unsupported-value',
    b'{"n": 1, "d": ' + b'[' * 65 + b']' * 65 + b'}': 'unsupported-value',
    b'{"n": 1, "a name that is too long": 1}': 'bin-name', b'{"n": 1, "gid": "mine"}': 'bin-name',
    b'{"n": 1, "text": "refused by the server"}': 'rejected', b'{"n": 1, "big": "' + b'x' * 900_000 + b'"}': 'too-big',
}


def test_a_batch_of_all_kinds_of_bad_records(nsqd, program, standin):
    """The good ones beside them are stored, each bad one is a dead letter with its reason."""
    standin.server.max_record_size = 512 << 10
    standin.server.judge = lambda write: 21 if 'text' in write.bins else None
    nsqd.create(TOPIC, CHANNEL)
    mixed = [*BAD, *[json.dumps({'n': n}) for n in range(400)]]
    random.Random(7).shuffle(mixed)
    nsqd.publish(TOPIC, mixed)
    done = program.once(nsqd, timeout='30s', message={'fields': {'n': 'integer, required'}}, **standin.settings())
    told = servers.summary(done.stderr)
    assert (told['stored'], told['dead'], told['requeued']) == (400, len(BAD), 0)
    assert standin.numbers() == list(range(400))
    assert {(body, header['reason']) for header, body in nsqd.letters(DEAD, expected=len(BAD))} == set(BAD.items())


# ------------------------------------------------------------------------------------------------ failures of the queue

def test_nsqd_killed_and_restarted_in_mid_window(nsqds, program, standin):
    """What was held is stored though its nsqd is gone, the rest comes from its disk; what comes twice is one record."""
    nsqd, = nsqds(1, '--mem-queue-size=0', '--sync-timeout=50ms', SHORT)
    nsqd.create(TOPIC, CHANNEL)
    nsqd.restart()   # so that the channel is there when it starts: see Nsqd.lapse
    program.configure(nsqd, idle_timeout='5s', timeout='60s', nsq={'max-in-flight': 200}, **standin.settings(**QUICK))
    process = program.start('-v', 'once')
    subscribed(nsqd)
    with hung(standin.server):
        nsqd.publish(TOPIC, bodies(3000))
        wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] == 2800, 'all are in the channel, on disk')
        wait_until(lambda: received(program) == 200, 'it holds as many as it may')
        nsqd.kill()
        nsqd.restart()
    ended(process, seconds=60)
    assert standin.numbers() == list(range(3000))
    assert nsqd.left(TOPIC, CHANNEL) == 0


@pytest.mark.slow
def test_one_of_two_consumers_is_killed(nsqds, program, standin):
    """What the dead one held comes back after msg-timeout and is the other's."""
    nsqd = timed(nsqds(1, SHORT)[0])
    slow(standin, 0.3)
    program.configure(nsqd, idle_timeout='8s', timeout='60s', nsq={'max-in-flight': 500}, **standin.settings())
    first = program.start('once')
    program.copy()
    second = program.start('once')
    wait_until(lambda: len(nsqd.clients(TOPIC, CHANNEL)) == 2, 'both are subscribed')
    fill(nsqd, 6000)
    wait_until(lambda: [bool(each['in_flight_count']) for each in nsqd.clients(TOPIC, CHANNEL)] == [True, True],
               'both hold messages', 20)
    first.kill()
    ended(second, seconds=60)
    assert standin.numbers() == list(range(6000))
    assert nsqd.left(TOPIC, CHANNEL) == 0


def test_two_nsqds_of_one_node_id_give_a_record_for_each_message(nsqds, program, standin):
    """Published to at the same time they give equal ids to different messages."""
    pair = nsqds(2, node_id=7)
    publish_at_once(pair, 10000, 1000)
    told = servers.summary(program.once(pair, timeout='60s', **standin.settings()).stderr)
    assert told['stored'] == 20000
    assert standin.numbers() == list(range(20000))


# --------------------------------------------------------------------------------------------------- a field as the key

BY_ID = {'key': 'id', 'id-bin': ''}


def versions(numbers, key='k'):
    return [json.dumps({'id': key, 'n': n}) for n in numbers]


def test_a_late_redelivery_never_overwrites_a_newer_message(nsqds, program, cluster):
    """It waits in another nsqd while the newer one is stored."""
    old, new = nsqds(2)
    for place, nsqd in enumerate((old, new)):
        nsqd.create(TOPIC, CHANNEL)
        nsqd.publish(TOPIC, versions([place]))
    assert servers.summary(program.once(new, record=BY_ID, **cluster.settings()).stderr)['stored'] == 1
    told = servers.summary(program.once(old, record=BY_ID, **cluster.settings()).stderr)
    assert (told['stored'], told['stale'], told['dead']) == (0, 1, 0)
    assert cluster.records()['k']['n'] == 1
    assert old.left(TOPIC, CHANNEL) == 0


def test_the_newest_of_many_versions_wins_in_any_order_and_with_lost_answers(nsqd, program, standin):
    """2,000 versions of 20 keys, in batches of 50 by four writers, a share of the answers lost after the write."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [json.dumps({'id': n % 20, 'n': n}) for n in range(2000)])
    draw = random.Random(3)
    standin.server.judge = lambda write: Lost(9) if draw.random() < 0.05 else None
    done = program.once(nsqd, timeout='60s', record=BY_ID, **standin.settings(**{'batch-size': 50}))
    told = servers.summary(done.stderr)
    assert (told['stored'] + told['stale'], told['dead'], told['requeued']) == (2000, 0, 0)
    assert {key: bins['n'] for key, bins in standin.records().items()} == {n % 20: n for n in range(1980, 2000)}


def test_create_keeps_the_first_and_finishes_the_others(nsqd, program, cluster):
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, versions([1], 'a') + versions([1], 'b'))
    settings = {'record': {**BY_ID, 'write': 'create'}, **cluster.settings()}
    program.once(nsqd, **settings)
    nsqd.publish(TOPIC, versions([2], 'a') + versions([1], 'c'))
    told = servers.summary(program.once(nsqd, **settings).stderr)
    assert (told['stored'], told['duplicate'], nsqd.left(TOPIC, CHANNEL)) == (1, 1, 0)
    assert cluster.records() == {'a': {'id': 'a', 'n': 1}, 'b': {'id': 'b', 'n': 1}, 'c': {'id': 'c', 'n': 1}}


# ------------------------------------------------------------------------------------------------------------ every day

def test_a_lone_message_is_stored_at_once(nsqd, program, standin):
    nsqd.create(TOPIC, CHANNEL)
    program.configure(nsqd, timeout='30s', idle_timeout='20s', nsq={'max-messages': 2}, **standin.settings())
    running = program.start('once')
    subscribed(nsqd)
    for number in range(2):
        nsqd.publish(TOPIC, bodies(1, number))
        wait_until(lambda count=number + 1: standin.stored() == count, 'the message is stored', 2)
    ended(running, seconds=5)


def test_n_is_exact(nsqd, program, cluster):
    fill(nsqd, 3000)
    done = program.once(nsqd, nsq={'max-messages': 1234}, **cluster.settings())
    assert servers.summary(done.stderr)['stored'] == len(cluster.rows()) == 1234
    assert (nsqd.left(TOPIC, CHANNEL), nsqd.attempts(TOPIC, CHANNEL)) == (1766, [1] * 1766)


def test_replay_stores_under_the_first_key(nsqd, program, cluster):
    nsqd.create(DEAD, 'look')
    nsqd.publish(TOPIC, '{"n": 1, "a name that is too long": 5}')
    program.once(nsqd, **cluster.settings())
    (header, _), = nsqd.letters(DEAD, 'look', expected=1)
    program.configure(nsqd, record={'bins': {'a name that is too long': 'short'}}, **cluster.settings())
    program.run('replay')
    assert cluster.records() == {header['key']: {'n': 1, 'short': 5, 'gid': header['key']}}
