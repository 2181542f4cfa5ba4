"""The Aerospike store: what it keeps, what it does with a key that is there, and what follows from each answer."""
import contextlib
import os
import random
import re
import ssl
import time

import aerospike
import pytest
import trustme
from aerospike_helpers import expressions as exp

import clusters
import proxies
import roundtrip
import servers
from aerospike_server import Lost
from clusters import NAMESPACE
from xmsrv import (
    DUPLICATE,
    MEANING_BY_CODE,
    STALE,
    STORED,
    AerospikeStore,
    Record,
    StoreError,
    build_config,
    check_version,
    connect_reason,
    newest_wins_filter,
    read_file,
    to_milliseconds,
    write_obstacles,
)

BY_ID = {'key': 'id'}


@pytest.fixture
def opened(program):
    """A function: opened(cluster, key='id', write='create') is an open AerospikeStore with such a [record]."""
    with contextlib.ExitStack() as stack:
        def make(cluster, connected=True, more=(), **record):
            settings = cluster.settings(**dict(more))
            program.configure(nsq={'nsqd-tcp-address': '127.0.0.1:4150'}, record=record, **settings)
            config, faults, _ = build_config(read_file(str(program.path)))
            assert not faults
            store = AerospikeStore(config)
            stack.callback(store.close)
            if connected:
                store.open()
            return store
        yield make


def newer(key, time, **bins):
    """A record under a field as key, with its time in the bin gts."""
    return Record(key, {'id': key, **bins, 'gts': time}, time)


def numbered(count, first=0):
    """Records that differ in n, each under a key of its own."""
    return [Record(f'key-{n}', {'n': n}, None) for n in range(first, first + count)]


def outcomes(answers):
    return [answer.outcome for answer in answers]


# ------------------------------------------------------------------------------------------------------- what is kept

def test_a_record_is_kept_as_it_is(opened, cluster):
    bins = {'n': 1, 'f': 1.0, 't': True, 'z': -0.0, 's': '\u00e9"\\\n', '': [None, {'a': [2**63 - 1, -2**63]}], 'e': {},
            'deep': [{'': [True, 1, 1.0, None]}]}
    assert opened(cluster).write([Record('k', dict(bins), None)]) == [STORED]
    (key, kept), = cluster.rows()
    assert (key, sorted(map(repr, kept.items()))) == ('k', sorted(map(repr, bins.items())))


def test_a_key_keeps_its_type(opened, cluster):
    keys = ['1', 1, -2**63, 2**63 - 1, ' ', '\u00e9', 'k' * 1000]
    opened(cluster).write([Record(key, {'n': place}, None) for place, key in enumerate(keys)])
    assert sorted(map(repr, cluster.rows())) == sorted(repr((key, {'n': n})) for n, key in enumerate(keys))


def test_a_second_write_of_a_key_replaces_the_record(opened, cluster):
    store = opened(cluster)
    store.write([Record('k', {'a': 1, 'b': 1}, None)])
    assert store.write([Record('k', {'b': 2}, None)]) == [STORED]
    assert cluster.records() == {'k': {'b': 2}}


def test_a_full_batch_is_stored(opened, cluster):
    assert opened(cluster).write(numbered(500)) == [STORED] * 500
    assert cluster.numbers() == list(range(500))


def wide(key, number):
    return Record(key, {f'{n:x}': n for n in range(number)}, None)


def test_a_record_of_very_many_bins_goes_in_a_call_of_its_own(opened, standin):
    """It takes a server seconds, for which the others must not wait: their answers are lost otherwise."""
    store = opened(standin, more={'total-timeout': '1s'})
    standin.server.judge = lambda write: standin.server.hang() if len(write.bins) > 4000 else None
    answers = store.write([*numbered(2), wide('w', 4001), *numbered(2, first=2), wide('v', 5000)])
    assert outcomes(answers) == ['stored', 'stored', 'retry', 'stored', 'stored', 'retry']
    assert '4001 bins takes the server long: see total-timeout' in answers[2].detail
    standin.server.judge = None
    standin.server.resume()
    records = [wide('v', 5000), wide('w', 4001)]
    servers.wait_until(lambda: store.write(records) == [STORED] * 2, 'it is back')
    kept = standin.records()
    assert all(kept[record.key] == record.bins for record in records) and len(kept) == 6


