"""The batcher and its breaker, in front of a store that is a function, by a clock of its own."""
import asyncio
import contextlib
import itertools
import logging
import threading
import types

import pytest

import clock
from xmsrv import (
    STORED,
    BackgroundTasks,
    Batcher,
    Breaker,
    BreakerState,
    Health,
    StoreExecutor,
    WriteResult,
    close_store,
    log,
)

AWAY = WriteResult('retry', -15, 'no answer')
BUSY = WriteResult('busy', 14, 'the record is busy')


class Store:
    """Answers as `answer(batch)` says, and keeps (time, batch) of each call."""

    def __init__(self, answer, seconds=0.01):
        self.answer, self.seconds, self.calls, self.under_way, self.most = answer, seconds, [], 0, 0

    async def write(self, messages):
        loop = asyncio.get_running_loop()
        self.calls.append((loop.time(), [message.n for message in messages]))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.seconds)
        self.under_way -= 1
        answer = self.answer([message.n for message in messages], loop.time())
        return answer if isinstance(answer, list) else [answer] * len(messages)


def message(n, size=10):
    return types.SimpleNamespace(n=n, body=b'x' * size)


def run(store, numbers, seconds, size=4, writers=2, most=1 << 20, more=()):
    """What becomes of messages in so many seconds: (n -> outcome, batcher). more: (second, numbers) that come later."""
    settled = {}

    def settle(messages, results):
        again = []
        for each, result in zip(messages, results, strict=True):
            if result.outcome in ('retry', 'busy'):
                again.append(each)
            else:
                settled[each.n] = result.outcome
        return again

    async def main():
        tasks = BackgroundTasks()
        batcher = Batcher('store', tasks, Health(), store.write, settle, (size, most), writers, 2)
        batcher.add_messages([message(n) for n in numbers])
        loop, begun = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        for second, later in more:
            await asyncio.sleep(begun + second - loop.time())
            batcher.add_messages([message(n) for n in later])
        await asyncio.sleep(begun + seconds - loop.time())
        assert not tasks.error
        await tasks.cancel()
        return settled, batcher
    return clock.run(main())


