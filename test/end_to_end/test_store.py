"""The sqlite store: what it keeps, what it does with a key that is there, and what an outage of it does to messages."""
import contextlib
import itertools
import json
import resource
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import roundtrip
import servers
from xmsrv import DUPLICATE, MAX_BINS, STALE, STORED, Record, SqliteStore, StoreError, build_config, read_file

BY_ID = {'key': 'id'}


@pytest.fixture
def opened(program):
    """A function: opened(key='id', write='create') is an open SqliteStore with such a [record]."""
    with contextlib.ExitStack() as stack:
        def make(**record):
            program.configure(nsq={'nsqd-tcp-address': '127.0.0.1:4150'}, record=record)
            config, faults, _ = build_config(read_file(str(program.path)))
            assert not faults
            store = SqliteStore(config)
            stack.callback(store.close)
            store.open()
            return store
        yield make


@pytest.fixture
def lock(program):
    """A connection to the database that takes its write lock by lock.execute('BEGIN IMMEDIATE')."""
    connection = sqlite3.connect(program.database, isolation_level=None, check_same_thread=False)
    connection.execute('PRAGMA journal_mode = WAL')
    yield connection
    connection.close()


def newer(key, time, **bins):
    """A record under a field as key, with its time in the bin gts."""
    return Record(key, {'id': key, **bins, 'gts': time}, time)


def numbered(numbers, **more):
    """Bodies of messages that differ in n."""
    return [json.dumps({'n': n, **more}) for n in numbers]


# --- what is kept

def test_a_record_is_kept_as_it_is(opened, program):
    bins = {'n': 1, 'f': 1.0, 't': True, 'z': -0.0, 's': '\u00e9"\\\n', '': [None, {'a': [2**63 - 1]}], 'e': {}}
    assert opened().write([Record('k', dict(bins), None)]) == [STORED]
    (where, key, kept, stored_at), = program.rows()
    assert (where, key, repr(kept)) == ('orders', 'k', repr(bins))
    assert stored_at[4] == '-' and stored_at.endswith('Z')


def test_a_key_keeps_its_type(opened, program):
    keys = [1, '1', 0, '0', -1, '-1', '1.0', ' 1', '01', 2**63 - 1, -2**63, str(2**63 - 1), 'a', 'A', '\u00e9',
            'e\u0301']
    store = opened()
    assert store.write([Record(key, {'key': key}, None) for key in keys]) == [STORED] * len(keys)
    assert {(type(key), key) for key in program.records()} == {(type(key), key) for key in keys}
    assert all(bins == {'key': key} for key, bins in program.records().items())
    with contextlib.closing(sqlite3.connect(program.database)) as connection:
        types = dict(connection.execute('select typeof("key"), count(*) from records group by 1'))
    assert types == {'integer': 5, 'text': 11}


def test_a_second_write_of_a_key_replaces_the_record(opened, program):
    store = opened()
    store.write([Record('k', {'a': 1, 'b': 1}, None)])
    assert store.write([Record('k', {'a': 2}, None)]) == [STORED]
    assert program.records() == {'k': {'a': 2}}


def test_one_key_twice_in_a_batch_is_one_record(opened, program):
    assert opened().write([Record('k', {'a': 1}, None), Record('k', {'a': 2}, None)]) == [STORED] * 2
    assert program.records() == {'k': {'a': 2}}


def test_a_full_batch_is_one_transaction(opened, program):
    store = opened()
    assert store.write([Record(n, {'n': n}, None) for n in range(store.batch_size)]) == [STORED] * store.batch_size
    assert program.records() == {n: {'n': n} for n in range(store.batch_size)}


def test_an_empty_batch_is_nothing(opened, program):
    assert opened().write([]) == []
    assert program.records() == {}


def test_sets_share_a_file(opened, program):
    store = opened()
    store.write([Record('k', {'a': 1}, None)])
    store.set = 'others'
    store.write([Record('k', {'a': 2}, None)])
    assert {(where, key): bins for where, key, bins, _ in program.rows()} == {
        ('orders', 'k'): {'a': 1}, ('others', 'k'): {'a': 2}}
    assert '1 records in set others' in store.describe_contents()[0]


def test_what_is_answered_is_durable(opened, program):
    """FULL is a setting of a connection, so the store's own is asked."""
    store = opened()
    assert store.db.execute('PRAGMA synchronous').fetchone() == (2,)
    assert store.db.execute('PRAGMA journal_mode').fetchone() == ('wal',)
    store.write([Record('k', {'a': 1}, None)])
    assert not store.db.in_transaction
    assert program.records() == {'k': {'a': 1}}


