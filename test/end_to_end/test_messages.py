"""From the bytes of a message to its record, or to the reason why it can be none; and how RDY is dealt out."""
import bz2
import codecs
import gzip
import json
import lzma
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xmsrv import (
    MAX_BINS,
    InvalidMessage,
    Mapper,
    Message,
    build_config,
    decode_message,
    decode_with_path,
    rdy_shares,
    read_file,
)

TIMESTAMP = 1_700_000_000_000_000_000


def unfit(function, *args):
    """(reason, detail) of the InvalidMessage that `function` raises."""
    with pytest.raises(InvalidMessage) as caught:
        function(*args)
    return caught.value.reason, caught.value.detail


def either(function, body):
    """The decoded value, or the reason that there is none."""
    try:
        return function(body)
    except InvalidMessage as error:
        return InvalidMessage, error.reason, error.detail


def exact(value):
    """`value` in a form in which 1, 1.0 and True differ, and 0.0 and -0.0 too."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return type(value), repr(value)


def nested(levels, opening='[', closing=']'):
    """An object of so many levels in all."""
    return ('{"a":' + opening * (levels - 1) + '1' + closing * (levels - 1) + '}').encode()


# --- strict JSON

@pytest.mark.parametrize('body, value', [
    (b'{}', {}),
    (b' \t\r\n{"a": 1} \t\r\n', {'a': 1}),
    (b'{"": ""}', {'': ''}),
    (b'{"a": 9223372036854775807, "b": -9223372036854775808}', {'a': 2**63 - 1, 'b': -2**63}),
    (b'{"a": 1.0, "b": 1, "c": true, "d": -0.0}', {'a': 1.0, 'b': 1, 'c': True, 'd': -0.0}),
    (b'{"a": 0.1234567890123456789012345}', {'a': 0.1234567890123456789012345}),
    (b'{"a": 12345678901234567890.0}', {'a': 12345678901234567890.0}),
    (b'{"a": 1E2, "b": 0e-400, "c": -0.0e9, "d": 5e-324}', {'a': 100.0, 'b': 0.0, 'c': -0.0, 'd': 5e-324}),
    (b'{"a": 1.7976931348623157e308}', {'a': 1.7976931348623157e308}),
    (b'{"a": "1234567890123456789012345"}', {'a': '1234567890123456789012345'}),
    (b'{"a": [null, {"b": null}]}', {'a': [None, {'b': None}]}),
    (b'{"a": null}', {'a': None}),
    (b'{"a": {"n": 1}, "b": {"n": 1}}', {'a': {'n': 1}, 'b': {'n': 1}}),
    (rb'{"a": "\ud83d\ude00\n\u00e9\\u0000"}', {'a': '\U0001f600\n\u00e9\\u0000'}),
    ('{"\u00e9": "\U0001f600\uffff"}'.encode(), {'\u00e9': '\U0001f600\uffff'}),
    (nested(64), json.loads(nested(64))),
    (nested(64, '{"b":', '}'), json.loads(nested(64, '{"b":', '}'))),
    (b'{"a": [' + b'[],' * 500 + b'[]]}', {'a': [[]] * 501}),
    (b'{"a": "' + b'[' * 500 + b'"}', {'a': '[' * 500}),
])
def test_is_kept_exactly(body, value):
    assert exact(decode_message(body)) == exact(value)


@pytest.mark.parametrize('body, reason, detail', [
    # not JSON
    (b'', 'invalid-json', 'a value expected at character 0'),
    (b' \n', 'invalid-json', 'a value expected at character 0'),
    (b'hello', 'invalid-json', 'a value expected at character 0'),
    (b'{"a": }', 'invalid-json', 'a value expected at character 6'),
    (b'{"a": 1', 'invalid-json', "Expecting ',' delimiter at character 7"),
    (b'{"a": 1,}', 'invalid-json', None),
    (b'{"a": 01}', 'invalid-json', "Expecting ',' delimiter at character 7"),
    (b"{'a': 1}", 'invalid-json', None),
    (b'{"a": "b', 'invalid-json', 'Unterminated string starting at character 6'),
    (b'{"a": "b\nc"}', 'invalid-json', 'Invalid control character at character 8'),
    (b'{"a": "\0"}', 'invalid-json', 'Invalid control character at character 7'),
    (rb'{"a": "\x"}', 'invalid-json', r'Invalid \escape at character 7'),
    (b'{"a": 1}\0', 'invalid-json', 'more text after the value, at character 8'),
    (b'{"a": 1} {"a": 2}', 'invalid-json', 'more text after the value, at character 8'),
    (b'{"a": 1}\x0b', 'invalid-json', 'more text after the value, at character 8'),
    (b'{"a": 1}\n\n,', 'invalid-json', 'more text after the value, at character 8'),
    # not UTF-8
    (b'{"a": "\xff"}', 'invalid-json', 'not UTF-8 at byte 7'),
    (b'{"a": "\xed\xa0\x80"}', 'invalid-json', 'not UTF-8 at byte 7'),
    (b'x' * 40, 'invalid-json', 'a value expected at character 0'),
    (b'\n\n\n{"a": }', 'invalid-json', 'a value expected at character 9'),
    (b'\n {"a": "\xff"}', 'invalid-json', 'not UTF-8 at byte 9'),
    (b' {"a": 1} x', 'invalid-json', 'more text after the value, at character 9'),
    # NaN, infinities, a name twice
    (b'{"a": NaN}', 'invalid-json', 'a: NaN is not JSON'),
    (b'{"a": [1, -Infinity]}', 'invalid-json', 'a[1]: -Infinity is not JSON'),
    (b'{"a": Infinity}', 'invalid-json', 'a: Infinity is not JSON'),
    (b'NaN', 'invalid-json', 'NaN is not JSON'),
    (b'{"a": 1, "a": 1}', 'invalid-json', 'a: the name comes twice'),
    (b'{"x": [{"a": 1, "b": 2, "a": null}]}', 'invalid-json', 'x[0].a: the name comes twice'),
    (rb'{"a": 1, "\u0061": 2}', 'invalid-json', 'a: the name comes twice'),
    # no object
    (b'[]', 'not-an-object', 'the message is a list, not an object'),
    (b'[{"a": 1}]', 'not-an-object', 'the message is a list, not an object'),
    (b'"a"', 'not-an-object', 'the message is a string, not an object'),
    (b'1', 'not-an-object', 'the message is a number, not an object'),
    (b'1.5', 'not-an-object', 'the message is a number, not an object'),
    (b'true', 'not-an-object', 'the message is a boolean, not an object'),
    (b'null', 'not-an-object', 'the message is null, not an object'),
    # what a store would bend
    (b'{"a": 9223372036854775808}', 'unsupported-value', 'a: integer outside 64 bit'),
    (b'{"a": -9223372036854775809}', 'unsupported-value', 'a: integer outside 64 bit'),
    (b'{"ext": [{"n": 18446744073709551616}]}', 'unsupported-value', 'ext[0].n: integer outside 64 bit'),
    (b'{"a": ' + b'9' * 10000 + b'}', 'unsupported-value', 'a: integer outside 64 bit'),
    (b'{"a": 1e309}', 'unsupported-value', 'a: number beyond the largest double'),
    (b'{"a": 1e-400}', 'unsupported-value', 'a: number below the smallest double'),
    (b'{"a": [-0.00' + b'0' * 400 + b'1]}', 'unsupported-value', 'a[0]: number below the smallest double'),
    (b'{"a": {"b": [0, -1e999]}}', 'unsupported-value', 'a.b[1]: number beyond the largest double'),
    (rb'{"a": "x\u0000y"}', 'unsupported-value', 'a: NUL character'),
    (rb'{"b": {"a\u0000": 1}}', 'unsupported-value', r'b."a\u0000": NUL character'),
    (rb'{"a": ["\ud800"]}', 'unsupported-value', 'a[0]: lone surrogate'),
    (rb'{"a": "\udc00\ud800"}', 'unsupported-value', 'a: lone surrogate'),
    (rb'{"\udfff": 1}', 'unsupported-value', r'"\udfff": lone surrogate'),
    (rb'"\u0000"', 'unsupported-value', 'NUL character'),
    (nested(65), 'unsupported-value', 'a' + '[0]' * 63 + ': deeper than 64 levels'),
    (nested(65, '{"b":', '}'), 'unsupported-value', 'a' + '.b' * 63 + ': deeper than 64 levels'),
    (nested(100_000), 'unsupported-value', 'deeper than 64 levels'),
    (b'{"a":' + b'[' * 100_000, 'unsupported-value', 'deeper than 64 levels'),
    # the path: what is no plain word is quoted, in ASCII
    (b'{"a b": {"c.d": 1e999}}', 'unsupported-value', '"a b"."c.d": number beyond the largest double'),
    ('{"\u00e9": [1e999]}'.encode(), 'unsupported-value', r'"\u00e9"[0]: number beyond the largest double'),
    (b'{"": 1e999}', 'unsupported-value', '"": number beyond the largest double'),
])
def test_is_refused_with_reason_and_path(body, reason, detail):
    found = unfit(decode_message, body)
    assert found == (reason, detail or found[1])
    assert found[1] and not found[1].startswith(':')


BINARY_FAULT = ('not UTF-8', 'a value expected')


@pytest.mark.parametrize('body, words', [
    *[(text.encode(codec), codec[:6].upper()) for text in ('{"a": 1}', '["\u4f60"]', '"\U0001f600"') for codec in
      ('utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be')],
    (codecs.BOM_UTF16_BE + '[1]'.encode('utf-16-be'), 'UTF-16'),
    (codecs.BOM_UTF16_LE + b'{', 'UTF-16'),
    ('1'.encode('utf-16-le'), 'UTF-16'),
    (codecs.BOM_UTF8 + b'{"a": 1}', 'byte order mark'),
    (codecs.BOM_UTF8, 'byte order mark'),
    (gzip.compress(b'{"a": 1}', mtime=0), 'gzip'),
    (b'\x1f\x8b', 'gzip'),
    (bz2.compress(b'{"a": 1}'), 'bzip2'),
    (lzma.compress(b'{"a": 1}'), 'xz'),
    (zlib.compress(b'{"a": 1}'), 'zlib'),
    (b'\0\0\0\0', BINARY_FAULT),
    (b'\x07\0\xd8\xd8\xd8\xd8', BINARY_FAULT),
    (b'\x89PNG\0\0', BINARY_FAULT),
])
def test_the_detail_names_an_encoding_that_is_not_utf_8(body, words):
    reason, detail = unfit(decode_message, body)
    assert reason == 'invalid-json'
    assert any(word in detail for word in ([words] if isinstance(words, str) else words)), detail


def test_a_detail_is_short_and_still_names_the_rule():
    """The path is the sender's choice, the rule is what the operator looks for."""
    name = 'n' * 100
    reason, detail = unfit(decode_message, ('{"' + name + '":').encode() * 20 + b'1e999' + b'}' * 20)
    assert reason == 'unsupported-value'
    assert len(detail) <= 300
    assert detail.startswith('"nnn')
    assert detail.endswith(': number beyond the largest double')