def test_a_lone_message_goes_at_once_and_full_batches_by_as_many_writers():
    store = Store(lambda batch, now: STORED)
    settled, _ = run(store, range(10), 1)
    assert settled == dict.fromkeys(range(10), 'stored')
    assert [batch for _, batch in store.calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert store.most == 2
    store = Store(lambda batch, now: STORED)
    assert run(store, [7], 1)[0] == {7: 'stored'}
    assert store.calls == [(1000.0, [7])]


def test_a_batch_has_a_limit_of_bytes_and_one_message_may_exceed_it():
    store = Store(lambda batch, now: STORED)
    run(store, range(3), 1, most=15)
    assert [batch for _, batch in store.calls] == [[0], [1], [2]]
    store = Store(lambda batch, now: STORED)
    run(store, range(3), 1, most=5)
    assert [batch for _, batch in store.calls] == [[0], [1], [2]]


def test_in_an_outage_one_batch_at_a_time_probes_with_growing_delays_and_all_are_stored_after_it():
    end = 1060
    store = Store(lambda batch, now: AWAY if now < end else STORED)
    settled, batcher = run(store, range(40), 90, writers=4)
    assert settled == dict.fromkeys(range(40), 'stored')
    assert batcher.breaker.state is BreakerState.CLOSED
    probes = [at for at, _ in store.calls if at < end][4:]
    delays = [b - a for a, b in zip(probes, probes[1:], strict=False)]
    assert all(b - a >= 0.05 for a, b in zip(probes, probes[1:], strict=False))
    assert 2.4 <= max(delays) <= 5.1 and len(probes) < 35
    assert sorted(n for _, batch in store.calls for n in batch if _ >= end - 0.01) >= list(range(40))


def test_one_message_that_fails_its_whole_batch_ends_up_alone_and_holds_up_nobody():
    store = Store(lambda batch, now: AWAY if 5 in batch else STORED)
    settled, batcher = run(store, range(8), 60, size=8, more=[(second, [100 + second]) for second in range(1, 50)])
    assert settled.pop(5) == 'blamed'
    assert settled == dict.fromkeys([*range(5), 6, 7, *range(101, 150)], 'stored')
    assert not batcher.is_failing
    late = [at for at, batch in store.calls if batch[0] > 100]
    assert max(at - 1000 - int(at - 1000 + 0.001) for at in late) < 6


def test_a_message_that_fails_its_batch_alone_in_a_quiet_topic_is_halved_out_too():
    store = Store(lambda batch, now: AWAY if 5 in batch else STORED)
    settled, _ = run(store, range(8), 60, size=8)
    assert settled.pop(5) == 'blamed'
    assert settled == dict.fromkeys([0, 1, 2, 3, 4, 6, 7], 'stored')


def test_nothing_is_blamed_for_an_outage_of_any_length():
    store = Store(lambda batch, now: AWAY)
    settled, batcher = run(store, range(20), 3600)
    assert settled == {}
    assert batcher.is_failing


def test_a_busy_record_is_no_outage_and_is_tried_again_by_itself():
    store = Store(lambda batch, now: [BUSY if n == 3 and now < 1002 else STORED for n in batch])
    settled, batcher = run(store, range(8), 10, more=[(0.5, range(20, 40))])
    assert settled == dict.fromkeys([*range(8), *range(20, 40)], 'stored')
    assert batcher.health.errors == {}
    assert [batch for _, batch in store.calls if 3 in batch][1:] == [[3]] * (len(
        [batch for _, batch in store.calls if 3 in batch]) - 1)


def test_a_lone_busy_record_does_not_open_the_breaker():
    store = Store(lambda batch, now: BUSY)
    _, batcher = run(store, [1], 5)
    assert batcher.breaker.state is BreakerState.CLOSED and 3 < len(store.calls) < 10


@pytest.mark.parametrize('kept', [True, False])
def test_health_fails_with_the_breaker_and_recovers_with_it(kept):
    store = Store(lambda batch, now: AWAY if not kept or now < 1001 else STORED)
    _, batcher = run(store, [1], 10)
    assert batcher.health.is_up('store') is kept
    assert batcher.health.failures == ({} if kept else {'store': 'no answer'})


def test_an_outage_with_another_answer_is_a_line_again_and_the_same_answer_of_another_node_is_none(monkeypatch, caplog):
    """First the cluster is away; then it is back, and refuses the log-in."""
    monkeypatch.setattr(log, 'propagate', True)
    caplog.set_level(logging.INFO, 'x-msrv')
    answers = itertools.chain([WriteResult('retry', -15, f'no answer of node {n}') for n in range(3)],
                              itertools.repeat(WriteResult('retry', 80, 'not authenticated')))
    _, batcher = run(Store(lambda batch, now: next(answers)), [1], 20)
    assert batcher.health.errors['store'].text == 'not authenticated'
    assert [record.getMessage().split(':')[0] for record in caplog.records] == [
        'store unavailable (no answer of node 0)', 'store unavailable (not authenticated)']


def test_an_outage_without_a_code_is_a_line_again_where_its_text_is_another(monkeypatch, caplog):
    """First the file of dead letters has no room, then its directory is gone."""
    monkeypatch.setattr(log, 'propagate', True)
    caplog.set_level(logging.INFO, 'x-msrv')
    texts = itertools.chain(['no space'] * 3, itertools.repeat('no such file'))
    run(Store(lambda batch, now: WriteResult('retry', 'away', next(texts))), [1], 20)
    assert [record.getMessage().split(':')[0] for record in caplog.records] == [
        'store unavailable (no space)', 'store unavailable (no such file)']


def test_breaker_goes_from_closed_to_open_to_half_open_and_back():
    breaker = Breaker()
    assert breaker.state is BreakerState.CLOSED
    assert 0.05 <= breaker.on_failure() <= 0.1 and breaker.state is BreakerState.OPEN
    breaker.on_delay_over()
    assert breaker.state is BreakerState.HALF_OPEN
    assert 0.1 <= breaker.on_failure() <= 0.2 and breaker.state is BreakerState.OPEN
    breaker.on_success()
    assert breaker.state is BreakerState.CLOSED
    breaker.on_delay_over()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.on_failure() <= 0.1
    assert max(breaker.on_failure() for _ in range(50)) <= 5


def test_a_call_under_way_leaves_the_store_open_and_holds_up_nobody():
    closed, hang = [], threading.Event()

    async def main(busy):
        executor = StoreExecutor(2)    # so there is a thread in which it could be closed
        if busy:
            executor.submit(hang.wait, 20)
        await close_store(types.SimpleNamespace(close=lambda: closed.append(busy)), executor)
        hang.set()
        with pytest.raises(RuntimeError):
            executor.submit(print)    # it is shut down
    for busy in (True, False):
        asyncio.run(asyncio.wait_for(main(busy), 10))
    assert closed == [False]


def test_the_first_background_task_that_fails_is_the_error_and_a_cancelled_one_is_none():
    async def fails(seconds, error):
        await asyncio.sleep(seconds)
        raise error

    async def main():
        tasks = BackgroundTasks()
        sleeping = tasks.start(asyncio.sleep(100))
        done = tasks.start(asyncio.sleep(1))
        await done
        await asyncio.sleep(0)
        assert tasks.wake.is_set() and tasks.error is None and tasks.tasks == {sleeping}
        sleeping.cancel()
        await asyncio.sleep(1)
        assert tasks.error is None
        for error in (ZeroDivisionError(), KeyError()):
            tasks.start(fails(1, error))
            await asyncio.sleep(2)
        assert isinstance(tasks.error, ZeroDivisionError)
        tasks.start(asyncio.sleep(100))
        await tasks.cancel()
        assert tasks.tasks == set()
    clock.run(main())


def test_tasks_that_lose_a_cancellation_are_cancelled_again():
    async def stubborn():
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)

    async def main():
        tasks = BackgroundTasks()
        tasks.start(stubborn())
        await asyncio.sleep(1)
        await asyncio.wait_for(tasks.cancel(), 10)
        assert tasks.tasks == set()
    clock.run(main())


