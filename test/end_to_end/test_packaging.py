"""What the packages put around the program: launcher, units, maintenance, manual pages. The packages: packages/."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types

import pytest

import xmsrv as module
from servers import ROOT

sys.path[:0] = [str(ROOT / 'man'), str(ROOT / 'packaging')]
import options  # noqa: E402
import stage  # noqa: E402

UNITS = ROOT / 'systemd'
PAGE, CONF_PAGE = ROOT / 'man' / 'x-msrv.8', ROOT / 'man' / 'x-msrv.conf.5'
SERVICES = ['x-msrv', 'x-msrv-daemon']


def script(path, text):
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(*command, expect=0, **environment):
    """The CompletedProcess of a command, as text."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False,
                         env=os.environ | {name: str(value) for name, value in environment.items()})
    assert ran.returncode == expect, ran.stdout + ran.stderr
    return ran


# --------------------------------------------------------------------------------------------------------- the launcher

@pytest.fixture
def launcher(workdir):
    """The launcher, with `bin` in the place of /usr/bin, where each Python only says its name and arguments."""
    text = (ROOT / 'bin' / 'x-msrv').read_text()
    assert text.count('/usr/bin/python3') == 5
    path = workdir / 'launcher'
    script(path, text.replace('/usr/bin/python3', f'{workdir}/bin/python3'))
    return types.SimpleNamespace(path=path, add=lambda *versions: [
        script(workdir / 'bin' / f'python{version}', f'#!/bin/sh\necho {version} "$@"\n') for version in versions])


@pytest.mark.parametrize('version', ['3.11', '3.14'])
def test_the_launcher_takes_the_python3_of_the_system(launcher, workdir, version):
    """Although a newer one is beside it: bytecode, updates and the package's range are for that of the system."""
    launcher.add('3.9', version, '3.13')
    (workdir / 'bin/python3').symlink_to(f'python{version}')
    assert run(launcher.path, 'once').stdout == f'{version} -I -S -B /usr/share/x-msrv once\n'


@pytest.mark.parametrize('system', ['3.9', '3.15'])
def test_where_the_python3_of_the_system_is_not_fit_the_launcher_takes_the_newest_that_is(launcher, workdir, system):
    """3.10 and 3.15 are none."""
    launcher.add('3.9', '3.10', '3.11', '3.12', '3.15')
    (workdir / 'bin/python3').symlink_to(f'python{system}')
    assert run(launcher.path, 'once').stdout == '3.12 -I -S -B /usr/share/x-msrv once\n'
    launcher.add('3.14')
    assert run(launcher.path, '--version').stdout.startswith('3.14 ')


def test_the_launcher_passes_on_every_argument_as_it_is(launcher, workdir):
    """Blanks, quotes and nothing at all."""
    script(workdir / 'bin' / 'python3.11', '#!/bin/sh\nshift 4\nprintf "<%s>" "$@"\n')
    assert run(launcher.path, 'a b', '', "'", '$x').stdout == "<a b><><'><$x>"


@pytest.mark.parametrize('there', [(), ('3.10', '3')])
def test_without_a_fit_python_the_launcher_says_what_to_install(launcher, there):
    """In one line, exit 70; not the python3 that is there."""
    launcher.add(*there)
    ran = run(launcher.path, 'once', expect=os.EX_SOFTWARE)
    line, = ran.stderr.splitlines()
    assert line.startswith('x-msrv: no Python from 3.11 to 3.14 in /usr/bin: install')


@pytest.mark.parametrize('flags', [(), ('-I', '-S', '-B')])
def test_the_program_finds_its_libraries_and_so_do_its_workers(workdir, monkeypatch, flags):
    """As the packages lay them out, below any root."""
    programs, lib = workdir / 'usr/share/x-msrv', workdir / 'usr/lib/x-msrv'
    programs.mkdir(parents=True)
    lib.parent.mkdir(parents=True)
    lib.symlink_to(sysconfig.get_path('platlib'))
    for source in (ROOT / 'xmsrv.py', ROOT / 'packaging' / '__main__.py'):
        shutil.copy(source, programs)
    python = getattr(sys, '_base_executable', sys.executable)   # not that of the venv, which has libraries of its own
    version = f'x-msrv {module.__version__}\n'
    monkeypatch.delenv('PYTHONDONTWRITEBYTECODE', raising=False)
    assert run(python, *flags, programs, '--version').stdout == version
    command = run(python, *flags, '-c', f'import sys; sys.path[:0] = [{str(programs)!r}, {str(lib)!r}]\n'
                  'import xmsrv; print(*xmsrv.worker_command(), sep="\\n")').stdout.splitlines()
    assert command[1:] == [*flags, str(programs)]
    assert run(*command, '--version').stdout == version


