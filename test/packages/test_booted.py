"""The packages on booted systems: apt and dnf install them from a repository, then test/guest/verify.sh looks.

What a system has to be like is in guests.py; each test boots one of its own.
"""
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

import guests
import pytest
from guests import GUESTS, Guest, one_at_a_time, run
from test_packages import ARCH, DEB, RPM, stage

from documents import commands
from servers import NSQ_TOOLS, ROOT

pytestmark = pytest.mark.skipif(bool(guests.missing()), reason=guests.missing())
NSQD_PACKAGE = f'''Package: nsqd
Version: 1.3.0
Architecture: {ARCH}
Maintainer: nobody <nobody@example.org>
Provides: ca-certificates
Description: stands for a package that Debian has not
'''
PREVIOUS = '0.0.1'
OLD_LAYOUT = 'b728d67'   # the last commit that had the program among its libraries, in /usr/lib/x-msrv
ENOUGH = 130        # tests that verify.sh makes at least, on any system
VERIFY = {f'/srv/verify/{path.name}': path for path in (
    ROOT / 'test/guest/verify.sh', ROOT / 'test/guest/ends.py', ROOT / 'test/support/aerospike_server.py',
    ROOT / 'test/support/servers.py', NSQ_TOOLS / 'nsqd')}
RPM_FILES = {
    '/etc/rpm/macros': '%_dbpath /var/lib/rpm\n',
    '/usr/share/licenses/filesystem/README': 'EL and Fedora have the directory from their package filesystem.\n',
    '/etc/dnf/vars/releasever': '9\n',
    '/etc/dnf/dnf.conf': '[main]\ngpgcheck=0\nplugins=0\n',
    '/etc/yum.repos.d/test.repo': ''.join(f'[{name}]\nname={name}\nbaseurl=file:///srv/repo/{name}\nenabled={on}\n'
                                          for name, on in (('x-msrv', 1), ('system', 1), ('el9', 0)))}
# What a system of rpms has of its own, which the root has from debs: name, version, what it provides. EL 9 besides.
STAND_INS = {
    'system': [('systemd', '252', ''), ('bash', '5', '/bin/sh'), ('glibc', '2.36', 'libc.so.6(GLIBC_2.28)(64bit)'),
               ('zlib', '1.2', 'libz.so.1()(64bit)'), ('python3', '3.11', '')],
    'el9': [('python3', '3.9', ''), ('python3.11', '3.11', ''), ('python3.12', '3.12', '')]}


@pytest.fixture(scope='module')
def previous():
    """The packages of an older version."""
    made = GUESTS / 'previous'
    with one_at_a_time(made.name):
        found = sorted(made.glob('x-msrv*'))
        if len(found) != 2 or min(path.stat().st_mtime for path in found) < DEB.stat().st_mtime:
            shutil.rmtree(made, ignore_errors=True)
            with tempfile.TemporaryDirectory() as directory:
                older_tree(Path(directory))
                run('nice', 'make', '--silent', 'deb', 'rpm', cwd=directory)
                shutil.copytree(Path(directory) / 'dist', made)
    return sorted(made.glob('x-msrv*'))


def older_tree(tree):
    """The sources as of PREVIOUS: where this tree has its history, those of another layout; else these, but for the
    configuration. The libraries are the same."""
    if subprocess.run(['git', 'rev-parse', '--verify', '--quiet', f'{OLD_LAYOUT}^{{commit}}'], cwd=ROOT, check=False,
                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        run('sh', '-c', f'git archive {OLD_LAYOUT} | tar -x -C {tree}', cwd=ROOT)
        shutil.copytree(ROOT / 'build/vendor', tree / 'build/vendor', ignore=shutil.ignore_patterns('venv', '*.wheels'))
        (tree / f'build/vendor/.{ARCH}').touch()
    else:
        this_tree(tree)
    replace(tree / 'xmsrv.py', re.search(r"^__version__ = '.*'$", (tree / 'xmsrv.py').read_text(), re.MULTILINE)[0],
            f"__version__ = '{PREVIOUS}'")
    (tree / 'CHANGELOG.md').write_text(f'## {PREVIOUS} (2026-01-01)\n\n- It is older.\n')
    replace(tree / 'etc/x-msrv.conf', '# x-msrv: ', '# x-msrv, as it was: ')


def this_tree(tree):
    """What a package is built from."""
    for name in (*stage.SOURCES, 'vendor', 'build/vendor'):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('venv', '*.wheels', '__pycache__'))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, tree / name)