# --- its properties

texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=12)
integers = st.integers(-1 << 63, (1 << 63) - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
fit = st.recursive(st.none() | st.booleans() | integers | floats | texts,
                   lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12)
fit_objects = st.dictionaries(texts, fit, max_size=6)
wild = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.integers(10**18, 10**20) |
                    st.text(st.characters(codec=None), max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4))
pieces = st.lists(st.sampled_from([
    b'{', b'}', b'[', b']', b',', b':', b'"', b'"a"', b'"a":', b' ', b'\n', b'0', b'1', b'-', b'.', b'e',
    b'99999999999', b'99999999999999999999', b'1e400', b'NaN', b'Infinity', b'true', b'null', rb'\u0000', rb'\ud800',
    b'\\', b'\0', b'\xff', b'\xc3\xa9', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'[' * 64, b']' * 64]),
    max_size=12).map(b''.join)


@settings(deadline=None)
@given(st.binary(max_size=40) | pieces | pieces.map(lambda inner: b'{"a":' + inner + b'}'))
def test_fast_and_careful_path_agree_on_any_bytes(body):
    assert exact(either(decode_message, body)) == exact(either(decode_with_path, body))


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), wild, max_size=4), st.booleans())
@example({'a': float('nan')}, False)
@example({'a': '\ud800'}, True)
@example({'a': 10**18, 'b': [10**19]}, False)
def test_fast_and_careful_path_agree_on_any_object(value, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode('utf-8', 'surrogatepass')
    assert exact(either(decode_message, body)) == exact(either(decode_with_path, body))


@settings(deadline=None)
@given(fit_objects, st.booleans())
def test_what_is_fit_is_accepted_and_kept_to_the_type(value, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert exact(decode_message(body)) == exact(value)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), wild, max_size=4))
def test_what_is_accepted_encodes_to_an_equal_value(value):
    found = either(decode_message, json.dumps(value).encode())
    if isinstance(found, dict):
        assert exact(json.loads(json.dumps(found, ensure_ascii=False).encode())) == exact(value)
    else:
        assert found[1] == 'unsupported-value' or (found[1] == 'invalid-json' and 'is not JSON' in found[2])


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(0, 5))
def test_the_depth_limit_does_not_depend_on_what_lies_beside_it(levels, beside):
    body = nested(levels)[:-1] + b', "b": [' + b','.join([b'[]'] * beside) + b']}'
    found = either(decode_message, body)
    assert isinstance(found, dict) == (levels <= 64)


