"""Debian systems that boot here: roots made once and kept in build/guests, copies of them under systemd-nspawn.

    with Guest(root('bookworm'), files) as guest:
        guest.run('systemctl', 'is-system-running')
"""
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from servers import ROOT, wait_until

GUESTS = ROOT / 'build' / 'guests'
TOOLS = {'systemd-nspawn': 'systemd-container', 'mmdebstrap': 'mmdebstrap', 'nsenter': 'util-linux',
         'dpkg-scanpackages': 'dpkg-dev', 'createrepo_c': 'createrepo-c', 'rpmbuild': 'rpm',
         'vagrant': 'vagrant'}
KEYRING = Path('/usr/share/keyrings/debian-archive-keyring.gpg')
# What verify.sh and the packages use; nothing can be fetched once it has booted, for it has no network but its own lo.
BOOTED = ['systemd', 'systemd-sysv', 'libc6', 'zlib1g', 'python3', 'man-db', 'procps']
RUNIT = ['runit', 'runit-run']
KINDS = {'bookworm': ('bookworm', [*BOOTED, *RUNIT]), 'trixie': ('trixie', [*BOOTED, *RUNIT]),
         'testing': ('testing', BOOTED),
         'bookworm-dnf': ('bookworm', [*BOOTED, *RUNIT, 'dnf', 'rpm']),
         # Not to boot: Debian's image for containers, what the package asks for, and what autopkgtest does.
         'slim': ('trixie', ['libc6', 'zlib1g', 'python3', 'systemd-standalone-sysusers', 'systemd-standalone-tmpfiles',
                             'apt-utils'])}
CGROUPS = [path for path in (Path('/sys/fs/cgroup/unified'), Path('/sys/fs/cgroup/systemd'), Path('/sys/fs/cgroup'))
           if (path / 'cgroup.procs').exists()]
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'


def missing():
    """Why no guest can boot here, or nothing."""
    if os.geteuid():
        return 'only root can boot a system'
    if not CGROUPS:
        return 'there are no cgroups here'
    lacking = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    return f'apt-get install {" ".join(lacking)}' if lacking else ''


def run(*command, expect=0, seconds=600, stderr=subprocess.STDOUT, **options):
    """What a command prints, on stderr, too; AssertionError with it on another status than `expect`."""
    ran = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                         stderr=stderr, errors='replace', check=False, timeout=seconds, **options)
    assert ran.returncode == expect, f'{command}: {ran.returncode}\n{ran.stdout}'
    return ran.stdout


