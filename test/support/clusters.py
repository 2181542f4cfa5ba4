"""Where the Aerospike tests keep their records: in a real server, where XMSRV_TEST_AEROSPIKE=host:port names one, else
in the stand-in; and what they read back, by the official client."""
import contextlib
import itertools
import os

import aerospike

import proxies
from aerospike_server import AerospikeServer, form_cluster

REAL = os.environ.get('XMSRV_TEST_AEROSPIKE')
NAMESPACE = 'test'
sets = itertools.count()


class Cluster:
    """A set of one's own in a namespace, and a client that looks at it. server: the stand-in; None for a real one.
    options: more of the client's own configuration."""

    def __init__(self, address, server=None, **options):
        self.address, self.server, self.options = address, server, options
        self.set = f'xmsrv-{os.getpid()}-{next(sets)}'
        self._client = None

    @property
    def client(self):
        """Connected when it is first asked for."""
        if not self._client:
            host, _, port = self.address.rpartition(':')
            self._client = aerospike.client({'hosts': [(host.strip('[]'), int(port))], 'validate_keys': True,
                                             **self.options})
        return self._client

    def settings(self, **more):
        """What Xmsrv.configure() is told, so that records go here; `more` is of [aerospike]."""
        options = {'hosts': self.address, 'namespace': NAMESPACE, 'set': self.set, **more}
        return {'store': 'aerospike', 'aerospike': options}

    def rows(self):
        """All records as (key, bins); the key is the user's own, and its type with it."""
        found = self.client.query(NAMESPACE, self.set).results()
        assert all(key[1] == self.set and key[2] is not None for key, _, _ in found)
        return [(key[2], bins) for key, _, bins in found]

    def records(self):
        """The bins of each record by its key; AssertionError where two records have one."""
        rows = self.rows()
        records = {(type(key), key): bins for key, bins in rows}
        assert len(records) == len(rows)
        return {key: bins for (_, key), bins in records.items()}

    def numbers(self):
        """The `n` of each record, in order: twice in the list where a message became two records."""
        return sorted(bins['n'] for _, bins in self.rows())

    def stored(self):
        """The number of records, at little cost."""
        if self.server:
            return self.server.stored(NAMESPACE, self.set)
        return len(self.rows())

    def put(self, key, bins):
        """A record as somebody else would write it."""
        self.client.put((NAMESPACE, self.set, key), bins, policy={'key': aerospike.POLICY_KEY_SEND})

    def close(self):
        """Takes the records out of a real server, and disconnects."""
        if not self.server:
            self.client.truncate(NAMESPACE, self.set, 0)
        if self._client:
            self._client.close()


@contextlib.contextmanager
def standin(**options):
    """A Cluster on a stand-in of its own."""
    with AerospikeServer(**options) as server, contextlib.closing(Cluster(server.address, server)) as cluster:
        yield cluster


@contextlib.contextmanager
def pair():
    """A Cluster behind a NAT: two stand-ins, each with half of the partitions, whose advertised addresses refuse. The
    second one is the only peer of its `server`."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(AerospikeServer(node=name, advertised=stack.enter_context(proxies.refusing())))
                 for name in ('BB901000000FC02', 'BB902000000FC02')]
        form_cluster(*nodes)
        options = {'use_services_alternate': True}
        yield stack.enter_context(contextlib.closing(Cluster(nodes[0].address, nodes[0], **options)))


@contextlib.contextmanager
def any_cluster():
    """A Cluster on the real server where there is one, else on a stand-in."""
    with contextlib.closing(Cluster(REAL)) if REAL else standin() as cluster:
        yield cluster
