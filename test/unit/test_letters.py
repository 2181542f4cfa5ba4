"""Dead letters: what is durable before it is said to be, and a file that is written anew while others append to it."""
import asyncio
import errno
import fcntl
import json
import os
import types

import pytest

import fakes
import xmsrv
from xmsrv import (
    DEAD,
    MAX_HISTORY,
    BackgroundTasks,
    DeadLetterFileSource,
    DeadLetterSink,
    InvalidMessage,
    append_durably,
    decode_line,
    decode_topic,
    encode_line,
    encode_topic,
)

ONE, TWO, THREE = b'{"n": 1}\n', b'{"n": 2}\n', b'{"n": 3}\n'


def letter(n, body=b'{"n": 1}', **more):
    """A line of a file."""
    return encode_line({'reason': 'schema', 'detail': 'n: no', 'id': f'{n:016d}', 'attempts': 1,
                        'timestamp': str(1000 + n),
                        'time': '2026-11-24T03:44:00Z', **more}, body)


# -- appending

def test_a_new_file_and_its_name_are_fsynced_behind_the_write(tmp_path, monkeypatch):
    calls = fakes.record_system_calls(monkeypatch, 'write', 'fsync')
    append_durably(str(tmp_path / 'dead'), [ONE, TWO])
    assert calls == [('write', f'{tmp_path}/dead'), ('fsync', f'{tmp_path}/dead'), ('fsync', str(tmp_path))]
    del calls[:]
    append_durably(str(tmp_path / 'dead'), [THREE])
    assert calls == [('write', f'{tmp_path}/dead'), ('fsync', f'{tmp_path}/dead')]
    assert (tmp_path / 'dead').read_bytes() == ONE + TWO + THREE
    assert (tmp_path / 'dead').stat().st_mode & 0o137 == 0


def test_a_torn_line_is_ended_first(tmp_path):
    (tmp_path / 'dead').write_bytes(ONE + b'{"n": ')
    append_durably(str(tmp_path / 'dead'), [TWO])
    assert (tmp_path / 'dead').read_bytes() == ONE + b'{"n": \n' + TWO


def test_what_could_not_be_written_whole_or_synced_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / 'dead').write_bytes(ONE)
    write = os.write

    def half(fd, data):
        if len(data) > 3:
            return write(fd, data[:3])
        raise OSError(errno.ENOSPC, 'no space')
    with monkeypatch.context() as patch, pytest.raises(OSError, match='no space'):
        patch.setattr(os, 'write', half)
        append_durably(str(tmp_path / 'dead'), [b'12345'])
    assert (tmp_path / 'dead').read_bytes() == ONE

    def failed(fd):
        raise OSError(errno.EIO, 'no sync')
    with monkeypatch.context() as patch, pytest.raises(OSError, match='no sync'):
        patch.setattr(os, 'fsync', failed)
        append_durably(str(tmp_path / 'dead'), [TWO])
    assert (tmp_path / 'dead').read_bytes() == ONE


def test_a_file_that_another_has_locked_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(xmsrv, 'LOCK_TIMEOUT', 0.05)
    with (tmp_path / 'dead').open('wb') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            append_durably(str(tmp_path / 'dead'), [ONE])
    assert (tmp_path / 'dead').read_bytes() == b''


def test_a_file_that_was_replaced_before_it_was_locked_is_opened_again(tmp_path, monkeypatch):
    (tmp_path / 'dead').write_bytes(b'')
    lock, replaced = xmsrv.lock_file, []

    def slow(fd, seconds):
        lock(fd, seconds)
        if not replaced:
            replaced.append((tmp_path / 'dead').rename(tmp_path / 'old'))
    monkeypatch.setattr(xmsrv, 'lock_file', slow)
    append_durably(str(tmp_path / 'dead'), [ONE])
    assert ((tmp_path / 'dead').read_bytes(), (tmp_path / 'old').read_bytes()) == (ONE, b'')


@pytest.mark.parametrize('device', ['/dev/null', '.'])
def test_only_a_regular_file_takes_dead_letters(tmp_path, device):
    (tmp_path / 'dead').symlink_to(device)
    with pytest.raises(OSError, match='regular'):
        append_durably(str(tmp_path / 'dead'), [ONE])


# -- the envelope

