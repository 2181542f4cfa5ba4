"""What a store's answers mean. The client of Aerospike is the test's; the numbers are written out here, not taken from
the table under test. SQLite is real, in a file of the test."""
import contextlib
import errno
import sqlite3
import time
import types

import aerospike
import pytest

import fakes
import xmsrv
from fakes import sqlite_store, stored
from xmsrv import MAX_BINS, STORES, Record, StoreError, halves, log

ERRORS = aerospike.exception


class Client:
    """Answers each record as `answers` says (key -> code, 0 where it is not named), and keeps what it was
    asked."""

    def __init__(self, answers=None, refuses=(), stored=None):
        self.answers, self.refuses, self.stored = answers or {}, refuses, stored or {}
        self.calls, self.policies, self.info, self.seconds = [], [], {}, 0

    def batch_write(self, batch, policy):
        keys = [write.key[2] for write in batch.batch_records]
        self.calls.append(keys)
        self.policies.append(policy)
        time.sleep(self.seconds)
        for key in keys:
            if key in self.refuses:
                raise self.refuses[key]
        for write in batch.batch_records:
            write.result, write.in_doubt = self.answers.get(write.key[2], 0), False
        return types.SimpleNamespace(result=0)

    def batch_read(self, keys, bins, policy):
        self.read = keys, bins, policy
        return types.SimpleNamespace(batch_records=[
            types.SimpleNamespace(result=0 if key[2] in self.stored else 2,
                                  record=(key, {}, {'gts': self.stored.get(key[2])})) for key in keys])

    def info_all(self, question, policy=None):
        answer = next((text for name, text in self.info.items() if question.startswith(name)), '')
        return {'node': (None, answer)}

    def close(self):
        pass


@contextlib.contextmanager
def opened(monkeypatch, client, **sections):
    """An AerospikeStore on `client`; `client.config` is what the store would connect with."""
    def connect(config):
        client.config = config
        return client
    monkeypatch.setattr(aerospike, 'client', connect)
    store = STORES['aerospike'](fakes.options(**sections))
    store.open()
    yield store
    store.close()


def records(*keys, time=None, bins=None):
    return [Record(key, dict(bins or {'n': 1}), time) for key in keys]


def outcomes(store, *keys, **more):
    return [result.outcome for result in store.write(records(*keys, **more))]


@pytest.mark.parametrize(('code', 'outcome', 'reason'), [
    (0, 'stored', None), (13, 'rejected', 'too-big'),
    # a message's own fault, for a write of this run was good
    (4, 'rejected', 'rejected'), (-2, 'rejected', 'rejected'), (12, 'rejected', 'rejected'),
    (21, 'rejected', 'rejected'),
    # this record alone: hot key, lost conflict, transaction
    (14, 'busy', 14), (28, 'busy', 28), (120, 'busy', 120),
    # time, load, connection, cluster
    (-15, 'retry', -15), (-14, 'retry', -14), (-10, 'retry', -10), (-8, 'retry', -8), (9, 'retry', 9),
    (18, 'retry', 18), (7, 'retry', 7), (11, 'retry', 11),
    # nothing helps but a person
    (8, 'stop', 8), (20, 'stop', 20), (22, 'stop', 22), (80, 'stop', 80), (81, 'stop', 81), (82, 'stop', 82),
    # 5 and 27 have no meaning without write = create, and without a time; 3 and 999 nowhere
    (5, 'retry', 5), (27, 'retry', 27), (3, 'retry', 3), (999, 'retry', 999),
])
def test_each_answer_beside_a_good_write(monkeypatch, caplog, code, outcome, reason):
    monkeypatch.setattr(log, 'propagate', True)
    with opened(monkeypatch, Client({'bad': code})) as store:
        good, bad = store.write(records('good', 'bad'))
    assert (good.outcome, bad.outcome, bad.reason) == ('stored', outcome, reason)
    said = [record for record in caplog.records if 'are retried' in record.getMessage()]
    assert bool(said) is (code in (5, 27, 3, 999))    # the log says so of an answer that nobody has thought of


