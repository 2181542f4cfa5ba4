"""TLS and AUTH: what was asked for and not obtained is an error before a message or a secret crosses."""
import contextlib
import datetime
import json
import re
import shutil
import ssl

import pytest
import trustme

import flows
import proxies
import servers

TOPIC, CHANNEL = 'orders', 'x-msrv'
SECRET = 'the-secret-that-nobody-may-see'
FEATURES = {'tls_v1': True, 'auth_required': True, 'max_rdy_count': 2500, 'msg_timeout': 60000,
            'max_msg_timeout': 900000, 'output_buffer_timeout': 25}
# tcp-https: TLS is required of TCP, and HTTP stays open, for the test's own use.
WANTS_CERTIFICATE = ['--tls-required=tcp-https', '--tls-client-auth-policy=require-verify']


class Authority:
    """A CA, and the files of what it signs."""

    def __init__(self, directory, name):
        self.directory, self.name, self.ca = directory, name, trustme.CA(organization_name=name)
        self.file = self._write('ca', self.ca.cert_pem)

    def issue(self, *names, **options):
        """The (certificate, key) files of a certificate for `names`."""
        issued = self.ca.issue_cert(*names, **options)
        return self._write('cert', *issued.cert_chain_pems), self._write('key', issued.private_key_pem)

    def _write(self, what, *blobs):
        path = self.directory / f'{self.name}-{what}.pem'
        path.write_bytes(b''.join(blob.bytes() for blob in blobs))
        return path


@pytest.fixture
def ours(workdir):
    """The authority that x-msrv is told to trust."""
    return Authority(workdir, 'ours')


@pytest.fixture
def theirs(workdir):
    """Another authority."""
    return Authority(workdir, 'theirs')


@pytest.fixture
def secret(workdir):
    """The file with the secret."""
    path = workdir / 'secret'
    path.write_text(f'{SECRET}\n')
    return path


def fill(nsqd, count=10):
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [b'{"n": %d}' % number for number in range(count)])


def all_stored(program, nsqd, count=10):
    assert sorted(bins['n'] for bins in program.records().values()) == list(range(count))
    servers.wait_until(lambda: nsqd.left(TOPIC, CHANNEL) == 0, 'nsqd has every FIN')


def nothing_taken(nsqd):
    """All messages wait, and none was ever delivered."""
    stats = nsqd.stats(TOPIC, CHANNEL)
    assert (stats['depth'], stats['message_count']) == (10, 10)
    assert stats['in_flight_count'] == stats['requeue_count'] == stats['timeout_count'] == 0


def refused(done, *words):
    """One clear line at the end, without the secret."""
    line, = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert line.startswith('error: no nsqd can be reached: ')
    for word in words:
        assert word in line
    assert SECRET not in done.stderr


# --------------------------------------------------------------------------------------------------- on the real nsqd

@pytest.mark.parametrize('args', [
    [], ['--tls-required=tcp-https'], ['--tls-min-version=tls1.3'], ['--deflate=false', '--snappy=false'],
], ids=str)
def test_messages_cross_tls(program, nsqds, ours, args):
    nsqd, = nsqds(1, *args, tls=ours.issue('127.0.0.1'))
    fill(nsqd, 5000)
    program.once(nsqd, timeout='20s', nsq={'tls': {'ca-file': ours.file}})
    all_stored(program, nsqd, 5000)


