"""One connection to an nsqd, from the handshake to its end: the nsqd answers by a script, by a clock of the test."""
import asyncio
import json
import socket
import ssl

import pytest
from tornado.iostream import StreamClosedError

import clock
import fakes
import xmsrv
from fakes import ERROR, RESPONSE, AnsweringStream, frame
from xmsrv import (
    BackgroundTasks,
    Connection,
    ConnectionOptions,
    Consumer,
    Health,
    NameResolver,
    NsqdError,
    Publisher,
    Subscription,
    describe_error,
)

ADDRESS = '127.0.0.1', 4150
HEARTBEAT = frame(RESPONSE, b'_heartbeat_')


def info(**members):
    """An nsqd's answer to IDENTIFY."""
    return [frame(RESPONSE, json.dumps(members).encode())]


def error(text):
    return [frame(ERROR, text)]


def with_connection(monkeypatch, steps, *streams, make=None, tls=None, secret=None, **nsq):
    """Runs `steps(connection, *streams)`. streams: the arguments of an AnsweringStream for each attempt to connect."""
    async def main():
        link = ConnectionOptions(fakes.options(nsq={'connect-timeout': '5s', **nsq}))
        made = [AnsweringStream(**each) for each in streams or ({},)]
        waiting = iter(made)

        async def credentials():
            return tls, secret

        async def connect_tcp(connection):
            connection.stream = next(waiting)
        link.load_credentials, link.tls_options = credentials, tls
        monkeypatch.setattr(Connection, 'connect_tcp', connect_tcp)
        connection = make(link) if make else Connection(ADDRESS, link, 'orders', 'x-msrv')
        try:
            await steps(connection, *made)
        finally:
            for stream in made:
                stream.close()
    clock.run(main())


# -- the handshake

def test_identify_says_who_we_are_and_asks_for_what_a_window_needs(monkeypatch):
    monkeypatch.setattr(socket, 'gethostname', lambda: 'host.example.org')

    async def steps(connection, stream):
        await connection.open()
        assert stream.commands == ['IDENTIFY', 'SUB']
        identify, subscribe = stream.sent
        assert subscribe == b'SUB orders x-msrv\n'
        assert identify.startswith(b'  V2IDENTIFY\n')
        assert int.from_bytes(identify[13:17], 'big') == len(identify) - 17
        assert json.loads(identify[17:]) == {
            'client_id': 'host', 'hostname': 'host.example.org', 'user_agent': f'x-msrv/{xmsrv.__version__}',
            'feature_negotiation': True, 'tls_v1': False, 'heartbeat_interval': 10000, 'output_buffer_timeout': 25,
            'output_buffer_size': 65536, 'msg_timeout': 30000, 'deflate': False}
    with_connection(monkeypatch, steps, **{'msg-timeout': '30s'})


def test_what_nsqd_refuses_as_a_whole_is_asked_again_with_its_own_defaults(monkeypatch):
    async def steps(connection, first, second):
        await connection.open()
        assert (first.closed, second.commands, connection.heartbeat_interval) == (True, ['IDENTIFY', 'SUB'], 60.0)
        assert not {'heartbeat_interval', 'output_buffer_size'} & json.loads(second.sent[0][17:]).keys()
    with_connection(monkeypatch, steps, {'IDENTIFY': error(b'E_BAD_BODY IDENTIFY heartbeat interval')}, {})


@pytest.mark.parametrize('step', ['IDENTIFY', 'SUB'])
def test_any_other_error_ends_the_handshake_and_leaves_no_socket(monkeypatch, step):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match='E_INVALID no'):
            await connection.open()
        assert (stream.closed, connection.is_closed) == (True, True)
    with_connection(monkeypatch, steps, {step: error(b'E_INVALID no')})