def test_create_keeps_the_first(opened, cluster):
    store = opened(cluster, write='create')
    records = [Record('k', {'n': 1}, None), Record('l', {'n': 2}, None), Record('k', {'n': 3}, None)]
    answers = store.write(records)
    assert sorted(outcomes(answers)) == ['duplicate', 'stored', 'stored'] and answers[1] is STORED
    first = cluster.records()
    assert store.write(records) == [DUPLICATE] * 3
    assert cluster.records() == first


def test_update_merges_bins(opened, cluster):
    store = opened(cluster, write='update')
    store.write([Record('k', {'a': 1, 'b': 1}, None)])
    assert store.write([Record('k', {'b': 2, 'c': 2}, None)]) == [STORED]
    assert cluster.records() == {'k': {'a': 1, 'b': 2, 'c': 2}}


@pytest.mark.parametrize('ttl, least, most', [
    ('1h', 3590, 3600), ('3650d', 315359990, 315360000), ('never', None, None),
])
def test_ttl(opened, cluster, ttl, least, most):
    assert opened(cluster, ttl=ttl).write([Record('k', {'n': 1}, None)]) == [STORED]
    _, meta = cluster.client.exists((NAMESPACE, cluster.set, 'k'))
    assert meta['ttl'] == aerospike.TTL_NEVER_EXPIRE if least is None else least <= meta['ttl'] <= most


def rows_of(cluster, set_is_topic=False):
    """A function: the (key, bins) of what was stored of a topic, which it takes out, for a real server keeps it."""
    def rows(topic):
        if set_is_topic:
            cluster.set = topic
        found = cluster.rows()
        for key, _ in found:
            cluster.client.remove((NAMESPACE, cluster.set, key))
        return found
    return rows


def test_any_message_is_equal_in_the_store_or_a_dead_letter_byte_for_byte(nsqd, program, cluster):
    roundtrip.check(nsqd, program, rows_of(cluster, set_is_topic=True), **cluster.settings(set=''))


@pytest.mark.parametrize('record', [{'write': 'create'}, {'write': 'update'}, {'key': 'n'}], ids=str)
def test_any_size_is_equal_in_the_store_or_a_dead_letter(nsqd, program, cluster, record):
    settings = cluster.settings(**{'total-timeout': '30s'})
    rows, timed = rows_of(cluster), 'key' in record

    def without_time(topic):
        found = rows(topic)
        assert all(('gts' in bins) == timed for _, bins in found)
        return [(key, {name: value for name, value in bins.items() if name != 'gts'}) for key, bins in found]

    roundtrip.check_sizes(nsqd, program, without_time, own_bins=1 + timed, record=record, **settings)


@pytest.mark.parametrize('seconds, limit', [
    (-1, 50), (0.01, 50), (2, 2000), (86400, 86_400_000), (0x7FFFFFFF / 1000, 0x7FFFFFFF),
    (2**32 / 1000, 0x7FFFFFFF), (3650 * 86400, 0x7FFFFFFF)])
def test_a_limit_of_time_stays_within_what_the_client_counts(seconds, limit):
    """2**32 ms would be no limit at all, and one second more would be one second."""
    assert to_milliseconds(seconds) == limit


def test_a_very_long_total_timeout(opened, cluster):
    assert opened(cluster, more={'total-timeout': '3650d'}).write(numbered(2)) == [STORED] * 2


# ---------------------------------------------------------------------------------------------------- the newest wins

def test_the_filter_is_the_one_that_the_client_compiles():
    """Ours is compiled once, and one item of it is put in its place for each record."""
    before, (op, kind, _, children), after = newest_wins_filter('gts')
    for moment in (0, 5, -2**63, 2**63 - 1):
        compiled = exp.Or(exp.Not(exp.BinExists('gts')), exp.LE(exp.IntBin('gts'), moment)).compile()
        assert [*before, (op, kind, {'val': moment}, children), *after] == compiled


@pytest.mark.parametrize('stored, answer, left', [(5, STALE, 5), (4, STORED, 4), (3, STORED, 4), (None, STORED, 4)])
def test_the_newest_wins(opened, cluster, stored, answer, left):
    if stored:
        cluster.put('k', {'id': 'k', 'gts': stored})
    assert opened(cluster, **BY_ID).write([newer('k', 4)]) == [answer]
    assert cluster.records() == {'k': {'id': 'k', 'gts': left}}