@pytest.mark.parametrize('code', [4, -2, 12, 21])
def test_a_refusal_before_any_good_write_has_no_verdict_and_after_one_it_has(monkeypatch, code):
    with opened(monkeypatch, Client({'bad': code})) as store:
        assert outcomes(store, 'bad') == ['undecided']
        assert outcomes(store, 'good') == ['stored']
        assert outcomes(store, 'bad') == ['rejected']


@pytest.mark.parametrize('code', [13, 14, -15, 22, 999])
def test_an_answer_that_says_nothing_of_the_form_is_no_proof(monkeypatch, code):
    with opened(monkeypatch, Client({'bad': 4, 'other': code})) as store:
        assert outcomes(store, 'other', 'bad')[1] == 'undecided'


def test_the_first_of_a_key_wins_with_create(monkeypatch):
    with opened(monkeypatch, Client({'there': 5, 'bad': 4}), record={'write': 'create'}) as store:
        assert outcomes(store, 'there', 'bad') == ['duplicate', 'rejected']


@pytest.mark.parametrize(('stored', 'outcome'), [
    ({'k': 11}, 'stale'), ({'k': 10}, 'retry'), ({'k': 9}, 'retry'), ({}, 'retry'), ({'k': 'text'}, 'rejected'),
    ({'k': True}, 'rejected'), ({'k': 10.5}, 'rejected'),
])
def test_what_the_filter_leaves_out_is_judged_by_the_stored_time(monkeypatch, stored, outcome):
    client = Client({'k': 27}, stored=stored)
    with opened(monkeypatch, client, record={'key': 'id'}) as store:
        assert outcomes(store, 'k', 'good', time=10) == [outcome, 'stored']
    assert client.read[:2] == ([('test', 'orders', 'k')], ['gts'])


def test_a_batch_is_durable_on_all_copies_and_the_client_tries_nothing_again(monkeypatch):
    client = Client()
    with opened(monkeypatch, client, aerospike={'total-timeout': '3s'}, record={'ttl': '1h'}) as store:
        store.write(records('a', 'b'))
    policy = client.config['policies']['batch_write']
    assert policy == {'key': aerospike.POLICY_KEY_SEND, 'commit_level': aerospike.POLICY_COMMIT_LEVEL_ALL,
                      'exists': aerospike.POLICY_EXISTS_CREATE_OR_REPLACE, 'ttl': 3600}
    (limits,), = [client.policies]
    assert limits['max_retries'] == 0
    assert 2500 < limits['total_timeout'] <= 3000 and 2500 < limits['socket_timeout'] <= 3000
    assert client.config['validate_keys'] is True


@pytest.mark.parametrize(('write', 'policy'), [('replace', 'POLICY_EXISTS_CREATE_OR_REPLACE'),
                                               ('create', 'POLICY_EXISTS_CREATE'), ('update', 'POLICY_EXISTS_IGNORE')])
def test_each_mode_has_its_policy(monkeypatch, write, policy):
    client = Client()
    with opened(monkeypatch, client, record={'write': write}):
        assert client.config['policies']['batch_write']['exists'] == getattr(aerospike, policy)


def test_with_newest_wins_each_write_carries_its_own_time_and_the_whole_policy(monkeypatch):
    from aerospike_helpers import expressions as exp
    client = Client()
    with opened(monkeypatch, client, record={'key': 'id'}) as store:
        writes = [store.builder.build_write(record) for record in [*records('a', time=5), *records('b', time=6)]]
    for write, moment in zip(writes, (5, 6), strict=True):
        wanted = exp.Or(exp.Not(exp.BinExists('gts')), exp.LE(exp.IntBin('gts'), moment)).compile()
        assert write.policy['expressions'] == wanted
        assert write.policy['commit_level'] == aerospike.POLICY_COMMIT_LEVEL_ALL
        assert write.policy['key'] == aerospike.POLICY_KEY_SEND


@pytest.mark.parametrize(('items', 'parts'), [
    ([], []), ([1], []), ([1, 2], [[1], [2]]), ([1, 2, 3], [[1], [2, 3]])])
def test_the_halves_of_a_batch_have_all_of_it(items, parts):
    assert halves(items) == parts


