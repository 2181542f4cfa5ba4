"""The daemon: its periods, its workers, what it says to systemd, and that neither an outage nor a kill ends or costs
anything."""
import asyncio
import contextlib
import datetime
import fcntl
import glob
import itertools
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import threading
import time

import pytest

import clusters
import proxies
import servers
import xmsrv as xmsrv_module
from flows import CHANNEL, TOPIC, bodies, ended, fill, numbers, passed
from http_answers import figure, get
from servers import wait_until
from xmsrv import Schedule


def count(program, word):
    """How often the log has it."""
    return program.log.read_text().count(word) if program.log.exists() else 0


def stopped(process, seconds=10):
    """SIGTERM ends it well."""
    process.terminate()
    ended(process, seconds=seconds)


def children(process):
    """The pids of its worker processes: proc_pid_task_children(5), for it is asked hundreds of times a second."""
    found = []
    for path in glob.glob(f'/proc/{process.pid}/task/*/children'):
        with contextlib.suppress(OSError), open(path) as file:   # a thread that has ended by now
            found += map(int, file.read().split())
    return sorted(found)


class Systemd(proxies.Thread):
    """The socket that systemd would listen at. It reads all the time, as systemd does: few datagrams find room."""

    def __init__(self, directory):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.path = str(directory / 'notify')
        self.socket.bind(self.path)
        self.socket.settimeout(0.1)
        self.heard = []
        super().__init__()

    def _serve(self):
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                self.heard += [line.partition('=') for line in self.socket.recv(1 << 16).decode().split('\n')]
        self.socket.close()

    def fields(self, name):
        """All values of a field, so far."""
        return [value for key, _, value in list(self.heard) if key == name]


@pytest.fixture
def systemd(workdir, monkeypatch):
    """What x-msrv tells systemd, with a watchdog of 1 s."""
    with Systemd(workdir) as made:
        monkeypatch.setattr(servers.Xmsrv, 'extra', {'NOTIFY_SOCKET': made.path, 'WATCHDOG_USEC': '1000000'})
        yield made


# -------------------------------------------------------------------------------------------------------------- periods

@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 3])
def test_twenty_periods_of_ten(nsqd, program, workers):
    """500 messages wait: never more than 10 in a period, and none is skipped."""
    fill(nsqd, 500)
    program.configure(nsqd, period='2s', workers=workers, nsq={'max-messages': 10})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) >= 200 and time.time() - max(times_of(program)) > 1,
               'twenty periods are over, and no window is open', 80)
    stopped(running)
    times = times_of(program)
    starts = [times[0], *(b for a, b in itertools.pairwise(times) if b - a > 1)]
    sizes = [sum(start <= each < start + 1 for each in times) for start in starts]
    assert sum(sizes) == len(times) and max(sizes) <= 10
    assert sizes[:20] == [10] * 20   # the first one, too, which may find only some of the workers up
    assert all(1.6 < b - a < 2.8 for a, b in itertools.pairwise(starts[:20]))
    assert numbers(program) == list(range(len(times)))
    assert (nsqd.left(TOPIC, CHANNEL), nsqd.stats(TOPIC, CHANNEL)['requeue_count']) == (500 - len(times), 0)


def times_of(program):
    """The times of all records in seconds, sorted."""
    return sorted(epoch(stored_at) for _, _, _, stored_at in program.rows())


def epoch(stored_at):
    """A record's time in seconds."""
    return datetime.datetime.fromisoformat(stored_at.replace('Z', '+00:00')).timestamp()


def test_the_connection_stays_open_between_windows(nsqd, program):
    fill(nsqd, 30)
    program.configure(nsqd, period='500ms', nsq={'max-messages': 10})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 30, 'three windows are over')
    assert nsqd.log.read_bytes().count(b'new client(') == 1
    stopped(running)


def test_no_drift_and_no_making_up():
    schedule = Schedule(10.0)
    assert schedule.seconds_to_start(100.0) == 0
    schedule.start_period(100.0)
    assert schedule.seconds_to_start(103.0) == 7
    schedule.start_period(110.02)   # on time, but for a moment
    assert schedule.seconds_to_start(110.02) == pytest.approx(9.98)
    schedule.start_period(147.0)    # late: three are missed
    assert (schedule.seconds_to_start(147.0), schedule.seconds_to_start(160.0)) == (10, 0)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_window_without_end_flows(nsqd, program, workers):
    fill(nsqd, 1000)
    program.configure(nsqd, period='0', workers=workers, timeout='1s', idle_timeout='100ms')
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 1000, 'all are stored')
    still = passed(2)
    wait_until(still, 'timeout and idle-timeout are long over')
    nsqd.publish(TOPIC, bodies(1, 1000))
    wait_until(lambda: len(program.rows()) == 1001, 'a late one is stored at once', 2)
    assert count(program, 'received') == 0
    stopped(running)
    assert numbers(program) == list(range(1001))
    assert 1 <= count(program, 'received') <= workers   # one to which nothing came has nothing to say


def test_what_comes_beyond_n_is_kept_for_the_next_window(nsqds, program):
    """With RDY moved about between nsqds some may come too many: none is handed back, none is lost, none doubled."""
    started = nsqds(3)
    for place, nsqd in enumerate(started):
        fill(nsqd, 100, 100 * place)
    program.configure(started, period='100ms', nsq={'max-messages': 7})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 300, 'all are stored', 30)
    stopped(running)
    assert numbers(program) == list(range(300))
    assert sum(nsqd.stats(TOPIC, CHANNEL)['requeue_count'] for nsqd in started) == 0
    told = [int(number) for number in re.findall(r'stored (\d+)', program.log.read_text())]
    assert max(told) == 7 and sum(told) == 300


# -------------------------------------------------------------------------------------------------------------- workers

@pytest.mark.slow
def test_workers_killed_ten_times_lose_nothing(nsqds, program, changed):
    """Each killed in mid-flow; one that was up for a while is started again after a second, not later and later."""
    changed('import xmsrv\nxmsrv.WORKER_STABLE_TIME = 0.5\n')
    nsqd, = nsqds(1, '--msg-timeout=1s')
    nsqd.create(TOPIC, CHANNEL)
    nsqd.lapse(TOPIC, CHANNEL)
    program.configure(nsqd, period='0', workers=3, nsq={'max-in-flight': 100})
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 3, 'all workers are subscribed')
    for kill in range(10):
        nsqd.publish(TOPIC, bodies(1000, 1000 * kill))
        victim = children(running)[kill % 3]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda victim=victim: victim not in children(running) and len(children(running)) == 3,
                   'another is started in its place', 30)
    wait_until(lambda: len(program.rows()) == 10000, 'all are stored', 60)
    wait_until(lambda: not nsqd.left(TOPIC, CHANNEL), 'and finished', 30)
    stopped(running)
    assert numbers(program) == list(range(10000))
    assert count(program, 'ended: killed by SIGKILL') >= 5


def test_a_killed_worker_is_no_outage(nsqd, program, systemd):
    """One of two: it stays ready, and says who is missing. Both: they are starting, and no end is down."""
    fill(nsqd, 0)
    port = servers.free_ports()
    program.configure(nsqd, period='0', workers=2, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    well, seen = (200, 'queue: up\nstore: up\ndead letters: up\n'), []

    def says(condition):
        seen.append(get(port, '/readyz'))
        return condition(seen[-1])

    def is_well():
        return says(well.__eq__) and nsqd.stats(TOPIC, CHANNEL)['clients'] == len(children(running)) == 2
    wait_until(is_well, 'both are ready', 20)
    seen.clear()
    for number in 1, 2:
        assert {status for status, _ in seen} <= {200}   # while one works
        for pid in children(running)[:number]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: says(lambda answer: 'has ended' in answer[1]), 'it is noticed')
        wait_until(is_well, 'all is well', 20)
    assert any(status == 503 and told.startswith('queue: starting\nstore: starting\n') for status, told in seen)
    assert not [told for _, told in seen if ': down' in told]
    assert not [text for text in systemd.fields('STATUS') if 'unavailable' in text]
    stopped(running)


def test_workers_wait_for_no_heartbeat_between_windows(nsqd, program):
    """One window after the other: several a second, though a worker says how it is only twice."""
    fill(nsqd, 400)
    program.configure(nsqd, period='0', workers=2, nsq={'max-messages': 20})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) >= 20, 'the first window is over')
    wait_until(lambda: len(program.rows()) == 400, 'all are stored', 5)
    stopped(running)
    assert numbers(program) == list(range(400))


def test_a_worker_that_says_nonsense_is_replaced(nsqd, program, changed):
    """The first one of all."""
    changed('import contextlib, sys\nif "worker" in sys.argv:\n    with contextlib.suppress(FileExistsError):\n'
            '        open("said", "x").close()\n        print("{", flush=True)\n')
    fill(nsqd, 10)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10 and nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both are at work', 20)
    assert count(program, 'sent an invalid status line') == 1
    stopped(running)


def test_workers_end_with_their_parent(nsqd, program):
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both workers are subscribed')
    pids = children(running)
    running.kill()
    wait_until(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in pids), 'they have ended')


@pytest.mark.slow
def test_a_daemon_whose_workers_do_not_stay_up_ends_with_70(nsqd, program, changed):
    changed('import sys\nif "worker" in sys.argv:\n    sys.exit("cannot run")\n')
    fill(nsqd, 0)
    program.configure(nsqd, workers=2)
    ended(program.start('daemon'), 70, 60)
    assert count(program, 'no worker stays up') == 1


