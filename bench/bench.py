#!/usr/bin/env python3
"""`make bench`: what x-msrv costs, beside the obvious version, in one run on one machine and on a real nsqd.

The machine is shared with the nsqd that is read from, and noisy: ratios hold, absolute figures do not.
"""
import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'test' / 'support'))

from servers import PROGRAM, Nsqd, Xmsrv, spawn, summary, wait_until  # noqa: E402

TOPIC = 'bench'
MANY = 1_000_000
IDLE_SECONDS = 10
STEADY_RATE, STEADY_SECONDS = 500, 10
NSQDS = 100
LARGE = ((1_000_000, 100), (25_000_000, 4))   # bytes of a message, how many of them
MAX_LARGE = '--max-msg-size=30000000', '--max-body-size=30000000'


class Cost:
    """What one run of a command cost: seconds from start to exit, CPU seconds, peak memory in MiB."""

    def __init__(self, command, directory):
        begun = time.monotonic()
        process = spawn(command, stderr=subprocess.PIPE, cwd=directory)
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f'bench: {command} ended with {process.returncode}:\n{said}')
        self.cpu = usage.ru_utime + usage.ru_stime
        self.memory = usage.ru_maxrss / 1024
        self.said = said


def body(number):
    """A message of some 90 bytes, with a list of objects."""
    return (b'{"id": %d, "msg": "Some message-%d", "price": 0.25, "ext": [{"ext1": "xxx"}, {"ext2": 42}]}'
            % (number, number))


