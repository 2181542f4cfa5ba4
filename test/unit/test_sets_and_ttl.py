"""Set and ttl of a record by fields of its message: what the mapper takes, and what both stores make of them."""
import json
import types

import aerospike
import pytest

import fakes
from fakes import stored_in_sets
from xmsrv import MAX_TTL, InvalidMessage, Mapper, Record, build_config, sets_of
from xmsrv import AerospikeStore as Store


def mapped(value, **record):
    options = fakes.options(record=record)
    return Mapper(options).build_record(fakes.message(7, json.dumps(value).encode()))


def refused(value, **record):
    with pytest.raises(InvalidMessage) as caught:
        mapped(value, **record)
    return caught.value.reason, caught.value.detail


# --- what the mapper takes

@pytest.mark.parametrize('name', ['acme', 'a' * 63, '\u00e9' * 31, 'a/b', 'A', '0'])
def test_a_field_names_the_set(name):
    assert mapped({'tenant': name, 'n': 1}, **{'set-field': 'tenant'}).set == name
    assert mapped({'a': [{'tenant': name}]}, **{'set-field': 'a[0].tenant'}).set == name
    assert mapped({'tenant': name}).set is None


@pytest.mark.parametrize(('name', 'rule'), [
    (None, 'missing, and it names the set'), (5, 'not a string'), (True, 'not a string'), (['a'], 'not a string'),
    ({}, 'not a string'), ('', 'not a name for Aerospike'), ('a b', 'not a name for Aerospike'), ('a;b', 'not a name'),
    ('a:b', 'not a name'), ('a,b', 'not a name'), ('a\n', 'not a name'), ('a' * 64, '64 bytes; Aerospike takes 63'),
    ('\u00e9' * 32, '64 bytes'), ('<ERO~MRT>', 'a set of the server itself')])
def test_what_is_no_name_of_a_set_is_a_dead_letter(name, rule):
    reason, detail = refused({'tenant': name, 'n': 1}, **{'set-field': 'tenant'})
    assert (reason, detail.startswith(f'tenant: {rule}')) == ('schema', True), detail
    assert refused({'n': 1}, **{'set-field': 'tenant'}) == ('schema', 'tenant: missing, and it names the set')


@pytest.mark.parametrize('seconds', [1, 60, MAX_TTL, None])
def test_a_field_gives_the_ttl(seconds):
    assert mapped({'a': {'keep': seconds}}, **{'ttl-field': 'a.keep'}).ttl == seconds
    assert mapped({'keep': seconds, 'n': 1}, **{'ttl-field': 'keep'}).ttl == seconds
    assert mapped({'n': 1}, **{'ttl-field': 'keep'}).ttl is None


@pytest.mark.parametrize('seconds', [0, -1, MAX_TTL + 1, 1.0, '60', True, [60], {}])
def test_what_is_no_ttl_is_a_dead_letter(seconds):
    assert MAX_TTL == 3650 * 86400
    assert refused({'keep': seconds}, **{'ttl-field': 'keep'}) == (
        'schema', 'keep: a ttl is a whole number of seconds from 1 to 315360000')


def test_set_and_ttl_are_found_before_bins_get_their_names():
    record = mapped({'t': 'acme', 'k': 5, 'gid': 'x'}, **{'set-field': 't', 'ttl-field': 'k', 'id-bin': 'k2',
                                                         'bins': {'t': 'tenant', 'k': 'gts2'}})
    assert (record.set, record.ttl, record.bins['tenant'], record.bins['gts2']) == ('acme', 5, 'acme', 5)


@pytest.mark.parametrize(('sections', 'fault'), [
    ({'record': {'ttl-field': 'keep'}, 'store': 'sqlite'}, '[record] ttl-field: store = sqlite keeps records for ever'),
    ({'record': {'set-field': 'a..b'}}, '[record] set-field = a..b: no path'),
    ({'message': {'fields': {'a': 'any'}, 'unknown-fields': 'drop'}, 'record': {'set-field': 't'}},
     '[record] set-field = t: no such field'),
    ({'message': {'fields': {'a': 'any'}, 'unknown-fields': 'reject'}, 'record': {'ttl-field': 't'}},
     '[record] ttl-field = t: no such field')])
