"""[[delete]]: which messages delete the record of their key, and how each store is told."""
import contextlib
import json
import random
import types

import aerospike
import pytest
from aerospike_helpers import expressions as exp
from aerospike_helpers.batch.records import Remove, Write

import fakes
from fakes import stored
from xmsrv import (
    DELETED,
    STALE,
    STORED,
    STORES,
    TTL_NEVER,
    Deletion,
    InvalidMessage,
    Mapper,
    Metrics,
    Record,
    StoreError,
    lasting_tombstones,
    merge_metrics,
    readings_of,
    tombstone_obstacles,
)

DELETE = {'field': 'op', 'values': 'd'}


def options(record=None, **delete):
    return fakes.options(record={'key': 'id', 'time': 'ts', **(record or {}), 'delete': {**DELETE, **delete}})


def mapped(body, config=None):
    return Mapper(config or options()).build_record(fakes.message(body=json.dumps(body).encode()))


# -- which messages delete

@pytest.mark.parametrize(('words', 'value', 'deletes'), [
    ('d', 'd', True), ('d', 'D', False), ('d', ['d'], False), ('d', {'d': 'd'}, False), ('d', None, False),
    (['x', 'd'], 'd', True),
    ('1', 1, True), ('1', '1', True), ('1', True, False), ('1', 1.0, False), ('01', 1, False), ('-1', -1, True),
    ('true', True, True), ('true', 'true', True), ('true', 1, False), ('false', False, True), ('false', 0, False),
    ('null', None, True), ('null', 'null', True), ('0', False, False),
])
def test_a_value_deletes_by_its_text_and_its_type(words, value, deletes):
    record = mapped({'id': 1, 'ts': 2, 'op': value}, options(values=words))
    assert isinstance(record, Deletion) is deletes


def test_a_field_that_is_absent_is_no_null():
    assert not isinstance(mapped({'id': 1, 'ts': 2}, options(values='null')), Deletion)
    assert not isinstance(mapped({'id': 1, 'ts': 2, 'a': 1}, options(values='null', field='a.b')), Deletion)
    assert isinstance(mapped({'id': 1, 'ts': 2, 'a': {'b': None}}, options(values='null', field='a.b')), Deletion)


@pytest.mark.parametrize(('id_bin', 'bins'), [('gid', {'gid': 1, 'gts': 2}), ('', {'gts': 2})])
def test_a_tombstone_has_key_and_time_alone_and_its_own_ttl(id_bin, bins):
    config = options({'id-bin': id_bin, 'ttl': '1h', 'bins': {'text': 't'}}, keep='2d')
    record = mapped({'id': 1, 'ts': 2, 'op': 'd', 'text': 'x', 'more': [1]}, config)
    assert (record.key, record.bins, record.time, record.ttl) == (1, bins, 2, 2 * 86400)
    assert mapped({'id': 1, 'ts': 2}, options(keep='never')).ttl is None
    assert mapped({'id': 1, 'ts': 2, 'op': 'd'}, options(keep='never')).ttl == TTL_NEVER


def test_what_no_bin_could_hold_is_no_matter_for_a_delete():
    assert mapped({'id': 1, 'ts': 2, 'op': 'd', 'a name of very many letters': 1}).bins == {'gid': 1, 'gts': 2}
    with pytest.raises(InvalidMessage, match='over 15 bytes'):
        mapped({'id': 1, 'ts': 2, 'a name of very many letters': 1})


@pytest.mark.parametrize(('body', 'unfit'), [
    ({'ts': 2}, 'key: id: missing'), ({'id': '', 'ts': 2}, 'key: id: a key is a string'),
    ({'id': 1}, 'schema: ts: not an integer'), ({'id': 1, 'ts': 2.0}, 'schema: ts: not an integer'),
    ({'id': 1, 'ts': 2**63}, 'unsupported-value: ts: integer outside 64 bit'),
])
def test_a_delete_without_a_good_key_and_time_is_a_dead_letter(body, unfit):
    with pytest.raises(InvalidMessage, match=unfit):
        mapped({**body, 'op': 'd'})