# --- newest wins

@pytest.mark.parametrize('stored, answer, left', [
    (newer('k', 5, v='old'), STORED, 'new'),
    (newer('k', 10, v='old'), STORED, 'new'),
    (newer('k', 11, v='old'), STALE, 'old'),
    (newer('k', 2**63 - 1, v='old'), STALE, 'old'),
    (newer('k', -1, v='old'), STORED, 'new'),
    (Record('k', {'v': 'old'}, -1), STORED, 'new'),
])
def test_the_newest_wins(opened, program, stored, answer, left):
    store = opened(**BY_ID)
    store.write([stored])
    assert store.write([newer('k', 10, v='new')]) == [answer]
    assert program.records()['k']['v'] == left


@pytest.mark.parametrize('moment', ['5', 5.0, True, None, [], {}])
def test_a_stored_time_of_another_type_is_not_overwritten(opened, program, moment):
    """And the records beside it are written."""
    store = opened(**BY_ID)
    store.write([newer('k', moment, v='old')])
    first, second, third = store.write([newer('a', 1), newer('k', 10, v='new'), newer('b', 1)])
    assert (first, third) == (STORED, STORED)
    assert (second.outcome, second.reason) == ('rejected', 'rejected')
    assert 'gts' in second.detail
    assert program.records()['k']['v'] == 'old' and len(program.records()) == 3


@pytest.mark.parametrize('times', list(itertools.permutations([1, 2, 3])))
def test_the_newest_wins_inside_a_batch(opened, program, times):
    answers = opened(**BY_ID).write([newer('k', time, v=time) for time in times])
    assert program.records()['k']['v'] == 3
    assert answers == [STORED if time == max(times[:place + 1]) else STALE for place, time in enumerate(times)]


def test_equal_times_write_the_last(opened, program):
    assert opened(**BY_ID).write([newer('k', 1, v='a'), newer('k', 1, v='b')]) == [STORED] * 2
    assert program.records()['k']['v'] == 'b'


def test_keys_of_two_types_do_not_compete(opened, program):
    assert opened(**BY_ID).write([newer(1, 9), newer('1', 1), newer(1, 1)]) == [STORED, STORED, STALE]
    assert {key: bins['gts'] for key, bins in program.records().items()} == {1: 9, '1': 1}


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from([1, '1', 'k']), st.integers(0, 9)), max_size=6), max_size=4))
def check_order(make, batches):
    """Whatever the batches, the newest of each key is left, and each answer says whether it was written."""
    store = make()
    left = {}
    for batch in batches:
        answers = store.write([newer(key, time) for key, time in batch])
        for (key, time), answer in zip(batch, answers, strict=True):
            assert answer == (STALE if left.get((type(key), key), -1) > time else STORED)
            left[type(key), key] = max(time, left.get((type(key), key), -1))
    rows = store.db.execute('select "key", bins from records where "set" = ?', (store.set,)).fetchall()
    assert {(type(key), key): json.loads(bins)['gts'] for key, bins in rows} == left


def test_any_order_of_batches_leaves_the_newest(opened):
    store, sets = opened(**BY_ID), itertools.count()
    store.db.execute('PRAGMA synchronous = OFF')

    def make():
        store.set = f'set {next(sets)}'
        return store
    check_order(make)


def test_newest_wins_over_several_windows(nsqd, program):
    """By the time that the senders give, in one batch and across two, both ways round."""
    settings = {'record': {'key': 'id', 'time': 'ts'}, 'nsq': {'max-messages': 4}}
    nsqd.create('orders', 'x-msrv')
    sent = [('a', 1), ('a', 2), ('b', 2), ('b', 1)], [('a', 1), ('a', 3), ('b', 3), ('b', 3)]
    stale = []
    for batch in sent:
        nsqd.publish('orders', [json.dumps({'id': key, 'ts': ts}) for key, ts in batch])
        counts = servers.summary(program.once(nsqd, **settings).stderr)
        assert counts['received'] == counts['stored'] + counts['stale'] == 4
        stale.append(counts['stale'])
    assert stale == [1, 1]
    assert {key: bins['gts'] for key, bins in program.records().items()} == {'a': 3, 'b': 3}
    assert nsqd.left('orders', 'x-msrv') == 0