# ---------------------------------------------------------------------------------------------------------------- units

def settings(unit):
    """The settings of a unit as (name, value) pairs, in order."""
    return re.findall(r'^([A-Za-z]+)=(.*)$', (UNITS / unit).read_text(), re.MULTILINE)


def hardening(unit):
    """The hardening of a service, with its comments."""
    text = (UNITS / unit).read_text()
    return re.search(r'^# Hardening: .*?^UMask=\S+$', text, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize('unit', [f'{name}{at}.service' for name in SERVICES for at in ('', '@')])
def test_every_service_is_hardened_alike(unit):
    """The same lines, the same reasons."""
    assert hardening(unit) == hardening('x-msrv.service')


@pytest.mark.parametrize('unit', ['x-msrv.service', 'x-msrv.timer', 'x-msrv-daemon.service'])
def test_a_template_is_its_unit_for_another_file(unit):
    """It differs in the file alone, and in what it is called."""
    def without_names(pairs):
        return [(name, value) for name, value in pairs if name != 'Description']
    plain = [(name, value.replace('/usr/bin/x-msrv ', '/usr/bin/x-msrv -c /etc/x-msrv/%i.conf ')
              .replace('x-msrv.timer', 'x-msrv@%i.timer')) for name, value in settings(unit)]
    assert without_names(settings(unit.replace('.', '@.'))) == without_names(plain)


def test_the_timer_counts_from_start_to_start():
    """OnCalendar came early: more than max-messages in a period."""
    assert [pair for pair in settings('x-msrv.timer') if pair[0].startswith('On')] == [
        ('OnActiveSec', '0'), ('OnUnitActiveSec', '10s')]


def test_only_one_of_timer_and_daemon_runs():
    """The daemon stops the timer and not its service, which every tick would start again."""
    assert ('Conflicts', 'x-msrv.timer') in settings('x-msrv-daemon.service')
    for unit in ('x-msrv.timer', 'x-msrv.service'):
        assert 'Conflicts' not in dict(settings(unit))


def test_a_reload_checks_the_file_first():
    """So that one with faults fails the reload; what is not there yet (69) does not: the daemon waits for it."""
    assert [value for name, value in settings('x-msrv-daemon.service') if name == 'ExecReload'] == [
        "/bin/sh -c '/usr/bin/x-msrv check || [ $$? = 69 ]'", "/bin/sh -c 'kill -HUP $MAINPID'"]


@pytest.mark.parametrize('status, passes', [(0, True), (69, True), (78, False), (70, False)])
def test_a_reload_fails_by_a_fault_of_the_text_alone(workdir, status, passes):
    """As the shell of the unit has it, for which systemd makes $ of $$."""
    check = next(value for name, value in settings('x-msrv-daemon.service') if name == 'ExecReload')
    command = re.fullmatch("/bin/sh -c '(.*)'", check)[1].replace('$$', '$')
    script(workdir / 'x-msrv', f'#!/bin/sh\nexit {status}\n')
    ran = subprocess.run(['sh', '-c', command.replace('/usr/bin', str(workdir))], check=False)
    assert (ran.returncode == 0) == passes


def test_only_a_wrong_text_or_command_line_keeps_the_daemon_from_another_start():
    found = dict(settings('x-msrv-daemon.service'))
    assert (found['Restart'], found['RestartPreventExitStatus']) == ('always', '64 78')


def test_what_the_units_start_are_commands_of_the_program():
    """And the options are its own."""
    parser = module.build_parser()
    for unit in UNITS.glob('*.service'):
        started = re.findall(r"^Exec\w+=(?:/bin/sh -c ')?/usr/bin/x-msrv ([^|\n]*)", unit.read_text(), re.MULTILINE)
        assert started
        for command in started:
            parser.parse_args(command.split())


def test_the_rpm_makes_the_user_of_sysusers():
    """rpm before 4.20 knows no sysusers.d: the line stands in the spec, too."""
    line = re.search('^u .*', (UNITS / 'x-msrv.sysusers').read_text(), re.MULTILINE)[0]
    assert f"echo '{line}' | systemd-sysusers -" in (ROOT / 'rpm' / 'x-msrv.spec').read_text()


@pytest.mark.parametrize('status, seconds', [('0', 0), ('-1', 0), ('69', 0), ('64', 30), ('78', 30)])
def test_under_runit_only_a_wrong_text_or_command_line_is_waited_for(workdir, status, seconds):
    """`finish` sleeps after 64 and 78."""
    script(workdir / 'sleep', '#!/bin/sh\necho slept $1\n')
    ran = run('sh', ROOT / 'runit' / 'finish', status, '0', PATH=f'{workdir}:{os.environ["PATH"]}')
    assert ran.stdout == (f'slept {seconds}\n' if seconds else '')


# ---------------------------------------------------------------------------------------------------------- maintenance

SYSTEMCTL = '''#!/bin/sh
case $1 in
    list-units) tr ' ' '\\n' <"$DIRECTORY/active" | sed 's/$/ loaded active/' ;;
    *) echo "$@" >>"$DIRECTORY/calls" ;;
esac
'''


@pytest.fixture
def maintain(workdir):
    """`maintain` with a systemctl that has the active units of the file `active`, and notes its calls."""
    script(workdir / 'bin' / 'systemctl', SYSTEMCTL)
    (workdir / 'calls').touch()

    def call(verb, active=''):
        (workdir / 'active').write_text(active)
        run(ROOT / 'packaging' / 'maintain', verb, PATH=f'{workdir}/bin:/usr/bin:/bin', XMSRV_SYSTEMD=workdir,
            XMSRV_PAUSED=workdir / 'paused', DIRECTORY=workdir)
        calls = (workdir / 'calls').read_text().splitlines()
        (workdir / 'calls').write_text('')
        return calls
    return call


DAEMONS = 'try-restart x-msrv-daemon.service x-msrv-daemon@*.service'


def test_timers_rest_while_files_are_replaced(maintain):
    """Those that ran, instances too, start again; daemons get the new files."""
    assert maintain('pause', 'x-msrv.timer x-msrv@a.timer') == ['stop x-msrv.timer x-msrv@a.timer']
    assert maintain('resume') == ['daemon-reload', 'start x-msrv.timer x-msrv@a.timer', DAEMONS]
    assert maintain('resume') == ['daemon-reload', DAEMONS]


def test_what_a_broken_upgrade_has_stopped_is_started_by_the_next(maintain):
    """The note stays until somebody resumes."""
    maintain('pause', 'x-msrv.timer')
    assert maintain('pause') == []
    assert 'start x-msrv.timer' in maintain('resume')


def test_where_nothing_ran_nothing_is_started(maintain):
    """An installation enables nothing."""
    assert maintain('pause') == []
    assert maintain('resume') == ['daemon-reload', DAEMONS]


def test_a_removal_stops_all(maintain):
    """Timers, windows and daemons."""
    assert maintain('stop', 'x-msrv@a.timer x-msrv-daemon.service')[0] == 'stop x-msrv@a.timer x-msrv-daemon.service'


# --------------------------------------------------------------------------------------------------------------- manual

def section(page, title):
    """The source of a section of a page."""
    return re.search(rf'^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)', page.read_text(), re.MULTILINE | re.DOTALL)[1]


def test_the_option_list_of_the_manual_is_the_table():
    """`make man` writes it."""
    page = CONF_PAGE.read_text()
    assert page.split(options.BEGIN)[1].split(options.END)[0] == options.page_list()


@pytest.mark.parametrize('number', range(3))
def test_the_examples_of_the_manual_are_without_fault(program, number):
    """x-msrv.conf(5), HELP_EPILOG."""
    found = re.findall(r'^\.Bd .*?\n(.*?)^\.Ed', section(CONF_PAGE, 'EXAMPLES'), re.MULTILINE | re.DOTALL)
    assert len(found) == 3
    program.write(found[number])
    assert 'no fault found' in program.run('check').stdout


def test_the_command_lines_of_the_manual_work(nsqd, program):
    """x-msrv(8), HELP_EPILOG, in their order, with a message and a dead letter."""
    lines = re.findall(r'^\.Dl x-msrv (.*)$', section(PAGE, 'EXAMPLES'), re.MULTILINE)
    assert len(lines) == 6
    program.configure(nsqd)
    nsqd.publish('orders', ['{"id": 1}', '[]'])
    said = {line: program.run(*line.split()) for line in lines}
    assert 'nsqd' in said['check --connect'].stdout
    assert 'received 2, stored 1' in said['--set nsq.max-messages=10 once'].stderr
    assert 'not-an-object' in said['replay --list'].stdout


def test_every_command_and_status_is_in_the_manual():
    """As --help has them."""
    page, parser = PAGE.read_text(), module.build_parser()
    commands = parser._subparsers._group_actions[0]._choices_actions
    for command in commands:
        assert re.search(rf'^\.It Cm {command.dest}\b', page, re.MULTILINE), command.dest
        for option in parser._subparsers._group_actions[0].choices[command.dest]._option_string_actions:
            assert not option.startswith('--') or ' \\-' + option[2:].replace('-', '\\-') in page, option
    statuses = set(re.findall(r'^\.It (\d+)$', section(PAGE, 'EXIT STATUS'), re.MULTILINE))
    assert statuses == set(re.findall(r'(\d+) \w', module.HELP_EPILOG.split('exit status:')[1]))


def test_no_line_of_a_manual_is_longer_than_mandoc_likes():
    for page in sorted((ROOT / 'man').glob('*.[58]')):
        lines = page.read_text().splitlines()
        assert [line for line in lines if len(line.encode()) > 80 and not line.startswith('.')] == [], page.name


def diagnostics():
    """The fixed parts of the lines that the manual explains, each as a list."""
    items = re.findall(r'^\.It (.*Sy .*)$', section(PAGE, 'DIAGNOSTICS').split('diagnostics:')[1], re.MULTILINE)
    return [[part.replace('\\&', '') for part in re.findall(r'Sy "([^"]*)"', item)] for item in items]


@pytest.mark.parametrize('parts', diagnostics(), ids=' '.join)
def test_the_lines_that_the_manual_explains_are_what_is_said(parts):
    """Each stands in the source, in one line of it or the next."""
    source = ''.join((ROOT / name).read_text() for name in ('xmsrv.py', 'bin/x-msrv'))
    assert re.search('.{0,60}?'.join(map(re.escape, parts)), source, re.DOTALL), parts


# ------------------------------------------------------------------------------------------------------------ changelog

def test_both_changelogs_come_from_changelog_md(monkeypatch):
    """In the form that Debian and rpm read, whatever the locale; the version is the module's."""
    monkeypatch.setenv('SOURCE_DATE_EPOCH', '1792000000')
    changes = stage.releases('# Changelog\n\n## 0.2.0 (unreleased)\n\n- Add a\n  thing at 5%.\n- Fix b.\n\n'
                             '## 0.1.0 (2026-03-01)\n\n- Add all.\n')
    debian = stage.debian_changelog(changes, stage.source_date(changes[0][1]))
    assert 'x-msrv (0.2.0-1) unstable; urgency=medium\n\n  * Add a thing at 5%.\n  * Fix b.\n\n -- ' in debian
    assert debian.endswith('Sun, 01 Mar 2026 12:00:00 -0000\n')
    spec = stage.rpm_changelog(changes, 1792000000)
    assert '* Sun Mar 01 2026 ' in spec and '- Add a thing at 5%%.\n' in spec


def test_the_changelog_is_of_this_version():
    """What `make deb` and `make rpm` insist on."""
    assert stage.releases((ROOT / 'CHANGELOG.md').read_text())[0][0] == stage.program_version() == module.__version__
