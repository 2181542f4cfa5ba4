"""The blocks of README.md and docs/*.md, run as a reader would type them.

An answer is what stands below one heading. Its blocks become one shell script:

    ```ini             lines that the reader puts into /etc/x-msrv/x-msrv.conf: merged into it
    ```sh              commands, typed as they stand
    ```text            lines that the commands before it print, or parts of them
    ```sh root         commands of a system that boots systemd: test/packages runs them there
    ```sh elsewhere    commands of a tool that no package brings (docker, kubectl, aql)
    <!-- sh ... -->    commands that the reader does not see: messages to work on, or a last look

Host names and paths of the documents stand for those of the test: see Stage.names.
"""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from servers import NSQ_TOOLS, PROGRAM, ROOT, free_ports, spawn, wait_until

HEADING = re.compile(r'^##+ (.+)$', re.MULTILINE)
PIECE = re.compile(r'^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$|^<!-- sh\n(?P<hidden>.*?)^-->$', re.MULTILINE | re.DOTALL)


def answers(file):
    """{heading: [(kind, text), ...]} of a document under ROOT, for each heading that has blocks."""
    parts = HEADING.split((ROOT / file).read_text())
    found = {heading: pieces(text) for heading, text in zip(['', *parts[1::2]], parts[::2], strict=True)}
    return {heading: blocks for heading, blocks in found.items() if blocks}


def pieces(text):
    """(kind, text) of each block; the kind of a hidden one is 'sh'."""
    return [(match['kind'] or 'sh', match['text'] or match['hidden']) for match in PIECE.finditer(text)]


def commands(file, kind):
    """{heading: script} of the blocks of one kind, such as 'sh root'."""
    scripts = {heading: ''.join(text for each, text in blocks if each == kind)
               for heading, blocks in answers(file).items()}
    return {heading: script for heading, script in scripts.items() if script}


def plain(line):
    """A line as it is compared: what is blank counts as one blank."""
    return ' '.join(line.split())


class Stage:
    """A directory with a configuration and the servers that the names of the documents stand for."""

    def __init__(self, directory, nsqds, lookupd, cluster):
        self.directory = Path(directory)
        self.conf = self.directory / 'etc' / 'x-msrv.conf'
        self.names = {
            'queue1:4150': nsqds[0].tcp, 'queue1:4151': nsqds[0].http, 'queue2:4150': nsqds[1].tcp,
            'queue2:4151': nsqds[1].http, '127.0.0.1:4150': nsqds[0].tcp, '127.0.0.1:4151': nsqds[0].http,
            'lookup1:4161': lookupd.http, 'db1:3000': cluster.address, 'db2:3000': cluster.address,
            '127.0.0.1:3000': cluster.address, '127.0.0.1:9464': f'127.0.0.1:{free_ports()}',
            '/etc/x-msrv': str(self.directory / 'etc'), '/var/lib/x-msrv': str(self.directory / 'lib')}
        for name in ('etc', 'lib', 'bin'):
            (self.directory / name).mkdir()
        self.conf.write_text(self.localised((ROOT / 'etc' / 'x-msrv.conf').read_text())
                             .replace('[nsq]', f'state-dir = {self.directory / "lib"}\n[nsq]', 1))
        self.tool('x-msrv', f'exec {PROGRAM} -c {self.conf} "$@"')
        self.tool('configure', f'exec {sys.executable} {__file__} configure {self.conf}')
        self.tool('daemon-until', f'exec {sys.executable} {__file__} daemon-until "$@"')

    def localised(self, text):
        """The text with this stage's addresses and paths in place of the documents'."""
        for name, value in self.names.items():
            text = text.replace(name, value)
        return text

    def tool(self, name, line):
        """A command for the scripts."""
        path = self.directory / 'bin' / name
        path.write_text(f'#!/bin/sh\n{line}\n')
        path.chmod(0o755)

    def play(self, blocks, within=60):
        """Run the blocks of one answer in one shell; AssertionError where a command fails, or prints something else."""
        process = self._start(self.script(blocks))
        try:
            wait_until(lambda: process.poll() is not None, 'the commands end', within)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)   # what they left in the background
            process.wait()
        assert process.returncode == 0, f'exit status {process.returncode}\n{self.printed()}'
        for number, (kind, text) in enumerate(blocks):
            if kind == 'text':
                self.compare(text, self.output(number - 1))

    def script(self, blocks):
        """The shell script of an answer."""
        lines = ['set -eu']
        for number, (kind, written) in enumerate(blocks):
            text = self.localised(written)
            if kind == 'ini':
                lines.append(f"configure <<'END'\n{text}END")
            elif kind == 'sh':
                lines.append(f'{{\n{text}}} >{number}.out 2>&1')
        return '\n'.join(lines) + '\n'

    def _start(self, script):
        environment = {name: value for name, value in os.environ.items() if not name.startswith('XMSRV__')}
        own = [self.directory / 'bin', NSQ_TOOLS, ROOT / 'test', Path(sys.executable).parent]
        environment['PATH'] = ':'.join([*map(str, own), os.environ['PATH']])
        (self.directory / 'script').write_text(script)
        with (self.directory / 'errors').open('w') as errors:
            return spawn([shutil.which('sh'), 'script'], env=environment, cwd=self.directory, stdout=errors,
                         stderr=subprocess.STDOUT, start_new_session=True)

    def output(self, number):
        """What a block of commands printed."""
        path = self.directory / f'{number}.out'
        return path.read_text() if path.exists() else ''

    def printed(self):
        """All that was printed, for a failed test's message."""
        files = [self.directory / 'script', *sorted(self.directory.glob('*.out')), self.directory / 'errors']
        return '\n'.join(f'--- {file.name}\n{file.read_text()}' for file in files)

    def compare(self, text, printed):
        """AssertionError where a line of a ```text block is not among the lines that were printed."""
        lines = [plain(line) for line in self.localised(printed).splitlines()]
        for line in filter(None, text.splitlines()):
            assert any(plain(self.localised(line)) in each for each in lines), f'{line!r} is not in\n{printed}'


def configure(path):
    """`configure FILE`: merge the lines on stdin into it, as a reader edits it."""
    import configobj  # of the venv; not needed where only the blocks are read
    options = {'interpolation': False, 'encoding': 'utf-8'}
    config = configobj.ConfigObj(path, **options)
    config.merge(configobj.ConfigObj(sys.stdin.read().splitlines(), **options))
    config.write()


def daemon_until(words):
    """`daemon-until WORDS`: a daemon runs until it logs these words, and is then told to stop; its log is printed."""
    log = Path('daemon.log')
    with log.open('w') as file:
        process = spawn(['x-msrv', 'daemon'], stderr=file)
    wait_until(lambda: words in log.read_text() or process.poll() is not None, words, 30)
    process.terminate()
    status = process.wait(30)
    print(log.read_text())
    return status


if __name__ == '__main__':
    sys.exit({'configure': configure, 'daemon-until': daemon_until}[sys.argv[1]](sys.argv[2]))