def test_what_the_client_refuses_as_a_whole_is_halved_until_the_culprit_is_alone(monkeypatch):
    client = Client(refuses={'k5': ERRORS.ParamError()})
    with opened(monkeypatch, client) as store:
        assert outcomes(store, *(f'k{n}' for n in range(8))) == ['stored'] * 5 + ['rejected'] + ['stored'] * 2
    assert client.calls[-3:] == [['k4'], ['k5'], ['k6', 'k7']]


@pytest.mark.parametrize('error', [ERRORS.TimeoutError, ERRORS.ClusterError, ERRORS.DeviceOverload])
def test_an_outage_is_not_halved(monkeypatch, error):
    client = Client(refuses={'k0': error()})
    with opened(monkeypatch, client) as store:
        assert outcomes(store, 'k0', 'k1', 'k2') == ['retry'] * 3
    assert len(client.calls) == 1


def test_halving_ends_at_the_deadline(monkeypatch):
    client = Client(refuses={f'k{n}': ERRORS.ParamError() for n in range(64)})
    client.seconds = 0.03
    with opened(monkeypatch, client, aerospike={'total-timeout': '100ms'}) as store:
        results = store.write(records(*client.refuses))
    assert len(client.calls) < 10
    assert {result.reason for result in results[-32:]} == {-15}


def test_wide_records_go_alone_behind_the_others(monkeypatch):
    client = Client()
    with opened(monkeypatch, client) as store:
        store.write([*records('wide', bins={f'b{n}': 1 for n in range(4001)}), *records('a', 'b')])
    assert client.calls == [['a', 'b'], ['wide']]


@pytest.mark.parametrize(('fact', 'advice'), [
    ('stop_writes=true', 'stop_writes'), ('clock_skew_stop_writes=true', 'clock_skew_stop_writes'),
    ('default-ttl=60;nsup-period=0;allow-ttl-without-nsup=false', 'nsup-period is 0')])
def test_forbidden_after_a_good_write_stops_and_names_the_cause(monkeypatch, fact, advice):
    client = Client({'bad': 22})
    client.info = {'namespace/': fact, 'sets/': '', 'build': '8.1.0.0'}
    with opened(monkeypatch, client) as store:
        assert outcomes(store, 'good') == ['stored']
        result, = store.write(records('bad'))
    assert result.outcome == 'stop' and '22' in result.detail and advice in result.detail


def test_the_cause_of_an_earlier_batch_is_not_named_for_a_later_one(monkeypatch):
    client = Client({'bad': 8})
    client.info = {'namespace/': 'stop_writes=true', 'sets/': '', 'build': '8.1.0.0'}
    with opened(monkeypatch, client) as store:
        first, = store.write(records('bad'))
        client.info_all = lambda question, policy=None: {}
        second, = store.write(records('bad'))
    assert 'stop_writes' in first.detail
    assert second.detail.endswith('(make room)')


@pytest.mark.parametrize(('version', 'taken'), [('5.7.0.8', False), ('6.0.0.0', True), ('10.1', True), ('odd', True)])
def test_a_server_that_takes_no_batches_of_writes_is_refused(monkeypatch, version, taken):
    client = Client()
    client.info = {'build': version}
    fails = contextlib.nullcontext() if taken else pytest.raises(StoreError, match='too old')
    with fails, opened(monkeypatch, client):
        pass


# -- the cluster itself

