"""A window between a source and a store that are objects of the test, by a clock of its own."""
import asyncio
import itertools
import json
import math
import sys
import types

import pytest

import clock
import fakes
from fakes import Queue, numbered
from xmsrv import (
    DEAD,
    MAX_LONE_FAILURES,
    STORED,
    BackgroundTasks,
    DecodeQueue,
    End,
    FailedMessages,
    Health,
    Mapper,
    Metrics,
    Window,
    WindowLimits,
    WindowState,
    WriteResult,
    decoded_size,
)

LETTERS_AWAY = WriteResult('unkept', 'away', 'nsqd is away')
AWAY, STOP = WriteResult('retry', -15, 'no answer'), WriteResult('stop', 20, 'no such namespace')
UNDECIDED = WriteResult('undecided', 4, 'answer 4 ParamError')
UNKEPT = WriteResult('unkept', 'refused', 'nsqd: E_BAD_MESSAGE')
SET_FULL = WriteResult('set-full', 22, 'the set full has reached its limit')


def config(**more):
    return fakes.options(nsq={'max-held': str(more.get('max_held', 1 << 20))})


def window_of(steps, limits=(0, 10.0, 0.5), write=lambda numbers, now: STORED, keep=DEAD, **more):
    """Runs a window, and `steps(window, queue)` beside it. Returns (window, queue)."""
    async def main():
        loop, queue, tasks = asyncio.get_running_loop(), Queue(), BackgroundTasks()
        options = config(**more)

        async def call(messages):
            await asyncio.sleep(0.01)
            answer = await result_of(write([message.n for message in messages], loop.time() - 1000))
            return answer if isinstance(answer, list) else [answer] * len(messages)

        async def keep_all(messages):
            return [await result_of(keep(loop.time() - 1000) if callable(keep) else keep)] * len(messages)
        pipeline = types.SimpleNamespace(
            config=options, source=queue, tasks=tasks, metrics=Metrics(), health=Health(), write=call,
            sink=types.SimpleNamespace(write_dead_letters=keep_all),
            store=types.SimpleNamespace(batch_size=4, writers=2, call_timeout=2.0))

        async def tick():
            while True:
                tasks.wake.set()
                await asyncio.sleep(0.025)
        window = Window(pipeline, WindowLimits(*limits), Mapper(options))
        running = asyncio.ensure_future(window.run())
        ticking = asyncio.ensure_future(tick())
        await asyncio.sleep(0)
        await steps(window, queue)
        await asyncio.wait_for(running, 1000)
        ticking.cancel()
        await tasks.cancel()
        return window, queue
    return clock.run(main())


async def result_of(answer):
    """An answer, or what a coroutine returns at last."""
    return await answer if asyncio.iscoroutine(answer) else answer


async def wait_for(condition, seconds=100):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def no_steps(window, queue):
    queue.idle_since = asyncio.get_running_loop().time()


def sent(*numbers, idle=True, **more):
    async def steps(window, queue):
        queue.send(*numbers, **more)
        await asyncio.sleep(0.5)
        queue.idle_since = asyncio.get_running_loop().time() if idle else None
    return steps


def test_an_idle_window_ends_after_its_idle_timeout():
    window, _ = window_of(no_steps)
    assert (window.end_reason, window.exit_status, window.state) == (End.IDLE, 0, WindowState.CLOSED)
    assert 0.5 <= window.times.seconds < 0.7


def test_a_window_that_is_never_idle_ends_by_its_timeout():
    window, queue = window_of(sent(1, 2, idle=False))
    assert (window.end_reason, window.count['stored'], sorted(queue.finished)) == (End.TIMEOUT, 2, [1, 2])
    assert 10 <= window.times.seconds < 10.2


def test_a_full_window_ends_at_once_and_requeues_what_is_beyond():
    window, queue = window_of(sent(*range(7)), limits=(5, 10.0, 0.5))
    assert window.end_reason is End.FULL
    assert (window.count['received'], window.count['stored']) == (7, 5)
    assert (sorted(queue.finished), queue.requeues) == ([0, 1, 2, 3, 4], [(5, 0), (6, 0)])
    assert window.times.seconds < 0.2


