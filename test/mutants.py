"""Do the tests notice? Each mutant is one wrong line of the module; the tests have to fail on it.

    make mutants                     all of them
    make mutants ARGS=fsync          those with that word in their name or in that of their section

A mutant is changed in a copy of the module. First run the unit tests of its own section, then all of the unit floor; one
that survives these, and names tests of the end-to-end floor, runs those, which have to pass on the module as it is. The
last lines have the rate of each section, and of all. The exit status is 0 where at least RATE of all mutants are killed and
each could be judged. A mutant whose text does not stand in the module exactly once is an error: the module has changed,
and the mutant has to follow. So are tests that are not there: they fail on anything.
"""
# ruff: noqa: E501 - what is replaced, and by what, is easier to compare in one line each
import collections
import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import pytest

RATE = 0.9
KILLED, SURVIVED, EQUIVALENT, FAILED = 'killed', 'survived', 'equivalent', 'error'
MODULE = Path('xmsrv.py')
OPTIONS = ['-n', '0', '-x', '-q', '-p', 'no:cacheprovider', '--timeout', '20', '--assert=plain']   # a test that hangs has noticed, too
LONGEST = 300               # seconds for the tests of one mutant, before they count as hanging
NOTICED = {pytest.ExitCode.OK: False, pytest.ExitCode.TESTS_FAILED: True, pytest.ExitCode.INTERRUPTED: True}   # the last where the import fails

# The tests that come first, by the section in which a mutant stands: most often it is killed by one of these.
FIRST = {'fields of a message': ['rules', 'paths'], 'faults of the configuration': ['rules', 'paths'],
         'message and mapping': ['mapping', 'paths', 'sets_and_ttl', 'documents_and_types', 'deletion'],
         'nsqd protocol': ['consumer'], 'stores': ['store_results', 'sets_and_ttl', 'deletion'],
         'dead letters': ['letters'], 'batcher and breaker': ['batcher', 'schedule', 'runner'],
         'RDY and consumer': ['consumer', 'rdy'], 'window': ['window', 'runner'],
         'pipeline and once': ['schedule', 'pipeline', 'runner'], 'replay': ['letters'],
         'window runner': ['runner', 'schedule'], 'supervisor': ['runner'], 'HTTP': ['page'],
         'daemon': ['runner', 'schedule']}