def test_a_batch_that_is_not_full_waits_for_the_one_under_way():
    store = Store(lambda batch, now: STORED, seconds=1)
    run(store, range(5), 5, more=[(0.5, [5, 6])])
    assert store.calls == [(1000.0, [0, 1, 2, 3]), (1001.0, [4, 5, 6])]
    store = Store(lambda batch, now: STORED, seconds=1)
    run(store, range(5), 5, more=[(0.5, [5, 6, 7])])
    assert store.calls == [(1000.0, [0, 1, 2, 3]), (1000.5, [4, 5, 6, 7])]


def test_all_that_is_pending_goes_in_one_batch_where_it_fits():
    for number, size, batches in ((4, 10, [4]), (5, 10, [4, 1]), (4, 300, [3, 1]), (3, 333, [3])):
        store = Store(lambda batch, now: STORED)

        async def main(number=number, size=size, store=store):
            tasks = BackgroundTasks()
            batcher = Batcher('store', tasks, Health(), store.write, lambda *_: (), (4, 1000), 1, 2)
            batcher.add_messages([message(n, size) for n in range(number)])
            await asyncio.sleep(1)
            assert (batcher.pending_bytes, len(batcher.pending), batcher.is_at_rest) == (0, 0, True)
            await tasks.cancel()
        clock.run(main())
        assert [len(batch) for _, batch in store.calls] == batches


def test_what_some_batches_failed_with_while_others_were_accepted_is_no_outage_of_all():
    """A batch that is to blame is tried three times, halved, and down to its one message, in a few seconds."""
    store = Store(lambda batch, now: AWAY if 3 in batch else STORED)
    settled, batcher = run(store, range(4), 30, more=[(0.05 * n, [100 + n]) for n in range(1, 100)])
    assert settled[3] == 'blamed' and len(settled) == 103
    assert batcher.breaker.state is BreakerState.CLOSED and batcher.health.is_up('store')
    tries = [at - 1000 for at, batch in store.calls if 3 in batch]
    assert 4 <= len(tries) <= 6 and tries[-1] < 5


def test_new_messages_probe_as_well_as_old_batches():
    """Else a batch that can't succeed would be the only probe, and the store would never be seen to be back."""
    store = Store(lambda batch, now: AWAY if 0 in batch or now < 1003 else STORED)
    settled, _ = run(store, [0], 12, size=1, writers=1, more=[(0.5, range(1, 9))])
    assert {n for n in settled if n} == set(range(1, 9))
    assert min(at for at, batch in store.calls if batch[0] in range(1, 9)) < 1003