@pytest.mark.parametrize(('ttl', 'namespace', 'set_', 'obstacle'), [
    (0, {}, {}, None),
    (0, {'stop_writes': 'false', 'clock_skew_stop_writes': 'false'}, {}, None),
    (0, {'stop_writes': 'true'}, {}, 'stop_writes'),
    (0, {'clock_skew_stop_writes': 'true'}, {}, 'clock_skew_stop_writes'),
    (0, {}, {'stop-writes-count': '10', 'objects': '9'}, None),
    (0, {}, {'stop-writes-count': '10', 'objects': '10'}, 'its stop-writes-count of 10'),
    (0, {}, {'stop-writes-count': '0', 'objects': '10'}, None),
    (0, {}, {'stop-writes-size': '10', 'data_used_bytes': '10'}, 'its stop-writes-size of 10'),
    (0, {}, {'stop-writes-size': '10', 'memory_data_bytes': '4', 'device_data_bytes': '6'}, 'stop-writes-size of 10'),
    (0, {}, {'stop-writes-size': '10', 'memory_data_bytes': '4', 'device_data_bytes': '5'}, None),
    # a ttl of ours, of the set, of the namespace; none
    (60, {'nsup-period': '0'}, {}, 'a ttl is refused, for'),
    (0, {'nsup-period': '0', 'default-ttl': '60'}, {}, '(default-ttl = 60)'),
    (0, {'nsup-period': '0', 'default-ttl': '0'}, {'default-ttl': '7'}, '(default-ttl = 7)'),
    (0, {'nsup-period': '0', 'default-ttl': '0'}, {}, None),
    (-1, {'nsup-period': '0', 'default-ttl': '60'}, {}, None),
    (60, {'nsup-period': '120'}, {}, None),
    (60, {'nsup-period': '0', 'allow-ttl-without-nsup': 'true'}, {}, None),
    (60, {'nsup-period': '0', 'allow-ttl-without-nsup': 'false'}, {}, 'a ttl is refused'),
])
def test_why_a_node_forbids_writes(ttl, namespace, set_, obstacle):
    found = list(xmsrv.write_obstacles(xmsrv.TTL_NEVER if ttl == -1 else ttl, namespace, set_))
    assert len(found) == bool(obstacle) and (not obstacle or obstacle in found[0]), found


FACTS = {'build': '8.1.1.2', 'namespace/test': 'nsup-period=120;default-ttl=0;max-record-size=1048576;objects=99;'
         'effective_replication_factor=2', 'sets/test/orders': 'objects=10:stop-writes-count=0;',
         'get-config': 'batch-max-requests=5000'}


def described(monkeypatch, *nodes, **sections):
    """What describe_contents() says of nodes that answer so."""
    client = Client()
    client.info_all = lambda question, policy=None: {
        f'node{number}': next(((None, text) for name, text in node.items() if question.startswith(name)),
                              ('error', None)) for number, node in enumerate(nodes)}
    with opened(monkeypatch, client, **sections) as store:
        return store.describe_contents()


def test_a_cluster_is_described_with_its_records_each_counted_once(monkeypatch):
    where = 'aerospike 127.0.0.1:3000: test.orders'
    assert described(monkeypatch, FACTS) == (
        f'{where}: 1 node, server 8.1.1.2, 5 records of at most 1048576 bytes, default-ttl 0, nsup-period 120', [])
    line, problems = described(monkeypatch, FACTS, {**FACTS, 'build': '8.0'}, {**FACTS, 'build': '8.0'})
    assert line.startswith(f'{where}: 3 nodes, server 8.1.1.2 and 8.0, 15 records') and problems == []
    alone = {**FACTS, 'namespace/test': 'nsup-period=120'}
    assert described(monkeypatch, alone)[0].startswith(f'{where}: 1 node, server 8.1.1.2, 10 records')


def test_what_is_wrong_with_a_cluster_is_named_once_for_all_nodes(monkeypatch):
    full = {**FACTS, 'namespace/test': FACTS['namespace/test'] + ';stop_writes=true'}
    small = {**FACTS, 'get-config': 'batch-max-requests=100;x=y', 'sets/': 'stop-writes-count=1:objects=1'}
    del small['sets/test/orders']
    _, problems = described(monkeypatch, full, full, small, {**FACTS, 'get-config': 'batch-max-requests=0'})
    assert [problem.partition('test.orders: ')[2] for problem in problems] == [
        'the namespace stops writes (stop_writes): a limit of its storage or memory is reached',
        'the set has reached its stop-writes-count of 1',
        'batch-size = 500 is over batch-max-requests = 100 of the server']
    assert described(monkeypatch, {**FACTS, 'get-config': 'batch-max-requests=500'})[1] == []


def test_a_namespace_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    node = {'build': '8.1.1.2', 'namespaces': 'one;two\n', 'namespace/': '', 'sets/': ''}
    line, problems = described(monkeypatch, node)
    assert line.endswith('server 8.1.1.2')
    assert problems[0].endswith('no such namespace; there are one, two')


