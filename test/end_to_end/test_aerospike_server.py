"""The stand-in for Aerospike does what the server does, as far as the official client can see.

With XMSRV_TEST_AEROSPIKE=host:port each test that asks nothing special of the server is played on that one, too: in its
namespace `test`, in sets that are empty before and after.
"""
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import aerospike
import pytest
from aerospike import exception
from aerospike_helpers import expressions as exp
from aerospike_helpers.batch.records import BatchRecords, Remove, Write
from aerospike_helpers.operations import operations

import aerospike_server
import servers
from aerospike_server import AerospikeServer, Lost
from servers import wait_until

REAL = os.environ.get('XMSRV_TEST_AEROSPIKE')
TRACE = Path(__file__).parent.parent / 'data' / 'aerospike' / 'trace.jsonl'
MIB = 1 << 20
REPLACE = {'exists': aerospike.POLICY_EXISTS_CREATE_OR_REPLACE}
CREATE = {'exists': aerospike.POLICY_EXISTS_CREATE}
SEND_KEY = {'key': aerospike.POLICY_KEY_SEND}


@contextlib.contextmanager
def connected(address, *tls_name, **config):
    """A client of the server at `address`."""
    host, _, port = address.rpartition(':')
    client = aerospike.client({'hosts': [(host.strip('[]'), int(port), *tls_name)], **config})
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope='module', params=['stand-in', *(['real'] if REAL else [])])
def client(request):
    """A client of a stand-in; of the real server, too, where there is one."""
    with contextlib.ExitStack() as stack:
        address = REAL if request.param == 'real' else stack.enter_context(AerospikeServer()).address
        yield stack.enter_context(connected(address))


@pytest.fixture
def key(client):
    """A function: the key of that name in the worker's own set, for a server never forgets the name of one."""
    own = f'contract-{os.environ.get("PYTEST_XDIST_WORKER", "alone")}'
    clear(client, own)
    yield lambda name: ('test', own, name)
    clear(client, own)


@pytest.fixture
def server():
    """A stand-in."""
    with AerospikeServer() as made:
        yield made


@pytest.fixture
def local(server):
    """A client of it, that looks often whether it is back."""
    with connected(server.address, tend_interval=250) as made:
        yield made


def clear(client, name):
    for key, *_ in client.query('test', name).results(None, {'nobins': True}):
        client.remove(key)


def write(client, records, policy=None, meta=None, **call):
    """Write (key, bins) pairs in one batch: the call's result, and each record's."""
    batch = batch_of(records, policy, meta)
    client.batch_write(batch, call)
    return batch.result, [each.result for each in batch.batch_records]


def batch_of(records, policy=None, meta=None):
    """The batch of (key, bins) pairs; a third value is a record's own policy."""
    return BatchRecords([Write(key, [operations.write(*item) for item in bins.items()], meta, own[0] if own else policy)
                         for key, bins, *own in records])


def local_keys(number):
    return [('test', 'orders', n) for n in range(number)]


def code(call, *args):
    """What a call ends with: 0, or the code of its error."""
    try:
        call(*args)
    except exception.AerospikeError as error:
        return error.code
    return 0


# ------------------------------------------------------------------------------------------------- what was recorded

def k(name):
    return 'test', 'trace', name


def if_newer(name, value):
    """The policy of a write that happens only where bin `name` is absent, or not newer than `value`."""
    newer = exp.Or(exp.Not(exp.BinExists(name)), exp.LE(exp.IntBin(name), value))
    return {'expressions': newer.compile()}


def play_newer(gts, value):
    return lambda client: write(client, [(k('nw'), {'gts': gts, 'v': value}, {**REPLACE, **if_newer('gts', gts)})])


def play_read(client):
    rows = client.batch_read([k('b0'), k('b1'), k('zzz')]).batch_records
    return [(row.result, row.record[2] if row.record else None) for row in rows]


STEPS = {
    'put string key': lambda client: client.put(
        k('k1'), {'a': 1, 's': 'text', 'f': 1.5, 'b': True, 'l': [1, 'x', None], 'm': {'x': [{'y': 2}]}}),
    'put string key, send key, replace': lambda client: client.put(k('k2'), {'a': 1}, {}, {**SEND_KEY, **REPLACE}),
    'put integer key': lambda client: client.put(k(7), {'a': 1}),
    'get': lambda client: client.get(k('k1')),
    'get missing': lambda client: client.get(k('none')),
    'exists': lambda client: client.exists(k('k1')),
    'put create only, exists already': lambda client: client.put(k('k1'), {'a': 1}, {}, CREATE),
    'put record too big': lambda client: client.put(k('big'), {'a': 'x' * MIB}),
    'put unknown namespace': lambda client: client.put(('nope', 'trace', 'k'), {'a': 1}),
    'batch_write 1': lambda client: write(client, [(k('b1'), {'a': 1, 's': 'x'})]),
    'batch_write 3': lambda client: write(
        client, [(k(f'b{n}'), {'gid': f'b{n}', 'n': n, 'l': [n, {'x': n}]}) for n in range(3)]),
    'batch_write replace + send key': lambda client: write(
        client, [(k(f'r{n}'), {'a': n}) for n in range(2)], {**SEND_KEY, **REPLACE}),
    'batch_write mixed: ok, create-only duplicate': lambda client: write(
        client, [(k('new1'), {'a': 1}), (k('b1'), {'a': 2}, CREATE)]),
    'batch_write ttl': lambda client: write(
        client, [(k('t1'), {'a': 1}, {'ttl': 3600}), (k('t2'), {'a': 1}, {'ttl': aerospike.TTL_NEVER_EXPIRE})]),
    'batch_write only if newer: gts 100 on nothing': play_newer(100, 'a'),
    'batch_write only if newer: gts 50 on 100': play_newer(50, 'old'),
    'batch_write only if newer: gts 200 on 100': play_newer(200, 'b'),
    'get the newest': lambda client: client.get(k('nw'))[2],
    'batch_write unknown namespace': lambda client: write(client, [(('nope', 'trace', 'k'), {'a': 1})]),
    'batch_read 3, one missing': play_read,
    'remove': lambda client: client.remove(k('b0')),
    'query of a set': lambda client: len(client.query('test', 'trace').results()),
    'info namespace': lambda client: client.info_all('namespace/test'),
}


