"""nsqlookupd is asked every few seconds: a line tells of an answer that is another than the last one."""
import asyncio
import json
import logging
import math
import types

import pytest
from tornado.httpclient import HTTPError

import clock
import fakes
import xmsrv

FIRST, SECOND = 'http://127.0.0.1:4161', 'http://127.0.0.1:4171'
NSQD = {('127.0.0.1', 4150): 4151}
DOWN = 'nsqlookupd 127.0.0.1:4171: Connection refused'
BACK = 'nsqlookupd 127.0.0.1:4171 is back'
FIRST_DOWN = 'nsqlookupd 127.0.0.1:4161: no'
NONE = 'no nsqlookupd can be reached: 127.0.0.1:4161: no; 127.0.0.1:4171: no'
UNKNOWN = 'no nsqd has the topic orders yet'


@pytest.fixture
def lines():
    """The warnings and debug lines, as (level, text)."""
    handler, found = logging.Handler(), []
    handler.emit = lambda record: found.append((record.levelname, record.getMessage()))
    xmsrv.log.addHandler(handler)
    xmsrv.log.setLevel(logging.DEBUG)
    yield found
    xmsrv.log.removeHandler(handler)
    xmsrv.log.setLevel(logging.NOTSET)


@pytest.mark.parametrize(('answers', 'expected'), [
    ([(NSQD, {})] * 2, []),
    ([({}, {})] * 3, [('WARNING', UNKNOWN), ('DEBUG', UNKNOWN), ('DEBUG', UNKNOWN)]),
    ([(NSQD, {SECOND: 'Connection refused'})] * 2, [('WARNING', DOWN), ('DEBUG', DOWN)]),
    ([({}, {}), (NSQD, {}), ({}, {})], [('WARNING', UNKNOWN), ('WARNING', UNKNOWN)]),
    ([(NSQD, {SECOND: 'Connection refused'}), (NSQD, {}), (NSQD, {})], [('WARNING', DOWN), ('INFO', BACK)]),
    ([({}, {FIRST: 'no', SECOND: 'no'}), (NSQD, {FIRST: 'no'}), (NSQD, {FIRST: 'no'})],
     [('WARNING', f'{NONE}; keeping the known nsqds'), ('INFO', BACK), ('WARNING', FIRST_DOWN), ('DEBUG', FIRST_DOWN)]),
    ([({}, {}), ({}, {SECOND: 'Connection refused'})], [('WARNING', UNKNOWN), ('WARNING', f'{DOWN}; {UNKNOWN}')]),
], ids=['all is well', 'no topic', 'one is down', 'in between all was well', 'one is back',
        'one of two is back', 'another answer'])
def test_the_same_answer_is_said_once(monkeypatch, lines, answers, expected):
    given = iter(answers)

    async def look_up(*arguments):
        return next(given)
    monkeypatch.setattr(xmsrv, 'look_up', look_up)
    config = types.SimpleNamespace(nsq=types.SimpleNamespace(
        nsqd_tcp_address=[], lookupd_http_address=[FIRST, SECOND]))

    async def ask():
        poller = xmsrv.LookupPoller(config, 'orders', types.SimpleNamespace(update_nsqds=lambda found: None))
        for _ in answers:
            await poller.look_up()
    asyncio.run(ask())
    assert lines == expected


def test_no_nsqlookupd_that_answers_is_said_once_as_well(monkeypatch, lines):
    async def look_up(*arguments):
        return {}, {FIRST: 'no answer'}
    monkeypatch.setattr(xmsrv, 'look_up', look_up)
    config = types.SimpleNamespace(nsq=types.SimpleNamespace(nsqd_tcp_address=[], lookupd_http_address=[FIRST]))

    async def ask():
        poller = xmsrv.LookupPoller(config, 'orders', types.SimpleNamespace(update_nsqds=None))
        await poller.look_up()
        await poller.look_up()
    asyncio.run(ask())
    line = 'no nsqlookupd can be reached: 127.0.0.1:4161: no answer; keeping the known nsqds'
    assert lines == [('WARNING', line), ('DEBUG', line)]


# -- what nsqlookupd and nsqd say over HTTP

class Client:
    """An HTTP client: answers each URL after so many seconds. answers: a part of the URL -> (seconds, body), where a
    body is bytes, or what is raised."""

    def __init__(self, **answers):
        self.answers, self.urls, self.closed = answers, [], False

    async def fetch(self, url, **timeouts):
        assert timeouts == {'connect_timeout': 3.0, 'request_timeout': 3.0}
        self.urls.append(url)
        seconds, body = next(answer for part, answer in self.answers.items() if part.replace('_', '/') in url)
        await asyncio.sleep(seconds)
        if isinstance(body, Exception):
            raise body
        return types.SimpleNamespace(body=body)

    def close(self):
        self.closed = True


def producers(*ports):
    return json.dumps({'producers': [
        {'broadcast_address': '127.0.0.1', 'tcp_port': port, 'http_port': port + 1} for port in ports]}).encode()