def test_a_worker_that_is_silent_for_long_is_killed_and_replaced(nsqds, program, systemd, changed):
    """The others flow meanwhile, and all that says what is up says so, and names the one that does not respond. Nothing
    else ends: no watchdog is there that would."""
    changed('import xmsrv\nxmsrv.WORKER_SILENCE, xmsrv.WORKER_KILL_TIME = 2.0, 6.0\n')
    nsqd, = nsqds(1, '--msg-timeout=1s')
    fill(nsqd, 0)
    port = servers.free_ports()
    program.configure(nsqd, period='0', workers=2, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both workers are subscribed')
    silent, other = children(running)
    os.kill(silent, signal.SIGSTOP)
    text, seen = f'(pid {silent}) is not responding', []

    def is_told():
        seen.append(get(port, '/readyz'))
        return text in seen[-1][1]
    wait_until(is_told, 'who asks hears of it')
    assert {status for status, _ in seen} == {200} and seen[-1][1].startswith('queue: up\nstore: up\n')
    assert get(port, '/healthz') == (200, 'ok\n') and figure(port, 'xmsrv_queue_up') == 1
    assert re.search(f'<p id="status" class="up">[^<]*{re.escape(text)}', get(port, '/')[1])
    wait_until(lambda: text in systemd.fields('STATUS')[-1], 'STATUS says so, too')
    wait_until(lambda: count(program, f'(pid {silent}) ended: killed by SIGKILL'), 'it is killed', 20)
    assert count(program, text)   # twice where it was slow to start
    wait_until(lambda: len(children(running)) == 2 and nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'it is replaced', 20)
    assert other in children(running) and silent not in children(running)
    nsqd.publish(TOPIC, bodies(50))
    wait_until(lambda: len(program.rows()) == 50, 'messages flow', 20)
    stopped(running)


def test_a_daemon_that_was_stopped_keeps_its_workers(nsqd, program, changed):
    """For longer than a worker may be silent."""
    changed('import xmsrv\nxmsrv.WORKER_SILENCE, xmsrv.WORKER_KILL_TIME = 2.5, 3.0\n')
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both workers are subscribed')
    pids = children(running)
    running.send_signal(signal.SIGSTOP)
    wait_until(passed(4), 'it has read nothing for that long')
    running.send_signal(signal.SIGCONT)
    nsqd.publish(TOPIC, bodies(50))
    wait_until(lambda: len(program.rows()) == 50, 'messages flow', 20)
    wait_until(passed(1), 'the workers would be killed by now')
    assert children(running) == pids and not count(program, 'killed')
    stopped(running)


def test_a_worker_that_cannot_be_started_is_tried_again(nsqd, program, workdir, changed):
    """It says why, with a growing pause, and messages flow as soon as one can."""
    changed('import os, xmsrv\nreal = xmsrv.worker_command\n'
            'xmsrv.worker_command = lambda: real() if os.path.exists("there") else ["/nonexistent/python"]\n')
    fill(nsqd, 10)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    failed = '(pid none) ended: it could not be started: No such file or directory'
    wait_until(lambda: count(program, failed) >= 3, 'it is tried again')
    assert running.poll() is None and not program.rows()
    (workdir / 'there').touch()
    wait_until(lambda: len(program.rows()) == 10, 'all are stored', 20)
    stopped(running)


@pytest.mark.slow
def test_workers_of_which_none_can_be_started_end_the_daemon(nsqd, program, changed):
    changed('import xmsrv\nxmsrv.worker_command = lambda: ["/nonexistent/python"]\n')
    program.configure(nsqd, period='0', workers=2)
    ended(program.start('daemon'), os.EX_SOFTWARE, 60)
    assert count(program, 'could not be started') >= 5 and count(program, 'no worker stays up') == 1


def test_what_a_test_has_stopped_is_not_left_behind(nsqd, workdir):
    """A worker that can't see that its daemon has gone."""
    program = servers.Xmsrv(workdir)
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both workers are subscribed')
    pids = children(running)
    assert sorted(program.workers()) == sorted(pids)
    os.kill(pids[0], signal.SIGSTOP)
    program.close()
    assert not any(os.path.exists(f'/proc/{pid}/exe') for pid in pids)


def test_a_worker_that_does_not_end_is_killed(nsqd, program):
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=2, aerospike={'total-timeout': '100ms'})
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both workers are subscribed')
    os.kill(children(running)[0], signal.SIGSTOP)
    stopped(running)
    assert count(program, 'did not stop in time: killed') == 1


# ------------------------------------------------------------------------------------------------ the file, and the end

def test_a_good_file_holds_from_the_next_window_on_and_a_bad_one_never(nsqd, program, systemd):
    fill(nsqd, 1000)
    program.configure(nsqd, period='300ms', nsq={'max-messages': 1})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) >= 3, 'it is under way')
    program.configure(nsqd, period='300ms', nsq={'max-messages': 100}, timeout='soon', nonsense='1')
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: count(program, 'keeping the current configuration'), 'the bad one is reported')
    assert count(program, 'timeout = soon: not a duration') == count(program, 'nonsense = 1: no such option') == 1
    there = len(program.rows())
    wait_until(lambda: len(program.rows()) >= there + 2, 'it goes on')
    assert len(program.rows()) < there + 20
    program.configure(nsqd, period='300ms', nsq={'max-messages': 100})
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: len(program.rows()) == 1000, 'the good one holds')
    stopped(running)
    assert numbers(program) == list(range(1000))
    assert (len(systemd.fields('RELOADING')), len(systemd.fields('MONOTONIC_USEC'))) == (2, 2)
    assert (len(systemd.fields('READY')), systemd.fields('STOPPING')) == (3, ['1'])


@pytest.fixture
def missing(workdir):
    """Settings with a directory that is not mounted yet, what makes it, and what is said until then."""
    return ({'dead_letter': {'topic': None, 'file': workdir / 'mount' / 'dead.json'}}, (workdir / 'mount').mkdir,
            'its directory is not there')


@pytest.mark.parametrize('workers', [1, 2])
def test_a_directory_that_is_not_there_yet_is_waited_for(nsqd, program, systemd, missing, workers):
    settings, make, said = missing
    fill(nsqd, 10)
    port = servers.free_ports()
    program.configure(nsqd, period='200ms', workers=workers, metrics={'listen': f'127.0.0.1:{port}'}, **settings)
    assert said in program.run('once', expect=os.EX_UNAVAILABLE).stderr
    running = program.start('daemon')
    wait_until(lambda: systemd.fields('READY'), 'it is ready')
    wait_until(lambda: any(said in text for text in systemd.fields('STATUS')), 'systemd hears of it')
    status, told = get(port, '/readyz')
    assert status == 503 and 'waiting for configuration: ' in told and said in told
    assert get(port, '/healthz')[0] == 200 and not program.rows()
    make()
    wait_until(lambda: len(program.rows()) == 10, 'all are stored', 40)
    wait_until(lambda: get(port, '/readyz') == (200, 'queue: up\nstore: up\ndead letters: up\n'), 'it is well', 20)
    stopped(running)
    assert count(program, said) == count(program, 'configuration: recovered after') == 1


def test_a_secret_and_a_certificate_that_are_not_there_yet_are_waited_for(nsqd, program, workdir):
    """Both are named at once; also one that is there and does not load is waited for."""
    fill(nsqd, 10)
    tls = {'ca-file': workdir / 'ca.pem'}
    with clusters.standin(users={'writer': 's3cret'}) as cluster:
        settings = cluster.settings(**{'user': 'writer', 'password-file': workdir / 'password'})
        program.configure(nsqd, period='200ms', **servers.merge(settings, {'nsq': {'tls': tls}}))
        running = program.start('daemon')
        wait_until(lambda: re.search(r'ca\.pem: No such file.*password: No such file', program.log.read_text()), 'both')
        (workdir / 'ca.pem').write_text('half a certificate')
        wait_until(lambda: count(program, 'the certificates do not load'), 'it does not load', 20)
        program.configure(nsqd, period='200ms', **settings)
        running.send_signal(signal.SIGHUP)
        alone = f'for configuration: [aerospike] password-file = {workdir}/password: No such file or directory\n'
        wait_until(lambda: count(program, alone), 'it waits for the other one alone')
        assert cluster.stored() == count(program, 'reloaded') == 0
        (workdir / 'password').write_text('s3cret')
        wait_until(lambda: cluster.stored() == 10, 'all are stored', 40)
        assert count(program, 'configuration reloaded') == 1
        stopped(running)


def test_a_daemon_that_waits_for_a_file_ends_at_once_and_takes_another_configuration(nsqd, program, missing):
    settings, _, said = missing
    fill(nsqd, 10)
    program.configure(nsqd, **settings)
    running = program.start('daemon')
    wait_until(lambda: count(program, said), 'it waits')
    stopped(running, 3)
    running = program.start('daemon')
    wait_until(lambda: count(program, said) == 2, 'it waits')
    program.configure(nsqd)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: len(program.rows()) == 10, 'all are stored', 20)
    stopped(running)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_reload_holds_once_its_files_are_there_and_messages_flow_meanwhile(nsqd, program, systemd, missing, workers):
    settings, make, said = missing
    fill(nsqd, 10)
    port = servers.free_ports()
    listen = {'metrics': {'listen': f'127.0.0.1:{port}'}}
    program.configure(nsqd, period='200ms', workers=workers, **listen)
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way', 20)
    program.configure(nsqd, period='200ms', workers=workers, sqlite={'set': 'new'}, **listen, **settings)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: count(program, f'{said}; keeping the current configuration'), 'it says so')
    wait_until(lambda: any(said in text for text in systemd.fields('STATUS')), 'systemd hears of it')
    wait_until(lambda: said in get(port, '/readyz')[1] and get(port, '/readyz')[0] == 200, 'so does who asks', 20)
    program.configure(nsqd, timeout='soon')
    running.send_signal(signal.SIGHUP)   # changes nothing of what holds; what waited has been replaced
    wait_until(lambda: count(program, 'timeout = soon'), 'it is reported')
    wait_until(lambda: said not in get(port, '/readyz')[1], 'nothing waits any more')
    program.configure(nsqd, period='200ms', workers=workers, sqlite={'set': 'new'}, **listen, **settings)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: count(program, f'{said}; keeping the current configuration') == 2, 'it waits again')
    fill(nsqd, 10, 10)
    wait_until(lambda: len(program.rows()) == 20, 'messages flow', 20)
    assert {where for where, _, _, _ in program.rows()} == {TOPIC} and not count(program, 'configuration reloaded')
    make()
    wait_until(lambda: count(program, 'configuration: recovered after'), 'the new one holds', 40)
    wait_until(lambda: count(program, 'configuration reloaded') == 1, 'it says so')
    sent = itertools.count(20)

    def stored_by_the_new():   # what comes while the open window ends is stored by the old one
        nsqd.publish(TOPIC, bodies(1, next(sent)))
        return 'new' in {where for where, _, _, _ in program.rows()}
    wait_until(stored_by_the_new, 'it does', 20)
    wait_until(lambda: not nsqd.left(TOPIC, CHANNEL), 'all are finished', 20)
    stopped(running)
    assert numbers(program) == list(range(next(sent)))