def outcome(step, client):
    """What a step returns or raises, as it was recorded."""
    try:
        return normal(str(STEPS[step](client)))
    except exception.AerospikeError as error:
        return normal(f'{type(error).__name__}: {error.args}')


def normal(text):
    """Without what differs between servers: the address, the node's name, and all but the first facts of info."""
    text = re.sub(r"'(\[::1\]|[\d.]+):\d+ ", "'SERVER ", text)
    return re.sub(r"\{'\w+': (\(None, '.*;objects=).*", r'\1', text)


def recorded():
    return [json.loads(line) for line in TRACE.read_text().splitlines()]


def test_each_step_ends_as_recorded(client):
    clear(client, 'trace')
    wanted = {line['step']: normal(line['outcome']) for line in recorded() if 'outcome' in line}
    assert wanted.pop('close') == 'None'
    assert {step: outcome(step, client) for step in STEPS} == wanted
    clear(client, 'trace')


def test_each_frame_is_as_recorded(server, monkeypatch):
    """Byte for byte, of the client and of the stand-in, but for what varies: void times, task ids, a query's order."""
    said = []

    def listening(connection, kind, body):
        answer = answers(connection, kind, body)
        if kind == aerospike_server.MESSAGE:
            said.append((aerospike_server.frame(kind, body).hex(), answer))
        return answer
    answers = aerospike_server.Connection.answer
    monkeypatch.setattr(aerospike_server.Connection, 'answer', listening)
    with connected(server.address) as made:
        for step in STEPS:
            outcome(step, made)
    wanted = exchanges()
    assert len(said) == len(wanted)
    for (step, request, answer), (request_now, answer_now) in zip(wanted, said, strict=True):
        whole, _, _ = request.partition('...')
        assert same(whole) == same(request_now)[:len(whole)], step
        assert messages(answer) == messages(answer_now), step


def exchanges():
    """The recorded (step, request in hex, answer) of each record message."""
    found = []
    for line in recorded():
        if line.get('type') == aerospike_server.MESSAGE and line['dir'] == 'client':
            found.append((line['step'], line['hex'], b''))
        elif line.get('type') == aerospike_server.MESSAGE:
            step, request, answer = found.pop()
            found.append((step, request, answer + bytes.fromhex(line['hex'])))
    return found


def same(request):
    """A request in hex without its task id."""
    return re.sub('(?<=0000000907)[0-9a-f]{16}', '0' * 16, request, count=1)


def messages(data):
    """The messages in the frames of an answer, sorted, without void times."""
    found = []
    while data:
        body, data = data[8:8 + int.from_bytes(data[2:8], 'big')], data[8 + int.from_bytes(data[2:8], 'big'):]
        at = 0
        while at < len(body):
            fields, ops = aerospike_server.HEADER.unpack_from(body, at)[-2:]
            _, end = aerospike_server.read_fields(body, at + 22, fields)
            _, end = aerospike_server.read_ops(body, end, ops)
            ttl = b'some' if any(body[at + 10:at + 14]) else b'none'
            found.append(body[at:at + 10] + ttl + body[at + 14:end])
            at = end
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------- the edges

@pytest.mark.parametrize(('bins', 'error'), [
    ({'a': 1 << 63}, exception.ParamError),
    ({'a': [{'deep': -(1 << 63) - 1}]}, exception.ParamError),
    ({'sixteen-letters-': 1}, exception.BinNameError),
    ({'a': 'lone \ud800'}, exception.ClientError),
    ({}, exception.ParamError),
], ids=['big integer', 'big integer inside', 'long bin name', 'surrogate', 'nothing to do'])
def test_what_the_client_refuses_leaves_the_batch_unwritten(client, key, bins, error):
    with pytest.raises(error):
        write(client, [(key('good'), {'a': 1}), (key('bad'), bins)])
    assert code(client.get, key('good')) == 2


def test_key_of_a_float_is_refused(client, key):
    with pytest.raises(exception.ParamError):
        client.put(key(1.5), {'a': 1})


@pytest.mark.parametrize('value', [
    'text', '', 'd\u00fcne \U0001f40d', 0, -1, (1 << 63) - 1, -(1 << 63), 1.5, -0.0, 1e300, True, False, b'',
    b'\0bytes', [], {}, [None, [True, 1.5, 'x', b'y']], {'': {'x': None}, 'y': [{'z': 1}]}, 'x' * 70000,
    list(range(70000)),
], ids=lambda value: repr(value)[:20])
def test_value_is_read_as_it_was_written(client, key, value):
    write(client, [(key(1), {'v': value, '': 'no name'}), (key(2), {'v': value})])
    _, _, bins = client.get(key(1))
    assert repr(bins) == repr({'v': value, '': 'no name'})


def test_string_is_cut_at_a_nul(client, key):
    write(client, [(key(1), {'a': 'cut\0here', 'm': {'x\0y': 1}}), (key(2), {'a': 1})])
    assert client.get(key(1))[2] == {'a': 'cut', 'm': {'x': 1}}