@pytest.mark.parametrize('body', [b'{"n": 1}', b'', b'\xff\x00\n', b'two\nlines', 'ä'.encode()])
def test_both_forms_of_a_letter_read_back_as_the_same_message(body):
    header = {'reason': 'schema', 'id': '0123456789abcdef', 'attempts': 3, 'timestamp': '1732419840000000001'}
    for _, message in (decode_topic(encode_topic(header, body)), decode_line(encode_line(header, body))):
        assert (message.body, message.id, message.attempts) == (body, b'0123456789abcdef', 3)
        assert message.timestamp == 1732419840000000001
    assert encode_line(header, body).count(b'\n') == 1


HEADER = b'{"reason": "schema", "id": "0123456789abcdef", "attempts": 1, "timestamp": "5"}'


@pytest.mark.parametrize(('broken', 'rule'), [
    (b'', 'not JSON'), (b'[' * 100000, 'not JSON'), (letter(1)[:-9], 'not JSON'), (b'[]', 'not an object'),
    (b'null', 'not an object'), (b'{}', 'it has no reason'), (b'{"reason": "none"}', 'its reason is "none"'),
    (letter(1, reason='other'), 'its reason is "other"'), (letter(1, reason=['schema']), 'its reason is a list'),
    (b'{"reason": "schema"}', 'it has no id'), (letter(1, id=7), 'its id is 7'),
    (letter(1, id='\xe4'), r'its id is "\u00e4"'),
    (letter(1, timestamp='9' * 30), f'its timestamp is "{"9" * 30}"'),
    (letter(1, timestamp=None), 'its timestamp is null'), (letter(1, timestamp=1.5), 'its timestamp is 1.5'),
    (letter(1, attempts=True), 'its attempts is true'),
    (letter(1, timestamp=float('inf')), 'its timestamp is Infinity'), (letter(1, attempts='x'), 'its attempts is "x"')])
def test_what_is_no_letter_is_said_to_be_none(broken, rule):
    for read in (decode_topic, decode_line):
        with pytest.raises(InvalidMessage) as caught:
            read(broken)
        assert (caught.value.reason, caught.value.detail) == (
            'invalid-json', f'not a dead letter of x-msrv: {rule}')


@pytest.mark.parametrize(('read', 'members', 'rule'), [
    (decode_topic, {}, 'it has no body'), (decode_line, {}, 'it has neither body nor body_base64'),
    (decode_line, {'body': 7}, 'its body is not a string of Unicode'),
    (decode_line, {'body': '\ud800'}, 'its body is not a string of Unicode'),
    (decode_line, {'body_base64': 7}, 'its body_base64 is not base64'),
    (decode_line, {'body_base64': 'a'}, 'its body_base64 is not base64')])
def test_a_letter_without_its_body_is_none(read, members, rule):
    with pytest.raises(InvalidMessage) as caught:
        read(json.dumps({**json.loads(HEADER), **members}).encode())
    assert caught.value.detail == f'not a dead letter of x-msrv: {rule}'


def test_the_history_grows_to_a_limit_and_keeps_the_latest():
    header = json.loads(letter(1))
    for n in range(MAX_HISTORY + 5):
        header = xmsrv.with_history(header, InvalidMessage('key', f'try {n}'))
    assert (header['detail'], len(header['history'])) == (f'try {MAX_HISTORY + 4}', 20)
    assert [entry['detail'] for entry in header['history']] == [f'try {n}' for n in range(4, 24)]


def test_the_envelope_has_where_it_came_from_and_the_first_time_as_text():
    message = fakes.message(3, conn='nsqd:1', attempts=2)
    message.record, message.rejection = xmsrv.Record('k', {}, None), InvalidMessage('key', 'none')
    sink = DeadLetterSink(fakes.options(), None)
    header = sink.build_header(message)
    sink.close()
    assert header.pop('time')
    assert header == {'reason': 'key', 'detail': 'none', 'key': 'k', 'topic': 'orders', 'channel': 'x-msrv',
                      'nsqd': 'nsqd:1', 'id': f'{3:016d}', 'attempts': 2, 'timestamp': '1003'}


# -- the keeper