def test_a_reload_without_its_file_waits_for_it_and_messages_flow_meanwhile(nsqd, program, systemd):
    """Who replaces the file by two steps need not send the signal twice."""
    fill(nsqd, 10)
    port = servers.free_ports()
    program.configure(nsqd, period='200ms', metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way', 20)
    program.path.unlink()
    running.send_signal(signal.SIGHUP)
    waits = f'waiting for configuration: {program.path}: No such file or directory'
    wait_until(lambda: count(program, f'{waits}; keeping the current configuration'), 'it says so')
    wait_until(lambda: any(text.startswith(waits) for text in systemd.fields('STATUS')), 'systemd hears of it')
    ready = (200, f'queue: up\nstore: up\ndead letters: up\n{waits}\n')
    wait_until(lambda: get(port, '/readyz') == ready, 'so does who asks', 20)
    fill(nsqd, 10, 10)
    wait_until(lambda: len(program.rows()) == 20, 'messages flow', 20)
    program.configure(nsqd, period='200ms', sqlite={'set': 'new'})
    wait_until(lambda: count(program, 'configuration reloaded'), 'it is in force', 40)
    fill(nsqd, 10, 20)
    wait_until(lambda: len(program.rows()) == 30 and 'new' in {where for where, _, _, _ in program.rows()}, 'it is', 20)
    stopped(running)


def test_a_reload_changes_the_number_of_workers(nsqd, program):
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    wait_until(lambda: len(children(running)) == 2, 'there are two')
    program.configure(nsqd, period='0', workers=3)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 3, 'there are three')
    program.configure(nsqd, period='0', workers=1)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: not children(running) and nsqd.stats(TOPIC, CHANNEL)['clients'] == 1, 'there is none')
    stopped(running)


def test_a_reload_makes_no_second_window_in_a_period(nsqd, program):
    fill(nsqd, 100)
    program.configure(nsqd, period='5s', nsq={'max-messages': 10})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'the first window is over')
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: count(program, 'configuration reloaded'), 'the file is read again')
    still = passed(1.5)
    wait_until(still, 'a window would have begun by now')
    assert len(program.rows()) == 10
    wait_until(lambda: len(program.rows()) == 20, 'the next one comes in its time', 6)
    stopped(running)


@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('settings', [{'period': '300ms', 'nsq': {'max-messages': 10}}, {'period': '0'}],
                         ids=['windows', 'without end'])
def test_a_daemon_whose_lock_was_replaced_waits_until_the_other_process_ends(nsqd, program, workdir, workers, settings):
    fill(nsqd, 10)
    program.configure(nsqd, workers=workers, **settings)
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way', 20)
    lock, = lock_files(workdir / 'state')
    with open(f'{lock}.new', 'w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        os.replace(f'{lock}.new', lock)
        wait_until(lambda: count(program, f'{lock} was removed or replaced: taking the lock again') == 1, 'it says so')
        wait_until(lambda: count(program, 'waiting for lock: process'), 'it waits', 20)
        wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['clients'], 'it takes nothing')
        nsqd.publish(TOPIC, bodies(10, 10))
        wait_until(passed(1), 'several windows would be over')
        assert len(program.rows()) == 10
    wait_until(lambda: len(program.rows()) == 20, 'messages flow', 20)
    stopped(running)


def test_a_reload_with_another_state_directory_takes_its_lock(nsqd, program, workdir):
    fill(nsqd, 0)
    program.configure(nsqd, period='200ms')
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'it is under way')
    program.configure(nsqd, period='200ms', state_dir=workdir / 'other')
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: lock_files(workdir / 'other'), 'the other lock is there')
    assert f'process {running.pid}' in program.run('once', expect=os.EX_TEMPFAIL).stderr
    stopped(running)


def test_a_reload_while_the_lock_is_waited_for_takes_the_lock_of_the_new_state_directory(nsqd, program, workdir):
    fill(nsqd, 0)
    program.configure(nsqd, timeout='60s', idle_timeout='60s')
    once = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 1, 'another run has the lock')
    daemon = program.start('daemon')
    wait_until(lambda: count(program, f'waiting for lock: process {once.pid} has '), 'the daemon waits for it')
    program.configure(nsqd, state_dir=workdir / 'other')
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'it waits no more')
    stopped(daemon)
    stopped(once)


def test_a_hang_up_at_any_moment_ends_nothing(nsqd, program):
    """Also before it has read its file."""
    fill(nsqd, 10)
    program.configure(nsqd, period='200ms')
    running = program.start('daemon')
    wait_until(lambda: servers.handles(running, signal.SIGHUP), 'it is past its first lines')
    for _ in range(100):   # without an end none would ever come to a window
        running.send_signal(signal.SIGHUP)
        assert running.poll() is None
    wait_until(lambda: len(program.rows()) == 10, 'it goes on', 20)
    stopped(running)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_stop_in_mid_window_ends_soon(nsqd, program, workers, changed):
    """Within total-timeout and 2 s, though timeout is a minute and a lot is waiting."""
    changed(SLOW)
    fill(nsqd, 20000)
    program.configure(nsqd, timeout='60s', workers=workers)
    running = program.start('daemon')
    wait_until(program.rows, 'it is under way')
    stopped(running, 4)
    wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['in_flight_count'], 'nsqd has read all answers')
    assert numbers(program) == sorted(numbers(program)) and len(numbers(program)) < 20000
    assert len(set(numbers(program))) == len(numbers(program)) == 20000 - nsqd.stats(TOPIC, CHANNEL)['depth']


SLOW = '''
import threading
import xmsrv
write = xmsrv.SqliteStore.write
xmsrv.SqliteStore.batch_size = 100
xmsrv.SqliteStore.write = lambda self, records: threading.Event().wait(0.1) or write(self, records)
'''


# ------------------------------------------------------------------------------------------------------------- the lock

def lock_files(directory):
    """The locks in a state-dir, each of a configuration."""
    return list(directory.glob('*.lock'))


@pytest.mark.parametrize('way', ['link', 'linked directory', 'relative'])
def test_two_names_of_one_file_exclude_each_other(nsqd, program, workdir, way):
    fill(nsqd, 5)
    program.configure(nsqd, period='60s', nsq={'max-messages': 5})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 5, 'it is under way')
    (workdir / 'other.conf').symlink_to(program.path)
    (workdir / 'directory').symlink_to(workdir)
    path = {'link': workdir / 'other.conf', 'linked directory': workdir / 'directory' / 'x-msrv.conf',
            'relative': 'state/../x-msrv.conf'}[way]
    ran = program.run('-c', path, 'once', expect=os.EX_TEMPFAIL)
    assert f'process {running.pid}' in ran.stderr
    stopped(running)
    assert len(lock_files(workdir / 'state')) == 1


def test_two_files_of_one_name_do_not_exclude_each_other(nsqd, program, workdir):
    """With one state-dir; each still excludes itself."""
    paths = [workdir / 'first' / ('long' * 60 + '.conf'), workdir / 'second' / ('long' * 60 + '.conf')]
    running = []
    for path, topic in zip(paths, ('a', 'b'), strict=True):
        path.parent.mkdir()
        program.path = path
        program.configure(nsqd, topic=topic, timeout='60s', idle_timeout='60s')
        running.append(program.start('once'))
        wait_until(lambda topic=topic: nsqd.stats(topic, CHANNEL)['clients'], 'it is subscribed')
    for path, process in zip(paths, running, strict=True):
        assert f'process {process.pid}' in program.run('-c', path, 'once', expect=os.EX_TEMPFAIL).stderr
    for process in running:
        stopped(process)
    locks = lock_files(workdir / 'state')
    assert sorted(path.name[:50] for path in locks) == [('long' * 13)[:50]] * 2


def test_a_link_that_is_changed_and_reloaded_takes_the_lock_of_its_new_file(nsqd, program, workdir):
    fill(nsqd, 0)
    first, second = workdir / 'first.conf', workdir / 'second.conf'
    for program.path in (first, second):
        program.configure(nsqd, period='200ms')
    link = program.path = workdir / 'x-msrv.conf'
    link.symlink_to(first)
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'it is under way')
    assert f'process {running.pid}' in program.run('-c', first, 'once', expect=os.EX_TEMPFAIL).stderr
    link.unlink()
    link.symlink_to(second)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: len(lock_files(workdir / 'state')) == 2, 'the other lock is there')
    assert f'process {running.pid}' in program.run('-c', second, 'once', expect=os.EX_TEMPFAIL).stderr
    program.run('-c', first, 'once')
    stopped(running)


def test_a_configuration_from_a_pipe_leaves_one_lock(nsqd, program, workdir):
    """Not another one with each run."""
    program.configure(nsqd)
    for _ in range(2):
        command = f'cat {program.path} | {servers.PROGRAM} -c /dev/stdin once'
        subprocess.run(['sh', '-c', command], check=True, timeout=30)
    assert len(lock_files(workdir / 'state')) == 1


