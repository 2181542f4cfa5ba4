"""A file or a frame may have no end: what is read into memory has a limit, and the error names it."""
import os
import struct
import threading

import pytest

import fakes
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


@pytest.mark.parametrize('kind', [fakes.RESPONSE, fakes.ERROR, xmsrv.MESSAGE])
def test_a_frame_has_at_most_256_mib(kind):
    connection = xmsrv.Connection(('127.0.0.1', 4150), None)
    longest = struct.pack('>ii', 256 << 20, kind) + b'x' * 100
    heartbeats = fakes.frame(fakes.RESPONSE, b'anything') * 3
    assert connection.unpack_frames(heartbeats + longest) == [] and connection.buffer == longest
    with pytest.raises(xmsrv.NsqdError, match='^frame of 268435457 bytes: more than 256 MiB$'):
        connection.unpack_frames(heartbeats + struct.pack('>ii', (256 << 20) + 1, kind))


def test_a_header_in_two_parts_announces_its_frame_as_well():
    connection = xmsrv.Connection(('127.0.0.1', 4150), None)
    header = struct.pack('>ii', 0x40000000, xmsrv.MESSAGE)
    assert connection.unpack_frames(header[:5]) == []
    with pytest.raises(xmsrv.NsqdError, match='frame of 1073741824 bytes'):
        connection.unpack_frames(connection.buffer + header[5:])


@pytest.mark.parametrize('given, expected', [
    ({}, 1000),
    ({'aerospike': {'batch-size': '200'}}, 1000),
    ({'aerospike': {'batch-size': '2000'}}, 4000),   # one batch under way, and one that gathers
    ({'store': 'sqlite'}, 2500),
    ({'store': 'sqlite', 'aerospike': {'batch-size': '2000'}}, 2500),
    ({'nsq': {'max-in-flight': '7'}}, 7),
    ({'nsq': {'max-in-flight': '9000'}, 'store': 'sqlite'}, 9000),
], ids=str)
def test_an_empty_max_in_flight_is_what_keeps_the_store_busy(given, expected):
    assert fakes.options(**given).nsq.max_in_flight == expected