class Publisher:
    """A Publisher that takes what `refuses` does not; `published`: the bodies of each MPUB."""

    made = []

    def __init__(self, address, link, topic, channel):
        self.address, self.topic, self.channel, self.is_closed, self.published = address, topic, channel, False, []
        self.made.append(self)

    def __str__(self):
        return xmsrv.format_address(self.address)

    async def open(self):
        if self.address[1] in self.down:
            raise ConnectionRefusedError(errno.ECONNREFUSED, 'refused')

    async def publish(self, bodies):
        assert not self.is_closed
        bodies = [decode_topic(body)[1].body for body in bodies]
        if self.fault and any(b'bad' in body for body in bodies):
            raise self.fault
        self.published.append(bodies)

    def close(self):
        self.is_closed = True


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """A function: what becomes of (port of its nsqd, body), as (results, what was published, what is in the file)."""
    def kept(*sent, file=True, down=(), fault=None, **dead_letter):
        async def main():
            messages = []
            for n, (port, body) in enumerate(sent):
                messages.append(fakes.message(n, body, types.SimpleNamespace(address=('127.0.0.1', port))))
                messages[-1].rejection = InvalidMessage('schema', 'no')
            path = {'file': str(tmp_path / 'dead')} if file else {}
            config = fakes.options(dead_letter={**path, **dead_letter})
            sink = DeadLetterSink(config, None)
            try:
                return await sink.write_dead_letters(messages)
            finally:
                sink.close()
        monkeypatch.setattr(xmsrv, 'Publisher', Publisher)
        Publisher.made, Publisher.down, Publisher.fault = [], down, fault
        results = asyncio.run(main())
        lines = (tmp_path / 'dead').read_bytes().splitlines() if (tmp_path / 'dead').exists() else []
        return (results, [body for publisher in Publisher.made for bodies in publisher.published for body in bodies],
                [decode_line(line)[1].body for line in lines])
    return kept


def test_letters_go_to_the_topic_of_the_nsqd_that_delivered_them(keep):
    assert keep((1, b'a'), (2, b'b'), (1, b'c')) == ([DEAD] * 3, [b'a', b'c', b'b'], [])
    assert [(publisher.address[1], publisher.topic, publisher.channel) for publisher in Publisher.made] == [
        (1, 'orders.dead', 'x-msrv-replay'), (2, 'orders.dead', 'x-msrv-replay')]


def test_the_header_has_the_key_where_it_is_known():
    for key, expected in (('$id', True), ('id', False)):
        sink = DeadLetterSink(fakes.options(record={'key': key}), None)
        message = fakes.message(1)
        message.rejection = InvalidMessage('schema', 'no')
        assert sink.build_header(message)['key'] == (message.key if expected else None)
        message.record = xmsrv.Record('k', {}, None)
        assert sink.build_header(message)['key'] == 'k'
        sink.close()


def test_what_the_topic_has_taken_makes_no_file(keep, tmp_path):
    keep((1, b'a'))
    assert os.listdir(tmp_path) == []


def test_what_the_topic_refuses_goes_to_the_file_and_the_others_are_published(keep):
    bodies = [b'a', b'b', b'bad', b'd', b'e']
    results, published, lines = keep(*((1, body) for body in bodies), fault=xmsrv.NsqdError('E_BAD_MESSAGE'))
    assert (results, sorted(published), lines) == ([DEAD] * 5, [b'a', b'b', b'd', b'e'], [b'bad'])


def test_without_a_file_what_is_refused_away_or_unknown_is_said_to_be(keep):
    results, *_ = keep((1, b'bad'), (2, b'b'), file=False, down=[2], fault=xmsrv.NsqdError('E_BAD_MESSAGE'))
    assert [(result.outcome, result.reason) for result in results] == [('unkept', 'refused'), ('unkept', 'away')]
    results, *_ = keep((1, b'bad'), file=False, fault=TimeoutError())
    assert [(result.outcome, result.reason) for result in results] == [('unkept', 'unknown')]


def test_a_publish_without_an_answer_is_not_halved(keep):
    results, published, _ = keep((1, b'a'), (1, b'bad'), file=False, fault=TimeoutError())
    assert ({result.reason for result in results}, published) == ({'unknown'}, [])


def test_a_file_that_cannot_be_written_keeps_nothing(keep, tmp_path):
    (tmp_path / 'dead').symlink_to('/nonexistent/dead')
    results, *_ = keep((1, b'a'), topic='')
    assert [(result.outcome, result.reason) for result in results] == [('unkept', 'away')]


def test_discarded_letters_go_nowhere(keep):
    assert keep((1, b'a'), file=False, discard='yes') == ([DEAD], [], [])


