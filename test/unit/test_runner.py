"""Windows without end, the daemon around them, and its workers: processes, pipelines and the store are the test's."""
import asyncio
import contextlib
import json
import os
import types

import pytest

import clock
import fakes
import xmsrv
from xmsrv import (
    STORED,
    BreakerState,
    Daemon,
    End,
    Health,
    Metrics,
    Pipeline,
    RunLock,
    StoreError,
    StoreUnavailable,
    Supervisor,
    Unavailable,
    WindowRunner,
    Worker,
    WriteResult,
    readiness_text,
    render_page,
)

UP, DOWN, CLOSED, STARTING = xmsrv.BackendState
AWAY = WriteResult('retry', -15, 'no answer')


def now():
    return asyncio.get_running_loop().time() - 1000


# -- windows, one after the other

class Runner:
    """A WindowRunner on a queue of the test. opened: when its pipeline was opened; reports: its windows."""

    def __init__(self, monkeypatch, write=lambda messages: STORED, fault=lambda: None, **sections):
        self.opened, self.reports, self.grants = [], [], 0
        self.queue, self.write, self.fault = fakes.Queue(), write, fault
        self.queue.connections, self.queue.addresses = [1], [1]
        config = fakes.options(**{'timeout': '2s', 'idle-timeout': '500ms', **sections})
        monkeypatch.setattr(xmsrv, 'topic_pipeline', self.pipeline)
        self.runner = WindowRunner(config, Metrics(), self.grant, self.reports.append)

    @contextlib.asynccontextmanager
    async def pipeline(self, config, store, figures, health):
        self.opened.append(now())
        fault = self.fault()
        if fault:
            raise fault
        tasks = xmsrv.BackgroundTasks()

        async def tick():
            while True:
                tasks.wake.set()
                await asyncio.sleep(0.025)

        async def call(messages):
            await asyncio.sleep(0.01)
            return [self.write(messages)] * len(messages)
        tasks.start(tick())
        self.tasks = tasks
        yield types.SimpleNamespace(
            config=config, source=self.queue, tasks=tasks, metrics=figures, health=health, write=call, sink=None,
            store=types.SimpleNamespace(batch_size=4, writers=2, call_timeout=2.0))
        await tasks.cancel()

    async def grant(self):
        self.grants += 1
        await asyncio.sleep(1)
        return self.runner.config.nsq.max_messages

    async def window(self):
        """The next window that is open."""
        before = self.runner.window
        while self.runner.window in (None, before):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        return self.runner.window

    def run(self, steps):
        async def main():
            running = asyncio.ensure_future(self.runner.run())
            await steps(self)
            self.runner.stop()
            await asyncio.wait_for(running, 10)
        clock.run(main())
        return self


def test_what_came_beyond_n_is_taken_up_by_the_next_window_and_counts_there(monkeypatch):
    async def steps(it):
        first = await it.window()
        it.queue.send(*range(7))
        assert first.credit() == 0
        second = await it.window()
        assert (it.reports[0].count['received'], it.reports[0].count['stored']) == (5, 5)
        assert (second.accepted, second.credit(), first.credit()) == (2, 3, 0)
        await asyncio.sleep(1)
        assert sorted(it.queue.finished) == list(range(7)) and it.queue.requeues == []
    it = Runner(monkeypatch, nsq={'max-messages': '5'}).run(steps)
    assert it.reports[1].count['received'] == 2


def test_what_is_left_of_one_window_is_not_credit_of_the_next(monkeypatch):
    async def steps(it):
        first = await it.window()
        it.queue.send(1, 2)
        second = await it.window()
        assert (first.accepted, first.credit(), second.credit()) == (2, 0, 5)
    Runner(monkeypatch, nsq={'max-messages': '5'}).run(steps)


def test_a_store_that_failed_is_opened_again_and_probed_by_one_batch_at_a_time(monkeypatch):
    answers, under_way = {'fails': True}, []

    def write(messages):
        return AWAY if answers['fails'] else STORED

    async def steps(it):
        await it.window()
        it.queue.send(1)
        seen = set()
        while now() < 5.5:
            seen.add((it.runner.backend_states['queue'], it.runner.backend_states['store']))
            assert 'queue' not in it.runner.failure_text
            await asyncio.sleep(0.01)
        assert len(it.opened) == 2 and not it.runner.health.is_up('store')
        assert seen == {(UP, UP), (UP, DOWN), (CLOSED, DOWN)}   # the window closes both ends, and one is to blame
        assert it.queue.requeues == [(1, 0)]
        second = await it.window()
        assert second.store_batcher.breaker.state is BreakerState.HALF_OPEN
        assert second.credit() == 4          # a batch
        answers['fails'] = False
        it.queue.send(*range(10, 30))
        under_way.append(len(second.store_batcher.calls))
        await asyncio.sleep(0.5)
        assert it.runner.health.is_up('store') and len(it.queue.finished) == 20
    Runner(monkeypatch, write=write).run(steps)
    assert under_way == [1]


@pytest.mark.parametrize(('fault', 'end'), [(StoreUnavailable('gone'), 'store'), (Unavailable('gone'), 'queue')])
def test_an_end_that_is_away_is_tried_again_with_backoff(monkeypatch, fault, end):
    async def steps(it):
        await asyncio.sleep(300)
        other, = {'queue', 'store'} - {end}   # is not to blame, and not opened before the first is
        assert it.runner.backend_states == {end: DOWN, other: CLOSED, 'dead letters': UP}
        assert it.runner.failure_text == f'{end} unavailable: gone'
        total = xmsrv.merge_metrics(it.runner.current_metrics())
        assert {each for each, name in xmsrv.UP_METRICS.items() if not total.value_of(name)} == {end}
    it = Runner(monkeypatch, fault=lambda: fault).run(steps)
    delays = [b - a for a, b in zip(it.opened, it.opened[1:], strict=False)]
    assert 0.5 <= delays[0] <= 1 and 15 <= max(delays) <= 30 and len(delays) < 25


@pytest.mark.parametrize('reason', ['stop', 'end_after_window'])
def test_between_windows_an_end_is_heard_at_once(monkeypatch, reason):
    async def steps(it):
        await asyncio.sleep(0.5)
        getattr(it.runner, reason)()
        await asyncio.sleep(0.1)
        assert it.runner.task.done()
    Runner(monkeypatch).run(steps)


def test_a_reload_writes_what_is_pending_and_starts_no_other_window(monkeypatch):
    async def steps(it):
        window = await it.window()
        it.queue.send(*range(20))
        it.runner.end_after_window()
        await asyncio.sleep(3)
        assert (window.end_reason, len(it.queue.finished), it.grants) == (End.RELOAD, 20, 1)
        assert it.runner.task.done()
    Runner(monkeypatch).run(steps)