def test_what_is_beyond_is_kept_for_the_next_window_where_there_is_one():
    window, queue = window_of(sent(*range(7)), limits=(5, 10.0, 0.5, True))
    assert (window.count['received'], window.count['stored'], queue.requeues) == (5, 5, [])
    assert [message.n for message in queue.in_flight.values()] == [5, 6]


@pytest.mark.parametrize('reason', [End.SIGNAL, End.RELOAD])
def test_a_signal_requeues_what_is_pending_and_a_reload_writes_it(reason):
    async def steps(window, queue):
        queue.send(*range(20))
        window.end(reason)
    window, queue = window_of(steps)
    stored = 8 if reason is End.SIGNAL else 20    # two batches of four were under way
    assert (window.end_reason, window.exit_status, len(queue.finished)) == (reason, 0, stored)
    assert len(queue.requeues) == 20 - stored and {delay for _, delay in queue.requeues} <= {0}


def test_the_first_reason_stays_but_for_one_that_does_not_drain():
    async def steps(window, queue):
        window.end(End.IDLE)
        window.end(End.TIMEOUT)
        assert (window.end_reason, window.credit(), window.messages_left > 0) == (End.IDLE, 0, True)
        window.end(End.SIGNAL)
        window.end(End.STORE_FAILED, 'gone')
    window, _ = window_of(steps)
    assert (window.end_reason, window.detail, window.exit_status) == (End.SIGNAL, '', 0)


def test_a_store_that_takes_nothing_ends_the_window_and_all_is_requeued():
    window, queue = window_of(sent(*range(6)), write=lambda numbers, now: STOP)
    assert (window.end_reason, window.detail, window.exit_status) == (End.STORE_FAILED, 'no such namespace', 75)
    assert (queue.finished, len(queue.requeues)) == ([], 6)


def test_an_outage_to_the_end_requeues_all_and_names_the_last_answer():
    window, queue = window_of(sent(*range(6)), write=lambda numbers, now: AWAY)
    assert (window.end_reason, window.exit_status) == (End.STORE_FAILED, 75)
    assert 'out of time' in window.detail and 'last answer: no answer' in window.detail
    assert (queue.finished, len(queue.requeues)) == ([], 6)


def test_a_full_window_waits_for_a_store_that_is_away_for_a_while():
    window, queue = window_of(sent(*range(4)), (4, 10.0, 0.5), write=lambda numbers, now: AWAY if now < 3 else STORED)
    assert (window.end_reason, sorted(queue.finished), queue.requeues) == (End.FULL, [0, 1, 2, 3], [])


def test_a_call_that_never_comes_back_does_not_hold_the_window():
    window, queue = window_of(sent(1), write=lambda numbers, now: asyncio.sleep(1e6))
    assert (window.end_reason, window.exit_status, queue.requeues) == (End.STORE_FAILED, 75, [(1, 0)])
    assert 'has not come back in 2.5 s' in window.detail and window.times.seconds < 13
    assert window.pipeline.health.failures == {'store': 'a call has not come back in 2.5 s'}


def test_a_call_that_hangs_in_a_window_without_end_is_a_failure_until_the_next_one_succeeds():
    async def steps(window, queue):
        health = window.pipeline.health
        queue.send(1)
        await asyncio.sleep(3.9)
        assert health.is_up('store')
        await wait_for(lambda: not health.is_up('store'))
        assert health.failures == {'store': 'a call has not come back in 4.0 s'}
        await wait_for(lambda: health.is_up('store'))
        assert queue.finished == [1]
        window.end(End.RELOAD)

    async def come_back_late():
        await asyncio.sleep(20)
        return STORED
    window_of(steps, (0, math.inf, math.inf, True), write=lambda numbers, now: come_back_late())


