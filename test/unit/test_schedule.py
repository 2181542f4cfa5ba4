"""When windows start, how long is waited between attempts, and who has the lock."""
import os
import types

import pytest

import fakes
from xmsrv import AlreadyRunning, Backoff, RunLock, Schedule, Unavailable, hold_run_lock, state_dir_fault


def starts(period, *late):
    """The times at which windows start, where each is so late."""
    schedule, now, times = Schedule(period), 100.0, []
    for seconds in late:
        now += schedule.seconds_to_start(now) + seconds
        schedule.start_period(now)
        times.append(now)
    return times


def test_windows_start_a_period_apart_without_drift():
    assert starts(10, 0, 0, 0.04, 0.04, 0.04, 0) == pytest.approx([100, 110, 120.04, 130.04, 140.04, 150])


def test_what_was_missed_is_not_made_up_for():
    assert starts(10, 0, 25, 0, 0) == pytest.approx([100, 135, 145, 155])


@pytest.mark.parametrize(('began', 'next_start'), [(100.0, 110), (100.04, 110), (99.0, 110), (108.0, 118)])
def test_a_window_that_begins_late_begins_the_period_anew(began, next_start):
    schedule = Schedule(10)
    schedule.start_period(100.0)
    schedule.on_late_start(began)
    assert 109.0 + schedule.seconds_to_start(109.0) == pytest.approx(next_start)


def test_no_period_is_one_window_after_the_other():
    assert starts(0, 0, 1, 0) == [100, 101, 101]


def test_delays_double_up_to_the_most_and_begin_anew_after_a_success(monkeypatch):
    monkeypatch.setattr('random.uniform', lambda low, high: high)
    backoff = Backoff(0.1, 5)
    assert [backoff.next_delay() for _ in range(8)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    backoff.tries = 10 ** 6
    assert backoff.next_delay() == 5
    backoff.reset_delay()
    assert backoff.next_delay() == 0.1


def test_delays_have_jitter_and_never_more_than_the_most():
    delays = set()
    for _ in range(100):
        backoff = Backoff(8, 5)
        delays.add(backoff.next_delay())
    assert len(delays) > 50 and min(delays) >= 2.5 and max(delays) <= 5


# -- the lock

@pytest.fixture
def config(tmp_path):
    (tmp_path / 'orders.conf').touch()
    return fakes.options(state_dir=str(tmp_path / 'state'))


def test_two_runs_of_one_file_exclude_each_other_by_whatever_name(config, tmp_path):
    (tmp_path / 'link.conf').symlink_to('orders.conf')
    lock, other = RunLock(config, tmp_path / 'orders.conf'), RunLock(config, tmp_path / 'link.conf')
    assert lock.try_acquire() is None and lock.is_held
    assert other.try_acquire() == str(os.getpid()) and not other.is_held
    with pytest.raises(AlreadyRunning, match=str(os.getpid())), hold_run_lock(config, tmp_path / 'link.conf'):
        pass
    assert (tmp_path / lock.path).read_text() == f'{os.getpid()}\n{tmp_path}/orders.conf\n'
    lock.release()
    assert not lock.is_held and (tmp_path / lock.path).read_text() == ''
    assert other.try_acquire() is None
    other.release()


def test_two_files_of_one_name_do_not(config, tmp_path):
    (tmp_path / 'more').mkdir()
    (tmp_path / 'more' / 'orders.conf').touch()
    lock, other = RunLock(config, tmp_path / 'orders.conf'), RunLock(config, tmp_path / 'more' / 'orders.conf')
    assert (lock.try_acquire(), other.try_acquire()) == (None, None)
    lock.release()
    other.release()


def test_a_lock_whose_file_was_removed_or_replaced_is_no_lock(config, tmp_path):
    lock = RunLock(config, tmp_path / 'orders.conf')
    assert lock.try_acquire() is None
    os.unlink(lock.path)
    assert not lock.is_held
    another = RunLock(config, tmp_path / 'orders.conf')
    assert another.try_acquire() is None
    assert another.is_held and not lock.is_held
    lock.release()
    assert another.is_held
    another.release()


def test_a_state_directory_that_cannot_be_is_unavailable(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(Unavailable):
        RunLock(types.SimpleNamespace(state_dir=str(tmp_path / 'file' / 'state')), 'x.conf').try_acquire()


@pytest.mark.parametrize(('path', 'closed', 'rule'), [
    ('there', '', None), ('there/new/state', '', None),
    ('there', 'there', 'not writable'), ('there/new/state', 'there', 'cannot be created: {}/there is not writable'),
    ('file', '', 'not a directory'), ('file/new/state', '', 'cannot be created: {}/file is not a directory'),
    ('link', '', 'not a directory')])
def test_a_state_directory_that_cannot_be_used_has_a_rule(tmp_path, monkeypatch, path, closed, rule):
    """`closed`: a directory in which nothing can be made; root may make files anywhere, so that is only said."""
    (tmp_path / 'there').mkdir()
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != str(tmp_path / closed))
    assert state_dir_fault(str(tmp_path / path)) == (rule and rule.format(tmp_path))


def test_a_lock_is_given_back_at_the_end_whatever_happens(config, tmp_path):
    with pytest.raises(ZeroDivisionError), hold_run_lock(config, tmp_path / 'orders.conf'):
        raise ZeroDivisionError
    with hold_run_lock(config, tmp_path / 'orders.conf'):
        pass