def test_a_window_that_fails_for_the_store_says_it_once_in_the_words_of_the_store(monkeypatch, lines):
    """Health knows why the store fails; that the window failed by it is no other reason."""
    async def steps(it):
        await it.window()
        it.queue.send(1)
        await asyncio.sleep(12)
        assert len(it.opened) == 2
        assert it.runner.health.failures == {'store': 'no answer'}
    Runner(monkeypatch, write=lambda messages: AWAY).run(steps)
    assert [line for line in lines() if 'unavailable' in line] == [
        'store unavailable (no answer): retrying, consumption paused']


def test_a_reload_waits_for_no_backoff_after_a_window_that_fails_for_the_store(monkeypatch):
    async def steps(it):
        await it.window()
        it.queue.send(1)
        it.runner.backoff.tries = 10
        await asyncio.sleep(0.5)
        it.runner.end_after_window()
        await asyncio.sleep(5)
        assert it.reports[0].end_reason is End.STORE_FAILED and it.runner.task.done()
    Runner(monkeypatch, write=lambda messages: AWAY).run(steps)


def test_ends_are_those_of_health_and_of_the_connections(monkeypatch):
    async def steps(it):
        await it.window()
        assert it.runner.backend_states == {'queue': UP, 'store': UP, 'dead letters': UP}
        it.queue.connections = []
        assert it.runner.backend_states['queue'] is DOWN
        it.runner.health.report_failure('dead letters', 'away')
        assert it.runner.backend_states['dead letters'] is DOWN
    Runner(monkeypatch).run(steps)


def test_the_store_recovers_in_a_quiet_topic_but_not_while_messages_wait(monkeypatch):
    async def steps(it):
        await it.window()
        it.runner.health.report_failure('store', 'gone')
        await asyncio.sleep(2)
        assert not it.runner.health.is_up('store')    # something may come
        it.queue.idle_since = now()
        it.runner.window.pending_count += 1
        await asyncio.sleep(2)
        assert not it.runner.health.is_up('store')
        it.runner.window.pending_count -= 1
        await asyncio.sleep(1)
        assert it.runner.health.is_up('store')
    Runner(monkeypatch, period='0').run(steps)


def test_the_store_recovers_in_a_quiet_topic_also_where_windows_are_shorter_than_a_tick(monkeypatch):
    async def steps(it):
        await it.window()
        it.runner.health.report_failure('store', 'gone')
        it.queue.idle_since = now()
        await asyncio.sleep(5)
        assert it.runner.health.is_up('store') and len(it.reports) > 2
    Runner(monkeypatch, **{'idle-timeout': '100ms'}).run(steps)


@pytest.mark.parametrize('period', ['0', '10s'])
def test_dead_letters_recover_in_a_quiet_topic_once_none_that_was_given_back_can_come_again(monkeypatch, period):
    """Another worker has settled it, or somebody has emptied the channel: here nothing could prove the recovery."""
    async def steps(it):
        await it.window()
        await asyncio.sleep(100)
        it.runner.health.report_failure('dead letters', 'no space')
        it.queue.idle_since = now() + 1000
        await asyncio.sleep(500)
        it.runner.health.report_failure('dead letters', 'no space')   # it came again
        await asyncio.sleep(595)
        assert not it.runner.health.is_up('dead letters')
        await asyncio.sleep(60)
        assert it.runner.health.is_up('dead letters')
    Runner(monkeypatch, period=period).run(steps)


def test_dead_letters_do_not_recover_while_messages_come(monkeypatch):
    async def steps(it):
        await it.window()
        it.runner.health.report_failure('dead letters', 'no space')
        await asyncio.sleep(3000)
        assert not it.runner.health.is_up('dead letters')
    Runner(monkeypatch, period='0').run(steps)


def test_a_call_that_hangs_is_not_healthy(monkeypatch):
    async def steps(it):
        window = await it.window()
        time = asyncio.get_running_loop().time()
        assert it.runner.is_healthy(time)
        window.store_batcher.calls.append(time)
        assert it.runner.is_healthy(time + 3.9) and not it.runner.is_healthy(time + 4.1)
        window.store_batcher.calls.clear()
    Runner(monkeypatch).run(steps)


# -- a pipeline

def test_a_store_that_raises_is_an_outage_or_a_stop_for_each_message():
    class Store(xmsrv.Store):
        def write(self, records):
            raise StoreError('gone', retryable=records[0] == 'again')

    async def main():
        executor = xmsrv.StoreExecutor(1)
        pipeline = Pipeline(None, None, Store(), executor, None, None, Metrics(), Health())
        results = [await pipeline.write([types.SimpleNamespace(record=word)] * 2) for word in ('again', 'never')]
        executor.shutdown()
        return results
    again, never = asyncio.run(main())
    assert again == [WriteResult('retry', 'down', 'gone')] * 2 and never == [WriteResult('stop', 'down', 'gone')] * 2


def test_an_error_in_a_window_requeues_what_is_in_flight_at_rdy_0_before_the_connections_close():
    queue, order = fakes.Queue(), []
    queue.deliver = lambda messages: None
    queue.stop = lambda: order.append(('stopped', len(queue.requeues)))

    async def open_or_close():
        order.append(('opened or closed', len(queue.requeues)))
    queue.open = queue.close = open_or_close

    async def main():
        async with xmsrv.open_pipeline(None, Stores(), lambda tasks: queue, Metrics(), Health()):
            queue.send(1, 2)
            raise ZeroDivisionError

    class Stores(xmsrv.Store):
        pass
    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert order == [('opened or closed', 0), ('stopped', 0), ('opened or closed', 2)]


# -- the daemon

class Engine:
    """What a daemon keeps going."""

    endless, failure_text, left, stopped = False, None, 0, 0

    def end_after_window(self):
        self.left += 1

    def stop(self):
        self.stopped += 1


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """A Daemon whose file is tmp_path/orders.conf; write(text) changes it."""
    def write(more=''):
        (tmp_path / 'orders.conf').write_text(
            f'state-dir = {tmp_path}/state\nstore = sqlite\nworkers = 2\n{more}\n'
            '[nsq]\nnsqd-tcp-address = 127.0.0.1:1\ntopic = orders\nmax-messages = 5\n')
    monkeypatch.setattr(xmsrv, 'set_up_configured_log', lambda config, arguments: None)
    write()
    made = Daemon(types.SimpleNamespace(config=str(tmp_path / 'orders.conf'), set_before=[], set_after=[],
                                        command='daemon', verbose=0, quiet=0))
    made.write = write
    made.config_in_force.set()
    return made


def test_a_reload_puts_the_new_file_in_force_and_ends_the_engine(daemon):
    daemon.runner = engine = Engine()
    daemon.write('timeout = 3s')
    daemon.on_hangup()
    assert (daemon.config.timeout, engine.left) == (3.0, 1)
    team = daemon.new_runner()
    assert (team.raw['timeout'], team.config.timeout) == ('3s', 3.0)