@pytest.mark.parametrize('step', ['IDENTIFY', 'SUB'])
def test_each_step_is_bounded_and_named(monkeypatch, step):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match=f'{step}: no answer in 5 s'):
            await connection.open()
        assert asyncio.get_running_loop().time() == pytest.approx(1005)
        assert stream.closed
    with_connection(monkeypatch, steps, {step: []})


def test_a_time_out_of_the_kernels_is_not_ours(monkeypatch):
    async def steps(connection, stream):
        async def fails():
            raise TimeoutError(110, 'Connection timed out')
        with pytest.raises(TimeoutError, match='Connection timed out'):
            await connection.limit_step('TCP', fails())
    with_connection(monkeypatch, steps)


def test_heartbeats_in_the_handshake_are_answered(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        assert stream.commands == ['IDENTIFY', 'NOP', 'SUB']
    with_connection(monkeypatch, steps, {'IDENTIFY': [HEARTBEAT, *info()]})


@pytest.mark.parametrize('data', [
    (3).to_bytes(4, 'big') + bytes(4), (0xffffffff).to_bytes(4, 'big') + bytes(4), b'HTTP/1.1 400 Bad Request\r\n',
    ((1 << 20) + 1).to_bytes(4, 'big') + bytes(4)])
def test_an_answer_that_is_no_frame_is_no_nsqd(monkeypatch, data):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match='not an nsqd'):
            await connection.open()
    with_connection(monkeypatch, steps, {'IDENTIFY': [data]})


@pytest.mark.parametrize('size', [0, (1 << 20) - 4])
def test_an_answer_of_any_size_that_a_frame_may_have_is_one(monkeypatch, size):
    async def steps(connection, stream):
        connection.stream = stream
        stream.feed(frame(RESPONSE, b'x' * size))
        assert await connection.read_response() == b'x' * size
    with_connection(monkeypatch, steps)


@pytest.mark.parametrize('answer', [b'OK', b'[]', b'[' * 100_000, b'{"max_rdy_count": "many"}', b'{"msg_timeout": 1.5}',
                                    b'{"max_msg_timeout": null}', b'{"output_buffer_timeout": true}'])
def test_what_no_nsqd_answers_to_identify_ends_the_handshake(monkeypatch, answer):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match='not an answer of nsqd'):
            await connection.open()
        assert stream.commands == ['IDENTIFY']
    with_connection(monkeypatch, steps, {'IDENTIFY': [frame(RESPONSE, answer)]})


def test_a_subscription_that_is_not_answered_by_ok_is_none(monkeypatch):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match='perhaps'):
            await connection.open()
    with_connection(monkeypatch, steps, {'SUB': [frame(RESPONSE, b'perhaps')]})


