"""[[delete]]: whatever the order of a key's messages and however often they come, the newest of them decides."""
import collections
import contextlib
import json
import random
import signal
import sqlite3
import urllib.request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clusters
import servers
from aerospike_server import ENTERPRISE
from servers import wait_until
from xmsrv import DELETED, STALE, STORED, STORES, Deletion, Record, StoreError, build_config, read_file

TOPIC, CHANNEL = 'orders', 'x-msrv'
KEEP = 7 * 86400
DELETE = {'field': 'op', 'values': ['d', 'true']}


class Sqlite:
    """The file of the fixture `xmsrv`, told of as a Cluster is."""

    server = None

    def __init__(self, program):
        self.xmsrv = program

    def settings(self, **_):
        return {}

    def records(self):
        return self.xmsrv.records()

    def put(self, key, bins):
        with contextlib.closing(sqlite3.connect(self.xmsrv.database)) as database, database:
            database.execute('INSERT INTO records ("set", "key", bins, stored_at) VALUES (?, ?, ?, ?)',
                             (TOPIC, key, json.dumps(bins), '2026-01-01T00:00:00Z'))


@pytest.fixture(params=['sqlite', 'aerospike'])
def place(request, program):
    """Where records go: a file, and a cluster."""
    if request.param == 'sqlite':
        yield Sqlite(program)
        return
    with clusters.any_cluster() as cluster:
        yield cluster


def record_options(mode='tombstone', **delete):
    """[record] with deletes."""
    return {'key': 'id', 'time': 'ts', 'delete': {**DELETE, 'mode': mode, **delete}}


@pytest.fixture
def opened(program):
    """A function: opened(place, 'remove') is an open store with deletes."""
    with contextlib.ExitStack() as stack:
        def make(place, mode='tombstone', **more):
            program.configure(nsq={'nsqd-tcp-address': '127.0.0.1:4150'}, record=record_options(mode, **more),
                              **place.settings())
            config, faults, _ = build_config(read_file(str(program.path)))
            assert not faults
            store = STORES[config.store](config)
            store.open()
            stack.callback(store.close)
            return store
        yield make


def change(key, time, **bins):
    return Record(key, {'id': key, 'ts': time, **bins, 'gid': key, 'gts': time}, time)


def delete(key, time, keep=KEEP):
    return Deletion(key, {'gid': key, 'gts': time}, time, None, keep)


def made(operations):
    """Records of (key, time, whether it is a delete)."""
    return [delete(key, time) if deletes else change(key, time) for key, time, deletes in operations]


def expected(operations):
    """What is stored when the newest operation of each key has decided, tombstones included."""
    newest = {}
    for operation in operations:
        newest[operation[0]] = max(operation, newest.get(operation[0], operation), key=lambda each: each[1])
    return {record.key: record.bins for record in made(newest.values())}


# -------------------------------------------------------------------------------------------------- what a delete does

def test_a_tombstone_takes_the_place_of_a_record_and_holds_off_what_is_older(opened, place):
    store = opened(place)
    assert store.write([change('k', 1)]) == [STORED]
    assert store.write([delete('k', 3)]) == [DELETED]
    assert place.records() == {'k': {'gid': 'k', 'gts': 3}}
    assert store.write([change('k', 2), delete('k', 2)]) == [STALE, STALE]
    assert store.write([delete('k', 3)]) == [DELETED]          # once more, as after a timeout
    assert store.write([change('k', 4)]) == [STORED]
    assert place.records() == {'k': change('k', 4).bins}
    assert store.write([delete('k', 3)]) == [STALE]
    assert place.records() == {'k': change('k', 4).bins}


def test_a_removal_takes_out_what_is_not_newer(opened, place):
    store = opened(place, 'remove')
    assert store.write([change('old', 1), change('same', 2), change('new', 3)]) == [STORED] * 3
    assert store.write([delete(key, 2) for key in ('old', 'same', 'new', 'absent')]) == [
        DELETED, DELETED, STALE, DELETED]
    assert place.records() == {'new': change('new', 3).bins}
    assert store.write([delete('old', 2)]) == [DELETED]        # once more