def test_list_of_65_levels_is_written_and_never_read_again(client, key):
    def nested(levels):
        value = 1
        for _ in range(levels):
            value = [value]
        return value
    assert write(client, [(key(each), {'a': nested(each)}) for each in (64, 65)]) == (0, [0, 0])
    assert client.get(key(64))[2] == {'a': nested(64)}
    with pytest.raises(exception.ClientError):
        client.get(key(65))


def test_null_removes_a_bin(client, key):
    client.put(key('old'), {'a': 1, 'b': 1})
    client.put(key('last'), {'a': 1})
    records = [(key('old'), {'a': None, 'c': 2}), (key('new'), {'a': None, 'c': 2}), (key('last'), {'a': None}),
               (key('nulls'), {'a': None})]
    assert write(client, records) == (0, [0, 0, 0, 2])
    assert client.get(key('old'))[2] == {'b': 1, 'c': 2}
    assert client.get(key('new'))[2] == {'c': 2}
    assert code(client.get, key('last')) == 2


def test_null_with_create_is_left_out_and_with_replace_refused(client, key):
    records = [(key('with null'), {'a': None, 'c': 2}), (key('nulls'), {'a': None}), (key('good'), {'c': 2})]
    assert write(client, records, CREATE) == (0, [0, 2, 0])
    assert client.get(key('with null'))[2] == {'c': 2}
    assert write(client, records, REPLACE) == (-16, [4, 4, 0])


@pytest.mark.parametrize(('more', 'result'), [(0, (0, [0, 0])), (1, (-16, [13, 0]))])
def test_record_too_big_alone_is_refused(client, key, more, result):
    """Beside text and set name 48 bytes are stored: the bin's name, and what belongs to record, set and bin."""
    text = 'x' * (MIB - 48 - len(key('big')[1]) + more)
    assert write(client, [(key('big'), {'a': text}), (key('good'), {'a': 1})]) == result


def test_existing_record_alone_is_refused_by_create(client, key):
    client.put(key('old'), {'a': 1})
    assert write(client, [(key('old'), {'a': 2}), (key('new'), {'a': 2})], CREATE) == (-16, [5, 0])
    assert client.get(key('old'))[2] == {'a': 1}


def test_missing_record_is_refused_by_update_and_replace_only(client, key):
    client.put(key('old'), {'a': 1, 'b': 1})
    records = [(key('old'), {'a': 2}), (key('new'), {'a': 2})]
    assert write(client, records, {'exists': aerospike.POLICY_EXISTS_UPDATE}) == (0, [0, 2])
    assert client.get(key('old'))[2] == {'a': 2, 'b': 1}
    assert write(client, records, {'exists': aerospike.POLICY_EXISTS_REPLACE}) == (0, [0, 2])
    assert client.get(key('old'))[2] == {'a': 2}


LONG = {'total_timeout': 30000}   # for calls of many values, on a machine that has other work


def bins_of(number):
    return {f'{n:x}': n for n in range(number)}


@pytest.mark.parametrize(('more', 'result'), [(0, (0, [0, 0])), (1, (-16, [4, 0]))])
@pytest.mark.parametrize('policy', [REPLACE, CREATE, None], ids=['replace', 'create', 'update'])
def test_record_of_too_many_bins_alone_is_refused(client, key, policy, more, result):
    assert write(client, [(key('many'), bins_of(32767 + more)), (key('good'), {'a': 1})], policy, **LONG) == result
    if more:
        assert code(client.get, key('many')) == 2
    else:
        assert client.get(key('many'), LONG)[2] == bins_of(32767)


def test_update_that_would_make_too_many_bins_is_refused(client, key):
    assert write(client, [(key(1), bins_of(32767))], **LONG) == (0, [0])
    assert write(client, [(key(1), {'other': 1}), (key(1), {'0': 'new'})], **LONG) == (-16, [4, 0])
    assert client.get(key(1), LONG)[2] == {**bins_of(32767), '0': 'new'}


def test_client_counts_operations_in_16_bits(client, key):
    """It says that all were written."""
    assert write(client, [(key('cut'), bins_of(65537)), (key('good'), {'a': 1})], **LONG) == (0, [0, 0])
    assert client.get(key('cut'))[2] == bins_of(1)


def test_no_operations_by_that_count_spoil_the_whole_batch(client, key):
    result, records = write(client, [(key('none'), bins_of(65536)), (key('good'), {'a': 1})], max_retries=0, **LONG)
    assert result < 0 and records == [-15, -15]
    assert [code(client.get, key(name)) for name in ('none', 'good')] == [2, 2]


@pytest.mark.parametrize('size', [1, 31, 32, 255, 256, 65535, 65536, 900_000])
def test_sizes_are_kept(client, key, size):
    """At the limits of the numbers in which msgpack and the protocol keep a size."""
    few = min(size, 70_000)
    for value in ('x' * size, ['x' * size], {'x' * size: 1}, list(range(few)), {f'{n}': n for n in range(few)}):
        client.put(key('size'), {'v': value}, {}, {**REPLACE, **LONG})
        assert client.get(key('size'), LONG)[2] == {'v': value}


@pytest.mark.parametrize('size', [1, 255, 256, 65535, 65536, 1_000_000])
def test_key_is_kept_at_any_length(client, key, size):
    write(client, [(key('k' * size), {'a': 1})], SEND_KEY)
    assert [row[0][2] for row in client.query('test', key('')[1]).results()] == ['k' * size]


def test_key_counts_for_the_size_of_its_record(client, key):
    assert write(client, [(key('k' * MIB), {'a': 1}), (key('good'), {'a': 1})], SEND_KEY) == (-16, [13, 0])