def test_a_node_that_does_not_say_its_limits_has_none_and_a_cluster_that_says_nothing_is_down(monkeypatch):
    assert described(monkeypatch, {name: text for name, text in FACTS.items() if name != 'get-config'})[1] == []
    with pytest.raises(StoreError, match='no node answers'):
        described(monkeypatch, {}, {})


def test_an_info_question_that_fails_is_an_outage_with_its_name(monkeypatch):
    client = Client()
    with opened(monkeypatch, client) as store:
        def fails(question, policy=None):
            asked.append(policy)
            raise ERRORS.TimeoutError('x')
        asked, client.info_all = [], fails
        with pytest.raises(StoreError, match='9 TimeoutError'):
            store.nodes.query_info('build')
        with pytest.raises(StoreError):
            store.nodes.query_info('build', time.monotonic() + 2)
        assert asked[0] is None and 1900 < asked[1]['timeout'] <= 2000


@pytest.mark.parametrize(('seconds', 'taken'), [(1, 1000), (0.0004, 50), (-5, 50), (1e9, 0x7FFFFFFF)])
def test_a_limit_is_never_0_nor_over_what_the_client_counts(seconds, taken):
    assert xmsrv.to_milliseconds(seconds) == taken


@pytest.mark.parametrize(('code', 'text', 'reason'), [
    ('ERR_TIMEOUT', '', 'no answer in time'), ('ERR_TIMEOUT', 'AEROSPIKE_ERR_TIMEOUT', 'no answer in time'),
    ('ERR_TIMEOUT', 'too slow', 'too slow'),
    ('ERR_CONNECTION', 'Socket write error: 111, 127.0.0.1:3000', 'Connection refused'),
    ('ERR_CONNECTION', 'Socket read error: 104 from [::1]:3000', 'Connection reset by peer'),
    ('ERR_INVALID_HOST', 'Invalid hostname db: Name or service not known', 'Name or service not known'),
    ('ERR_CLIENT', 'Invalid proto version 72', 'the server at this address is no Aerospike server'),
    ('ERR_NOT_AUTHENTICATED', '', 'not authenticated')])
def test_the_clients_line_about_a_host_in_words(code, text, reason):
    assert xmsrv.connect_reason(code, text) == reason


class Module:
    """What a ConnectLog needs of the client's module."""

    LOG_LEVEL_WARN = 3

    def __init__(self):
        self.handler = self.level = None

    def set_log_handler(self, handler):
        self.handler = handler

    def set_log_level(self, level):
        self.level = level


def test_the_reason_for_each_host_is_taken_from_the_clients_log():
    module = Module()
    with xmsrv.ConnectLog(module) as connect_log:
        assert module.level == 3
        for line in ('Failed to connect to seed db1 3000. AEROSPIKE_ERR_TIMEOUT ', 'TLS: certificate verify failed',
                     'Failed to connect to seed ::1 3000. AEROSPIKE_ERR_TLS_ERROR Socket write error: 111, [::1]:3000',
                     'Failed to lookup db2 3000. AEROSPIKE_ERR_INVALID_HOST Invalid hostname db2: not known',
                     'Failed to connect to seed db1 3000. AEROSPIKE_ERR_TIMEOUT ', 'something else'):
            module.handler(3, 'function', 'path', 7, line)
    assert module.handler is None
    assert connect_log.failed_hosts() == [
        'db1:3000: no answer in time', '[::1]:3000: TLS: certificate verify failed; Connection refused',
        'db2:3000: not known']


def test_a_cluster_that_cannot_be_reached_is_named_with_the_reason(monkeypatch):
    error = ERRORS.ConnectionError()
    error.msg = 'Failed to connect'

    def connect(config):
        raise error
    monkeypatch.setattr(aerospike, 'client', connect)
    store = STORES['aerospike'](fakes.options())
    with pytest.raises(StoreError, match='127.0.0.1:3000: test.orders: -10 ConnectionError: Failed to connect'):
        store.open()
    assert store.client is None
    store.close()


@pytest.mark.parametrize(('hosts', 'nodes', 'found'), [
    ('a:3000, b:3000', ['BB9'], True), ('a:3000, b:3000', [], False), ('a:3000', ['BB9'], False)])
