"""Paths into a message: how they are written, what they find, and what each option makes of them."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fakes
import xmsrv
from fakes import bins_of, mapped, refused
from xmsrv import Mapper, Path, build_config

ORDER = {'customer': {'id': 7, 'address': {'city': 'Bern', 'zip': '3000'}, 'a.b': 1}, 'items': [{'id': 1}, {'id': 2}],
         'at': {'ms': 5}, 'n': 1}


# --- how a path is written

@pytest.mark.parametrize(('text', 'steps'), [
    ('a', ('a',)), ('customer.address.city', ('customer', 'address', 'city')), ('items[0].id', ('items', 0, 'id')),
    ('a[0][12]', ('a', 0, 12)), (r'a\.b', ('a.b',)), (r'a\.b.c', ('a.b', 'c')), (r'a\[0\]', ('a[0]',)),
    (r'a\\', ('a\\',)), (r'\\.b', ('\\', 'b')), (r'\$x', ('$x',)), ('a.$oid', ('a', '$oid')),
    ('a b.\u00e9', ('a b', '\u00e9')),
])
def test_a_path_has_names_indices_and_escapes(text, steps):
    assert (Path.parse(text).steps, str(Path.parse(text))) == (steps, text)


@pytest.mark.parametrize('text', ['', '.', '.a', 'a.', 'a..b', '[0]', 'a[0]b', 'a.[0]', 'a[-1]', 'a[00]', 'a[x]', 'a[',
                                  'a]', 'a[]', 'a\\', r'a\b', r'a\$', '$x', 'a[1000000000]'])
def test_what_is_no_path_is_refused_with_the_rule(text):
    with pytest.raises(ValueError, match='path'):
        Path.parse(text)


names = st.text(max_size=6).filter(bool)


def escaped(name, first):
    text = ''.join('\\' + letter if letter in '.[]\\' else letter for letter in name)
    return '\\' + text if first and text.startswith('$') else text


@given(st.lists(names | st.integers(0, 999), max_size=5), names)
def test_each_place_has_one_spelling(steps, first):
    text = escaped(first, True)
    for step in steps:
        text += f'[{step}]' if isinstance(step, int) else '.' + escaped(step, False)
    path = Path.parse(text)
    assert path.steps == (first, *steps)
    document = leaf = object()
    for step in reversed(path.steps):
        document = {step: document} if isinstance(step, str) else [None] * step + [document]
    assert path.get(document) is leaf and path.descend(document, 'none') is leaf


@pytest.mark.parametrize(('text', 'found'), [
    ('n', 1), ('customer.address.city', 'Bern'), ('items[1].id', 2), (r'customer.a\.b', 1), ('absent', None),
    ('customer.absent', None), ('items[2]', None), ('items[2].id', None), ('items.id', None), ('customer[0]', None),
    ('n.x', None), ('customer.address.city[0]', None), ('customer.address.city.x', None)])
def test_a_path_finds_a_value_or_none(text, found):
    assert Path.parse(text).get(ORDER) == found


# --- key and time

def test_key_and_time_may_lie_inside():
    record = mapped(ORDER, record={'key': 'customer.id', 'time': 'at.ms'})
    assert (record.key, record.time, record.bins) == (7, 5, {**ORDER, 'gid': 7, 'gts': 5})
    assert mapped(ORDER, record={'key': 'items[1].id'}).key == 2
    for key, rule in (('customer.no', 'missing'), ('items[2].id', 'missing'), ('n.id', 'missing'),
                      ('customer.address', 'a key is a string, not empty, or an integer')):
        assert refused(ORDER, key=key) == ('key', f'{key}: {rule}')
    assert refused(ORDER, key='n', time='customer.address.city') == (
        'schema', 'customer.address.city: not an integer, and it is the time of the message')


# --- [[fields]]

@pytest.mark.parametrize(('line', 'detail'), [
    (('customer.id', 'string'), 'customer.id: not a string'),
    (('customer.id', 'integer, min 8'), 'customer.id: value under 8'),
    (('customer.name', 'string, required'), 'customer.name: missing'),
    (('customer.address.no', 'any, required'), 'customer.address.no: missing'),
    (('items[1].id', 'integer, max 1'), 'items[1].id: value over 1'),
    (('items[2].id', 'integer, required'), 'items[2].id: missing'),
    ((r'customer.a\.b', 'string'), 'customer."a.b": not a string'),
    (('n.x', 'string'), 'n: not an object'), (('n[0]', 'string'), 'n: not a list'),
    (('items.x', 'string'), 'items: not an object'),
    (('customer.address[0].x', 'string'), 'customer.address: not a list'),
])
def test_a_rule_on_a_path_names_it(line, detail):
    path, rules = line
    assert refused(ORDER, {path: rules.split(', ')}) == ('schema', detail)


@pytest.mark.parametrize('value', [{}, {'customer': None}, {'customer': {}}, {'customer': {'id': None}},
                                   {'customer': {'id': 5}}])
def test_a_field_inside_that_is_absent_or_null_breaks_no_rule_but_required(value):
    kept = {name: item for name, item in value.items() if item is not None}
    assert bins_of({'n': 1, **value}, {'customer.id': 'integer'}) == {'n': 1, **kept}
    if value != {'customer': {'id': 5}}:
        assert refused(value, {'customer.id': ['integer', 'required']}) == ('schema', 'customer.id: missing')


def test_an_object_that_is_named_has_its_own_rules_and_those_of_the_fields_inside():
    fields = {'customer': ['object', 'max 3'], 'customer.id': 'integer', 'items': 'any', 'items[0].id': 'integer'}
    assert bins_of(ORDER, fields) == ORDER
    assert refused({'customer': {'id': 'x', 'b': 1, 'c': 2, 'd': 3}}, fields) == (
        'schema', 'customer.id: not an integer; customer: length over 3')
    assert refused({'items': 5}, fields) == ('schema', 'items: not a list')


FIELDS = {'customer.id': 'integer', 'customer.address.city': 'string', 'items[0].id': 'integer', 'n': 'integer'}


def test_drop_keeps_what_is_named_with_the_objects_around_it():
    assert bins_of({**ORDER, 'x': 1}, FIELDS, 'drop') == {
        'customer': {'id': 7, 'address': {'city': 'Bern'}}, 'items': ORDER['items'], 'n': 1}
    assert bins_of({'customer': {'x': 1, 'address': {'x': 1}}, 'n': 1}, FIELDS, 'drop') == {'n': 1}
    assert bins_of(ORDER, {**FIELDS, 'customer.address': 'object'}, 'drop')['customer'] == {
        'id': 7, 'address': ORDER['customer']['address']}
    assert bins_of({'customer': {'id': 1, 'address': None}}, FIELDS, 'drop') == {'customer': {'id': 1, 'address': None}}


def test_reject_names_what_is_unknown_inside():
    assert refused({**ORDER, 'x': 1}, FIELDS, 'reject') == (
        'schema', 'at: unknown field; customer."a.b": unknown field; customer.address.zip: unknown field')
    known = {'customer': {'id': 7, 'address': {'city': 'Bern'}}, 'items': [{'id': 1, 'x': 2}], 'n': 1}
    assert bins_of(known, FIELDS, 'reject') == known
    assert bins_of(ORDER, {'customer': 'object', 'items': 'any', 'at': 'any', **FIELDS}, 'reject') == ORDER


# --- [[bins]]

BINS = {'customer.address.city': 'city', 'items[0].id': 'first', 'n': 'number', 'customer.absent': 'none'}


def test_a_field_inside_gets_a_bin_and_stays_in_its_object():
    value = {name: ORDER[name] for name in ('customer', 'items', 'n')}
    assert bins_of(value, bins=BINS) == {
        'customer': ORDER['customer'], 'items': ORDER['items'], 'number': 1, 'city': 'Bern', 'first': 1}


def test_with_drop_it_is_taken_out_of_its_object():
    fields = {**FIELDS, 'customer.absent': 'any'}
    value = {**ORDER, 'x': 1}
    assert bins_of(value, fields, 'drop', bins=BINS) == {
        'customer': {'id': 7}, 'items': ORDER['items'], 'number': 1, 'city': 'Bern', 'first': 1}
    taken = {'customer.id': 'customer', 'customer.address.city': 'city'}
    assert bins_of(ORDER, {'customer.id': 'any', 'customer.address.city': 'any'}, 'drop', bins=taken) == {
        'customer': 7, 'city': 'Bern'}
    whole = {'customer': 'object', 'customer.address.city': 'string'}
    city = {'customer.address.city': 'city'}
    assert bins_of({'customer': {'address': {'city': 'Bern'}}}, whole, 'drop', bins=city) == {
        'customer': {'address': {}}, 'city': 'Bern'}


ORDERS = pytest.mark.parametrize('lines', [('a.b', 'a.b.c'), ('a.b.c', 'a.b')], ids=['parent first', 'child first'])


@ORDERS
@pytest.mark.parametrize(('fields', 'unknown', 'expected'), [
    # kept: the child stays in each object around it
    ({}, 'keep', {'a': {'b': {'c': 1, 'd': 2}, 'x': 3}, 'parent': {'c': 1, 'd': 2}, 'child': 1}),
    # taken out: no object holds what has a bin of its own
    ({'a.b.c': 'any', 'a.b.d': 'any', 'a.x': 'any'}, 'drop', {'a': {'x': 3}, 'parent': {'d': 2}, 'child': 1}),
    ({'a.b': 'object', 'a.b.c': 'any'}, 'drop', {'parent': {'d': 2}, 'child': 1}),
    ({'a': 'object'}, 'drop', {'a': {'x': 3}, 'parent': {'d': 2}, 'child': 1}),
    # an object that is empty then is no bin
    ({'a.b.c': 'any'}, 'drop', {'child': 1}),
])
def test_a_parent_and_its_child_have_their_bins_in_any_order_of_lines(lines, fields, unknown, expected):
    names = {'a.b': 'parent', 'a.b.c': 'child'}
    value = {'a': {'b': {'c': 1, 'd': 2}, 'x': 3}}
    assert bins_of(value, fields, unknown, bins={path: names[path] for path in lines}) == expected


@ORDERS
def test_a_parent_that_is_named_and_has_nothing_left_is_an_empty_object(lines):
    names = {'a.b': 'parent', 'a.b.c': 'child'}
    found = bins_of({'a': {'b': {'c': 1}}}, {'a.b': 'object', 'a.b.c': 'any'}, 'drop',
                    bins={path: names[path] for path in lines})
    assert found == {'child': 1, 'parent': {}}


PLACES = ['a', 'a.b', 'a.b.c', 'a.b.c.d', 'a.b.e', 'a.f', 'a.f[0]', 'a.f[0].g', 'h', 'h.i', 'h.i.j']
insides = st.recursive(st.integers(0, 9) | st.none(), lambda children: st.dictionaries(
    st.sampled_from('bcdegij'), children, max_size=4), max_leaves=12)
objects = st.dictionaries(st.sampled_from('bcfi'), insides, max_size=3) | st.fixed_dictionaries(
    {'b': st.fixed_dictionaries({'c': st.fixed_dictionaries({'d': insides}), 'e': insides}),
     'f': st.lists(st.dictionaries(st.just('g'), insides), max_size=2), 'i': st.fixed_dictionaries({'j': insides})})


def outcome(mapper, value):
    """The bins of a message, or why it is refused."""
    try:
        return mapper.build_record(fakes.message(7, json.dumps(value).encode())).bins
    except xmsrv.InvalidMessage as rejection:
        return rejection.reason, rejection.detail


@settings(deadline=None)   # each example reads two configurations
@given(st.fixed_dictionaries({'a': objects, 'h': objects}), st.lists(st.sampled_from(PLACES), unique=True, min_size=2),
       st.lists(st.sampled_from(PLACES[3:]), unique=True), st.randoms(use_true_random=False))
def test_any_order_of_lines_makes_the_same_bins(value, sources, fields, random):
    bins = {source: f'bin of {source}' for source in sources}
    lines = list(bins.items())
    random.shuffle(lines)
    mappers = [Mapper(fakes.options(
        message={'fields': {'a': 'any', 'h': 'any', **dict.fromkeys(fields, 'any')}, 'unknown-fields': 'drop'},
        record={'id-bin': '', 'bins': each})) for each in (bins, dict(lines))]
    found, shuffled = [outcome(mapper, value) for mapper in mappers]
    assert found == shuffled
    if isinstance(found, tuple):   # a value is of another type than a path needs
        return
    for source, name in bins.items():
        path = Path.parse(source)
        whole = path.get(value)
        # found, whatever other line took out of it or around it
        assert (name in found) == (whole is not None)
        if not isinstance(whole, dict):
            assert found.get(name) == whole
            continue
        # of what other lines name inside it, only what lies in a list stays
        within = [each for each in map(Path.parse, sources) if path.leads_to(each) and each != path]
        taken = [each for each in within if all(isinstance(step, str) for step in each.steps)]
        for each in within:
            rest = Path('', each.steps[len(path.steps):])
            stays = not any(other.leads_to(each) for other in taken)
            assert rest.descend(found[name]) == (each.get(value) if stays else None)



def test_the_key_is_found_before_anything_is_taken_out():
    fields = {'customer.id': 'integer'}
    record = mapped(ORDER, message={'fields': fields, 'unknown-fields': 'drop'},
                    record={'key': 'customer.id', 'id-bin': '', 'bins': {'customer.id': 'id'}})
    assert (record.key, record.bins) == (7, {'id': 7, 'gts': 1007})


def test_a_null_inside_is_no_bin_or_a_dead_letter():
    value = {'a': {'b': None}}
    assert bins_of(value, bins={'a.b': 'b'}) == value
    assert refused(value, nulls='reject', bins={'a.b': 'b'}) == ('schema', 'a.b: null')
    assert bins_of({'a': {}}, nulls='reject', bins={'a.b': 'b'}) == {'a': {}}


def test_a_bin_of_a_path_is_not_taken_by_a_field_of_its_name():
    assert refused({'a': {'b': 1}, 'b': 2}, bins={'a.b': 'b'})[0] == 'bin-name'


def test_metadata_become_bins():
    sources = {'$attempts': 'tries', '$nsqd': 'from', '$timestamp': 'at', '$topic': 'topic'}
    message = fakes.message(7, b'{"n": 1}', '192.0.2.1:4150', attempts=3)
    made = Mapper(fakes.options(record={'id-bin': '', 'bins': sources})).build_record(message)
    assert made.bins == {'n': 1, 'tries': 3, 'from': '192.0.2.1:4150', 'at': 1007, 'topic': 'orders'}


# --- faults

@pytest.mark.parametrize(('sections', 'fault'), [
    ({'record': {'key': 'a..b'}}, "[record] key = a..b: no path at '..b'"),
    ({'record': {'key': '$x'}}, '[record] key = $x: $id, or the name of a field'),
    ({'record': {'bins': {'$id': 'b'}}}, '[record] [[bins]] $id = b: there is $attempts, $nsqd, $timestamp, $topic; '
                                         'a field of this name is written \\$id'),
    ({'record': {'bins': {'a[x]': 'b'}}}, "[record] [[bins]] a[x] = b: no path at '[x]'"),
    ({'record': {'bins': {'a.b': 'x', 'c.d': 'x'}}}, '[record] [[bins]] c.d = x: more than one value would go'),
    ({'record': {'bins': {'a.b': 'gid'}}}, '[record] [[bins]] a.b = gid: more than one value would go'),
    ({'message': {'fields': {'city': 'any'}}, 'record': {'bins': {'a.b': 'city'}}},
     '[record] [[bins]] a.b = city: more than one value would go into this bin, also that of [[fields]] city'),
    # it stays in its list
    ({'message': {'fields': {'a[0].b': 'any'}, 'unknown-fields': 'drop'}, 'record': {'bins': {'a[0].b': 'a'}}},
     '[record] [[bins]] a[0].b = a: more than one value would go into this bin, also that of [[fields]] a'),
    ({'message': {'fields': {'a.': 'any'}}}, "[message] [[fields]] a. = any: no path at '.'"),
    ({'message': {'fields': {'a': 'string', 'a.b': 'any'}}},
     '[message] [[fields]] a: object and string at once, by other paths'),
    ({'message': {'fields': {'a[0]': 'any', 'a.b': 'any'}}},
     '[message] [[fields]] a: list and object at once, by other paths'),
    ({'message': {'unknown-fields': 'reject', 'fields': {'a.b': 'any'}}, 'record': {'key': 'a.c'}},
     '[record] key = a.c: no such field in [message] [[fields]]'),
    ({'message': {'fields': {'a_name_of_17_byte.x': 'any'}}},
     '[message] [[fields]] a_name_of_17_byte: over 15 bytes for a bin: map it in [[bins]]'),
])
def test_faults_of_paths_are_named(sections, fault):
    given_ = {'nsq': {'nsqd-tcp-address': '127.0.0.1:4150', 'topic': 't'}, 'store': 'sqlite', **sections}
    faults = build_config(given_)[1]
    assert [str(each)[:len(fault)] for each in faults if each.section != ''] == [fault]


@pytest.mark.parametrize('sections', [
    {'message': {'unknown-fields': 'reject', 'fields': {'a.b': 'any', 'c': 'object'}},
     'record': {'key': 'a.b', 'bins': {'a': 'whole', 'c.d': 'd'}}},
    {'message': {'unknown-fields': 'drop', 'fields': {'a_name_of_17_byte.x': 'any', 'city.name': 'any'}},
     'record': {'bins': {'a_name_of_17_byte.x': 'x', 'city.name': 'city'}}},
    {'message': {'fields': {'a': 'any', 'a[0].b': 'any', 'c': 'list', 'c[0]': 'any'}}},
])
def test_what_fits_together_is_no_fault(sections):
    assert fakes.options(**sections)