class Mutant(typing.NamedTuple):
    """`old` becomes `new`. tests: arguments for pytest, of the end-to-end floor, where the unit floor can't see it.
    equivalent: why nobody can tell the mutant from the module; then it is not run."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str = ''


UNCHANGED = Mutant('the module as it is', '__version__ = ', '__version__ = ')


def end_to_end(file, names):
    """The arguments for some tests of a file of the end-to-end floor."""
    return f'test/end_to_end/{file}.py', '-k', names


MUTANTS = (
    # -- values of options, fields of a message, faults of the configuration
    Mutant('a relative path', 'if not os.path.isabs(path):', 'if False:', end_to_end('test_configuration', 'whole or relative')),
    Mutant('a credential outside of its directory', "if name in ('', '.', '..') or re.search('[/\\0]', name):", 'if False:',
           end_to_end('test_configuration', 'credential')),
    Mutant('limits that exclude each other', '    if least > most:\n', '    if False:\n'),
    Mutant('a word that another rule excludes', '                if not rule.accepts(value):\n                    raise ValueError',
           '                if False:\n                    raise ValueError'),
    Mutant('an integer that has over 64 bit', "if kind == 'integer' and not lowest <= value <= highest:", 'if False:'),
    Mutant('a key of any type', 'for kind in sorted(kinds[path].difference(fitting)):', 'for kind in ():'),
    Mutant('a bin of two options', '        if others:\n            yield Fault(*group[-1]', '        if False:\n            yield Fault(*group[-1]'),
    Mutant('a bin of a list that stays', 'and not any(isinstance(step, int) for step in path.steps))}', ')}'),

    # -- message and mapping
    Mutant('id without its checksum', "(b'%b-%x-%x' % (id, timestamp, zlib.crc32(body)))", "(b'%b-%x' % (id, timestamp))"),
    Mutant('id without its time', "(b'%b-%x-%x' % (id, timestamp, zlib.crc32(body)))", "(b'%b-%x' % (id, zlib.crc32(body)))"),
    Mutant('a name that comes twice', 'if len(members) != len(pairs):', 'if False:'),
    Mutant('a name that comes twice in a plain text', "if text.count(':') == decoded_members.total:", 'if True:'),
    Mutant('members are never counted again', '        decoded_members.to_skip -= 1\n', ''),
    Mutant('members are counted on', '    decoded_members.total = 0\n', ''),
    Mutant('infinite numbers', "    if math.isinf(value):\n", '    if False:\n'),
    Mutant('NaN', "STRICT_NUMBERS = {'parse_float': parse_finite, 'parse_constant': refuse_constant}", "STRICT_NUMBERS = {'parse_float': parse_finite}"),
    Mutant('long numbers pass', '            and LONG_NUMBER not in body.translate(DIGITS_TO_ZERO)\n', ''),
    Mutant('escapes pass', "(92 not in body or b'\\\\u' not in body)", '(True)'),
    Mutant('depth is not looked at', "body.count(b'[') + body.count(b'{') <= MAX_DEPTH", 'True'),
    Mutant('text after the value', 'if end == len(text) and value.__class__ is dict', 'if value.__class__ is dict'),
    Mutant('one level too many', '        if depth > MAX_DEPTH:\n', '        if depth > MAX_DEPTH + 1:\n'),
    Mutant('a lone surrogate', "re.search('[\\ud800-\\udfff]', value)", 'False'),
    Mutant('a boolean as key', "if key.__class__ is int or", 'if isinstance(key, int) or'),
    Mutant('an empty key', "key.__class__ is str and key:", 'key.__class__ is str:'),
    Mutant('a bin that is taken', 'if name in self.reserved_bins:', 'if False:'),
    Mutant('a long bin name', "            if len(name.encode()) > MAX_BIN_NAME:\n                raise InvalidMessage",
           '            if len(name) > MAX_BIN_NAME:\n                raise InvalidMessage'),
    Mutant('too many bins', 'if not 0 < len(bins) <= MAX_BINS:', 'if not 0 < len(bins) <= MAX_BINS + 2:'),
    Mutant('nulls are kept', '        if None in fields.values():\n            fields = self.without_nulls(fields)\n        if self.schema:',
           '        if self.schema:'),
    Mutant('a deleting value of another type', 'value.__class__ in self.types and (value.__class__, value) in self.values',
           'value in [each for _, each in self.values]'),
    Mutant('all is required of a delete', 'rule.required and not partial', 'rule.required'),
    Mutant('a tombstone for ever', 'return Deletion(key, bins, moment, set_, rule.keep)', 'return Deletion(key, bins, moment, set_)'),
    Mutant('a set of the server itself', 'if name.startswith(RESERVED_SET):', 'if False:'),
    Mutant('a ttl of nothing', 'not 1 <= seconds <= MAX_TTL):', 'not 0 <= seconds <= MAX_TTL):'),
    Mutant('a null inside is rejected by nobody', "if value is None and self.nulls == 'reject':", 'if False:'),
    Mutant('nothing is taken out of its object', 'if self.kept_names is not None and isinstance(source, Path):', 'if False:'),
    Mutant('an object is stored before what is taken out of it', '-len(pair[1].steps) if', 'len(pair[1].steps) if'),
    Mutant('base64 in any spelling', "a2b_base64(data), newline=False) == data", "a2b_base64(data), newline=False) != b'x'"),
    Mutant('an item beyond the end', 'step >= len(value):', 'step > len(value):'),
    Mutant('what lies inside is unknown to nobody', 'elif inner and value.__class__ is dict:', 'elif False:'),
    Mutant('a time that is no integer', "if moment.__class__ is not int:\n            raise InvalidMessage",
           'if moment is None:\n            raise InvalidMessage'),

    # -- nsqd protocol
    Mutant('heartbeats unanswered', "        if kind == RESPONSE and data == b'_heartbeat_':\n            self.send_command(nsq.nop())",
           "        if kind == RESPONSE and data == b'_heartbeat_':\n            pass"),
    Mutant('a silent nsqd never given up', 'silence = 2 * self.heartbeat_interval + 1', 'silence = 1e9'),
    Mutant('a late answer is an error', 'if kind == ERROR and data.startswith(LATE_ERRORS):', 'if False:'),
    Mutant('an error of nsqd passes', "        elif kind == ERROR:\n            raise NsqdError", "        elif kind == 99:\n            raise NsqdError"),
    Mutant('TLS that is not offered', "if not self.info.get('tls_v1'):", 'if False:'),
    Mutant('deflate that is not offered', "        if not self.info.get('deflate'):\n            raise", "        if not self.info.get('deflate'):\n            return\n            raise",
           end_to_end('test_links', 'refuses_deflate')),
    Mutant('no bound of what is inflated', 'self.inflater.decompress(self.deflated, READ_SIZE)', 'self.inflater.decompress(self.deflated)'),
    Mutant('deflated and not sent', ' + self.deflater.flush(zlib.Z_SYNC_FLUSH))', ')'),
    Mutant('the secret crosses in the clear', "    if not address.startswith('https://'):\n        return HTTP_TIMEOUTS\n", '', end_to_end('test_links', 'in_the_clear')),
    Mutant('the secret goes where an answer leads', ", 'follow_redirects': False}", '}', end_to_end('test_links', 'in_the_clear')),
    Mutant('auth that is not done', "if secret and not self.info.get('auth_required'):", 'if False:'),
    Mutant('closed before CLOSE_WAIT', 'await asyncio.wait_for(self.close_wait.wait(), CLOSE_TIMEOUT)', 'await asyncio.sleep(0)'),
    Mutant('no bound for CLOSE_WAIT', 'await asyncio.wait_for(self.close_wait.wait(), CLOSE_TIMEOUT)', 'await self.close_wait.wait()'),
    Mutant('messages behind CLS are not requeued',
           'self.consumer.requeue([message for message in self.consumer.in_flight.values() if message.conn is self])', 'pass'),
    Mutant('a part of a frame is no activity', "            if missing > 0:\n                self.last_data = self.last_read",
           '            if missing > 0:\n                pass'),
    Mutant('the rest of a read is lost', '        self.buffer = data[at:]', "        self.buffer = b''"),
    Mutant('each chunk is a whole frame', '            if missing > 0:\n', '            if False:\n',
           equivalent='unpack() keeps the rest of an unfinished frame for the next read: only slower with large frames'),

    Mutant('limits that nsqd refuses are not asked again', "if not str(error).startswith('E_BAD_BODY'):", 'if True:'),
    Mutant('TLS is left out', "        if tls:\n            await self.limit_step('TLS', self.start_tls(tls))\n", ''),
    Mutant('AUTH is left out', "        await self.limit_step('AUTH', self.authenticate(secret))\n", ''),
    Mutant('the name of the host is not verified', "server_hostname=self.address[0] if self.address[1] else 'localhost')", 'server_hostname=None)'),
    Mutant('a step without bound', 'async with time_limit(seconds,', 'async with time_limit(None,'),
    Mutant('a handshake that fails leaves its socket', '            await self.perform_handshake(features)\n        except BaseException:\n            self.close_socket()', '            await self.perform_handshake(features)\n        except BaseException:\n            pass'),
    Mutant('TLS that fails leaves its socket', '                    twin.shutdown(socket.SHUT_RDWR)', '                    pass'),
    Mutant('an answer of any size', 'if not 4 <= size <= MAX_RESPONSE:', 'if False:'),
    Mutant('heartbeats in the handshake', '                self.send_command(nsq.nop())\n            elif kind', '                pass\n            elif kind'),
    Mutant('any answer to SUB', "await self.limit_step('SUB', self.read_response(b'OK'))", "await self.limit_step('SUB', self.read_response())"),
    Mutant('the round trip is not measured', '        self.round_trip = asyncio.get_running_loop().time() - asked\n', ''),
    Mutant('a publish without bound', 'await asyncio.wait_for(self.pending_answer, PUBLISH_TIMEOUT)', 'await self.pending_answer'),
    Mutant('an error of a publish reaches nobody', '            self.close_socket()\n            self.resolve_answer(error)\n', '            self.close_socket()\n'),
    Mutant('a heartbeat is the answer to a publish', "        if kind == RESPONSE and data == b'OK':\n            self.resolve_answer()", '        if kind == RESPONSE:\n            self.resolve_answer()'),
    Mutant('limits of nsqd that are not read', "self.max_rdy = self.info.get('max_rdy_count', 2500)", 'self.max_rdy = 2500'),
    Mutant('TLS that nsqd wants is not told', "            if 'TLS required' in str(error):\n                raise", "            if False:\n                raise"),
    Mutant('a 404 of any web server', "error.code == 404 and json.loads(body)['message'] == 'TOPIC_NOT_FOUND'", 'error.code == 404'),
    Mutant('all nsqlookupds are waited for', '            bound.reschedule(asyncio.get_running_loop().time() + patience)', '            pass'),
    Mutant('no nsqlookupd is waited for', 'if any(answers.values()) and bound.when() is None:', 'if True:'),
    Mutant('one nsqlookupd that is down is all', 'if len(errors) == len(set(config.nsq.lookupd_http_address)):', 'if errors:'),
    Mutant('a thread for each who asks', '        if not future:\n            future = self.lookups', '        if True:\n            future = self.lookups'),
    Mutant('what a name server said is kept', '            future.add_done_callback(lambda _: self.lookups.pop(key))\n', ''),
    Mutant('the depth at another nsqd', "['tcp_port'] != tcp_port:", "['tcp_port'] == -1:"),
    Mutant('what waits in the topic is not counted', "return topic.get('depth', 0), channel_stats", 'return 0, channel_stats'),

    # -- stores
    Mutant('one key in all sets', 'return record.set or self.set, record.key', 'return self.set, record.key'),
    Mutant('all sets wait for one that is full', 'if self.record.set_field and FULL_SET in', 'if False and FULL_SET in'),
    Mutant('22 is tried again', '(8, 20, 22, 80, 81, 82)', '(8, 20, 80, 81, 82)'),
    Mutant('a stop is a refusal', '(-2, 4, 12, 21)', '(-2, 4, 12, 21, 22)'),
    Mutant('permanent errors are tried again', "'refused'),   # this message", "'retry'),   # this message"),
    Mutant('too big is tried again', "13: 'too-big'", "13: 'retry'"),
    Mutant('a busy record is an outage', "(14, 28, 120), 'busy'", "(14, 28, 120), 'retry'"),
    Mutant('no answer is an unknown answer', '(-15, -14, -10, -8, 7, 9, 11, 18)', '(-14, -10, -8, 7, 9, 11, 18)'),
    Mutant('commit level', 'aerospike.POLICY_COMMIT_LEVEL_ALL', 'aerospike.POLICY_COMMIT_LEVEL_MASTER'),
    Mutant('the key is not sent', 'key = aerospike.POLICY_KEY_SEND if self.options.send_key else', 'key ='),
    Mutant('the name of the cluster is not asked for', "            config['cluster_name'] = options.cluster_name\n", '            pass\n',
           end_to_end('test_cluster', 'another_name')),
    Mutant('inner addresses alone', "options.services_alternate,", 'False,', end_to_end('test_cluster', 'behind_a_nat')),
    Mutant('one node after the other', "'max_retries': 0, 'concurrent': True}", "'max_retries': 0}", end_to_end('test_cluster', 'at_the_same_time')),
    Mutant('no ttl', "'ttl': self.record.ttl}", "'ttl': 0}"),
    Mutant("the client's retries", "'max_retries': 0,", "'max_retries': 2,"),
    Mutant('a call without limit', "{'total_timeout': left,", "{'total_timeout': 0,"),
    Mutant('newest wins: always written', 'exp.LE(exp.IntBin(time_bin), 0)', 'exp.GE(exp.IntBin(time_bin), 0)'),
    Mutant('newest wins: the same time loses', 'exp.LE(exp.IntBin(time_bin), 0)', 'exp.LT(exp.IntBin(time_bin), 0)'),
    Mutant("newest wins: the record's policy only", "policy = {**self.policy, 'expressions'", "policy = {'expressions'"),
    Mutant('the first refused is rejected', "if meaning == 'refused' and self.write_accepted:", "if meaning == 'refused':"),
    Mutant('a refusal is proof', "PROVES_WRITABLE = ('stored', 'duplicate', 'filtered')", "PROVES_WRITABLE = ('stored', 'duplicate', 'filtered', 'stop')"),
    Mutant('the refused are never rejected', 'self.write_accepted = self.write_accepted or any', 'self.write_accepted = False and any'),
    Mutant('what was filtered is stale', "if TYPE_CHECKS['integer'](moment) and moment > record.time:", 'if True:'),
    Mutant('what was filtered is never stale', "if TYPE_CHECKS['integer'](moment) and moment > record.time:", 'if False:'),
    Mutant('an outage is halved', "if not parts or self.meanings.get(code) == 'retry':", 'if not parts:'),
    Mutant('halving loses an item', '[items[:middle], items[middle:]]', '[items[:middle], items[middle + 1:]]'),
    Mutant('halving has no deadline', '            elif time.monotonic() > deadline:\n', '            elif False:\n'),
    Mutant('wide records go with the others', 'default=0) > WIDE_RECORD:', 'default=0) > 1 << 30:'),
    Mutant('old servers', '    if numbers and tuple(map(int, numbers.groups())) < MIN_SERVER:', '    if False:'),
    Mutant('no advice for 22', "        if 'stop' in meanings:\n", '        if False:\n'),
    Mutant('the cause of an earlier batch', "            self.causes[code] = ''   #", '            pass   #'),
    Mutant('an answer that cannot be', ' if code not in impossible}', '}'),
    Mutant('a namespace full of sets is not named', 'if not self.record.set_field or len(set().union(*sets.values())) < MAX_SETS:', 'if True:'),
    Mutant('SQLite: every record is of the one set', 'SELECT coalesce(column1, ?1)', 'SELECT coalesce(?1, column1)'),
    Mutant('SQLite without fsync', "synchronous = FULL')", "synchronous = NORMAL')"),
    Mutant('SQLite: older wins', 'return STALE if moment > record.time else STORED', 'return STORED'),
    Mutant('SQLite: the same time loses', 'return STALE if moment > record.time', 'return STALE if moment >= record.time'),
    Mutant('SQLite: within a batch', '        stored[record_id] = record.bins\n', '        pass\n'),
    Mutant('SQLite: every error passes', "retryable=locked)", 'retryable=True)'),
    Mutant('SQLite: no error passes', "retryable=locked)", 'retryable=False)'),
    Mutant('SQLite: no rollback', "if self.db and self.db.in_transaction:", 'if False:'),
    Mutant('SQLite: a replaced file', 'if not os.path.samestat(os.stat(self.path), self.file):', 'if False:'),
    Mutant('SQLite: a retry writes what it merged before', 'records = [copy.copy(record) for record in records]', 'records = [*records]'),
    Mutant('SQLite: merged the wrong way', '{**stored.get(record_id, {}), **record.bins}', '{**record.bins, **stored.get(record_id, {})}'),
    Mutant('SQLite: removals as they come', 'order.sort(key=lambda index: isinstance(records[index], Deletion))', 'pass'),
    Mutant('SQLite: a tombstone never ends', "            self.db.execute(self.drop, (format_rfc3339(time.time()),))\n", '            pass\n'),
    Mutant("SQLite: a tombstone's end stays", ", ', expires_at = excluded.expires_at'\n", ", ''\n"),
    Mutant('removals with the other writes', 'if self.is_removal(write)] if self.removes else []', 'if False]'),
    Mutant('removals do not wait', "        due = [write for write in removals if not write.result]\n", '        due = removals\n'),
    Mutant('no record to remove is unknown', 'if write.result == NOT_FOUND and self.is_removal(write):', 'if False:'),
    Mutant('what is older undoes a removal', 'if stored.result == NOT_FOUND and self.removes:', 'if False:'),
    Mutant('a removal without its filter', "{**self.removal_policy, 'expressions': newest}", 'self.removal_policy'),
    Mutant('a removal proves the form of writes', 'self.write_accepted = self.write_accepted or bool(others)', 'self.write_accepted = True'),

    Mutant('one of several hosts is not enough', 'if len(self.options.hosts) == 1:', 'if True:'),
    Mutant('each copy of a record counts', "for facts in node.values()) // copies", "for facts in node.values())"),
    Mutant('a set that is full is not named', '        if limit and sum(', '        if False and sum('),
    Mutant('a ttl that is refused is not named', "return namespace.get('nsup-period') == '0' and", 'return False and'),
    Mutant('a batch-size over the limit is not named', 'if limit < self.options.batch_size]', 'if limit < 0]'),
    Mutant('why a host failed is not said', "'; '.join(connect_log.failed_hosts()) or truncate_text", 'truncate_text',
           tests=end_to_end('test_aerospike', 'refused or unreachable or reach or tls')),
    Mutant('a call without limit in the client', 'return min(INT32_MAX, max(50, int(seconds * 1000)))', 'return int(seconds * 1000)'),
    Mutant('wide records beyond the deadline', 'if len(write.ops) > WIDE_RECORD and time.monotonic() < deadline:', 'if len(write.ops) > WIDE_RECORD:'),
    Mutant('a stored time that cannot be read is stale', "return [WriteResult('retry', error.code,\n                                f'{self.where}: answer", "return [STALE] * len(records)\n            return [WriteResult('retry', error.code, f'{self.where}: answer"),
    Mutant('SQLite: another table is found out late', "        self.upsert([Record('', {}, None)])\n", '        pass\n'),
    Mutant('SQLite: what somebody else wrote is older', "if not isinstance(bins, dict):\n            return WriteResult", "if False:\n            return WriteResult"),
    Mutant('SQLite: sets share their keys', 'return record.set or self.set, record.key', 'return self.set, record.key'),

    # -- dead letters
    Mutant('no fsync of the file', "            os.fsync(fd)\n        except OSError:", '            pass\n        except OSError:'),
    Mutant('no fsync of the directory', "        if not end:\n            sync_directory(os.path.dirname(filename))", '        if not end:\n            pass'),
    Mutant('no fsync in sync_directory', "    try:\n        os.fsync(fd)\n    finally:", '    try:\n        pass\n    finally:'),
    Mutant('no fsync of the rewritten file', '        os.fsync(self.new_file.fileno())\n', '        pass\n'),
    Mutant('no last fsync of the rewritten file', 'self.new_file)   # what came meanwhile\n        self.sync_new_file()',
           'self.new_file)   # what came meanwhile\n        self.new_file.flush()'),
    Mutant('no fsync after the rename', '        sync_directory(os.path.dirname(self.topic))\n', ''),
    Mutant('no truncation of a torn write', '                os.ftruncate(fd, end)\n            raise', '                pass\n            raise'),
    Mutant('a torn line is joined', "(b'\\n' if torn else b'') + b''.join(lines)", "b''.join(lines)"),
    Mutant('an orphan is written to', '            if is_in_place(fd, filename):\n', '            if True:\n'),
    Mutant('appended without a lock', '            lock_file(fd, seconds)\n', '            pass\n'),
    Mutant('replay without its last lock', '        lock_file(self.file.fileno(), LOCK_TIMEOUT)\n', ''),
    Mutant('what came meanwhile is lost', 'shutil.copyfileobj(self.file, self.new_file)   # what', 'pass   # what'),
    Mutant('a file that was replaced meanwhile', 'if not is_in_place(self.file.fileno(), self.topic) or os', 'if os'),
    Mutant('a file that was cut meanwhile', ' or os.fstat(self.file.fileno()).st_size < self.size:', ':'),
    Mutant('mode of the new file', '        os.fchmod(fd, was.st_mode & 0o7777)\n', ''),
    Mutant('a replay that was killed left something', '        self.new_file.truncate()    #', '        pass    #'),
    Mutant('the letter that failed leaves the file', '        if message.key in self.stored_keys:\n', '        if message.key in self.stored_keys or message.key in self.failed:\n'),
    Mutant('no history', "'history': [*(history if isinstance(history, list) else ()), former][-MAX_HISTORY:]}", "'history': [former]}"),
    Mutant('a history without end', 'former][-MAX_HISTORY:]', 'former]'),
    Mutant('what the topic refused is kept by nobody', 'if unkept and self.file:', 'if False:'),
    Mutant('everything goes to the file, too', 'unkept = await self.append_to_file(list(unkept))', 'unkept = await self.append_to_file(list(messages))'),
    Mutant('a refused batch is not halved', '            if len(messages) > 1 and not self.closed and', '            if False and'),
    Mutant('a publish without answer is halved', ' and not isinstance(error, asyncio.TimeoutError):', ':'),
    Mutant('no answer is a refusal', 'refused = isinstance(error, NsqdError)', 'refused = True'),
    Mutant('a letter has the time of its failure', "'timestamp': str(message.timestamp), 'time'", "'timestamp': str(time.time_ns()), 'time'"),

    Mutant('a connection that was lost takes letters', 'if address not in self.connections or self.connections[address].is_closed:', 'if address not in self.connections:'),
    Mutant('a connection that refused stays open', 'self.connections.pop(address).close()', 'self.connections.pop(address)'),
    Mutant('a batch is halved while the run ends', 'if len(messages) > 1 and not self.closed and', 'if len(messages) > 1 and'),
    Mutant('no advice for letters that are refused', "hint = '; a file in [dead-letter] would keep it' if refused", "hint = '' if refused"),
    Mutant('a letter without a body', "            raise ValueError('it has no body')\n", '            pass\n'),

    # -- batcher and breaker
    Mutant('no byte limit of a batch', 'not messages or weight + len(self.pending[0].body) <= self.max_bytes', 'True'),
    Mutant('no record limit of a batch', 'while self.pending and len(messages) < self.size and', 'while self.pending and'),
    Mutant('no one-batch probe', 'len(self.calls) >= (1 if self.is_failing else self.writers)', 'len(self.calls) >= self.writers'),
    Mutant('no one-batch probe after an outage', 'BreakerState.CLOSED if health.is_up(backend) else BreakerState.HALF_OPEN', 'BreakerState.CLOSED'),
    Mutant('no maximum of the backoff', 'return min(self.longest, self.first * 2 ** min(self.tries - 1, 20))', 'return self.first * 2 ** min(self.tries - 1, 20)'),
    Mutant('a backoff that does not grow', '2 ** min(self.tries - 1, 20)) * random', '1) * random'),
    Mutant('a backoff that is not reset', '        self.state = BreakerState.CLOSED\n        self.backoff.reset_delay()', '        self.state = BreakerState.CLOSED'),
    Mutant('the breaker stays closed', '        self.state = BreakerState.OPEN\n', '        pass\n'),
    Mutant('the breaker never closes', '        self.state = BreakerState.CLOSED\n        self', '        self'),
    Mutant('no batch is halved', 'halves(self.messages) if self.failures >= FAILURES_TO_HALVE else []', '[]'),
    Mutant('an outage is blamed on the messages', 'to_blame = (batch.failures or batch.busy_rounds) and self.successes > batch.successes_before', 'to_blame = batch.failures > 3'),
    Mutant('the batch is never to blame', 'to_blame = (batch.failures or batch.busy_rounds) and self.successes > batch.successes_before', 'to_blame = False'),
    Mutant('only old batches probe', 'if self.retries and not probes_new:', 'if self.retries:'),
    Mutant('a busy record has no delay', '0.1 * 2 ** min(batch.busy_rounds, 6))', '0)'),
    Mutant('a stopped batcher goes on', "        if (self.stopped or self.breaker", '        if (self.breaker'),
    Mutant('health is not told of the outage', "            self.health.report_failure(self.backend, self.last_error, kind)\n", ''),
    Mutant('health is not told of the recovery', "        self.breaker.on_success()\n        self.health.report_recovery(self.backend)", '        self.breaker.on_success()'),
    Mutant('what is tried again beside what is undecided is forgotten', '            self.retry_records(batch, retry)\n', '                self.retry_records(batch, retry)\n'),
    Mutant('a letter is given up while its nsqd is away', " or result.outcome == 'unkept':", ':'),
    Mutant('a call that hangs is an outage though others succeed', 'is_silent = batcher.is_hanging(now) and now - batcher.succeeded_at > batcher.hanging_after', 'is_silent = batcher.is_hanging(now)'),
    Mutant('a call that hangs is not reported', '            self.report_hanging_calls(loop.time())\n', ''),
    Mutant('a store that hangs at the end of a window is up', '                    self.pipeline.health.report_failure(batcher.backend, batcher.last_error)\n', '                    pass\n'),
    Mutant('a refused letter is an outage', "(result.outcome == 'unkept' and result.reason != 'refused')", "result.outcome == 'unkept'"),

    Mutant('a store with a call under way is closed', '    if not executor.calls:\n', '    if True:\n'),
    Mutant('the last error of a task', 'self.error = self.error or task.exception()', 'self.error = task.exception()'),
    Mutant('a cancellation that is lost', '        while self.tasks:\n            for task in self.tasks:', '        if self.tasks:\n            for task in self.tasks:'),

    # -- RDY and consumer
    Mutant('RDY is raised before it is lowered', 'key=lambda pair: pair[1] - pair[0].rdy)', 'key=lambda pair: pair[0].rdy - pair[1])'),
    Mutant('RDY over max_rdy_count', 'more = min(budget, most - rdys[i],', 'more = min(budget,'),
    Mutant('idle nsqds take no turns', 'key=lambda i: states[i][2])', 'key=lambda i: 0)'),
    Mutant('RDY is not lowered by what came', '            self.deliver(fresh)\n            self.reduce_rdy(connection)', '            self.deliver(fresh)'),
    Mutant('RDY after the end', '        self.credit, self.deliver = lambda: 0, None\n        self.on_credit_change()', '        self.deliver = None'),
    Mutant('credit of a window leaks into the next', '        self.credit, self.deliver = credit, deliver\n        self.tick_due',
           '        self.deliver = deliver\n        self.tick_due'),
    Mutant('counts of a window leak into the next', '        self.requeued = self.late = 0\n        self.idle_since = None', '        self.idle_since = None'),
    Mutant('idleness of a window leaks into the next', '            connection.idle = connection.found_idle = False\n            connection.set_aside = 0', '            connection.set_aside = 0'),
    Mutant('what is set aside leaks into the next window', '            message.set_aside = False\n', '            pass\n'),
    Mutant('the RDY of what is set aside leaks into the next window', '            connection.set_aside = 0\n', ''),
    Mutant('a redelivery keeps its number of deliveries', '        first.attempts = second.attempts\n', ''),
    Mutant('what comes by an old RDY is read at full speed', 'return self.total > 2 * self.limit', 'return False'),
    Mutant('a flood is not read at all', '            await asyncio.sleep(RDY_TRANSIT)\n        return await super()', '            await asyncio.sleep(3600)\n        return await super()'),
    Mutant('max-held is not looked at', 'if credit <= 0 or volume.total >= volume.limit:', 'if credit <= 0:'),
    Mutant('no room for one message', 'return max(1, (self.limit - self.total)', 'return max(0, (self.limit - self.total)'),
    Mutant('held bytes only grow', '        self.in_flight_bytes.total -= sum([len(message.body) for message in messages])\n        self.late', '        self.late'),
    Mutant('a second copy is a second message', 'if self.in_flight.setdefault(message.key, message) is message]', 'if self.in_flight.setdefault(message.key, message)]'),
    Mutant('the answer goes to the first connection', 'first.conn, first.touched_at, first.received_at = second.conn,', '_, first.touched_at, first.received_at = second.conn,'),
    Mutant('a redelivery is touched too late', 'first.conn, first.touched_at, first.received_at = second.conn, second.touched_at, second.received_at', 'first.conn = second.conn'),
    Mutant('what is lost counts as answered', '            if connection.is_closed:\n                late', '            if False:\n                late'),
    Mutant('a refused REQ counts', "self.requeued -= data.startswith(b'E_REQ')", 'pass'),
    Mutant('TOUCH without end', '               and now - message.received_at < message.conn.max_msg_timeout]', '               ]'),
    Mutant('TOUCH at the end of msg-timeout', 'message.conn.msg_timeout / 2 - 2 * TICK_INTERVAL', 'message.conn.msg_timeout'),
    Mutant('TOUCH at every look', '        for message in due:\n            message.touched_at = now', '        for message in ():\n            message.touched_at = now'),
    Mutant('no TOUCH between windows', 'if self.in_flight and now - last_touch', 'if self.deliver and now - last_touch'),
    Mutant('idle before the answer could be there', 'now - connection.rdy_since - connection.round_trip >=', 'now - connection.rdy_since >='),
    Mutant('idle though messages come', 'if now - connection.last_data < connection.idle_delay:', 'if False:'),
    Mutant('idle though one nsqd is not', 'all(c.found_idle for c in self.connections)', 'any(c.found_idle for c in self.connections)'),
    Mutant('an nsqd that nobody names is connected again', '        while address in self.addresses:\n', '        while True:\n'),
    Mutant('the queue is up without an nsqd', "                self.health.report_failure('queue', f'nsqd {connection}: {error}' if was_up else self.failure_text)", '                pass'),
    Mutant('one nsqd of two is the queue', "        if self.connections or not was_up and self.health.is_up('queue'):", "        if not was_up and self.health.is_up('queue'):"),
    Mutant('a connection that ends at once begins the delays anew', 'if loop.time() - up_since >= backoff.longest:', 'if loop.time() >= up_since:'),
    Mutant('the first error of an outage stays', "            if was_up or self.has_tried_all():\n", '            if was_up:\n'),
    Mutant('delays of REQ in seconds', "(b'REQ %%s %d\\n' % (delay * 1000), messages)", "(b'REQ %%s %d\\n' % delay, messages)"),
    Mutant('what is set aside uses up RDY', 'rdys = [(c, share and share + c.set_aside)', 'rdys = [(c, share)'),

    Mutant('RDY goes to another at once', 'rdy = min(rdy, self.rdy_bound(connection, may_come - may_send))', 'pass'),
    Mutant('a lower RDY is never heard', 'return self.rdy_overhang if now - self.lowered_at < RDY_TRANSIT + self.round_trip else 0', 'return self.rdy_overhang'),
    Mutant('a far nsqd hears as soon', 'RDY_TRANSIT + self.round_trip else 0', 'RDY_TRANSIT else 0'),
    Mutant('what came is still to come', 'self.rdy_overhang = max(0, self.rdy_overhang - len(messages))', 'pass'),
    Mutant('nsqlookupd is not asked before a new attempt', '            if self.poller:\n                await self.poller.wait_for_answer()\n', ''),
    Mutant('an answer for a connection that is gone is in time', '            if connection.is_closed:\n                late += len(group)', '            if False:\n                late += len(group)'),
    Mutant('RDY of others at the end of the credit', 'if budget == 0 or self.in_flight_bytes.free_slots', 'if self.in_flight_bytes.free_slots'),
    Mutant('an nsqd that may not send is idle', '                connection.rdy_since = now\n', '                pass\n'),
    Mutant('a tick that does not look for idle nsqds', '            self.mark_idle(now)\n            self.on_credit_change()', '            self.on_credit_change()'),
    Mutant('the longest msg-timeout rules', 'min((c.msg_timeout for c in self.connections), default=60)', 'max((c.msg_timeout for c in self.connections), default=60)'),
    Mutant('an nsqd that is back is not told', '        if backoff.tries:\n            log.info', '        if False:\n            log.info'),
    Mutant('the first nsqd is not waited for', 'while not (self.connections or self.has_tried_all()', 'while not (self.has_tried_all()'),

    # -- window
    Mutant('more than N', 'beyond_limit, messages = messages[left:], messages[:left]', 'beyond_limit, messages = [], messages'),
    Mutant('messages beyond N are not taken up by the next window', '            self.accept(carried_over)\n', ''),
    Mutant('messages beyond N are requeued by a daemon', 'kept = self.beyond_limit if self.limits.has_successor and self.end_reason.drains else []', 'kept = []'),
    Mutant('messages beyond N are kept by once', 'kept = self.beyond_limit if self.limits.has_successor and', 'kept = self.beyond_limit if'),
    Mutant('messages beyond N are counted twice', 'self.count_received(len(messages) if self.limits.has_successor else', 'self.count_received(len(messages) + len(beyond_limit) if self.limits.has_successor else'),
    Mutant('credit after the end', '        if self.state is not WindowState.OPEN:\n            return 0\n        if not', '        if not'),
    Mutant('credit in an outage', 'return 0 if batcher.breaker.state is BreakerState.OPEN else min(self.messages_left, batcher.size)', 'return min(self.messages_left, batcher.size)'),
    Mutant('a lone message that fails holds up all others', 'return min(1, self.messages_left) if all_fail_alone else 0', 'return 0'),
    Mutant('an outage takes one message after the other', 'self.pending_count == batcher.lone_failure_count < MAX_LONE_FAILURES', 'self.pending_count == batcher.lone_failure_count'),
    Mutant('credit of more than a probe', 'BreakerState.OPEN else min(self.messages_left, batcher.size)', 'BreakerState.OPEN else self.messages_left'),
    Mutant('a reason that drains replaces one that does not', 'self.end_reason is None or (self.end_reason.drains and not reason.drains)', 'True'),
    Mutant('a signal writes what is pending', "        if not reason.drains:\n            self.store_batcher.stop()", '        if False:\n            self.store_batcher.stop()'),
    Mutant('a reload requeues', "RELOAD = 'told to end', True", "RELOAD = 'told to end', False"),
    Mutant('a signal is a failure', "SIGNAL = 'stopped', False, os.EX_OK", "SIGNAL = 'stopped', False, os.EX_TEMPFAIL"),
    Mutant('a failed store exits 0', "STORE_FAILED = 'the store failed', False, os.EX_TEMPFAIL", "STORE_FAILED = 'the store failed', False, os.EX_OK"),
    Mutant('no timeout', '        elif now - self.times.timeout_since >= self.limits.timeout:\n', '        elif False:\n'),
    Mutant('idle though messages are pending', 'if self.pending_count or idle_since is None:', 'if idle_since is None:'),
    Mutant('full while messages are pending', '        if not self.messages_left and not self.pending_count:\n', '        if not self.messages_left:\n'),
    Mutant('a call that hangs is waited for', "if bounded and loop.time() - max(begun, self.times.progress_at) > seconds:", 'if False:'),
    Mutant('a delay that does not grow', 'min(most, first * 2 ** min(attempts - 1, 20))', 'first'),
    Mutant('a delay without maximum', 'min(most, first * 2 ** min(attempts - 1, 20))', 'first * 2 ** min(attempts - 1, 20)'),
    Mutant('a letter that is not kept is finished', "'unkept': 'on_unkept'", "'unkept': 'finish'"),
    Mutant('several refused are dead letters', 'if len(self.undecided_keys) > 1:', 'if len(self.undecided_keys) > 9:'),
    Mutant('one refused is never a dead letter', 'elif message.attempts >= REFUSALS_TO_REJECT:', 'elif False:'),
    Mutant('one refused is a dead letter at once', 'elif message.attempts >= REFUSALS_TO_REJECT:', 'elif True:'),
    Mutant('what is left is not requeued', 'self.source.requeue([message for key, message in self.source.in_flight.items() if key not in keys])', 'pass'),
    Mutant('writes that still fail are no failure', 'if self.pending_count and (batcher.pending or', 'if False and (batcher.pending or'),
    Mutant('letters that are not kept are no failure', 'if number := self.failed_messages.count(reason):', 'if (number := self.failed_messages.count(reason)) and reason is End.STORE_FAILED:'),
    Mutant('a letter that was kept at last is a failure', '        self.failed_messages.discard(messages)\n', ''),
    Mutant('messages of a full set count without end', 'for key in list(itertools.islice(self.reasons, max(0, len(self.reasons) - self.MOST))):', 'for key in ():'),
    Mutant('a full set is a wrong policy', "        log.error('%s', result.detail)\n        self.requeue_with_delay", "        self.undecided_keys.update(message.key for message in messages)\n        log.error('%s', result.detail)\n        self.requeue_with_delay"),
    Mutant('records that are busy to the end are no failure', 'if self.pending_count and self.end_reason.drains:   #', 'if False:   #'),
    Mutant('memory of decoded messages has no bound', 'len(fit) < most and decoded < self.max_held:', 'len(fit) < most:'),
    Mutant('memory of decoded messages is not given back', '        self.records.decoded_bytes -= sum([message.size for message in messages])\n', ''),
    Mutant('a message that is larger than the bound waits for ever', 'most and decoded < self.max_held:', 'most and self.decoded_bytes + decoded_size(self.waiting[0].body) <= self.max_held:'),

    Mutant('a keeper that is away for a moment', "if result.reason == 'away' and message.attempts == 1", "if False and message.attempts == 1"),
    Mutant('a keeper is waited for without end', 'message.attempts == 1 and message.received_at > young]', 'message.attempts == 1]'),
    Mutant('a letter that comes again waits for its keeper', "result.reason == 'away' and message.attempts == 1 and", "result.reason == 'away' and"),
    Mutant('a source that has ended is waited for', 'if exhausted or now - self.times.active_at', 'if now - self.times.active_at'),
    Mutant('a daemon ends with its source', 'not self.pending_count and not self.limits.has_successor\n', 'not self.pending_count\n'),
    Mutant('what crosses the end is requeued', 'if self.end_reason not in (None, End.IDLE, End.TIMEOUT) or', 'if self.end_reason is not None or'),
    Mutant('a window without an nsqd is well', "if self.limits.has_successor and not self.pipeline.health.is_up('queue'):", 'if False:'),
    Mutant('each batch says that the store takes nothing', '        if self.end_reason is not End.STORE_FAILED:\n            log', '        if True:\n            log'),
    Mutant('requeued without a fault is no warning', "level = (logging.WARNING if slow and", 'level = (logging.WARNING if False and'),

    # -- pipeline and once
    Mutant('a removed lock file is trusted', 'return self.fd is not None and is_in_place(self.fd, self.path)', 'return self.fd is not None'),
    Mutant('no lock', 'self.fd = fd = open_locked(self.path, os.O_RDWR | os.O_CREAT, 0)', 'self.fd = fd = open_regular(self.path, os.O_RDWR | os.O_CREAT)'),
    Mutant('a lock by the name of the file', 'hexdigest()[:LOCK_HASH]', 'hexdigest()[:0]'),
    Mutant('a lock by the name that is given', 'real_path(filename), config.state_dir', 'os.path.abspath(filename), config.state_dir'),
    Mutant('the lock is not given back', '        yield\n    finally:\n        lock.release()', '        yield\n    finally:\n        pass'),
    Mutant('what is in flight at an error is not requeued', '        source.requeue(list(source.in_flight.values()))\n    await', '        pass\n    await'),
    Mutant('a store that stops is tried again', "'retry' if error.retryable else 'stop'", "'retry'"),

    # -- replay
    Mutant('the timeout of a pass counts from its start', '        super().finish(messages, result)\n        self.times.timeout_since = asyncio.get_running_loop().time()\n', '        super().finish(messages, result)\n'),
    Mutant('letters that fail again are no progress', '        self.source.set_aside(messages)\n        self.times.timeout_since = asyncio.get_running_loop().time()\n', '        self.source.set_aside(messages)\n'),
    Mutant('a batch that failed is progress', '        self.times.progress_at = asyncio.get_running_loop().time()\n', '        self.times.progress_at = self.times.timeout_since = asyncio.get_running_loop().time()\n'),
    Mutant('letters that are left out are no progress', '        self.times.timeout_since = asyncio.get_running_loop().time()\n        groups', '        groups'),
    Mutant('a rate is not kept', '        await asyncio.sleep(begin - now)\n', ''),
    Mutant('a rate without batches', 'min(batcher.size, max(1, replay_filter.rate // 10))', '1'),
    Mutant('letters of any reason', '(not wanted.reasons or header', '(True or header'),
    Mutant('letters of any time', 'first.timestamp >= wanted.since', 'True'),
    Mutant('what is no letter is asked for', '        except InvalidMessage:\n            return False', '        except InvalidMessage:\n            return True'),
    Mutant('a look takes letters', '        chosen = self.select_messages(messages)\n        self.source.set_aside(chosen)\n', '        chosen = self.select_messages(messages)\n        self.source.finish(chosen)\n'),


    # -- daemon
    Mutant('a window that is late is made up for', 'self.last_start = due if now - due <= START_TOLERANCE else now', 'self.last_start = max(due, 0)'),
    Mutant('windows drift', 'self.last_start = due if now - due <= START_TOLERANCE else now', 'self.last_start = now'),
    Mutant('the old lock is kept after a reload', 'if self.lock and self.lock.path == lock.path and self.lock.is_held:', 'if self.lock and self.lock.is_held:'),
    Mutant('the daemon trusts a removed lock file', 'self.lock.path == lock.path and self.lock.is_held:', 'self.lock.path == lock.path:'),
    Mutant('a window does not ask for the lock', '        while not self.keeps_lock():   #', '        while False:   #'),
    Mutant('workers do not ask for the lock', '            if not self.keeps_lock():   #', '            if False:   #'),
    Mutant('a window without end does not ask for the lock', '                    self.keeps_lock()   # once', '                    pass   # once'),
    Mutant('a runner goes on without the lock', '        if not is_kept and self.runner:', '        if False:'),
    Mutant('the old lock is not released', '        if self.lock:\n            self.lock.release()\n        self.lock = lock', '        self.lock = lock'),
    Mutant('a faulty file takes effect', "        except ConfigError as error:\n            log.error('%s\\nkeeping the current", "        except ConfigError as error:\n            self.runner.end_after_window()\n            log.error('%s\\nkeeping the current"),
    Mutant('a configuration that was replaced waits on', '            self.keep_config()\n', ''),
    Mutant('a reload changes nothing', '        if self.runner:\n            self.runner.end_after_window()\n', ''),
    Mutant('a failed store is not opened again', 'if window.end_reason is End.STORE_FAILED and not self.health.is_up', 'if False and not self.health.is_up'),
    Mutant('no backoff while an end is away', "                await asyncio.sleep(self.backoff.next_delay())\n\n    async def run_windows", '                await asyncio.sleep(0.01)\n\n    async def run_windows'),
    Mutant('a signal between windows is not heard', '        elif self.task:\n            self.task.cancel()\n\n    def stop', '\n    def stop'),
    Mutant('ready without an nsqd', 'if self.pipeline and not self.pipeline.source.connections:', 'if False:'),
    Mutant('the store stays down in a quiet topic', "        self.health.report_recovery('store')\n        failure = self", '        failure = self'),
    Mutant('the store stays down where windows are short', '        if window.end_reason is End.IDLE:\n            self.clear_errors()\n', ''),
    Mutant('a replay waits behind letters that are all invalid', 'if not self.records.waiting or not (fit or invalid):', 'if len(fit) < self.store_batcher.size:'),
    Mutant('a replay waits for what is left in flight', '                self.source.set_aside(messages)\n                self.failed_messages.add(', '                self.failed_messages.add('),
    Mutant('a rounded timestamp is a timestamp', 'not isinstance(value, (float, bool)) and int(value)', 'int(value)'),
    Mutant('the store recovers while messages wait', 'if source.idle_since is not None and self.window and not self.window.pending_count:', 'if self.window:'),
    Mutant('the end of a failure is not told', '        if failure:\n            level', '        if False:\n            level'),
    Mutant('a stuck call is healthy', 'return not self.window or self.window.is_healthy(now)', 'return True'),

    # -- supervisor
    Mutant('workers keep the old configuration', '        worker.send_line(raw=self.raw)\n', '        self.first_raw = globals().setdefault("_raw", self.raw)\n        worker.send_line(raw=self.first_raw)\n'),
    Mutant('workers are not told of a reload', 'self.end_by(lambda worker: worker.send_line(leave=True), self.config.timeout)', 'self.end_by(lambda worker: None, 1e6)'),
    Mutant('a reload leaves workers no time', 'self.end_by(lambda worker: worker.send_line(leave=True), self.config.timeout)', 'self.end_by(lambda worker: worker.send_line(leave=True), 0.0)'),
    Mutant('a worker that does not end is not killed', 'asyncio.get_running_loop().call_later(self.end_timeout, self.kill_worker, worker, \'did not stop in time\')', 'pass'),
    Mutant('each worker gets N', "return [share + ((index", "return [share * number + ((index"),
    Mutant('what does not divide is lost', '((index + self.rotation) % number < extra)', '0'),
    Mutant('what does not divide does not go round', '        self.rotation += 1\n', ''),
    Mutant('a second window in one period', '        if waits or self.config.nsq.max_messages and not self.free_limit:', '        if self.config.nsq.max_messages and not self.free_limit:'),
    Mutant('a late grant leaves the next period where it was', "                self.schedule.on_late_start(message['granted_at'])\n", '                pass\n'),
    Mutant('every grant moves the period', 'if began - self.last_start > START_TOLERANCE:', 'if began > self.last_start:'),
    Mutant('a silent worker holds up the others', 'any(not worker.is_silent for worker in self.workers_in_state(WorkerState.BUSY))', 'any(self.workers_in_state(WorkerState.BUSY))'),
    Mutant('a share of a silent worker is given once more', 'return self.config.nsq.max_messages - sum(', 'return self.config.nsq.max_messages - 0 * sum('),
    Mutant('a silent worker gets a grant', 'for worker in self.workers_in_state(WorkerState.IDLE) if not worker.is_silent]', 'for worker in self.workers_in_state(WorkerState.IDLE)]'),
    Mutant('a period of nothing begins', 'if waits or self.config.nsq.max_messages and not self.free_limit:', 'if waits:'),
    Mutant('a grant is forgotten', "crossed = message['seen'] != worker.last_grant", "crossed = False"),
    Mutant('a silent worker is healthy', 'responding = [worker for worker in self.workers if not worker.is_silent]', 'responding = self.workers'),
    Mutant('what a silent worker said before still holds', '            worker.status = WorkerStatus(snapshot=counts.take_snapshot())\n', '            pass\n'),
    Mutant('the gauges of a silent worker still hold', '                counts.merge_snapshot(worker.status.snapshot, gauges=False)', '                counts.merge_snapshot(worker.status.snapshot)'),
    Mutant('a stuck worker is not killed', 'if has_just_passed(WORKER_KILL_TIME):', 'if False:'),
    Mutant('a sick worker is healthy', 'return bool(responding) and all(worker.status.is_healthy for worker in responding)', 'return bool(responding)'),
    Mutant('one end that is up is enough', 'MERGE_ORDER = (BackendState.DOWN, BackendState.CLOSED, BackendState.UP,', 'MERGE_ORDER = (BackendState.UP, BackendState.DOWN, BackendState.CLOSED,'),
    Mutant('a worker that starts is an end that is down', 'min((each[backend] for each in states), key=MERGE_ORDER.index)', 'min((each[backend] for each in states), key=PAGE_ORDER.index)'),
    Mutant('dead letters that can come again are forgotten', 'failure.last > LETTER_RETURN_TIME', 'failure.since > LETTER_RETURN_TIME'),
    Mutant('an end that is closed on purpose is down', 'unopened = BackendState.CLOSED if self.health.errors else', 'unopened = BackendState.DOWN if self.health.errors else'),
    Mutant('figures of a worker that is gone are lost', '            self.exited_worker_metrics.merge_snapshot(worker.status.snapshot, gauges=False)\n', '            pass\n'),
    Mutant('workers that never stay up', 'if all(each.failed_starts >= MAX_FAILED_STARTS for each in self.workers):', 'if False:'),
    Mutant('a worker that ended is not started again', '        while not self.tell_to_end:\n            begun, worker.state', '        if not self.tell_to_end:\n            begun, worker.state'),
    Mutant('a worker outlives its parent', "self.runner.end_after_window()\n        except ValueError as error:   # killed in mid-line, or longer than `limit`\n            log.error('invalid command of the daemon: %s', error)\n        self.runner.stop()", 'self.runner.end_after_window()\n        except ValueError:\n            pass'),
    Mutant('a worker does not hear of a reload', "            if 'leave' in message:\n", '            if False:\n'),
)


class Verdict(typing.NamedTuple):
    """What became of a mutant: a word, how, and the section in which it stands."""

    word: str
    how: str
    section: str


def run_unit_tests(directory: Path, arguments: list[str]) -> typing.NoReturn:
    """Runs tests on the module in `directory`, and ends this process, which was forked for that, with pytest's status. To
    start Python and to import all that the module imports would take longer than the tests."""
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    sys.modules.pop(MODULE.stem, None)
    sys.path.insert(0, str(directory))
    os._exit(pytest.main([*OPTIONS, *arguments]))


def unit_tests_notice(directory: Path, arguments: list[str]) -> bool:
    """Whether tests of the unit floor fail on the module in `directory`. Raises LookupError where there are none."""
    child, end, over = os.fork(), time.monotonic() + LONGEST, (0, 0)
    if not child:
        run_unit_tests(directory, arguments)
    while not over[0] and time.monotonic() < end:
        time.sleep(0.02)
        over = os.waitpid(child, os.WNOHANG)
    if not over[0]:
        os.kill(child, signal.SIGKILL)
        over = os.waitpid(child, 0)
    return noticed(os.waitstatus_to_exitcode(over[1]), arguments)


def end_to_end_tests_notice(directory: Path, arguments: Sequence[str]) -> bool:
    """The same of tests of the end-to-end floor, for which the program is a process of its own."""
    command = [Path(sys.executable).parent / 'pytest', *OPTIONS, *arguments]
    done = subprocess.run(command, env={**os.environ, 'PYTHONPATH': str(directory)}, check=False,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return noticed(done.returncode, arguments)


def noticed(status: int, arguments: Sequence[str]) -> bool:
    """Whether tests failed, by pytest's exit status; below 0 it is the signal that ended it, as where it hung."""
    if status >= 0 and status not in NOTICED:
        raise LookupError(f'pytest {" ".join(arguments)} ended with {status}: no such tests')
    return status < 0 or NOTICED[pytest.ExitCode(status)]


