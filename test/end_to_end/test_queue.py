"""The queue's side: at most N a window, nothing lost and nothing doubled, whatever the nsqds and the network do."""
import asyncio
import contextlib
import itertools
import socket
import sqlite3
import struct
import threading
import types

import pytest
from tornado.iostream import StreamClosedError

import proxies
import servers
from flows import in_use
from servers import wait_until
from xmsrv import BackgroundTasks, Connection, ConnectionOptions, NameResolver, NsqdError, Publisher

TOPIC, CHANNEL = 'orders', 'x-msrv'


def numbered(count, first=0):
    """Bodies of messages, each with its number."""
    return [b'{"n": %d}' % number for number in range(first, first + count)]


def fill(nsqd, count, first=0):
    """Put so many numbered messages into the channel."""
    nsqd.create(TOPIC, CHANNEL)
    if count:
        nsqd.publish(TOPIC, numbered(count, first))
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] >= count, 'the messages are in the channel')


def numbers(program):
    """The numbers of all records, in order: a message stored twice is there twice."""
    return sorted(bins['n'] for bins in program.records().values())


def fill_timed(nsqd, count):
    """As fill(), in a channel in which one message has timed out before: see Nsqd.lapse."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.lapse(TOPIC, CHANNEL)
    fill(nsqd, count)
    assert timed_out(nsqd) == 0


def timed_out(nsqd):
    """How many messages have timed out, after that one."""
    return nsqd.stats(TOPIC, CHANNEL)['timeout_count'] - 1


def left(nsqds):
    return sum(nsqd.left(TOPIC, CHANNEL) for nsqd in nsqds)


def counts(nsqds, name):
    return sum(nsqd.stats(TOPIC, CHANNEL)[name] for nsqd in nsqds)


def connections(nsqd):
    """How many connections that nsqd ever took."""
    return nsqd.log.read_bytes().count(b'new client(')


def ended(process, seconds=30):
    """The exit status of a program in the background."""
    return process.wait(timeout=seconds)


@contextlib.contextmanager
def waiting_store(program, nsqd, proxy, held, **nsq):
    """`x-msrv once` by way of the proxy, holding so many messages: until the end of this another has the database."""
    nsqd.pause(TOPIC, CHANNEL)
    program.configure(nsq=addresses(proxy, **nsq), timeout='40s', idle_timeout='2s')
    running = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'x-msrv is subscribed, its store open')
    with contextlib.closing(sqlite3.connect(program.database, isolation_level=None)) as database:
        database.execute('BEGIN IMMEDIATE')
        nsqd.unpause(TOPIC, CHANNEL)
        wait_until(lambda: proxy.count('message') == held, 'x-msrv holds the messages')
        yield running


def addresses(proxy, **options):
    return {'nsqd-tcp-address': proxy.addresses, **options}


# ------------------------------------------------------------------------------------------------------------ exactly N

@pytest.mark.parametrize(('counts_of', 'limit', 'in_flight'), [
    ([100], 10, 2500),
    ([100, 100, 100], 10, 2500),
    ([150], 100, 7),
    ([100, 100, 100], 100, 7),
    ([400, 400, 400], 1000, 90),
    ([0, 0, 100], 10, 2500),
    ([0, 0, 100], 10, 2),
    ([10] * 5, 2, 2500),
    ([0, 0, 0, 10, 0], 2, 2500),
    ([10], 10, 2500),
], ids=str)
def test_window_takes_exactly_n_and_touches_no_other_message(program, nsqds, counts_of, limit, in_flight):
    started = nsqds(len(counts_of))
    for place, (nsqd, count) in enumerate(zip(started, counts_of, strict=True)):
        fill(nsqd, count, 1000 * place)
    done = program.once(started, timeout='20s', nsq={'max-messages': limit, 'max-in-flight': in_flight})
    told = servers.summary(done.stderr)
    assert (told['received'], told['stored'], told['requeued'], told['late']) == (limit, limit, 0, 0)
    assert told['seconds'] < 5  # RDY moves in tens of ms; the timeout is four times that
    assert len(program.records()) == limit
    assert left(started) == sum(counts_of) - limit
    assert counts(started, 'in_flight_count') == counts(started, 'requeue_count') == 0
    attempts = [each for nsqd in started for each in nsqd.attempts(TOPIC, CHANNEL)]
    assert attempts == [1] * (sum(counts_of) - limit)


def test_successive_windows_take_n_each_until_the_queue_is_empty(program, nsqds):
    started = nsqds(3)
    for place, nsqd in enumerate(started):
        fill(nsqd, 10, 10 * place)
    stored = []
    for _ in range(4):
        done = program.once(started, nsq={'max-messages': 12}, args=['-v'])
        stored.append(servers.summary(done.stderr)['stored'])
    assert stored == [12, 12, 6, 0]
    assert numbers(program) == list(range(30))
    assert counts(started, 'requeue_count') == counts(started, 'timeout_count') == left(started) == 0


@pytest.mark.parametrize('in_flight', [5, 2500])
def test_idle_nsqds_do_not_slow_a_busy_one_down(program, nsqds, in_flight):
    """One message a tick of 25 ms would be 50 s."""
    started = nsqds(5)
    for nsqd in started:
        fill(nsqd, 0)
    fill(started[3], 2000)
    told = servers.summary(program.once(started, timeout='40s', nsq={'max-in-flight': in_flight}).stderr)
    assert told['stored'] == 2000
    assert told['seconds'] < 15


class Credit:
    """What the commands and frames of a run allowed nsqd to deliver, event by event: never more than N."""

    def __init__(self, limit):
        self.limit, self.finished, self.delivered = limit, 0, 0
        self.rdy, self.in_flight, self.over = {}, {}, {}

    def follow_all(self, proxy):
        """Takes all events of a proxy. What x-msrv sends to several nsqds at once reaches it in any order, so the sums
        are looked at where it had seen all."""
        for number, event in enumerate(proxy.events):
            if number in proxy.settled:
                self.check(event)
            if event.name in ('RDY', 'FIN', 'REQ', 'TOUCH', 'CLS', 'NOP', 'message'):
                self.follow(event)

    def follow(self, event):
        """Takes an event, and asserts what holds after it."""
        where = event.connection
        assert where not in self.over, f'{event} after CLS'
        if event.name == 'RDY':
            self.rdy[where] = int(event.argument)
        elif event.name == 'message':
            self.delivered += 1
            self.in_flight[where] = self.in_flight.get(where, 0) + 1
        elif event.name in ('FIN', 'REQ'):
            self.in_flight[where] -= 1
            self.finished += event.name == 'FIN'
            at_once = event.name == 'REQ' and event.argument.endswith(b' 0')
            assert not (at_once and self.rdy[where]), f'REQ at RDY {self.rdy}'
        elif event.name == 'CLS':
            self.over[where] = True
            assert self.rdy.get(where, 0) == self.in_flight.get(where, 0) == 0

    def check(self, event):
        """Asserts that nsqd may not deliver more than the window may take."""
        assert self.total <= self.limit - self.finished, f'{event}: RDY {self.rdy}, {self.finished} finished'
        assert self.delivered + self.to_come <= self.limit, f'{event}: RDY {self.rdy}, in flight {self.in_flight}'

    @property
    def total(self):
        return sum(self.rdy.values())

    @property
    def to_come(self):
        """nsqd delivers while fewer are in flight than RDY says."""
        return sum(max(0, rdy - self.in_flight.get(where, 0)) for where, rdy in self.rdy.items())


@pytest.mark.parametrize(('each', 'limit', 'in_flight'), [
    ([100], 10, 2500), ([300], 200, 7), ([100, 100, 100], 10, 2500), ([0, 100, 0], 10, 2500), ([10], 10, 2500),
], ids=str)
def test_rdy_never_allows_more_than_the_window_may_take(program, nsqds, each, limit, in_flight):
    started = nsqds(len(each))
    for nsqd, count in zip(started, each, strict=True):
        fill(nsqd, count)
    with proxies.Proxy(*started) as proxy:
        program.once(nsq=addresses(proxy, **{'max-messages': limit, 'max-in-flight': in_flight}))
    credit = Credit(limit)
    credit.follow_all(proxy)
    assert credit.finished == credit.delivered == limit
    assert credit.rdy.keys() <= credit.over.keys()   # N may be reached before the last nsqd is subscribed
    assert max(map(int, proxy.arguments('RDY'))) <= in_flight


def test_messages_are_requeued_with_a_delay_or_at_rdy_0(program, nsqds, workdir):
    """Dead letters that can't be kept come again later; the good ones beside them are finished."""
    nsqd, = nsqds(1)
    fill(nsqd, 20)
    nsqd.publish(TOPIC, [b'no JSON'] * 5)
    with proxies.Proxy(nsqd) as proxy, in_use(workdir / 'dead.json') as path:
        done = program.once(nsq=addresses(proxy), dead_letter={'topic': '', 'file': path}, expect=75)
    told = servers.summary(done.stderr)
    assert (told['stored'] + told['requeued'], told['dead']) == (25, 0)
    credit = Credit(10 ** 9)
    credit.follow_all(proxy)
    assert proxy.count('REQ') == told['requeued'] >= 5
    assert left([nsqd]) == counts([nsqd], 'requeue_count') == told['requeued']
    assert counts([nsqd], 'in_flight_count') == 0


