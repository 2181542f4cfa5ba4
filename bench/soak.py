#!/usr/bin/env python3
"""`make soak`: ten minutes of a daemon's life, with an outage of the store, a reload and a killed worker in each.

Messages flow all the time, 1 in 100 of them bad, and its figures are scraped. A minute after the start and at the end
it says what all its processes hold together: memory that grows by more than 8 MiB, or open files that grow at all, or a
message that is neither a record nor a dead letter, make it fail. The store is the stand-in of the tests.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'test' / 'support'))

from aerospike_server import AerospikeServer  # noqa: E402
from servers import Nsqd, Xmsrv, free_ports, wait_until  # noqa: E402

TOPIC, CHANNEL = 'soak', 'x-msrv'
CHUNK = 100        # messages a publish, ten times a second
GROWTH = 8         # MiB
NAMESPACE = 'test'


def processes(parent):
    """The pids of the daemon and of its workers."""
    found = subprocess.run(['pgrep', '-P', str(parent)], capture_output=True, text=True, check=False).stdout.split()
    return [parent, *map(int, found)]


def held(parent):
    """(MiB, open files) of the daemon and its workers together."""
    pages = files = 0
    for pid in processes(parent):
        pages += int(Path(f'/proc/{pid}/statm').read_text().split()[1])
        files += len(os.listdir(f'/proc/{pid}/fd'))
    return pages * os.sysconf('SC_PAGESIZE') / (1 << 20), files


class Flow(threading.Thread):
    """Publishes until it is told to stop; `count` is how many there were."""

    def __init__(self, nsqd):
        super().__init__(daemon=True)
        self.nsqd, self.count, self.over = nsqd, 0, threading.Event()

    def run(self):
        while not self.over.wait(0.1):
            bodies = [json.dumps({'n': n, 'text': 'x' * 60}) if n % 100 else '{"cut'
                      for n in range(self.count, self.count + CHUNK)]
            self.nsqd.publish(TOPIC, bodies)
            self.count += CHUNK


def minute(running, server, port, workers):
    """One minute, scraped each second, with an outage, a reload and a kill. Returns (MiB, open files) at its end."""
    begun = time.monotonic()
    events = {15: server.refuse, 20: server.listen, 35: lambda: running.send_signal(signal.SIGHUP)}
    if workers > 1:
        events[45] = lambda: os.kill(processes(running.pid)[-1], signal.SIGKILL)
    for second in range(60):
        wait_until(lambda second=second: time.monotonic() >= begun + second, 'the next second', 70)
        if second in events:
            events[second]()
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/metrics', timeout=10) as answer:
            answer.read()
        if running.poll() is not None:
            sys.exit(f'soak: the daemon has ended with {running.returncode}')
    return held(running.pid)


def soak(directory, minutes, workers):
    """The whole of it; returns the faults."""
    port = free_ports()
    with Nsqd(directory, '--msg-timeout=5s') as nsqd, AerospikeServer(namespaces=(NAMESPACE,)) as server:
        program = Xmsrv(directory)
        program.configure(nsqd, topic=TOPIC, period='1s', workers=workers, metrics={'listen': f'127.0.0.1:{port}'},
                          store='aerospike', aerospike={'hosts': server.address, 'namespace': NAMESPACE})
        nsqd.create(TOPIC, CHANNEL)
        running = program.start('daemon')
        try:
            wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['clients'], 'the daemon is subscribed', 30)
            flow = Flow(nsqd)
            flow.start()
            samples = []
            for number in range(1, minutes + 1):
                samples.append(minute(running, server, port, workers))
                print(f'minute {number:2}: {flow.count:9,} published, {server.stored(NAMESPACE, TOPIC):9,} stored, '
                      f'{samples[-1][0]:6.1f} MiB, {samples[-1][1]} open files', flush=True)
            flow.over.set()
            flow.join()
            wait_until(lambda: not nsqd.left(TOPIC, CHANNEL), 'all is stored', 120)
            running.terminate()
            running.wait(timeout=30)
            return list(faults(samples, flow.count, server.stored(NAMESPACE, TOPIC), nsqd))
        finally:
            program.close()


def faults(samples, published, stored, nsqd):
    """Yields what is wrong at the end."""
    (memory, files), (memory_then, files_then) = samples[0], samples[-1]
    dead = len({body for _, body in nsqd.letters(f'{TOPIC}.dead')})
    print(f'memory {memory_then - memory:+.1f} MiB, open files {files_then - files:+}, {published:,} published, '
          f'{stored:,} stored')
    if memory_then - memory > GROWTH:
        yield f'memory grew by {memory_then - memory:.1f} MiB'
    if files_then > files:
        yield f'open files grew from {files} to {files_then}'
    if stored != published - published // 100:
        yield f'{stored} records of {published - published // 100} good messages'
    if not dead:
        yield 'no dead letter was kept'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=int, default=10, help='how long (default: 10)')
    parser.add_argument('--workers', type=int, default=2, help='worker processes of the daemon (default: 2)')
    options = parser.parse_args()
    (ROOT / 'build').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='soak-', dir=ROOT / 'build') as directory:
        found = soak(directory, options.minutes, options.workers)
    sys.exit('soak: ' + '; '.join(found) if found else 0)


if __name__ == '__main__':
    main()