def test_once_says_who_has_the_configuration(nsqd, program, workdir):
    fill(nsqd, 5)
    program.configure(nsqd, period='60s')
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 5, 'it is under way')
    ran = program.run('once', expect=os.EX_TEMPFAIL)
    lock, = lock_files(workdir / 'state')
    assert f'process {running.pid}' in ran.stderr and str(lock) in ran.stderr
    assert lock.read_text().splitlines() == [str(running.pid), str(program.path)]
    stopped(running)
    program.run('once')


def test_the_daemon_waits_for_once_and_says_so(nsqd, program, systemd):
    fill(nsqd, 0)
    program.configure(nsqd, timeout='60s', idle_timeout='60s')
    first = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'it is subscribed')
    daemon = program.start('daemon')
    wait_until(lambda: count(program, f'waiting for lock: process {first.pid} has '), 'the daemon says so')
    wait_until(lambda: any('waiting for lock: ' in text for text in systemd.fields('STATUS')), 'to systemd as well')
    stopped(first)
    nsqd.publish(TOPIC, bodies(3))
    wait_until(lambda: len(program.rows()) == 3, 'the daemon has taken over')
    stopped(daemon)


@pytest.mark.parametrize('make', [os.mkfifo, lambda path: path.symlink_to('/dev/zero')], ids=['FIFO', 'device'])
def test_a_lock_that_is_no_file_is_69_and_waited_for(nsqd, program, workdir, make):
    fill(nsqd, 10)
    program.configure(nsqd)
    program.run('once')
    lock, = (workdir / 'state').glob('*.lock')
    lock.unlink()
    make(lock)
    fault = f'{program.path}: state-dir = {workdir}/state: {lock}: not a regular file\n'
    assert program.run('once', expect=os.EX_UNAVAILABLE).stderr == f'error: {fault}'
    running = program.start('daemon')
    wait_until(lambda: count(program, f'waiting for lock: {fault}'), 'the daemon says so')
    fill(nsqd, 10, 10)
    lock.unlink()
    wait_until(lambda: len(program.rows()) == 20, 'it goes on', 20)
    stopped(running)


def test_a_state_directory_that_cannot_be_is_69_and_waited_for(nsqd, program, systemd, workdir):
    """`once`, the daemon and `check --connect` say the same of it; check without it does not look."""
    (workdir / 'file').write_text('')
    fill(nsqd, 10)
    port = servers.free_ports()
    program.configure(nsqd, state_dir=workdir / 'file' / 'state', metrics={'listen': f'127.0.0.1:{port}'})
    fault = (f'{program.path}: state-dir = {workdir}/file/state: cannot be created: {workdir}/file is not a directory')
    program.run('check')
    for command in ['once'], ['check', '--connect']:
        assert program.run(*command, expect=os.EX_UNAVAILABLE).stderr == f'error: {fault}\n'
    running = program.start('daemon')
    waits = f'waiting for lock: {fault}'
    wait_until(lambda: systemd.fields('STATUS')[-1:] == [waits], 'systemd hears of it')
    assert get(port, '/readyz') == (503, ''.join(f'{end}: starting\n' for end in BACKENDS) + f'{waits}\n')
    assert waits in get(port, '/')[1] and count(program, waits) == 1
    (workdir / 'file').unlink()
    wait_until(lambda: len(program.rows()) == 10, 'all are stored', 20)
    assert count(program, 'lock: recovered after') == 1
    stopped(running)


def test_a_lock_that_is_no_longer_waited_for_is_not_in_the_status(nsqd, program, systemd):
    """A window without end never brings another line."""
    fill(nsqd, 0)
    port = servers.free_ports()
    program.configure(nsqd, timeout='60s', idle_timeout='60s', metrics={'listen': f'127.0.0.1:{port}'})
    first = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'it is subscribed')
    daemon = program.start('daemon')
    wait_until(lambda: any('waiting for lock: process' in text for text in systemd.fields('STATUS')), 'it waits')
    stopped(first)
    wait_until(lambda: get(port, '/readyz')[0] == 200, 'it is ready')
    wait_until(lambda: systemd.fields('STATUS')[-1] == 'starting', 'and says so')   # the first window is open
    stopped(daemon)


# ------------------------------------------------------------------------------------- outages, and what systemd hears

def test_a_boot_with_the_store_down_is_ready_and_says_so(nsqd, program, standin, systemd):
    fill(nsqd, 10)
    standin.server.refuse()
    port = servers.free_ports()
    program.configure(nsqd, period='200ms', metrics={'listen': f'127.0.0.1:{port}'}, **standin.settings())
    running = program.start('daemon')
    wait_until(lambda: systemd.fields('READY'), 'it is ready')
    wait_until(lambda: any(standin.address in text for text in systemd.fields('STATUS')), 'and says what is down')
    assert get(port, '/healthz')[0] == 200
    status, told = get(port, '/readyz')
    assert status == 503 and told.startswith('queue: closed\nstore: down\ndead letters: up\nstore unavailable: ')
    standin.server.listen()
    wait_until(lambda: standin.stored() == 10, 'all are stored', 40)
    wait_until(lambda: get(port, '/readyz') == (200, 'queue: up\nstore: up\ndead letters: up\n'), 'both ends are up')
    stopped(running)
    assert count(program, 'unavailable') == count(program, 'recovered after') == 1


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('period', ['0', '300ms'])
def test_a_store_away_for_five_watchdog_intervals_ends_nothing(nsqd, program, standin, systemd, period, workers):
    fill(nsqd, 100)
    settings = standin.settings(**{'total-timeout': '300ms'})
    program.configure(nsqd, period=period, timeout='2s', workers=workers, **settings)
    running = program.start('daemon')
    wait_until(lambda: standin.stored() == 100, 'it is under way')
    standin.server.refuse()
    nsqd.publish(TOPIC, bodies(100, 100))
    still, beats = passed(6), len(systemd.fields('WATCHDOG'))
    wait_until(still, 'the outage goes on for more than five watchdog intervals')
    assert len(systemd.fields('WATCHDOG')) - beats >= 9   # two an interval; the machine may be busy
    standin.server.listen()
    wait_until(lambda: standin.stored() == 200, 'all are stored', 60)
    wait_until(lambda: not nsqd.left(TOPIC, CHANNEL), 'and finished', 20)
    stopped(running)
    assert standin.numbers() == list(range(200))


def test_a_queue_that_goes_away_and_comes_back(nsqds, program, systemd):
    nsqd, = nsqds(1, '--mem-queue-size=0', '--sync-every=1')
    fill(nsqd, 10)
    program.configure(nsqd, period='200ms', timeout='1s')
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way')
    nsqd.stop()
    wait_until(lambda: count(program, f'nsqd {nsqd.tcp}'), 'it is missed')
    still, beats = passed(3), len(systemd.fields('WATCHDOG'))
    wait_until(still, 'it is away for a while')
    assert len(systemd.fields('WATCHDOG')) - beats >= 4
    nsqd.restart()
    nsqd.publish(TOPIC, bodies(10, 10))
    wait_until(lambda: len(program.rows()) == 20, 'all are stored', 30)
    wait_until(lambda: count(program, 'recovered after') == 1, 'it says that it is over')
    stopped(running)