@pytest.mark.parametrize('fault', ['timeout = never', 'no-option = 1', '[nsq'])
def test_a_faulty_file_changes_nothing(daemon, fault):
    daemon.runner = engine = Engine()
    before = daemon.config
    daemon.write(fault)
    daemon.on_hangup()
    assert (daemon.config, engine.left) == (before, 0)


@pytest.fixture
def lines(monkeypatch, caplog):
    """A function: the lines of the log so far that an operator sees without -v."""
    monkeypatch.setattr(xmsrv.log, 'propagate', True)
    caplog.set_level('INFO', 'x-msrv')
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_reload_is_logged_once_the_file_is_in_force(daemon, tmp_path, lines):
    """Not while a directory that it names is missing."""
    reloaded, told = f'{daemon.arguments.config}: configuration reloaded', f'{tmp_path}/mount/dead'
    waiting = (f'waiting for configuration: [dead-letter] file = {told}: its directory is not there; '
               'keeping the current configuration')

    async def main():
        daemon.runner = engine = Engine()
        before = daemon.config
        daemon.write(f'[dead-letter]\nfile = {told}')
        daemon.on_hangup()
        assert (lines(), daemon.config, engine.left) == ([waiting], before, 0)
        await asyncio.sleep(40)
        daemon.on_hangup()    # whoever asks again is answered again
        assert lines() == [waiting] * 2
        (tmp_path / 'mount').mkdir()
        while not engine.left:
            await asyncio.sleep(1)
        assert daemon.config.dead_letter.file == told
    clock.run(main())
    assert [line for line in lines() if 'recovered' not in line] == [waiting, waiting, reloaded]
    assert lines()[2].startswith('configuration: recovered after')


def test_a_reload_without_a_file_waits_for_it(daemon, lines):
    """A mount that is not there yet: nobody has to send the signal again."""
    async def main():
        daemon.runner = engine = Engine()
        os.unlink(daemon.arguments.config)
        daemon.on_hangup()
        waiting = f'waiting for configuration: {daemon.arguments.config}: No such file or directory'
        assert (lines(), daemon.waiting_lines) == ([f'{waiting}; keeping the current configuration'], [waiting])
        await asyncio.sleep(40)
        assert engine.left == 0 and len(lines()) == 1
        daemon.write('timeout = 3s')
        await asyncio.sleep(31)
        assert (engine.left, daemon.config.timeout, daemon.waiting_lines) == (1, 3.0, [])
    clock.run(main())
    assert lines()[1:] == [f'{daemon.arguments.config}: configuration reloaded']


def test_a_reload_whose_file_comes_with_a_fault_changes_nothing(daemon, lines):
    async def main():
        daemon.runner = engine = Engine()
        before = daemon.config
        os.unlink(daemon.arguments.config)
        daemon.on_hangup()
        daemon.write('timeout = never')
        await asyncio.sleep(40)
        assert (daemon.config, engine.left, daemon.waiting_lines, daemon.config_task) == (before, 0, [], None)
    clock.run(main())
    assert [line for line in lines() if 'recovered' in line or 'reloaded' in line] == []
    assert 'timeout = never' in lines()[-1] and lines()[-1].endswith('keeping the current configuration')


@pytest.fixture
def limited(monkeypatch):
    """Lines that repeat within the minute are limited."""
    repeats = xmsrv.RateLimitFilter(lambda: 100.0)
    monkeypatch.setattr(repeats, 'set_timer', lambda: None)
    monkeypatch.setattr(xmsrv.log, 'filters', [repeats])


@pytest.mark.usefixtures('limited')
def test_what_a_reload_waits_for_is_logged_however_often_another_file_was(daemon, tmp_path, lines):
    async def main():
        daemon.runner = Engine()
        os.unlink(daemon.arguments.config)
        for _ in range(xmsrv.REPEATS_LOGGED + 3):
            daemon.on_hangup()
        assert len(lines()) == xmsrv.REPEATS_LOGGED
        daemon.write(f'[dead-letter]\nfile = {tmp_path}/mount/dead')
        daemon.on_hangup()
        assert f'{tmp_path}/mount/dead' in lines()[-1]
        for fault in ['never'] * (xmsrv.REPEATS_LOGGED + 3) + ['soon']:
            daemon.write(f'timeout = {fault}')
            daemon.on_hangup()
        assert 'timeout = soon' in lines()[-1] and len(lines()) == 2 * xmsrv.REPEATS_LOGGED + 2
    clock.run(main())


@pytest.mark.usefixtures('limited')
def test_workers_that_end_hide_no_other(monkeypatch, lines):
    async def steps(team, processes):
        for _ in range(xmsrv.REPEATS_LOGGED + 3):
            processes[1].say()
            for process in processes[2:] or processes[:1]:
                if process.returncode is None:
                    process.exit(1)
            await asyncio.sleep(25)
        processes[1].exit(1)
        await asyncio.sleep(0.1)
        ended = [line for line in lines() if ' ended: ' in line]
        assert [line.split(' (')[0] for line in ended] == ['worker 1'] * xmsrv.REPEATS_LOGGED + ['worker 2']
    with_team(monkeypatch, steps)


def test_a_faulty_text_drops_a_configuration_that_waits_for_its_files(daemon, tmp_path, lines):
    """What waits is always of the latest reload, or nothing does."""
    async def main():
        daemon.runner = engine = Engine()
        before = daemon.config
        daemon.write(f'[dead-letter]\nfile = {tmp_path}/mount/dead')
        daemon.on_hangup()
        assert len(daemon.waiting_lines) == 1
        daemon.write('timeout = never')
        daemon.on_hangup()
        assert (daemon.waiting_lines, daemon.config_task) == ([], None)
        (tmp_path / 'mount').mkdir()
        await asyncio.sleep(40)
        assert (daemon.config, engine.left) == (before, 0)
    clock.run(main())
    assert [line for line in lines() if 'recovered' in line or 'reloaded' in line] == []


def test_a_faulty_text_before_the_first_configuration_is_in_force_leaves_that_of_the_start(daemon, tmp_path):
    async def main():
        daemon.config_in_force.clear()
        daemon.write(f'[dead-letter]\nfile = {tmp_path}/mount/dead')
        daemon.raw, daemon.config, daemon.unavailable = xmsrv.load_config(daemon.arguments)
        daemon.apply_config(daemon.raw, daemon.config, daemon.unavailable)
        at_start = daemon.waiting_lines
        daemon.write(f'[dead-letter]\nfile = {tmp_path}/other/dead')
        daemon.on_hangup()
        assert daemon.waiting_lines != at_start
        daemon.write('timeout = never')
        daemon.on_hangup()
        assert daemon.waiting_lines == at_start and not daemon.config_in_force.is_set()
        (tmp_path / 'mount').mkdir()
        while not daemon.config_in_force.is_set():
            await asyncio.sleep(1)
        assert daemon.config.dead_letter.file == f'{tmp_path}/mount/dead'
    clock.run(main())


