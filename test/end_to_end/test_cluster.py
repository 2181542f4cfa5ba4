"""Reaching a cluster: of several nodes, behind a NAT, by its name, with each kind of log-in; with and without keys."""
import ssl
import threading

import pytest
import trustme

import clusters
import servers
from clusters import NAMESPACE
from flows import CHANNEL, TOPIC, bodies, fill
from servers import wait_until

ALTERNATE = {'services-alternate': 'yes'}


@pytest.fixture
def pair():
    """Two nodes whose advertised addresses can't be reached."""
    with clusters.pair() as made:
        yield made


def refused(done, nsqd, words):
    """Nothing is taken, and the line says why."""
    assert words in done.stderr, done.stderr
    stats = nsqd.stats(TOPIC, CHANNEL)
    assert (stats['depth'], stats['in_flight_count'], stats['requeue_count']) == (10, 0, 0)


# --- several nodes, behind a NAT

def test_a_cluster_behind_a_nat_is_reached_by_its_alternate_addresses(program, nsqd, pair):
    fill(nsqd, 3000)
    told = servers.summary(program.once(nsqd, **pair.settings(**ALTERNATE)).stderr)
    assert (told['stored'], told['requeued'], nsqd.left(TOPIC, CHANNEL)) == (3000, 0, 0)
    assert pair.numbers() == list(range(3000))
    shares = [node.stored(NAMESPACE, pair.set) for node in (pair.server, *pair.server.peers)]
    assert sum(shares) == 3000 and min(shares) > 1000
    assert ': 2 nodes, server ' in program.run('check', '--connect').stdout


def test_the_nodes_are_written_to_at_the_same_time(program, nsqd, pair):
    """Each of them takes its part of a batch while the other has its own under way."""
    fill(nsqd, 100)
    peer, = pair.server.peers
    meeting = threading.Barrier(2, timeout=10)
    met = []

    def meet(write):
        if write.number == 1:
            meeting.wait()   # BrokenBarrierError where the other one does not come
            met.append(write)
    pair.server.judge = peer.judge = meet
    told = servers.summary(program.once(nsqd,
                                        **pair.settings(**ALTERNATE, writers=1, **{'total-timeout': '20s'})).stderr)
    assert (told['stored'], len(met)) == (100, 2)
    assert pair.numbers() == list(range(100))


def test_without_them_it_is_69_with_the_option_that_is_missing(program, nsqd, pair):
    fill(nsqd, 10)
    done = program.once(nsqd, expect=69, **pair.settings())
    peer, = pair.server.peers
    refused(done, nsqd, f'{peer.advertised}: Connection refused (an address from the cluster; if it is an internal '
                        'one: services-alternate = yes)')


@pytest.mark.parametrize(('fail', 'mend'), [('refuse', 'listen'), ('hang', 'resume')])
def test_an_outage_of_one_of_two_nodes_loses_and_doubles_nothing(program, nsqd, pair, fail, mend):
    """Half of each batch is stored meanwhile, and no call takes longer than it may."""
    peer, = pair.server.peers
    program.configure(nsqd, period='0', **pair.settings(**ALTERNATE))
    fill(nsqd, 1000)
    program.start('daemon')
    wait_until(lambda: pair.server.stored(NAMESPACE, pair.set) + peer.stored(NAMESPACE, pair.set) == 1000,
               'the first messages are stored')
    before = peer.stored(NAMESPACE, pair.set)
    getattr(peer, fail)()
    nsqd.publish(TOPIC, bodies(1000, 1000))
    wait_until(lambda: pair.server.stored(NAMESPACE, pair.set) + before > 1300, 'the other node has its share', 20)
    getattr(peer, mend)()
    wait_until(lambda: nsqd.left(TOPIC, CHANNEL) == 0, 'all is answered', 40)
    assert pair.numbers() == list(range(2000))
    assert 'dead' not in program.log.read_text() and 'has not come back' not in program.log.read_text()


# --- by its name

def test_a_cluster_of_that_name_is_taken(program, nsqd, standin):
    fill(nsqd, 10)
    program.once(nsqd, **standin.settings(**{'cluster-name': 'standin'}))
    assert standin.numbers() == list(range(10))


def test_a_cluster_of_another_name_gets_nothing(program, nsqd, standin):
    fill(nsqd, 10)
    done = program.once(nsqd, expect=69, **standin.settings(**{'cluster-name': 'shop'}))
    refused(done, nsqd, f"{standin.address}: its cluster-name is 'standin', not 'shop'")
    assert "not 'shop'" in program.run('check', '--connect', expect=69).stderr
    assert standin.stored() == 0


def test_of_two_hosts_none_of_another_cluster_is_written_to(program, nsqd, standin):
    """Also where the client is content with some of the hosts."""
    fill(nsqd, 10)
    with clusters.standin() as other:
        other.server.cluster_name = 'shop'
        program.once(nsqd, **standin.settings(hosts=f'{standin.address}, {other.address}', **{'cluster-name': 'shop'}))
        assert len(other.client.query(NAMESPACE, standin.set).results()) == 10
    assert standin.stored() == 0