@pytest.mark.parametrize('mode', ['tombstone', 'remove'])
def test_deletes_stand_beside_other_records_in_a_batch(opened, place, mode):
    store = opened(place, mode)
    store.write([change(key, 1) for key in (1, '1', 'k')])
    assert store.write([change('a', 5), delete(1, 5), change('b', 5), delete('k', 0)]) == [
        STORED, DELETED, STORED, STALE]
    left = place.records()
    assert (1 in left) == (mode == 'tombstone')
    assert {'1', 'k', 'a', 'b'} <= set(left)
    assert left['1'] == change('1', 1).bins and left['k'] == change('k', 1).bins


@pytest.mark.parametrize('moment', ['soon', 5.0, True])
@pytest.mark.parametrize('mode', ['tombstone', 'remove'])
def test_a_stored_time_of_another_type_is_not_deleted(opened, place, mode, moment):
    store = opened(place, mode)
    place.put('k', {'v': 1, 'gts': moment})
    rejected, deleted = store.write([delete('k', 4), delete('l', 4)])
    assert (rejected.outcome, rejected.reason, deleted) == ('rejected', 'rejected', DELETED)
    assert place.records()['k'] == {'v': 1, 'gts': moment}


@pytest.mark.parametrize('mode', ['tombstone', 'remove'])
def test_a_record_without_a_time_is_deleted(opened, place, mode):
    store = opened(place, mode)
    place.put('k', {'v': 1})
    assert store.write([delete('k', 4)]) == [DELETED]
    assert place.records() == ({'k': {'gid': 'k', 'gts': 4}} if mode == 'tombstone' else {})


# ---------------------------------------------------------------------------------------------------- any order at all

# Times are their own, for of two messages of one time neither is newer. Batches of (key, time, deletes); the flag says
# that the process dies after the batch was written and before it was answered, so that it comes again in another order.
operations = st.lists(st.tuples(st.sampled_from(['a', 'b', 1]), st.booleans()), min_size=1, max_size=14).map(
    lambda each: [(key, time, deletes) for time, (key, deletes) in enumerate(each)])


@st.composite
def deliveries(draw):
    """Batches of deliveries in which each operation is at least once, and whether the process is killed after each."""
    sent = draw(operations)
    again = draw(st.lists(st.sampled_from(sent), max_size=8))
    stream = draw(st.permutations(sent + again))
    batches = []
    while stream:
        size = draw(st.integers(1, 6))
        batch, stream = stream[:size], stream[size:]
        batches.append(batch)
        if draw(st.booleans()):    # killed
            batches.append(draw(st.permutations(batch)))
    return sent, batches


def test_tombstones_leave_what_the_newest_message_says(opened, place):
    store, numbers = opened(place), iter(range(10_000))

    @settings(max_examples=60, deadline=None)
    @given(deliveries())
    def check(case):
        sent, batches = case
        run = next(numbers)
        for batch in batches:
            answers = store.write(made([(f'{run}-{key!r}', time, deletes) for key, time, deletes in batch]))
            assert set(answers) <= {STORED, DELETED, STALE}
        found = {key: bins for key, bins in place.records().items() if key.startswith(f'{run}-')}
        assert found == expected([(f'{run}-{key!r}', time, deletes) for key, time, deletes in sent])
    check()


def test_removals_leave_what_the_newest_message_says_but_forget_its_time(opened, place):
    """A model of what a removed record forgets: the newest of what is stored and of the batch decides."""
    store, numbers = opened(place, 'remove'), iter(range(10_000))

    @settings(max_examples=60, deadline=None)
    @given(deliveries())
    def check(case):
        _, batches = case
        run, left = next(numbers), {}
        for batch in batches:
            named = [(f'{run}-{key!r}', time, deletes) for key, time, deletes in batch]
            assert set(store.write(made(named))) <= {STORED, DELETED, STALE}
            for key, operations in grouped_by_key(named).items():
                newest = max([*operations, *left.get(key, [])], key=lambda each: each[1])
                left[key] = [] if newest[2] else [newest]
        found = {key: bins for key, bins in place.records().items() if key.startswith(f'{run}-')}
        assert found == expected([operation for each in left.values() for operation in each])
    check()


def grouped_by_key(operations):
    groups = collections.defaultdict(list)
    for operation in operations:
        groups[operation[0]].append(operation)
    return groups


def bodies(operations):
    return [json.dumps({'id': key, 'ts': time, **({'op': 'd'} if deletes else {'op': 'u', 'text': f'{time}'})})
            for key, time, deletes in operations]