@pytest.mark.parametrize('period', ['0', '300ms'])
def test_an_outage_that_changes_its_reason_is_told_with_the_latest(nsqd, program, systemd, period):
    """nsqd is away; then something else has its port."""
    port = servers.free_ports()
    fill(nsqd, 10)
    program.configure(nsqd, period=period, timeout='1s', metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way')

    def told(reason):
        """The log, STATUS, /readyz and the page say it."""
        return (count(program, f'queue unavailable (no nsqd can be reached: {nsqd.tcp}: {reason}')
                and reason in systemd.fields('STATUS')[-1] and get(port, '/')[1].count(reason) >= 2
                and 'queue: down\nstore: up\ndead letters: up\nqueue unavailable: ' in get(port, '/readyz')[1]
                and reason in get(port, '/readyz')[1])
    nsqd.stop()
    wait_until(lambda: told('Connection refused'), 'it is away', 20)
    with proxies.Says(proxies.frame(b'E_INVALID not nsqd', 1), nsqd.port):
        wait_until(lambda: told('E_INVALID not nsqd'), 'another answers', 20)
    nsqd.restart()
    wait_until(lambda: count(program, 'queue recovered after') == 1, 'it is back', 20)
    stopped(running)


def test_a_queue_that_is_not_there_at_the_start(nsqd, program, systemd):
    fill(nsqd, 10)
    nsqd.stop()
    program.configure(nsqd, period='200ms')
    running = program.start('daemon')
    wait_until(lambda: count(program, 'no nsqd can be reached'), 'it says so')
    assert systemd.fields('READY') == ['1']
    nsqd.restart()
    wait_until(lambda: len(program.rows()) == 10, 'all are stored', 40)
    stopped(running)


@pytest.mark.parametrize('period', ['0', '200ms'])
def test_a_topic_that_nobody_has_yet_is_in_the_status(nsqd, nsqlookupd, program, systemd, period):
    port = servers.free_ports()
    program.configure(nsqlookupd, period=period, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    said = f'queue unavailable: no nsqd has the topic {TOPIC} yet'
    wait_until(lambda: said in systemd.fields('STATUS'), 'systemd hears of it')
    assert get(port, '/readyz')[0] == 503
    assert (figure(port, 'xmsrv_store_up'), count(program, 'no nsqd has the topic')) == (1, 1)
    stopped(running)


@pytest.mark.parametrize('workers', [1, 3])
def test_what_is_not_up_yet_is_in_the_status(nsqd, program, systemd, workers):
    """A window without end flows once it can, not before."""
    port = servers.free_ports()
    fill(nsqd, 10)
    nsqd.suspend()
    program.configure(nsqd, period='0', workers=workers, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: any('not up yet: queue, store' in text for text in systemd.fields('STATUS')), 'it waits')
    assert get(port, '/readyz')[0] == 503
    assert not any(text.startswith('flowing') for text in systemd.fields('STATUS'))
    nsqd.resume()
    wait_until(lambda: len(program.rows()) == 10, 'all are stored', 20)
    wait_until(lambda: systemd.fields('STATUS')[-1].startswith('flowing') and get(port, '/readyz')[0] == 200,
               'all agree', 20)
    stopped(running)


def test_a_window_without_end_says_when_all_is_well_again(nsqd, program, workdir, systemd):
    """Also where nothing comes that could show it."""
    fill(nsqd, 0)
    port = servers.free_ports()
    (workdir / 'there').write_text('no database')
    program.configure(nsqd, period='0', sqlite={'path': workdir / 'there'}, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: count(program, 'unavailable'), 'it says that the store is down')
    assert (get(port, '/readyz')[0], figure(port, 'xmsrv_store_up')) == (503, 0)
    (workdir / 'there').unlink()
    wait_until(lambda: count(program, 'recovered after'), 'it says that it is back', 20)
    wait_until(lambda: get(port, '/readyz')[0] == 200 and figure(port, 'xmsrv_store_up') == 1, 'so does its site')
    wait_until(lambda: systemd.fields('STATUS')[-1].startswith('flowing'), 'and its status')
    stopped(running)


BACKENDS = ('queue', 'store', 'dead letters')


def down_in_the_log(program):
    """The ends that the log says fail: the last word on each."""
    words = dict(re.findall(r'(queue|store|dead letters) (unavailable \(|recovered after)', program.log.read_text()))
    return {end for end, word in words.items() if word.startswith('unavailable')}


def down_elsewhere(port, systemd):
    """The ends that STATUS, /readyz, the page (its marks and its text) and the metrics say are down: a set of each."""
    readyz, page, status = get(port, '/readyz'), get(port, '/')[1], systemd.fields('STATUS')[-1]
    text = re.search('<p id="status"[^>]*>(.*?)</p>', page)[1]
    metrics = {'queue': 'xmsrv_queue_up', 'store': 'xmsrv_store_up', 'dead letters': 'xmsrv_dead_letters_up'}
    down = [{end for end in BACKENDS if f'{end} unavailable' in status},
            {end for end in BACKENDS if f'{end} unavailable' in text},
            {end for end in BACKENDS if f'{end}: down\n' in readyz[1]},
            {end for end in BACKENDS if f'class="down">{end}:' in page},
            {end for end, name in metrics.items() if not figure(port, name)}]
    assert (readyz[0] == 503) == bool(down[2])
    return down


@contextlib.contextmanager
def away(end, nsqd, standin, directory):
    """An end is away, and meanwhile there are messages that need it."""
    hidden = directory.with_suffix('.hidden')
    {'queue': nsqd.stop, 'store': standin.server.refuse, 'dead letters': lambda: directory.rename(hidden)}[end]()
    if end != 'queue':
        nsqd.publish(TOPIC, ['no JSON'] if end == 'dead letters' else bodies(5, 10))
    yield
    {'queue': nsqd.restart, 'store': standin.server.listen, 'dead letters': lambda: hidden.rename(directory)}[end]()


@pytest.mark.parametrize('period', ['0', '300ms'])
@pytest.mark.parametrize('end', BACKENDS)
def test_all_that_tells_of_an_outage_tells_the_same(nsqds, program, standin, systemd, workdir, end, period):
    """The log, STATUS, /readyz, /healthz, the page and the metrics: in an outage, and when it is over."""
    nsqd, = nsqds(1, '--mem-queue-size=0', '--sync-every=1')
    fill(nsqd, 10)
    (workdir / 'dead').mkdir()
    port = servers.free_ports()
    program.configure(nsqd, period=period, timeout='2s', metrics={'listen': f'127.0.0.1:{port}'},
                      **{'dead-letter': {'topic': '', 'file': workdir / 'dead' / 'letters'}},
                      **standin.settings(**{'total-timeout': '300ms'}))
    running = program.start('daemon')
    wait_until(lambda: standin.stored() == 10, 'it is under way')
    with away(end, nsqd, standin, workdir / 'dead'):
        wait_until(lambda: down_in_the_log(program) == {end}, 'the log tells of it', 20)
        wait_until(lambda: down_elsewhere(port, systemd) == [{end}] * 5, 'all others tell the same', 20)
        still = passed(5)   # some windows: one that fails for the store closes the connections to nsqd, too
        wait_until(lambda: still() or down_elsewhere(port, systemd) != [{end}] * 5, 'the outage goes on')
        assert still() and down_in_the_log(program) == {end}
        assert get(port, '/healthz') == (200, 'ok\n')   # it goes on: nobody has to restart it
    wait_until(lambda: down_in_the_log(program) == set(), 'the log tells that it is over', 40)
    wait_until(lambda: down_elsewhere(port, systemd) == [set()] * 5, 'so do all others', 20)
    assert get(port, '/healthz') == (200, 'ok\n')
    stopped(running)


def test_a_secret_that_is_missing_for_a_while_ends_nothing(nsqd, program, workdir):
    fill(nsqd, 10)
    (workdir / 'password').write_text('s3cret')
    with clusters.standin(users={'writer': 's3cret'}) as cluster:
        program.configure(nsqd, period='200ms', **cluster.settings(**{
            'user': 'writer', 'password-file': workdir / 'password', 'total-timeout': '300ms'}))
        running = program.start('daemon')
        wait_until(lambda: cluster.stored() == 10, 'it is under way')
        (workdir / 'password').unlink()
        cluster.server.judge = lambda write: 8
        nsqd.publish(TOPIC, bodies(1, 10))
        wait_until(lambda: count(program, 'No such file'), 'it says what is missing', 20)
        cluster.server.judge = lambda write: None
        (workdir / 'password').write_text('s3cret')
        wait_until(lambda: cluster.stored() == 11, 'it goes on', 30)
        stopped(running)


def test_a_lost_queue_is_no_success(nsqd, program):
    fill(nsqd, 10)
    port = servers.free_ports()
    program.configure(nsqd, period='300ms', timeout='1s', metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way')
    nsqd.kill()
    wait_until(lambda: count(program, 'Connection refused'), 'it is missed', 20)
    success = figure(port, 'xmsrv_last_success_timestamp_seconds')
    still = passed(2)
    wait_until(still, 'several periods have passed')
    assert figure(port, 'xmsrv_last_success_timestamp_seconds') == success
    assert (figure(port, 'xmsrv_store_up'), figure(port, 'xmsrv_connections{state="up"}')) == (1, 0)
    # nothing was in flight, so nothing is said to have been requeued
    assert count(program, f'the window failed: no nsqd can be reached: {nsqd.tcp}: Connection refused') > 0
    assert not count(program, 'requeued 0 messages') and not count(program, ' received 0, ')
    stopped(running)


@pytest.mark.slow
def test_one_connection_to_each_nsqd_after_outages_of_nsqlookupd(nsqds, nsqlookupd, program):
    nsqd, = nsqds(1, lookupd=[nsqlookupd])
    fill(nsqd, 5)
    wait_until(lambda: nsqlookupd.producers(TOPIC), 'nsqlookupd knows it')
    program.configure(nsqlookupd, period='300ms', timeout='500ms')
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 5, 'it is under way')
    for outage in range(2):
        nsqd.stop()
        wait_until(lambda: not nsqlookupd.producers(TOPIC), 'nsqlookupd knows it no more')
        still = passed(1.5)
        wait_until(still, 'it is away for some windows')
        nsqd.restart()
        nsqd.publish(TOPIC, bodies(5, 5 + 5 * outage))
        wait_until(lambda outage=outage: len(program.rows()) == 10 + 5 * outage, 'all are stored', 40)
        assert nsqd.stats(TOPIC, CHANNEL)['clients'] == 1
    stopped(running)


def test_nsqds_that_nsqlookupd_names_later_are_found(nsqds, nsqlookupd, program):
    first, second = nsqds(2, lookupd=[nsqlookupd])
    fill(first, 5)
    wait_until(lambda: nsqlookupd.producers(TOPIC), 'nsqlookupd knows the first')
    program.configure(nsqlookupd, period='200ms')
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 5, 'it is under way')
    fill(second, 5, 5)
    wait_until(lambda: len(program.rows()) == 10, 'the second is found', 20)
    stopped(running)


def beats_end(systemd):
    """The watchdog is not fed for so long that systemd would act: three times its interval."""
    def silent():
        nonlocal seen, since
        if len(systemd.fields('WATCHDOG')) != seen:
            seen, since = len(systemd.fields('WATCHDOG')), time.monotonic()
        return time.monotonic() - since > 3
    seen, since = -1, time.monotonic()
    wait_until(silent, 'the watchdog is not fed any more', 40)


@pytest.mark.slow
@pytest.mark.parametrize('who', ['daemon', 'workers'])
def test_a_stuck_process_starves_the_watchdog(nsqd, program, systemd, who):
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=1 if who == 'daemon' else 2)
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] and systemd.fields('WATCHDOG'), 'it is under way')
    for pid in [running.pid] if who == 'daemon' else children(running):
        os.kill(pid, signal.SIGSTOP)
    beats_end(systemd)


@pytest.mark.slow
def test_a_store_call_that_never_ends_starves_the_watchdog(nsqd, program, systemd, changed):
    changed('import threading, xmsrv\nxmsrv.SqliteStore.write = lambda self, records: threading.Event().wait(600)\n'
            'xmsrv.SqliteStore.call_timeout = 1.0\n')
    fill(nsqd, 5)
    program.configure(nsqd, period='0')
    running = program.start('daemon')
    wait_until(lambda: systemd.fields('WATCHDOG'), 'it is under way')
    beats_end(systemd)
    stopped(running)


