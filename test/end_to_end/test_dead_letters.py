"""Dead letters: kept with the reason in a topic or a file, or thrown away by wish."""
import base64
import collections
import contextlib
import datetime
import fcntl
import json
import os
import random
import re
import resource
import socket
import stat
import threading
import time

import pytest

import proxies
import servers
from flows import CHANNEL, DEAD, RELAXED, REPLAY, STRICT, TOPIC, bury, ended, unfit
from servers import wait_until

MEMBERS = {'reason', 'detail', 'key', 'topic', 'channel', 'nsqd', 'id', 'attempts', 'timestamp', 'time'}


def good(number, first=0):
    """`number` messages that fit STRICT."""
    return [json.dumps({'id': n}).encode() for n in range(first, first + number)]


def ids(program):
    """The `id` of each record, in order: twice in the list where a message became two records."""
    return sorted(int(bins['id']) for _, _, bins, _ in program.rows())


def filed(path):
    """The dead letters in a file, as (header, body)."""
    letters = []
    for line in path.read_text(encoding='utf-8').splitlines():
        header = json.loads(line)
        assert ('body' in header) != ('body_base64' in header)
        body = header.pop('body').encode() if 'body' in header else base64.b64decode(header.pop('body_base64'))
        letters.append((header, body))
    return letters


# ----------------------------------------------------------------------------------------------------------- in a topic

@pytest.mark.parametrize('body', [
    b'{"id": 1, "msg": "cut sho', b'{"id": 1, "msg": "caf\xe9 \xff\xfe"}', b'\n\n[1]\r\n\x00',
    '["gr\u00fc\u00df dich"]'.encode(),
])
def test_a_letter_is_a_line_of_json_and_the_body_byte_for_byte(nsqd, program, body):
    """It says all that is known of the message."""
    nsqd.create(TOPIC, CHANNEL)
    before = time.time()
    nsqd.publish(TOPIC, body)
    assert servers.summary(program.once(nsqd).stderr)['dead'] == 1
    (header, kept), = nsqd.letters(DEAD)
    assert kept == body
    assert set(header) - {'history'} == MEMBERS
    assert (header['topic'], header['channel'], header['nsqd']) == (TOPIC, CHANNEL, nsqd.tcp)
    assert header['attempts'] == 1
    assert header['key'].startswith(f"{header['id']}-{int(header['timestamp']):x}-")
    assert before <= int(header['timestamp']) / 1e9 <= time.time()
    assert before <= datetime.datetime.fromisoformat(header['time'].replace('Z', '+00:00')).timestamp() <= time.time()
    assert header['detail']
    assert nsqd.left(TOPIC, CHANNEL) == 0


def test_a_letter_goes_to_the_nsqd_that_delivered_its_message(nsqds, program):
    """Each of three has its own."""
    trio = nsqds(3)
    for place, nsqd in enumerate(trio):
        nsqd.publish(TOPIC, unfit(5, first=10 * place))
    assert servers.summary(program.once(trio, message=STRICT).stderr)['dead'] == 15
    for place, nsqd in enumerate(trio):
        letters = nsqd.letters(DEAD)
        assert sorted(body for _, body in letters) == sorted(unfit(5, first=10 * place))
        assert {header['nsqd'] for header, _ in letters} == {nsqd.tcp}


def test_a_tail_that_comes_and_goes_takes_no_letter_away(nsqd, program):
    """The channel of replay is there before the first letter, so that each letter is in it, whoever else reads."""
    with tail(nsqd) as seen:
        bury(program, nsqd, unfit(1))
        wait_until(lambda: b'"reason"' in seen(), 'the tail has seen the letter')
    bury(program, nsqd, unfit(1, first=1))
    with tail(nsqd):
        bury(program, nsqd, unfit(1, first=2))
    assert sorted(body for _, body in nsqd.letters(DEAD)) == unfit(3)


def test_a_tail_after_the_first_letter_takes_it_not_away(nsqd, program):
    """Nobody had read the topic before."""
    bury(program, nsqd, unfit(2))
    with tail(nsqd):
        bury(program, nsqd, unfit(1, first=2))
    assert sorted(body for _, body in nsqd.letters(DEAD)) == unfit(3)


@contextlib.contextmanager
def tail(nsqd):
    """NSQ's own nsq_tail on the topic of dead letters; gives a function: what it has printed."""
    out = nsqd.directory / 'tail'
    with out.open('wb') as file:
        process = servers.spawn([servers.NSQ_TOOLS / 'nsq_tail', '--topic', DEAD, '--channel', 'tail#ephemeral',
                                 '--nsqd-tcp-address', nsqd.tcp], stdout=file, stderr=file)
    try:
        wait_until(lambda: nsqd.clients(DEAD, 'tail#ephemeral'), 'the tail has subscribed')
        yield out.read_bytes
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not nsqd.clients(DEAD, 'tail#ephemeral'), 'nsqd has seen the tail go')