def what_is_left(place):
    """(key, time, whether it is a tombstone) of each record."""
    return sorted((key, bins['gts'], 'text' not in bins) for key, bins in place.records().items())


def test_a_run_that_is_killed_again_and_again_leaves_what_the_newest_message_says(nsqds, program, place):
    """From two nsqds, in any order, some of them twice, with a timeout short enough for deliveries from killed runs."""
    draw, pair = random.Random(13), nsqds(2, '--msg-timeout=1s')
    sent = [(n % 60, time, draw.random() < 0.4) for n, time in enumerate(draw.sample(range(100_000), 1200))]
    stream = sent + draw.sample(sent, 300)
    draw.shuffle(stream)
    for nsqd, part in zip(pair, (stream[:700], stream[700:]), strict=True):
        nsqd.create(TOPIC, CHANNEL)
        nsqd.publish(TOPIC, bodies(part))
    program.configure(pair, record=record_options(), nsq={'max-in-flight': 100}, **place.settings(**{'batch-size': 20}))

    def waiting():
        return sum(nsqd.left(TOPIC, CHANNEL) for nsqd in pair)

    def kill_after(number):
        before, run = waiting(), program.start('once')
        wait_until(lambda: run.poll() is not None or waiting() <= before - number, f'{number} messages are answered')
        run.send_signal(signal.SIGKILL)
        run.wait()

    for _ in range(6):
        kill_after(draw.randrange(1, 100))
    wait_until(lambda: program.run('once') and not waiting(), 'all are answered', 60)
    newest = {key: max((each for each in sent if each[0] == key), key=lambda each: each[1]) for key, _, _ in sent}
    assert what_is_left(place) == sorted(newest.values())


# -------------------------------------------------------------------------------------------------------- the whole way

def published(nsqd, messages):
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [json.dumps(message) for message in messages])


@pytest.mark.parametrize('mode', ['tombstone', 'remove'])
def test_a_window_counts_deletes_and_shows_them(nsqd, program, place, mode):
    published(nsqd, [{'id': n, 'ts': 1, 'text': 'x'} for n in range(5)])
    options = {'record': record_options(mode), 'nsq': {'max-messages': 10}, **place.settings()}
    assert servers.summary(program.once(nsqd, **options).stderr)['deleted'] == 0
    published(nsqd, [{'id': 0, 'ts': 2, 'op': 'd'}, {'id': 1, 'ts': 2, 'op': True}, {'id': 2, 'ts': 0, 'op': 'd'},
                     {'id': 3, 'ts': 2, 'op': 'D'}, {'id': 9, 'ts': 2, 'op': 'd'}, {'ts': 2, 'op': 'd'}])
    textfile = program.directory / 'x.prom'
    ran = program.once(nsqd, metrics={'textfile': textfile}, log_format='json', **options)
    told = next(json.loads(line) for line in ran.stderr.splitlines() if '"received"' in line)
    counts = {'received': 6, 'stored': 1, 'deleted': 3, 'duplicate': 0, 'stale': 1, 'dead': 1, 'requeued': 0, 'late': 0}
    assert {name: told[name] for name in counts} == counts
    assert ', stored 1, deleted 3, duplicate 0, stale 1, ' in told['message']
    assert 'xmsrv_messages_total{channel="x-msrv",outcome="deleted",topic="orders"} 3.0' in textfile.read_text()
    assert 'xmsrv_lag_seconds_count{channel="x-msrv",topic="orders"} 4.0' in textfile.read_text()
    (header, _), = nsqd.letters(f'{TOPIC}.dead', expected=1)
    assert (header['reason'], header['detail']) == ('key', 'id: missing')
    gone = {0, 1} if mode == 'remove' else set()
    assert set(place.records()) == {0, 1, 2, 3, 4, *([9] if mode == 'tombstone' else [])} - gone


def test_a_delete_needs_no_more_than_key_and_time(nsqd, program, place):
    """What is required of a record is not of a delete; the rules of the fields that it has are."""
    fields = {'id': 'integer, required, min 1', 'ts': 'integer, required', 'op': 'string, one-of u|d',
              'state': 'string, required, one-of open|paid'}
    published(nsqd, [{'id': 1, 'ts': 1, 'state': 'open'}, {'id': 1, 'ts': 2, 'op': 'd'},
                     {'id': 2, 'ts': 2, 'op': 'd', 'state': 'lost'}, {'id': 0, 'ts': 2, 'op': 'd'}])
    counts = servers.summary(program.once(nsqd, message={'fields': fields}, record=record_options(values=['d']),
                                          **place.settings()).stderr)
    assert (counts['stored'], counts['deleted'], counts['dead']) == (1, 1, 2)
    details = {header['detail'] for header, _ in nsqd.letters(f'{TOPIC}.dead', expected=2)}
    assert details == {'state: not one of open|paid', 'id: value under 1'}
    assert place.records() == {1: {'gid': 1, 'gts': 2}}


