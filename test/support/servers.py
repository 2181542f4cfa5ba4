"""Real NSQ servers on free loopback ports, and the installed x-msrv, for the tests, the demo and the benchmark.

Only the standard library, and nothing of pytest. Each server is a context manager that has started when it was made:

    with Nsqd(directory, '--msg-timeout=2s') as nsqd:
        nsqd.publish('orders', [b'{"id": 1}', b'{"id": 2}'])
        assert nsqd.stats('orders', 'x-msrv')['topic_depth'] == 2
"""
import contextlib
import ctypes
import http.client
import json
import os
import random
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parent.parent.parent
NSQ_TOOLS = ROOT / 'build' / 'bin'
# The very venv that runs the tests, so that what they drive is what was installed there.
PROGRAM = Path(sys.executable).parent / 'x-msrv'

# Below the kernel's own range, from which an outgoing connection could take the port of a server that is to restart.
PORTS = range(10000, 32000, 2)
ADDRESS_IN_USE = 'address already in use'
MPUB_BYTES = 4 << 20  # nsqd takes 5 MiB a request (--max-body-size)
MAX_RDY = 2500        # nsqd's --max-rdy-count

LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec is no time to load anything
PR_SET_PDEATHSIG = 1      # linux/prctl.h


def wait_until(condition, what, seconds=10):
    """The first true value of `condition()`; AssertionError that names `what` after `seconds`. Only this sleeps, longer
    where it takes long to ask: the processors are for what is tested."""
    asked = time.monotonic()
    end = asked + seconds
    while not (value := condition()):
        now = time.monotonic()
        assert now < end, f'waited {seconds} s in vain: {what}'
        time.sleep(min(0.1, max(0.005, 2 * (now - asked))))
        asked = time.monotonic()
    return value


def spawn(command, **options):
    """A Popen that dies with this process, even where this one is killed.

    The kernel ties it to the thread that called: start nothing from a thread that ends before its child should.
    """
    command = [str(part) for part in command]
    # preexec_fn can hang where another thread holds a lock at the fork: ours takes no lock.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent, **options)  # noqa: PLW1509


def _die_with_parent():
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):   # a shell's background job, or nohup, ignores some
        signal.signal(number, signal.SIG_DFL)


def handles(process, number):
    """Whether a process has a handler for a signal, or ignores it: proc_pid_status(5)."""
    with open(f'/proc/{process.pid}/status') as status:
        masks = [int(line.split()[1], 16) for line in status if line.startswith(('SigIgn', 'SigCgt'))]
    return any(mask >> (number - 1) & 1 for mask in masks)


# -------------------------------------------------------------------------------------------------------------- servers

