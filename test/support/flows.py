"""What the tests of a whole flow have in common: messages that can be told apart, what became of them, and bounds."""
import contextlib
import fcntl
import json
import re
import threading
import time

import servers
from servers import wait_until

TOPIC, CHANNEL, DEAD, REPLAY = 'orders', 'x-msrv', 'orders.dead', 'x-msrv-replay'
SHORT = '--msg-timeout=1s'
STRICT = {'fields': {'id': 'integer, required'}}   # [message], which unfit() does not pass
RELAXED = {}                                       # and here it does


def bodies(number, first=0):
    """`number` messages, told apart by `n`."""
    return [json.dumps({'n': n, 'text': 'amber'}) for n in range(first, first + number)]


def fill(nsqd, number, first=0):
    """Publish messages, and wait until nsqd has carried all of them from the topic to the channel."""
    nsqd.create(TOPIC, CHANNEL)
    if number:
        nsqd.publish(TOPIC, bodies(number, first))
    wait_until(lambda: not nsqd.stats(TOPIC, CHANNEL)['topic_depth'], 'all are in the channel')


def publish_at_once(pair, each, chunk):
    """Publish `each` messages to both of two nsqds, chunk by chunk at the same moments."""
    together = threading.Barrier(2)

    def publish(nsqd, first):
        for start in range(first, first + each, chunk):
            together.wait(timeout=30)
            nsqd.publish(TOPIC, bodies(chunk, start))

    for nsqd in pair:
        nsqd.create(TOPIC, CHANNEL)
    threads = [threading.Thread(target=publish, args=(nsqd, place * each)) for place, nsqd in enumerate(pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def numbers(program):
    """The `n` of each record in SQLite, in order: twice in the list where a message became two records."""
    return sorted(bins['n'] for _, _, bins, _ in program.rows())


def received(program):
    """How many messages the log (-v) tells of, so far."""
    return sum(map(int, re.findall(r'nsqd \S+: (\d+) messages', program.log.read_text())))


def passed(seconds):
    """Whether so much time is over, from now on: for a fault that has to last."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def ended(process, status=0, seconds=30):
    """The process ends by itself, with this exit status."""
    assert process.wait(timeout=seconds) == status


@contextlib.contextmanager
def in_use(path):
    """A file that another process has locked, so that x-msrv can't write to it."""
    with path.open('ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def unfit(number, first=0, **more):
    """`number` messages that do not fit STRICT, and fit RELAXED."""
    return [json.dumps({'id': f'{n}', **more}).encode() for n in range(first, first + number)]


def bury(program, nsqd, messages, **settings):
    """Publish messages and run a window with STRICT; all of them end as dead letters."""
    nsqd.publish(TOPIC, messages)
    count = servers.summary(program.once(nsqd, message=STRICT, **settings).stderr)
    assert (count['dead'], count['requeued']) == (len(messages), 0)
