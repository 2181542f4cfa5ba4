"""What each option of the mapping makes of messages, on both stores: all is read back, or a dead letter."""
import base64
import collections
import itertools
import json
import os
import subprocess

import aerospike
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import roundtrip
import servers
from clusters import NAMESPACE


class SqlitePlace:
    """Records in the SQLite file of the test. own: whether a bin can be of a type that JSON lacks."""

    own = False

    def __init__(self, program):
        self.xmsrv, self.seen = program, set()

    def settings(self, **more):
        return {'sqlite': {'path': self.xmsrv.database, **more}}

    def rows(self, _):
        """The (set, bins) of each record that is new since the last call."""
        found = [(set_, key, bins) for set_, key, bins, _ in self.xmsrv.rows() if (set_, key) not in self.seen]
        self.seen.update((set_, key) for set_, key, _ in found)
        return [(set_, bins) for set_, _, bins in found]


class AerospikePlace:
    """Records in a cluster, which are taken out of it when they are read."""

    own = True

    def __init__(self, cluster):
        self.cluster = cluster

    def settings(self, **more):
        return self.cluster.settings(**more)

    def rows(self, sets):
        """The (set, bins) of each record in these sets; blobs in base64, geometries as JSON has them."""
        found = []
        for set_ in sets:
            for key, _, bins in self.cluster.client.query(NAMESPACE, set_).results():
                found.append((set_, {name: readable(value) for name, value in bins.items()}))
                self.cluster.client.remove((NAMESPACE, set_, key[2]))
        return found


def readable(value):
    if isinstance(value, bytes):
        return {'blob': base64.b64encode(value).decode()}
    return {'geojson': json.loads(value.dumps())} if isinstance(value, aerospike.GeoJSON) else value


@pytest.fixture(params=['sqlite', 'aerospike'])
def place(request, program):
    return SqlitePlace(program) if request.param == 'sqlite' else AerospikePlace(request.getfixturevalue('cluster'))


topics = (f'mapping-{number}' for number in itertools.count())


def check(nsqd, program, place, values, expected, sets=(), **sections):
    """Windows over lists of messages out of `values`. `expected(value)`: (set, bins) of its record, without gid, or the
    reason why it is a dead letter. sets: those that records may be in; none is the set of the place."""
    @settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(st.lists(values, min_size=30, max_size=60))
    def round_trip(batch):
        topic, batch = next(topics), [{'n': n, **value} for n, value in enumerate(batch)]
        own = place.settings(set=sets[0] if sets else topic)
        dead = window(nsqd, program, topic, batch, {**own, **sections})
        foreseen = [expected(value) for value in batch]
        reasons = {value['n']: one for value, one in zip(batch, foreseen, strict=True) if isinstance(one, str)}
        assert dead == reasons
        records = [(set_ or topic, bins) for set_, bins in (one for one in foreseen if not isinstance(one, str))]
        found = [(set_, {name: value for name, value in bins.items() if name != 'gid'})
                 for set_, bins in place.rows(sets or [topic])]
        assert counted(found) == counted(records)

    round_trip()


def counted(records):
    return collections.Counter((set_, roundtrip.exact(bins)) for set_, bins in records)


def window(nsqd, program, topic, batch, settings_):
    """One window over messages. Returns the reason of each dead letter by the `n` of its message."""
    nsqd.create(topic, 'x-msrv')
    nsqd.publish(topic, [json.dumps(value) for value in batch])
    done = program.once(nsqd, topic=topic, nsq={'max-messages': len(batch)}, **settings_)
    counts = servers.summary(done.stderr)
    assert (counts['received'], counts['stored'] + counts['dead']) == (len(batch), len(batch))
    letters = nsqd.drain(f'{topic}.dead', 'x-msrv-replay', expected=counts['dead'])
    found = [letter.partition(b'\n')[::2] for letter in letters]
    return {json.loads(body)['n']: json.loads(header)['reason'] for header, body in found}


def without_nulls(value):
    return {name: item for name, item in value.items() if item is not None}


# --- paths, metadata

inside = st.fixed_dictionaries({}, optional={
    'a': st.sampled_from([None, 5, [1], {}, {'b': 1}, {'b': None}, {'b': 'x'}, {'b': 2, 'c': [None]}]),
    'l': st.sampled_from([None, [], [1], [{}], [{'x': 1}], [{'x': None}, {'x': 2}], {'x': 1}, 'x']),
    'p': roundtrip.fit})


def fits(a):
    """Whether `a` may be in a message where `a.b` has to be an integer."""
    return a is None or isinstance(a, dict) and isinstance(a.get('b') or 0, int)