def test_the_round_trip_is_measured_by_identify(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        assert connection.round_trip == pytest.approx(0.4)
        assert connection.last_read == pytest.approx(1000.8)   # SUB has its own
    with_connection(monkeypatch, steps, {'delay': 0.4})


def test_no_secret_crosses_before_tls_is_there(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        assert stream.commands == ['IDENTIFY', 'TLS', 'AUTH', 'SUB']
        assert stream.tls == (False, 'the context', '127.0.0.1')
        assert stream.sent[1] == b'AUTH\n\x00\x00\x00\x06secret'
        assert json.loads(stream.sent[0][17:])['tls_v1'] is True
    with_connection(monkeypatch, steps, {'IDENTIFY': info(tls_v1=True, auth_required=True)}, tls='the context',
                    secret=b'secret')


@pytest.mark.parametrize(('offered', 'fault', 'text'), [
    ({}, {}, 'does not offer it'), ({'tls_v1': False}, {}, 'does not offer it'),
    ({'tls_v1': True, 'auth_required': True}, {'TLS': error(b'E_INVALID failed')}, 'E_INVALID'),
    ({'tls_v1': True, 'auth_required': True}, {'TLS': []}, 'TLS: no answer in 5 s'),
    ({'tls_v1': True}, {}, 'does not use AUTH'),
    ({'tls_v1': True, 'auth_required': True}, {'AUTH': error(b'E_AUTH_FAILED')}, 'E_AUTH_FAILED')])
def test_what_was_asked_for_and_is_not_there_ends_the_handshake(monkeypatch, offered, fault, text):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match=text):
            await connection.open()
        assert 'SUB' not in stream.commands
        assert ('AUTH' in stream.commands) is ('AUTH' in fault)
        assert connection.is_closed
    with_connection(monkeypatch, steps, {'IDENTIFY': info(**offered), **fault}, tls='the context', secret=b'secret')


def test_a_certificate_that_is_not_good_ends_the_connection(monkeypatch):
    """The socket, too: tornado keeps the stream for itself until TLS is there."""
    async def steps(connection, stream):
        with pytest.raises(ssl.SSLError):
            await connection.open()
        stream.peer.setblocking(False)
        assert (stream.peer.recv(1), stream.commands) == (b'', ['IDENTIFY'])   # nsqd sees its end
    with_connection(monkeypatch, steps, {'IDENTIFY': info(tls_v1=True)}, tls=ssl.SSLError('no'))


def test_auth_that_only_nsqd_wants_is_named(monkeypatch):
    async def steps(connection, stream):
        with pytest.raises(NsqdError, match='auth-secret-file is not set'):
            await connection.open()
    with_connection(monkeypatch, steps, {'IDENTIFY': info(auth_required=True)})


def test_a_secret_that_cannot_be_read_is_an_error_of_this_attempt(tmp_path):
    secret = tmp_path / 'secret'
    link = ConnectionOptions(fakes.options(nsq={'auth-secret-file': str(secret)}))
    with pytest.raises(NsqdError, match=f'^\\[nsq\\] auth-secret-file = {secret}: No such file or directory$'):
        asyncio.run(link.load_credentials())
    secret.write_text('first\n')
    assert asyncio.run(link.load_credentials()) == (None, b'first')
    secret.write_text('second\n')
    assert asyncio.run(link.load_credentials()) == (None, b'second')
    assert asyncio.run(ConnectionOptions(fakes.options()).load_credentials()) == (None, None)


@pytest.mark.parametrize(('content', 'rule'), [
    (None, 'No such file or directory'), (b'x', 'the certificates do not load: .*')])
def test_a_certificate_that_cannot_be_read_is_named_with_its_file(tmp_path, content, rule):
    authorities = tmp_path / 'ca.pem'
    link = ConnectionOptions(fakes.options(nsq={'tls': {'ca-file': str(authorities)}}))
    if content:
        authorities.write_bytes(content)
    with pytest.raises(NsqdError, match=f'^\\[nsq\\] \\[\\[tls\\]\\] ca-file = {authorities}: {rule}$'):
        asyncio.run(link.load_credentials())


@pytest.mark.parametrize(('fault', 'text'), [
    (TimeoutError(), 'no answer in time'), (StreamClosedError(), 'the connection was closed'),
    (StreamClosedError(ConnectionRefusedError(111, 'Connection refused')), 'Connection refused'),
    (NsqdError('E_INVALID'), 'E_INVALID'), (UnicodeError(), 'UnicodeError'), (OSError(5, 'broken'), 'broken')])
def test_an_error_in_a_few_words(fault, text):
    assert describe_error(fault) == text


def test_a_certificate_is_refused_in_openssls_words():
    fault = ssl.SSLCertVerificationError(1, 'long text')
    fault.verify_message = 'Hostname mismatch'
    assert describe_error(fault) == 'TLS: Hostname mismatch'


def test_to_leave_says_when_nsqd_wants_tls_and_nothing_else(monkeypatch):
    for answer, fails in ((b'CLOSE_WAIT', None), (b'E_INVALID TLS required', 'TLS required'), (b'E_INVALID', None)):
        async def steps(connection, stream, fails=fails):
            await connection.open()
            if fails:
                with pytest.raises(NsqdError, match=fails):
                    await connection.close_unsubscribed()
            else:
                await connection.close_unsubscribed()
            assert (stream.commands[-1], stream.closed) == ('CLS', True)
        kind = RESPONSE if answer == b'CLOSE_WAIT' else ERROR
        with_connection(monkeypatch, steps, {'CLS': [frame(kind, answer)]})


def test_nothing_is_written_to_a_connection_that_is_lost(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        stream.close()
        connection.send_command(b'NOP\n')
        assert connection.is_closed
        connection.send_command(b'NOP\n')
        assert stream.commands == ['IDENTIFY', 'SUB']
    with_connection(monkeypatch, steps)


# -- a subscription

def subscription(link):
    return Subscription(ADDRESS, Consumer(fakes.options(), BackgroundTasks(), link, 'orders', 'x-msrv', Health()))


@pytest.mark.parametrize(('members', 'limits'), [
    ({}, (2500, 60.0, 900.0, 0.5)),
    ({'max_rdy_count': 7, 'msg_timeout': 2000, 'max_msg_timeout': 5000, 'output_buffer_timeout': 25},
     (7, 2.0, 5.0, 0.05))])
def test_the_limits_are_those_that_nsqd_names(monkeypatch, members, limits):
    async def steps(connection, stream):
        await connection.open()
        assert (connection.max_rdy, connection.msg_timeout, connection.max_msg_timeout, connection.idle_delay) == limits
    with_connection(monkeypatch, steps, {'IDENTIFY': info(**members)}, make=subscription)


def test_rdy_is_sent_when_it_changes_and_a_new_one_gives_another_chance(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        connection.idle = True
        connection.set_rdy(0)
        assert stream.commands[2:] == [] and connection.idle
        await asyncio.sleep(1)
        connection.set_rdy(5)
        assert (stream.sent[2:], connection.idle, connection.rdy_since) == ([b'RDY 5\n'], False, 1001.0)
        await asyncio.sleep(1)
        connection.idle = True
        connection.set_rdy(3)
        assert (connection.idle, connection.rdy_since) == (True, 1001.0)   # it could deliver all the time
        connection.set_rdy(4)
        assert (connection.idle, connection.rdy_since, stream.sent[3:]) == (True, 1002.0, [b'RDY 3\n', b'RDY 4\n'])
    with_connection(monkeypatch, steps, make=subscription)


def test_a_subscription_closes_at_close_wait_and_not_before(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        connection.on_response(RESPONSE, b'CLOSE_WAIT')   # nobody has asked for it
        reading = asyncio.ensure_future(connection.read_messages())
        closing = asyncio.ensure_future(connection.close())
        stream.feed(frame(RESPONSE, b'OK'))
        await asyncio.sleep(0.4)
        assert not stream.closed
        stream.feed(frame(RESPONSE, b'CLOSE_WAIT'))
        await asyncio.sleep(0.1)
        assert stream.closed and closing.done()
        reading.cancel()
    with_connection(monkeypatch, steps, {'CLS': []}, make=subscription)


# -- a publisher

def publisher(link):
    return Publisher(ADDRESS, link, 'orders.dead', 'x-msrv-replay')


def test_a_publish_ends_with_its_answer_and_a_heartbeat_is_none(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        assert stream.sent[1] == b'SUB orders.dead x-msrv-replay\n'
        await connection.publish([b'one', b'two'])
        assert asyncio.get_running_loop().time() == pytest.approx(1000.5)
        await connection.publish([b'three'])   # and another time
        bodies = b'\x00\x00\x00\x03one\x00\x00\x00\x03two'
        assert stream.sent[2] == (b'MPUB orders.dead\n' + (len(bodies) + 4).to_bytes(4, 'big')
                                  + b'\x00\x00\x00\x02' + bodies)
        assert stream.commands[2:] == ['MPUB', 'NOP', 'MPUB', 'NOP']
        connection.close()
        await asyncio.sleep(0)
        assert stream.closed and connection.reader.cancelled()
    with_connection(monkeypatch, steps, {'MPUB': [HEARTBEAT]}, make=answering_late)


def answering_late(link):
    """A publisher whose nsqd answers half a second after its heartbeat."""
    connection = publisher(link)
    send = connection.send_command

    def sending(data):
        send(data)
        if data.startswith(b'MPUB'):
            asyncio.get_running_loop().call_later(0.5, connection.stream.feed, frame(RESPONSE, b'OK'))
    connection.send_command = sending
    return connection


def test_a_publish_without_an_answer_is_given_up_after_5_s(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        with pytest.raises(TimeoutError):
            await connection.publish([b'one'])
        assert asyncio.get_running_loop().time() == pytest.approx(1005)
        connection.close()
    with_connection(monkeypatch, steps, {'MPUB': []}, make=publisher)


def test_an_error_of_a_publish_reaches_whoever_waits_and_ends_the_connection(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        with pytest.raises(NsqdError, match='E_BAD_MESSAGE'):
            await connection.publish([b'one'])
        assert (stream.closed, connection.is_closed) == (True, True)
        connection.close()
    with_connection(monkeypatch, steps, {'MPUB': error(b'E_BAD_MESSAGE')}, make=publisher)


def test_a_connection_that_ends_without_a_publish_is_lost_and_no_error(monkeypatch):
    async def steps(connection, stream):
        await connection.open()
        stream.close()
        await asyncio.sleep(0.1)
        assert connection.is_closed and connection.reader.done() and not connection.reader.exception()
    with_connection(monkeypatch, steps, make=publisher)


# -- names

def test_an_address_needs_no_thread_and_a_name_one_for_all_who_ask(monkeypatch):
    asked = []

    def look_up_name(host, family, flags=0):
        asked.append((host, flags))
        if flags:
            return real(host, family, flags)
        if host == 'bad':
            raise socket.gaierror(-2, 'Name or service not known')
        return [(socket.AF_INET6, 1, 6, '', ('::1', 0, 0, 7)), (socket.AF_INET, 1, 6, '', ('127.0.0.1', 0))]
    real = xmsrv.look_up_name
    monkeypatch.setattr(xmsrv, 'look_up_name', look_up_name)

    async def main():
        resolver = NameResolver()
        assert await resolver.resolve('127.0.0.1', 4150) == [(socket.AF_INET, ('127.0.0.1', 4150))]
        assert await resolver.resolve('::1', 4150) == [(socket.AF_INET6, ('::1', 4150, 0, 0))]
        assert [host for host, flags in asked if not flags] == []
        found = await asyncio.gather(*(resolver.resolve('name', port) for port in (1, 2)))
        assert found == [[(socket.AF_INET6, ('::1', port, 0, 7)), (socket.AF_INET, ('127.0.0.1', port))]
                         for port in (1, 2)]
        with pytest.raises(socket.gaierror, match='not known'):
            await resolver.resolve('bad', 1)
        assert NameResolver.lookups == {}
    asyncio.run(asyncio.wait_for(main(), 10))


def test_whoever_asks_for_a_name_that_is_looked_up_waits_for_that_thread(monkeypatch):
    threads = []

    class Thread:
        def __init__(self, target, args, daemon):
            threads.append((target, args, daemon))

        def start(self):
            pass
    monkeypatch.setattr(xmsrv.threading, 'Thread', Thread)
    first, second, other = (NameResolver().start_lookup(name, 0) for name in ('a', 'a', 'b'))
    assert first is second is not other
    assert [(args[1], daemon) for _, args, daemon in threads] == [(('a', 0), True), (('b', 0), True)]
    first.cancel()
    assert not first.cancelled()   # for the others wait, too
    NameResolver.lookups.clear()
