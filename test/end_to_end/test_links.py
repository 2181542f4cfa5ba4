"""Ways to reach the queue other than plain TCP: unix sockets, deflate, and nsqlookupd behind HTTPS."""
import json
import ssl
import urllib.error
import urllib.request

import pytest
import trustme

import proxies
import servers
from flows import CHANNEL, DEAD, REPLAY, TOPIC, bodies, fill, numbers, passed, unfit
from servers import wait_until

SECRET = 'the-secret-that-nobody-may-see'
TLS_ONLY = '--tls-required=tcp-https'
SYSTEM = {'deflate': True, 'max_rdy_count': 2500, 'msg_timeout': 60000, 'max_msg_timeout': 900000}


@pytest.fixture
def authority(workdir):
    """A certificate authority; its certificate is in ca.pem."""
    made = trustme.CA()
    made.cert_pem.write_to_path(workdir / 'ca.pem')
    return made


def issued(authority, workdir, name):
    """The (certificate, key) files for a name."""
    made = authority.issue_cert(name)
    made.cert_chain_pems[0].write_to_path(workdir / 'cert.pem')
    made.private_key_pem.write_to_path(workdir / 'key.pem')
    return workdir / 'cert.pem', workdir / 'key.pem'


@pytest.fixture
def secret(workdir):
    """The file with the secret."""
    path = workdir / 'secret'
    path.write_text(f'{SECRET}\n')
    return path


def refused(done, words):
    """One line at the end, with these words."""
    line, = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert line.startswith('error: no nsqd can be reached: ') and words in line
    assert SECRET not in done.stderr


def nothing_taken(nsqd, number):
    """All messages wait, and none was ever delivered."""
    stats = nsqd.stats(TOPIC, CHANNEL)
    assert (stats['depth'], stats['in_flight_count'], stats['requeue_count']) == (number, 0, 0)


# --- unix sockets

@pytest.fixture
def local(nsqds, workdir):
    """A function: an nsqd that listens on a unix socket in the directory, and the socket's path."""
    def start(*args, **options):
        path = workdir / 'nsqd.sock'
        return nsqds(1, f'--tcp-address={path}', *args, **options)[0], path
    return start


def test_messages_and_dead_letters_cross_a_unix_socket(program, local):
    nsqd, path = local()
    fill(nsqd, 3000)
    nsqd.publish(TOPIC, b'no JSON')
    program.configure(nsq={'nsqd-tcp-address': path})
    told = servers.summary(program.run('once').stderr)
    assert (told['stored'], told['dead'], told['requeued']) == (3000, 1, 0)
    assert (numbers(program), nsqd.left(TOPIC, CHANNEL)) == (list(range(3000)), 0)
    assert nsqd.stats(DEAD, REPLAY)['depth'] == 1
    told = program.run('check', '--connect').stdout
    assert f'nsqd {path}: version ' in told and f'depth of {TOPIC}/{CHANNEL} unknown' in told
    line, = program.run('replay', '--list', '--json').stdout.splitlines()
    assert json.loads(line)['nsqd'] == str(path)


def test_a_unix_socket_beside_tcp(program, local, nsqd):
    here, path = local()
    fill(here, 10)
    fill(nsqd, 10, first=10)
    program.once(nsq={'nsqd-tcp-address': [path, nsqd.tcp]})
    assert numbers(program) == list(range(20))


def test_an_nsqd_that_comes_back_on_its_unix_socket_is_found(program, local):
    nsqd, path = local()
    fill(nsqd, 10)
    program.configure(period='0', nsq={'nsqd-tcp-address': path})
    program.start('daemon')
    wait_until(lambda: len(program.rows()) == 10, 'the first messages are stored')
    nsqd.stop()
    missing = f'no nsqd can be reached: {path}: No such file or directory'
    wait_until(lambda: missing in program.log.read_text(), 'it says what is away', 20)
    nsqd.restart()
    nsqd.publish(TOPIC, bodies(10, 10))
    wait_until(lambda: len(program.rows()) == 20, 'the next messages are stored', 20)


@pytest.mark.parametrize(('make', 'words'), [
    (lambda path: None, 'No such file or directory'), (lambda path: path.touch(), 'Connection refused'),
], ids=['nothing there', 'a file'])
def test_a_unix_socket_that_is_not_there_is_69(program, workdir, make, words):
    path = workdir / 'nsqd.sock'
    make(path)
    refused(program.once(nsq={'nsqd-tcp-address': path}, expect=69), f'{path}: {words}')


@pytest.mark.parametrize(('name', 'status'), [('localhost', 0), ('nsqd.example', 69)])
def test_tls_on_a_unix_socket_is_verified_for_localhost(program, local, authority, workdir, name, status):
    nsqd, path = local(TLS_ONLY, tls=issued(authority, workdir, name))
    fill(nsqd, 10)
    done = program.once(nsq={'nsqd-tcp-address': path, 'tls': {'ca-file': workdir / 'ca.pem'}}, expect=status)
    if status:
        refused(done, 'TLS: ')
        nothing_taken(nsqd, 10)
    else:
        assert numbers(program) == list(range(10))