# --- connections

def test_no_more_connections_are_made_than_allowed(program, nsqd, standin):
    """One of the client's is for its looks at the cluster."""
    standin.server.delay = 0.05
    fill(nsqd, 2000)
    most = []
    standin.server.judge = lambda write: most.append(len(standin.server.connections))
    settings = standin.settings(**{'max-connections': 2, 'writers': 2, 'batch-size': 50})
    program.once(nsqd, timeout='20s', **settings)
    assert standin.numbers() == list(range(2000))
    assert max(most) <= 3


# --- log-ins

@pytest.fixture
def guarded(workdir):
    """A function: a stand-in with TLS and users, and x-msrv's certificate for the name, in client.pem."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(workdir / 'ca.pem')

    def start(name):
        client = authority.issue_cert('x-msrv.example', common_name=name)
        client.private_key_and_cert_chain_pem.write_to_path(workdir / 'client.pem')
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert('db.example').configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        (workdir / 'password').write_text('s3cret\n')
        return clusters.standin(tls=context, users={'writer': 's3cret'})
    return start


def stored_by(server, directory, program, nsqd, certificate=False, expect=0, **options):
    """Runs a window with ten messages, with that log-in."""
    fill(nsqd, 10)
    tls = {'ca-file': directory / 'ca.pem', 'name': 'db.example'}
    tls |= {'cert-file': directory / 'client.pem', 'key-file': directory / 'client.pem'} if certificate else {}
    done = program.once(nsqd, expect=expect, **server.settings(tls=tls, **options))
    assert server.stored() == (0 if expect else 10)
    assert 's3cret' not in done.stderr
    return done


def test_a_client_certificate_names_the_user(program, nsqd, guarded, workdir):
    with guarded('writer') as cluster:
        stored_by(cluster, workdir, program, nsqd, certificate=True, **{'auth-mode': 'pki'})


def test_a_client_certificate_of_nobody_is_69(program, nsqd, guarded, workdir):
    with guarded('nobody') as cluster:
        done = stored_by(cluster, workdir, program, nsqd, certificate=True, expect=69, **{'auth-mode': 'pki'})
    refused(done, nsqd, 'invalid user')


def test_a_certificate_alone_is_no_log_in_unless_asked_for(program, nsqd, guarded, workdir):
    with guarded('writer') as cluster:
        refused(stored_by(cluster, workdir, program, nsqd, certificate=True, expect=69), nsqd, 'not authenticated')


def test_a_user_of_a_directory_logs_in_with_the_password_itself(program, nsqd, guarded, workdir):
    login = {'auth-mode': 'external', 'user': 'writer', 'password-file': workdir / 'password'}
    with guarded('x-msrv') as cluster:
        (workdir / 'password').write_text('another\n')
        done = stored_by(cluster, workdir, program, nsqd, expect=69, **login)
        refused(done, nsqd, 'invalid credential')
    with guarded('x-msrv') as cluster:
        nsqd.drain(TOPIC, CHANNEL)
        stored_by(cluster, workdir, program, nsqd, **login)


# --- keys

def stored_keys(cluster):
    """The key that each record has with it, None where it has none."""
    return [key[2] for key, _, _ in cluster.client.query(NAMESPACE, cluster.set).results()]


@pytest.mark.parametrize('send', ['yes', 'no'])
def test_keys_are_stored_unless_that_is_not_wished(program, nsqd, cluster, send):
    fill(nsqd, 10)
    program.once(nsqd, **cluster.settings(**{'send-key': send}))
    found = cluster.client.query(NAMESPACE, cluster.set).results()
    assert sorted(bins['n'] for _, _, bins in found) == list(range(10))
    assert all(key[2] == (bins['gid'] if send == 'yes' else None) for key, _, bins in found)


def test_without_keys_the_newest_still_wins_and_none_is_doubled(program, nsqd, cluster):
    record = {'key': 'id', 'time': 'at', 'id-bin': ''}
    settings = {'record': record, **cluster.settings(**{'send-key': 'no'})}
    nsqd.publish(TOPIC, [b'{"id": 1, "at": 2}', b'{"id": "1", "at": 2}'])
    assert servers.summary(program.once(nsqd, **settings).stderr)['stored'] == 2
    nsqd.publish(TOPIC, [b'{"id": 1, "at": 1}', b'{"id": "1", "at": 3}'])
    told = servers.summary(program.once(nsqd, **settings).stderr)
    assert (told['stored'], told['stale']) == (1, 1)
    found = cluster.client.query(NAMESPACE, cluster.set).results()
    assert stored_keys(cluster) == [None, None]
    assert sorted((str(bins['id']), type(bins['id']).__name__, bins['gts']) for _, _, bins in found) == [
        ('1', 'int', 2), ('1', 'str', 3)]