def test_fields_inside_get_bins_besides(nsqd, program, place):
    def expected(value):
        a, items = value.get('a'), value.get('l')
        first = items[0].get('x') if isinstance(items, list) and items and isinstance(items[0], dict) else None
        own = {'ab': (a or {}).get('b') if fits(a) else None, 'tries': 1}
        return (None, without_nulls({**value, **own, 'first': first})) if fits(a) else 'schema'
    check(nsqd, program, place, inside, expected, message={'fields': {'a.b': 'integer'}},
          record={'bins': {'a.b': 'ab', 'l[0].x': 'first', '$attempts': 'tries'}})


def test_with_drop_they_are_taken_out_and_the_rest_of_their_object_is_dropped(nsqd, program, place):
    def expected(value):
        a = value.get('a')
        if not fits(a):
            return 'schema'
        kept = {'c': a['c']} if 'c' in (a or {}) else None
        return None, without_nulls({'n': value['n'], 'ab': (a or {}).get('b'), 'a': kept})
    check(nsqd, program, place, inside, expected, record={'bins': {'a.b': 'ab'}},
          message={'unknown-fields': 'drop', 'fields': {'a.b': 'integer', 'a.c': 'any', 'n': 'any'}})


def test_metadata_of_nsq_are_bins(nsqd, program, place):
    bins = {'$attempts': 'tries', '$nsqd': 'from', '$timestamp': 'at', '$topic': 'topic'}
    program.configure(nsqd, record={'bins': bins}, **place.settings(set='orders'))
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', '{"n": 1}')
    nsqd.bounce('orders', 'x-msrv', 2)
    program.run('once')
    (_, found), = place.rows(['orders'])
    at = found.pop('at')
    assert found.pop('gid').split('-')[1] == f'{at:x}'
    assert found == {'n': 1, 'tries': 3, 'from': nsqd.tcp, 'topic': 'orders'}


def test_a_replayed_letter_has_the_metadata_of_its_first_delivery(nsqd, program, place):
    record = {'bins': {'$nsqd': 'from', '$attempts': 'tries', 'a.b': 'ab'}}
    sections = {'record': record, **place.settings(set='orders')}
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', '{"a": {"b": 1}}')
    program.once(nsqd, message={'fields': {'a.b': 'string'}}, **sections)
    program.configure(nsqd, message={'fields': {'a.b': 'integer'}}, **sections)
    program.run('replay')
    (_, found), = place.rows(['orders'])
    assert (found['from'], found['tries'], found['ab'], found['a']) == (nsqd.tcp, 1, 1, {'b': 1})


@pytest.mark.parametrize('key, winner', [('customer.id', 2), ('items[0].sku', 2)])
def test_the_newest_message_wins_by_key_and_time_inside(nsqd, program, place, key, winner):
    def order(n, at):
        return json.dumps({'n': n, 'customer': {'id': 'c'}, 'items': [{'sku': 5}], 'at': {'ms': at}})
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', [order(1, 10), order(2, 30), order(3, 20)])
    done = program.once(nsqd, record={'key': key, 'time': 'at.ms'}, **place.settings(set='orders'))
    counts = servers.summary(done.stderr)
    (_, found), = place.rows(['orders'])
    assert (found['n'], found['gts'], counts['stored'] + counts['stale']) == (winner, 30, 3)


# --- document-bin

documents = st.dictionaries(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=30)
                            .filter(lambda name: name != 'n'), roundtrip.fit, max_size=5)


def test_a_document_is_read_back_whole(nsqd, program, place):
    check(nsqd, program, place, documents, lambda value: (None, {'doc': value, 'number': value['n']}),
          record={'document-bin': 'doc', 'bins': {'n': 'number', 'not here.at all': 'none'}})


@pytest.mark.parametrize('value', [
    {f'field number {n}': n for n in range(40_000)},
    {f'{n:x}': None for n in range(100_000)},
    {'deep': json.loads('{"a":' * 62 + '[]' + '}' * 62)},
    {'x' * 100_000: {'y' * 100_000: 'z' * 100_000}},
], ids=['long names', 'many fields', 'deep', 'long'])
def test_a_document_may_be_large_and_deep(nsqds, program, place, value):
    nsqd, = nsqds(1, '--max-msg-size=8388608', '--max-body-size=16777216')
    topic, value = next(topics), {'n': 0, **value}
    limits = {'total-timeout': '30s'} if place.own else {}
    assert window(nsqd, program, topic, [value, {'n': 1}],
                  {**place.settings(set=topic, **limits), 'record': {'document-bin': 'doc', 'id-bin': ''}}) == {}
    assert sorted((bins['doc'] for _, bins in place.rows([topic])), key=lambda doc: doc['n']) == [value, {'n': 1}]