def test_a_secret_that_stays_on_the_host_is_no_warning(program, workdir, secret):
    options = {'topic': TOPIC, 'auth-secret-file': secret}
    program.configure(nsq={**options, 'nsqd-tcp-address': '/run/nsqd.sock'})
    assert program.run('check').stderr == ''
    program.configure(nsq={**options, 'nsqd-tcp-address': '/run/nsqd.sock, 192.0.2.1:4150'})
    assert 'crosses the network in the clear' in program.run('check').stderr


# --- deflate

@pytest.mark.parametrize('tls', [False, True], ids=['plain', 'tls'])
def test_messages_and_dead_letters_cross_deflated(program, nsqds, authority, workdir, tls):
    """Large ones, too, which deflate to a hundredth; nsqd says that the connection is deflated."""
    certificate = issued(authority, workdir, '127.0.0.1') if tls else None
    nsqd, = nsqds(1, *([TLS_ONLY] if tls else []), tls=certificate)
    fill(nsqd, 5000)
    large = [b'{"n": %d, "text": "%s"}' % (n, b'x' * 900_000) for n in range(5000, 5010)]
    nsqd.publish(TOPIC, [*large, *unfit(10, text='y' * 300_000)])
    program.configure(nsqd, period='0', idle_timeout='5s', message={'fields': {'n': 'integer, required'}},
                      nsq={'compression': 'deflate', **({'tls': {'ca-file': workdir / 'ca.pem'}} if tls else {})})
    daemon = program.start('daemon')
    wait_until(lambda: len(program.rows()) == 5010 and nsqd.left(TOPIC, CHANNEL) == 0, 'all are stored', 30)
    client, = nsqd.clients(TOPIC, CHANNEL)
    assert (client['deflate'], client['snappy'], client['tls']) == (True, False, tls)
    assert numbers(program) == list(range(5010))
    assert {len(bins.get('text', '')) for bins in program.records().values()} == {5, 900_000}
    assert nsqd.stats(DEAD, REPLAY)['depth'] == 10
    daemon.terminate()
    assert daemon.wait(timeout=20) == 0
    assert 'deflate, depth of orders/x-msrv 0 ' in program.run('check', '--connect').stdout


def test_fewer_bytes_cross_deflated(program, nsqd):
    """Of 2,000 messages that are much alike less than a quarter."""
    crossed = {}
    for compression in ('none', 'deflate'):
        nsqd.publish(TOPIC, bodies(2000))
        with proxies.Proxy(nsqd) as proxy:
            done = program.once(nsq={'nsqd-tcp-address': proxy.addresses, 'compression': compression})
        assert servers.summary(done.stderr)['stored'] == 2000
        crossed[compression] = proxy.size
    assert crossed['deflate'] < crossed['none'] / 4


def test_heartbeats_cross_deflated(program, nsqd, changed):
    """nsqd closes a connection that does not answer two of them; here there is one a second."""
    changed('import xmsrv; xmsrv.HEARTBEAT_INTERVAL = 1.0')
    nsqd.create(TOPIC, CHANNEL)
    program.configure(nsqd, period='0', nsq={'compression': 'deflate'})
    program.start('daemon')
    wait_until(lambda: nsqd.clients(TOPIC, CHANNEL), 'it is connected')
    connected = nsqd.clients(TOPIC, CHANNEL)[0]['connect_ts']
    wait_until(passed(4.5), 'four heartbeats')
    nsqd.publish(TOPIC, bodies(10))
    wait_until(lambda: len(program.rows()) == 10, 'the messages are stored')
    assert nsqd.clients(TOPIC, CHANNEL)[0]['connect_ts'] == connected


def test_nsqd_that_refuses_deflate_is_an_error(program, nsqds):
    """No silent fallback."""
    nsqd, = nsqds(1, '--deflate=false')
    fill(nsqd, 10)
    refused(program.once(nsqd, nsq={'compression': 'deflate'}, expect=69),
            'compression = deflate is asked for, and this nsqd does not offer it')
    nothing_taken(nsqd, 10)
    assert 'does not offer it' in program.run('check', '--connect', expect=69).stderr


def test_what_is_no_deflate_is_an_error_with_its_reason(program):
    greeting = proxies.frame(json.dumps(SYSTEM).encode()) + proxies.frame(b'OK')   # in the clear
    with proxies.Says(greeting) as fake:
        refused(program.once(nsq={'nsqd-tcp-address': fake.address, 'compression': 'deflate'}, expect=69),
                'not what deflate makes')


def test_nobody_asks_for_deflate_unasked(program, nsqd):
    fill(nsqd, 10)
    with proxies.Proxy(nsqd) as proxy:
        program.once(nsq={'nsqd-tcp-address': proxy.addresses})
    asked, = proxy.arguments('IDENTIFY')
    assert json.loads(asked)['deflate'] is False and 'snappy' not in json.loads(asked)


# --- nsqlookupd behind HTTPS