@pytest.mark.parametrize(('name', 'good'), [('s' * 63, True), ('s' * 64, False), ('\u00e9' * 32, False)])
def test_set_name_has_at_most_63_bytes(server, local, name, good):
    records = [(('test', name, 'k'), {'a': 1})]
    if good:
        assert write(local, records) == (0, [0])
    else:
        with pytest.raises(exception.ParamError):
            write(local, records)


def test_ttl_and_timeout_wrap_round_in_the_client(client, key):
    """They have 32 bits: so x-msrv never passes on more."""
    assert write(client, [(key(1), {'a': 1})], {'ttl': (1 << 32) + 60})[1] == [0]
    assert client.exists(key(1))[1]['ttl'] in (59, 60)


def test_generation_wraps_round(server, local):
    """It has 16 bits; a write that does not ask for one is not held up."""
    at, = local_keys(1)
    local.put(at, {'a': 0})
    digest, = server.namespaces['test'].records
    records = server.namespaces['test'].records
    records[digest] = records[digest]._replace(generation=0xffff)
    assert write(local, [(at, {'a': 1})]) == (0, [0])
    assert local.get(at)[1]['gen'] == 1


def test_last_of_two_operations_on_a_bin_wins(client, key):
    rows = [Write(key(n), [operations.write('a', 1), operations.write('a', 2)]) for n in range(2)]
    client.batch_write(BatchRecords(rows))
    assert [row.result for row in rows] == [0, 0]
    assert client.get(key(0))[2] == {'a': 2}


def test_true_is_the_key_1_and_bytes_are_the_text(client, key):
    write(client, [(key(each), {'was': repr(each)}) for each in (1, True, '1', b'1', bytearray(b'1'), -1)])
    found = client.query(*key(1)[:2]).results()
    assert sorted(bins['was'] for *_, bins in found) == ['-1', 'True', "b'1'", "bytearray(b'1')"]


def test_generation_counts_writes_and_can_be_asked_for(client, key):
    for _ in range(2):
        write(client, [(key(1), {'a': 1}), (key(2), {'a': 1})])
    assert client.get(key(1))[1]['gen'] == 2
    equal, newer = {'gen': aerospike.POLICY_GEN_EQ}, {'gen': aerospike.POLICY_GEN_GT}
    records = [(key(1), {'a': 2}), (key('new'), {'a': 2})]
    assert write(client, records, equal, {'gen': 1}) == (-16, [3, 3])
    assert write(client, records, newer, {'gen': 2}) == (-16, [3, 0])
    assert write(client, records[:1], equal, {'gen': 2}) == (0, [0])
    assert code(lambda: client.remove(key(1), policy={**equal, 'generation': 2})) == 3
    assert code(lambda: client.remove(key(1), policy={**equal, 'generation': 3})) == 0


def test_create_is_judged_before_generation_and_generation_before_the_filter(client, key):
    client.put(key(1), {'gts': 9})
    wrong = {'gen': aerospike.POLICY_GEN_EQ, **if_newer('gts', 1)}
    assert write(client, [(key(1), {'a': 1})], {**CREATE, **wrong}, {'gen': 7})[1] == [5]
    assert write(client, [(key(1), {'a': 1})], wrong, {'gen': 7})[1] == [3]
    assert write(client, [(key(1), {'a': 1})], {'ttl': 400000000, **wrong}, {'gen': 1})[1] == [27]


def test_rows_that_share_all_but_their_key(client, key):
    keys = [key(n) for n in range(20)]
    done = client.batch_operate(keys, [operations.write('a', 1), operations.write('b', 'x')])
    assert [row.result for row in done.batch_records] == [0] * 20
    assert [row.record[2] for row in client.batch_read(keys, ['b']).batch_records] == [{'b': 'x'}] * 20
    assert [row.record[1]['gen'] for row in client.batch_read(keys, []).batch_records] == [1] * 20
    assert [row.result for row in client.batch_remove([*keys, key('none')]).batch_records] == [0] * 20 + [2]


def removed(client, rows, **policy):
    """Remove each (key, moment) in one batch, where the stored time is not newer: the results."""
    batch = BatchRecords([Remove(key, {**if_newer('gts', moment), **policy}) for key, moment in rows])
    client.batch_write(batch)
    return [each.result for each in batch.batch_records]


def test_a_batch_removes_what_its_filters_let_it(client, key):
    write(client, [(key('old'), {'gts': 1}), (key('same'), {'gts': 2}), (key('new'), {'gts': 3}),
                   (key('none'), {'a': 1}), (key('text'), {'gts': 'x'})])
    names = 'old', 'same', 'new', 'none', 'text', 'absent'
    assert removed(client, [(key(name), 2) for name in names]) == [0, 0, 27, 0, 27, 2]
    assert [client.exists(key(name))[1] is not None for name in names] == [False, False, True, False, True, False]


def test_a_removed_record_forgets_its_time(client, key):
    write(client, [(key(1), {'gts': 5})])
    assert removed(client, [(key(1), 9)]) == [0]
    assert write(client, [(key(1), {'gts': 4}, if_newer('gts', 4))]) == (0, [0])


def test_a_durable_delete_needs_an_enterprise_server(server, local):
    key = local_keys(1)[0]
    local.put(key, {'gts': 1})
    assert removed(local, [(key, 1), ((*key[:2], 'absent'), 1)], durable_delete=True) == [25, 25]
    server.edition = aerospike_server.ENTERPRISE
    assert removed(local, [(key, 1), ((*key[:2], 'absent'), 1)], durable_delete=True) == [0, 2]
    assert server.namespaces['test'].durable_deletes == 1
    assert info(local, 'edition') == aerospike_server.ENTERPRISE