def test_messages_beyond_n_are_handed_back_unhandled(program, nsqd):
    """RDY has no answer, so one that was moved can race with a message: here nsqd is made to send five too many."""
    fill(nsqd, 100)
    with proxies.Proxy(nsqd, judge=lambda event: b'RDY 15\n' if event[1:] == ('RDY', b'10') else True) as proxy:
        done = program.once(nsq=addresses(proxy, **{'max-messages': 10}))
    told = servers.summary(done.stderr)
    assert (told['stored'], told['requeued'], len(program.records())) == (10, 5, 10)
    assert sorted(nsqd.attempts(TOPIC, CHANNEL)) == [1] * 85 + [2] * 5


# ------------------------------------------------------------------------------------------------- the end of a window

def test_empty_queue_ends_the_window_after_idle_timeout(program, nsqds):
    started = nsqds(2)
    for nsqd in started:
        fill(nsqd, 0)
    told = servers.summary(program.once(started, timeout='30s', idle_timeout='1s', args=['-v']).stderr)
    assert 1 <= told['seconds'] < 5
    assert told['received'] == 0


def test_paused_channel_ends_the_window_and_keeps_its_messages(program, nsqd):
    fill(nsqd, 10)
    nsqd.pause(TOPIC, CHANNEL)
    told = servers.summary(program.once(nsqd, timeout='30s', args=['-v']).stderr)
    assert (told['received'], left([nsqd])) == (0, 10)
    assert told['seconds'] < 5
    nsqd.unpause(TOPIC, CHANNEL)
    program.once(nsqd)
    assert numbers(program) == list(range(10))