@pytest.mark.parametrize('unknown', ['keep', 'drop', 'reject'])
def test_a_delete_is_checked_in_what_it_has(unknown):
    fields = {'id': ['integer', 'required'], 'ts': ['integer', 'required'], 'op': 'string',
              'n': ['integer', 'required', 'min 1']}
    config = fakes.options(record={'key': 'id', 'time': 'ts', 'delete': DELETE},
                           message={'fields': fields, 'unknown-fields': unknown})
    assert mapped({'id': 1, 'ts': 2, 'op': 'd'}, config).bins == {'gid': 1, 'gts': 2}
    for more, detail in (({'n': 0}, 'n: value under 1'), ({'n': 'x'}, 'n: not an integer')):
        with pytest.raises(InvalidMessage, match=detail):
            mapped({'id': 1, 'ts': 2, 'op': 'd', **more}, config)
    with pytest.raises(InvalidMessage, match='n: missing'):
        mapped({'id': 1, 'ts': 2, 'op': 'u'}, config)
    refused = (pytest.raises(InvalidMessage, match='other: unknown field') if unknown == 'reject'
               else contextlib.nullcontext())
    with refused:
        mapped({'id': 1, 'ts': 2, 'op': 'd', 'other': 1}, config)


def test_a_field_that_is_dropped_can_say_that_a_record_is_deleted():
    config = fakes.options(record={'key': 'id', 'time': 'ts', 'delete': DELETE},
                           message={'fields': {'id': 'integer', 'ts': 'integer'}, 'unknown-fields': 'drop'})
    assert isinstance(mapped({'id': 1, 'ts': 2, 'op': 'd'}, config), Deletion)
    assert mapped({'id': 1, 'ts': 2, 'op': 'u'}, config).bins == {'id': 1, 'ts': 2, 'gid': 1, 'gts': 2}


def test_a_null_beside_it_is_as_in_any_message():
    body = {'id': 1, 'ts': 2, 'op': 'd', 'after': None}
    assert isinstance(mapped(body), Deletion)
    config = fakes.options(record={'key': 'id', 'time': 'ts', 'delete': DELETE}, message={'nulls': 'reject'})
    with pytest.raises(InvalidMessage, match='after: null'):
        mapped(body, config)


@pytest.mark.parametrize(('word', 'values'), [
    ('d', ['d']), ('7', ['7', 7]), ('-7', ['-7', -7]), ('07', ['07']), ('+7', ['+7']), ('1.5', ['1.5']),
    ('true', ['true', True]), ('null', ['null', None]), ('True', ['True'])])
def test_what_a_word_may_stand_for(word, values):
    assert list(map(repr, readings_of(word))) == list(map(repr, values))


def test_a_delete_counts_as_one_and_its_age_is_observed():
    metrics, messages = Metrics(), [fakes.message(n) for n in range(3)]
    metrics.add_settled(DELETED, messages, 10.0)
    total = merge_metrics([metrics.take_snapshot()])
    assert total.value_of('xmsrv_lag_seconds_count') == 3
    assert total.value_of('xmsrv_messages_total', 'deleted') == 0     # before any window has told


# -- Aerospike

class Client:
    """Keeps what it was asked to write. answers: (whether it is a removal, key) -> code; stored: key -> time."""

    def __init__(self, answers=None, stored=None, **info):
        self.answers, self.stored, self.calls = answers or {}, stored or {}, []
        self.info = {'release': 'edition=Aerospike Community Edition;version=8.1.2.0', **info}

    def batch_write(self, batch, policy):
        self.calls.append(batch.batch_records)
        for write in batch.batch_records:
            write.result = self.answers.get((isinstance(write, Remove), write.key[2]), 0)
        return types.SimpleNamespace(result=0)

    def batch_read(self, keys, bins, policy):
        return types.SimpleNamespace(batch_records=[
            types.SimpleNamespace(result=0 if key[2] in self.stored else 2,
                                  record=(key, {}, {'gts': self.stored.get(key[2])})) for key in keys])

    def info_all(self, question, policy=None):
        if question not in self.info:
            raise aerospike.exception.InvalidRequest(4, 'unrecognized command')
        return {'node': (None, self.info[question])}

    def close(self):
        pass


def store_on(monkeypatch, client, config):
    monkeypatch.setattr(aerospike, 'client', lambda _: client)
    store = STORES['aerospike'](config)
    store.open()
    return store


def change(key, time):
    return Record(key, {'id': key, 'gts': time}, time)


def delete(key, time, keep=60):
    return Deletion(key, {'gid': key, 'gts': time}, time, None, keep)


def not_newer(time):
    return exp.Or(exp.Not(exp.BinExists('gts')), exp.LE(exp.IntBin('gts'), time)).compile()


def test_a_tombstone_is_a_write_with_its_filter_and_ttl(monkeypatch):
    client = Client({(False, 'stale'): 27}, {'stale': 9})
    store = store_on(monkeypatch, client, options({'ttl': '1h'}))
    assert store.write([change('a', 1), delete('b', 2), delete('stale', 3)]) == [STORED, DELETED, STALE]
    (first, second, _), = client.calls
    assert (first.policy['ttl'], second.policy['ttl']) == (3600, 60)
    assert second.policy['exists'] == aerospike.POLICY_EXISTS_CREATE_OR_REPLACE
    assert second.policy['expressions'] == not_newer(2)
    assert {op['bin']: op['val'] for op in second.ops} == {'gid': 'b', 'gts': 2}


