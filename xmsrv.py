"""x-msrv: stores JSON messages of an NSQ topic as records, at most N a window; none is lost, duplicated or altered.

A message flows through this module in the order of the picture in CONTRIBUTING.md:
Subscription.read_messages -> Consumer.on_messages -> Window.accept -> Mapper.build_record -> Batcher -> Store.write ->
Window.settle -> Consumer.finish. A dead letter goes from Window.reject_invalid by a second Batcher to
DeadLetterSink.write_dead_letters, and from there by Window.settle to Consumer.finish as well.
"""

# ruff: noqa: E402 - the imports take a tenth of a second, in which a signal must find its handler
import os
import signal
import sys

# commands that a signal ends with 0 before a message was taken
COMMANDS_ENDED_BY_SIGNAL = {'once', 'daemon', 'worker', 'replay'}


def exit_at_once(number: int, _: object) -> None:
    """Handles SIGTERM and SIGINT until a command installs its own handler: no message was taken yet. Without a handler
    process 1 of a container would not receive SIGTERM at all, and SIGINT would print a traceback."""
    os._exit(0 if COMMANDS_ENDED_BY_SIGNAL.intersection(sys.argv) else 128 + number)


def catch_early_signals() -> None:
    """Installs exit_at_once() for each signal that the parent process did not set to be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, exit_at_once)
    if 'daemon' in sys.argv or 'worker' in sys.argv:   # the file is not read yet, so there is nothing to reload
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


# Not where a test, or a worker by `python -c`, imports it.
if os.path.basename(getattr(sys, 'argv', [''])[0]) == 'x-msrv' or __name__ == '__main__':
    catch_early_signals()

import argparse
import asyncio
import base64
import binascii
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import pwd
import random
import re
import resource
import shutil
import socket
import sqlite3
import ssl
import stat
import struct
import textwrap
import threading
import time
import types
import typing
import zlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar

import configobj
import nsq
import voluptuous as vol
from tornado.httpclient import AsyncHTTPClient, HTTPError
from tornado.iostream import IOStream, StreamClosedError
from tornado.netutil import Resolver, bind_sockets
from tornado.tcpclient import TCPClient

__version__ = '0.2.0'

log = logging.getLogger('x-msrv')
NOTICE = (logging.INFO + logging.WARNING) // 2   # lines that an operator wants to see of a run without problems
logging.addLevelName(NOTICE, 'NOTICE')

Item = TypeVar('Item')
Key = TypeVar('Key')


# ---------------------------------------------------------------------------------------------------------------------
# errors and results
# ---------------------------------------------------------------------------------------------------------------------

class Failure(Exception):
    """Ends the program with a line for the operator; `exit_status` is a status of sysexits(3)."""

    exit_status = os.EX_SOFTWARE


class UsageError(Failure):
    """Options of the command line that do not go together, or the value of one that is not in its form."""

    exit_status = os.EX_USAGE


class DataError(Failure):
    """`check --message` was given a message that can never become a record."""

    exit_status = os.EX_DATAERR


class AlreadyRunning(Failure):
    """Another process runs with this configuration; nothing was taken."""

    exit_status = os.EX_TEMPFAIL


class ConfigError(Failure):
    """The configuration has faults: one line of text for each."""

    exit_status = os.EX_CONFIG


class Unavailable(Failure):
    """The queue or the store can't be reached, or the configuration or a file that it names is not there yet; nothing
    was taken."""

    exit_status = os.EX_UNAVAILABLE


class OutputError(Failure):
    """Standard output could not be written."""

    exit_status = os.EX_IOERR


class OutputClosed(Exception):
    """The reader of standard output has gone, as with `x-msrv config | head`: not a failure."""


class StoreUnavailable(Unavailable):
    """The store can't be reached, or fails."""


class NsqdError(Exception):
    """An nsqd refused a command or broke the protocol; its connection has to be closed. The text may quote it."""

    def __init__(self, text: str) -> None:
        super().__init__(escape_controls(truncate_text(text, 500)))


class StoreError(Exception):
    """A call of the store failed. `retryable`: a later try may succeed; else the window has to stop."""

    def __init__(self, text: str, retryable: bool = True) -> None:
        super().__init__(text)
        self.retryable = retryable


class InvalidMessage(Exception):
    """A message can never become a record: `reason` is one of REASONS, `detail` names the field and the rule."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f'{reason}: {detail}')
        self.reason = reason
        self.detail = truncate_text(detail, 300)


REASONS = ('invalid-json', 'not-an-object', 'schema', 'unsupported-value', 'bin-name', 'key', 'too-big', 'rejected')


def truncate_text(text: str, length: int) -> str:
    """Cuts `text` to `length` characters: details quote field names, which a sender may make as long as he likes."""
    return text if len(text) <= length else text[:length - 3] + '...'


def escape_controls(text: str, kept: str = '') -> str:
    """Text of others for a terminal, a log or STATUS: control characters, which could forge a line or colour it, become
    escapes, `\\x1b`; not those in `kept`."""
    if text.isprintable():
        return text
    return ''.join(char if char.isprintable() or char in kept else char.encode('unicode_escape').decode()
                   for char in text)


def terminal_safe(text: str) -> str:
    """Text of a message for a terminal, in ASCII: stricter than escape_controls(), for anybody can publish characters
    that look like others."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


class WriteResult(NamedTuple):
    """The result of one message at the store or the dead-letter sink; Window.settle does what follows from it."""

    outcome: str
    reason: Any = None   # a str, or the number that the store answered
    detail: Any = None   # a str, where the outcome has one


STORED = WriteResult('stored')         # durably
DELETED = WriteResult('deleted')       # durably: no record of that key is there, or its tombstone
DUPLICATE = WriteResult('duplicate')   # the key was there, and write = create
STALE = WriteResult('stale')           # the stored record of that key is newer
DEAD = WriteResult('dead')             # durably kept as dead letter, or discard = yes
# The others carry a reason or code, and a detail:
#   rejected, reason   it can never be stored
#   undecided, code    refused while no write has succeeded yet: by the message's fault, or by a policy for all
#   busy, code         not stored now; the store works
#   retry, code        not stored, or perhaps stored: the store does not work now; try again
#   stop, code         not stored; the window ends
#   set-full, code     the set of the record takes no new ones; other sets may
#   unkept, reason     a dead letter that can't be kept: topic or file, whichever was tried last, is `away`
#                      (or full), has `refused` it, or it is `unknown` whether it was kept
#   blamed, None       its write alone fails, or is refused; it is requeued with a delay


def distinct_results(results: Sequence[WriteResult]) -> Sequence[WriteResult]:
    """The different results of a batch. Usually all are equal, which list.count() finds out at C speed."""
    return results[:1] if results.count(results[0]) == len(results) else list(dict.fromkeys(results))


def format_rfc3339(seconds: float) -> str:
    """Seconds since 1970 as `2026-11-24T03:44:00.123456Z`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')


def group_by_key(items: Sequence[Item], key: Callable[[Item], Key]) -> Iterable[tuple[Key, Sequence[Item]]]:
    """Groups items by key, in their order, as (key, items)."""
    keys = [key(item) for item in items]
    if len(set(keys)) < 2:   # as it mostly is
        return [(keys[0], items)] if keys else []
    groups: dict[Key, list[Item]] = collections.defaultdict(list)
    for each, item in zip(keys, items, strict=True):
        groups[each].append(item)
    return groups.items()


def halves(items: list[Item]) -> list[list[Item]]:
    """Both halves of a batch that was refused as a whole, to be tried by themselves; none of a single item."""
    middle = len(items) // 2
    return [items[:middle], items[middle:]] if middle else []


def require_regular(filename: str) -> None:
    """Raises OSError where the path is no regular file: a device, a pipe, a FIFO, a directory."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(filename).st_mode):
            raise OSError(errno.EINVAL, 'not a regular file', filename)


def open_regular(filename: str, flags: int, mode: int = 0o640) -> int:
    """Opens a regular file. Returns its descriptor. Raises OSError; it never waits for the other end of a FIFO."""
    require_regular(filename)   # opening a device may already have an effect
    fd = os.open(filename, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, 'not a regular file', filename)
    return fd


def read_at_most(file: typing.BinaryIO, limit: int) -> bytes:
    """All bytes of a file, a pipe or a FIFO. Raises ValueError for more than `limit`: /dev/zero never ends."""
    data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f'larger than {limit >> 20} MiB')
    return data


SUMMARY_COUNTS = ('received', 'stored', 'deleted', 'duplicate', 'stale', 'dead', 'requeued', 'late')


# ---------------------------------------------------------------------------------------------------------------------
# log and systemd: where lines go, in which form, and what systemd is told
# ---------------------------------------------------------------------------------------------------------------------

JOURNAL_SOCKET = '/run/systemd/journal/socket'   # systemd.io/JOURNAL_NATIVE_PROTOCOL
PRIORITIES = {'DEBUG': 7, 'INFO': 6, 'NOTICE': 5, 'WARNING': 4, 'ERROR': 3, 'CRITICAL': 2}   # sd-daemon(3)
STARTED_AT = time.monotonic()   # not logging's relativeCreated, which falls when somebody sets the clock back
REPEATS_LOGGED = 5              # warnings or errors of a kind that are logged; more are counted
REPEATS_INTERVAL = 60.0         # seconds until their count is logged
REPEATS_TEMPLATE = '%d more like this in the last minute: %s'

STDOUT_FD = 1               # the descriptor of standard output

SYSTEMD_VARIABLES = ('NOTIFY_SOCKET', 'WATCHDOG_PID', 'WATCHDOG_USEC')   # workers don't inherit these


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`; the kernel may write only a part at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


class Output(io.TextIOWrapper):
    """Standard output. A failed write raises OutputError or OutputClosed, and only once."""

    def write(self, text: str) -> int:
        """As print() does it. Raises OutputError, OutputClosed."""
        return self.call_or_fail(super().write, text)

    def flush(self) -> None:
        """Raises OutputError, OutputClosed."""
        self.call_or_fail(super().flush)

    @staticmethod
    def call_or_fail(call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function. After a failure the rest of the output is dropped; else Python would write it again when it
        exits, and exit with a status of its own."""
        try:
            return call(*arguments)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDOUT_FD)
            os.close(nowhere)
            if isinstance(error, BrokenPipeError):
                raise OutputClosed from None
            raise OutputError(f'standard output: {error.strerror}') from None


def reserve_standard_descriptors() -> None:
    """Opens /dev/null in the place of each closed standard stream, so that no file of ours gets its number. Stdin and
    stdout still fail, with EBADF, when they are used; what goes to stderr is lost."""
    for fd, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)   # gets the lowest free number, which is fd


def set_up_output() -> None:
    """Makes print() use Output. Characters that the encoding of a terminal lacks are escaped; a file or a pipe gets
    UTF-8, like the configuration, whatever the locale. A closed standard output fails when something is printed."""
    before = sys.stdout
    if before is None:
        sys.stdout = Output(io.BufferedWriter(io.FileIO(STDOUT_FD, 'w')), 'utf-8', 'backslashreplace')
    elif type(before) is io.TextIOWrapper and before.fileno() == STDOUT_FD:   # else somebody captures it
        buffering, through = before.line_buffering, before.write_through
        encoding = before.encoding if before.isatty() else 'utf-8'
        sys.stdout = Output(before.detach(), encoding, 'backslashreplace', None, buffering, through)


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1, half the interval of sd_watchdog_enabled(3); None without a watchdog."""
    microseconds = os.environ.get('WATCHDOG_USEC', '')
    if os.environ.get('WATCHDOG_PID', str(os.getpid())) != str(os.getpid()):
        return None
    if not re.fullmatch('[0-9]{1,18}', microseconds):
        if microseconds:
            log.warning('WATCHDOG_USEC = %s: not a number of microseconds; no watchdog is told', microseconds)
        return None
    return int(microseconds) / 2e6 or None


class SystemdNotifier:
    """Sends the state of the service to systemd, by sd_notify(3); without systemd it sends nothing. watchdog_interval:
    seconds between two WATCHDOG=1; None: none are expected."""

    def __init__(self) -> None:
        self.address = os.environ.get('NOTIFY_SOCKET', '')
        self.watchdog_interval = watchdog_interval()

    def send_fields(self, **fields: object) -> None:
        """Sends fields such as READY=1; a failure changes nothing."""
        if not self.address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0.1)   # a systemd that does not read must not block the service
            sender.connect('\0' + self.address[1:] if self.address[0] == '@' else self.address)
            sender.send('\n'.join(f'{name}={escape_controls(str(value))}' for name, value in fields.items()).encode())


class EscapingFormatter(logging.Formatter):
    """Formats the text of a record, and a traceback below it, without control characters. Of its arguments a Failure
    alone may have several lines: one for each fault of a configuration."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The text of a record, without its traceback."""
        has_lines = not record.args or any(isinstance(argument, Failure) for argument in record.args)
        return escape_controls(super().formatMessage(record), '\n' if has_lines else '')

    def formatException(self, ei: Any) -> str:
        """The lines of a traceback."""
        return escape_controls(super().formatException(ei), '\n')


class TextFormatter(EscapingFormatter):
    """`warning: text`, for a terminal or a file; debug lines (-v) begin with the seconds since the start."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = super().format(record)
        if record.levelno == logging.DEBUG:
            line = f'{time.monotonic() - STARTED_AT:.3f} {line}'
        return line if record.levelno in (logging.INFO, NOTICE) else f'{record.levelname.lower()}: {line}'


class PriorityFormatter(EscapingFormatter):
    """`<4>text`, a prefix per line: what the journal reads from stderr."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        prefix = f'<{PRIORITIES[record.levelname]}>'
        return prefix + super().format(record).replace('\n', f'\n{prefix}')


class JsonFormatter(logging.Formatter):
    """A record as one JSON object a line: time, level, message, `common`, the record's `fields`."""

    def __init__(self, common: Mapping[str, object]) -> None:
        super().__init__()
        self.common = common

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        members = {'time': format_rfc3339(record.created), 'level': record.levelname.lower(),
                   'message': record.getMessage(),
                   **self.common, **getattr(record, 'fields', {})}
        if record.exc_info:
            members['traceback'] = self.formatException(record.exc_info)
        return json.dumps(members)


class JournalHandler(logging.StreamHandler[TextIO]):
    """Sends each record to the journal as a datagram of fields, `common` among them. Where its socket is missing or
    refuses, lines with their priority go to stderr."""

    def __init__(self, common: Mapping[str, object]) -> None:
        super().__init__()
        self.common, self.plain_formatter = common, EscapingFormatter()
        self.setFormatter(PriorityFormatter())
        # Made with the first entry: where there are no open files, lines still go to stderr.
        self.socket: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a record; logging reports one that can't be formatted. A record before the configuration is read, or
        the last of the process, goes to stderr: the journal can't find the unit of a process that has ended."""
        try:
            if 'topic' not in self.common or getattr(record, 'last', False):
                raise OSError('by way of stderr')
            self.send_entry(self.build_entry(record))
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def build_entry(self, record: logging.LogRecord) -> bytes:
        """A record in the form of the journal: the counts of a summary and other fields become XMSRV_..."""
        fields = {**self.common, **getattr(record, 'fields', {})}
        return journal_entry({'MESSAGE': self.plain_formatter.format(record), 'PRIORITY': PRIORITIES[record.levelname],
                              'SYSLOG_IDENTIFIER': 'x-msrv',
                              **{f'XMSRV_{name.upper()}': value for name, value in fields.items()}})

    def send_entry(self, entry: bytes) -> None:
        """Sends a datagram, unconnected, so that a restarted journal receives it, too. Raises OSError."""
        self.socket = self.socket or socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.socket.sendto(entry, JOURNAL_SOCKET)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self.send_sealed(entry)

    def send_sealed(self, entry: bytes) -> None:
        """Sends an entry that is too large for the socket as a sealed file in memory."""
        fd = os.memfd_create('x-msrv', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            write_all(fd, entry)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS,
                        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
            self.socket.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack('i', fd))], 0, JOURNAL_SOCKET)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Closes the socket; stderr stays open."""
        if self.socket:
            self.socket.close()
        super().close()


def journal_entry(fields: Mapping[str, object]) -> bytes:
    """Encodes fields for the journal: `NAME=value`, or name, length and value where the value has a newline."""
    lines = []
    for name, value in fields.items():
        data = str(value).encode('utf-8', 'backslashreplace')
        given = b'\n' + struct.pack('<Q', len(data)) + data if b'\n' in data else b'=' + data
        lines.append(name.encode() + given + b'\n')
    return b''.join(lines)


class RepeatCount(NamedTuple):
    """Lines of a kind: since when, how many, and the last of them."""

    since: float
    number: int
    last: logging.LogRecord


class RateLimitFilter(logging.Filter):
    """Suppresses repeated warnings and errors: the first REPEATS_LOGGED of a kind pass, the others are counted, and the
    count is logged after a minute or at exit. The kind is the record's own `kind`, else its template, or its text where
    that has no words. A line whose subject is an argument has a `kind` that names it: one nsqd hides no other.

    seen: by kind. With -v all pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock, self.lock = clock, threading.Lock()   # the store's threads log as well
        self.seen: dict[str, RepeatCount] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """True for a record that is logged."""
        if record.levelno < logging.WARNING or record.msg == REPEATS_TEMPLATE or log.isEnabledFor(logging.DEBUG):
            return True
        self.log_expired_counts()
        template = record.msg if re.search('[a-z]{2}', record.msg) else record.getMessage()
        kind = getattr(record, 'kind', template)
        with self.lock:
            before = self.seen.get(kind) or RepeatCount(self.clock(), 0, record)
            count = self.seen[kind] = RepeatCount(before.since, before.number + 1, record)
        if count.number == REPEATS_LOGGED + 1:
            self.set_timer()
        return count.number <= REPEATS_LOGGED

    def set_timer(self) -> None:
        """Logs the count in time, even without another line; in a thread, as an event loop may not exist."""
        timer = threading.Timer(REPEATS_INTERVAL, self.log_expired_counts)
        timer.daemon = True
        timer.start()

    def log_expired_counts(self) -> None:
        """Logs the counts whose minute is over."""
        self.log_counts(self.clock() - REPEATS_INTERVAL)

    def log_counts(self, until: float = math.inf) -> None:
        """Logs the counts that began before `until`, and removes them."""
        with self.lock:
            over = [self.seen.pop(kind) for kind, count in list(self.seen.items()) if count.since <= until]
        for _, number, last in over:
            if number > REPEATS_LOGGED:
                log.log(last.levelno, REPEATS_TEMPLATE, number - REPEATS_LOGGED, last.getMessage())


rate_limit_filter = RateLimitFilter()


class ChangeLog:
    """The log of a subject that is checked repeatedly: a line is logged when it differs from the last one, an equal one
    only with -v. After clear() the same line is logged again."""

    def __init__(self) -> None:
        self.last = ''

    def log(self, level: int, template: str, *arguments: object) -> None:
        """Logs a line about the subject, as logging.log() takes it."""
        text = template % arguments
        log.log(level if text != self.last else logging.DEBUG, template, *arguments, extra={'kind': text})
        self.last = text

    def clear(self) -> None:
        """The subject has recovered."""
        self.last = ''


def is_under_journal() -> bool:
    """True when stderr goes to the journal: systemd.exec(5), JOURNAL_STREAM."""
    try:
        here = os.fstat(2)
    except OSError:   # it is closed
        return False
    return os.environ.get('JOURNAL_STREAM') == f'{here.st_dev}:{here.st_ino}'


def log_handler(log_format: str, common: Mapping[str, object]) -> logging.StreamHandler[TextIO]:
    """The handler for a format, and for what stderr is."""
    if log_format == 'text' and is_under_journal():
        return JournalHandler(common)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(common) if log_format == 'json' else TextFormatter())
    return handler


def set_up_log(arguments: argparse.Namespace, log_format: str = 'text', **common: object) -> None:
    """Sends the log to stderr or the journal, at the level that -v and -q ask for. `common`: fields of each record."""
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate = [log_handler(log_format, common)], False
    log.addFilter(rate_limit_filter)
    log.setLevel(logging.DEBUG if arguments.verbose else logging.WARNING if arguments.quiet else logging.INFO)
    logging.getLogger('tornado').setLevel(logging.CRITICAL)   # it would report again each error that it raises


BACKENDS = ('queue', 'store', 'dead letters')


class BackendState(enum.StrEnum):
    """The state of one of BACKENDS. UP: no failure is known. DOWN: it fails, and a text says why. CLOSED: it is closed
    on purpose while another fails. STARTING: nothing is known of it yet."""

    UP = 'up'
    DOWN = 'down'
    CLOSED = 'closed'
    STARTING = 'starting'


# Of several workers: one that fails counts for all; one that is just starting does not while others work.
MERGE_ORDER = (BackendState.DOWN, BackendState.CLOSED, BackendState.UP, BackendState.STARTING)


def merge_backend_states(states: Sequence[Mapping[str, BackendState]]) -> dict[str, BackendState]:
    """The state of each of BACKENDS for several workers together."""
    return {backend: min((each[backend] for each in states), key=MERGE_ORDER.index) for backend in BACKENDS}


class BackendFailure(NamedTuple):
    """The failure of a backend: its text, the loop time since when, its kind, and the loop time of its last report."""

    text: str
    since: float
    kind: str
    last: float


class Health:
    """The state of the queue, the store and the dead-letter sink (BACKENDS): which are up, which fail, and since when.

    STATUS, /readyz, the page and the metrics all read it, so that they agree.
    """

    def __init__(self) -> None:
        self.errors: dict[str, BackendFailure] = {}

    def report_failure(self, backend: str, text: str, kind: str | None = None) -> None:
        """`backend` fails, because of `text`. A repeated failure of the same kind is logged only with -v."""
        last, now = self.errors.get(backend), asyncio.get_running_loop().time()
        failure = BackendFailure(text, last.since if last else now, kind or text, now)
        known = last is not None and last.kind == failure.kind
        paused = '' if backend == 'dead letters' else ', consumption paused'
        log.log(logging.DEBUG if known else logging.WARNING, '%s unavailable (%s): retrying%s', backend, text, paused,
                extra={'kind': f'{backend}: {failure.kind}'})
        self.errors[backend] = failure

    def report_recovery(self, backend: str) -> None:
        """`backend` works, or works again."""
        failure = self.errors.pop(backend, None)
        if failure:
            level = logging.INFO if backend == 'queue' else logging.WARNING   # as for a single nsqd
            log.log(level, '%s recovered after %.1f s', backend, asyncio.get_running_loop().time() - failure.since,
                    extra={'kind': f'{backend} recovered'})

    def is_up(self, backend: str) -> bool:
        """True when no failure of `backend` is known."""
        return backend not in self.errors

    @property
    def backend_states(self) -> dict[str, BackendState]:
        """The state of each of BACKENDS, while all are open."""
        return {backend: BackendState.UP if self.is_up(backend) else BackendState.DOWN for backend in BACKENDS}

    @property
    def failures(self) -> dict[str, str]:
        """Why each of BACKENDS is down that is."""
        return {backend: self.errors[backend].text for backend in BACKENDS if backend in self.errors}


def describe_failures(failures: Mapping[str, str]) -> list[str]:
    """Failures in words, by backend."""
    return [f'{backend} unavailable: {why}' for backend, why in failures.items()]


# ---------------------------------------------------------------------------------------------------------------------
# metrics: what is counted
# ---------------------------------------------------------------------------------------------------------------------

class Metric(NamedTuple):
    """A metric. kind: counter, gauge or histogram. join: merges the values of a gauge from several workers."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    join: Callable[[tuple[float, float]], float] = sum


# The one table of metrics. No label has a value that a message could choose.
METRIC_DEFINITIONS = (
    Metric('xmsrv_received_total', 'counter', (), 'Messages that came, those that came again too.'),
    Metric('xmsrv_messages_total', 'counter', ('outcome',), 'Messages by outcome.'),
    Metric('xmsrv_dead_letters_total', 'counter', ('reason',), 'Dead letters, kept or discarded.'),
    Metric('xmsrv_store_errors_total', 'counter', ('code',), 'Records of failed writes (retry, stop), by answer.'),
    Metric('xmsrv_store_batch_seconds', 'histogram', (), 'Seconds that a call of the store took.'),
    Metric('xmsrv_store_batch_records', 'histogram', (), 'Records in a call of the store.'),
    Metric('xmsrv_lag_seconds', 'histogram', (), 'Age of a message when its record was stored or deleted, in seconds.'),
    Metric('xmsrv_channel_depth', 'gauge', ('nsqd',),
           'Messages waiting on an nsqd, in the topic or the channel; absent where nsqd does not tell.'),
    Metric('xmsrv_in_flight', 'gauge', (), 'Messages held, without an answer to nsqd yet.'),
    Metric('xmsrv_connections', 'gauge', ('state',), 'nsqds that are connected (up), and that are not (down).'),
    Metric('xmsrv_queue_up', 'gauge', (),
           '1 while an nsqd is connected, or none is needed, for the store fails; 0 while none can be reached.', min),
    Metric('xmsrv_store_up', 'gauge', (), '1 while the store takes records, 0 while it does not.', min),
    Metric('xmsrv_dead_letters_up', 'gauge', (), '1 while dead letters are kept, 0 while their keeper is away.', min),
    Metric('xmsrv_windows_total', 'counter', ('result',), 'Windows that ended well (done), or not (failed).'),
    Metric('xmsrv_last_success_timestamp_seconds', 'gauge', (),
           'When a window last ended well, or all was well in one without end.', max),
    Metric('xmsrv_period_seconds', 'gauge', (),
           'The configured period, or timeout where that is longer; 0: a window without end.', max),
    Metric('xmsrv_worker_restarts_total', 'counter', (), 'Workers that ended and were started again.'),
    Metric('xmsrv_build_info', 'gauge', ('version',), 'Always 1.', max),
)
LAST_SUCCESS = 'xmsrv_last_success_timestamp_seconds'
KEPT_GAUGES = (LAST_SUCCESS, 'xmsrv_build_info')                               # gauges that a reload does not touch
# by backend
UP_METRICS = {'queue': 'xmsrv_queue_up', 'store': 'xmsrv_store_up', 'dead letters': 'xmsrv_dead_letters_up'}
METRICS_BY_NAME = {metric.name: metric for metric in METRIC_DEFINITIONS}
BUCKET_BOUNDS = {   # upper bounds of the buckets
    'xmsrv_store_batch_seconds': (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    'xmsrv_store_batch_records': (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    'xmsrv_lag_seconds': (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 600, 1800, 3600, 21600, 86400),
}
LABEL_VALUES = {   # label values known beforehand: start at 0
    'xmsrv_messages_total': [(outcome,) for outcome in SUMMARY_COUNTS[1:]],
    'xmsrv_dead_letters_total': [(reason,) for reason in REASONS],
    'xmsrv_windows_total': [('done',), ('failed',)],
}
RECENT_DEAD_LETTERS = 10   # dead letters that are shown
LAG = 'xmsrv_lag_seconds'
SUFFIXES = {'histogram': {'_bucket': ('le',), '_sum': (), '_count': ()}}   # other series have their metric's name
# Each series by name: its metric, and its labels in the order in which a key of MetricTotals has their values.
SERIES = {metric.name + suffix: (metric, (*metric.labels, *more)) for metric in METRIC_DEFINITIONS
          for suffix, more in SUFFIXES.get(metric.kind, {'': ()}).items()}


class RecentDeadLetter(NamedTuple):
    """One of the latest dead letters: seconds since 1970, and why."""

    when: float
    reason: str
    detail: str


class Snapshot(typing.TypedDict):
    """What a process counted, as JSON can say it. samples: lists of series, value of each label, number."""

    samples: list[list[Any]]
    recent: list[RecentDeadLetter]


class LagHistogram:
    """The ages of messages, many at once: Histogram.observe() takes 0.6 us for each of them, this a tenth of it."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, [*bounds, math.inf]
        self.counts, self.total = [0] * len(self.bounds), 0.0   # of each bucket alone

    def observe_all(self, ages: list[float]) -> None:
        """Counts ages. An age below zero counts as zero: a falling sum looks like a restart."""
        ages.sort()
        below = 0
        for bucket, bound in enumerate(self.bounds):
            upto = bisect.bisect_right(ages, bound)
            self.counts[bucket] += upto - below
            below = upto
        self.total += sum(ages[bisect.bisect_left(ages, 0.0):])

    def collect(self) -> Iterator[Any]:
        """Yields its family, as prometheus_client asks for it."""
        from prometheus_client import core, utils
        bounds = map(utils.floatToGoString, self.bounds)
        yield core.HistogramMetricFamily(self.name, self.text, sum_value=self.total, buckets=list(
            zip(bounds, itertools.accumulate(self.counts), strict=True)))


class Metrics:
    """What this process counts, in prometheus_client's own metrics, each made when first needed: a gauge that nobody
    has set yet has no series. recent: (seconds since 1970, reason, detail) of the latest dead letters."""

    def __init__(self) -> None:
        self.registry = import_prometheus().CollectorRegistry()
        self.metrics: dict[str, Any] = {}
        self.lag = LagHistogram(LAG, METRICS_BY_NAME[LAG].help, BUCKET_BOUNDS[LAG])
        self.registry.register(self.lag)
        self.recent: collections.deque[RecentDeadLetter] = collections.deque(maxlen=RECENT_DEAD_LETTERS)
        for metric in METRIC_DEFINITIONS:   # a counter that starts at 0 shows its first event
            for value in LABEL_VALUES.get(metric.name, [()]):
                if metric.kind != 'gauge' and metric.name != LAG and len(value) == len(metric.labels):
                    self.labelled_metric(metric.name, *value)
        self.set_gauge('xmsrv_build_info', 1, __version__)

    def labelled_metric(self, name: str, *labels: str) -> Any:
        """The Counter, Gauge or Histogram with these values of its labels."""
        made = self.metrics.get(name)
        if made is None:
            import prometheus_client
            metric = METRICS_BY_NAME[name]
            more = {'buckets': BUCKET_BOUNDS[name]} if metric.kind == 'histogram' else {}
            made = self.metrics[name] = getattr(prometheus_client, metric.kind.capitalize())(
                name, metric.help, metric.labels, registry=self.registry, **more)
        return made.labels(*labels) if labels else made

    def increment(self, name: str, number: float = 1, *labels: str) -> None:
        """Adds `number` to a counter."""
        self.labelled_metric(name, *labels).inc(number)

    def set_gauge(self, name: str, number: float, *labels: str) -> None:
        """Sets a gauge."""
        self.labelled_metric(name, *labels).set(number)

    # -- what is counted

    def record_batch(self, records: int, seconds: float, answers: Sequence[WriteResult]) -> None:
        """Records one call of the store."""
        self.labelled_metric('xmsrv_store_batch_seconds').observe(seconds)
        self.labelled_metric('xmsrv_store_batch_records').observe(records)
        for answer in distinct_results(answers):
            if answer.outcome in ('retry', 'stop'):
                self.increment('xmsrv_store_errors_total', answers.count(answer), str(answer.reason))

    def add_settled(self, answer: WriteResult, messages: list[Any], now: float) -> None:
        """Records messages that finished with the same result."""
        if answer is STORED or answer is DELETED:
            self.lag.observe_all([now - message.timestamp / 1e9 for message in messages])
        elif answer is DEAD:
            for message in messages:
                self.increment('xmsrv_dead_letters_total', 1, message.rejection.reason)
                self.recent.append(RecentDeadLetter(now, message.rejection.reason, message.rejection.detail))

    def sync_counts(self, window: Any) -> None:
        """Adds the counts of a window since the last call. Where nsqd refuses a REQ, count['requeued'] falls by one;
        a counter can't fall, so the next requeue is not counted."""
        count = window.count
        for outcome in SUMMARY_COUNTS[1:]:
            new = count[outcome] - window.exported_counts[outcome]
            # Example: 5 requeues are exported, then nsqd refuses one of them, so count has 4. The next requeue makes it
            # 5 again: nothing is added. The one after it makes 6: 1 is added.
            if new > 0:
                self.increment('xmsrv_messages_total', new, outcome)
                window.exported_counts[outcome] = count[outcome]

    def set_period(self, config: Any) -> None:
        """Sets the gauge of the period."""
        self.set_gauge('xmsrv_period_seconds', 0 if config.endless else max(config.period, config.timeout))

    def record_window(self, window: Any) -> None:
        """Records the end of a window."""
        self.sync_counts(window)
        self.increment('xmsrv_windows_total', 1, 'failed' if window.failed else 'done')
        if not window.failed:
            self.set_gauge(LAST_SUCCESS, time.time())

    def record_consumer(self, consumer: Any) -> None:
        """Sets the gauges of a consumer."""
        up = len(consumer.connections)
        self.set_gauge('xmsrv_in_flight', len(consumer.in_flight))
        self.set_gauge('xmsrv_connections', up, 'up')
        self.set_gauge('xmsrv_connections', max(0, len(consumer.addresses) - up), 'down')

    def set_depths(self, waiting: Mapping[str, int]) -> None:
        """Sets the depth of each nsqd, and removes the depths of nsqds that did not tell any."""
        if 'xmsrv_channel_depth' in self.metrics:
            self.metrics['xmsrv_channel_depth'].clear()
        for nsqd, depth in waiting.items():
            self.set_gauge('xmsrv_channel_depth', depth, nsqd)

    def record_unavailable(self, failed: Collection[str]) -> None:
        """Records that `once` could not begin, for these of BACKENDS."""
        self.increment('xmsrv_windows_total', 1, 'failed')
        self.record_backends({backend: BackendState.DOWN if backend in failed else BackendState.CLOSED
                              for backend in BACKENDS})
        self.record_disconnected()

    def record_backends(self, states: Mapping[str, BackendState]) -> None:
        """Sets the gauge of each backend, once something is known of it."""
        for backend, name in UP_METRICS.items():
            if states[backend] is not BackendState.STARTING:
                self.set_gauge(name, int(states[backend] is not BackendState.DOWN))

    def record_disconnected(self) -> None:
        """Records that no nsqd is connected."""
        up = self.registry.get_sample_value('xmsrv_connections', {'state': 'up'}) or 0
        self.increment('xmsrv_connections', up, 'down')
        self.set_gauge('xmsrv_connections', 0, 'up')
        self.set_gauge('xmsrv_in_flight', 0)

    def forget_gauges(self) -> None:
        """Removes all gauges but KEPT_GAUGES: after a reload they may be wrong. Counters stay."""
        gauges = [name for name in self.metrics if METRICS_BY_NAME[name].kind == 'gauge']
        for name in set(gauges).difference(KEPT_GAUGES):
            self.registry.unregister(self.metrics.pop(name))

    def take_snapshot(self) -> Snapshot:
        """All of it, for another process."""
        return {'samples': samples_of(self.registry.collect()), 'recent': list(self.recent)}


class NullMetric:
    """A Counter, Gauge or Histogram that counts nothing."""

    def labels(self, *values: str) -> 'NullMetric':
        """Itself: it has no labels."""
        return self

    def ignore_value(self, number: float = 1) -> None:
        """Counts nothing."""

    inc = set = observe = ignore_value


class NullMetrics(Metrics):
    """Metrics of a run that writes them nowhere: to import prometheus_client takes 10 ms, a tenth of a short run."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.lag = LagHistogram(LAG, METRICS_BY_NAME[LAG].help, BUCKET_BOUNDS[LAG])
        self.recent = collections.deque(maxlen=RECENT_DEAD_LETTERS)

    def labelled_metric(self, name: str, *labels: str) -> NullMetric:
        """One that counts nothing."""
        return NullMetric()

    def record_disconnected(self) -> None:
        """Nothing to record."""


def samples_of(families: Iterable[Any]) -> list[list[Any]]:
    """The samples of families (prometheus_client) as a Snapshot has them; only metrics of METRIC_DEFINITIONS."""
    return [[sample.name, *(sample.labels[label] for label in SERIES[sample.name][1]), sample.value]
            for family in families for sample in family.samples if sample.name in SERIES]


class MetricTotals:
    """The metrics of several processes, or of successive runs, added up. numbers: by (series, value of each
    label). recent: as in Metrics. constant: labels that every series gets."""

    def __init__(self, constant: Mapping[str, str] | None = None) -> None:
        self.constant = constant or {}
        self.numbers: dict[tuple[str, ...], float] = {}
        self.recent: list[RecentDeadLetter] = []

    def merge_snapshot(self, snapshot: Snapshot, gauges: bool = True) -> None:
        """Adds a snapshot. Drops series that this version does not know: a worker may be of a newer one."""
        for *labelled, number in snapshot['samples']:
            key = tuple(labelled)
            if key[0] not in SERIES:
                continue
            metric, there = SERIES[key[0]][0], self.numbers.get(key)
            if metric.kind != 'gauge':
                self.numbers[key] = (there or 0) + number
            elif gauges:
                self.numbers[key] = number if there is None else metric.join((there, number))
        letters = [*self.recent, *itertools.starmap(RecentDeadLetter, snapshot['recent'])]
        self.recent = sorted(letters)[-RECENT_DEAD_LETTERS:]

    def take_snapshot(self) -> Snapshot:
        """All of it, to be merged with others."""
        return {'samples': [[*key, number] for key, number in self.numbers.items()], 'recent': self.recent}

    def value_of(self, *key: str) -> float:
        """The value of a series, 0 where it is not there."""
        return self.numbers.get(key, 0)

    def collect(self) -> Iterator[Any]:
        """Yields the families, as prometheus_client asks for them."""
        from prometheus_client import core
        families = {metric.name: core.Metric(metric.name.removesuffix('_total'), metric.help, metric.kind)
                    for metric in METRIC_DEFINITIONS}
        for (name, *values), number in self.numbers.items():
            metric, labels = SERIES[name]
            families[metric.name].add_sample(name, {**dict(zip(labels, values, strict=True)), **self.constant}, number)
        yield from families.values()


def merge_metrics(snapshots: Iterable[Snapshot], constant: Mapping[str, str] | None = None) -> MetricTotals:
    """The metrics of several processes, added up."""
    total = MetricTotals(constant)
    for snapshot in snapshots:
        total.merge_snapshot(snapshot)
    return total


def format_exposition(metrics: MetricTotals, process: bool = False) -> bytes:
    """The metrics in Prometheus' text format; on request with those of this process (CPU, memory)."""
    import prometheus_client
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics)
    if process:
        prometheus_client.ProcessCollector(registry=registry)
    text: bytes = prometheus_client.generate_latest(registry)
    return text


def import_prometheus() -> Any:
    """Imports now what the end of a run needs, too: an upgrade may replace it meanwhile. These variables
    would make it use files."""
    for name in ('PROMETHEUS_MULTIPROC_DIR', 'prometheus_multiproc_dir'):
        os.environ.pop(name, None)
    import prometheus_client.core
    import prometheus_client.parser
    return prometheus_client


def write_textfile(filename: str, metrics: Metrics, constant: Mapping[str, str]) -> None:
    """Writes the figures for node_exporter: whole or not at all, readable for everybody, with the counts of earlier
    runs added. A failure is only a warning: the messages are stored."""
    filename = os.path.realpath(filename)   # a link to the file stays one
    total = merge_metrics([metrics.take_snapshot()], constant)
    try:
        total.merge_snapshot(read_previous_counts(filename, constant))
    except Exception as error:   # anything may stand there
        log.warning('%s: not a textfile of x-msrv, its counters start from 0: %s', filename, error)
    beside = f'{filename}.{os.getpid()}'
    try:
        require_regular(filename)   # a device or a FIFO is never replaced
        with open(open_regular(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 'wb') as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(format_exposition(total))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, filename)
    except OSError as error:
        log.warning('%s: %s', filename, error.strerror)
        with contextlib.suppress(OSError):
            os.unlink(beside)


def read_previous_counts(filename: str, constant: Mapping[str, str]) -> Snapshot:
    """The counts in the file that have the labels `constant`, and its last success: those of earlier runs of this
    pipeline. Counts of another topic or channel are left out, with a warning. Another kind of file raises any
    error."""
    if not os.path.exists(filename):
        return {'samples': [], 'recent': []}
    families = read_textfile(filename)
    everything = [sample for family in families for sample in family.samples if sample.name in SERIES]
    own = [sample for sample in everything if constant.items() <= sample.labels.items()]
    if len(own) < len(everything):
        log.warning('%s: replaces the metrics of another topic or channel: each pipeline needs its own textfile',
                    filename)
    return {'samples': lasting_samples(own), 'recent': []}


def lasting_samples(samples: Iterable[Any]) -> list[list[Any]]:
    """Picks the samples of a textfile that the next run continues. Raises ValueError for one that is no count."""
    from prometheus_client.utils import floatToGoString
    kept = {}
    for sample in samples:
        metric, labels = SERIES[sample.name]
        values = {name: sample.labels[name] for name in labels}
        if not 0 <= sample.value < math.inf:
            raise ValueError(f'{sample.name} is {sample.value}')
        if 'le' in values:   # earlier versions wrote 1 for 1.0
            values['le'] = floatToGoString(values['le'])
        if metric.kind != 'gauge':
            kept[(sample.name, *values.values())] = sample.value
        # a time in the future (a clock was wrong) would silence the alerts
        elif metric.name == LAST_SUCCESS:
            kept[(LAST_SUCCESS,)] = min(sample.value, time.time())
    for name, bounds in BUCKET_BOUNDS.items():   # drops those of another version
        buckets = {key for key in kept if key[0] == f'{name}_bucket'}
        if buckets != {(f'{name}_bucket', floatToGoString(bound)) for bound in [*bounds, math.inf]}:
            kept = {key: number for key, number in kept.items() if SERIES[key[0]][0].name != name}
    return [[*key, number] for key, number in kept.items()]


def read_textfile(filename: str) -> list[Any]:
    """The families in a textfile. Raises anything for what is no such file."""
    from prometheus_client import parser
    with open(open_regular(filename, os.O_RDONLY), encoding='utf-8') as file:
        return list(parser.text_fd_to_metric_families(file))


# ---------------------------------------------------------------------------------------------------------------------
# values of options: validators
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_FILE = '/etc/x-msrv/x-msrv.conf'
STATE_DIR = '/var/lib/x-msrv'
UNIT_FILE = '/usr/lib/systemd/system/x-msrv.service'   # there where a package is installed
SERVICE_USER = 'x-msrv'   # that the packages make
MAX_NAME = 64             # characters of a topic or channel: nsq internal/protocol/names.go
MAX_NAMESPACE = 31        # bytes: AS_ID_NAMESPACE_SZ of the Aerospike server, less its NUL
MAX_SET_NAME = 63         # bytes: AS_SET_NAME_MAX_SIZE of the Aerospike server, less its NUL; kept for every store
MAX_TTL = 3650 * 86400   # s: the longest that an Aerospike server takes
MAX_BIN_NAME = 15     # bytes of UTF-8: Aerospike's limit; kept for every store, so that a pipeline can move
TIME_UNITS = {'ms': 0.001, 's': 1, 'm': 60, 'h': 3600, 'd': 86400}
TTL_NEVER = 0xFFFFFFFF    # a ttl: aerospike.TTL_NEVER_EXPIRE
MAX_CONNECTIONS = 15000    # to a node: a server's limit for all its clients (proto-fd-max, its default)
MAX_FILE = 1 << 20     # bytes of a configuration: 20,000 lines, and /dev/zero has no end
MAX_SOCKET_PATH = 107  # bytes: unix(7)
INT64 = range(-1 << 63, 1 << 63)   # of an integer in a record
VARIABLES = 'XMSRV__'  # their prefix: Docker and Kubernetes set XMSRV_PORT and others for a service of that name
SIZE_UNITS = {'': 1, 'KiB': 1 << 10, 'MiB': 1 << 20, 'GiB': 1 << 30}
Address = tuple[str, int]          # host, port; path of a unix socket, 0
Validator = Callable[[Any], Any]   # a value of the file in, the typed value out; ValueError with one sentence


def single_value(value: Any) -> str:
    """A single value, not a list."""
    if not isinstance(value, str):
        raise ValueError('one value, not a list (quote it if it holds a comma)')
    return value


def parse_quantity(value: Any, units: Mapping[str, float], example: str) -> float:
    """`value`, digits and a unit of `units`, in that whose factor is 1."""
    match = re.fullmatch(r'([0-9]{1,18}(?:\.[0-9]+)?)\s*([A-Za-z]*)', single_value(value))
    if not match or match[2] not in units:
        raise ValueError(f'not {example}')
    return round(float(match[1]) * units[match[2]], 6)   # 1.1 h is 3960 s, and not 3960.0000000000005


def parse_duration(value: Any) -> float:
    """`500ms`, `10s`, `5m`, `30d` as seconds, a thousandth at least."""
    seconds = parse_quantity(value, TIME_UNITS, 'a duration such as 500ms, 10s, 5m, 1h, 30d')
    if seconds < TIME_UNITS['ms']:
        raise ValueError('at least 1ms')
    return seconds


def parse_period(value: Any) -> float:
    """A duration, or 0: one window after the other."""
    return 0.0 if re.fullmatch(f'0({"|".join(TIME_UNITS)})?', single_value(value)) else parse_duration(value)


def parse_size(value: Any) -> int:
    """`64KiB`, `32MiB` as bytes, more than none."""
    count = int(parse_quantity(value, SIZE_UNITS, 'a size such as 4096, 64KiB, 32MiB'))
    if not count:
        raise ValueError('must be greater than 0')
    return count


def whole_number(least: int = 0, most: int | None = None) -> Validator:
    """A validator of a whole number from `least` to `most`."""
    def check_number(value: Any) -> int:
        if not re.fullmatch('[0-9]{1,18}', single_value(value)):
            raise ValueError('not a whole number')
        if int(value) < least or most is not None and int(value) > most:
            raise ValueError(f'at least {least}' if int(value) < least else f'at most {most}')
        return int(value)
    return check_number


parse_count, parse_positive = whole_number(), whole_number(1)


def one_of(*words: str) -> Validator:
    """A validator that takes one of `words`."""
    def check_word(value: Any) -> Any:
        if value not in words:
            raise ValueError('not one of ' + ', '.join(words))
        return value
    return check_word


def parse_yes_no(value: Any) -> bool:
    """`yes` or `no` as a bool."""
    return bool(one_of('yes', 'no')(value) == 'yes')


def optional_value(check: Validator) -> Validator:
    """A validator of an empty value (None), or of a value that `check` accepts."""
    return lambda value: None if value == '' else check(value)


def list_of(check: Validator) -> Validator:
    """A validator of a list; a single value is a list of one, an empty value an empty list."""
    def check_items(value: Any) -> list[Any]:
        if isinstance(value, dict):
            raise ValueError('an option, not a section')
        return [check(item) for item in ([value] if isinstance(value, str) else value) if item != '']
    return check_items


def name_parser(pattern: str, rule: str, limit: str, most: int) -> Validator:
    """A validator of a name that has a pattern, else `rule`, and at most `most` bytes, of which `limit` says more."""
    def check_name(value: Any) -> Any:
        if not re.fullmatch(pattern, single_value(value)):
            raise ValueError(rule)
        size = len(value.encode())
        if size > most:
            raise ValueError(f'{size} {limit} {most} at most')
        return value
    return check_name


parse_topic = name_parser(
    r'[.a-zA-Z0-9_-]+(#ephemeral)?',
    'not a name for NSQ: letters, digits, . _ - and at the end perhaps #ephemeral', 'characters; NSQ takes', MAX_NAME)
parse_bin_name = name_parser(r'[^\0\ud800-\udfff]+', 'not a name for a bin', 'bytes; a bin name has', MAX_BIN_NAME)
# Nothing that the info protocol takes apart.
parse_namespace, parse_set = [name_parser(
    r'[^\s:;,\ud800-\udfff]+', 'not a name for Aerospike: at least one character, no white space and none of : ; ,',
    'bytes; Aerospike takes', most) for most in (MAX_NAMESPACE, MAX_SET_NAME)]


def parse_dead_letter_topic(value: Any) -> Any:
    """`$topic.dead`, for the topic that is read with `.dead`, or a topic's name."""
    return value if value == '$topic.dead' else parse_topic(value)


def ttl_parser(**words: int) -> Validator:
    """A validator of a word, or of a duration as whole seconds: what the Aerospike client takes for them."""
    def check_ttl(value: Any) -> int:
        if single_value(value) in words:
            return words[value]
        seconds = parse_quantity(value, TIME_UNITS, f'{", ".join(words)} or a duration such as 1h, 30d')
        if not 1 <= seconds <= MAX_TTL or seconds % 1:
            raise ValueError('a whole number of seconds, from 1s to 3650d')
        return int(seconds)
    return check_ttl


def parse_address(value: Any) -> Address:
    """`host:port`, `192.0.2.1:4150` or `[2001:db8::1]:4150` as (host, port)."""
    match = re.fullmatch(r'(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]/@]+)):([0-9]{1,5})', single_value(value))
    if not match or not 0 < int(match[3]) < 65536:
        raise ValueError('not host:port (IPv6 in brackets, [::1]:4150)')
    if match[1]:
        ipaddress.IPv6Address(match[1])
        return match[1], int(match[3])
    try:
        match[2].encode('idna')   # as the resolver does
    except UnicodeError:
        raise ValueError('not a host name: a part of it is empty or over 63 characters') from None
    return match[2], int(match[3])


def is_accepted_by(check: Validator, value: Any) -> bool:
    """True when a validator accepts a value."""
    try:
        check(value)
    except (ValueError, vol.Invalid):
        return False
    return True


def is_ip_literal(host: str) -> bool:
    """True for an IP address, which needs no resolver."""
    return is_accepted_by(ipaddress.ip_address, host)


def format_address(address: Address) -> str:
    """(host, port) as text, IPv6 in brackets; of a unix socket its path."""
    host, port = address
    if host.startswith('/'):
        return host
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def nsqd_address(value: Any) -> Address:
    """As parse_address(), or the path of a unix socket, with 0 as port."""
    if not single_value(value).startswith('/'):
        if '/' in value:
            raise ValueError('not host:port, nor the whole path of a unix socket, as /run/nsqd.sock')
        return parse_address(value)
    if '\0' in value or len(os.fsencode(value)) > MAX_SOCKET_PATH:
        raise ValueError(f'not the path of a unix socket: at most {MAX_SOCKET_PATH} bytes, and no NUL')
    return value, 0


def lookupd_address(value: Any) -> str:
    """`host:port`, or `https://host`, with or without a port, as the beginning of a URL."""
    scheme, _, rest = (value if '://' in single_value(value) else f'http://{value}').partition('://')
    if scheme not in ('http', 'https') or re.search(r'[?#\\]', rest):
        raise ValueError('not host:port, nor https://host')
    bare = scheme == 'https' and not re.search(r':[0-9]*$', rest.rpartition(']')[2])
    return f'{scheme}://{format_address(parse_address(rest + ":443" if bare else rest))}'


def compression_name(value: Any) -> str:
    """`none` or `deflate`."""
    if value == 'snappy':
        raise ValueError('snappy needs a native library, which is not carried; deflate compresses better')
    return str(one_of('none', 'deflate')(value))


def parse_path(value: Any) -> str:
    """A path; `~` is the home directory."""
    if not single_value(value):
        raise ValueError('a path must not be empty')
    if '\0' in value:
        raise ValueError('must not contain NUL')
    expanded: str = os.path.expanduser(value)
    ours = value.partition('/')[0] == '~'
    if value.startswith('~') and (not os.path.isabs(expanded) or ours and os.environ.get('HOME') == ''):
        raise ValueError('no home directory to replace ~ with: write the whole path')
    return expanded


def whole_path(value: Any) -> str:
    """A path, as parse_path(), that is the same wherever the program is started."""
    path = parse_path(value)
    if not os.path.isabs(path):
        raise ValueError('a relative path: write the whole one, which begins with / or ~')
    return path


def parse_secret_path(value: Any) -> str:
    """The path of a secret or a key; `credential:NAME` is systemd's credential of that name."""
    if not single_value(value).startswith('credential:'):
        return whole_path(value)
    directory, name = os.environ.get('CREDENTIALS_DIRECTORY'), value.partition(':')[2]
    if name in ('', '.', '..') or re.search('[/\0]', name):
        raise ValueError('not the name of a credential: credential:NAME, without a slash')
    if not directory:
        raise ValueError('no credential here, for only systemd hands them out; to try it: systemd-run --pty '
                         f'--property=LoadCredential={name}:/path/of/it x-msrv check')
    return os.path.join(directory, name)


def as_invalid(check: Validator) -> Validator:
    """Makes a ValueError of `check` a vol.Invalid: voluptuous would drop its message."""
    def check_value(value: Any) -> Any:
        try:
            return check(value)
        except vol.Invalid:
            raise
        except ValueError as error:
            raise vol.Invalid(str(error)) from None
    return check_value


# ---------------------------------------------------------------------------------------------------------------------
# fields of a message: paths, types and rules
# ---------------------------------------------------------------------------------------------------------------------

def join_path(where: str, step: str | int) -> str:
    """The path of a member or element: `ext[0].n`; names that are no plain, short words are quoted, in ASCII."""
    if isinstance(step, int):
        return f'{where}[{step}]'
    name = step if re.fullmatch(r'[\w-]{1,40}', step, re.ASCII) else json.dumps(truncate_text(step, 40))
    return f'{where}.{name}' if where else name


class Path:
    r"""The place of a value in a message: `customer.city`, `items[0].id`, `a\.b` for a name that has a dot in it.

    steps: the name of each object's member (str) and the index of each list's item (int), from the top. A backslash
    escapes `.`, `[`, `]`, itself, and a `$` at the beginning; so each path has one spelling.
    get(document): the value there; None where there is none, or a null.
    """

    __slots__ = ('text', 'steps', 'get')
    TOKEN = re.compile(r'(\.?)((?:[^\\.\[\]]|\\[.\[\]\\])+)|\[(0|[1-9][0-9]{0,8})\]')

    def __init__(self, text: str, steps: tuple[str | int, ...]) -> None:
        self.text, self.steps = text, steps
        # Most paths are a name at the top, which dict.get() finds at C speed.
        self.get: Callable[..., Any] = operator.methodcaller('get', steps[0]) if len(steps) == 1 else self.descend

    @classmethod
    def parse(cls, value: object) -> 'Path':
        """A path of the configuration. Raises ValueError with the rule that it breaks."""
        written = single_value(value)
        if written.startswith('$'):
            raise ValueError(f'no path begins with $; the field of this name is written \\{written}')
        rest, steps = written.removeprefix('\\') if written.startswith('\\$') else written, []
        at = 0
        while at < len(rest):
            token = cls.TOKEN.match(rest, at)
            # A dot stands before each name but the first: `a.b` is right, `.a` and `a[0]b` are not. An index never
            # comes first, for a message is an object: `[0].a` is wrong.
            if not token or token[3] is None and bool(token[1]) != bool(at) or not at and token[3]:
                raise ValueError(f'no path at {rest[at:]!r}: names with a dot between them, items as [0], and a '
                                 'backslash before each . [ ] and backslash of a name')
            steps.append(int(token[3]) if token[3] else re.sub(r'\\(.)', r'\1', token[2]))
            at = token.end()
        if not steps:
            raise ValueError('a path must not be empty')
        return cls(written, tuple(steps))

    def descend(self, document: dict[str, Any], missing: Any = None) -> Any:
        """As get(), step by step; `missing` where there is none, None for a null alone."""
        value: Any = document
        for step in self.steps:
            if isinstance(step, str):
                if value.__class__ is not dict or step not in value:
                    return missing
            elif value.__class__ is not list or step >= len(value):
                return missing
            value = value[step]
        return value

    @property
    def label(self) -> str:
        """The path as details of dead letters have it."""
        return functools.reduce(join_path, self.steps, '')

    def parents(self) -> Iterator[tuple['Path', str]]:
        """Yields each container on the way to this value: its path, and its type (`object` or `list`)."""
        for end, step in enumerate(self.steps[1:], 1):
            steps = self.steps[:end]
            yield Path(functools.reduce(join_path, steps, ''), steps), 'list' if isinstance(step, int) else 'object'

    def leads_to(self, other: 'Path') -> bool:
        """Whether the other path is this one, or lies inside the value at this one."""
        return other.steps[:len(self.steps)] == self.steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and other.steps == self.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


METADATA = ('$attempts', '$nsqd', '$timestamp', '$topic')   # what [[bins]] may name of a message besides its fields


def path_or(word: str) -> Callable[[object], 'str | Path']:
    """A validator that takes `word`, or the path of a field."""
    def check(value: object) -> str | Path:
        if value == word:
            return word
        if value == '' or str(value).startswith('$'):
            raise ValueError(f'{word}, or the name of a field')
        return Path.parse(value)
    return check


def bin_source(value: str) -> 'str | Path':
    """The path of a field, or one of METADATA."""
    if value.startswith('$') and value not in METADATA:
        raise ValueError(f'there is {", ".join(METADATA)}; a field of this name is written \\{value}')
    return value if value in METADATA else Path.parse(value)


def subsection_of(name: Validator, check: Validator) -> Validator:
    """A validator of a free subsection: each line's name by `name`, its value by `check`, all faults at once."""
    lines: Validator = vol.Schema({as_invalid(name): as_invalid(check)})
    return lines


def is_base64(value: object) -> bool:
    """Whether it is a string in base64 as of RFC 4648, section 4, in the one spelling that its bytes have."""
    try:
        data = value.encode('ascii')   # type: ignore[attr-defined]
        return binascii.b2a_base64(binascii.a2b_base64(data), newline=False) == data
    except (AttributeError, ValueError):
        return False


TYPE_CHECKS = {
    'string': lambda value: isinstance(value, str),
    'integer': lambda value: isinstance(value, int) and not isinstance(value, bool),
    'number': lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    'boolean': lambda value: isinstance(value, bool),
    'list': lambda value: isinstance(value, list),
    'object': lambda value: isinstance(value, dict),
    'any': lambda value: True,
    'base64': is_base64,
    'geojson': lambda value: isinstance(value, (dict, str)),   # MessageSchema looks into it
}
SCALAR_TYPES = {'string': str, 'integer': int, 'number': float}
ARTICLES = {'integer': 'an ', 'object': 'an ', 'base64': ''}   # of TYPE_CHECKS, where it is not `a `


class FieldRule(NamedTuple):
    """A line of [[fields]]: the name of its type, a check that raises vol.Invalid, and whether it is required."""

    kind: str
    check: Validator
    required: bool = False


class ValueRule(NamedTuple):
    """A rule for the value of a field: as it is written, `min 1`; what it says of a value that it does not accept;
    and its argument, a limit or the words of one-of with their values."""

    text: str
    accepts: Callable[[Any], Any]
    fault: str
    argument: Any = None


def with_article(kind: str) -> str:
    """`a string`, `an integer`, `base64`."""
    return ARTICLES.get(kind, 'a ') + kind


def type_rule(kind: str) -> ValueRule:
    """The rule that a value is of the JSON type `kind`; nothing is converted."""
    return ValueRule(kind, TYPE_CHECKS[kind], f'not {with_article(kind)}')


def check_all(rules: Sequence[ValueRule]) -> Validator:
    """A validator: the first of `rules` that does not accept the value says why."""
    pairs = [(rule.accepts, rule.fault) for rule in rules]

    def check(value: Any) -> Any:
        for accepts, fault in pairs:
            if not accepts(value):
                raise vol.Invalid(fault)
        return value
    return check


def parse_scalar(rule: str, word: str, kind: str) -> Any:
    """A word of a rule as a string, integer or (finite) number."""
    try:
        value = SCALAR_TYPES[kind](word)
    except ValueError:
        value = math.nan
    if kind != 'string' and not math.isfinite(value):
        raise ValueError(f'{rule} wants {with_article(kind)}, not {word!r}')
    return value


def blob_size(value: str) -> int:
    """The number of bytes that a string in base64 stands for."""
    return len(value) // 4 * 3 - value.count('=')


def rule_limit(text: str, bound: str, kind: str) -> ValueRule:
    """`min` or `max`: of the value for numbers, of the length for strings, lists and objects, and of the bytes that a
    string in base64 stands for."""
    name = text.partition(' ')[0]
    limit = parse_scalar(name, bound, kind if kind == 'number' else 'integer')
    within = functools.partial(operator.le if name == 'min' else operator.ge, limit)
    measure = blob_size if kind == 'base64' else len
    what, accepts = ('value', within) if kind in ('integer', 'number') else (
        'length', lambda value: within(measure(value)))
    return ValueRule(text, accepts, f'{what} {"under" if name == "min" else "over"} {bound}', limit)


def rule_one_of(text: str, words: str, kind: str) -> ValueRule:
    """`one-of a|b|c`: the value is one of them."""
    if not words.strip('| '):
        raise ValueError('one-of names no value')
    values = {word.strip(): parse_scalar('one-of', word.strip(), kind) for word in words.split('|')}
    return ValueRule(text, frozenset(values.values()).__contains__, f'not one of {words}', values)


def rule_match(text: str, pattern: str, kind: str) -> ValueRule:
    """`match REGEX`: the whole string matches the regular expression."""
    try:
        return ValueRule(text, re.compile(pattern).fullmatch, f'does not match {pattern}')
    except re.error as error:
        raise ValueError(f'match {pattern}: {error}') from None


LIMITED_TYPES = (*SCALAR_TYPES, 'list', 'object', 'base64')
# Each rule that has an argument: what makes it, and the types that it fits.
VALUE_RULES = {'min': (rule_limit, LIMITED_TYPES), 'max': (rule_limit, LIMITED_TYPES),
               'one-of': (rule_one_of, SCALAR_TYPES), 'match': (rule_match, ('string',))}
# What `min` and `max` limit, and where that begins and ends by itself; else it is a length.
RANGES = {'integer': ('integer of 64 bit', INT64[0], INT64[-1]), 'number': ('number', -math.inf, math.inf)}


def parse_field(value: Any) -> FieldRule:
    """A line of [[fields]], `integer, required, min 1`, as a FieldRule."""
    if isinstance(value, dict):
        raise ValueError('an option, not a section')
    kind, *texts = [value] if isinstance(value, str) else value or ['']
    if kind not in TYPE_CHECKS:
        raise ValueError(f'no type {kind!r}; there are ' + ', '.join(TYPE_CHECKS))
    for before, text in zip(['', *texts], texts, strict=False):   # before parse_rule(): its error has no hint
        if text != 'required' and text.partition(' ')[0] not in VALUE_RULES:
            raise ValueError(f'no rule {text!r}; there are required, ' + ', '.join(VALUE_RULES)
                             + comma_hint(before, text))
    rules = [parse_rule(text, kind) for text in texts if text != 'required']
    require_possible(kind, rules)
    return FieldRule(kind, check_all([type_rule(kind), *rules]), 'required' in texts)


def comma_hint(before: str, rest: str) -> str:
    """A hint to quote a rule that its comma may have cut in two: `before`, a rule with an argument, and `rest`."""
    return f'; quote a rule that holds a comma: "{before},{rest}"' if before.partition(' ')[0] in VALUE_RULES else ''


def parse_rule(text: str, kind: str) -> ValueRule:
    """A rule with its argument, `min 1`, for values of the type `kind`."""
    name, _, argument = text.partition(' ')
    if not argument.strip():
        raise ValueError(f'{name} needs an argument (quote the rule if it has a # in it)')
    make_rule, types_ = VALUE_RULES[name]
    if kind not in types_:
        raise ValueError(f'{name} does not fit the type {kind}')
    return make_rule(text, argument.strip(), kind)


def require_possible(kind: str, rules: Sequence[ValueRule]) -> None:
    """Raises ValueError for rules that no value keeps together, and for a word of one-of that breaks another one."""
    what, lowest, highest = RANGES.get(kind, ('length', 0, math.inf))
    least = max([lowest, *(rule.argument for rule in rules if rule.text.startswith('min '))])
    most = min([highest, *(rule.argument for rule in rules if rule.text.startswith('max '))])
    if least > most:
        raise ValueError(f'no {what} is from {least} to {most}')
    for choice in (rule for rule in rules if rule.text.startswith('one-of ')):
        for word, value in choice.argument.items():
            if kind == 'integer' and not lowest <= value <= highest:
                raise ValueError(f'one-of {word}: never, for an integer has 64 bit')
            for rule in rules:
                if not rule.accepts(value):
                    raise ValueError(f'one-of {word}: never, for {rule.text}')


# ---------------------------------------------------------------------------------------------------------------------
# options and configuration: the table of options, and what a file, the environment and --set say
# ---------------------------------------------------------------------------------------------------------------------

def place_of(section: str, name: str) -> tuple[str, ...]:
    """Sections and name, `nsq.tls` and `ca-file` as ('nsq', 'tls', 'ca-file')."""
    return *filter(None, section.split('.')), name


class Option(NamedTuple):
    """An option, or with a default of None a free subsection, which is only there when the file has it."""

    section: str
    name: str
    default: str | None
    check: Validator
    help: str

    @property
    def path(self) -> tuple[str, ...]:
        """Sections and name."""
        return place_of(self.section, self.name)

    @property
    def is_free(self) -> bool:
        """Whether it is a subsection of names that a user chooses."""
        return self.default is None

    @property
    def dotted(self) -> str:
        """What --set calls it, nsq.tls.ca-file; for a free subsection the beginning, message.fields."""
        return '.'.join(self.path) + '.' * self.is_free

    @property
    def variable(self) -> str:
        """The variable of the environment for it, XMSRV__NSQ__TLS__CA_FILE; for a free subsection the beginning of
        those, whose names follow as they are: XMSRV__MESSAGE__FIELDS__id."""
        return VARIABLES + '__'.join(self.path).upper().replace('-', '_') + '__' * self.is_free


# The one table of options: schema, defaults, the sample file, `check` and the manual are made from it.
OPTIONS = (
    Option('', 'state-dir', STATE_DIR, whole_path, 'State directory (lock, SQLite file); created if missing.'),
    Option('', 'timeout', '10s', parse_duration, 'Maximum duration of a window.'),
    Option('', 'idle-timeout', '500ms', parse_duration,
           'A window ends early when the queue has been idle for this long.'),
    Option('', 'period', '10s', parse_period,
           'The daemon starts a window every period; 0: one after the other, or without max-messages one endless '
           'window.'),
    Option('', 'workers', '1', parse_positive,
           'Processes of the daemon that share max-messages; for more than one core.'),
    Option('', 'log-format', 'text', one_of('text', 'json'), 'text, or json: an object a line.'),
    Option('', 'store', 'aerospike', one_of('aerospike', 'sqlite'),
           'Store of the records: [aerospike], or for a first run a file, [sqlite].'),
    Option('nsq', 'nsqd-tcp-address', '', list_of(nsqd_address),
           'host:port of each nsqd, or the path of its unix socket, separated by commas; or:'),
    Option('nsq', 'lookupd-http-address', '', list_of(lookupd_address),
           'host:port of each nsqlookupd (HTTP), or https://host:port; one list, not both.'),
    Option('nsq', 'topic', '', optional_value(parse_topic), 'Topic to read. Must be set.'),
    Option('nsq', 'channel', 'x-msrv', parse_topic, 'Channel of the topic; each channel gets every message once.'),
    Option('nsq', 'max-messages', '0', parse_count, 'Maximum messages per window; 0: no limit.'),
    Option('nsq', 'max-in-flight', '', optional_value(parse_positive),
           'Maximum messages in flight, over all nsqds together; empty: 1000 to Aerospike, or two batches if that is '
           'more; 2500 to SQLite.'),
    Option('nsq', 'max-held', '32MiB', parse_size,
           'Maximum bytes of messages in flight, and of decoded ones; above it, RDY is 0.'),
    Option('nsq', 'msg-timeout', '', optional_value(parse_duration),
           'Time after which nsqd delivers an unanswered message again; empty: as nsqd is set.'),
    Option('nsq', 'connect-timeout', '5s', parse_duration,
           'Maximum duration of each step of a connection: name, TCP, IDENTIFY, TLS, deflate, AUTH, SUB.'),
    Option('nsq', 'compression', 'none', compression_name,
           'none, or deflate for a slow link: all traffic with nsqd is compressed.'),
    Option('nsq', 'auth-secret-file', '', optional_value(parse_secret_path),
           'File with the secret for AUTH, or credential:NAME; nsqlookupds with https:// get it, too.'),
    Option('nsq.tls', 'ca-file', '', optional_value(whole_path),
           'Authorities to trust, PEM; empty: those of the system.'),
    Option('nsq.tls', 'cert-file', '', optional_value(whole_path), 'Client certificate, PEM.'),
    Option('nsq.tls', 'key-file', '', optional_value(parse_secret_path), 'Its key, PEM, or credential:NAME.'),
    Option('message', 'unknown-fields', 'keep', one_of('keep', 'drop', 'reject'),
           'Fields that [[fields]] does not name: kept, dropped, or a reason for a dead letter.'),
    Option('message', 'nulls', 'omit', one_of('omit', 'reject'), 'A null at the top: no bin, or a dead letter.'),
    Option('message', 'fields', None, subsection_of(Path.parse, parse_field),
           'A line a field, PATH = TYPE, RULE...; types: ' + ' '.join(TYPE_CHECKS) + '; rules: required, min N, max N, '
           'one-of A|B, match REGEX.'),
    Option('record', 'key', '$id', path_or('$id'),
           'Key of the record: $id, or the PATH of a field; which message of a key wins: see write.'),
    Option('record', 'id-bin', 'gid', optional_value(parse_bin_name), 'Bin that holds the key; empty: none.'),
    Option('record', 'time-bin', 'gts', optional_value(parse_bin_name),
           'With a field as key: the bin with the time by which the newest message wins.'),
    Option('record', 'time', '$timestamp', path_or('$timestamp'),
           'That time: when it was published (ns), or the PATH of an integer field.'),
    Option('record', 'write', 'replace', one_of('replace', 'create', 'update'),
           'replace: the newest wins; create: the first wins; update: bins are merged (with $id only).'),
    Option('record', 'ttl', 'default', ttl_parser(default=0, never=TTL_NEVER),
           'How long a record stays after its last write: default, as the namespace has it; never, for ever; or a '
           'duration of whole seconds, up to 3650d.'),
    Option('record', 'ttl-field', '', optional_value(Path.parse),
           'PATH of an integer field, the seconds that its record stays after that write; absent or null: ttl.'),
    Option('record', 'set-field', '', optional_value(Path.parse),
           'PATH of a string field that names the set of its record; empty: all go to set of the store.'),
    Option('record', 'document-bin', '', optional_value(parse_bin_name),
           'Bin for the whole message as one map, with names of any length; only [[bins]] makes others. Empty: each '
           'field has its bin.'),
    Option('record', 'bins', None, subsection_of(bin_source, parse_bin_name),
           'A line a field, PATH = BIN; all others keep their names. Also ' + ', '.join(METADATA) + '.'),
    Option('record.delete', 'field', '', optional_value(Path.parse),
           'PATH of the field that says that a record is deleted.'),
    Option('record.delete', 'values', '', list_of(single_value),
           'Values of that field that delete: strings, integers, true, false or null.'),
    Option('record.delete', 'mode', 'tombstone', one_of('tombstone', 'remove'),
           'tombstone: key and time stay, so that an older message that comes late changes nothing; remove: nothing '
           'stays.'),
    Option('record.delete', 'keep', '7d', ttl_parser(never=TTL_NEVER),
           'How long a tombstone stays: longer than any message can be late.'),
    Option('aerospike', 'hosts', '', list_of(parse_address),
           'Seed nodes, host:port, separated by commas. Must be set.'),
    Option('aerospike', 'namespace', '', optional_value(parse_namespace),
           'Namespace of the records. Must be set.'),
    Option('aerospike', 'set', '', optional_value(parse_set),
           'Set of the records; empty: the topic.'),
    Option('aerospike', 'batch-size', '500', parse_positive, 'Maximum records per call.'),
    Option('aerospike', 'writers', '4', parse_positive, 'Maximum concurrent calls.'),
    Option('aerospike', 'total-timeout', '2s', parse_duration, 'Maximum duration of a call.'),
    Option('aerospike', 'services-alternate', 'no', parse_yes_no,
           "yes: the nodes are reached by their alternate addresses, as from outside of a NAT, of Docker's or of "
           "Kubernetes' network."),
    Option('aerospike', 'cluster-name', '', optional_value(single_value),
           'Name of the cluster; a node of another cluster is not used. Empty: any.'),
    Option('aerospike', 'max-connections', '100', whole_number(1, MAX_CONNECTIONS),
           'Connections to each node at most.'),
    Option('aerospike', 'send-key', 'yes', parse_yes_no,
           'yes: the key is stored with its record; no: only its hash, which takes less room and can never be undone.'),
    Option('aerospike', 'auth-mode', 'internal', one_of('internal', 'external', 'pki'),
           'internal: user and password of the cluster; external: of a directory (LDAP), with TLS; pki: the client '
           'certificate of [[tls]] names the user.'),
    Option('aerospike', 'user', '', optional_value(single_value), 'User to log in as; empty: no log-in.'),
    Option('aerospike', 'password-file', '', optional_value(parse_secret_path),
           "File with the user's password, or credential:NAME."),
    Option('aerospike.tls', 'ca-file', '', optional_value(whole_path),
           'Authorities to trust, PEM. Must be set: the client brings an OpenSSL of its own, which knows none.'),
    Option('aerospike.tls', 'cert-file', '', optional_value(whole_path), 'Client certificate, PEM.'),
    Option('aerospike.tls', 'key-file', '', optional_value(parse_secret_path), 'Its key, PEM, or credential:NAME.'),
    Option('aerospike.tls', 'name', '', optional_value(single_value),
           "Name that the nodes' certificates are for; empty: each host's own."),
    Option('sqlite', 'path', 'records.sqlite', parse_path, 'Database file; a relative path starts at state-dir.'),
    Option('sqlite', 'set', '', optional_value(single_value), 'Value of the column "set"; empty: the topic.'),
    Option('dead-letter', 'topic', '$topic.dead', optional_value(parse_dead_letter_topic),
           'Topic for messages that can never become a record; empty: none.'),
    Option('dead-letter', 'file', '', optional_value(whole_path),
           'File for dead letters that no topic has taken; JSON lines.'),
    Option('dead-letter', 'discard', 'no', parse_yes_no, 'yes: dead letters are discarded.'),
    Option('metrics', 'listen', '', optional_value(parse_address),
           'host:port at which the daemon answers /metrics, /healthz, /readyz and a page to look at; empty: nowhere.'),
    Option('metrics', 'depth-interval', '10s', parse_period,
           'Interval at which each nsqd is asked over HTTP for the depth of the channel, for the page and the '
           'metrics; 0: never. `once` asks at its end, if it has a textfile.'),
    Option('metrics', 'textfile', '', optional_value(whole_path),
           'File that `once` writes the same figures to, NAME.prom in the directory of node_exporter; empty: none.'),
)
OPTIONS_BY_PATH = {option.path: option for option in OPTIONS}
# Off unless configured, and what they turn on.
SUBSECTIONS = {'nsq.tls': 'turns TLS on', 'aerospike.tls': 'turns TLS on', 'record.delete': 'turns deletes on'}


class FaultKind(enum.Enum):
    """The kind of a fault: it decides the exit status, and whether the daemon waits."""

    TEXT = 'the text of the configuration: waiting is no use'
    UNAVAILABLE = 'a file or address that the text names may yet come'


class Fault(NamedTuple):
    """A fault of the configuration: its place, the value, the rule that it breaks, and its FaultKind. variable: the
    variable of the environment that brought the value; none for the file and --set. line: where it is the line that
    can't be read. meant: section and name that an unknown name is most like."""

    section: str
    option: str
    value: Any
    rule: str
    kind: FaultKind = FaultKind.TEXT
    variable: str = ''
    line: int = 0
    meant: tuple[str, str] | None = None

    def __str__(self) -> str:
        where = f'line {self.line}: ' if self.line else ''
        where += ''.join('[' * depth + part + ']' * depth + ' ' for depth, part in enumerate(self.path[:-1], 1))
        shown = ', '.join(self.value) if isinstance(self.value, list) else self.value
        given = f' = {truncate_text(str(shown), 200)}' if self.value is not None else ''
        place = f'environment: {self.variable}' if self.variable else where + self.option
        return escape_controls(f'{place}{given}: {self.rule}')

    @property
    def path(self) -> tuple[str, ...]:
        """Sections and option, as a Setting has them."""
        return place_of(self.section, self.option)


Sections = dict[str, Any]   # of a file, raw or typed: sections are dicts, too


def configuration_schema() -> Validator:
    """The voluptuous schema of a whole file, from OPTIONS."""
    tree: dict[Any, Any] = {}
    for option in OPTIONS:
        node = tree
        for part in option.path[:-1]:
            off = option.section in SUBSECTIONS and option.section.endswith('.' + part)
            node = node.setdefault(vol.Optional(part) if off else vol.Optional(part, default=dict), {})
        key = vol.Optional(option.name) if option.is_free else vol.Optional(option.name, default=option.default)
        node[key] = as_invalid(option.check)
    schema: Validator = vol.Schema(tree)
    return schema


def read_file(filename: str, settings: Iterable['Setting'] = ()) -> Sections:
    """The raw sections of the INI file `filename` with `settings` laid over it.

    Raises Unavailable for a file that can't be read, ConfigError for one that is no INI, with each such line.
    """
    try:
        text = read_text(filename)
        raw = configobj.ConfigObj(text.split('\n'), interpolation=False)
        faults: list[Fault] = []
        raw.walk(lambda section, name: faults.extend(unquoted_comments(text, section, name)))
    except configobj.ConfigObjError as error:
        faults = list(syntax_faults(text.split('\n'), error.errors))
    except UnicodeDecodeError as error:
        raise ConfigError(f'{filename}: line {error.object.count(10, 0, error.start) + 1}: not UTF-8') from None
    except OSError as error:   # it may be there at the next try
        raise Unavailable(f'{filename}: {error.strerror}') from None
    if faults:
        raise ConfigError('\n'.join(f'{filename}: {fault}' for fault in faults))
    sections: Sections = raw.dict()
    for setting in settings:
        apply_setting(sections, setting)
    return sections


def read_text(filename: str) -> str:
    """The text of a configuration file, without a byte order mark. Raises ConfigError, UnicodeDecodeError, OSError."""
    with open(filename, 'rb') as file:
        try:
            data = read_at_most(file, MAX_FILE)
        except ValueError as error:
            raise ConfigError(f'{filename}: {error}: not a configuration') from None
    return io.TextIOWrapper(io.BytesIO(data), encoding='utf-8-sig').read()   # with line ends as open() reads them


# What configobj says of a line, and the rule that it breaks.
SYNTAX_RULES = {
    'Invalid line': 'neither OPTION = VALUE nor [SECTION]',
    'Duplicate': 'stands twice',
    'Cannot compute the section depth': 'has not as many [ as ]',
    'Section too nested': 'stands in no section: [SECTION] first, then [[SUBSECTION]]',
    'Parse error in value': 'a quote that does not end, or a comma without a value',
    'Parse error in multiline value': 'three quotes that do not end',
}


def syntax_faults(lines: Sequence[str], errors: Iterable[configobj.ConfigObjError]) -> Iterator[Fault]:
    """Yields a Fault for each line that configobj can't read; not for one that stands twice only because the heading
    above it can't be read."""
    places, unread = [*line_places(lines)], False
    for error in errors:
        section, name = places[error.line_number - 1]
        rule = next((rule for text, rule in SYNTAX_RULES.items() if str(error).startswith(text)), str(error))
        if isinstance(error, configobj.DuplicateError):
            first = places.index((section, name)) + 1
            if first == error.line_number and unread:
                continue
            rule += f', first in line {first}' * (first < error.line_number)
        unread = True
        written, is_option, value = error.line.strip().partition('=')
        if written.startswith('[') or not is_option:
            name, value = truncate_text(error.line.strip(), 200), None
        yield Fault(section, name, value and value.strip(), rule, line=error.line_number)


def line_places(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the section in which each line stands, and the name of its option or subsection."""
    above: list[str] = []
    for line in lines:
        heading = re.match(r'\s*(\[+)([^\[\]]+)', line)
        name = (heading[2] if heading else line.partition('=')[0]).strip().strip('"\'')
        above = above[:len(heading[1]) - 1] if heading else above
        yield '.'.join(above), name
        above = [*above, name] if heading else above


def section_path(section: configobj.Section) -> str:
    """The name of a section of configobj as options have it."""
    return f'{section.parent.name}.{section.name}' if section.depth > 1 else section.name or ''


def unquoted_comments(text: str, section: configobj.Section, name: str) -> Iterator[Fault]:
    """Yields a Fault for a value that a # may have cut: configobj reads the rest of the line as a comment.

    No Fault after a value in quotes, nor where the option takes no value with a #, as `timeout = 5s # a remark`.
    """
    comment, value = section.inline_comments.get(name), section[name]
    end = value[-1] if isinstance(value, list) and value else value
    where = section_path(section)
    if not comment or not isinstance(end, str) or not may_contain_hash(where, name, end):
        return
    line = re.search(rf'^\s*["\']?{re.escape(name)}["\']?\s*=[^\n]*?({re.escape(end)}[ \t]*{re.escape(comment)})\s*$',
                     text, re.MULTILINE)
    if line:
        yield Fault(where, name, line[1], 'quote the value: without quotes, # starts a comment')


def may_contain_hash(section: str, name: str, value: str) -> bool:
    """True when an option accepts a value that continues with a #."""
    option = OPTIONS_BY_PATH.get(place_of(section, name))
    if option:
        return any(is_accepted_by(option.check, value + more) for more in ('#', '#ephemeral'))
    around = OPTIONS_BY_PATH.get(tuple(section.split('.')))
    return around is not None and around.is_free


class Setting(NamedTuple):
    """A value that overrides the file. shown: how it was given, for an error; variable: the environment variable;
    empty for --set."""

    path: tuple[str, ...]
    value: str
    shown: str
    variable: str = ''


def command_line_setting(text: str) -> Setting:
    """`SECTION.OPTION=VALUE`, what follows --set. Raises UsageError."""
    name, _, value = text.partition('=')
    path = option_path(name.strip(), lambda option: option.dotted) or tuple(name.strip().split('.'))
    if '=' not in text or not path[-1]:
        raise UsageError(f'--set {escape_controls(text)}: not SECTION.OPTION=VALUE')
    return Setting(path, value, f'--set {text}')


def option_path(name: str, spelling: Callable[[Option], str]) -> tuple[str, ...]:
    """The path of the option that is spelled so; empty where there is none. What follows the name of a free subsection
    is the path of a field, whose dots are its own."""
    for option in OPTIONS:
        inner = name.removeprefix(spelling(option))
        if option.is_free and inner not in ('', name):
            return *option.path, inner
        if name == spelling(option):
            return () if option.is_free else option.path
    return ()


def variable_path(variable: str) -> tuple[str, ...]:
    """The path of the option that a variable of the environment sets; empty where there is none."""
    return option_path(variable, lambda option: option.variable)


def environment_settings(environment: Mapping[str, str]) -> list[Setting]:
    """What the variables of the environment set; unknown ones are for unknown_variables()."""
    paths = {variable: variable_path(variable) for variable in environment if variable.startswith(VARIABLES)}
    return [Setting(path, environment[variable], f'environment: {variable}', variable)
            for variable, path in paths.items() if path]


def unknown_variables(environment: Mapping[str, str]) -> list[Fault]:
    """A Fault for each XMSRV__ variable that sets no option, with the nearest known name."""
    unknown = [name for name in environment if name.startswith(VARIABLES) and not variable_path(name)]
    return [Fault('', '', environment[name], 'no such option' + nearest_variable(name), variable=name)
            for name in unknown]


def nearest_variable(variable: str) -> str:
    """A hint: the variable of this option in another section, or else the most similar variable, or nothing."""
    names = [option.variable.removeprefix(VARIABLES) + 'NAME' * option.is_free for option in OPTIONS]
    elsewhere = [name for name in names if f'__{name}'.endswith('__' + variable.rpartition('__')[2])]
    close = elsewhere or difflib.get_close_matches(variable.removeprefix(VARIABLES), names, 1)
    return f'; did you mean {VARIABLES}{close[0]}?' if close else ''


def read_overrides(arguments: argparse.Namespace) -> list[Setting]:
    """The settings that override the file: environment, then --set, which wins."""
    given: list[Setting] = arguments.set_before + arguments.set_after
    return environment_settings(os.environ) + given


def apply_setting(raw: Sections, setting: Setting) -> None:
    """Lays one Setting over the raw sections; its value is read as the file's are. Raises ConfigError."""
    *sections, option = setting.path
    shown = escape_controls(setting.shown)
    if not is_accepted_by(str.encode, setting.shown + setting.value):
        raise ConfigError(f'{shown}: not UTF-8')
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f'{shown}: {section} is an option, not a section')
    try:
        read = configobj.ConfigObj([f'value = {setting.value}'], interpolation=False)
        raw[option] = read['value']
    except (configobj.ConfigObjError, KeyError):
        read = None
    if not read or read.inline_comments['value']:   # a # would cut it short
        raise ConfigError(f'{shown}: the value cannot be read; quote the value')


def validate_sections(raw: Sections) -> tuple[Sections, list[Fault]]:
    """Raw sections as (typed sections, faults): all faults at once; the typed sections lack the faulty values."""
    schema, faults = configuration_schema(), list[Fault]()
    while True:
        try:
            return schema(raw), faults
        except vol.MultipleInvalid as error:
            for fault in error.errors:
                faults.append(fault_from_error(raw, fault))
                around: Any = raw
                for part in fault.path[:-1]:
                    around = around[part]
                around.pop(fault.path[-1], None)


def fault_from_error(raw: Sections, error: vol.Invalid) -> Fault:
    """A voluptuous error about `raw` as a Fault, with the nearest known name for an unknown one."""
    *sections, option = [str(part) for part in error.path]
    section = '.'.join(sections)
    value = functools.reduce(lambda node, part: node.get(part, {}), sections, raw).get(option)
    is_section = isinstance(value, dict)
    if error.msg == 'extra keys not allowed':
        name, what = (f'{"[" * len(error.path)}{option}{"]" * len(error.path)}', 'section') if is_section else (
            option, 'option')
        hint, meant = nearest_name(section, option)
        return Fault(section, name, None if is_section else value, f'no such {what}{hint}', meant=meant)
    if error.msg == 'expected a dictionary':
        return Fault(section, option, value, 'a section, not an option')
    if is_section:
        return Fault(section, option, None, 'an option, not a section')
    return Fault(section, option, value, error.msg)


def nearest_name(section: str, option: str) -> tuple[str, tuple[str, str] | None]:
    """A hint, and the section and name that are meant: where this `option` belongs, or else the most similar known
    name; or nothing."""
    elsewhere = [known.section for known in OPTIONS if known.name == option]
    if elsewhere:
        where = f'[{elsewhere[0]}]' if elsewhere[0] else 'the top, before any section'
        return f'; it belongs to {where}', (elsewhere[0], option)
    names = {known.name for known in OPTIONS if known.section == section}
    close = difflib.get_close_matches(option, names.union(known.section.split('.')[-1] for known in OPTIONS), 1)
    return (f'; did you mean {close[0]}?', (section, close[0])) if close else ('', None)


def to_namespace(sections: Sections) -> types.SimpleNamespace:
    """Typed sections as an object: `config.nsq.max_messages`. Free subsections stay dicts."""
    free = {option.name for option in OPTIONS if option.is_free}
    return types.SimpleNamespace(**{
        name.replace('-', '_'): to_namespace(value) if isinstance(value, dict) and name not in free else value
        for name, value in sections.items()})


# ---------------------------------------------------------------------------------------------------------------------
# faults of the configuration: what only shows between options, and in the files that they name
# ---------------------------------------------------------------------------------------------------------------------

def faults_where(section: str, *lines: tuple[Any, str, Any, str]) -> Iterator[Fault]:
    """Yields a Fault for each line that begins with something true; then come its option, value and rule."""
    for is_fault, option, value, rule in lines:
        if is_fault:
            yield Fault(section, option, value, rule)


def cross_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults of combinations of options."""
    nsqds, lookupds = config.nsq.nsqd_tcp_address, config.nsq.lookupd_http_address
    yield from faults_where(
        'nsq', (not config.nsq.topic, 'topic', None, 'missing; name the topic to read'),
        (bool(nsqds) == bool(lookupds), 'nsqd-tcp-address', None,
         f'either this or lookupd-http-address: {"not both" if nsqds else "one of them is needed"}'))
    for faults in (dead_letter_faults, mapping_faults, delete_faults, store_faults, tls_faults, environment_faults):
        yield from faults(config)


def dead_letter_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults of [dead-letter]."""
    topic, file, discard = config.dead_letter.topic, config.dead_letter.file, config.dead_letter.discard
    yield from faults_where(
        'dead-letter',
        (not (topic or file or discard), 'topic', None,
         'no topic and no file: set discard = yes to discard dead letters'),
        (discard and (topic or file), 'discard', 'yes', 'cannot be combined with a topic or a file'),
        (len(topic or '') > MAX_NAME, 'topic', topic,
         f'{len(topic or "")} characters; NSQ takes {MAX_NAME} at most'),
        (topic and topic == config.nsq.topic, 'topic', topic,
         'must not be the topic that is read: its dead letters would be consumed again'))


def mapping_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults between [message] and [record]."""
    message, record = config.message, config.record
    yield from unfit_fields(message, record)
    yield from conflicting_types(message.fields)
    yield from faults_where('message', (
        message.unknown_fields != 'keep' and not message.fields, 'unknown-fields', message.unknown_fields,
        'without [[fields]] no field is known'))
    yield from faults_where(
        'record',
        (record.write == 'update' and record.key != '$id', 'write', 'update',
         'bins cannot be merged in order; it needs key = $id'),
        (record.write == 'replace' and record.key != '$id' and not record.time_bin, 'time-bin', '',
         'with a field as key and write = replace it is needed: the newest wins'))
    yield from bin_faults(message, record)


# The options of [record] that name a field, the types of [[fields]] that fit, and why.
FIELD_TYPES = {
    'key': (('string', 'integer', 'number', 'any', 'base64', 'geojson'), 'a key is a string or an integer'),
    'time': (('integer', 'number', 'any'), 'the time is an integer'),
    'ttl-field': (('integer', 'number', 'any'), 'a ttl is an integer'),
    'set-field': (('string', 'any', 'base64'), 'the name of a set is a string'),
}


def unfit_fields(message: types.SimpleNamespace, record: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the paths of [record] whose field has a type that does not fit, and those that lead to no field, where
    only those of [[fields]] are known."""
    kinds = known_types(message.fields)
    lines = [('record', option, getattr(record, option.replace('-', '_')), None) for option in FIELD_TYPES]
    lines += [('record.bins', str(path), path, name) for path, name in record.bins.items()]
    for section, option, path, name in lines:
        if not isinstance(path, Path):
            continue
        if message.fields and message.unknown_fields != 'keep' and not is_known(path, message):
            yield Fault(section, option, name or str(path), 'no such field in [message] [[fields]]')
        fitting, need = FIELD_TYPES[option] if section == 'record' else (TYPE_CHECKS, '')
        for kind in sorted(kinds[path].difference(fitting)):
            yield Fault(section, option, str(path), f'{with_article(kind)} by [[fields]], and {need}')


def is_known(path: Path, message: types.SimpleNamespace) -> bool:
    """Whether [[fields]] names a field, one inside it, or one around it."""
    return any(known.leads_to(path) or path.leads_to(known) for known in message.fields)


def conflicting_types(fields: dict[Path, FieldRule]) -> Iterator[Fault]:
    """Yields a Fault for each value that would need two types: `a = string` beside `a.b = any`."""
    for path, kinds in known_types(fields).items():
        if len(kinds.difference(OPEN_TYPES)) > 1:
            yield Fault('message.fields', str(path), None,
                        f'{" and ".join(sorted(kinds.difference(OPEN_TYPES)))} at once, by other paths')


OPEN_TYPES = ('any', 'geojson')   # types of more than one JSON type


def known_types(fields: Mapping[Path, FieldRule]) -> dict[Path, set[str]]:
    """The types of the fields and of what lies around them, as far as [[fields]] says."""
    kinds = parent_types(fields)
    for path, rule in fields.items():
        kinds[path].add(rule.kind)
    return kinds


def parent_types(fields: Iterable[Path]) -> dict[Path, set[str]]:
    """The types that values have on the way to `fields`: `a.b` makes `a` an object, `a[0]` a list."""
    kinds = collections.defaultdict(set)
    for path in fields:
        for parent, kind in path.parents():
            kinds[parent].add(kind)
    return kinds


def bin_faults(message: types.SimpleNamespace, record: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the bins that more than one value would go into, and the names that are too long for one."""
    named = top_names(message, record)
    lines = [('record', 'id-bin', record.id_bin), ('record', 'time-bin', record.time_bin),
             ('record', 'document-bin', record.document_bin),
             *(('record.bins', str(path), name) for path, name in record.bins.items())]
    for name, group in group_by_key([line for line in lines if line[2]], lambda line: line[2]):
        *others, last = [f'[[bins]] {option}' if section == 'record.bins' else option for section, option, _ in group]
        others += [f'[[fields]] {name}'] * (name in named)
        if others:
            yield Fault(*group[-1], f'more than one value would go into this bin, also that of {" and ".join(others)}')
    key = record.key
    if (isinstance(key, Path) and len(key.steps) == 1 and key not in message.fields and not record.document_bin
            and record.bins.get(key, key.steps[0]) in (record.id_bin, record.time_bin)):
        yield Fault('record', 'key', str(key), 'its bin is also id-bin or time-bin: rename one of them')
    for name in sorted(named):
        if len(name.encode()) > MAX_BIN_NAME:
            yield Fault('message.fields', name, None, f'over {MAX_BIN_NAME} bytes for a bin: map it in [[bins]]')


def top_names(message: types.SimpleNamespace, record: types.SimpleNamespace) -> set[str]:
    """The names at the top of a message that become bins under these names, as far as [[fields]] knows them. With
    `drop` a field of [[bins]] leaves nothing behind, unless it lies in a list."""
    if record.document_bin:
        return set()
    moved = {path for path in record.bins if isinstance(path, Path)
             and (len(path.steps) == 1 or message.unknown_fields == 'drop' and path in message.fields
                  and not any(isinstance(step, int) for step in path.steps))}
    tops = {path.steps[0] for path in moved if len(path.steps) == 1}
    return {str(path.steps[0]) for path in message.fields if path not in moved} - tops


def delete_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields what is wrong with [[delete]], and between it and the other options."""
    message, record, delete = config.message, config.record, config.record.delete
    if not delete:
        return
    field, known = delete.field, message.fields.get(delete.field)
    yield from faults_where(
        'record.delete',
        (not field, 'field', None, 'missing; name the field that says that a record is deleted'),
        (not delete.values, 'values', None, 'missing; name the values of the field that say so'),
        (field and len(field.steps) == 1 and message.nulls == 'reject' and 'null' in delete.values, 'values', 'null',
         'never comes: [message] has nulls = reject'),
        (field and message.fields and message.unknown_fields == 'reject' and not is_known(field, message), 'field',
         str(field), 'no such field in [message] [[fields]]'))
    yield from faults_where(
        'record',
        (record.key == '$id', 'key', '$id', 'never the same for two messages: [[delete]] needs a field as key'),
        (record.key != '$id' and record.write != 'replace', 'write', record.write,
         '[[delete]] needs replace: the newest message of a key wins'))
    for word in delete.values if known else ():
        if word != 'null' and not any(is_accepted_by(known.check, value) for value in readings_of(word)):
            yield Fault('record.delete', 'values', word, f'never comes: [[fields]] rejects it in {field}')


def readings_of(word: str) -> list[Any]:
    """The values that a word of [[delete]] stands for: `1` is '1' and 1, `true` is 'true' and True."""
    literals = {'true': True, 'false': False, 'null': None}
    if re.fullmatch('-?(0|[1-9][0-9]{0,18})', word):
        return [word, int(word)]
    return [word, literals[word]] if word in literals else [word]


def store_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults of the chosen store; the sections of other stores are not checked."""
    options, for_ever = config.aerospike, 'store = sqlite keeps records for ever: leave it'
    if config.store == 'sqlite':
        yield from faults_where('record', (config.record.ttl, 'ttl', None, f'{for_ever} at default'),
                                (config.record.ttl_field, 'ttl-field', None, f'{for_ever} empty'))
        return
    yield from faults_where('aerospike', *[
        (not getattr(options, name), name, None, 'missing (or set store = sqlite, for a first run)')
        for name in ('hosts', 'namespace')], (
        len((options.set or '').encode()) > MAX_SET_NAME, 'set', options.set,
        f'the topic has over {MAX_SET_NAME} bytes: name a set'))
    yield from auth_faults(options)
    yield from faults_where('aerospike.tls', (
        options.tls and not options.tls.ca_file, 'ca-file', None,
        'missing: the client knows no authorities of its own'))


def auth_faults(options: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields what is wrong between auth-mode, user, password-file and [[tls]] of [aerospike]."""
    mode, tls, user, password = options.auth_mode, options.tls, options.user, options.password_file
    named = mode == 'pki' and bool(user or password)
    yield from faults_where(
        'aerospike',
        (named, 'auth-mode', mode, 'the certificate names the user: neither user nor password-file'),
        (mode == 'internal' and bool(user) != bool(password), 'user', user or '', 'user and password-file go together'),
        (mode == 'pki' and not (tls and tls.cert_file), 'auth-mode', mode,
         'it needs the client certificate: cert-file in [[tls]]'),
        (mode == 'external' and not (user and password), 'auth-mode', mode, 'it needs user and password-file'),
        (mode == 'external' and not tls, 'auth-mode', mode,
         'it needs [[tls]]: the password itself crosses the network'))


def tls_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields a Fault for a key without its certificate, which would never be presented."""
    for section in connected_sections(config):
        tls = getattr(config, section).tls
        if tls and tls.key_file and not tls.cert_file:
            yield Fault(f'{section}.tls', 'key-file', tls.key_file, 'a key without its certificate: name its cert-file')


def connected_sections(config: types.SimpleNamespace) -> Sequence[str]:
    """The sections of what is connected to."""
    return ('nsq', 'aerospike') if config.store == 'aerospike' else ('nsq',)


def environment_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults of the files that the configuration names. The daemon repeats this in a thread."""
    yield from path_faults(config)
    yield from unreadable_files(config)


def path_faults(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults of the paths that are written to. A device or a FIFO is a fault of the text. A missing
    directory is a fault unless x-msrv creates it, as the store and the lock do."""
    if os.path.exists(config.state_dir) and not os.path.isdir(config.state_dir):
        yield Fault('', 'state-dir', config.state_dir, 'not a directory')
    made = [('sqlite', 'path', config.sqlite.path)] if config.store == 'sqlite' else []
    found = [('dead-letter', 'file', config.dead_letter.file), ('metrics', 'textfile', config.metrics.textfile)]
    for section, option, filename in (*made, *found):
        if filename and os.path.exists(filename):
            if not os.path.isfile(filename):
                yield Fault(section, option, filename, 'not a regular file')
        elif filename and section != 'sqlite' and not os.path.isdir(os.path.dirname(os.path.realpath(filename))):
            yield Fault(section, option, filename, 'its directory is not there', FaultKind.UNAVAILABLE)


def value_of(config: types.SimpleNamespace, option: Option) -> Any:
    """The value of an option; None where its section is off."""
    return functools.reduce(lambda node, part: node and getattr(node, part.replace('-', '_')), option.path, config)


def unreadable_files(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the secrets and certificates that can't be read, or are empty."""
    for section in connected_sections(config):
        yield from credential_faults(config, section)


def credential_faults(config: types.SimpleNamespace, section: str) -> Iterable[Fault]:
    """The faults of the secrets and certificates of a section."""
    files = [option for option in OPTIONS if option.path[0] == section and option.name.endswith('-file')]
    faults = [fault for option in files for fault in secret_file_faults(option, value_of(config, option))]
    return faults or certificate_faults(section, getattr(config, section).tls)


def secret_file_faults(option: Option, filename: str | None) -> Iterator[Fault]:
    """Yields a Fault for the file of an option that can't be read, or is empty."""
    try:
        if filename and not open_secret(filename):
            raise ValueError('empty')
    except (OSError, ValueError) as error:
        rule = getattr(error, 'strerror', None) or str(error)
        yield Fault(option.section, option.name, filename, rule, FaultKind.UNAVAILABLE)


def certificate_faults(section: str, tls: types.SimpleNamespace | None) -> Iterator[Fault]:
    """Yields a Fault for the authorities, or else the certificate with its key, that do not load or do not match."""
    option, filename = 'ca-file', tls and tls.ca_file
    try:
        if filename:
            ssl.create_default_context(cafile=filename)
        if tls:
            option, filename = 'cert-file', tls.cert_file
            tls_context(tls)
    except (OSError, ValueError) as error:
        yield Fault(f'{section}.tls', option, filename, f'the certificates do not load: {error}', FaultKind.UNAVAILABLE)


def address_faults(listen: Address | None) -> Iterator[Fault]:
    """Yields a Fault for an address of `listen` that this host does not have. A port in use is no fault: a running
    daemon with the same configuration has it."""
    if not listen:
        return
    try:
        for family, kind, protocol, _, found in socket.getaddrinfo(listen[0], 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(found)
    except OSError as error:
        yield Fault('metrics', 'listen', format_address(listen), error.strerror or str(error), FaultKind.UNAVAILABLE)


def open_secret(filename: str) -> bytes:
    """The bytes of a secret's file, without the line end that editors add."""
    with open(open_regular(filename, os.O_RDONLY), 'rb') as file:
        return file.read(1 << 20).strip()


def tls_context(tls: types.SimpleNamespace) -> ssl.SSLContext:
    """The ssl context for the options of a [[tls]] section: host names verified, TLS 1.2 or newer."""
    context = ssl.create_default_context(cafile=tls.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file, no_passphrase)
    return context


def no_passphrase() -> NoReturn:
    """Instead of OpenSSL's question on the terminal."""
    raise ValueError('the key is encrypted: x-msrv cannot ask for its passphrase')


def cross_warnings(config: types.SimpleNamespace) -> Iterator[str]:
    """Yields warnings: legal, but seldom meant."""
    nsq_, cluster = config.nsq, config.aerospike if config.store == 'aerospike' else None
    local = nsq_.nsqd_tcp_address and not any(port for _, port in nsq_.nsqd_tcp_address)   # unix sockets
    if any((name or '').endswith('#ephemeral') for name in (nsq_.channel, nsq_.topic)):
        yield '[nsq] an #ephemeral topic or channel: what is published between runs is lost'
    if nsq_.auth_secret_file and not nsq_.tls and not local:
        yield '[nsq] auth-secret-file without [[tls]]: the secret crosses the network in the clear'
    if cluster and cluster.user and not cluster.tls:
        yield '[aerospike] user without [[tls]]: a hash of the password crosses the network in the clear'
    if cluster and cluster.writers > cluster.max_connections:
        yield (f'[aerospike] writers = {cluster.writers}: max-connections = {cluster.max_connections} to each node, so '
               'calls beyond that fail and are tried again')
    if config.dead_letter.discard:
        yield '[dead-letter] discard = yes: what can never become a record is thrown away'
    if os.path.exists(UNIT_FILE):
        yield from sandbox_warnings(config)


def sandbox_warnings(config: types.SimpleNamespace) -> Iterator[str]:
    """Yields a warning for each path that the packaged units may not write to."""
    paths = {'state-dir': config.state_dir, '[dead-letter] file': config.dead_letter.file,
             '[metrics] textfile': config.metrics.textfile}
    if config.store == 'sqlite':
        paths['[sqlite] path'] = config.sqlite.path
    for option, filename in paths.items():
        directory = filename and (filename if option == 'state-dir' else os.path.dirname(filename))
        let = 'INVOCATION_ID' in os.environ and os.access(directory or '.', os.W_OK)   # in a unit that may
        if directory and not let and not (directory + '/').startswith(STATE_DIR + '/'):
            yield (f'{option} = {filename}: the service may write only below {STATE_DIR}; let it: systemctl edit '
                   f'x-msrv (or x-msrv-daemon), with [Service] and ReadWritePaths={directory}')


# ---------------------------------------------------------------------------------------------------------------------
# effective configuration: all of it together, read and printed
# ---------------------------------------------------------------------------------------------------------------------

def build_config(raw: Sections) -> tuple[types.SimpleNamespace, list[Fault], list[str]]:
    """Raw sections as (config, faults, warnings).

    `config` has a value for each option, the derived ones filled in; with faults it is fit for no run.
    """
    sections, faults = validate_sections(copy.deepcopy(raw))
    config = to_namespace(sections)
    config.nsq.tls = getattr(config.nsq, 'tls', None)
    config.aerospike.tls = getattr(config.aerospike, 'tls', None)
    config.message.fields = getattr(config.message, 'fields', {})
    config.record.bins = getattr(config.record, 'bins', {})
    config.record.delete = getattr(config.record, 'delete', None)
    derive_options(config)
    keep_faulty_fields(config.message.fields, faults)
    unjudged = unjudged_options(faults)
    faults += [fault for fault in cross_faults(config)
               if not unjudged & {(fault.section, fault.option), ('', fault.section.partition('.')[0])}]
    return config, faults, list(cross_warnings(config))


# (section, option): those that cross_faults() would blame, too, as validation has removed the faulty value.
BLAMED_WITH = {
    ('', 'store'): (('', 'aerospike'),),
    ('nsq', 'lookupd-http-address'): (('nsq', 'nsqd-tcp-address'),),
    ('nsq.tls', 'cert-file'): (('nsq.tls', 'key-file'),),
    ('message', 'fields'): (('message', 'unknown-fields'),),
    ('aerospike', 'user'): (('aerospike', 'auth-mode'),),
    ('aerospike', 'password-file'): (('aerospike', 'user'), ('aerospike', 'auth-mode')),
    ('aerospike', 'tls'): (('aerospike', 'auth-mode'),),
    ('aerospike.tls', 'cert-file'): (('aerospike.tls', 'key-file'), ('aerospike', 'auth-mode')),
    ('dead-letter', 'file'): (('dead-letter', 'topic'),),
    ('dead-letter', 'discard'): (('dead-letter', 'topic'),),
}


def unjudged_options(faults: Iterable[Fault]) -> set[tuple[str, str]]:
    """The options, as (section, name), of which cross_faults() can't judge because of these faults: one fault is one
    line. With a section they are all that is in it.

    Example: `nsqd-tcp-address = x` is no address, so validation has removed it. "either this or lookupd-http-address"
    would be a second line for the same fault; so it would be for `nsqd-tcp-adress = queue1:4150`.
    """
    at_fault = {place for fault in faults for place in ((fault.section, fault.option), fault.meant) if place}
    return at_fault.union(*(BLAMED_WITH.get(place, ()) for place in at_fault))


def keep_faulty_fields(fields: dict[Path, FieldRule], faults: Iterable[Fault]) -> None:
    """Puts the fields whose rules are faulty into [[fields]], as of any type: [record] knows them all the same."""
    for fault in faults:
        if fault.section == 'message.fields' and is_accepted_by(Path.parse, fault.option):
            fields[Path.parse(fault.option)] = parse_field('any')


def default_in_flight(config: types.SimpleNamespace) -> int:
    """`max-in-flight` where it is empty: what keeps the store busy, and no more.

    A message, its record and what the client makes of it take some kilobytes: 2,500 of them do not fit into a cache of
    the CPU, which costs up to an eighth of all CPU to Aerospike. SQLite commits one batch while the next one gathers:
    with 1,000 in flight a slow disk takes 40 % longer.
    """
    return max(1000, 2 * config.aerospike.batch_size) if config.store == 'aerospike' else 2500


def derive_options(config: types.SimpleNamespace) -> None:
    """Sets the options that depend on other options."""
    record, dead = config.record, config.dead_letter
    config.nsq.max_in_flight = config.nsq.max_in_flight or default_in_flight(config)
    config.sqlite.path = os.path.join(config.state_dir, config.sqlite.path)
    config.sqlite.set = config.sqlite.set or config.nsq.topic
    config.endless = not config.period and not config.nsq.max_messages   # the daemon's one window
    config.aerospike.set = config.aerospike.set or config.nsq.topic
    if record.key == '$id' or record.write != 'replace':
        record.time_bin = None   # only newest-wins needs it
    if dead.topic == '$topic.dead':
        dead.topic = None if dead.discard else f'{config.nsq.topic or ""}'.removesuffix('#ephemeral') + '.dead'


def load_config(arguments: argparse.Namespace) -> tuple[Sections, types.SimpleNamespace, list[Fault]]:
    """The configuration of the command line as (raw sections, config, faults): see validated_config(). Raises
    ConfigError, Unavailable."""
    raw = read_file(arguments.config, read_overrides(arguments))
    return raw, *validated_config(arguments, raw)


def validated_config(arguments: argparse.Namespace, raw: Sections) -> tuple[types.SimpleNamespace, list[Fault]]:
    """Raw sections as (config, faults): only faults of FaultKind.UNAVAILABLE, of options that the command uses.
    Raises ConfigError with a line for each fault, of either kind, if any is of TEXT."""
    config, faults, warnings = build_config(raw)
    faults = unknown_variables(os.environ) + faults
    if any(fault.kind is FaultKind.TEXT for fault in faults):
        raise ConfigError(format_faults(arguments, faults))
    if arguments.command == 'check':
        set_up_configured_log(config, arguments)
        for warning in warnings:
            log.warning('%s: %s', arguments.config, warning)
        faults += address_faults(config.metrics.listen)
    return config, [fault for fault in faults if is_fault_of_command(arguments, fault)]


def sample_config() -> str:
    """The full sample file: every option at its default, its help above it; what turns something on is a remark."""
    lines, section = ['# x-msrv: every option at its default.'], ''
    for option in OPTIONS:
        if option.section != section:
            section = option.section
            outer, _, inner = section.partition('.')
            lines += ['', *([f'# [[{inner}]] {SUBSECTIONS[section]}.', f'# [[{inner}]]'] if inner else [f'[{outer}]'])]
        lines += ['', *textwrap.wrap(option.help, 110, initial_indent='# ', subsequent_indent='# ')]
        line = f'[[{option.name}]]' if option.is_free else f'{option.name} = {option.default}'.rstrip()
        lines.append(f'# {line}' if option.is_free or section in SUBSECTIONS else line)
    return '\n'.join(lines) + '\n'


class PrintedConfig(configobj.ConfigObj):   # type: ignore[misc]  # it has no hints
    """A ConfigObj that is only written: as a file it reads back what it was given."""

    def __init__(self) -> None:
        super().__init__(interpolation=False, write_empty_values=True, indent_type='')

    def _quote(self, value: str | list[str], multiline: bool = True) -> str:
        """Also quotes what configobj forgets: a name (not multiline) with = or [, and non-ASCII blanks."""
        quoted: str = super()._quote(value, multiline)
        cut = r'^\s|\s$' if multiline else r'^\s|\s$|=|^\['
        return str(self._get_single_quote(value)) % value if quoted == value and re.search(cut, quoted) else quoted


def dump_config(raw: Sections, settings: Sequence[Setting] | None = None) -> str:
    """Raw sections with defaults filled in, as the text of a file; a secret appears only as its file's name. With
    `settings`, the overrides of the file, a comment above each value that is not the default says where it is from.

    Raises ConfigError for an override that no file can express.
    """
    printed = PrintedConfig()
    for option in OPTIONS:
        node: Sections | None = raw
        for part in option.path[:-1]:
            node = (node or {}).get(part)
        if node is None and option.section in SUBSECTIONS:
            continue
        target = functools.reduce(add_section, option.path[:-1], printed)
        value = (node or {}).get(option.name, option.default)
        if value is not None:
            target[option.name] = value
            if settings is not None and value != option.default:
                remark_origin(target, option, settings)
    printed.walk(require_quotable)
    return '\n'.join(line.rstrip() for line in printed.write()) + '\n'


def add_section(outer: configobj.Section, name: str) -> configobj.Section:
    """The section of a name inside another one, with a blank line above it."""
    inner = outer.setdefault(name, {})
    outer.comments[name] = ['']
    return inner


def require_quotable(section: configobj.Section, name: str) -> None:
    """Raises ConfigError for an option whose name or value can't be written."""
    try:
        section.main._quote(name, multiline=False)
        section.main._quote(section[name])
    except configobj.ConfigObjError:
        found = 'a line end in its name' if '\n' in name else 'quotes of both kinds'
        fault = Fault(section_path(section), name, section[name], f'no file can hold it, for it has {found}')
        raise ConfigError(f'--set or environment: {fault}') from None


def remark_origin(target: configobj.Section, option: Option, settings: Sequence[Setting]) -> None:
    """Puts above the value of an option, or above each line of a free subsection, where it comes from."""
    origins = {setting.path: setting.variable and f'the environment: {setting.variable}' or '--set'
               for setting in settings}
    section, names, path = (target[option.name], target[option.name], option.path) if option.is_free else (
        target, [option.name], option.path[:-1])
    for name in names:
        section.comments[name] = [f'# from {origins.get((*path, name), "the file")}']


def is_fault_of_command(arguments: argparse.Namespace, fault: Fault) -> bool:
    """True when a command uses the option of a fault."""
    if arguments.command in ('config', 'completion') or getattr(arguments, 'message', None) is not None:
        return False
    return fault.option != 'textfile' or arguments.command in ('once', 'check')   # only `once` writes it


def format_faults(arguments: argparse.Namespace, faults: Iterable[Fault]) -> str:
    """Faults for the operator, a line each, with the file or the variable of the environment."""
    variables = {setting.path: setting.variable for setting in read_overrides(arguments)}
    named = [fault._replace(variable=fault.variable or variables.get(fault.path, '')) for fault in faults]
    return '\n'.join(str(fault) if fault.variable else f'{arguments.config}: {fault}' for fault in named)


def set_up_configured_log(config: types.SimpleNamespace, arguments: argparse.Namespace) -> None:
    """Sets up the log by the configuration."""
    set_up_log(arguments, config.log_format, topic=config.nsq.topic, channel=config.nsq.channel)


# ---------------------------------------------------------------------------------------------------------------------
# message and mapping: from bytes to a record, or the reason why not
# ---------------------------------------------------------------------------------------------------------------------

MAX_DEPTH = 64              # levels; a map or list of 65 is stored by Aerospike, and can never be read again
# Bins of a record: RECORD_MAX_BINS of the Aerospike server. The client counts the operations of a record in 16 bits, so
# it would write a part of 65,537 bins without an error. Holds in any store, like MAX_BIN_NAME.
MAX_BINS = 32767
DIGITS_TO_ZERO = bytes.maketrans(b'123456789', b'000000000')
JSON_SPACE = b' \t\r\n'     # RFC 8259, section 2
LONG_NUMBER = b'0' * 19     # shorter runs of digits are inside 64 bit


class Message:
    """One delivery of a message by an nsqd.

    id: 16 hex digits, bytes. timestamp: when it was published, ns since 1970, by that nsqd's clock. attempts:
    deliveries so far. key: `$id`, the same on each delivery and never the same for two messages (an id is not unique
    between nsqds, nor between topics of one nsqd). record: what Mapper made of it. rejection: why it can never become a
    record. touched_at: loop time at which nsqd last (re)started its msg-timeout; received_at: loop time of its arrival.
    set_aside: left in flight until the window ends. size: bytes that it takes once decoded, at most.
    """

    __slots__ = ('conn', 'id', 'timestamp', 'attempts', 'body', 'key', 'record', 'rejection', 'touched_at',
                 'received_at', 'set_aside', 'size')

    def __init__(self, conn: Any, id: bytes, timestamp: int, attempts: int, body: bytes, now: float = 0.0) -> None:
        self.conn = conn
        self.id = id
        self.timestamp = timestamp
        self.attempts = attempts
        self.body = body
        # Example: `0d1f2a3b4c5d6e70-1879ab3c01d2e3f4-9ae0daaf`: the id, the time of publication in ns, and the CRC-32
        # of the body, the last two in hex. All three are the same on each delivery.
        self.key = (b'%b-%x-%x' % (id, timestamp, zlib.crc32(body))).decode('ascii', 'replace')
        self.record: Record | None = None
        self.rejection: InvalidMessage | None = None
        self.touched_at = self.received_at = now
        self.set_aside = False
        self.size = 0


class Record:
    """What is stored of one message.

    key: str or int. bins: name -> value, as JSON has it. time: decides newest-wins, or None. set: its set's name;
    None: the configured set. ttl: seconds that it stays; None: the configured ttl.
    """

    __slots__ = ('key', 'bins', 'time', 'set', 'ttl')

    def __init__(self, key: str | int, bins: dict[str, Any], time: int | None, set: str | None = None,
                 ttl: int | None = None) -> None:
        self.key = key
        self.bins = bins
        self.time = time
        self.set = set
        self.ttl = ttl


class Deletion(Record):
    """Deletes the record of its key. bins: of the tombstone (mode = tombstone), which stays for `ttl`."""

    __slots__ = ()


class InvalidValue:
    """Replaces a value that strict JSON does not allow, until check_value() has found its path."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as dict; ValueError where a name comes twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError('a name comes twice')
    return members


def mark_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as dict, with an InvalidValue under each name that comes twice."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        members[name] = value if name not in members else InvalidValue('invalid-json', 'the name comes twice')
    return members


def parse_finite(digits: str) -> float:
    """A JSON number with a point or exponent as the nearest double. Raises ValueError beyond the largest, and for one
    that would become 0."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError('beyond the largest double')
    if not value and re.match('[-0.]*[1-9]', digits):
        raise ValueError('below the smallest double')
    return value


def parse_finite_or_mark(digits: str) -> float | InvalidValue:
    """Like parse_finite(), with an InvalidValue for a number that no double can hold."""
    try:
        return parse_finite(digits)
    except ValueError as error:
        return InvalidValue('unsupported-value', f'number {error}')


def parse_integer_or_mark(digits: str) -> int | InvalidValue:
    """A JSON integer of any length; an InvalidValue for one outside signed 64 bit."""
    value = int(digits) if len(digits) <= 20 else 1 << 64
    return value if value in INT64 else InvalidValue('unsupported-value', 'integer outside 64 bit')


def refuse_constant(name: str) -> NoReturn:
    """Raises ValueError for NaN and the infinities."""
    raise ValueError(f'{name} is not JSON')


def json_scanner(**hooks: Any) -> Callable[[str, int], tuple[Any, int]]:
    """The scan_once of a decoder: its decode also looks for white space, at twice the cost of decoding."""
    scan_once: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(**hooks).scan_once   # type: ignore[attr-defined]
    return scan_once


class MemberCount:
    """Counts the members of the objects that json decodes; as object_hook it costs half of what an object_pairs_hook
    does: json makes that one tuple per member. to_skip: how many of the next messages are decoded without counting."""

    __slots__ = ('total', 'to_skip')

    def __init__(self) -> None:
        self.total = self.to_skip = 0

    def add(self, members: dict[str, Any]) -> dict[str, Any]:
        """An object has been decoded."""
        self.total += len(members)
        return members


COUNTED_AGAIN = 1000        # messages after which members are counted again
decoded_members = MemberCount()
STRICT_NUMBERS = {'parse_float': parse_finite, 'parse_constant': refuse_constant}
scan_counting = json_scanner(object_hook=decoded_members.add, **STRICT_NUMBERS)
scan_unique = json_scanner(object_pairs_hook=reject_duplicates, **STRICT_NUMBERS)


def parse_strict(text: str) -> tuple[Any, int]:
    """The value at the beginning of a text, and where it ends; ValueError where a name comes twice.

    Each member has a colon, so with as many decoded members as colons no name came twice: `{"a": 1, "a": 2}` has two
    colons and one member. Colons in strings, `"12:30"`, leave that open; as the messages of a topic look alike, the
    next ones then go the slower way at once.
    """
    if decoded_members.to_skip:
        decoded_members.to_skip -= 1
        return scan_unique(text, 0)
    decoded_members.total = 0
    found = scan_counting(text, 0)
    if text.count(':') == decoded_members.total:
        return found
    decoded_members.to_skip = COUNTED_AGAIN
    return scan_unique(text, 0)


parse_lenient = json_scanner(
    object_pairs_hook=mark_duplicates, parse_float=parse_finite_or_mark, parse_int=parse_integer_or_mark,
    parse_constant=lambda name: InvalidValue('invalid-json', f'{name} is not JSON'))


def decode_message(body: bytes) -> dict[str, Any]:
    """Decodes a message strictly: UTF-8, one object, each name once, no value that a store would alter.

    Raises InvalidMessage. Most messages are checked on their bytes at C speed. The others are decoded again with
    an InvalidValue per fault and walked for its path.
    """
    if ((92 not in body or b'\\u' not in body)   # 92: a backslash; \u may give NUL or a surrogate
            and LONG_NUMBER not in body.translate(DIGITS_TO_ZERO)
            and (len(body) <= 2 * MAX_DEPTH or body.count(b'[') + body.count(b'{') <= MAX_DEPTH)):
        try:
            text = body.strip(JSON_SPACE).decode()
            value, end = parse_strict(text)
            if end == len(text) and value.__class__ is dict:
                return value
        except (ValueError, StopIteration):
            pass   # decode_with_path says why
    return decode_with_path(body)


COMPRESSIONS = {b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd', b'\xfd7zXZ': 'xz', b'BZh': 'bzip2', b'x\x9c': 'zlib'}


def foreign_encoding(body: bytes) -> str | None:
    """Names the encoding or compression of a body that is not plain UTF-8 (and so never JSON), else returns None."""
    for signature, name in COMPRESSIONS.items():
        if body.startswith(signature):
            return f'the body is compressed by {name}, not JSON text'
    encoding = json.detect_encoding(body)   # by its byte order mark, or by zero bytes
    if encoding == 'utf-8-sig':
        return 'the body begins with a byte order mark (EF BB BF); JSON text has none'
    if encoding == 'utf-8' or (len(encoding) > len('utf-16') and not is_decodable_as(body, encoding)):
        return None
    return f'the body is {encoding[:6].upper()}, not UTF-8'


def is_decodable_as(body: bytes, encoding: str) -> bool:
    """True when the body is text in this encoding, so that binary data with zero bytes is not mistaken for it."""
    try:
        return '\0' not in body.decode(encoding)
    except UnicodeError:
        return False


def decode_with_path(body: bytes) -> dict[str, Any]:
    """Like decode_message(), at a third of the speed, with the path of the fault."""
    body = body.rstrip(JSON_SPACE)
    try:
        text = body.decode()
        value, end = parse_lenient(text, len(body) - len(body.lstrip(JSON_SPACE)))   # positions count from the start
    except UnicodeDecodeError as error:
        raise not_json(body, f'not UTF-8 at byte {error.start}') from None
    except StopIteration as error:
        raise not_json(body, f'a value expected at character {error.value}') from None
    except json.JSONDecodeError as error:
        raise not_json(body, f'{error.msg.removesuffix(" at")} at character {error.pos}') from None
    except RecursionError:
        raise InvalidMessage('unsupported-value', f'deeper than {MAX_DEPTH} levels') from None
    if end != len(text):
        raise not_json(body, f'more text after the value, at character {end}')
    check_value(value, '', 1)
    if not isinstance(value, dict):
        raise InvalidMessage('not-an-object', f'the message is {type_name(value)}, not an object')
    return value


def not_json(body: bytes, detail: str) -> InvalidMessage:
    """The reason why a body is no JSON: its encoding or compression where that is what is wrong, else `detail`."""
    return InvalidMessage('invalid-json', foreign_encoding(body) or detail)


def type_name(value: object) -> str:
    """The JSON type of a value, with its article."""
    names = {list: 'a list', str: 'a string', bool: 'a boolean', int: 'a number', float: 'a number', type(None): 'null'}
    return names.get(value.__class__, 'an object')


def check_value(value: object, where: str, depth: int) -> None:
    """Raises InvalidMessage for the first value that can't be stored exactly; `where` is its path."""
    if value.__class__ is str:
        check_string(value, where)
    elif isinstance(value, InvalidValue):
        raise InvalidMessage(value.reason, with_path(where, value.detail))
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise InvalidMessage('unsupported-value', with_path(where, f'deeper than {MAX_DEPTH} levels'))
        for step, item in (value.items() if isinstance(value, dict) else enumerate(value)):
            inner = join_path(where, step)
            if isinstance(step, str):
                check_string(step, inner)
            check_value(item, inner, depth + 1)


def check_string(value: str, where: str) -> None:
    """Raises InvalidMessage for a string or name that Aerospike cuts (NUL) or refuses (lone surrogate)."""
    if '\0' in value:
        raise InvalidMessage('unsupported-value', with_path(where, 'NUL character'))
    if not value.isascii() and re.search('[\ud800-\udfff]', value):
        raise InvalidMessage('unsupported-value', with_path(where, 'lone surrogate'))


def with_path(where: str, rule: str) -> str:
    """The detail for a path and the rule broken there; a path of any length leaves the rule in sight."""
    return f'{truncate_text(where, 200)}: {rule}' if where else rule


# The known names of an object, each with the Names inside it; None: its whole value is known.
# Example: of the paths `customer.name` and `items[0].id` it is {'customer': {'name': None}, 'items': None}: of a
# customer the name is known, of the items all.
Names = dict[str, Any]


def known_names(fields: Iterable[Path]) -> Names:
    """The names that [[fields]] knows: its paths, what lies inside them, and the way there. A list is known whole:
    without one item the others would have other indices."""
    names: Names = {}
    for path in sorted(fields, key=lambda path: len(path.steps)):   # `a`, known whole, comes before `a.b`
        inner: Names | None = names
        for step, following in zip(path.steps, [*path.steps[1:], None], strict=True):
            if inner is not None:
                inner = inner.setdefault(str(step), {} if isinstance(following, str) else None)
    return names


def drop_unknown_fields(fields: dict[str, Any], names: Names) -> dict[str, Any]:
    """The fields that are known; an object without a known name is dropped, too."""
    kept = {}
    for name, value in fields.items():
        inner = names.get(name, UNKNOWN)
        if inner is None or inner is not UNKNOWN and value.__class__ is not dict:
            kept[name] = value
        elif inner is not UNKNOWN:
            pruned = drop_unknown_fields(value, inner)
            if pruned:
                kept[name] = pruned
    return kept


UNKNOWN: Any = object()


def unknown_fields(fields: dict[str, Any], names: Names, where: str = '') -> Iterator[str]:
    """Yields the paths of the fields that are not known, as details have them."""
    for name, value in fields.items():
        inner = names.get(name, UNKNOWN)
        if inner is UNKNOWN:
            yield join_path(where, name)
        elif inner and value.__class__ is dict:
            yield from unknown_fields(value, inner, join_path(where, name))


def check_geojson(value: object) -> None:
    """Raises vol.Invalid for what is no object with a `type`, nor the text of one. The geometry itself is for the
    server to judge."""
    try:
        found = decode_message(value.encode()) if isinstance(value, str) else value
    except InvalidMessage as rejection:
        raise vol.Invalid(f'not GeoJSON: {rejection.detail}') from None
    if not isinstance(found, dict) or not isinstance(found.get('type'), str):
        raise vol.Invalid('not GeoJSON: an object with a type, or its text')


BIN_TYPES_OF_FIELDS = {'base64': 'blob', 'geojson': 'geojson'}   # types of Aerospike that JSON lacks


def typed_bins(config: types.SimpleNamespace) -> dict[str, str]:
    """The Aerospike type of each bin whose field is base64 or geojson. Inside an object or a document bin such a field
    keeps its JSON type."""
    bins = {}
    for path, rule in config.message.fields.items():
        own = path.steps[0] if is_top(path) and not config.record.document_bin else None
        name = config.record.bins.get(path, own)
        if name and rule.kind in BIN_TYPES_OF_FIELDS:
            bins[name] = BIN_TYPES_OF_FIELDS[rule.kind]
    return bins


class MessageSchema:
    """The rules of [[fields]], and what becomes of fields that it does not name. With `partial`, for a message that
    deletes a record, no field is required."""

    def __init__(self, message: types.SimpleNamespace, partial: bool = False) -> None:
        fields = message.fields
        implied = {path: FieldRule(kind, check_all([type_rule(kind)])) for path, kinds in parent_types(fields).items()
                   for kind in kinds if path not in fields or fields[path].kind in OPEN_TYPES}
        self.rules = [(path.get, path.label, check_geojson if rule.kind == 'geojson' else rule.check,
                       rule.required and not partial)
                      for path, rule in (*fields.items(), *implied.items())]
        self.unknown, self.names = message.unknown_fields, known_names(fields)

    def apply_schema(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields to keep. Raises InvalidMessage with up to three faults."""
        faults = []
        for get, label, check, required in self.rules:
            value = get(fields)
            if value is not None:
                try:
                    check(value)
                except vol.Invalid as error:
                    faults.append(f'{label}: {error.msg}')
            elif required:
                faults.append(f'{label}: missing')
        if self.unknown == 'reject':
            faults += [f'{where}: unknown field' for where in unknown_fields(fields, self.names)]
        if faults:
            raise InvalidMessage('schema', '; '.join(sorted(faults)[:3]))
        return drop_unknown_fields(fields, self.names) if self.unknown == 'drop' else fields


def too_many_bins(number: int) -> str:
    """The detail for a record of so many bins."""
    return f'{number} bins, with id-bin and time-bin; a record has at most {MAX_BINS}'


RESERVED_SET = '<ERO~'      # prefix of the server's own sets: it answers 16 to a write there


def field_of(option: str | Path) -> Path | None:
    """The path that an option names; None for its word of NSQ, `$id` or `$timestamp`."""
    return option if isinstance(option, Path) else None


def is_top(source: str | Path) -> bool:
    """Whether a line of [[bins]] names a field at the top of the message."""
    return isinstance(source, Path) and len(source.steps) == 1


def take_out(fields: dict[str, Any], steps: Sequence[str | int], names: Names | None) -> None:
    """Removes the value at a path, and each object that this empties and `names` knows only in part. What lies in a
    list stays there: without one item the others would have other indices."""
    name, *rest = steps
    value = fields.get(str(name), UNKNOWN)
    if not rest:
        fields.pop(str(name), None)
    elif value.__class__ is dict and isinstance(rest[0], str):
        inner = names.get(str(name)) if names else None
        take_out(value, rest, inner)
        if not value and inner is not None:
            del fields[str(name)]


class DeletionRule:
    """Which messages delete the record of their key, by [[delete]]. keep: ttl of a tombstone."""

    def __init__(self, delete: types.SimpleNamespace, message: types.SimpleNamespace) -> None:
        self.field, self.keep = delete.field, delete.keep
        # With their types, for True and 1 are equal in Python.
        self.values = {(value.__class__, value) for word in delete.values for value in readings_of(word)}
        self.types = {kind for kind, _ in self.values}
        self.schema = MessageSchema(message, partial=True) if message.fields else None

    def applies_to(self, fields: dict[str, Any]) -> bool:
        """Whether a message, as it was decoded, deletes its record."""
        value = self.field.descend(fields, UNKNOWN)
        return value.__class__ in self.types and (value.__class__, value) in self.values


class Mapper:
    """Makes the record of a message, by [message] and [record]."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        message, record = config.message, config.record
        self.nulls, self.document_bin = message.nulls, record.document_bin
        self.schema = MessageSchema(message) if message.fields else None
        self.key, self.time = field_of(record.key), field_of(record.time)
        self.set_field, self.ttl_field = record.set_field, record.ttl_field
        self.id_bin, self.time_bin = record.id_bin, record.time_bin
        # Names at the top that get another bin; and (bin, source) of all other lines of [[bins]].
        top = {} if record.document_bin else {path: name for path, name in record.bins.items() if is_top(path)}
        self.renamed = {path.steps[0]: name for path, name in top.items()}
        # The deepest first: with `drop` a field is taken out of its object before that gets a bin, whatever the order.
        self.sources = sorted(((name, source) for source, name in record.bins.items() if source not in top),
                              key=lambda pair: -len(pair[1].steps) if isinstance(pair[1], Path) else 0)
        self.kept_names = self.schema.names if (
            self.schema and message.unknown_fields == 'drop' and not record.document_bin) else None
        # Makes bins of the fields. Mostly None: each field is the bin of its name, which saves a call a message.
        self.layout = (self.document_bins if record.document_bin else self.mapped_bins if self.sources
                       else self.renamed_bins if self.renamed else None)
        self.topic = config.nsq.topic
        self.reserved_bins = {name for name in (self.id_bin, self.time_bin) if name} | set(record.bins.values())
        self.checked_names: set[str] = set()   # names of bins that were found good: a cache, bounded
        self.deletion = DeletionRule(record.delete, message) if record.delete else None

    def build_record(self, message: Message) -> Record:
        """The Record of `message`; raises InvalidMessage."""
        fields = decode_message(message.body)
        if self.deletion and self.deletion.applies_to(fields):
            return self.deletion_of(fields, message, self.deletion)
        if None in fields.values():
            fields = self.without_nulls(fields)
        if self.schema:
            fields = self.schema.apply_schema(fields)
        key = self.key_of(fields) if self.key else message.key
        moment = self.time_of(fields, message) if self.time_bin else None
        set_ = self.set_of(fields) if self.set_field else None
        ttl = self.ttl_of(fields) if self.ttl_field else None
        if self.layout:
            bins = self.layout(fields, message)
        else:
            if not self.checked_names.issuperset(fields):
                self.check_bin_names(fields)
            bins = fields
        if self.id_bin:
            bins[self.id_bin] = key
        if self.time_bin:
            bins[self.time_bin] = moment
        if not 0 < len(bins) <= MAX_BINS:
            raise InvalidMessage('unsupported-value', too_many_bins(len(bins)) if bins else 'no field to store')
        return Record(key, bins, moment, set_, ttl)

    def deletion_of(self, fields: dict[str, Any], message: Message, rule: 'DeletionRule') -> Deletion:
        """The Deletion that a message asks for: it needs key and time; other fields are optional, but checked if
        present. Raises InvalidMessage."""
        if None in fields.values():
            fields = self.without_nulls(fields)
        if rule.schema:
            fields = rule.schema.apply_schema(fields)
        key, moment = self.key_of(fields), self.time_of(fields, message)
        set_ = self.set_of(fields) if self.set_field else None
        bins = {self.id_bin: key, self.time_bin: moment} if self.id_bin else {self.time_bin: moment}
        return Deletion(key, bins, moment, set_, rule.keep)

    def without_nulls(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields without nulls at the top: an absent bin reads as null, and the client refuses a null. In a
        document bin nulls stay."""
        if self.nulls == 'reject':
            name = next(name for name, value in fields.items() if value is None)
            raise InvalidMessage('schema', f'{join_path("", name)}: null')
        return fields if self.document_bin else {name: value for name, value in fields.items() if value is not None}

    def key_of(self, fields: dict[str, Any]) -> str | int:
        """The field that is the key: a string, not empty, or an integer (the server takes True and 1 for one key)."""
        path: Any = self.key
        key = path.get(fields)
        if key.__class__ is int or key.__class__ is str and key:
            return key
        rule = 'missing' if key is None else 'a key is a string, not empty, or an integer'
        raise InvalidMessage('key', f'{path.label}: {rule}')

    def time_of(self, fields: dict[str, Any], message: Message) -> int:
        """The time by which the newest message of a key wins."""
        if not self.time:
            return message.timestamp
        moment = self.time.get(fields)
        if moment.__class__ is not int:
            raise InvalidMessage('schema', f'{self.time.label}: not an integer, and it is the time of the message')
        return moment

    def set_of(self, fields: dict[str, Any]) -> str:
        """The name of the record's set. Without one nobody knows whose record it is: a dead letter."""
        name = self.set_field.get(fields)
        try:
            if name.__class__ is not str:
                raise ValueError('missing, and it names the set' if name is None else 'not a string')
            if name.startswith(RESERVED_SET):
                raise ValueError('a set of the server itself')
            return parse_set(name)
        except ValueError as error:
            raise InvalidMessage('schema', f'{self.set_field.label}: {error}') from None

    def ttl_of(self, fields: dict[str, Any]) -> int | None:
        """Seconds that the record stays after this write; None: as the configuration has it."""
        seconds = self.ttl_field.get(fields)
        if seconds is not None and (seconds.__class__ is not int or not 1 <= seconds <= MAX_TTL):
            raise InvalidMessage('schema',
                                 f'{self.ttl_field.label}: a ttl is a whole number of seconds from 1 to {MAX_TTL}')
        return seconds

    def renamed_bins(self, fields: dict[str, Any], message: Message) -> dict[str, Any]:
        """The fields under the names that they have, or that [[bins]] gives them."""
        if not self.checked_names.issuperset(fields):
            self.check_bin_names(fields)
        return {self.renamed.get(name, name): value for name, value in fields.items()}

    def mapped_bins(self, fields: dict[str, Any], message: Message) -> dict[str, Any]:
        """As renamed_bins(), with what [[bins]] takes out of objects and of NSQ's metadata."""
        found = self.values_of_sources(fields, message)
        return self.renamed_bins(fields, message) | found

    def document_bins(self, fields: dict[str, Any], message: Message) -> dict[str, Any]:
        """The message as one map, and what [[bins]] names."""
        return {**self.values_of_sources(fields, message), self.document_bin: fields}

    def values_of_sources(self, fields: dict[str, Any], message: Message) -> dict[str, Any]:
        """The bins that [[bins]] makes of paths and metadata. With `unknown-fields = drop` a field is taken out of its
        object, even if the object has a bin itself; else it also stays there. A null is no bin, as at the top."""
        found = {}
        for name, source in self.sources:
            value = (self.message_metadata(source, message) if isinstance(source, str)
                     else source.descend(fields, UNKNOWN))
            if value is None and self.nulls == 'reject':
                raise InvalidMessage('schema', f'{source.label}: null')
            if value is not None and value is not UNKNOWN:
                found[name] = value
            if self.kept_names is not None and isinstance(source, Path):
                take_out(fields, source.steps, self.kept_names)
        return found

    def message_metadata(self, source: str, message: Message) -> str | int:
        """What NSQ says of a message, by the name that [[bins]] has for it."""
        if source == '$nsqd':
            return str(message.conn)
        if source == '$topic':
            return self.topic
        return message.attempts if source == '$attempts' else message.timestamp

    def check_bin_names(self, fields: dict[str, Any]) -> None:
        """Raises InvalidMessage for a field that can't have a bin of its name."""
        for name in fields:
            if name in self.renamed:
                continue
            if name in self.reserved_bins:
                raise InvalidMessage('bin-name',
                                     f'{join_path("", name)}: this bin belongs to id-bin, time-bin or another field')
            if len(name.encode()) > MAX_BIN_NAME:
                raise InvalidMessage('bin-name', f'{join_path("", name)}: over {MAX_BIN_NAME} bytes')
        self.checked_names = self.checked_names.union(fields) if len(self.checked_names) < 10000 else set(fields)


# ---------------------------------------------------------------------------------------------------------------------
# nsqd protocol: one connection, and what nsqlookupd says
# ---------------------------------------------------------------------------------------------------------------------

READ_SIZE = 256 * 1024      # bytes a read
MAX_RESPONSE = 1 << 20      # bytes of an answer in the handshake: another server's might announce gigabytes
# Bytes of a frame, of which RDY bounds only the number: one that a broken server announces must not take all memory.
# nsqd's own limit of a message is 1 MiB (--max-msg-size), and no Aerospike server takes a record of more than 8 MiB.
MAX_FRAME = 256 << 20
HANDSHAKE_STEPS = 8         # at most, each in connect-timeout: files, name, TCP, IDENTIFY, TLS, deflate, AUTH, SUB
LOOKUP_TIMEOUT = 3.0        # seconds for an HTTP server to take a connection, and to answer
LOOKUP_GRACE = 0.5          # seconds that a question waits for the other nsqlookupds once one has named nsqds
HEARTBEAT_INTERVAL = 10.0   # seconds; nsqd closes after two unanswered, we after two missed
DEFAULT_HEARTBEAT = 60.0    # seconds, for an nsqd that refused ours; its default (--client-timeout/2): 30
HTTP_TIMEOUTS: dict[str, Any] = {'connect_timeout': LOOKUP_TIMEOUT, 'request_timeout': LOOKUP_TIMEOUT}
OUTPUT_BUFFER_TIMEOUT = 25       # ms that nsqd may keep messages back: the least it takes (--min-output-buffer-timeout)
OUTPUT_BUFFER_SIZE = 64 * 1024   # bytes that nsqd gathers for one write: the most it takes (--max-output-buffer-size)
TICK_INTERVAL = 0.025            # seconds between looks at RDY, idleness and TOUCH
# Seconds, plus a round trip, after which nsqd must have acted on an RDY (it sends no answer): twice the time that
# its output buffer may keep messages back.
RDY_TRANSIT = 2 * OUTPUT_BUFFER_TIMEOUT / 1000
DEFLATE_LEVEL = 1                # of what is sent: FINs, whose ids hardly get smaller at any
PUBLISH_TIMEOUT = 5.0            # seconds for nsqd to take a batch of dead letters
CLOSE_TIMEOUT = 1.0              # seconds to wait for CLOSE_WAIT
RESPONSE, ERROR, MESSAGE = nsq.FRAME_TYPE_RESPONSE, nsq.FRAME_TYPE_ERROR, nsq.FRAME_TYPE_MESSAGE
FRAME_HEADER = struct.Struct('>ii')          # size of what follows, frame type
MESSAGE_HEADER = struct.Struct('>iiqH16s')   # of a message: size, type, timestamp, attempts, id
LATE_ERRORS = (b'E_FIN_FAILED', b'E_REQ_FAILED', b'E_TOUCH_FAILED')       # not fatal: nsqd has delivered it again
UNREACHABLE = (OSError, NsqdError, UnicodeError)   # OSError: TimeoutError, too; UnicodeError: an invalid name
Nsqds = dict[Address, int | None]       # address -> HTTP port, where nsqlookupd has named it


def describe_error(error: BaseException) -> str:
    """Describes an exception of a connection in a few words."""
    cause = getattr(error, 'real_error', None) or error
    if isinstance(cause, TimeoutError):
        return 'no answer in time'
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f'TLS: {cause.verify_message}'
    if isinstance(cause, StreamClosedError):
        return 'the connection was closed'
    return escape_controls(getattr(cause, 'strerror', None) or str(cause) or type(cause).__name__)


@contextlib.asynccontextmanager
async def time_limit(seconds: float | None, text: str) -> AsyncIterator[asyncio.Timeout]:
    """Raises NsqdError(text) when its block takes longer."""
    try:
        async with asyncio.timeout(seconds) as bound:
            yield bound
    except TimeoutError:
        if not bound.expired():   # ETIMEDOUT from the kernel
            raise
        raise NsqdError(text) from None


class NameResolver(Resolver):
    """Resolves a name to addresses of both families, in a thread for each: a hanging name delays no other.

    asyncio's own look-up shares the few threads of its executor, also for IP addresses: a few names whose name server
    does not answer use them up. c-ares (tornado's CaresResolver) is deprecated, and does not read nsswitch.conf.
    """

    # name -> the Future of its thread: one for all who ask for that name meanwhile
    lookups: dict[tuple[str, int], concurrent.futures.Future[list[Any]]] = {}

    async def resolve(self, host: str, port: int, family: int = socket.AF_UNSPEC) -> list[tuple[int, Any]]:
        """[(family, address)] for connect(). Raises OSError."""
        try:
            found = look_up_name(host, family, socket.AI_NUMERICHOST)   # an IP address, which needs no name server
        except socket.gaierror:
            found = await asyncio.wrap_future(self.start_lookup(host, family))
        return [(family, (sockaddr[0], port, *sockaddr[2:])) for family, _, _, _, sockaddr in found]

    def start_lookup(self, host: str, family: int) -> concurrent.futures.Future[list[Any]]:
        """The Future of the thread that looks up `host`; its result is not cached."""
        key = host, family
        future = self.lookups.get(key)
        if not future:
            future = self.lookups[key] = concurrent.futures.Future()
            future.set_running_or_notify_cancel()   # a cancelled waiter must not cancel it for others
            future.add_done_callback(lambda _: self.lookups.pop(key))
            # daemon: no exit waits for it
            threading.Thread(target=self.run_lookup, args=(future, key), daemon=True).start()
        return future   # the thread may have removed it

    def run_lookup(self, future: concurrent.futures.Future[list[Any]], key: tuple[str, int]) -> None:
        """Looks the name up, in the thread."""
        try:
            future.set_result(look_up_name(*key))
        except (OSError, UnicodeError) as error:
            future.set_exception(error)


class ResolvedName(Resolver):
    """Gives the addresses that a NameResolver has found."""

    def initialize(self, addresses: list[tuple[int, Any]]) -> None:
        """Takes the addresses."""
        self.addresses = addresses

    async def resolve(self, host: str, port: int, family: int = socket.AF_UNSPEC) -> list[tuple[int, Any]]:
        """The same addresses for each name."""
        return self.addresses


def look_up_name(host: str, family: int, flags: int = 0) -> list[Any]:
    """The result of getaddrinfo for a name, for any port. Raises OSError, or UnicodeError for an invalid name."""
    return socket.getaddrinfo(host, 0, family, socket.SOCK_STREAM, flags=flags)


class DeflateStream:
    """A stream with deflate in both directions, with the methods of IOStream that a Connection uses. Raw deflate: no
    header or checksum of zlib, as in nsqd (compress/flate of Go)."""

    def __init__(self, stream: IOStream) -> None:
        self.stream = stream
        self.deflater = zlib.compressobj(DEFLATE_LEVEL, wbits=-zlib.MAX_WBITS)
        self.inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        self.inflated = b''                      # not read yet
        self.deflated: bytes | None = None       # read and not inflated yet; None: all that came is inflated

    def __getattr__(self, name: str) -> Any:
        """Of the stream below: close(), and `socket` for what it says of TLS."""
        return getattr(self.stream, name)

    def write(self, data: bytes) -> None:
        """Writes all of it at once: nothing waits in the compressor."""
        self.stream.write(self.deflater.compress(data) + self.deflater.flush(zlib.Z_SYNC_FLUSH))

    async def read_bytes(self, size: int, partial: bool = False) -> bytes:
        """`size` bytes; if partial, 1 to `size`, as available. Raises NsqdError for data that is not deflate."""
        while len(self.inflated) < (1 if partial else size):
            self.inflated += await self.inflate_more()
        data, self.inflated = self.inflated[:size], self.inflated[size:]
        return data

    async def inflate_more(self) -> bytes:
        """The next inflated bytes, READ_SIZE at most: a small input may inflate to a huge output."""
        if self.deflated is None:
            self.deflated = await self.stream.read_bytes(READ_SIZE, partial=True)
        try:
            found = self.inflater.decompress(self.deflated, READ_SIZE)
        except zlib.error as error:
            raise NsqdError(f'not what deflate makes: {error}') from None
        if self.inflater.eof:
            raise NsqdError('the deflated stream has ended')
        # A full output: zlib may hold more of it, even with no input left (b'', not None).
        self.deflated = self.inflater.unconsumed_tail if len(found) == READ_SIZE else None
        return found


class ConnectionOptions:
    """The options of [nsq] that hold for every connection to an nsqd."""

    def __init__(self, config: types.SimpleNamespace) -> None:
        self.config = config
        self.tls_options, self.secret_file = config.nsq.tls, config.nsq.auth_secret_file
        self.msg_timeout, self.connect_timeout = config.nsq.msg_timeout, config.nsq.connect_timeout
        self.compression = config.nsq.compression

    async def load_credentials(self) -> tuple[ssl.SSLContext | None, bytes | None]:
        """(ssl context, secret), as their files are now; None for what is not configured. Raises NsqdError.

        Certificates and secrets are replaced while a daemon runs (cert-manager, vault), so each attempt reads them
        anew; in a thread, as loading the system's authorities takes 50 ms.
        """
        if not self.tls_options and not self.secret_file:
            return None, None
        return await asyncio.to_thread(self.read_credentials)

    def read_credentials(self) -> tuple[ssl.SSLContext | None, bytes | None]:
        """Reads the credentials, in a thread."""
        try:
            return (tls_context(self.tls_options) if self.tls_options else None,
                    open_secret(self.secret_file) if self.secret_file else None)
        except (OSError, ValueError) as error:
            faults = '; '.join(map(str, credential_faults(self.config, 'nsq')))   # none when it came meanwhile
            raise NsqdError(faults or f'[nsq] a certificate or the secret: {error}') from None

    def identity_fields(self) -> dict[str, Any]:
        """The fields of IDENTIFY that are the same for every connection."""
        host = socket.gethostname()
        return {'client_id': host.partition('.')[0], 'hostname': host, 'user_agent': f'x-msrv/{__version__}',
                'feature_negotiation': True, 'tls_v1': bool(self.tls_options), 'deflate': self.compression == 'deflate'}

    def requested_features(self) -> dict[str, int]:
        """The features that IDENTIFY requests; nsqd refuses all of them when one value exceeds its limits."""
        features = {'heartbeat_interval': int(HEARTBEAT_INTERVAL * 1000), 'output_buffer_size': OUTPUT_BUFFER_SIZE,
                    'output_buffer_timeout': OUTPUT_BUFFER_TIMEOUT}
        if self.msg_timeout:
            features['msg_timeout'] = round(self.msg_timeout * 1000)
        return features


class Connection:
    """A connection to an nsqd, from the handshake to CLOSE_WAIT.

    pynsq's AsyncConn has a callback and an object a message, checks no host name, and sends secrets in the clear when
    TLS was not obtained; here only pynsq's commands and names are used. `info` is nsqd's answer to IDENTIFY.
    """

    def __init__(self, address: Address, options: ConnectionOptions, topic: str | None = None,
                 channel: str | None = None) -> None:
        self.address, self.options, self.topic, self.channel = address, options, topic, channel
        self.stream: Any = None   # an IOStream, once it is connected
        self.info: dict[str, Any] = {}
        self.is_closed = False
        self.buffer = b''        # the unfinished frame of the last read
        self.last_read = 0.0     # loop time of the last read
        self.last_data = 0.0     # loop time of the last read that had a message, or a part of one
        self.round_trip = 0.0    # seconds from a command to its answer, in the handshake
        self.silence_timer: asyncio.TimerHandle   # of check_silence(), while messages are read
        self.heartbeat_interval = HEARTBEAT_INTERVAL

    def __str__(self) -> str:
        return format_address(self.address)

    async def open(self) -> None:
        """Connects, up to the subscription where a topic is given. Raises one of UNREACHABLE."""
        try:
            await self.connect(self.options.requested_features())
        except NsqdError as error:
            if not str(error).startswith('E_BAD_BODY'):
                raise
            log.warning('nsqd %s: %s; retrying IDENTIFY with the defaults of nsqd', self, error,
                        extra={'kind': f'nsqd {self}: IDENTIFY'})
            self.heartbeat_interval = DEFAULT_HEARTBEAT
            await self.connect({})

    async def connect(self, features: dict[str, int]) -> None:
        """Performs the handshake; a failure leaves no socket open."""
        try:
            await self.perform_handshake(features)
        except BaseException:
            self.close_socket()
            raise

    async def perform_handshake(self, features: dict[str, int]) -> None:
        """IDENTIFY, TLS, deflate, AUTH, SUB: no secret is sent before a configured TLS is there."""
        self.buffer, self.is_closed = b'', False
        tls, secret = await self.limit_step('the reading of certificates and secret', self.options.load_credentials())
        await (self.connect_tcp() if self.address[1] else self.connect_unix())
        asked = asyncio.get_running_loop().time()
        self.send_command(b'  V2' + nsq.identify({**self.options.identity_fields(), **features}))
        self.info = self.parse_info(await self.limit_step('IDENTIFY', self.read_response()))
        self.round_trip = asyncio.get_running_loop().time() - asked
        if tls:
            await self.limit_step('TLS', self.start_tls(tls))
        if self.options.compression == 'deflate':
            await self.limit_step('deflate', self.start_deflate())
        await self.limit_step('AUTH', self.authenticate(secret))
        if self.topic:
            self.send_command(nsq.subscribe(self.topic, self.channel))
            await self.limit_step('SUB', self.read_response(b'OK'))
        self.last_read = asyncio.get_running_loop().time()

    async def limit_step(self, step: str, awaitable: Awaitable[Item]) -> Item:
        """Awaits a step of the handshake. Raises NsqdError when it takes longer than connect-timeout."""
        seconds = self.options.connect_timeout
        async with time_limit(seconds, f'{step}: no answer in {seconds:g} s'):
            return await awaitable

    async def connect_tcp(self) -> None:
        """A TCP connection to the first address of the name that takes one, of either family."""
        found = await self.limit_step('name server', NameResolver().resolve(*self.address))
        try:   # tornado's own bound: it closes the sockets of all attempts
            self.stream = await TCPClient(ResolvedName(found)).connect(
                *self.address, timeout=self.options.connect_timeout)
        except TimeoutError:
            raise NsqdError(f'no connection in {self.options.connect_timeout:g} s') from None
        self.stream.set_nodelay(True)

    async def connect_unix(self) -> None:
        """A connection to the unix socket of an nsqd of this host."""
        self.stream = IOStream(socket.socket(socket.AF_UNIX))
        await self.limit_step('unix socket', self.stream.connect(self.address[0]))

    @staticmethod
    def parse_info(data: bytes) -> dict[str, Any]:
        """nsqd's answer to IDENTIFY as a dict."""
        try:
            info = json.loads(data)
        except (ValueError, RecursionError):
            info = None
        limits = ('max_rdy_count', 'msg_timeout', 'max_msg_timeout', 'output_buffer_timeout')
        if not isinstance(info, dict) or not all(TYPE_CHECKS['integer'](info.get(name, 0)) for name in limits):
            raise NsqdError(f'not an answer of nsqd: {truncate_text(ascii(data), 60)}')
        return info

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """TLS; verifies the host's name, `localhost` for a unix socket."""
        if not self.info.get('tls_v1'):
            raise NsqdError('TLS is configured, but this nsqd does not offer it')
        stream, self.stream = self.stream, None
        # On failure tornado drops the stream with its socket; the twin can still shut that socket down.
        with stream.socket.dup() as twin:
            try:
                self.stream = await stream.start_tls(
                    False, ssl_options=context, server_hostname=self.address[0] if self.address[1] else 'localhost')
            except BaseException:
                with contextlib.suppress(OSError):
                    twin.shutdown(socket.SHUT_RDWR)
                raise
        await self.read_response(b'OK')

    async def start_deflate(self) -> None:
        """Deflate, in both directions. Nothing is sent before nsqd's OK: it might read that as plain bytes."""
        if not self.info.get('deflate'):
            raise NsqdError('compression = deflate is asked for, and this nsqd does not offer it')
        self.stream = DeflateStream(self.stream)
        await self.read_response(b'OK')

    async def authenticate(self, secret: bytes | None) -> None:
        """AUTH with the secret, where there is one. Raises NsqdError where only one side wants it."""
        if secret and not self.info.get('auth_required'):
            raise NsqdError('auth-secret-file is set, but this nsqd does not use AUTH')
        if not secret and self.info.get('auth_required'):
            raise NsqdError('AUTH required by this nsqd, but auth-secret-file is not set')
        if secret:
            self.send_command(nsq.protocol.auth(secret))
            await self.read_response()

    async def read_response(self, expected: bytes | None = None) -> bytes:
        """The next response's bytes, in the handshake. Raises NsqdError for an error of nsqd."""
        while True:
            size, kind = FRAME_HEADER.unpack(await self.stream.read_bytes(8))
            if not 4 <= size <= MAX_RESPONSE:
                raise NsqdError('not an nsqd: its response is not a frame')
            data = await self.stream.read_bytes(size - 4)
            if kind == RESPONSE and data == b'_heartbeat_':
                self.send_command(nsq.nop())
            elif kind != RESPONSE or (expected and data != expected):
                raise NsqdError(data.decode('utf-8', 'replace'))
            else:
                return data

    def send_command(self, data: bytes) -> None:
        """Sends a command. The reader notices a closed connection."""
        if not self.is_closed:
            try:
                self.stream.write(data)
            except StreamClosedError:
                self.is_closed = True

    async def read_messages(self) -> None:
        """Delivers messages until the connection ends; then raises the reason: NsqdError when nothing has arrived for
        two heartbeats and a second."""
        silence = 2 * self.heartbeat_interval + 1
        self.last_read = asyncio.get_running_loop().time()
        try:
            async with time_limit(None, f'no heartbeat for {silence:g} s') as bound:
                self.check_silence(silence, bound)
                while True:
                    messages = self.unpack_frames(await self.read_frames())
                    if messages or self.buffer:
                        self.last_data = self.last_read
                    if messages:
                        self.deliver(messages)
        finally:
            self.silence_timer.cancel()

    def check_silence(self, silence: float, bound: asyncio.Timeout) -> None:
        """Ends the reading when nothing has arrived for `silence` seconds, else checks again when that may be so: a
        limit for each read would cost a third of what a small read does."""
        loop, due = asyncio.get_running_loop(), self.last_read + silence
        if due > loop.time():
            self.silence_timer = loop.call_at(due, self.check_silence, silence, bound)
        else:
            bound.reschedule(due)

    async def read_frames(self) -> bytes:
        """Reads until the frame that has begun is complete. Chunks are joined once: joining each to those before costs
        the square of a large frame's size, and nsqd gives up a write after a heartbeat interval."""
        chunks = [self.buffer]
        missing = (4 + FRAME_HEADER.unpack_from(self.buffer)[0] - len(self.buffer)
                   if len(self.buffer) >= FRAME_HEADER.size else 0)
        while True:
            chunk: bytes = await self.stream.read_bytes(READ_SIZE, partial=True)
            self.last_read = asyncio.get_running_loop().time()
            chunks.append(chunk)
            missing -= len(chunk)
            if missing > 0:
                self.last_data = self.last_read
            else:
                return b''.join(chunks) if self.buffer else chunk

    def unpack_frames(self, data: bytes) -> list[Message]:
        """The messages of all complete frames in `data`; other frames are handled at once."""
        messages, at, end, now = [], 0, len(data), self.last_read
        unpack_frame, unpack_head, body = FRAME_HEADER.unpack_from, MESSAGE_HEADER.unpack_from, MESSAGE_HEADER.size
        while end - at >= 8:
            size, kind = unpack_frame(data, at)
            after = at + 4 + size
            if size < (body - 4 if kind == MESSAGE else 4):
                raise NsqdError('invalid frame size')
            if after > end:
                if size > MAX_FRAME:
                    raise NsqdError(f'frame of {size} bytes: more than {MAX_FRAME >> 20} MiB')
                break
            if kind == MESSAGE:
                _, _, timestamp, attempts, id = unpack_head(data, at)
                messages.append(Message(self, id, timestamp, attempts, data[at + body:after], now))
            else:
                self.on_response(kind, data[at + 8:after])
            at = after
        self.buffer = data[at:]
        return messages

    def on_response(self, kind: int, data: bytes) -> None:
        """Handles a response or an error of nsqd."""
        if kind == RESPONSE and data == b'_heartbeat_':
            self.send_command(nsq.nop())
        elif kind == ERROR:
            raise NsqdError(data.decode('utf-8', 'replace'))

    def deliver(self, messages: list[Message]) -> None:
        """Handles messages; only a Subscription receives any."""

    async def close_unsubscribed(self) -> None:
        """Closes a connection that has no subscription. Raises NsqdError when nsqd requires TLS: nsqd says so only in
        answer to a command, and CLS is a harmless one."""
        self.send_command(b'CLS\n')
        try:
            await self.limit_step('CLS', self.read_response(b'CLOSE_WAIT'))
        except NsqdError as error:
            if 'TLS required' in str(error):
                raise
        finally:
            self.close_socket()

    def close_socket(self) -> None:
        """Closes the socket at once."""
        self.is_closed = True
        if self.stream:
            self.stream.close()


class Publisher(Connection):
    """A connection that publishes to its topic."""

    async def open(self) -> None:
        """Connects and starts to read the answers."""
        await super().open()
        self.pending_answer: asyncio.Future[None] | None = None   # the answer to an MPUB
        self.reader = asyncio.ensure_future(self.read_answers())
        log.debug('nsqd %s: connected, for dead letters in %s', self, self.topic)

    async def publish(self, bodies: list[bytes]) -> None:
        """Publishes all or none, in one MPUB: nsqd checks all before it accepts any. Raises one of UNREACHABLE. Each
        error closes the connection, and its text may get lost; after several PUBs it would be unknown which of them
        nsqd accepted."""
        self.pending_answer = asyncio.get_running_loop().create_future()
        self.send_command(nsq.mpub(self.topic, bodies))
        await asyncio.wait_for(self.pending_answer, PUBLISH_TIMEOUT)

    async def read_answers(self) -> None:
        """Reads until the connection ends, and fails a pending MPUB with the reason."""
        try:
            await self.read_messages()
        except UNREACHABLE as error:
            log.debug('nsqd %s: %s; dead-letter connection closed', self, describe_error(error))
            self.close_socket()
            self.resolve_answer(error)

    def resolve_answer(self, error: BaseException | None = None) -> None:
        """Sets the result of the pending MPUB."""
        if self.pending_answer and not self.pending_answer.done():
            if error:
                self.pending_answer.set_exception(error)
            else:
                self.pending_answer.set_result(None)

    def on_response(self, kind: int, data: bytes) -> None:
        """OK is the answer to the MPUB."""
        if kind == RESPONSE and data == b'OK':
            self.resolve_answer()
        else:
            super().on_response(kind, data)

    def close(self) -> None:
        """Closes it; a pending MPUB gets no answer."""
        self.reader.cancel()
        self.close_socket()


class Subscription(Connection):
    """A connection that receives messages.

    rdy: the last RDY sent. in_flight: number of messages without an answer. set_aside: how many of these stay in flight
    until the window's end; RDY is raised by that number. rdy_since: loop time since when nsqd could have delivered.
    idle: no message for `idle_delay` though RDY was above in_flight; reset by a message, and when RDY rises from 0.
    found_idle: it has been idle at some time since its last message. rdy_overhang: messages beyond RDY that nsqd may
    still send, as it may not have received yet the RDY that was lowered at lowered_at.
    """

    def __init__(self, address: Address, consumer: Any) -> None:
        super().__init__(address, consumer.connection_options, consumer.topic, consumer.channel)
        self.consumer = consumer
        self.rdy = self.in_flight = self.set_aside = 0
        self.idle, self.found_idle, self.rdy_since = False, False, 0.0
        self.rdy_overhang, self.lowered_at = 0, 0.0
        self.close_wait: asyncio.Event | None = None   # set by CLOSE_WAIT

    async def open(self) -> None:
        """Connects and reads nsqd's limits."""
        await super().open()
        self.max_rdy = self.info.get('max_rdy_count', 2500)
        self.msg_timeout = self.info.get('msg_timeout', 60000) / 1000
        self.max_msg_timeout = self.info.get('max_msg_timeout', 900000) / 1000
        self.idle_delay = 2 * self.info.get('output_buffer_timeout', 250) / 1000
        log.debug('nsqd %s: connected, version %s, RDY at most %d, msg-timeout %g s', self, self.info.get('version'),
                  self.max_rdy, self.msg_timeout)

    async def read_frames(self) -> bytes:
        """Reads on, slowly while bodies in flight exceed max-held twice: messages are large, and nsqd has not received
        yet the RDY that says so. Reading never stops: nsqd closes a connection that it can't write to."""
        if self.consumer.in_flight_bytes.is_flooded and not self.close_wait:
            await asyncio.sleep(RDY_TRANSIT)
        return await super().read_frames()

    def deliver(self, messages: list[Message]) -> None:
        """Passes messages to the consumer."""
        self.rdy_since = self.last_read
        self.rdy_overhang = max(0, self.rdy_overhang - len(messages))
        self.consumer.on_messages(self, messages)

    def on_response(self, kind: int, data: bytes) -> None:
        """A refused FIN, REQ or TOUCH is late, no error: what was stored stays stored, the redelivery rewrites it."""
        if kind == ERROR and data.startswith(LATE_ERRORS):
            self.consumer.on_late_answer(self, data)
        elif data == b'CLOSE_WAIT' and self.close_wait:
            self.close_wait.set()
        else:
            super().on_response(kind, data)

    def set_rdy(self, rdy: int) -> None:
        """Sends RDY when it changes."""
        if rdy != self.rdy:
            now = asyncio.get_running_loop().time()
            if rdy > self.rdy:
                self.rdy_since = now
                self.rdy_overhang = max(0, self.rdy_overhang_at(now) - (rdy - self.rdy))
            else:
                # Example: RDY is 10, 2 messages are in flight, and RDY 3 is sent. Until nsqd receives it, 10 - 2 = 8
                # more messages may come. may_send_at() has 3 of them in the new RDY, so `rdy_overhang` is 5.
                self.rdy_overhang = self.rdy_overhang_at(now) + max(0, self.rdy - self.in_flight - rdy)
                self.lowered_at = now
            if not self.rdy:
                self.idle = False
            log.debug('nsqd %s: RDY %d -> %d', self, self.rdy, rdy)
            self.rdy = rdy
            self.send_command(nsq.ready(rdy))

    def may_send_at(self, now: float) -> int:
        """How many messages nsqd may send, by its RDY and by a higher one before it (`rdy_overhang`)."""
        return max(0, self.rdy - self.set_aside) + self.rdy_overhang_at(now)

    def rdy_overhang_at(self, now: float) -> int:
        """`rdy_overhang`; 0 once nsqd must have received the lower RDY."""
        return self.rdy_overhang if now - self.lowered_at < RDY_TRANSIT + self.round_trip else 0

    async def close(self) -> None:
        """Sends CLS after all answers, awaits CLOSE_WAIT (1 s): closing at once would lose the FINs on their way.
        Messages that arrive meanwhile are requeued, so that msg-timeout need not pass; nsqd accepts REQ after CLS."""
        self.close_wait = asyncio.Event()
        self.send_command(b'CLS\n')
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.close_wait.wait(), CLOSE_TIMEOUT)
        self.consumer.requeue([message for message in self.consumer.in_flight.values() if message.conn is self])
        self.close_socket()
        log.debug('nsqd %s: disconnected', self)


def http_client(requests: int = 1) -> AsyncHTTPClient:
    """An HTTP client for `requests` at a time, whose name lookups delay no other; the caller closes it."""
    return AsyncHTTPClient(force_instance=True, resolver=NameResolver(), max_clients=requests)


async def look_up(config: types.SimpleNamespace, topic: str,
                  patience: float = math.inf) -> tuple[Nsqds, dict[str, str]]:
    """Asks all nsqlookupds for the nsqds of a topic. Once one has named some, it waits for the others for at most
    `patience` seconds. Returns ({(host, port): http port}, {address: error})."""
    addresses, options = config.nsq.lookupd_http_address, ConnectionOptions(config)
    answers: dict[str, Nsqds] = {}
    errors = dict.fromkeys(addresses, 'no answer yet')
    client = http_client(len(addresses))

    async def ask(address: str) -> None:
        try:
            answers[address] = await ask_lookupd(client, address, topic, options)
            errors.pop(address, None)
        except UNREACHABLE as error:
            errors[address] = describe_error(error)
        if any(answers.values()) and bound.when() is None:
            bound.reschedule(asyncio.get_running_loop().time() + patience)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as bound:
                await asyncio.gather(*map(ask, addresses))
    finally:
        client.close()
    found = {nsqd: port for address in addresses for nsqd, port in answers.get(address, {}).items()}
    return found, errors


async def lookup_options(address: str, options: ConnectionOptions) -> dict[str, Any]:
    """The arguments of fetch() for an nsqlookupd: for https:// with the certificates and the secret of [nsq]. The
    secret is never sent in the clear, nor to a redirect's target. Raises NsqdError."""
    if not address.startswith('https://'):
        return HTTP_TIMEOUTS
    # their files may be on a mount that hangs
    async with time_limit(LOOKUP_TIMEOUT, '[nsq] a certificate or the secret: not read in time'):
        context, secret = await options.load_credentials()
    if secret and not re.fullmatch(rb'[!-~]+', secret):   # tornado's error would show it
        raise NsqdError('[nsq] the secret: a header of HTTP takes printable ASCII without blanks')
    headers = {'Authorization': f'Bearer {secret.decode()}'} if secret else {}
    return {**HTTP_TIMEOUTS, 'ssl_options': context, 'headers': headers, 'follow_redirects': False}


async def ask_lookupd(client: AsyncHTTPClient, address: str, topic: str, options: ConnectionOptions) -> Nsqds:
    """The nsqds that one nsqlookupd names for a topic; none when it does not know the topic."""
    try:
        response = await client.fetch(f'{address}/lookup?topic={topic.replace("#", "%23")}',
                                      **await lookup_options(address, options))
        return parse_producers(response.body)
    except HTTPError as error:   # also a timeout, and an answer that breaks off
        if no_such_topic(error):
            return {}
        raise NsqdError(f'{error}; no answer of an nsqlookupd' if error.code == 404 else str(error)) from None
    except ssl.SSLError:   # it may be a ValueError, too
        raise
    except ValueError as error:
        raise NsqdError(f'not an answer of nsqlookupd: {error}') from None


def parse_producers(body: bytes) -> Nsqds:
    """The nsqds that an answer of nsqlookupd names. Raises ValueError with the rule that it breaks."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError('not JSON') from None
    producers = answer.get('producers') if isinstance(answer, dict) else None
    if not isinstance(producers, list):
        raise ValueError('it has no list of producers')
    return dict(map(parse_producer, producers))


def parse_producer(producer: Any) -> tuple[Address, int]:
    """((host, port), http port) of an nsqd that nsqlookupd names. Raises ValueError."""
    if not isinstance(producer, dict):
        raise ValueError('a producer that is not an object')
    host = producer.get('broadcast_address')
    if not isinstance(host, str) or not host or not host.isprintable():
        raise ValueError(f'a producer whose broadcast_address is {shorten_json(host)}')
    for name, lowest in ('tcp_port', 1), ('http_port', 0):   # a TCP port of 0 would mean a unix socket of this machine
        port = producer.get(name)
        if not TYPE_CHECKS['integer'](port) or port not in range(lowest, 65536):
            raise ValueError(f'a producer whose {name} is {shorten_json(port)}')
    return (host, producer['tcp_port']), producer['http_port']


def shorten_json(value: Any) -> str:
    """A value for an error: the beginning of what JSON writes."""
    if isinstance(value, (list, dict)):   # it may have more levels than can be written
        return 'a list' if isinstance(value, list) else 'an object'
    return truncate_text(json.dumps(value), 60)


class LookupLog(ChangeLog):
    """The log of repeated lookups, which also says once of an nsqlookupd that it is back."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: list[str] = []

    def report_failing(self, addresses: Collection[str]) -> None:
        """Records the nsqlookupds that fail now."""
        for address in self.failing:
            if address not in addresses:
                log.info('nsqlookupd %s is back', address)
        self.failing = [*addresses]


def no_such_topic(error: HTTPError) -> bool:
    """True for the response of nsqlookupd to an unknown topic; any other web server may answer 404 as well."""
    try:
        body = error.response.body if error.response else b''
        return error.code == 404 and json.loads(body)['message'] == 'TOPIC_NOT_FOUND'
    except (KeyError, TypeError, ValueError, RecursionError):
        return False


async def find_nsqds(config: types.SimpleNamespace, topic: str, patience: float = math.inf,
                     news: LookupLog | None = None) -> Nsqds:
    """The nsqds of a topic, {(host, port): http port or None}. Raises Unavailable when no nsqlookupd answers. Warns of
    those that do not; with a LookupLog `news`, a repeated lookup warns only once."""
    if config.nsq.nsqd_tcp_address:
        return dict.fromkeys(config.nsq.nsqd_tcp_address)
    found, errors = await look_up(config, topic, patience)
    errors = {address.removeprefix('http://'): error for address, error in errors.items()}
    news = news or LookupLog()
    news.report_failing(errors)
    if len(errors) == len(set(config.nsq.lookupd_http_address)):
        raise Unavailable('no nsqlookupd can be reached: '
                          + '; '.join(f'{address}: {error}' for address, error in errors.items()))
    lines = [f'nsqlookupd {address}: {error}' for address, error in errors.items()]
    if not found:
        lines.append(f'no nsqd has the topic {topic} yet')
    if lines:
        news.log(logging.WARNING, '%s', '; '.join(lines))
    else:
        news.clear()
    return found


async def total_depth(config: types.SimpleNamespace, topic: str, channel: str) -> int | None:
    """The number of messages that wait for a channel on all nsqds; None when an nsqd does not report it."""
    nsqds = await find_nsqds(config, topic)
    stats = await asyncio.gather(*(topic_stats(address, http_port, topic) for address, http_port in nsqds.items()))
    return None if None in stats else sum(sum(topic_and_channel_depth(each, channel)) for each in stats if each)


class ChannelDepth(NamedTuple):
    """The number of messages that wait for a channel on one nsqd, and which are paused: `topic`, `channel` or both."""

    waiting: int
    paused: str


async def channel_depths(config: Any, topic: str, channel: str) -> dict[str, ChannelDepth]:
    """The depth of a channel on each nsqd, by address as text. Leaves out an nsqd or nsqlookupd that does not answer,
    without a log line: the consumer logs that."""
    nsqds: Nsqds = dict.fromkeys(config.nsq.nsqd_tcp_address) or (await look_up(config, topic, LOOKUP_GRACE))[0]
    found: dict[Address, ChannelDepth] = {}

    async def ask(address: Address, http_port: int | None) -> None:
        stats = await topic_stats(address, http_port, topic)
        if stats is None:
            return
        with contextlib.suppress(AttributeError, KeyError, TypeError):   # another web server answers there
            paused = [name for name, each in (('topic', stats), ('channel', channel_stats(stats, channel)))
                      if each.get('paused')]
            in_topic, in_channel = topic_and_channel_depth(stats, channel)
            found[address] = ChannelDepth(in_topic + in_channel, ', '.join(paused))
    with contextlib.suppress(TimeoutError):   # the answers so far count
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            await asyncio.gather(*(ask(*each) for each in nsqds.items()))
    return {format_address(address): found[address] for address in nsqds if address in found}


async def topic_stats(address: Address, http_port: int | None, topic: str) -> dict[str, Any] | None:
    """The statistics of a topic on an nsqd: {} without such a topic, None when its HTTP port can't be found.

    nsqlookupd names the HTTP port; else the next port is tried (4151 after 4150), if it is the same nsqd's.
    """
    host, tcp_port = address
    if not tcp_port:   # of a unix socket nobody knows which HTTP side belongs to it
        return None
    base = f'http://{format_address((host, http_port or tcp_port + 1))}'
    client = http_client()
    try:
        info = await client.fetch(f'{base}/info', **HTTP_TIMEOUTS)
        if json.loads(info.body)['tcp_port'] != tcp_port:
            return None
        query = f'format=json&include_mem=false&include_clients=false&topic={topic.replace("#", "%23")}'
        stats = await client.fetch(f'{base}/stats?{query}', **HTTP_TIMEOUTS)
        found: dict[str, Any] = next(iter(json.loads(stats.body)['topics'] or ()), {})   # nsqd says null for none
        return found
    except (OSError, HTTPError, ValueError, KeyError, TypeError, RecursionError):
        return None
    finally:
        client.close()


def channel_stats(topic: dict[str, Any], channel: str) -> dict[str, Any]:
    """The statistics of a channel, of topic_stats(): {} without such a channel."""
    return next((stats for stats in topic.get('channels') or () if stats['channel_name'] == channel), {})


def topic_and_channel_depth(topic: dict[str, Any], channel: str) -> tuple[int, int]:
    """(in the topic, in the channel): the messages that wait for a channel.

    nsqd moves a message from the topic to each channel; while the topic has no channel, messages wait in the topic.
    """
    return topic.get('depth', 0), channel_stats(topic, channel).get('depth', 0)


# ---------------------------------------------------------------------------------------------------------------------
# stores
# ---------------------------------------------------------------------------------------------------------------------

THREAD_PREFIX = 'x-msrv'     # of the names of threads that may hang in a call: see leave_stuck_calls


class Store:
    """A store's interface; it stores nothing. All methods block: a pipeline runs them in `writers` threads.

    batch_size: maximum records per call. call_timeout: seconds after which a call counts as hanging.
    """

    batch_size = 500
    writers = 1
    call_timeout = 5.0

    def open(self) -> None:
        """Connects. Raises StoreError."""

    def write(self, records: list[Record]) -> list[WriteResult]:
        """Writes the records, each whole or not at all, durably. Returns a WriteResult for each. Raises StoreError when
        none of them is known to be written."""
        raise StoreError('no store', retryable=False)

    def describe_contents(self) -> tuple[str, list[str]]:
        """Describes the store for `check --connect`: a line, and a list of problems. Raises StoreError."""
        return 'no store', []

    def close(self) -> None:
        """Disconnects."""


RecordId = tuple[str, str | int]   # the set and the key of a record


class SqliteStore(Store):
    """Records in a table of an SQLite file: WAL, synchronous FULL, one transaction a batch."""

    batch_size = 1000
    lock_timeout = 2.0   # seconds; below call_timeout, so that a locked file is an answer, not a call that hangs
    # "key" has no type: no affinity, so that 1 and "1" stay two keys (sqlite.org/datatype3.html, 3.1)
    table = ('CREATE TABLE IF NOT EXISTS records ("set" TEXT NOT NULL, "key" NOT NULL, bins TEXT NOT NULL,'
             ' stored_at TEXT NOT NULL, PRIMARY KEY ("set", "key")) WITHOUT ROWID')
    drop = ('DELETE FROM records WHERE expires_at <= (SELECT max(expires_at) FROM'
            ' (SELECT expires_at FROM records WHERE expires_at <= ? ORDER BY expires_at LIMIT 1000))')
    # check_circular: bins were decoded from JSON, so no object is inside itself; the search costs a seventh of encoding
    to_json = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'), check_circular=False).encode

    def __init__(self, config: types.SimpleNamespace) -> None:
        self.path, self.set = config.sqlite.path, config.sqlite.set
        self.mode, self.time_bin, self.set_field = config.record.write, config.record.time_bin, config.record.set_field
        # Otherwise each record is written, whatever the table has under its key.
        self.needs_read = bool(self.time_bin) or self.mode != 'replace'
        self.delete_mode = config.record.delete and config.record.delete.mode
        self.columns: tuple[str, ...] = ()   # of the table, once it is open
        self.db: Any = None                  # an sqlite3.Connection, once it is open

    def open(self) -> None:
        """Opens or creates the file; raises StoreError when it can't be written to."""
        with self.sqlite_errors():
            os.makedirs(os.path.dirname(self.path), mode=0o750, exist_ok=True)
            require_regular(self.path)
            self.db = sqlite3.connect(self.path, timeout=self.lock_timeout, isolation_level=None,
                                      check_same_thread=False)
            self.db.execute('PRAGMA journal_mode = WAL')
            self.db.execute('PRAGMA synchronous = FULL')
            self.db.execute(self.table)
            self.prepare_table()
            self.file = os.stat(self.path)
        log.debug('sqlite %s: open', self.path)

    def prepare_table(self) -> None:
        """Adds the column for tombstones if configured. Fails now for a table of another form.

        A process that opened the table before that column was added fails at its next write, as it gives a value too
        few, and opens the table again. Otherwise it would write a record, and leave the end of a tombstone in its row.
        """
        self.db.execute('BEGIN IMMEDIATE')
        self.columns = self.read_columns()
        if self.delete_mode == 'tombstone' and 'expires_at' not in self.columns:
            self.db.execute('ALTER TABLE records ADD COLUMN expires_at TEXT')
            self.db.execute('CREATE INDEX IF NOT EXISTS records_end ON records (expires_at) WHERE expires_at NOTNULL')
            self.columns = self.read_columns()
        self.db.execute('SAVEPOINT trial')
        self.upsert([Record('', {}, None)])
        self.db.execute('ROLLBACK TO trial')
        self.db.execute('COMMIT')

    def read_columns(self) -> tuple[str, ...]:
        """The names of the table's columns."""
        return tuple(row[1] for row in self.db.execute('PRAGMA table_info (records)'))

    @contextlib.contextmanager
    def sqlite_errors(self) -> Iterator[None]:
        """Raises StoreError for errors of SQLite and the file system; only a locked database is worth a retry."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if self.db and self.db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute('ROLLBACK')
            code = getattr(error, 'sqlite_errorcode', 0) & 0xFF   # without what an extended code adds
            locked = code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            raise StoreError(f'sqlite {self.path}: {error}', retryable=locked) from error

    def write(self, records: list[Record]) -> list[WriteResult]:
        """Writes a batch in one transaction. With newest-wins, create or update each record is compared with the stored
        one; BEGIN IMMEDIATE holds the write lock of the file, so that nothing is written between the comparison and the
        write."""
        if self.mode == 'update':   # stored bins are merged into copies: a retry merges what is stored then
            records = [copy.copy(record) for record in records]
        with self.sqlite_errors():
            self.db.execute('BEGIN IMMEDIATE')
            self.drop_expired()
            results = self.merge_stored(records) if self.needs_read else [STORED] * len(records)
            self.write_and_delete(records, results)
            self.db.execute('COMMIT')
            if not os.path.samestat(os.stat(self.path), self.file):   # with WAL, SQLite goes on in the old file
                raise OSError('the file was replaced while it was in use')
        return results

    def drop_expired(self) -> None:
        """Removes expired tombstones, about 1,000 at most, as the batch waits for that. A tombstone that is left still
        holds off older messages."""
        if 'expires_at' in self.columns:
            self.db.execute(self.drop, (format_rfc3339(time.time()),))

    def merge_stored(self, records: list[Record]) -> list[WriteResult]:
        """The result of each record. In update mode the stored bins are merged into the record."""
        stored, order = self.read_stored(records), list(range(len(records)))
        if self.delete_mode == 'remove':
            # Removals are judged last, as a removed record has no time to compare with.
            # Example: a batch has a removal of time 5 and then an older record of time 3. Judged in this order the
            # record would be stored. Judged last, the removal takes that record away, too.
            order.sort(key=lambda index: isinstance(records[index], Deletion))
        results = [STORED] * len(records)
        for index in order:
            results[index] = self.judge_record(records[index], stored)
        return results

    def read_stored(self, records: list[Record]) -> dict[RecordId, Any]:
        """The stored bins of all records whose set and key `records` have."""
        record_ids = {self.record_id(record) for record in records}
        if not record_ids:
            return {}
        # A join, for with `("set", "key") IN (VALUES ...)` SQLite scans the whole table.
        query = ('SELECT "set", "key", bins FROM (VALUES ' + ','.join(['(?,?)'] * len(record_ids)) +
                 ') CROSS JOIN records ON "set" = column1 AND "key" = column2')
        rows = self.db.execute(query, [*itertools.chain.from_iterable(record_ids)])
        return {(set_, key): self.parse_bins(bins) for set_, key, bins in rows}

    @staticmethod
    def parse_bins(bins: Any) -> Any:
        """The bins of a row; the raw value when it is no JSON."""
        try:
            return json.loads(bins)
        except (ValueError, TypeError, RecursionError):
            return bins

    def judge_record(self, record: Record, stored: dict[RecordId, Any]) -> WriteResult:
        """The result of one record; updates `stored` to the bins that are stored after it."""
        record_id = self.record_id(record)
        result = self.compare_stored(record, stored[record_id]) if record_id in stored else STORED
        if result is STORED and self.mode == 'update':
            record.bins = {**stored.get(record_id, {}), **record.bins}
            if len(record.bins) > MAX_BINS:
                result = WriteResult('rejected', 'unsupported-value', too_many_bins(len(record.bins)))
        if result is not STORED:
            return result
        stored[record_id] = record.bins
        if not isinstance(record, Deletion):
            return STORED
        if self.delete_mode == 'remove':
            del stored[record_id]
        return DELETED

    def compare_stored(self, record: Record, bins: Any) -> WriteResult:
        """The result of a record whose key is stored already, with `bins`."""
        if self.mode == 'create':
            return DUPLICATE
        if not isinstance(bins, dict):
            return WriteResult('rejected', 'rejected', 'the stored bins are no JSON object, so they cannot be compared')
        if self.mode == 'update' or self.time_bin not in bins:
            return STORED
        moment = bins[self.time_bin]
        if not TYPE_CHECKS['integer'](moment):
            return WriteResult('rejected', 'rejected', f'the stored {self.time_bin} is no integer: cannot compare')
        return STALE if moment > record.time else STORED

    def record_id(self, record: Record) -> RecordId:
        """The set and the key of a record."""
        return record.set or self.set, record.key

    def write_and_delete(self, records: list[Record], results: list[WriteResult]) -> None:
        """Writes the records and tombstones with a good result. With `mode = remove` it removes the deleted records."""
        # Example of `remove`: a batch has a record of key 1 and then its removal. Both succeed, so key 1 is in
        # `removed`: the record is not written, and the removal is the DELETE below. A tombstone is a row like that of
        # any record.
        removed: set[RecordId] = set()
        if self.delete_mode == 'remove':
            removed = {self.record_id(record) for record, result in zip(records, results, strict=True)
                       if result is DELETED}
        self.upsert([record for record, result in zip(records, results, strict=True)
                     if result in (STORED, DELETED) and not (removed and self.record_id(record) in removed)])
        for set_, record_ids in group_by_key(list(removed), lambda record_id: record_id[0]):
            self.db.execute(f'DELETE FROM records WHERE "set" = ? AND "key" IN ({",".join("?" * len(record_ids))})',
                            (set_, *(key for _, key in record_ids)))

    def upsert(self, records: list[Record]) -> None:
        """Writes all rows in one statement; of equal keys the last one stays. One statement releases the interpreter
        lock once and not for each row. To get it back may take 5 ms while the loop decodes: 400 rows/s instead of
        90,000, measured."""
        if not records:
            return
        rows: list[tuple[Any, ...]] = [(record.set, record.key, self.to_json(record.bins)) for record in records]
        value = change = ''
        if 'expires_at' in self.columns:
            rows = [(*row, self.end_of(record)) for row, record in zip(rows, records, strict=True)]
            value, change = ', column4', ', expires_at = excluded.expires_at'
        row = f'({",".join("?" * len(rows[0]))})'
        self.db.execute(
            f'INSERT INTO records SELECT coalesce(column1, ?1), column2, column3, ?2{value}'
            f' FROM (VALUES {",".join([row] * len(rows))}) WHERE true ON CONFLICT ("set", "key")'
            f' DO UPDATE SET bins = excluded.bins, stored_at = excluded.stored_at{change}',
            (self.set, format_rfc3339(time.time()), *itertools.chain.from_iterable(rows)))

    @staticmethod
    def end_of(record: Record) -> str | None:
        """When a tombstone ends, as text that sorts by time (`never` last); None for a record."""
        if not isinstance(record, Deletion):
            return None
        return 'never' if record.ttl == TTL_NEVER else format_rfc3339(time.time() + (record.ttl or 0))

    def describe_contents(self) -> tuple[str, list[str]]:
        """Path, number of records, SQLite's version."""
        tombstone = 'expires_at' if 'expires_at' in self.columns else 'NULL'
        query = f'SELECT count(*), count({tombstone}), count(DISTINCT "set") FROM records'
        with self.sqlite_errors():
            found = self.db.execute(query if self.set_field else query + ' WHERE "set" = ?',
                                    () if self.set_field else (self.set,))
            number, tombstones, sets = found.fetchone()
        records = f'{number - tombstones} records' + (f' and {tombstones} tombstones' if tombstones else '')
        where = f'{sets} sets' if self.set_field else f'set {self.set}'
        return f'sqlite {self.path}: {records} in {where}, SQLite {sqlite3.sqlite_version}', []

    def close(self) -> None:
        """Closes the file."""
        if self.db:
            self.db.close()


# The meaning of each answer of the cluster (names: aerospike.exception), the most severe first; any other answer is
# 'unknown'. Meanings are words of this section alone: build_result() makes a WriteResult of each.
MEANING_BY_CODE = {
    **dict.fromkeys((8, 20, 22, 80, 81, 82), 'stop'),   # full, no namespace, forbidden, not allowed
    **dict.fromkeys((-15, -14, -10, -8, 7, 9, 11, 18), 'retry'),   # no answer, time, load, the cluster
    **dict.fromkeys((14, 28, 120), 'busy'),   # this record alone
    **dict.fromkeys((-2, 4, 12, 21), 'refused'),   # this message is to blame, or a policy for all messages
    0: 'stored', 5: 'duplicate', 13: 'too-big', 27: 'filtered', 160: 'no-geometry',
}
PROVES_WRITABLE = ('stored', 'duplicate', 'filtered')   # meanings of answers that only a well-formed write gets
ADVICE_BY_CODE = {8: 'make room', 9: 'see whether the nodes are overloaded or gone',
                  18: 'the disks are too slow for the load',
                  20: 'see namespace in [aerospike]',
                  22: 'a stop-writes limit of the set, clock skew between the nodes, or a ttl where nsup-period is 0; '
              'x-msrv check --connect names it',
                  80: 'see user in [aerospike]', 81: 'give the user the role read-write',
                  82: 'the whitelist lacks this host'}
NOT_FOUND = 2                # the answer where no record has that key
NO_ANSWER = -15              # the client's own code for a call without an answer
FULL_SET = 22                # the answer to a new record of a full set; ADVICE_BY_CODE has its other causes
FORBIDDING_CODES = (8, 22)   # answers whose cause the statistics of the nodes name
# A record with more bins gets a call of its own: the server compares the name of each bin with all before it, so that
# 4,000 bins take 0.1 s and 32,767 take seconds (8.1, measured), and the other records of the batch would have to wait.
WIDE_RECORD = 4000
MAX_SETS = 4095          # of a namespace, which never forgets one: AS_SET_MAX_COUNT of the server
# A call takes a thread for each node of its batch: with one thread too few, a node that hangs delays the records of
# another node longer than the call may take.
NODES = 8                # the most that a cluster of the Community Edition has
MAX_THREADS = 256
MIN_SERVER = (6, 0)      # the first server that takes batches of writes
INT32_MAX = 0x7FFFFFFF   # ms: the client counts in 32 bits. A larger number would wrap round, and 0 would be no limit.

Facts = dict[str, str]   # what a node reports of a namespace or a set: name -> value
code_of = operator.attrgetter('result')   # the answer to a write


def to_milliseconds(seconds: float) -> int:
    """Seconds as the client takes a limit: whole milliseconds, at least 50 (0 is no limit), within 32 bits."""
    return min(INT32_MAX, max(50, int(seconds * 1000)))


@functools.cache
def names_of_answers() -> dict[int, str]:
    """The client's names of the answers of a cluster, by code."""
    from aerospike import exception
    codes = {name: getattr(error, 'code', None) for name, error in vars(exception).items()}
    return {code: name for name, code in codes.items() if isinstance(code, int)}


def describe_code(code: Any, cause: str = '') -> str:
    """The name of an answer's code, with its cause where that is known, else with advice."""
    advice = cause or ADVICE_BY_CODE.get(code)
    return f'{code} {names_of_answers().get(code, "not known to the client")}' + (f' ({advice})' if advice else '')


def parse_facts(text: str, separator: str) -> Facts:
    """`a=1;b=true`, an answer to an info question, as a dict."""
    return {name: value for name, _, value in (fact.partition('=') for fact in text.strip(';').split(separator))}


def sets_of(text: str, name: str) -> dict[str, Facts]:
    """The answer to `sets/NAMESPACE` as {set: its facts}. The answer about a single set has no name: it is `name`."""
    found = [parse_facts(each, ':') for each in text.split(';') if each]
    return {facts.get('set', name): facts for facts in found}


def integer_fact(facts: Facts, name: str) -> int:
    """A fact as an integer; 0 when the server does not have it."""
    return int(facts[name]) if facts.get(name, '').isdecimal() else 0


def check_version(where: str, version: str) -> None:
    """Raises StoreError for a server (`5.7.0.8`) below MIN_SERVER; a version of another form is taken as new enough."""
    numbers = re.match(r'(\d+)\.(\d+)', version)
    if numbers and tuple(map(int, numbers.groups())) < MIN_SERVER:
        raise StoreError(f'{where}: server {version} is too old: {".".join(map(str, MIN_SERVER))} or newer is needed')


def refuses_ttl(namespace: Facts) -> bool:
    """Whether a node refuses every ttl, by its facts of the namespace: nothing would expire there."""
    return namespace.get('nsup-period') == '0' and namespace.get('allow-ttl-without-nsup') != 'true'


def write_obstacles(ttl: int, namespace: Facts, set_: Facts, name: str = 'the set') -> Iterator[str]:
    """Yields the reasons why a node forbids writes, from its facts of the namespace and the set."""
    if namespace.get('stop_writes') == 'true':
        yield 'the namespace stops writes (stop_writes): a limit of its storage or memory is reached'
    if namespace.get('clock_skew_stop_writes') == 'true':
        yield 'the clocks of the nodes differ too much (clock_skew_stop_writes)'
    used = {'stop-writes-count': ('objects',),
            'stop-writes-size': ('data_used_bytes', 'memory_data_bytes', 'device_data_bytes')}   # the latter up to 6.4
    for option, counters in used.items():
        limit = integer_fact(set_, option)
        if limit and sum(integer_fact(set_, counter) for counter in counters) >= limit:
            yield f'{name} has reached its {option} of {limit}'
    default = integer_fact(set_, 'default-ttl') or integer_fact(namespace, 'default-ttl')
    if (ttl or default) not in (0, TTL_NEVER) and refuses_ttl(namespace):
        source = '' if ttl else f' (default-ttl = {default})'
        yield f'a ttl is refused{source}, for nsup-period is 0 and allow-ttl-without-nsup is off'


def tombstone_obstacles(keep: int | None, namespace: Facts) -> Iterator[str]:
    """Yields why a node refuses tombstones that end after `keep` seconds, by its facts of the namespace."""
    if keep not in (None, TTL_NEVER) and refuses_ttl(namespace):
        yield ('the tombstones of [[delete]] are refused, for keep is a ttl, nsup-period is 0 and '
               'allow-ttl-without-nsup is off: set nsup-period, or keep = never')


def lasting_tombstones(keep: int | None, namespace: Facts) -> list[str]:
    """The warning that a namespace accepts tombstones but never removes expired ones."""
    if keep in (None, TTL_NEVER) or namespace.get('nsup-period') != '0' or refuses_ttl(namespace):
        return []
    return ['the tombstones of [[delete]] are not removed after keep, for nsup-period is 0: they fill the storage']


class ConnectLog:
    """Collects the log lines of the client while it connects: its exceptions name neither the host nor the reason.

    The client has one log for the whole process, so __exit__ disables it.
    """

    LINE = re.compile(r'Failed to (lookup|connect to seed|connect to peer) (\S+) (\d+)\. (?:AEROSPIKE_(\w+) ?)?(.*)',
                      re.DOTALL)
    PEER = ' (an address from the cluster; if it is an internal one: services-alternate = yes)'

    def __init__(self, client_module: Any) -> None:
        self.module = client_module
        self.lines: list[str] = []

    def __enter__(self) -> typing.Self:
        self.module.set_log_level(self.module.LOG_LEVEL_WARN)
        self.module.set_log_handler(self.on_client_line)
        return self

    def __exit__(self, *exception: object) -> None:
        self.module.set_log_handler(None)

    def on_client_line(self, level: int, function: str, path: str, line: int, text: str) -> None:
        """Collects one line."""
        self.lines.append(text)

    def failed_hosts(self) -> list[str]:
        """`host:port: reason` of each host that failed, as far as the client logged it."""
        found: list[str] = []
        before: list[str] = []   # lines of TLS, which the client logs ahead of the line of the host
        for text in self.lines:
            match = self.LINE.match(text)
            if match:
                what, host, port, code, rest = match.groups()
                why = '; '.join([*before, connect_reason(code or '', rest)])
                hint = self.PEER if what == 'connect to peer' else ''
                found.append(f'{format_address((host, int(port)))}: {truncate_text(why, 300)}{hint}')
            before = [] if match else [*before, text]
        return list(dict.fromkeys(found))


def connect_reason(code: str, text: str) -> str:
    """The reason in a line of the client about a host, in words and without the repeated address."""
    text = re.sub(r'(, | from )(\[\S+\]|[^\s:]+):\d+$', '', text).removeprefix('AEROSPIKE_' + code)
    text = re.sub(r'^Invalid hostname \S+: ', '', text)
    text = re.sub(r'^Socket \w+ error: (\d+)$', lambda found: os.strerror(int(found[1])), text)
    text = re.sub("^Invalid node .* Expected cluster name '(.*)' Received '(.*)'$",
                  r"its cluster-name is '\2', not '\1'", text, flags=re.DOTALL)
    if text.startswith('Invalid proto'):
        return 'the server at this address is no Aerospike server'
    if code == 'ERR_TIMEOUT' and not text:
        return 'no answer in time'
    return text or code.removeprefix('ERR_').replace('_', ' ').lower()


class NodeInfo:
    """Asks the nodes of a cluster about themselves (info requests): when the store opens, for the cause of an answer,
    and for `check --connect`. Deadlines are monotonic. where: how the store is named in messages."""

    def __init__(self, client: Any, config: types.SimpleNamespace, where: str) -> None:
        self.client, self.where = client, where
        self.options, self.record = config.aerospike, config.record
        delete = config.record.delete
        self.keep = delete.keep if delete and delete.mode == 'tombstone' else None   # of tombstones, in seconds

    def query_info(self, question: str, deadline: float | None = None) -> dict[str, str]:
        """The answer of each node to an info request, by node. Raises StoreError."""
        from aerospike.exception import AerospikeError
        policy = {'timeout': to_milliseconds(deadline - time.monotonic())} if deadline else None
        try:
            answers = self.client.info_all(question, policy)
        except AerospikeError as error:
            raise StoreError(f'{self.where}: {describe_code(error.code)}') from None
        found = {node: answer.strip() for node, (error, answer) in answers.items() if not error and answer is not None}
        if not found:
            raise StoreError(f'{self.where}: no node answers')
        return found

    def query_facts(self, deadline: float | None = None) -> tuple[dict[str, Facts], dict[str, dict[str, Facts]]]:
        """({node: facts of the namespace}, {node: {set: facts}}), for each set that records may go to. Raises
        StoreError."""
        namespace = self.options.namespace
        namespaces = self.query_info(f'namespace/{namespace}', deadline)
        one = '' if self.record.set_field else f'/{self.options.set}'
        sets = self.query_info(f'sets/{namespace}{one}', deadline)
        return ({node: parse_facts(text, ';') for node, text in namespaces.items()},
                {node: sets_of(text, self.options.set) for node, text in sets.items()})

    # -- for the store

    def check_versions(self) -> None:
        """Raises StoreError for a server below MIN_SERVER. A node that is too busy to say its version passes."""
        versions: dict[str, str] = {}
        with contextlib.suppress(StoreError):
            versions = self.query_info('build', time.monotonic() + self.options.total_timeout)
        for version in versions.values():
            check_version(self.where, version)

    def have_durable_deletes(self) -> bool:
        """Whether all nodes have durable deletes, so that no node that restarts revives a removed record. The Community
        Edition refuses them. Raises StoreError."""
        for question in ('release', 'edition'):   # from 8.1 on, and before
            with contextlib.suppress(StoreError):
                editions = self.query_info(question, time.monotonic() + self.options.total_timeout).values()
                if all('Edition' in edition for edition in editions):
                    return not any('Community' in edition for edition in editions)
        raise StoreError(f'{self.where}: no node says which edition it is, so whether it has durable deletes')

    def find_obstacles(self, deadline: float | None = None) -> list[str]:
        """The reasons why writes are forbidden, each once for all nodes. Raises StoreError."""
        namespaces, sets = self.query_facts(deadline)
        ttl = 1 if self.record.ttl_field else self.record.ttl   # 1: any ttl stands for those of messages
        causes = [obstacle for node, facts in namespaces.items()
                  for name, set_ in sets.get(node, {}).items() or [(self.options.set, {})]
                  for obstacle in write_obstacles(ttl, facts, set_, self.set_label(name))]
        refused = [obstacle for facts in namespaces.values() for obstacle in tombstone_obstacles(self.keep, facts)]
        return list(dict.fromkeys([*causes, *refused]))

    def find_full_sets(self, deadline: float) -> dict[str, str]:
        """{set: reason} for each set that accepts no new record; empty where no node answers."""
        sets: dict[str, dict[str, Facts]] = {}
        with contextlib.suppress(StoreError):
            _, sets = self.query_facts(deadline)
        return {name: text for node in sets.values() for name, facts in node.items()
                for text in write_obstacles(0, {}, facts, self.set_label(name))}

    def set_label(self, name: str) -> str:
        """A set as messages to the operator have it: with its name where records may go to several sets."""
        return f'the set {name}' if self.record.set_field else 'the set'

    # -- for `check --connect`

    def describe_nodes(self, durable_deletes: bool | None) -> tuple[str, list[str]]:
        """Describes nodes, version, records, ttl and record size of the namespace. Returns a line, and the problems.
        durable_deletes: whether removals are durable; None without removals. Raises StoreError."""
        versions = self.query_info('build')
        servers = ' and '.join(dict.fromkeys(versions.values()))
        namespaces, sets = self.query_facts()
        facts = next((facts for facts in namespaces.values() if 'nsup-period' in facts), None)
        if not facts:
            names = next(iter(self.query_info('namespaces').values())).replace(';', ', ')
            return f'{self.where}: server {servers}', [f'{self.where}: no such namespace; there are {names}']
        line = (f'{self.where}: {len(versions)} node{"s" * (len(versions) > 1)}, server {servers}, '
                f'{self.describe_records(facts, sets)}, default-ttl {facts.get("default-ttl")}, '
                f'nsup-period {facts["nsup-period"]}')
        if durable_deletes is not None:
            line += f', {"" if durable_deletes else "no "}durable deletes'
        problems = [*self.find_obstacles(), *self.find_batch_limits(), *lasting_tombstones(self.keep, facts),
                    *self.find_set_limit(sets)]
        return line, [f'{self.where}: {problem}' for problem in problems]

    def describe_records(self, namespace: Facts, sets: dict[str, dict[str, Facts]]) -> str:
        """The number of records, each counted once, their size at most, and the number of sets."""
        copies = integer_fact(namespace, 'effective_replication_factor') or 1
        records = sum(integer_fact(facts, 'objects') for node in sets.values() for facts in node.values()) // copies
        number = len(set().union(*sets.values()))
        among = f' in {number} of at most {MAX_SETS} sets' if self.record.set_field else ''
        return f'{records} records of at most {namespace.get("max-record-size")} bytes{among}'

    def find_set_limit(self, sets: dict[str, dict[str, Facts]]) -> list[str]:
        """The problem that a namespace can have no new set, where messages name the set."""
        if not self.record.set_field or len(set().union(*sets.values())) < MAX_SETS:
            return []
        return [f'the namespace has {MAX_SETS} sets: a message that names a new one can never be stored']

    def find_batch_limits(self) -> list[str]:
        """The problem of a batch-size above the limit of the server, as far as the server reports it."""
        texts: Iterable[str] = ()
        with contextlib.suppress(StoreError):
            texts = self.query_info('get-config:context=service').values()
        # 0: without limit
        limits = {integer_fact(parse_facts(text, ';'), 'batch-max-requests') for text in texts} - {0}
        return [f'batch-size = {self.options.batch_size} is over batch-max-requests = {limit} of the server'
                for limit in sorted(limits)[:1] if limit < self.options.batch_size]


EXISTS_POLICIES = {'replace': 'POLICY_EXISTS_CREATE_OR_REPLACE', 'create': 'POLICY_EXISTS_CREATE',
                   'update': 'POLICY_EXISTS_IGNORE'}


def newest_wins_filter(time_bin: str) -> tuple[list[Any], Any, list[Any]]:
    """The filter for newest-wins: a record is written when the stored time is absent or not newer.

    The compiled expression is a list. Returned are the items before the one that differs from record to record, that
    item, and those after it: compiling costs 8 us a record, putting the item in its place 0.2.
    """
    from aerospike_helpers import expressions as exp
    compiled = exp.Or(exp.Not(exp.BinExists(time_bin)), exp.LE(exp.IntBin(time_bin), 0)).compile()
    # The item is (op, kind, {'val': 0}, children), for the 0 above. build_write() puts the time of its record there.
    index = next(index for index, item in enumerate(compiled) if item[2] == {'val': 0})
    return compiled[:index], compiled[index], compiled[index + 1:]


class WriteBuilder:
    """Makes the writes and removals for batch_write() from records. What is the same for all records is made once, when
    the store opens.

    policy: of all writes, the client's default. durable_deletes: whether removals are durable; None without removals.
    """

    def __init__(self, config: types.SimpleNamespace, policy: dict[str, Any], durable_deletes: bool | None) -> None:
        import aerospike
        from aerospike_helpers.batch import records
        self.Write, self.Remove, self.operator = records.Write, records.Remove, aerospike.OPERATOR_WRITE
        self.namespace, self.set, self.policy = config.aerospike.namespace, config.aerospike.set, policy
        self.removal_policy = None if durable_deletes is None else {
            'key': policy['key'], 'commit_level': policy['commit_level'], 'durable_delete': durable_deletes}
        self.filter = newest_wins_filter(config.record.time_bin) if config.record.time_bin else None
        encoders: dict[str, Callable[[Any], Any]] = {'blob': binascii.a2b_base64, 'geojson': aerospike.GeoJSON}
        self.encoders = {name: encoders[kind] for name, kind in typed_bins(config).items()}

    def build_write(self, record: Record) -> Any:
        """A Write, or a Remove for a Deletion where records are removed."""
        key, policy = (self.namespace, record.set or self.set, record.key), None   # None: the client's default
        if self.filter:
            before, (op, kind, _, children), after = self.filter
            newest = [*before, (op, kind, {'val': record.time}, children), *after]
            if self.removal_policy and isinstance(record, Deletion):
                return self.Remove(key, {**self.removal_policy, 'expressions': newest})
            policy = {**self.policy, 'expressions': newest}
        if record.ttl:
            policy = {**(policy or self.policy), 'ttl': record.ttl}
        operator = self.operator
        ops = [{'op': operator, 'bin': name, 'val': value} for name, value in record.bins.items()]
        if self.encoders:
            for op in ops:
                if op['bin'] in self.encoders:
                    op['val'] = self.encoders[op['bin']](op['val'])
        return self.Write(key, ops, None, policy)


class AerospikeStore(Store):
    """Stores records in an Aerospike cluster by batch_write, each record with its own answer.

    The retries of the client are off: only the window retries, with backoff and TOUCH. The client itself connects again
    to nodes that were away. A pipeline uses the store only in threads of its executor. removes: whether a Deletion
    removes its record. write_accepted: the cluster accepted a write since open, so a later refusal is the fault of the
    record, not of a policy.
    """

    def __init__(self, config: types.SimpleNamespace) -> None:
        options = config.aerospike
        self.config, self.options, self.record = config, options, config.record
        self.batch_size, self.writers = options.batch_size, options.writers
        self.call_timeout = options.total_timeout + 0.5
        target = options.namespace if config.record.set_field else f'{options.namespace}.{options.set}'
        self.where = f'aerospike {", ".join(map(format_address, options.hosts))}: {target}'
        self.removes = bool(self.record.delete) and self.record.delete.mode == 'remove'
        self.client: Any = None
        self.write_accepted = False
        self.causes: dict[int, str] = {}   # code -> its cause, by the nodes
        # Only `create` is answered with 5 (the key exists), only newest-wins with 27 (filtered out). Anywhere else
        # these are 'unknown' and retried: taken for 'duplicate', a 5 would finish a message that is not stored.
        impossible = ({5} if self.record.write != 'create' else set()) | ({27} if not self.record.time_bin else set())
        self.meanings = {code: meaning for code, meaning in MEANING_BY_CODE.items() if code not in impossible}

    # -- opening

    def open(self) -> None:
        """Connects. The client is imported here, as no other store needs it."""
        import aerospike
        from aerospike_helpers.batch.records import BatchRecords
        self.aerospike, self.BatchRecords = aerospike, BatchRecords
        key = aerospike.POLICY_KEY_SEND if self.options.send_key else aerospike.POLICY_KEY_DIGEST
        policy = {'key': key, 'commit_level': aerospike.POLICY_COMMIT_LEVEL_ALL,
                  'exists': getattr(aerospike, EXISTS_POLICIES[self.record.write]), 'ttl': self.record.ttl}
        self.client = self.connect(policy)
        self.nodes = NodeInfo(self.client, self.config, self.where)
        self.nodes.check_versions()
        self.durable_deletes = self.nodes.have_durable_deletes() if self.removes else None
        self.builder = WriteBuilder(self.config, policy, self.durable_deletes)
        log.debug('%s: connected', self.where)

    def connect(self, policy: dict[str, Any]) -> Any:
        """Returns a connected client. Raises StoreError, with the reason for each host."""
        with ConnectLog(self.aerospike) as connect_log:
            try:
                return self.connect_client(self.client_config(policy))
            except (OSError, ValueError) as error:   # password-file has changed since it was checked
                raise StoreError(f'{self.where}: {self.options.password_file}: '
                                 f'{getattr(error, "strerror", None) or error}') from None
            except self.aerospike.exception.AerospikeError as error:
                reason = '; '.join(connect_log.failed_hosts()) or truncate_text(str(error.msg), 200)
                raise StoreError(f'{self.where}: {describe_code(error.code)}: {reason}') from None

    def connect_client(self, config: dict[str, Any]) -> Any:
        """Returns a connected client. With one of two hosts down, and one node found, the client refuses the cluster:
        then this one node is enough."""
        try:
            return self.aerospike.client(config)
        except self.aerospike.exception.AerospikeError:
            if len(self.options.hosts) == 1:
                raise
            client = self.aerospike.client({**config, 'fail_if_not_connected': False})
            if client.get_node_names():
                return client
            client.close()
            raise

    def client_config(self, policy: dict[str, Any]) -> dict[str, Any]:
        """The client's own configuration; it refuses a name that it does not know (validate_keys)."""
        options, tls = self.options, self.options.tls
        config = {'validate_keys': True, 'connect_timeout': to_milliseconds(options.total_timeout),
                  'hosts': [(*host, tls.name) if tls and tls.name else host for host in options.hosts],
                  'use_services_alternate': options.services_alternate,
                  'max_conns_per_node': options.max_connections,
                  'thread_pool_size': min(MAX_THREADS, NODES * options.writers),
                  'policies': {'batch_write': policy,
                               'auth_mode': getattr(self.aerospike, f'AUTH_{options.auth_mode.upper()}')}}
        if options.cluster_name:
            config['cluster_name'] = options.cluster_name
        if options.user:
            config.update(user=options.user, password=open_secret(options.password_file).decode())
        if tls:
            config['tls'] = {'enable': True, 'cafile': tls.ca_file}
            if tls.cert_file:
                config['tls'].update(certfile=tls.cert_file, keyfile=tls.key_file or tls.cert_file)
        return config

    # -- writing a batch

    def write(self, records: list[Record]) -> list[WriteResult]:
        """Writes a batch. An outage is a result, not an exception."""
        deadline = time.monotonic() + self.options.total_timeout
        writes = list(map(self.builder.build_write, records))
        removals = [write for write in writes if self.is_removal(write)] if self.removes else []
        others = [write for write in writes if not self.is_removal(write)] if removals else writes
        if max([len(record.bins) for record in records], default=0) > WIDE_RECORD:
            self.send_wide_apart(others, deadline)
        elif others:
            self.send_batch(others, deadline)
        if removals:
            self.send_removals(removals, others, deadline)
        if any(map(code_of, writes)):
            return self.resolve_results(records, writes, deadline)
        self.write_accepted = self.write_accepted or bool(others)   # an accepted removal proves nothing of writes
        return [self.success_of(record) for record in records] if self.record.delete else [STORED] * len(writes)

    def is_removal(self, write: Any) -> bool:
        """Whether a write removes its record."""
        return write.__class__ is self.builder.Remove

    def send_batch(self, writes: list[Any], deadline: float) -> None:
        """Writes a batch and sets the code of each answer. Where the client refuses a batch as a whole, each half is
        sent by itself, until the record that it refuses is alone."""
        try:
            batch = self.client.batch_write(self.BatchRecords(writes), self.call_policy(deadline))
            if batch.result and not any(map(code_of, writes)):   # never seen: an error of no record
                self.set_code(writes, batch.result)
        except Exception as error:   # whatever it raises, nothing was written
            code, parts = getattr(error, 'code', -2), halves(writes)
            if not parts or self.meanings.get(code) == 'retry':
                self.set_code(writes, code)
            elif time.monotonic() > deadline:
                self.set_code(writes, NO_ANSWER)
            else:
                for part in parts:
                    self.send_batch(part, deadline)

    def call_policy(self, deadline: float) -> dict[str, Any]:
        """The policy of one call that has to return by `deadline` (monotonic). concurrent: to all nodes at once; one
        after the other takes half as long again for three."""
        left = to_milliseconds(deadline - time.monotonic())
        return {'total_timeout': left, 'socket_timeout': left, 'max_retries': 0, 'concurrent': True}

    @staticmethod
    def set_code(writes: list[Any], code: int) -> None:
        """Sets the same answer for all writes."""
        for write in writes:
            write.result = code

    def send_wide_apart(self, writes: list[Any], deadline: float) -> None:
        """Like send_batch(), but wide records are sent last and one by one, so that a slow one delays only itself.
        Records that the deadline leaves no time for are not sent and get the answer of a timeout."""
        others = [write for write in writes if len(write.ops) <= WIDE_RECORD]
        if others:
            self.send_batch(others, deadline)
        for write in writes:
            if len(write.ops) > WIDE_RECORD and time.monotonic() < deadline:
                self.send_batch([write], deadline)
            elif len(write.ops) > WIDE_RECORD:
                self.set_code([write], NO_ANSWER)

    def send_removals(self, removals: list[Any], others: list[Any], deadline: float) -> None:
        """Sends removals, after the other writes of the batch: a removed record leaves no time to compare older records
        with. Where a write of the same key must be retried, so must the removal."""
        retried = {write.key: write.result for write in others
                   if write.result and self.meaning_of(write) in ('retry', 'busy', 'stop', 'unknown')}
        for write in removals:
            write.result = retried.get(write.key, 0)
        due = [write for write in removals if not write.result]
        if due:
            self.send_batch(due, deadline)

    # -- from answers to results

    def resolve_results(self, records: list[Record], writes: list[Any], deadline: float) -> list[WriteResult]:
        """The result of each record of a batch in which not all records were simply stored."""
        meanings = [self.meaning_of(write) for write in writes]
        self.write_accepted = self.write_accepted or any(meaning in PROVES_WRITABLE and not self.is_removal(write)
                                                         for meaning, write in zip(meanings, writes, strict=True))
        if 'stop' in meanings:
            self.find_causes(set(map(code_of, writes)), deadline)
        results = [self.success_of(record) if meaning == 'stored' else self.build_result(meaning, write)
                   for record, meaning, write in zip(records, meanings, writes, strict=True)]
        if self.record.set_field and FULL_SET in map(code_of, writes):
            self.mark_full_sets(writes, results, deadline)
        filtered = [index for index, meaning in enumerate(meanings) if meaning == 'filtered']
        for index, result in zip(filtered, self.read_filtered([records[index] for index in filtered], deadline),
                                 strict=True):
            results[index] = result
        return results

    def meaning_of(self, write: Any) -> str:
        """The meaning of the answer to a write, by MEANING_BY_CODE. A removal that finds no record counts as
        'stored'."""
        if write.result == NOT_FOUND and self.is_removal(write):
            return 'stored'
        return self.meanings.get(write.result, 'unknown')

    @staticmethod
    def success_of(record: Record) -> WriteResult:
        """The result of a record whose write, or removal, was done."""
        return DELETED if isinstance(record, Deletion) else STORED

    def find_causes(self, codes: set[int], deadline: float) -> None:
        """Asks the nodes for the cause of the forbidding answers among `codes`, to name it in place of the advice."""
        for code in codes.intersection(FORBIDDING_CODES):
            self.causes[code] = ''   # the cause of an earlier batch may be over
            with contextlib.suppress(StoreError):
                self.causes[code] = '; '.join(self.nodes.find_obstacles(deadline))

    def build_result(self, meaning: str, write: Any) -> WriteResult:
        """The result of a record that was not simply stored."""
        if meaning == 'duplicate':
            return DUPLICATE
        code, answer = write.result, f'answer {describe_code(write.result, self.causes.get(write.result, ""))}'
        if meaning == 'too-big':
            return WriteResult('rejected', 'too-big', answer)
        if meaning == 'no-geometry':
            names = [op['bin'] for op in write.ops if isinstance(op['val'], self.aerospike.GeoJSON)]
            return WriteResult('rejected', 'rejected', f'{answer}: no geometry in {", ".join(names)}')
        if meaning == 'refused' and self.write_accepted:
            return WriteResult('rejected', 'rejected', answer)
        text = f'{self.where}: {answer}' + (', perhaps written' if write.in_doubt else '')
        if meaning == 'refused':
            return WriteResult('undecided', code, f'{text}, and no write has succeeded since opening')
        if meaning == 'retry' and not self.is_removal(write) and len(write.ops) > WIDE_RECORD:
            text += f'; a record of {len(write.ops)} bins takes the server long: see total-timeout'
        if meaning == 'unknown':
            log.error('%s; its messages are retried', text)
        return WriteResult(meaning if meaning in ('stop', 'busy') else 'retry', code, text)

    def mark_full_sets(self, writes: list[Any], results: list[WriteResult], deadline: float) -> None:
        """Makes `set-full` of the results for full sets: only their messages are requeued, and other sets go on."""
        full = self.nodes.find_full_sets(deadline)
        for index, write in enumerate(writes):
            if write.result == FULL_SET and write.key[1] in full:
                text = f'{self.where}: answer {FULL_SET}: {full[write.key[1]]}; its messages are requeued with a delay'
                results[index] = WriteResult('set-full', FULL_SET, text)

    def read_filtered(self, records: list[Record], deadline: float) -> list[WriteResult]:
        """The result of each record that the filter rejected, by the stored time: stale; rejected where that
        is no integer; retry where it changed or can't be read."""
        if not records:
            return []
        keys = [(self.options.namespace, record.set or self.options.set, record.key) for record in records]
        try:
            found = self.client.batch_read(keys, [self.record.time_bin], self.call_policy(deadline)).batch_records
        except self.aerospike.exception.AerospikeError as error:
            return [WriteResult('retry', error.code,
                                f'{self.where}: answer {describe_code(error.code)}')] * len(records)
        return [self.resolve_filtered(record, stored) for record, stored in zip(records, found, strict=True)]

    def resolve_filtered(self, record: Record, stored: Any) -> WriteResult:
        """The result of one record that the filter rejected. stored: the answer to reading the stored time."""
        moment: Any = stored.record[2].get(self.record.time_bin) if stored.result == 0 else None
        if TYPE_CHECKS['integer'](moment) and moment > record.time:
            return STALE
        if stored.result == NOT_FOUND and self.removes:
            return STALE   # a newer deletion has removed it: writing this record would undo that
        if stored.result not in (0, NOT_FOUND):
            return WriteResult('retry', stored.result, f'{self.where}: answer {describe_code(stored.result)}')
        if moment is None or TYPE_CHECKS['integer'](moment):
            return WriteResult('retry', stored.result, f'{self.where}: the record changed meanwhile')
        return WriteResult('rejected', 'rejected', f'the stored {self.record.time_bin} is no integer: cannot compare')

    # -- check, and the end

    def describe_contents(self) -> tuple[str, list[str]]:
        """Describes nodes, version, records, ttl and record size of the namespace, and its problems."""
        return self.nodes.describe_nodes(self.durable_deletes)

    def close(self) -> None:
        """Disconnects."""
        if self.client:
            self.client.close()


STORES = {'aerospike': AerospikeStore, 'sqlite': SqliteStore}


# ---------------------------------------------------------------------------------------------------------------------
# dead letters: messages that can never become a record, kept with the reason
# ---------------------------------------------------------------------------------------------------------------------

REPLAY_CHANNEL = 'x-msrv-replay'
LOCK_TIMEOUT = 5.0                  # seconds for another process to be done with the file
DEAD_LETTER_BATCH = 100             # dead letters a call
# seconds for such a call that is not halved: connecting, a publish, the file
DEAD_LETTER_TIMEOUT = 20.0
DEAD_LETTER_BATCH_BYTES = 4 << 20   # bodies of a call: nsqd takes 5 MiB (--max-body-size)
# former failures that a dead letter in a file keeps: a nightly replay must not grow it for ever
MAX_HISTORY = 20
DeadLetter = tuple[dict[str, Any], Message]         # its header, and the message that it was
DeadLetterDecoder = Callable[[bytes], DeadLetter]   # decode_topic() or decode_line()


def encode_topic(header: dict[str, Any], body: bytes) -> bytes:
    """A dead letter for a topic: a line of JSON, then the body's own bytes, so that it is hardly larger than them."""
    return json.dumps(header).encode() + b'\n' + body


def decode_topic(letter: bytes) -> DeadLetter:
    """A dead letter from a topic as (header, the Message it was); raises InvalidMessage for anything else."""
    line, newline, body = letter.partition(b'\n')
    with as_invalid_message():
        header = parse_header(line)
        if not newline:
            raise ValueError('it has no body')
        return header, original_message(header, body)


def decode_line(line: bytes) -> DeadLetter:
    """A dead letter from a file, as decode_topic() returns it from a topic."""
    with as_invalid_message():
        header = parse_header(line)
        return header, original_message(header, pop_body(header))


@contextlib.contextmanager
def as_invalid_message() -> Iterator[None]:
    """Raises InvalidMessage for any fault of a dead letter, which anybody may have written."""
    try:
        yield
    except ValueError as error:
        raise InvalidMessage('invalid-json', f'not a dead letter of x-msrv: {error}') from None


def parse_header(line: bytes) -> dict[str, Any]:
    """The line of JSON of a dead letter as a dict. Raises ValueError with the rule that it breaks."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON') from None
    if not isinstance(header, dict):
        raise ValueError('not an object')
    for name, is_valid in HEADER_CHECKS.items():
        if name not in header:
            raise ValueError(f'it has no {name}')
        if not is_valid(header[name]):
            raise ValueError(f'its {name} is {shorten_json(header[name])}')
    return header


def is_int64(value: Any) -> bool:
    """True for an integer of 64 bits, which may be a string: many tools round numbers, to 1.7e18, which is none."""
    try:
        return not isinstance(value, (float, bool)) and int(value) in INT64
    except (TypeError, ValueError, OverflowError):
        return False


# What a replay needs of a header.
HEADER_CHECKS: dict[str, Callable[[Any], bool]] = {
    'reason': lambda value: isinstance(value, str) and value in REASONS,
    'id': lambda value: isinstance(value, str) and value.isascii(),
    'timestamp': is_int64,
    'attempts': is_int64,
}


def pop_body(header: dict[str, Any]) -> bytes:
    """Takes the body out of the header of a dead letter in a file. Raises ValueError."""
    text, encoded = header.pop('body', None), header.pop('body_base64', None)
    if text is None and encoded is None:
        raise ValueError('it has neither body nor body_base64')
    try:
        return base64.b64decode(encoded, validate=True) if text is None else str.encode(text)
    except (TypeError, ValueError):
        rule = 'body_base64 is not base64' if text is None else 'body is not a string of Unicode'
        raise ValueError(f'its {rule}') from None


def original_message(header: dict[str, Any], body: bytes) -> Message:
    """The Message that became a dead letter with this header."""
    return Message(str(header.get('nsqd') or ''), header['id'].encode('ascii'), int(header['timestamp']),
                   int(header['attempts']), body)


def with_history(header: dict[str, Any], rejection: InvalidMessage) -> dict[str, Any]:
    """The header of a dead letter that failed again: the new reason, and the former ones in `history`, oldest first."""
    history = header.get('history')
    former = {name: header.get(name) for name in ('time', 'reason', 'detail')}
    return {**header, 'reason': rejection.reason, 'detail': rejection.detail, 'time': format_rfc3339(time.time()),
            'history': [*(history if isinstance(history, list) else ()), former][-MAX_HISTORY:]}


def encode_line(header: dict[str, Any], body: bytes) -> bytes:
    """A dead letter for a file: a line of JSON with the body as text or base64."""
    try:
        kept = {'body': body.decode()}
    except UnicodeDecodeError:
        kept = {'body_base64': binascii.b2a_base64(body, newline=False).decode()}
    return json.dumps({**header, **kept}).encode() + b'\n'


def append_durably(filename: str, lines: Sequence[bytes]) -> None:
    """Appends lines to a file, all or none, fsynced; one writer at a time by a lock on it. Raises OSError."""
    fd = open_locked(filename, os.O_RDWR | os.O_CREAT | os.O_APPEND, LOCK_TIMEOUT)
    try:
        end = os.fstat(fd).st_size
        torn = end and os.pread(fd, 1, end - 1) != b'\n'   # a writer was killed in mid-line: its message is redelivered
        try:
            write_all(fd, (b'\n' if torn else b'') + b''.join(lines))
            os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):   # the next writer ends a torn line; report the first error
                os.ftruncate(fd, end)
            raise
        if not end:
            sync_directory(os.path.dirname(filename))
    finally:
        os.close(fd)


def open_locked(filename: str, flags: int, seconds: float) -> int:
    """Opens a file and locks it against other writers within `seconds`. Returns its descriptor. Raises OSError. Replay
    may rename a new file over the old one before the lock is obtained; then the new one is opened."""
    while True:
        with contextlib.ExitStack() as stack:
            fd = open_regular(filename, flags)
            stack.callback(os.close, fd)
            lock_file(fd, seconds)
            if is_in_place(fd, filename):
                stack.pop_all()   # leaves it open
                return fd


def is_in_place(fd: int, filename: str) -> bool:
    """True when the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(filename))
    except FileNotFoundError:
        return False


def lock_file(fd: int, seconds: float) -> None:
    """Locks a file against other writers. Raises OSError when it is still locked after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise BlockingIOError(errno.EWOULDBLOCK, 'another process has it locked') from None
            time.sleep(0.01)


def sync_directory(directory: str) -> None:
    """Makes a new file's name durable."""
    fd = os.open(directory or '.', os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class DeadLetterSink:
    """Keeps dead letters in a topic, over a second connection to the nsqd that delivered the message (an error of a
    PUB closes the connection). Those that nsqd does not accept go to the file, if one is set."""

    def __init__(self, config: types.SimpleNamespace, connection_options: ConnectionOptions) -> None:
        options = config.dead_letter
        self.topic, self.file, self.discard = options.topic, options.file, options.discard
        self.source = {'topic': config.nsq.topic, 'channel': config.nsq.channel}
        self.key_is_id = config.record.key == '$id'
        self.connection_options = connection_options
        self.connections: dict[Address, Publisher] = {}
        self.pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f'{THREAD_PREFIX}-letters')
        self.closed = False

    def build_header(self, message: Message) -> dict[str, Any]:
        """The header of a message's dead letter, as a dict for JSON, with the record's key where it is known. The
        timestamp (ns) is a string: many tools round numbers."""
        rejection = message.rejection
        assert rejection, 'only a message that can never become a record is a dead letter'
        key = message.record.key if message.record else message.key if self.key_is_id else None
        return {'reason': rejection.reason, 'detail': rejection.detail, 'key': key, **self.source,
                'nsqd': str(message.conn), 'id': message.id.decode('ascii', 'replace'), 'attempts': message.attempts,
                'timestamp': str(message.timestamp), 'time': format_rfc3339(time.time())}

    async def write_dead_letters(self, messages: list[Message]) -> list[WriteResult]:
        """Keeps the messages, each with its `rejection`. Returns DEAD, or WriteResult('unkept', ...), for each."""
        for message in messages if log.isEnabledFor(logging.DEBUG) else ():
            fields = {'outcome': 'dead', 'reason': message.rejection and message.rejection.reason}
            log.debug('dead letter %s: %s', message.key, message.rejection, extra={'fields': fields})
        if self.discard:
            return [DEAD] * len(messages)
        unkept = dict.fromkeys(messages, WriteResult('unkept', 'refused', 'neither a topic nor a file is configured'))
        if self.topic:
            groups = group_by_key(messages, lambda message: message.conn.address)
            found = await asyncio.gather(*(self.publish_batch(address, list(group)) for address, group in groups))
            unkept = {message: result for results in found for message, result in results.items()}
        if unkept and self.file:
            unkept = await self.append_to_file(list(unkept))
        return [unkept.get(message, DEAD) for message in messages]

    async def publish_batch(self, address: Address, messages: list[Message]) -> dict[Message, WriteResult]:
        """Publishes dead letters to one nsqd. Returns {message: result} of those not confirmed. After any error
        of MPUB but a timeout each half is tried by itself, on a new connection, down to one message."""
        try:
            publisher = await self.open_publisher(address)
        except UNREACHABLE as error:
            text = f'nsqd {format_address(address)}: {describe_error(error)}'
            log.warning('dead letters: %s', text, extra={'kind': f'dead letters: {text}'})
            return dict.fromkeys(messages, WriteResult('unkept', 'away', text))
        try:
            await publisher.publish([encode_topic(self.build_header(m), m.body) for m in messages])
        except UNREACHABLE as error:
            self.connections.pop(address).close()
            if len(messages) > 1 and not self.closed and not isinstance(error, asyncio.TimeoutError):
                first, second = halves(messages)
                return await self.publish_batch(address, first) | await self.publish_batch(address, second)
            return dict.fromkeys(messages, self.unpublished_result(messages[0], publisher, error))
        return {}

    def unpublished_result(self, message: Message, publisher: Publisher, error: BaseException) -> WriteResult:
        """Logs that a dead letter is not confirmed. Returns its result."""
        refused = isinstance(error, NsqdError)   # else nsqd may have accepted it
        hint = '; a file in [dead-letter] would keep it' if refused and not self.file else ''
        text = f'nsqd {publisher}: {describe_error(error)}'
        log.warning('dead letter %s: %s%s', message.key, text, hint, extra={'kind': f'dead letter: nsqd {publisher}'})
        return WriteResult('unkept', 'refused' if refused else 'unknown', text)

    async def open_publisher(self, address: Address) -> Publisher:
        """The connection that publishes to the nsqd at `address`. Its SUB, at RDY 0, makes the replay channel:
        without it the first nsq_tail would take all."""
        if address not in self.connections or self.connections[address].is_closed:
            publisher = Publisher(address, self.connection_options, self.topic, REPLAY_CHANNEL)
            await publisher.open()
            self.connections[address] = publisher
        return self.connections[address]

    async def append_to_file(self, messages: list[Message]) -> dict[Message, WriteResult]:
        """Appends dead letters to the file. Returns {message: result} of those that could not be appended."""
        lines = [encode_line(self.build_header(m), m.body) for m in messages]
        try:
            await asyncio.get_running_loop().run_in_executor(self.pool, append_durably, self.file, lines)
        except OSError as error:
            text = f'{self.file}: {error.strerror}'
            log.error('dead letters: %s', text, extra={'kind': f'dead letters: {text}'})
            return dict.fromkeys(messages, WriteResult('unkept', 'away', text))
        return {}

    def close(self) -> None:
        """Closes the connections; a pending publish gets no answer."""
        self.closed = True
        for publisher in self.connections.values():
            publisher.close()
        self.pool.shutdown(wait=False)


# ---------------------------------------------------------------------------------------------------------------------
# batcher and breaker: messages wait for their batch
# ---------------------------------------------------------------------------------------------------------------------

BATCH_BYTES = 8 << 20       # of message bodies: a call of 150 MB looks to the client like an outage
FAILURES_TO_HALVE = 3       # failures of a whole batch before it is halved
MAX_LONE_FAILURES = 10      # while fewer messages fail alone, one more may come, to show that the store works
HANGING_GRACE = 2.0         # seconds: a call that lasts for so much longer than its time limit hangs
HANGING_TEXT = 'a call has not come back in %.1f s'
NO_VERDICT = {'stop', 'undecided'}   # outcomes that do not show whether the store accepts records
WriteBatch = Callable[[list[Message]], Awaitable[list[WriteResult]]]        # messages -> a result each
SettleBatch = Callable[[list[Message], list[WriteResult]], list[Message]]   # messages, results -> the messages to retry


class Backoff:
    """Growing delays with jitter, in seconds."""

    def __init__(self, first: float, most: float) -> None:
        self.first, self.longest, self.tries = first, most, 0

    def next_delay(self) -> float:
        """The next delay."""
        self.tries += 1
        return min(self.longest, self.first * 2 ** min(self.tries - 1, 20)) * random.uniform(0.5, 1)

    def reset_delay(self) -> None:
        """Starts anew."""
        self.tries = 0


class BackgroundTasks:
    """Background tasks. The first that fails leaves its exception in `error`; `wake` is set whenever one ends."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.error: BaseException | None = None
        self.wake = asyncio.Event()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task."""
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.on_task_end)
        return task

    def on_task_end(self, task: asyncio.Task[Any]) -> None:
        """Keeps the exception of a failed task."""
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.error = self.error or task.exception()
        self.wake.set()

    async def cancel(self) -> None:
        """Cancels all tasks, repeatedly: before Python 3.12 wait_for loses a cancellation that arrives together with
        its result (github.com/python/cpython/issues/86296)."""
        while self.tasks:
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(self.tasks, timeout=0.1)


class BreakerState(enum.Enum):
    """CLOSED: batches start. OPEN: no batch starts. HALF_OPEN: one batch at a time starts, as a probe."""

    CLOSED = 'closed'
    OPEN = 'open'
    HALF_OPEN = 'half-open'


class Breaker:
    """The circuit breaker in front of the store or the dead-letter sink.

    Example: the store dies. The batch under way fails: OPEN, for at most 0.1 s. Then HALF_OPEN: one batch is sent
    as a probe and fails: OPEN for at most 0.2 s, 0.4 s, ... 5 s. The store is up again: the next probe succeeds:
    CLOSED, and batches start as before.
    """

    def __init__(self, state: BreakerState = BreakerState.CLOSED) -> None:
        self.state, self.backoff = state, Backoff(0.1, 5)

    def on_failure(self) -> float:
        """Opens after a whole batch failed. Returns the seconds until the next probe."""
        self.state = BreakerState.OPEN
        return self.backoff.next_delay()

    def on_delay_over(self) -> None:
        """Lets the next batch probe."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def on_success(self) -> None:
        """Closes after a batch showed that the backend works."""
        self.state = BreakerState.CLOSED
        self.backoff.reset_delay()


class Batch:
    """Messages for one call. failures: how often the whole batch failed. busy_rounds: how often some of its records
    were busy. successes_before: Batcher.successes at the last of either."""

    __slots__ = ('messages', 'failures', 'successes_before', 'busy_rounds')

    def __init__(self, messages: list[Message], failures: int = 0, successes_before: int = 0,
                 busy_rounds: int = 0) -> None:
        self.messages, self.failures = messages, failures
        self.successes_before, self.busy_rounds = successes_before, busy_rounds

    def halves_if_due(self) -> list['Batch']:
        """Both halves, each as often failed; the batch itself when it has one message, or too few failures."""
        parts = halves(self.messages) if self.failures >= FAILURES_TO_HALVE else []
        return [Batch(part, self.failures, self.successes_before) for part in parts] or [self]


class Batcher:
    """Collects messages into batches: it owns the pending messages, the batches under way and the breaker.

    A batch starts when it is full, and at once when none is under way: a lone message does not wait, and under load
    batches fill while the one before them is written. A batch that fails as a whole opens the breaker, and from its
    third failure on is halved, so that one message which fails all the others with it ends up alone. When other batches
    were accepted since its last failure, the batch itself is to blame, and the breaker stays as it is.

    Example: 10 messages arrive, for batches of 4 and 2 writers. Two batches of 4 start at once. The last 2 messages
    wait: their batch is not full, and calls are under way. When both calls have returned, the batch of 2 starts.

    Example: message 5 of a batch of 8 makes every write fail. The batch fails three times and is halved. The half
    without message 5 is stored. The other half is halved again, until message 5 is alone: it is requeued with a delay,
    and the other 7 are stored. In an outage every half fails, so no message is ever blamed for it.

    write: async, messages -> a result each. settle: (messages, results) -> the messages to retry.
    backend: the one of BACKENDS that it writes to. limits: (messages, bytes) of a batch. writers: calls at a time.
    call_timeout: seconds after which a call counts as hanging.
    """

    def __init__(self, backend: str, tasks: BackgroundTasks, health: Health, write: WriteBatch, settle: SettleBatch,
                 limits: tuple[int, int], writers: int, call_timeout: float) -> None:
        self.backend, self.tasks, self.health, self.write, self.settle = backend, tasks, health, write, settle
        (self.size, self.max_bytes), self.writers, self.call_timeout = limits, writers, call_timeout
        self.pending: collections.deque[Message] = collections.deque()
        self.pending_bytes = 0
        self.retries: collections.deque[Batch] = collections.deque()   # batches that may go again
        self.calls: list[float] = []         # loop times at which those under way began
        self.successes = 0                   # batches after which the backend was known to work
        self.succeeded_at = -math.inf        # loop time of the last of them
        self.last_error = ''
        self.breaker = Breaker(BreakerState.CLOSED if health.is_up(backend) else BreakerState.HALF_OPEN)
        self.stopped = False                 # no batch starts

    @property
    def is_failing(self) -> bool:
        """True unless the breaker is closed."""
        return self.breaker.state is not BreakerState.CLOSED

    @property
    def lone_failure_count(self) -> int:
        """The number of batches to retry of one message that failed FAILURES_TO_HALVE times or more."""
        return sum([len(batch.messages) == 1 and batch.failures >= FAILURES_TO_HALVE for batch in self.retries])

    @property
    def is_full(self) -> bool:
        """True when a full batch is pending."""
        return len(self.pending) >= self.size or self.pending_bytes >= self.max_bytes

    @property
    def is_at_rest(self) -> bool:
        """True when no call is under way and no batch can start now: the rest waits for the end of a delay."""
        return not self.calls and (self.stopped or self.is_failing or not (self.pending or self.retries))

    @property
    def hanging_after(self) -> float:
        """Seconds after which a call hangs: its time limit and HANGING_GRACE."""
        return self.call_timeout + HANGING_GRACE

    def is_hanging(self, now: float) -> bool:
        """True when a call has been under way for longer than that."""
        return now - min(self.calls, default=now) > self.hanging_after

    def add_messages(self, messages: list[Message]) -> None:
        """Adds messages, and starts the batches that may start."""
        self.pending.extend(messages)
        self.pending_bytes += sum([len(message.body) for message in messages])
        self.start_batches()

    def start_batches(self) -> None:
        """Starts the batches that may start."""
        while batch := self.next_batch():
            started = asyncio.get_running_loop().time()
            self.calls.append(started)
            self.tasks.start(self.run_batch(batch, started))

    def next_batch(self) -> Batch | None:
        """The batch to start next; None when no batch may start now."""
        if (self.stopped or self.breaker.state is BreakerState.OPEN
                or len(self.calls) >= (1 if self.is_failing else self.writers)):
            return None
        # Probes alternate between old batches and new messages, if any are pending: a batch may never succeed.
        # Example: after the first failure (tries is 1) the failed batch itself probes, after the second a batch of
        # new messages, after the third an old batch again.
        probes_new = self.is_failing and self.breaker.backoff.tries % 2 == 0 and self.pending
        if self.retries and not probes_new:
            return self.retries.popleft()
        return self.take_batch() if self.pending and (not self.calls or self.is_full) else None

    def take_batch(self) -> Batch:
        """Removes one batch from the pending messages."""
        if len(self.pending) <= self.size and self.pending_bytes <= self.max_bytes:   # all, as it mostly is
            messages, self.pending, self.pending_bytes = list(self.pending), collections.deque(), 0
            return Batch(messages)
        messages, weight = [], 0
        while self.pending and len(messages) < self.size and (
                not messages or weight + len(self.pending[0].body) <= self.max_bytes):
            messages.append(self.pending.popleft())
            weight += len(messages[-1].body)
        self.pending_bytes -= weight
        return Batch(messages)

    async def run_batch(self, batch: Batch, started: float) -> None:
        """Runs one batch: the call, and the handling of its results."""
        results = await self.write(batch.messages)
        self.calls.remove(started)
        self.log_results(batch, results, asyncio.get_running_loop().time() - started)
        retry = self.settle(batch.messages, results)
        different = distinct_results(results)
        if all(map(is_outage, different)):
            self.on_batch_failure(batch, results[0], retry)
        else:
            if NO_VERDICT.isdisjoint([result.outcome for result in different]):
                self.on_batch_success()
            self.retry_records(batch, retry)
        self.start_batches()

    def on_batch_success(self) -> None:
        """The backend works, or answers for single messages."""
        self.successes += 1
        self.succeeded_at = asyncio.get_running_loop().time()
        self.breaker.on_success()
        self.health.report_recovery(self.backend)

    def retry_records(self, batch: Batch, retry: list[Message]) -> None:
        """Retries the records of a batch that did not fail as a whole (busy ones, mostly), after a delay."""
        if retry:
            again = Batch(retry, successes_before=self.successes, busy_rounds=batch.busy_rounds + 1)
            self.retry_later([again], 0.1 * 2 ** min(batch.busy_rounds, 6))

    def on_batch_failure(self, batch: Batch, result: WriteResult, retry: list[Message]) -> None:
        """The whole batch failed: the backend is unavailable, or one message of the batch makes it fail."""
        self.last_error = result.detail or result.outcome
        # Example: a batch fails when 7 batches have been accepted. Others go on, 9 are accepted, and it fails again:
        # the store works for others, so this batch is to blame. At its first failure nobody can tell.
        to_blame = (batch.failures or batch.busy_rounds) and self.successes > batch.successes_before
        batch.failures, batch.successes_before, batch.messages = batch.failures + 1, self.successes, retry
        if not to_blame:
            # a cluster answers the same code with another text for each node
            kind = f'batch {result.reason}' if isinstance(result.reason, int) else None
            self.health.report_failure(self.backend, self.last_error, kind)
            self.retries.extend(batch.halves_if_due() if retry else ())
            if self.breaker.state is not BreakerState.OPEN:   # else another batch under way has opened it
                self.open_breaker()
        # Example: message 5 makes a batch of 8 fail three times; halves follow. Those with message 5 fail at 4 and at 2
        # messages and are halved at once. Alone it fails once more, and is requeued. A batch of one is tried four
        # times; a dead letter as often as settle() returns it, for its own nsqd may be away beside others that work.
        elif len(retry) > 1 or batch.failures <= FAILURES_TO_HALVE or result.outcome == 'unkept':
            self.retry_later(batch.halves_if_due() if retry else (), 0.1 * batch.failures)
        elif retry:
            self.settle(retry, [WriteResult('blamed', None, self.last_error)])

    def open_breaker(self) -> None:
        """Stops all batches for the delay of the breaker; then one batch probes."""
        delay = self.breaker.on_failure()
        log.debug('%s: next try in %.1f s, %d messages pending', self.backend, delay, len(self.pending))

        def delay_over() -> None:
            self.breaker.on_delay_over()
            self.start_batches()
        asyncio.get_running_loop().call_later(delay, delay_over)

    def retry_later(self, batches: Sequence[Batch], delay: float) -> None:
        """Retries batches after `delay` seconds; others continue meanwhile."""
        def delay_over() -> None:
            self.retries.extend(batches)
            self.start_batches()
        asyncio.get_running_loop().call_later(delay, delay_over)

    def log_results(self, batch: Batch, results: list[WriteResult], seconds: float) -> None:
        """Logs the results of a batch, for -v."""
        if log.isEnabledFor(logging.DEBUG):
            outcomes = collections.Counter(result.outcome for result in results)
            log.debug('%s: batch of %d, %d bytes, in %.0f ms: %s', self.backend, len(batch.messages),
                      sum(len(message.body) for message in batch.messages), seconds * 1000,
                      ', '.join(f'{name} {number}' for name, number in outcomes.items()))

    def stop(self) -> None:
        """Starts no batch any more."""
        self.stopped = True


class StoreExecutor(concurrent.futures.ThreadPoolExecutor):
    """The threads in which calls of a store block; it knows the calls under way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: set[concurrent.futures.Future[Any]] = set()

    def submit(self, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        """Submits a call."""
        call = super().submit(*args, **options)
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        return call


async def close_store(store: Store, executor: StoreExecutor) -> None:
    """Closes the store in its executor, with a time limit; a store with a call under way is not closed."""
    if not executor.calls:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(executor, store.close), CLOSE_TIMEOUT)
    executor.shutdown(wait=False)


def is_outage(result: WriteResult) -> bool:
    """True when the backend may be to blame for a result; a single dead letter that is refused is no outage."""
    return result.outcome == 'retry' or (result.outcome == 'unkept' and result.reason != 'refused')


def group_by_result(messages: list[Message],
                    results: list[WriteResult]) -> Iterable[tuple[WriteResult, Sequence[Message]]]:
    """Groups the messages of a batch by result, as (result, messages); usually all have the same."""
    if results.count(results[0]) == len(messages):
        return [(results[0], messages)]
    return group_by_key(messages, dict(zip(messages, results, strict=True)).__getitem__)


# ---------------------------------------------------------------------------------------------------------------------
# RDY and consumer: the connections to all nsqds, and the one place that answers them
# ---------------------------------------------------------------------------------------------------------------------

LOOKUP_INTERVAL = 5.0       # seconds between questions to nsqlookupd
FIRST_MESSAGE_SIZE = 64 << 10   # bytes assumed for a message before any has arrived
REQUEUE_DELAYS = 1, 600     # seconds: after the first delivery, and at most; doubled between


class Source(typing.Protocol):
    """The source of a window's messages: the nsqds (Consumer), or a file of dead letters (DeadLetterFileSource).

    It delivers messages while `credit()` is positive, and answers them. in_flight: key -> Message without an answer
    yet. requeued, late: counts since start().
    """

    topic: str
    channel: str
    max_in_flight: int
    in_flight: dict[str, Message]
    requeued: int
    late: int

    def start(self, credit: Callable[[], int], deliver: Callable[[list[Message]], None]) -> None:
        """Starts to deliver: messages go to `deliver`, as many as `credit()` allows."""

    def stop(self) -> None:
        """Stops delivering."""

    def on_credit_change(self) -> None:
        """Called when `credit()` has changed."""

    def finish(self, messages: list[Message]) -> None:
        """Answers messages of which nothing is left to do."""

    def requeue(self, messages: list[Message], delay: float = 0) -> None:
        """Returns messages: they are redelivered after `delay` seconds at the earliest."""

    def set_aside(self, messages: list[Message]) -> None:
        """Sets messages aside until the window's end, without blocking others."""

    @property
    def idle_since(self) -> float | None:
        """Loop time at which it was found idle; None when not idle."""

    @property
    def is_exhausted(self) -> bool:
        """True when nothing can arrive any more."""


def rdy_shares(states: Sequence[tuple[int, bool, float, int]], budget: int) -> list[int]:
    """Distributes a budget of messages as RDY; each state is (rdy, idle, rdy_since, max_rdy).

    Each idle connection keeps RDY 1 when the budget has 1 for every connection. The others share the rest evenly, but
    none loses RDY while that is enough (one may be on its way). When the budget is smaller, idle connections take
    turns, the one whose turn was longest ago first.
    """
    rdys = [0] * len(states)
    eager = sorted((i for i, state in enumerate(states) if not state[1]), key=lambda i: -states[i][0])
    idle = sorted((i for i, state in enumerate(states) if state[1]), key=lambda i: states[i][2])
    if budget >= len(states):
        for i in idle:
            rdys[i] = 1
        budget -= len(idle)
    # Example: a budget of 12 for A (RDY 9), B (RDY 1) and C (RDY 1, idle). C gets 1, so 11 are left for A and B. A
    # keeps its 9, more than its fair share of 6, for 9 messages may be on their way. B gets the other 2.
    for group in eager, idle:
        for place, i in enumerate(group):
            rdy, _, _, most = states[i]
            fair = -(-budget // (len(group) - place))
            more = min(budget, most - rdys[i], max(fair, rdy if group is eager else 0))
            rdys[i] += more
            budget -= more
    return rdys


def allocate_rdy(connections: Sequence[Any], budget: int, keep_busy: bool) -> list[tuple[Any, int]]:
    """The new RDY of each connection. Reductions come first, so that the sum never exceeds the budget meanwhile.
    keep_busy: within the budget only idle connections lose RDY.

    Example without `keep_busy`: three connections, a budget of 12, and the third is idle. It keeps RDY 1, so that its
    next message is delivered; the other two share 11: RDY 6, 5, 1. A budget of 2 is not enough for RDY 1 each: the two
    that are not idle get 1 each, and idle ones take turns.
    """
    # Example: RDY is 10, and 4 messages of it are set aside. For nsqd these are in flight, so only 6 others can come.
    # The budget is shared without these 4, and each share is raised by them: for a share of 6 RDY 10 is sent.
    more = rdy_shares([(max(0, c.rdy - c.set_aside) if keep_busy else 0, c.idle, c.rdy_since,
                        max(0, c.max_rdy - c.set_aside)) for c in connections], budget)
    rdys = [(c, share and share + c.set_aside) for c, share in zip(connections, more, strict=True)]
    return sorted(rdys, key=lambda pair: pair[1] - pair[0].rdy)


def reduced_rdy(connection: Any, connections: Sequence[Any], budget: int) -> int:
    """The new RDY of a connection on which messages have arrived, so that the sum stays within the budget.

    Example: The window may accept 5 messages, RDY is 5. Three arrive, so the budget is 2, and RDY 2 is sent before the
    first FIN. Otherwise each FIN would free a slot of RDY 5, and nsqd would send a sixth message.
    """
    excess = sum([c.rdy - c.set_aside for c in connections]) - budget
    return connection.rdy if excess <= 0 else max(0, connection.rdy - excess)


class InFlightBytes:
    """Counts bytes of bodies in flight; tells how many more messages fit. A large message raises `expected_size`, the
    bytes expected of the next, at once; each small one lowers it a little."""

    def __init__(self, most: int) -> None:
        self.limit, self.total, self.expected_size = most, 0, FIRST_MESSAGE_SIZE

    def add_sizes(self, sizes: list[int]) -> None:
        """Adds the sizes of messages that arrived."""
        self.total += sum(sizes)
        self.expected_size = max(int(self.expected_size * 0.95 ** len(sizes)), 1, *sizes)

    @property
    def is_flooded(self) -> bool:
        """True when it is over twice the limit.

        Example: RDY is 500, for none has come yet. The first message has 1 MiB, so RDY falls to 32; until nsqd receives
        that, it may send 500 MiB. They stay in nsqd and in the sockets.
        """
        return self.total > 2 * self.limit

    @property
    def free_slots(self) -> int:
        """The number of messages that may still arrive below the limit; at least 1, as one can exceed all of it."""
        return max(1, (self.limit - self.total) // self.expected_size)


class LookupPoller:
    """Polls nsqlookupd for the nsqds of a topic in the background, and updates the Consumer."""

    def __init__(self, config: types.SimpleNamespace, topic: str, consumer: 'Consumer') -> None:
        self.config, self.topic, self.consumer = config, topic, consumer
        self.lookup_due = asyncio.Event()
        self.news = LookupLog()
        self.answered = asyncio.Event()   # set when the next look-up has ended

    async def run(self) -> None:
        """Polls every LOOKUP_INTERVAL, and at once for wait_for_answer()."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lookup_due.wait(), LOOKUP_INTERVAL)
            self.lookup_due.clear()
            await self.look_up()

    async def look_up(self) -> None:
        """Polls once. When no nsqlookupd answers, the known nsqds stay."""
        answered, self.answered = self.answered, asyncio.Event()
        try:
            self.consumer.update_nsqds(await find_nsqds(self.config, self.topic, news=self.news))
        except Unavailable as error:
            self.news.log(logging.WARNING, '%s; keeping the known nsqds', error)
        answered.set()

    async def wait_for_answer(self) -> None:
        """Polls now and waits for the answer; one to an earlier look-up may be out of date."""
        self.lookup_due.set()
        await self.answered.wait()


class Consumer:
    """The connections to all nsqds of a topic: the Source for messages from nsqd. It alone owns RDY and the messages in
    flight, and answers nsqd."""

    def __init__(self, config: types.SimpleNamespace, tasks: BackgroundTasks, connection_options: ConnectionOptions,
                 topic: str, channel: str, health: Health) -> None:
        self.config, self.tasks, self.connection_options, self.health = config, tasks, connection_options, health
        self.topic, self.channel = topic, channel
        self.max_in_flight = config.nsq.max_in_flight
        self.addresses: list[Address] = []                          # of the nsqds to connect to
        self.connect_tasks: dict[Address, asyncio.Task[Any]] = {}   # address -> the task that keeps its connection up
        self.connections: list[Subscription] = []                   # Subscriptions that are up
        self.connect_errors: dict[Address, str | None] = {}         # address -> None, or the error of its last attempt
        self.in_flight: dict[str, Message] = {}                     # key -> Message without an answer yet
        self.in_flight_bytes = InFlightBytes(config.nsq.max_held)
        self.credit: Callable[[], int] = lambda: 0   # of the window that takes messages; 0 between windows
        self.deliver: Callable[[list[Message]], None] | None = None
        self.requeued = self.late = 0
        self.idle_since: float | None = None
        self.tick_due = asyncio.Event()   # run_ticks() sleeps until then
        self.poller = LookupPoller(config, topic, self) if config.nsq.lookupd_http_address else None

    async def open(self) -> None:
        """Looks up the nsqds and connects; returns when the first is connected. Raises Unavailable when none is."""
        news = self.poller.news if self.poller else None
        self.update_nsqds(await find_nsqds(self.config, self.topic, LOOKUP_GRACE, news))
        while not (self.connections or self.has_tried_all() or self.tasks.error):
            self.tasks.wake.clear()
            await self.tasks.wake.wait()
        if self.tasks.error:
            raise self.tasks.error
        if self.addresses and not self.connections:
            raise Unavailable(self.failure_text)
        self.tasks.start(self.run_ticks())
        if self.poller:
            self.tasks.start(self.poller.run())

    def has_tried_all(self) -> bool:
        """True when the connection to each nsqd is up or has failed."""
        return all(address in self.connect_errors for address in self.addresses)

    def update_nsqds(self, found: Nsqds) -> None:
        """Connects to new nsqds. An nsqd that is no longer named stays while its connection lasts."""
        up = [connection.address for connection in self.connections]
        self.addresses = list(dict.fromkeys([*found, *up]))
        for address in found:
            if address not in self.connect_tasks or self.connect_tasks[address].done():
                self.connect_errors.pop(address, None)
                self.connect_tasks[address] = self.tasks.start(self.maintain_connection(address))
        if not self.addresses and not self.health.is_up('queue'):
            self.health.report_failure('queue', self.failure_text)
        self.tasks.wake.set()

    async def maintain_connection(self, address: Address) -> None:
        """Keeps a connection to one nsqd up, with backoff, as long as it is configured or named by nsqlookupd.

        nsqlookupd is polled before each new attempt: SUB would create a deleted topic again.
        """
        backoff, news, loop = Backoff(0.1, 5), ChangeLog(), asyncio.get_running_loop()
        while address in self.addresses:
            connection, up_since = Subscription(address, self), math.inf
            try:
                await connection.open()
                up_since = loop.time()
                self.on_connect(connection, backoff)
                news.clear()
                await connection.read_messages()
            except UNREACHABLE as error:
                if address not in self.addresses:   # it was closed
                    return
                self.on_disconnect(connection, describe_error(error), news)
            if loop.time() - up_since >= backoff.longest:   # an nsqd that closes at once keeps its delay
                backoff.reset_delay()
            delay = backoff.next_delay()
            log.debug('nsqd %s: connecting again in %.1f s', connection, delay)
            await asyncio.sleep(delay)
            if self.poller:
                await self.poller.wait_for_answer()

    def on_connect(self, connection: Subscription, backoff: Backoff) -> None:
        """Handles a new connection."""
        self.connect_errors[connection.address] = None
        self.connections.append(connection)
        if backoff.tries:
            log.info('nsqd %s is back', connection)
        self.health.report_recovery('queue')
        self.tasks.wake.set()

    def on_disconnect(self, connection: Subscription, error: str, news: ChangeLog) -> None:
        """Handles a connection that failed or ended. Health is told of the last and, in an outage, of all
        once each has failed; else `news`, the log of this nsqd."""
        connection.close_socket()
        self.connect_errors[connection.address] = error
        was_up = connection in self.connections
        if was_up:
            self.connections.remove(connection)
        if self.connections or not was_up and self.health.is_up('queue'):
            news.log(logging.WARNING, 'nsqd %s: %s', connection, error)
        else:
            news.clear()   # so that its error is logged again when the queue is up without it
            if was_up or self.has_tried_all():
                self.health.report_failure('queue', f'nsqd {connection}: {error}' if was_up else self.failure_text)
        self.tasks.wake.set()

    @property
    def failure_text(self) -> str:
        """The latest error of each nsqd, when none can be reached."""
        if not self.addresses:
            return f'no nsqd has the topic {self.topic} yet'
        return 'no nsqd can be reached: ' + '; '.join(
            f'{format_address(address)}: {self.connect_errors[address]}' for address in self.addresses)

    # -- messages

    def start(self, credit: Callable[[], int], deliver: Callable[[list[Message]], None]) -> None:
        """Starts to deliver to a window: nothing is set aside yet, and each nsqd has to prove again that it is idle."""
        self.credit, self.deliver = credit, deliver
        self.tick_due.set()
        self.requeued = self.late = 0
        self.idle_since = None
        for message in self.in_flight.values():
            message.set_aside = False
        for connection in self.connections:
            connection.idle = connection.found_idle = False
            connection.set_aside = 0

    def stop(self) -> None:
        """Stops delivering: no window accepts messages."""
        self.credit, self.deliver = lambda: 0, None
        self.on_credit_change()

    def on_messages(self, connection: Subscription, messages: list[Message]) -> None:
        """Handles the messages of one read. A redelivery of a message in flight only moves it."""
        fresh = [message for message in messages if self.in_flight.setdefault(message.key, message) is message]
        for message in messages if len(fresh) < len(messages) else ():
            self.on_redelivery(self.in_flight[message.key], message)
        connection.in_flight += len(fresh)
        connection.idle = connection.found_idle = False
        self.idle_since = None
        sizes = [len(message.body) for message in fresh]
        self.in_flight_bytes.add_sizes(sizes)
        log.debug('nsqd %s: %d messages', connection, len(messages))
        if self.deliver:
            self.deliver(fresh)
            self.reduce_rdy(connection)
        else:   # they wait for the next window and need TOUCH meanwhile
            self.tick_due.set()

    def on_redelivery(self, first: Message, second: Message) -> None:
        """Handles a redelivery of a message in flight: the answer goes to the connection that delivered it last."""
        first.conn.in_flight -= 1
        first.conn.set_aside -= first.set_aside
        second.conn.in_flight += 1
        second.conn.set_aside += first.set_aside
        first.conn, first.touched_at, first.received_at = second.conn, second.touched_at, second.received_at
        first.attempts = second.attempts

    def set_aside(self, messages: list[Message]) -> None:
        """Sets messages aside until the window's end. They stay in flight, so RDY is raised by their number: others
        can arrive."""
        for message in messages:
            if message.key in self.in_flight and not message.set_aside:
                message.set_aside = True
                message.conn.set_aside += 1

    # -- RDY

    @property
    def rdy_budget(self) -> int:
        """The maximum sum of RDY over all connections, without the messages set aside.

        Example: max-held is 32 MiB, 24 MiB are in flight in 100 messages, and messages have 1 MiB: 8 more may come, so
        RDY may add up to 108.
        """
        credit, volume = self.credit(), self.in_flight_bytes
        if credit <= 0 or volume.total >= volume.limit:
            return 0
        set_aside = sum([c.set_aside for c in self.connections])
        return max(0, min(credit, self.max_in_flight - set_aside,
                          len(self.in_flight) - set_aside + volume.free_slots))

    def reduce_rdy(self, connection: Subscription) -> None:
        """Where the window or max-held is nearly full, lowers the RDY of a connection on which messages arrived,
        before a FIN can free a slot. Others mostly follow at the next tick."""
        spare = min(self.credit(), self.in_flight_bytes.free_slots)
        if spare >= self.max_in_flight:   # the sum of RDY can't exceed it; skips sums that cost much with 100 nsqds
            return
        budget = self.rdy_budget
        connection.set_rdy(reduced_rdy(connection, self.connections, budget))
        if budget == 0 or self.in_flight_bytes.free_slots < self.max_in_flight:   # else the next tick does it
            self.on_credit_change()

    def on_credit_change(self) -> None:
        """Distributes the budget to the connections."""
        # Example: max-in-flight is 2,500 and the credit is over 5,000. All of RDY is moved from A to B: if A still
        # sends 2,500 by its old RDY, and B 2,500 by the new one, that is not too many. So nothing is counted, and A
        # loses its RDY at once.
        ample_credit = self.credit() > 2 * self.max_in_flight
        now = asyncio.get_running_loop().time()
        may_come = 0 if ample_credit else sum([connection.may_send_at(now) for connection in self.connections])
        for connection, share in allocate_rdy(self.connections, self.rdy_budget, keep_busy=not ample_credit):
            may_send, rdy = connection.may_send_at(now), share
            if rdy > connection.rdy and not ample_credit:
                rdy = min(rdy, self.rdy_bound(connection, may_come - may_send))
            connection.set_rdy(rdy)
            may_come += connection.may_send_at(now) - may_send

    def rdy_bound(self, connection: Subscription, others: int) -> int:
        """The highest RDY that a connection may get now; others: what all other connections may still send.

        A slow nsqd looks like an idle one. When its RDY is lowered, it may still send by the old RDY until it receives
        the new one (`rdy_overhang`). Until then no other nsqd gets that part of the credit.

        Example: 10 may come, A has RDY 10 and is silent, so it is lowered to 1. B gets 9, after RDY_TRANSIT.
        """
        return max(connection.rdy, self.credit() + connection.set_aside - others)

    @property
    def is_exhausted(self) -> bool:
        """True when no nsqd has the topic, or messages in flight use up each RDY."""
        # Example: max-in-flight is 2,500, and a replay has set 2,500 dead letters aside that failed again. RDY is 0
        # from then on, so nothing can come, and no nsqd is ever found idle: the window would wait for its timeout.
        return not self.addresses or bool(self.connections and self.in_flight and all(
            c.rdy <= c.in_flight for c in self.connections))

    def mark_idle(self, now: float) -> None:
        """Marks the connections that could deliver and did not."""
        for connection in self.connections:
            if now - connection.last_data < connection.idle_delay:   # a part of a message is activity, too
                connection.idle = connection.found_idle = False
            elif connection.rdy <= connection.in_flight:
                connection.rdy_since = now
            elif now - connection.rdy_since - connection.round_trip >= connection.idle_delay:
                connection.idle = connection.found_idle = True
        if not (self.rdy_budget and self.connections and self.has_tried_all()
                and all(c.found_idle for c in self.connections)):
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now

    # -- answers

    def finish(self, messages: list[Message]) -> None:
        """Sends FIN: only for messages that Window.finish has settled."""
        self.send_answers(b'FIN %s\n', messages)

    def requeue(self, messages: list[Message], delay: float = 0) -> None:
        """Sends REQ. Without a delay only at RDY 0: else nsqd would redeliver the same messages at once."""
        late = self.send_answers(b'REQ %%s %d\n' % (delay * 1000), messages)
        self.requeued += len(messages) - late

    def send_answers(self, command: bytes, messages: list[Message]) -> int:
        """Sends one command per message, in one write per connection. Returns how many were too late: their connection
        has ended, and nsqd redelivers them."""
        messages = [message for message in messages if self.in_flight.pop(message.key, None)]   # each is answered once
        late = 0
        for connection, group in group_by_key(messages, lambda message: message.conn):
            connection.in_flight -= len(group)
            connection.set_aside -= sum([message.set_aside for message in group])
            connection.send_command(b''.join([command % message.id for message in group]))
            if connection.is_closed:
                late += len(group)
        self.in_flight_bytes.total -= sum([len(message.body) for message in messages])
        self.late += late
        return late

    def on_late_answer(self, connection: Subscription, data: bytes) -> None:
        """Handles a refused FIN, REQ or TOUCH: nsqd has redelivered the message."""
        if not data.startswith(b'E_TOUCH'):
            self.late += 1
            self.requeued -= data.startswith(b'E_REQ')
        log.warning('nsqd %s: late: %s', connection, data.partition(b' ')[0].decode('utf-8', 'replace'),
                    extra={'kind': f'nsqd {connection}: late'})

    def touch(self, now: float) -> None:
        """Sends TOUCH for messages delivered or touched half of msg-timeout ago. None after max-msg-timeout:
        nsqd then redelivers, though it still accepts TOUCH.

        Example: the store is away for an hour. TOUCH ends after 15 minutes, and nsqd takes the messages back; it keeps
        them, as RDY is 0. Then the store is up, the copies here are written. Where a FIN is late, nsqd delivers
        the message again, and it is written once more under its key.
        """
        due = [message for message in self.in_flight.values()
               if now - message.touched_at >= message.conn.msg_timeout / 2 - 2 * TICK_INTERVAL
               and now - message.received_at < message.conn.max_msg_timeout]
        for connection, group in group_by_key(due, lambda message: message.conn):
            log.debug('nsqd %s: TOUCH for %d messages', connection, len(group))
            connection.send_command(b''.join([b'TOUCH %s\n' % message.id for message in group]))
        for message in due:
            message.touched_at = now

    # -- time

    async def run_ticks(self) -> None:
        """Updates RDY and idleness, and sends TOUCH, at every tick."""
        loop, last_touch = asyncio.get_running_loop(), 0.0
        while True:
            now = loop.time()
            self.mark_idle(now)
            self.on_credit_change()
            shortest = min((c.msg_timeout for c in self.connections), default=60)
            if self.in_flight and now - last_touch >= shortest / 8:
                last_touch = now
                self.touch(now)
            self.tasks.wake.set()
            await self.wait_for_tick(shortest / 8)

    async def wait_for_tick(self, touch_interval: float) -> None:
        """Waits for the next tick. Between windows only TOUCH is due; without messages in flight this sleeps until
        tick_due."""
        self.tick_due.clear()
        seconds = TICK_INTERVAL if self.deliver else touch_interval
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.tick_due.wait(), seconds if self.deliver or self.in_flight else None)

    async def close(self) -> None:
        """Closes every connection; Subscription.close() requeues messages still in flight."""
        self.addresses = []
        self.stop()
        await asyncio.gather(*(connection.close() for connection in self.connections))


# ---------------------------------------------------------------------------------------------------------------------
# window: one bounded receive, from the first message to the last answer
# ---------------------------------------------------------------------------------------------------------------------

SINK_RETRY_TIME = 5.0       # seconds that a dead letter waits for an unavailable dead-letter sink
# Deliveries after which an undecided message becomes a dead letter; those that an outage used up count, too.
REFUSALS_TO_REJECT = 3
SMALL_BODY = 512            # bytes of a body that is too small to count what it contains
SMALL_FACTOR = 44           # decoded bytes per byte of such a body, at most (lists in lists, measured)


def decoded_size(body: bytes) -> int:
    """The maximum memory of a decoded message: lists inside lists take 44 times their body. The sizes are those of
    CPython's objects (sys.getsizeof): 56 and more a list, 64 and more an object, and for each element a pointer and
    itself."""
    if len(body) < SMALL_BODY:
        return len(body) * SMALL_FACTOR
    return len(body) + 72 * body.count(b',') + 128 * body.count(b'[') + 256 * body.count(b'{')


class DecodeQueue:
    """Messages that wait to become records. Decoded ones take at most `max_held` bytes and one message."""

    def __init__(self, mapper: 'Mapper', max_held: int) -> None:
        self.mapper, self.max_held = mapper, max_held
        self.waiting: collections.deque[Message] = collections.deque()
        self.decoded_bytes = 0

    def take_records(self, most: int) -> tuple[list[Message], list[Message]]:
        """Decodes up to `most` messages. Returns (messages with a record, messages that can never have one)."""
        fit: list[Message] = []
        invalid: list[Message] = []
        waiting, as_record, decoded = self.waiting, self.mapper.build_record, self.decoded_bytes
        while waiting and len(fit) < most and decoded < self.max_held:
            message = waiting.popleft()
            message.size = decoded_size(message.body)
            decoded += message.size
            try:
                message.record = as_record(message)
                fit.append(message)
            except InvalidMessage as rejection:
                message.rejection = rejection
                invalid.append(message)
        self.decoded_bytes = decoded
        return fit, invalid


class WindowState(enum.Enum):
    """OPEN: accepts messages. DRAINING: asks for none, and writes what it has if its End `drains`. CLOSED:
    every message is answered, or the next window's.

    Example: max-messages is 5, and 7 messages arrive, because two were under way when RDY was lowered. When 5 are
    written, the window is full: DRAINING, CLOSED. The daemon keeps the 2 in flight, and its next window accepts
    them first; `once` has no next window and requeues them.
    """

    OPEN = 'open'
    DRAINING = 'draining'
    CLOSED = 'closed'


class End(enum.Enum):
    """The reason why a window ended: its text for -v, whether pending messages are still written, and the exit status.

    Example: a window is out of time, and drains; SIGTERM comes meanwhile. SIGNAL does not drain, so it replaces
    TIMEOUT: the batches under way end, the messages that are pending are requeued, and the exit status is 0.
    """

    FULL = 'full', True, os.EX_OK
    IDLE = 'the queue is idle', True, os.EX_OK
    TIMEOUT = 'out of time', True, os.EX_OK
    RELOAD = 'told to end', True, os.EX_OK
    SIGNAL = 'stopped', False, os.EX_OK
    STORE_FAILED = 'the store failed', False, os.EX_TEMPFAIL
    DEAD_LETTERS_FAILED = 'dead letters could not be kept', False, os.EX_TEMPFAIL
    QUEUE_FAILED = 'no nsqd is connected', False, os.EX_TEMPFAIL

    def __init__(self, text: str, drains: bool, exit_status: int) -> None:
        self.text, self.drains, self.exit_status = text, drains, exit_status


class WindowLimits(typing.NamedTuple):
    """The limits of a window. max_messages: 0 for any number. timeout, idle_timeout: seconds. has_successor: another
    window follows, which gets the messages beyond this limit (daemon)."""

    max_messages: int
    timeout: float
    idle_timeout: float
    has_successor: bool = False


@dataclasses.dataclass(slots=True)
class WindowTimes:
    """Loop times of a window. timeout_since: from when `timeout` counts. active_at: last activity. progress_at: last
    return of a batch. draining_since: begin of draining. seconds: duration, set at the end."""

    started_at: float = 0.0
    timeout_since: float = 0.0
    active_at: float = 0.0
    progress_at: float = 0.0
    draining_since: float = 0.0
    seconds: float = 0.0


class FailedMessages:
    """The messages of a window that failed and have not succeeded since, each with the End that says what failed.

    Example: the dead letter of A is not kept, so A is requeued with a delay. The window would end as
    DEAD_LETTERS_FAILED. A is delivered again in the same window and its dead letter is kept: the window ends well.
    """

    MOST = 10_000   # an open window may see any number: beyond this the oldest are forgotten

    def __init__(self) -> None:
        self.reasons: dict[str, End] = {}   # by the key of the message

    def add(self, messages: list[Message], reason: End) -> None:
        """Adds messages that failed."""
        self.reasons.update((message.key, reason) for message in messages)
        for key in list(itertools.islice(self.reasons, max(0, len(self.reasons) - self.MOST))):
            del self.reasons[key]

    def discard(self, messages: list[Message]) -> None:
        """Removes messages that have succeeded now."""
        for message in messages if self.reasons else ():
            self.reasons.pop(message.key, None)

    def count(self, reason: End) -> int:
        """The number of messages with this End."""
        return collections.Counter(self.reasons.values())[reason]


# The method of Window that settle() calls for each outcome.
ACTIONS = {'stored': 'finish', 'deleted': 'finish', 'duplicate': 'finish', 'stale': 'finish', 'dead': 'finish',
           'rejected': 'reject_by_store', 'retry': 'retry', 'busy': 'retry', 'undecided': 'on_undecided',
           'stop': 'on_store_stop', 'unkept': 'on_unkept', 'blamed': 'requeue_with_delay',
           'set-full': 'on_set_full'}


class Window:
    """One bounded receive: accepts up to max-messages messages and counts what became of them (`outcome_counts`).

    It accepts messages from its Source, has them mapped and written in batches, and acts on each result. pending_count:
    messages still to be settled. beyond_limit: those over max-messages. undecided_keys: keys of the messages that
    the store refused before it accepted any write.
    """

    requeues_on_purpose = False   # a replay does
    empty_level = logging.DEBUG   # level of an empty summary: a timer makes 8,640 of them a day

    def __init__(self, pipeline: Any, limits: WindowLimits, mapper: Mapper) -> None:
        self.pipeline, self.limits, self.source = pipeline, limits, pipeline.source
        store, sink, tasks, health = pipeline.store, pipeline.sink, pipeline.tasks, pipeline.health
        self.records = DecodeQueue(mapper, pipeline.config.nsq.max_held)
        self.store_batcher = Batcher('store', tasks, health, pipeline.write, self.settle,
                                     (store.batch_size, BATCH_BYTES), store.writers, store.call_timeout)
        self.dead_letter_batcher = Batcher('dead letters', tasks, health, sink and sink.write_dead_letters, self.settle,
                                           (DEAD_LETTER_BATCH, DEAD_LETTER_BATCH_BYTES), 1, DEAD_LETTER_TIMEOUT)
        self.state, self.detail = WindowState.OPEN, ''
        self.end_reason: Any = None   # an End, once the window ends
        self.times = WindowTimes()
        self.outcome_counts = dict.fromkeys(SUMMARY_COUNTS, 0)
        self.exported_counts = dict(self.outcome_counts)   # what the metrics have of `outcome_counts`
        self.accepted = self.pending_count = 0
        self.failed_messages = FailedMessages()
        self.beyond_limit: list[Message] = []
        self.undecided_keys: set[str] = set()

    # -- a message's way

    @property
    def messages_left(self) -> int:
        """The number of messages that the window may still accept, also after IDLE or TIMEOUT."""
        if self.end_reason not in (None, End.IDLE, End.TIMEOUT) or self.state is WindowState.CLOSED:
            return 0
        return self.limits.max_messages - self.accepted if self.limits.max_messages else sys.maxsize

    def credit(self) -> int:
        """The number of messages that the source may request: while the store fails 0, or one batch as a probe.

        Example: a single message is in flight, and its write always fails. Nobody can tell whether the store or the
        message is to blame, and without another message nobody ever could. So one more may come: it is stored, the
        breaker closes, and the first one is requeued with a delay.
        """
        batcher = self.store_batcher
        if self.state is not WindowState.OPEN:
            return 0
        if not batcher.is_failing:
            return self.messages_left
        if self.pending_count:
            all_fail_alone = self.pending_count == batcher.lone_failure_count < MAX_LONE_FAILURES
            return min(1, self.messages_left) if all_fail_alone else 0
        return 0 if batcher.breaker.state is BreakerState.OPEN else min(self.messages_left, batcher.size)

    def accept(self, messages: list[Message]) -> None:
        """Takes messages; those beyond the limit stay in flight."""
        left = self.messages_left
        beyond_limit, messages = messages[left:], messages[:left]
        self.count_received(len(messages) if self.limits.has_successor else len(messages) + len(beyond_limit))
        self.beyond_limit += beyond_limit
        self.source.set_aside(beyond_limit)
        self.accepted += len(messages)
        self.pending_count += len(messages)
        self.records.waiting.extend(messages)
        self.map_records()

    def map_records(self) -> None:
        """Maps waiting messages, as many as may be decoded, and adds them to the batcher."""
        while True:
            fit, invalid = self.records.take_records(self.store_batcher.size)   # so that a full batch starts at once
            if invalid:
                self.reject_invalid(invalid)
            if fit:
                self.store_batcher.add_messages(fit)
            if not self.records.waiting or not (fit or invalid):   # no more wait, or no more may be decoded
                return

    def count_received(self, number: int) -> None:
        """Counts received messages."""
        self.outcome_counts['received'] += number
        self.pipeline.metrics.increment('xmsrv_received_total', number)

    def reject_invalid(self, messages: list[Message]) -> None:
        """Sends messages that can never become records to the dead letters; each has its `rejection`."""
        self.dead_letter_batcher.add_messages(messages)

    def settle(self, messages: list[Message], results: list[WriteResult]) -> list[Message]:
        """Acts on the results of a batch. Returns the messages to retry."""
        self.times.progress_at = asyncio.get_running_loop().time()
        retry: list[Message] = []
        for result, group in group_by_result(messages, results):
            retry += getattr(self, ACTIONS[result.outcome])(group, result) or ()
        self.map_records()
        return retry

    def finish(self, messages: list[Message], result: WriteResult) -> None:
        """Finishes settled messages."""
        self.outcome_counts[result.outcome] += len(messages)
        self.pipeline.metrics.add_settled(result, messages, time.time())
        self.failed_messages.discard(messages)
        self.uncount_pending(messages)
        self.source.finish(messages)

    def uncount_pending(self, messages: list[Message]) -> None:
        """Removes messages from those that are pending."""
        self.pending_count -= len(messages)
        self.records.decoded_bytes -= sum([message.size for message in messages])
        for message in messages:   # else it stays until its batch ends, beside the next ones that are decoded
            message.record = None

    def retry(self, messages: list[Message], result: WriteResult) -> list[Message]:
        """Lets the batcher retry the messages."""
        return messages

    def reject_by_store(self, messages: list[Message], result: WriteResult) -> None:
        """Makes dead letters of messages that the store can never accept."""
        for message in messages:
            message.rejection = InvalidMessage(result.reason, result.detail)
        self.reject_invalid(messages)

    def on_undecided(self, messages: list[Message], result: WriteResult) -> None:
        """Handles refused messages while no write has succeeded yet. Several refused messages: a policy is to blame.
        One alone: the message, from delivery REFUSALS_TO_REJECT on."""
        self.undecided_keys.update(message.key for message in messages)
        message = messages[0]
        key = message.record and message.record.key
        text = f'message {message.id.decode("ascii", "replace")}, key {key!r}: {result.detail}'
        # Example: a policy refuses every write. A second refused message shows it, and the window ends. But if one
        # message is refused alone, it is requeued, and its third delivery makes it a dead letter.
        if len(self.undecided_keys) > 1:
            self.on_store_stop(messages, WriteResult('stop', result.reason, text))
        elif message.attempts >= REFUSALS_TO_REJECT:
            self.reject_by_store(messages, WriteResult('rejected', 'rejected', result.detail))
        else:
            log.error('%s', text)
            if self.limits.has_successor:
                self.requeue_with_delay(messages, WriteResult('blamed', None, text))
            else:   # left in flight: requeued without delay when the window ends
                self.uncount_pending(messages)
                self.source.set_aside(messages)
                self.failed_messages.add(messages, End.STORE_FAILED)

    def on_set_full(self, messages: list[Message], result: WriteResult) -> None:
        """Their set takes no new record until an operator acts: requeues them, so that others go on."""
        log.error('%s', result.detail)
        self.requeue_with_delay(messages, result)

    def on_store_stop(self, messages: list[Message], result: WriteResult) -> None:
        """Ends the window, as the store accepts nothing until an operator acts; its messages are requeued."""
        if self.end_reason is not End.STORE_FAILED:
            log.error('%s; the window ends, its messages are requeued', result.detail)
        self.pipeline.health.report_failure('store', result.detail)
        self.uncount_pending(messages)
        self.end(End.STORE_FAILED, result.detail)

    def on_unkept(self, messages: list[Message], result: WriteResult) -> list[Message]:
        """Retries dead letters for SINK_RETRY_TIME if the sink is away, but only at their first delivery; requeues
        all others with a delay."""
        young = asyncio.get_running_loop().time() - SINK_RETRY_TIME
        retry = [message for message in messages
                 if result.reason == 'away' and message.attempts == 1 and message.received_at > young]
        self.requeue_with_delay([message for message in messages if message not in retry], result)
        return retry

    def requeue_with_delay(self, messages: list[Message], result: WriteResult) -> None:
        """Requeues messages that can't be settled now, with a delay that doubles with each delivery."""
        self.uncount_pending(messages)
        for attempts, group in group_by_key(messages, lambda message: message.attempts):
            first, most = REQUEUE_DELAYS
            self.source.requeue(group, min(most, first * 2 ** min(attempts - 1, 20)))
        self.failed_messages.add(messages, End.DEAD_LETTERS_FAILED if result.outcome == 'unkept' else End.STORE_FAILED)

    # -- its end

    def end(self, reason: End, detail: str = '') -> None:
        """Ends the window. The first reason stays, unless it drains and the new one does not."""
        if self.end_reason is None or (self.end_reason.drains and not reason.drains):
            self.end_reason, self.detail = reason, detail
        if not reason.drains:
            self.store_batcher.stop()
            self.dead_letter_batcher.stop()
        if self.state is WindowState.OPEN:
            self.state = WindowState.DRAINING
            self.times.draining_since = asyncio.get_running_loop().time()
            self.pipeline.tasks.wake.set()
            self.source.on_credit_change()

    async def run(self) -> None:
        """Accepts messages until the window ends, lets it drain, and closes it."""
        loop = asyncio.get_running_loop()
        self.times.started_at = self.times.timeout_since = self.times.active_at = loop.time()
        log.debug('window: begins, at most %s messages, %g s, idle %g s, %d in flight',
                  self.limits.max_messages or 'any number of', self.limits.timeout, self.limits.idle_timeout,
                  self.source.max_in_flight)
        with progress_bar(self) as show:
            carried_over = list(self.source.in_flight.values()) if self.limits.has_successor else []
            self.source.start(self.credit, self.accept)
            self.accept(carried_over)
            self.source.on_credit_change()
            await self.wait_until(lambda: show() or self.has_ended(loop.time()))
            log.debug('window: ends after %.2f s, %s; %d taken, %d under way',
                      self.times.draining_since - self.times.started_at, self.end_reason.text, self.accepted,
                      self.pending_count)
            await self.wait_until(lambda: show() or self.is_drained(loop.time()), bounded=True)
        self.close()
        self.times.seconds = loop.time() - self.times.started_at

    def has_ended(self, now: float) -> bool:
        """Ends the window when it is full, idle or out of time. Returns True once it has ended."""
        idle_since = self.source.idle_since
        # Example: idle-timeout is 0.5 s. The nsqds are idle since 2.8 s, and the last record is stored at 3.0 s: the
        # window ends at 3.5 s. A slow store does not make a window end as idle.
        if self.pending_count or idle_since is None:
            self.times.active_at = now
        exhausted = self.source.is_exhausted and not self.pending_count and not self.limits.has_successor
        if not self.messages_left and not self.pending_count:
            self.end(End.FULL)
        elif exhausted or now - self.times.active_at >= self.limits.idle_timeout:
            self.end(End.IDLE)
        elif now - self.times.timeout_since >= self.limits.timeout:
            self.end(End.TIMEOUT)
        return self.state is not WindowState.OPEN

    def is_drained(self, now: float) -> bool:
        """True when nothing under way can still succeed. A message may be on its way when RDY 0 is sent: with room for
        it, the window waits a tick, so that it need not be requeued."""
        at_rest = self.store_batcher.is_at_rest and self.dead_letter_batcher.is_at_rest
        failing = self.store_batcher.is_failing or self.dead_letter_batcher.is_failing or self.store_batcher.stopped
        return at_rest and (failing or not self.messages_left or now - self.times.draining_since >= TICK_INTERVAL)

    async def wait_until(self, condition: Callable[[], bool], bounded: bool = False) -> None:
        """Waits until the condition holds; bounded: or until a call hangs. Raises a task's error."""
        loop, tasks = asyncio.get_running_loop(), self.pipeline.tasks
        begun = loop.time()
        while not condition():
            if tasks.error:
                raise tasks.error
            # the dead letters' batcher is waited for if only it has calls and no signal came; else the store's
            store, letters = self.store_batcher, self.dead_letter_batcher
            batcher = letters if letters.calls and not store.calls and self.end_reason is not End.SIGNAL else store
            seconds = batcher.call_timeout + 0.5
            if bounded and loop.time() - max(begun, self.times.progress_at) > seconds:
                batcher.last_error = HANGING_TEXT % seconds
                if self.end_reason is End.SIGNAL:
                    log.error('%s: %s', batcher.backend, batcher.last_error)
                else:   # so that the window runner opens it anew, and waits until it can
                    self.pipeline.health.report_failure(batcher.backend, batcher.last_error)
                return
            self.report_hanging_calls(loop.time())
            tasks.wake.clear()
            await tasks.wake.wait()

    def close(self) -> None:
        """Decides the final End, and requeues all messages but those of the next window."""
        self.find_failure()
        self.store_batcher.stop()
        self.dead_letter_batcher.stop()
        self.state = WindowState.CLOSED
        kept = self.beyond_limit if self.limits.has_successor and self.end_reason.drains else []
        if self.limits.has_successor and not kept:
            self.count_received(len(self.beyond_limit))   # else the next window counts them
        keys = {message.key for message in kept}
        self.source.stop()
        self.source.requeue([message for key, message in self.source.in_flight.items() if key not in keys])

    def find_failure(self) -> None:
        """Ends by a failure, if any: of messages to be requeued, or of the queue."""
        for batcher, reason, what in ((self.store_batcher, End.STORE_FAILED, 'writes were'),
                                      (self.dead_letter_batcher, End.DEAD_LETTERS_FAILED, 'dead letters were')):
            if self.pending_count and (batcher.pending or batcher.retries or batcher.calls):
                last = f', last answer: {batcher.last_error}' if batcher.last_error else ''
                self.end(reason, f'{what} still failing when the window ended ({self.end_reason.text}){last}')
        for reason, what in ((End.STORE_FAILED, 'messages could not be stored'),
                             (End.DEAD_LETTERS_FAILED, 'dead letters could not be kept')):
            if number := self.failed_messages.count(reason):
                self.end(reason, f'{number} {what}')
        if self.limits.has_successor and not self.pipeline.health.is_up('queue'):
            self.end(End.QUEUE_FAILED, self.pipeline.health.errors['queue'].text)
        if self.pending_count and self.end_reason.drains:   # retries that wait for a delay
            self.end(End.STORE_FAILED, f'{self.pending_count} messages were to be tried again')

    def is_healthy(self, now: float) -> bool:
        """True unless a call hangs."""
        return not (self.store_batcher.is_hanging(now) or self.dead_letter_batcher.is_hanging(now))

    def report_hanging_calls(self, now: float) -> None:
        """Tells Health of a backend in which a call hangs, and no other succeeds; the next that does clears it."""
        for batcher in (self.store_batcher, self.dead_letter_batcher):
            is_silent = batcher.is_hanging(now) and now - batcher.succeeded_at > batcher.hanging_after
            if is_silent and self.pipeline.health.is_up(batcher.backend):
                self.pipeline.health.report_failure(batcher.backend, HANGING_TEXT % batcher.hanging_after)

    @property
    def count(self) -> dict[str, int]:
        """The number of messages received, and of each outcome."""
        return {**self.outcome_counts, 'requeued': self.source.requeued, 'late': self.source.late}

    @property
    def exit_status(self) -> int:
        """The exit status of `once` after this window."""
        return self.end_reason.exit_status

    @property
    def failed(self) -> bool:
        """True when the window ended because of a failure."""
        return self.exit_status != os.EX_OK

    def report_end(self) -> int:
        """Logs the summary and why the window failed. `once` closes the connections before, as nsqd may refuse answers
        until then. Returns the exit status."""
        self.pipeline.metrics.record_window(self)
        fields = {'topic': self.source.topic, 'channel': self.source.channel,
                  'outcome': 'failed' if self.failed else 'done'}
        self.log_summary(fields)
        if self.failed:
            reason = self.detail or self.end_reason.text
            extra = {'fields': fields, 'kind': f'failed window: {self.end_reason}'}
            if self.count['requeued']:
                log.error('requeued %d messages: %s', self.count['requeued'], reason, extra=extra)
            else:
                log.error('the window failed: %s', reason, extra=extra)
        return self.exit_status

    def log_summary(self, fields: dict[str, Any]) -> None:
        """Logs the summary; as a warning when messages were requeued without a failure, because something is slow. An
        outage of the queue fails each window: there an empty one is logged with -v only."""
        seconds = self.times.seconds
        counts = ', '.join(f'{name} {number}' for name, number in self.count.items())
        slow = self.end_reason in (End.IDLE, End.TIMEOUT) and self.count['requeued'] > 0
        level = (logging.WARNING if slow and not self.requeues_on_purpose else
                 NOTICE if any(self.count.values()) or self.failed and self.end_reason is not End.QUEUE_FAILED
                 else self.empty_level)
        log.log(level, '[%s/%s] %s in %.2f s', self.source.topic, self.source.channel, counts, seconds,
                extra={'fields': {**fields, **self.count, 'seconds': round(seconds, 2)}})


@contextlib.contextmanager
def progress_bar(window: Window) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, for a window of more than a second; yields a function that redraws it."""
    if window.limits.has_successor or not sys.stderr or not sys.stderr.isatty() or log.level > logging.INFO:
        yield lambda: None
        return
    import tqdm  # here: only a terminal needs it

    most = window.limits.max_messages or None
    with tqdm.tqdm(total=most, unit='msg', delay=1, leave=False, desc=window.source.topic) as bar:
        yield lambda: bar.update(window.accepted - bar.n) and None


# ---------------------------------------------------------------------------------------------------------------------
# pipeline and once: queue and store opened, and one window
# ---------------------------------------------------------------------------------------------------------------------

WINDOW_GRACE = 5.0          # seconds for the end of a window after its timeout, before systemd may kill `once`


@dataclasses.dataclass(slots=True)
class Pipeline:
    """An open source, an open store, and the other objects that windows share. sink: None in a replay, where dead
    letters stay in the source."""

    config: types.SimpleNamespace
    source: Source
    store: Store
    executor: StoreExecutor
    sink: DeadLetterSink | None
    tasks: BackgroundTasks
    metrics: Metrics
    health: Health

    async def write(self, messages: list[Message]) -> list[WriteResult]:
        """Writes the records of messages in a thread of the store. Returns the result of each."""
        loop = asyncio.get_running_loop()
        begun, records = loop.time(), typing.cast(list[Record], [message.record for message in messages])
        try:
            results = await loop.run_in_executor(self.executor, self.store.write, records)
        except StoreError as error:
            results = [WriteResult('retry' if error.retryable else 'stop', 'down', str(error))] * len(messages)
        self.metrics.record_batch(len(messages), loop.time() - begun, results)
        return results


@contextlib.asynccontextmanager
async def open_pipeline(config: types.SimpleNamespace, store: Store, new_source: Callable[[BackgroundTasks], Any],
                        metrics: Metrics, health: Health,
                        sink: DeadLetterSink | None = None) -> AsyncIterator[Pipeline]:
    """Opens the store, then the source made by `new_source(tasks)`; yields a Pipeline, and closes everything at the
    end. Raises Unavailable when one of them can't be reached; then no message was received."""
    loop, tasks = asyncio.get_running_loop(), BackgroundTasks()
    executor = StoreExecutor(store.writers, thread_name_prefix=f'{THREAD_PREFIX}-store')
    source = new_source(tasks)
    try:
        await loop.run_in_executor(executor, store.open)
        await source.open()
        yield Pipeline(config, source, store, executor, sink, tasks, metrics, health)
    except StoreError as error:
        raise StoreUnavailable(str(error)) from None
    finally:
        await run_uninterrupted(close_pipeline(source, store, executor, sink, tasks))


async def close_pipeline(source: Any, store: Store, executor: StoreExecutor, sink: DeadLetterSink | None,
                         tasks: BackgroundTasks) -> None:
    """Requeues what is in flight, closes source and store, within a few seconds even if a call hangs."""
    if sink:
        sink.close()
    source.stop()   # RDY 0, for an error skips Window.close(): else nsqd would deliver them here again
    if source.in_flight:
        source.requeue(list(source.in_flight.values()))
    await source.close()
    await tasks.cancel()
    await close_store(store, executor)


async def run_uninterrupted(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end even if this task is cancelled meanwhile; the cancellation is raised afterwards."""
    task, cancelled = asyncio.ensure_future(coroutine), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled:
        raise cancelled


def topic_pipeline(config: types.SimpleNamespace, store: Store, metrics: Metrics,
                   health: Health) -> AbstractAsyncContextManager[Pipeline]:
    """The pipeline from the nsqds of the configuration to its store."""
    options = ConnectionOptions(config)
    return open_pipeline(
        config, store, lambda tasks: Consumer(config, tasks, options, config.nsq.topic, config.nsq.channel, health),
        metrics, health, DeadLetterSink(config, options))


async def run_once(config: types.SimpleNamespace, stopper: 'SignalHandler', metrics: Metrics) -> int:
    """Runs one window. Returns the exit status."""
    health, store = Health(), STORES[config.store](config)
    connecting = HANDSHAKE_STEPS * config.nsq.connect_timeout
    SystemdNotifier().send_fields(EXTEND_TIMEOUT_USEC=int((connecting + config.timeout + store.call_timeout
                                                           + WINDOW_GRACE) * 1e6))
    async with topic_pipeline(config, store, metrics, health) as pipeline:
        limits = WindowLimits(config.nsq.max_messages, config.timeout, config.idle_timeout)
        window = stopper.window = Window(pipeline, limits, Mapper(config))
        await window.run()
        metrics.record_backends(health.backend_states)
        metrics.record_consumer(pipeline.source)
        if config.metrics.textfile and config.metrics.depth_interval:
            await note_depths(config, metrics)
    return window.report_end()


async def note_depths(config: Any, metrics: Metrics) -> dict[str, ChannelDepth]:
    """Asks the nsqds what still waits, and sets the gauges. Returns the answers."""
    found = await channel_depths(config, config.nsq.topic, config.nsq.channel)
    metrics.set_depths({nsqd: depth.waiting for nsqd, depth in found.items()})
    return found


class SignalHandler:
    """Handles SIGTERM and SIGINT: stops `window`, or cancels the task before there is one."""

    def __init__(self) -> None:
        self.window: Any = None   # a Window, or something else that has a stop()
        self.task = asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)

    def stop(self) -> None:
        """Handles a signal; a second one has no effect."""
        if isinstance(self.window, Window):
            self.window.end(End.SIGNAL)
        elif self.window:
            self.window.stop()
        elif self.task:
            self.task.cancel()


LOCK_NAME = 50              # characters of a configuration's name in that of its lock: a file name has 255 bytes
LOCK_HASH = 12              # hexadecimal digits


class RunLock:
    """The lock by which `once` and `daemon` of one configuration exclude each other: NAME-HASH.lock in state-dir, for
    NAME.conf. HASH is that of the real path: two names of one file share a lock, two files of one name do not. The file
    holds the pid of the holder and the real path. It is not in the runtime directory: systemd removes that with the
    first unit that ends."""

    def __init__(self, config: types.SimpleNamespace, filename: str) -> None:
        self.filename, self.state_dir = real_path(filename), config.state_dir
        name = os.path.basename(self.filename).removesuffix('.conf')[:LOCK_NAME]
        digest = hashlib.sha256(os.fsencode(self.filename)).hexdigest()[:LOCK_HASH]
        self.path = os.path.join(config.state_dir, f'{name}-{digest}.lock')
        self.fd: int | None = None

    def try_acquire(self) -> str | None:
        """Returns None, or the pid of another holder as text. Raises Unavailable when the file can't be locked."""
        try:
            os.makedirs(self.state_dir, mode=0o750, exist_ok=True)
            self.fd = fd = open_locked(self.path, os.O_RDWR | os.O_CREAT, 0)
        except BlockingIOError:
            return self.holder_pid()
        except OSError as error:   # also of a file system that has no locks
            rule = state_dir_fault(self.state_dir) or f'{self.path}: {error.strerror}'
            raise Unavailable(f'{self.filename}: {Fault("", "state-dir", self.state_dir, rule)}') from None
        with contextlib.suppress(OSError):   # on a full disk it is a lock even without its text
            os.ftruncate(fd, 0)
            os.pwrite(fd, f'{os.getpid()}\n'.encode() + os.fsencode(self.filename) + b'\n', 0)
        return None

    def holder_pid(self) -> str:
        """The pid of the holder, as text."""
        try:
            with open(open_regular(self.path, os.O_RDONLY), 'rb') as file:
                return file.readline(32).decode('ascii', 'replace').strip() or 'unknown'
        except OSError:   # it has ended meanwhile
            return 'unknown'

    @property
    def is_held(self) -> bool:
        """True while this process holds the lock and its path still names it."""
        return self.fd is not None and is_in_place(self.fd, self.path)

    def release(self) -> None:
        """Releases the lock. The file stays: removing it could take it from the next holder."""
        if self.fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)
            os.close(self.fd)
            self.fd = None


def state_dir_fault(path: str) -> str | None:
    """Why no lock can be made in this state-dir; None when one can. A missing directory is made with the lock."""
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK):
        return None
    rule = 'not writable' if os.path.isdir(there) else 'not a directory'
    return rule if there == path else f'cannot be created: {there} is {rule}'


def real_path(filename: str) -> str:
    """The absolute path of a file without symbolic links. A pipe has no such path (/dev/fd/63 becomes pipe:[N],
    different for each process): its name is used as given."""
    return os.path.realpath(filename) if os.path.isfile(filename) else os.path.abspath(filename)


@contextlib.contextmanager
def hold_run_lock(config: types.SimpleNamespace, filename: str) -> Iterator[None]:
    """Holds the lock of a configuration, for `once`. Raises AlreadyRunning with the pid of another holder."""
    lock = RunLock(config, filename)
    if holder := lock.try_acquire():
        raise AlreadyRunning(f'another x-msrv has this configuration: process {holder} ({lock.path})')
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# replay: dead letters once more, under their first key
# ---------------------------------------------------------------------------------------------------------------------

class ReplayFilter(collections.namedtuple('ReplayFilter', 'reasons since limit rate', defaults=((), 0, 0, 0))):
    """The options of a replay: dead letters with one of `reasons` (none: any), published at `since` or later (ns since
    1970), at most `limit` of them (0: all), `rate` a second (0: without limit)."""

    @property
    def is_filtering(self) -> bool:
        """True when the filter may exclude a dead letter."""
        return bool(self.reasons or self.since)


class ReplayMapper(Mapper):
    """Builds the record of the message inside a dead letter, with the key and time of its first delivery."""

    def __init__(self, config: types.SimpleNamespace, decode_letter: DeadLetterDecoder) -> None:
        super().__init__(config)
        self.decode_letter = decode_letter

    def build_record(self, message: Message) -> Record:
        """Raises InvalidMessage, also for a message that is no dead letter."""
        return super().build_record(self.decode_letter(message.body)[1])


class Replay(Window):
    """A pass over the dead letters: what fails again, or does not pass `replay_filter`, is set aside and requeued at
    the end. The pass lasts while dead letters come or are settled: `timeout` counts from the last of either. A failed
    batch does not count, so in an outage the pass ends."""

    requeues_on_purpose, empty_level = True, logging.INFO   # a user waits

    def __init__(self, pipeline: Pipeline, decode_letter: DeadLetterDecoder, replay_filter: ReplayFilter) -> None:
        config = pipeline.config
        super().__init__(pipeline, WindowLimits(replay_filter.limit, config.timeout, config.idle_timeout),
                         ReplayMapper(config, decode_letter))
        self.decode_letter, self.replay_filter = decode_letter, replay_filter
        self.filtered_count = 0        # messages that the filter excluded
        self.next_write = 0.0          # loop time at which the next batch may be written, by `rate`
        if replay_filter.rate:   # ten batches a second, one after the other
            batcher = self.store_batcher
            batcher.write, batcher.writers = self.write_at_rate, 1
            batcher.size = min(batcher.size, max(1, replay_filter.rate // 10))

    def accept(self, messages: list[Message]) -> None:
        """Accepts the dead letters that pass the filter."""
        super().accept(self.select_messages(messages))

    def select_messages(self, messages: list[Message]) -> list[Message]:
        """The messages that pass the filter; the others are set aside."""
        self.times.timeout_since = asyncio.get_running_loop().time()
        groups = dict(group_by_key(messages, self.is_selected))
        others = list(groups.get(False, ()))
        self.source.set_aside(others)
        self.filtered_count += len(others)
        self.count_received(len(others))
        return list(groups.get(True, ()))

    def is_selected(self, message: Message) -> bool:
        """True when a message passes the filter. Without a filter all do; with one, only dead letters can: another
        message has no reason and no time."""
        wanted = self.replay_filter
        if not wanted.is_filtering:
            return True
        try:
            header, first = self.decode_letter(message.body)
        except InvalidMessage:
            return False
        return (not wanted.reasons or header['reason'] in wanted.reasons) and first.timestamp >= wanted.since

    async def write_at_rate(self, messages: list[Message]) -> list[WriteResult]:
        """Writes a batch, at the time that the rate allows."""
        now = asyncio.get_running_loop().time()
        begin = max(now, self.next_write)
        self.next_write = begin + len(messages) / self.replay_filter.rate
        await asyncio.sleep(begin - now)
        return await self.pipeline.write(messages)

    def reject_invalid(self, messages: list[Message]) -> None:
        """Holds and logs messages that stay dead letters."""
        for message in messages:   # each was asked for
            name = describe_letter(message, self.decode_letter)['id']   # as --list has it
            log.log(NOTICE, '%s stays a dead letter: %s', terminal_safe(name), terminal_safe(str(message.rejection)))
        self.uncount_pending(messages)
        self.source.set_aside(messages)
        self.times.timeout_since = asyncio.get_running_loop().time()

    def finish(self, messages: list[Message], result: WriteResult) -> None:
        """Finishes durable messages."""
        super().finish(messages, result)
        self.times.timeout_since = asyncio.get_running_loop().time()

    def log_summary(self, fields: dict[str, Any]) -> None:
        """Logs the summary of the replay, and the number of dead letters excluded by the filter."""
        super().log_summary(fields)
        if self.filtered_count:
            most = f' (of a topic, at most max-in-flight = {self.source.max_in_flight} can be held)'
            log.info('%d of them were excluded by --reason or --since and stay dead letters%s', self.filtered_count,
                     most if self.decode_letter is decode_topic else '')


class ReplayListing(Replay):
    """A replay that only lists: `letters` are the dead letters that pass the filter; all are requeued at the end."""

    def __init__(self, pipeline: Pipeline, decode_letter: DeadLetterDecoder, replay_filter: ReplayFilter) -> None:
        super().__init__(pipeline, decode_letter, replay_filter)
        self.letters: list[Message] = []
        self.source.max_in_flight = max(self.source.max_in_flight, self.replay_filter.limit)

    def accept(self, messages: list[Message]) -> None:
        """Keeps the dead letters for the list."""
        chosen = self.select_messages(messages)
        self.source.set_aside(chosen)
        chosen = chosen[:self.messages_left]
        self.accepted += len(chosen)
        self.letters += chosen


class DeadLetterFileSource:
    """The file of dead letters as a Source.

    Each line is the body of a Message, whose key contains the line's number and checksum: rewrite_file() drops a line
    only if both are those of a stored message. Until the replay is over no line of it changes. Then rewrite_file()
    writes a new file and renames it over the old one, under the writers' lock; the lock of the new file excludes a
    second replay. stored_keys: keys of stored dead letters; failed: key -> its new InvalidMessage. new_file: None
    when only listing.
    """

    idle_since = None           # it never gets idle: it ends

    def __init__(self, config: types.SimpleNamespace, tasks: BackgroundTasks, path: str, read_only: bool) -> None:
        self.tasks, self.topic, self.channel, self.read_only = tasks, path, REPLAY_CHANNEL, read_only
        self.max_in_flight, self.max_held = config.nsq.max_in_flight, config.nsq.max_held
        self.credit: Callable[[], int] | None = None
        self.deliver: Callable[[list[Message]], None] | None = None
        self.new_file: Any = None
        self.tmp_path = f'{path}.replay'   # of the new file, until it replaces the old one
        self.in_flight: dict[str, Message] = {}
        self.held_bytes = 0
        self.requeued = self.late = 0
        self.stored_keys: set[str] = set()
        self.failed: dict[str, InvalidMessage] = {}
        self.read_all = False
        self.files = contextlib.ExitStack()

    def __str__(self) -> str:
        return self.topic

    async def open(self) -> None:
        """Opens the file up to its current end; under its lock no writer is in the middle of a line. Raises
        Unavailable."""
        try:
            if not self.read_only:
                fd = open_locked(self.tmp_path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0)
                self.new_file = self.files.enter_context(os.fdopen(fd, 'wb'))
            fd = open_locked(self.topic, os.O_RDONLY, LOCK_TIMEOUT)
            self.file = self.files.enter_context(os.fdopen(fd, 'rb'))
            was = os.fstat(fd)
            self.size = was.st_size
            fcntl.flock(fd, fcntl.LOCK_UN)
            if self.new_file:
                self.copy_owner_and_mode(was)
        except OSError as error:
            busy = isinstance(error, BlockingIOError) and not (self.read_only or self.new_file)
            text = 'another replay has locked it' if busy else error.strerror
            raise Unavailable(f'{error.filename or self}: {text}') from None
        self.tasks.start(self.feed_window(self.read_messages()))

    def copy_owner_and_mode(self, was: os.stat_result) -> None:
        """Copies owner and mode of the old file to the new one, while it is empty."""
        fd = self.new_file.fileno()
        self.new_file.truncate()    # a killed replay may have left content
        now = os.fstat(fd)
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(fd, was.st_uid, was.st_gid)
        os.fchmod(fd, was.st_mode & 0o7777)

    def read_messages(self) -> Iterator[Message]:
        """Yields each line as a Message."""
        self.file.seek(0)
        number, left = 0, self.size
        while line := self.file.readline(left):
            number, left = number + 1, left - len(line)
            yield Message(self, b'line %d' % number, 0, 1, line)   # the time is in the letter

    # -- what a window reads from

    async def feed_window(self, messages: Iterator[Message]) -> None:
        """Delivers all lines, as fast as the window accepts them."""
        while True:
            room = self.free_slots()
            lines = list(itertools.islice(messages, room))
            self.read_all = self.read_all or len(lines) < room
            letters = [message for message in lines if message.body.strip()]   # a blank line is no dead letter
            if letters:
                assert self.deliver, 'without a window there is no room'
                self.in_flight.update((message.key, message) for message in letters)
                self.held_bytes += sum(len(message.body) for message in letters)
                self.deliver(letters)
            self.tasks.wake.set()
            await asyncio.sleep(0 if lines else TICK_INTERVAL)

    def free_slots(self) -> int:
        """The number of lines that may be delivered now."""
        if not self.credit or self.held_bytes >= self.max_held:
            return 0
        return max(0, min(self.credit(), self.max_in_flight - len(self.in_flight), 500))

    @property
    def is_exhausted(self) -> bool:
        """True when all lines are read and answered."""
        return self.read_all and not self.in_flight

    def start(self, credit: Callable[[], int], deliver: Callable[[list[Message]], None]) -> None:
        """Starts to deliver lines."""
        self.credit, self.deliver = credit, deliver

    def stop(self) -> None:
        """Stops delivering."""
        self.credit = self.deliver = None

    def on_credit_change(self) -> None:
        """Nothing to do: feed_window() reads the credit itself."""

    def finish(self, messages: list[Message]) -> None:
        """Marks dead letters that leave the file."""
        self.stored_keys.update(message.key for message in self.pop_in_flight(messages))

    def requeue(self, messages: list[Message], delay: float = 0) -> None:
        """Marks dead letters that stay in the file; those that failed again get a history."""
        messages = self.pop_in_flight(messages)
        self.failed.update((message.key, message.rejection) for message in messages if message.rejection)
        self.requeued += len(messages)

    set_aside = requeue

    def pop_in_flight(self, messages: list[Message]) -> list[Message]:
        """Removes messages from `in_flight`. Returns those that were in it."""
        messages = [message for message in messages if self.in_flight.pop(message.key, None)]
        self.held_bytes -= sum(len(message.body) for message in messages)
        return messages

    # -- the new file

    def rewrite_file(self) -> None:
        """Writes the file anew without the stored dead letters. After an OSError they may stay, and the next replay
        stores them again under the same keys. Most is written before the lock, for which writers wait."""
        if not self.new_file or not (self.stored_keys or self.failed):
            return
        self.new_file.writelines(self.rewritten_line(message) for message in self.read_messages())
        self.sync_new_file()
        lock_file(self.file.fileno(), LOCK_TIMEOUT)
        if not is_in_place(self.file.fileno(), self.topic) or os.fstat(self.file.fileno()).st_size < self.size:
            raise OSError(errno.ESTALE, 'it was replaced or truncated meanwhile')
        self.file.seek(self.size)
        shutil.copyfileobj(self.file, self.new_file)   # what came meanwhile
        self.sync_new_file()
        os.rename(self.tmp_path, self.topic)
        sync_directory(os.path.dirname(self.topic))

    def sync_new_file(self) -> None:
        """Flushes and fsyncs the new file."""
        self.new_file.flush()
        os.fsync(self.new_file.fileno())

    def rewritten_line(self, message: Message) -> bytes:
        """The line of the new file for a line of the old one; empty for a stored dead letter."""
        if message.key in self.stored_keys:
            return b''
        if message.key in self.failed:
            with contextlib.suppress(InvalidMessage):   # what is no letter has no history
                header, first = decode_line(message.body)
                return encode_line(with_history(header, self.failed[message.key]), first.body)
        return message.body

    async def close(self) -> None:
        """Closes and so unlocks the files, and removes a new file that did not replace the old one."""
        with contextlib.suppress(OSError):   # a full disk has been reported
            if self.new_file and is_in_place(self.new_file.fileno(), self.tmp_path):
                os.unlink(self.tmp_path)
            self.files.close()


def replay_pipeline(config: types.SimpleNamespace, path: str | None, store: Store,
                    read_only: bool = False) -> AbstractAsyncContextManager[Pipeline]:
    """The pipeline from the dead letters to a store: from the file at `path`, or without one from the topic."""
    health = Health()

    def new_source(tasks: BackgroundTasks) -> Source:
        if path:
            return DeadLetterFileSource(config, tasks, path, read_only)
        return Consumer(config, tasks, ConnectionOptions(config), config.dead_letter.topic, REPLAY_CHANNEL, health)
    return open_pipeline(config, store, new_source, NullMetrics(), health)


async def run_replay(config: types.SimpleNamespace, stopper: SignalHandler, path: str | None,
                     replay_filter: ReplayFilter) -> int:
    """Replays dead letters, and removes those of a file that are stored. Returns the exit status."""
    async with replay_pipeline(config, path, STORES[config.store](config)) as pipeline:
        window = stopper.window = Replay(pipeline, decode_line if path else decode_topic, replay_filter)
        await window.run()
        fault = None
        try:
            if isinstance(pipeline.source, DeadLetterFileSource):
                pipeline.source.rewrite_file()
        except OSError as error:
            fault = error.strerror
    status = window.report_end()
    if fault:   # even where a signal ended the window
        log.error('%s: not safely written anew, the next replay may take its letters again: %s', path, fault)
    return status or (os.EX_TEMPFAIL if fault else os.EX_OK)


async def list_dead_letters(config: types.SimpleNamespace, stopper: SignalHandler, path: str | None,
                            replay_filter: ReplayFilter, arguments: argparse.Namespace) -> int:
    """Prints the dead letters, with --dry-run also what would become of them. Returns the exit status."""
    topic, decode_letter = path or config.dead_letter.topic, decode_line if path else decode_topic
    depth = count_letters(path) if path else await total_depth(config, topic, REPLAY_CHANNEL)
    async with replay_pipeline(config, path, Store(), read_only=True) as pipeline:
        listing = stopper.window = ReplayListing(pipeline, decode_letter, replay_filter)
        await listing.run()
    fates: collections.Counter[str | bool] = collections.Counter()
    for message in listing.letters:
        told = describe_letter(message, decode_letter)
        if arguments.dry_run:
            told.update(predict_outcome(message, listing.records.mapper))
            fates['deletes' if 'deletes' in told else told['passes']] += 1
        print(json.dumps(told) if arguments.json else format_listing(told))
    shown = len(listing.letters)
    first = f'{shown} of the first {shown + listing.filtered_count}' if replay_filter.is_filtering else f'first {shown}'
    deletes = f'{fates["deletes"]} would delete their records, ' if fates['deletes'] else ''
    fate = f'{fates[True]} would be stored, {deletes}{fates[False]} would stay; ' if arguments.dry_run else ''
    end = f'{fate}{first} of depth {"unknown" if depth is None else depth} in {topic}'
    if arguments.json:
        log.info('%s', end)
    else:
        print(end)
    return os.EX_OK


def describe_letter(message: Message, decode_letter: DeadLetterDecoder) -> dict[str, Any]:
    """Describes a dead letter for JSON; `age`: seconds since it was published, `body`: its first characters."""
    try:
        header, first = decode_letter(message.body)
    except InvalidMessage as rejection:
        return {'reason': 'unreadable', 'detail': rejection.detail, 'id': message.id.decode(),
                'body': body_excerpt(message.body)}
    return {'reason': header['reason'], 'detail': header.get('detail'),
            'age': round(max(0.0, time.time() - first.timestamp / 1e9), 3), 'key': header.get('key'),
            'id': header['id'], 'nsqd': header.get('nsqd'), 'attempts': first.attempts,
            'timestamp': str(first.timestamp), 'body': body_excerpt(first.body)}


def predict_outcome(message: Message, mapper: Mapper) -> dict[str, Any]:
    """`passes`: whether the mapper takes a letter now; else `why`; `deletes`: it would delete a record."""
    try:
        record = mapper.build_record(message)
    except InvalidMessage as rejection:
        return {'passes': False, 'why': str(rejection)}
    return {'passes': True, 'deletes': True} if isinstance(record, Deletion) else {'passes': True}


def body_excerpt(body: bytes) -> str:
    """The first bytes of a body as text."""
    return truncate_text(body[:80].decode('utf-8', 'backslashreplace'), 60)


def format_listing(told: dict[str, Any]) -> str:
    """A line of the list: id, age, reason, detail and the first bytes of the body; or what would become of it."""
    words = {name: terminal_safe(str(value)) for name, value in told.items()}
    if 'passes' in told:
        passes = 'would delete its record' if 'deletes' in told else 'would be stored'
        return f'{words["id"]:16}  ' + (passes if told['passes'] else f'would stay: {words["why"]}')
    if 'age' not in told:
        return f'{words["id"]:16}  unreadable  {words["detail"]}'
    return f'{words["id"]:16}  {format_age(told["age"]):>4}  {words["reason"]}: {words["detail"]}  {words["body"]}'


def count_letters(path: str) -> int:
    """The lines of a file that are not blank. Raises Unavailable."""
    try:
        with open(open_regular(path, os.O_RDONLY), 'rb') as file:
            return sum(bool(line.strip()) for line in file)
    except OSError as error:
        raise Unavailable(f'{path}: {error.strerror}') from None


def format_age(seconds: float) -> str:
    """A duration in its largest unit."""
    unit, length = next(((u, s) for u, s in (('d', 86400), ('h', 3600), ('m', 60)) if seconds >= s), ('s', 1))
    return f'{seconds / length:.0f}{unit}'


# ---------------------------------------------------------------------------------------------------------------------
# window runner: one window after the other, in this process
# ---------------------------------------------------------------------------------------------------------------------

START_TOLERANCE = 0.05      # seconds by which a start may be late and still count as on time
RECOVERY_TICK = 0.5         # seconds between two checks of clear_errors_when_idle()
LETTER_RETURN_TIME = REQUEUE_DELAYS[1] + 5.0   # seconds after which a dead letter that was given back has come again


class Schedule:
    """The start times of windows: every `period` seconds, without drift. Missed windows are skipped. A late start
    begins the period anew, so there are never two windows in one period."""

    def __init__(self, period: float) -> None:
        self.period, self.last_start = period, -math.inf

    def seconds_to_start(self, now: float) -> float:
        """Seconds to the next start."""
        return max(0.0, self.last_start + self.period - now)

    def start_period(self, now: float) -> None:
        """A window starts now."""
        # Example: a period of 10 s, the last start at 100.0 s. A start at 110.03 counts as 110.0, and the next one is
        # due at 120.0: no drift. A start at 113.0 (the window took long) counts as 113.0, and the next one is due at
        # 123.0.
        due = self.last_start + self.period
        self.last_start = due if now - due <= START_TOLERANCE else now

    def on_late_start(self, began: float) -> None:
        """A window of this period began only then: the period begins anew."""
        if began - self.last_start > START_TOLERANCE:
            self.last_start = began


class WindowRunner:
    """Runs windows in this process, one for each grant, on connections that stay open. It waits while queue or store
    can't be opened.

    wait_for_grant: async, waits until a window may begin and returns its max-messages. on_window_end: called with each
    window that has ended.
    """

    def __init__(self, config: types.SimpleNamespace, metrics: Metrics, wait_for_grant: Callable[[], Awaitable[int]],
                 on_window_end: Callable[[Window], None]) -> None:
        self.config, self.metrics = config, metrics
        self.wait_for_grant, self.on_window_end = wait_for_grant, on_window_end
        self.endless = config.endless
        self.health = Health()
        self.backoff = Backoff(1, 30)
        self.pipeline: Any = None   # the Pipeline, whose source is a Consumer
        self.window: Window | None = None
        self.task: asyncio.Task[None] | None = None
        self.end_reason: End | None = None   # set once the runner has to end

    async def run(self) -> int:
        """Runs until end_by(). Returns the exit status."""
        self.task = asyncio.ensure_future(self.run_until_ended())
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        return os.EX_OK

    async def run_until_ended(self) -> None:
        """Opens queue and store and runs windows; again with backoff when one is down."""
        while not self.end_reason:
            try:
                await self.run_windows()
            except Unavailable as error:
                self.health.report_failure('store' if isinstance(error, StoreUnavailable) else 'queue', str(error))
            if not self.end_reason:
                await asyncio.sleep(self.backoff.next_delay())

    async def run_windows(self) -> None:
        """Runs windows on one set of connections, until the end or until the store fails in one: then Health knows
        why. Raises Unavailable when queue or store is away."""
        store = STORES[self.config.store](self.config)
        async with topic_pipeline(self.config, store, self.metrics, self.health) as pipeline:
            self.pipeline = pipeline
            self.health.report_recovery('queue')
            try:
                while not self.end_reason:
                    window = await self.run_window(await self.wait_for_grant(), pipeline)
                    if window.end_reason is End.STORE_FAILED and not self.health.is_up('store'):
                        break
                    self.backoff.reset_delay()
            finally:
                self.pipeline = None

    async def run_window(self, max_messages: int, pipeline: Pipeline) -> Window:
        """Runs a window to its end; returns it."""
        config = self.config
        timeout, idle_timeout = (math.inf, math.inf) if self.endless else (config.timeout, config.idle_timeout)
        limits = WindowLimits(max_messages, timeout, idle_timeout, has_successor=True)
        self.window = window = Window(pipeline, limits, Mapper(config))
        if self.end_reason:
            window.end(self.end_reason)
        clearing = pipeline.tasks.start(self.clear_errors_when_idle(pipeline.source))
        await window.run()
        clearing.cancel()
        if window.end_reason is End.IDLE:
            self.clear_errors()
        self.window = None
        window.report_end()
        self.on_window_end(window)
        return window

    async def clear_errors_when_idle(self, source: Source) -> None:
        """Clears failures each RECOVERY_TICK while the queue is idle, as no batch does."""
        while True:
            await asyncio.sleep(RECOVERY_TICK)
            if source.idle_since is not None and self.window and not self.window.pending_count:
                self.clear_errors()

    def clear_errors(self) -> None:
        """Clears the failure of the store, whose connection has to be enough, as nothing waits for it; and that of the
        dead letters when each that was given back has had time to come again: others must have settled it.

        Example: of two workers, one could not keep a dead letter and gave it back; the other one got it, and kept it.
        Nothing ever comes to the first that could tell it so.
        """
        self.health.report_recovery('store')
        failure = self.health.errors.get('dead letters')
        if failure and asyncio.get_running_loop().time() - failure.last > LETTER_RETURN_TIME:
            self.health.report_recovery('dead letters')

    def end_by(self, reason: End) -> None:
        """Ends the open window by `reason`, and then the runner; without a window, cancels the current wait."""
        self.end_reason = reason
        if self.window:
            self.window.end(reason)
        elif self.task:
            self.task.cancel()

    def stop(self) -> None:
        """Requeues the messages that are not being stored, and ends."""
        self.end_by(End.SIGNAL)

    def end_after_window(self) -> None:
        """Ends after the open window has drained."""
        self.end_by(End.RELOAD)

    @property
    def failure_text(self) -> str:
        """What fails, in words."""
        return '; '.join(describe_failures(self.backend_failures))

    @property
    def backend_failures(self) -> dict[str, str]:
        """Why each of BACKENDS is down that is. The queue can be down without a failure: nsqlookupd names no nsqd."""
        failures = self.health.failures
        if 'queue' not in failures and self.backend_states['queue'] is BackendState.DOWN:
            failures['queue'] = ('no nsqd is connected' if self.pipeline.source.addresses else
                                 f'no nsqd has the topic {self.config.nsq.topic} yet')
        return failures

    @property
    def connections(self) -> dict[str, tuple[int, int, str]]:
        """{nsqd: (number of connections that are up, messages in flight, last error)} of all known nsqds."""
        if not self.pipeline:
            return {}
        source = self.pipeline.source
        up = {connection.address: connection for connection in source.connections}
        return {format_address(address): (int(address in up), up[address].in_flight if address in up else 0,
                                          source.connect_errors.get(address) or '') for address in source.addresses}

    @property
    def backend_states(self) -> dict[str, BackendState]:
        """The state of each of BACKENDS. Without a pipeline, those that do not fail are closed, or just being opened.

        Example: the store failed in a window, and `backoff` waits to open both again. The store is DOWN, the queue
        is CLOSED: nobody has to look after nsqd.
        """
        states = self.health.backend_states
        if self.pipeline and not self.pipeline.source.connections:
            states['queue'] = BackendState.DOWN
        elif not self.pipeline:
            unopened = BackendState.CLOSED if self.health.errors else BackendState.STARTING
            states |= {backend: unopened for backend in ('queue', 'store') if self.health.is_up(backend)}
        return states

    def is_healthy(self, now: float) -> bool:
        """True unless a call of a batcher hangs; that this returns at all proves that the loop runs."""
        return not self.window or self.window.is_healthy(now)

    def current_metrics(self) -> list[Snapshot]:
        """The metrics as of now."""
        metrics = self.metrics
        if self.window:
            metrics.sync_counts(self.window)
            # without end, it succeeds while all backends are up
            if self.endless and set(self.backend_states.values()) == {BackendState.UP}:
                metrics.set_gauge(LAST_SUCCESS, time.time())
        if self.pipeline:
            metrics.record_consumer(self.pipeline.source)
        else:
            metrics.record_disconnected()
        metrics.record_backends(self.backend_states)
        return [metrics.take_snapshot()]


# ---------------------------------------------------------------------------------------------------------------------
# supervisor: the worker processes of a daemon
# ---------------------------------------------------------------------------------------------------------------------

WORKER_STATUS_INTERVAL = 0.5   # seconds between two status lines of a worker
WORKER_SILENCE = 5.0           # seconds without a status line after which a worker counts as unresponsive
WORKER_KILL_TIME = 30.0        # seconds after which it is killed: half of WatchdogSec, by which systemd ends the daemon
WORKER_STABLE_TIME = 10.0      # seconds that a worker has to run, for its exit not to count as a failed start
MAX_FAILED_STARTS = 5          # failed starts in a row of every worker, after which the daemon exits


class WorkerState(enum.StrEnum):
    """STARTING: (re)opens its backends. IDLE: waits for a grant. BUSY: between grant and IDLE. STOPPING: was told to
    stop. BACKOFF: its process has exited, and the next one starts after a delay.

    A worker reports the first three; its parent sets all but IDLE.
    """

    STARTING = 'starting'
    IDLE = 'idle'
    BUSY = 'busy'
    STOPPING = 'stopping'
    BACKOFF = 'backoff'


class WorkerStatus(NamedTuple):
    """What a worker last said of itself, as WindowRunner has it; the defaults are of one that has said nothing yet."""

    is_healthy: bool = True
    backend_states: Mapping[str, BackendState] = dict.fromkeys(BACKENDS, BackendState.STARTING)
    failures: Mapping[str, str] = {}
    connections: Mapping[str, tuple[int, int, str]] = {}
    snapshot: Snapshot | None = None


class WorkerHandle:
    """The parent's view of a worker process. last_grant: number of the last grant sent; see on_status(). share: the
    messages that this grant allows. silence: seconds without a status line, see Supervisor.watch_workers()."""

    def __init__(self, index: int) -> None:
        self.index, self.state, self.last_grant, self.share = index, WorkerState.STARTING, 0, 0
        self.process: Any = None   # its Process, from its first start on
        self.status, self.silence, self.failed_starts = WorkerStatus(), 0.0, 0

    def __str__(self) -> str:
        return f'worker {self.index + 1} (pid {self.pid})'

    @property
    def pid(self) -> int | str:
        """Its process id; "none" where its process could not be started."""
        return self.process.pid if self.process else 'none'

    @property
    def is_silent(self) -> bool:
        """True when it has sent no status line for too long."""
        return self.silence >= WORKER_SILENCE

    def send_line(self, **message: Any) -> None:
        """Sends a line to the worker; its reader notices when it has exited."""
        if self.process:
            self.process.stdin.write(json.dumps(message).encode() + b'\n')


class Supervisor:
    """The worker processes of a daemon. It has no connections of its own: it starts workers, grants each its share in
    every period, reads their status, and stops them."""

    def __init__(self, daemon: Any) -> None:
        self.config, self.raw, self.arguments = daemon.config, daemon.raw, daemon.arguments
        self.metrics, self.on_window_end, self.schedule = daemon.metrics, daemon.on_window_end, daemon.schedule
        self.keeps_lock: Callable[[], bool] = daemon.keeps_lock
        self.workers, self.rotation = [WorkerHandle(index) for index in range(self.config.workers)], 0
        self.endless = self.config.endless
        self.state_changed = asyncio.Event()
        self.exited_worker_metrics = daemon.exited_worker_metrics
        self.exit_status = os.EX_OK
        # how to tell a worker to end; None until requested
        self.tell_to_end: Callable[[WorkerHandle], None] | None = None
        self.end_timeout = 0.0      # seconds until the kill
        self.stopped = asyncio.Event()

    async def run(self) -> int:
        """Runs until end_by(), or until no worker stays up. Returns the exit status."""
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self.grant_periods()), asyncio.ensure_future(self.watch_workers()),
            asyncio.gather(*map(self.maintain_worker, self.workers))]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()   # raises what it has raised
        finally:
            for task in tasks:
                task.cancel()
        return self.exit_status

    # -- its workers

    async def maintain_worker(self, worker: WorkerHandle) -> None:
        """Restarts one worker whenever it exits, with backoff."""
        loop, backoff = asyncio.get_running_loop(), Backoff(1, 30)
        while not self.tell_to_end:
            begun, worker.state = loop.time(), WorkerState.STARTING
            fate = await self.run_worker(worker)
            self.on_exit(worker)
            if self.tell_to_end:
                return
            worker.failed_starts = 0 if loop.time() - begun > WORKER_STABLE_TIME else worker.failed_starts + 1
            if not worker.failed_starts:
                backoff.reset_delay()
            log.error('worker %d (pid %s) ended: %s', worker.index + 1, worker.pid, fate,
                      extra={'kind': f'worker {worker.index + 1} ended'})
            if all(each.failed_starts >= MAX_FAILED_STARTS for each in self.workers):
                log.critical('no worker stays up')
                self.exit_status = os.EX_SOFTWARE
                self.stop()
                return
            self.metrics.increment('xmsrv_worker_restarts_total')
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), backoff.next_delay())

    async def run_worker(self, worker: WorkerHandle) -> str:
        """Runs one process from start to exit. Returns a description of its exit."""
        try:
            await self.start_worker(worker)
        except OSError as error:
            worker.process = None
            return f'it could not be started: {error.strerror}'
        if self.tell_to_end:
            self.stop_worker(worker)
        await self.read_status(worker)
        return describe_exit(await worker.process.wait())

    async def start_worker(self, worker: WorkerHandle) -> None:
        """Starts a worker with the current configuration, even if the file has changed. It has its own session, so that
        Ctrl-C on a terminal reaches only the parent."""
        flags = ['-v'] * self.arguments.verbose + ['-q'] * self.arguments.quiet
        outside = {name: value for name, value in os.environ.items() if name not in SYSTEMD_VARIABLES}
        worker.process = await asyncio.create_subprocess_exec(
            *worker_command(), '-c', self.arguments.config, *flags, 'worker', stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, limit=1 << 24, env=outside, start_new_session=True)
        worker.send_line(raw=self.raw)

    async def read_status(self, worker: WorkerHandle) -> None:
        """Reads the status lines of a worker until it exits."""
        try:
            async for line in worker.process.stdout:
                self.on_status(worker, json.loads(line))
                self.state_changed.set()
        # killed in mid-line, or another writer on the pipe; ValueError also for a line that is too long
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.error('%s sent an invalid status line, killed: %s', worker, error,
                      extra={'kind': f'worker {worker.index + 1}: status line'})
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()

    def on_status(self, worker: WorkerHandle, message: dict[str, Any]) -> None:
        """Handles a status line of a worker."""
        worker.silence = 0.0
        worker.status = WorkerStatus(
            message['healthy'],
            {backend: BackendState(state) for backend, state in message['backends'].items()}, message['failures'],
            message['connections'], message['snapshot'])
        for count, seconds in message['windows']:
            self.on_window_end(count, seconds)
        if worker.state is not WorkerState.STOPPING:
            # Example: grant 7 is on its way to a worker, and its line "idle, seen 6" on its way to us. It will start a
            # window. If we took it for idle, the next period could begin during that window.
            crossed = message['seen'] != worker.last_grant
            if not crossed:
                # Example: a grant is sent at 100.0 s, to a worker that was just stopped. It goes on at 108.0 s. For
                # a period of 4 s the next one is overdue by then: it would begin at once after this window.
                self.schedule.on_late_start(message['granted_at'])
            worker.state = WorkerState.BUSY if crossed else WorkerState(message['state'])

    def on_exit(self, worker: WorkerHandle) -> None:
        """Handles the exit of a worker: keeps its metrics."""
        if worker.status.snapshot:
            self.exited_worker_metrics.merge_snapshot(worker.status.snapshot, gauges=False)
        worker.state, worker.status, worker.last_grant = WorkerState.BACKOFF, WorkerStatus(), 0
        worker.silence = 0.0
        self.state_changed.set()

    async def watch_workers(self) -> None:
        """Counts the silence of each worker by its own ticks, not by the clock: while this process is stopped, alone or
        with its workers, it reads no status line."""
        while True:
            await asyncio.sleep(WORKER_STATUS_INTERVAL)
            for worker in self.workers:
                if worker.process and worker.process.returncode is None:
                    worker.silence += WORKER_STATUS_INTERVAL
                    self.on_silence(worker)

    def on_silence(self, worker: WorkerHandle) -> None:
        """Handles the silence of a worker. After WORKER_SILENCE nothing is known of it, until its next status line: the
        others say what is up. After WORKER_KILL_TIME it is killed. A busy one is not silent: its loop sends its status
        whatever the store does."""
        def has_just_passed(limit: float) -> bool:
            return worker.silence - WORKER_STATUS_INTERVAL < limit <= worker.silence
        if has_just_passed(WORKER_SILENCE):
            log.error('worker %d (pid %s) is not responding', worker.index + 1, worker.pid,
                      extra={'kind': f'worker {worker.index + 1}: not responding'})
            counts = MetricTotals()
            if worker.status.snapshot:
                counts.merge_snapshot(worker.status.snapshot, gauges=False)
            worker.status = WorkerStatus(snapshot=counts.take_snapshot())
            self.state_changed.set()
        if has_just_passed(WORKER_KILL_TIME):
            self.kill_worker(worker, f'has been silent for {worker.silence:g} s')

    # -- its periods

    async def grant_periods(self) -> None:
        """Shares max-messages, in every period, among the workers that are idle when it begins: where one is up first,
        it gets all. One that becomes idle later waits for the next period."""
        loop = asyncio.get_running_loop()
        while True:
            if (seconds := self.schedule.seconds_to_start(loop.time())) > 0:
                await asyncio.sleep(seconds)
                continue
            if not (idle := self.workers_to_grant()):
                self.state_changed.clear()
                await self.state_changed.wait()
                continue   # the period may have begun anew meanwhile
            if not self.keeps_lock():   # all workers are told to end, so none becomes idle
                continue
            self.schedule.start_period(loop.time())
            for worker, share in zip(idle, self.split_limit(len(idle)), strict=True):
                if share or not self.config.nsq.max_messages:
                    worker.state, worker.last_grant, worker.share = WorkerState.BUSY, worker.last_grant + 1, share
                    worker.send_line(grant=share, number=worker.last_grant)

    def workers_in_state(self, state: WorkerState) -> list[WorkerHandle]:
        """The workers in a state."""
        return [worker for worker in self.workers if worker.state is state]

    def workers_to_grant(self) -> list[WorkerHandle]:
        """The idle workers, if a period may begin now. Unless endless, it has to wait for those that are BUSY and
        respond, and while silent ones have all of max-messages."""
        waits = not self.endless and any(not worker.is_silent for worker in self.workers_in_state(WorkerState.BUSY))
        if waits or self.config.nsq.max_messages and not self.free_limit:
            return []
        return [worker for worker in self.workers_in_state(WorkerState.IDLE) if not worker.is_silent]

    @property
    def free_limit(self) -> int:
        """max-messages without the shares of silent workers, which may still take them.

        Example: max-messages is 10. A worker of 3 falls silent with its share of 4. Until it responds or is killed, the
        others get 6 a period: it may go on in any of these, and take 4.
        """
        return self.config.nsq.max_messages - sum(worker.share for worker in self.workers_in_state(WorkerState.BUSY))

    def split_limit(self, number: int) -> list[int]:
        """The shares of so many workers; the remainder rotates from period to period.

        Example: max-messages is 10, for 3 workers: 3, 3, 4 in the first period, then 3, 4, 3, then 4, 3, 3. The sum is
        10 in every period, and no worker is always the one with most to do.
        """
        share, extra = divmod(self.free_limit, number)
        self.rotation += 1
        return [share + ((index + self.rotation) % number < extra) for index in range(number)]

    # -- its end

    def stop(self) -> None:
        """Stops all workers: they requeue the messages that they are not storing. A worker that does not stop in time
        is killed."""
        self.end_by(lambda worker: worker.process.terminate(), 0.0)

    def end_after_window(self) -> None:
        """Stops all workers after their windows."""
        self.end_by(lambda worker: worker.send_line(leave=True), self.config.timeout)

    def end_by(self, how: Callable[[WorkerHandle], None], more: float) -> None:
        """Tells all workers to stop, including those that are just starting."""
        call_timeout = STORES[self.config.store](self.config).call_timeout
        self.tell_to_end, self.end_timeout = how, more + call_timeout + 1.5
        self.stopped.set()
        for worker in self.workers:
            self.stop_worker(worker)

    def stop_worker(self, worker: WorkerHandle) -> None:
        """Tells a worker to stop, and kills it if it does not stop in time."""
        if self.tell_to_end and worker.process and worker.process.returncode is None:
            worker.state = WorkerState.STOPPING
            with contextlib.suppress(ProcessLookupError):
                self.tell_to_end(worker)
            asyncio.get_running_loop().call_later(self.end_timeout, self.kill_worker, worker, 'did not stop in time')

    def kill_worker(self, worker: WorkerHandle, reason: str) -> None:
        """Kills a worker that still runs."""
        if worker.process.returncode is None:
            log.error('%s %s: killed', worker, reason, extra={'kind': f'worker {worker.index + 1}: killed'})
            worker.process.kill()

    # -- how it is

    @property
    def failure_text(self) -> str:
        """What fails, in words, which workers are to be started again, and which do not respond."""
        gone = [] if self.tell_to_end else [f'worker {worker.index + 1} has ended'
                                            for worker in self.workers_in_state(WorkerState.BACKOFF)]
        silent = [f'{worker} is not responding' for worker in self.workers if worker.is_silent]
        return '; '.join([*gone, *silent, *describe_failures(self.backend_failures)])

    @property
    def backend_failures(self) -> dict[str, str]:
        """Why each of BACKENDS fails, each reason once, also where several workers say so."""
        reasons = {backend: dict.fromkeys(worker.status.failures[backend] for worker in self.workers
                                          if backend in worker.status.failures) for backend in BACKENDS}
        return {backend: '; '.join(reason) for backend, reason in reasons.items() if reason}

    @property
    def connections(self) -> dict[str, tuple[int, int, str]]:
        """As in WindowRunner, summed over the workers."""
        found: dict[str, tuple[int, int, str]] = {}
        for worker in self.workers:
            for nsqd, (up, in_flight, error) in worker.status.connections.items():
                there = found.get(nsqd, (0, 0, ''))
                found[nsqd] = there[0] + up, there[1] + in_flight, there[2] or error
        return found

    @property
    def backend_states(self) -> dict[str, BackendState]:
        """The state of each of BACKENDS for all workers together."""
        return merge_backend_states([worker.status.backend_states for worker in self.workers])

    def is_healthy(self, now: float) -> bool:
        """True when a worker responds, and each that does reports itself healthy. A silent one is killed in time."""
        responding = [worker for worker in self.workers if not worker.is_silent]
        return bool(responding) and all(worker.status.is_healthy for worker in responding)

    def current_metrics(self) -> list[Any]:
        """The metrics of the parent and all workers."""
        return [self.metrics.take_snapshot(), *filter(None, (worker.status.snapshot for worker in self.workers))]


def worker_command() -> list[str]:
    """The command that runs this module in a worker, with the same Python and from the same path."""
    here = os.path.dirname(os.path.abspath(__file__))
    flags = {'-I': sys.flags.isolated, '-S': sys.flags.no_site, '-B': sys.flags.dont_write_bytecode}
    python = [sys.executable, *(flag for flag, on in flags.items() if on)]
    if os.path.exists(os.path.join(here, '__main__.py')):   # the packages' layout: it finds the libraries
        return [*python, here]
    return [*python, '-c', f'import sys; sys.path.insert(0, {here!r}); import xmsrv; sys.exit(xmsrv.main())']


def describe_exit(status: int) -> str:
    """Describes an exit status of subprocess."""
    names = {each.value: each.name for each in signal.Signals}   # without most real-time signals
    return f'killed by {names.get(-status, f"signal {-status}")}' if status < 0 else f'exit status {status}'


class Worker:
    """A worker process of a daemon. It reads configuration and grants from stdin and writes its status to stdout; end
    of file on stdin means that its parent has exited."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.metrics = arguments, Metrics()
        self.grants: asyncio.Queue[int] = asyncio.Queue()
        self.windows: list[Window] = []
        self.state = WorkerState.STARTING
        self.last_grant = 0      # number of the last grant
        self.granted_at = 0.0    # loop time at which it came; the clock of all processes

    async def run(self, stopper: SignalHandler) -> int:
        """Runs until it is told to stop. Returns the exit status."""
        stdin = asyncio.StreamReader(limit=1 << 24)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
        config, _ = validated_config(self.arguments, json.loads(await stdin.readline())['raw'])
        set_up_configured_log(config, self.arguments)
        self.runner = stopper.window = WindowRunner(config, self.metrics, self.wait_for_grant, self.windows.append)
        tasks = BackgroundTasks()
        tasks.start(self.read_commands(stdin))
        tasks.start(self.send_status_regularly())
        status = await self.runner.run()
        await tasks.cancel()
        self.send_status()
        return status

    async def read_commands(self, stdin: asyncio.StreamReader) -> None:
        """Reads the commands of the parent."""
        try:
            async for line in stdin:
                message = json.loads(line)
                if 'grant' in message:
                    self.state, self.last_grant = WorkerState.BUSY, message['number']
                    self.granted_at = asyncio.get_running_loop().time()
                    self.grants.put_nowait(message['grant'])
                if 'leave' in message:
                    self.runner.end_after_window()
        except ValueError as error:   # killed in mid-line, or longer than `limit`
            log.error('invalid command of the daemon: %s', error)
        self.runner.stop()

    async def wait_for_grant(self) -> int:
        """Waits for a grant; meanwhile the worker is idle."""
        self.state = WorkerState.IDLE
        self.send_status()
        return await self.grants.get()

    async def send_status_regularly(self) -> None:
        """Sends its status regularly: a worker that sends none is stuck."""
        while True:
            self.send_status()
            await asyncio.sleep(WORKER_STATUS_INTERVAL)

    def send_status(self) -> None:
        """Sends a status line to the parent."""
        windows, self.windows[:] = [(window.count, window.times.seconds) for window in self.windows], []
        runner, (metrics,) = self.runner, self.runner.current_metrics()
        # A failed window has closed its pipeline: while that is opened anew, other workers need not wait for this one.
        reopens = self.state is WorkerState.BUSY and not (runner.pipeline or self.grants.qsize())
        line = json.dumps({
            'state': WorkerState.STARTING if reopens else self.state,
            'seen': self.last_grant, 'granted_at': self.granted_at, 'windows': windows, 'snapshot': metrics,
            'healthy': runner.is_healthy(asyncio.get_running_loop().time()), 'backends': runner.backend_states,
            'failures': runner.backend_failures, 'connections': runner.connections})
        with contextlib.suppress(BrokenPipeError):
            write_all(1, line.encode() + b'\n')


# ---------------------------------------------------------------------------------------------------------------------
# HTTP: the status page, and the answers to a scrape and to health checks
# ---------------------------------------------------------------------------------------------------------------------

SAMPLE_INTERVAL = 10.0      # seconds between two samples of the charts
SAMPLES = 90                # samples that are kept: 15 minutes
TREND = 300.0               # seconds over which the growth of the depth is measured
IDLE_INTERVAL = 5.0         # seconds between two checks of watch_depth() whether there is a listener
CHARTED = ('stored', 'deleted', 'dead', 'requeued')   # from below


class BackendSince(NamedTuple):
    """The state of one of BACKENDS, since when (s since 1970), why it is not up."""

    state: BackendState
    since: float
    why: str


class Sample(NamedTuple):
    """The totals at a loop time: counts of CHARTED, sum of ages, messages waiting, nsqds that told their depth."""

    time: float
    counts: tuple[float, ...]
    ages: float
    waiting: int
    nsqds: int


class History:
    """What the page shows of the past: since when each backend is in its state, counts by time, and the last depths."""

    def __init__(self) -> None:
        self.started = time.time()
        self.backends: dict[str, BackendSince] = {}
        self.samples: collections.deque[Sample] = collections.deque(maxlen=SAMPLES + 1)
        self.depths: dict[str, ChannelDepth] = {}

    def note_backends(self, states: Mapping[str, BackendState], failures: Mapping[str, str], now: float) -> None:
        """Notes each backend's state; another reason does not restart an outage."""
        for backend, state in states.items():
            was = self.backends.get(backend)
            begun = was.since if was and was.state == state else now
            self.backends[backend] = BackendSince(state, begun, failures.get(backend, ''))

    def is_due(self, now: float) -> bool:
        """Whether it is time for a sample."""
        return not self.samples or now - self.samples[-1].time >= SAMPLE_INTERVAL - 0.5

    def note_counts(self, total: MetricTotals, now: float) -> None:
        """Adds a sample."""
        counts = tuple(total.value_of('xmsrv_messages_total', kind) for kind in CHARTED)
        waiting = sum(depth.waiting for depth in self.depths.values())
        self.samples.append(Sample(now, counts, total.value_of(f'{LAG}_sum'), waiting, len(self.depths)))

    def recent_rates(self, seconds: float) -> tuple[float, float, float] | None:
        """(real duration, messages stored or deleted, sum of their ages) of the last `seconds`; None with less than
        two samples."""
        recent = [sample for sample in self.samples if self.samples[-1].time - sample.time <= seconds]
        if len(recent) < 2:
            return None
        first, last = recent[0], recent[-1]
        return last.time - first.time, sum(last.counts[:2]) - sum(first.counts[:2]), last.ages - first.ages

    def depth_growth(self) -> float | None:
        """Growth of the depth in messages per second, negative if it falls; None with too few samples."""
        known = [sample for sample in self.samples if sample.nsqds == len(self.depths)
                 and self.samples[-1].time - sample.time <= TREND]
        if len(known) < 4:
            return None
        return (known[-1].waiting - known[0].waiting) / (known[-1].time - known[0].time)


def format_moment(begun: float, now: float) -> str:
    """A moment in words: `14:03:05Z (12 min)`, with the day where it was another."""
    moment = format_rfc3339(begun)
    day = '' if moment[:10] == format_rfc3339(now)[:10] else f'{moment[:10]} '
    return f'{day}{moment[11:19]}Z ({format_duration(now - begun)})'


def format_duration(seconds: float) -> str:
    """A duration in the largest unit of which there are two: `45 s`, `12 min`, `30 h`, `5 d`."""
    for unit, size in ('d', 86400), ('h', 3600), ('min', 60):
        if seconds >= 2 * size:
            return f'{seconds / size:.0f} {unit}'
    return f'{max(0.0, seconds):.0f} s'


def describe_trend(waiting: int, growth: float | None) -> str:
    """Whether the backlog grows, in words; a change of less than a hundredth in TREND is none."""
    if growth is None:
        return 'not known yet whether it grows'
    if abs(growth) * TREND < max(1.0, waiting / 100):
        return 'steady'
    if growth > 0:
        return f'grows by {format_number(growth)}/s'
    end = f', empty in {format_duration(waiting / -growth)}' if waiting else ''
    return f'falls by {format_number(-growth)}/s{end}'


def format_number(number: float) -> str:
    """A number in at most a few characters: `0.25`, `7.5`, `940`, `12.5k`, `3M`."""
    for unit, size in ('G', 1e9), ('M', 1e6), ('k', 1e3):
        if number >= 0.9995 * size:   # 999.7 is 1k
            return f'{number / size:.3g}{unit}'
    return f'{number:.3g}'


def page_tiles(history: History, total: MetricTotals) -> Iterator[tuple[str, str, str, str]]:
    """Yields the tiles as (id, title, value, note): depth, rate and age of stored messages, and totals of
    outcomes."""
    known = [depth.waiting for depth in history.depths.values()]
    outcome_count = functools.partial(total.value_of, 'xmsrv_messages_total')
    yield ('depth', 'waiting in the channel', f'{sum(known):,}' if known else 'not known',
           describe_trend(sum(known), history.depth_growth()) if known else 'no nsqd answers by HTTP')
    seconds, stored, ages = history.recent_rates(60) or (0, 0, 0)
    longer, more, older = history.recent_rates(SAMPLES * SAMPLE_INTERVAL) or (0, 0, 0)
    yield ('rate', 'stored/s, last minute', format_number(stored / seconds) if seconds else 'none yet',
           f'{format_number(more / longer)} in {format_duration(longer)}' if longer else '')
    yield ('lag', 'mean age when stored', f'{format_number(ages / stored)} s' if stored else 'none stored',
           f'{format_number(older / more)} s in {format_duration(longer)}' if more else '')
    yield ('stored', 'stored', f'{outcome_count("stored"):,.0f}',
           f'deleted {outcome_count("deleted"):,.0f}, requeued {outcome_count("requeued"):,.0f}')
    yield ('in-flight', 'in flight', f'{total.value_of("xmsrv_in_flight"):,.0f}', '')
    yield ('dead', 'dead letters', f'{outcome_count("dead"):,.0f}', '')


def dead_letter_reasons(total: MetricTotals) -> str:
    """How many there were for each reason."""
    counts = {reason: total.value_of('xmsrv_dead_letters_total', reason) for reason in REASONS}
    return ', '.join(f'{reason} {number:,.0f}' for reason, number in counts.items() if number)


def nsqd_rows(daemon: 'Daemon') -> Iterator[tuple[str, str, str, str, int, str]]:
    """Yields a line for each nsqd that is configured, connected or answers by HTTP: (nsqd, its BackendState, that in
    words, what waits, messages in flight, remark)."""
    queue = daemon.backend_states['queue']
    unconnected = queue if queue in (BackendState.CLOSED, BackendState.STARTING) else BackendState.DOWN
    connections = daemon.runner.connections if daemon.runner else {}
    configured = [format_address(address) for address in daemon.config.nsq.nsqd_tcp_address]
    for nsqd in dict.fromkeys([*configured, *connections, *daemon.history.depths]):
        up, in_flight, error = connections.get(nsqd, (0, 0, ''))
        depth, workers = daemon.history.depths.get(nsqd), daemon.config.workers
        paused = f'{depth.paused} paused' if depth and depth.paused else ''
        state = BackendState.UP if up >= workers else BackendState.STARTING if up and not error else unconnected
        waiting = f'{depth.waiting:,}' if depth else 'not known'
        yield (nsqd, state, f'{up} of {workers} workers' if 0 < up < workers else state, waiting, in_flight,
               '; '.join(filter(None, [error, paused])))


def some_down(rows: Sequence[tuple[Any, ...]]) -> str:
    """How many nsqds are not connected; the queue may be up all the same."""
    down = [nsqd for nsqd, state, *_ in rows if state is BackendState.DOWN]
    return f'{len(down)} of {len(rows)} nsqds are not connected' if down else ''


class Bar(NamedTuple):
    """A part of a chart: the messages of one kind in one sample; x, y and height in its units."""

    kind: str
    x: float
    y: float
    height: float
    label: str


class Chart(NamedTuple):
    """A chart. kinds: for its key; ticks: (y, text) beside it; times: (x, text) below it."""

    id: str
    title: str
    kinds: tuple[str, ...]
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    times: list[tuple[int, str]]
    width: float


PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 40, 356, 8, 112   # of a chart, in its units
BAR_WIDTH = (PLOT_RIGHT - PLOT_LEFT) / SAMPLES


def axis_end(most: float) -> float:
    """The least 1, 2 or 5 times a power of ten that is not less than `most`."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * step for step in (1, 2, 5, 10) if most <= power * step * (1 + 1e-9))


def column_chart(name: str, title: str, kinds: tuple[str, ...],
                 columns: Sequence[tuple[float, Sequence[float]]]) -> Chart:
    """A chart of columns: (seconds before now, a value for each kind, stacked from below)."""
    top = axis_end(max((sum(values) for _, values in columns), default=0))
    span, bars = SAMPLES * SAMPLE_INTERVAL, []
    for age, values in columns:
        y, x = float(PLOT_BOTTOM), PLOT_RIGHT - (age / span) * (PLOT_RIGHT - PLOT_LEFT) - BAR_WIDTH
        for kind, value in zip(kinds, values, strict=True):
            height = (PLOT_BOTTOM - PLOT_TOP) * value / top
            y -= height
            if height:
                bars.append(Bar(kind, round(x, 1), round(y, 1), round(height, 1),
                                f'{kind} {format_number(value)}, {format_duration(age)} ago'))
    ticks = [(PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * part, format_number(top * part)) for part in (0, 0.5, 1)]
    parts = [(round(PLOT_RIGHT - (PLOT_RIGHT - PLOT_LEFT) * part), span * part) for part in (1, 2 / 3, 1 / 3, 0)]
    times = [(x, f'-{format_duration(age)}' if age else 'now') for x, age in parts]
    return Chart(name, title, kinds, bars, ticks, times, round(BAR_WIDTH - 0.4, 2))


def rate_chart(history: History) -> Chart:
    """The outcomes per second."""
    columns = []
    for before, after in itertools.pairwise(history.samples):
        seconds = after.time - before.time
        columns.append((history.samples[-1].time - after.time,
                        [(b - a) / seconds for a, b in zip(before.counts, after.counts, strict=True)]))
    return column_chart('rates', 'Messages a second', CHARTED, columns)


def depth_chart(history: History) -> Chart:
    """What waits in the channel."""
    columns = [(history.samples[-1].time - sample.time, [sample.waiting])
               for sample in history.samples if sample.nsqds]
    return column_chart('depths', 'Messages that wait in the channel', ('waiting',), columns)


# the state of the whole page is the first of them
PAGE_ORDER = (BackendState.DOWN, BackendState.STARTING, BackendState.CLOSED, BackendState.UP)
PAGE_STYLE = """:root{color-scheme:light dark;--text:#1d2328;--faint:#5c666f;--back:#fff;--box:#f3f5f7;--line:#d5dbe0;
--good:#176b35;--bad:#b3141c;--dead:#b07400;--bar:#2f7d4a;--gone:#5b7f95;--depth:#3566b8}
@media(prefers-color-scheme:dark){:root{--text:#dfe4e8;--faint:#98a3ad;--back:#101418;--box:#1a2026;--line:#323b44;
--good:#6fcf8b;--bad:#ff8080;--dead:#e0b040;--bar:#58b478;--gone:#8fb4c8;--depth:#7fa8ee}}
*{box-sizing:border-box}body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:64em;padding:.8em 1em 2em;
color:var(--text);background:var(--back);overflow-wrap:anywhere}h1{font-size:1.25em;margin:.2em 0}
h2{font-size:1em;margin:1.6em 0 .3em}p{margin:.3em 0}small,.faint{color:var(--faint);font-size:.87em}
.up{color:var(--good)}.down{color:var(--bad);font-weight:bold}.closed,.starting{color:var(--faint)}
#status{padding:.5em .7em;background:var(--box);border-left:4px solid var(--good)}
#status.down,#status.starting{border-color:var(--bad);font-weight:normal;color:var(--text)}
#status.starting{border-color:var(--dead)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}th,td{padding:.25em .9em .25em 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line)}th{color:var(--faint);font-weight:normal;font-size:.87em}
td:first-child{white-space:nowrap}.number{text-align:right}.tiles,.charts{display:grid;gap:.6em;margin:.8em 0}
.tiles{grid-template-columns:repeat(auto-fit,minmax(9.5em,1fr))}.tiles div{background:var(--box);padding:.5em .7em}
.tiles b{display:block;font-size:1.35em;font-variant-numeric:tabular-nums}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,22em),1fr))}figure{margin:0}figcaption{font-weight:bold}
svg{display:block;width:100%;height:auto;background:var(--box)}svg text{font:10px system-ui,sans-serif;
fill:var(--faint)}svg line{stroke:var(--line)}.stored{fill:var(--bar)}.deleted{fill:var(--gone)}
.dead{fill:var(--dead)}.requeued{fill:var(--bad)}
.waiting{fill:var(--depth)}.key::before{content:"";display:inline-block;width:.7em;height:.7em;margin:0 .3em 0 .8em}
.key.stored::before{background:var(--bar)}.key.deleted::before{background:var(--gone)}
.key.dead::before{background:var(--dead)}
.key.requeued::before{background:var(--bad)}.key.waiting::before{background:var(--depth)}
#backends td:first-child{width:1%}#nsqds *{white-space:nowrap}#nsqds td:last-child{white-space:normal;min-width:9em}
@media(max-width:36em){#letters tr{display:block;padding:.4em 0;border-bottom:1px solid var(--line)}
#letters td{display:block;border:0;padding:0}}"""


PAGE_TEMPLATE = """\
<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<title>{{ '' if state == 'up' else state.upper() + ': ' }}x-msrv {{ name }}</title>
<style>{% raw style %}</style></head><body>
<h1>x-msrv {{ name }}</h1>
<p id="status" class="{{ state }}">{{ status }}</p>
<table id="backends">{% for backend, kind, begun, why in backends %}<tr>
<td><span id="{{ backend.replace(' ', '-') }}" class="{{ kind }}">{{ backend }}: {{ kind }}</span></td>
<td>since {{ begun }}{{ '; ' + why if why else '' }}</td></tr>{% end %}</table>
<div class="tiles">{% for id, title, value, note in tiles %}
<div id="{{ id }}"><small>{{ title }}</small><b>{{ value }}</b>
<small>{{ note }}</small></div>{% end %}</div>
<div class="charts">{% for chart in charts %}<figure id="{{ chart.id }}"><figcaption>{{ chart.title }}</figcaption>
<svg viewBox="0 0 360 130" role="img" aria-label="{{ chart.title }}">{% for y, text in chart.ticks %}
<line x1="40" x2="356" y1="{{ y }}" y2="{{ y }}"/>
<text x="36" y="{{ y + 3 }}" text-anchor="end">{{ text }}</text>{% end %}{% for x, text in chart.times %}
<text x="{{ x }}" y="126" text-anchor="{{ 'end' if x > 340 else 'middle' }}">{{ text }}</text>{% end %}
{% for bar in chart.bars %}
<rect class="{{ bar.kind }}" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ chart.width }}" height="{{ bar.height }}">
<title>{{ bar.label }}</title></rect>{% end %}</svg>
<p>{% for kind in chart.kinds %}<small class="key {{ kind }}">{{ kind }}</small>{% end %}</p></figure>{% end %}</div>
<h2>nsqds</h2><div class="wide"><table id="nsqds"><tr><th>nsqd</th><th>connection</th><th class="number">waiting</th>
<th class="number">in flight</th><th></th></tr>{% for nsqd, kind, words, waiting, in_flight, note in nsqds %}
<tr><td>{{ nsqd }}</td><td class="{{ kind }}">{{ words }}</td><td class="number">{{ waiting }}</td>
<td class="number">{{ in_flight }}</td><td>{{ note }}</td></tr>{% end %}</table></div>
<h2>The latest dead letters</h2>{% if letters %}<p><small>{{ reasons }}</small></p><table id="letters">
{% for when, reason, detail in letters %}
<tr><td>{{ when }}</td><td>{{ reason }}</td><td>{{ detail }}</td></tr>{% end %}</table>{% else %}<p>none</p>{% end %}
<p class="faint">{{ foot }}</p></body></html>
"""


@functools.cache
def page_template() -> Any:
    """The template of the page, which escapes all that it is given but `raw`."""
    from tornado.template import Template
    return Template(PAGE_TEMPLATE)


def render_page(daemon: 'Daemon') -> bytes:
    """The status page: it reloads itself every 5 s, and needs no other resources."""
    now, total, history = time.time(), daemon.total_metrics(), daemon.history
    states, nsq, rows = daemon.backend_states, daemon.config.nsq, list(nsqd_rows(daemon))
    history.note_backends(states, daemon.backend_failures, now)
    made: bytes = page_template().generate(
        name=f'{nsq.topic}/{nsq.channel}', style=PAGE_STYLE, status=daemon.status_line,
        state=min(states.values(), key=PAGE_ORDER.index),
        backends=[(name, state, format_moment(begun, now), why or (some_down(rows) if name == 'queue' else ''))
                  for name, (state, begun, why) in history.backends.items()],
        tiles=page_tiles(history, total), charts=[rate_chart(history), depth_chart(history)],
        nsqds=rows, reasons=dead_letter_reasons(total),
        letters=[(f'{format_rfc3339(when)[:19]}Z', reason, detail)   # nothing of their bodies
                 for when, reason, detail in reversed(total.recent)],
        foot=f'{format_rfc3339(now)[:19]}Z, {socket.gethostname()}, x-msrv {__version__}, process {os.getpid()}, '
             f'running since {format_moment(history.started, now)}')
    return made


def readiness_text(daemon: 'Daemon') -> str:
    """A line for each backend with its state, a line for each wait, and what fails, if anything does."""
    backends = [f'{backend}: {state}' for backend, state in daemon.backend_states.items()]
    lines = [*backends, *daemon.waiting_lines, daemon.failure_text]
    return ''.join(f'{escape_controls(line)}\n' for line in lines if line)


HTTP_CONNECTIONS = 32       # at a time; requests are rare, and answered at once
HTTP_FILES_SHARE = 4        # at most 1/4 of RLIMIT_NOFILE: the rest is for nsqds and the store
HTTP_MAX_HEADER = 8192      # bytes of a request's head
HTTP_MAX_BODY = 1024        # bytes of its body, for which nobody asks
HTTP_BODY_TIMEOUT = 5.0     # seconds to read the body
HTTP_IDLE_TIMEOUT = 15.0    # seconds for the next head
HTTP_ACCEPT_PAUSE = 1.0     # seconds without accepting, when there are no open files left


class HttpListener:
    """Accepts connections for an HTTP server. Above the limit the oldest connection is closed, so that many idle
    clients block neither a scrape nor a health check. Tornado itself has no limit, and without a free file descriptor
    it would retry accept() in a busy loop."""

    def __init__(self, server: Any, address: Address, sockets: list[socket.socket]) -> None:
        self.server, self.address, self.sockets = server, address, sockets
        self.streams: collections.deque[IOStream] = collections.deque()
        self.loop = asyncio.get_running_loop()
        for listener in sockets:
            self.resume_accepting(listener)

    def resume_accepting(self, listener: socket.socket) -> None:
        """Accepts connections from now on."""
        if listener in self.sockets:
            self.loop.add_reader(listener, self.accept_connection, listener)

    def accept_connection(self, listener: socket.socket) -> None:
        """Accepts one connection."""
        try:
            connection, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):   # it has gone by now
            return
        except OSError as error:   # no open files, or no memory
            log.warning('[metrics] listen: %s; no connection is accepted for %g s', error.strerror, HTTP_ACCEPT_PAUSE)
            self.loop.remove_reader(listener)
            self.loop.call_later(HTTP_ACCEPT_PAUSE, self.resume_accepting, listener)
            self.close_oldest(len(self.streams) // 2)
            return
        file_share = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // HTTP_FILES_SHARE
        self.close_oldest(max(1, min(HTTP_CONNECTIONS, file_share)) - 1)
        self.streams.append(IOStream(connection))
        self.server.handle_stream(self.streams[-1], address)

    def close_oldest(self, most: int) -> None:
        """Closes the oldest connections, until there are at most so many."""
        self.streams = collections.deque(stream for stream in self.streams if not stream.closed())
        while len(self.streams) > most:
            log.warning('[metrics] listen: %d connections are open; the oldest is closed', len(self.streams))
            self.streams.popleft().close()

    def stop(self) -> None:
        """Stops accepting; open connections are served and close when idle."""
        for listener in self.sockets:
            self.loop.remove_reader(listener)
            listener.close()
        self.sockets = []


def serve_http(daemon: 'Daemon', address: Address, sockets: list[socket.socket]) -> HttpListener:
    """An HTTP server for a Daemon, at sockets that listen at `address`; it stops by stop()."""
    from tornado import httpserver, web

    class Handler(web.RequestHandler):
        """GET or HEAD of /metrics, /healthz, /readyz, /."""

        def get(self) -> None:
            """Answers with the current state."""
            self.set_header('Cache-Control', 'no-store')
            self.set_header('Content-Security-Policy', "default-src 'none'; style-src 'unsafe-inline'; img-src data:")
            kind, good, text = answers[self.request.path]()
            self.set_header('Content-Type', f'{kind}; charset=utf-8')
            self.set_status(200 if good else 503)
            self.finish(text)

        head = get   # tornado leaves out the body

    answers: dict[str, Callable[[], tuple[str, bool, str | bytes]]] = {   # (type, whether all is well, body)
        '/metrics': lambda: ('text/plain; version=0.0.4', True,
                             format_exposition(daemon.total_metrics(), process=True)),
        '/healthz': lambda: (('text/plain', True, 'ok\n') if daemon.is_healthy() else
                             ('text/plain', False, 'no progress\n')),
        '/readyz': lambda: ('text/plain', daemon.is_ready, readiness_text(daemon)),
        '/': lambda: ('text/html', True, render_page(daemon))}
    site = web.Application([(path, Handler) for path in answers], log_function=lambda handler: None)
    server = httpserver.HTTPServer(site, max_header_size=HTTP_MAX_HEADER, max_body_size=HTTP_MAX_BODY,
                                   body_timeout=HTTP_BODY_TIMEOUT, idle_connection_timeout=HTTP_IDLE_TIMEOUT)
    return HttpListener(server, address, sockets)


# ---------------------------------------------------------------------------------------------------------------------
# daemon: the long-lived process
# ---------------------------------------------------------------------------------------------------------------------

class Daemon:
    """The long-lived process: it holds the lock, keeps one WindowRunner or Supervisor running, reloads its
    configuration, and reports its state to systemd and by HTTP."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.metrics, self.notifier = arguments, Metrics(), SystemdNotifier()
        self.exited_worker_metrics = MetricTotals()
        self.raw, self.config, self.unavailable = load_config(arguments)   # the last: faults at the start
        set_up_configured_log(self.config, arguments)
        self.schedule = Schedule(self.config.period)
        self.history = History()
        self.runner: WindowRunner | Supervisor | None = None
        self.is_stopping = False
        self.listener: HttpListener | None = None
        self.status = 'starting'
        self.lock: RunLock | None = None
        self.tasks = BackgroundTasks()
        # set when the first configuration is active, or to stop
        self.config_in_force = asyncio.Event()
        self.config_task: asyncio.Task[Any] | None = None   # waits for the files of another one
        self.address_due = asyncio.Event()   # `listen` may have changed
        # what is waited for: `configuration`, `lock` or `listen` -> (text, since when)
        self.waits: dict[str, tuple[str, float]] = {}
        self.file_executor = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix=f'{THREAD_PREFIX}-files')

    async def run(self, stopper: SignalHandler) -> int:
        """Runs until a signal. Returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.on_hangup)
        stopper.window = self
        self.tasks.start(self.maintain_listener())
        self.apply_config(self.raw, self.config, self.unavailable)
        await asyncio.sleep(0)   # lets maintain_listener() open an IP address first
        self.notifier.send_fields(READY=1, STATUS=self.status_line)
        self.tasks.start(self.notify_regularly())
        self.tasks.start(self.watch_depth())
        try:
            await self.config_in_force.wait()
            status = await self.run_until_stopped()
            if self.tasks.error:
                raise self.tasks.error
            return status
        finally:
            self.notifier.send_fields(STOPPING=1)
            self.close_listener()
            await self.tasks.cancel()
            self.file_executor.shutdown(wait=False)
            if self.lock:
                self.lock.release()

    async def hold_lock(self) -> None:
        """Waits until this process holds the lock of its configuration."""
        while not self.is_stopping:
            reason = self.take_lock()
            self.record_wait('lock', [reason] if reason else ())
            if not reason:
                return
            await asyncio.sleep(TICK_INTERVAL * 4)

    def take_lock(self) -> str | None:
        """Acquires the lock, in place of that of another state-dir, unless it is held. Returns None, or the reason why
        it has to wait."""
        lock = RunLock(self.config, self.arguments.config)   # anew each time: a reload may change its path
        if self.lock and self.lock.path == lock.path and self.lock.is_held:
            return None
        if self.lock and self.lock.path == lock.path:   # another process may have the new file
            log.warning('%s was removed or replaced: taking the lock again', lock.path)
            self.lock.release()
            self.lock = None
        try:
            holder = lock.try_acquire()
        except Unavailable as error:
            return str(error)
        if holder:
            return f'process {holder} has {lock.path}'
        if self.lock:
            self.lock.release()
        self.lock = lock
        return None

    def keeps_lock(self) -> bool:
        """True when this process holds its lock, or has taken it anew. Else another one has it: the runner ends, and
        run_until_stopped() waits for the lock. Asked before each window, and regularly in one without end."""
        is_kept = not self.take_lock()
        if not is_kept and self.runner:
            self.runner.end_after_window()
        return is_kept

    async def run_until_stopped(self) -> int:
        """Runs a WindowRunner or Supervisor for each configuration in turn."""
        status = os.EX_OK
        while not self.is_stopping and not status:
            await self.hold_lock()
            if self.is_stopping:
                break
            self.metrics.forget_gauges()
            self.metrics.set_period(self.config)
            self.runner = self.new_runner()
            status = await self.runner.run()
            self.runner = None
        return status

    def new_runner(self) -> WindowRunner | Supervisor:
        """A WindowRunner in this process, or a Supervisor of workers."""
        self.schedule.period = period = self.config.period   # last_start stays: a reload starts no extra window
        if self.config.workers > 1:
            log.info('%d workers, %s', self.config.workers,
                     f'a window every {period:g} s' if period else 'without pauses')
            return Supervisor(self)
        return WindowRunner(self.config, self.metrics, self.wait_for_grant,
                            lambda window: self.on_window_end(window.count, window.times.seconds))

    async def wait_for_grant(self) -> int:
        """Waits for the start of the next period. Returns max-messages."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.schedule.seconds_to_start(loop.time()))
        while not self.keeps_lock():   # which cancels this task
            await asyncio.sleep(TICK_INTERVAL)
        self.schedule.start_period(loop.time())
        return self.config.nsq.max_messages

    def on_window_end(self, count: Mapping[str, int], seconds: float) -> None:
        """Records the end of a window. count: its messages by outcome."""
        counts = ', '.join(f'{name} {number}' for name, number in count.items() if number)
        self.status = f'last window: {counts or "nothing came"} in {seconds:.2f} s'

    async def notify_regularly(self) -> None:
        """Sends WATCHDOG=1 to systemd while the runner is healthy, and STATUS when it changes."""
        loop, told = asyncio.get_running_loop(), None
        pause = min(self.notifier.watchdog_interval or 1.0, 1.0)
        while True:
            if self.is_healthy():
                self.notifier.send_fields(WATCHDOG=1)
            if self.runner and self.runner.endless:
                self.status = f'flowing: {self.total_metrics().value_of("xmsrv_messages_total", "stored"):.0f} stored'
                if self.lock and self.runner.config is self.config and not self.is_stopping:
                    self.keeps_lock()   # once: then there is no lock, until run_until_stopped() has one
            if self.tasks.error:   # a bug that would go unnoticed; run() raises it
                self.stop()
            if self.status_line != told:
                told = self.status_line
                self.notifier.send_fields(STATUS=told)
            self.history.note_backends(self.backend_states, self.backend_failures, time.time())
            if self.listener and self.history.is_due(loop.time()):
                self.history.note_counts(self.total_metrics(), loop.time())
            await asyncio.sleep(pause)

    async def watch_depth(self) -> None:
        """Asks the nsqds for their depth while there is a listener."""
        while True:
            interval = self.config.metrics.depth_interval
            if self.listener and interval:
                self.history.depths = await note_depths(self.config, self.metrics)
            elif self.history.depths:
                self.history.depths = {}
                self.metrics.set_depths({})
            await asyncio.sleep(interval if self.listener and interval else IDLE_INTERVAL)

    @property
    def status_line(self) -> str:
        """The STATUS: waits, and the failures or the last window."""
        state = self.failure_text or (self.status if self.runner or not self.waits else '')
        return '; '.join(filter(None, [*self.waiting_lines, state]))

    @property
    def failure_text(self) -> str:
        """The failures, or the backends that are not up yet: STATUS gives the reason whenever /readyz is not 200."""
        if not self.runner:
            return ''
        starting = [backend for backend, state in self.backend_states.items() if state is BackendState.STARTING]
        return self.runner.failure_text or (f'not up yet: {", ".join(starting)}' if starting else '')

    def on_hangup(self) -> None:
        """Handles SIGHUP: reloads the configuration."""
        self.notifier.send_fields(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
        self.reload_config()
        self.notifier.send_fields(READY=1)

    def reload_config(self) -> None:
        """Reads the configuration again. A valid one takes effect with the next window; one with faults of the text is
        logged in full and changes nothing; while it, or a file that it names, is missing, the old one stays in
        force. What an earlier reload waits for is dropped in any case: its text has been replaced."""
        filename = self.arguments.config
        try:
            if os.path.exists(filename) and not os.path.isfile(filename):   # reading a pipe would block
                raise ConfigError(f'{filename}: not a file; no reload')
            read = load_config(self.arguments)
        except ConfigError as error:
            log.error('%s\nkeeping the current configuration', error, extra={'kind': str(error)})
            self.keep_config()
        except Unavailable as error:
            self.wait_for_config([error], self.reload_when_readable())
        else:
            self.apply_config(*read)

    def stop(self) -> None:
        """Handles SIGTERM and SIGINT."""
        self.is_stopping = True
        self.config_in_force.set()
        if self.runner:
            self.runner.stop()

    # -- what is waited for, without a person: files that the configuration names, the address of `listen`

    def apply_config(self, raw: dict[str, Any], config: types.SimpleNamespace, unavailable: Sequence[Fault]) -> None:
        """Activates a configuration, at once or when all files that it names exist; drops a configuration that still
        waits."""
        if unavailable:
            self.wait_for_config(unavailable, self.apply_when_available(raw, config))
            return
        if self.config_task:
            self.config_task.cancel()
        self.activate_config(raw, config)

    def keep_config(self) -> None:
        """Keeps the configuration in force, as the new text is faulty. Before the first one is in force, the daemon
        waits on for that of its start."""
        self.drop_waiting_config()
        if not self.config_in_force.is_set():
            self.apply_config(self.raw, self.config, self.unavailable)

    def drop_waiting_config(self) -> None:
        """Drops a configuration that waits for its files, if there is one: its text has been replaced."""
        if self.config_task:
            self.config_task.cancel()
        self.config_task = None
        self.waits.pop('configuration', None)

    def wait_for_config(self, faults: Sequence[object], waiting: Coroutine[Any, Any, None]) -> None:
        """Starts to wait for what is missing, in place of an earlier wait, and logs it even if it is the same."""
        self.drop_waiting_config()
        self.record_wait('configuration', faults)
        self.config_task = self.tasks.start(waiting)

    async def reload_when_readable(self) -> None:
        """Reads the configuration again, with backoff, when its file can be read."""
        backoff = Backoff(1, 30)
        await asyncio.sleep(backoff.next_delay())
        while not os.access(self.arguments.config, os.R_OK):
            await asyncio.sleep(backoff.next_delay())
        self.config_task = None
        self.waits.pop('configuration', None)
        self.reload_config()

    async def apply_when_available(self, raw: dict[str, Any], config: types.SimpleNamespace) -> None:
        """Checks the files again, with backoff, until all exist."""
        backoff, loop = Backoff(1, 30), asyncio.get_running_loop()
        while 'configuration' in self.waits:
            await asyncio.sleep(backoff.next_delay())
            faults = await loop.run_in_executor(self.file_executor, list, environment_faults(config))
            self.record_wait('configuration', [fault for fault in faults if is_fault_of_command(self.arguments, fault)])
        self.activate_config(raw, config)

    def activate_config(self, raw: dict[str, Any], config: types.SimpleNamespace) -> None:
        """Activates a configuration; the open window is finished with the old one."""
        is_reload = config is not self.config
        self.config_task, self.raw, self.config = None, raw, config
        self.record_wait('configuration', ())
        set_up_configured_log(config, self.arguments)
        if is_reload:
            log.info('%s: configuration reloaded', self.arguments.config)
        self.config_in_force.set()
        self.address_due.set()
        if self.runner:
            self.runner.end_after_window()

    def record_wait(self, subject: str, faults: Sequence[object]) -> None:
        """Records the faults that a subject waits for (none: it waits no longer), and logs each change."""
        now, text = time.monotonic(), '; '.join(map(str, faults))
        was, since = self.waits.pop(subject, ('', now))
        if text:
            self.waits[subject] = text, since
        if text and text != was:
            meanwhile = '; keeping the current configuration' if self.runner and subject == 'configuration' else ''
            log.warning('waiting for %s: %s%s', subject, text, meanwhile, extra={'kind': f'{subject}: {text}'})
        elif was and not text:
            log.warning('%s: recovered after %.1f s', subject, now - since, extra={'kind': f'{subject}: recovered'})

    @property
    def waiting_lines(self) -> list[str]:
        """A line for each subject that the daemon waits for."""
        return [f'waiting for {subject}: {text}' for subject, (text, _) in self.waits.items()]

    # -- what others may ask

    async def maintain_listener(self) -> None:
        """Keeps the HTTP listener at the configured address, with backoff; messages flow meanwhile."""
        backoff = Backoff(1, 30)
        while True:
            self.address_due.clear()
            await self.open_listener(self.config.metrics.listen)
            if 'listen' not in self.waits:
                backoff.reset_delay()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.address_due.wait(), backoff.next_delay() if 'listen' in self.waits
                                       else None)

    async def open_listener(self, address: Address | None) -> None:
        """Opens the listener at `address`, if one is configured and it has changed. The old listener is closed after
        the new one is open, or before if both have the same port: 0.0.0.0 can't be bound beside 127.0.0.1."""
        there = self.listener and self.listener.address
        if not address or there and address != there and address[1] == there[1]:
            self.close_listener()
        try:
            if address and not (self.listener and address == self.listener.address):
                site = serve_http(self, address, await self.bind_sockets(*address))
                self.close_listener()
                self.listener = site
        except OSError as error:
            self.record_wait('listen', [Fault('metrics', 'listen', address and format_address(address),
                                              error.strerror or str(error))])
        else:
            self.record_wait('listen', ())

    async def bind_sockets(self, host: str, port: int) -> list[socket.socket]:
        """Sockets that listen. A name is looked up in a thread. Raises OSError."""
        if is_ip_literal(host):
            return bind_sockets(port, host)
        return await asyncio.get_running_loop().run_in_executor(self.file_executor, bind_sockets, port, host)

    def close_listener(self) -> None:
        """Closes the listener."""
        if self.listener:
            self.listener.stop()
        self.listener = None

    @property
    def backend_states(self) -> dict[str, BackendState]:
        """The state of each of BACKENDS."""
        return self.runner.backend_states if self.runner else dict.fromkeys(BACKENDS, BackendState.STARTING)

    @property
    def is_ready(self) -> bool:
        """True when all of BACKENDS are up."""
        return set(self.backend_states.values()) == {BackendState.UP}

    @property
    def backend_failures(self) -> dict[str, str]:
        """Why each of BACKENDS is not up that is not."""
        failures = self.runner.backend_failures if self.runner else {}
        reasons = {BackendState.CLOSED: 'on purpose, while another fails',
                   BackendState.STARTING: '; '.join(self.waiting_lines) or 'not up yet'}
        return {backend: failures.get(backend) or reasons.get(state, '')
                for backend, state in self.backend_states.items() if state is not BackendState.UP}

    def is_healthy(self) -> bool:
        """True while the runner makes progress."""
        return not self.runner or self.runner.is_healthy(asyncio.get_running_loop().time())

    def total_metrics(self) -> MetricTotals:
        """All metrics, merged."""
        total = merge_metrics(self.runner.current_metrics() if self.runner else [self.metrics.take_snapshot()])
        total.merge_snapshot(self.exited_worker_metrics.take_snapshot())
        return total


# ---------------------------------------------------------------------------------------------------------------------
# check: the backends
# ---------------------------------------------------------------------------------------------------------------------

async def check_connections(config: types.SimpleNamespace, filename: str) -> int:
    """Connects to the store and the queue, and reports each as soon as it is known. Returns the exit status. filename:
    of the configuration."""
    print(f'{filename}: valid', flush=True)
    results = [report_backend('', [f'{filename}: {fault}' for fault in unwritable_paths(config)]),
               report_backend(*check_store(config)),
               *[report_backend(*result) for result in await check_nsqds(config)]]
    return os.EX_OK if all(results) else os.EX_UNAVAILABLE


def report_backend(description: str, problems: Sequence[str]) -> bool:
    """Prints the description of a backend, if any, and then logs its problems. Returns True where it has none."""
    if description:
        print(escape_controls(description), flush=True)   # before the problems, which go to stderr
    for problem in problems:
        log.error('%s', problem)
    return not problems


def check_store(config: types.SimpleNamespace) -> tuple[str, list[str]]:
    """Opens the store. Returns the description of what it holds, empty where it fails, and the problems."""
    store = STORES[config.store](config)
    try:
        store.open()
        found = store.describe_contents()
        store.close()
    except StoreError as error:
        return '', [str(error)]
    return found


async def check_nsqds(config: types.SimpleNamespace) -> list[tuple[str, list[str]]]:
    """Connects to each nsqd. Returns the description of each, empty where it fails, and the problems."""
    try:
        nsqds = await find_nsqds(config, config.nsq.topic)
    except Unavailable as error:
        return [('', [str(error)])]
    described = await asyncio.gather(*(describe_nsqd(config, address, http_port)
                                       for address, http_port in nsqds.items()), return_exceptions=True)
    results: list[tuple[str, list[str]]] = []
    for address, found in zip(nsqds, described, strict=True):
        if isinstance(found, UNREACHABLE):
            results.append(('', [f'nsqd {format_address(address)}: {describe_error(found)}']))
        elif isinstance(found, BaseException):
            raise found
        else:
            results.append((found, []))
    return results


def unwritable_paths(config: types.SimpleNamespace) -> Iterator[Fault]:
    """Yields the faults of the paths in which a run would write, and this user can't. Only for `check --connect`, which
    does what a run does: another user may check the text."""
    rule = state_dir_fault(config.state_dir)
    if rule:
        yield Fault('', 'state-dir', config.state_dir, rule)
    letters, textfile = config.dead_letter.file, config.metrics.textfile
    for section, option, filename, made in (('dead-letter', 'file', letters, not os.path.exists(letters or '')),
                                            ('metrics', 'textfile', textfile, True)):   # each run makes another
        if filename and not os.access(os.path.dirname(os.path.realpath(filename)) if made else filename, os.W_OK):
            yield Fault(section, option, filename, 'not writable')


async def describe_nsqd(config: types.SimpleNamespace, address: Address, http_port: int | None) -> str:
    """Describes an nsqd in one line, without a subscription, which would create topic and channel. Raises one of
    UNREACHABLE."""
    connection = Connection(address, ConnectionOptions(config))
    await connection.open()
    parts = [f'nsqd {connection}: version {connection.info.get("version")}']
    if config.nsq.tls:
        parts += tls_facts(connection.stream.socket)
    if config.nsq.compression != 'none':
        parts.append(config.nsq.compression)
    await connection.close_unsubscribed()
    topic = await topic_stats(address, http_port, config.nsq.topic)
    return ', '.join([*parts, *describe_topic(topic, config.nsq.topic, config.nsq.channel)])


def describe_topic(stats: dict[str, Any] | None, topic: str, channel: str) -> list[str]:
    """Describes a topic and its channel, in parts; `stats` is of topic_stats()."""
    if stats is None:
        return [f'depth of {topic}/{channel} unknown']
    in_topic, in_channel = topic_and_channel_depth(stats, channel)
    found = channel_stats(stats, channel)
    if not stats:
        where = 'there is no such topic yet'
    elif not found:
        where = f'topic {in_topic}, which the channel gets when it is made'
    else:
        where = f'topic {in_topic}, channel {in_channel}'
    parts = [f'depth of {topic}/{channel} {in_topic + in_channel} ({where})', f'clients {found.get("client_count", 0)}']
    return parts + [f'{kind} paused' for kind, it in (('topic', stats), ('channel', found)) if it.get('paused')]


BIN_TYPES = {bool: 'boolean', int: 'integer', float: 'float', str: 'string', list: 'list', dict: 'map'}   # Aerospike's


def check_message(config: types.SimpleNamespace, body: bytes) -> None:
    """Prints the record that a message would become, without the store. Raises DataError when it can't."""
    message = Message(None, b'', 0, 1, body)
    try:
        record = Mapper(config).build_record(message)
    except InvalidMessage as rejection:
        raise DataError(terminal_safe(str(rejection))) from None
    options = config.record
    key = '$id (made by nsqd)' if options.key == '$id' else json.dumps(record.key)
    print(f'set   {terminal_safe(record.set or getattr(config, config.store).set)}')
    print(f'key   {BIN_TYPES[type(record.key)]}  {key}')
    if isinstance(record, Deletion):
        print(f'does  {describe_deletion(options.delete)}')
        if options.delete.mode == 'remove':
            return
    elif options.ttl_field:
        print(f'ttl   {f"{record.ttl} s" if record.ttl else "as ttl in [record]"}')
    print_bins(config, record.bins)


def print_bins(config: types.SimpleNamespace, bins: Mapping[str, Any]) -> None:
    """Prints the bins of a record: name, type and value, or the metadata that nsqd makes when it takes the message."""
    options = config.record
    made = {name: source for source, name in options.bins.items() if source in METADATA and source != '$topic'}
    if options.key == '$id':
        made[options.id_bin] = '$id'
    if options.time == '$timestamp':
        made[options.time_bin] = '$timestamp'
    names = {name: terminal_safe(name) for name in bins}
    width = max(map(len, names.values()))
    own_types = typed_bins(config) if config.store == 'aerospike' else {}   # SQLite keeps what JSON has
    for name, value in bins.items():
        text = f'{made[name]} (made by nsqd)' if name in made else json.dumps(value)
        print(f'bin   {names[name]:{width}}  {own_types.get(name) or BIN_TYPES[type(value)]:7}  {text}')


def describe_deletion(delete: types.SimpleNamespace) -> str:
    """What a message does that deletes the record of its key."""
    if delete.mode == 'remove':
        return 'delete    the record is removed, where it is not newer'
    ends = 'never ends' if delete.keep == TTL_NEVER else f'ends after {delete.keep} s'
    return f'delete    a tombstone of these bins, which {ends}, takes the place of a record that is not newer'


def tls_facts(tls_socket: Any) -> list[str]:
    """The protocol, and the days to the expiry of the peer's certificate."""
    expiry = ssl.cert_time_to_seconds(tls_socket.getpeercert()['notAfter'])
    days = max(0, int((expiry - time.time()) // 86400))   # whole days: 0 on the last day
    return [tls_socket.version(), f'certificate valid for {days} days']


# ---------------------------------------------------------------------------------------------------------------------
# command line
# ---------------------------------------------------------------------------------------------------------------------

# bash splits words at = and :, and shtab's function does not join them again. It also takes a value that is the name of
# a command for that command, and does not know whether an optional value was given. So it is shown only the arguments
# that are no options, the option whose value is typed, and the word at the cursor.
BASH_WRAPPER = """
_x_msrv() {
    local word parser known nargs option='' words=() plain=()
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if [[ $words && ($word == [=:]* || ${words[-1]} == *[=:]) ]]; then words[-1]+=$word; else words+=("$word"); fi
    done
    local cur=${words[-1]}
    for word in "${words[@]:1:${#words[@]}-2}"; do
        if [[ $word == -?* ]]; then   # argparse takes no value that begins with -
            parser=_shtab_x_msrv${plain:+_$plain} option=''
            known="${parser}_option_strings[*]" nargs="${parser}_${word//[^[:word:]]/_}_nargs"
            [[ " ${!known} " == *" $word "* && ${!nargs-1} != 0 ]] && option=$word
        elif [[ $option ]]; then option=''
        else plain+=("$word"); fi
    done
    case $cur in --*=*) option=${cur%%=*} cur=${cur#*=} ;; -*) option='' ;; esac
    local COMP_WORDS=(x-msrv "${plain[@]}" ${option:+"$option"} "$cur")
    local COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_x_msrv
    COMPREPLY=("${COMPREPLY[@]#"${cur%"${cur##*[=:]}"}"}")   # bash puts them in the place of the last part
    if [[ $option == --set ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _x_msrv x-msrv
"""


def shell_completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script of bash, zsh or fish for the command line of `parser`."""
    import shtab
    if shell == 'zsh':
        join_option_values(parser)
    return f'{shtab.complete(parser, shell)}\n{BASH_WRAPPER if shell == "bash" else ""}'


def join_option_values(parser: argparse.ArgumentParser) -> None:
    """Tells zsh's _arguments that a value may be joined to its option (`--set=x`), and that some are optional.

    Only for shtab: afterwards the parser can't parse."""
    # argparse has no public way to ask a parser for what it takes.
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                join_option_values(command)
        elif action.nargs != 0:
            action.option_strings = [name + ('=' if name.startswith('--') else '+') for name in action.option_strings]
            if action.nargs == '?':
                action.metavar = f':{action.metavar}'


# The completion of a file name in each shell: shtab's own, except fish's, which would look for a file `--config=a`.
FILE_COMPLETION = {'bash': '_shtab_compgen_files', 'zsh': '_files',
                   'fish': "(__fish_complete_path (string replace -r '^--[a-z]+=' '' -- (commandline -ct)))"}


def set_completion(action: argparse.Action, how: dict[str, Any] = FILE_COMPLETION) -> None:
    """Tells shtab what each shell calls, or chooses from, for the value of an option."""
    action.complete = how   # type: ignore[attr-defined]  # where shtab looks for it


def setting_completion() -> dict[str, Any]:
    """The completion of --set in each shell, from the table of options."""
    words = ' '.join(f'{option.section}.{option.name}'.lstrip('.') + ('=' if option.default is not None else '.')
                     for option in OPTIONS)
    return {'bash': '_x_msrv_settings', 'zsh': '_x_msrv_settings', 'fish': words,
            'preamble': {'bash': f"_x_msrv_settings() {{ compgen -W '{words}' -- \"$1\"; }}",
                         'zsh': f"_x_msrv_settings() {{ compadd -S '' -- {words} }}"}}


GC_THRESHOLD = 100_000   # objects; a batch makes thousands, without cycles: Python's 700 costs a third more CPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3   # malloc.h
MAX_MESSAGE = 256 << 20     # bytes that `check --message` reads; nsqd's own limit is 1 MiB, --max-msg-size
KEPT_MEMORY = 4 << 20       # bytes a thread; a batch of 500 small records needs 1 MiB


# Without `worker`, which only the daemon starts.
COMMAND_HELP = {'once': 'one window, then exit',
                'daemon': 'a window every period, until told to stop',
                'check': 'every fault in the configuration at once',
                'replay': 'run dead letters through again, under their first key',
                'config': 'print the effective configuration',
                'completion': 'print what a shell reads to complete the command line'}


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with the status of sysexits(3)."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong in a line."""
        self.exit(os.EX_USAGE, f'{self.prog}: {message}; see {self.prog} --help\n')

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Answers an unknown command with those that the help has; argparse would name `worker`, too."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise argparse.ArgumentError(action, f'invalid choice: {value!r} (choose from {", ".join(COMMAND_HELP)})')
        super()._check_value(action, value)


HELP_EPILOG = """examples:
  x-msrv check --connect                     are file, queue and store all right?
  x-msrv once                                one window, as the timer does it
  x-msrv --set nsq.max-messages=10 once      the same, at most ten messages
  x-msrv daemon                              a window every period; SIGHUP reads the file again
  x-msrv check --message order.json          which record would this become?
  x-msrv replay --list                       what became a dead letter, and why
  x-msrv replay --dry-run --reason schema    which of them would pass now?
  eval "$(x-msrv completion bash)"           complete all this with TAB; for zsh the same, with zsh

exit status: 0 done, 64 usage, 65 the message of check --message can never become a record, 69 queue
or store out of reach, or the configuration or a file that it names not there yet (nothing was taken),
70 internal error, 74 standard output could not be written, 75 messages requeued because the store or the
dead-letter sink failed, or another x-msrv has this configuration, 78 the text of the configuration is wrong
"""


def add_common_options(parser: argparse.ArgumentParser, after: bool) -> None:
    """The options that stand before or after the command; after it (`after`) they have no default."""
    absent = argparse.SUPPRESS
    set_completion(parser.add_argument('-c', '--config', metavar='FILE', default=absent if after else DEFAULT_FILE,
                                       help=f'configuration (default: {DEFAULT_FILE})'))
    set_completion(parser.add_argument('--set', metavar='SECTION.OPTION=VALUE', action='append', default=[],
                                       type=command_line_setting, dest='set_after' if after else 'set_before',
                                       help='set one option, over the file and the environment'), setting_completion())
    parser.add_argument('--as-root', action='store_true', default=absent if after else False,
                        help=f'as root, do not become the user {SERVICE_USER}')
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument('-v', '--verbose', action='store_true', default=absent if after else False, help='say more')
    loud.add_argument('-q', '--quiet', action='store_true', default=absent if after else False, help='say less')


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(prog='x-msrv', formatter_class=argparse.RawDescriptionHelpFormatter, epilog=HELP_EPILOG,
                    description='Takes JSON messages from an NSQ topic and stores each as one record.')
    parser.add_argument('--version', action='version', version=f'x-msrv {__version__}')
    add_common_options(parser, after=False)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    made = {}
    add_common_options(commands.add_parser('worker'), after=True)   # no help: only the daemon starts it
    for name, help in COMMAND_HELP.items():
        made[name] = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + '.')
        add_common_options(made[name], after=True)
    asked = made['check'].add_mutually_exclusive_group()
    asked.add_argument('--connect', action='store_true', help='also reach the queue and the store')
    set_completion(asked.add_argument('--message', metavar='FILE',
                                      help='show the record that the message in FILE (-: stdin) becomes'))
    add_replay_options(made['replay'])
    made['config'].add_argument('--sample', action='store_true', help='print every option at its default')
    made['completion'].add_argument('shell', choices=('bash', 'zsh', 'fish'))
    return parser


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Makes an argparse type of a validator, with the validator's error text."""
    def parse_argument(value: str) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f'{value}: {error}') from None
    return parse_argument


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """The options of replay."""
    parser.epilog = ('Dead letters that --reason and --since exclude stay dead letters. Of a topic, a replay can hold '
                     'max-in-flight of these, and then ends; of a file, it examines all. A replay can be '
                     'stopped, or killed, and run again.')
    set_completion(parser.add_argument('--file', metavar='PATH', nargs='?', const='',
                                       help='replay a file (default: file of [dead-letter]), not the topic; this is '
                                            'the default without a topic'))
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument('--list', action='store_true', help='only list them, 20 without --limit')
    looks.add_argument('--dry-run', action='store_true',
                       help='only tell which would pass now, without asking the store')
    parser.add_argument('--json', action='store_true', help='with --list or --dry-run: a JSON object a line')
    parser.add_argument('--reason', action='append', choices=REASONS, metavar='R', default=[],
                        help='those with this reason (may be repeated): ' + ', '.join(REASONS))
    parser.add_argument('--since', type=argument_type(parse_duration), metavar='DURATION',
                        help='those published within, say, 2h or 30d')
    parser.add_argument('--limit', type=argument_type(parse_positive), metavar='N', help='at most N of them')
    parser.add_argument('--rate', type=argument_type(parse_positive), metavar='N', help='at most N a second')


def load_available_config(arguments: argparse.Namespace) -> types.SimpleNamespace:
    """Loads the configuration and checks that its files are available. Raises ConfigError or Unavailable, a line per
    fault."""
    _, config, unavailable = load_config(arguments)
    set_up_configured_log(config, arguments)
    require_available(arguments, unavailable)
    return config


def require_available(arguments: argparse.Namespace, unavailable: Sequence[Fault]) -> None:
    """Raises Unavailable with a line for each fault, where there are any."""
    if unavailable:
        raise Unavailable(format_faults(arguments, unavailable))


BACKEND_BY_SECTION = {'nsq': 'queue', 'aerospike': 'store', 'sqlite': 'store', 'dead-letter': 'dead letters'}


def failed_backends(error: Unavailable, unavailable: Sequence[Fault]) -> set[str]:
    """The backends for which a run could not begin: that need a missing file, or can't be reached."""
    if unavailable:
        sections = {fault.section.partition('.')[0] for fault in unavailable}
        return {BACKEND_BY_SECTION[section] for section in sections & BACKEND_BY_SECTION.keys()}
    return {'store' if isinstance(error, StoreUnavailable) else 'queue'}


def command_once(arguments: argparse.Namespace) -> int:
    """x-msrv once"""
    _, config, unavailable = load_config(arguments)
    set_up_configured_log(config, arguments)
    metrics = Metrics() if config.metrics.textfile else NullMetrics()
    metrics.set_period(config)
    with hold_run_lock(config, arguments.config):
        try:
            require_available(arguments, unavailable)
            return run_until_signal(lambda stopper: run_once(config, stopper, metrics))
        except Unavailable as error:
            metrics.record_unavailable(failed_backends(error, unavailable))
            raise
        finally:
            if config.metrics.textfile:
                # node_exporter refuses equal series of two files: these labels tell two pipelines of a host apart.
                names = {'topic': config.nsq.topic, 'channel': config.nsq.channel}
                write_textfile(config.metrics.textfile, metrics, names)


def command_daemon(arguments: argparse.Namespace) -> int:
    """x-msrv daemon"""
    return run_until_signal(lambda stopper: Daemon(arguments).run(stopper))


def command_worker(arguments: argparse.Namespace) -> int:
    """x-msrv worker: a process of the daemon's, which alone starts it."""
    return run_until_signal(lambda stopper: Worker(arguments).run(stopper))


def command_check(arguments: argparse.Namespace) -> int:
    """x-msrv check"""
    config = load_available_config(arguments)
    if arguments.message is not None:
        check_message(config, read_message(arguments.message))
        return os.EX_OK
    status = asyncio.run(check_connections(config, arguments.config)) if arguments.connect else os.EX_OK
    if not status:
        print(f'{arguments.config}: no fault found', flush=True)
    return status


def read_message(filename: str) -> bytes:
    """The bytes of a file, or (-) of standard input."""
    try:
        with open(0 if filename == '-' else filename, 'rb', closefd=filename != '-') as file:
            return read_at_most(file, MAX_MESSAGE)
    except OSError as error:
        raise UsageError(f'--message {filename}: {error.strerror}') from None
    except ValueError as error:
        raise DataError(f'--message {filename}: {error}: no message is') from None


def command_replay(arguments: argparse.Namespace) -> int:
    """x-msrv replay"""
    read_only = arguments.list or arguments.dry_run
    if arguments.json and not read_only:
        raise UsageError('replay: --json goes with --list or --dry-run')
    if arguments.rate and read_only:
        raise UsageError('replay: --rate does not go with --list or --dry-run, which store nothing')
    config = load_available_config(arguments)
    path = dead_letter_path(arguments, config)
    since = time.time_ns() - int(arguments.since * 1e9) if arguments.since else 0
    limit = arguments.limit or (20 if arguments.list else 0)
    choice = ReplayFilter(tuple(arguments.reason), since, limit, arguments.rate or 0)
    if path and not os.path.isfile(path):
        return on_missing_file(path, arguments.file)
    if read_only:
        return run_until_signal(lambda stopper: list_dead_letters(config, stopper, path, choice, arguments))
    return run_until_signal(lambda stopper: run_replay(config, stopper, path, choice))


def dead_letter_path(arguments: argparse.Namespace, config: types.SimpleNamespace) -> str | None:
    """The file to replay; None: the topic."""
    dead = config.dead_letter
    if dead.topic and arguments.file is None:
        return None
    path = arguments.file or dead.file
    if not path:
        raise ConfigError(f'{arguments.config}: [dead-letter]: neither a topic nor a file to replay' if
                          arguments.file is None else f'{arguments.config}: [dead-letter] file: none; say --file PATH')
    return os.path.realpath(path)


def on_missing_file(path: str, asked_for: str | None) -> int:
    """Handles a missing file: the configured one is created with the first dead letter."""
    if asked_for or os.path.exists(path):
        raise UsageError(f'replay: {path}: {"not a regular file" if os.path.exists(path) else "no such file"}')
    log.info('%s does not exist: no dead letter to replay', path)
    return os.EX_OK


def command_config(arguments: argparse.Namespace) -> int:
    """x-msrv config"""
    if arguments.sample:
        print(sample_config(), end='')
        return os.EX_OK
    raw, config, _ = load_config(arguments)
    set_up_configured_log(config, arguments)
    print(dump_config(raw, read_overrides(arguments)), end='')
    return os.EX_OK


def command_completion(arguments: argparse.Namespace) -> int:
    """x-msrv completion"""
    print(shell_completion(arguments.shell, build_parser()), end='')
    return os.EX_OK


COMMANDS = {'once': command_once, 'daemon': command_daemon, 'worker': command_worker, 'check': command_check,
            'replay': command_replay, 'config': command_config, 'completion': command_completion}


def run_until_signal(command: Callable[[SignalHandler], Coroutine[Any, Any, int]]) -> int:
    """Runs an async command with a SignalHandler; a signal before its window exits with 0: nothing was taken."""
    async def main_task() -> int:
        return await command(SignalHandler())
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    keep_freed_memory()
    try:
        return run_loop(main_task())
    except asyncio.CancelledError:
        return os.EX_OK


def keep_freed_memory() -> None:
    """Makes glibc keep what a batch frees, for the next batch. By default a thread gives back all but 128 KiB, and gets
    it again page by page: a page fault a message, a seventh of all CPU. Sets both limits: setting either turns off
    glibc's own adapting of both."""
    library = ctypes.CDLL(None)
    if hasattr(library, 'mallopt'):   # other C libraries have none, and need none
        library.mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)
        library.mallopt(M_MMAP_THRESHOLD, KEPT_MEMORY)


def run_loop(main_task: Coroutine[Any, Any, int]) -> int:
    """Like asyncio.run(), which would wait for ever for a thread that reads from a hung mount."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix=f'{THREAD_PREFIX}-files'))
    loop.set_exception_handler(on_loop_error)
    try:
        return loop.run_until_complete(main_task)
    finally:
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        close_loop(loop)


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Closes the loop and removes its handlers. Signals are ignored from here on, as the process is exiting."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)   # so that none finds the moment in between
    loop.close()
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an error that no task waits for; errors of connections only with -v."""
    error = context.get('exception')
    given_up = isinstance(error, (*UNREACHABLE, asyncio.CancelledError))
    log.log(logging.DEBUG if given_up else logging.ERROR, 'internal error: %s: %r', context['message'], error,
            extra={'kind': f'internal error: {type(error).__name__}'})


def leave_stuck_calls(status: int) -> None:
    """Exits when a call hangs 0.5 s more: the interpreter would wait for its thread."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)]
    for thread in threads:
        thread.join(0.5)
    if any(thread.is_alive() for thread in threads):
        if sys.stdout:
            sys.stdout.flush()
        os._exit(status)


def become_user() -> None:
    """As root, switches to the user of the packages, if it exists, before any file is opened: the service could not
    open files that root creates in state-dir."""
    if os.geteuid():
        return
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return
    os.initgroups(SERVICE_USER, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ['HOME'] = user.pw_dir


def dispatch_command(arguments: list[str] | None) -> int:
    """Runs the command and logs a failure in one line. Returns the exit status."""
    set_up_log(argparse.Namespace(verbose=False, quiet=False))
    try:
        try:
            return run_command(build_parser().parse_args(arguments))
        finally:
            if sys.stdout:
                sys.stdout.flush()   # while a failure can still be told
    except Failure as failure:
        log.error('%s', failure, extra={'last': True})
        return failure.exit_status
    except OutputClosed:
        return os.EX_OK
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:   # the only broad except: a bug must look neither like success nor like a known failure
        log.error('internal error: %s: %s', type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
        return os.EX_SOFTWARE


def run_command(parsed: argparse.Namespace) -> int:
    """Runs the command of a parsed command line. Returns the exit status."""
    set_up_log(parsed)
    if parsed.command in ('daemon', 'worker'):   # until it has its handler
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if parsed.command not in COMMANDS_ENDED_BY_SIGNAL and signal.getsignal(signal.SIGINT) is exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)   # so that what is printed by now is not lost
    if parsed.command not in ('config', 'completion') and not parsed.as_root:
        become_user()
    return COMMANDS[parsed.command](parsed)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    reserve_standard_descriptors()
    set_up_output()
    status = dispatch_command(arguments)
    rate_limit_filter.log_counts()
    leave_stuck_calls(status)
    return status


if __name__ == '__main__':
    sys.exit(main())
