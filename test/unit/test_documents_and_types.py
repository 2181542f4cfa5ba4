"""The whole message in one bin, and fields whose type JSON lacks: what the mapper makes of them, and the stores."""
import base64
import json
import types

import aerospike
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakes
from fakes import bins_of, mapped, refused
from xmsrv import AerospikeStore, Record, build_config, typed_bins

POINT = {'type': 'Point', 'coordinates': [7.45, 46.95]}


# --- document-bin

DOC = {'document-bin': 'doc'}


@pytest.mark.parametrize('value', [
    {}, {'n': 1}, {'a': None, 'b': {'c': None}, 'l': [None]}, {'': {'': ''}}, {'x' * 1000: 1, 'gid': 2, 'doc': 3},
    {f'field number {n}': n for n in range(100_000)}])
def test_a_document_is_the_message_as_it_is(value):
    assert bins_of(value, **DOC) == {'doc': value}


def test_a_document_has_as_many_levels_as_a_message():
    deep = b'{"a":' * 64 + b'1' + b'}' * 64
    assert bins_of(deep, **DOC) == {'doc': json.loads(deep)}
    assert refused(b'{"a":' * 65 + b'1' + b'}' * 65, **DOC)[0] == 'unsupported-value'


def test_what_bins_name_gets_a_bin_besides_and_stays_in_the_document():
    value = {'id': 'x', 'customer': {'city': 'Bern'}, 'none': None, 'a long name of a field': 5}
    sources = {'id': 'id', 'customer.city': 'city', 'none': 'none', 'a long name of a field': 'short',
               '$attempts': 'tries'}
    record = mapped(value, record={'key': 'id', **DOC, 'bins': sources})
    assert record.bins == {'doc': value, 'id': 'x', 'city': 'Bern', 'short': 5, 'tries': 1, 'gid': 'x', 'gts': 1007}
    assert record.key == 'x'


def test_fields_of_a_document_have_rules_and_may_be_dropped_or_rejected():
    fields = {'a name of a field': ['integer', 'required'], 'b.c': 'string'}
    good = {'a name of a field': 1, 'b': {'c': 'x'}}
    for unknown in ('keep', 'drop', 'reject'):
        assert bins_of(good, fields, unknown, **DOC, bins={'b.c': 'c'}) == {'doc': good, 'c': 'x'}
    assert bins_of({**good, 'd': 1, 'b': {'c': 'x', 'd': 1}}, fields, 'drop', **DOC) == {'doc': good}
    assert refused({**good, 'd': None}, fields, 'reject', **DOC) == ('schema', 'd: unknown field')
    assert refused({**good, 'a name of a field': None}, fields, **DOC) == ('schema', '"a name of a field": missing')


def test_nulls_of_a_document_may_be_rejected():
    assert refused({'a': None}, nulls='reject', **DOC) == ('schema', 'a: null')
    assert refused({'a': {'b': None}}, nulls='reject', **DOC, bins={'a.b': 'b'}) == ('schema', 'a.b: null')
    assert bins_of({'a': {'b': None}}, nulls='reject', **DOC) == {'doc': {'a': {'b': None}}}


@pytest.mark.parametrize(('record', 'fault'), [
    ({'document-bin': 'gid'}, 'document-bin = gid: more than one value would go into this bin, also that of id-bin'),
    ({'key': 'id', 'document-bin': 'gts'},
     'document-bin = gts: more than one value would go into this bin, also that of time-bin'),
    ({'document-bin': 'doc', 'bins': {'a': 'doc'}},
     '[[bins]] a = doc: more than one value would go into this bin, also that of document-bin')])
def test_a_document_needs_a_bin_of_its_own(record, fault):
    assert faults(record=record) == [f'[record] {fault}']


def test_names_of_a_document_are_of_any_length():
    assert not faults(record=DOC, message={'fields': {'a name of over 15 bytes': 'any', 'gid': 'any'}})
    assert not faults(record={**DOC, 'key': 'gid'})


def faults(**sections):
    given_ = {'nsq': {'nsqd-tcp-address': '127.0.0.1:4150', 'topic': 't'}, 'store': 'sqlite', **sections}
    return [str(each) for each in build_config(given_)[1] if each.section]


# --- base64

@given(st.binary(max_size=50))
def test_what_is_base64_is_kept_as_it_came(value):
    text = base64.b64encode(value).decode()
    assert bins_of({'f': text}, {'f': ['base64', 'required']}) == {'f': text}