# --- the record of a message

@pytest.fixture
def record(program):
    """A function: record(body, message={...}, record={...}) is the Record that the configuration makes of `body`."""
    def make(body, **sections):
        program.configure(**{'nsq': {'nsqd-tcp-address': '127.0.0.1:4150'}, **sections})
        config, faults, _ = build_config(read_file(str(program.path)))
        assert not faults
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Mapper(config).build_record(Message(None, b'0123456789abcdef', TIMESTAMP, 1, body))
    return make


KEY_ID = {'key': 'id'}


def test_the_key_of_a_message_is_its_id_time_and_checksum(record):
    body = b'{"a": 1}'
    made = record(body)
    assert made.key == f'0123456789abcdef-{TIMESTAMP:x}-{zlib.crc32(body):x}'
    assert made.bins == {'a': 1, 'gid': made.key}
    assert record(b'{"a": 2}').key != made.key


@pytest.mark.parametrize('key', ['a', '1', ' ', '\u00e9' * 100, 1, 0, -1, 2**63 - 1, -2**63])
def test_a_field_is_the_key(record, key):
    made = record({'id': key}, record=KEY_ID)
    assert exact(made.key) == exact(key)
    assert exact(made.bins) == exact({'id': key, 'gid': key, 'gts': TIMESTAMP})
    assert made.time == TIMESTAMP


