"""The configuration file, --set and the command line: every fault at once, each with its place and its rule."""
import json
import math
import os
import pwd
import re
import socket
import subprocess
from types import SimpleNamespace

import configobj
import pytest
import trustme
from hypothesis import example, given, settings
from hypothesis import strategies as st

import servers
from xmsrv import (
    OPTIONS,
    TYPE_CHECKS,
    ConfigError,
    UsageError,
    apply_setting,
    command_line_setting,
    dump_config,
    environment_settings,
    escape_controls,
    lookupd_address,
    main,
    nsqd_address,
    open_regular,
    parse_address,
    parse_count,
    parse_duration,
    parse_field,
    parse_path,
    parse_positive,
    parse_secret_path,
    parse_size,
    ttl_parser,
    unknown_variables,
    variable_path,
)

TOP = 'state-dir = {directory}\nstore = sqlite\n'
NSQ = '[nsq]\nnsqd-tcp-address = 127.0.0.1:4150\ntopic = orders\n'
VALID = TOP + NSQ
CLUSTER = 'state-dir = {directory}\n' + NSQ + '[aerospike]\nhosts = [::1]:3000, b:3000\nnamespace = test\n'
AUTHORITIES = '/etc/ssl/certs/ca-certificates.crt'
QUOTE = 'quote the value: without quotes, # starts a comment'
CLOSED = VALID + '[message]\nunknown-fields = reject\n[[fields]]\nid = integer, required\n'


@pytest.fixture
def faults(program):
    """A function: the faults that `check` finds in a text, without the file's name."""
    def check(text, *args, expect=78):
        program.write(text.replace('{directory}', str(program.directory)))
        return located(program.run(*args, 'check', expect=expect).stderr, program.path)
    return check


def located(stderr, path):
    """The lines of `stderr` without level and file name; each has to name the file."""
    lines = [line.removeprefix('error: ') for line in stderr.splitlines()]
    assert all(line.startswith(f'{path}: ') for line in lines), stderr
    return [line.removeprefix(f'{path}: ') for line in lines]


# --- faults

def test_all_faults_are_reported_at_once(faults):
    """Unknown names, wrong types and what only shows between options: one run names them all."""
    found = faults('''
        state-dir = {directory}
        store = sqlite
        timeout = soon
        max-messages = 5
        nonsense = 1
        [nsq]
        topik = orders
        channel = my channel
        max-in-flight = 0
        [[tls]]
        ca-file = /nonexistent/ca.pem
        [message]
        unknown-fields = forget
        [record]
        write = update
        key = id
        [[bins]]
        field = a_bin_of_over_15_bytes
        [elsewhere]
        a = 1
        ''')
    assert sorted(found) == sorted([
        'timeout = soon: not a duration such as 500ms, 10s, 5m, 1h, 30d',
        'max-messages = 5: no such option; it belongs to [nsq]',
        'nonsense = 1: no such option',
        '[elsewhere]: no such section',
        '[nsq] topik = orders: no such option; did you mean topic?',
        '[nsq] nsqd-tcp-address: either this or lookupd-http-address: one of them is needed',
        '[nsq] channel = my channel: not a name for NSQ: letters, digits, . _ - and at the end perhaps #ephemeral',
        '[nsq] max-in-flight = 0: at least 1',
        '[nsq] [[tls]] ca-file = /nonexistent/ca.pem: No such file or directory',
        '[message] unknown-fields = forget: not one of keep, drop, reject',
        '[record] write = update: bins cannot be merged in order; it needs key = $id',
        '[record] [[bins]] field = a_bin_of_over_15_bytes: 22 bytes; a bin name has 15 at most',
    ])


EXTERNAL = CLUSTER.replace('[nsq]', '[nsq]\n', 1) + (
    f'auth-mode = external\nuser = u\npassword-file = {__file__}\n[[tls]]\nca-file = {AUTHORITIES}\n')


@pytest.mark.parametrize('text', [
    TOP + '[nsq]\nnsqd-tcp-address = nowhere\ntopic = orders\n',
    TOP + '[nsq]\nnsqd-tcp-adress = 127.0.0.1:4150\ntopic = orders\n',
    TOP + '[nsq]\nlookupd-http-address = nowhere\ntopic = orders\n',
    TOP + 'topic = orders\n[nsq]\nnsqd-tcp-address = 127.0.0.1:4150\n',
    VALID.replace('[nsq]', '[nqs]'),
    VALID.replace('sqlite', 'sqllite'),
    CLUSTER.replace('[aerospike]', '[aerospik]'),
    VALID + '[[tls]]\ncert-file = relative\nkey-file = /k\n',
    VALID + '[dead-letter]\ntopic =\nfile = relative\n',
    VALID + '[dead-letter]\ntopic =\ndiscard = perhaps\n',
    VALID + '[message]\nunknown-fields = drop\nfields = 1\n',
    CLOSED.replace('integer', 'intger') + '[record]\nkey = id\n[[bins]]\nid = number\n',
    CLOSED.replace('[[fields]]', '[[feilds]]'),
    EXTERNAL.replace('user = u\n', ''),
    EXTERNAL.replace('user = u\n', 'user = a, b\n'),
    EXTERNAL.replace(f'= {__file__}', '= relative'),
    CLUSTER + 'user = u\npassword-file = relative\n',
    EXTERNAL.replace('[[tls]]', '[[tsl]]'),
])
def test_one_fault_is_one_line(faults, text):
    """Also where another option waits for the value that is wrong."""
    assert len(faults(text)) == 1


