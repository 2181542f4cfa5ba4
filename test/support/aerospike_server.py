"""A stand-in for an Aerospike server: a node, all data in memory, for tests and a laptop. Only the standard library.

The official client can't tell it from a server for what x-msrv asks of one: put, get, select, exists, remove, batches
of reads and writes, filter expressions, a query of a whole set, info, and the log-in; and a look into a map by key.
See data/aerospike for what the two say to each other; the order of the checks is that of the server's own source.

    with AerospikeServer() as server:
        client = aerospike.client({'hosts': [(server.host, server.port)]})
        server.judge = lambda write: 18 if write.number == 3 else None

Alone in the foreground: python test/aerospike_server.py --port 3000
"""
import argparse
import base64
import collections
import contextlib
import functools
import json
import operator
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time

from servers import PORTS

NODE, BUILD, CLUSTER = 'BB901000000FC02', '8.1.1.2', 'standin'
COMMUNITY, ENTERPRISE = 'Aerospike Community Edition', 'Aerospike Enterprise Edition'
PARTITIONS = 4096
EPOCH = 1262304000    # s; void times count from the start of 2010 (UTC)
LONGEST_TTL = 315360000  # s, ten years
MAX_BINS = 32767      # of a record
DEFAULT_TTL, KEEP_TTL, NEVER = 0, 0xfffffffe, 0xffffffff
CHUNK = 500           # records in a frame of a query's answer

# Result codes.
OK, NOT_FOUND, WRONG_GENERATION, BAD_REQUEST, EXISTS, NO_SPACE, TOO_BIG = 0, 2, 3, 4, 5, 8, 13
NO_NAMESPACE, BAD_BIN_NAME, FORBIDDEN, ENTERPRISE_ONLY, NOT_APPLICABLE, FILTERED_OUT = 20, 21, 22, 25, 26, 27
NO_GEOMETRY, NO_INDEX = 160, 201
NO_SECURITY, BAD_COMMAND, NO_USER, BAD_CREDENTIAL, NOT_AUTHENTICATED = 51, 54, 60, 65, 80

# Frames, and the flags of a record message: info1, info2, info3.
FRAME = struct.Struct('>Q')  # a byte version, a byte type, six bytes size
VERSION, INFO, SECURITY, MESSAGE = 2, 1, 2, 3
LONGEST_FRAME = 128 << 20
HEADER = struct.Struct('>BBBBBBIIIHH')  # its size, info1-4, result, generation, ttl, timeout or row, fields, ops
FIELD = struct.Struct('>IB')
OP = struct.Struct('>IBBBB')  # size, op, particle type, version, size of the name
ROW = struct.Struct('>I20sB')
READ, GET_ALL, BATCH, NO_BINS = 1, 2, 8, 32
WRITE, DELETE, SAME_GENERATION, NEWER_GENERATION, DURABLE, CREATE_ONLY, ALL_OPS = 1, 2, 4, 8, 16, 32, 128
LAST, UPDATE_ONLY, REPLACE, REPLACE_ONLY = 1, 8, 16, 32
REPEAT, HAS_INFO, HAS_GENERATION, HAS_TTL, HAS_INFO4 = 1, 2, 4, 8, 16
NAMESPACE, SET, KEY, DIGEST, PARTITION_LIST, DIGEST_LIST, MOST, RANGE, UDF, BATCH_ROWS, FILTER = (
    0, 1, 2, 4, 11, 12, 13, 22, 30, 41, 43)
OP_READ, OP_WRITE, OP_CDT_READ = 1, 2, 3

# Particle types.
NIL, INTEGER, FLOAT, STRING, BLOB, BOOL, MAP, LIST, GEOJSON = 0, 1, 2, 3, 4, 17, 19, 20, 23

# Commands and fields of the log-in.
AUTHENTICATE, LOGIN = 0, 20
USER, CLEAR_PASSWORD, TOKEN = 0, 4, 5

# What is asked for of one record. `ops`: a list of (op, bin name, the whole operation as it came).
Request = collections.namedtuple('Request', 'info1 info2 info3 generation ttl namespace set filter key ops')

# `bins`: name -> the operation that an answer brings it in, so what was written is read back bit for bit.
Record = collections.namedtuple('Record', 'set key generation void_time bins')

Answer = collections.namedtuple('Answer', 'code generation void_time count bins', defaults=(0, 0, 0, b''))

# What `judge` sees: the number of this write, from 1, and what it is to write. `key`: the user's, None where not sent.
Write = collections.namedtuple('Write', 'number namespace set key digest bins')


class Lost(collections.namedtuple('Lost', 'code')):
    """A verdict of `judge`: write the record, and answer `code`."""


class Refused(Exception):
    """A request is not done; the argument is the result code."""


# ---------------------------------------------------------------------------------------------------------- expressions

BYTES, ARRAY, PAIRS = object(), object(), object()
MSGPACK = {  # type byte: what follows
    0xc0: None, 0xc2: False, 0xc3: True, 0xca: '>f', 0xcb: '>d',
    0xcc: '>B', 0xcd: '>H', 0xce: '>I', 0xcf: '>Q', 0xd0: '>b', 0xd1: '>h', 0xd2: '>i', 0xd3: '>q',
    0xd9: (BYTES, '>B'), 0xda: (BYTES, '>H'), 0xdb: (BYTES, '>I'),
    0xc4: (BYTES, '>B'), 0xc5: (BYTES, '>H'), 0xc6: (BYTES, '>I'), 0xdc: (ARRAY, '>H'), 0xdd: (ARRAY, '>I'),
    0xde: (PAIRS, '>H'), 0xdf: (PAIRS, '>I')}