def test_a_document_that_is_too_large_for_the_namespace_is_a_dead_letter(nsqd, program, standin):
    standin.server.max_record_size = 10_000
    topic = next(topics)
    batch = [{'n': 0, 'v': 'x' * 20_000}, {'n': 1, 'v': 'x'}]
    dead = window(nsqd, program, topic, batch, {**standin.settings(), 'record': {'document-bin': 'doc'}})
    assert dead == {0: 'too-big'} and [bins['doc'] for _, bins in standin.rows()] == batch[1:]


# --- set-field, ttl-field

def test_each_record_goes_to_the_set_of_its_tenant(nsqd, program, place, request):
    unique = f'{os.getpid()}-{place.own}'
    names = [f'acme-{unique}', f'umbrella-{unique}', f'\u00e9-{unique}']
    bad = [None, '', 'a b', 'a:b', 'x' * 64, 5, ['acme']]
    tenants = st.fixed_dictionaries({'t': st.fixed_dictionaries({'id': st.sampled_from(names + bad)})})

    def expected(value):
        name = value['t']['id']
        return (name, value) if name in names else 'schema'
    check(nsqd, program, place, tenants, expected, sets=names, record={'set-field': 't.id'})


def test_one_key_is_a_record_in_each_set(nsqd, program, place):
    sets = [f'{name}-{os.getpid()}-{place.own}' for name in ('one', 'two')]
    batch = [{'n': n, 't': sets[n % 2], 'id': 'same'} for n in range(6)]
    topic = next(topics)
    record = {'set-field': 't', 'key': 'id', 'time': 'n'}
    nsqd.create(topic, 'x-msrv')
    nsqd.publish(topic, [json.dumps(value) for value in batch])
    program.once(nsqd, topic=topic, record=record, **place.settings(set='rest'))
    assert {set_: bins['n'] for set_, bins in place.rows(sets)} == {sets[0]: 4, sets[1]: 5}


def test_a_set_that_is_full_holds_up_no_other(nsqd, program, standin):
    """Its messages are requeued with a delay; the status says that some were not stored."""
    topic = next(topics)
    standin.server.namespaces[NAMESPACE].set_count_limits['full'] = 1
    batch = [{'n': n, 't': 'full' if n % 2 else 'other'} for n in range(20)]
    nsqd.create(topic, 'x-msrv')
    nsqd.publish(topic, [json.dumps(value) for value in batch])
    done = program.once(nsqd, topic=topic, record={'set-field': 't'}, expect=os.EX_TEMPFAIL, **standin.settings())
    counts = servers.summary(done.stderr)
    assert (counts['stored'], counts['requeued'], counts.get('dead', 0)) == (11, 9, 0)
    assert 'the set full has reached its stop-writes-count of 1' in done.stderr
    assert '9 messages could not be stored' in done.stderr
    said = program.run('check', '--connect', expect=os.EX_UNAVAILABLE)
    assert 'the set full has reached its stop-writes-count' in said.stderr
    assert '11 records of at most 1048576 bytes in 2 of at most 4095 sets' in said.stdout


def test_each_record_stays_as_long_as_its_message_says(nsqd, program, cluster):
    topic, longest = next(topics), 3650 * 86400
    values = [60, 3600, None, longest, 0, 1.5, 'x', longest + 1, True]
    batch = [{'n': n, 'keep': value} for n, value in enumerate(values)] + [{'n': len(values)}]
    record = {'ttl-field': 'keep', 'ttl': '1h', 'key': 'n'}
    assert window(nsqd, program, topic, batch, {**cluster.settings(), 'record': record}) == dict.fromkeys(
        range(4, 9), 'schema')
    expected = {0: 60, 1: 3600, 2: 3600, 3: longest, 9: 3600}
    for n, seconds in expected.items():
        _, meta = cluster.client.exists((NAMESPACE, cluster.set, n))
        assert seconds - 60 < meta['ttl'] <= seconds
    assert sorted(cluster.numbers()) == sorted(expected)


# --- base64 and geojson

POINT = {'type': 'Point', 'coordinates': [7.45, 46.95]}
SQUARE = {'type': 'Polygon', 'coordinates': [[[0, 0], [1.5, 0], [1.5, 1], [0, 0]]]}
BAD_SHAPES = [{'type': 'Point'}, {'type': 'Point', 'coordinates': [0, 91]}, {'type': 'Nothing', 'coordinates': [0, 0]},
              {'type': 'Polygon', 'coordinates': [[[0, 0], [1, 1]]]}, '{"type": "Polygon", "coordinates": [[5]]}']