def test_lone_message_does_not_wait_for_company(program, nsqd):
    """Neither nsqd's buffer nor a batch keeps it until the window ends."""
    fill(nsqd, 0)
    program.configure(nsqd, timeout='30s', idle_timeout='20s', nsq={'max-messages': 2})
    running = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'x-msrv is subscribed')
    for number in range(2):
        nsqd.publish(TOPIC, numbered(1, number))
        wait_until(lambda count=number + 1: len(program.records()) == count, 'the message is stored', 2)
    assert ended(running, 5) == 0


def test_messages_that_trickle_keep_the_window_open_until_timeout(program, nsqd):
    fill(nsqd, 0)
    program.configure(nsqd, timeout='3s', idle_timeout='1s')
    running = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'x-msrv is subscribed')
    for number in itertools.count():
        assert number < 5000, 'the window does not end'
        nsqd.publish(TOPIC, numbered(1, number))
        wait_until(lambda count=number + 1: len(program.records()) == count or running.poll() is not None,
                   'the message is stored, or the window is over')
        if running.poll() is not None:
            break
    told = servers.summary(program.log.read_text())
    assert 3 <= told['seconds'] < 6
    assert told['stored'] == told['received'] - told['requeued'] == len(program.records())
    assert told['requeued'] == counts([nsqd], 'requeue_count') <= 1   # one may cross the RDY 0 of the window's end
    assert told['late'] == counts([nsqd], 'in_flight_count') == 0


def test_endless_flow_ends_at_timeout_and_nothing_is_handed_back(program, nsqd):
    fill(nsqd, 5000)
    program.configure(nsqd, timeout='2s')
    running = program.start('once')
    published = 5000
    while running.poll() is None:
        assert published < 500_000, 'the window does not end'
        if nsqd.left(TOPIC, CHANNEL) < 20_000:
            nsqd.publish(TOPIC, numbered(1000, published))
            published += 1000
    told = servers.summary(program.log.read_text())
    assert 2 <= told['seconds'] < 5
    assert told['stored'] == told['received'] == len(program.records())
    assert told['requeued'] == told['late'] == 0
    assert left([nsqd]) == published - told['stored']
    assert counts([nsqd], 'requeue_count') == counts([nsqd], 'in_flight_count') == 0


def test_every_fin_has_arrived_when_the_program_ends(program, nsqd):
    count = 20_000
    fill(nsqd, count)
    program.once(nsqd, timeout='40s')
    at_exit = nsqd.stats(TOPIC, CHANNEL)
    assert (at_exit['depth'], at_exit['in_flight_count'], at_exit['deferred_count']) == (0, 0, 0)
    assert (at_exit['requeue_count'], at_exit['timeout_count'], at_exit['clients']) == (0, 0, 0)
    assert len(program.records()) == count


def test_task_that_loses_a_cancellation_ends_all_the_same():
    """As a connection does whose handshake is over at the moment at which the window is."""
    async def stubborn():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def start_and_cancel():
        tasks = BackgroundTasks()
        tasks.start(stubborn())
        await asyncio.sleep(0)
        await asyncio.wait_for(tasks.cancel(), 10)
        return tasks

    assert not asyncio.run(start_and_cancel()).tasks


@pytest.mark.parametrize('data', [proxies.frame(b'short', 2), b'\0\0\0\3\0\0\0\0', b'\xff' * 8], ids=repr)
def test_frame_of_a_size_that_there_is_not_ends_its_connection(data):
    with pytest.raises(NsqdError, match='size'):
        Connection(('127.0.0.1', 1), None).unpack_frames(data)


class Chunks:
    """The side of a stream that a connection reads: hands out data in chunks of that size, then the connection ends."""

    def __init__(self, data, size):
        self.chunks = iter([data[start:start + size] for start in range(0, len(data), size)])

    async def read_bytes(self, most, partial):
        try:
            return next(self.chunks)
        except StopIteration:
            raise StreamClosedError from None

    def write(self, data):
        pass


class Reader(Connection):
    """Keeps what it reads, and counts the bytes that it looked at for that."""

    def __init__(self, data, size):
        super().__init__(('127.0.0.1', 1), None)
        self.stream, self.bodies, self.looked_at = Chunks(data, size), [], 0

    def unpack_frames(self, data):
        self.looked_at += len(data)
        return super().unpack_frames(data)

    def deliver(self, messages):
        self.bodies += [message.body for message in messages]

    def read_all(self):
        with pytest.raises(StreamClosedError):
            asyncio.run(self.read_messages())
        return self.bodies


def delivered(*bodies):
    """The frames of messages, each with a heartbeat behind it."""
    return b''.join(proxies.frame(struct.pack('>qH16s', 1, 1, b'%016x' % number) + body, 2)
                    + proxies.frame(b'_heartbeat_') for number, body in enumerate(bodies))


@pytest.mark.parametrize('size', [1, 2, 3, 7, 8, 9, 33, 34, 35, 100, 1000, 5000, 1 << 16])
def test_messages_are_the_same_in_whatever_chunks_they_come(size):
    bodies = [b'', b'a', b'b' * 4000, b'', b'c' * 65_536, b'd' * 9]
    assert Reader(delivered(*bodies), size).read_all() == bodies