@functools.cache
def pass_on_the_module(arguments: tuple[str, ...]) -> bool:
    """Whether tests of the end-to-end floor pass on the module as it is: else they tell nothing of a mutant."""
    return not end_to_end_tests_notice(MODULE.parent.absolute(), arguments)


def section_of(text: str, place: int) -> str:
    """The name of the section around a place of the module: what stands under its last line of dashes before that."""
    names = re.findall(r'^# -{80,}\n# ([^:\n]+).*\n# -{80,}$', text[:place], re.MULTILINE)
    return names[-1] if names else ''


def judge(text: str, top: str, mutant: Mutant) -> Verdict:
    """What becomes of a mutant. text: the module's. top: a directory for the copies."""
    if text.count(mutant.old) != 1:
        return Verdict(FAILED, f'its text stands in the module {text.count(mutant.old)} times', '')
    section = section_of(text, text.index(mutant.old))
    if mutant.equivalent:
        return Verdict(EQUIVALENT, mutant.equivalent, section)
    directory = Path(tempfile.mkdtemp(dir=top))
    (directory / MODULE.name).write_text(text.replace(mutant.old, mutant.new))
    try:
        return Verdict(*judge_copy(mutant, directory, FIRST.get(section, ())), section)
    except LookupError as error:
        return Verdict(FAILED, str(error), section)