@pytest.mark.parametrize('moment', ['soon', 5.0, [5], {'a': 5}, True], ids=repr)
def test_a_stored_time_of_another_type_is_not_overwritten(opened, cluster, moment):
    cluster.put('k', {'id': 'k', 'gts': moment})
    rejected, stored = opened(cluster, **BY_ID).write([newer('k', 4), newer('l', 4)])
    assert (rejected.outcome, rejected.reason, stored) == ('rejected', 'rejected', STORED)
    assert 'gts' in rejected.detail
    assert cluster.records()['k'] == {'id': 'k', 'gts': moment}


@pytest.mark.parametrize('times', [(1, 2, 3), (3, 2, 1), (2, 3, 1), (2, 1, 2)])
def test_the_newest_wins_inside_a_batch(opened, cluster, times):
    answers = opened(cluster, **BY_ID).write([newer('k', time) for time in times])
    assert set(outcomes(answers)) <= {'stored', 'stale'} and STORED in answers
    assert cluster.records()['k']['gts'] == max(times)


def test_any_order_of_batches_leaves_the_newest(opened, cluster):
    store, draw = opened(cluster, **BY_ID), random.Random(4)
    records = [(f'k{number % 20}', time) for number, time in enumerate(draw.sample(range(10_000), 400))]
    for first in range(0, 400, 50):
        store.write([newer(*record) for record in records[first:first + 50]])
    newest = {key: max(time for name, time in records if name == key) for key, _ in records}
    assert {key: bins['gts'] for key, bins in cluster.records().items()} == newest


def test_a_record_without_the_time_is_overwritten(opened, cluster):
    cluster.put('k', {'other': 1})
    assert opened(cluster, **BY_ID).write([newer('k', 4)]) == [STORED]
    assert cluster.records() == {'k': {'id': 'k', 'gts': 4}}


# ------------------------------------------------------------------------------------------- what one bad record costs

UNFIT = {
    'integer': {'n': 2**63}, 'deep integer': {'a': [{'b': -2**63 - 1}]}, 'name': {'x' * 16: 1},
    'surrogate': {'s': '\ud800'}, 'no bins': {}, 'type': {'n': object()},
}


