"""Stand-ins for unit tests: the configuration without a file, an nsqd's stream, messages, what was fsynced."""
import asyncio
import contextlib
import json
import os
import re
import socket
import sqlite3

import nsq
import pytest
from tornado.iostream import StreamClosedError

import xmsrv

RESPONSE, ERROR = nsq.FRAME_TYPE_RESPONSE, nsq.FRAME_TYPE_ERROR


def options(**sections):
    """A whole configuration: `options(nsq={'max-in-flight': '10'}, period='1s')`, the rest at its defaults."""
    given = {'nsq': {'nsqd-tcp-address': '127.0.0.1:4150', 'topic': 'orders'},
             'aerospike': {'hosts': '127.0.0.1:3000', 'namespace': 'test'}}
    for name, value in sections.items():
        option = name.replace('_', '-')
        given[option] = {**given.get(option, {}), **value} if isinstance(value, dict) else value
    config, faults, _ = xmsrv.build_config(given)
    assert not [fault for fault in faults if fault.kind is xmsrv.FaultKind.TEXT], faults
    return config


class Stream:
    """What tornado's IOStream is to a connection. `sent`: commands, without their line ends. A read gives what
    `feed` has put there, and waits without end where that is nothing."""

    def __init__(self):
        self.sent, self.chunks, self.closed = [], asyncio.Queue(), False

    def write(self, data):
        self.sent += data.decode('latin-1').splitlines()

    def feed(self, data):
        self.chunks.put_nowait(data)

    async def read_bytes(self, number, partial=False):
        return await self.chunks.get()

    def close(self):
        self.closed = True


class AnsweringStream:
    """The stream of an nsqd that answers each command `delay` seconds later, with the frames that `answers`
    has for its name; one that is named without any stays unanswered. sent: what was written; commands: the names of
    it."""

    def __init__(self, delay=0.0, **answers):
        self.answers = {'IDENTIFY': [frame(RESPONSE, b'{}')], 'CLS': [frame(RESPONSE, b'CLOSE_WAIT')],
                        **{name: [frame(RESPONSE, b'OK')] for name in ('SUB', 'AUTH', 'TLS', 'MPUB')}, **answers}
        self.delay, self.sent, self.commands, self.tls = delay, [], [], None
        self.buffer, self.arrived, self.closed = bytearray(), asyncio.Event(), False
        self.socket, self.peer = socket.socketpair()

    def write(self, data):
        if self.closed:
            raise StreamClosedError
        self.sent.append(data)
        self.answer(re.match(rb'(?:  V2)?([A-Z]+)', data)[1].decode())

    def answer(self, name):
        self.commands.append(name)
        for each in self.answers.get(name, ()):
            asyncio.get_running_loop().call_later(self.delay, self.feed, each)

    def feed(self, data):
        self.buffer += data
        self.arrived.set()

    async def read_bytes(self, number, partial=False):
        while len(self.buffer) < (1 if partial else number):
            if self.closed:
                raise StreamClosedError
            self.arrived.clear()
            await self.arrived.wait()
        taken = bytes(self.buffer[:number])
        del self.buffer[:number]
        return taken

    async def start_tls(self, server_side, ssl_options, server_hostname):
        self.tls = server_side, ssl_options, server_hostname
        if isinstance(ssl_options, Exception):
            raise ssl_options
        self.answer('TLS')
        return self

    def close(self):
        self.closed = True
        self.arrived.set()
        self.socket.close()
        self.peer.close()


def frame(kind, data):
    """A frame as nsqd sends it."""
    return (len(data) + 4).to_bytes(4, 'big') + kind.to_bytes(4, 'big') + data


def message_frame(id, body=b'{}', attempts=1, timestamp=1):
    """The frame of a message."""
    return frame(nsq.FRAME_TYPE_MESSAGE, timestamp.to_bytes(8, 'big') + attempts.to_bytes(2, 'big') + id + body)


def message(n=0, body=b'{"n": 1}', conn=None, attempts=1, now=0.0):
    """The message number `n`."""
    return xmsrv.Message(conn, b'%016d' % n, 1000 + n, attempts, body, now)


class Queue:
    """A Source whose messages the test delivers."""

    topic, channel, max_in_flight = 'orders', 'x-msrv', 2500

    def __init__(self):
        self.in_flight, self.finished, self.requeues = {}, [], []
        self.requeued = self.late = 0
        self.idle_since, self.is_exhausted, self.credit = None, False, None

    def start(self, credit, deliver):
        self.credit, self.deliver = credit, deliver

    def stop(self):
        self.credit = None

    def on_credit_change(self):
        pass

    def finish(self, messages):
        self.finished += [self.in_flight.pop(message.key).n for message in messages]

    def requeue(self, messages, delay=0):
        self.requeues += [(self.in_flight.pop(message.key).n, delay) for message in messages]
        self.requeued += len(messages)

    def set_aside(self, messages):
        pass

    def send(self, *numbers, attempts=1, body=None):
        made = [numbered(n, attempts, body, asyncio.get_running_loop().time()) for n in numbers]
        self.in_flight.update((message.key, message) for message in made)
        self.deliver(made)


class Numbered(xmsrv.Message):
    __slots__ = ('n',)


def numbered(n, attempts=1, body=None, now=0.0):
    message = Numbered(None, b'%016d' % n, n, attempts, body or json.dumps({'n': n}).encode(), now)
    message.n = n
    return message


def mapped(value, **sections):
    """The Record that a Mapper of these sections makes of a message: of its body, or of a value for it."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return xmsrv.Mapper(options(**sections)).build_record(message(7, body))


def bins_of(value, fields=(), unknown='keep', nulls='omit', **record):
    """The bins of such a record, without id-bin."""
    sections = {'fields': dict(fields), 'unknown-fields': unknown, 'nulls': nulls}
    return mapped(value, message=sections, record={'id-bin': '', **record}).bins


def refused(value, *args, **options):
    """(reason, detail) of the message that bins_of() can make nothing of."""
    with pytest.raises(xmsrv.InvalidMessage) as caught:
        bins_of(value, *args, **options)
    return caught.value.reason, caught.value.detail


@contextlib.contextmanager
def sqlite_store(directory, **sections):
    """An open SqliteStore whose file is in `directory`."""
    store = xmsrv.SqliteStore(options(store='sqlite', state_dir=str(directory), **sections))
    store.open()
    yield store
    store.close()


def stored(directory):
    """{key: bins} of the records of such a store."""
    return {key: bins for (_, key), bins in stored_in_sets(directory).items()}


def stored_in_sets(directory):
    """{(set, key): bins} of the records of such a store."""
    with contextlib.closing(sqlite3.connect(directory / 'records.sqlite')) as database:
        return {(set_, key): json.loads(bins) for set_, key, bins in
                database.execute('SELECT "set", key, bins FROM records')}


def record_system_calls(monkeypatch, *names):
    """A list to which each call of os.NAME adds (name, path): the path is that of the first argument."""
    calls = []

    def recorded(name, call):
        def wrapper(first, *more, **options):
            where = os.readlink(f'/proc/self/fd/{first}') if isinstance(first, int) else str(first)
            calls.append((name, where))
            return call(first, *more, **options)
        return wrapper
    for name in names:
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    return calls