def test_a_call_that_hangs_beside_others_that_succeed_is_no_failure_of_the_store():
    async def steps(window, queue):
        health = window.pipeline.health
        queue.send(0)
        for second in range(20):
            queue.send(*range(4 * second + 1, 4 * second + 5))   # a full batch does not wait for the first one
            await wait_for(lambda number=4 * second + 4: len(queue.finished) == number)
            await asyncio.sleep(1)
            assert health.is_up('store')
        await wait_for(lambda: not health.is_up('store'))
        window.end(End.RELOAD)
    window_of(steps, (0, math.inf, math.inf, True),
              write=lambda numbers, now: asyncio.sleep(1e6) if 0 in numbers else STORED)


def test_a_dead_letter_that_never_comes_back_is_a_failure_of_their_keeper():
    window, queue = window_of(sent(1, body=b'[]'), keep=lambda now: asyncio.sleep(1e6))
    assert (window.end_reason, queue.requeues) == (End.DEAD_LETTERS_FAILED, [(1, 0)])
    assert list(window.pipeline.health.failures) == ['dead letters']


def test_a_call_that_never_comes_back_is_no_outage_where_a_signal_ends_the_window():
    async def steps(window, queue):
        queue.send(1)
        await asyncio.sleep(1)
        window.end(End.SIGNAL)
    window, queue = window_of(steps, write=lambda numbers, now: asyncio.sleep(1e6))
    assert (window.end_reason, window.exit_status, queue.requeues) == (End.SIGNAL, 0, [(1, 0)])
    assert window.pipeline.health.failures == {}


@pytest.mark.parametrize('other', [WriteResult('busy', 14, 'answer 14'), AWAY])
def test_what_is_tried_again_beside_what_is_undecided_is_stored(other):
    tries = []

    def write(numbers, now):
        tries.append(numbers)
        return [UNDECIDED if n == 1 else other if len(tries) == 1 else STORED for n in numbers]

    async def steps(window, queue):
        queue.send(1, 2)
        await wait_for(lambda: queue.finished == [2])
        assert (queue.requeues, window.pending_count) == ([(1, 1)], 0)
        window.end(End.RELOAD)
    window_of(steps, (0, math.inf, math.inf, True), write=write)


def test_a_letter_whose_nsqd_is_away_is_tried_for_its_time_beside_others_that_are_kept():
    async def steps(window, queue):
        async def keep(messages):
            await asyncio.sleep(0.005)
            return [LETTERS_AWAY if message.n == 99 else DEAD for message in messages]
        window.dead_letter_batcher.write = keep
        begun, numbers = asyncio.get_running_loop().time(), itertools.count(100)
        queue.send(99, body=b'[]')
        while not queue.requeues:
            await asyncio.sleep(0.1)
            queue.send(next(numbers), body=b'[]')
        assert 5 <= asyncio.get_running_loop().time() - begun < 7
        window.end(End.RELOAD)
    window, queue = window_of(steps, (0, math.inf, math.inf, True))
    assert (queue.requeues, window.end_reason) == ([(99, 1)], End.DEAD_LETTERS_FAILED)


def test_records_that_are_busy_to_the_end_are_a_failure():
    window, queue = window_of(sent(1), write=lambda numbers, now: WriteResult('busy', 14, 'hot'))
    assert (window.end_reason, window.exit_status, queue.requeues) == (End.STORE_FAILED, 75, [(1, 0)])


def test_credit_is_0_in_an_outage_one_batch_for_the_probe_and_then_what_is_left():
    seen = []

    async def steps(window, queue):
        queue.send(*range(4))
        await asyncio.sleep(0.02)
        seen.append((window.store_batcher.breaker.state.value, window.credit()))
        while window.store_batcher.is_failing:
            await asyncio.sleep(0.001)
        seen.append(window.credit())
        queue.idle_since = asyncio.get_running_loop().time()
    window, queue = window_of(steps, limits=(100, 60.0, 0.5), write=lambda n, now: AWAY if now < 5 else STORED)
    assert seen == [('open', 0), 96]
    assert (window.end_reason, len(queue.finished)) == (End.IDLE, 4)