@pytest.mark.parametrize('key', ['', True, False, 1.0, 0.5, [], {}, [1], {'id': 1}])
def test_what_is_no_string_and_no_integer_is_no_key(record, key):
    assert unfit(lambda: record({'id': key}, record=KEY_ID)) == (
        'key', 'id: a key is a string, not empty, or an integer')


@pytest.mark.parametrize('body', [{}, {'ID': 1}, {'id': None}, {'ext': {'id': 1}}])
def test_a_message_without_its_key_is_refused(record, body):
    assert unfit(lambda: record(body, record=KEY_ID)) == ('key', 'id: missing')


def test_nulls_at_the_top_are_left_out_and_those_inside_kept(record):
    made = record({'a': None, 'b': [None], 'c': {'d': None}})
    assert made.bins == {'b': [None], 'c': {'d': None}, 'gid': made.key}


def test_nulls_at_the_top_are_refused_on_demand(record):
    reject = {'nulls': 'reject'}
    assert unfit(lambda: record({'a': 1, 'b': None}, message=reject)) == ('schema', 'b: null')
    assert record({'a': [None]}, message=reject).bins['a'] == [None]


@pytest.mark.parametrize('body', [{}, {'a': None, 'b': None}])
def test_a_message_with_nothing_in_it_is_a_record_only_with_an_id_bin(record, body):
    made = record(body)
    assert made.bins == {'gid': made.key}
    assert unfit(lambda: record(body, record={'id-bin': ''})) == ('unsupported-value', 'no field to store')


