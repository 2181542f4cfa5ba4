"""What stands between x-msrv and nsqd in a test, and sees or spoils what they say. Only the standard library."""
import collections
import contextlib
import http.server
import json
import selectors
import socket
import ssl
import struct
import threading

WITH_BODY = (b'IDENTIFY', b'AUTH', b'PUB', b'MPUB')
FRAMES = {0: 'response', 1: 'error', 2: 'message'}

# `name` is a command (RDY, FIN, ...), or what nsqd sent: response, error, message. `argument`: the rest of a command's
# line or its body; a message's id; a response's text. `connection`: 0, 1, ... in the order in which they were made.
Event = collections.namedtuple('Event', 'connection name argument')


class Thread:
    """A server in a thread; `_serve` ends when `_closing` is set, which it looks at ten times a second."""

    def __init__(self):
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._closing.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


class Proxy(Thread):
    """Forwards to nsqds, a port for each, and keeps every command and frame in `events`, in their order. Between
    connections that is known only where `settled` has the event's number: there all that was sent had been seen.

    `judge(event)` is called in between: False swallows it, bytes take its place, ConnectionError cuts its connection.
    `size`: bytes that came from nsqds. What is encrypted or deflated goes through as it is.
    """

    def __init__(self, *nsqds, judge=lambda event: True):
        self.events, self.settled, self.judge = [], set(), judge
        self._selector = selectors.DefaultSelector()
        self._made = self.size = 0
        self.addresses = []
        for nsqd in nsqds:
            listener = socket.create_server(('127.0.0.1', 0))
            self._selector.register(listener, selectors.EVENT_READ, (nsqd.host, nsqd.port))
            self.addresses.append(f'127.0.0.1:{listener.getsockname()[1]}')
        super().__init__()

    def count(self, name):
        """How many events of that name there were."""
        return sum(event.name == name for event in list(self.events))

    def arguments(self, name):
        """The arguments of the events of that name."""
        return [event.argument for event in list(self.events) if event.name == name]

    def _serve(self):
        while not self._closing.is_set():
            ready = self._selector.select(0.1)
            while ready:
                self._round(ready)
                ready = self._selector.select(0)
            self.settled.add(len(self.events))
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()

    def _round(self, ready):
        for key, _ in ready:
            if key.fileobj.fileno() < 0:
                continue   # its other half has ended in this round
            if isinstance(key.data, tuple):
                self._accept(key)
            else:
                self._pass_on(key.fileobj, key.data)

    def _accept(self, key):
        client, _ = key.fileobj.accept()
        try:
            server = socket.create_connection(key.data, timeout=10)
        except OSError:
            client.close()
            return
        client.settimeout(10)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = _Pair(self._made, client, server)
        self._made += 1
        for each in (client, server):
            self._selector.register(each, selectors.EVENT_READ, pair)

    def _pass_on(self, source, pair):
        try:
            data = source.recv(1 << 18)
            if not data:
                raise ConnectionError
            sink = pair.server if source is pair.client else pair.client
            self.size += len(data) if source is pair.server else 0
            passed = []
            try:
                for name, argument, raw in pair.units(source, data):
                    event = Event(pair.number, name, argument)
                    self.events.append(event)
                    verdict = self.judge(event)
                    if verdict is not False:
                        passed.append(verdict if isinstance(verdict, bytes) else raw)
            finally:
                sink.sendall(b''.join(passed))
        except OSError:
            for each in (pair.client, pair.server):
                self._selector.unregister(each)
                each.close()