def producer(**members):
    """The answer of an nsqlookupd that names one nsqd, with other members."""
    named = {'broadcast_address': '127.0.0.1', 'tcp_port': 4150, 'http_port': 4151, **members}
    return json.dumps({'producers': [named]}).encode()


def http_error(code, body=b''):
    return HTTPError(code, response=types.SimpleNamespace(body=body))


def asked(monkeypatch, client, patience=math.inf, topic='orders'):
    """What look_up() finds at two nsqlookupds, and how many seconds it took."""
    monkeypatch.setattr(xmsrv, 'http_client', lambda requests=1: client)
    config = fakes.options(nsq={'nsqd-tcp-address': '', 'lookupd-http-address': [FIRST, SECOND]})

    async def main():
        found, errors = await xmsrv.look_up(config, topic, patience)
        return found, errors, asyncio.get_running_loop().time() - 1000
    found, errors, seconds = clock.run(main())
    assert client.closed
    return found, errors, pytest.approx(seconds)


def test_all_nsqlookupds_are_asked_at_once_and_what_they_name_is_put_together(monkeypatch):
    client = Client(**{':4161': (1, producers(4150, 4152)), ':4171': (2, producers(4152, 4154))})
    assert asked(monkeypatch, client, topic='orders#ephemeral') == (
        {('127.0.0.1', port): port + 1 for port in (4150, 4152, 4154)}, {}, 2)
    assert client.urls == [f'http://127.0.0.1:{port}/lookup?topic=orders%23ephemeral' for port in (4161, 4171)]


@pytest.mark.parametrize(('first', 'second', 'seconds'), [
    ((1, producers(4150)), (9, producers(4152)), 1.5),          # the second gets half a second more
    ((1, producers(4150)), (1.4, producers()), 1.4),
    ((1, producers()), (9, producers(4150)), 9),                # nothing is named yet
    ((1, ConnectionRefusedError(111, 'refused')), (9, producers(4150)), 9)])
def test_once_nsqds_are_named_the_others_are_waited_for_only_a_little(monkeypatch, first, second, seconds):
    found, errors, took = asked(monkeypatch, Client(**{':4161': first, ':4171': second}), patience=0.5)
    assert (list(found), took) == ([('127.0.0.1', 4150)], seconds)
    assert errors.get(SECOND) == ('no answer yet' if seconds == 1.5 else None)


@pytest.mark.parametrize(('answer', 'error'), [
    (http_error(404, b'{"message": "TOPIC_NOT_FOUND"}'), None),
    (http_error(404, b'not found'), 'HTTP 404: Not Found; no answer of an nsqlookupd'),
    (http_error(404, b'{"message": "NOT_FOUND"}'), 'HTTP 404: Not Found; no answer of an nsqlookupd'),
    (http_error(404, b'[]'), 'HTTP 404: Not Found; no answer of an nsqlookupd'),
    (http_error(404, b'[' * 100_000), 'HTTP 404: Not Found; no answer of an nsqlookupd'),
    (HTTPError(404), 'HTTP 404: Not Found; no answer of an nsqlookupd'),
    (http_error(500, b'{"message": "TOPIC_NOT_FOUND"}'), 'HTTP 500: Internal Server Error'),
    (ConnectionRefusedError(111, 'refused'), 'refused'), (TimeoutError(), 'no answer in time'),
    *((body, f'not an answer of nsqlookupd: {rule}') for body, rule in (
        (b'', 'not JSON'), (b'x', 'not JSON'), (b'\xff', 'not JSON'), (b'[' * 100_000, 'not JSON'),
        (b'{}', 'it has no list of producers'), (b'[]', 'it has no list of producers'),
        (b'{"producers": 1}', 'it has no list of producers'), (b'1', 'it has no list of producers'),
        (b'{"producers": [1]}', 'a producer that is not an object'),
        (b'{"producers": [{}]}', 'a producer whose broadcast_address is null'),
        (producer(broadcast_address=5), 'a producer whose broadcast_address is 5'),
        (producer(broadcast_address=''), 'a producer whose broadcast_address is ""'),
        (producer(broadcast_address='a\n\x1b'), r'a producer whose broadcast_address is "a\n\u001b"'),
        (producer(tcp_port=0), 'a producer whose tcp_port is 0'),
        (producer(tcp_port=True), 'a producer whose tcp_port is true'),
        (producer(tcp_port='x'), 'a producer whose tcp_port is "x"'),
        (producer(tcp_port=[[]]), 'a producer whose tcp_port is a list'),
        (producer(tcp_port=99999), 'a producer whose tcp_port is 99999'),
        (producer(http_port={}), 'a producer whose http_port is an object'),
        (producer(http_port=None), 'a producer whose http_port is null')))])
def test_an_nsqlookupd_that_fails_is_named_with_its_fault(monkeypatch, answer, error):
    found, errors, _ = asked(monkeypatch, Client(**{':4161': (0, answer), ':4171': (0, producers(4150))}))
    assert found == NSQD
    assert errors == ({} if error is None else {FIRST: error})