def test_time_is_a_field_of_the_message(record):
    made = record({'id': 'a', 'ts': 5}, record={'key': 'id', 'time': 'ts'})
    assert (made.time, made.bins['gts']) == (5, 5)


@pytest.mark.parametrize('ts', ['5', 5.0, True, [], None])
def test_a_time_that_is_no_integer_is_refused(record, ts):
    reason, detail = unfit(lambda: record({'id': 'a', 'ts': ts}, record={'key': 'id', 'time': 'ts'}))
    assert (reason, detail.startswith('ts: not an integer')) == ('schema', True)


def test_time_bin_serves_newest_wins_alone(record):
    assert 'gts' not in record({'a': 1}).bins
    made = record({'id': 1}, record={'key': 'id', 'write': 'create'})
    assert (made.time, made.bins) == (None, {'id': 1, 'gid': 1})


def test_bins_rename_fields(record):
    made = record({'id': 'a', 'a_very_long_field_name': 1, 'other': 2},
                  record={'bins': {'a_very_long_field_name': 'short', 'absent': 'gone'}})
    assert made.bins == {'id': 'a', 'short': 1, 'other': 2, 'gid': made.key}


def test_bins_can_swap_names(record):
    made = record({'a': 1, 'b': 2}, record={'bins': {'a': 'b', 'b': 'a'}})
    assert made.bins == {'b': 1, 'a': 2, 'gid': made.key}


@pytest.mark.parametrize('body, options', [
    ({'gid': 1}, {}),
    ({'own': 1}, {'id-bin': 'own'}),
    ({'id': 1, 'gts': 1}, {'key': 'id'}),
    ({'id': 1, 'own': 1}, {'key': 'id', 'time-bin': 'own'}),
    ({'a': 1, 'b': 2}, {'bins': {'a': 'b'}}),
    ({'b': 2}, {'bins': {'a': 'b'}}),
])
def test_a_field_in_the_bin_of_another_value_is_refused(record, body, options):
    reason, detail = unfit(lambda: record(body, record=options))
    assert (reason, detail) == (
        'bin-name', f'{list(body)[-1]}: this bin belongs to id-bin, time-bin or another field')


@pytest.mark.parametrize('body, options', [
    ({'gid': 1}, {'id-bin': ''}),
    ({'gts': 1}, {}),
    ({'gid': 1}, {'bins': {'gid': 'theirs'}}),
])
def test_a_field_may_have_a_bin_that_is_free(record, body, options):
    assert 1 in record(body, record=options).bins.values()


@pytest.mark.parametrize('name, good', [
    ('n' * 15, True), ('n' * 16, False), ('\u00e9' * 7, True), ('\u00e9' * 8, False), ('', True)])
def test_a_bin_name_has_at_most_fifteen_bytes(record, name, good):
    if good:
        assert record({name: 1}).bins[name] == 1
    else:
        reason, detail = unfit(lambda: record({name: 1}))
        assert (reason, detail.endswith(': over 15 bytes')) == ('bin-name', True)


@pytest.mark.parametrize('options, own', [
    ({}, 1), ({'id-bin': ''}, 0), ({'key': 'id'}, 2), ({'key': 'id', 'write': 'create'}, 1),
    ({'bins': {'f1': 'renamed'}}, 1), ({'write': 'update'}, 1)])
@pytest.mark.parametrize('over', [0, 1, 32769 - 2, 2 * 65536 - 32767])
def test_a_record_has_at_most_32767_bins(record, options, own, over):
    """One more the server refuses, and from 65,536 on the client writes a part. Nulls make no bin."""
    body = {'id': 7, **{f'f{n}': n for n in range(MAX_BINS - own + over - 1)}, 'z': None}
    if over:
        assert unfit(lambda: record(body, record=options)) == (
            'unsupported-value', f'{MAX_BINS + over} bins, with id-bin and time-bin; a record has at most 32767')
    else:
        assert len(record(body, record=options).bins) == MAX_BINS