def test_a_keeper_that_is_away_for_a_moment_gets_the_time_to_come_back():
    window, queue = window_of(sent(1, body=b'[]'), keep=lambda now: LETTERS_AWAY if now < 3 else DEAD)
    assert (window.count['dead'], queue.finished, queue.requeues, window.exit_status) == (1, [1], [], 0)
    assert window.pipeline.health.is_up('dead letters')


def test_a_letter_waits_for_its_keeper_for_5_seconds_and_then_makes_room():
    when = []

    async def steps(window, queue):
        queue.send(1, body=b'[]')
        while not queue.requeues:
            await asyncio.sleep(0.1)
        when.append(asyncio.get_running_loop().time() - 1000)
        assert window.pending_count == 0
        queue.idle_since = asyncio.get_running_loop().time()
    window, queue = window_of(steps, (0, 30.0, 0.5), keep=LETTERS_AWAY)
    assert queue.requeues == [(1, 1)] and 5 <= when[0] <= 10.1
    assert (window.end_reason, window.exit_status) == (End.DEAD_LETTERS_FAILED, 75)
    assert not window.pipeline.health.is_up('dead letters')


def test_a_letter_that_comes_again_does_not_wait_for_its_keeper():
    async def steps(window, queue):
        queue.send(1, attempts=2, body=b'[]')
        await asyncio.sleep(0.1)
        assert queue.requeues == [(1, 2)]
        queue.idle_since = asyncio.get_running_loop().time()
    window_of(steps, keep=LETTERS_AWAY)


def test_good_messages_are_stored_while_the_keeper_is_away():
    async def steps(window, queue):
        queue.send(1, body=b'[]')
        await asyncio.sleep(0.5)
        queue.send(*range(10, 30))
        await asyncio.sleep(0.5)
        assert sorted(queue.finished) == list(range(10, 30))
        queue.idle_since = asyncio.get_running_loop().time()
    window_of(steps, keep=LETTERS_AWAY)


def test_a_source_that_has_ended_ends_the_window_at_once_when_all_is_settled():
    async def steps(window, queue):
        queue.send(*range(8))
        queue.is_exhausted = True
        await asyncio.sleep(0)
        assert window.end_reason is None    # they are still being written
    window, queue = window_of(steps)
    assert (window.end_reason, len(queue.finished)) == (End.IDLE, 8) and window.times.seconds < 0.2


def test_a_window_of_a_daemon_waits_though_nobody_has_the_topic_yet():
    async def steps(window, queue):
        queue.is_exhausted = True
    window, _ = window_of(steps, (0, 3.0, 10.0, True))
    assert window.end_reason is End.TIMEOUT and 3 <= window.times.seconds < 3.2


def test_what_comes_to_an_idle_window_restarts_its_idle_timeout():
    async def steps(window, queue):
        queue.idle_since = asyncio.get_running_loop().time()
        await asyncio.sleep(0.4)
        queue.idle_since = None
        queue.send(1)
        await asyncio.sleep(0.4)
        assert window.end_reason is None
        queue.idle_since = asyncio.get_running_loop().time()
    window, _ = window_of(steps)
    assert window.end_reason is End.IDLE and 1.3 <= window.times.seconds < 1.4


def test_what_crosses_the_end_of_an_open_window_is_taken():
    async def steps(window, queue):
        window.end(End.IDLE)
        queue.send(1, 2)
        await asyncio.sleep(0.5)
    window, queue = window_of(steps)
    assert (window.count['received'], sorted(queue.finished), queue.requeues) == (2, [1, 2], [])


def test_what_crosses_a_reload_is_requeued():
    async def steps(window, queue):
        queue.send(1)
        await asyncio.sleep(0.05)
        window.end(End.RELOAD)
        queue.send(2)
    window, queue = window_of(steps)
    assert (window.end_reason, queue.finished, queue.requeues) == (End.RELOAD, [1], [(2, 0)])