def test_rows_with_the_flags_of_transactions(client, key):
    assert write(client, [(key(n), {'a': n}) for n in range(3)], {'on_locking_only': True}) == (0, [0, 0, 0])
    assert client.get(key(2))[2] == {'a': 2}


def test_select_reads_the_bins_that_are_there(client, key):
    client.put(key(1), {'a': 1, 'b': 2, 'c': 3})
    assert client.select(key(1), ['c', 'a'])[2] == {'a': 1, 'c': 3}
    assert client.exists(key(1))[1]['gen'] == 1
    assert code(client.select, key('none'), ['a']) == 2


# ---------------------------------------------------------------------------------------------------------- expressions

@pytest.mark.parametrize(('stored', 'result'), [
    (None, 0), ({'other': 1}, 0), ({'gts': 99}, 0), ({'gts': 100}, 0), ({'gts': 101}, 27), ({'gts': -5}, 0),
    ({'gts': '99'}, 27), ({'gts': 99.0}, 27), ({'gts': [99]}, 27), ({'gts': True}, 27),
], ids=str)
@pytest.mark.parametrize('rows', [1, 2], ids=['alone', 'in a batch'])
def test_newest_wins(client, key, stored, result, rows):
    if stored:
        client.put(key(0), stored)
    records = [(key(n), {'gts': 100, 'new': True}) for n in range(rows)]
    assert write(client, records, if_newer('gts', 100)) == (0, [result, 0][:rows])
    assert ('new' in client.get(key(0))[2]) == (result == 0)


@pytest.mark.parametrize('gts', [1 << 40, (1 << 63) - 1, -1, -(1 << 63)])
def test_newest_wins_with_wide_numbers(client, key, gts):
    client.put(key(0), {'gts': 0})
    result = 0 if gts > 0 else 27
    assert write(client, [(key(n), {'gts': gts}) for n in range(2)], if_newer('gts', gts)) == (0, [result, 0])


INT, FLOAT, TEXT, BOOL = exp.IntBin('i'), exp.FloatBin('f'), exp.StrBin('s'), exp.BoolBin('b')
IS_5, UNKNOWN = exp.Eq(INT, 5), exp.Eq(exp.IntBin('none'), 5)


@pytest.mark.parametrize(('expression', 'result'), [
    (IS_5, 0), (exp.Eq(INT, 6), 27), (exp.NE(INT, 6), 0), (exp.NE(INT, 5), 27), (exp.GT(INT, 4), 0),
    (exp.GT(INT, 5), 27), (exp.GE(INT, 5), 0), (exp.GE(INT, 6), 27), (exp.LT(INT, 6), 0), (exp.LT(INT, 5), 27),
    (exp.LE(INT, 5), 0), (exp.LE(INT, 4), 27), (exp.Eq(FLOAT, 1.5), 0), (exp.LT(FLOAT, 1.5), 27),
    (exp.Eq(TEXT, 'text'), 0), (exp.GT(TEXT, 'tex'), 0), (exp.LT(TEXT, 'tex'), 27), (exp.Eq(TEXT, 'x' * 40), 27),
    (exp.Eq(exp.BlobBin('y'), b'\1'), 0), (BOOL, 0), (exp.Not(BOOL), 27), (exp.Eq(BOOL, True), 0),
    (exp.Eq(BOOL, False), 27), (exp.And(BOOL, IS_5, exp.Eq(FLOAT, 1.5)), 0), (exp.And(BOOL, exp.Eq(INT, 6)), 27),
    (exp.Or(exp.Eq(INT, 6), BOOL), 0), (exp.Or(exp.Eq(INT, 6), exp.Not(BOOL)), 27),
    (exp.BinExists('i'), 0), (exp.BinExists('none'), 27), (exp.Eq(exp.BinType('s'), 3), 0),
    (exp.Eq(exp.BinType('l'), 20), 0), (exp.Eq(exp.BinType('b'), 17), 0), (exp.Eq(exp.BinType('none'), 0), 0),
    (UNKNOWN, 27), (exp.Not(UNKNOWN), 27), (exp.Or(UNKNOWN, BOOL), 0), (exp.And(UNKNOWN, BOOL), 27),
    (exp.Not(exp.And(UNKNOWN, exp.Not(BOOL))), 0), (exp.Eq(INT, 'text'), 4), (exp.Eq(INT, 5.0), 4),
    (exp.Or(BOOL, exp.Eq(INT, 1.5)), 4), (INT, 4), (exp.Not(INT), 4), (exp.And(BOOL, INT), 4),
])
def test_expression_filters_writes_and_reads(client, key, expression, result):
    client.put(key(1), {'i': 5, 'f': 1.5, 's': 'text', 'b': True, 'l': [], 'y': b'\1'})
    policy = {'expressions': expression.compile()}
    assert code(client.get, key(1), policy) == result
    assert write(client, [(key(1), {'n': 1}), (key('new'), {'n': 1})], policy)[1] == [result, 0]
    batch = client.batch_read([key(1), key('none')], policy=policy)
    assert (batch.result, [row.result for row in batch.batch_records]) == (
        (4, [-15, -15]) if result == 4 else (0, [result, 2]))


def test_expression_unknown_to_the_stand_in_is_refused(server, local):
    local.put(('test', 'orders', 1), {'i': 5})
    sum_is_6 = exp.Eq(exp.Add(INT, 1), 6)
    assert code(local.get, ('test', 'orders', 1), {'expressions': sum_is_6.compile()}) == 4