def test_paths_and_nulls_may_say_that_a_record_is_deleted(nsqd, program, place):
    """As change data capture does: the state after the change is null."""
    options = {'key': 'key.id', 'time': 'source.lsn', 'delete': {'field': 'change.after', 'values': 'null'}}
    published(nsqd, [{'key': {'id': 7}, 'source': {'lsn': 1}, 'change': {'after': {'a': 1}}},
                     {'key': {'id': 8}, 'source': {'lsn': 1}, 'change': {}},
                     {'key': {'id': 7}, 'source': {'lsn': 2}, 'change': {'after': None}}])
    counts = servers.summary(program.once(nsqd, record=options, **place.settings()).stderr)
    assert (counts['stored'], counts['deleted'], counts['stale']) == (2, 1, 0)
    assert place.records()[7] == {'gid': 7, 'gts': 2} and place.records()[8]['change'] == {}


def fetch(port, path):
    with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=10) as answer:
        return answer.read().decode()


def test_a_daemon_counts_deletes_on_its_page(nsqd, program, place):
    published(nsqd, [{'id': 1, 'ts': 1}, {'id': 1, 'ts': 2, 'op': 'd'}, {'id': 2, 'ts': 2, 'op': 'd'}])
    port = servers.free_ports()
    program.configure(nsqd, record=record_options(), period='1s', workers=2, metrics={'listen': f'127.0.0.1:{port}'},
                      **place.settings())
    program.start('daemon')

    def shown():
        with contextlib.suppress(OSError):
            return [fetch(port, path) for path in ('/metrics', '/')]
        return '', ''
    wait_until(lambda: 'outcome="deleted"} 2.0' in shown()[0], 'two deletes are in the metrics', 20)
    wait_until(lambda: 'deleted 2,' in shown()[1] and 'class="key deleted"' in shown()[1], 'two are on the page')


def test_dead_letters_that_delete_can_be_replayed(nsqd, program, place):
    """With the time of their first delivery: what is newer stays."""
    strict = {'fields': {'id': 'integer, required'}}
    published(nsqd, [{'id': 'a', 'op': 'd'}, {'id': 'b', 'op': 'd'}])
    options = {'record': {**record_options(), 'time': '$timestamp'}, **place.settings()}
    assert servers.summary(program.once(nsqd, message=strict, **options).stderr)['dead'] == 2
    published(nsqd, [{'id': 'b', 'text': 'newer'}])
    assert servers.summary(program.once(nsqd, **options).stderr)['stored'] == 1
    listed = program.run('replay', '--dry-run').stdout.splitlines()
    assert [line.split('  ')[-1] for line in listed[:2]] == ['would delete its record'] * 2
    assert listed[-1].startswith('0 would be stored, 2 would delete their records, 0 would stay')
    counts = servers.summary(program.run('replay').stderr)
    assert (counts['deleted'], counts['stale'], counts['dead'], counts['requeued']) == (1, 1, 0, 0)
    assert set(place.records()['a']) == {'gid', 'gts'} and place.records()['b']['text'] == 'newer'


def test_the_example_of_orders_deletes_them(nsqd, program, cluster):
    """With the message that stands there, before and after those that are older."""
    path = servers.ROOT / 'etc' / 'x-msrv-orders.conf'
    lines = path.read_text().splitlines()
    older = [line[1:].strip() for line in lines if line.startswith('#   {')]
    deletion, = [line[1:].strip() for line in lines if line.startswith('# {')]
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [older[0], deletion, *older, deletion.replace('A-17', 'B-18'), deletion.replace('order', 'n')])
    more = {'nsq.nsqd-tcp-address': nsqd.tcp, 'state-dir': program.directory / 'state', 'aerospike.set': cluster.set,
            'aerospike.hosts': cluster.address}
    set_ = [f'--set={name}={value}' for name, value in more.items()]
    counts = servers.summary(program.run('-c', path, *set_, 'once').stderr)
    assert (counts['stored'] + counts['stale'], counts['deleted'], counts['dead']) == (3, 2, 1)
    assert cluster.records() == {key: {'order_id': key, 'version': 3} for key in ('A-17', 'B-18')}


