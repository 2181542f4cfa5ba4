"""Nsqds, nsqlookupds and configurations may hold any character: none forges a line, or colours a terminal."""
import contextlib
import logging
import types

import pytest

import fakes
import xmsrv
from xmsrv import (
    ConfigError,
    Connection,
    EscapingFormatter,
    Fault,
    JournalHandler,
    JsonFormatter,
    NsqdError,
    PriorityFormatter,
    TextFormatter,
    Unavailable,
    UsageError,
    command_line_setting,
    describe_error,
    escape_controls,
)

FORGED = 'E_\xff\0\nerror: \x1b[31mred\x9b'
ESCAPED = r'E_\xff\x00\nerror: \x1b[31mred\x9b'.replace(r'\xff', '\xff')


def record(template, *arguments, exc_info=None):
    return logging.LogRecord('x-msrv', logging.WARNING, '', 0, template, arguments, exc_info)


@pytest.mark.parametrize(('text', 'escaped'), [
    (FORGED, ESCAPED), ('a\tb\r\x7f', r'a\tb\r\x7f'),
    ('na\xefve, \u65e5\u672c "a" \\x', 'na\xefve, \u65e5\u672c "a" \\x'),
    ('\udcff\u202e\u2028', r'\udcff\u202e\u2028'), ('', '')])
def test_control_characters_alone_are_escaped(text, escaped):
    assert escape_controls(text) == escaped


def test_kept_characters_stay():
    assert escape_controls('a\nb\x1b', '\n') == 'a\nb' + r'\x1b'


@pytest.mark.parametrize(('formatter', 'prefix'), [
    (TextFormatter(), 'warning: '), (PriorityFormatter(), '<4>'), (EscapingFormatter(), '')])
def test_a_record_is_one_line_whatever_its_words(formatter, prefix):
    assert formatter.format(record('nsqd %s: %s', FORGED, ValueError(FORGED))) == f'{prefix}nsqd {ESCAPED}: {ESCAPED}'


def test_a_list_of_faults_has_its_lines():
    error = ConfigError('first\nsecond\x1b')
    assert TextFormatter().format(record('%s\nkept', error)) == 'warning: first\nsecond' + r'\x1b' + '\nkept'
    assert PriorityFormatter().format(record('%s', error)) == '<4>first\n<4>second' + r'\x1b'


def test_a_traceback_has_its_lines():
    try:
        raise ValueError('red\x1b')
    except ValueError as error:
        info = type(error), error, error.__traceback__
    lines = TextFormatter().format(record('internal error', exc_info=info)).split('\n')
    assert (lines[0], lines[-1]) == ('warning: internal error', r'ValueError: red\x1b') and len(lines) > 3


def test_the_journal_gets_one_line_and_json_its_own_escapes():
    entry = JournalHandler({}).build_entry(record('nsqd %s', FORGED))
    assert f'MESSAGE=nsqd {ESCAPED}\n'.encode() in entry
    assert r'E_\u00ff\u0000\nerror: \u001b[31m' in JsonFormatter({}).format(record('nsqd %s', FORGED))


def test_an_error_frame_is_escaped_and_cut():
    connection = Connection(('127.0.0.1', 4150), None)
    with pytest.raises(NsqdError) as caught:
        connection.unpack_frames(fakes.frame(fakes.ERROR, FORGED.encode()))
    assert str(caught.value) == ESCAPED
    assert len(str(NsqdError('x' * 10_000))) == 500


@pytest.mark.parametrize('error', [OSError(5, FORGED), ValueError(FORGED)])
def test_another_error_is_escaped(error):
    assert describe_error(error) == ESCAPED


def test_a_fault_is_one_line_whatever_its_value():
    assert str(Fault('nsq', 'topic', FORGED, 'no')) == f'[nsq] topic = {ESCAPED}: no'
    assert str(Fault('', '', 'x', 'no', variable=FORGED)) == f'environment: {ESCAPED} = x: no'


@pytest.mark.parametrize('text', ['nsq.topic\n', 'nsq.\x1b=x', 'nsq.topic=a\nb'])
def test_what_set_is_given_is_one_line(text):
    with pytest.raises((ConfigError, UsageError)) as caught:
        setting = command_line_setting(text)
        xmsrv.apply_setting({'nsq': 'an option'} if '=' in text else {}, setting)
        raise AssertionError(setting)
    assert str(caught.value).isprintable() and escape_controls(text) in str(caught.value)


def test_status_and_readyz_have_a_line_for_each_thing(monkeypatch):
    sent = []
    sender = types.SimpleNamespace(settimeout=float, connect=str, send=sent.append)
    monkeypatch.setenv('NOTIFY_SOCKET', '/run/notify')
    monkeypatch.setattr(xmsrv.socket, 'socket', lambda *arguments: contextlib.nullcontext(sender))
    xmsrv.SystemdNotifier().send_fields(READY=1, STATUS='down\nSTOPPING=1')
    assert sent == [rb'READY=1' + b'\n' + rb'STATUS=down\nSTOPPING=1']
    daemon = types.SimpleNamespace(backend_states={'queue': 'down'}, waiting_lines=['a\nb'], failure_text=FORGED)
    assert xmsrv.readiness_text(daemon) == 'queue: down\n' + r'a\nb' + f'\n{ESCAPED}\n'


def test_a_failure_without_lines_is_one_line():
    assert TextFormatter().format(record('%s', Unavailable('a\x1b'))) == r'warning: a\x1b'