def test_the_lock_follows_the_state_directory_and_the_old_one_is_given_back(daemon, tmp_path):
    async def main():
        await daemon.hold_lock()
        old = daemon.lock
        await daemon.hold_lock()
        assert daemon.lock is old
        daemon.config.state_dir = str(tmp_path / 'other')
        await daemon.hold_lock()
        assert daemon.lock.path.startswith(str(tmp_path / 'other')) and daemon.lock.is_held
        assert not old.is_held
        daemon.lock.release()
    clock.run(main())


def test_a_lock_whose_file_was_removed_is_taken_anew(daemon):
    async def main():
        await daemon.hold_lock()
        os.unlink(daemon.lock.path)
        await daemon.hold_lock()
        assert daemon.lock.is_held
        daemon.lock.release()
    clock.run(main())


def test_a_window_takes_a_lock_anew_whose_file_was_removed(daemon, lines):
    async def main():
        await daemon.hold_lock()
        assert await daemon.wait_for_grant() == 5 and lines() == []
        os.unlink(daemon.lock.path)
        assert await daemon.wait_for_grant() == 5
        assert daemon.lock.is_held
        assert lines() == [f'{daemon.lock.path} was removed or replaced: taking the lock again']
        daemon.lock.release()
    clock.run(main())


def test_no_window_starts_while_another_process_has_the_lock(daemon, lines):
    async def main():
        await daemon.hold_lock()
        daemon.runner = engine = Engine()
        path = daemon.lock.path
        os.unlink(path)
        other = RunLock(daemon.config, daemon.arguments.config)
        assert other.try_acquire() is None
        waiting = asyncio.ensure_future(daemon.wait_for_grant())
        await asyncio.sleep(20)
        assert not waiting.done() and engine.left
        assert lines() == [f'{path} was removed or replaced: taking the lock again']
        other.release()
        assert await asyncio.wait_for(waiting, 1) == 5
        daemon.lock.release()
    clock.run(main())


def test_a_window_without_end_asks_for_its_lock_as_well_and_is_ended_once(daemon):
    async def main():
        await daemon.hold_lock()
        daemon.runner = engine = Engine()
        engine.endless, engine.config, engine.is_healthy = True, daemon.config, lambda now: True
        engine.backend_states, engine.backend_failures = dict.fromkeys(xmsrv.BACKENDS, UP), {}
        engine.current_metrics = lambda: [Metrics().take_snapshot()]
        asking = asyncio.ensure_future(daemon.notify_regularly())
        os.unlink(daemon.lock.path)
        await asyncio.sleep(3)
        assert daemon.lock.is_held and engine.left == 0
        os.unlink(daemon.lock.path)
        other = RunLock(daemon.config, daemon.arguments.config)
        assert other.try_acquire() is None
        await asyncio.sleep(5)
        assert (daemon.lock, engine.left) == (None, 1)
        asking.cancel()
        other.release()
    clock.run(main())


def test_a_lock_that_another_has_is_waited_for_and_the_status_says_so(daemon):
    async def main():
        other = RunLock(daemon.config, daemon.arguments.config)
        assert other.try_acquire() is None
        waiting = asyncio.ensure_future(daemon.hold_lock())
        await asyncio.sleep(5)
        assert not waiting.done() and f'waiting for lock: process {os.getpid()} has ' in daemon.status_line
        other.release()
        await asyncio.wait_for(waiting, 1)
        assert daemon.lock.is_held
        daemon.lock.release()
    clock.run(main())


def test_a_signal_ends_the_wait_for_a_lock(daemon):
    async def main():
        other = RunLock(daemon.config, daemon.arguments.config)
        other.try_acquire()
        waiting = asyncio.ensure_future(daemon.hold_lock())
        await asyncio.sleep(1)
        daemon.stop()
        await asyncio.wait_for(waiting, 1)
        assert daemon.lock is None
        other.release()
    clock.run(main())


# -- its workers

class Process:
    """A worker process. lines: what it was told, as JSON; say() has it say something."""

    def __init__(self, place):
        self.pid, self.returncode, self.lines, self.signals = 100 + place, None, [], []
        self.stdin = types.SimpleNamespace(write=lambda line: self.lines.append(json.loads(line)))
        self.stdout = asyncio.StreamReader()
        self.exited = asyncio.Event()

    def say(self, **fields):
        state = {'state': 'idle', 'seen': 0, 'healthy': True, 'windows': [],
                 'failures': {}, 'connections': {},
                 'backends': dict.fromkeys(xmsrv.BACKENDS, 'up'), 'snapshot': Metrics().take_snapshot(),
                 'granted_at': 0.0, **fields}
        self.stdout.feed_data(json.dumps(state).encode() + b'\n')

    def exit(self, status=0):
        self.returncode = status
        self.stdout.feed_eof()
        self.exited.set()

    async def wait(self):
        await self.exited.wait()
        return self.returncode

    def terminate(self):
        self.signals.append('terminate')

    def kill(self):
        self.signals.append('kill')
        self.exit(-9)

    def grants(self):
        return [(line['grant'], line['number']) for line in self.lines if 'grant' in line]


def with_team(monkeypatch, steps, workers=2, n=5, end=True, **sections):
    """Runs `steps(team, processes)`: a team of so many workers that share n messages."""
    async def main():
        processes = []

        async def start(*command, **options):
            processes.append(Process(len(processes)))
            return processes[-1]
        monkeypatch.setattr(asyncio, 'create_subprocess_exec', start)
        config = fakes.options(**{'period': '10s', 'workers': str(workers), 'nsq': {'max-messages': str(n)},
                                  **sections})
        team = Supervisor(types.SimpleNamespace(
            config=config, raw={'the': 'raw'}, arguments=types.SimpleNamespace(config='x', verbose=0, quiet=0),
            metrics=Metrics(), exited_worker_metrics=xmsrv.MetricTotals(), on_window_end=lambda count, seconds: None,
            keeps_lock=lambda: True, schedule=xmsrv.Schedule(10)))
        running = asyncio.ensure_future(team.run())
        await asyncio.sleep(0.01)
        await steps(team, processes)
        if end:
            team.stop()
            for process in processes:
                process.exit()
        return await asyncio.wait_for(running, 100)
    return clock.run(main())