@pytest.mark.parametrize('text, fault', [
    # names
    ('tmeout = 1s\n' + VALID, 'tmeout = 1s: no such option; did you mean timeout?'),
    ('topic = x\n' + VALID, 'topic = x: no such option; it belongs to [nsq]'),
    (VALID + 'timeout = 1s\n', '[nsq] timeout = 1s: no such option; it belongs to the top, before any section'),
    (VALID + 'ca-file = x\n', '[nsq] ca-file = x: no such option; it belongs to [nsq.tls]'),
    (VALID + '[recrod]\nkey = id\n', '[recrod]: no such section; did you mean record?'),
    (VALID + '[[tsl]]\n', '[nsq] [[tsl]]: no such section; did you mean tls?'),
    (VALID + '[[topics]]\n', '[nsq] [[topics]]: no such section; did you mean topic?'),
    # a section for an option and the other way round
    (TOP + 'nsq = 5\n[message]\n', 'nsq = 5: a section, not an option'),
    (VALID + '[message]\nfields = x\n', '[message] fields = x: a section, not an option'),
    (VALID + '[message]\nfields = x # y\n', '[message] fields = x: a section, not an option'),
    (VALID + '[record]\nbins = a, b # y\n', '[record] bins = a, b: a section, not an option'),
    (VALID + '[[msg-timeout]]\na = 1\n', '[nsq] msg-timeout: an option, not a section'),
    (VALID + '[[lookupd-http-address]]\nlocalhost:4161 = 1\n', '[nsq] lookupd-http-address: an option, not a section'),
    (VALID + '[message]\n[[fields]]\n[[[a]]]\ninteger = 1\n', '[message] [[fields]] a: an option, not a section'),
    # types
    (VALID + 'max-messages = many\n', '[nsq] max-messages = many: not a whole number'),
    (VALID + 'max-messages = -1\n', '[nsq] max-messages = -1: not a whole number'),
    (VALID + 'max-messages = 1, 2\n',
     '[nsq] max-messages = 1, 2: one value, not a list (quote it if it holds a comma)'),
    (VALID + 'max-held = 32MB\n', '[nsq] max-held = 32MB: not a size such as 4096, 64KiB, 32MiB'),
    (VALID + 'msg-timeout = 0s\n', '[nsq] msg-timeout = 0s: at least 1ms'),
    ('idle-timeout = 500\n' + VALID, 'idle-timeout = 500: not a duration such as 500ms, 10s, 5m, 1h, 30d'),
    ('log-format = xml\n' + VALID, 'log-format = xml: not one of text, json'),
    (VALID + '[dead-letter]\ndiscard = maybe\n', '[dead-letter] discard = maybe: not one of yes, no'),
    (VALID + 'channel = tail#ephemeral\n', f'[nsq] channel = tail#ephemeral: {QUOTE}'),
    (VALID.replace('orders', 'orders #ephemeral'), f'[nsq] topic = orders #ephemeral: {QUOTE}'),
    (VALID + '[sqlite]\nset = customers  # of the shop\n', f'[sqlite] set = customers  # of the shop: {QUOTE}'),
    (VALID + '[sqlite]\nset = #1\n', f'[sqlite] set =  #1: {QUOTE}'),
    (VALID + '[dead-letter]\nfile = {directory}/dead #2\n', f'[dead-letter] file = {{directory}}/dead #2: {QUOTE}'),
    (VALID + '[record]\n[[bins]]\ncolour = c #1\n', f'[record] [[bins]] colour = c #1: {QUOTE}'),
    (VALID + '[message]\n[[fields]]\nid = string, match a#b\n', f'[message] [[fields]] id = match a#b: {QUOTE}'),
    (VALID + '[message]\n[[fields]]\nid = string, match #[a-z]+\n',
     f'[message] [[fields]] id = match #[a-z]+: {QUOTE}'),
    (VALID + '[message]\n[[fields]]\nid = string, required, one-of #1|#2\n',
     f'[message] [[fields]] id = one-of #1|#2: {QUOTE}'),
    (VALID + '[message]\n[[fields]]\nid = string, "match #a"\nother = string, match #a\n',
     f'[message] [[fields]] other = match #a: {QUOTE}'),
    # queue
    (TOP + '[nsq]\nnsqd-tcp-address = 127.0.0.1:4150\n', '[nsq] topic: missing; name the topic to read'),
    (TOP + '[nsq]\ntopic = orders\n',
     '[nsq] nsqd-tcp-address: either this or lookupd-http-address: one of them is needed'),
    (VALID + 'lookupd-http-address = 127.0.0.1:4161\n',
     '[nsq] nsqd-tcp-address: either this or lookupd-http-address: not both'),
    (TOP + '[nsq]\ntopic = orders\nlookupd-http-address = localhost\n',
     '[nsq] lookupd-http-address = localhost: not host:port (IPv6 in brackets, [::1]:4150)'),
    (TOP + '[nsq]\ntopic = orders\nnsqd-tcp-address = ::1:4150\n',
     '[nsq] nsqd-tcp-address = ::1:4150: not host:port (IPv6 in brackets, [::1]:4150)'),
    (TOP + '[nsq]\ntopic = orders\nnsqd-tcp-address = ~/n.sock\n',
     '[nsq] nsqd-tcp-address = ~/n.sock: not host:port, nor the whole path of a unix socket, as /run/nsqd.sock'),
    (VALID.replace('orders', 'a b'),
     '[nsq] topic = a b: not a name for NSQ: letters, digits, . _ - and at the end perhaps #ephemeral'),
    (VALID.replace('orders', 'x' * 65) + '[dead-letter]\ntopic = dead\n',
     f'[nsq] topic = {"x" * 65}: 65 characters; NSQ takes 64 at most'),
    # dead letters
    (VALID.replace('orders', 'x' * 60),
     f'[dead-letter] topic = {"x" * 60}.dead: 65 characters; NSQ takes 64 at most'),
    (VALID + '[dead-letter]\ntopic = orders\n',
     '[dead-letter] topic = orders: must not be the topic that is read: its dead letters would be consumed again'),
    (VALID + '[dead-letter]\ntopic =\n',
     '[dead-letter] topic: no topic and no file: set discard = yes to discard dead letters'),
    (VALID + '[dead-letter]\ntopic = dead\ndiscard = yes\n',
     '[dead-letter] discard = yes: cannot be combined with a topic or a file'),
    (VALID + '[dead-letter]\nfile = {directory}/dead\ndiscard = yes\n',
     '[dead-letter] discard = yes: cannot be combined with a topic or a file'),
    (TOP + '[nsq]\ntopic = orders\nnsqd-tcp-address = queue1..example:4150\n', '[nsq] nsqd-tcp-address = '
     'queue1..example:4150: not a host name: a part of it is empty or over 63 characters'),
    (VALID.replace('state-dir = {directory}', 'state-dir ='), 'state-dir = : a path must not be empty'),
    (VALID + 'msg-timeout = 0.5ms\n', '[nsq] msg-timeout = 0.5ms: at least 1ms'),
    # mapping
    (CLOSED + '[record]\nkey = uid\n', '[record] key = uid: no such field in [message] [[fields]]'),
    (CLOSED + '[record]\nkey = id\ntime = ts\n', '[record] time = ts: no such field in [message] [[fields]]'),
    (CLOSED + '[record]\n[[bins]]\nuid = u\n', '[record] [[bins]] uid = u: no such field in [message] [[fields]]'),
    (VALID + '[message]\nunknown-fields = drop\n',
     '[message] unknown-fields = drop: without [[fields]] no field is known'),
    (CLOSED + 'a_field_of_over_15_bytes = string\n',
     '[message] [[fields]] a_field_of_over_15_bytes: over 15 bytes for a bin: map it in [[bins]]'),
    (VALID + '[record]\nid-bin = a_bin_of_17_bytes\n',
     '[record] id-bin = a_bin_of_17_bytes: 17 bytes; a bin name has 15 at most'),
    (VALID + '[record]\n[[bins]]\na = one\nb = one\n',
     '[record] [[bins]] b = one: more than one value would go into this bin, also that of [[bins]] a'),
    (VALID + '[record]\n[[bins]]\na = gid\n',
     '[record] [[bins]] a = gid: more than one value would go into this bin, also that of id-bin'),
    (CLOSED + '[record]\nid-bin = id\n',
     '[record] id-bin = id: more than one value would go into this bin, also that of [[fields]] id'),
    (VALID + '[record]\ndocument-bin = gid\n',
     '[record] document-bin = gid: more than one value would go into this bin, also that of id-bin'),
    (VALID + '[record]\nkey = id\nid-bin = gts\n[[bins]]\na = gts\n', '[record] [[bins]] a = gts: more than one '
     'value would go into this bin, also that of id-bin and time-bin'),
    (CLOSED + 'name = string\n[record]\n[[bins]]\nid = name\n',
     '[record] [[bins]] id = name: more than one value would go into this bin, also that of [[fields]] name'),
    (VALID + '[record]\nkey = $Id\n', '[record] key = $Id: $id, or the name of a field'),
    (VALID + '[record]\nkey = $timestamp\n', '[record] key = $timestamp: $id, or the name of a field'),
    (VALID + '[record]\nkey =\n', '[record] key = : $id, or the name of a field'),
    (VALID + '[record]\nkey = id\ntime = $now\n', '[record] time = $now: $timestamp, or the name of a field'),
    (VALID + '[record]\nkey = gid\n', '[record] key = gid: its bin is also id-bin or time-bin: rename one of them'),
    (VALID + '[record]\nkey = id\nwrite = update\n',
     '[record] write = update: bins cannot be merged in order; it needs key = $id'),
    (VALID + '[record]\nkey = id\ntime-bin =\n',
     '[record] time-bin = : with a field as key and write = replace it is needed: the newest wins'),
    # store
    (VALID + '[record]\nttl = 30d\n', '[record] ttl: store = sqlite keeps records for ever: leave it at default'),
    (CLUSTER + '[record]\nttl = 1.5s\n', '[record] ttl = 1.5s: a whole number of seconds, from 1s to 3650d'),
    (CLUSTER + '[record]\nttl = 3651d\n', '[record] ttl = 3651d: a whole number of seconds, from 1s to 3650d'),
    (CLUSTER + '[record]\nttl = soon\n', '[record] ttl = soon: not default, never or a duration such as 1h, 30d'),
    (CLUSTER.replace('hosts = [::1]:3000, b:3000\n', ''),
     '[aerospike] hosts: missing (or set store = sqlite, for a first run)'),
    (CLUSTER.replace('namespace = test\n', ''),
     '[aerospike] namespace: missing (or set store = sqlite, for a first run)'),
    (CLUSTER + 'set = a:b\n',
     '[aerospike] set = a:b: not a name for Aerospike: '
     'at least one character, no white space and none of : ; ,'),
    (CLUSTER + f'set = {"x" * 64}\n', f'[aerospike] set = {"x" * 64}: 64 bytes; Aerospike takes 63 at most'),
    (CLUSTER.replace('orders', 'x' * 64) + '[dead-letter]\ntopic = dead\n',
     f'[aerospike] set = {"x" * 64}: the topic has over 63 bytes: name a set'),
    (CLUSTER + 'user = writer\n', '[aerospike] user = writer: user and password-file go together'),
    (CLUSTER + 'password-file = {directory}/x-msrv.conf\n',
     '[aerospike] user = : user and password-file go together'),
    (CLUSTER + f'auth-mode = pki\n[[tls]]\nca-file = {AUTHORITIES}\n',
     '[aerospike] auth-mode = pki: it needs the client certificate: cert-file in [[tls]]'),
    (CLUSTER + f'auth-mode = external\n[[tls]]\nca-file = {AUTHORITIES}\n',
     '[aerospike] auth-mode = external: it needs user and password-file'),
    (CLUSTER + 'auth-mode = external\nuser = u\npassword-file = {directory}/x-msrv.conf\n',
     '[aerospike] auth-mode = external: it needs [[tls]]: the password itself crosses the network'),
    (CLUSTER + 'auth-mode = ldap\n', '[aerospike] auth-mode = ldap: not one of internal, external, pki'),
    (CLUSTER + 'max-connections = 0\n', '[aerospike] max-connections = 0: at least 1'),
    (CLUSTER + 'max-connections = 20000\n', '[aerospike] max-connections = 20000: at most 15000'),
    (CLUSTER + 'services-alternate = maybe\n', '[aerospike] services-alternate = maybe: not one of yes, no'),
    (VALID + 'compression = snappy\n', '[nsq] compression = snappy: snappy needs a native library, which is not '
     'carried; deflate compresses better'),
    (VALID + 'compression = gzip\n', '[nsq] compression = gzip: not one of none, deflate'),
    (VALID.replace('127.0.0.1:4150', '/' + 'x' * 107), f'[nsq] nsqd-tcp-address = /{"x" * 107}: not the path of a unix '
     'socket: at most 107 bytes, and no NUL'),
    (TOP + '[nsq]\ntopic = orders\nlookupd-http-address = ftp://a:21\n',
     '[nsq] lookupd-http-address = ftp://a:21: not host:port, nor https://host'),
    (TOP + '[nsq]\ntopic = orders\nlookupd-http-address = https://a/b\n',
     '[nsq] lookupd-http-address = https://a/b: not host:port (IPv6 in brackets, [::1]:4150)'),
    (CLUSTER + '[[tls]]\n', '[aerospike] [[tls]] ca-file: missing: the client knows no authorities of its own'),
    # fields
    (VALID + '[message]\n[[fields]]\nid = int\n', "[message] [[fields]] id = int: no type 'int'; there are string, "
     'integer, number, boolean, list, object, any, base64, geojson'),
    (VALID + '[message]\n[[fields]]\nid = integer, needed\n', "[message] [[fields]] id = integer, needed: no rule "
     "'needed'; there are required, min, max, one-of, match"),
    (VALID + '[message]\n[[fields]]\nid = boolean, min 1\n',
     '[message] [[fields]] id = boolean, min 1: min does not fit the type boolean'),
    (VALID + '[message]\n[[fields]]\nid = integer, match 1\n',
     '[message] [[fields]] id = integer, match 1: match does not fit the type integer'),
    (VALID + '[message]\n[[fields]]\nid = integer, max ten\n',
     "[message] [[fields]] id = integer, max ten: max wants an integer, not 'ten'"),
    (VALID + '[message]\n[[fields]]\nid = number, min nan\n',
     "[message] [[fields]] id = number, min nan: min wants a number, not 'nan'"),
    (VALID + '[message]\n[[fields]]\nid = integer, one-of a|b\n',
     "[message] [[fields]] id = integer, one-of a|b: one-of wants an integer, not 'a'"),
    (VALID + '[message]\n[[fields]]\nid = string, match (\n',
     '[message] [[fields]] id = string, match (: match (: missing ), unterminated subpattern at position 0'),
    *((VALID + f'[message]\n[[fields]]\nid = {kind}, {rule}\n', f'[message] [[fields]] id = {kind}, {rule}: '
       f'{rule} needs an argument (quote the rule if it has a # in it)')
      for kind, rule in [('integer', 'min'), ('list', 'max'), ('number', 'one-of'), ('string', 'match')]),
    # rules that no value keeps
    *((VALID + f'[message]\n[[fields]]\nid = {rules}\n', f'[message] [[fields]] id = {rules}: {rule}')
      for rules, rule in [
          ('string, max -1', 'no length is from 0 to -1'), ('list, max -3, required', 'no length is from 0 to -3'),
          ('object, min 2, max 1', 'no length is from 2 to 1'), ('base64, min 4, max 3', 'no length is from 4 to 3'),
          ('integer, min 5, max 3', 'no integer of 64 bit is from 5 to 3'),
          ('integer, max 3, min 1, min 5', 'no integer of 64 bit is from 5 to 3'),
          ('number, min 0.5, max 0.25', 'no number is from 0.5 to 0.25'),
          ('integer, min 9223372036854775808',
           'no integer of 64 bit is from 9223372036854775808 to 9223372036854775807'),
          ('integer, max -9223372036854775809',
           'no integer of 64 bit is from -9223372036854775808 to -9223372036854775809'),
          ('integer, one-of 1|9223372036854775808', 'one-of 9223372036854775808: never, for an integer has 64 bit'),
          ('integer, one-of 1|7, max 5', 'one-of 7: never, for max 5'),
          ('number, min 2, one-of 1.5|3', 'one-of 1.5: never, for min 2'),
          ('string, one-of open|paid, max 3', 'one-of open: never, for max 3'),
          ('string, match [a-z]+, one-of open|PAID', 'one-of PAID: never, for match [a-z]+'),
          ('string, one-of a|b, one-of b|c', 'one-of a: never, for one-of b|c'),
          ('string, one-of |', 'one-of names no value'), ('string, one-of ||', 'one-of names no value')]),
    # fields that can't be what [record] makes of them
    (VALID + '[message]\n[[fields]]\nid = boolean\n[record]\nkey = id\n',
     '[record] key = id: a boolean by [[fields]], and a key is a string or an integer'),
    (VALID + '[message]\n[[fields]]\nid.n = any\n[record]\nkey = id\n',
     '[record] key = id: an object by [[fields]], and a key is a string or an integer'),
    (VALID + '[message]\n[[fields]]\nts = string\n[record]\nkey = id\ntime = ts\n',
     '[record] time = ts: a string by [[fields]], and the time is an integer'),
    (CLUSTER + '[message]\n[[fields]]\nkeep = base64\n[record]\nttl-field = keep\n',
     '[record] ttl-field = keep: base64 by [[fields]], and a ttl is an integer'),
    (CLUSTER + '[message]\n[[fields]]\nt[0].a = any\n[record]\nset-field = t\n',
     '[record] set-field = t: a list by [[fields]], and the name of a set is a string'),
    (VALID + '[message]\n[[fields]]\nid = string, match (a|b){2,4}, required\n', '[message] [[fields]] id = string, '
     "match (a|b){2, 4}, required: no rule '4}'; there are required, min, max, one-of, match; "
     'quote a rule that holds a comma: "match (a|b){2,4}"'),
    (VALID + '[message]\n[[fields]]\nid = string, match (x,y)\n', "[message] [[fields]] id = string, match (x, y): no "
     "rule 'y)'; there are required, min, max, one-of, match; quote a rule that holds a comma: \"match (x,y)\""),
    # files
    (VALID + 'auth-secret-file = credential:nsq\n', '[nsq] auth-secret-file = credential:nsq: no credential here, '
     'for only systemd hands them out; to try it: systemd-run --pty --property=LoadCredential=nsq:/path/of/it x-msrv '
     'check'),
    (VALID + '[[tls]]\nkey-file = {directory}/x-msrv.conf\n',
     '[nsq] [[tls]] key-file = {directory}/x-msrv.conf: a key without its certificate: name its cert-file'),
    (CLUSTER + f'[[tls]]\nca-file = {AUTHORITIES}\nkey-file = {{directory}}/x-msrv.conf\n',
     '[aerospike] [[tls]] key-file = {directory}/x-msrv.conf: a key without its certificate: name its cert-file'),
    ('state-dir = ~nobody-of-this-name/state\n' + VALID.replace('state-dir = {directory}\n', ''),
     'state-dir = ~nobody-of-this-name/state: no home directory to replace ~ with: write the whole path'),
    (VALID + '[dead-letter]\nfile = "a\0b"\n', r'[dead-letter] file = a\x00b: must not contain NUL'),
    # paths that are written
    (VALID.replace('state-dir = {directory}', 'state-dir = /dev/null'), 'state-dir = /dev/null: not a directory'),
    (VALID.replace('state-dir = {directory}', 'state-dir = {directory}/x-msrv.conf'),
     'state-dir = {directory}/x-msrv.conf: not a directory'),
    (VALID + '[dead-letter]\nfile = /dev/full\n', '[dead-letter] file = /dev/full: not a regular file'),
    (VALID + '[dead-letter]\nfile = /proc\n', '[dead-letter] file = /proc: not a regular file'),
    (VALID + '[metrics]\ntextfile = /dev/zero\n', '[metrics] textfile = /dev/zero: not a regular file'),
    (VALID + '[metrics]\ntextfile = {directory}\n', '[metrics] textfile = {directory}: not a regular file'),
    (VALID + '[sqlite]\npath = /dev/null\n', '[sqlite] path = /dev/null: not a regular file'),
    (VALID + '[sqlite]\npath = {directory}\n', '[sqlite] path = {directory}: not a regular file'),
])
def test_a_fault_is_one_line_with_its_place_and_rule(program, capsys, text, fault):
    """One line and no more: a second one that only follows from the first sends the reader astray."""
    program.write(text.replace('{directory}', str(program.directory)))
    assert main(['-c', str(program.path), 'check']) == 78   # in this process: a new one for each would take long
    assert located(capsys.readouterr().err, program.path) == [fault.replace('{directory}', str(program.directory))]