@pytest.mark.parametrize('megabytes', [1, 5, 25])
def test_cost_of_a_large_message_grows_with_its_size(megabytes):
    bodies = [b'small', b'x' * (megabytes << 20), b'behind it']
    reader = Reader(delivered(*bodies), 1 << 16)
    assert reader.read_all() == bodies
    assert reader.looked_at < 2 * sum(map(len, bodies)) + (1 << 18)


def test_large_message_arrives_beside_small_ones(program, nsqds):
    nsqd, = nsqds(1, '--max-msg-size=40000000', '--max-body-size=50000000')
    nsqd.create(TOPIC, CHANNEL)
    large = b'{"n": 10, "text": "%s"}' % (b'x' * 30_000_000)
    for bodies in (numbered(10), [large], numbered(10, 11)):
        nsqd.publish(TOPIC, bodies)
    program.once(nsqd, timeout='50s', idle_timeout='5s')
    assert numbers(program) == list(range(21))
    assert [len(bins['text']) for bins in program.records().values() if 'text' in bins] == [30_000_000]
    assert (left([nsqd]), counts([nsqd], 'timeout_count'), connections(nsqd)) == (0, 0, 1)


def shortlived(kind, address):
    """A connection that waits 1.2 s for a heartbeat."""
    options = types.SimpleNamespace(tls=None, auth_secret_file='', msg_timeout=None, connect_timeout=5,
                                    compression='none')
    host, _, port = address.rpartition(':')
    made = kind((host, int(port)), ConnectionOptions(types.SimpleNamespace(nsq=options)), TOPIC, CHANNEL)
    made.heartbeat_interval = 0.1
    return made


async def read_silence(address):
    connection = shortlived(Connection, address)
    await connection.open()
    try:
        await connection.read_messages()
    finally:
        connection.close_socket()


async def publish_into_silence(address):
    publisher = shortlived(Publisher, address)
    await publisher.open()
    try:
        await publisher.publish([b'a dead letter'])
    finally:
        publisher.close()


@pytest.mark.parametrize('meet', [read_silence, publish_into_silence])
def test_connection_without_heartbeats_is_given_up_for_just_that(meet):
    with proxies.FakeNsqd({}) as fake, pytest.raises(NsqdError, match=r'^no heartbeat for 1\.2 s$'):
        asyncio.run(meet(fake.tcp))


class Announces(proxies.FakeNsqd):
    """Begins a message of a gigabyte when it may send one."""

    def _reply(self, data):
        return b'\x40\0\0\0\0\0\0\2' if b'RDY' in data else super()._reply(data)


def test_nsqd_that_announces_a_gigabyte_is_given_up_and_tried_again(program):
    with Announces({}) as fake:
        program.configure(nsq={'nsqd-tcp-address': [fake.tcp]}, period='0')
        daemon = program.start('daemon')
        wait_until(lambda: fake.ended >= 2, 'two connections have ended')
        assert f'queue unavailable (nsqd {fake.tcp}: frame of 1073741824 bytes' in program.log.read_text()
        daemon.terminate()
        assert daemon.wait(10) == 0


@pytest.mark.slow
def test_nsqd_that_falls_silent_is_given_up_for_want_of_a_heartbeat(program, nsqd):
    """After two of its own, 10 s each; then it comes back."""
    fill(nsqd, 0)
    program.configure(nsqd, period='0')
    program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'the daemon is subscribed')
    first, = [client['remote_address'] for client in nsqd.clients(TOPIC, CHANNEL)]
    nsqd.suspend()
    wait_until(lambda: f'queue unavailable (nsqd {nsqd.tcp}: ' in program.log.read_text(), 'the connection is given up',
               40)
    nsqd.resume()
    assert f'nsqd {nsqd.tcp}: no heartbeat for 21 s' in program.log.read_text()
    assert 'the connection was closed' not in program.log.read_text()

    def is_another():
        return [client for client in nsqd.clients(TOPIC, CHANNEL) if client['remote_address'] != first]
    # Until nsqd has seen that the first has gone, it may deliver there, and again only after msg-timeout.
    wait_until(lambda: len(nsqd.clients(TOPIC, CHANNEL)) == len(is_another()) == 1, 'the daemon is back', 30)
    nsqd.publish(TOPIC, numbered(5))
    wait_until(lambda: len(program.records()) == 5, 'the messages are stored')


def test_nsqd_that_hangs_at_the_end_holds_nothing_up(program, nsqd):
    fill(nsqd, 10)
    with proxies.Proxy(nsqd) as proxy:
        with waiting_store(program, nsqd, proxy, 10, **{'max-messages': 10}) as running:
            nsqd.suspend()
        assert ended(running, 10) == 0
    nsqd.resume()
    assert numbers(program) == list(range(10))


# ----------------------------------------------------------------------------------------------------------- nsqlookupd

@pytest.fixture
def lookupds(workdir):
    """A function: lookupds(2) starts two."""
    with contextlib.ExitStack() as stack:
        yield lambda count, **options: [
            stack.enter_context(servers.Nsqlookupd(workdir, **options)) for _ in range(count)]


def registered(lookupd, nsqd):
    wait_until(lambda: any(each.endswith(f':{nsqd.port}') for each in lookupd.producers(TOPIC)),
               'nsqlookupd knows the nsqd')


