"""From bytes to a record, or the reason why not."""
import zlib

import pytest

import fakes
from xmsrv import COUNTED_AGAIN, MAX_BINS, InvalidMessage, Mapper, decode_message, decoded_members

DEEP = b'[' * 62 + b']' * 62    # in a member of an object, under a list: 64 levels


def mapped(body, conn=None, **sections):
    return Mapper(fakes.options(**sections)).build_record(fakes.message(7, body, conn))


def refused(body, **sections):
    with pytest.raises(InvalidMessage) as caught:
        mapped(body, **sections)
    return caught.value.reason, caught.value.detail


def test_the_key_is_id_time_and_checksum_and_the_same_for_each_delivery():
    body = b'{"n": 1}'
    key = f'{7:016d}-{1007:x}-{zlib.crc32(body):x}'
    assert mapped(body).key == key == mapped(body, conn='another').key
    others = [fakes.message(7, b'{"n": 2}'), fakes.message(8, body)]
    others[1].timestamp = 1007
    assert len({key, *(message.key for message in others)}) == 3
    assert mapped(body).bins == {'n': 1, 'gid': key}


@pytest.mark.parametrize(('body', 'fields'), [
    (b' {"a": [1, 2.5, true, null, {"b": ""}]}\r\n', {'a': [1, 2.5, True, None, {'b': ''}]}),
    (b'{"a": 9223372036854775807, "b": -9223372036854775808}', {'a': (1 << 63) - 1, 'b': -1 << 63}),
    (b'{"a": 1.7976931348623157e308}', {'a': 1.7976931348623157e308}),
    ('{"ä": "\\u00e4\U0001f600", "b": "\\ud83d\\ude00"}'.encode(), {'ä': 'ä\U0001f600', 'b': '\U0001f600'}),
    (b'{"a": "[[[\\\\{{{"}', {'a': '[[[\\{{{'}), (rb'{"a\"": "\n\\"}', {'a"': '\n\\'}),
    # colons in strings and names
    (b'{"t": "12:30", "u": "http://x", "a": {"t": 1}}', {'t': '12:30', 'u': 'http://x', 'a': {'t': 1}}),
    (b'{"a": ":)", "b": " :"}', {'a': ':)', 'b': ' :'}), (b'{"a" : "x", ":b"\t: 1}', {'a': 'x', ':b': 1}),
    (b'{"n": [' + DEEP + b']}', None), (b'{"n": [' + DEEP + b'], "b": "\\\\"}', None),
])
def test_what_is_good_is_kept_as_it_is(body, fields):
    decoded = decode_message(body)
    assert fields is None or decoded == fields


@pytest.mark.parametrize('before', [[], [b'{"t": "12:30"}'] * 2], ids=['plain', 'colons'])
def test_a_name_that_comes_twice_is_seen_whatever_came_before(monkeypatch, before):
    monkeypatch.setattr(decoded_members, 'to_skip', 0)
    for body in before:
        assert decode_message(body) == {'t': '12:30'}
    for body in (b'{"a": 1, "a": 1}', b'{"b": [{"a": 1, "a": 1}]}', b'{"a": {"b": ":", "b": {}}}',
                 b'{"a":1,"b:a":1,"a":2}', b'{"a": "\\"", "a": "\\\\"}', b'{"a\\n": 1, "a\\n": 1}'):
        assert refused(body)[1].endswith('the name comes twice')


def test_a_colon_in_a_string_leaves_it_open_for_a_while_what_the_count_says(monkeypatch):
    monkeypatch.setattr(decoded_members, 'to_skip', 0)
    for body, doubtful in ((b'{"a": {"b": 1}}', 0), (b'{"t": "12:30"}', COUNTED_AGAIN),
                           (b'{"a": 1}', COUNTED_AGAIN - 1)):
        decode_message(body)
        assert decoded_members.to_skip == doubtful
    decoded_members.to_skip = 0
    for _ in range(2):
        decode_message(b'{"a": {"b": 1}}')
        assert decoded_members.to_skip == 0