def test_faults_are_named(sections, fault):
    given = {'nsq': {'nsqd-tcp-address': '127.0.0.1:4150', 'topic': 't'},
             'aerospike': {'hosts': '127.0.0.1:3000', 'namespace': 'test'}, **sections}
    faults = [str(each) for each in build_config(given)[1] if each.section]
    assert len(faults) == 1 and faults[0].startswith(fault), faults


# --- SQLite

def sqlite_store(tmp_path, **record):
    return fakes.sqlite_store(tmp_path, record=record, sqlite={'set': 'rest'})


def outcomes(results):
    return [result.outcome for result in results]


def test_sqlite_keeps_the_records_of_each_set_apart(tmp_path):
    with sqlite_store(tmp_path, **{'set-field': 't'}) as store:
        records = [Record(key, {'t': set_, 'n': n}, None, set_) for n, (set_, key) in
                   enumerate([('a', 1), ('b', 1), ('a', '1'), (None, 1), ('a', 1)])]
        assert outcomes(store.write(records)) == ['stored'] * 5
        assert stored_in_sets(tmp_path) == {('a', 1): {'t': 'a', 'n': 4}, ('b', 1): {'t': 'b', 'n': 1},
                                            ('a', '1'): {'t': 'a', 'n': 2}, ('rest', 1): {'t': None, 'n': 3}}
        assert '4 records in 3 sets' in store.describe_contents()[0]


def test_sqlite_judges_a_record_by_the_one_in_its_own_set(tmp_path):
    def newer(set_, time):
        return Record('k', {'gts': time}, time, set_)
    with sqlite_store(tmp_path, **{'set-field': 't', 'key': 'k'}) as store:
        assert outcomes(store.write([newer('a', 5), newer('b', 3), newer('a', 4)])) == ['stored', 'stored', 'stale']
        assert outcomes(store.write([newer('b', 4), newer('a', 4), newer('c', 1)])) == ['stored', 'stale', 'stored']
        assert stored_in_sets(tmp_path) == {('a', 'k'): {'gts': 5}, ('b', 'k'): {'gts': 4}, ('c', 'k'): {'gts': 1}}


def test_sqlite_creates_in_each_set_and_looks_records_up_by_the_index(tmp_path):
    with sqlite_store(tmp_path, **{'set-field': 't', 'write': 'create'}) as store:
        records = [Record('k', {}, None, 'a'), Record('k', {}, None, 'b'), Record('k', {}, None, 'a')]
        assert outcomes(store.write(records)) == ['stored', 'stored', 'duplicate']
        asked = []
        store.db.set_trace_callback(asked.append)
        store.read_stored(records)
        plan = ' '.join(row[3] for row in store.db.execute(f'EXPLAIN QUERY PLAN {asked[0]}'))
        assert 'SEARCH records USING PRIMARY KEY' in plan and 'SCAN records' not in plan


# --- Aerospike

class Client:
    """Takes each write, and answers to info what the test gave."""

    def __init__(self, info=()):
        self.writes, self.read, self.code, self.codes, self.info = [], [], 0, {}, dict(info)

    def batch_write(self, batch, policy):
        self.writes += batch.batch_records
        for write in batch.batch_records:
            write.result, write.in_doubt = self.codes.get(write.key[1], self.code), False
        return types.SimpleNamespace(result=0)

    def batch_read(self, keys, bins, policy):
        self.read += keys
        return types.SimpleNamespace(batch_records=[types.SimpleNamespace(result=0, record=(key, {}, {'gts': 9}))
                                                    for key in keys])

    def info_all(self, question, policy=None):
        return {'node': (None, self.info.get(question, ''))}

    def close(self):
        pass


def opened(monkeypatch, client, **record):
    monkeypatch.setattr(aerospike, 'client', lambda config: client)
    store = Store(fakes.options(record=record, aerospike={'set': 'rest'}))
    store.open()
    return store