def test_fields_that_are_dropped_are_no_bins(record):
    body = {f'f{n}': n for n in range(70_000)}
    made = record(body, message={'unknown-fields': 'drop', 'fields': {'f69999': 'integer'}})
    assert made.bins == {'f69999': 69_999, 'gid': made.key}


def test_a_good_message_does_not_let_the_next_one_through(program):
    """Names that were found good are remembered; names that were not are looked at each time."""
    program.configure(nsq={'nsqd-tcp-address': '127.0.0.1:4150'})
    mapper = Mapper(build_config(read_file(str(program.path)))[0])
    for _ in range(2):
        mapper.build_record(Message(None, b'0' * 16, 1, 1, b'{"a": 1}'))
        for body in (b'{"a": 1, "gid": 1}', b'{"a": 1, "a_name_of_17_byte": 1}'):
            assert unfit(mapper.build_record, Message(None, b'0' * 16, 1, 1, body))[0] == 'bin-name'


# --- the [[fields]]

VALUES = {'string': 'a', 'integer': 1, 'number': 1.5, 'boolean': True, 'list': [1], 'object': {'a': 1}}
FITS = {(kind, other): kind in (other, 'any') or (kind, other) == ('number', 'integer')
        for kind in [*VALUES, 'any'] for other in VALUES}


@pytest.mark.parametrize('kind, other', FITS)
def test_a_type_takes_its_own_values_and_converts_none(record, kind, other):
    body, message = {'f': VALUES[other]}, {'fields': {'f': kind}}
    if FITS[kind, other]:
        assert exact(record(body, message=message).bins['f']) == exact(VALUES[other])
    else:
        article = 'an' if kind[0] in 'aeiou' else 'a'
        assert unfit(lambda: record(body, message=message)) == ('schema', f'f: not {article} {kind}')


@pytest.mark.parametrize('line, good, bad, rule', [
    ('integer, min 1', [1, 2, 2**63 - 1], [0, -1], 'value under 1'),
    ('integer, max 10', [10, -5], [11], 'value over 10'),
    ('integer, min -3, max 3', [-3, 0, 3], [-4], 'value under -3'),
    ('number, min 0.5', [0.5, 1, 7.5], [0.25, 0, -1], 'value under 0.5'),
    ('number, max 2.5', [2.5, 2, -9.5], [2.75, 3], 'value over 2.5'),
    ('string, min 2', ['ab', '\u00e9\u00e9'], ['', 'a'], 'length under 2'),
    ('string, max 2', ['', '\U0001f600\U0001f600'], ['abc'], 'length over 2'),
    ('list, min 1', [[0]], [[]], 'length under 1'),
    ('list, max 1', [[], [[1, 2]]], [[1, 2]], 'length over 1'),
    ('object, max 1', [{}, {'a': 1}], [{'a': 1, 'b': 2}], 'length over 1'),
    ('string, one-of red|green', ['red', 'green'], ['', 'blue', 'Red', 'red|green'], 'not one of red|green'),
    ('integer, one-of 1|2', [1, 2], [0, 3], 'not one of 1|2'),
    ('number, one-of 0.5|2', [0.5, 2, 2.0], [1], 'not one of 0.5|2'),
    ('string, match [a-c]+', ['a', 'abc'], ['', 'abcd', 'xa', 'a\n'], 'does not match [a-c]+'),
    (r'string, "match \d{2,3}"', ['12', '123'], ['1', '1234', 'ab'], r'does not match \d{2,3}'),
    ('string, required', ['a', ''], [], None),
])
def test_a_rule_holds(record, line, good, bad, rule):
    message = {'fields': {'f': line}}
    for value in good:
        assert exact(record({'f': value}, message=message).bins['f']) == exact(value)
    for value in bad:
        reason, detail = unfit(lambda value=value: record({'f': value}, message=message))
        assert (reason, detail) == ('schema', f'f: {rule}')