def test_a_message_whose_stored_time_is_no_integer_is_a_dead_letter(nsqd, program, opened):
    opened(**BY_ID).write([Record('k', {'gts': 'yesterday'}, 0)])
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', ['{"id": "k"}', '{"id": "other"}'])
    counts = servers.summary(program.once(nsqd, record=BY_ID, nsq={'max-messages': 2}).stderr)
    assert (counts['stored'], counts['dead']) == (1, 1)
    header, _, body = nsqd.drain('orders.dead', 'x-msrv-replay', expected=1)[0].partition(b'\n')
    assert (json.loads(header)['reason'], json.loads(header)['key'], body) == ('rejected', 'k', b'{"id": "k"}')
    assert program.records()['k'] == {'gts': 'yesterday'}


# --- create, update

def test_create_keeps_the_first(opened, program):
    store = opened(key='id', write='create')
    first, second, again = ({'id': 'k', 'v': v} for v in range(3))
    assert store.write([Record('k', first, None), Record('k', second, None)]) == [STORED, DUPLICATE]
    assert store.write([Record('k', again, None), Record('l', {'id': 'l'}, None)]) == [DUPLICATE, STORED]
    assert program.records() == {'k': {'id': 'k', 'v': 0}, 'l': {'id': 'l'}}


def test_duplicates_are_finished_and_counted(nsqd, program):
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', ['{"id": 1, "v": 1}', '{"id": 1, "v": 2}', '{"id": "1"}'])
    options = {'record': {'key': 'id', 'write': 'create'}, 'nsq': {'max-messages': 3}}
    counts = servers.summary(program.once(nsqd, **options).stderr)
    assert (counts['stored'], counts['duplicate'], counts['requeued']) == (2, 1, 0)
    assert program.records()[1]['v'] == 1
    assert nsqd.left('orders', 'x-msrv') == 0


def test_update_merges_bins(opened, program):
    store = opened(write='update')
    store.write([Record('k', {'a': 1, 'b': {'x': 1}}, None)])
    assert store.write([Record('k', {'b': {'y': 2}}, None), Record('k', {'c': 3}, None)]) == [STORED] * 2
    assert program.records() == {'k': {'a': 1, 'b': {'y': 2}, 'c': 3}}


def test_update_never_merges_beyond_the_bins_of_a_record(opened, program):
    """As in the cluster: what is there stays as it was."""
    store = opened(write='update')
    full = {f'f{n}': n for n in range(MAX_BINS)}
    assert store.write([Record('k', dict(full), None)]) == [STORED]
    answers = store.write([Record('k', {'other': 1}, None), Record('k', {'f0': 'new'}, None)])
    assert [(answer.outcome, answer.reason) for answer in answers] == [
        ('rejected', 'unsupported-value'), ('stored', None)]
    assert program.records() == {'k': {**full, 'f0': 'new'}}


# --- a store that can't be opened: nothing is taken

def no_database(path):
    path.write_text('no database, and long enough that its first bytes are looked at; ' * 10)


