"""A file or a frame may have no end: what is read into memory has a limit, and the error names it."""
import os
import threading

import pytest

import xmsrv


@pytest.fixture
def fifo(tmp_path):
    """A FIFO into which a thread writes what the test gives it."""
    path, writers = tmp_path / 'fifo', []
    os.mkfifo(path)

    def written(data):
        writers.append(threading.Thread(target=path.write_bytes, args=(data,)))
        writers[0].start()
        return str(path)
    yield written
    for writer in writers:
        writer.join(10)


@pytest.mark.parametrize('text', ['[nsq]\r\ntopic = caf\xe9\n', '\ufeff[nsq]\ntopic = caf\xe9\n'])
def test_a_configuration_may_come_from_a_fifo(fifo, text):
    assert xmsrv.read_file(fifo(text.encode())) == {'nsq': {'topic': 'caf\xe9'}}


def test_a_configuration_has_at_most_1_mib(tmp_path):
    path = tmp_path / 'x.conf'
    path.write_bytes(b'#' * (1 << 20))
    assert xmsrv.read_file(str(path)) == {}
    path.write_bytes(b'#' * ((1 << 20) + 1))
    with pytest.raises(xmsrv.ConfigError, match='x.conf: larger than 1 MiB: not a configuration'):
        xmsrv.read_file(str(path))


def test_a_message_to_be_checked_may_come_from_a_fifo(fifo):
    assert xmsrv.read_message(fifo(b'x' * 200_000)) == b'x' * 200_000


def test_a_message_to_be_checked_has_at_most_256_mib(tmp_path):
    path = tmp_path / 'message'
    path.touch()
    os.truncate(path, (256 << 20) + 1)   # a hole, which takes no disk
    with pytest.raises(xmsrv.DataError, match='--message .*: larger than 256 MiB: no message is'):
        xmsrv.read_message(str(path))


@pytest.mark.parametrize(('read', 'failure'), [(xmsrv.read_file, xmsrv.ConfigError),
                                               (xmsrv.read_message, xmsrv.DataError)])
def test_a_device_without_an_end_is_refused(read, failure):
    with pytest.raises(failure, match='/dev/zero: larger than'):
        read('/dev/zero')