@pytest.mark.parametrize('text, fault', [
    (VALID + '[dead-letter]\nfile = /nonexistent/dead\n',
     '[dead-letter] file = /nonexistent/dead: its directory is not there'),
    (VALID + '[dead-letter]\nfile = {directory}/link\n',
     '[dead-letter] file = {directory}/link: its directory is not there'),
    (VALID + '[metrics]\ntextfile = /nonexistent/x.prom\n',
     '[metrics] textfile = /nonexistent/x.prom: its directory is not there'),
    (VALID + '[metrics]\ntextfile = {directory}/x-msrv.conf/x.prom\n',
     '[metrics] textfile = {directory}/x-msrv.conf/x.prom: its directory is not there'),
    (CLUSTER + 'user = a\npassword-file = /nonexistent/p\n',
     '[aerospike] password-file = /nonexistent/p: No such file or directory'),
    (VALID + 'auth-secret-file = /nonexistent/secret\n',
     '[nsq] auth-secret-file = /nonexistent/secret: No such file or directory'),
    (VALID + 'auth-secret-file = {directory}\n', '[nsq] auth-secret-file = {directory}: not a regular file'),
    (VALID + 'auth-secret-file = /dev/zero\n', '[nsq] auth-secret-file = /dev/zero: not a regular file'),
    (VALID + 'auth-secret-file = {directory}/fifo\n', '[nsq] auth-secret-file = {directory}/fifo: not a regular file'),
    (VALID + 'auth-secret-file = {directory}/empty\n', '[nsq] auth-secret-file = {directory}/empty: empty'),
    (VALID + '[[tls]]\ncert-file = /nonexistent/cert\n',
     '[nsq] [[tls]] cert-file = /nonexistent/cert: No such file or directory'),
    (VALID + '[metrics]\nlisten = 192.0.2.7:9100\n',
     '[metrics] listen = 192.0.2.7:9100: Cannot assign requested address'),
])
def test_what_is_not_there_yet_is_69_and_no_fault_of_the_text(program, capsys, text, fault):
    """It may come by itself."""
    (program.directory / 'empty').touch()
    (program.directory / 'link').symlink_to('/nonexistent/dead')
    os.mkfifo(program.directory / 'fifo')
    program.write(text.replace('{directory}', str(program.directory)))
    assert main(['-c', str(program.path), 'check']) == 69
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('warning: ')]
    assert located('\n'.join(errors), program.path) == [fault.replace('{directory}', str(program.directory))]
    assert main(['-c', str(program.path), 'config']) == 0