def test_workers_get_the_configuration_that_holds_and_shares_of_n(monkeypatch):
    async def steps(team, processes):
        assert [process.lines for process in processes] == [[{'raw': {'the': 'raw'}}]] * 2
        for turn in range(1, 4):
            for process in processes:
                process.say(seen=turn - 1)
            await asyncio.sleep(10)
        assert [process.grants() for process in processes] == [[(2, 1), (3, 2), (2, 3)], [(3, 1), (2, 2), (3, 3)]]
    with_team(monkeypatch, steps)


def test_the_workers_that_are_up_share_all_of_n_and_others_wait_for_the_next_period(monkeypatch):
    async def steps(team, processes):
        processes[1].say()
        await asyncio.sleep(0.1)
        for seen, process in enumerate(processes):
            process.say(seen=seen)
        await asyncio.sleep(0.1)
        assert [process.grants() for process in processes] == [[], [(5, 1)], []]
        for _ in range(3):
            for seen, process in enumerate(processes[:2]):
                process.say(seen=seen)
            processes[2].say(state='starting')      # its queue and store are opened anew
            await asyncio.sleep(3)
        processes[0].say()
        await asyncio.sleep(1)
        assert [process.grants() for process in processes] == [[(3, 1)], [(5, 1), (2, 2)], []]
    with_team(monkeypatch, steps, workers=3)


def test_a_grant_that_was_long_under_way_begins_the_period_anew(monkeypatch):
    """Never two windows one behind the other: workers that were stopped read their grants late."""
    async def steps(team, processes):
        def now():
            return asyncio.get_running_loop().time()

        async def pass_seconds(number):
            for _ in range(number):
                processes[0].say(seen=len(processes[0].grants()), granted_at=late)
                await asyncio.sleep(1)
        late = now()
        processes[0].say()
        await asyncio.sleep(0.1)
        assert len(processes[0].grants()) == 1
        for _ in range(4):                              # 12 s, of a period of 10: it has not read its grant
            processes[0].say(seen=0)
            await asyncio.sleep(3)
        late = now()
        await pass_seconds(9)
        assert len(processes[0].grants()) == 1
        await pass_seconds(3)
        assert len(processes[0].grants()) == 2
    with_team(monkeypatch, steps, workers=1)


@pytest.mark.parametrize('line', [
    b'{"healthy"', b'[]', b'7', json.dumps({'healthy': True, 'backends': []}).encode(), b'x' * (1 << 17)], ids=len)
def test_a_worker_whose_status_line_is_none_is_killed_and_the_others_go_on(monkeypatch, line):
    async def steps(team, processes):
        processes[0].stdout.feed_data(line + b'\n')
        await asyncio.sleep(0.1)
        assert [process.signals for process in processes[:2]] == [['kill'], []]
        processes[1].say()
        await asyncio.sleep(0.1)
        assert team.workers[1].state is xmsrv.WorkerState.BUSY
    with_team(monkeypatch, steps)


def test_workers_go_on_with_what_a_silent_one_may_not_take(monkeypatch):
    """Its share is its own until it responds or has ended: never more than n in a period."""
    monkeypatch.setattr(xmsrv, 'WORKER_KILL_TIME', 35.0)   # in the fourth period

    async def steps(team, processes):
        async def pass_period(*speakers, **said):
            for _ in range(4):
                for process in speakers:
                    process.say(seen=len(process.grants()), **said)
                await asyncio.sleep(2.5)

        def granted():
            return [[number for number, _ in process.grants()] for process in processes]
        for process in processes[:3]:
            process.say()
        await asyncio.sleep(0.1)
        assert granted() == [[2], [1], [2]]
        await pass_period(*processes[1:])               # the first falls silent with its grant: 3 are left
        assert granted() == [[2], [1, 2], [2, 1]]
        await pass_period(processes[2])                 # and the second one, with 2
        assert granted() == [[2], [1, 2], [2, 1, 1]]
        await pass_period(*processes[1:])               # the second responds again, with its window over
        assert granted()[1:3] == [[1, 2, 2], [2, 1, 1, 1]]
        await pass_period(*processes[1:])               # the first has been killed: all are free again
        assert processes[0].signals == ['kill']
        assert [sum(each[-1] for each in granted()[1:3]), len(processes)] == [5, 4]
    with_team(monkeypatch, steps, workers=3)


def test_a_silent_idle_worker_gets_no_grant_and_no_period_begins_where_silent_ones_have_all_of_n(monkeypatch):
    async def steps(team, processes):
        processes[0].say()
        await asyncio.sleep(0.1)
        assert processes[0].grants() == [(5, 1)]
        for _ in range(8):
            processes[1].say()
            await asyncio.sleep(3)
        assert processes[1].grants() == [] and not team.workers[1].is_silent
        processes[0].say(seen=1)
        await asyncio.sleep(0.1)
        assert [process.grants() for process in processes] == [[(5, 1), (3, 2)], [(2, 1)]]
        for process in processes:
            process.say(seen=len(process.grants()))
        for _ in range(4):                              # the second one falls silent, without a grant
            processes[0].say(seen=2)
            await asyncio.sleep(2.5)
        assert [process.grants() for process in processes] == [[(5, 1), (3, 2), (5, 3)], [(2, 1)]]
    with_team(monkeypatch, steps)


def test_workers_without_the_lock_are_told_to_end_and_get_no_grant(monkeypatch):
    async def steps(team, processes):
        for process in processes:
            process.say()
        await asyncio.sleep(0.1)
        team.keeps_lock = lambda: bool(team.end_after_window())
        for _ in range(4):
            for process in processes:
                process.say(seen=1)
            await asyncio.sleep(3)
        assert [len(process.grants()) for process in processes] == [1, 1]
        assert [process.lines[-1] for process in processes] == [{'leave': True}] * 2
        for process in processes:
            process.exit()
    assert with_team(monkeypatch, steps, end=False) == 0


def test_grants_that_fail_end_the_daemon(monkeypatch):
    """A bug there is an internal error, and no daemon that grants nothing any more."""
    async def steps(team, processes):
        monkeypatch.setattr(team.schedule, 'start_period', lambda now: 1 / 0)
        processes[0].say()
        await asyncio.sleep(10)
    with pytest.raises(ZeroDivisionError):
        with_team(monkeypatch, steps, end=False)


@pytest.mark.parametrize(('settings', 'seconds'), [({}, 4), ({'aerospike': {'total-timeout': '10s'}}, 12),
                                                   ({'store': 'sqlite', 'state_dir': '/tmp'}, 6.5)])
def test_a_worker_has_the_time_of_a_call_to_its_store_before_it_is_killed(monkeypatch, settings, seconds):
    async def steps(team, processes):
        team.stop()
        assert team.end_timeout == seconds
    with_team(monkeypatch, steps, **settings)


def test_a_second_team_has_its_own_configuration(monkeypatch):
    for raw in ('one', 'two'):
        async def steps(team, processes, raw=raw):
            team.raw = {'file': raw}
            processes[0].exit()
            await asyncio.sleep(1)
            assert processes[2].lines == [{'raw': {'file': raw}}]
        with_team(monkeypatch, steps)