@pytest.mark.parametrize(('info', 'durable'), [
    ({}, False), ({'release': 'edition=Aerospike Enterprise Edition;version=8.1.2.0'}, True),
    ({'release': 'edition=Aerospike Federal Edition'}, True),
    ({'release': 'odd', 'edition': 'Aerospike Enterprise Edition'}, True),
    ({'release': 'odd', 'edition': 'Aerospike Community Edition'}, False)])
def test_a_removal_has_its_filter_and_is_durable_where_it_can_be(monkeypatch, info, durable):
    client = Client(**info)
    assert store_on(monkeypatch, client, options(mode='remove')).write([delete('b', 2)]) == [DELETED]
    (removal,), = client.calls
    assert isinstance(removal, Remove)
    assert removal.policy == {'key': aerospike.POLICY_KEY_SEND, 'commit_level': aerospike.POLICY_COMMIT_LEVEL_ALL,
                              'durable_delete': durable, 'expressions': not_newer(2)}


def test_a_cluster_that_does_not_say_its_edition_is_asked_again_later(monkeypatch):
    client = Client(release='odd')
    with pytest.raises(StoreError, match='which edition') as raised:
        store_on(monkeypatch, client, options(mode='remove'))
    assert raised.value.retryable
    store_on(monkeypatch, client, options())    # tombstones are writes, in any edition


def test_removals_come_after_all_other_writes_of_their_batch(monkeypatch):
    client = Client({(True, 'absent'): 2, (True, 'newer'): 27}, {'newer': 9})
    store = store_on(monkeypatch, client, options(mode='remove'))
    answers = store.write([delete('a', 2), change('a', 1), delete('absent', 1), change('b', 1), delete('newer', 1)])
    assert answers == [DELETED, STORED, DELETED, STORED, STALE]
    kinds = [[type(write) for write in call] for call in client.calls]
    assert kinds == [[Write, Write], [Remove, Remove, Remove]]


@pytest.mark.parametrize(('code', 'outcome'), [(14, 'busy'), (-15, 'retry'), (999, 'retry'), (8, 'stop')])
def test_a_removal_waits_for_what_is_older_and_not_written_yet(monkeypatch, code, outcome):
    client = Client({(False, 'a'): code})
    client.info['namespace/test'] = client.info['sets/test/orders'] = ''
    store = store_on(monkeypatch, client, options(mode='remove'))
    answers = store.write([delete('a', 2), change('a', 1), delete('b', 1)])
    assert [answer.outcome for answer in answers] == [outcome, outcome, 'deleted']
    assert [write.key[2] for write in client.calls[-1]] == ['b']


@pytest.mark.parametrize(('mode', 'outcome'), [('remove', 'stale'), ('tombstone', 'retry')])
def test_a_message_older_than_what_was_removed_since_does_not_undo_that(monkeypatch, mode, outcome):
    """It was filtered out, and when its time is asked for the record is gone."""
    client = Client({(False, 'a'): 27}, {})
    store = store_on(monkeypatch, client, options(mode=mode))
    assert [answer.outcome for answer in store.write([change('a', 1), change('b', 1)])] == [outcome, 'stored']


def test_a_removal_of_what_the_cluster_rejected_goes_on(monkeypatch):
    client = Client({(False, 'a'): 13})
    store = store_on(monkeypatch, client, options(mode='remove'))
    assert [answer.outcome for answer in store.write([delete('a', 2), change('a', 1)])] == ['deleted', 'rejected']


def test_a_removal_proves_nothing_of_the_form_of_a_write(monkeypatch):
    client = Client({(False, 'bad'): 4, (True, 'absent'): 2})
    store = store_on(monkeypatch, client, options(mode='remove'))
    assert store.write([delete('a', 2)]) == store.write([delete('absent', 2)]) == [DELETED]
    assert [answer.outcome for answer in store.write([delete('a', 2), change('bad', 1)])] == ['deleted', 'undecided']
    assert store.write([change('good', 1)]) == [STORED]
    assert [answer.outcome for answer in store.write([change('bad', 1)])] == ['rejected']


def test_not_found_is_no_answer_to_a_write(monkeypatch):
    store = store_on(monkeypatch, Client({(False, 'a'): 2}), options())
    assert [answer.outcome for answer in store.write([delete('a', 2)])] == ['retry']


