"""What bash, zsh and fish make of a TAB: each shell is typed into, on a terminal, and shows what would be run."""
import argparse
import contextlib
import os
import pty
import re
import shutil
import subprocess

import pytest

import servers
from xmsrv import OPTIONS, build_parser, shell_completion

SHELLS = {
    'bash': ['bash', '--noprofile', '--norc', '-i'],
    'zsh': ['zsh', '-f', '-i'],
    'fish': ['fish', '--no-config', '-i'],
}
PREPARE = {
    'bash': "PS1='ready> '; bind 'set bell-style none'; source completion",
    'zsh': "PS1='ready> '; autoload -Uz compinit; compinit -u -D; unsetopt beep; eval \"$(<completion)\"",
    'zsh-fpath': "PS1='ready> '; fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D; unsetopt beep",
    'fish': 'source completion',
}
# Stands in for the program, and shows each of its arguments.
FUNCTION = "x-msrv() { printf '<%s>' \"$@\"; echo ' was typed'; }"
FUNCTIONS = {'bash': FUNCTION, 'zsh': FUNCTION,
             'fish': "function x-msrv; printf '<%s>' $argv; echo ' was typed'; end"}
# What is there for one command, its options among it.
PARTS = {'bash': r'^_shtab_x_msrv_{}_option_strings=.*', 'zsh': r'^_shtab_x_msrv_{}_options=\((?:\n .*)*',
         'fish': r"^complete .* '_shtab_x_msrv_using {}\b.*"}
# A shell may be missing; its text is looked at all the same.
HERE = [name for name in PREPARE if shutil.which(name.partition('-')[0])]


@pytest.fixture(params=HERE)
def shell(request, workdir, program):
    """An interactive shell that has read what `x-msrv completion` prints for it (for zsh-fpath: that finds it)."""
    name = request.param.partition('-')[0]
    (workdir / 'completion').write_text(program.run('completion', name).stdout)
    (workdir / '_x-msrv').symlink_to('completion')
    (workdir / 'orders.conf').touch()
    (workdir / 'a:b.conf').touch()
    with Terminal(SHELLS[name], workdir) as terminal:
        terminal.type(f'{PREPARE[request.param]}; {FUNCTIONS[name]}; echo pre""pared\n', 'prepared')
        yield terminal


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command, directory):
        self.seen = ''
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        environment = {'PATH': os.environ['PATH'], 'TERM': 'dumb', 'HOME': str(directory), 'LC_ALL': 'C.UTF-8'}
        # fish wants a session that the terminal controls.
        self.process = subprocess.Popen(['setsid', '--ctty', *command], stdin=slave, stdout=slave, stderr=slave,
                                        cwd=directory, env=environment)
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, keys, expected):
        """Type, and wait for `expected` to be shown behind all that was there before."""
        begin = len(self.seen)
        os.write(self.master, keys.encode())
        servers.wait_until(lambda: self.shown(begin, expected), f'{expected!r} is shown behind {keys!r}')

    def shown(self, begin, expected):
        with contextlib.suppress(BlockingIOError):
            self.seen += os.read(self.master, 65536).decode()
        return expected in self.seen[begin:]


@pytest.mark.parametrize('typed, run', [
    ('rep\t--lis\t', '<replay><--list>'),
    ('--set nsq.topic=on\tx once', '<--set><nsq.topic=onx><once>'),
    ('--set nsq.max-m\t5 onc\t', '<--set><nsq.max-messages=5><once>'),
    ('--set=sqlite.pa\tx onc\t', '<--set=sqlite.path=x><once>'),
    ('once --set idl\t1s --verb\t', '<once><--set><idle-timeout=1s><--verbose>'),
    ('-c ord\tche\t--conn\t', '<-c><orders.conf><check><--connect>'),
    ('--config ord\tonce', '<--config><orders.conf><once>'),
    ('-c once rep\t', '<-c><once><replay>'),
    ('completion z\t', '<completion><zsh>'),
    ('replay --file ord\t--dry\t', '<replay><--file><orders.conf><--dry-run>'),
    ('replay --file --dry\t', '<replay><--file><--dry-run>'),
    ('replay --reason inv\t--reason rej\t', '<replay><--reason><invalid-json><--reason><rejected>'),
    ('check --message ord\t', '<check><--message><orders.conf>'),
    ('-v rep\t--lim\t 3', '<-v><replay><--limit><3>'),
    ('-vq rep\t--lis\t', '<-vq><replay><--list>'),
    ('replay --reason=inv\t--js\t', '<replay><--reason=invalid-json><--json>'),
    ('--config=ord\tonc\t', '<--config=orders.conf><once>'),
    ('-c a:b\tonc\t', '<-c><a:b.conf><once>'),
    ('--set message.fie\tid=integer onc\t', '<--set><message.fields.id=integer><once>'),
])
def test_a_tab_completes(shell, typed, run):
    """Commands, their options, files, and settings, behind which no blank is put."""
    shell.type(f'x-msrv {typed}\n', f'{run} was typed')


@pytest.mark.parametrize('shell', SHELLS)
def test_the_text_has_all_that_the_help_and_the_table_of_options_have(program, shell):
    """Of each command; without any configuration."""
    text = program.run('completion', shell).stdout
    commands = re.findall(r'^    (\w+) ', program.run('--help').stdout, re.MULTILINE)
    assert {'once', 'check', 'replay', 'config', 'completion'} <= set(commands)
    for command in commands:
        part = '\n'.join(re.findall(PARTS[shell].format(command), text, re.MULTILINE))
        for option in re.findall(r'(?:^  |, )(--?\w[\w-]*)', program.run(command, '--help').stdout, re.MULTILINE):
            name = option if shell != 'fish' else f'-{"l" if option[:2] == "--" else "s"} {option.strip("-")}'
            assert re.search(rf'(?<![\w-]){name}(?![\w-])', part), (command, option)
    for option in OPTIONS:
        assert f' {option.section}.{option.name}'.replace(' .', ' ') in re.sub('[\'"]', ' ', text)


def test_what_the_help_hides_is_not_completed():
    """A command and an option without help."""
    parser = build_parser()
    commands = parser._actions[-1]
    commands.choices['once'].add_argument('--hidden', help=argparse.SUPPRESS)
    for shell in SHELLS:
        assert not re.search(r'\bworker\b|hidden', shell_completion(shell, parser))


def test_64_is_a_shell_that_is_not_known(program):
    assert 'tcsh' in program.run('completion', 'tcsh', expect=os.EX_USAGE).stderr