def test_a_store_that_takes_nothing_is_said_once_for_all_batches(caplog):
    caplog.set_level('ERROR', 'x-msrv')
    window, _ = window_of(sent(*range(8)), write=lambda numbers, now: STOP)    # two batches are under way
    assert [record.getMessage() for record in caplog.records] == [
        'no such namespace; the window ends, its messages are requeued']
    assert not window.pipeline.health.is_up('store')


def test_a_lone_refusal_names_message_and_key(caplog):
    caplog.set_level('ERROR', 'x-msrv')
    window_of(sent(7), write=lambda numbers, now: UNDECIDED)
    line, = [record.getMessage() for record in caplog.records]
    assert line.startswith("message 0000000000000007, key '0000000000000007-7-") and '4 ParamError' in line


@pytest.mark.parametrize(('steps', 'level'), [
    (no_steps, 'DEBUG'), (sent(1), 'NOTICE'), (sent(1, 2, idle=False), 'NOTICE')])
def test_the_summary_is_worth_a_notice_where_something_came(caplog, steps, level):
    caplog.set_level('DEBUG', 'x-msrv')
    window, _ = window_of(steps)
    caplog.clear()
    assert window.report_end() == 0
    record, = caplog.records
    assert (record.levelname, record.fields['outcome'], window.failed) == (level, 'done', False)
    assert record.getMessage().startswith('[orders/x-msrv] received ')


def test_a_failed_window_to_which_nothing_came_is_worth_a_notice_and_counts(caplog):
    async def steps(window, queue):
        window.end(End.STORE_FAILED, 'gone')
    caplog.set_level('DEBUG', 'x-msrv')
    window, _ = window_of(steps)
    caplog.clear()
    assert window.report_end() == 75
    assert [(record.levelname, record.getMessage()) for record in caplog.records][1:] == [
        ('ERROR', 'the window failed: gone')]
    assert caplog.records[0].levelname == 'NOTICE'


def test_an_empty_window_in_an_outage_of_the_queue_is_no_notice_each_period(caplog):
    async def steps(window, queue):
        window.end(End.QUEUE_FAILED, 'gone')
    caplog.set_level('DEBUG', 'x-msrv')
    window, _ = window_of(steps)
    caplog.clear()
    assert window.report_end() == 75
    assert [record.levelname for record in caplog.records] == ['DEBUG', 'ERROR']


def test_a_background_task_that_fails_ends_the_program():
    async def steps(window, queue):
        async def fails():
            raise ZeroDivisionError
        window.pipeline.tasks.start(fails())
    with pytest.raises(ZeroDivisionError):
        window_of(steps)


@pytest.mark.parametrize(('body', 'size'), [
    (b'x' * 511, 511 * 44), (b'x' * 512, 512), (b'[' * 600, 600 * 129), (b'{' * 600, 600 * 257),
    (b',' * 600, 600 * 73)])
def test_the_memory_that_a_message_takes_is_told_from_its_bytes(body, size):
    assert decoded_size(body) == size


@pytest.mark.parametrize('body', [
    b'[' * 60 + b']' * 60, b'[' * 250 + b']' * 250, b'[[]' + b',[]' * 100 + b']', b'{"a":' * 60 + b'1' + b'}' * 60,
    b'[1e9' + b',1e9' * 100 + b']', b'[[],{}' + b',[],{}' * 200 + b']'], ids=len)
def test_no_decoded_message_takes_more_than_that(body):
    def size_of(value):
        parts = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else ()
        return sys.getsizeof(value) + sum(map(size_of, parts))
    assert size_of(json.loads(body)) <= decoded_size(body)