def test_one_node_of_several_hosts_is_enough(monkeypatch, hosts, nodes, found):
    configs, closed = [], []

    class Partial(Client):
        def get_node_names(self):
            return nodes

        def close(self):
            closed.append(self)

    def connect(config):
        configs.append(config)
        if config.get('fail_if_not_connected', True):
            raise ERRORS.ClusterError('no')
        return Partial()
    monkeypatch.setattr(aerospike, 'client', connect)
    store = STORES['aerospike'](fakes.options(aerospike={'hosts': [host.strip() for host in hosts.split(',')]}))
    fails = contextlib.nullcontext() if found else pytest.raises(StoreError)
    with fails:
        store.open()
    assert bool(store.client) is found and len(closed) == (len(configs) == 2 and not found)


def test_the_client_is_told_of_hosts_names_user_and_certificates(monkeypatch, tmp_path):
    for name in ('ca', 'cert', 'key', 'password'):
        (tmp_path / name).write_text(f'{name}\n')
    client, tls = Client(), {'ca-file': str(tmp_path / 'ca')}
    with opened(monkeypatch, client, aerospike={'hosts': ['a:3000', 'b:4000'], 'total-timeout': '3s'}):
        config = client.config
    assert (config['hosts'], config['connect_timeout']) == ([('a', 3000), ('b', 4000)], 3000)
    assert not {'tls', 'user', 'password'} & config.keys()
    tls['name'] = 'db'
    secure = {'hosts': ['a:3000'], 'user': 'me', 'password-file': str(tmp_path / 'password'), 'tls': tls}
    with opened(monkeypatch, client, aerospike=secure):
        config = client.config
    assert (config['hosts'], config['user'], config['password']) == ([('a', 3000, 'db')], 'me', 'password')
    assert config['tls'] == {'enable': True, 'cafile': tls['ca-file']}
    tls['cert-file'] = str(tmp_path / 'cert')
    for more, key in (({}, 'cert'), ({'key-file': str(tmp_path / 'key')}, 'key')):
        with opened(monkeypatch, client, aerospike={**secure, 'tls': {**tls, **more}}):
            assert client.config['tls'] == {'enable': True, 'cafile': tls['ca-file'], 'certfile': tls['cert-file'],
                                            'keyfile': str(tmp_path / key)}


def test_a_password_that_is_gone_by_now_is_an_outage(monkeypatch, tmp_path):
    with pytest.raises(StoreError, match='password: No such file'), opened(
            monkeypatch, Client(), aerospike={'user': 'me', 'password-file': str(tmp_path / 'password')}):
        pass


def test_an_answer_is_told_with_its_name_and_advice_and_whether_it_may_have_been_written(monkeypatch):
    client = Client({'bad': 9})
    with opened(monkeypatch, client) as store:
        result, = store.write(records('bad'))
        assert result.detail.endswith('answer 9 TimeoutError (see whether the nodes are overloaded or gone)')
        write = types.SimpleNamespace(result=9, in_doubt=True, ops=[1])
        assert store.build_result('retry', write).detail.endswith(', perhaps written')
        write = types.SimpleNamespace(result=9, in_doubt=False, ops=[1] * 4001)
        assert 'a record of 4001 bins takes the server long' in store.build_result('retry', write).detail
        assert xmsrv.describe_code(12345) == '12345 not known to the client'


def test_the_time_that_is_stored_and_cannot_be_read_is_tried_again(monkeypatch):
    client = Client({'k': 27})

    def fails(keys, bins, policy):
        raise ERRORS.ClusterError('x')
    client.batch_read = fails
    with opened(monkeypatch, client, record={'key': 'id'}) as store:
        result, = store.write(records('k', time=10))
    assert (result.outcome, result.reason) == ('retry', 11)


def test_an_error_that_is_nobodys_is_everybodys(monkeypatch):
    client = Client()
    client.batch_write = lambda batch, policy: types.SimpleNamespace(result=-8)
    with opened(monkeypatch, client) as store:
        write = store.builder.build_write(records('a')[0])
        write.result = 0
        store.send_batch([write], time.monotonic() + 1)
        assert write.result == -8