@pytest.fixture
def front(nsqlookupd, authority, workdir):
    """A function: an HTTPS server for `name` before the real nsqlookupd, which lets in who has the secret."""
    def start(name='127.0.0.1', status=None, more=()):
        def answer(path):
            if status:
                return status, b''
            if server.headers[-1].get('Authorization') != f'Bearer {SECRET}':
                return 401, b''
            try:
                with urllib.request.urlopen(f'http://{nsqlookupd.http}{path}', timeout=5) as found:
                    return found.status, found.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*issued(authority, workdir, name))
        server = proxies.Web(answer, context, more)
        return server
    return start


@pytest.fixture
def registered(nsqds, nsqlookupd):
    """An nsqd with ten messages, which nsqlookupd knows."""
    nsqd, = nsqds(1, lookupd=[nsqlookupd])
    fill(nsqd, 10)
    wait_until(lambda: nsqlookupd.producers(TOPIC), 'nsqlookupd knows the nsqd')
    return nsqd


@pytest.fixture
def guarded(nsqds, nsqlookupd, authority, workdir):
    """The same; it wants the secret, as the HTTPS server before nsqlookupd does, and has TLS."""
    grant = {'topic': '.*', 'channels': ['.*'], 'permissions': ['subscribe', 'publish']}
    body = json.dumps({'ttl': 3600, 'identity': 'x', 'identity_url': '', 'authorizations': [grant]}).encode()
    with proxies.Web(lambda path: (200, body)) as auth_server:
        nsqd, = nsqds(1, f'--auth-http-address={auth_server.address}', lookupd=[nsqlookupd],
                      tls=issued(authority, workdir, '127.0.0.1'))
        fill(nsqd, 10)
        wait_until(lambda: nsqlookupd.producers(TOPIC), 'nsqlookupd knows the nsqd')
        yield nsqd


def test_nsqlookupd_behind_https_gets_the_secret(program, guarded, front, workdir, secret):
    with front() as server:
        program.once(nsq={'lookupd-http-address': f'https://{server.address}', 'auth-secret-file': secret,
                          'tls': {'ca-file': workdir / 'ca.pem'}})
        assert numbers(program) == list(range(10))
        assert 'depth of orders/x-msrv 0 ' in program.run('check', '--connect').stdout


@pytest.mark.parametrize(('name', 'trusted', 'words'), [
    ('lookup.example', True, "IP address mismatch, certificate is not valid for '127.0.0.1'"),
    ('127.0.0.1', False, 'unable to get local issuer certificate')], ids=['another name', 'another authority'])
def test_an_https_server_that_is_another_gets_no_secret(program, front, workdir, secret, name, trusted, words):
    with front(name) as server:
        done = program.once(nsq={'lookupd-http-address': f'https://{server.address}', 'auth-secret-file': secret,
                                 'tls': {'ca-file': workdir / 'ca.pem'} if trusted else {}}, expect=69)
    assert f'no nsqlookupd can be reached: https://{server.address}: TLS: ' in done.stderr
    assert words in done.stderr and server.headers == []


def test_the_secret_is_not_sent_in_the_clear_nor_where_an_answer_leads(program, nsqd, front, workdir, secret):
    options = {'auth-secret-file': secret, 'tls': {'ca-file': workdir / 'ca.pem'}}
    with proxies.Web(lambda path: (200, b'{"producers": []}')) as plain:
        program.once(nsq={'lookupd-http-address': plain.address, **options})
        assert len(plain.headers) == 1 and 'Authorization' not in plain.headers[0]
        with front(status=302, more=[('Location', f'http://{plain.address}/lookup')]) as server:
            done = program.once(nsq={'lookupd-http-address': f'https://{server.address}', **options}, expect=69)
        assert 'HTTP 302' in done.stderr and len(plain.headers) == 1


def test_the_authorities_of_the_system_serve_without_tls_for_nsqd(program, registered, nsqlookupd, front, workdir,
                                                                  secret, monkeypatch):
    monkeypatch.setenv('SSL_CERT_FILE', str(workdir / 'ca.pem'))
    with front(status=None) as server:
        done = program.once(nsq={'lookupd-http-address': f'https://{server.address}'}, expect=69)
        assert 'HTTP 401' in done.stderr
        # one that can be asked beside it names the nsqd, and this one costs a warning
        done = program.once(nsq={'lookupd-http-address': [f'https://{server.address}', nsqlookupd.http]})
    assert numbers(program) == list(range(10))
    assert f'warning: nsqlookupd https://{server.address}: HTTP 401' in done.stderr


def test_a_secret_that_no_header_can_hold_is_not_shown(program, front, workdir, secret):
    secret.write_text(f'{SECRET}\nX: y')
    with front() as server:
        done = program.once(nsq={'lookupd-http-address': f'https://{server.address}', 'auth-secret-file': secret,
                                 'tls': {'ca-file': workdir / 'ca.pem'}}, args=['-v'], expect=69)
    assert 'a header of HTTP takes printable ASCII' in done.stderr and SECRET not in done.stderr
