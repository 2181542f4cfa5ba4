#!/usr/bin/env python3
"""The two ends of x-msrv as verify.sh drives them: the stand-in store, and nsqd over HTTP. Only the standard library.

    ends.py store                     the stand-in on port 3000; SIGUSR1: it goes away, SIGUSR2: back with its data
    ends.py publish TOPIC COUNT       so many messages
    ends.py load FILE TOPIC...        200 messages/s to each topic until FILE is there, then prints how many each got
    ends.py records SET               how many records the set has, whichever store is on port 3000
    ends.py left TOPIC                how many messages are not finished yet, in the channel x-msrv
    ends.py windows TOPIC             of its windows in the journal: their number, most received by one, received by all
"""
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

NAMESPACE, CHANNEL = 'test', 'x-msrv'
STORE, NSQD_HTTP = ('127.0.0.1', 3000), ('127.0.0.1', 4151)
INFO = struct.Struct('>Q')      # a byte version (2), a byte type (1), six bytes size
INFO_FLAGS = 2 << 56 | 1 << 48
MPUB = 1000                     # messages a request at most
LOAD, PAUSE = 20, 0.1           # messages a round, s between rounds


def store():
    """Serves until it is killed."""
    from aerospike_server import AerospikeServer
    with AerospikeServer(*STORE, [NAMESPACE]) as server:
        signals = {signal.SIGUSR1: server.refuse, signal.SIGUSR2: server.listen, signal.SIGTERM: sys.exit}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        print('listening', flush=True)
        while True:
            signals[signal.sigwait(signals)]()


def ask(method, path, body=None):
    """nsqd's answer over HTTP."""
    connection = http.client.HTTPConnection(*NSQD_HTTP, timeout=30)
    connection.request(method, path, body)
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == http.client.OK, f'{path}: {answer.status} {data!r}'
    return data


def publish(topic, count):
    """Messages {"id": 0} and so on."""
    for first in range(0, int(count), MPUB):
        bodies = (json.dumps({'id': each, 'msg': topic}) for each in range(first, min(first + MPUB, int(count))))
        ask('POST', f'/mpub?topic={topic}', '\n'.join(bodies))


def load(until, *topics):
    """Messages to each topic, until the file is there."""
    rounds = 0
    while not Path(until).exists():
        for topic in topics:
            publish(topic, LOAD)
        rounds += 1
        time.sleep(PAUSE)
    print(rounds * LOAD)


def records(name):
    """By the info protocol, which the stand-in and a real server speak."""
    request = f'sets/{NAMESPACE}/{name}\n'.encode()
    with socket.create_connection(STORE, timeout=10) as sock, sock.makefile('rb') as file:
        sock.sendall(INFO.pack(INFO_FLAGS | len(request)) + request)
        size = INFO.unpack(file.read(INFO.size))[0] & (1 << 48) - 1
        found = re.search(r'objects=(\d+)', file.read(size).decode())
    print(found[1] if found else 0)


def left(topic):
    """Waiting, deferred and in flight."""
    topics = json.loads(ask('GET', f'/stats?format=json&topic={topic}'))['topics'] or []
    mine = [each for found in topics for each in found['channels'] or [] if each['channel_name'] == CHANNEL]
    print(sum(found['depth'] for found in topics) + sum(
        each['depth'] + each['in_flight_count'] + each['deferred_count'] for each in mine))


def windows(topic):
    """By the fields of the journal that the summaries bear."""
    command = ['journalctl', '--no-pager', '-o', 'json', f'XMSRV_TOPIC={topic}']
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout.splitlines()
    received = [int(entry['XMSRV_RECEIVED']) for entry in map(json.loads, lines) if 'XMSRV_RECEIVED' in entry]
    print(len(received), max(received, default=0), sum(received))


if __name__ == '__main__':
    {'store': store, 'publish': publish, 'load': load, 'records': records, 'left': left,
     'windows': windows}[sys.argv[1]](*sys.argv[2:])