def replace(path, old, new):
    """Once, in a file."""
    text = path.read_text()
    assert text.count(old) == 1, f'{old} in {path}'
    path.write_text(text.replace(old, new))


def verify(guest):
    """Every test of verify.sh has passed; their number. What it says is shown where one failed, or it took too long."""
    said = guest.run('sh', '-c', 'timeout 500 /srv/verify/verify.sh; echo "exit $?"')
    print(said)
    assert 'exit 0' in said and 'not ok' not in said
    return int(re.search(r'^1\.\.(\d+)$', said, re.MULTILINE)[1])


# ------------------------------------------------------------------------------------------------------------------ deb

@pytest.fixture(scope='module')
def apt_repository(tmp_path_factory, previous):
    """A directory of debs, as `deb [trusted=yes] file:` takes it."""
    made = tmp_path_factory.mktemp('apt')
    for deb in (DEB, *(path for path in previous if path.suffix == '.deb')):
        shutil.copy(deb, made)
    (made / 'Packages').write_text(run('dpkg-scanpackages', '--multiversion', '.', cwd=made, stderr=subprocess.DEVNULL))
    return made


@pytest.mark.parametrize('suite', ['bookworm', 'trixie', 'testing'])
def test_debian(suite, apt_repository):
    """systemd 252 and Python 3.11 on Debian 12, 257 and 3.13 on Debian 13; testing has Python 3.14, and no runit."""
    files = {**VERIFY, '/srv/repo': apt_repository, '/etc/apt/sources.list': 'deb [trusted=yes] file:/srv/repo ./\n'}
    with Guest(guests.root(suite), files) as guest:
        guest.run('apt-get', '-qq', 'update')
        assert verify(guest) > ENOUGH


def test_the_commands_of_the_documents(apt_repository):
    """What README.md and the cookbook have root type, in their order; each unit that they start runs."""
    files = {**VERIFY, '/srv/repo': apt_repository, f'/srv/new/{DEB.name}': DEB,
             '/etc/apt/sources.list': 'deb [trusted=yes] file:/srv/repo ./\n'}
    with Guest(guests.root('trixie'), files) as guest:
        guest.run('apt-get', '-qq', 'update')
        guest.run('systemd-run', '--quiet', '--unit=nsqd', '/srv/verify/nsqd', '-data-path=/run')
        for file in ('README.md', 'docs/COOKBOOK.md'):
            for script in commands(file, 'sh root').values():
                guest.run('sh', '-euc', f'cd /srv/new\n{script}'.replace('amd64', ARCH))
                if file == 'README.md':   # which brings the Python for it
                    guest.run('systemd-run', '--quiet', '--unit=store', 'python3', '/srv/verify/ends.py', 'store')
                for unit in re.findall(r'enable --now (\S+)', script):
                    assert guest.run('systemctl', 'is-active', unit) == 'active\n'
                    guest.run('systemctl', 'disable', '--now', '--quiet', unit)