HANGS = ('import threading, xmsrv\nwrite = xmsrv.SqliteStore.write\nxmsrv.SqliteStore.call_timeout = 1.0\n'
         'def hang(self, records):\n    open("called", "w").close()\n    threading.Event().wait(600)\n'
         'xmsrv.SqliteStore.write = hang\n'
         'xmsrv.SqliteStore.close = lambda self: open("closed", "w").close()\n')


@pytest.mark.parametrize('command', ['once', 'daemon'])
def test_a_stop_does_not_wait_for_a_call_that_never_ends(nsqd, program, workdir, changed, command):
    """The store is left as it is: to close it under a call is for no store to bear. The messages go back."""
    changed(HANGS)
    fill(nsqd, 5)
    program.configure(nsqd, timeout='60s')
    running = program.start(command)
    wait_until((workdir / 'called').exists, 'the call is under way')
    stopped(running, 10)
    assert not (workdir / 'closed').exists()
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['requeue_count'] == 5, 'they have gone back')


class Closing:
    """A store that says whether it was closed, and whose close() may hang for some seconds."""

    def __init__(self, seconds=0.0):
        self.seconds, self.closed = seconds, threading.Event()

    def close(self):
        self.closed.set()
        threading.Event().wait(self.seconds)


@pytest.mark.parametrize('under_way', [False, True])
def test_a_store_is_closed_unless_a_call_is_under_way(under_way):
    store, over = Closing(), threading.Event()

    async def close():
        pool = xmsrv_module.StoreExecutor(2)
        if under_way:
            pool.submit(over.wait, 30)
        await xmsrv_module.close_store(store, pool)
    asyncio.run(close())
    over.set()
    assert store.closed.is_set() == (not under_way)


def test_a_store_that_does_not_close_is_left(monkeypatch):
    monkeypatch.setattr(xmsrv_module, 'CLOSE_TIMEOUT', 0.1)
    store, begun = Closing(2.0), time.monotonic()
    asyncio.run(xmsrv_module.close_store(store, xmsrv_module.StoreExecutor(1)))
    assert store.closed.is_set() and time.monotonic() - begun < 1.5


def test_a_systemd_that_does_not_read_stops_nothing(nsqd, program, workdir, monkeypatch):
    fill(nsqd, 100)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(workdir / 'deaf'))
        monkeypatch.setattr(servers.Xmsrv, 'extra', {'NOTIFY_SOCKET': str(workdir / 'deaf'), 'WATCHDOG_USEC': '100000'})
        program.configure(nsqd, period='500ms', nsq={'max-messages': 10})
        running = program.start('daemon')
        wait_until(lambda: len(program.rows()) == 100, 'all are stored', 20)
        stopped(running)


@pytest.mark.parametrize('value', ['', '0', 'soon', '-5', '1e6', '\u0663', '9' * 5000])
def test_a_watchdog_that_is_no_number_is_none(nsqd, program, monkeypatch, value):
    monkeypatch.setattr(servers.Xmsrv, 'extra', {'WATCHDOG_USEC': value})
    fill(nsqd, 3)
    program.configure(nsqd, period='1s')
    running = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 3, 'all are stored')
    stopped(running)
    assert count(program, 'not a number of microseconds') == (value not in ('', '0'))


@pytest.mark.parametrize('variables, seconds', [
    ({'WATCHDOG_USEC': '3000000'}, 1.5), ({'WATCHDOG_USEC': '3000000', 'WATCHDOG_PID': str(os.getpid())}, 1.5),
    ({'WATCHDOG_USEC': '3000000', 'WATCHDOG_PID': '1'}, None), ({'WATCHDOG_USEC': '3000000', 'WATCHDOG_PID': ''}, None),
    ({}, None)])
def test_the_watchdog_is_told_twice_an_interval(monkeypatch, variables, seconds):
    """Where it is ours."""
    for name in ('WATCHDOG_USEC', 'WATCHDOG_PID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert xmsrv_module.SystemdNotifier().watchdog_interval == seconds


def test_only_the_parent_tells_systemd(nsqd, program, systemd):
    fill(nsqd, 0)
    program.configure(nsqd, period='0', workers=2)
    running = program.start('daemon')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'both workers are subscribed')
    for pid in children(running):
        with open(f'/proc/{pid}/environ', 'rb') as file:
            assert b'NOTIFY_SOCKET' not in file.read()
    assert systemd.fields('READY') == ['1']
    stopped(running)


def test_once_asks_for_the_time_that_it_may_take(nsqd, program, systemd):
    program.once(nsqd, timeout='7s')
    assert int(systemd.fields('EXTEND_TIMEOUT_USEC')[0]) > 7e6


# ------------------------------------------------------------------------------------------------------------- by HTTP

@pytest.mark.parametrize('workers', [1, 2])
def test_figures_under_load_and_at_the_end(nsqd, program, workers):
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*bodies(20000), *['no JSON'] * 30])
    port = servers.free_ports()
    program.configure(nsqd, period='0', workers=workers, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    stored = 'xmsrv_messages_total{outcome="stored"}'
    seen = []
    wait_until(lambda: seen.append(figure(port, stored) or 0) or seen[-1] == 20000, 'all are counted', 30)
    assert seen == sorted(seen)
    wait_until(lambda: figure(port, 'xmsrv_messages_total{outcome="dead"}') == 30, 'the dead letters too')
    expected = {'xmsrv_received_total': 20030, 'xmsrv_dead_letters_total{reason="invalid-json"}': 30,
                'xmsrv_lag_seconds_count': 20000, 'xmsrv_store_up': 1, 'xmsrv_in_flight': 0,
                'xmsrv_connections{state="up"}': workers, 'xmsrv_connections{state="down"}': 0,
                'xmsrv_period_seconds': 0, 'xmsrv_messages_total{outcome="late"}': 0}
    wait_until(lambda: {name: figure(port, name) for name in expected} == expected, 'the figures are as expected')
    assert figure(port, 'xmsrv_store_batch_records_sum') == 20000
    assert 'no JSON' not in get(port, '/metrics')[1]
    assert get(port, '/healthz') == (200, 'ok\n')
    assert get(port, '/nothing')[0] == 404
    stopped(running)


def test_counts_of_a_dead_worker_are_not_forgotten(nsqd, program):
    fill(nsqd, 1000)
    port = servers.free_ports()
    program.configure(nsqd, period='0', workers=2, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    stored = 'xmsrv_messages_total{outcome="stored"}'
    wait_until(lambda: figure(port, stored) == 1000, 'all are counted')
    for pid in children(running):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: figure(port, 'xmsrv_worker_restarts_total') == 2, 'both are started again')
    assert figure(port, stored) == 1000
    stopped(running)


def test_counts_of_workers_are_not_doubled_between_two_configurations(nsqd, program, workdir):
    """The workers have gone, and the lock of the new state-dir is another's."""
    fill(nsqd, 1000)
    port = servers.free_ports()
    settings = {'period': '0', 'workers': 2, 'metrics': {'listen': f'127.0.0.1:{port}'}}
    program.configure(nsqd, **settings)
    running = program.start('daemon')
    stored = 'xmsrv_messages_total{outcome="stored"}'
    wait_until(lambda: figure(port, stored) == 1000, 'all are counted')
    (workdir / 'other').mkdir()
    with (workdir / 'other' / lock_files(workdir / 'state')[0].name).open('w') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        program.configure(nsqd, state_dir=workdir / 'other', **settings)
        running.send_signal(signal.SIGHUP)
        wait_until(lambda: count(program, 'waiting for lock: process'), 'the lock is waited for')
        assert figure(port, stored) == 1000
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'] == 2, 'the workers are back')
    assert figure(port, stored) == 1000
    stopped(running)


def depths(port):
    """What /metrics says that waits, by nsqd."""
    found = re.findall(r'^xmsrv_channel_depth\{nsqd="(.*)"\} (.*)$', get(port, '/metrics')[1], re.MULTILINE)
    return {nsqd: float(depth) for nsqd, depth in found}


@pytest.mark.parametrize('workers', [1, 2])
def test_the_depth_of_the_channel_is_in_the_metrics_and_on_the_page(nsqds, program, workers):
    """Of each nsqd whose HTTP side answers; messages flow all the same."""
    first, second = nsqds(2)
    fill(first, 500)
    fill(second, 300, 500)
    port = servers.free_ports()
    program.configure([first, second], period='60s', workers=workers, nsq={'max-messages': 200},
                      metrics={'listen': f'127.0.0.1:{port}', 'depth-interval': '200ms'})
    running = program.start('daemon')
    wait_until(lambda: 0 < sum(depths(port).values()) < 800, 'a window is over')
    wait_until(lambda: sum(depths(port).values()) == 800 - len(program.rows()) and len(depths(port)) == 2,
               'all that waits is in the metrics')
    assert f'<b>{sum(depths(port).values()):.0f}</b>' in get(port, '/')[1]
    second.pause(TOPIC, CHANNEL)
    wait_until(lambda: '<td>channel paused</td>' in get(port, '/')[1], 'the page says that it is paused')
    second.suspend()
    wait_until(lambda: set(depths(port)) == {first.tcp}, 'nothing is said of an nsqd that does not answer')
    second.resume()
    wait_until(lambda: set(depths(port)) == {first.tcp, second.tcp}, 'it is back')
    stopped(running)


def test_the_depth_is_asked_of_the_nsqds_that_nsqlookupd_names_and_no_more_once_it_is_turned_off(
        nsqds, nsqlookupd, program):
    nsqd, = nsqds(1, lookupd=[nsqlookupd])
    fill(nsqd, 50)
    wait_until(lambda: nsqlookupd.producers(TOPIC), 'nsqlookupd knows it')
    port, settings = servers.free_ports(), {'period': '60s', 'nsq': {'max-messages': 20}}
    listens = {'listen': f'127.0.0.1:{port}', 'depth-interval': '200ms'}
    program.configure(nsqlookupd, metrics=listens, **settings)
    running = program.start('daemon')
    wait_until(lambda: depths(port) == {nsqd.tcp: 30}, 'what waits is in the metrics')
    program.configure(nsqlookupd, metrics=listens | {'depth-interval': '0'}, **settings)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: depths(port) == {}, 'nobody asks any more')
    assert 'not known' in get(port, '/')[1]
    stopped(running)