class Server:
    """What nsqd and nsqlookupd have in common: ports, a directory, an HTTP side, a life that tests cut short."""

    name = None

    def __init__(self, directory, *args, host='127.0.0.1'):
        """Start it with `args` on two adjacent free ports of `host`; RuntimeError with its log where it won't."""
        self.directory = Path(tempfile.mkdtemp(prefix=f'{self.name}-', dir=directory))
        self.log = self.directory / 'log'
        self.host, self.args, self.process = host, args, None
        while not self._start(free_ports(host)):
            pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()

    @property
    def tcp(self):
        return self._address(self.port)

    @property
    def http(self):
        return self._address(self.port + 1)

    def kill(self):
        """SIGKILL: what it held in memory is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """SIGTERM: it writes its queues to disk."""
        self.process.terminate()
        self.process.wait(timeout=10)

    def suspend(self):
        """SIGSTOP: connections stay up and silent."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def restart(self):
        """Start again on the same ports and data; one that still runs is stopped first."""
        if self.process.poll() is None:
            self.stop()
        wait_until(lambda: self._start(self.port), f'{self.name} can bind {self.tcp} again')

    def request(self, method, path, body=None, **query):
        """The body of the HTTP answer; RuntimeError on any status but 200."""
        status, answer = self._http(method, path, body, query)
        if status != http.client.OK:
            raise RuntimeError(f'{self.name}: {method} {path} answered {status}: {answer[:200]!r}')
        return answer

    def options(self):
        """The arguments of this kind of server, its addresses aside."""
        return []

    def _address(self, port):
        return f'[{self.host}]:{port}' if ':' in self.host else f'{self.host}:{port}'

    def _http(self, method, path, body, query):
        connection = http.client.HTTPConnection(self.host, self.port + 1, timeout=30)
        try:
            connection.request(method, f'{path}?{urlencode(query)}' if query else path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _start(self, port):
        """True when it answers on `port`, False when the port was taken; RuntimeError with its log otherwise."""
        self.port = port
        command = [NSQ_TOOLS / self.name, '--tcp-address', self.tcp, '--http-address', self.http,
                   '--broadcast-address', self.host, *self.options(), *self.args]
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open('ab') as log:
            self.process = spawn(command, stdout=log, stderr=log)
        # Its own words, for what answers on the port may be another server, the reason why this one can't start.
        wait_until(lambda: self.process.poll() is not None or self._listens(before),
                   f'{self.name} listens, see {self.log}')
        if self.process.poll() is None:
            return True
        said = self._said(before)
        if ADDRESS_IN_USE in said:
            return False
        raise RuntimeError(f'{self.name} did not start:\n{said}')

    def _listens(self, since):
        said = self._said(since)
        return 'TCP: listening' in said and 'HTTP: listening' in said

    def _said(self, since):
        return self.log.read_bytes()[since:].decode(errors='replace')


class Nsqlookupd(Server):
    name = 'nsqlookupd'

    def producers(self, topic):
        """The TCP addresses of the nsqds that have `topic`."""
        status, answer = self._http('GET', '/lookup', None, {'topic': topic})
        found = json.loads(answer).get('producers', []) if status == http.client.OK else []
        return {f"{each['broadcast_address']}:{each['tcp_port']}" for each in found}


class Nsqd(Server):
    name = 'nsqd'

    def __init__(self, directory, *args, lookupd=(), node_id=None, tls=None, host='127.0.0.1'):
        """`args` as on nsqd's command line; `lookupd`: Nsqlookupds to register with; `tls`: (certificate, key) files.

        Each gets a node id of its own, for by default all of one host share one, and with it their message ids.
        """
        self.lookupd, self.tls = lookupd, tls
        self.node_id = random.SystemRandom().randrange(1024) if node_id is None else node_id
        super().__init__(directory, *args, host=host)

    def options(self):
        # Without an address of its own HTTPS would be on port 4152 of every nsqd with TLS.
        args = ['--data-path', self.directory, '--node-id', self.node_id, '--https-address=']
        for lookupd in self.lookupd:
            args += ['--lookupd-tcp-address', lookupd.tcp]
        return args + (['--tls-cert', self.tls[0], '--tls-key', self.tls[1]] if self.tls else [])

    def publish(self, topic, bodies):
        """One message (bytes or str), or a list of them."""
        if isinstance(bodies, (bytes, str)):
            self.request('POST', '/pub', _bytes(bodies), topic=topic)
            return
        for chunk in _chunks([_bytes(body) for body in bodies], MPUB_BYTES):
            frames = b''.join(struct.pack('>I', len(body)) + body for body in chunk)
            self.request('POST', '/mpub', struct.pack('>I', len(chunk)) + frames, topic=topic, binary='true')

    def create(self, topic, channel=None):
        """A topic, and a channel of it: what is published before the channel is there goes to whoever comes first."""
        self.request('POST', '/topic/create', topic=topic)
        if channel:
            self.request('POST', '/channel/create', topic=topic, channel=channel)

    def pause(self, topic, channel=None):
        self._switch('pause', topic, channel)

    def unpause(self, topic, channel=None):
        self._switch('unpause', topic, channel)

    def stats(self, topic, channel=None):
        """The channel's counts (0 where it is not there), `clients`, `paused`; `topic_depth` and `topic_messages`."""
        topics = json.loads(self.request('GET', '/stats', format='json', topic=topic))['topics']
        found = topics[0] if topics else {}
        mine = next((each for each in found.get('channels') or [] if each['channel_name'] == channel), {})
        counts = ('depth', 'in_flight_count', 'deferred_count', 'message_count', 'requeue_count', 'timeout_count')
        return {count: mine.get(count, 0) for count in counts} | {
            'clients': mine.get('client_count', 0), 'paused': mine.get('paused', False),
            'topic_depth': found.get('depth', 0), 'topic_messages': found.get('message_count', 0)}

    def left(self, topic, channel):
        """How many messages are not finished yet: waiting, deferred or in flight."""
        now = self.stats(topic, channel)
        return now['topic_depth'] + now['depth'] + now['in_flight_count'] + now['deferred_count']

    def drain(self, topic, channel='test', expected=None, seconds=10):
        """Take messages and finish them: the bodies, exactly `expected` of them or all there are; at most `seconds`."""
        return [data[26:] for data in self._drain(topic, channel, expected, seconds)]

    def attempts(self, topic, channel):
        """Take all messages and finish them: how often each was delivered, this time included."""
        return [int.from_bytes(data[8:10], 'big') for data in self._drain(topic, channel)]

    def bounce(self, topic, channel, times):
        """Take one message and hand it back, so many times."""
        with _Client(self.host, self.port, topic, channel) as client:
            for _ in range(times):
                wait_until(lambda: client.take(1, b'REQ %s 0\n'), f'a message of {topic}/{channel} comes')

    def lapse(self, topic, channel):
        """Let a message of our own time out, so that from here on each does in its time: nsqd looks for them only in
        the channels that it knew at its last look round, each 5 s (QueueScanRefreshInterval)."""
        self.publish(topic, b'{}')
        with _Client(self.host, self.port, topic, channel) as client:
            wait_until(lambda: client.take(1, b'TOUCH %s\n'), f'a message of {topic}/{channel} comes')
        wait_until(lambda: self.stats(topic, channel)['timeout_count'], f'a message of {topic}/{channel} times out', 20)
        self.drain(topic, channel, 1)

    def _drain(self, topic, channel, expected=None, seconds=10):
        end = time.monotonic() + seconds
        taken = []
        with _Client(self.host, self.port, topic, channel) as client:
            while expected is None or len(taken) < expected:
                batch = client.take(min(MAX_RDY, (expected or len(taken) + MAX_RDY) - len(taken)))
                taken += batch
                if not batch and expected is None and not self.left(topic, channel):
                    break
                assert time.monotonic() < end, f'{topic}: {len(taken)} of {expected or "all"} messages in {seconds} s'
        return taken

    def requeue(self, topic, channel, number):
        """Deliver `number` messages once and hand them back, as a consumer does that failed."""
        with _Client(self.host, self.port, topic, channel) as client:
            taken = client.take(number, b'REQ %s 0\n')
        assert len(taken) == number, f'{topic}: {len(taken)} of {number} messages'

    def letters(self, topic, channel='x-msrv-replay', expected=None):
        """Drain a topic of dead letters: a list of (header, body)."""
        split = [letter.partition(b'\n') for letter in self.drain(topic, channel, expected)]
        return [(json.loads(header), body) for header, _, body in split]

    def clients(self, topic, channel):
        """What nsqd counts of each consumer of a channel: `ready_count`, `in_flight_count` and more."""
        topics = json.loads(self.request('GET', '/stats', format='json', topic=topic))['topics']
        return [client for each in topics or [] for mine in each['channels'] or []
                if mine['channel_name'] == channel for client in mine['clients'] or []]

    def _switch(self, verb, topic, channel):
        if channel:
            self.request('POST', f'/channel/{verb}', topic=topic, channel=channel)
        else:
            self.request('POST', f'/topic/{verb}', topic=topic)


class _Client:
    """The least NSQ consumer: of our own, so that no test trusts what it tests."""

    QUIET = 0.2  # s without a message, after which a batch is over

    def __init__(self, host, port, topic, channel):
        self.socket = socket.create_connection((host, port), timeout=5)
        self.file = self.socket.makefile('rb')
        identify = json.dumps({'client_id': 'test', 'output_buffer_size': -1}).encode()  # -1: nsqd buffers nothing
        self.socket.sendall(b'  V2IDENTIFY\n' + struct.pack('>I', len(identify)) + identify)
        self.socket.sendall(f'SUB {topic} {channel}\n'.encode())
        self._expect(b'OK')
        self._expect(b'OK')

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            # The FINs before it are done when this is answered; closed at once, nsqd would drop some.
            self.socket.sendall(b'CLS\n')
            self._expect(b'CLOSE_WAIT')
        finally:
            self.socket.close()

    def take(self, most, answer=b'FIN %s\n'):
        """Up to `most` messages, answered together: each in flight counts against RDY, so no more than `most` come.

        Each as in its frame: timestamp (8 bytes), attempts (2), id (16), body.
        """
        self.socket.sendall(b'RDY %d\n' % most)
        taken = []
        while len(taken) < most and self._readable():
            kind, data = self._frame()
            if kind == 2:
                taken.append(data)
        self.socket.sendall(b'RDY 0\n' + b''.join(answer % data[10:26] for data in taken))
        return taken

    def _readable(self):
        """Whether a frame is there, or begins within QUIET."""
        self.socket.settimeout(self.QUIET)
        try:
            return bool(self.file.peek(1))
        except TimeoutError:
            # A file object refuses all reads after a timeout; nothing is in its buffer, so a new one misses nothing.
            self.file = self.socket.makefile('rb')
            return False
        finally:
            self.socket.settimeout(5)

    def _frame(self):
        size, kind = struct.unpack('>Ii', self.file.read(8))
        data = self.file.read(size - 4)
        if data == b'_heartbeat_':
            self.socket.sendall(b'NOP\n')
        if kind == 1:
            raise RuntimeError(f'nsqd: {data!r}')
        return kind, data

    def _expect(self, answer):
        while self._frame() != (0, answer):
            pass


def free_ports(host='127.0.0.1'):
    """A port that is free together with the next one. Another process may be faster: retry when the bind fails."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        try:
            for each in (port, port + 1):
                socket.create_server((host, each), family=socket.AF_INET6 if ':' in host else socket.AF_INET).close()
            return port
        except OSError:
            continue


def _bytes(body):
    return body.encode() if isinstance(body, str) else body


def _chunks(bodies, most):
    """Lists of bodies of at most `most` bytes in all, or of a single larger one."""
    chunk, size = [], 0
    for body in bodies:
        if chunk and size + len(body) + 8 > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(body)
        size += len(body) + 8
    if chunk:
        yield chunk


# ---------------------------------------------------------------------------------------------------------- the program

class Xmsrv:
    """The installed command, with a configuration file, a state directory and an sqlite file in `directory`."""

    extra = {}  # more of its environment

    def __init__(self, directory):
        self.directory = Path(directory)
        self.path = self.directory / 'x-msrv.conf'
        self.database = self.directory / 'records.sqlite'
        self.log = self.directory / 'x-msrv.log'
        self.started = []

    def configure(self, servers=(), topic='orders', channel='x-msrv', **sections):
        """Write the file: a fit default for `servers` (Nsqds, or Nsqlookupds), overlaid with `sections`.

        A section is a dict, a subsection a dict in it, an option of the top level a keyword: idle_timeout='1s',
        dead_letter={'file': path}, nsq={'max-messages': 10, 'tls': {'ca-file': path}}. None takes a default out.
        """
        servers = [servers] if isinstance(servers, Server) else list(servers)
        state = self.directory / 'state'
        state.mkdir(exist_ok=True)
        settings = {'state-dir': state, 'timeout': '5s', 'store': 'sqlite', 'nsq': {'topic': topic, 'channel': channel},
                    'sqlite': {'path': self.database}, 'dead-letter': {'topic': f'{topic}.dead'}}
        if any(isinstance(server, Nsqlookupd) for server in servers):
            settings['nsq']['lookupd-http-address'] = [server.http for server in servers]
        elif servers:
            settings['nsq']['nsqd-tcp-address'] = [server.tcp for server in servers]
        self.write('\n'.join(ini(merge(settings, {name.replace('_', '-'): value for name, value in sections.items()}))))

    def copy(self):
        """Another file with the same configuration, for a second process: of one file only one `once` runs."""
        self.path = self.path.with_name(f'{self.path.stem}-2.conf')
        self.path.write_text(self.path.with_name('x-msrv.conf').read_text())

    def write(self, text):
        """The configuration file, word for word."""
        self.path.write_text(text + '\n', encoding='utf-8')

    def run(self, *args, expect=0, timeout=60):
        """The CompletedProcess of `x-msrv -c FILE ARGS`, as text; AssertionError on another status than `expect`."""
        process = self.popen(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f'x-msrv {args} still runs after {timeout} s:\n{process.communicate()[1]}') from None
        status = process.returncode
        assert status == expect, f'x-msrv {args}: exit status {status}, not {expect}:\n{stdout}{stderr}'
        return subprocess.CompletedProcess(process.args, status, stdout, stderr)

    def once(self, servers=(), *, expect=0, within=60, args=(), **settings):
        """configure(servers, **settings), then one window of at most `within` seconds: its CompletedProcess."""
        self.configure(servers, **settings)
        return self.run(*args, 'once', expect=expect, timeout=within)

    def start(self, *args):
        """A Popen in the background; what it says goes to the file `log`. The fixture kills it at the end."""
        with self.log.open('a') as log:
            return self.popen(*args, stdout=log, stderr=log)

    def popen(self, *args, **options):
        # Without the journal's variables, which would add priority prefixes to each line.
        environment = {name: value for name, value in os.environ.items()
                       if name not in ('JOURNAL_STREAM', 'INVOCATION_ID', 'NOTIFY_SOCKET')} | self.extra
        process = spawn([PROGRAM, '-c', self.path, *args], env=environment, cwd=self.directory,
                        **{'text': True, 'errors': 'backslashreplace', **options})
        self.started.append(process)
        return process

    def close(self):
        """Kill all that was started, workers too: one that is stopped does not see that its parent has gone."""
        for process in self.started:
            process.kill()
            process.wait()
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.workers(), 'no worker is left')

    def workers(self):
        """The pids of all worker processes that have a configuration in `directory`, also of daemons that are gone."""
        found = []
        for path in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):   # it has ended
                arguments = path.read_bytes().split(b'\0')
                if b'worker' in arguments and any(each.startswith(b'%s/' % os.fsencode(self.directory))
                                                  for each in arguments):
                    found.append(int(path.parent.name))
        return found

    @contextlib.contextmanager
    def locked(self):
        """The database is locked by another writer, which exists for the store as an outage."""
        connection = sqlite3.connect(self.database, timeout=10, isolation_level=None)
        try:
            connection.execute('BEGIN IMMEDIATE')
            yield
            connection.execute('ROLLBACK')
        finally:
            connection.close()

    def rows(self):
        """All records: (set, key, bins as parsed JSON, stored_at); none where no record was ever stored."""
        if not self.database.exists():
            return []
        connection = sqlite3.connect(self.database, timeout=10)
        try:
            if not connection.execute("select 1 from sqlite_master where name = 'records'").fetchone():
                return []
            found = connection.execute('select "set", key, bins, stored_at from records').fetchall()
        finally:
            connection.close()
        return [(where, key, json.loads(bins), stored_at) for where, key, bins, stored_at in found]

    def records(self):
        """The bins of each record by its key (an integer or a string); AssertionError where two sets share a key."""
        rows = self.rows()
        records = {key: bins for _, key, bins, _ in rows}
        assert len(records) == len(rows)
        return records


def ini(settings, depth=0):
    """The lines of an INI file for nested dicts: options first, then sections, as configobj has it."""
    for name, value in settings.items():
        if not isinstance(value, dict):
            yield f'{name} = {_ini_value(value)}'
    for name, value in settings.items():
        if isinstance(value, dict):
            yield '[' * (depth + 1) + name + ']' * (depth + 1)
            yield from ini(value, depth + 1)


def _ini_value(value):
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    return ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def merge(base, overlay):
    """`base` with what `overlay` says otherwise, dict by dict; None takes an entry out."""
    merged = dict(base)
    for name, value in overlay.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def summary(stderr):
    """The last summary line of `stderr` as a dict of its counts, with 'topic', 'channel' and 'seconds'."""
    lines = re.findall(r'\[(\S+)/(\S+)\] (received \d+, .*) in ([\d.]+) s\b', stderr)
    assert lines, f'no summary line in:\n{stderr}'
    topic, channel, counts, seconds = lines[-1]
    pairs = (count.rsplit(' ', 1) for count in counts.split(', '))
    return {name: int(count) for name, count in pairs} | {'topic': topic, 'channel': channel, 'seconds': float(seconds)}