COMPARISONS = {1: operator.eq, 2: operator.ne, 3: operator.gt, 4: operator.ge, 5: operator.lt, 6: operator.le}
AND, OR, NOT, BIN, BIN_TYPE, CALL = 16, 17, 18, 81, 82, 127
IS_BOOL, IS_INTEGER, IS_STRING, IS_MAP, IS_BLOB, IS_FLOAT = 1, 2, 3, 5, 6, 7
PARTICLES = {IS_BOOL: BOOL, IS_INTEGER: INTEGER, IS_STRING: STRING, IS_MAP: MAP, IS_BLOB: BLOB, IS_FLOAT: FLOAT}
IN_CONTEXT, AT_INDEX, AT_KEY, GET_BY_KEY, VALUE = 255, 0x10, 0x22, 97, 7   # of calls that look into a list or a map


def passes(expression, bins):
    """Whether `bins` pass the filter (msgpack); Refused with 4 where it is not one, or of a kind not known here."""
    try:
        tree, end = unpack(expression, 0)
    except (IndexError, KeyError, struct.error):
        raise Refused(BAD_REQUEST) from None
    kind, value = evaluate(tree, bins)
    if end != len(expression) or kind != IS_BOOL:
        raise Refused(BAD_REQUEST)
    return value is True


def unpack(data, at):
    """The msgpack value at `at`, and where the next one is. Strings and blobs alike are bytes."""
    byte = data[at]
    at += 1
    if byte < 0x80 or byte >= 0xe0:
        return byte if byte < 0x80 else byte - 256, at
    if byte < 0xc0:
        if byte < 0xa0:
            return (unpack_pairs if byte < 0x90 else unpack_array)(data, at, byte & 15)
        return unpack_bytes(data, at, byte & 31)
    kind = MSGPACK[byte]
    if kind is None or isinstance(kind, bool):
        return kind, at
    what, form = kind if isinstance(kind, tuple) else (None, kind)
    value, = struct.unpack_from(form, data, at)
    at += struct.calcsize(form)
    if what is None:
        return value, at
    return {BYTES: unpack_bytes, ARRAY: unpack_array, PAIRS: unpack_pairs}[what](data, at, value)


def unpack_bytes(data, at, size):
    return data[at:at + size], at + size


def unpack_array(data, at, size):
    items = []
    for _ in range(size):
        item, at = unpack(data, at)
        items.append(item)
    return items, at


def unpack_pairs(data, at, size):
    """A map: where each of its values begins and ends, by its key."""
    places = {}
    for _ in range(size):
        key, at = unpack(data, at)
        _, end = unpack(data, at)
        places[key] = at, end
        at = end
    return places, at


def look_into(data, call):
    """The part of a list or map (msgpack) that a call asks for: a value by its key, in a context or not. A nil where
    there is no such key, None where the context is not there; Refused with 4 for another call."""
    context, call = call[1:] if call[0] == IN_CONTEXT else ([], call)
    if call[:2] != [GET_BY_KEY, VALUE] or len(call) != 3:
        raise Refused(BAD_REQUEST)
    for kind, wanted in zip(context[::2], context[1::2], strict=True):
        if kind not in (AT_KEY, AT_INDEX):
            raise Refused(BAD_REQUEST)
        data = part_of(data, wanted, kind)
        if data is None:
            return None
    return (part_of(data, call[2], AT_KEY) or b'\xc0') if isinstance(unpack(data, 0)[0], dict) else None


def part_of(data, wanted, kind):
    found, _ = unpack(data, 0)
    if kind == AT_KEY and isinstance(found, dict) and wanted in found:
        return data[slice(*found[wanted])]
    if kind == AT_INDEX and isinstance(found, list) and wanted < len(found):
        at = len(data) - len(data[1:]) if data[0] < 0xa0 else struct.calcsize(MSGPACK[data[0]][1]) + 1
        for _ in range(wanted):
            _, at = unpack(data, at)
        return data[at:unpack(data, at)[1]]
    return None


def particle_of(data):
    """A value of msgpack as a bin has it: (particle type, bytes)."""
    value, _ = unpack(data, 0)
    if isinstance(value, (dict, list)):
        return (MAP if isinstance(value, dict) else LIST), data
    if value is None:
        return NIL, b''
    if isinstance(value, bool):
        return BOOL, bytes([value])
    if isinstance(value, int):
        return INTEGER, value.to_bytes(8, 'big', signed=True)
    return (FLOAT, struct.pack('>d', value)) if isinstance(value, float) else (value[0], value[1:])