BAD_JSON = ['{}', '[1]', 'x', {'a': 1}, 5]


def test_blobs_are_read_back_byte_for_byte(nsqd, program, place):
    values = st.fixed_dictionaries({}, optional={'b': st.binary(max_size=100).map(encoded) | st.sampled_from(
        ['A', '*', None, 5, 'AB==']), 'in': st.fixed_dictionaries({'b': st.binary(max_size=10).map(encoded)})})

    def expected(value):
        blob, inner = value.get('b'), value.get('in')
        if blob in ('A', '*', 5, 'AB=='):
            return 'schema'
        own = {'b': blob, 'inner': inner and inner['b']}
        if place.own:
            own = {name: text if text is None else {'blob': text} for name, text in own.items()}
        return None, without_nulls({**value, **own})
    check(nsqd, program, place, values, expected, message={'fields': {'b': 'base64', 'in.b': 'base64'}},
          record={'bins': {'in.b': 'inner'}})


def encoded(data):
    return base64.b64encode(data).decode()


def test_geometries_are_read_back_as_they_came(nsqd, program, place):
    good = [POINT, SQUARE, json.dumps(SQUARE), '{"type":"AeroCircle","coordinates":[[-1.5,2],300]}',
            {'type': 'Feature', 'geometry': POINT, 'properties': {'name': 'B\u00e4rn'}}]
    shapes = st.fixed_dictionaries({'at': st.sampled_from([*good, *good, None, *BAD_SHAPES, *BAD_JSON])})

    def expected(value):
        shape = value['at']
        if shape in BAD_JSON:
            return 'schema'
        if not place.own or shape is None:
            return None, without_nulls(value)
        if shape in BAD_SHAPES:
            return 'rejected'
        return None, {**value, 'at': {'geojson': json.loads(shape) if isinstance(shape, str) else shape}}
    check(nsqd, program, place, shapes, expected, message={'fields': {'at': 'geojson'}})


# --- check --message

def checked(program, value, expect=0):
    done = subprocess.run([servers.PROGRAM, '-c', program.path, 'check', '--message', '-'], text=True, timeout=30,
                          input=json.dumps(value), capture_output=True, check=False)
    assert done.returncode == expect, done.stderr
    return done.stdout.splitlines() if not expect else done.stderr


def test_check_shows_what_each_option_makes_of_a_message(program):
    aerospike_ = {'nsq': {'nsqd-tcp-address': '127.0.0.1:9'}, 'store': 'aerospike',
                  'aerospike': {'hosts': '127.0.0.1:9', 'namespace': 'test'}}
    fields = {'b': 'base64', 'at': 'geojson', 'c.b': 'base64'}
    bins = {'c.b': 'cb', '$attempts': 'tries', '$topic': 'topic'}
    value = {'b': 'AAE=', 'at': POINT, 'c': {'b': ''}, 't': 'acme', 'keep': 60}
    program.configure(**aerospike_, message={'fields': fields}, record={
        'set-field': 't', 'ttl-field': 'keep', 'bins': bins, 'id-bin': ''})
    assert checked(program, value) == [
        'set   acme', 'key   string  $id (made by nsqd)', 'ttl   60 s', 'bin   b      blob     "AAE="',
        'bin   at     geojson  {"type": "Point", "coordinates": [7.45, 46.95]}', 'bin   c      map      {"b": ""}',
        'bin   t      string   "acme"', 'bin   keep   integer  60', 'bin   cb     blob     ""',
        'bin   tries  integer  $attempts (made by nsqd)', 'bin   topic  string   "orders"']
    assert 'ttl   as ttl in [record]' in checked(program, {**value, 'keep': None})
    assert checked(program, {**value, 't': 'a b'}, 65) == (
        'error: schema: t: not a name for Aerospike: at least one character, no white space and none of : ; ,\n')
    program.configure(**aerospike_, record={'document-bin': 'doc', 'id-bin': '', 'bins': {'c.b': 'cb'}})
    assert checked(program, value)[2:] == ['bin   cb   string   ""', f'bin   doc  map      {json.dumps(value)}']


# --- the manual, and the examples