def test_answers_of_all_nsqlookupds_are_merged(program, nsqds, lookupds):
    asked = lookupds(2)
    for place, lookupd in enumerate(asked):
        nsqd, = nsqds(1, lookupd=[lookupd])
        fill(nsqd, 10, 10 * place)
        registered(lookupd, nsqd)
    program.once(asked)
    assert numbers(program) == list(range(20))


def test_nsqd_named_by_two_nsqlookupds_gets_one_connection(program, nsqds, lookupds):
    asked = lookupds(2)
    nsqd, = nsqds(1, lookupd=asked)
    fill(nsqd, 10)
    for lookupd in asked:
        registered(lookupd, nsqd)
    program.once(asked)
    assert numbers(program) == list(range(10))
    assert connections(nsqd) == 1


def test_nsqd_listed_twice_gets_one_connection(program, nsqd):
    fill(nsqd, 10)
    program.once(nsq={'nsqd-tcp-address': [nsqd.tcp, nsqd.tcp]})
    assert numbers(program) == list(range(10))
    assert connections(nsqd) == 1


def web(status, body):
    return lambda: proxies.Web(lambda path: (status, body))


def saying(greeting):
    return lambda: proxies.Says(greeting)


BAD_LOOKUPDS = {
    'refused': proxies.refusing,
    'silent': saying(b''),
    'error': web(500, b'{}'),
    'web server': web(404, b'<html>Not Found</html>'),
    'HTTP of nsqd': web(404, b'{"message":"NOT_FOUND"}'),
    'odd 404': web(404, b'["TOPIC_NOT_FOUND"]'),
    'no JSON': web(200, b'<html>'),
    'other JSON': web(200, b'[]'),
    'odd producers': web(200, b'{"producers": [{}]}'),
    'deep JSON': web(200, b'[' * 100_000),
    'odd port': web(200, b'{"producers": [{"broadcast_address": "a", "tcp_port": 1, "http_port": 1e999}]}'),
}


@contextlib.contextmanager
def bad(makers, name):
    """The address of a server with that fault."""
    with makers[name]() as made:
        yield made if isinstance(made, str) else made.address


@pytest.mark.parametrize('fault', BAD_LOOKUPDS)
def test_one_bad_nsqlookupd_costs_a_warning(program, nsqds, nsqlookupd, fault):
    nsqd, = nsqds(1, lookupd=[nsqlookupd])
    fill(nsqd, 10)
    registered(nsqlookupd, nsqd)
    with bad(BAD_LOOKUPDS, fault) as address:
        done = program.once(nsq={'lookupd-http-address': [address, nsqlookupd.http]}, within=15)
    assert numbers(program) == list(range(10))
    assert [line for line in done.stderr.splitlines() if line.startswith('warning') and address in line]


@pytest.mark.parametrize('fault', BAD_LOOKUPDS)
def test_no_good_nsqlookupd_is_69_soon(program, fault):
    with bad(BAD_LOOKUPDS, fault) as address:
        done = program.once(nsq={'lookupd-http-address': [address]}, timeout='60s', expect=69, within=15)
    assert f'no nsqlookupd can be reached: {address}' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_topic_that_nsqlookupd_does_not_know_is_an_empty_window(program, nsqlookupd):
    done = program.once(nsqlookupd, timeout='30s', within=10, args=['-v'])
    assert f'no nsqd has the topic {TOPIC} yet' in done.stderr
    assert servers.summary(done.stderr)['received'] == 0


# ------------------------------------------------------------------------------------------------------------ addresses

def test_ipv6_addresses_of_nsqd_and_nsqlookupd(program, nsqds, lookupds):
    lookupd, = lookupds(1, host='::1')
    nsqd, = nsqds(1, host='::1', lookupd=[lookupd])
    fill(nsqd, 10)
    registered(lookupd, nsqd)
    program.once(nsqd, nsq={'max-messages': 4})
    program.once(lookupd)
    assert numbers(program) == list(range(10))


@pytest.fixture
def name_server(workdir, monkeypatch):
    """In x-msrv, `localhost` is ::1 and 127.0.0.1, whatever this machine's own file of hosts says; names that end in
    .silent get no answer while the test lasts."""
    (workdir / 'sitecustomize.py').write_text(
        'import socket, threading\n'
        'real = socket.getaddrinfo\n'
        'def answer(host, port, family=0, type=0, proto=0, flags=0):\n'
        '    options = port, family, type, proto, flags\n'
        '    if flags & socket.AI_NUMERICHOST:\n'
        '        return real(host, *options)\n'
        '    if host.endswith(".silent"):\n'
        '        threading.Event().wait()\n'
        '    if host != "localhost":\n'
        '        return real(host, *options)\n'
        '    return real("::1", *options) + real("127.0.0.1", *options)\n'
        'socket.getaddrinfo = answer\n')
    monkeypatch.setenv('PYTHONPATH', str(workdir))


@pytest.mark.usefixtures('name_server')
@pytest.mark.parametrize('listening', ['127.0.0.1', '::1'])
def test_name_of_both_families_reaches_a_server_that_listens_on_one(program, nsqds, lookupds, listening):
    lookupd, = lookupds(1, host=listening)
    nsqd, = nsqds(1, host=listening, lookupd=[lookupd])
    fill(nsqd, 10)
    registered(lookupd, nsqd)
    program.once(nsq={'nsqd-tcp-address': [f'localhost:{nsqd.port}'], 'max-messages': 4})
    program.once(nsq={'lookupd-http-address': [f'localhost:{lookupd.port + 1}']})
    assert numbers(program) == list(range(10))