def test_autopkgtest(tmp_path):
    """debian/tests, as Debian's CI runs them, where nsqd is a package; no systemd there, and no network needed."""
    testbed, tree = tmp_path / 'testbed', tmp_path / 'tree'
    run('cp', '-a', '--reflink=auto', guests.root('slim'), testbed)
    (testbed / 'etc/apt/sources.list').write_text('')
    nsqd = tmp_path / 'nsqd'
    for path, text in (('DEBIAN/control', NSQD_PACKAGE), ('usr/bin/nsqd', '')):
        (nsqd / path).parent.mkdir(parents=True)
        (nsqd / path).write_text(text)
    shutil.copy(NSQ_TOOLS / 'nsqd', nsqd / 'usr/bin')
    run('dpkg-deb', '--build', nsqd, testbed / 'nsqd.deb')
    run('chroot', testbed, 'dpkg', '--install', '/nsqd.deb')
    shutil.copytree(ROOT / 'debian', tree / 'debian')
    releases = stage.releases((ROOT / 'CHANGELOG.md').read_text())
    (tree / 'debian/changelog').write_text(stage.debian_changelog(releases, 1))
    (tree / 'debian/files').touch()   # as a tree that was built: autopkgtest builds nothing
    # A testbed has /proc, which autopkgtest's chroot does not mount; it goes with the namespace.
    said = run('unshare', '--mount', 'sh', '-ec', 'mount -t proc proc "$1/proc"; shift; exec "$@"', 'sh', testbed,
               'autopkgtest', '--no-built-binaries', DEB, tree, '--', 'chroot', testbed)
    assert re.search(r'^window +PASS$', said, re.MULTILINE), said


# ------------------------------------------------------------------------------------------------------------------ rpm

def stand_in(directory, name, version, provides):
    """An empty rpm."""
    spec = directory / f'{name}.spec'
    spec.write_text(textwrap.dedent(f'''\
        Name: {name}
        Version: {version}
        Release: 1
        Summary: stands for what the root has from elsewhere
        License: MIT
        {f'Provides: {provides}' if provides else ''}
        %description
        Nothing.
        %files
        '''))
    run('rpmbuild', '-bb', '--quiet', '--define', f'_topdir {directory}/build', '--define', f'_rpmdir {directory}',
        spec)


@pytest.fixture(scope='module')
def rpm_guest(tmp_path_factory, previous):
    """What a guest with dnf has: the repositories of RPM_FILES, as dnf reads them, and verify.sh."""
    made = tmp_path_factory.mktemp('rpm')
    for name, packages in STAND_INS.items():
        made.joinpath(name).mkdir()
        for each in packages:
            stand_in(made / name, *each)
    made.joinpath('x-msrv').mkdir()
    for rpm in (RPM, *(path for path in previous if path.suffix == '.rpm')):
        shutil.copy(rpm, made / 'x-msrv')
    for repository in made.iterdir():
        run('createrepo_c', '--quiet', repository)
    return {**VERIFY, **RPM_FILES, '/srv/repo': made}


def test_rpm(rpm_guest):
    """Debian with dnf: its resolution and scriptlets are those of EL, its files those of Debian."""
    with Guest(guests.root('bookworm-dnf'), rpm_guest) as guest:
        guest.run('dnf', '-y', 'install', *(name for name, *_ in STAND_INS['system']))
        assert verify(guest) > ENOUGH


def test_on_el_9_its_rpm_brings_a_newer_python(rpm_guest):
    """EL 9 has Python 3.9 as python3, and others beside it, of which the package recommends one."""
    with Guest(guests.root('bookworm-dnf'), rpm_guest) as guest:
        dnf = ('dnf', '-y', '--enablerepo=el9', '--exclude=python3-3.11*')
        guest.run(*dnf, 'install', 'python3', 'systemd', 'bash', 'glibc', 'zlib')
        assert guest.run('rpm', '-q', '--qf', '%{version}', 'python3') == '3.9'
        guest.run(*dnf, 'install', 'x-msrv')
        assert guest.run('rpm', '-q', '--qf', '%{version}', 'python3.12') == '3.12'


# -------------------------------------------------------------------------------------------------------------- Vagrant

def test_vagrant_takes_the_vagrantfile(tmp_path):
    """Without a provider: no virtual machine runs here."""
    shutil.copy(ROOT / 'Vagrantfile', tmp_path)
    run('vagrant', 'validate', '--ignore-provider', cwd=tmp_path, env={**os.environ, 'VAGRANT_HOME': tmp_path / 'home'})