def test_all_that_is_missing_is_said_at_once_and_with_a_fault_of_the_text_it_is_78(program):
    text = VALID + 'auth-secret-file = /nonexistent/s\n[[tls]]\n[dead-letter]\nfile = /nonexistent/d\n[metrics]\n' \
        'textfile = /nonexistent/t\n'
    missing = ['[nsq] auth-secret-file = /nonexistent/s: No such file or directory',
               '[dead-letter] file = /nonexistent/d: its directory is not there',
               '[metrics] textfile = /nonexistent/t: its directory is not there']
    program.write(text.replace('{directory}', str(program.directory)))
    assert sorted(located(program.run('check', expect=69).stderr, program.path)) == sorted(missing)
    told = program.run('once', expect=69).stderr
    assert all(fault in told for fault in missing)
    told = located(program.run('--set', 'timeout=soon', 'check', expect=78).stderr, program.path)
    assert sorted(told) == sorted([*missing, 'timeout = soon: not a duration such as 500ms, 10s, 5m, 1h, 30d'])
    replayed = program.run('replay', expect=69).stderr   # it writes no textfile
    assert missing[0] in replayed and missing[2] not in replayed


def test_an_address_that_a_running_daemon_has_is_no_fault(program):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        program.write(VALID.replace('{directory}', str(program.directory)) + f'[metrics]\nlisten = 127.0.0.1:{port}\n')
        assert program.run('check').stderr == ''


@pytest.mark.parametrize('home, value, expected', [
    ('/home/operator', '~', '/home/operator'), ('/home/operator', '~/a', '/home/operator/a'), ('/', '~/a', '/a'),
    ('/home/operator', '~root', pwd.getpwnam('root').pw_dir), ('', '~', None), ('', '~/a', None), ('', 'a~', 'a~'),
    ('relative', '~/a', None), ('/home/operator', '~nobody-of-this-name', None), ('/home/operator', './~', './~'),
])
def test_a_home_directory_is_there_or_a_fault(monkeypatch, home, value, expected):
    """Else a directory would be made that is named ~."""
    monkeypatch.setenv('HOME', home)
    if expected:
        assert parse_path(value) == expected
    else:
        with pytest.raises(ValueError, match='no home directory'):
            parse_path(value)


PATH_OPTIONS = [option for option in OPTIONS if re.search('dir$|file$|^path$', option.name)]


@pytest.mark.parametrize('option', PATH_OPTIONS, ids=lambda option: f'{option.section}.{option.name}')
def test_a_path_is_whole_or_starts_at_home(monkeypatch, option):
    """Else it would be another one in a service than in a shell. That of the database starts at state-dir."""
    monkeypatch.setenv('HOME', '/home/operator')
    assert option.check('/a/b') == '/a/b'
    assert option.check('~/a') == '/home/operator/a'
    for value in ('a', './a', '../a', 'a/~', 'credentials:a'):
        if option.section == 'sqlite':
            assert option.check(value) == value
        else:
            with pytest.raises(ValueError, match='^a relative path: write the whole one, which begins with / or ~$'):
                option.check(value)


def test_a_relative_path_is_a_fault_of_its_option(faults):
    rule = 'a relative path: write the whole one, which begins with / or ~'
    assert sorted(faults('state-dir = x\nstore = sqlite\n' + NSQ + 'auth-secret-file = s\n[[tls]]\nca-file = ca.pem\n'
                         'cert-file = c\nkey-file = ./k\n[dead-letter]\nfile = d\n[metrics]\ntextfile = x.prom\n')) == [
        f'[dead-letter] file = d: {rule}', f'[metrics] textfile = x.prom: {rule}',
        f'[nsq] [[tls]] ca-file = ca.pem: {rule}', f'[nsq] [[tls]] cert-file = c: {rule}',
        f'[nsq] [[tls]] key-file = ./k: {rule}', f'[nsq] auth-secret-file = s: {rule}', f'state-dir = x: {rule}']


@pytest.mark.parametrize('name', ['', '.', '..', '/etc/shadow', '../x', 'a/b'])
def test_a_credential_has_the_name_of_one(monkeypatch, name):
    """Its path never leaves the directory of systemd's credentials."""
    monkeypatch.setenv('CREDENTIALS_DIRECTORY', '/run/credentials/x-msrv.service')
    with pytest.raises(ValueError, match='not the name of a credential'):
        parse_secret_path(f'credential:{name}')


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda name: os.symlink('/dev/null', name)],
                         ids=['FIFO', 'directory', 'link to a device'])
def test_what_is_no_regular_file_is_not_opened(workdir, make):
    """And not waited for."""
    make(workdir / 'file')
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_CREAT | os.O_APPEND):
        with pytest.raises(OSError, match='not a regular file'):
            open_regular(workdir / 'file', flags)


def test_a_regular_file_is_opened_also_by_a_link(workdir):
    (workdir / 'link').symlink_to(workdir / 'file')
    with open(open_regular(workdir / 'link', os.O_WRONLY | os.O_CREAT), 'wb') as file:
        file.write(b'x')
    assert (workdir / 'file').read_bytes() == b'x' and (workdir / 'file').stat().st_mode & 0o137 == 0


@pytest.mark.parametrize('text, option', [
    (VALID + '[[tls]]\ncert-file = {directory}/cert.pem\n', '[nsq] [[tls]] cert-file'),
    (VALID + '[[tls]]\nca-file = {directory}/cert.pem\ncert-file = {directory}/cert.pem\n', '[nsq] [[tls]] ca-file'),
    (CLUSTER + '[[tls]]\nca-file = {directory}/cert.pem\n', '[aerospike] [[tls]] ca-file'),
])
def test_a_certificate_that_does_not_load_is_69(faults, workdir, text, option):
    """It may be under way to its place."""
    (workdir / 'cert.pem').write_text('no certificate')
    found, = faults(text, expect=69)
    assert found.startswith(f'{option} = {workdir}/cert.pem: the certificates do not load: ')


def test_an_encrypted_key_is_69_and_no_question(faults, workdir):
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-passout', 'pass:secret', '-subj', '/CN=a',
                    '-keyout', workdir / 'key.pem', '-out', workdir / 'cert.pem'], check=True, capture_output=True)
    found, = faults(VALID + '[[tls]]\ncert-file = {directory}/cert.pem\nkey-file = {directory}/key.pem\n',
                    expect=69)
    assert found.endswith('the key is encrypted: x-msrv cannot ask for its passphrase')


def test_lines_that_are_no_ini_are_all_named(faults):
    assert faults('timeout\n[nsq\ntopic = orders\n\'topic\' = twice\n[a]\n[a]\n') == [
        'line 1: timeout: neither OPTION = VALUE nor [SECTION]',
        'line 2: [nsq: neither OPTION = VALUE nor [SECTION]',
        'line 4: [nsq] topic = twice: stands twice, first in line 3',
        'line 6: [a]: stands twice, first in line 5']


@pytest.mark.parametrize('text, fault', [
    ('[nsq]\ntopic = a\nchannel = b\ntopic = c  # a remark\n',
     'line 4: [nsq] topic = c  # a remark: stands twice, first in line 2'),
    ('[nsq]\n[[tls]]\nca-file = a\n"ca-file" = b\n',
     'line 4: [nsq] [[tls]] ca-file = b: stands twice, first in line 3'),
    ('[nsq]\ntopic = a\n[sqlite]\nset = b\n[ nsq ]\nset = c\n', 'line 5: [ nsq ]: stands twice, first in line 1'),
    ('[nsq]\n[[tls]]\n[[tls]] # again\n', 'line 3: [nsq] [[tls]] # again: stands twice, first in line 2'),
    ('[nsq]\na = """\n[b]\n"""\na = 2\n', 'line 5: [b] a = 2: stands twice'),
    ('x' * 300 + '\n', f'line 1: {"x" * 197}...: neither OPTION = VALUE nor [SECTION]'),
    ('= x\n', 'line 1:  = x: neither OPTION = VALUE nor [SECTION]'),
    ('nsq = 1\n[nsq]\n', 'line 2: [nsq]: stands twice, first in line 1'),
    ('[message]\n[[fields]]\na.b = any\na.b = string\n',
     'line 4: [message] [[fields]] a.b = string: stands twice, first in line 3'),
    ('[nsq]\ntopic: orders\n', 'line 2: [nsq] topic: orders: neither OPTION = VALUE nor [SECTION]'),
    ('[nsq]\ntopic = "orders\n',
     'line 2: [nsq] topic = "orders: a quote that does not end, or a comma without a value'),
    ('[nsq]\ntopic = a,,b\n', 'line 2: [nsq] topic = a,,b: a quote that does not end, or a comma without a value'),
    ("[nsq]\ntopic = '''orders\nchannel = x\n", "line 2: [nsq] topic = '''orders: three quotes that do not end"),
    ('[nsq]]\n', 'line 1: [nsq]]: has not as many [ as ]'),
    ('[[tls]]\n', 'line 1: [[tls]]: stands in no section: [SECTION] first, then [[SUBSECTION]]'),
    ('[nsq]\n[[[tls]]]\n', 'line 2: [nsq] [[[tls]]]: stands in no section: [SECTION] first, then [[SUBSECTION]]'),
])
def test_a_line_that_is_no_ini_is_named_with_its_section_and_rule(faults, text, fault):
    assert faults(text) == [fault]


@pytest.mark.parametrize('content, rule, status', [
    (None, 'No such file or directory', 69), (b'[nsq]\ntopic = \xff\n', 'line 2: not UTF-8', 78),
    (VALID.encode('utf-16'), 'line 1: not UTF-8', 78)])
def test_a_file_that_cannot_be_read_is_a_fault(program, content, rule, status):
    if content:
        program.path.write_bytes(content)
    found = located(program.run('check', expect=status).stderr, program.path)
    assert found == [rule]


@pytest.mark.parametrize('command', ['once', 'check', 'config', 'replay'])
def test_no_command_runs_with_a_fault(program, command):
    program.write(VALID.replace('{directory}', str(program.directory)) + 'max-in-flight = 0\n')
    done = program.run(command, expect=78)
    assert located(done.stderr, program.path) == ['[nsq] max-in-flight = 0: at least 1']
    assert not done.stdout