def test_the_manual_says_how_to_look_into_a_document(cluster):
    """Its lines, run on a cluster of other names."""
    page = (servers.ROOT / 'man' / 'x-msrv.conf.5').read_text()
    code = page.split('.\\" document: run by a test\n')[1].split('.Ed')[0].partition('indent\n')[2]
    host, port = cluster.address.rsplit(':', 1)
    for old, new in (("('db1', 3000)", f"('{host}', {port})"), ("'shop'", repr(NAMESPACE)),
                     ("'documents'", repr(cluster.set))):
        assert old in code
        code = code.replace(old, new)
    for key, document in (('9f2e', {'metadata': {'language': 'de'}}), ('a', {'metadata': {'language': 'fr'}}),
                          ('b', {'metadata': {'language': 5}}), ('c', {'metadata': 'de'}), ('d', {'language': 'de'}),
                          ('e', {'metadata': {'pages': 7, 'language': 'de'}})):
        cluster.put(key, {'doc': document})
    found = {}
    exec(code, found)
    assert found['language'] == 'de'
    assert sorted(key[2] for key, _, _ in found['rows']) == ['9f2e', 'e']
    found['client'].close()



def example(program, nsqd, cluster, name, *more, sets=()):
    """Runs an example on the messages that stand at its beginning and on `more`; the bodies of all dead letters."""
    path = servers.ROOT / 'etc' / f'x-msrv-{name}.conf'
    samples = [line[2:].strip() for line in path.read_text().splitlines() if line.startswith('#   {')]
    assert len(samples) == 2
    for set_ in sets:
        samples = [line.replace(f'"{set_.partition("-")[0]}"', f'"{set_}"') for line in samples]
    topic = 'events' if name == 'tenants' else name
    nsqd.create(topic, 'x-msrv')
    nsqd.publish(topic, [*samples, *map(json.dumps, more)])
    options = {'nsq.nsqd-tcp-address': nsqd.tcp, 'state-dir': program.directory / 'state', 'aerospike.set': cluster.set,
               'aerospike.hosts': cluster.address}
    done = program.run('-c', path, *(f'--set={option}={value}' for option, value in options.items()), 'once')
    counts = servers.summary(done.stderr)
    assert counts['received'] == len(samples) + len(more)
    letters = nsqd.drain(f'{topic}.dead', 'x-msrv-replay', expected=counts['dead'])
    return [json.loads(sample) for sample in samples], [json.loads(letter.partition(b'\n')[2]) for letter in letters]


def test_the_example_of_orders_keeps_the_newest(nsqd, program, cluster):
    later = {'order': {'id': 'B-1', 'version': 7}, 'state': 'sent', 'customer': {'id': 1}}
    bad = {'order': {'id': 'B-2', 'version': 1}, 'state': 'lost', 'customer': {'id': 1}}
    (newest, _), dead = example(program, nsqd, cluster, 'orders', later, bad)
    assert cluster.records() == {
        'A-17': {**newest, 'order_id': 'A-17', 'version': 2, 'customer_id': 42},
        'B-1': {**later, 'order_id': 'B-1', 'version': 7, 'customer_id': 1}}
    assert dead == [bad]


def test_the_example_of_documents_keeps_them_whole(nsqd, program, cluster):
    many = {'document': 'many', **{f'a name of over 15 bytes {n}': n for n in range(5000)}}
    (first, second), dead = example(program, nsqd, cluster, 'documents', many, {'document': 5})
    found = cluster.records()
    assert {key: bins['doc'] for key, bins in found.items()} == {'9f2e': first, '77aa': second, 'many': many}
    assert found['77aa']['language'] == 'de' and set(found['9f2e']) == {'doc', 'gts'}
    assert dead == [{'document': 5}]


def test_the_example_of_tenants_has_a_set_for_each(nsqd, program, cluster):
    sets = [f'{name}-{os.getpid()}' for name in ('acme', 'umbrella')]
    (login, logout), dead = example(program, nsqd, cluster, 'tenants', {'event': 'x'}, {
        'tenant': {'name': 'a b'}, 'event': 'y'}, sets=sets)
    assert login['token'] == '3q2+7w=='
    for set_, message, seconds in ((sets[0], {**login, 'token': b'\xde\xad\xbe\xef'}, 3600),
                                   (sets[1], logout, 30 * 86400)):
        (key, meta, bins), = cluster.client.query(NAMESPACE, set_).results()
        assert seconds - 60 < meta['ttl'] <= seconds
        assert (bins.pop('gid'), bins.pop('nsqd')) == (key[2], nsqd.tcp) and bins.pop('published') > 0
        assert bins == message
        cluster.client.remove((NAMESPACE, set_, key[2]))
    assert sorted(letter['event'] for letter in dead) == ['x', 'y']
