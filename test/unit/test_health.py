"""What is up and what fails: one object that all others read. And what repeats in the log."""
import asyncio
import logging
import re

import pytest

import clock
from xmsrv import REPEATS_LOGGED, REPEATS_TEMPLATE, ChangeLog, Health, RateLimitFilter, describe_failures, log


@pytest.fixture
def lines(monkeypatch):
    """(level, text) of each line of the log."""
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            found.append((record.levelname, record.getMessage()))
    monkeypatch.setattr(log, 'handlers', [Handler()])
    monkeypatch.setattr(log, 'filters', [])
    monkeypatch.setattr(log, 'level', logging.DEBUG)
    log.manager._clear_cache()
    yield found
    log.manager._clear_cache()


def test_a_failure_is_said_once_and_its_end_with_how_long_it_took(lines):
    async def main():
        health = Health()
        assert (health.is_up('store'), health.failures) == (True, {})
        health.report_failure('store', 'no answer', kind='batch')
        await asyncio.sleep(2)
        health.report_failure('store', 'no answer of another node', kind='batch')
        assert (health.is_up('store'), health.is_up('queue')) == (False, True)
        assert health.failures == {'store': 'no answer of another node'}
        await asyncio.sleep(3)
        health.report_recovery('store')
        health.report_recovery('store')
        assert (health.is_up('store'), health.failures) == (True, {})
    clock.run(main())
    assert lines == [('WARNING', 'store unavailable (no answer): retrying, consumption paused'),
                     ('DEBUG', 'store unavailable (no answer of another node): retrying, consumption paused'),
                     ('WARNING', 'store recovered after 5.0 s')]


def test_a_failure_of_another_kind_is_a_warning_again_and_the_same_is_none(lines):
    async def main():
        health = Health()
        health.report_failure('queue', 'refused')
        health.report_failure('queue', 'refused')
        health.report_failure('queue', 'no name')
        health.report_failure('dead letters', 'full')
        assert describe_failures(health.failures) == ['queue unavailable: no name', 'dead letters unavailable: full']
    clock.run(main())
    assert [level for level, _ in lines] == ['WARNING', 'DEBUG', 'WARNING', 'WARNING']
    assert lines[-1][1] == 'dead letters unavailable (full): retrying'    # for the queue flows meanwhile


@pytest.fixture
def limited(monkeypatch, lines):
    """Lines that repeat within the minute are limited."""
    monkeypatch.setattr(log, 'level', logging.INFO)
    log.manager._clear_cache()
    repeats = RateLimitFilter(lambda: 100.0)
    monkeypatch.setattr(repeats, 'set_timer', lambda: None)
    monkeypatch.setattr(log, 'filters', [repeats])


@pytest.mark.usefixtures('limited')
def test_a_failure_for_another_reason_is_logged_however_often_the_former_was(lines):
    """An nsqd that takes each connection and closes it: its end is down and up again many times a minute."""
    async def main():
        health = Health()
        for reason in ['closed'] * (REPEATS_LOGGED + 3) + ['E_UNAUTHORIZED']:
            health.report_failure('queue', reason)
            health.report_recovery('queue')
    clock.run(main())
    assert [re.search(r'\((.*)\)', text)[1] for level, text in lines if level == 'WARNING'] == [
        *['closed'] * REPEATS_LOGGED, 'E_UNAUTHORIZED']


@pytest.mark.usefixtures('limited')
def test_the_lines_of_many_subjects_hide_none_of_them(lines):
    """Eight nsqds that are gone, and a backend that recovers while another did so all the time."""
    for number in range(REPEATS_LOGGED + 3):
        news = ChangeLog()
        for _ in range(2):
            news.log(logging.WARNING, 'nsqd %s: %s', f'10.0.0.{number}:4150', 'refused')
    assert [text for _, text in lines] == [
        f'nsqd 10.0.0.{number}:4150: refused' for number in range(REPEATS_LOGGED + 3)]

    async def main():
        health = Health()
        for backend in ['store'] * (REPEATS_LOGGED + 3) + ['dead letters']:
            health.report_failure(backend, 'gone')
            health.report_recovery(backend)
    clock.run(main())
    recovered = [text for _, text in lines if 'recovered' in text]
    assert recovered == ['store recovered after 0.0 s'] * REPEATS_LOGGED + ['dead letters recovered after 0.0 s']


def test_what_repeats_is_counted_and_said_when_the_minute_is_over(lines, monkeypatch):
    monkeypatch.setattr(log, 'level', logging.INFO)
    log.manager._clear_cache()
    time = [100.0]
    repeats = RateLimitFilter(lambda: time[0])
    monkeypatch.setattr(repeats, 'set_timer', lambda: None)

    def passes(text, *arguments, level=logging.WARNING):
        return repeats.filter(logging.LogRecord('x-msrv', level, '', 0, text, arguments, None))
    assert [passes('late: %s', n) for n in range(REPEATS_LOGGED + 3)] == [True] * REPEATS_LOGGED + [False] * 3
    assert passes('another: %s', 1) and passes('late: %s', 9, level=logging.INFO)
    time[0] += 59
    assert not passes('late: %s', 10)
    time[0] += 2
    assert passes('late: %s', 11)
    assert lines == [('WARNING', REPEATS_TEMPLATE % (4, 'late: 10'))]