def silent_names(count):
    return [f'host{number}.silent:4150' for number in range(count)]


@pytest.mark.usefixtures('name_server')
@pytest.mark.parametrize('host', ['127.0.0.1', 'localhost'])
def test_names_without_an_answer_delay_no_other_nsqd(program, nsqd, host):
    """More of them than there are threads in any pool; what can be reached is read before the first is given up."""
    fill(nsqd, 10)
    program.configure(nsq={'nsqd-tcp-address': [*silent_names(40), f'{host}:{nsqd.port}'], 'connect-timeout': '20s'},
                      timeout='60s', idle_timeout='60s')
    running = program.start('once')
    wait_until(lambda: len(program.records()) == 10, 'what can be reached is stored', 15)
    assert 'silent' not in program.log.read_text()
    running.terminate()
    assert ended(running, 10) == 0


@pytest.mark.usefixtures('name_server')
def test_nsqlookupd_whose_name_gets_no_answer_costs_a_warning(program, nsqds, nsqlookupd):
    nsqd, = nsqds(1, lookupd=[nsqlookupd])
    fill(nsqd, 10)
    registered(nsqlookupd, nsqd)
    done = program.once(nsq={'lookupd-http-address': [*silent_names(10), nsqlookupd.http]}, within=20)
    assert numbers(program) == list(range(10))
    assert 'nsqlookupd host9.silent:4150' in done.stderr


@pytest.mark.usefixtures('name_server')
def test_name_without_an_answer_is_69_and_check_asks_for_all_at_once(program):
    program.configure(nsq={'nsqd-tcp-address': silent_names(10), 'connect-timeout': '2s'})
    for command in (['once'], ['check', '--connect']):
        done = program.run(*command, expect=69, timeout=15)
        assert 'host9.silent:4150: name server: no answer in 2 s' in done.stderr


def test_one_thread_asks_for_a_name_however_often_it_is_wanted(monkeypatch):
    asked, answer = [], threading.Event()

    def getaddrinfo(host, *args, flags=0):
        if flags:
            raise socket.gaierror(socket.EAI_NONAME, 'no address')
        asked.append(host)
        assert answer.wait(10)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('192.0.2.7', 0))]

    async def want_often():
        resolver = NameResolver()
        wanted = [asyncio.ensure_future(resolver.resolve('queue.example', port)) for port in range(1, 30)]
        done, _ = await asyncio.wait([wanted.pop(0)], timeout=0.01)
        assert not done
        wanted.pop(0).cancel()   # gives up, and the others do not
        answer.set()
        return [port for (_, (_, port)), in await asyncio.gather(*wanted)]

    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    assert asyncio.run(want_often()) == list(range(3, 30))
    assert asked == ['queue.example']
    assert not NameResolver.lookups


# -------------------------------------------------------------------------------------------------- unreachable, broken

BAD_NSQDS = {
    'refused': proxies.refusing,
    'no connection': proxies.unanswering,
    'silent': saying(b''),
    'HTTP': saying(b'HTTP/1.1 400 Bad Request\r\n\r\n'),
    'negative size': saying(b'\xff' * 8),
    'no features': saying(proxies.frame(b'OK')),
    'other JSON': saying(proxies.frame(b'[]')),
    'error': saying(proxies.frame(b'E_INVALID go away', 1)),
    'deep JSON': saying(proxies.frame(b'[' * 100_000)),
    'odd limits': saying(proxies.frame(b'{"max_rdy_count": "x"}')),
}


@pytest.mark.parametrize('fault', BAD_NSQDS)
def test_no_nsqd_within_reach_is_69_soon(program, fault):
    with bad(BAD_NSQDS, fault) as address:
        done = program.once(nsq={'nsqd-tcp-address': [address]}, timeout='60s', expect=69, within=15)
    assert f'no nsqd can be reached: {address}' in done.stderr
    assert not program.records()


@pytest.mark.parametrize(('fault', 'text'), [
    ('silent', 'IDENTIFY: no answer in 0.4 s'), ('no connection', 'no connection in 0.4 s'),
])
def test_step_of_a_connection_is_bounded_by_connect_timeout_and_named(program, fault, text):
    with bad(BAD_NSQDS, fault) as address:
        done = program.once(nsq={'nsqd-tcp-address': [address], 'connect-timeout': '400ms'}, expect=69, within=10)
    assert f'{address}: {text}' in done.stderr


def test_unknown_host_is_69_soon(program):
    done = program.once(nsq={'nsqd-tcp-address': ['nowhere.invalid:4150']}, expect=69, within=30)
    assert 'no nsqd can be reached: nowhere.invalid:4150' in done.stderr


@pytest.mark.parametrize('fault', BAD_NSQDS)
def test_bad_nsqd_beside_a_good_one_costs_a_warning(program, nsqd, fault):
    fill(nsqd, 10)
    with bad(BAD_NSQDS, fault) as address:
        done = program.once(nsq={'nsqd-tcp-address': [address, nsqd.tcp]}, timeout='8s', within=20)
    assert numbers(program) == list(range(10))
    assert left([nsqd]) == 0
    assert len([line for line in done.stderr.splitlines() if line.startswith('warning') and address in line]) == 1