# ------------------------------------------------------------------------------------------------------------------ ttl

def test_ttl_is_counted_down(client, key):
    for ttl, least, most in [(3600, 3500, 3600), (0, 1 << 31, 1 << 32), (aerospike.TTL_NEVER_EXPIRE, 1 << 31, 1 << 32),
                             (315360000, 315359900, 315360000)]:
        assert write(client, [(key(n), {'a': 1}) for n in range(2)], {'ttl': ttl}) == (0, [0, 0])
        assert least <= client.get(key(0))[1]['ttl'] <= most


def test_ttl_can_be_kept(client, key):
    client.put(key(0), {'a': 1}, None, {'ttl': 3600})
    assert write(client, [(key(n), {'a': 2}) for n in range(2)], {'ttl': aerospike.TTL_DONT_UPDATE}) == (0, [0, 0])
    assert client.get(key(0))[1]['ttl'] <= 3600
    assert client.get(key(1))[1]['ttl'] > 1 << 31


def test_ttl_over_ten_years_is_refused(client, key):
    assert write(client, [(key(n), {'a': 1}) for n in range(2)], {'ttl': 315360001}) == (-16, [4, 4])


def test_record_is_gone_after_its_ttl(client, key):
    write(client, [(key(n), {'a': 1}) for n in range(2)], {'ttl': 1})
    wait_until(lambda: code(client.get, key(0)) == 2, 'the record expires')
    assert client.query(*key(0)[:2]).results() == []
    assert write(client, [(key(n), {'a': 1}) for n in range(2)], CREATE) == (0, [0, 0])
    assert client.get(key(0))[1]['gen'] == 1


def test_ttl_is_refused_where_nothing_would_expire():
    with AerospikeServer(nsup_period=0) as server, connected(server.address) as client:
        records = [(each, {'a': 1}) for each in local_keys(2)]
        assert write(client, records, {'ttl': 3600}) == (-16, [22, 22])
        assert write(client, records, {'ttl': 0}) == (0, [0, 0])
        assert write(client, records, {'ttl': aerospike.TTL_NEVER_EXPIRE}) == (0, [0, 0])
        server.default_ttl = 60
        assert write(client, records, {'ttl': 0}) == (-16, [22, 22])
        server.allow_ttl_without_nsup = True
        assert write(client, records, {'ttl': 0}) == (0, [0, 0])
        assert client.get(local_keys(1)[0])[1]['ttl'] <= 60


# ------------------------------------------------------------------------------------------------------- query and info

def limit_set(client, name, count):
    client.info_all(f'set-config:context=namespace;id=test;set={name};stop-writes-count={count}')


def test_full_set_takes_no_new_record(client, key):
    own = key(1)[1]
    assert write(client, [(key(n), {'a': n}) for n in range(2)]) == (0, [0, 0])
    try:
        limit_set(client, own, 2)
        assert facts(info(client, f'sets/test/{own}'), ':')['stop-writes-count'] == '2'
        assert write(client, [(key(n), {'a': n}) for n in range(3)]) == (-16, [0, 0, 22])
    finally:
        limit_set(client, own, 0)
    assert write(client, [(key(2), {'a': 2})]) == (0, [0])


def test_truncate_takes_out_a_set(client, key):
    write(client, [(key(n), {'a': n}) for n in range(3)])
    client.info_all(f'truncate:namespace=test;set={key(1)[1]}')
    wait_until(lambda: code(client.get, key(1)) == 2, 'it is gone')


@pytest.mark.parametrize(('option', 'result'), [('stop_writes', 8), ('clock_skew_stop_writes', 22)])
def test_stopped_writes_are_told_by_info(server, local, option, result):
    setattr(server, option, True)
    assert write(local, [(each, {'a': 1}) for each in local_keys(2)]) == (-16, [result] * 2)
    assert facts(info(local, 'namespace/test'))[option] == 'true'


def test_query_reads_everything_back_with_its_key(client, key):
    names = [*range(600), *(f'name {n}' for n in range(600))]
    write(client, [(key(name), {'n': str(name), 'other': 1}) for name in names], SEND_KEY)
    write(client, [(key('keyless'), {'n': 'keyless'}), (key('too'), {'n': 'too'})])
    found = client.query(*key(0)[:2]).results()
    assert {str(name): bins['n'] for (_, _, name, _), _, bins in found if name is not None} == {
        str(name): str(name) for name in names}
    assert sorted(bins['n'] for (_, _, name, _), _, bins in found if name is None) == ['keyless', 'too']


def test_query_can_be_narrowed(client, key):
    write(client, [(key(n), {'n': n, 'other': 1}) for n in range(50)])
    query = client.query(*key(0)[:2])
    query.select('n')
    found = query.results({'expressions': exp.LT(exp.IntBin('n'), 5).compile()})
    assert sorted((bins for _, _, bins in found), key=str) == [{'n': n} for n in range(5)]
    query.max_records = 7
    assert len(query.results()) == 7


def test_query_of_an_unknown_set_is_empty(client, key):
    assert client.query(*key(0)[:2]).results() == []


def test_key_once_sent_stays(client, key):
    write(client, [(key(n), {'a': 1}) for n in range(2)], SEND_KEY)
    write(client, [(key(n), {'a': 2}) for n in range(2)], REPLACE)
    assert sorted(name for (_, _, name, _), *_ in client.query(*key(0)[:2]).results()) == [0, 1]


def info(client, command):
    """The one node's answer."""
    (error, text), = client.info_all(command).values()
    assert error is None
    return text.strip()


def facts(text, separator=';'):
    return dict(pair.split('=', 1) for pair in text.rstrip(';').split(separator))