def judge_copy(mutant: Mutant, directory: Path, first: Sequence[str]) -> tuple[str, str]:
    """What becomes of a mutant whose module is in `directory`, as word and how; `first` names its own unit tests."""
    for tests in ([f'test/unit/test_{name}.py' for name in first], ['test/unit']):
        if tests and unit_tests_notice(directory, tests):
            return KILLED, ''
    if not mutant.tests:
        return SURVIVED, ''
    if not pass_on_the_module(mutant.tests):
        return FAILED, 'its end-to-end tests fail on the module as it is'
    return (KILLED, 'end to end') if end_to_end_tests_notice(directory, mutant.tests) else (SURVIVED, 'end to end')


def judge_all(mutants: Sequence[Mutant]) -> list[Verdict]:
    """Judges mutants, one on each processor that is for us at a time, and prints what became of each. In processes, for
    where there are threads a fork may find a lock that nobody gives back."""
    text, verdicts = MODULE.read_text(), []
    with (tempfile.TemporaryDirectory(dir='build') as top, concurrent.futures.ProcessPoolExecutor(
            len(os.sched_getaffinity(0)), multiprocessing.get_context('fork')) as pool):
        judged = pool.map(functools.partial(judge, text, str(Path(top).absolute())), mutants)
        for mutant, verdict in zip(mutants, judged, strict=True):
            verdicts.append(verdict)
            print(f'{verdict.word:10} {mutant.name}' + (f' ({verdict.how})' if verdict.how else ''), flush=True)
    return verdicts


