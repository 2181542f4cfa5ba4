"""A deflated stream: what comes out is what went in, however it is cut, and never much at a time."""
import asyncio
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmsrv import READ_SIZE, DeflateStream, NsqdError


class Pipe:
    """A stream of which reads give the chunks that it was made with, and writes are kept."""

    def __init__(self, chunks=()):
        self.chunks, self.written = list(chunks), b''

    async def read_bytes(self, number, partial=False):
        return self.chunks.pop(0)

    def write(self, data):
        self.written += data


def deflated(parts):
    """As nsqd sends it: each part flushed, so that it can be read before the next one comes."""
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return b''.join(made.compress(part) + made.flush(zlib.Z_SYNC_FLUSH) for part in parts)


def cut(data, size):
    """The data in chunks of so many bytes."""
    return [data[start:start + size] for start in range(0, len(data), size)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300) | st.integers(0, 3 * READ_SIZE).map(bytes), min_size=1, max_size=4),
       st.integers(1, 70000))
def test_what_comes_out_is_what_went_in(parts, size):
    async def read_all():
        stream, found = DeflateStream(Pipe(cut(deflated(parts), size))), b''
        while len(found) < sum(map(len, parts)):
            data = await stream.read_bytes(READ_SIZE, partial=True)
            assert 0 < len(data) <= READ_SIZE
            found += data
        return found
    assert asyncio.run(read_all()) == b''.join(parts)


@settings(deadline=None)
@given(st.binary(min_size=8, max_size=300), st.integers(1, 20))
def test_an_answer_of_the_handshake_is_read_to_its_last_byte_and_no_further(data, size):
    async def read():
        stream = DeflateStream(Pipe(cut(deflated([data[:8], data[8:], b'more']), size)))
        return [await stream.read_bytes(8), await stream.read_bytes(len(data) - 8), await stream.read_bytes(4)]
    assert asyncio.run(read()) == [data[:8], data[8:], b'more']


def test_much_from_little_comes_a_chunk_at_a_time():
    """100 MB of 100 KB: no more than a chunk is in memory, and no byte is read from the socket meanwhile."""
    small = deflated([bytes(100 << 20)])
    assert len(small) < READ_SIZE
    pipe = Pipe([small])

    async def read():
        stream = DeflateStream(pipe)
        return [(len(await stream.read_bytes(READ_SIZE, partial=True)), len(stream.inflated))
                for _ in range((100 << 20) // READ_SIZE)]
    assert set(asyncio.run(read())) == {(READ_SIZE, 0)}


def test_what_is_written_is_flushed_at_once():
    async def write():
        stream, reader = DeflateStream(Pipe()), zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        for command in (b'RDY 10\n', b'FIN 0123456789abcdef\n' * 100, b''):
            before = len(stream.stream.written)
            stream.write(command)
            assert reader.decompress(stream.stream.written[before:]) == command
    asyncio.run(write())


@pytest.mark.parametrize(('data', 'words'), [
    (b'\xff' * 20, 'not what deflate makes'), (zlib.compress(b'a' * 100), 'not what deflate makes'),
    (zlib.compressobj(wbits=-zlib.MAX_WBITS).flush(), 'has ended')], ids=['rubbish', "zlib's header", 'its end'])
def test_what_is_no_deflate_ends_the_connection(data, words):
    with pytest.raises(NsqdError, match=words):
        asyncio.run(DeflateStream(Pipe([data])).read_bytes(8))