def connect(port, number=1):
    """So many connections to a port, as sockets."""
    return [socket.create_connection(('127.0.0.1', port), timeout=10) for _ in range(number)]


def at_its_end(connection):
    """Whether the other side has closed it, now."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        try:
            return not connection.recv(1 << 16, socket.MSG_PEEK)
        except ConnectionResetError:
            return True
    return False


def open_files(process):
    """How many a process has."""
    return len(os.listdir(f'/proc/{process.pid}/fd'))


def cpu_seconds(process):
    """What a process has used of the processors: proc_pid_stat(5)."""
    with open(f'/proc/{process.pid}/stat') as stat:
        fields = stat.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


@pytest.fixture
def site(nsqd, program):
    """A daemon that listens for HTTP, as (process, port)."""
    fill(nsqd, 0)
    port = servers.free_ports()
    program.configure(nsqd, period='500ms', metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: get(port, '/readyz')[0] == 200, 'it listens')
    return running, port


def test_a_crowd_keeps_out_nobody(program, site):
    """Whoever comes is let in, and costs the oldest its connection."""
    running, port = site
    before = open_files(running)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(each) for each in connect(port, 90)]
        wait_until(lambda: sum(map(at_its_end, crowd)) == 90 - 32, 'the oldest are closed')
        assert not any(map(at_its_end, crowd[-32:])) and open_files(running) <= before + 32
        assert get(port, '/healthz') == (200, 'ok\n')
    assert count(program, 'the oldest is closed') == 5   # then they are only counted
    stopped(running)


def test_a_crowd_has_a_quarter_of_few_open_files(site):
    running, port = site
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (80, 80))
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(each) for each in connect(port, 50)]
        wait_until(lambda: sum(map(at_its_end, crowd)) == 50 - 20, 'the oldest are closed')
    stopped(running)


def test_no_open_files_left_is_said_and_waited_out(nsqd, program, site):
    running, port = site
    limit = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (open_files(running), limit[1]))
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(each) for each in connect(port, 40)]
        wait_until(lambda: count(program, 'Too many open files'), 'it is said')
        used, still = cpu_seconds(running), passed(2)
        wait_until(still, 'it goes on for a while')
        assert cpu_seconds(running) - used < 0.5
        nsqd.publish(TOPIC, bodies(3))
        wait_until(lambda: len(program.rows()) == 3, 'messages flow')
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limit)
        wait_until(lambda: get(port, '/healthz')[0] == 200, 'it accepts again')
        assert crowd
    stopped(running)


def refused(port, request):
    """What comes back for a request, until its connection is closed."""
    connection, = connect(port)
    with connection, contextlib.suppress(ConnectionResetError):
        connection.sendall(request)
        return connection.recv(1 << 16)
    return b''


HEAD = b'GET /healthz HTTP/1.1\r\nHost: x\r\n'


@pytest.mark.parametrize('request_', [
    HEAD + b'X: ' + b'x' * 9000 + b'\r\n\r\n',
    HEAD + b'Content-Length: 2000\r\n\r\n' + b'x' * 2000,
    HEAD + b'Transfer-Encoding: chunked\r\n\r\n' + b'400\r\n' + b'x' * 1024 + b'\r\n' + b'400\r\n' + b'x' * 1024,
], ids=['head', 'body', 'body in chunks'])
def test_a_request_that_is_too_large_is_refused(site, request_):
    running, port = site
    assert b' 200 ' not in refused(port, request_)
    small = HEAD + b'X: ' + b'x' * 7000 + b'\r\nContent-Length: 1000\r\n\r\n' + b'x' * 1000
    assert b' 200 OK' in refused(port, small)
    stopped(running)


def exchange(port, method, path):
    """(first line, headers, body) of the answer to a request, read until its connection is closed."""
    connection, = connect(port)
    with connection, connection.makefile('rb') as answer:
        connection.sendall(f'{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'.encode())
        head, _, body = answer.read().partition(b'\r\n\r\n')
    line, *headers = head.decode().split('\r\n')
    return line, dict(header.split(': ', 1) for header in headers), body


@pytest.mark.parametrize('path', ['/healthz', '/readyz', '/metrics', '/', '/nonexistent'])
def test_head_is_answered_as_get_without_the_body(nsqd, program, site, path):
    """Also where the answer is that a backend is down. The time, and the figures, are others in the next answer."""
    running, port = site
    for up in (True, False):
        if not up:
            nsqd.kill()
            wait_until(lambda: get(port, '/readyz')[0] == 503, 'the outage is noticed')
        line, headers, body = exchange(port, 'GET', path)
        head_line, head_headers, nothing = exchange(port, 'HEAD', path)
        changing = {'Date', 'Etag'} | ({'Content-Length'} if path in ('/metrics', '/') else set())
        assert (head_line, nothing) == (line, b'') and body
        assert head_headers.keys() == headers.keys() and int(head_headers['Content-Length']) > 0
        assert all(head_headers[name] == value for name, value in headers.items() if name not in changing)
    stopped(running)


@pytest.mark.parametrize('sent', [b'', HEAD, HEAD + b'Content-Length: 9\r\n\r\nxxx', HEAD + b'\r\n'],
                         ids=['nothing', 'a part of the head', 'a part of the body', 'a request, and no other'])
def test_a_connection_that_is_idle_is_closed(nsqd, program, changed, sent):
    changed('import xmsrv\nxmsrv.HTTP_IDLE_TIMEOUT, xmsrv.HTTP_BODY_TIMEOUT = 0.5, 0.3\n')
    port = servers.free_ports()
    program.configure(nsqd, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: get(port, '/healthz')[0] == 200, 'it listens')
    connection, = connect(port)
    with connection:
        connection.sendall(sent)
        connection.settimeout(10)
        while connection.recv(1 << 16):   # its answer, where it gets one
            pass
    stopped(running)


def test_an_address_that_is_taken_is_waited_for_and_messages_flow(nsqd, program, systemd):
    fill(nsqd, 10)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        program.configure(nsqd, period='200ms', metrics={'listen': f'127.0.0.1:{port}'})
        running = program.start('daemon')
        wait_until(lambda: len(program.rows()) == 10, 'all are stored', 20)
        waits = f'waiting for listen: [metrics] listen = 127.0.0.1:{port}: Address already in use'
        wait_until(lambda: any(waits in text for text in systemd.fields('STATUS')), 'systemd hears of it')
    wait_until(lambda: get(port, '/readyz') == (200, 'queue: up\nstore: up\ndead letters: up\n'), 'it listens', 40)
    wait_until(lambda: systemd.fields('STATUS')[-1].startswith('last window'), 'systemd hears of that, too')
    assert count(program, waits) == count(program, 'listen: recovered after') == 1
    stopped(running)


def test_a_bug_in_the_background_ends_it_with_70(nsqd, program, changed):
    """Here of what listens: else it would never listen, and nobody would hear why."""
    changed('import xmsrv\nxmsrv.bind_sockets = None\n')
    fill(nsqd, 0)
    program.configure(nsqd, metrics={'listen': '127.0.0.1:9100'})
    ended(program.start('daemon'), os.EX_SOFTWARE)
    assert count(program, 'internal error: TypeError') == 1


def test_an_address_of_no_host_of_ours_ends_nothing(nsqd, program):
    """Nor does a name that nobody knows. 192.0.2.0/24 is nobody's: RFC 5737."""
    fill(nsqd, 10)
    for first, host in (0, '192.0.2.9'), (10, 'nowhere.invalid'):
        program.configure(nsqd, period='200ms', metrics={'listen': f'{host}:9100'})
        running = program.start('daemon')
        wait_until(lambda first=first: len(program.rows()) == first + 10, 'all are stored', 20)
        wait_until(lambda host=host: count(program, f'[metrics] listen = {host}:9100: '), 'it says so', 20)
        fill(nsqd, 10, first + 10)
        wait_until(lambda first=first: len(program.rows()) == first + 20, 'messages flow', 20)
        stopped(running)


def test_a_reload_takes_the_same_port_of_another_address(nsqd, program):
    """0.0.0.0 can't be had beside 127.0.0.1: that one is given up first."""
    port = servers.free_ports()
    program.configure(nsqd, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: get(port, '/healthz')[0] == 200, 'it listens')
    program.configure(nsqd, metrics={'listen': f'0.0.0.0:{port}'})
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: listens_at(running, '00000000', port), 'it listens everywhere')
    assert get(port, '/healthz')[0] == 200 and not count(program, 'waiting for listen')
    program.configure(nsqd)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: not listens_at(running, '00000000', port), 'it listens no more')
    stopped(running)


def listens_at(process, address, port):
    """Whether somebody in the network namespace of a process listens at an IPv4 address (hexadecimal)."""
    with open(f'/proc/{process.pid}/net/tcp') as table:
        return any(line.split()[1:4:2] == [f'{address}:{port:04X}', '0A'] for line in table)