def read_only(path):
    """By the file's own header (write version 3), which binds root as well: sqlite.org/fileformat.html, 1.3.3."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute('create table other (a)')
    data = bytearray(path.read_bytes())
    data[18] = 3
    path.write_bytes(data)
    path.chmod(0o400)


@pytest.mark.parametrize('prepare, where', [
    (no_database, None),
    (read_only, None),
    (lambda path: path.symlink_to('/nonexistent/records.sqlite'), None),
    (lambda path: path.touch(), 'records.sqlite/below'),
    (lambda path: None, '/proc/self/records.sqlite'),
    (lambda path: None, '/dev/null/records.sqlite'),
], ids=['no database', 'read-only', 'dangling link', 'below a file', 'no place for it', 'below a device'])
def test_a_store_that_cannot_be_opened_takes_nothing(nsqd, program, prepare, where):
    prepare(program.database)
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', numbered(range(3)))
    path = program.directory / where if where else program.database
    done = program.once(nsqd, sqlite={'path': path}, expect=69)
    assert done.stderr.startswith(f'error: sqlite {path}: ') and len(done.stderr.splitlines()) == 1
    stats = nsqd.stats('orders', 'x-msrv')
    assert (stats['depth'], stats['requeue_count'], stats['in_flight_count']) == (3, 0, 0)
    assert str(path) in program.run('check', '--connect', expect=69).stderr


def test_a_directory_that_is_missing_is_made(nsqd, program):
    nsqd.publish('orders', numbered([1]))
    program.once(nsqd, **{'state-dir': program.directory / 'new' / 'state'}, sqlite={'path': 'a/b.sqlite'},
                 nsq={'max-messages': 1})
    assert (program.directory / 'new' / 'state' / 'a' / 'b.sqlite').exists()


def test_a_lock_at_the_start_that_stays_takes_nothing(nsqd, program, lock):
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', numbered(range(3)))
    lock.execute('BEGIN IMMEDIATE')
    assert 'database is locked' in program.once(nsqd, expect=69).stderr
    stats = nsqd.stats('orders', 'x-msrv')
    assert (stats['depth'], stats['requeue_count']) == (3, 0)
    lock.execute('ROLLBACK')
    assert servers.summary(program.once(nsqd, nsq={'max-messages': 3}).stderr)['stored'] == 3


# --- a store that fails in mid-window

def locked_window(nsqd, program, lock, count, **options):
    """An x-msrv that holds messages which it cannot store, for the test has the lock; returns it when it says so."""
    nsqd.create('orders', 'x-msrv')
    program.configure(nsqd, **{'idle-timeout': '30s', **options})
    process = program.start('once')
    servers.wait_until(lambda: nsqd.stats('orders', 'x-msrv')['clients'], 'x-msrv is subscribed')
    lock.execute('BEGIN IMMEDIATE')
    nsqd.publish('orders', numbered(range(count)))
    servers.wait_until(lambda: 'database is locked): retrying' in program.log.read_text(), 'the store is down', 20)
    return process


def test_a_lock_that_passes_costs_only_time(nsqd, program, lock):
    process = locked_window(nsqd, program, lock, 50, timeout='60s', nsq={'max-messages': 50})
    assert process.poll() is None
    lock.execute('ROLLBACK')
    assert process.wait(timeout=30) == 0, program.log.read_text()
    counts = servers.summary(program.log.read_text())
    assert (counts['received'], counts['stored'], counts['requeued'], counts['late']) == (50, 50, 0, 0)
    assert sorted(bins['n'] for bins in program.records().values()) == list(range(50))
    assert nsqd.left('orders', 'x-msrv') == 0


def test_a_lock_to_the_end_hands_everything_back_at_once(nsqd, program, lock):
    """By REQ: nsqd's msg-timeout is 60 s."""
    process = locked_window(nsqd, program, lock, 50, timeout='2s')
    assert process.wait(timeout=30) == 75, program.log.read_text()
    servers.wait_until(lambda: nsqd.stats('orders', 'x-msrv')['depth'] == 50, 'all are back in the queue', 2)
    counts = servers.summary(program.log.read_text())
    assert (counts['stored'], counts['requeued'], counts['dead']) == (0, 50, 0)
    lock.execute('ROLLBACK')
    assert program.records() == {}


def test_nothing_more_is_taken_while_the_store_is_down(nsqd, program, lock):
    process = locked_window(nsqd, program, lock, 10, timeout='60s', nsq={'max-messages': 20})
    nsqd.publish('orders', numbered(range(10, 20)))
    servers.wait_until(lambda: nsqd.stats('orders', 'x-msrv')['depth'] == 10, 'ten more wait')
    assert nsqd.stats('orders', 'x-msrv')['in_flight_count'] == 10
    lock.execute('ROLLBACK')
    assert process.wait(timeout=30) == 0, program.log.read_text()
    assert sorted(bins['n'] for bins in program.records().values()) == list(range(20))


