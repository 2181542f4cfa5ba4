"""The shape of the module: sections use only what stands above them, states are enumerations, all within limits."""
import ast
import bisect
import inspect
import re
import symtable
from pathlib import Path

import pytest

import xmsrv

SOURCE = inspect.getsource(xmsrv)
TREE = ast.parse(SOURCE)
DASHES = '# ' + '-' * 117
MAX_ATTRIBUTES, MAX_LINES = 20, 40
# `xmsrv.NAME =` or `xmsrv.CLASS.NAME =`, at the beginning of a line in a string, too
REPLACED = r'(?:(?<![.\w])|(?<=\\n))xmsrv\.(\w+)(?:\.(\w+))?(?= = |, xmsrv\.)'

# Attributes that hold True or False. None of them decides what a state should: each is a fact or a wish, with one
# place that sets it. A new one needs its reason here; where two or more describe one thing, make them an Enum.
FLAGS = {
    'FieldRule.required': 'a word of the configuration, never changed',
    'Message.set_aside': 'whether RDY is raised for it: one bit for each of thousands of messages',
    'Connection.is_closed': 'whether the socket has ended: set once',
    'Subscription.idle': 'a measured fact, which allocate_rdy deals by',
    'Subscription.found_idle': 'a measured fact: RDY was above 0 for long enough',
    'AerospikeStore.write_accepted': 'a fact about the cluster: set once, by the first write that it accepts',
    'DeadLetterSink.closed': 'set once, by close()',
    'Batcher.stopped': "set once, by stop(): the end of its window, which is that window's state",
    'WindowLimits.has_successor': 'a wish: an argument, never changed',
    'DeadLetterFileSource.read_all': 'a fact about the file: its last line was read',
    'Daemon.is_stopping': 'set once, by a signal',
    'WorkerStatus.is_healthy': 'what the worker said of itself last',
}


def defined_names():
    """The line where each name of the module is defined."""
    lines = {}
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
            lines |= {leaf.id: node.lineno for leaf in ast.walk(target or ast.Pass()) if isinstance(leaf, ast.Name)}
    return lines


def global_uses(table):
    """Yields (line of the scope, name) for each name that a scope and all inside it take from the module."""
    for symbol in table.get_symbols():
        if symbol.is_global() and symbol.is_referenced():
            yield table.get_lineno(), symbol.get_name()
    for child in table.get_children():
        yield from global_uses(child)


def sections():
    """Each section as (the line at which it begins, its name)."""
    return [(SOURCE.count('\n', 0, match.start()), match[1]) for match in
            re.finditer(f'^{DASHES}\n# ([^-:][^:\n]*).*\n{DASHES}$', SOURCE, re.MULTILINE)]


def banners():
    """The lines at which sections begin."""
    return [line for line, _ in sections()]


def is_typed(function):
    """Whether a function says what it returns, and of what type each of its parameters is."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs,
             *filter(None, (function.args.vararg, function.args.kwarg))]
    return bool(function.returns and all(each.annotation or each.arg in ('self', 'cls') for each in given))


def classes():
    """Each class of the module, with the attributes that its methods set on `self` and its own annotated fields."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.ClassDef):
            yield node, [*self_attributes(node), *((field.target.id, field) for field in node.body
                                                   if isinstance(field, ast.AnnAssign))]


def self_attributes(node):
    """Yields (attribute, assignment) for each `self.x = ...` of a class, also where several are assigned at once."""
    for statement in ast.walk(node):
        targets = getattr(statement, 'targets', [getattr(statement, 'target', None)])
        for target in targets if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) else ():
            for leaf in ast.walk(target):
                if isinstance(leaf, ast.Attribute) and getattr(leaf.value, 'id', None) == 'self':
                    yield leaf.attr, statement


def is_flag(attribute, statement):
    """Whether an assignment gives an attribute True or False, or its annotation says that it is one."""
    if isinstance(statement, ast.AnnAssign) and getattr(statement.annotation, 'id', None) == 'bool':
        return True
    pairs = [(target, statement.value) for target in getattr(statement, 'targets', ())]
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple):
        pairs = [pair for target in statement.targets if isinstance(target, ast.Tuple)
                 for pair in zip(target.elts, statement.value.elts, strict=True)]
    return any(getattr(target, 'attr', None) == attribute and isinstance(value, ast.Constant)
               and isinstance(value.value, bool) for target, value in pairs)


def functions():
    """Each function and method of the module."""
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_section_uses_what_stands_below_it():
    starts, lines = banners(), defined_names()
    assert len(starts) > 12
    section = {name: bisect.bisect(starts, line) for name, line in lines.items()}
    module = symtable.symtable(SOURCE, 'xmsrv.py', 'exec')
    uses = [use for child in module.get_children() for use in global_uses(child)]   # its own could not be imported
    forward = {f'line {line} uses {name}, of line {lines[name]}' for line, name in uses
               if name in lines and section[name] > bisect.bisect(starts, line)}
    assert sorted(forward) == []


def test_every_function_has_hints():
    starts, names = banners(), ['imports', *(name for _, name in sections())]
    untyped = {}
    for node in functions():
        if not is_typed(node):
            untyped.setdefault(names[bisect.bisect(starts, node.lineno - 1)], []).append(node.name)
    assert untyped == {}


def test_no_flag_decides_what_a_state_should():
    flags = {f'{node.name}.{attribute}' for node, attributes in classes() for attribute, statement in attributes
             if is_flag(attribute, statement)}
    assert sorted(flags) == sorted(FLAGS)


def test_no_class_has_too_many_attributes():
    sizes = {node.name: {attribute for attribute, _ in attributes} for node, attributes in classes()}
    assert {name: len(found) for name, found in sizes.items() if len(found) > MAX_ATTRIBUTES} == {}


def test_no_function_is_too_long():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize('kind', [ast.ClassDef, (ast.FunctionDef, ast.AsyncFunctionDef)], ids=['class', 'function'])
def test_what_is_public_says_what_it_is(kind):
    public = [node for scope in [TREE, *(node for node, _ in classes())] for node in scope.body
              if isinstance(node, kind) and not node.name.startswith('_')]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_what_tests_replace_is_there():
    """A name that the module no longer has would be set in vain, and its test would see nothing."""
    for path in sorted(Path(__file__).parent.parent.rglob('test_*.py')):
        for name, member in re.findall(REPLACED, path.read_text()):
            assert hasattr(xmsrv, name), f'{path.name}: xmsrv.{name}'
            assert not member or hasattr(getattr(xmsrv, name), member), f'{path.name}: xmsrv.{name}.{member}'