def evaluate(tree, bins):
    """The (type, value) of an expression; its value is None where a bin is missing or of another type.

    Types are checked in every branch, as the server does before it looks at a record: Refused with 4.
    """
    if not isinstance(tree, list):
        return constant(tree)
    code, *rest = tree or [None]
    if code in COMPARISONS:
        return compare(COMPARISONS[code], [evaluate(each, bins) for each in rest])
    if code in (AND, OR, NOT):
        return combine(code, [evaluate(each, bins) for each in rest])
    if code == CALL and len(rest) == 4 and rest[0] in PARTICLES:
        _, data = evaluate(rest[3], bins)
        found = particle_of(look_into(data, rest[2]) or b'\xc0') if data is not None else (NIL, b'')
        return rest[0], decode(*found) if found[0] == PARTICLES[rest[0]] else None
    if code in (BIN, BIN_TYPE) and rest and isinstance(rest[-1], bytes):
        return look_up(code, rest, bins)
    raise Refused(BAD_REQUEST)


def constant(value):
    """Of bytes the first is their particle type."""
    if isinstance(value, bytes) and value[:1] in (b'\x03', b'\x04'):
        return (IS_STRING if value[0] == STRING else IS_BLOB), value[1:]
    for kind, python in ((IS_BOOL, bool), (IS_INTEGER, int), (IS_FLOAT, float)):
        if isinstance(value, python):
            return kind, value
    raise Refused(BAD_REQUEST)


def compare(operation, operands):
    if len(operands) != 2 or operands[0][0] != operands[1][0]:
        raise Refused(BAD_REQUEST)
    (_, left), (_, right) = operands
    return IS_BOOL, None if left is None or right is None else operation(left, right)


def combine(code, operands):
    """And, or, not, in three values: an unknown one decides nothing."""
    values = [value for kind, value in operands if kind == IS_BOOL]
    if len(values) != len(operands) or (len(values) != 1 if code == NOT else len(values) < 2):
        raise Refused(BAD_REQUEST)
    if code == NOT:
        return IS_BOOL, None if values[0] is None else not values[0]
    decisive = code == OR
    if decisive in values:
        return IS_BOOL, decisive
    return IS_BOOL, None if None in values else not decisive


def look_up(code, rest, bins):
    """A bin's value, or the type of what it holds (0 where there is none)."""
    found = bins.get(rest[-1])
    if code == BIN_TYPE and len(rest) == 1:
        return IS_INTEGER, found[5] if found else NIL
    if code != BIN or len(rest) != 2 or rest[0] not in PARTICLES:
        raise Refused(BAD_REQUEST)
    wanted = PARTICLES[rest[0]]
    return rest[0], decode(wanted, found[8 + found[7]:]) if found and found[5] == wanted else None


def decode(particle, value):
    if particle == INTEGER:
        return int.from_bytes(value, 'big', signed=True)
    if particle == FLOAT:
        return struct.unpack('>d', value)[0]
    return value != b'\0' if particle == BOOL else value


# ------------------------------------------------------------------------------------------------------------- messages

def frame(kind, *parts):
    body = b''.join(parts)
    return FRAME.pack(VERSION << 56 | kind << 48 | len(body)) + body


def header(code=OK, generation=0, void_time=0, row=0, fields=0, ops=0, info1=0, info3=0):
    return HEADER.pack(HEADER.size, info1, 0, info3, 0, code, generation, void_time, row, fields, ops)


def last(code=OK):
    """The frame that ends an answer of many records."""
    return frame(MESSAGE, header(code, info3=LAST))


def field(number, value):
    return FIELD.pack(len(value) + 1, number) + value


@functools.lru_cache(maxsize=4096)
def done(op, name):
    """An operation without a value: what a write answers for each of its own when asked to answer them all."""
    return OP.pack(4 + len(name), op, NIL, 0, len(name)) + name


def read_fields(body, at, count):
    """The fields of a message (number -> bytes), and where they end."""
    fields = {}
    for _ in range(count):
        size, number = FIELD.unpack_from(body, at)
        fields[number] = body[at + 5:at + 4 + size]
        at += 4 + size
    return fields, at


def read_ops(body, at, count):
    ops = []
    for _ in range(count):
        size, op, _, _, name = OP.unpack_from(body, at)
        ops.append((op, body[at + 8:at + 8 + name], body[at:at + 4 + size]))
        at += 4 + size
    return ops, at


def make_request(infos, generation, ttl, fields, ops, default_filter=None):
    return Request(*infos, generation, ttl, fields.get(NAMESPACE, b'').decode(errors='replace'), fields.get(SET, b''),
                   fields.get(FILTER, default_filter), fields.get(KEY), ops)


def read_row(body, at, flags, default_filter):
    """The request of a row that does not repeat the one before it, and where it ends."""
    infos = [body[at], 0, 0]
    at += 1
    if flags & HAS_INFO:
        infos[1:] = body[at:at + 2]
        at += 2
    if flags & HAS_INFO4:
        at += 1
    generation = ttl = 0
    if flags & HAS_GENERATION:
        generation = int.from_bytes(body[at:at + 2], 'big')
        at += 2
    if flags & HAS_TTL:
        ttl = int.from_bytes(body[at:at + 4], 'big')
        at += 4
    fields, ops = struct.unpack_from('>HH', body, at)
    fields, at = read_fields(body, at + 4, fields)
    ops, at = read_ops(body, at, ops)
    return make_request(infos, generation, ttl, fields, ops, default_filter), at


def read_key(particle):
    """A user key as Python has it: an integer, a string or bytes; None where none was sent."""
    if not particle:
        return None
    if particle[0] == INTEGER:
        return int.from_bytes(particle[1:], 'big', signed=True)
    return particle[1:].decode(errors='replace') if particle[0] == STRING else particle[1:]


