"""A pass over dead letters, by a clock of its own: what was asked for is stored, all else stays where it is."""
import asyncio
import json
import types

import pytest

import clock
import fakes
from xmsrv import (
    STORED,
    BackgroundTasks,
    DeadLetterFileSource,
    DeadLetterSink,
    End,
    Health,
    InvalidMessage,
    Metrics,
    Replay,
    ReplayFilter,
    ReplayListing,
    WriteResult,
    decode_line,
    decode_topic,
    encode_line,
    encode_topic,
    run_replay,
)

AWAY = WriteResult('retry', -15, 'no answer')


def letter(n, reason='schema', wrap=encode_topic, body=None):
    """The dead letter of message `n`, which was published at n seconds."""
    message = fakes.message(n, body or b'{"n": %d}' % n)
    message.timestamp, message.rejection = n * 10 ** 9, InvalidMessage(reason, 'no')
    sink = DeadLetterSink(fakes.options(), None)
    sink.close()
    return wrap(sink.build_header(message), message.body)


def passed(steps=None, path=None, write=lambda now: STORED, seconds=0.01, kind=Replay, choice=None, **sections):
    """Runs a pass, over the file at `path` or over a topic in which `steps(window, queue)` sends letters. `seconds`:
    that each write takes. Returns (window, what was written)."""
    written = []

    async def main():
        loop, tasks = asyncio.get_running_loop(), BackgroundTasks()
        config = fakes.options(**{'timeout': '10s', 'idle-timeout': '500ms', **sections})

        async def call(messages):
            await asyncio.sleep(seconds)
            answer = write(loop.time() - 1000)
            written.extend((loop.time() - 1000, message.record.bins['n']) for message in messages if answer is STORED)
            return [answer] * len(messages)

        async def tick():
            while True:
                tasks.wake.set()
                await asyncio.sleep(0.025)
        source = (DeadLetterFileSource(config, tasks, str(path), read_only=kind is ReplayListing) if path
                  else fakes.Queue())
        pipeline = types.SimpleNamespace(
            config=config, source=source, tasks=tasks, metrics=Metrics(), health=Health(), write=call, sink=None,
            store=types.SimpleNamespace(batch_size=4, writers=1, call_timeout=2.0))
        ticking = asyncio.ensure_future(tick())
        if path:
            await source.open()
        window = kind(pipeline, decode_line if path else decode_topic, choice or ReplayFilter())
        running = asyncio.ensure_future(window.run())
        await asyncio.sleep(0)
        if steps:
            await steps(window, source)
        await asyncio.wait_for(running, 10000)
        if path:
            source.rewrite_file()
            await source.close()
        ticking.cancel()
        await tasks.cancel()
        return window
    return clock.run(main()), written


def sent(*letters):
    async def steps(window, queue):
        for n, body in enumerate(letters):
            queue.send(n, body=body)
        queue.idle_since = asyncio.get_running_loop().time()
    return steps


def file_of(tmp_path, *numbers, **more):
    path = tmp_path / 'dead'
    path.write_bytes(b''.join(letter(n, wrap=encode_line, **more) for n in numbers))
    return path


class Stopper:
    """What ends a replay by a signal as soon as there is a window, or does not."""

    def __init__(self, ends):
        self.ends = ends

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'window' and self.ends:
            value.end(End.SIGNAL)


@pytest.mark.parametrize('ends', [False, True])
def test_a_file_that_cannot_be_written_anew_is_a_failure_after_a_signal_too(tmp_path, monkeypatch, caplog, ends):
    def full(source):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(DeadLetterFileSource, 'rewrite_file', full)
    path, config = file_of(tmp_path, 1, 2), fakes.options(store='sqlite', state_dir=str(tmp_path))
    assert asyncio.run(run_replay(config, Stopper(ends), str(path), ReplayFilter())) == 75
    assert f'{path}: not safely written anew, the next replay may take its letters again: No space' in caplog.text