# --- valid files, warnings

@pytest.mark.parametrize('text', [
    VALID,
    TOP + '[nsq]\ntopic = orders\nlookupd-http-address = a:4161, b.example:4161, [2001:db8::1]:4161\n',
    TOP + '[nsq]\ntopic = orders\nnsqd-tcp-address = 192.0.2.1:1, [::1]:65535, [fe80::1%eth0]:4150,\n',
    TOP + '[nsq]\ntopic = orders\nlookupd-http-address = https://a.example, a:4161, https://[2001:db8::1]:4161\n',
    VALID.replace('127.0.0.1:4150', '/run/nsqd.sock, a:4150') + 'compression = deflate\n',
    CLUSTER + 'services-alternate = yes\ncluster-name = shop\nmax-connections = 4\nsend-key = no\n',
    VALID.replace('orders', 'x' * 59),
    VALID.replace('orders', 'x' * 64) + '[dead-letter]\ntopic = dead\n',
    VALID + '[dead-letter]\ntopic =\nfile = {directory}/dead\n',
    VALID + '[dead-letter]\nfile = {directory}/dead\n',
    CLOSED + '[record]\nkey = id\n',
    VALID + '[message]\n[[fields]]\na = string\n[record]\nkey = id\ntime = ts\n[[bins]]\nunknown = u\n',
    VALID + '[message]\n[[fields]]\na = integer, min 3, max 3, one-of 3\nb = string, max 0\n'
    'c = string, one-of a|, min 0\nd = number, one-of 1|2.5, max 2.5\ne = list, min -1\n',
    CLUSTER + '[message]\n[[fields]]\na = number\nb = base64\nc.d = any\n[record]\nkey = b\ntime = a\n'
    'ttl-field = a\nset-field = c.d\n',
    VALID + '[record]\nkey = id\nwrite = create\ntime-bin =\n',
    VALID + '[record]\nwrite = update\n',
    VALID + '[record]\nid-bin =\nkey = gid\n',
    VALID + '[record]\n[[bins]]\na = ' + '\u00e9' * 7 + '\n',
    VALID + '[[tls]]\n',
    VALID + '[aerospike]\nuser = nobody\n[[tls]]\n',
    CLUSTER,
    'period = 0s\n' + VALID,
    'period = 0\n' + VALID,
    CLUSTER + '[record]\nttl = never\n',
    CLUSTER + '[record]\nttl = 3650d\nkey = id\n',
    '\ufeff' + VALID,
    VALID.replace('\n', '\r\n'),
    VALID + 'channel = "tail" # a remark\n[message] # another\n[[fields]]\na = string, "match #[a-f]+"  # too\n',
    VALID.replace('[nsq]', 'store = sqlite # not aerospike\n[nsq]').replace('store = sqlite\n', ''),
    VALID + '# \u00e9\nmax-messages = 10 # a remark\nmsg-timeout = 1.5m\nmax-held = 1.5KiB\n',
])
def test_a_valid_file_has_no_fault(program, text):
    program.write(text.replace('{directory}', str(program.directory)))
    done = program.run('check')
    assert (done.stdout, done.stderr) == (f'{program.path}: no fault found\n', '')


@pytest.mark.parametrize('more, warning', [
    ('channel = "tail#ephemeral"\n', '[nsq] an #ephemeral topic or channel: what is published between runs is lost'),
    ("topic = 'orders#ephemeral'\n", '[nsq] an #ephemeral topic or channel: what is published between runs is lost'),
    ('auth-secret-file = {directory}/secret\n',
     '[nsq] auth-secret-file without [[tls]]: the secret crosses the network in the clear'),
    ('[aerospike]\nhosts = a:1\nnamespace = n\nuser = u\npassword-file = {directory}/secret\n',
     "[aerospike] user without [[tls]]: a hash of the password crosses the network in the clear"),
    ('[aerospike]\nhosts = a:1\nnamespace = n\nwriters = 101\n',
     '[aerospike] writers = 101: max-connections = 100 to each node, so calls beyond that fail and are tried again'),
    ('[aerospike]\nhosts = a:1\nnamespace = n\nmax-connections = 3\n',
     '[aerospike] writers = 4: max-connections = 3 to each node, so calls beyond that fail and are tried again'),
    ('[dead-letter]\ndiscard = yes\n',
     '[dead-letter] discard = yes: what can never become a record is thrown away'),
])
def test_what_is_seldom_meant_is_a_warning(program, more, warning):
    (program.directory / 'secret').write_text('s3cret\n')
    base = VALID.replace('topic = orders\n', '') if 'topic =' in more else VALID
    base = base.replace('store = sqlite\n', '') if '[aerospike]' in more else base
    program.write((base + more).replace('{directory}', str(program.directory)))
    assert program.run('check').stderr == f'warning: {program.path}: {warning}\n'
    assert program.run('-q', 'config').stderr == ''


def test_paths_that_the_service_may_not_write_to_are_named(program, monkeypatch, capsys):
    """Where a package is installed."""
    monkeypatch.setattr('xmsrv.UNIT_FILE', __file__)
    program.write('[nsq]\nnsqd-tcp-address = a:1\ntopic = orders\n[aerospike]\nhosts = a:1\nnamespace = n\n'
                  '[metrics]\ntextfile = /var/lib/node_exporter/x.prom\n[dead-letter]\nfile = '
                  '/var/lib/x-msrv-other/d\n')
    monkeypatch.setattr('os.path.isdir', lambda path: True)
    assert main(['-c', str(program.path), 'check']) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.rpartition('=')[2] for line in told] == ['/var/lib/x-msrv-other', '/var/lib/node_exporter']


def test_root_becomes_the_user_of_the_package(program, monkeypatch):
    """Its groups, too, and before it opens anything; not where that is not wished, nor for what opens nothing."""
    done = []
    user = SimpleNamespace(pw_uid=12, pw_gid=34, pw_dir='/nonexistent')
    monkeypatch.setattr('pwd.getpwnam', {'x-msrv': user}.__getitem__)
    monkeypatch.setattr('os.geteuid', lambda: 0)
    monkeypatch.setenv('HOME', '/root')
    for name in ('initgroups', 'setgid', 'setuid'):
        monkeypatch.setattr(f'os.{name}', lambda *values, name=name: done.append((name, *values)))
    for args in (['--as-root', 'check'], ['check', '--as-root'], ['config', '--sample'], ['completion', 'bash']):
        main(['-c', '/nonexistent', *args])
    assert done == []
    assert main(['-c', '/nonexistent', 'once']) == 69
    assert done == [('initgroups', 'x-msrv', 34), ('setgid', 34), ('setuid', 12)]


def test_the_dead_letters_of_an_ephemeral_topic_have_a_name_that_nsq_takes(program, nsqd):
    """It once was orders#ephemeral.dead, which nsqd refuses."""
    nsqd.create('orders#ephemeral', 'x-msrv')
    nsqd.publish('orders#ephemeral', b'no json')
    program.configure(nsqd, topic='"orders#ephemeral"', dead_letter={'topic': None}, nsq={'max-messages': 1})
    assert servers.summary(program.run('once').stderr)['dead'] == 1
    assert nsqd.drain('orders.dead', 'x-msrv-replay', expected=1)[0].endswith(b'\nno json')


# --- secrets, certificates

def test_credential_is_one_of_systemd(program, monkeypatch):
    (program.directory / 'nsq').write_text('s3cret\n')
    program.write(VALID.replace('{directory}', str(program.directory)) + 'auth-secret-file = credential:nsq\n[[tls]]\n')
    monkeypatch.setenv('CREDENTIALS_DIRECTORY', str(program.directory))
    assert program.run('check').stderr == ''
    shown = program.run('config').stdout
    assert 'auth-secret-file = credential:nsq\n' in shown and 's3cret' not in shown
    monkeypatch.setenv('CREDENTIALS_DIRECTORY', '/nonexistent')
    assert 'No such file or directory' in program.run('check', expect=69).stderr


def test_good_certificates_are_no_fault(program):
    authority = trustme.CA()
    made = authority.issue_cert('localhost')
    authority.cert_pem.write_to_path(program.directory / 'ca.pem')
    made.private_key_pem.write_to_path(program.directory / 'key.pem')
    made.cert_chain_pems[0].write_to_path(program.directory / 'cert.pem')
    lines = '[[tls]]\nca-file = {directory}/ca.pem\ncert-file = {directory}/cert.pem\nkey-file = {directory}/key.pem\n'
    program.write((VALID + lines).replace('{directory}', str(program.directory)))
    assert program.run('check').stderr == ''


# --- --set

def shown(program, *args):
    """The effective configuration, parsed."""
    return configobj.ConfigObj(program.run(*args).stdout.splitlines(), interpolation=False).dict()


def test_set_goes_over_the_file_before_and_after_the_command(program):
    program.write(VALID.replace('{directory}', str(program.directory)) + 'max-messages = 1\n')
    assert shown(program, '--set', 'nsq.max-messages=2', 'config')['nsq']['max-messages'] == '2'
    assert shown(program, 'config', '--set', 'nsq.max-messages=3')['nsq']['max-messages'] == '3'
    both = shown(program, '--set=nsq.max-messages=2', '--set=timeout=1m', 'config', '--set=nsq.max-messages=3')
    assert (both['nsq']['max-messages'], both['timeout']) == ('3', '1m')


