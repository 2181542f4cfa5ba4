#!/usr/bin/env python3
"""`make bench`: what x-msrv costs, beside the obvious version, in one run on one machine and on a real nsqd.

The machine is shared with the nsqd that is read from, and noisy: ratios hold, absolute figures do not.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'test'))

from servers import PROGRAM, Nsqd, Xmsrv, spawn, summary  # noqa: E402

TOPIC = 'bench'
LARGE = 1_000_000


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
    """A message of 80 bytes."""
    start = json.dumps({'id': number, 'price': number / 8, 'msg': ''})[:-2]
    return (start + 'm' * (78 - len(start)) + '"}').encode()


def fill(nsqd, count):
    """Publishes `count` messages to both channels of an empty topic."""
    nsqd.request('POST', '/topic/create', topic=TOPIC)
    for channel in ('x-msrv', 'obvious'):
        nsqd.request('POST', '/channel/create', topic=TOPIC, channel=channel)
        nsqd.request('POST', '/channel/empty', topic=TOPIC, channel=channel)
    nsqd.publish(TOPIC, [body(number) for number in range(count)])


def once(nsqd, directory, count, **nsq):
    """The Cost of `x-msrv once` for `count` messages to an empty database, all at its defaults."""
    program = Xmsrv(tempfile.mkdtemp(dir=directory))
    program.configure(nsqd, topic=TOPIC, timeout='10m', nsq=nsq)
    cost = Cost([PROGRAM, '-c', program.path, 'once'], directory)
    if summary(cost.said)['stored'] != count:
        sys.exit(f'bench: not all of {count} messages were stored:\n{cost.said}')
    return cost


def obvious(nsqd, directory, count):
    """The Cost of the obvious version for the same messages."""
    database = Path(tempfile.mkdtemp(dir=directory)) / 'records.sqlite'
    return Cost([sys.executable, ROOT / 'bench' / 'obvious.py', nsqd.tcp, TOPIC, database, count], directory)


def show(name, count, costs):
    """Prints the median of several runs; returns its messages a second."""
    rate = statistics.median(count / cost.seconds for cost in costs)
    cpu = statistics.median(cost.cpu for cost in costs) / count * 100_000
    memory = max(cost.memory for cost in costs)
    print(f'{name:44} {rate:9,.0f} {cpu:10.2f} {memory:8.0f}', flush=True)
    return rate


def throughput(nsqd, directory, count, rounds):
    """(a) against (b), in turns, so that a noisy neighbour meets both."""
    ours, theirs = [], []
    for _ in range(rounds):
        fill(nsqd, count)
        ours.append(once(nsqd, directory, count, **{'max-messages': count}))
        theirs.append(obvious(nsqd, directory, count))
    print(f'\n{f"{count:,} messages of 80 bytes":44} {"msg/s":>9} {"CPU s/100k":>10} {"peak MiB":>8}')
    a = show('(a) x-msrv once, sqlite', count, ours)
    b = show('(b) pynsq Reader, insert, commit per 100', count, theirs)
    print(f'(a) / (b)  {a / b:.1f}')
    return max(cost.memory for cost in ours)


def start_to_exit(nsqd, directory, rounds):
    """Seconds of a run that finds ten messages, and of one that finds none."""
    print()
    for name, count, options in (('10 messages, max-messages = 10', 10, {'max-messages': 10}),
                                 ('none (of it, idle-timeout 0.5 s)', 0, {})):
        costs = []
        for _ in range(rounds):
            fill(nsqd, 0)
            if count:
                nsqd.publish(TOPIC, [body(number) for number in range(count)])
            costs.append(once(nsqd, directory, count, **options))
        print(f'start to exit, {name:34} {statistics.median(cost.seconds for cost in costs):.2f} s')


def large(nsqd, directory, memory):
    """Memory after ten times as many messages."""
    fill(nsqd, LARGE)
    print(f'\n{"ten times as many":44} {"msg/s":>9} {"CPU s/100k":>10} {"peak MiB":>8}')
    cost = once(nsqd, directory, LARGE, **{'max-messages': LARGE})
    show(f'(a) {LARGE:,} messages', LARGE, [cost])
    print(f'memory grew by {cost.memory - memory:+.1f} MiB')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=100_000, help='messages a run (default: 100,000)')
    parser.add_argument('--rounds', type=int, default=3, help='runs of each; the median is shown (default: 3)')
    options = parser.parse_args()
    (ROOT / 'build').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='bench-', dir=ROOT / 'build') as directory, \
            Nsqd(directory, f'--mem-queue-size={2 * LARGE}') as nsqd:
        print(f'Python {sys.version.split()[0]}, {os.cpu_count()} cores, nsqd on the same machine', flush=True)
        memory = throughput(nsqd, directory, options.count, options.rounds)
        start_to_exit(nsqd, directory, options.rounds)
        large(nsqd, directory, memory)


if __name__ == '__main__':
    main()