class _Pair:
    """Both sockets of a connection, and what came on each and is not a whole unit yet."""

    def __init__(self, number, client, server):
        self.number, self.client, self.server = number, client, server
        self.rest = {client: b'', server: b''}
        self.greeted = self.opaque = False

    def units(self, source, data):
        """Yields (name, argument, bytes) of each command or frame that is whole."""
        data = self.rest[source] + data
        while data:
            if self.opaque:
                unit = ('opaque', b'', len(data))
            else:
                unit = self._command(data) if source is self.client else self._frame(data)
            if not unit:
                break
            name, argument, size = unit
            yield name, argument, data[:size]
            data = data[size:]
        self.rest[source] = data

    def _command(self, data):
        if not self.greeted:
            self.greeted = len(data) >= 4
            return ('magic', data[:4], 4) if self.greeted else None
        line, newline, body = data.partition(b'\n')
        name, _, argument = line.partition(b' ')
        if not newline:
            return None
        size = len(line) + 1
        if name in WITH_BODY:
            if len(body) < 4 or len(body) < 4 + int.from_bytes(body[:4], 'big'):
                return None
            argument = body[4:4 + int.from_bytes(body[:4], 'big')]
            size += 4 + len(argument)
        return name.decode(), argument, size

    def _frame(self, data):
        if len(data) < 8 or len(data) < 4 + int.from_bytes(data[:4], 'big'):
            return None
        size, kind = struct.unpack('>Ii', data[:8])
        content = data[8:4 + size]
        if kind == 0 and content.startswith(b'{'):
            self.opaque = json.loads(content)['tls_v1'] or json.loads(content)['deflate']
        return FRAMES[kind], content[10:26] if kind == 2 else content, 4 + size


class FakeNsqd(Thread):
    """Answers IDENTIFY with `info`, does TLS where it has a context, says OK to the rest: nsqd without a message.

    plain, secret: what was read before and inside TLS. refusals: handshakes that the client broke off.
    """

    def __init__(self, info, context=None):
        self.answer = json.dumps(info).encode()
        self.context = context
        self.plain, self.secret, self.refusals, self.ended = b'', b'', [], 0
        self._listener = socket.create_server(('127.0.0.1', 0))
        self._listener.settimeout(0.1)
        self.tcp = f'127.0.0.1:{self._listener.getsockname()[1]}'
        super().__init__()

    def _serve(self):
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(10)
                with contextlib.suppress(OSError):
                    self._talk(connection)
                connection.close()
                self.ended += 1
        self._listener.close()

    def _talk(self, connection):
        head = connection.recv(4096)
        while b'}' not in head:
            head += connection.recv(4096)
        self.plain += head
        connection.sendall(frame(self.answer))
        if not self.context:
            for data in iter(lambda: connection.recv(4096), b''):
                self.plain += data
                connection.sendall(self._reply(data))
            return
        try:
            connection = self.context.wrap_socket(connection, server_side=True)
        except (ssl.SSLError, OSError) as error:
            self.refusals.append(error)
            return
        with connection:
            connection.settimeout(10)
            connection.sendall(frame(b'OK'))
            for data in iter(lambda: connection.recv(4096), b''):
                self.secret += data
                connection.sendall(self._reply(data))

    def _reply(self, data):
        if b'CLS\n' in data:
            return frame(b'CLOSE_WAIT')
        return frame(b'OK') if data.startswith((b'AUTH', b'SUB')) else b''


def frame(data, kind=0):
    """A frame of nsqd."""
    return struct.pack('>Ii', len(data) + 4, kind) + data


class Says(Thread):
    """Takes connections, says `greeting` on each, reads what comes, and never says more: silent where it is empty."""

    def __init__(self, greeting=b'', port=0):
        self.greeting, self.taken = greeting, []
        self._listener = socket.create_server(('127.0.0.1', port))
        self._listener.settimeout(0.1)
        self.address = f'127.0.0.1:{self._listener.getsockname()[1]}'
        super().__init__()

    def _serve(self):
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self.taken.append(connection)
                connection.sendall(self.greeting)
        for connection in (*self.taken, self._listener):
            connection.close()


class Web(Thread):
    """An HTTP server on a free port: `answer(path)` gives (status, body); with an ssl `context` by HTTPS. `headers`: of
    each request that came."""

    def __init__(self, answer, context=None, more=()):
        headers = self.headers = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                headers.append(dict(self.headers))
                status, body = answer(self.path)
                self.send_response(status)
                for name, value in more:
                    self.send_header(name, value)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.timeout = 0.1
        self.address = f'127.0.0.1:{self._server.server_port}'
        super().__init__()

    def _serve(self):
        while not self._closing.is_set():
            self._server.handle_request()
        self._server.server_close()


@contextlib.contextmanager
def refusing():
    """An address that refuses every connection, and that nobody else can get meanwhile."""
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        yield f'127.0.0.1:{taken.getsockname()[1]}'


@contextlib.contextmanager
def unanswering():
    """An address that never answers a connection: the listener's queue is full, so the kernel drops what comes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f'127.0.0.1:{listener.getsockname()[1]}'