@pytest.mark.parametrize('setting, section, option, value', [
    ('timeout=1m', (), 'timeout', '1m'),
    ('nsq.nsqd-tcp-address=a:1, [::1]:2', ('nsq',), 'nsqd-tcp-address', ['a:1', '[::1]:2']),
    ('record.bins.customer_reference=ref', ('record', 'bins'), 'customer_reference', 'ref'),
    (r'record.bins.items[0].a\.b=first', ('record', 'bins'), r'items[0].a\.b', 'first'),
    ('message.fields.customer.id=integer', ('message', 'fields'), 'customer.id', 'integer'),
    ('message.fields.id=integer, required, min 1', ('message', 'fields'), 'id', ['integer', 'required', 'min 1']),
    ('message.fields.id=string, "match [a,b]=#"', ('message', 'fields'), 'id', ['string', 'match [a,b]=#']),
    ('sqlite.set=', ('sqlite',), 'set', ''),
    ('sqlite.set=a=b', ('sqlite',), 'set', 'a=b'),
    ('nsq.tls.ca-file=/etc/ssl/certs/ca-certificates.crt', ('nsq', 'tls'), 'ca-file',
     '/etc/ssl/certs/ca-certificates.crt'),
])
def test_set_reaches_every_section_and_takes_lists(setting, section, option, value):
    raw = {}
    apply_setting(raw, command_line_setting(setting))
    for part in section:
        raw = raw[part]
    assert raw == {option: value}


@pytest.mark.parametrize('setting, rule', [
    ('timeout.a=1', 'timeout is an option, not a section'),
    ('nsq.topic="a', 'the value cannot be read; quote the value'),
    ('nsq.channel=tail#ephemeral', 'the value cannot be read; quote the value'),
    ('nsq.channel=tail # ephemeral', 'the value cannot be read; quote the value'),
    ('message.fields.id=string, match #a', 'the value cannot be read; quote the value'),
])
def test_a_bad_set_is_a_fault_that_quotes_it(program, setting, rule):
    program.write('timeout = 1s\n' + VALID.replace('{directory}', str(program.directory)))
    assert program.run('--set', setting, 'check', expect=78).stderr == f'error: --set {setting}: {rule}\n'


@pytest.mark.parametrize('setting', ['nsq.max-messages', '=1', 'nsq.=1', ''])
@pytest.mark.parametrize('command', [['check'], ['daemon'], ['config', '--sample'], ['completion', 'bash']],
                         ids=lambda command: command[0])
def test_64_is_a_set_that_has_no_option_or_no_value(program, setting, command):
    """A fault of the command line: before or after any command, and whatever the file is."""
    for args in (['--set', setting, *command], [*command, '--set', setting]):
        done = program.run(*args, expect=64)
        assert (done.stdout, done.stderr) == ('', f'error: --set {setting}: not SECTION.OPTION=VALUE\n')


def test_78_is_a_set_of_an_option_that_there_is_not(program):
    program.write(VALID.replace('{directory}', str(program.directory)))
    assert 'no such section' in program.run('--set', 'nosuch.option=1', 'check', expect=78).stderr


def test_a_fault_that_was_set_is_reported_like_one_of_the_file(faults):
    assert faults(VALID, '--set', 'message.fields.id=string, match a{1,2}', '--set', 'message.fields.a=list, min') == [
        "[message] [[fields]] id = string, match a{1, 2}: no rule '2}'; there are required, min, max, one-of, match; "
        'quote a rule that holds a comma: "match a{1,2}"',
        '[message] [[fields]] a = list, min: min needs an argument (quote the rule if it has a # in it)']
    assert faults(VALID, '--set', 'nsq.max-mesages=1', '--set', 'record.bins.a=a_bin_name_too_long') == [
        '[nsq] max-mesages = 1: no such option; did you mean max-messages?',
        '[record] [[bins]] a = a_bin_name_too_long: 19 bytes; a bin name has 15 at most']


@settings(deadline=None)
@given(st.text(max_size=30) | st.builds('{}.{}={}'.format, *[st.text('ab."\'#,\n[]=', max_size=8)] * 3))
def test_any_set_is_laid_over_or_refused(setting):
    raw = {'a': 'b', 'b': {'a': 'b'}}
    try:
        apply_setting(raw, command_line_setting(setting))
    except (ConfigError, UsageError) as error:
        assert str(error).startswith(f'--set {escape_controls(setting)}: ')
        assert isinstance(error, UsageError) == str(error).endswith(': not SECTION.OPTION=VALUE')
    else:
        assert '=' in setting


# --- the environment

def test_the_environment_goes_over_the_file_and_set_over_both(program):
    program.write('timeout = 1s\n' + VALID.replace('{directory}', str(program.directory)) + 'max-in-flight = 1\n')
    program.extra = {'XMSRV__TIMEOUT': '2s', 'XMSRV__NSQ__MAX_MESSAGES': '2', 'XMSRV__NSQ__TLS__CA_FILE': AUTHORITIES,
                     'XMSRV__NSQ__NSQD_TCP_ADDRESS': 'a:1, [::1]:2', 'XMSRV__RECORD__BINS__customerId': '"a,b"',
                     'XMSRV__MESSAGE__FIELDS__customerId': 'integer, min 1',
                     'XMSRV_PORT': 'tcp://10.0.0.1:80', 'XMSRV_TIMEOUT': 'x'}
    found = shown(program, '--set=timeout=3s', 'config')
    assert (found['timeout'], found['nsq']['max-messages'], found['nsq']['max-in-flight']) == ('3s', '2', '1')
    assert found['nsq']['tls']['ca-file'] == AUTHORITIES
    assert found['nsq']['nsqd-tcp-address'] == ['a:1', '[::1]:2']
    assert found['message']['fields'] == {'customerId': ['integer', 'min 1']}
    assert found['record']['bins'] == {'customerId': 'a,b'}


def test_a_path_is_spelled_in_a_variable_as_in_the_file(program, nsqd):
    """As x-msrv.conf(5) has it; the same path of the file gives way."""
    program.configure(nsqd, nsq={'max-messages': 1}, message={'fields': {'customer.address.city': 'integer'}})
    program.extra = {'XMSRV__MESSAGE__FIELDS__customer.address.city': 'string, max 40',
                     'XMSRV__RECORD__BINS__items[0].id': 'first', r'XMSRV__RECORD__BINS__a\.b': 'short',
                     r'XMSRV__RECORD__BINS__c\[$d\\': 'odd', 'XMSRV__RECORD__BINS__$topic': 'topic'}
    found = shown(program, 'config')
    assert found['message']['fields'] == {'customer.address.city': ['string', 'max 40']}
    assert found['record']['bins'] == {'items[0].id': 'first', r'a\.b': 'short', r'c\[$d\\': 'odd', '$topic': 'topic'}
    nsqd.publish('orders', json.dumps({'customer': {'address': {'city': 'Bern'}}, 'items': [{'id': 7}], 'a.b': 1,
                                       'c[$d\\': 2}).encode())
    assert servers.summary(program.run('once').stderr)['stored'] == 1
    (_, _, bins, _), = program.rows()
    assert {name: bins[name] for name in ('first', 'short', 'odd', 'topic')} == {
        'first': 7, 'short': 1, 'odd': 2, 'topic': 'orders'}


@pytest.mark.parametrize(('variable', 'rule'), [
    ('XMSRV__RECORD__BINS__a..b', "no path at '..b'"), ('XMSRV__RECORD__BINS__a[x]', "no path at '[x]'"),
    ('XMSRV__RECORD__BINS__a[0', "no path at '[0'"), ('XMSRV__RECORD__BINS__$x', 'there is $attempts'),
    ('XMSRV__RECORD__BINS__"a.b', 'no such')])
def test_a_variable_that_spells_no_path_is_a_fault(program, variable, rule):
    program.write(VALID.replace('{directory}', str(program.directory)))
    program.extra = {variable: 'b'}
    if rule == 'no such':   # a quote is a part of the name
        assert shown(program, 'config')['record']['bins'] == {'"a.b': 'b'}
    else:
        assert program.run('check', expect=78).stderr.startswith(f'error: environment: {variable} = b: {rule}')


def test_the_environment_alone_is_enough(program, nsqd):
    """As in a container: the file is an empty one. The workers of a daemon hear of it by their parent."""
    nsqd.publish('orders', [b'{"id": 1}', b'{"id": 2}'])
    program.write('')
    program.extra = {'XMSRV__STATE_DIR': str(program.directory), 'XMSRV__STORE': 'sqlite',
                     'XMSRV__NSQ__TOPIC': 'orders',
                     'XMSRV__NSQ__NSQD_TCP_ADDRESS': nsqd.tcp, 'XMSRV__SQLITE__PATH': str(program.database)}
    assert servers.summary(program.run('once').stderr)['stored'] == 2
    nsqd.publish('orders', b'{"id": 3}')
    program.extra |= {'XMSRV__WORKERS': '2', 'XMSRV__PERIOD': '100ms', 'XMSRV__IDLE_TIMEOUT': '50ms'}
    program.start('daemon')
    servers.wait_until(lambda: len(program.rows()) == 3, 'a worker stores the third')
    assert program.run('-c', '/dev/null', 'check').stdout == '/dev/null: no fault found\n'