@pytest.mark.parametrize('bins', UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize('place', [0, 37, 99])
def test_what_the_client_refuses_takes_no_other_record_along(opened, cluster, bins, place):
    """The mapper lets none of them through; if the client has more to refuse than we know, this is what happens."""
    records = numbered(99)
    records.insert(place, Record('bad', bins, None))
    answers = opened(cluster).write(records)
    bad = answers.pop(place)
    assert answers == [STORED] * 99
    assert bad.outcome in ('rejected', 'retry')
    assert cluster.numbers() == list(range(99))


def test_a_record_that_is_too_big_is_rejected_alone(opened, cluster):
    records = numbered(9)
    records.insert(4, Record('big', {'n': 'x' * (2 << 20)}, None))
    answers = opened(cluster).write(records)
    big = answers.pop(4)
    assert (big.outcome, big.reason, answers) == ('rejected', 'too-big', [STORED] * 9)


def test_a_null_takes_its_record_along(opened, cluster):
    """The mapper leaves them out; with replace the server answers 4."""
    answers = opened(cluster).write([Record('k', {'n': None}, None), *numbered(2)])
    assert (outcomes(answers), answers[0].reason) == (['rejected', 'stored', 'stored'], 'rejected')


def test_a_namespace_that_is_not_there_stops_the_window(opened, cluster):
    answers = opened(cluster, more={'namespace': 'nowhere'}).write(numbered(3))
    assert set(outcomes(answers)) <= {'stop', 'retry'}
    assert 'nowhere' in answers[0].detail


# ------------------------------------------------------------------------------------------------- the table of answers

def answered(store, cluster, code):
    """The Answers to four records, of which the third gets `code`."""
    cluster.server.judge = lambda write: code if write.key == 'key-2' else None
    return store.write(numbered(4))


@pytest.mark.parametrize('code',
                         [code for code, what in MEANING_BY_CODE.items() if what in ('retry', 'stop') and code > 0])
def test_an_answer_that_is_nobodys_fault(opened, standin, code):
    answers = answered(opened(standin), standin, code)
    assert outcomes(answers) == ['stored', 'stored', MEANING_BY_CODE[code], 'stored']
    assert f'answer {code} ' in answers[2].detail and f'{NAMESPACE}.{standin.set}' in answers[2].detail
    assert standin.numbers() == [0, 1, 3]


@pytest.mark.parametrize('code', [4, 12, 21])
def test_a_refusal_is_a_dead_letter_where_others_were_stored(opened, standin, code):
    answer = answered(opened(standin), standin, code)[2]
    assert (answer.outcome, answer.reason) == ('rejected', 'rejected')
    assert f'answer {code} ' in answer.detail


@pytest.mark.parametrize('code', [4, 12, 21])
def test_a_refusal_of_all_stops_the_window(opened, standin, code):
    """A wrong policy answers so to every record."""
    standin.server.judge = lambda write: code
    store = opened(standin)
    answers = store.write(numbered(4))
    assert outcomes(answers) == ['undecided'] * 4
    assert 'no write has succeeded since opening' in answers[0].detail
    standin.server.judge = lambda write: None
    assert store.write(numbered(4)) == [STORED] * 4
    standin.server.judge = lambda write: code
    assert outcomes(store.write(numbered(4))) == ['rejected'] * 4


@pytest.mark.parametrize('code, write', [
    (99, 'replace'), (5, 'replace'), (27, 'replace'), (2, 'replace'), (27, 'create'),
])
def test_an_answer_that_is_not_in_the_table_is_tried_again_and_said(opened, standin, monkeypatch, code, write):
    said = []
    monkeypatch.setattr('xmsrv.log.error', lambda text, *values: said.append(text % values))
    store = opened(standin, write=write)
    assert [answered(store, standin, code)[2].outcome for _ in range(2)] == ['retry', 'retry']
    assert len(said) == 2 and all(f'answer {code} ' in line for line in said)   # the log limits what repeats


def test_a_write_that_is_in_doubt_is_tried_again(opened, standin):
    store = opened(standin)
    answer = answered(store, standin, Lost(9))[2]
    assert answer.outcome == 'retry'
    assert standin.numbers() == [0, 1, 2, 3]
    standin.server.judge = lambda write: None
    assert store.write(numbered(4)) == [STORED] * 4
    assert standin.numbers() == [0, 1, 2, 3]


def test_filtered_out_by_what_is_gone_is_tried_again(opened, standin):
    """The record expired, or was deleted, between the write and the look at it."""
    standin.server.judge = lambda write: 27
    answer, = opened(standin, **BY_ID).write([newer('k', 4)])
    assert answer.outcome == 'retry'


@contextlib.contextmanager
def full_set(cluster):
    cluster.client.info_all(f'set-config:context=namespace;id={NAMESPACE};set={cluster.set};stop-writes-count=2')
    yield
    cluster.client.info_all(f'set-config:context=namespace;id={NAMESPACE};set={cluster.set};stop-writes-count=0')


@contextlib.contextmanager
def no_expiry(cluster):
    cluster.server.nsup_period, cluster.server.default_ttl = 0, 60
    yield


@contextlib.contextmanager
def clock_skew(cluster):
    cluster.server.clock_skew_stop_writes = True
    yield


@contextlib.contextmanager
def full_namespace(cluster):
    cluster.server.stop_writes = True
    yield


FORBIDDEN = {full_set: (22, 'the set has reached its stop-writes-count of 2'),
             no_expiry: (22, 'a ttl is refused (default-ttl = 60)'),
             clock_skew: (22, 'the clocks of the nodes differ too much'),
             full_namespace: (8, 'the namespace stops writes')}


@pytest.mark.parametrize('cause', FORBIDDEN, ids=lambda cause: cause.__name__)
def test_the_advice_names_the_cause_of_a_forbidden_write(nsqd, program, standin, cause):
    """ttl is the default, so it is not what has to be looked at."""
    code, words = FORBIDDEN[cause]
    program.configure(nsqd, **standin.settings())
    nsqd.publish('orders', ['{"n": 1}', '{"n": 2}', '{"n": 3}'])
    standin.put('k', {'n': 0})
    standin.put('l', {'n': 0})
    with cause(standin):
        said = program.run('once', expect=os.EX_TEMPFAIL).stderr
        checked = program.run('check', '--connect', expect=os.EX_UNAVAILABLE)
    assert f'answer {code} ' in said and words in said
    assert words in checked.stderr and NAMESPACE in checked.stdout


def test_a_forbidden_write_without_a_known_cause_gets_general_advice(opened, standin):
    answer = answered(opened(standin), standin, 22)[2]
    assert 'check --connect' in answer.detail


def test_what_a_full_set_holds_can_still_be_written(opened, cluster):
    """The limit is on new records."""
    store = opened(cluster)
    assert store.write(numbered(2)) == [STORED] * 2
    with full_set(cluster):
        servers.wait_until(lambda: outcomes(store.write([Record('new', {'n': 3}, None)])) == ['stop'], 'it is full')
        assert store.write(numbered(2)) == [STORED] * 2


LIMITED = {'objects': '10', 'stop-writes-count': '10', 'data_used_bytes': '999', 'stop-writes-size': '1000'}


@pytest.mark.parametrize('ttl, namespace, set_, words', [
    (0, {}, {}, []),
    (0, {'stop_writes': 'false', 'clock_skew_stop_writes': 'false', 'nsup-period': '0', 'default-ttl': '0'}, {}, []),
    (0, {'stop_writes': 'true', 'clock_skew_stop_writes': 'true'}, {}, ['stop_writes', 'clock_skew_stop_writes']),
    (0, {}, LIMITED, ['stop-writes-count of 10']),
    (0, {}, {**LIMITED, 'objects': '9'}, []),
    (0, {}, {**LIMITED, 'objects': '9', 'data_used_bytes': '1000'}, ['stop-writes-size of 1000']),
    (0, {}, {'memory_data_bytes': '60', 'device_data_bytes': '40', 'stop-writes-size': '100'}, ['stop-writes-size']),
    (0, {}, {'objects': '10', 'stop-writes-count': '0', 'stop-writes-size': 'odd'}, []),
    (3600, {'nsup-period': '0'}, {}, ['a ttl is refused, ']),
    (3600, {'nsup-period': '120'}, {}, []),
    (3600, {'nsup-period': '0', 'allow-ttl-without-nsup': 'true'}, {}, []),
    (0xFFFFFFFF, {'nsup-period': '0', 'default-ttl': '5'}, {}, []),
    (0, {'nsup-period': '0', 'default-ttl': '5'}, {}, ['(default-ttl = 5)']),
    (0, {'nsup-period': '0', 'default-ttl': '5'}, {'default-ttl': '4294967295'}, []),
    (0, {'nsup-period': '0', 'default-ttl': '0'}, {'default-ttl': '7'}, ['(default-ttl = 7)']),
])
def test_why_a_node_forbids_writes(ttl, namespace, set_, words):
    found = list(write_obstacles(ttl, namespace, set_))
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


# ------------------------------------------------------------------------------------------------------ old servers

def test_a_server_that_is_too_old_is_named(nsqd, program, standin):
    standin.server.build = '5.7.0.31'
    program.configure(nsqd, **standin.settings())
    nsqd.publish('orders', '{"n": 1}')
    for command in (['once'], ['check', '--connect']):
        said = program.run(*command, expect=os.EX_UNAVAILABLE).stderr
        assert 'server 5.7.0.31 is too old: 6.0 or newer is needed' in said
    assert nsqd.left('orders', 'x-msrv') == 1


@pytest.mark.parametrize('version', ['6.0.0.0', '6.4.0.2', '8.1.2.0', '10.0.0.0-rc1', 'main'])
def test_a_server_that_is_new_enough(version):
    check_version('here', version)


@pytest.mark.parametrize('version', ['4.9.0.3', '5.7.0.8', '5.10.0.0-2-gabc'])
def test_a_server_that_is_not(version):
    with pytest.raises(StoreError, match=f'here: server {version} is too old'):
        check_version('here', version)


def test_check_says_that_a_batch_is_over_the_servers_limit(nsqd, program, standin):
    standin.server.batch_max_requests = 5000
    program.configure(nsqd, **standin.settings(**{'batch-size': 5000}))
    program.run('check', '--connect')
    program.configure(nsqd, **standin.settings(**{'batch-size': 5001}))
    said = program.run('check', '--connect', expect=os.EX_UNAVAILABLE).stderr
    assert 'batch-size = 5001 is over batch-max-requests = 5000' in said


# -------------------------------------------------------------------------------------------------------------- outages

def test_a_cluster_that_is_not_there_is_down(opened, standin):
    standin.server.refuse()
    with pytest.raises(StoreError, match=NAMESPACE):
        opened(standin)


def test_a_server_that_answers_nothing_is_down_in_time(opened, standin):
    store = opened(standin, more={'total-timeout': '500ms'})
    standin.server.hang()
    begun = time.monotonic()
    assert outcomes(store.write(numbered(3))) == ['retry'] * 3
    assert time.monotonic() - begun < store.call_timeout
    standin.server.resume()
    servers.wait_until(lambda: store.write(numbered(3)) == [STORED] * 3, 'it is back')


def test_a_server_that_dies_and_comes_back(opened, standin):
    store = opened(standin, more={'total-timeout': '500ms'})
    assert store.write(numbered(3)) == [STORED] * 3
    standin.server.refuse()
    assert outcomes(store.write(numbered(3))) == ['retry'] * 3
    standin.server.listen()
    servers.wait_until(lambda: store.write(numbered(3)) == [STORED] * 3, 'it is back')


def test_answers_that_are_lost_after_the_write(opened, standin):
    store = opened(standin)
    standin.server.drop_answers = 1
    answers = store.write(numbered(3))
    assert outcomes(answers) == ['retry'] * 3
    assert 'perhaps written' in answers[0].detail
    assert standin.numbers() == [0, 1, 2]
    servers.wait_until(lambda: store.write(numbered(3)) == [STORED] * 3, 'it is tried again')
    assert standin.numbers() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- how it is reached

@contextlib.contextmanager
def unknown_name():
    yield 'no-such-host.invalid:3000'


@contextlib.contextmanager
def silent():
    with proxies.Says() as server:
        yield server.address


@contextlib.contextmanager
def web_server():
    with proxies.Says(b'HTTP/1.1 400 Bad Request\r\n\r\n') as server:
        yield server.address


UNREACHABLE = {unknown_name: 'Name or service not known|Temporary failure in name resolution',
               proxies.refusing: 'Connection refused', silent: 'no answer in time',
               web_server: 'the server at this address is no Aerospike server'}


@pytest.mark.parametrize('host, reason', UNREACHABLE.items(), ids=lambda value: getattr(value, '__name__', ''))
def test_a_host_that_cannot_be_reached_is_named_with_the_reason(opened, standin, host, reason):
    with host() as address, pytest.raises(StoreError, match=f'{re.escape(address)}: ({reason})'):
        opened(standin, more={'hosts': address, 'total-timeout': '500ms'})


def test_each_host_that_cannot_be_reached_is_named(nsqd, program):
    with proxies.refusing() as first, proxies.refusing() as second:
        hosts = f'{first}, no-such-host.invalid:3000, {second}'
        program.configure(nsqd, store='aerospike', aerospike={'hosts': hosts, 'namespace': NAMESPACE})
        for command in (['once'], ['check', '--connect']):
            said = program.run(*command, expect=os.EX_UNAVAILABLE).stderr
            assert all(f'{address}: Connection refused' in said for address in (first, second))
            assert 'no-such-host.invalid:3000: ' in said


def test_the_log_of_the_client_is_quiet_after_it_has_connected(opened, standin, capfd):
    store = opened(standin)
    standin.server.refuse()
    assert outcomes(store.write(numbered(2))) == ['retry'] * 2
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('code, text, reason', [
    ('ERR_CONNECTION', 'Socket write error: 111, 127.0.0.1:3000', 'Connection refused'),
    ('ERR_CONNECTION', 'Socket read error: 104, [2001:db8::1]:3000', 'Connection reset by peer'),
    ('ERR_INVALID_HOST', 'Invalid hostname db1: Name or service not known', 'Name or service not known'),
    ('ERR_TIMEOUT', ', 127.0.0.1:3000', 'no answer in time'),
    ('INVALID_USER', 'AEROSPIKE_INVALID_USER from 127.0.0.1:3000', 'invalid user'),
    ('', 'something new', 'something new'),
    ('ERR_CLUSTER', '', 'cluster'),
])
def test_the_reason_in_a_line_of_the_client(code, text, reason):
    assert connect_reason(code, text) == reason


def test_one_of_several_hosts_is_enough(opened, standin):
    with proxies.refusing() as address:
        store = opened(standin, more={'hosts': f'{address}, {standin.address}'})
        assert store.write(numbered(2)) == [STORED] * 2


def test_ipv6(opened):
    with clusters.standin(host='::1') as cluster:
        assert opened(cluster).write(numbered(2)) == [STORED] * 2


@pytest.fixture
def authority(workdir):
    """A certificate authority in ca.pem, and a function that makes the context of a server by that name."""
    made = trustme.CA()
    made.cert_pem.write_to_path(workdir / 'ca.pem')
    client = made.issue_cert('x-msrv')
    client.private_key_and_cert_chain_pem.write_to_path(workdir / 'client.pem')

    def context(name, mutual=False):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.issue_cert(name).configure_cert(context)
        if mutual:
            made.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
    return context


TLS = {'ca-file': 'ca.pem', 'name': 'db.example'}


def tls(workdir, **options):
    """The option [[tls]], with files in the directory."""
    merged = {**TLS, **options}
    return {'tls': {name: workdir / value if name.endswith('-file') else value for name, value in merged.items()}}


def test_tls(opened, authority, workdir):
    with clusters.standin(tls=authority('db.example')) as cluster:
        assert opened(cluster, more=tls(workdir)).write(numbered(2)) == [STORED] * 2


def test_tls_with_a_client_certificate(opened, authority, workdir):
    with clusters.standin(tls=authority('db.example', mutual=True)) as cluster:
        more = tls(workdir, **{'cert-file': 'client.pem', 'key-file': 'client.pem'})
        assert opened(cluster, more=more).write(numbered(2)) == [STORED] * 2
        with pytest.raises(StoreError):
            opened(cluster, more=tls(workdir))


def test_tls_of_another_name_is_refused(opened, authority, workdir):
    with clusters.standin(tls=authority('other.example')) as cluster, pytest.raises(StoreError):
        opened(cluster, more=tls(workdir))


def test_tls_of_an_unknown_authority_is_refused(opened, authority, workdir):
    trustme.CA().cert_pem.write_to_path(workdir / 'theirs.pem')
    reason = 'certificate verify failed'
    with clusters.standin(tls=authority('db.example')) as cluster, pytest.raises(StoreError, match=reason):
        opened(cluster, more=tls(workdir, **{'ca-file': 'theirs.pem'}))


def test_tls_asked_for_and_not_there_is_refused(opened, authority, workdir):
    with clusters.standin() as cluster, pytest.raises(StoreError):
        opened(cluster, more=tls(workdir))


def test_user(opened, workdir):
    (workdir / 'password').write_text('s3cret\n')
    login = {'user': 'writer', 'password-file': workdir / 'password'}
    with clusters.standin(users={'writer': 's3cret'}) as cluster:
        assert opened(cluster, more=login).write(numbered(2)) == [STORED] * 2
        with pytest.raises(StoreError, match='invalid user') as failure:
            opened(cluster, more={**login, 'user': 'nobody'})
        assert 's3cret' not in str(failure.value)
        with pytest.raises(StoreError):
            opened(cluster)


# ------------------------------------------------------------------------------------------------------ check --connect

def test_check_says_what_is_there(nsqd, program, cluster):
    program.configure(nsqd, record={'ttl': '1h'}, **cluster.settings())
    cluster.put('k', {'a': 1})
    ran = program.run('check', '--connect')
    line, = [line for line in ran.stdout.splitlines() if line.startswith('aerospike ')]
    assert f'aerospike {cluster.address}: {NAMESPACE}.{cluster.set}: 1 node, server ' in line
    assert 'nsup-period' in line and 'bytes' in line


def test_check_says_that_the_namespace_is_not_there(nsqd, program, cluster):
    program.configure(nsqd, **cluster.settings(namespace='nowhere'))
    said = program.run('check', '--connect', expect=os.EX_UNAVAILABLE).stderr
    assert f'no such namespace; there are {NAMESPACE}' in said


def test_check_says_that_a_ttl_would_be_refused(nsqd, program):
    with clusters.standin(nsup_period=0) as cluster:
        program.configure(nsqd, record={'ttl': '1h'}, **cluster.settings())
        assert 'a ttl is refused' in program.run('check', '--connect', expect=os.EX_UNAVAILABLE).stderr
        program.configure(nsqd, record={'ttl': 'never'}, **cluster.settings())
        program.run('check', '--connect')


def test_check_says_that_the_cluster_is_down(nsqd, program, standin):
    standin.server.refuse()
    program.configure(nsqd, **standin.settings())
    ran = program.run('check', '--connect', expect=os.EX_UNAVAILABLE)
    assert f'aerospike {standin.address}: {NAMESPACE}.{standin.set}: ' in ran.stderr
    assert 'nsqd' in ran.stdout