def test_a_bug_is_no_fault_of_an_nsqlookupd(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        asked(monkeypatch, Client(**{':4161': (0, ZeroDivisionError()), ':4171': (0, producers(4150))}))


TOPIC = {'topic_name': 'orders', 'depth': 3, 'channels': [
    {'channel_name': 'other', 'depth': 100}, {'channel_name': 'x-msrv', 'depth': 4}]}


@pytest.mark.parametrize(('info', 'stats', 'depth'), [
    (b'{"tcp_port": 4150}', {'topics': [TOPIC]}, 7), (b'{"tcp_port": 4150}', {'topics': None}, 0),
    (b'{"tcp_port": 4150}', {'topics': [{'depth': 3, 'channels': None}]}, 3),
    (b'{"tcp_port": 4250}', {'topics': [TOPIC]}, None),      # what answers there is another one
    (b'{}', {}, None), (b'x', {}, None), (http_error(404), {}, None), (ConnectionRefusedError(), {}, None),
    (b'{"tcp_port": 4150}', {}, None)])
def test_the_depth_is_that_of_topic_and_channel_or_unknown(monkeypatch, info, stats, depth):
    client = Client(_info=(0, info), _stats=(0, json.dumps(stats).encode()))
    monkeypatch.setattr(xmsrv, 'http_client', lambda requests=1: client)
    config = types.SimpleNamespace(nsq=types.SimpleNamespace(nsqd_tcp_address=[('127.0.0.1', 4150)]))
    assert clock.run(xmsrv.total_depth(config, 'orders', 'x-msrv')) == depth
    assert client.urls[0] == 'http://127.0.0.1:4151/info' and client.closed


def test_the_depths_of_all_nsqds_add_up_by_the_ports_that_nsqlookupd_names(monkeypatch):
    async def look_up(*arguments):
        return {('127.0.0.1', 4150): 9, ('127.0.0.1', 4250): 9}, {}
    monkeypatch.setattr(xmsrv, 'look_up', look_up)
    monkeypatch.setattr(xmsrv, 'topic_stats', lambda address, port, topic: asyncio.sleep(0, {'depth': port}))
    config = types.SimpleNamespace(nsq=types.SimpleNamespace(nsqd_tcp_address=[], lookupd_http_address=[FIRST]))
    assert clock.run(xmsrv.total_depth(config, 'orders', 'x-msrv')) == 18


# -- the poller

def polled(monkeypatch, steps, answer):
    """Runs `steps(poller, times)`; answer: what nsqlookupd names, or raises. times: at which it was asked."""
    async def main():
        times, named = [], []

        async def find_nsqds(config, topic, news):
            times.append(asyncio.get_running_loop().time() - 1000)
            await asyncio.sleep(0.1)
            if isinstance(answer, Exception):
                raise answer
            return answer
        monkeypatch.setattr(xmsrv, 'find_nsqds', find_nsqds)
        poller = xmsrv.LookupPoller(None, 'orders', types.SimpleNamespace(update_nsqds=named.append))
        running = asyncio.ensure_future(poller.run())
        await steps(poller, times)
        running.cancel()
        return named
    return clock.run(main())


def test_nsqlookupd_is_asked_every_5_seconds_and_at_once_when_somebody_wants_to_know(monkeypatch):
    async def steps(poller, times):
        await asyncio.sleep(11)
        assert times == pytest.approx([5, 10.1])
        await asyncio.wait_for(poller.wait_for_answer(), 1)
        assert times[2:] == pytest.approx([11])
        await asyncio.sleep(6)
        assert times[3:] == pytest.approx([16.1])
    assert polled(monkeypatch, steps, NSQD) == [NSQD] * 4


@pytest.mark.parametrize('answer', [NSQD, xmsrv.Unavailable('gone')])
def test_who_waits_for_a_fresh_answer_gets_one_that_was_asked_for_after_that(monkeypatch, answer):
    async def steps(poller, times):
        await asyncio.sleep(5.05)                # a question is under way
        first = asyncio.ensure_future(poller.wait_for_answer())
        gone = asyncio.ensure_future(poller.wait_for_answer())
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.06)
        assert not first.done()                  # that one is answered by now
        await asyncio.wait_for(first, 1)
        assert times == pytest.approx([5, 5.1])
    polled(monkeypatch, steps, answer)


def test_the_patience_does_not_begin_anew_with_each_answer(monkeypatch):
    addresses = ['http://127.0.0.1:4161', 'http://127.0.0.1:4171', 'http://127.0.0.1:4181']
    config = fakes.options(nsq={'nsqd-tcp-address': '', 'lookupd-http-address': addresses})
    delays = dict(zip(addresses, (1.0, 1.4, 9.0), strict=True))

    async def answer(client, address, topic, options):
        await asyncio.sleep(delays[address])
        return {(address, 4150): 4151}
    monkeypatch.setattr(xmsrv, 'ask_lookupd', answer)

    async def main():
        begun = asyncio.get_running_loop().time()
        found, _ = await xmsrv.look_up(config, 'orders', 0.5)
        return len(found), asyncio.get_running_loop().time() - begun
    assert clock.run(main()) == (2, pytest.approx(1.5))