# ------------------------------------------------------------------------------------------------------------- the data

class Namespace:
    """Its records by digest. A record is never changed, only replaced."""

    def __init__(self, server):
        self.server, self.records = server, {}
        self.set_count_limits = {}   # name of a set -> its stop-writes-count
        self.durable_deletes = 0

    def live(self, digest):
        """The record, None where there is none or it has expired."""
        record = self.records.get(digest)
        if record and expired(record):
            del self.records[digest]
            return None
        return record

    def apply(self, request, digest):
        """Do what a request asks of one record. What is refused by the record brings its generation along."""
        old = None
        try:
            if request.info2 & WRITE and request.info2 & DELETE:
                self.check_durability(request)
                return self.remove(request, digest)
            if request.info2 & WRITE:
                self.check_stop_writes()
                check_ops(request)
            elif not request.info1 & READ:
                raise Refused(BAD_REQUEST)
            old = self.live(digest)
            return self.write(request, digest, old) if request.info2 & WRITE else self.read(request, old)
        except Refused as refused:
            return Answer(refused.args[0], *(old.generation, old.void_time) if old else ())

    def read(self, request, old):
        if old is None:
            raise Refused(NOT_FOUND)
        check_filter(request, old)
        if request.info1 & NO_BINS:
            return Answer(OK, old.generation, old.void_time)
        if not (request.info1 & GET_ALL or request.ops):
            raise Refused(BAD_REQUEST)
        bins = selected(old, request.ops)
        return Answer(OK, old.generation, old.void_time, len(bins), b''.join(bins))

    def remove(self, request, digest):
        old = self.live(digest)
        if old is None:
            raise Refused(NOT_FOUND)
        check_generation(request, old)
        check_filter(request, old)
        del self.records[digest]
        self.durable_deletes += bool(request.info2 & DURABLE)
        return Answer(OK)

    def write(self, request, digest, old):
        if old is None and request.info3 & (UPDATE_ONLY | REPLACE_ONLY):
            raise Refused(NOT_FOUND)
        if old and request.info2 & CREATE_ONLY:
            raise Refused(EXISTS)
        if old is None:
            self.check_set_count(request.set)
        check_generation(request, old)
        check_filter(request, old)
        new = self.written(request, old)
        if new.bins:
            self.records[digest] = new
        elif old is None:
            raise Refused(NOT_FOUND)
        else:
            del self.records[digest]
        acks = [done(op, name) for op, name, _ in request.ops] if request.info2 & ALL_OPS else ()
        metadata = (new.generation, new.void_time) if new.bins else (0, 0)
        return Answer(OK, *metadata, len(acks), b''.join(acks))

    def written(self, request, old):
        """The record that a write makes. A key that was stored stays, where the write brings none."""
        void_time = self.void_time(request.ttl, old)
        bins = dict(old.bins) if old and not request.info3 & (REPLACE | REPLACE_ONLY) else {}
        for _, name, raw in request.ops:
            if raw[5] == NIL:
                bins.pop(name, None)
            elif raw[5] == GEOJSON and not is_geometry(raw[8 + raw[7]:]):
                raise Refused(NO_GEOMETRY)
            else:
                bins[name] = raw[:4] + b'\1' + raw[5:]  # OP_READ: as it is read
        generation = old.generation % 0xffff + 1 if old else 1
        new = Record(request.set, request.key or (old and old.key), generation, void_time, bins)
        if len(bins) > MAX_BINS:
            raise Refused(BAD_REQUEST)
        if size(new) > self.server.max_record_size:
            raise Refused(TOO_BIG)
        return new

    def check_stop_writes(self):
        if self.server.clock_skew_stop_writes:
            raise Refused(FORBIDDEN)
        if self.server.stop_writes:
            raise Refused(NO_SPACE)

    def check_durability(self, request):
        """The Community Edition refuses a durable delete before it looks for the record."""
        if request.info2 & DURABLE and self.server.edition == COMMUNITY:
            raise Refused(ENTERPRISE_ONLY)

    def check_set_count(self, name):
        """A set at its stop-writes-count takes no new record; what is there can be written."""
        limit = self.set_count_limits.get(name.decode(), 0)
        if limit and sum(record.set == name for record in self.records.values()) >= limit:
            raise Refused(FORBIDDEN)

    def void_time(self, ttl, old):
        """When a write with that ttl expires, 0 for never; Refused where the ttl may not be."""
        server = self.server
        if ttl == KEEP_TTL and old is None:
            ttl = DEFAULT_TTL
        if LONGEST_TTL < ttl < KEEP_TTL:
            raise Refused(BAD_REQUEST)
        if ttl == KEEP_TTL:
            return old.void_time
        seconds = ttl or server.default_ttl
        if seconds in (0, NEVER):
            return 0
        if not (server.nsup_period or server.allow_ttl_without_nsup):
            raise Refused(FORBIDDEN)
        return now() + seconds


def is_geometry(particle):
    """Whether a GeoJSON value (flags, number of cells, cells, text) is one that the server takes."""
    cells = int.from_bytes(particle[1:3], 'big')
    try:
        shape = json.loads(particle[3 + 8 * cells:])
        if shape['type'] == 'Feature':
            shape = shape['geometry']
        return GEOMETRIES[shape['type']](shape['coordinates'])
    except (ValueError, TypeError, KeyError, IndexError):
        return False