def test_dead_letters_cross_tls(program, nsqds, ours):
    nsqd, = nsqds(1, '--tls-required=tcp-https', tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    nsqd.publish(TOPIC, b'no JSON')
    done = program.once(nsqd, nsq={'tls': {'ca-file': ours.file}})
    assert servers.summary(done.stderr)['dead'] == 1
    assert nsqd.stats(f'{TOPIC}.dead', 'x-msrv-replay')['depth'] == 1


@pytest.mark.parametrize('name', ['127.0.0.1', 'localhost'])
def test_tls_1_3_is_used_and_check_says_so(program, nsqds, ours, name):
    nsqd, = nsqds(1, tls=ours.issue(name))
    program.configure(nsq={'nsqd-tcp-address': [f'{name}:{nsqd.port}'], 'tls': {'ca-file': ours.file}})
    assert 'TLSv1.3' in program.run('check', '--connect').stdout


def test_ipv6_address_is_verified(program, nsqds, ours):
    nsqd, = nsqds(1, host='::1', tls=ours.issue('::1'))
    fill(nsqd)
    program.once(nsqd, nsq={'tls': {'ca-file': ours.file}})
    all_stored(program, nsqd)


def test_system_authorities_are_trusted_without_ca_file(program, nsqds, ours, monkeypatch):
    nsqd, = nsqds(1, tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    refused(program.once(nsqd, nsq={'tls': {}}, expect=69), 'TLS')
    monkeypatch.setenv('SSL_CERT_FILE', str(ours.file))
    program.once(nsqd, nsq={'tls': {}})
    all_stored(program, nsqd)


def test_ca_file_replaces_the_system_authorities(program, nsqds, ours, theirs, monkeypatch):
    nsqd, = nsqds(1, tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    monkeypatch.setenv('SSL_CERT_FILE', str(ours.file))
    refused(program.once(nsqd, nsq={'tls': {'ca-file': theirs.file}}, expect=69), 'TLS')
    nothing_taken(nsqd)


def test_client_certificate_is_shown_where_nsqd_wants_one(program, nsqds, ours):
    nsqd, = nsqds(1, *WANTS_CERTIFICATE, '--tls-root-ca-file', ours.file, tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    done = program.once(nsqd, nsq={'tls': {'ca-file': ours.file}}, expect=69)
    refused(done, 'TLS', 'certificate required')
    cert, key = ours.issue('client.example')
    program.once(nsqd, nsq={'tls': {'ca-file': ours.file, 'cert-file': cert, 'key-file': key}})
    all_stored(program, nsqd)


def test_client_certificate_of_another_authority_is_refused(program, nsqds, ours, theirs):
    nsqd, = nsqds(1, *WANTS_CERTIFICATE, '--tls-root-ca-file', ours.file, tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    cert, key = theirs.issue('client.example')
    done = program.once(nsqd, nsq={'tls': {'ca-file': ours.file, 'cert-file': cert, 'key-file': key}}, expect=69)
    refused(done, 'TLS')
    nothing_taken(nsqd)


def test_nsqd_that_requires_tls_is_an_error_without_it(program, nsqds, ours):
    nsqd, = nsqds(1, '--tls-required=tcp-https', tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    refused(program.once(nsqd, expect=69), 'TLS required')
    assert 'TLS required' in program.run('check', '--connect', expect=69).stderr
    nothing_taken(nsqd)


def exchange(old, new):
    """Puts the contents of files in the place of others."""
    for there, source in zip(old, new, strict=True):
        shutil.copy(source, there)


def warnings(program, nsqd, words):
    """The warnings of a program in the background that are about that nsqd, or about the queue whose only one it is,
    with these words."""
    begin = re.compile(rf'warning: (queue unavailable \((no nsqd can be reached:|nsqd)|nsqd) {re.escape(nsqd.tcp)}: ')
    return [line for line in program.log.read_text().splitlines() if begin.match(line) and words in line]


def test_exchanged_authority_is_read_at_the_next_attempt(program, nsqds, ours, workdir):
    """By a daemon in a window that never ends; meanwhile it says why it can't connect. Dead letters need it, too."""
    (workdir / 'new').mkdir()
    new = Authority(workdir / 'new', 'new')
    served = ours.issue('127.0.0.1')
    nsqd, = nsqds(1, '--tls-required=tcp-https', tls=served)
    fill(nsqd)
    program.configure(nsqd, period='0', nsq={'tls': {'ca-file': ours.file}})
    program.start('daemon')
    servers.wait_until(lambda: len(program.records()) == 10, 'the first messages are stored')
    exchange(served, new.issue('127.0.0.1'))
    nsqd.restart()
    servers.wait_until(lambda: warnings(program, nsqd, 'TLS: '), 'it does not trust the new authority', 20)
    exchange([ours.file], [new.file])
    nsqd.publish(TOPIC, [b'{"n": 10}', b'no JSON'])
    servers.wait_until(lambda: len(program.records()) == 11, 'the next message is stored', 20)
    servers.wait_until(lambda: nsqd.stats(f'{TOPIC}.dead', 'x-msrv-replay')['depth'] == 1, 'the dead letter is kept')
    all_stored(program, nsqd, 11)


def test_exchanged_client_certificate_is_read_at_the_next_attempt(program, nsqds, ours, theirs):
    """Beside another nsqd that stays connected; the file is away for a while, too."""
    shown = theirs.issue('client.example')
    other, nsqd = (nsqds(1, *args, tls=ours.issue('127.0.0.1'))[0] for args in (
        [], [*WANTS_CERTIFICATE, '--tls-root-ca-file', ours.file]))
    fill(other)
    nsqd.publish(TOPIC, b'{"n": 10}')
    program.configure([other, nsqd], period='0', nsq={'tls': {
        'ca-file': ours.file, 'cert-file': shown[0], 'key-file': shown[1]}})
    program.start('daemon')
    servers.wait_until(lambda: warnings(program, nsqd, 'alert'), 'its client certificate is refused')
    shown[0].unlink()
    servers.wait_until(lambda: warnings(program, nsqd, 'No such file'), 'the certificate is away', 20)
    exchange(shown, ours.issue('client.example'))
    servers.wait_until(lambda: len(program.records()) == 11, 'the messages of both are stored', 20)


def test_nsqd_with_a_bad_certificate_beside_a_good_one_costs_a_warning(program, nsqds, ours, workdir):
    good, = nsqds(1, tls=ours.issue('127.0.0.1'))
    (workdir / 'wrong').mkdir()
    other = Authority(workdir / 'wrong', 'wrong')
    bad, = nsqds(1, tls=other.issue('127.0.0.1'))
    for nsqd in (good, bad):
        fill(nsqd)
    done = program.once([good, bad], nsq={'tls': {'ca-file': ours.file}})
    all_stored(program, good)
    nothing_taken(bad)
    assert [line for line in done.stderr.splitlines() if line.startswith('warning') and bad.tcp in line]


# -------------------------------------------------------------------------------- what crossed, as the other end saw it

def context(authority, *names, **options):
    """The server's side of TLS with a certificate for `names`."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*authority.issue(*names, **options))
    return made


def only_identify(fake):
    """What came in the clear is one IDENTIFY."""
    assert fake.plain.startswith(b'  V2IDENTIFY\n')
    size = int.from_bytes(fake.plain[13:17], 'big')
    json.loads(fake.plain[17:])
    assert len(fake.plain) == 17 + size


@contextlib.contextmanager
def fake_nsqd(info, tls=None):
    """A FakeNsqd; at the end it has read all that was sent."""
    with proxies.FakeNsqd(info, tls) as fake:
        yield fake
        servers.wait_until(lambda: fake.ended, 'the connection has ended')


def test_secret_crosses_within_tls_alone(program, ours, secret):
    """Shows what the tests below look for, and that the fake can see it."""
    with fake_nsqd(FEATURES, context(ours, '127.0.0.1')) as fake:
        done = program.once(args=['-v'], nsq={'nsqd-tcp-address': [fake.tcp], 'auth-secret-file': secret,
                                              'tls': {'ca-file': ours.file}})
    only_identify(fake)
    assert fake.secret.startswith(b'AUTH\n' + len(SECRET).to_bytes(4, 'big') + SECRET.encode() + b'SUB orders x-msrv\n')
    assert fake.secret.endswith(b'CLS\n')
    assert SECRET not in done.stderr + done.stdout


PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize(('names', 'options', 'word'), [
    (['192.0.2.1'], {}, 'mismatch'),
    (['nsqd.example'], {}, 'mismatch'),
    (['127.0.0.1'], {'not_before': PAST, 'not_after': PAST + datetime.timedelta(days=1)}, 'expired'),
], ids=['other address', 'other name', 'expired'])
def test_certificate_that_does_not_fit_ends_it_before_any_secret(program, ours, secret, names, options, word):
    with fake_nsqd(FEATURES, context(ours, *names, **options)) as fake:
        done = program.once(nsq={'nsqd-tcp-address': [fake.tcp], 'auth-secret-file': secret,
                                 'tls': {'ca-file': ours.file}}, expect=69)
    only_identify(fake)
    assert (fake.secret, len(fake.refusals)) == (b'', 1)
    refused(done, 'TLS', word)


def test_certificate_of_an_unknown_authority_ends_it_before_any_secret(program, ours, theirs, secret):
    with fake_nsqd(FEATURES, context(theirs, '127.0.0.1')) as fake:
        done = program.once(nsq={'nsqd-tcp-address': [fake.tcp], 'auth-secret-file': secret,
                                 'tls': {'ca-file': ours.file}}, expect=69)
    only_identify(fake)
    assert (fake.secret, len(fake.refusals)) == (b'', 1)
    refused(done, 'TLS', 'unable to get local issuer certificate')


@pytest.mark.parametrize('info', [{**FEATURES, 'tls_v1': False}, {'auth_required': True}], ids=['off', 'unknown'])
def test_nsqd_without_tls_gets_neither_secret_nor_subscription(program, ours, secret, info):
    with fake_nsqd(info) as fake:
        done = program.once(nsq={'nsqd-tcp-address': [fake.tcp], 'auth-secret-file': secret,
                                 'tls': {'ca-file': ours.file}}, expect=69)
    only_identify(fake)
    refused(done, 'TLS is configured')


def test_real_nsqd_without_tls_gets_neither_secret_nor_subscription(program, nsqd, ours, secret):
    fill(nsqd)
    with proxies.Proxy(nsqd) as proxy:
        done = program.once(nsq={'nsqd-tcp-address': proxy.addresses, 'auth-secret-file': secret,
                                 'tls': {'ca-file': ours.file}}, expect=69)
    assert [event.name for event in proxy.events] == ['magic', 'IDENTIFY', 'response']
    refused(done, 'TLS is configured')
    nothing_taken(nsqd)


@pytest.mark.filterwarnings('ignore:ssl.TLSVersion:DeprecationWarning')
def test_old_tls_is_refused(program, ours, secret):
    """TLS 1.1 is the most that this server offers."""
    old = context(ours, '127.0.0.1')
    old.set_ciphers('ALL:@SECLEVEL=0')
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with fake_nsqd(FEATURES, old) as fake:
        done = program.once(nsq={'nsqd-tcp-address': [fake.tcp], 'auth-secret-file': secret,
                                 'tls': {'ca-file': ours.file}}, expect=69)
    assert (fake.secret, len(fake.refusals)) == (b'', 1)
    refused(done, 'TLS')


def test_handshake_without_end_is_bounded(program, ours):
    with proxies.Says(proxies.frame(json.dumps(FEATURES).encode())) as says:
        done = program.once(nsq={'nsqd-tcp-address': [says.address], 'tls': {'ca-file': ours.file}}, timeout='60s',
                            expect=69, within=15)
    refused(done, 'TLS: no answer in 5 s')


# ----------------------------------------------------------------------------------------------------------------- auth

@pytest.fixture
def auth_server():
    """The address of an auth server that knows SECRET, for everything, and `reader`, which may read another topic."""
    def answer(path):
        known = {f'secret={SECRET}': '.*', 'secret=reader': '^another$'}
        topic = next((topic for part, topic in known.items() if part in path), None)
        grant = {'topic': topic, 'channels': ['.*'], 'permissions': ['subscribe', 'publish']}
        body = {'ttl': 3600, 'identity': 'x', 'identity_url': '', 'authorizations': [grant]}
        return (200, json.dumps(body).encode()) if topic else (403, b'{"message": "NOT_AUTHORIZED"}')
    with proxies.Web(answer) as server:
        yield server.address


@pytest.fixture
def guarded(nsqds, auth_server):
    """An nsqd that asks the auth server, with ten messages."""
    nsqd, = nsqds(1, f'--auth-http-address={auth_server}')
    fill(nsqd)
    return nsqd


def test_good_secret_is_let_in_and_never_logged(program, guarded, secret):
    guarded.publish(TOPIC, b'no JSON')
    done = program.once(guarded, args=['-v'], nsq={'auth-secret-file': secret})
    assert servers.summary(done.stderr)['dead'] == 1  # the dead letter's connection has shown the secret, too
    all_stored(program, guarded)
    assert SECRET not in done.stderr + done.stdout + program.run('config').stdout


@pytest.mark.parametrize(('text', 'word'), [('wrong', 'E_AUTH_FAILED'), ('reader', 'E_UNAUTHORIZED')])
def test_secret_that_does_not_open_is_69(program, guarded, workdir, text, word):
    (workdir / 'other').write_text(text)
    refused(program.once(guarded, nsq={'auth-secret-file': workdir / 'other'}, expect=69), word)
    nothing_taken(guarded)


def test_nsqd_that_wants_a_secret_is_69_without_one(program, guarded):
    refused(program.once(guarded, expect=69), 'AUTH required')
    assert 'AUTH required' in program.run('check', '--connect', expect=69).stderr
    nothing_taken(guarded)


@pytest.mark.parametrize(('patience', 'status'), [('6s', 0), ('700ms', 69)])
def test_slow_auth_server_has_a_step_of_the_connection_to_itself(program, nsqds, workdir, secret, patience, status):
    """It takes 1.5 s, of each nsqd; nsqd waits for 5 s."""
    grant = {'topic': '.*', 'channels': ['.*'], 'permissions': ['subscribe', 'publish']}
    body = json.dumps({'ttl': 3600, 'identity': 'x', 'identity_url': '', 'authorizations': [grant]}).encode()

    def answer(path):
        over = flows.passed(1.5)
        servers.wait_until(over, 'the auth server has thought about it')
        return 200, body

    with proxies.Web(answer) as server:
        nsqd, = nsqds(1, f'--auth-http-address={server.address}', '--http-client-request-timeout=5s')
        fill(nsqd)
        options = {'auth-secret-file': secret, 'connect-timeout': patience}
        done = program.once(nsqd, nsq=options, expect=status)
    if status:
        refused(done, 'AUTH: no answer in 0.7 s')
        nothing_taken(nsqd)
    else:
        all_stored(program, nsqd)


def test_exchanged_secret_is_read_at_the_next_attempt(program, guarded, workdir):
    (workdir / 'other').write_text('wrong')
    program.configure(guarded, period='0', nsq={'auth-secret-file': workdir / 'other'})
    program.start('daemon')
    servers.wait_until(lambda: program.log.read_text().count('E_AUTH_FAILED'), 'the secret does not open')
    (workdir / 'other').write_text(SECRET)
    servers.wait_until(lambda: len(program.records()) == 10, 'the messages are stored', 20)
    all_stored(program, guarded)


def test_nsqd_without_auth_never_sees_the_secret(program, nsqd, secret):
    fill(nsqd)
    with proxies.Proxy(nsqd) as proxy:
        done = program.once(nsq={'nsqd-tcp-address': proxy.addresses, 'auth-secret-file': secret}, expect=69)
    assert [event.name for event in proxy.events] == ['magic', 'IDENTIFY', 'response']
    refused(done, 'auth-secret-file is set')
    nothing_taken(nsqd)


def test_secret_and_tls_together(program, nsqds, auth_server, ours, secret):
    nsqd, = nsqds(1, f'--auth-http-address={auth_server}', '--tls-required=tcp-https', tls=ours.issue('127.0.0.1'))
    fill(nsqd)
    program.once(nsqd, nsq={'auth-secret-file': secret, 'tls': {'ca-file': ours.file}})
    all_stored(program, nsqd)