def test_letters_that_are_all_invalid_hold_up_no_pass_though_max_held_is_reached(tmp_path):
    path = file_of(tmp_path, *range(1, 41), body=b'{"n": "x", "v": [%s]}' % b','.join([b'0'] * 1500))
    window, _ = passed(path=path, nsq={'max-held': '200KiB'}, message={'fields': {'n': 'integer'}})
    assert (window.end_reason, window.exit_status, window.count['requeued']) == (End.IDLE, 0, 40)
    assert window.times.seconds < 2 and len(path.read_bytes().splitlines()) == 40


def test_a_message_that_the_cluster_refuses_before_any_other_holds_up_no_pass_over_a_file(tmp_path):
    refused = WriteResult('undecided', 4, 'answer 4 ParamError')
    window, _ = passed(path=file_of(tmp_path, 1), write=lambda now: refused)
    assert (window.end_reason, window.exit_status, window.count['requeued']) == (End.STORE_FAILED, 75, 1)
    assert window.times.seconds < 2


def test_a_pass_over_a_file_lasts_longer_than_the_timeout_of_a_window(tmp_path):
    path = file_of(tmp_path, *range(40))
    window, written = passed(path=path, seconds=1.5, timeout='2s')
    assert ([n for _, n in written], path.read_bytes()) == (list(range(40)), b'')
    assert window.times.seconds > 14 and (window.end_reason, window.exit_status) == (End.IDLE, 0)


def test_a_pass_that_leaves_all_out_lasts_for_as_long_as_letters_come():
    async def steps(window, queue):
        for n in range(10):
            queue.send(n, body=letter(n))
            await asyncio.sleep(1.9)
    window, written = passed(steps, timeout='2s', choice=ReplayFilter(reasons=('key',)))
    assert (window.count['received'], window.filtered_count, written) == (10, 10, [])
    assert window.end_reason is End.TIMEOUT and 19 < window.times.seconds < 19.3


def test_a_pass_in_an_outage_ends_by_its_timeout(tmp_path):
    path = file_of(tmp_path, 1, 2, 3)
    before = path.read_bytes()
    window, _ = passed(path=path, write=lambda now: AWAY, timeout='10s')
    assert (window.end_reason, window.exit_status, path.read_bytes()) == (End.STORE_FAILED, 75, before)
    assert 10 <= window.times.seconds < 11


def test_a_pass_over_nothing_ends_at_once_or_when_the_topic_is_idle(tmp_path):
    window, _ = passed(path=file_of(tmp_path))
    assert window.end_reason is End.IDLE and window.times.seconds < 0.2

    async def nothing(window, queue):
        queue.idle_since = asyncio.get_running_loop().time()
    window, _ = passed(nothing)
    assert window.end_reason is End.IDLE and window.times.seconds < 0.7

    async def silent(window, queue):
        pass
    window, _ = passed(silent, timeout='3s')
    assert window.end_reason is End.TIMEOUT and 3 <= window.times.seconds < 3.2


def test_letters_that_fail_again_are_held_till_the_end_and_come_round_once():
    held = []

    async def steps(window, queue):
        queue.set_aside = held.extend
        queue.send(0, body=letter(0, body=b'{"n": '))
        await asyncio.sleep(1)
        assert ([message.n for message in held], queue.requeues, window.pending_count) == ([0], [], 0)
        queue.idle_since = asyncio.get_running_loop().time()
    window, _ = passed(steps)
    assert window.source.requeues == [(0, 0)]


def test_an_outage_in_the_middle_leaves_what_was_not_stored(tmp_path):
    path = file_of(tmp_path, *range(12))
    window, written = passed(path=path, write=lambda now: STORED if now < 2.5 else AWAY, seconds=1)
    assert window.exit_status == 75
    assert [n for _, n in written] + [json.loads(line)['id'] for line in path.read_bytes().splitlines()] == [
        *range(8), *(f'{n:016d}' for n in range(8, 12))]
    assert 12 <= window.times.seconds < 13.1   # 10 s after the last that was stored


def test_a_pass_stores_at_the_rate_that_was_asked_for():
    _, written = passed(sent(*(letter(n) for n in range(30))), choice=ReplayFilter(rate=10), timeout='2s')
    times = [at for at, _ in written]
    assert len(times) == 30 and 2.89 <= times[-1] - times[0] <= 3.0
    assert all(0.09 <= b - a <= 0.12 for a, b in zip(times, times[1:], strict=False))