def print_rates(verdicts: Sequence[Verdict]) -> None:
    """The rate of each section, in the order of the module, and of all."""
    for section in [*dict.fromkeys(verdict.section for verdict in verdicts if verdict.section), '']:
        counts = collections.Counter(verdict.word for verdict in verdicts if not section or verdict.section == section)
        print(f'{section or "all":24} {rate(counts):4.0%}: {counts[KILLED]} of {counts[KILLED] + counts[SURVIVED]} killed'
              + (f', {counts[EQUIVALENT]} equivalent' if counts[EQUIVALENT] else '')
              + (f', {counts[FAILED]} errors' if counts[FAILED] else ''))


def rate(counts: collections.Counter[str]) -> float:
    """Which part of those that were judged was killed."""
    return counts[KILLED] / max(1, counts[KILLED] + counts[SURVIVED])


def chosen(words: Sequence[str]) -> list[Mutant]:
    """The mutants that have all the words in their names, or in those of their sections; in the order of the module."""
    text = MODULE.read_text()
    return [mutant for mutant in sorted(MUTANTS, key=lambda mutant: text.find(mutant.old))
            if all(word in f'{mutant.name}, {section_of(text, text.find(mutant.old))}' for word in words)]


def main(words: Sequence[str]) -> int:
    """Judges the mutants that the words choose. Returns the exit status."""
    for name in (MODULE.stem, 'aerospike', 'aerospike_helpers.expressions', 'hypothesis', 'prometheus_client'):
        importlib.import_module(name)   # what each of the forked processes needs
    mutants = chosen(words)
    if not mutants:
        print('no mutant has these words in its name')
        return 1
    if judge_all([UNCHANGED])[0].word != SURVIVED:
        print('the unit tests fail on the module as it is')
        return 1
    verdicts = judge_all(mutants)
    print_rates(verdicts)
    counts = collections.Counter(verdict.word for verdict in verdicts)
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        if verdict.word == FAILED:
            print(f'error: {mutant.name}: {verdict.how}')
    return 0 if rate(counts) >= RATE and not counts[FAILED] else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