def test_nobody_starts_while_another_has_its_grant_of_the_last_period(monkeypatch):
    async def steps(team, processes):
        one, two = processes
        one.say()
        two.say()
        await asyncio.sleep(0.1)
        assert (len(one.grants()), len(two.grants())) == (1, 1)
        for _ in range(10):
            one.say(seen=1)
            two.say(seen=0)         # it said that before it heard of its grant
            await asyncio.sleep(3)
        assert (len(one.grants()), len(two.grants())) == (1, 1)
        for _ in range(10):
            one.say(seen=1)
            two.say(seen=1, state='busy')
            await asyncio.sleep(3)
        assert (len(one.grants()), len(two.grants())) == (1, 1)
        two.say(seen=1)
        await asyncio.sleep(0.1)
        assert (len(one.grants()), len(two.grants())) == (2, 2)
    with_team(monkeypatch, steps)


def test_the_end_of_a_worker_frees_its_grant_keeps_its_figures_and_another_is_started(monkeypatch):
    async def steps(team, processes):
        metrics = Metrics()
        metrics.increment('xmsrv_received_total', 7)
        for process in processes:
            process.say(snapshot=metrics.take_snapshot())
        await asyncio.sleep(0.1)
        processes[0].exit(-9)
        await asyncio.sleep(1.5)
        assert len(processes) == 3
        total = xmsrv.merge_metrics([*team.current_metrics(), team.exited_worker_metrics.take_snapshot()])
        assert (total.value_of('xmsrv_received_total'), total.value_of('xmsrv_worker_restarts_total')) == (14, 1)
        assert set(team.workers[0].status.backend_states.values()) == {STARTING}
        assert set(team.backend_states.values()) == {UP}
        processes[2].say()
        await asyncio.sleep(0.1)
        assert set(team.workers[0].status.backend_states.values()) == set(team.backend_states.values()) == {UP}
    with_team(monkeypatch, steps)


def test_workers_that_never_stay_up_end_the_daemon(monkeypatch):
    async def steps(team, processes):
        for _ in range(400):
            for process in processes:
                if process.returncode is None:
                    process.exit(1)
            await asyncio.sleep(1)
        assert len(processes) == 10
    assert with_team(monkeypatch, steps, end=False) == 70


def test_a_reload_has_workers_finish_their_windows_and_kills_one_that_does_not(monkeypatch):
    async def steps(team, processes):
        team.end_after_window()
        assert [process.lines[-1] for process in processes] == [{'leave': True}] * 2
        processes[0].exit()
        await asyncio.sleep(9)
        assert processes[1].signals == []
        await asyncio.sleep(6)
        assert processes[1].signals == ['kill']
    with_team(monkeypatch, steps, end=False)


def test_a_signal_goes_to_all_and_one_that_does_not_end_is_killed(monkeypatch):
    async def steps(team, processes):
        team.stop()
        processes[0].exit()
        await asyncio.sleep(1)
        assert [process.signals for process in processes] == [['terminate'], ['terminate']]
        await asyncio.sleep(4)
        assert processes[1].signals == ['terminate', 'kill']
    with_team(monkeypatch, steps, end=False)


def test_a_sick_worker_is_not_healthy_nor_are_workers_that_are_all_silent(monkeypatch):
    async def steps(team, processes):
        for process in processes:
            process.say()
        await asyncio.sleep(0.1)
        assert team.is_healthy(0)
        processes[0].say(healthy=False)
        await asyncio.sleep(0.1)
        assert not team.is_healthy(0)
        processes[0].say()
        await asyncio.sleep(4)
        assert team.is_healthy(0)
        processes[1].say()
        await asyncio.sleep(2)
        assert team.is_healthy(0)       # the other makes progress
        processes[1].say(healthy=False)
        await asyncio.sleep(0.1)
        assert not team.is_healthy(0)
        await asyncio.sleep(6)
        assert not team.is_healthy(0)
        assert set(team.backend_states.values()) == {STARTING}
    with_team(monkeypatch, steps)


def test_a_worker_that_is_stuck_is_killed(monkeypatch):
    async def steps(team, processes):
        for _ in range(11):      # nobody has to ask how it is
            processes[1].say()
            await asyncio.sleep(3)
        assert [process.signals for process in processes] == [['kill'], [], []]
        assert team.failure_text == ''
    with_team(monkeypatch, steps)


def test_a_silent_worker_is_named_by_all_and_takes_nothing_down_while_another_works(monkeypatch, daemon, lines):
    async def steps(team, processes):
        daemon.runner = team
        text, well = f'worker 1 (pid {processes[0].pid}) is not responding', 'queue: up\nstore: up\ndead letters: up\n'
        metrics = Metrics()
        metrics.record_backends(dict.fromkeys(xmsrv.BACKENDS, UP))
        metrics.increment('xmsrv_received_total', 7)
        metrics.set_gauge('xmsrv_connections', 1, 'up')
        told = {'snapshot': metrics.take_snapshot(), 'connections': {'a:4150': (1, 2, '')}}

        def figures():
            total = xmsrv.merge_metrics(team.current_metrics())
            return [total.value_of(*key) for key in (('xmsrv_queue_up',), ('xmsrv_connections', 'up'),
                                                     ('xmsrv_received_total',))]
        for _ in range(2):
            processes[0].say(**told)
            for _ in range(3):
                processes[1].say(**told)
                await asyncio.sleep(3)
            assert (daemon.is_ready, daemon.is_healthy(), daemon.status_line) == (True, True, text)
            assert readiness_text(daemon) == f'{well}{text}\n'
            assert f'<p id="status" class="up">{text}</p>' in render_page(daemon).decode()
            assert (figures(), team.connections) == ([1, 1, 14], {'a:4150': (1, 2, '')})
        processes[0].say(**told)
        await asyncio.sleep(0.1)
        assert (daemon.failure_text, readiness_text(daemon)) == ('', well)
        assert (figures(), team.connections) == ([1, 2, 14], {'a:4150': (2, 4, '')})
        assert lines() == [text] * 2
    with_team(monkeypatch, steps)


def test_a_silent_worker_no_longer_says_that_an_end_is_down(monkeypatch):
    """That was how it was; the other says how it is."""
    async def steps(team, processes):
        processes[0].say(failures={'store': 'gone'}, backends={**dict.fromkeys(xmsrv.BACKENDS, 'up'), 'store': 'down'})
        for _ in range(3):
            processes[1].say()
            await asyncio.sleep(2)
        assert set(team.backend_states.values()) == {UP}
        assert team.failure_text == f'worker 1 (pid {processes[0].pid}) is not responding'
    with_team(monkeypatch, steps)