@pytest.mark.parametrize('body', [{}, {'f': None}])
def test_required_asks_for_a_value(record, body):
    assert unfit(lambda: record(body, message={'fields': {'f': 'any, required'}})) == ('schema', 'f: missing')
    assert 'f' not in record(body, message={'fields': {'f': 'any'}}).bins


@pytest.mark.parametrize('what', ['keep', 'drop', 'reject'])
def test_unknown_fields(record, what):
    def made(body):
        return record(body, message={'unknown-fields': what, 'fields': {'a': 'integer'}})

    assert made({'a': 1}).bins['a'] == 1
    if what == 'reject':
        assert unfit(made, {'a': 1, 'b': 2}) == ('schema', 'b: unknown field')
    else:
        assert ('b' in made({'a': 1, 'b': 2}).bins) == (what == 'keep')


def test_the_first_three_faults_of_a_message_are_named(record):
    reason, detail = unfit(lambda: record({'a': 'x', 'b': 1, 'zz': 1}, message={
        'unknown-fields': 'reject', 'fields': {'a': 'integer', 'b': 'string', 'c': 'any, required', 'd': 'any'}}))
    assert (reason, detail) == ('schema', 'a: not an integer; b: not a string; c: missing')


# --- how RDY is dealt out

states = st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.floats(0, 100), st.just(40)), min_size=1, max_size=8)
mixed = st.lists(st.integers(1, 40).flatmap(lambda most: st.tuples(
    st.integers(0, most), st.booleans(), st.floats(0, 100), st.just(most))), max_size=8)
budgets = st.integers(0, 400)


@settings(deadline=None)
@given(mixed, budgets)
def test_shares_never_go_over_the_budget_nor_over_what_one_nsqd_takes(states, budget):
    dealt = rdy_shares(states, budget)
    assert len(dealt) == len(states)
    assert sum(dealt) <= budget
    assert all(0 <= rdy <= most for rdy, (_, _, _, most) in zip(dealt, states, strict=True))


@settings(deadline=None)
@given(mixed, budgets)
def test_no_busy_connection_loses_what_it_has_while_the_budget_lasts(states, budget):
    asleep = sum(quiet for _, quiet, _, _ in states) if budget >= len(states) else 0
    dealt = rdy_shares(states, budget)
    if asleep + sum(rdy for rdy, quiet, _, _ in states if not quiet) <= budget:
        assert all(new >= rdy for new, (rdy, quiet, _, _) in zip(dealt, states, strict=True) if not quiet)


@settings(deadline=None)
@given(mixed, budgets)
def test_every_connection_is_heard_when_there_is_one_for_each(states, budget):
    if budget >= len(states) + sum(rdy for rdy, quiet, _, _ in states if not quiet):
        assert all(rdy >= 1 for rdy in rdy_shares(states, budget))
    if budget >= len(states):
        assert all(rdy >= 1 for rdy, state in zip(rdy_shares(states, budget), states, strict=True) if state[1])


@settings(deadline=None)
@given(states, budgets)
def test_nothing_of_the_budget_lies_idle(states, budget):
    assert sum(rdy_shares(states, budget)) == min(budget, sum(most for _, _, _, most in states))


@settings(deadline=None)
@given(states, st.integers(1, 8))
def test_with_too_few_for_all_the_quiet_take_turns(states, budget):
    """The one that was heard longest ago comes first."""
    quiet = [(0, True, listening, 40) for _, _, listening, _ in states]
    if budget < len(quiet):
        heard = [state[2] for state, rdy in zip(quiet, rdy_shares(quiet, budget), strict=True) if rdy]
        left = [state[2] for state, rdy in zip(quiet, rdy_shares(quiet, budget), strict=True) if not rdy]
        assert heard and max(heard) <= min(left)


@settings(deadline=None)
@given(st.integers(1, 8), budgets)
def test_equals_get_equal_shares(number, budget):
    dealt = rdy_shares([(0, False, 0.0, 1000)] * number, budget)
    assert max(dealt) - min(dealt) <= 1