def is_point(position):
    longitude, latitude = position
    return isinstance(position, list) and abs(longitude) <= 180 and abs(latitude) <= 90


def is_polygon(loops):
    return isinstance(loops, list) and all(
        len(loop) > 3 and loop[0] == loop[-1] and all(map(is_point, loop)) for loop in loops)


GEOMETRIES = {'Point': is_point, 'Polygon': is_polygon,
              'MultiPolygon': lambda polygons: isinstance(polygons, list) and all(map(is_polygon, polygons)),
              'AeroCircle': lambda circle: is_point(circle[0]) and circle[1] > 0}


def size(record):
    """Bytes that the server would store: exact where all bins are strings or bytes, else some more."""
    optional = (4 if record.void_time else 0) + sum(1 + len(each) for each in (record.set, record.key) if each)
    return 40 + optional + sum(len(raw) - 2 for raw in record.bins.values())


def expired(record):
    return 0 < record.void_time < now()


def now():
    """s since the EPOCH."""
    return int(time.time()) - EPOCH


def check_ops(request):
    if not request.ops:
        raise Refused(BAD_REQUEST)
    for op, name, raw in request.ops:
        if len(name) > 15:
            raise Refused(BAD_BIN_NAME)
        if op != OP_WRITE or raw[5] == NIL and request.info3 & (REPLACE | REPLACE_ONLY):
            raise Refused(BAD_REQUEST)


def check_generation(request, old):
    stored = old.generation if old else 0
    if request.info2 & SAME_GENERATION and request.generation != stored:
        raise Refused(WRONG_GENERATION)
    if request.info2 & NEWER_GENERATION and request.generation <= stored:
        raise Refused(WRONG_GENERATION)


def check_filter(request, old):
    """Only a record that is there is judged."""
    if old and request.filter and not passes(request.filter, old.bins):
        raise Refused(FILTERED_OUT)


def selected(record, ops):
    """The bins that were asked for and are there, or all."""
    if not ops:
        return record.bins.values()
    return [record.bins[name] if op == OP_READ else looked_up(name, asked, record.bins[name])
            for op, name, asked in ops if name in record.bins]


def looked_up(name, asked, stored):
    """What a read of a part of a map answers."""
    data = look_into(stored[8 + len(name):], unpack(asked[8 + len(name):], 0)[0])
    if data is None:
        raise Refused(NOT_APPLICABLE)
    particle, value = particle_of(data)
    return OP.pack(4 + len(name) + len(value), OP_CDT_READ, particle, 0, len(name)) + name + value


class Query:
    """A query of the partitions of a namespace: of a set or of all of them, filtered or not."""

    def __init__(self, request, fields):
        self.request, self.namespace = request, fields[NAMESPACE]
        self.most = int.from_bytes(fields.get(MOST, b''), 'big') or None
        pids = fields.get(PARTITION_LIST, b'')
        self.partitions = set(struct.unpack(f'<{len(pids) // 2}H', pids))
        digests = fields.get(DIGEST_LIST, b'')
        digests = [digests[at:at + 20] for at in range(0, len(digests), 20)]
        # Where a partition was read in part before, up to this digest.
        self.after = {partition(digest): digest for digest in digests}

    def frames(self, records):
        found = [(digest, record) for digest, record in sorted(records) if self.wants(digest, record)][:self.most]
        for at in range(0, len(found), CHUNK):
            yield frame(MESSAGE, *(self.item(*each) for each in found[at:at + CHUNK]))

    def wants(self, digest, record):
        if self.request.set not in (b'', record.set) or expired(record):
            return False
        pid = partition(digest)
        if pid not in self.partitions and digest <= self.after.get(pid, b'\xff' * 20):
            return False
        return not self.request.filter or passes(self.request.filter, record.bins)

    def item(self, digest, record):
        fields = [field(NAMESPACE, self.namespace), field(DIGEST, digest)]
        fields += [field(number, value) for number, value in ((SET, record.set), (KEY, record.key)) if value]
        bare = self.request.info1 & NO_BINS
        bins = () if bare else selected(record, self.request.ops)
        head = header(OK, record.generation, record.void_time, fields=len(fields), ops=len(bins), info1=bare)
        return b''.join((head, *fields, *bins))


def partition(digest):
    return int.from_bytes(digest[:2], 'little') % PARTITIONS


# ---------------------------------------------------------------------------------------------------------- connections