def test_messages_that_were_requeued_without_a_fault_are_worth_a_warning(caplog):
    async def steps(window, queue):
        queue.idle_since = asyncio.get_running_loop().time()
        queue.requeued = 3    # they came too late
    caplog.set_level('DEBUG', 'x-msrv')
    window, _ = window_of(steps)
    caplog.clear()
    assert window.report_end() == 0
    assert [record.levelname for record in caplog.records] == ['WARNING']


def test_a_failed_window_says_what_failed_and_how_many_went_back(caplog):
    window, _ = window_of(sent(*range(6)), write=lambda numbers, now: STOP)
    caplog.clear()
    assert window.report_end() == 75
    assert [(record.levelname, record.getMessage(), record.fields['outcome']) for record in caplog.records][-1] == (
        'ERROR', 'requeued 6 messages: no such namespace', 'failed')


def test_a_window_without_an_nsqd_at_its_end_has_failed():
    async def steps(window, queue):
        window.pipeline.health.report_failure('queue', 'refused')
    for lasting, reason in ((True, End.QUEUE_FAILED), (False, End.TIMEOUT)):
        window, _ = window_of(steps, (0, 1.0, 0.5, lasting))
        assert (window.end_reason, window.detail) == (reason, 'refused' if lasting else '')


def test_credit_follows_the_breaker_also_where_nothing_is_pending():
    async def steps(window, queue):
        breaker = window.store_batcher.breaker
        assert window.credit() == 100
        breaker.on_failure()
        assert window.credit() == 0
        breaker.on_delay_over()
        assert window.credit() == 4    # a batch
        window.accepted = 98
        assert window.credit() == 2
        window.pending_count = 1
        assert window.credit() == 0
        breaker.on_success()
        assert window.credit() == 2
        window.pending_count = 0
        queue.idle_since = asyncio.get_running_loop().time()
    window_of(steps, (100, 10.0, 0.5))


@pytest.mark.parametrize(('attempts', 'delay'), [(1, 1), (2, 2), (5, 16), (11, 600), (60, 600)])
def test_a_dead_letter_that_nobody_keeps_is_requeued_with_a_delay_that_grows(attempts, delay):
    window, queue = window_of(sent(1, attempts=attempts, body=b'[]'), keep=UNKEPT)
    assert queue.requeues == [(1, delay)]
    assert (window.end_reason, window.exit_status) == (End.DEAD_LETTERS_FAILED, 75)
    assert window.detail == '1 dead letters could not be kept'
    assert window.pipeline.health.is_up('dead letters')    # the keeper works: it refuses this one


def test_letters_that_nobody_keeps_do_not_end_the_window_nor_use_it_up_twice():
    async def steps(window, queue):
        queue.send(1, 2, 3, body=b'[]')
        for n in range(10, 40):
            await asyncio.sleep(0.05)
            if window.credit():
                queue.send(n)
    window, queue = window_of(steps, limits=(20, 10.0, 0.5), keep=UNKEPT)
    assert (len(queue.finished), window.count['stored'], len(queue.requeues)) == (17, 17, 3)


def test_one_message_refused_in_a_quiet_topic_waits_and_is_a_dead_letter_on_its_third_delivery():
    for attempts, delay in ((1, 1), (2, 2), (3, None)):
        for lasting in (True, False):
            limits = 0, 10.0, 0.5, lasting
            window, queue = window_of(sent(7, attempts=attempts), limits, write=lambda numbers, now: UNDECIDED)
            assert queue.requeues == ([(7, delay * lasting)] if delay else [])
            assert (window.count['dead'], window.exit_status) == ((0, 75) if delay else (1, 0))


def test_several_messages_refused_and_none_accepted_are_a_wrong_policy():
    window, queue = window_of(sent(7, 8, attempts=9), write=lambda numbers, now: UNDECIDED)
    assert (window.end_reason, window.exit_status, window.count['dead']) == (End.STORE_FAILED, 75, 0)
    assert 'key' in window.detail and '4 ParamError' in window.detail
    assert queue.requeues == [(7, 0), (8, 0)]