@contextlib.contextmanager
def file_size_limit(size):
    """What is started inside can make no file larger than `size` bytes: a full disk, without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('how', ['removed', 'moved'])
def test_a_database_that_is_taken_away_is_no_store_any_more(opened, program, how):
    """SQLite itself would go on, in a file that nobody can find."""
    store = opened()
    assert store.write([Record('a', {'n': 1}, None)]) == [STORED]
    for path in program.directory.glob('records.sqlite*'):
        if how == 'removed':
            path.unlink()
        else:
            path.rename(path.with_name('elsewhere' + path.name))
    with pytest.raises(StoreError, match='records.sqlite') as failure:
        store.write([Record('b', {'n': 2}, None)])
    assert not failure.value.retryable


@pytest.mark.parametrize('bins', ['oops', '5', '[]', 'null', '[' * 100_000, None])
def test_a_stored_row_that_is_no_record_is_not_overwritten(opened, program, bins):
    store = opened(**BY_ID)
    store.db.execute('INSERT INTO records VALUES (?, ?, ?, ?)', ('orders', 'k', bins or b'\xff', 'now'))
    rejected, stored = store.write([newer('k', 4), newer('l', 4)])
    assert (rejected.outcome, stored) == ('rejected', STORED)


def test_a_table_of_another_form_takes_nothing(nsqd, program):
    nsqd.publish('orders', numbered(range(3)))
    with contextlib.closing(sqlite3.connect(program.database)) as database:
        database.execute('CREATE TABLE records (a)')
    ran = program.once(nsqd, expect=69)
    assert 'records.sqlite' in ran.stderr and nsqd.left('orders', 'x-msrv') == 3


def test_a_full_disk_loses_nothing(nsqd, program):
    """What is finished is stored, the rest is back in the queue, and a run with more room stores it."""
    count = 5000
    nsqd.create('orders', 'x-msrv')
    nsqd.publish('orders', numbered(range(count), pad='x' * 500))
    program.configure(nsqd, nsq={'max-messages': count})
    with file_size_limit(1 << 20):
        process = program.start('once')
    assert process.wait(timeout=30) == 75, program.log.read_text()
    counts = servers.summary(program.log.read_text())
    left = count - counts['stored']
    servers.wait_until(lambda: nsqd.stats('orders', 'x-msrv')['depth'] == left, f'{left} are back in the queue', 2)
    assert 0 < counts['stored'] < count and counts['dead'] == 0
    assert len(program.records()) == counts['stored']
    program.run('once')
    assert sorted(bins['n'] for bins in program.records().values()) == list(range(count))
    assert nsqd.left('orders', 'x-msrv') == 0


def test_a_write_that_fails_leaves_no_transaction_open(opened, program, lock):
    store = opened(**BY_ID)
    store.db.execute('PRAGMA busy_timeout = 10')
    lock.execute('BEGIN IMMEDIATE')
    with pytest.raises(StoreError) as caught:
        store.write([newer('k', 1)])
    assert caught.value.retryable
    lock.execute('ROLLBACK')
    lock.execute('ALTER TABLE records RENAME TO gone')
    with pytest.raises(StoreError) as caught:
        store.write([newer('k', 1)])
    assert not caught.value.retryable and not store.db.in_transaction
    lock.execute('ALTER TABLE gone RENAME TO records')
    assert store.write([newer('k', 1)]) == [STORED]


@pytest.mark.parametrize('failing', [2, 3])
def test_a_batch_is_stored_whole_or_not_at_all(opened, program, lock, failing):
    lock.execute('CREATE TABLE IF NOT EXISTS other (a)')
    store = opened()
    lock.execute(f'CREATE TRIGGER full BEFORE INSERT ON records WHEN NEW."key" = {failing} '
                 "BEGIN SELECT raise(ABORT, 'no'); END")
    with pytest.raises(StoreError):
        store.write([Record(n, {'n': n}, None) for n in range(4)])
    assert program.records() == {}


def test_two_programs_share_one_database(nsqds, program):
    """Each waits for the other's transactions."""
    first, second = nsqds(2)
    for server, start in ((first, 0), (second, 3000)):
        server.create('orders', 'x-msrv')
        server.publish('orders', numbered(range(start, start + 3000)))
    processes = []
    for server in (first, second):
        program.configure(server, nsq={'max-messages': 3000})
        if server is second:
            program.copy()
        processes.append(program.start('once'))
        # It has read its file when it is subscribed; the next one gets another under the same name.
        servers.wait_until(lambda server=server: server.stats('orders', 'x-msrv')['message_count'] and (
            server.stats('orders', 'x-msrv')['clients'] or server.left('orders', 'x-msrv') < 3000), 'it has begun')
    assert [process.wait(timeout=30) for process in processes] == [0, 0], program.log.read_text()
    assert sorted(bins['n'] for bins in program.records().values()) == list(range(6000))


# --- any message

def rows_of(program):
    """A function: the (key, bins) of what is stored of a topic."""
    return lambda topic: [(key, bins) for where, key, bins, _ in program.rows() if where == topic]


def test_any_message_is_equal_in_the_store_or_a_dead_letter_byte_for_byte(nsqd, program):
    roundtrip.check(nsqd, program, rows_of(program))


def test_any_size_is_equal_in_the_store_or_a_dead_letter(nsqd, program):
    roundtrip.check_sizes(nsqd, program, rows_of(program))