def test_a_high_rate_goes_in_batches():
    _, written = passed(sent(*(letter(n) for n in range(30))), choice=ReplayFilter(rate=30))
    times = [at for at, _ in written]
    assert 0.85 <= times[-1] - times[0] <= 1 and len(set(times)) == 11   # one, then 3 at a time


@pytest.mark.parametrize(('choice', 'chosen'), [
    (ReplayFilter(), [0, 1, 2, 3]), (ReplayFilter(reasons=('key', 'rejected')), [1, 3]),
                                                (ReplayFilter(since=2 * 10 ** 9), [2, 3]),
    (ReplayFilter(reasons=('key',), since=2 * 10 ** 9), [3]), (ReplayFilter(limit=3), [0, 1, 2]),
    (ReplayFilter(reasons=('schema',), limit=1), [0])])
def test_only_what_was_asked_for_is_stored(choice, chosen):
    letters = [letter(n, reason) for n, reason in enumerate(('schema', 'key', 'schema', 'key'))]
    window, written = passed(sent(*letters), choice=choice)
    assert [n for _, n in written] == chosen
    queue = window.source
    assert sorted([*queue.finished, *(n for n, _ in queue.requeues)]) == [0, 1, 2, 3] and queue.in_flight == {}
    assert queue.finished == chosen


def test_what_is_no_letter_was_asked_for_only_where_all_are(caplog):
    caplog.set_level('INFO', 'x-msrv')
    for choice, left_out in ((ReplayFilter(), 0), (ReplayFilter(since=1), 2)):
        window, written = passed(sent(b'no letter', b'{}\n{}'), choice=choice)
        assert (window.filtered_count, window.count['received'], written) == (left_out, 2, [])
        assert [n for n, _ in window.source.requeues] == [0, 1]
        assert (window.exit_status, window.pending_count) == (0, 0)


def test_what_fails_again_stays_with_todays_reason(tmp_path):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1, wrap=encode_line, body=b'{"n": ') + letter(2, wrap=encode_line))
    window, written = passed(path=path)
    assert [n for _, n in written] == [2] and window.count['requeued'] == 1
    again = json.loads(path.read_bytes())
    assert (again['reason'], again['history'][0]['reason'], again['body']) == ('invalid-json', 'schema', '{"n": ')
    assert window.exit_status == 0


def test_letters_that_fail_again_count_as_progress():
    async def steps(window, queue):
        for n in range(5):
            queue.send(n, body=letter(n, body=b'{"n": '))
            await asyncio.sleep(1.9)
    window, _ = passed(steps, timeout='2s')
    assert (window.end_reason, window.count['received']) == (End.TIMEOUT, 5)


def test_letters_that_the_store_rejects_count_as_progress(tmp_path):
    path = file_of(tmp_path, *range(40))
    window, _ = passed(path=path, write=lambda now: WriteResult('rejected', 'too-big', 'no'), seconds=1.5, timeout='2s')
    assert (window.end_reason, window.count['requeued']) == (End.IDLE, 40) and window.times.seconds > 14


def test_a_look_keeps_everything_where_it_is():
    letters = [letter(n, reason) for n, reason in enumerate(('schema', 'key', 'schema', 'key'))]
    window, written = passed(sent(*letters), kind=ReplayListing, choice=ReplayFilter(reasons=('key',), limit=1))
    assert ([message.n for message in window.letters], written, window.source.finished) == ([1], [], [])
    assert sorted(n for n, _ in window.source.requeues) == [0, 1, 2, 3]
    assert window.filtered_count == 2
    window, _ = passed(sent(*letters), kind=ReplayListing, choice=ReplayFilter(limit=5000))
    assert window.source.max_in_flight == 5000 and len(window.letters) == 4


def test_a_look_at_a_file_ends_with_it(tmp_path):
    path = file_of(tmp_path, *range(3000))
    before = path.read_bytes()
    window, _ = passed(path=path, kind=ReplayListing)
    assert len(window.letters) == 3000 and path.read_bytes() == before
    assert not (tmp_path / 'dead.replay').exists()