def test_the_memory_of_what_is_decoded_is_bounded_and_everything_is_stored():
    most = []

    def write(numbers, now):
        most.append(len(numbers))
        return STORED
    body = b'{"n": [' + b'[],' * 2000 + b'1]}'
    window, queue = window_of(sent(*range(30), body=body), write=write, max_held=3 * decoded_size(body))
    assert len(queue.finished) == window.count['stored'] == 30
    assert max(most) <= 3
    assert window.records.decoded_bytes == 0


def test_one_message_larger_than_the_bound_is_decoded_alone():
    queue = DecodeQueue(types.SimpleNamespace(build_record=lambda message: None), 10)
    queue.waiting.extend(numbered(n, body=b'x' * 100) for n in range(3))
    fit, _ = queue.take_records(100)
    assert (len(fit), queue.take_records(100)) == (1, ([], []))
    queue.decoded_bytes -= fit[0].size
    assert len(queue.take_records(100)[0]) == 1


def test_a_message_of_a_full_set_makes_no_wrong_policy_of_one_that_is_refused():
    def write(numbers, now):
        return [SET_FULL if n == 7 else UNDECIDED for n in numbers]
    window, queue = window_of(sent(7, 8), (0, 10.0, 0.5, True), write=write)
    assert sorted(queue.requeues) == [(7, 1), (8, 1)]
    assert (window.end_reason, window.detail) == (End.STORE_FAILED, '2 messages could not be stored')


def test_a_message_that_is_settled_at_its_second_delivery_is_no_failure():
    answers = [UNKEPT, DEAD]

    async def steps(window, queue):
        queue.send(1, body=b'[]')
        await asyncio.sleep(1)
        queue.send(1, attempts=2, body=b'[]')
        await asyncio.sleep(1)
        window.end(End.RELOAD)
    window, queue = window_of(steps, (0, math.inf, math.inf, True), keep=lambda now: answers.pop(0))
    assert (queue.requeues, queue.finished) == ([(1, 1)], [1])
    assert (window.end_reason, window.failed, window.count['dead']) == (End.RELOAD, False, 1)


def test_an_open_window_remembers_so_many_messages_that_were_given_back(monkeypatch):
    monkeypatch.setattr(FailedMessages, 'MOST', 10)

    async def steps(window, queue):
        for n in range(100):
            queue.send(n)
            await asyncio.sleep(0.02)
        window.end(End.RELOAD)
    window, queue = window_of(steps, (0, math.inf, math.inf, True), write=lambda numbers, now: SET_FULL)
    assert (len(queue.requeues), len(window.failed_messages.reasons), window.undecided_keys) == (100, 10, set())


@pytest.mark.parametrize('poison', [1, 3])
def test_messages_that_always_fail_hold_up_no_others_in_a_quiet_topic(poison):
    """They are alone in flight, so only another message can show that the store works."""
    async def steps(window, queue):
        queue.send(*range(poison))
        await wait_for(lambda: not window.pipeline.health.is_up('store'))
        for n in range(100, 110):
            await wait_for(window.credit)
            queue.send(n)
        await wait_for(lambda: not window.pending_count)
        assert window.pipeline.health.is_up('store')
        window.end(End.RELOAD)
    window, queue = window_of(steps, (0, math.inf, math.inf, True),
                              write=lambda numbers, now: AWAY if min(numbers) < poison else STORED)
    assert sorted(queue.requeues) == [(n, 1) for n in range(poison)]
    assert sorted(queue.finished) == list(range(100, 110))


def test_an_outage_takes_few_more_messages_where_few_are_in_flight():
    async def steps(window, queue):
        queue.send(0)
        for n in range(1, 1000):
            await asyncio.sleep(10)
            queue.send(*range(n * 1000, n * 1000 + window.credit()))
        assert len(queue.in_flight) == MAX_LONE_FAILURES
        window.end(End.SIGNAL)
    window_of(steps, (0, math.inf, math.inf, True), write=lambda numbers, now: AWAY)
