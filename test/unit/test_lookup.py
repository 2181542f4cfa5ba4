"""nsqlookupd is asked every few seconds: a line tells of an answer that is another than the last one."""
import asyncio
import logging
import types

import pytest

import xmsrv

FIRST, SECOND = ('127.0.0.1', 4161), ('127.0.0.1', 4171)
NSQD = {('127.0.0.1', 4150): 4151}
DOWN = 'nsqlookupd 127.0.0.1:4171: Connection refused'
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
    ([({}, {}), ({}, {SECOND: 'Connection refused'})], [('WARNING', UNKNOWN), ('WARNING', f'{DOWN}; {UNKNOWN}')]),
], ids=['all is well', 'no topic', 'one is down', 'in between all was well', 'another answer'])
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
    assert [level for level, _ in lines] == ['WARNING', 'DEBUG']
    assert lines[0][1].endswith('going on with the nsqds that are known')