def test_a_connection_that_refused_a_letter_is_closed_and_another_one_made(keep):
    keep((1, b'bad'), (1, b'b'), fault=xmsrv.NsqdError('E_BAD_MESSAGE'))
    assert len(Publisher.made) == 3    # both, the bad one, the good one
    assert all(publisher.is_closed for publisher in Publisher.made)


def test_the_log_names_the_letter_and_the_option_that_would_keep_it(keep, caplog):
    caplog.set_level('WARNING', 'x-msrv')
    for file, fault, hint in ((False, xmsrv.NsqdError('E_BAD_MESSAGE'), True), (False, TimeoutError(), False),
                              (True, xmsrv.NsqdError('E_BAD_MESSAGE'), False)):
        caplog.clear()
        keep((1, b'bad'), file=file, fault=fault)
        line, = [record.getMessage() for record in caplog.records]
        assert line.startswith('dead letter 0000000000000000-')
        assert ('a file in [dead-letter] would keep it' in line) is hint


def test_a_connection_that_was_lost_is_made_anew(monkeypatch):
    async def main():
        monkeypatch.setattr(xmsrv, 'Publisher', Publisher)
        Publisher.made, Publisher.down, Publisher.fault = [], (), None
        sink = DeadLetterSink(fakes.options(), None)
        message = fakes.message(1, b'a', types.SimpleNamespace(address=('127.0.0.1', 1)))
        message.rejection = InvalidMessage('schema', 'no')
        for lost in (False, True, False):
            assert await sink.write_dead_letters([message]) == [DEAD]
            assert len(Publisher.made) == 1 + (len(Publisher.made) > 1)
            Publisher.made[-1].is_closed = lost
        sink.close()
    asyncio.run(main())
    assert [len(publisher.published) for publisher in Publisher.made] == [2, 1]
    assert Publisher.made[-1].is_closed


def test_a_batch_that_is_refused_while_the_run_ends_is_not_halved(keep, monkeypatch):
    async def publish(publisher, bodies):
        publisher.sink.close()
        raise xmsrv.NsqdError('E_BAD_MESSAGE')

    def made(address, link, topic, channel):
        publisher = Publisher(address, link, topic, channel)
        publisher.sink = sink
        return publisher

    async def main():
        messages = [fakes.message(n, b'a', types.SimpleNamespace(address=('127.0.0.1', 1))) for n in range(4)]
        for message in messages:
            message.rejection = InvalidMessage('schema', 'no')
        return await sink.write_dead_letters(messages)
    Publisher.made, Publisher.down = [], ()
    monkeypatch.setattr(Publisher, 'publish', publish)
    monkeypatch.setattr(xmsrv, 'Publisher', made)
    sink = DeadLetterSink(fakes.options(), None)
    assert {result.reason for result in asyncio.run(main())} == {'refused'}
    assert len(Publisher.made) == 1


def test_appending_leaves_no_file_open(tmp_path):
    before = os.listdir('/proc/self/fd')
    for _ in range(3):
        append_durably(str(tmp_path / 'dead'), [ONE])
        with (tmp_path / 'dead').open('ab') as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX)
            xmsrv.open_locked(str(tmp_path / 'dead'), os.O_RDWR, 0)
        (tmp_path / 'dead').unlink()
    assert len(os.listdir('/proc/self/fd')) == len(before)


def test_a_lock_that_is_given_back_in_time_is_had(tmp_path, monkeypatch):
    with (tmp_path / 'dead').open('wb') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        sleep = []

        def give_back(seconds):
            sleep.append(seconds)
            fcntl.flock(other, fcntl.LOCK_UN)
        monkeypatch.setattr(xmsrv.time, 'sleep', give_back)
        append_durably(str(tmp_path / 'dead'), [ONE])
    assert len(sleep) == 1 and 0 < sleep[0] < 0.1


# -- the file, written anew

def replayed(path, steps):
    """Runs `steps(source, messages)` with a source that has read the whole file."""
    async def main():
        tasks, messages = BackgroundTasks(), []
        source = DeadLetterFileSource(fakes.options(), tasks, str(path), read_only=False)
        source.start(lambda: 1000, messages.extend)
        await source.open()
        while not source.read_all:
            await asyncio.sleep(0)
        await asyncio.to_thread(steps, source, messages)
        await tasks.cancel()
        await source.close()
        return source
    return asyncio.run(main())