def large_body(size):
    """A message of so many bytes, all but a few of them in lines of 80."""
    return json.dumps({'id': size, 'lines': ['m' * 80] * (size // 84)}).encode()


def fill(nsqd, count):
    """Publishes `count` messages to both channels of an empty topic."""
    nsqd.request('POST', '/topic/create', topic=TOPIC)
    for channel in ('x-msrv', 'obvious'):
        nsqd.request('POST', '/channel/create', topic=TOPIC, channel=channel)
        nsqd.request('POST', '/channel/empty', topic=TOPIC, channel=channel)
    nsqd.publish(TOPIC, [body(number) for number in range(count)])


def once(nsqd, directory, count, cluster=None, **nsq):
    """The Cost of `x-msrv once` for `count` messages to an empty database or an emptied set, all at its defaults."""
    program = Xmsrv(tempfile.mkdtemp(dir=directory))
    program.configure(nsqd, topic=TOPIC, timeout='10m', nsq=nsq, **(cluster.emptied() if cluster else {}))
    cost = Cost([PROGRAM, '-c', program.path, 'once'], directory)
    if count and summary(cost.said)['stored'] != count:   # an empty window says nothing
        sys.exit(f'bench: not all of {count} messages were stored:\n{cost.said}')
    return cost


def obvious(nsqd, directory, count, cluster=None):
    """The Cost of the obvious version for the same messages."""
    place = cluster.place() if cluster else Path(tempfile.mkdtemp(dir=directory)) / 'records.sqlite'
    return Cost([sys.executable, ROOT / 'bench' / 'obvious.py', nsqd.tcp, TOPIC, place, count], directory)


class Cluster:
    """The real Aerospike server that the benchmark was given, and the set that it fills there."""

    def __init__(self, address, namespace):
        import aerospike  # here: without a server there is no need of it
        self.address, self.namespace, self.set = address, namespace, f'bench-{os.getpid()}'
        host, _, port = address.rpartition(':')
        self.client = aerospike.client({'hosts': [(host, int(port))]})

    def empty(self):
        """Takes all records out, and waits until they are gone."""
        self.client.truncate(self.namespace, self.set, 0)
        wait_until(lambda: not self.count(), 'the set is empty', 60)

    def count(self):
        """The records in the set, as the server counts them."""
        (_, answer), = self.client.info_all(f'sets/{self.namespace}/{self.set}').values()
        return int(dict(fact.partition('=')[::2] for fact in answer.split(':')).get('objects', 0))

    def emptied(self):
        """What Xmsrv.configure() is told, with the set empty."""
        self.empty()
        options = {'hosts': self.address, 'namespace': self.namespace, 'set': self.set}
        return {'store': 'aerospike', 'aerospike': options}

    def place(self):
        """The same for obvious.py."""
        self.empty()
        return f'aerospike:{self.address}:{self.namespace}:{self.set}'

    def bare(self, directory, count):
        """The messages a second of the bare client, and the CPU microseconds that it takes for one."""
        self.empty()
        command = [sys.executable, ROOT / 'bench' / 'bare.py', self.address, self.namespace, self.set, count]
        said = subprocess.run([str(part) for part in command], cwd=directory, check=True, stdout=subprocess.PIPE).stdout
        seconds, cpu = map(float, said.split())
        return count / seconds, cpu / count * 1e6


def show(name, count, costs):
    """Prints the median of several runs; returns its messages a second."""
    rate = statistics.median(count / cost.seconds for cost in costs)
    cpu = statistics.median(cost.cpu for cost in costs) / count * 1e6
    memory = max(cost.memory for cost in costs)
    print(f'{name:44} {rate:9,.0f} {cpu:10.1f} {memory:8.0f}', flush=True)
    return rate


def headline(name):
    """Prints what stands above the rows of show()."""
    print(f'\n{name:44} {"msg/s":>9} {"CPU us/msg":>10} {"peak MiB":>8}')


def throughput(nsqd, directory, count, rounds, cluster=None):
    """(a) against (b), with a cluster also (c), in turns, so that a noisy neighbour meets all."""
    ours, theirs, bare = [], [], []
    for _ in range(rounds):
        fill(nsqd, count)
        ours.append(once(nsqd, directory, count, cluster, **{'max-messages': count}))
        theirs.append(obvious(nsqd, directory, count, cluster))
        if cluster:
            bare.append(cluster.bare(directory, count))
    headline(f'{count:,} messages of 90 bytes')
    a = show(f'(a) x-msrv once, {"aerospike" if cluster else "sqlite"}', count, ours)
    b = show(f'(b) pynsq Reader, {"one put" if cluster else "insert, commit per 100"}', count, theirs)
    if cluster:
        show_bare(a, statistics.median(cost.cpu for cost in ours) / count * 1e6, bare)
    print(f'(a) / (b)  {a / b:.1f}')
    return max(cost.memory for cost in ours)


def show_bare(rate, cpu, bare):
    """Prints the bare client's medians, and x-msrv's messages a second and CPU microseconds a message beside them."""
    bare_rate, bare_cpu = map(statistics.median, zip(*bare, strict=True))
    print(f'{"(c) bare client, batch_write of 500":44} {bare_rate:9,.0f} {bare_cpu:10.1f}')
    print(f'(a) / (c)  {rate / bare_rate:.2f}; CPU a message {cpu:.1f} us, of the bare client {bare_cpu:.1f} us, '
          f'ratio {cpu / bare_cpu:.2f}')


def wakes(pid):
    """(voluntary context switches of the main thread, CPU seconds) of a process so far."""
    status = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    ticks = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]
    return int(status['voluntary_ctxt_switches']), sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')


def idle_daemon(nsqd, directory):
    """Wake-ups and CPU of a daemon between two windows, with nothing in the queue."""
    fill(nsqd, 0)
    program = Xmsrv(tempfile.mkdtemp(dir=directory))
    program.configure(nsqd, topic=TOPIC, period='10m', timeout='5s')
    running = program.start('daemon', '-v')
    try:
        wait_until(lambda: 'window: ends' in program.log.read_text(), 'the first window is over', 30)
        begun, before = time.monotonic(), wakes(running.pid)
        wait_until(lambda: time.monotonic() - begun >= IDLE_SECONDS, 'the time to count is over', 2 * IDLE_SECONDS)
        switches, cpu = (now - then for now, then in zip(wakes(running.pid), before, strict=True))
        print(f'\nidle daemon: {switches / IDLE_SECONDS:.1f} wake-ups a second, CPU {cpu / IDLE_SECONDS:.2%}')
    finally:
        program.close()


def start_to_exit(nsqd, directory, rounds, cluster=None):
    """Seconds of a run that finds ten messages, and of one that finds none."""
    print()
    for name, count, options in (('10 messages, max-messages = 10', 10, {'max-messages': 10}),
                                 ('none (of it, idle-timeout 0.5 s)', 0, {})):
        costs = []
        for _ in range(rounds):
            fill(nsqd, 0)
            if count:
                nsqd.publish(TOPIC, [body(number) for number in range(count)])
            costs.append(once(nsqd, directory, count, cluster, **options))
        print(f'start to exit, {name:34} {statistics.median(cost.seconds for cost in costs):.2f} s')


def many(nsqd, directory, memory, cluster=None):
    """Memory after ten times as many messages."""
    fill(nsqd, MANY)
    headline('ten times as many')
    cost = once(nsqd, directory, MANY, cluster, **{'max-messages': MANY})
    show(f'(a) {MANY:,} messages', MANY, [cost])
    print(f'memory grew by {cost.memory - memory:+.1f} MiB')


def large(directory):
    """Messages of 1 MB, and of 25 MB, to SQLite: a record in Aerospike is never so large."""
    with Nsqd(directory, *MAX_LARGE) as nsqd:
        headline('large messages')
        for size, count in LARGE:
            fill(nsqd, 0)
            for _ in range(count):
                nsqd.publish(TOPIC, large_body(size))
            show(f'{count} messages of {size // 1_000_000} MB', count, [once(nsqd, directory, count)])


def many_nsqds(directory, count):
    """As many messages as before, but from 100 nsqds of one topic."""
    with contextlib.ExitStack() as stack:
        nsqds = [stack.enter_context(Nsqd(directory)) for _ in range(NSQDS)]
        for nsqd in nsqds:
            nsqd.create(TOPIC, 'x-msrv')
            nsqd.publish(TOPIC, [body(number) for number in range(count // NSQDS)])
        headline(f'{NSQDS} nsqds of one topic')
        show(f'{count:,} messages, sqlite', count, [once(nsqds, directory, count, **{'max-messages': count})])


def latency(directory, cluster=None):
    """Milliseconds from the publication of a message to its FIN, as nsqd measures them, in streaming mode."""
    with Nsqd(directory, '--e2e-processing-latency-percentile=0.5,0.99') as nsqd:
        nsqd.create(TOPIC, 'x-msrv')
        program = Xmsrv(tempfile.mkdtemp(dir=directory))
        program.configure(nsqd, topic=TOPIC, period='0', **(cluster.emptied() if cluster else {}))
        running = program.start('daemon')
        try:
            wait_until(lambda: nsqd.stats(TOPIC, 'x-msrv')['clients'], 'the daemon is subscribed', 30)
            _, before = wakes(running.pid)
            publish_steadily(nsqd)
            wait_until(lambda: not nsqd.left(TOPIC, 'x-msrv'), 'all is stored', 30)
            _, after = wakes(running.pid)
        finally:
            program.close()
        channel, = json.loads(nsqd.request('GET', '/stats', format='json', topic=TOPIC))['topics'][0]['channels']
        found = {each['quantile']: each['value'] / 1e6 for each in channel['e2e_processing_latency']['percentiles']}
    print(f'latency at {STEADY_RATE} messages/s, {"aerospike" if cluster else "sqlite"}: p50 {found[0.5]:.1f} ms, '
          f'p99 {found[0.99]:.1f} ms, CPU {(after - before) / STEADY_SECONDS:.1%}', flush=True)


def publish_steadily(nsqd):
    """Publishes one by one, evenly spread. nsqd's answers, of ten bytes each, stay unread in the socket."""
    with socket.create_connection((nsqd.host, nsqd.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b'  V2')
        begun = time.monotonic()
        for number in range(STEADY_RATE * STEADY_SECONDS):
            time.sleep(max(0.0, begun + number / STEADY_RATE - time.monotonic()))
            data = body(number)
            connection.sendall(b'PUB %s\n%s%s' % (TOPIC.encode(), len(data).to_bytes(4, 'big'), data))
        wait_until(lambda: nsqd.stats(TOPIC)['topic_messages'] == STEADY_RATE * STEADY_SECONDS, 'all is published')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=100_000, help='messages a run (default: 100,000)')
    parser.add_argument('--rounds', type=int, default=3, help='runs of each; the median is shown (default: 3)')
    parser.add_argument('--aerospike', metavar='HOST:PORT', help='a real Aerospike server, for its part')
    parser.add_argument('--namespace', default='test', help='namespace there (default: test)')
    parser.add_argument('--only', choices=['sqlite', 'aerospike'], help='one part alone')
    options = parser.parse_args()
    stores = {'sqlite': None, 'aerospike': options.aerospike and Cluster(options.aerospike, options.namespace)}
    (ROOT / 'build').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='bench-', dir=ROOT / 'build') as directory, \
            Nsqd(directory, f'--mem-queue-size={2 * MANY}') as nsqd:
        print(f'Python {sys.version.split()[0]}, {os.cpu_count()} cores, the servers on the same machine', flush=True)
        for name in [options.only] if options.only else stores:
            if name == 'aerospike' and not stores[name]:
                print('\naerospike: skipped, for no server is named: make bench AEROSPIKE=host:port')
                continue
            memory = throughput(nsqd, directory, options.count, options.rounds, stores[name])
            start_to_exit(nsqd, directory, options.rounds, stores[name])
            many(nsqd, directory, memory, stores[name])
            latency(directory, stores[name])
        idle_daemon(nsqd, directory)
        many_nsqds(directory, options.count)
        large(directory)
    if stores['aerospike']:
        stores['aerospike'].empty()


if __name__ == '__main__':
    main()