def test_a_reload_drops_no_scrape_and_takes_a_new_address(nsqd, program):
    """One that is taken is waited for: it answers at the old one meanwhile."""
    fill(nsqd, 0)
    port, other = servers.free_ports(), servers.free_ports()
    program.configure(nsqd, metrics={'listen': f'127.0.0.1:{port}'})
    running = program.start('daemon')
    wait_until(lambda: get(port, '/healthz')[0] == 200, 'it listens')
    for reload in range(20):
        running.send_signal(signal.SIGHUP)
        assert get(port, '/healthz')[0] == 200
        wait_until(lambda reload=reload: count(program, 'configuration reloaded') == reload + 1, 'it is read again')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        program.configure(nsqd, metrics={'listen': f'127.0.0.1:{taken.getsockname()[1]}'})
        running.send_signal(signal.SIGHUP)
        wait_until(lambda: 'waiting for listen: ' in get(port, '/readyz')[1], 'it is reported')
    assert get(port, '/healthz')[0] == 200
    program.configure(nsqd, metrics={'listen': f'127.0.0.1:{other}'})
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: get(other, '/healthz')[0] == 200 and get(port, '/healthz')[0] == 0, 'it has moved')
    stopped(running)


# ------------------------------------------------------------------------------------------------------ in a textfile

def series(path, topic=TOPIC, channel=CHANNEL):
    """The samples of a textfile, without the labels that all of them have."""
    lines = [line.rpartition(' ') for line in path.read_text().splitlines() if not line.startswith('#')]
    assert all(f'channel="{channel}"' in name and f'topic="{topic}"' in name for name, _, _ in lines)
    return {re.sub(r'(channel|topic)="[^"]*",?', '', name).replace(',}', '}').removesuffix('{}'): float(value)
            for name, _, value in lines}


def test_the_textfile_carries_its_counts_over(nsqd, program, workdir):
    path = workdir / 'x-msrv.prom'
    settings = {'metrics': {'textfile': path}}
    fill(nsqd, 10)
    program.once(nsqd, **settings)
    first = series(path)
    assert path.stat().st_mode & 0o777 == 0o644
    assert first['xmsrv_messages_total{outcome="stored"}'] == first['xmsrv_lag_seconds_count'] == 10
    nsqd.publish(TOPIC, [*bodies(5, 10), 'no JSON'])
    program.once(nsqd, **settings)
    second = series(path)
    assert second['xmsrv_messages_total{outcome="stored"}'] == second['xmsrv_lag_seconds_count'] == 15
    assert second['xmsrv_dead_letters_total{reason="invalid-json"}'] == 1
    assert second['xmsrv_windows_total{result="done"}'] == 2
    assert second['xmsrv_lag_seconds_sum'] > first['xmsrv_lag_seconds_sum']
    assert [each.name for each in workdir.glob('*tmp*')] == []


@pytest.mark.parametrize('own', [{'topic': 'other'}, {'channel': 'other'}])
def test_the_textfile_takes_over_only_its_own_counts(nsqd, program, workdir, own):
    """Another topic, or another channel, has written to the same path."""
    path = workdir / 'x-msrv.prom'
    fill(nsqd, 7)
    program.once(nsqd, metrics={'textfile': path})
    names = {'topic': TOPIC, 'channel': CHANNEL} | own
    nsqd.create(**names)
    nsqd.publish(names['topic'], bodies(2))
    said = program.once(nsqd, **own, metrics={'textfile': path}).stderr
    assert f'warning: {path}: replaces the metrics of another topic or channel' in said
    for first in (2, 4):
        written = series(path, **names)
        assert written['xmsrv_received_total'] == written['xmsrv_lag_seconds_count'] == first
        assert written['xmsrv_messages_total{outcome="stored"}'] == first
        nsqd.publish(names['topic'], bodies(2))
        said = program.once(nsqd, **own, metrics={'textfile': path}).stderr
        assert 'replaces the metrics' not in said


def test_a_success_in_the_future_does_not_stay_in_the_textfile(nsqd, program, workdir, changed):
    """It was written while the clock was wrong; the alert on the last success would be silent until then."""
    path = workdir / 'x-msrv.prom'
    changed('import time\nnow = time.time\ntime.time = lambda: now() + 1e6\n')
    program.once(nsqd, metrics={'textfile': path})
    changed('')
    nsqd.stop()
    for _ in range(2):
        program.run('once', expect=os.EX_UNAVAILABLE)
        assert series(path)['xmsrv_last_success_timestamp_seconds'] <= time.time()


def test_a_message_from_the_future_has_no_lag(nsqd, program, workdir, changed):
    """The clock of the nsqd is ahead: a sum that falls would look to Prometheus like a restart."""
    path = workdir / 'x-msrv.prom'
    changed('import time\nnow = time.time\ntime.time = lambda: now() - 90\n')
    nsqd.publish(TOPIC, [*bodies(3), '[]'])
    program.once(nsqd, metrics={'textfile': path})
    written = series(path)
    assert (written['xmsrv_lag_seconds_count'], written['xmsrv_lag_seconds_sum']) == (3, 0)
    letter, = map(json.loads, program.run('-q', 'replay', '--list', '--json').stdout.splitlines())
    assert letter['age'] == 0


def test_what_a_run_leaves_behind_is_in_its_textfile(nsqd, program, workdir):
    path = workdir / 'x-msrv.prom'
    depth = f'xmsrv_channel_depth{{nsqd="{nsqd.tcp}"}}'
    fill(nsqd, 50)
    program.once(nsqd, nsq={'max-messages': 20}, metrics={'textfile': path})
    assert series(path)[depth] == 30
    nsqd.stop()
    program.run('once', expect=os.EX_UNAVAILABLE)
    assert depth not in series(path)
    nsqd.restart()
    program.once(nsqd, nsq={'max-messages': 20}, metrics={'textfile': path, 'depth-interval': '0'})
    assert len(program.rows()) == 40 and depth not in series(path)


def test_a_textfile_of_a_run_that_found_nobody(nsqd, program, workdir):
    """The counts of the run before it are kept, and so is its success."""
    path = workdir / 'x-msrv.prom'
    settings = {'metrics': {'textfile': path}}
    fill(nsqd, 10)
    program.once(nsqd, **settings)
    first = series(path)
    assert (first['xmsrv_store_up'], first['xmsrv_connections{state="up"}']) == (1, 1)
    assert first['xmsrv_period_seconds'] == 10
    nsqd.stop()
    program.once(nsqd, expect=os.EX_UNAVAILABLE, **settings)
    second = series(path)
    assert (second['xmsrv_store_up'], second['xmsrv_connections{state="up"}']) == (1, 0)
    assert (second['xmsrv_windows_total{result="done"}'], second['xmsrv_windows_total{result="failed"}']) == (1, 1)
    success = 'xmsrv_last_success_timestamp_seconds'
    assert (second['xmsrv_received_total'], second[success]) == (10, first[success])


@pytest.mark.parametrize(('section', 'option', 'end'), [
    ('dead-letter', 'file', 'xmsrv_dead_letters_up'), ('nsq', 'auth-secret-file', 'xmsrv_queue_up')])
def test_a_textfile_of_a_run_whose_file_is_missing_blames_the_end_that_needs_it(nsqd, program, workdir, section, option,
                                                                                end):
    path = workdir / 'x-msrv.prom'
    missing = {section: {option: workdir / 'mount' / 'file'}}
    program.once(nsqd, expect=os.EX_UNAVAILABLE, metrics={'textfile': path}, **missing)
    ends = ('xmsrv_queue_up', 'xmsrv_store_up', 'xmsrv_dead_letters_up')
    assert [name for name in ends if not series(path)[name]] == [end]


@pytest.mark.parametrize('content', [
    b'rubbish {{{\n', b'\xff\xfe', b'xmsrv_received_total x\n', b'xmsrv_messages_total{foo="x"} 1\n',
    b'xmsrv_messages_total{foo="x",topic="orders",channel="x-msrv"} 1\n',
    b''.join(b'xmsrv_lag_seconds_bucket{le="%d",topic="orders",channel="x-msrv"} +Inf\n' % bound
             for bound in range(17)),
], ids=lambda content: ascii(content[:30]))
def test_a_textfile_that_cannot_be_read_costs_a_warning(nsqd, program, workdir, content):
    path = workdir / 'x-msrv.prom'
    path.write_bytes(content)
    fill(nsqd, 10)
    assert f'warning: {path}' in program.once(nsqd, metrics={'textfile': path}).stderr
    assert len(program.rows()) == series(path)['xmsrv_received_total'] == 10


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_a_textfile_that_cannot_be_written_costs_a_warning_and_leaves_nothing(nsqd, program, workdir, make):
    """It was fit for one when the run began."""
    fill(nsqd, 10)
    program.configure(nsqd, idle_timeout='60s', nsq={'max-messages': 20}, metrics={'textfile': workdir / 'x-msrv.prom'})
    running = program.start('once')
    wait_until(lambda: len(program.rows()) == 10, 'it is under way')
    make(workdir / 'x-msrv.prom')
    fill(nsqd, 10, 10)
    ended(running)
    told = program.log.read_text()
    assert f'warning: {workdir}/x-msrv.prom' in told and len(program.rows()) == 20
    assert [path.name for path in workdir.glob('x-msrv.prom*')] == ['x-msrv.prom']


def test_a_failed_window_is_in_the_textfile(nsqd, program, workdir):
    path = workdir / 'x-msrv.prom'
    fill(nsqd, 10)
    program.once(nsqd)
    # time for a second batch, of those that nsqd sends a little later than the others
    program.configure(nsqd, timeout='5s', idle_timeout='60s', metrics={'textfile': path})
    running = program.start('once')
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'it is subscribed')
    with contextlib.closing(sqlite3.connect(program.database, isolation_level=None)) as database:
        database.execute('BEGIN IMMEDIATE')
        running.send_signal(signal.SIGSTOP)   # so that all come at once
        nsqd.publish(TOPIC, bodies(5, 10))
        wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['in_flight_count'] == 5, 'all are under way')
        running.send_signal(signal.SIGCONT)
        ended(running, os.EX_TEMPFAIL, 30)
    written = series(path)
    assert written['xmsrv_windows_total{result="failed"}'] == 1
    assert written['xmsrv_messages_total{outcome="requeued"}'] == 5
    assert written['xmsrv_store_errors_total{code="down"}'] >= 5
