"""Opening and closing both ends, with ends that are objects of the test, by a clock of its own."""
import asyncio
import contextlib
import os
import signal
import time
import types

import pytest

import clock
import fakes
import xmsrv
from xmsrv import (
    End,
    Health,
    Metrics,
    SignalHandler,
    Store,
    StoreError,
    StoreUnavailable,
    Window,
    WindowLimits,
    open_pipeline,
    run_once,
)


class SlowQueue:
    """A Source that takes a second to close, and has a task in the background."""

    in_flight = ()

    def __init__(self, tasks, opens):
        self.tasks, self.opens, self.closing, self.closed = tasks, opens, asyncio.Event(), False

    async def open(self):
        self.tasks.start(asyncio.sleep(1000))
        if not self.opens:
            await asyncio.sleep(1000)

    def stop(self):
        pass

    async def close(self):
        self.closing.set()
        await asyncio.sleep(1)
        self.closed = True


@pytest.mark.parametrize('opens', [True, False], ids=['once it is open', 'while it opens'])
def test_what_is_told_to_end_while_it_closes_is_closed_all_the_same(opens):
    # A reload in an outage, and at once another one, or SIGTERM: what is left open would go on beside its successor.
    async def use(queues):
        def new_queue(tasks):
            queues.append(SlowQueue(tasks, opens))
            return queues[0]
        async with open_pipeline(None, Store(), new_queue, Metrics(), Health()):
            await asyncio.sleep(1000)

    async def main():
        queues = []
        task = asyncio.ensure_future(use(queues))
        await asyncio.sleep(10)
        task.cancel()
        await queues[0].closing.wait()
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return queues[0].closed, queues[0].tasks.tasks

    assert clock.run(main()) == (True, set())


class FailingStore(Store):
    """A Store that can't be opened."""

    def open(self):
        raise StoreError('no such host')


def test_a_store_that_cannot_be_opened_is_away_before_any_queue_is_asked():
    class Queue(SlowQueue):
        async def open(self):
            raise AssertionError('the store comes first')

    async def main():
        with pytest.raises(StoreUnavailable, match='no such host'):
            async with open_pipeline(None, FailingStore(), lambda tasks: Queue(tasks, True), Metrics(), Health()):
                raise AssertionError('it is open')
    clock.run(main())


# -- once

class Source(fakes.Queue):
    """A source that is always open, to which five messages come."""

    connections, addresses = (), ()

    async def open(self):
        pass

    async def close(self):
        self.exhausted = True

    def on_credit_change(self):
        if self.credit and not self.finished and not self.in_flight and self.credit() > 0:
            self.send(*range(5))
            self.idle_since = asyncio.get_running_loop().time()


class ListStore(Store):
    """A Store whose records are a list."""

    def __init__(self, config):
        self.records = []
        stores.append(self)

    def open(self):
        pass

    def write(self, records):
        self.records += records
        return [xmsrv.STORED] * len(records)


stores = []


def ran(monkeypatch, stopper=None, **sections):
    """Runs `once` on such a source and store. Returns (exit status, store, source, what systemd was told)."""
    stores.clear()
    told, sources = [], []
    config = fakes.options(timeout='60s', idle_timeout='50ms', **sections)

    def pipeline(config, store, figures, health):
        def new_source(tasks):
            sources.append(Source())

            async def tick():
                while True:
                    tasks.wake.set()
                    await asyncio.sleep(0.01)
            tasks.start(tick())
            return sources[0]
        return open_pipeline(config, store, new_source, figures, health)
    monkeypatch.setitem(xmsrv.STORES, 'aerospike', ListStore)
    monkeypatch.setattr(xmsrv, 'topic_pipeline', pipeline)
    monkeypatch.setattr(xmsrv.SystemdNotifier, 'send_fields', lambda notifier, **fields: told.append(fields))
    metrics = Metrics()
    status = asyncio.run(run_once(config, stopper or types.SimpleNamespace(window=None), metrics))
    return status, stores[0], sources[0], told, metrics


def test_once_is_one_window_and_its_figures(monkeypatch):
    status, store, source, told, metrics = ran(monkeypatch)
    assert (status, len(store.records), sorted(source.finished)) == (0, 5, [0, 1, 2, 3, 4])
    total = xmsrv.merge_metrics([metrics.take_snapshot()])
    assert total.value_of('xmsrv_messages_total', 'stored') == 5
    assert all(total.value_of(name) == 1 for name in xmsrv.UP_METRICS.values())
    # what systemd may wait: each step of the handshake, the window, a call of the store, and some more
    assert told == [{'EXTEND_TIMEOUT_USEC': int((8 * 5 + 60 + 5 + 5) * 1e6)}]


def test_once_takes_at_most_n(monkeypatch):
    status, store, source, _, _ = ran(monkeypatch, nsq={'max-messages': '3'})
    assert (status, len(store.records), sorted(source.finished), source.requeues) == (0, 3, [0, 1, 2], [(3, 0), (4, 0)])


def test_a_signal_ends_what_runs_and_what_is_opened():
    async def main():
        queue, ended = fakes.Queue(), []
        stopper = SignalHandler()
        window = Window(types.SimpleNamespace(
            config=fakes.options(), source=queue, tasks=xmsrv.BackgroundTasks(), metrics=Metrics(), health=Health(),
                                              write=None,
            sink=None, store=Store()), WindowLimits(0, 1, 1), None)
        stopper.window = window
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
        assert window.end_reason is End.SIGNAL
        stopper.window = types.SimpleNamespace(stop=lambda: ended.append('stopped'))
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.01)
        assert ended == ['stopped']
        stopper.window = None
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(10)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
    begun = time.monotonic()
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
    assert time.monotonic() - begun < 9    # the signal ended the wait of 10 s


@pytest.mark.parametrize(('closed', 'faults'), [
    (None, []), ('state', ['state-dir = {}/state: not writable']),
    ('letters', ['[dead-letter] file = {}/letters/dead: not writable']),
    ('letters/dead', ['[dead-letter] file = {}/letters/dead: not writable']),
    ('figures', ['[metrics] textfile = {}/figures/x.prom: not writable']), ('figures/x.prom', [])])
def test_a_path_that_a_run_cannot_write_to_is_a_fault(tmp_path, monkeypatch, closed, faults):
    """Root may write anywhere, so that is only said. The textfile is replaced by a new one each time."""
    for name in 'state', 'letters', 'figures':
        (tmp_path / name).mkdir()
    (tmp_path / 'figures' / 'x.prom').touch()
    if closed == 'letters/dead':
        (tmp_path / closed).touch()
    config = fakes.options(state_dir=str(tmp_path / 'state'), dead_letter={'file': str(tmp_path / 'letters' / 'dead')},
                           metrics={'textfile': str(tmp_path / 'figures' / 'x.prom')})
    monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != str(tmp_path / closed) if closed else True)
    assert [str(fault) for fault in xmsrv.unwritable_paths(config)] == [fault.format(tmp_path) for fault in faults]