class Connection(threading.Thread):
    """One client's connection: reads a frame, answers it, reads the next."""

    def __init__(self, server, sock):
        super().__init__(daemon=True)
        self.server, self.sock = server, sock
        self.authenticated = not server.users
        self.closed = False

    def run(self):
        try:
            self.open()
            with self.sock.makefile('rb', 1 << 16) as file:
                while self.talk(file):
                    pass
        except OSError:
            pass  # the other end has gone, or failed the handshake, or this end was closed
        finally:
            self.sock.close()
            self.server.connections.discard(self)

    def open(self):
        if self.server.tls:
            self.sock = self.server.tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.server.hold(self)  # only now, for a close() meanwhile was of the socket as it was
        if self.server.tls:
            self.sock.do_handshake()

    def talk(self, file):
        """One request and its answer; False when there is no further one."""
        head = file.read(FRAME.size)
        if len(head) < FRAME.size:
            return False
        version, kind, size = head[0], head[1], int.from_bytes(head[2:], 'big')
        if version != VERSION or kind not in (INFO, SECURITY, MESSAGE) or size > LONGEST_FRAME:
            return False
        body = file.read(size)
        if len(body) < size:
            return False
        self.server.hold(self)
        answer = self.answer(kind, body)
        if answer:
            self.server.hold(self)
            self.sock.sendall(answer)
        return bool(answer)

    def answer(self, kind, body):
        """The frames to send; nothing where the connection is to end without them."""
        if kind == SECURITY:
            return self.server.log_in(self, body)
        if kind == INFO:
            lines = self.server.info(body) if self.authenticated else 'ERROR:80:not authenticated\n'
            return frame(INFO, lines.encode())
        answer, wrote = self.server.message(self, body)
        if self.server.delay:
            self.server.wait(self, self.server.delay)
        return b'' if wrote and self.server.drops_answer() else answer

    def close(self):
        """Cut it off, from whichever thread."""
        self.closed = True
        with contextlib.suppress(OSError):
            # Not the one of SSLSocket: after that the other thread would read on without TLS.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


# ----------------------------------------------------------------------------------------------------------- the server

