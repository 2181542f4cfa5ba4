"""The rules of [[fields]]: what a line accepts, and lines that no value keeps."""
import pytest
import voluptuous as vol
from hypothesis import given, settings
from hypothesis import strategies as st

import fakes
from xmsrv import build_config, parse_field

INTEGERS = [-1 << 63, *range(-5, 6), (1 << 63) - 1]
TEXTS = ['a' * length for length in range(7)]


def keeps(rule, value):
    """Whether a value keeps a rule."""
    try:
        rule.check(value)
    except vol.Invalid:
        return False
    return True


def lines(values, limits):
    """Lines of up to four rules for these values."""
    words = st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True)
    return st.lists(st.builds('{} {}'.format, st.sampled_from(['min', 'max']), limits)
                    | words.map(lambda chosen: 'one-of ' + '|'.join(map(str, chosen))), max_size=4)


@settings(deadline=None)
@given(st.tuples(st.just('integer'), st.just(INTEGERS), lines(INTEGERS, st.integers(-5, 5)))
       | st.tuples(st.just('string'), st.just(TEXTS), lines(TEXTS[1:], st.integers(0, 6))))
def test_a_line_is_refused_where_no_value_keeps_it_or_a_word_of_it_never_comes(line):
    kind, values, rules = line
    kept = [value for value in values if all(keeps(parse_field([kind, rule]), value) for rule in rules)]
    words = {word for rule in rules if rule.startswith('one-of ') for word in rule.removeprefix('one-of ').split('|')}
    if kept and words <= {str(value) for value in kept}:
        assert [value for value in values if keeps(parse_field([kind, *rules]), value)] == kept
    else:
        with pytest.raises(ValueError, match='^(no (length|integer of 64 bit) is from|one-of .*: never, for)'):
            parse_field([kind, *rules])


@pytest.mark.parametrize(('kind', 'rules', 'rule'), [
    ('number', ['min 1.5', 'max 1.25'], 'no number is from 1.5 to 1.25'),
    ('list', ['max -1'], 'no length is from 0 to -1'), ('base64', ['min 3', 'max 2'], 'no length is from 3 to 2'),
    ('integer', ['min 9223372036854775808'], 'no integer of 64 bit is from 9223372036854775808 to'),
    ('integer', ['one-of 9223372036854775808'], 'one-of 9223372036854775808: never, for an integer has 64 bit'),
    ('string', ['one-of a|bb', 'match [a-z]'], r'one-of bb: never, for match \[a-z\]'),
    ('string', ['one-of ||'], 'one-of names no value')])
def test_a_line_that_no_value_keeps_says_which_rule(kind, rules, rule):
    with pytest.raises(ValueError, match=f'^{rule}'):
        parse_field([kind, *rules])


@pytest.mark.parametrize(('kind', 'fitting'), [
    ('string', ['key', 'set-field']), ('integer', ['key', 'time', 'ttl-field']),
    ('number', ['key', 'time', 'ttl-field']), ('any', ['key', 'time', 'ttl-field', 'set-field']),
    ('base64', ['key', 'set-field']), ('geojson', ['key']), ('boolean', []), ('list', []), ('object', [])])
def test_a_field_that_an_option_names_has_a_type_that_fits(kind, fitting):
    for option in ('key', 'time', 'ttl-field', 'set-field'):
        record = {'key': 'id', option: 'f'}
        sections = {'message': {'fields': {'f': kind}}, 'record': record}
        if option in fitting:
            assert fakes.options(**sections)
            continue
        faults = build_config({'nsq': {'nsqd-tcp-address': 'a:1', 'topic': 't'},
                               'aerospike': {'hosts': 'a:1', 'namespace': 'n'}, **sections})[1]
        article = '' if kind == 'base64' else 'an ' if kind[0] in 'io' else 'a '
        assert [str(fault).partition(', and')[0] for fault in faults] == [
            f'[record] {option} = f: {article}{kind} by [[fields]]']