@pytest.mark.parametrize(('body', 'reason', 'detail'), [
    (b'{"a" 1}', 'invalid-json', "Expecting ':' delimiter at character 5"),
    (b'', 'invalid-json', 'a value expected'), (b'{"a": 1} x', 'invalid-json', 'more text'),
    (b'\n\n{"a": }', 'invalid-json', 'a value expected at character 8'),
    (b'\n \xff', 'invalid-json', 'not UTF-8 at byte 2'),
    (b'{"a": NaN}', 'invalid-json', 'a: NaN'), (b'{"a": -Infinity}', 'invalid-json', 'a: -Infinity'),
    (b'{"a": 1, "a": 1}', 'invalid-json', 'a: the name comes twice'),
    (b'{"a": {"b": 1, "b": 2}}', 'invalid-json', 'a.b: the name comes twice'),
    (b'{"a": ":", "a": 1}', 'invalid-json', 'a: the name comes twice'),
    (b'{"t": "12:30", "a": 1, "a": 1}', 'invalid-json', 'a: the name comes twice'),
    (b'{"a" : "x:y", "a": 1}', 'invalid-json', 'a: the name comes twice'),
    (b'[1]', 'not-an-object', 'a list'), (b'"x"', 'not-an-object', 'a string'), (b'null', 'not-an-object', 'null'),
    (b'{"a": 9223372036854775808}', 'unsupported-value', 'a: integer outside 64 bit'),
    (b'{"a": [-9223372036854775809]}', 'unsupported-value', 'a[0]: integer outside 64 bit'),
    (b'{"a": 1e309}', 'unsupported-value', 'a: number beyond'),
    (b'{"a": "\\u0000"}', 'unsupported-value', 'a: NUL'), (b'{"\\u0000": 1}', 'unsupported-value', 'NUL'),
    (b'{"a": "\\ud800"}', 'unsupported-value', 'a: lone surrogate'),
    (b'{"n": [[' + DEEP + b']]}', 'unsupported-value', 'deeper than 64 levels'),
    (b'{"n": ' + b'[' * 100000, 'unsupported-value', 'deeper than 64 levels'),
    (b'\xff', 'invalid-json', 'not UTF-8 at byte 0'), (b'\xef\xbb\xbf{}', 'invalid-json', 'byte order mark'),
    (b'\x1f\x8b\x08', 'invalid-json', 'gzip'), ('{"a": 1}'.encode('utf-16-le'), 'invalid-json', 'UTF-16'),
])
def test_what_a_store_would_bend_is_refused_with_its_place(body, reason, detail):
    with pytest.raises(InvalidMessage) as caught:
        decode_message(body)
    assert caught.value.reason == reason and detail in caught.value.detail


def test_bins_have_short_names_of_their_own_and_are_not_too_many():
    assert mapped(b'{"a": 1, "long name of a field": 2}', record={'bins': {'long name of a field': 'b'}, 'id-bin': ''}
                  ).bins == {'a': 1, 'b': 2}
    assert mapped('{"äääääääx": 1}'.encode()).bins['äääääääx'] == 1    # 15 bytes
    assert refused('{"ääääääää": 1}'.encode()) == ('bin-name', '"\\u00e4\\u00e4\\u00e4\\u00e4\\u00e4\\u00e4\\u00e4'
                                                               '\\u00e4": over 15 bytes')
    assert refused(b'{"gid": 1}')[0] == 'bin-name'
    assert refused(b'{"b": 1, "a": 2}', record={'bins': {'a': 'b'}})[0] == 'bin-name'
    names = [b'"b%d": 1' % n for n in range(MAX_BINS)]
    assert len(mapped(b'{' + b','.join(names[1:]) + b'}').bins) == MAX_BINS == 32767
    assert refused(b'{' + b','.join(names) + b'}')[0] == 'unsupported-value'
    assert refused(b'{}', record={'id-bin': ''}) == ('unsupported-value', 'no field to store')


@pytest.mark.parametrize('nulls', ['omit', 'reject'])
def test_a_null_at_the_top_is_no_bin_or_a_dead_letter(nulls):
    if nulls == 'omit':
        assert mapped(b'{"a": null, "b": [null]}', record={'id-bin': ''}).bins == {'b': [None]}
    else:
        assert refused(b'{"a": null}', message={'nulls': nulls}) == ('schema', 'a: null')


@pytest.mark.parametrize(('key', 'good'), [('"x"', 'x'), ('1', 1), ('-5', -5), ('""', None), ('true', None),
                                           ('1.0', None), ('[]', None), ('null', None)])
def test_a_field_as_key_is_a_string_or_an_integer_and_the_time_comes_with_it(key, good):
    options = {'record': {'key': 'id', 'id-bin': ''}}
    body = f'{{"id": {key}}}'.encode()
    if good is None:
        assert refused(body, **options)[0] == 'key'
    else:
        record = mapped(body, **options)
        assert (record.key, type(record.key), record.time) == (good, type(good), 1007)
        assert record.bins == {'id': good, 'gts': 1007}


def test_the_time_may_be_an_integer_field():
    options = {'record': {'key': 'id', 'id-bin': '', 'time': 'at'}}
    assert mapped(b'{"id": 1, "at": 5}', **options).time == 5
    for bad in ('1.5', 'true', '"5"', 'null'):
        assert refused(f'{{"id": 1, "at": {bad}}}'.encode(), **options)[0] == 'schema'


def test_the_schema_keeps_drops_or_rejects_what_it_does_not_name():
    fields = {'n': ['integer', 'required', 'min 1', 'max 9'], 's': ['string', 'match [a-z]+', 'max 3']}
    for unknown, expected in (('keep', {'n': 1, 'x': 2}), ('drop', {'n': 1})):
        message = {'fields': fields, 'unknown-fields': unknown}
        assert mapped(b'{"n": 1, "x": 2}', message=message, record={'id-bin': ''}).bins == expected
    message = {'fields': fields, 'unknown-fields': 'reject'}
    assert refused(b'{"n": 1, "x": 2}', message=message) == ('schema', 'x: unknown field')
    for body, detail in ((b'{}', 'n: missing'), (b'{"n": 0}', 'n: value under 1'), (b'{"n": 10}', 'n: value over 9'),
                         (b'{"n": true}', 'n: not an integer'), (b'{"n": 1, "s": "A"}', 's: does not match [a-z]+'),
                         (b'{"n": 1, "s": "abcd"}', 's: length over 3')):
        assert refused(body, message=message) == ('schema', detail)