# ---------------------------------------------------------------------------------------------------------------- check

@pytest.mark.parametrize('delete, words', [
    ({'mode': 'tombstone', 'keep': '1d'}, ['a tombstone of these bins, which ends after 86400 s,', 'bin   gid', 'gts']),
    ({'mode': 'tombstone', 'keep': 'never'}, ['which never ends']),
    ({'mode': 'remove'}, ['the record is removed, where it is not newer']),
])
def test_check_shows_what_a_message_deletes(nsqd, program, place, delete, words):
    program.configure(nsqd, record=record_options(**delete), **place.settings())
    body = program.directory / 'body'
    body.write_text('{"id": 5, "ts": 9, "op": "d", "text": "x"}')
    shown = program.run('check', '--message', body).stdout
    assert all(word in shown for word in [*words, 'key   integer  5'])
    assert 'text' not in shown.replace(str(body), '') and ('bin ' in shown) == (delete['mode'] == 'tombstone')
    body.write_text('{"id": 5, "ts": 9, "op": "u"}')
    assert 'delete' not in program.run('check', '--message', body).stdout


FAULTS = [
    ({'field': None}, {}, '[[delete]] field: missing'),
    ({'values': None}, {}, '[[delete]] values: missing'),
    ({'field': '$id'}, {}, '[[delete]] field = $id'),
    ({'mode': 'soft'}, {}, 'mode = soft: not one of tombstone, remove'),
    ({'keep': 'default'}, {}, 'keep = default: not never or a duration'),
    ({'keep': '1500ms'}, {}, 'keep = 1500ms: '),
    ({}, {'key': '$id', 'time': '$timestamp'}, '[record] key = $id: '),
    ({}, {'write': 'create'}, '[record] write = create: '),
]


@pytest.mark.parametrize('delete, record, fault', FAULTS)
def test_a_fault_of_deletes_is_named(nsqd, program, delete, record, fault):
    chosen = {name: value for name, value in {**record_options()['delete'], **delete}.items() if value is not None}
    program.configure(nsqd, record={**record_options(), 'delete': chosen, **record})
    assert fault in program.run('check', expect=78).stderr


@pytest.mark.parametrize('rule, unknown, fault', [
    ('string, one-of u|x', 'keep', 'values = d: never comes'), ('string', 'keep', None), ('string', 'reject', None),
    ('boolean', 'keep', 'values = d: never comes'), ('integer', 'keep', 'values = true: never comes'),
    (None, 'reject', '[[delete]] field = op: no such field'), (None, 'drop', None),
])
def test_values_that_no_message_can_have_are_a_fault(nsqd, program, rule, unknown, fault):
    fields = {'id': 'integer', 'ts': 'integer', **({'op': rule} if rule else {})}
    program.configure(nsqd, record=record_options(), message={'fields': fields, 'unknown-fields': unknown})
    ran = program.run('check', expect=78 if fault else 0)
    assert fault is None or fault in ran.stderr


def test_a_delete_by_a_null_that_is_rejected_is_a_fault(nsqd, program):
    record = {'key': 'id', 'delete': {'field': 'op', 'values': 'null'}}
    program.configure(nsqd, record=record, message={'nulls': 'reject'})
    assert 'values = null: never comes: [message] has nulls = reject' in program.run('check', expect=78).stderr


@pytest.mark.parametrize('keep, without_nsup, mode, words', [
    ('7d', False, 'tombstone', 'tombstones of [[delete]] are refused'),
    ('7d', True, 'tombstone', 'tombstones of [[delete]] are not removed after keep'),
    ('never', False, 'tombstone', None), ('7d', False, 'remove', None),
])
def test_check_says_that_a_namespace_does_not_expire_tombstones(nsqd, program, standin, keep, without_nsup, mode,
                                                                words):
    standin.server.nsup_period, standin.server.allow_ttl_without_nsup = 0, without_nsup
    program.configure(nsqd, record=record_options(mode, keep=keep), **standin.settings())
    ran = program.run('check', '--connect', expect=69 if words else 0)
    assert words is None or words in ran.stderr
    assert ('no durable deletes' in ran.stdout) == (mode == 'remove')