def test_a_worker_that_is_killed_is_said_once(monkeypatch, lines):
    async def steps(team, processes):
        monkeypatch.setattr(processes[0], 'kill', lambda: processes[0].signals.append('kill'))   # it takes its time
        for _ in range(30):
            processes[1].say()
            await asyncio.sleep(1.5)
        assert processes[0].signals == ['kill']
        who = f'worker 1 (pid {processes[0].pid})'
        assert lines() == [f'{who} is not responding', f'{who} has been silent for 30 s: killed']
        assert team.failure_text == lines()[0]
    with_team(monkeypatch, steps)


def test_a_parent_that_was_stopped_does_not_blame_its_workers(monkeypatch, lines):
    """It has not read what they said meanwhile; or they were stopped with it."""
    async def steps(team, processes):
        for process in processes:
            process.say()
        await asyncio.sleep(1)
        asyncio.get_running_loop().now += 600
        await asyncio.sleep(3)
        assert team.is_healthy(asyncio.get_running_loop().time())
        for process in processes:
            process.say()
        await asyncio.sleep(3)
        assert [process.signals for process in processes] == [[], []] and lines() == []
    with_team(monkeypatch, steps)


def test_a_worker_hears_of_grants_a_reload_and_the_end_of_its_parent():
    async def main():
        worker, flow = Worker(None), Engine()
        worker.runner, worker.state = flow, xmsrv.WorkerState.IDLE
        stdin = asyncio.StreamReader()
        task = asyncio.ensure_future(worker.read_commands(stdin))
        stdin.feed_data(b'{"grant": 3, "number": 1}\n')
        assert await worker.grants.get() == 3
        assert (worker.state, worker.last_grant) == (xmsrv.WorkerState.BUSY, 1)
        stdin.feed_data(b'{"leave": true}\n')
        await asyncio.sleep(0.1)
        assert (flow.left, flow.stopped) == (1, 0)
        stdin.feed_eof()
        await task
        assert flow.stopped == 1
    clock.run(main())


def test_a_team_says_what_is_wrong_each_thing_once(monkeypatch):
    async def steps(team, processes):
        assert team.failure_text == ''
        for process in processes:
            process.say(failures={'store': 'gone'}, backends={**dict.fromkeys(xmsrv.BACKENDS, 'up'), 'store': 'down'})
        await asyncio.sleep(0.1)
        assert team.failure_text == 'store unavailable: gone'
        assert team.backend_states == {'queue': UP, 'store': DOWN, 'dead letters': UP}
        processes[1].exit(1)
        await asyncio.sleep(0.1)
        assert team.failure_text == 'worker 2 has ended; store unavailable: gone'
        await asyncio.sleep(1)
        processes[2].say()
        processes[0].say()
        await asyncio.sleep(0.1)
        assert (team.failure_text, set(team.backend_states.values())) == ('', {UP})
    with_team(monkeypatch, steps)


def test_a_worker_that_is_started_again_is_no_end_that_is_down(monkeypatch, daemon):
    """While another works, all is up; without one it is starting, and says so."""
    async def steps(team, processes):
        daemon.runner = team
        for process in processes:
            process.say()
        await asyncio.sleep(0.1)
        processes[1].exit(-9)
        await asyncio.sleep(0.1)
        assert (daemon.is_ready, team.backend_failures, daemon.backend_failures) == (True, {}, {})
        assert readiness_text(daemon) == 'queue: up\nstore: up\ndead letters: up\nworker 2 has ended\n'
        processes[0].exit(-9)
        await asyncio.sleep(0.1)
        assert not daemon.is_ready and set(team.backend_states.values()) == {STARTING}
        assert readiness_text(daemon).endswith('starting\nworker 1 has ended; worker 2 has ended\n')
        await asyncio.sleep(1.5)
        assert len(processes) == 4
        assert readiness_text(daemon) == ('queue: starting\nstore: starting\ndead letters: starting\n'
                                          'not up yet: queue, store, dead letters\n')
        processes[2].say(backends={'queue': 'starting', 'store': 'starting', 'dead letters': 'up'})
        await asyncio.sleep(0.1)
        assert daemon.status_line == 'not up yet: queue, store'
        processes[3].say()
        await asyncio.sleep(0.1)
        assert (daemon.is_ready, daemon.failure_text) == (True, '')
        processes[2].say(backends={'queue': 'closed', 'store': 'down', 'dead letters': 'up'},
                         failures={'store': 'x'})
        await asyncio.sleep(0.1)
        assert daemon.backend_failures == {'queue': 'on purpose, while another fails', 'store': 'x'}
        assert readiness_text(daemon) == 'queue: closed\nstore: down\ndead letters: up\nstore unavailable: x\n'
    with_team(monkeypatch, steps)


@pytest.mark.parametrize('line', [b'Traceback (most recent call last)\n', b'{}\n', b'[]\n', b'{"healthy": tr\n'])
def test_a_worker_that_is_not_understood_is_killed_and_another_one_started(monkeypatch, line):
    async def steps(team, processes):
        processes[0].stdout.feed_data(line)
        await asyncio.sleep(1.5)
        assert (processes[0].signals, len(processes)) == (['kill'], 3)
    with_team(monkeypatch, steps)


def test_windows_of_workers_are_reported_with_their_counts(monkeypatch):
    reports = []

    async def steps(team, processes):
        team.on_window_end = lambda *window: reports.append(window)
        processes[0].say(windows=[({'stored': 3}, 1.5)] * 2)
        await asyncio.sleep(0.1)
    with_team(monkeypatch, steps)
    assert reports == [({'stored': 3}, 1.5)] * 2


def test_delays_of_a_worker_grow_and_begin_anew_when_it_has_stayed_up(monkeypatch):
    async def steps(team, processes):
        starts, loop = [], asyncio.get_running_loop()
        for life in (0.1, 0.1, 0.1, 0.1, 11, 0.1):
            number = len(processes)
            processes[-1].say()
            await asyncio.sleep(life)
            ended = loop.time()
            processes[-1].exit(1)
            while len(processes) == number:
                await asyncio.sleep(0.01)
            starts.append(loop.time() - ended)
        assert starts[0] <= 1.1 < starts[2] <= starts[3] * 2 and 4 <= starts[3] <= 8.1
        assert starts[4] <= 1.1 and starts[5] <= 2.1
    with_team(monkeypatch, steps, workers=1)


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch):
    async def steps(team, processes):
        async def fails(*command, **options):
            raise OSError(12, 'Cannot allocate memory')
        start = asyncio.create_subprocess_exec
        monkeypatch.setattr(asyncio, 'create_subprocess_exec', fails)
        processes[0].exit(1)
        await asyncio.sleep(2)
        assert team.failure_text.startswith('worker 1 has ended')
        monkeypatch.setattr(asyncio, 'create_subprocess_exec', start)
        for _ in range(10):
            processes[1].say()
            await asyncio.sleep(3)
        assert len(processes) == 3
    with_team(monkeypatch, steps)