def test_the_topic_may_have_64_characters(nsqd, program):
    """NSQ's limit, with .dead at its end."""
    topic = 't' * 59
    nsqd.publish(topic, b'[]')
    program.once(nsqd, topic=topic, dead_letter={'topic': None})
    assert [body for _, body in nsqd.letters(f'{topic}.dead')] == [b'[]']


def test_a_topic_that_would_have_65_characters_is_a_fault(nsqd, program):
    """Found before a message is taken."""
    nsqd.publish('t' * 60, b'[]')
    ran = program.once(nsqd, topic='t' * 60, dead_letter={'topic': None}, expect=os.EX_CONFIG)
    assert '65 characters' in ran.stderr
    assert nsqd.stats('t' * 60)['topic_depth'] == 1


def test_a_queue_of_nothing_but_bad_messages(nsqd, program):
    """1,000 of them; each counts as one taken."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, unfit(1000))
    first = servers.summary(program.once(nsqd, message=STRICT, nsq={'max-messages': 600}).stderr)
    assert (first['received'], first['dead'], nsqd.left(TOPIC, CHANNEL)) == (600, 600, 400)
    assert servers.summary(program.run('once').stderr)['dead'] == 400
    assert collections.Counter(body for _, body in nsqd.letters(DEAD)) == collections.Counter(unfit(1000))
    assert program.rows() == []


# ------------------------------------------------------------------------------------------- where the topic refuses it

BIG = {'text': 'x' * 1900}


def test_what_the_topic_refuses_stays_in_the_queue_beside_good_ones(nsqds, program):
    """With its header it is over --max-msg-size. The second window says so again, and doubles nothing."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    nsqd.create(TOPIC, CHANNEL)
    big, small = unfit(1, first=100, **BIG), unfit(2, first=200)
    nsqd.publish(TOPIC, [*good(10), small[0], *big, *good(10, first=10), small[1]])
    ran = program.once(nsqd, message=STRICT, expect=os.EX_TEMPFAIL)
    count = servers.summary(ran.stderr)
    assert (count['stored'], count['dead'], count['requeued']) == (20, 2, 1)
    assert re.search(r'warning: dead letter \w+-\w+-\w+: nsqd ', ran.stderr) and 'could not be kept' in ran.stderr
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] == 1, 'the delay of its requeue is over')
    again = servers.summary(program.run('once', expect=os.EX_TEMPFAIL).stderr)
    assert (again['received'], again['requeued']) == (1, 1)
    assert ids(program) == list(range(20))
    assert sorted(body for _, body in nsqd.letters(DEAD)) == small
    assert nsqd.drain(TOPIC, CHANNEL) == big


def test_a_letter_that_nobody_keeps_ends_no_window(nsqds, program):
    """It is requeued with a delay, and the good ones behind it flow as if it were not there."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*unfit(3, **BIG), *good(5000)])
    ran = program.once(nsqd, message=STRICT, nsq={'max-in-flight': 100}, expect=os.EX_TEMPFAIL)
    count = servers.summary(ran.stderr)
    assert count['stored'] == 5000 and count['requeued'] >= 3
    assert 'dead letters could not be kept' in ran.stderr
    assert 'a file in [dead-letter] would keep it' in ran.stderr
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] == 3, 'the delay of their requeue is over')
    assert min(nsqd.attempts(TOPIC, CHANNEL)) >= 2


def test_n_is_exact_with_letters_that_nobody_keeps(nsqds, program):
    """They count as taken, and take no credit from the others."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*unfit(3, **BIG), *good(50)])
    ran = program.once(nsqd, message=STRICT, nsq={'max-messages': 10}, expect=os.EX_TEMPFAIL, timeout='20s')
    count = servers.summary(ran.stderr)
    assert (count['received'], count['stored'], count['requeued']) == (10, 7, 3)
    assert sorted(nsqd.attempts(TOPIC, CHANNEL)) == [1] * 43 + [2] * 3