def test_what_was_stored_leaves_the_file_and_the_rest_stays_in_its_order(tmp_path):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1) + b'\n' + letter(2) + b'no letter\n' + letter(3))
    path.chmod(0o604)

    def steps(source, messages):
        first, second, nothing, third = messages
        second.rejection = nothing.rejection = InvalidMessage('key', 'today')
        source.finish([first])
        source.requeue([second, nothing, third])
        source.rewrite_file()
    replayed(path, steps)
    blank, two, foreign, three = path.read_bytes().splitlines(keepends=True)
    assert (blank, foreign, three) == (b'\n', b'no letter\n', letter(3))
    assert json.loads(two)['reason'] == 'key'
    assert [entry['detail'] for entry in json.loads(two)['history']] == ['n: no']
    assert path.stat().st_mode & 0o777 == 0o604
    assert os.listdir(tmp_path) == ['dead']


def test_the_new_file_is_durable_before_it_takes_the_old_ones_name_and_the_name_after_it(tmp_path, monkeypatch):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1) + letter(2))
    calls = fakes.record_system_calls(monkeypatch, 'fsync', 'rename')

    def steps(source, messages):
        source.finish(messages[:1])
        append_durably(str(path), [letter(3)])
        del calls[:]
        source.rewrite_file()
    replayed(path, steps)
    assert calls == [('fsync', f'{path}.replay'), ('fsync', f'{path}.replay'), ('rename', f'{path}.replay'),
                     ('fsync', str(tmp_path))]
    assert path.read_bytes() == letter(2) + letter(3)


def test_the_last_lock_keeps_a_letter_that_is_appended_while_the_file_is_exchanged(tmp_path, monkeypatch):
    """A writer that comes between the copy of what is new and the rename waits; then it writes to the new file."""
    path = tmp_path / 'dead'
    path.write_bytes(letter(1) + letter(2))
    rename, outcome = os.rename, []

    def slow(old, new):
        with open(old, 'rb') as there:
            assert there.read() == letter(2)    # by then it is written, not only buffered
        with pytest.raises(BlockingIOError):
            xmsrv.open_locked(str(path), os.O_RDWR | os.O_APPEND, 0)
        outcome.append('locked')
        rename(old, new)
    monkeypatch.setattr(os, 'rename', slow)

    def steps(source, messages):
        source.finish(messages[:1])
        source.rewrite_file()
    replayed(path, steps)
    assert outcome == ['locked']
    append_durably(str(path), [letter(3)])
    assert path.read_bytes() == letter(2) + letter(3)


@pytest.mark.parametrize('change', ['cut', 'replaced'])
def test_a_file_that_was_cut_or_replaced_meanwhile_stays_as_it_is(tmp_path, change):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1) + letter(2))

    def steps(source, messages):
        source.finish(messages)
        if change == 'replaced':
            path.rename(tmp_path / 'old')
        path.write_bytes(letter(1))
        with pytest.raises(OSError, match='meanwhile'):
            source.rewrite_file()
    replayed(path, steps)
    assert path.read_bytes() == letter(1)
    assert not (tmp_path / 'dead.replay').exists()


def test_nothing_changes_where_nothing_was_stored_nor_failed(tmp_path):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1))
    before = path.stat().st_ino
    replayed(path, lambda source, messages: (source.requeue(messages), source.rewrite_file()))
    assert (path.stat().st_ino, path.read_bytes()) == (before, letter(1))


def test_what_a_replay_that_was_killed_has_left_is_not_in_the_new_file(tmp_path):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1) + letter(2))
    (tmp_path / 'dead.replay').write_bytes(letter(9) * 5)
    replayed(path, lambda source, messages: (source.finish(messages[:1]), source.rewrite_file()))
    assert path.read_bytes() == letter(2)


def test_a_second_replay_is_kept_out(tmp_path):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1))

    def steps(source, messages):
        with pytest.raises(xmsrv.Unavailable, match='another replay'):
            replayed(path, lambda *_: None)
    replayed(path, steps)


def test_a_source_that_is_read_is_exhausted_only_when_all_is_answered(tmp_path):
    path = tmp_path / 'dead'
    path.write_bytes(letter(1))

    def steps(source, messages):
        assert not source.is_exhausted
        source.finish(messages)
        assert (source.is_exhausted, source.held_bytes) == (True, 0)
    replayed(path, steps)