def test_a_worker_is_this_module_again_with_the_same_file_and_without_systemd(monkeypatch):
    seen = []

    async def steps(team, processes):
        async def start(*command, **options):
            seen.append((command, options))
            return Process(9)
        monkeypatch.setattr(asyncio, 'create_subprocess_exec', start)
        monkeypatch.setenv('NOTIFY_SOCKET', '/run/systemd/notify')
        monkeypatch.setenv('WATCHDOG_USEC', '1')
        monkeypatch.setenv('WATCHDOG_PID', '1')
        team.arguments.verbose, team.arguments.quiet = 2, 1
        worker = xmsrv.WorkerHandle(7)
        await team.start_worker(worker)
        assert worker.process.lines == [{'raw': {'the': 'raw'}}]
    with_team(monkeypatch, steps)
    (command, options), = seen
    assert command[-6:] == ('-c', 'x', '-v', '-v', '-q', 'worker') and 'import xmsrv' in command[-7]
    assert not {'NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID'} & options['env'].keys()
    assert options['env']['PATH'] == os.environ['PATH'] and options['start_new_session'] is True


def test_how_a_process_ended_in_words():
    assert (xmsrv.describe_exit(0), xmsrv.describe_exit(3),
            xmsrv.describe_exit(-9), xmsrv.describe_exit(-40)) == (
                'exit status 0', 'exit status 3', 'killed by SIGKILL', 'killed by signal 40')


def test_with_a_window_without_end_each_worker_has_a_grant_of_its_own(monkeypatch):
    async def steps(team, processes):
        one, two = processes
        one.say()
        await asyncio.sleep(0.1)
        assert (one.grants(), two.grants()) == ([(0, 1)], [])
        for _ in range(4):
            one.say(seen=1, state='busy')
            two.say()
            await asyncio.sleep(3)
        assert two.grants() == [(0, 1)]     # it does not wait for the first
    with_team(monkeypatch, steps, n=0, period='0')


def test_a_share_of_nothing_is_no_grant(monkeypatch):
    async def steps(team, processes):
        for turn in range(3):
            for process in processes:
                process.say(seen=len(process.grants()))
            await asyncio.sleep(10)
            assert sum(len(process.grants()) for process in processes) == turn + 1
        assert {len(process.grants()) for process in processes} == {1, 2}    # they take turns
    with_team(monkeypatch, steps, n=1)


def said(monkeypatch, steps):
    """What a Worker says while `steps(worker)` run, as a list of dictionaries."""
    lines = []
    monkeypatch.setattr(xmsrv, 'write_all', lambda fd, data: lines.append((fd, json.loads(data))))

    async def main():
        worker = Worker(None)
        worker.runner = types.SimpleNamespace(
            current_metrics=lambda: [Metrics().take_snapshot()], is_healthy=lambda now: True,
                                              backend_states=dict.fromkeys(xmsrv.BACKENDS, UP),
            backend_failures={'store': 'x'}, connections={})
        await steps(worker)
    clock.run(main())
    assert {fd for fd, _ in lines} <= {1}
    return [line for _, line in lines]


def test_a_worker_that_waits_for_its_grant_is_idle_and_says_so_at_once(monkeypatch):
    async def steps(worker):
        waiting = asyncio.ensure_future(worker.wait_for_grant())
        await asyncio.sleep(0)
        assert worker.state is xmsrv.WorkerState.IDLE
        worker.grants.put_nowait(4)
        assert await waiting == 4
    line, = said(monkeypatch, steps)
    assert [line[name] for name in ('state', 'seen', 'healthy', 'windows', 'failures')] == [
        'idle', 0, True, [], {'store': 'x'}]


def test_a_worker_says_twice_a_second_how_it_is_and_tells_of_each_window_once(monkeypatch):
    async def steps(worker):
        talking = asyncio.ensure_future(worker.send_status_regularly())
        await asyncio.sleep(0.1)
        worker.windows.append(types.SimpleNamespace(count={'stored': 1}, times=types.SimpleNamespace(seconds=2.0)))
        await asyncio.sleep(1.5)
        talking.cancel()
    lines = said(monkeypatch, steps)
    assert [[seconds for _, seconds in line['windows']] for line in lines] == [[], [2.0], [], []]
    assert lines[0]['state'] == 'starting'


# -- one process: what it tells of itself

def test_figures_of_a_runner_follow_its_window_and_its_ends(monkeypatch):
    async def steps(it):
        it.queue.connections, it.queue.addresses = [1], [1, 2]
        await it.window()
        it.queue.send(1, 2)
        await asyncio.sleep(0.1)
        total = xmsrv.merge_metrics(it.runner.current_metrics())
        assert total.value_of('xmsrv_messages_total', 'stored') == 2
        assert {total.value_of(name) for name in xmsrv.UP_METRICS.values()} == {1}
        assert (total.value_of('xmsrv_connections', 'up'), total.value_of('xmsrv_connections', 'down')) == (1, 1)
        assert total.value_of(xmsrv.LAST_SUCCESS) > 0
        it.runner.health.report_failure('store', 'gone')
        assert xmsrv.merge_metrics(it.runner.current_metrics()).value_of(xmsrv.UP_METRICS['store']) == 0
    Runner(monkeypatch, period='0').run(steps)


def test_a_topic_that_nobody_has_yet_is_said_and_so_is_a_queue_without_connections(monkeypatch):
    async def steps(it):
        await it.window()
        assert it.runner.failure_text == ''
        it.queue.connections = []
        assert it.runner.failure_text == 'queue unavailable: no nsqd is connected'
        it.queue.addresses = []
        assert it.runner.failure_text == 'queue unavailable: no nsqd has the topic orders yet'
        it.runner.health.report_failure('queue', 'refused')
        assert it.runner.failure_text == 'queue unavailable: refused'
    Runner(monkeypatch).run(steps)


def test_a_runner_that_is_told_to_end_before_it_runs_opens_nothing(monkeypatch):
    it = Runner(monkeypatch)

    async def main():
        it.runner.end_after_window()
        assert await asyncio.wait_for(it.runner.run(), 1) == 0
    clock.run(main())
    assert it.opened == []


def test_a_window_that_is_open_when_a_daemon_ends_is_told_how(monkeypatch):
    async def steps(it):
        window = await it.window()
        it.queue.send(*range(20))
        it.runner.stop()
        await asyncio.sleep(1)
        assert window.end_reason is End.SIGNAL and it.runner.task.done()
    it = Runner(monkeypatch).run(steps)
    assert len(it.queue.requeues) == 20 - len(it.queue.finished) > 0