def test_info(client, key):
    client.put(key(1), {'a': 1})
    assert info(client, 'status') == 'ok'
    assert info(client, 'build').startswith('8.1.')
    assert 'test' in info(client, 'namespaces').split(';')
    assert facts(info(client, 'statistics'))['cluster_size'] == '1'
    assert info(client, 'cluster-name')
    known = facts(info(client, 'namespace/test'))
    assert int(known['objects']) >= 1
    assert {name: known[name] for name in ('ns_cluster_size', 'max-record-size', 'default-ttl', 'stop_writes',
                                           'allow-ttl-without-nsup')} == {
        'ns_cluster_size': '1', 'max-record-size': str(MIB), 'default-ttl': '0', 'stop_writes': 'false',
        'allow-ttl-without-nsup': 'false'}
    assert int(known['nsup-period']) > 0
    own = key(1)[1]
    assert f'ns=test:set={own}:objects=1:' in info(client, 'sets/test')
    assert facts(info(client, f'sets/test/{own}'), ':')['objects'] == '1'
    assert info(client, 'namespace/nope') == 'type=unknown'
    assert info(client, 'sets/nope') == 'ns_type=unknown'
    assert info(client, 'sets/test/nope') == ''


def test_unknown_info_command_is_an_error(client):
    with pytest.raises(exception.InvalidRequest, match='unrecognized command'):
        client.info_all('nonsense')


# -------------------------------------------------------------------------------------- what a stand-in can do on top

def test_judge_answers_in_the_place_of_a_write(server, local):
    seen = []
    server.judge = lambda write: seen.append(write) or {2: 18, 3: Lost(9)}.get(write.number)
    records = [(each, {'a': 1, 'b': 'x'}) for each in local_keys(4)]
    assert write(local, records, SEND_KEY) == (-16, [0, 18, 9, 0])
    assert [row.result for row in local.batch_read(local_keys(4)).batch_records] == [0, 2, 0, 0]
    assert (server.writes, server.stored('test', 'orders')) == (4, 3)
    assert [(each.number, each.namespace, each.set, each.key, each.bins) for each in seen] == [
        (n + 1, 'test', 'orders', n, ['a', 'b']) for n in range(4)]
    assert seen[0].digest == bytes(aerospike.calc_digest('test', 'orders', 0))


def test_judge_of_a_single_write(server, local):
    server.judge = lambda write: 8
    assert code(local.put, ('test', 'orders', 1), {'a': 1}) == 8
    assert (server.writes, server.stored('test', 'orders')) == (1, 0)


def test_limit_of_a_record_can_be_lower(server, local):
    server.max_record_size = 1000
    records = [(('test', 'orders', n), {'a': 'x' * n}) for n in (900, 1000)]
    assert write(local, records) == (-16, [0, 13])


def test_delay_is_before_the_answer(server, local):
    server.delay = 0.3
    records = [(each, {'a': 1}) for each in local_keys(2)]
    assert write(local, records, total_timeout=100, max_retries=0) == (9, [-15, -15])
    assert server.stored('test', 'orders') == 2
    assert write(local, records) == (0, [0, 0])


def test_lost_answer_leaves_the_records_in_doubt(server, local):
    server.drop_answers = 1
    batch = batch_of((each, {'a': 1}) for each in local_keys(2))
    local.batch_write(batch, {'max_retries': 0})
    assert [(row.result, row.in_doubt) for row in batch.batch_records] == [(-15, True)] * 2
    assert batch.result == -10
    assert (server.stored('test', 'orders'), server.drop_answers) == (2, 0)
    assert write(local, [(each, {'a': 1}) for each in local_keys(2)]) == (0, [0, 0])


def test_lost_answer_is_asked_for_again(server, local):
    server.drop_answers = 1
    assert write(local, [(each, {'a': 1}) for each in local_keys(2)], max_retries=2) == (0, [0, 0])
    assert (server.writes, local.get(local_keys(1)[0])[1]['gen']) == (4, 2)


def test_reads_keep_their_answers(server, local):
    server.drop_answers = 1
    assert code(local.get, local_keys(1)[0]) == 2
    assert [row.result for row in local.batch_read(local_keys(2)).batch_records] == [2, 2]
    assert server.drop_answers == 1


def test_hung_server_does_on_resume_what_it_was_asked(server, local):
    server.hang()
    records = [(each, {'a': 1}) for each in local_keys(2)]
    assert write(local, records, total_timeout=200, max_retries=0) == (9, [-15, -15])
    with socket.create_connection((server.host, server.port), timeout=0.1) as new:
        new.sendall(aerospike_server.frame(aerospike_server.INFO, b'status\n'))
        with pytest.raises(TimeoutError):
            new.recv(100)
        assert server.stored('test', 'orders') == 0
        server.resume()
        new.settimeout(10)
        assert new.recv(100)[8:] == b'status\tok\n'
    wait_until(lambda: server.stored('test', 'orders') == 2, 'the hung writes are done')
    wait_until(lambda: write(local, records) == (0, [0, 0]), 'writes are answered again')


def test_dead_server_comes_back_with_its_data_or_without(server, local):
    records = [(each, {'a': 1}) for each in local_keys(2)]
    assert write(local, records) == (0, [0, 0])
    server.refuse()
    assert write(local, records, max_retries=0) == (-10, [-15, -15])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), timeout=5)
    server.listen()
    assert server.stored('test', 'orders') == 2
    wait_until(lambda: write(local, records) == (0, [0, 0]), 'the client finds it again')
    server.refuse()
    server.listen(empty=True)
    assert server.stored('test', 'orders') == 0