def test_wide_records_that_have_no_time_left_are_not_sent(monkeypatch):
    now = [100.0]

    class Slow(Client):
        def batch_write(self, batch, policy):
            now[0] += 0.6
            return super().batch_write(batch, policy)
    client = Slow()
    with opened(monkeypatch, client, aerospike={'total-timeout': '1s'}) as store:
        monkeypatch.setattr(time, 'monotonic', lambda: now[0])
        results = store.write(records('a', 'b', 'c', bins={f'b{n}': 1 for n in range(4001)}))
    assert [result.outcome for result in results] == ['stored', 'stored', 'retry']
    assert (client.calls, results[2].reason) == ([['a'], ['b']], -15)


# -- SQLite

def test_sqlite_commits_each_batch_durably(tmp_path):
    with sqlite_store(tmp_path) as store:
        assert store.db.execute('PRAGMA synchronous').fetchone() == (2,)       # FULL
        assert store.db.execute('PRAGMA journal_mode').fetchone() == ('wal',)
        assert outcomes(store, 'a', 1, '1') == ['stored'] * 3
        assert not store.db.in_transaction
        assert stored(tmp_path) == {'a': {'n': 1}, 1: {'n': 1}, '1': {'n': 1}}


def test_sqlite_keeps_the_newest_also_within_a_batch(tmp_path):
    with sqlite_store(tmp_path, record={'key': 'id'}) as store:
        def write(*times):
            return [result.outcome for result in store.write([Record('k', {'gts': t}, t) for t in times])]
        assert write(5, 4, 5, 6) == ['stored', 'stale', 'stored', 'stored']
        assert (write(5), write(6), write(7)) == (['stale'], ['stored'], ['stored'])
        assert stored(tmp_path) == {'k': {'gts': 7}}


def test_sqlite_creates_once_and_merges_in_update(tmp_path):
    with sqlite_store(tmp_path, record={'write': 'create'}) as store:
        assert outcomes(store, 'a', 'a') == ['stored', 'duplicate']
    with sqlite_store(tmp_path, record={'write': 'update'}) as store:
        assert outcomes(store, 'a', bins={'m': 1}) == outcomes(store, 'a', bins={'m': 2}) == ['stored']
        assert stored(tmp_path) == {'a': {'n': 1, 'm': 2}}
        wide = {f'b{n}': 1 for n in range(MAX_BINS - 1)}
        assert outcomes(store, 'a', bins=wide) == ['rejected']
        assert stored(tmp_path) == {'a': {'n': 1, 'm': 2}}


def test_sqlite_merges_anew_when_an_update_is_tried_again(tmp_path):
    """What was stored at the first try is no longer what is stored now, after another process wrote."""
    with sqlite_store(tmp_path, record={'write': 'update'}) as store:
        again = Record('a', {'m': 2}, None)
        store.write([Record('a', {'n': 1}, None)])
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StoreError):
            patch.setattr(store, 'write_and_delete', lambda *_: store.db.execute('no SQL'))
            store.write([again])
        store.write([Record('a', {'n': 5}, None)])
        store.write([again])
        assert stored(tmp_path) == {'a': {'n': 5, 'm': 2}}


def test_sqlite_replaces_the_whole_record_but_in_update(tmp_path):
    with sqlite_store(tmp_path, record={'key': 'id'}) as store:
        for time_, bins in ((1, {'old': 1}), (2, {'new': 1})):
            store.write([Record('k', {**bins, 'gts': time_}, time_)])
        assert stored(tmp_path) == {'k': {'new': 1, 'gts': 2}}
    with sqlite_store(tmp_path) as store:
        assert outcomes(store, 'k', bins={'n': 2}) == ['stored']
        assert stored(tmp_path) == {'k': {'n': 2}}


@pytest.mark.parametrize('record', [{}, {'set-field': 't'}, {'key': 'id', 'time': 'ts', 'delete': {
    'field': 'op', 'values': 'd'}}], ids=['one set', 'several sets', 'tombstones'])