@pytest.mark.parametrize('how', ['kill', 'stop'])
def test_nsqd_that_restarts_in_mid_window_loses_nothing(program, nsqds, how):
    """Messages are held when the connection breaks; with a disk queue nsqd does its own part."""
    nsqd, = nsqds(1, '--mem-queue-size=0', '--sync-every=1')
    fill(nsqd, 300)
    with proxies.Proxy(nsqd) as proxy:
        with waiting_store(program, nsqd, proxy, 100, **{'max-in-flight': 100}) as running:
            getattr(nsqd, how)()
            # Before that it takes its answers for sent: the kernel takes them, and drops them when they are refused.
            wait_until(lambda: 'queue unavailable' in program.log.read_text(), 'x-msrv has seen that nsqd is gone')
            nsqd.restart()
        assert ended(running) == 0
    assert numbers(program) == list(range(300))
    assert left([nsqd]) == 0
    told = servers.summary(program.log.read_text())
    # What nsqd has delivered again before the store was free is answered there, and is not late.
    assert told['stored'] == told['received'] and 0 < told['late'] <= 100


def test_connection_that_breaks_in_mid_flow_loses_nothing(program, nsqds):
    """nsqd hands back what was in flight after its msg-timeout; the window is still open then."""
    nsqd, = nsqds(1, '--msg-timeout=1s')
    fill_timed(nsqd, 2000)

    def cut_once(event):
        if event.connection == 0 and proxy.count('message') == 500:
            raise ConnectionError

    with proxies.Proxy(nsqd, judge=cut_once) as proxy:
        program.configure(nsq=addresses(proxy, **{'max-in-flight': 200}), timeout='60s', idle_timeout='30s')
        running = program.start('once')
        wait_until(lambda: len(program.records()) == 2000 and not left([nsqd]), 'all are stored and finished', 20)
        running.terminate()
        assert ended(running) == 0
    assert numbers(program) == list(range(2000))
    assert {event.connection for event in proxy.events} == {0, 1}
    warning, = [line for line in program.log.read_text().splitlines() if line.startswith('warning')]
    assert proxy.addresses[0] in warning


def test_nsqd_that_comes_up_in_mid_window_is_found(program, nsqds):
    late, there = nsqds(2)
    fill(late, 10)
    fill(there, 10, 10)
    late.stop()
    program.configure([late, there], timeout='60s', idle_timeout='30s')
    running = program.start('once')
    wait_until(lambda: len(program.records()) == 10, 'the messages of the one that is there are stored')
    late.restart()
    wait_until(lambda: len(program.records()) == 20 and not left([late, there]), 'those of the other, too', 15)
    running.terminate()
    assert ended(running) == 0
    assert numbers(program) == list(range(20))
    warning, = [line for line in program.log.read_text().splitlines() if line.startswith('warning')]
    assert late.tcp in warning


def test_error_that_ends_a_connection_is_said_and_the_window_goes_on(program, nsqd):
    fill(nsqd, 10)

    def too_much_once(event):
        return b'RDY 999999\n' if event.connection == 0 and event.name == 'RDY' else True

    with proxies.Proxy(nsqd, judge=too_much_once) as proxy:
        done = program.once(nsq=addresses(proxy))
    assert numbers(program) == list(range(10))
    warning, = [line for line in done.stderr.splitlines() if line.startswith('warning')]
    assert proxy.addresses[0] in warning
    assert 'E_INVALID' in warning


# ------------------------------------------------------------------------------------------- held for long, TOUCH, late

@pytest.mark.slow
@pytest.mark.parametrize(('args', 'option'), [
    (['--msg-timeout=1s'], {}), (['--msg-timeout=3s'], {'msg-timeout': '1s'}),
], ids=str)
def test_held_messages_are_touched_so_that_none_comes_twice(program, nsqds, args, option):
    nsqd, = nsqds(1, *args)
    fill_timed(nsqd, 10)
    with proxies.Proxy(nsqd) as proxy:
        with waiting_store(program, nsqd, proxy, 10, **{'max-messages': 10}, **option) as running:
            wait_until(lambda: proxy.count('TOUCH') >= 50, 'more than twice the msg-timeout has passed')
        assert ended(running) == 0
    assert timed_out(nsqd) == left([nsqd]) == 0
    assert (proxy.count('message'), proxy.count('FIN'), proxy.count('error')) == (10, 10, 0)
    assert numbers(program) == list(range(10))


def swallow_touch(event):
    return event.name != 'TOUCH'


def cut_at_first_touch(event):
    """What is held then comes again on another connection."""
    if event.name == 'TOUCH' and event.connection == 0:
        raise ConnectionError


@pytest.mark.slow
@pytest.mark.parametrize(('args', 'judge'), [
    (['--msg-timeout=1s'], swallow_touch),
    (['--msg-timeout=1s'], cut_at_first_touch),
    (['--msg-timeout=700ms', '--max-msg-timeout=1200ms'], lambda event: True),   # before SQLite calls the file locked
], ids=['TOUCH lost', 'connection lost', 'max-msg-timeout'])
def test_second_copy_of_a_held_message_joins_the_first(program, nsqds, args, judge):
    nsqd, = nsqds(1, *args)
    fill_timed(nsqd, 10)
    with proxies.Proxy(nsqd, judge=judge) as proxy:
        with waiting_store(program, nsqd, proxy, 10) as running:
            wait_until(lambda: proxy.count('message') == 20, 'all have come again')
        assert ended(running) == 0
    told = servers.summary(program.log.read_text())
    assert (told['received'], told['stored'], told['late']) == (10, 10, 0)
    assert (proxy.count('FIN'), proxy.count('error'), left([nsqd])) == (10, 0, 0)
    assert numbers(program) == list(range(10))