def test_a_fault_of_the_environment_names_its_variable_beside_those_of_the_file(program):
    program.write(VALID.replace('{directory}', str(program.directory)) + 'max-in-flight = 0\n')
    program.extra = {'XMSRV__NSQ__TOPIC': 'a b', 'XMSRV__NSQ__TOPIK': 'orders', 'XMSRV__TOPIC': 'orders',
                     'XMSRV__RECORD__TTL': '1h', 'XMSRV__MESSAGE__FIELDS__id': 'int', 'XMSRV__MESSAGE__FIELDS__': 'any',
                     'XMSRV__NSQ__MAX_HELD': '1KB', 'XMSRV__': '', 'XMSRV__DEAD_LETTER__FILE': '/nonexistent/d'}
    told = program.run('--set=nsq.max-held=2KB', 'check', expect=78).stderr.removeprefix('error: ').splitlines()
    assert sorted(told) == sorted([
        'environment: XMSRV__NSQ__TOPIC = a b: not a name for NSQ: letters, digits, . _ - and at the end perhaps '
        '#ephemeral',
        'environment: XMSRV__NSQ__TOPIK = orders: no such option; did you mean XMSRV__NSQ__TOPIC?',
        'environment: XMSRV__TOPIC = orders: no such option; did you mean XMSRV__NSQ__TOPIC?',
        'environment: XMSRV__ = : no such option',
        'environment: XMSRV__MESSAGE__FIELDS__ = any: no such option; did you mean XMSRV__MESSAGE__FIELDS__NAME?',
        "environment: XMSRV__MESSAGE__FIELDS__id = int: no type 'int'; there are " + ', '.join(TYPE_CHECKS),
        'environment: XMSRV__RECORD__TTL: store = sqlite keeps records for ever: leave it at default',
        'environment: XMSRV__DEAD_LETTER__FILE = /nonexistent/d: its directory is not there',
        f'{program.path}: [nsq] max-in-flight = 0: at least 1',
        f'{program.path}: [nsq] max-held = 2KB: not a size such as 4096, 64KiB, 32MiB',   # --set is the stronger
    ])


@pytest.mark.parametrize('variable, value, rule', [
    ('XMSRV__NSQ__TOPIC', 'tail#ephemeral', 'the value cannot be read; quote the value'),
    ('XMSRV__SQLITE__SET', 'two\nlines', 'the value cannot be read; quote the value'),
    ('XMSRV__NSQ__TLS__CA_FILE', 'x', 'tls is an option, not a section'),
    ('XMSRV__SQLITE__SET', 'a\udcff', 'not UTF-8'),
    ('XMSRV__RECORD__BINS__\udcff', 'a', 'not UTF-8'),
])
def test_a_value_of_the_environment_that_is_none_is_a_fault(program, variable, value, rule):
    program.write(VALID.replace('{directory}', str(program.directory)) + 'tls = x\n')
    program.extra = {variable: value}
    said = f'error: environment: {variable}: {rule}\n'.encode('ascii', 'backslashreplace').decode()
    assert program.run('check', expect=78).stderr == said


@pytest.mark.parametrize('option', OPTIONS, ids=lambda option: f'{option.section}.{option.name}')
def test_each_option_has_a_variable_of_its_own(option):
    variable = option.variable
    assert re.fullmatch('XMSRV__[A-Z_]*[A-Z](__)?', variable)
    free = ('a.b_C',) if option.default is None else ()
    found, = environment_settings({variable + ''.join(free): 'x', 'HOME': '/'})
    assert found.path == (*filter(None, option.section.split('.')), option.name, *free)
    assert variable_path(variable + '_X') in ((), (*found.path[:-1], '_X'))


@given(st.dictionaries(st.from_regex('XMSRV_{0,3}([A-Z]{1,3}|NSQ|TOPIC|MESSAGE|FIELDS|_{1,3}){0,4}', fullmatch=True),
                       st.text(max_size=3)))
def test_a_variable_of_that_prefix_is_an_option_or_a_fault(environment):
    settings, faults = environment_settings(environment), unknown_variables(environment)
    named = [setting.variable for setting in settings] + [fault.variable for fault in faults]
    assert sorted(named) == sorted(name for name in environment if name.startswith('XMSRV__'))


# --- config

def test_config_says_where_each_value_comes_from_that_is_not_the_default(program):
    program.write('timeout = 10s\n' + VALID.replace('{directory}', str(program.directory)) + '''max-messages = 1
        max-in-flight = 1
        [message]
        [[fields]]
        id = integer
        ''')
    program.extra = {'XMSRV__NSQ__MAX_IN_FLIGHT': '2', 'XMSRV__NSQ__CHANNEL': 'other', 'XMSRV__PERIOD': '10s',
                     'XMSRV__MESSAGE__FIELDS__name': 'string', 'XMSRV__NSQ__MAX_MESSAGES': '2'}
    text = program.run('config', '--set', 'nsq.max-messages=3', '--set', 'nsq.tls.ca-file=').stdout
    origins = re.findall('^# from (.*)\n(.*?) =', text, re.MULTILINE)
    assert sorted(origins) == sorted([
        ('the file', 'state-dir'), ('the file', 'store'), ('the file', 'nsqd-tcp-address'), ('the file', 'topic'),
        ('the environment: XMSRV__NSQ__MAX_IN_FLIGHT', 'max-in-flight'), ('--set', 'max-messages'),
        ('the environment: XMSRV__NSQ__CHANNEL', 'channel'), ('the file', 'id'),
        ('the environment: XMSRV__MESSAGE__FIELDS__name', 'name')])
    assert text.count('# from') == len(origins)



def test_the_sample_is_the_full_file_that_is_shipped(program):
    full = servers.ROOT / 'etc' / 'x-msrv-full.conf'
    assert program.run('config', '--sample').stdout.encode() == full.read_bytes()


def test_the_sample_has_every_option_at_its_default(program):
    text = re.sub(r'^# (?=\[\[|[a-z-]+ =)', '', program.run('config', '--sample').stdout, flags=re.MULTILINE)
    for option in OPTIONS:
        if option.default is not None:
            assert f'\n{option.name} = {option.default}'.rstrip() + '\n' in text


@pytest.mark.parametrize('name', ['x-msrv.conf', 'x-msrv-local.conf', 'x-msrv-orders.conf', 'x-msrv-documents.conf',
                                  'x-msrv-tenants.conf'])
def test_the_shipped_files_are_valid(program, name):
    done = program.run('-c', servers.ROOT / 'etc' / name, 'check')
    assert done.stderr == ''


def authority(directory):
    """The file of a certificate authority."""
    path = directory / 'ca.pem'
    trustme.CA().cert_pem.write_to_path(path)
    return path


def test_the_full_file_needs_only_a_topic_an_address_and_a_namespace(program):
    """Its commented lines are as good: with all of them it is valid, too."""
    full = servers.ROOT / 'etc' / 'x-msrv-full.conf'
    needed = ['--set=nsq.topic=t', '--set=nsq.nsqd-tcp-address=a:1']
    needed += ['--set=aerospike.hosts=a:1', '--set=aerospike.namespace=n']
    assert program.run('-c', full, *needed, 'check').stderr == ''
    assert len(program.run('-c', full, 'check', expect=78).stderr.splitlines()) == len(needed)
    program.write(re.sub(r'^# (\[\[\w+\]\]|[a-z-]+ =)$', r'\1', full.read_text(), flags=re.MULTILINE))
    assert program.path.read_text().count('\n[[tls]]\n') == 2
    needed.append(f'--set=aerospike.tls.ca-file={authority(program.directory)}')
    needed += ['--set=record.key=id', '--set=record.delete.field=op', '--set=record.delete.values=d']
    assert program.run(*needed, 'check').stderr == ''


def test_config_read_back_gives_the_same(program):
    program.write(VALID.replace('{directory}', str(program.directory)) + '''
        [message]
        [[fields]]
        id = integer, required
        code = string, "match [a-c, ]{1,4}", "one-of a, b|c"
        text = string,
        "a # b" = any
        [record]
        [[bins]]
        code = "a,b"
        "q=uote" = 'it is "x"'
        text = " x "
        [sqlite]
        set = "it's # 1"
        path = """both ' and " quotes"""
        ''')
    first = program.run('config').stdout
    program.write(first)
    assert program.run('config').stdout == first
    read = configobj.ConfigObj(first.splitlines(), interpolation=False)
    assert read['message']['fields'] == {'id': ['integer', 'required'], 'text': ['string'], 'a # b': 'any',
                                         'code': ['string', 'match [a-c, ]{1,4}', 'one-of a, b|c']}
    assert read['record']['bins'] == {'code': 'a,b', 'q=uote': 'it is "x"', 'text': ' x '}
    assert read['sqlite']['set'] == "it's # 1"
    assert read['sqlite']['path'] == 'both \' and " quotes'


# What an INI file can say: configobj has no escapes, so a text with both kinds of triple quotes has no form.
values = st.text(st.characters(codec='utf-8', exclude_characters='\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'),
                 max_size=8).filter(lambda text: not re.search("\"\"\"|'''|[\"']$", text))


@settings(deadline=None)
@given(values | st.lists(values, max_size=3), st.dictionaries(values.filter(str.strip), values, max_size=3))
@example('"quoted"', {})
@example("'quoted'", {'"a"': '"b"'})
@example('a"b', {'# a': ' b', '[a]': '[b]', 'a = b': 'c'})
@example(['', 'a'], {})
@example([], {})
@example('it\'s "both", really', {})
def test_any_value_survives_config(value, names):
    if isinstance(value, list):
        value = [item for item in value if not ('"' in item and "'" in item)]
    raw = {'sqlite': {'set': value}, 'record': {'bins': {name.strip(): item for name, item in names.items()}}}
    text = dump_config(raw)
    read = configobj.ConfigObj(text.splitlines(), interpolation=False).dict()
    assert (read['sqlite']['set'] or '') == (value or '')
    assert read['record'].get('bins', {}) == raw['record']['bins']
    assert dump_config(read) == text


@pytest.mark.parametrize('names', [{'=': 'a'}, {'[': 'c'}, {'\xa0a\u2003': '\u2003b\xa0'}, {"it's=": "it's"}])
def test_a_name_that_configobj_would_leave_bare_survives_config(names):
    """With an equals sign, a bracket, or a blank that is none of ASCII's."""
    read = configobj.ConfigObj(dump_config({'record': {'bins': names}}).splitlines(), interpolation=False)
    assert read['record']['bins'] == names