@pytest.mark.parametrize(('keep', 'namespace', 'refused', 'lasting'), [
    (60, {'nsup-period': '0', 'allow-ttl-without-nsup': 'false'}, True, False),
    (60, {'nsup-period': '0', 'allow-ttl-without-nsup': 'true'}, False, True),
    (60, {'nsup-period': '120', 'allow-ttl-without-nsup': 'false'}, False, False), (60, {}, False, False),
    (TTL_NEVER, {'nsup-period': '0'}, False, False), (None, {'nsup-period': '0'}, False, False),
])
def test_what_a_namespace_does_with_tombstones(keep, namespace, refused, lasting):
    assert bool(list(tombstone_obstacles(keep, namespace))) is refused
    assert bool(lasting_tombstones(keep, namespace)) is lasting


# -- SQLite

def sqlite_store(tmp_path, **delete_options):
    return fakes.sqlite_store(tmp_path, record={'key': 'id', 'time': 'ts', 'delete': {**DELETE, **delete_options}})


def test_sqlite_keeps_a_tombstone_and_removes_a_removed_record(tmp_path):
    with sqlite_store(tmp_path) as store:
        assert store.write([change('k', 1), delete('k', 3), change('k', 2)]) == [STORED, DELETED, STALE]
        assert stored(tmp_path) == {'k': {'gid': 'k', 'gts': 3}}
        assert store.write([change('k', 4)]) == [STORED]
    with sqlite_store(tmp_path, mode='remove') as store:
        assert store.write([change('l', 1), delete('k', 3), delete('l', 2), delete('m', 1)]) == [
            STORED, STALE, DELETED, DELETED]
        assert stored(tmp_path) == {'k': {'id': 'k', 'gts': 4}}
        assert store.write([delete('n', 2), change('n', 3), delete('o', 3), change('o', 2)]) == [
            STALE, STORED, DELETED, STORED]
        assert set(stored(tmp_path)) == {'k', 'n'}


@pytest.mark.parametrize('mode', ['tombstone', 'remove'])
def test_sqlite_takes_an_empty_batch(tmp_path, mode):
    with sqlite_store(tmp_path, mode=mode) as store:
        assert store.write([]) == []


def test_sqlite_keeps_a_record_that_takes_the_place_of_a_tombstone(tmp_path):
    with sqlite_store(tmp_path) as store:
        assert store.write([delete('k', 1)]) == [DELETED]
        assert store.write([change('k', 2)]) == [STORED]
        assert store.db.execute('SELECT expires_at FROM records').fetchall() == [(None,)]


def test_sqlite_leaves_what_the_newest_message_says_in_any_order(tmp_path):
    draw = random.Random(7)
    sent = [(f'k{draw.randrange(40)}', time, draw.random() < 0.5) for time in range(800)]
    stream = sent + draw.sample(sent, 400)
    draw.shuffle(stream)
    with sqlite_store(tmp_path) as store:
        store.db.execute('PRAGMA synchronous = OFF')
        while stream:
            size = draw.randrange(1, 30)
            store.write([(delete if deletes else change)(key, time) for key, time, deletes in stream[:size]])
            del stream[:size]
    newest = {key: (key, time, deletes) for key, time, deletes in sent}
    assert stored(tmp_path) == {key: (delete if deletes else change)(key, time).bins
                                for key, time, deletes in newest.values()}


def test_sqlite_drops_a_bounded_number_of_ended_tombstones_a_batch(tmp_path):
    with sqlite_store(tmp_path) as store:
        for first in range(0, 2500, 500):
            assert store.write([delete(n, 2) for n in range(first, first + 500)]) == [DELETED] * 500
        store.db.execute("UPDATE records SET expires_at = printf('2020-01-01T00:00:00.%06dZ', \"key\")")
        assert store.write([change('k', 1)]) == [STORED]
        assert len(stored(tmp_path)) == 1501
        left = set(stored(tmp_path)) - {'k'}
        answers = store.write([change(key, 1) for key in left])
        # what was not dropped by then still holds off what is older
        assert (answers.count(STORED), answers.count(STALE)) == (1000, 500)
        assert store.write([change('k', 1)]) == [STORED]
        assert {tuple(bins) for bins in stored(tmp_path).values()} == {('id', 'gts')}


def test_sqlite_drops_by_the_index(tmp_path):
    with sqlite_store(tmp_path) as store:
        plan = [row[-1] for row in store.db.execute(f'EXPLAIN QUERY PLAN {store.drop}', ('x',))]
    assert sum('INDEX records_end' in step for step in plan) == 2 and not any('TABLE' in step for step in plan)