def test_letters_without_an_answer_end_in_75(nsqd, program):
    """nsqd takes what is published and says nothing. Each letter is published once, and not in halves again."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*unfit(50), *good(5)])
    with proxies.Proxy(nsqd, judge=lambda event: event.name != 'MPUB') as proxy:
        program.configure(nsq={'nsqd-tcp-address': proxy.addresses}, message=STRICT)
        ran = program.run('once', expect=os.EX_TEMPFAIL)
        assert proxy.count('MPUB') <= 2   # the first goes off at once with what is there, the rest together
    count = servers.summary(ran.stderr)
    assert (count['stored'], count['dead'], count['requeued'], nsqd.left(TOPIC, CHANNEL)) == (5, 0, 50, 50)


def test_what_the_topic_refuses_goes_to_the_file_and_nothing_else_does(nsqds, program, workdir):
    """Many at once, the refused among them: each is kept once, in one of the two."""
    nsqd, = nsqds(1, '--max-msg-size=2000')
    nsqd.create(TOPIC, CHANNEL)
    mixed = [*unfit(30, **BIG), *unfit(600, first=100)]
    random.Random().shuffle(mixed)
    nsqd.publish(TOPIC, mixed)
    ran = program.once(nsqd, message=STRICT, dead_letter={'file': workdir / 'dead.json'})
    assert servers.summary(ran.stderr)['dead'] == 630
    assert sorted(body for _, body in filed(workdir / 'dead.json')) == sorted(unfit(30, **BIG))
    assert sorted(body for _, body in nsqd.letters(DEAD)) == sorted(unfit(600, first=100))
    assert nsqd.left(TOPIC, CHANNEL) == 0


@pytest.mark.parametrize('reaches', [True, False])
def test_a_connection_cut_in_mid_publish_loses_nothing(nsqd, program, reaches):
    """Whether the letter arrived can't be known: the message stays in the queue, and becomes one record."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, unfit(1))
    with cut_at_pub(nsqd, reaches) as address:
        program.configure(nsq={'nsqd-tcp-address': address}, message=STRICT)
        count = servers.summary(program.run('once', expect=os.EX_TEMPFAIL).stderr)
    assert (count['dead'], count['requeued'], nsqd.left(TOPIC, CHANNEL)) == (0, 1, 1)
    assert nsqd.left(DEAD, REPLAY) == reaches
    wait_until(lambda: nsqd.stats(TOPIC, CHANNEL)['depth'] == 1, 'the delay of its requeue is over')
    assert servers.summary(program.once(nsqd, message=STRICT).stderr)['dead'] == 1
    assert nsqd.left(DEAD, REPLAY) == 1 + reaches
    program.configure(nsqd, message=RELAXED)
    program.run('replay')
    assert ids(program) == [0]
    assert (nsqd.left(TOPIC, CHANNEL), nsqd.left(DEAD, REPLAY)) == (0, 0)