def test_refused_fin_is_counted_and_warned_of_and_the_record_stays(program, nsqds):
    nsqd, = nsqds(1, '--msg-timeout=1s')
    fill_timed(nsqd, 10)
    with proxies.Proxy(nsqd, judge=swallow_touch) as proxy:
        with waiting_store(program, nsqd, proxy, 10, **{'max-messages': 10}) as running:
            wait_until(lambda: timed_out(nsqd) == 10, 'nsqd has taken the messages back')
        assert ended(running) == 0
    log = program.log.read_text()
    assert proxy.arguments('error')[0].startswith(b'E_FIN_FAILED')
    assert log.count('late: E_FIN_FAILED') == 6   # five are said, and then how many more came
    assert '5 more like this in the last minute' in log
    assert numbers(program) == list(range(10))
    told = servers.summary(log)
    assert (told['stored'], told['late'], told['requeued']) == (10, 10, 0)
    assert nsqd.attempts(TOPIC, CHANNEL) == [2] * 10


def test_redelivery_in_a_later_window_rewrites_the_same_record(program, nsqds):
    nsqd, = nsqds(1, '--msg-timeout=1s')
    fill_timed(nsqd, 10)
    with proxies.Proxy(nsqd, judge=lambda event: event.name != 'FIN') as proxy:
        program.once(nsq=addresses(proxy, **{'max-messages': 10}))
    first = program.records()
    assert (len(first), left([nsqd])) == (10, 10)
    wait_until(lambda: timed_out(nsqd) == 10, 'nsqd has taken the messages back')
    done = program.once(nsqd)
    assert servers.summary(done.stderr)['stored'] == 10
    assert program.records() == first
    assert left([nsqd]) == 0


def test_message_of_many_attempts_is_still_stored(program, nsqd):
    fill(nsqd, 1)
    nsqd.bounce(TOPIC, CHANNEL, 10)
    program.once(nsqd)
    assert numbers(program) == [0]
    assert left([nsqd]) == 0


# ----------------------------------------------------------------------------------------------------- limits of nsqd

@pytest.mark.parametrize(('args', 'option'), [
    (['--max-msg-timeout=2s', '--msg-timeout=1s'], {'msg-timeout': '10s'}),
    (['--max-heartbeat-interval=5s'], {}),
    (['--min-output-buffer-timeout=100ms'], {}),
    (['--max-output-buffer-size=16384'], {}),
], ids=str)
def test_identify_over_the_limits_is_tried_once_more_with_defaults(program, nsqds, args, option):
    nsqd, = nsqds(1, *args)
    fill(nsqd, 100)
    with proxies.Proxy(nsqd) as proxy:
        done = program.once(nsq=addresses(proxy, **option))
    assert numbers(program) == list(range(100))
    assert (proxy.count('IDENTIFY'), left([nsqd])) == (2, 0)
    warning, = [line for line in done.stderr.splitlines() if line.startswith('warning')]
    assert 'E_BAD_BODY' in warning
    assert 'retrying IDENTIFY with the defaults of nsqd' in warning


@pytest.mark.slow
def test_idle_connection_with_default_heartbeats_is_kept(program, nsqds):
    """nsqd's own default is a heartbeat each 30 s, three times what x-msrv asks for and was refused here."""
    nsqd, = nsqds(1, '--max-heartbeat-interval=5s')
    fill(nsqd, 0)
    done = program.once(nsqd, timeout='25s', idle_timeout='25s')
    assert connections(nsqd) == 2  # the one that was refused, and the one after it
    assert len([line for line in done.stderr.splitlines() if line.startswith('warning')]) == 1


def test_rdy_respects_the_limit_of_nsqd(program, nsqds):
    nsqd, = nsqds(1, '--max-rdy-count=5')
    fill(nsqd, 500)
    with proxies.Proxy(nsqd) as proxy:
        program.once(nsq=addresses(proxy))
    assert numbers(program) == list(range(500))
    assert max(map(int, proxy.arguments('RDY'))) == 5
    assert proxy.count('error') == 0


# ----------------------------------------------------------------------------------------------------- more than one

def test_two_consumers_of_a_channel_share_its_messages(program, nsqd, workdir):
    """Each takes half, exactly."""
    fill(nsqd, 5000)
    (workdir / 'second').mkdir()
    second = servers.Xmsrv(workdir / 'second')
    try:
        for each in (program, second):
            each.configure(nsqd, timeout='40s', idle_timeout='10s', nsq={'max-messages': 2500})
        assert [ended(running) for running in [each.start('once') for each in (program, second)]] == [0, 0]
        taken = [numbers(each) for each in (program, second)]
    finally:
        second.close()
    assert [len(each) for each in taken] == [2500, 2500]
    assert sorted(sum(taken, [])) == list(range(5000))
    assert left([nsqd]) == counts([nsqd], 'timeout_count') == counts([nsqd], 'requeue_count') == 0


def test_each_channel_of_a_topic_gets_every_message(program, nsqd):
    fill(nsqd, 0)
    nsqd.create(TOPIC, 'other')
    nsqd.publish(TOPIC, numbered(100))
    for channel in (CHANNEL, 'other'):
        done = program.once(nsqd, channel=channel)
        assert servers.summary(done.stderr)['stored'] == 100
        assert nsqd.left(TOPIC, channel) == 0
    assert numbers(program) == list(range(100))  # the key does not depend on the channel