@contextlib.contextmanager
def one_at_a_time(name):
    """Of all tests that run at once, one makes `name`."""
    GUESTS.mkdir(parents=True, exist_ok=True)
    with (GUESTS / f'.{name}.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mirror():
    """Where this machine has Debian from."""
    for update in (False, True):   # apt knows whose a source is when it has its lists
        if update:
            run('apt-get', '-qq', 'update')
        targets = run('apt-get', 'indextargets', '--format', '$(REPO_URI)', 'Created-By: Packages', 'Origin: Debian',
                      'Component: main').split()
        if targets:
            return targets[0]
    raise AssertionError("this machine has no source of Debian's packages")


def root(kind):
    """The directory of a kind of system; made where it is not there, or was made of other packages."""
    suite, wanted = KINDS[kind]
    packages = ','.join(wanted)
    made, stamp = GUESTS / kind, GUESTS / f'.{kind}.packages'
    with one_at_a_time(kind):
        if not (made.exists() and stamp.exists() and stamp.read_text() == packages):
            unfinished = GUESTS / f'{kind}.new'
            for old in (made, unfinished):
                shutil.rmtree(old, ignore_errors=True)
            run('nice', 'mmdebstrap', '--quiet', '--mode=root', '--variant=minbase', f'--include={packages}',
                '--aptopt=Acquire::Check-Valid-Until "false"', suite, unfinished,
                f'deb [signed-by={KEYRING}] {mirror()} {suite} main')
            unfinished.rename(made)
            stamp.write_text(packages)
    return made


class Guest:
    """A copy of a root, booted. `files`: what it has besides, path -> file, directory or text."""

    def __init__(self, original, files):
        self.name = f'x-msrv-{original.name}-{secrets.token_hex(4)}'
        self.root, self.log = GUESTS / self.name, GUESTS / f'{self.name}.log'
        self.cgroups = [path / self.name for path in CGROUPS]
        self.nspawn = None
        run('cp', '-a', '--reflink=auto', original, self.root)
        written = {'/etc/machine-id': '', '/etc/hostname': 'guest\n', '/etc/apt/sources.list': '',
                   '/etc/hosts': '127.0.0.1 localhost guest\n::1 localhost\n'}
        for path, what in {**written, **files}.items():
            self._put(path, what)

    def __enter__(self):
        try:
            self._boot()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exception):
        """Down, by itself or not, and nothing left of it here; where a test failed, its log stays."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run('systemctl', 'poweroff', '--no-wall')
            self.nspawn.wait(timeout=30)
        # The guest outlives an nspawn that is killed: all that is in its cgroups goes.
        for cgroup in self.cgroups:
            wait_until(lambda cgroup=cgroup: _removed(cgroup), f'{cgroup} is empty')
        if self.nspawn:
            self.nspawn.wait(timeout=10)
        shutil.rmtree(self.root)
        GUESTS.joinpath(f'.#{self.name}.lck').unlink(missing_ok=True)
        if not any(exception):
            self.log.unlink(missing_ok=True)

    def run(self, *command, **options):
        """What a command in the guest prints; as run()."""
        assert (init := self._first_process()), f'{self.name} does not run'
        return run('nsenter', '-t', init, '-m', '-u', '-i', '-n', '-p', '-C', '--', 'env', '-i', f'PATH={PATH}',
                   'HOME=/root', *command, **options)

    def _put(self, path, what):
        """A file or directory of ours, or a text, into the root."""
        target = self.root / path.lstrip('/')
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, str):
            target.write_text(what)
        elif what.is_dir():
            shutil.copytree(what, target, dirs_exist_ok=True)
        else:
            shutil.copy(what, target)

    def _boot(self):
        """Until systemd says that all is well."""
        for cgroup in self.cgroups:
            cgroup.mkdir()
        # sh enters the guest's own cgroup before nspawn starts: two guests in one would share their PID 1's scope.
        enter = ''.join(f'echo $$ >{cgroup}/cgroup.procs; ' for cgroup in self.cgroups)
        with self.log.open('w') as log:
            self.nspawn = subprocess.Popen(
                ['sh', '-c', f'{enter} exec "$@"', 'sh', 'systemd-nspawn', '--quiet', '--boot', '--register=no',
                 '--keep-unit', '--private-network', '--console=pipe', f'--machine={self.name}',
                 f'--directory={self.root}'],
                env={**os.environ, 'SYSTEMD_NSPAWN_UNIFIED_HIERARCHY': '1'}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log)
        wait_until(self._is_up, f'{self.name} is up, see {self.log}', 60)

    def _first_process(self):
        """The child of nspawn's that is PID 1 inside, if it is there yet; nspawn has others while it prepares."""
        assert self.nspawn and self.nspawn.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            for pid in Path(f'/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children').read_text().split():
                if re.search(r'^NSpid:.*\t1$', Path(f'/proc/{pid}/status').read_text(), re.MULTILINE):
                    return pid
        return None

    def _is_up(self):
        try:
            return self._first_process() and self.run('systemctl', 'is-system-running') == 'running\n'
        except AssertionError as error:
            assert self.nspawn.poll() is None, self.log.read_text()
            assert 'degraded' not in str(error), self.run('systemctl', '--failed')
            return False


def _removed(cgroup):
    """Whether it is gone: all in it is killed, and its directories are removed, inner ones first."""
    with contextlib.suppress(OSError):
        for path, _, _ in os.walk(cgroup, topdown=False):
            for pid in Path(path, 'cgroup.procs').read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            os.rmdir(path)
    return not cgroup.exists()