def test_a_namespace_that_refuses_tombstones_stops_the_window_and_says_why(nsqd, program, standin):
    standin.server.nsup_period = 0
    published(nsqd, [{'id': 1, 'ts': 2, 'op': 'd'}])
    ran = program.once(nsqd, expect=75, record=record_options(), **standin.settings())
    assert 'tombstones of [[delete]] are refused' in ran.stderr
    assert nsqd.left(TOPIC, CHANNEL) == 1


# -------------------------------------------------------------------------------------------- what one store alone has

@pytest.mark.parametrize('edition, durable', [(ENTERPRISE, True), ('Aerospike Federal Edition', True), (None, False)])
def test_an_enterprise_server_is_asked_for_durable_deletes(opened, standin, edition, durable):
    standin.server.edition = edition or standin.server.edition
    store = opened(standin, 'remove')
    store.write([change('k', 1)])
    assert store.write([delete('k', 2)]) == [DELETED]
    assert standin.records() == {} and standin.server.namespaces['test'].durable_deletes == int(durable)
    assert store.describe_contents()[0].endswith(', durable deletes' if durable else ', no durable deletes')


def test_a_removal_waits_for_an_older_record_of_its_batch_that_is_tried_again(opened, standin):
    store = opened(standin, 'remove')
    standin.server.judge = lambda write: 14 if write.key == 'k' and write.bins else None
    answers = store.write([delete('k', 2), change('k', 1), delete('l', 2)])
    assert [answer.outcome for answer in answers] == ['busy', 'busy', 'deleted']
    standin.server.judge = None
    assert store.write([delete('k', 2), change('k', 1)]) == [DELETED, STORED]
    assert standin.records() == {}


def test_a_tombstone_expires_after_keep(opened, cluster):
    store = opened(cluster, keep='2s')
    store.write([change('k', 1)])
    assert store.write([delete('k', 3, keep=2)]) == [DELETED]
    assert cluster.records() == {'k': {'gid': 'k', 'gts': 3}}
    wait_until(lambda: not cluster.records(), 'the tombstone has expired')
    assert store.write([change('k', 2)]) == [STORED]


def columns(program):
    with contextlib.closing(sqlite3.connect(program.database)) as database:
        return [row[1] for row in database.execute('PRAGMA table_info (records)')]


def ends(program):
    with contextlib.closing(sqlite3.connect(program.database)) as database:
        return dict(database.execute('SELECT "key", expires_at FROM records'))


def test_a_tombstone_in_a_file_ends_with_a_batch_after_keep(opened, program):
    store = opened(Sqlite(program))
    store.write([change('k', 1), change('l', 1), delete('k', 3, keep=1), delete('l', 3, keep=0xFFFFFFFF)])
    assert ends(program)['l'] == 'never' and ends(program)['k'].endswith('Z')
    assert store.write([change('k', 2), change('l', 2)]) == [STALE, STALE]
    assert ' 0 records and 2 tombstones ' in store.describe_contents()[0]
    wait_until(lambda: store.write([change('other', 1)]) and 'k' not in program.records(), 'the tombstone has ended')
    assert store.write([change('k', 2), change('l', 2)]) == [STORED, STALE]
    assert ends(program) == {'k': None, 'l': 'never', 'other': None}


def test_a_file_without_tombstones_gets_a_column_for_them_and_keeps_what_it_has(opened, program):
    plain = opened(Sqlite(program), 'remove')
    plain.write([change('k', 1), change('l', 1)])
    assert columns(program) == ['set', 'key', 'bins', 'stored_at']
    store = opened(Sqlite(program))
    assert columns(program) == ['set', 'key', 'bins', 'stored_at', 'expires_at']
    assert store.write([delete('k', 2)]) == [DELETED]
    # who opened the file before writes no record beside a tombstone's end
    with pytest.raises(StoreError):
        plain.write([change('k', 3)])
    plain.close()
    plain.open()
    assert plain.write([change('k', 3)]) == [STORED]
    assert ends(program) == {'k': None, 'l': None}


def test_a_table_of_another_form_is_not_changed(opened, program):
    with contextlib.closing(sqlite3.connect(program.database)) as database:
        database.execute('CREATE TABLE records (id INTEGER)')
    with pytest.raises(StoreError):
        opened(Sqlite(program))
    assert columns(program) == ['id']
