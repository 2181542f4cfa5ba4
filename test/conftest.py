"""Fixtures: real servers and the installed command, each test with its own, in its own directory."""
import contextlib
import os
import sys

# Before hypothesis is imported, so that its examples land there too.
os.environ.setdefault('HYPOTHESIS_STORAGE_DIRECTORY', 'build/hypothesis')
# The workers of one run after the other compile the tests once, and leave nothing beside the sources. What they start
# hears nothing of it.
if 'PYTEST_XDIST_WORKER' in os.environ:
    sys.pycache_prefix, sys.dont_write_bytecode = os.path.abspath('build/pycache'), False

import pytest

import clusters
import progress
import servers


@pytest.fixture
def workdir(tmp_path):
    """An empty directory."""
    return tmp_path


@pytest.fixture
def nsqds(workdir):
    """A function: nsqds(3, '--msg-timeout=2s', lookupd=[...]) starts three, stopped at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda count, *args, **options: [
            stack.enter_context(servers.Nsqd(workdir, *args, **options)) for _ in range(count)]


@pytest.fixture
def nsqd(nsqds):
    """One nsqd, as it comes."""
    return nsqds(1)[0]


@pytest.fixture
def nsqlookupd(workdir):
    """One nsqlookupd."""
    with servers.Nsqlookupd(workdir) as server:
        yield server


@pytest.fixture
def program(workdir):
    """The installed command; what it started is killed at the end of the test."""
    program = servers.Xmsrv(workdir)
    yield program
    program.close()


@pytest.fixture
def changed(workdir, monkeypatch):
    """A function: changed(code) has each process of x-msrv run that before its own, to stand for what can't be had."""
    def change(code):
        (workdir / 'sitecustomize.py').write_text(code)
        monkeypatch.setenv('PYTHONPATH', str(workdir))
    return change


@pytest.fixture
def cluster():
    """Where records go in a test that needs no fault of the store: a real server where one is named."""
    with clusters.any_cluster() as made:
        yield made


@pytest.fixture
def standin():
    """The same, always on the stand-in: cluster.server is what can be told to fail."""
    with clusters.standin() as made:
        yield made


# ---------------------------------------------------------------------------------------------- a skip is no pass in CI

skipped = []


def pytest_runtest_logreport(report):
    note_skip(report)


def pytest_collectreport(report):
    note_skip(report)


def note_skip(report):
    if report.skipped and not hasattr(report, 'wasxfail'):
        skipped.append(f'{report.nodeid}: {report.longrepr[2] if report.longrepr else ""}')


def pytest_sessionfinish(session):
    if skipped and os.environ.get('XMSRV_NO_SKIP') and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if skipped and os.environ.get('XMSRV_NO_SKIP'):
        terminalreporter.write_line(f'skipped, which counts as failed here: {", ".join(skipped)}', red=True)


# ------------------------------------------------------------------------------------ the order, and what is said of it

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Where -v asks for a line for each test, or a debugger for the terminal, that is what there is."""
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    plain = config.get_verbosity() < 0 and not config.getoption('usepdb') and not hasattr(config, 'workerinput')
    if reporter and plain and sys.stdout.isatty():
        config.pluginmanager.register(progress.Progress(reporter), 'progress')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Those that are slow come first: one that begins last would be waited for alone."""
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)