def test_server_can_die_in_mid_batch(server, local):
    server.judge = lambda write: server.refuse() if write.number == 3 else None
    batch = batch_of((each, {'a': 1}) for each in local_keys(5))
    local.batch_write(batch, {'max_retries': 0})
    assert batch.result == -10
    assert [(row.result, row.in_doubt) for row in batch.batch_records] == [(-15, True)] * 5
    assert server.stored('test', 'orders') == 2


def test_server_ends_in_time_whatever_it_does():
    with AerospikeServer() as server, connected(server.address) as client:
        server.delay = 3600
        args = client.put, ('test', 'orders', 1), {'a': 1}, None, {'total_timeout': 0}
        busy = threading.Thread(target=code, args=args)
        busy.start()
        wait_until(lambda: server.writes, 'the write has come')
        server.hang()
        server.refuse()
        busy.join(10)
        assert not busy.is_alive()


def test_namespaces_and_sets_are_told_apart():
    with AerospikeServer(namespaces=('test', 'other')) as server, connected(server.address) as client:
        for place in [('other', 'orders'), ('other', 'bills'), ('other', None)]:
            client.put((*place, 1), {'a': str(place)})
        assert (server.stored('test', 'orders'), server.stored('other', 'orders')) == (0, 1)
        assert client.query('test', 'orders').results() == []
        assert [bins['a'] for *_, bins in client.query('other', 'bills').results()] == ["('other', 'bills')"]
        assert len(client.query('other', None).results()) == 3


def test_ipv6():
    with AerospikeServer(host='::1') as server, connected(server.address) as client:
        assert server.address == f'[::1]:{server.port}'
        assert write(client, [(each, {'a': 1}) for each in local_keys(2)]) == (0, [0, 0])


# -------------------------------------------------------------------------------------------------------- TLS and users

@pytest.fixture
def certificate(workdir):
    """The (certificate, key) files of one for localhost that signs itself."""
    cert, key = workdir / 'cert.pem', workdir / 'key.pem'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
                    '-days', '1', '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost',
                    '-keyout', key, '-out', cert], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def tls(certificate):
    """The server's side of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def trusting(certificate):
    return {'enable': True, 'cafile': str(certificate[0])}


def test_tls(tls, certificate):
    with AerospikeServer(tls=tls) as server:
        with connected(server.address, 'localhost', tls=trusting(certificate)) as client:
            assert write(client, [(each, {'a': 'x' * 100000}) for each in local_keys(20)]) == (0, [0] * 20)
            assert client.get(local_keys(1)[0])[2] == {'a': 'x' * 100000}
        for options in ({}, {'tls': {'enable': True}}):
            with pytest.raises(exception.AerospikeError), connected(server.address, 'localhost', **options):
                pass


def test_tls_server_hangs_and_dies_and_comes_back(tls, certificate):
    with AerospikeServer(tls=tls) as server, connected(server.address, 'localhost', tls=trusting(certificate),
                                                       tend_interval=250) as client:
        records = [(each, {'a': 1}) for each in local_keys(2)]
        server.hang()
        assert write(client, records, total_timeout=200, max_retries=0)[1] == [-15, -15]
        server.refuse()
        server.resume()
        server.listen()
        wait_until(lambda: write(client, records) == (0, [0, 0]), 'the client finds it again')


USERS = {'amber': 'secret'}


def test_known_user_is_let_in():
    with AerospikeServer(users=USERS) as server, connected(server.address, user='amber', password='secret') as client:
        assert write(client, [(each, {'a': 1}) for each in local_keys(2)]) == (0, [0, 0])
        assert info(client, 'status') == 'ok'


@pytest.mark.parametrize(('login', 'refuse', 'result'), [
    ({'user': 'nobody', 'password': 'secret'}, None, 60), ({'user': 'amber', 'password': 'wrong'}, 65, 65),
    ({'user': 'amber', 'password': 'secret'}, 62, 62), ({}, None, 80)], ids=['unknown', 'wrong', 'told so', 'none'])
def test_others_are_not(login, refuse, result):
    with AerospikeServer(users=USERS) as server:
        server.refuse_logins = refuse
        with pytest.raises(exception.AerospikeError) as raised, connected(server.address, **login):
            pass
        assert raised.value.code == result


def test_community_edition_knows_no_users(server):
    with pytest.raises(exception.AerospikeError) as raised, connected(server.address, user='amber', password='secret'):
        pass
    assert raised.value.code == 51


def test_records_are_not_shown_without_a_log_in():
    get = bytes.fromhex(next(request for step, request, _ in exchanges() if step == 'get'))
    with AerospikeServer(users=USERS) as server, socket.create_connection((server.host, server.port), 10) as raw:
        raw.sendall(get)
        assert raw.recv(100)[8 + 5] == 80


# ------------------------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize('end', [signal.SIGINT, signal.SIGTERM])
def test_stands_alone(end):
    command = [sys.executable, aerospike_server.__file__, '--port', 0, '--namespace', 'test', 'more']
    process = servers.spawn(command, stdout=subprocess.PIPE, text=True)
    with process:
        line = process.stdout.readline()
        address = re.match(r'listening on (\S+), namespaces test, more; .*for tests and a laptop only$', line)[1]
        with connected(address) as client:
            client.put(('more', 'orders', 1), {'a': 1})
            process.send_signal(end)
            assert process.wait(timeout=10) == 0


def test_taken_port_is_said(server):
    command = [sys.executable, aerospike_server.__file__, '--port', str(server.port)]
    done = subprocess.run(command, check=False, text=True, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, f'error: 127.0.0.1 port {server.port}: Address already in use\n')
