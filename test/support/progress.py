"""A line on the terminal that says how far the tests are, in place of a dot for each."""
import time

import pytest


def duration(seconds):
    """Seconds as 2:05."""
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes}:{seconds:02d}'


class Progress:
    """The plugin: it rewrites its line with each test that has ended; what fails is named at once."""

    def __init__(self, reporter):
        self.reporter, self.begun = reporter, time.monotonic()
        self.total = self.ended = self.failed = 0

    def pytest_sessionstart(self, session):
        """The session counts what it has collected: here, or in the workers of xdist."""
        self.session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """pytest counts as ever, and writes no letter: the line says it."""
        if report.skipped or hasattr(report, 'wasxfail'):
            return None
        if report.when == 'call':
            return report.outcome, '', ''
        return 'error' if report.failed else '', '', ''

    def pytest_runtest_logreport(self, report):
        """A part of a test has ended; its teardown is the last."""
        if report.failed:
            self.failed += 1
            self.reporter.rewrite(f'failed: {report.nodeid} ({report.when})\n', erase=True)
        self.ended += report.when == 'teardown'
        self.reporter.rewrite(self.line(), erase=True)

    def pytest_sessionfinish(self, session):
        """What pytest says at the end has its own lines, and its own words."""
        self.reporter.rewrite(self.line() + '\n', erase=True)
        session.config.pluginmanager.unregister(self)

    def line(self):
        """312 of 1204 tests, 1 failed, 1:31 min"""
        failed = f', {self.failed} failed' if self.failed else ''
        passed = duration(time.monotonic() - self.begun)
        return f'{self.ended} of {self.session.testscollected} tests{failed}, {passed} min'