@pytest.mark.parametrize('value', ['A', 'AA', 'AAA', 'AA=', 'AAA==', 'AAAA=', '====', 'A===', 'AA==AA==', ' AAAA',
                                   'AAAA\n', 'AAAA====', 'AB==', 'AAB=', 'AA-_', 'AA\u00e9A', 5, True, [], {}, 1.5])
def test_what_is_no_base64_is_a_dead_letter(value):
    assert refused({'f': value}, {'f': 'base64'}) == ('schema', 'f: not base64')


@pytest.mark.parametrize(('size', 'detail'), [(0, 'length under 1'), (1, None), (2, None), (3, None),
                                              (4, 'length over 3')])
def test_limits_of_base64_are_of_its_bytes(size, detail):
    text, fields = base64.b64encode(bytes(size)).decode(), {'f': ['base64', 'min 1', 'max 3']}
    assert refused({'f': text}, fields)[1] == f'f: {detail}' if detail else bins_of({'f': text}, fields) == {'f': text}


# --- geojson

@pytest.mark.parametrize('value', [POINT, json.dumps(POINT), {'type': 'x'}, ' {"type": ""}\n'])
def test_what_looks_like_geojson_is_kept_as_it_came(value):
    assert bins_of({'f': value}, {'f': 'geojson'}) == {'f': value}


@pytest.mark.parametrize('value', [5, [], True, {}, {'type': 1}, '', '[]', 'Point', '{"type": 1}', '{"type": "P"',
                                   '{"type": "a", "type": "b"}', '{"type": "a", "x": NaN}',
                                   '{"type": "a", "x": 1e999}'])
def test_what_is_no_geojson_is_a_dead_letter(value):
    reason, detail = refused({'f': value}, {'f': 'geojson'})
    assert (reason, detail.startswith('f: not ')) == ('schema', True), detail


@pytest.mark.parametrize(('line', 'rule'), [
    (['geojson', 'max 5'], 'max does not fit the type geojson'), (['geojson', 'one-of a|b'], 'one-of does not fit'),
    (['base64', 'match a'], 'match does not fit'), (['base64', 'one-of a|b'], 'one-of does not fit')])
def test_rules_that_do_not_fit_are_faults(line, rule):
    fault, = faults(message={'fields': {'f': line}})
    assert rule in fault


def test_a_geometry_may_have_rules_of_its_own_inside():
    fields = {'at': 'geojson', 'at.coordinates[0]': ['number', 'required']}
    assert bins_of({'at': POINT}, fields) == {'at': POINT}
    assert refused({'at': {'type': 'Point', 'coordinates': ['x']}}, fields)[1] == 'at.coordinates[0]: not a number'


# --- the bins in Aerospike

def test_types_are_those_of_bins_of_their_own():
    message = {'fields': {'a': 'base64', 'b': 'geojson', 'c.d': 'base64', 'e.f': 'geojson', 'g': 'string',
                          'h': 'base64'}}
    record = {'bins': {'c.d': 'cd', 'h': 'hh'}}
    assert typed_bins(fakes.options(message=message, record=record)) == {
        'a': 'blob', 'b': 'geojson', 'cd': 'blob', 'hh': 'blob'}
    assert typed_bins(fakes.options(message=message, record={**record, **DOC})) == {'cd': 'blob', 'hh': 'blob'}


class Client:
    """Keeps what it is to write, and answers each with `code`."""

    def __init__(self):
        self.writes, self.code = [], 0

    def batch_write(self, batch, policy):
        self.writes += batch.batch_records
        for write in batch.batch_records:
            write.result, write.in_doubt = self.code, False
        return types.SimpleNamespace(result=0)

    def info_all(self, question, policy=None):
        return {}

    def close(self):
        pass


def test_aerospike_gets_blobs_and_geometries(monkeypatch):
    client = Client()
    monkeypatch.setattr(aerospike, 'client', lambda config: client)
    store = AerospikeStore(fakes.options(message={'fields': {'b': 'base64', 'g': 'geojson', 'h': 'geojson'}}))
    store.open()
    store.close()
    store.open()   # again, as after an outage
    record = Record('k', {'b': 'AAE=', 'g': POINT, 'h': json.dumps(POINT), 'n': 'AAE='}, None)
    store.write([record])
    ops = {op['bin']: op['val'] for op in client.writes[0].ops}
    assert (ops['b'], ops['n']) == (b'\0\1', 'AAE=')
    assert [type(ops[name]) for name in 'gh'] == [aerospike.GeoJSON] * 2
    assert [json.loads(ops[name].dumps()) for name in 'gh'] == [POINT] * 2
    client.code = 160
    answer, = store.write([record])
    assert answer == ('rejected', 'rejected', 'answer 160 InvalidGeoJSON: no geometry in g, h')
