"""Any message at all: equal in the store, or a dead letter byte for byte. The same for every store."""
import collections
import itertools
import json
import random

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import servers

texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=10)
scalars = st.none() | st.booleans() | st.integers(-1 << 63, (1 << 63) - 1) | st.floats(
    allow_nan=False, allow_infinity=False) | texts
fit = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                   max_leaves=8)
names = st.text('abcdefghijklm \u00e9."', max_size=7).filter(lambda name: name not in ('n', 'gid'))
wild = st.recursive(
    scalars | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(['\ud800', '\0', 2**63, 1e308 * 10]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3), max_leaves=8)
objects = st.dictionaries(names, fit, max_size=4).map(lambda value: (True, value))
wilder = st.dictionaries(names | st.text(max_size=20), wild, max_size=4).map(lambda value: (False, value))
batches = st.lists(objects | wilder, min_size=40, max_size=80)


def encoded(number, value, ascii_only):
    """A message's body, the number under n."""
    return json.dumps({'n': number, **value}, ensure_ascii=ascii_only).encode('utf-8', 'surrogatepass')


def damaged(body, seed):
    """The body with one byte changed, cut or doubled."""
    place = random.Random(seed).randrange(len(body))
    return [body[:place] + body[place + 1:], body[:place] + b'\xff' + body[place + 1:], body + body[place:],
            body.replace(b'"n"', b'"n": 1, "n"', 1)][seed % 4]


def check(nsqd, program, rows, **settings_):
    """Any message at all, in windows of `settings_` to topics of their own: equal in the store, or dead byte for byte.
    `rows(topic)` gives what is stored of one, as (key, bins)."""
    topics = (f'topic-{number}' for number in itertools.count())

    # Each example is a window of half a second, and a batch is not worth an hour of shrinking: the message is named.
    @settings(max_examples=5, deadline=None, phases=[Phase.generate])
    @given(batches, st.booleans(), st.integers(0, 1000))
    def round_trip(batch, ascii_only, seed):
        bodies = [encoded(n, value, ascii_only) for n, (_, value) in enumerate(batch)]
        bodies += [damaged(body, seed + n) for n, body in enumerate(bodies[:8])] + [b'[]', b'1', b'\0', b'\xff']
        topic = next(topics)
        dead = window(nsqd, program, topic, bodies, settings_)
        stored = equals(rows(topic), bodies)
        neither = collections.Counter(bodies) - collections.Counter(stored + dead)
        assert not neither, 'these are not stored with their very value, nor dead with their very bytes'
        assert len(stored + dead) == len(bodies)
        lost = [body for body, (harmless, _) in zip(bodies, batch, strict=False) if harmless and body in dead]
        assert not lost, 'these had no fault'

    round_trip()


# Sizes at which a number of fewer bits than Python's is full: of msgpack, of the protocol, of a record.
sizes = st.sampled_from([1, 15, 16, 31, 32, 127, 128, 255, 256, 32765, 32766, 32767, 32768, 65534, 65535, 65536,
                         70_000])
SHAPES = {
    'fields': lambda size: {f'{n:x}': n for n in range(size - 1)},   # one more is n
    'long name': lambda size: {'x' * min(size, 300): 1},
    'string': lambda size: {'v': 'x' * size},
    'two bytes a letter': lambda size: {'v': '\u00e9' * size},
    'list': lambda size: {'v': list(range(size))},
    'object': lambda size: {'v': {f'{n}': n for n in range(size)}},
    'strings inside': lambda size: {'v': ['x' * size, {'y' * size: 'z' * size}]},
    'depth': lambda size: {'v': nested(min(size, 63))},
    'integers': lambda size: {'v': [sign * (size << shift) for sign in (1, -1) for shift in (0, 8, 16, 32, 46)]},
}


def nested(levels):
    """A list of so many levels."""
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


def check_sizes(nsqd, program, rows, own_bins=1, **settings_):
    """Messages at the limits of every size: each is equal in the store, or dead because no store can hold it.
    own_bins: how many bins are not of the message (id-bin, time-bin)."""
    topics = (f'sizes-{number}' for number in itertools.count())
    one = st.tuples(st.sampled_from(sorted(SHAPES)), sizes)

    @settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate])
    @given(st.lists(one, min_size=4, max_size=8))
    @example([('fields', 32766), ('fields', 32767), ('fields', 65536), ('string', 1), ('fields', 70_000)])
    def round_trip(batch):
        values = [{**SHAPES[shape](size), 'n': n} for n, (shape, size) in enumerate(batch)]
        # What nsqd does not take (--max-msg-size), with the header of a dead letter, nobody can publish.
        values = [value for value in values if len(json.dumps(value)) < (1 << 20) - 4096]
        bodies = [json.dumps(value).encode() for value in values]
        topic = next(topics)
        dead = window(nsqd, program, topic, bodies, settings_)
        rejection = [body for body, value in zip(bodies, values, strict=True)
                     if len(value) + own_bins > 32767 or max(map(len, value)) > 15]
        assert collections.Counter(dead) == collections.Counter(rejection)
        assert sorted(equals(rows(topic), bodies) + dead) == sorted(bodies)

    round_trip()


def window(nsqd, program, topic, bodies, settings_):
    """One window over `bodies`: the bodies of the dead letters."""
    nsqd.create(topic, 'x-msrv')
    nsqd.publish(topic, bodies)
    done = program.once(nsqd, topic=topic, nsq={'max-messages': len(bodies)}, **settings_)
    counts = servers.summary(done.stderr)
    assert (counts['received'], counts['stored'] + counts['dead']) == (len(bodies), len(bodies))
    letters = nsqd.drain(f'{topic}.dead', 'x-msrv-replay', expected=counts['dead'])
    return [letter.partition(b'\n')[2] for letter in letters]


def equals(rows, bodies):
    """For each row the body that it was made of; AssertionError where there is none."""
    expected = {}
    for body in bodies:
        try:
            value = json.loads(body, object_pairs_hook=each_once)
        except ValueError:
            continue
        if isinstance(value, dict):
            bins = {name: item for name, item in value.items() if item is not None}
            expected.setdefault(exact(bins), []).append(body)
    found = []
    for key, bins in rows:
        assert bins.pop('gid') == key
        found.append(expected[exact(bins)].pop())
    return found


def each_once(pairs):
    """An object; ValueError where a name comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError('twice')
    return dict(pairs)


def exact(value):
    """`value` as text in which 1, 1.0 and True differ, and names have no order."""
    return json.dumps(value, sort_keys=True)