def test_aerospike_writes_to_the_set_with_the_ttl_of_the_record(monkeypatch):
    client = Client()
    store = opened(monkeypatch, client, **{'set-field': 't', 'ttl-field': 'keep', 'ttl': '1h'})
    store.write([Record('k', {'n': 1}, None, 'a', 60), Record('k', {'n': 1}, None, 'b'), Record('k', {'n': 1}, None)])
    assert [write.key for write in client.writes] == [('test', 'a', 'k'), ('test', 'b', 'k'), ('test', 'rest', 'k')]
    own, *others = [write.policy for write in client.writes]
    assert others == [None, None] and own == {**store.builder.policy, 'ttl': 60} and store.builder.policy['ttl'] == 3600


def test_aerospike_joins_ttl_and_the_filter_of_newest_wins_and_reads_in_the_same_set(monkeypatch):
    client = Client()
    store = opened(monkeypatch, client, **{'set-field': 't', 'ttl-field': 'keep', 'key': 'k'})
    client.code = 27
    records = [Record('k', {'gts': 5}, 5, 'a', 60), Record('k', {'gts': 5}, 5, 'b')]
    assert outcomes(store.write(records)) == ['stale'] * 2
    assert client.read == [('test', 'a', 'k'), ('test', 'b', 'k')]
    assert [(write.policy['ttl'], 'expressions' in write.policy) for write in client.writes] == [(60, True), (0, True)]


NAMESPACE = 'nsup-period={};default-ttl=0;max-record-size=1048576;objects=7'
SET = 'ns=test:set={}:objects=1:stop-writes-count={};'


def described(monkeypatch, sets, nsup=120, **record):
    info = {'build': '8.1.0.0', 'namespace/test': NAMESPACE.format(nsup), 'sets/test': sets,
            'sets/test/rest': SET.format('rest', 0)}
    return opened(monkeypatch, Client(info), **record).describe_contents()


def test_check_counts_the_sets_where_messages_name_them(monkeypatch):
    sets = SET.format('a', 0) + SET.format('b', 1)
    line, problems = described(monkeypatch, sets, **{'set-field': 't'})
    assert '2 records of at most 1048576 bytes in 2 of at most 4095 sets' in line
    words = 'the set b has reached its stop-writes-count of 1'
    assert [problem.partition(' test: ')[2] for problem in problems] == [words]
    assert '1 records of at most' in described(monkeypatch, sets)[0]
    many = ''.join(SET.format(n, 0) for n in range(4095))
    assert described(monkeypatch, many[:-len(SET.format(4094, 0))], **{'set-field': 't'})[1] == []
    assert 'the namespace has 4095 sets' in described(monkeypatch, many, **{'set-field': 't'})[1][0]


def test_a_full_set_holds_up_no_other(monkeypatch):
    client = Client({'build': '8.1.0.0', 'sets/test': SET.format('a', 1) + SET.format('b', 2)})
    store = opened(monkeypatch, client, **{'set-field': 't'})
    client.codes = {'a': 22}
    records = [Record(n, {'n': n}, None, set_) for n, set_ in enumerate(['a', 'b', 'a'])]
    results = store.write(records)
    assert outcomes(results) == ['set-full', 'stored', 'set-full']
    assert 'the set a has reached its stop-writes-count of 1; its messages are requeued' in results[0].detail
    client.codes = {'a': 22, 'b': 22}   # b is not full: what else forbids its writes is for all
    assert outcomes(store.write(records)) == ['set-full', 'stop', 'set-full']
    client.info = {}
    assert outcomes(store.write(records)) == ['stop'] * 3


def test_check_says_that_a_ttl_of_messages_would_be_refused(monkeypatch):
    assert described(monkeypatch, '', nsup=0)[1] == []
    assert 'a ttl is refused, for nsup-period is 0' in described(monkeypatch, '', nsup=0, **{'ttl-field': 'keep'})[1][0]


def test_the_answer_to_one_set_has_its_name_from_the_question():
    assert sets_of('objects=1:tombstones=0;', 'a') == {'a': {'objects': '1', 'tombstones': '0'}}
    assert sets_of('', 'a') == {}