def test_config_refuses_what_no_file_can_hold(program):
    """INI has no escapes, and --set does not need them for a name."""
    program.write(VALID.replace('{directory}', str(program.directory)))
    said = program.run('config', '--set', 'record.bins.\'a"=b', expect=78).stderr
    rule = 'no file can hold it, for it has quotes of both kinds'
    assert said == f'error: --set or environment: [record] [[bins]] \'a" = b: {rule}\n'
    said = program.run('config', '--set', 'record.bins.a\nb=c', expect=78).stderr
    rest = 'no file can hold it, for it has a line end in its name'
    assert said == rf'error: --set or environment: [record] [[bins]] a\nb = c: {rest}' + '\n'
    with pytest.raises(ConfigError, match=rf'\[sqlite\] set = .*: {rule}'):
        dump_config({'sqlite': {'set': ['a', 'b\'"']}})


def test_config_shows_every_option_and_runs_alone(program):
    """Each default is spelled out, TLS only where it is on."""
    program.write(VALID.replace('{directory}', str(program.directory)))
    found = shown(program, 'config')
    expected = {option.name for option in OPTIONS if option.default is not None and '.' not in option.section}
    assert {name for part in [found, *filter(lambda v: isinstance(v, dict), found.values())]
            for name, value in part.items() if not isinstance(value, dict)} == expected
    assert shown(program, '--set=nsq.tls.cert-file=', 'config')['nsq']['tls'] == {
        'ca-file': '', 'cert-file': '', 'key-file': ''}


# --- command line

@pytest.mark.parametrize('args', [
    (), ('nonsense',), ('--nonsense', 'once'), ('once', 'twice'), ('-v', '-q', 'once'), ('replay', '--limit', '0'),
    ('replay', '--limit', 'x'), ('--set',), ('check', '--sample')])
def test_wrong_usage_is_said_in_one_line(program, args):
    done = program.run(*args, expect=64)
    assert done.stdout == ''
    assert re.fullmatch(r'x-msrv( \w+)?: .*; see x-msrv( \w+)? --help\n', done.stderr)


def test_an_unknown_command_is_answered_with_those_of_the_manual(program):
    """Not with the one that only the daemon starts."""
    manual = (servers.ROOT / 'man/x-msrv.8').read_text()
    part = manual.partition('The commands are:')[2].partition('.El')[0]
    names = re.findall(r'^\.It Cm (\w+)', part, re.MULTILINE)
    assert program.run('frobnicate\x1b', expect=64).stderr == (
        "x-msrv: argument COMMAND: invalid choice: 'frobnicate\\x1b' (choose from " + ', '.join(names) +
        '); see x-msrv --help\n')


@pytest.mark.parametrize('args, rule', [
    (('--limit', '0'), '--limit: 0: at least 1'), (('--rate', 'x'), '--rate: x: not a whole number'),
    (('--since', 'x'), '--since: x: not a duration such as')])
def test_an_argument_of_replay_says_its_rule(program, args, rule):
    assert f'argument {rule}' in program.run('replay', *args, expect=64).stderr


def test_help_fits_one_screen_and_names_every_command_and_status(program):
    text = program.run('--help').stdout
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 110
    for word in ('once', 'check', 'replay', 'config', '--set', '--connect', '-c FILE', '/etc/x-msrv/x-msrv.conf'):
        assert word in text
    for status in ('0', '64', '65', '69', '70', '75', '78'):
        assert re.search(rf'\b{status} [a-z]', text), status


@pytest.mark.parametrize('command', ['once', 'check', 'replay', 'config'])
def test_each_command_has_its_help(program, command):
    assert f'usage: x-msrv {command}' in program.run(command, '--help').stdout


def test_version(program):
    assert re.fullmatch(r'x-msrv \d+\.\d+\.\d+\n', program.run('--version').stdout)


def test_a_reader_that_goes_away_is_no_error(program):
    process = program.popen('config', '--sample', stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait(timeout=10) == 0


# --- validators: value in, typed value out, or a ValueError of one sentence

@pytest.mark.parametrize('check, value, expected', [
    (parse_duration, '500ms', 0.5), (parse_duration, '10s', 10), (parse_duration, '5m', 300),
                                                    (parse_duration, '2h', 7200),
    (parse_duration, '30d', 2592000), (parse_duration, '1.5s', 1.5), (parse_duration, '10 s', 10),
    (parse_duration, '1.1h', 3960), (ttl_parser(), '1.1h', 3960), (ttl_parser(), '0.7d', 60480),
    (parse_size, '4096', 4096), (parse_size, '64KiB', 65536), (parse_size, '32MiB', 33554432),
                                                    (parse_size, '1GiB', 1 << 30),
    (parse_size, '1.5KiB', 1536), (parse_count, '0', 0), (parse_positive, '1', 1),
    (parse_address, 'nsqd.example:4150', ('nsqd.example', 4150)), (parse_address, '192.0.2.1:1', ('192.0.2.1', 1)),
    (nsqd_address, '/run/nsqd.sock', ('/run/nsqd.sock', 0)), (nsqd_address, 'a:1', ('a', 1)),
    (lookupd_address, 'a:4161', 'http://a:4161'), (lookupd_address, 'http://[::1]:4161', 'http://[::1]:4161'),
    (lookupd_address, 'https://a.example', 'https://a.example:443'), (lookupd_address, 'https://a:1', 'https://a:1'),
    (lookupd_address, 'https://[::1]', 'https://[::1]:443'),
    (parse_address, '[::1]:4150', ('::1', 4150)), (parse_address, '[fe80::1%eth0]:65535', ('fe80::1%eth0', 65535)),
])
def test_a_value_is_read(check, value, expected):
    assert check(value) == pytest.approx(expected) if isinstance(expected, float) else check(value) == expected


@pytest.mark.parametrize('check, value', [
    *((parse_duration, value) for value in ('', '10', 's', '-1s', '1e3s', '10 sec', '1s2', '0s', '0.0ms', 'inf', 'nan',
                                            '1,5s', '1S', '1 d 2 h', '\u0661s', '9' * 400 + 's')),
    *((parse_size, value) for value in ('', '0', '-1', '1kb', '1KB', 'KiB', '0.1', '1e3', '1TiB', '9' * 400)),
    *((parse_count, value) for value in ('', '-1', '1.0', '0x10', '1_000', ' 1', '\u0661', '9' * 19)),
    *((parse_positive, value) for value in ('0', '00', '-1', '')),
    *((parse_address, value) for value in ('', 'host', 'host:', ':4150', 'host:0', 'host:65536', 'host:-1', '::1:4150',
                                           '[::1]', '[::g]:1', '[]:1', '[1.2.3.4]:1', 'http://host:1', 'a b:1',
                                           'u@host:1',
                                           'host:123456', 'host:\u0661')),
    *((lookupd_address, value)
      for value in ('', 'a', 'http://a', 'https://', 'https://a:', 'https://a:0', 'https://u@a',
                    'https://a/', 'https://a?b', 'ftp://a:1', '://a:1', '/run/nsqd.sock')),
    *((nsqd_address, value) for value in ('run/nsqd.sock', '/a\0b', '/' + '\u00e9' * 54, 'unix:/run/nsqd.sock')),
])
def test_rubbish_is_refused(check, value):
    with pytest.raises(ValueError) as caught:
        check(value)
    assert_a_sentence(str(caught.value))


def assert_a_sentence(text):
    """One line for a person: no Python in it."""
    assert text and '\n' not in text and len(text) < 1000
    assert 'unpack' not in text and 'invalid literal' not in text and 'could not convert' not in text


rubbish = st.text(max_size=12) | st.lists(st.text(max_size=6), max_size=3) | st.dictionaries(
    st.sampled_from(['integer', 'a:1', '', 'required']), st.text(max_size=3), max_size=2) | st.from_regex(
    r'(string|integer|number|list|any)?', fullmatch=True).flatmap(lambda kind: st.lists(st.builds(
        '{} {}'.format, st.sampled_from(['min', 'max', 'one-of', 'match', 'required']),
        st.text('0a1|.(-e', max_size=5)), max_size=2).map(lambda rules: [kind, *rules])) | st.from_regex(
    r'[0-9]{1,3}(\.[0-9]{1,2})?( ?(ms|s|m|h|d|KiB|MiB|GiB))?|\[?[0-9a-f:.]{1,9}\]?:[0-9]{1,6}', fullmatch=True)


@pytest.mark.parametrize('option', [o for o in OPTIONS if o.default is not None] + ['field'],
                         ids=lambda o: getattr(o, 'name', o))
def test_a_validator_returns_a_value_or_raises_a_sentence(option):
    check = parse_field if option == 'field' else option.check

    @settings(deadline=None)
    @given(rubbish)
    @example([])
    @example({})
    @example('9' * 400)
    @example('9' * 400 + 's')
    def any_value(value):
        try:
            typed = check(value)
        except ValueError as error:
            assert_a_sentence(str(error))
        else:
            assert not isinstance(value, dict)
            assert not isinstance(typed, float) or math.isfinite(typed)

    any_value()


@pytest.mark.parametrize('option', [o for o in OPTIONS if o.default], ids=lambda o: o.name)
def test_every_default_is_valid(option):
    assert option.check(option.default) is not None


def test_no_option_is_listed_twice():
    names = [(option.section, option.name) for option in OPTIONS]
    assert len(names) == len(set(names)) and all(option.help.endswith('.') or option.section for option in OPTIONS)


@pytest.mark.parametrize('command', ['check', 'config'])
def test_a_configuration_comes_through_a_pipe(program, command):
    """It can be read only once."""
    os.mkfifo(program.path)
    process = program.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.path.write_text(VALID.format(directory=program.directory))   # when the command has opened it
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, '')
    assert {'check': 'no fault', 'config': 'topic = orders'}[command] in stdout