class AerospikeServer:
    """Has started when it was made, on a free port of its own where `port` is 0.

    tls: an SSLContext of the server's side. users: name -> password; with them a log-in comes before all else; a log-in
    without a name is that of the client certificate. node: its name. advertised: the address that it tells clients of,
    where that is another than the one it has, which it tells those of that ask for the alternate one. Set at
    any time: nsup_period, default_ttl, allow_ttl_without_nsup, max_record_size, stop_writes, clock_skew_stop_writes,
    build (its version), edition (ENTERPRISE takes durable deletes), cluster_name, batch_max_requests (which is only
    told), and what goes wrong:

    judge(write): called before each write of a record is done. None lets it be, an int is answered instead, Lost(code)
        is answered after it. `write` is a Write.
    delay: s before each answer to a record message. drop_answers: so many messages that write, from now on, are done
        and their connections closed without an answer. refuse_logins: the code that each log-in is answered with.
    """

    def __init__(self, host='127.0.0.1', port=0, namespaces=('test',), tls=None, users=None, nsup_period=120,
                 node=NODE, advertised=None):
        self.host, self.tls, self.users = host, tls, users
        self.nsup_period, self.default_ttl, self.allow_ttl_without_nsup = nsup_period, 0, False
        self.max_record_size = 1 << 20
        self.stop_writes = self.clock_skew_stop_writes = False
        self.build, self.edition, self.cluster_name, self.batch_max_requests = BUILD, COMMUNITY, CLUSTER, 0
        self.judge, self.delay, self.drop_answers, self.refuse_logins = None, 0, 0, None
        self.writes = 0
        self.node, self.advertised, self.peers, self.partitions = node, advertised, (), range(PARTITIONS)
        self.namespaces = {name: Namespace(self) for name in namespaces}
        self.connections = set()
        self._token, self._started = os.urandom(16), time.monotonic()
        self._lock, self._changed, self._hung = threading.Lock(), threading.Condition(), False
        self._listener = bound(host, port)
        self.port = self._listener.getsockname()[1]
        self.listen()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.refuse()
        self._listener.close()

    @property
    def address(self):
        return f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}'

    def stored(self, namespace, set):
        """The number of records."""
        return sum(record.set == set.encode() for record in self._records(namespace).values())

    def hang(self):
        """Take connections and requests, and do and answer nothing until resume()."""
        self._hung = True

    def resume(self):
        """Go on; what was asked for meanwhile is done now."""
        with self._changed:
            self._hung = False
            self._changed.notify_all()

    def refuse(self):
        """Die: what is being done is left where it is, connections are cut and new ones refused. Data stays."""
        # On Linux such a listener keeps its port and can listen again, so that nobody else gets the port meanwhile.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        join(self._acceptor)
        connections = list(self.connections)
        for connection in connections:
            connection.close()
        with self._changed:
            self._changed.notify_all()
        for connection in connections:
            join(connection)

    def listen(self, empty=False):
        """Come back after refuse(), on the same port."""
        if empty:
            for namespace in self.namespaces.values():
                namespace.records = {}
        self._listener.listen(128)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(self, sock)
                self.connections.add(connection)
                connection.start()

    # Waiting, in the connections' threads.

    def hold(self, connection):
        """Wait while hung; ConnectionError when the connection was closed."""
        if self._hung:
            with self._changed:
                self._changed.wait_for(lambda: connection.closed or not self._hung)
        if connection.closed:
            raise ConnectionError

    def wait(self, connection, seconds):
        with self._changed:
            self._changed.wait_for(lambda: connection.closed, seconds)

    def drops_answer(self):
        """Whether this answer is one of those; from the next on, one less is."""
        with self._lock:
            if not self.drop_answers:
                return False
            self.drop_answers -= 1
            return True

    # Record messages.

    def message(self, connection, body):
        """The frames of the answer, and whether anything was to be written."""
        _, info1, info2, info3, _, _, generation, ttl, _, fields, ops = HEADER.unpack_from(body)
        fields, at = read_fields(body, HEADER.size, fields)
        ops, _ = read_ops(body, at, ops)
        if not connection.authenticated:
            return last(NOT_AUTHENTICATED), False
        if info1 & BATCH:
            return self._batch(connection, fields)
        request = make_request((info1, info2, info3), generation, ttl, fields, ops)
        if DIGEST not in fields:
            return self._query(request, fields), False
        answer = self._record(connection, request, fields[DIGEST])
        head = header(answer.code, answer.generation, answer.void_time, ops=answer.count)
        return frame(MESSAGE, head, answer.bins), bool(info2 & WRITE)

    def _batch(self, connection, fields):
        """Rows are done in their order, up to one that can't be read or is for an unknown namespace."""
        rows, wrote, code, request = [], False, OK, None
        body, at = fields.get(BATCH_ROWS, b''), 5
        count = int.from_bytes(body[:4], 'big')
        try:
            if FILTER in fields:
                passes(fields[FILTER], {})  # a faulty one refuses the whole batch
            for _ in range(count):
                index, digest, flags = ROW.unpack_from(body, at)
                at += ROW.size
                if not flags & REPEAT:
                    request, at = read_row(body, at, flags, fields.get(FILTER))
                if request is None or request.namespace not in self.namespaces:
                    raise Refused(BAD_REQUEST)
                answer = self._record(connection, request, digest)
                rows += header(*answer[:3], index, ops=answer.count), answer.bins
                wrote |= request.info2 & WRITE
        except (Refused, struct.error, IndexError):
            code = BAD_REQUEST
        return (frame(MESSAGE, *rows) if rows else b'') + last(code if count else BAD_REQUEST), bool(wrote)

    def _record(self, connection, request, digest):
        """Do one request, as the judge has it."""
        verdict = self._judged(request, digest) if request.info2 & WRITE else None
        if connection.closed:
            raise ConnectionError  # died in mid-batch
        if isinstance(verdict, int):
            return Answer(verdict)
        namespace = self.namespaces.get(request.namespace)
        if namespace is None:
            return Answer(NO_NAMESPACE)
        with self._lock:
            answer = namespace.apply(request, digest)
        return Answer(verdict.code) if verdict else answer

    def _judged(self, request, digest):
        with self._lock:
            self.writes += 1
            number = self.writes
        if self.judge is None:
            return None
        bins = [name.decode(errors='replace') for _, name, _ in request.ops]
        return self.judge(Write(number, request.namespace, request.set.decode(errors='replace'),
                                read_key(request.key), digest, bins))

    def _query(self, request, fields):
        if request.info2 & WRITE or UDF in fields:
            return last(BAD_REQUEST)
        if request.namespace not in self.namespaces:
            return last(NO_NAMESPACE)
        if RANGE in fields:
            return last(NO_INDEX)
        try:
            return b''.join(Query(request, fields).frames(self._records(request.namespace).items())) + last()
        except Refused as refused:
            return last(refused.args[0])

    def _records(self, namespace):
        with self._lock:
            return dict(self.namespaces[namespace].records)

    # The log-in.

    def log_in(self, connection, body):
        """The answer to a log-in, or to a later connection's token.

        The password comes as a bcrypt hash, which the standard library can't make: any will do for a known user.
        """
        command, fields = body[2], read_fields(body, 16, body[3])[0]
        code = self._login_code(connection, command, fields)
        connection.authenticated |= code == OK
        token = field(TOKEN, self._token) if code == OK and command == LOGIN else b''
        return frame(SECURITY, bytes((0, code, command, bool(token))), bytes(12), token)

    def _login_code(self, connection, command, fields):
        if not self.users:
            return NO_SECURITY
        if command not in (LOGIN, AUTHENTICATE):
            return BAD_COMMAND
        if self.refuse_logins:
            return self.refuse_logins
        user = fields[USER].decode(errors='replace') if USER in fields else certified(connection.sock)
        if user not in self.users:
            return NO_USER
        if fields.get(CLEAR_PASSWORD, self.users[user].encode()) != self.users[user].encode():
            return BAD_CREDENTIAL
        if command == AUTHENTICATE and fields.get(TOKEN) != self._token:
            return NOT_AUTHENTICATED
        return OK

    # Info.

    def info(self, body):
        """A line of answer for each line of commands."""
        lines = body.decode(errors='replace').split('\n')
        return ''.join(f'{line}\t{self._info_of(line)}\n' for line in lines if line)

    def _info_of(self, line):
        command, _, rest = re.match('([^/:]*)([/:]?)(.*)', line).groups()
        known = {
            'node': self.node, 'build': self.build, 'cluster-name': self.cluster_name, 'status': 'ok',
            'user-agent-set': 'ok', 'edition': self.edition, 'partition-generation': '0', 'peers-generation': '0',
            'service-clear-std': self.advertised or self.address, 'service-tls-std': self.advertised or self.address,
            'service-clear-alt': self.address, 'service-tls-alt': self.address, 'namespaces': ';'.join(self.namespaces)}
        if command in ('peers-clear-std', 'peers-tls-std', 'peers-clear-alt', 'peers-tls-alt'):
            found = [(peer.node, command.endswith('-std') and peer.advertised or peer.address) for peer in self.peers]
            return f'0,{self.port},[{",".join(f"[{node},,[{address}]]" for node, address in found)}]'
        made = {'replicas': self._replicas, 'statistics': self._statistics, 'namespace': self._namespace,
                'sets': self._sets, 'set-config': self._set_config, 'truncate': self._truncate,
                'get-config': self._get_config}
        if command in made:
            return made[command](rest)
        return known.get(command, 'ERROR:4:unrecognized command')

    def _replicas(self, _):
        """Which partitions it owns, a bit for each; there is one copy of a record."""
        bits = bytearray(PARTITIONS // 8)
        for number in self.partitions:
            bits[number // 8] |= 0x80 >> number % 8
        return ';'.join(f'{name}:0,1,{base64.b64encode(bits).decode()}' for name in self.namespaces)

    def _statistics(self, _):
        return pairs({
            'cluster_size': 1 + len(self.peers), 'cluster_integrity': True, 'cluster_is_member': True,
            'uptime': int(time.monotonic() - self._started), 'client_connections': len(self.connections),
            'objects': sum(len(self._records(name)) for name in self.namespaces)})

    def _namespace(self, name):
        if name not in self.namespaces:
            return 'type=unknown'
        return pairs({
            'ns_cluster_size': 1 + len(self.peers), 'effective_replication_factor': 1,
            'objects': len(self._records(name)),
            'stop_writes': self.stop_writes, 'clock_skew_stop_writes': self.clock_skew_stop_writes,
            'allow-ttl-without-nsup': self.allow_ttl_without_nsup,
            'default-ttl': self.default_ttl, 'max-record-size': self.max_record_size, 'nsup-period': self.nsup_period,
            'replication-factor': 1, 'storage-engine': 'memory'})

    def _sets(self, rest):
        name, _, wanted = rest.partition('/')
        if name and name not in self.namespaces:
            return 'ns_type=unknown'
        counts = collections.Counter((each, record.set.decode()) for each in ([name] if name else self.namespaces)
                                     for record in self._records(each).values() if record.set)
        if wanted:
            return self._set_facts(name, wanted, counts[name, wanted]) if (name, wanted) in counts else ''
        return ''.join(f'ns={each}:set={set}:{self._set_facts(each, set, count)}'
                       for (each, set), count in counts.items())

    def _set_facts(self, namespace, name, count):
        limit = self.namespaces[namespace].set_count_limits.get(name, 0)
        return f'objects={count}:tombstones=0:stop-writes-count={limit};'

    def _set_config(self, rest):
        """Only the stop-writes-count of a set."""
        options = dict(pair.partition('=')[::2] for pair in rest.split(';'))
        if not {'id', 'set', 'stop-writes-count'} <= set(options) or options['id'] not in self.namespaces:
            return 'ERROR:4:bad parameter'
        self.namespaces[options['id']].set_count_limits[options['set']] = int(options['stop-writes-count'])
        return 'ok'

    def _truncate(self, rest):
        """Of a set, all that is there now."""
        options = dict(pair.partition('=')[::2] for pair in rest.split(';'))
        if options.get('namespace') not in self.namespaces or not options.get('set'):
            return 'ERROR:4:bad parameter'
        with self._lock:
            namespace = self.namespaces[options['namespace']]
            namespace.records = {digest: record for digest, record in namespace.records.items()
                                 if record.set != options['set'].encode()}
        return 'ok'

    def _get_config(self, _):
        return pairs({'batch-max-requests': self.batch_max_requests, 'proto-fd-max': 15000})


def form_cluster(*servers):
    """Make one cluster of them, before any client comes: each owns its share of the partitions."""
    for place, server in enumerate(servers):
        server.peers = [peer for peer in servers if peer is not server]
        server.partitions = range(place, PARTITIONS, len(servers))


def certified(sock):
    """The common name of a client certificate that was verified; None where there is none."""
    subject = getattr(sock, 'getpeercert', dict)() or {}
    return next((value for part in subject.get('subject', ()) for name, value in part if name == 'commonName'), None)


def pairs(values):
    """As info has them: a=1;b=true."""
    return ';'.join(f'{name}={str(value).lower()}' for name, value in values.items())


def join(thread):
    """Wait until it has ended, except where it is the caller's own; AssertionError when it takes too long."""
    if thread is not threading.current_thread():
        thread.join(10)
        assert not thread.is_alive()


def bound(host, port):
    """A socket bound to `port`, or to a free one where it is 0; OSError where it is taken."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    while True:
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port or random.SystemRandom().choice(PORTS)))
            made.listen()
            return made
        except OSError:
            made.close()
            if port:
                raise


# --------------------------------------------------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description='A stand-in for an Aerospike server, for tests and a laptop only.')
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=3000)
    parser.add_argument('--namespace', nargs='+', default=['test'])
    args = parser.parse_args()
    stop = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: stop.set())
    try:
        server = AerospikeServer(args.host, args.port, args.namespace)
    except OSError as error:
        sys.exit(f'error: {args.host} port {args.port}: {error.strerror}')
    with server:
        print(f'listening on {server.address}, namespaces {", ".join(args.namespace)}; data in memory, '
              'for tests and a laptop only', flush=True)
        stop.wait()


if __name__ == '__main__':
    main()