def test_sqlite_leaves_the_last_of_equal_keys_in_a_batch(tmp_path, record):
    with sqlite_store(tmp_path, record=record) as store:
        store.upsert([Record(key, {'n': n}, n) for n, key in enumerate(['a', 1, 'a', '1', 1, 'b', 'a'])])
        assert stored(tmp_path) == {'a': {'n': 6}, 1: {'n': 4}, '1': {'n': 3}, 'b': {'n': 5}}
        assert store.db.execute('SELECT DISTINCT "set" FROM records').fetchall() == [(store.set,)]
        store.upsert([])


def test_sqlite_judges_only_what_is_in_its_own_set(tmp_path):
    with sqlite_store(tmp_path, record={'write': 'create'}, sqlite={'set': 'one'}) as store:
        assert outcomes(store, 'k') == ['stored']
    with sqlite_store(tmp_path, record={'write': 'create'}, sqlite={'set': 'two'}) as store:
        assert outcomes(store, 'k', 'k') == ['stored', 'duplicate']
        line, problems = store.describe_contents()
        assert '1 records in set two' in line and problems == []


@pytest.mark.parametrize(('bins', 'detail'), [('[1]', 'no JSON object'), ('no json', 'no JSON object'),
                                              ('{"gts": "text"}', 'no integer'), ('{"gts": 1.5}', 'no integer')])
def test_sqlite_says_so_where_somebody_else_has_written(tmp_path, bins, detail):
    with sqlite_store(tmp_path, record={'key': 'id'}) as store:
        store.db.execute("INSERT INTO records VALUES (?, 'k', ?, '')", (store.set, bins))
        result, = store.write([Record('k', {'gts': 5}, 5)])
        assert result.outcome == 'rejected' and detail in result.detail
        store.db.execute("UPDATE records SET bins = '{}'")    # without a time it is older than all
        assert [each.outcome for each in store.write([Record('k', {'gts': 5}, 5)])] == ['stored']


def test_sqlite_finds_out_at_once_that_the_table_is_another(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / 'records.sqlite')) as database:
        database.execute('CREATE TABLE records (a, b)')
    with pytest.raises(StoreError) as caught, sqlite_store(tmp_path):
        pass
    assert not caught.value.retryable


def test_sqlite_leaves_nothing_of_its_first_look(tmp_path):
    with sqlite_store(tmp_path) as store:
        assert stored(tmp_path) == {} and not store.db.in_transaction
        assert store.write([]) == []


def test_sqlite_rolls_back_and_only_a_lock_may_pass(tmp_path):
    with sqlite_store(tmp_path) as store:
        store.db.execute('PRAGMA busy_timeout = 0')
        other = sqlite3.connect(tmp_path / 'records.sqlite', isolation_level=None)
        other.execute('BEGIN IMMEDIATE')
        with pytest.raises(StoreError) as caught:
            store.write(records('a'))
        assert caught.value.retryable
        other.execute('ROLLBACK')
        other.execute('DROP TABLE records')
        other.close()
        with pytest.raises(StoreError) as caught:
            store.write(records('a'))
        assert not caught.value.retryable and not store.db.in_transaction


def test_sqlite_notices_that_its_file_was_replaced(tmp_path):
    with sqlite_store(tmp_path) as store:
        (tmp_path / 'records.sqlite').rename(tmp_path / 'old')
        (tmp_path / 'records.sqlite').touch()
        with pytest.raises(StoreError, match='replaced'):
            store.write(records('a'))


def test_sqlite_takes_no_device(tmp_path):
    (tmp_path / 'records.sqlite').symlink_to('/dev/null')
    store = STORES['sqlite'](types.SimpleNamespace(
        sqlite=types.SimpleNamespace(path=str(tmp_path / 'records.sqlite'), set='s'),
        record=types.SimpleNamespace(write='replace', time_bin=None, set_field=None, delete=None)))
    with pytest.raises(StoreError) as caught:
        store.open()
    assert caught.value.__cause__.errno == errno.EINVAL


def test_a_path_that_is_named_so_is_not_locked(tmp_path):
    (tmp_path / 'locked').mkdir()
    with sqlite_store(tmp_path / 'locked') as store:
        (tmp_path / 'locked' / 'records.sqlite').rename(tmp_path / 'moved')
        with pytest.raises(StoreError) as caught:
            store.write(records('a'))
        assert not caught.value.retryable