@contextlib.contextmanager
def cut_at_pub(nsqd, reaches):
    """A proxy to an nsqd that cuts a connection at its first PUB, before or after it has arrived; gives its address."""
    listener = socket.create_server((nsqd.host, 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                near, cut = listener.accept()[0], threading.Event()
                far = socket.create_connection((nsqd.host, nsqd.port))
                threading.Thread(target=answers, args=(far, near, cut), daemon=True).start()
                threading.Thread(target=requests, args=(near, far, cut), daemon=True).start()

    def answers(far, near, cut):
        with contextlib.suppress(OSError):
            while (data := far.recv(1 << 16)) and not cut.is_set():
                near.sendall(data)
            near.shutdown(socket.SHUT_RDWR)

    def requests(near, far, cut):
        with contextlib.suppress(OSError), near, far:
            while (data := near.recv(1 << 16)) and b'PUB ' not in data:
                far.sendall(data)
            if data and reaches:
                cut.set()
                far.sendall(data)
                wait_until(lambda: nsqd.stats(DEAD)['topic_messages'], 'nsqd has taken the letter')
            for each in (near, far):
                each.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield '{}:{}'.format(*listener.getsockname())
    finally:
        listener.close()


# ------------------------------------------------------------------------------------------------------------ in a file

def test_a_file_has_a_line_for_each_letter_and_is_not_for_everybody(nsqd, program, workdir):
    """Text as `body`, anything else as `body_base64`; mode 0640."""
    path = workdir / 'dead.json'
    bodies = [b'{"cut', 'gr\u00fc\u00df dich\n'.encode(), b'caf\xe9']
    nsqd.publish(TOPIC, bodies)
    program.once(nsqd, dead_letter={'topic': '', 'file': path})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted('body' if 'body' in line else 'body_base64' for line in lines) == ['body', 'body', 'body_base64']
    letters = filed(path)
    assert sorted(body for _, body in letters) == sorted(bodies)
    assert all(set(header) - {'history'} == MEMBERS for header, _ in letters)
    assert nsqd.left(TOPIC, CHANNEL) == 0
    assert nsqd.stats(DEAD, REPLAY)['topic_messages'] == 0


def test_two_processes_write_one_file(nsqd, program, workdir):
    """Each line is whole, and each message is there once."""
    path = workdir / 'dead.json'
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, unfit(3000))
    program.configure(nsqd, message=STRICT, nsq={'max-in-flight': 50}, dead_letter={'topic': '', 'file': path})
    pair = [program.start('once')]
    program.copy()
    pair.append(program.start('once'))
    assert [process.wait(timeout=30) for process in pair] == [0, 0]
    totals = [int(number) for number in re.findall(r' dead (\d+)', program.log.read_text())]
    assert sum(totals) == 3000 and min(totals) > 0
    assert collections.Counter(body for _, body in filed(path)) == collections.Counter(unfit(3000))


def test_a_line_torn_by_a_kill_stays_by_itself(nsqd, program, workdir):
    """The next writer begins a new line."""
    path = workdir / 'dead.json'
    path.write_bytes(b'{"reason": "sche')
    nsqd.publish(TOPIC, unfit(2))
    program.once(nsqd, message=STRICT, dead_letter={'topic': '', 'file': path})
    torn, *lines = path.read_text().splitlines()
    assert torn == '{"reason": "sche'
    assert sorted(json.loads(line)['body'].encode() for line in lines) == unfit(2)


def test_a_file_that_another_has_locked_leaves_the_message_in_the_queue(nsqd, program, workdir):
    """For a while it is waited for, and not for ever."""
    path = workdir / 'dead.json'
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*good(5), *unfit(2)])
    with path.open('w') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        program.configure(nsqd, message=STRICT, dead_letter={'topic': '', 'file': path})
        ran = program.run('once', expect=os.EX_TEMPFAIL)
    assert 'another process has it locked' in ran.stderr
    count = servers.summary(ran.stderr)
    assert (count['stored'], count['requeued'], nsqd.left(TOPIC, CHANNEL)) == (5, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo, lambda path: path.symlink_to('/dev/full')],
                         ids=['directory', 'FIFO', 'device'])
def test_a_file_that_cannot_be_written_leaves_the_message_in_the_queue(nsqd, program, workdir, make):
    """Something that is no file has come in its place in mid-run: 75, and the good ones are stored."""
    path = workdir / 'dead.json'
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, good(5))
    program.configure(nsqd, message=STRICT, dead_letter={'topic': '', 'file': path}, idle_timeout='60s', timeout='20s',
                      nsq={'max-messages': 7})
    running = program.start('once')
    wait_until(lambda: len(ids(program)) == 5, 'the good ones are stored', 20)
    make(path)
    nsqd.publish(TOPIC, unfit(2))
    ended(running, os.EX_TEMPFAIL)
    count = servers.summary(program.log.read_text())
    assert (count['stored'], count['dead'], count['requeued']) == (5, 0, 2)
    assert f'{path}: not a regular file' in program.log.read_text()
    assert ids(program) == list(range(5))
    assert sorted(nsqd.drain(TOPIC, CHANNEL)) == unfit(2)


def test_a_disk_that_is_full_in_mid_line_leaves_no_part_of_it(nsqd, program, workdir):
    """The limit on the size of a file stands for the disk: a part of the line still fits."""
    path, limit = workdir / 'dead.json', 1 << 20
    line = b'{"reason": "schema"}'.ljust(1023) + b'\n'
    path.write_bytes(line * 1023)
    nsqd.create(TOPIC, CHANNEL)
    big = unfit(1, text='x' * 4000)
    nsqd.publish(TOPIC, [*good(5), *big])
    program.configure(nsqd, message=STRICT, dead_letter={'topic': '', 'file': path})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        process = program.start('once')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert process.wait(timeout=30) == os.EX_TEMPFAIL
    assert 'File too large' in program.log.read_text()
    assert path.read_bytes() == line * 1023
    assert (ids(program), nsqd.drain(TOPIC, CHANNEL)) == (list(range(5)), big)


def test_discard_throws_away_and_says_how_many(nsqd, program):
    """By wish alone; no topic is made."""
    nsqd.publish(TOPIC, [*good(3), *unfit(2)])
    ran = program.once(nsqd, message=STRICT, dead_letter={'topic': '', 'discard': True})
    count = servers.summary(ran.stderr)
    assert (count['stored'], count['dead'], nsqd.left(TOPIC, CHANNEL)) == (3, 2, 0)
    assert DEAD not in nsqd.request('GET', '/stats').decode()
