"""The deb and the rpm of dist/, as `make deb rpm` has just built them, and once more from elsewhere."""
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from servers import ROOT

sys.path.append(str(ROOT / 'packaging'))
import libraries
import stage

VERSION = stage.program_version()
ARCH = libraries.this_arch()
MACHINE = libraries.MACHINES[ARCH]
DEB = ROOT / 'dist' / f'x-msrv_{VERSION}-{stage.REVISION}_{ARCH}.deb'
RPM = ROOT / 'dist' / f'x-msrv-{VERSION}-{stage.REVISION}.{MACHINE}.rpm'
PROGRAM, LIB = Path('usr/share/x-msrv'), Path('usr/lib/x-msrv')
# What every system that is served has: the C library from 2.28 on, and zlib.
SYSTEM_LIBRARIES = re.compile(r'(libc|libm|libpthread|librt|libdl|libz|ld-linux-[\w-]+)\.so\.\d+')
MIB = 1 << 20


def run(*command, expect=0, **options):
    """What a command prints on stdout; AssertionError with all of it on another status than `expect`."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=500,
                         **options)
    assert ran.returncode == expect, f'{command}: {ran.returncode}\n{ran.stdout}{ran.stderr}'
    return ran.stdout


def field(name):
    """A field of the deb's control file."""
    return run('dpkg-deb', '--field', DEB, name).strip()


@pytest.fixture(scope='module')
def deb_tree(tmp_path_factory):
    """The files of the deb."""
    tree = tmp_path_factory.mktemp('deb')
    run('dpkg-deb', '--extract', DEB, tree)
    return tree


@pytest.fixture(scope='module')
def rpm_tree(tmp_path_factory):
    """The files of the rpm."""
    tree = tmp_path_factory.mktemp('rpm')
    run('sh', '-c', f'rpm2cpio {RPM} | cpio --quiet -idm', cwd=tree)
    return tree


def files(tree):
    """The files below `tree` as relative paths."""
    return {path.relative_to(tree) for path in tree.rglob('*') if not path.is_dir()}


# -------------------------------------------------------------------------------------------------------- how it builds

def test_the_same_bytes_from_elsewhere_and_without_a_network(tmp_path):
    """Another directory, time zone, umask and locale; no index, and for root no network at all."""
    tree = tmp_path / 'tree'
    tree.mkdir()
    for name in (*stage.SOURCES, 'vendor', 'build/vendor'):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('venv', '*.wheels', '__pycache__'))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, tree / name)
    environment = {**os.environ, 'PIP_NO_INDEX': '1', 'TZ': 'Pacific/Auckland', 'LC_ALL': 'C', 'LANG': 'C',
                   'SOURCE_DATE_EPOCH': run('rpm', '-qp', '--queryformat', '%{BUILDTIME}', RPM)}
    alone = ['unshare', '--net'] if os.geteuid() == 0 else []
    run(*alone, 'sh', '-c', 'umask 077; make deb rpm', cwd=tree, env=environment)
    for built in (DEB, RPM):
        assert hashlib.sha256((tree / 'dist' / built.name).read_bytes()).digest() == hashlib.sha256(
            built.read_bytes()).digest(), built.name


def test_lintian_has_nothing_to_say(tmp_path):
    """Down to pedantic tags; each override says why."""
    root = ['--allow-root'] if os.geteuid() == 0 else []
    assert run('lintian', *root, '--pedantic', '--display-info', DEB) == ''
    assert run('lintian', *root, '--pedantic', '--display-info', source_package(tmp_path)) == ''
    for name in ('x-msrv.lintian-overrides', 'source/lintian-overrides'):
        overrides = (ROOT / 'debian' / name).read_text()
        assert not re.search(r'^[^#\n].*\n[^#]', overrides, re.MULTILINE) and overrides.startswith('#')


def source_package(directory):
    """The .dsc of the tree that the deb was built from."""
    tree = directory / f'x-msrv-{VERSION}'
    run(sys.executable, 'packaging/stage.py', ARCH, tree, cwd=ROOT)
    run('tar', '--exclude=debian', '-czf', f'x-msrv_{VERSION}.orig.tar.gz', tree.name, cwd=directory)
    run('dpkg-source', '-b', tree.name, cwd=directory)
    return next(directory.glob('*.dsc'))


def test_the_watch_file_finds_releases(tmp_path):
    """Tags of a repository that stands for the one that it names."""
    upstream, tree = tmp_path / 'upstream', tmp_path / 'x-msrv'
    shutil.copytree(ROOT / 'debian', tree / 'debian')
    releases = stage.releases((ROOT / 'CHANGELOG.md').read_text())
    (tree / 'debian/changelog').write_text(stage.debian_changelog(releases, 1))
    git = ('git', '-C', upstream, '-c', 'user.name=t', '-c', 'user.email=t')
    run('git', 'init', '--quiet', upstream)
    run(*git, 'commit', '--quiet', '--allow-empty', '--message', 'x')
    for tag in (f'v{VERSION}', f'v{VERSION}.1', 'other'):
        run(*git, 'tag', tag)
    url = re.search(r'^https://\S+', (tree / 'debian/watch').read_text(), re.MULTILINE)[0]
    instead = {'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': f'url.{upstream}.insteadOf', 'GIT_CONFIG_VALUE_0': url}
    said = run('uscan', '--no-download', '--dehs', cwd=tree, env=os.environ | instead)
    assert f'<upstream-version>{VERSION}.1</upstream-version>' in said


def test_rpmlint_has_nothing_to_say():
    """But for what rpm/x-msrv.rpmlintrc gives a reason for; of the spec neither."""
    spec = ROOT / f'build/stage/rpm/x-msrv-{VERSION}/rpm/x-msrv.spec'
    assert ' 0 errors, 0 warnings' in run('rpmlint', '-r', ROOT / 'rpm' / 'x-msrv.rpmlintrc', spec, RPM)


@pytest.mark.parametrize('page', ['x-msrv.8', 'x-msrv.conf.5'])
def test_mandoc_has_nothing_to_say(page):
    """But for pages that are not installed here."""
    ran = subprocess.run(['mandoc', '-Tlint', ROOT / 'man' / page], capture_output=True, text=True, check=False)
    assert [line for line in ran.stdout.splitlines() if 'referenced manual not found' not in line] == []


@pytest.mark.parametrize('unit', sorted(path.name for path in (ROOT / 'systemd').glob('*.service')))
def test_a_service_is_exposed_little(unit):
    """systemd's own judgement, 0 to 10; the comments in the unit name the figure."""
    said = run('systemd-analyze', 'security', '--offline=true', '--no-pager', ROOT / 'systemd' / unit)
    exposure = re.search(r'Overall exposure level for \S+: ([\d.]+)', said)[1]
    assert float(exposure) <= 1.2
    assert f'says {exposure} ' in (ROOT / 'systemd' / unit).read_text()


def test_systemd_takes_every_unit(tmp_path, deb_tree):
    """Without a word about them."""
    shutil.copytree(deb_tree, tmp_path, dirs_exist_ok=True)
    system = Path('usr/lib/systemd/system')
    for target in (Path('/') / system).glob('*.target'):
        shutil.copy(target, tmp_path / system)
    (tmp_path / 'bin').mkdir()
    shutil.copy('/bin/sh', tmp_path / 'bin')
    units = ['x-msrv.timer', 'x-msrv@a.timer', 'x-msrv-daemon.service', 'x-msrv-daemon@a.service']
    ran = subprocess.run(['systemd-analyze', 'verify', '--man=no', f'--root={tmp_path}', *units],
                         capture_output=True, text=True, check=False)
    assert [line for line in ran.stderr.splitlines() if 'x-msrv' in line] == []


# ------------------------------------------------------------------------------------------------------ what it depends

def test_the_deb_names_no_python_but_a_range():
    """The builder's own would make it fit for no other system."""
    assert not re.search(r'python3\.\d', field('Depends'))
    assert 'python3 (>= 3.11), python3 (<< 3.15)' in field('Depends')
    assert 'python3:any' in field('Depends')


def test_python_compiles_the_deb_and_cleans_up_after_it(tmp_path):
    """dh_python3's part for the program, ours for the libraries: at installation, and when python3 becomes another."""
    run('dpkg-deb', '--control', DEB, tmp_path)
    postinst, prerm = ((tmp_path / name).read_text() for name in ('postinst', 'prerm'))
    assert re.findall(r'^\s*py3compile -p x-msrv(?::\w+)? (.*)', postinst, re.MULTILINE) == [f'/{LIB}', f'/{PROGRAM}']
    assert re.search(r'^\s*py3clean -p x-msrv', prerm, re.MULTILINE)


def test_the_deb_compiles_for_another_python(deb_tree):
    """Hooks of python3, executable, else it passes them over; one a directory."""
    for name, path in (('x-msrv', PROGRAM), ('x-msrv-libraries', LIB)):
        hook = deb_tree / f'usr/share/python3/runtime.d/{name}.rtupdate'
        assert os.access(hook, os.X_OK)
        commands = re.findall(rf'^\s*(\w+) -p x-msrv(?::\w+)? +/{path}$', hook.read_text(), re.MULTILINE)
        assert commands == ['py3clean', 'py3compile']


def test_the_rpm_asks_for_what_the_launcher_finds():
    """And for nothing that only the builder has; its private libraries are nobody else's."""
    requires = run('rpm', '-qp', '--requires', RPM).splitlines()
    assert f'({" or ".join(f"python{version}" for version in reversed(libraries.PYTHONS))}' \
        ' or (python3 >= 3.11 with python3 < 3.15))' in requires
    assert run('rpm', '-qp', '--recommends', RPM) == '(python3.12 if python3 < 3.11)\n'
    assert not [line for line in requires if re.search('python.*abi|libcrypto|libssl|libyaml', line)]
    assert not [line for line in run('rpm', '-qp', '--provides', RPM).splitlines() if '.so' in line]


def test_the_libraries_need_what_every_system_has(deb_tree):
    """dpkg-shlibdeps is not asked (debian/rules): they need each other, the C library and zlib."""
    found = libraries.shared_objects(deb_tree / LIB)
    own = {path.name for path in found}
    for path in found:
        dynamic = run('readelf', '--dynamic', '--version-info', '--wide', path)
        for needed in re.findall(r'\(NEEDED\).*\[(.*)\]', dynamic):
            assert needed in own or SYSTEM_LIBRARIES.fullmatch(needed), f'{path.name} needs {needed}'
        versions = {tuple(map(int, version.split('.'))) for version in re.findall(r'GLIBC_([\d.]+)', dynamic)}
        assert max(versions) <= (2, 28), path.name


def test_each_python_has_its_extension(deb_tree):
    """The client's; tornado's serves all of them."""
    for python in libraries.PYTHONS:
        assert (deb_tree / LIB / f'aerospike.cpython-{python.replace(".", "")}-{MACHINE}-linux-gnu.so').exists()
    assert (deb_tree / LIB / 'tornado' / 'speedups.abi3.so').exists()


def pythons():
    """Every fit Python that is here: Debian's, and pyenv's."""
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    for version in libraries.PYTHONS:
        found = [Path(f'/usr/bin/python{version}'), *pyenv.glob(f'versions/{version}.*/bin/python{version}')]
        yield from [path for path in found if path.exists()][:1]


@pytest.mark.parametrize('python', list(pythons()), ids=lambda path: path.name)
def test_the_program_runs_on_it(deb_tree, python):
    """With the libraries of the package, all of them from there."""
    assert run(python, '-I', '-S', '-B', deb_tree / PROGRAM, '--version') == f'x-msrv {VERSION}\n'
    where = run(python, '-I', '-S', '-B', '-c', f'import sys; sys.path.insert(0, "{deb_tree / LIB}")\n'
                'import aerospike, configobj, nsq, prometheus_client, tornado.speedups, tqdm, voluptuous\n'
                'for name in ("aerospike", "nsq", "tornado", "tornado.speedups"): print(sys.modules[name].__file__)')
    assert all(line.startswith(str(deb_tree / LIB)) for line in where.splitlines())


# -------------------------------------------------------------------------------------------------------- what it holds

def test_both_packages_hold_the_same_files(deb_tree, rpm_tree):
    """Documentation and its places aside."""
    def elsewhere(path):
        return path.parts[:3] in (('usr', 'share', 'doc'), ('usr', 'share', 'zsh')) or path.parts[:2] == ('etc', 'sv')
    deb, rpm = ({path for path in files(tree) if not elsewhere(path)} for tree in (deb_tree, rpm_tree))
    assert {path for path in deb - rpm if path.parts[:3] not in (
        ('usr', 'share', 'lintian'), ('usr', 'share', 'python3'))} == set()
    assert {path for path in rpm - deb if path.parts[:3] != ('usr', 'share', 'licenses')} == set()
    deb &= rpm
    for path in deb:
        if path.suffix != '.gz':
            assert (deb_tree / path).read_bytes() == (rpm_tree / path).read_bytes(), path


def test_everything_private_is_in_one_place(deb_tree):
    """Nothing of the system's Python, and no command but one."""
    for path in files(deb_tree):
        assert path.suffix != '.pyc' and (path.suffix not in ('.py', '.so') or path.parts[:3] == LIB.parts
                                          or path.parent == PROGRAM), path
    assert sorted(path.name for path in (deb_tree / PROGRAM).iterdir()) == ['__main__.py', 'xmsrv.py']
    assert [path.name for path in (deb_tree / 'usr' / 'bin').iterdir()] == ['x-msrv']


def test_no_path_of_the_builder_is_in_it(deb_tree):
    """Nor what only a developer would use."""
    for path in files(deb_tree):
        content = (deb_tree / path).read_bytes()
        assert bytes(ROOT) not in content, path
        assert path.suffix != '.pyi' and 'test' not in path.parts, path
        assert not (path.suffix == '.py' and content.startswith(b'#!')), path


def test_the_libraries_are_those_of_the_pins(deb_tree):
    """And the list that is shipped says so."""
    listed = (deb_tree / 'usr/share/doc/x-msrv/libraries.txt').read_text()
    pins = (ROOT / 'vendor/requirements.txt').read_text()
    for name, version in re.findall(r'^([\w-]+)==(\S+) *\\?$', pins, re.MULTILINE):
        assert re.search(rf'^{re.sub("[-_]", "[-_]", name)} {re.escape(version)}$', listed, re.MULTILINE), name
    for name in ('OpenSSL', 'libyaml', 'Lua'):
        assert re.search(rf'^{name} \d\S+ (.* )?\(of the aerospike client\)$', listed, re.MULTILINE)


def test_the_rpm_declares_what_it_bundles(deb_tree):
    """Each line of the list, with its version, as Fedora asks."""
    provides = run('rpm', '-qp', '--provides', RPM)
    listed = (deb_tree / 'usr/share/doc/x-msrv/libraries.txt').read_text().lower().splitlines()
    for line in listed:
        name, version = line.replace('_', '-').split()[:2]
        declared = rf'bundled\((python3-)?{re.escape(name)}\) = {re.escape(version)}'
        assert re.search(f'^{declared}$', provides, re.MULTILINE), line
    assert provides.count('bundled(') == len(listed)


def test_the_licenses_of_both_packages_are_those_of_the_libraries(deb_tree):
    """Each that a library's metadata names is in the rpm's License and in debian/copyright."""
    license_tag = run('rpm', '-qp', '--queryformat', '%{license}', RPM)
    named = {'MIT', 'BSD-2-Clause'}   # x-msrv's own and the Lua's; decorator's, of prometheus_client
    for metadata in (deb_tree / LIB).glob('*.dist-info/METADATA'):
        found = re.search(r'^License(?:-Expression)?: (.*)', metadata.read_text(), re.MULTILINE)
        named.update(found[1].replace('Apache Software License', 'Apache-2.0').split(' AND ') if found else [])
    assert set(license_tag.split(' AND ')) == named
    machine_readable = (deb_tree / 'usr/share/doc/x-msrv/copyright').read_text().lower()
    for name in (each.replace('MIT', 'Expat').lower() for each in named):
        assert re.search(rf'^license: (.* )?{re.escape(name)}( |$)', machine_readable, re.MULTILINE), name


def test_the_configuration_is_kept_over_an_upgrade():
    """A conffile of each kind; in the rpm readable by the group, on Debian tmpfiles.d sees to that."""
    control = run('dpkg-deb', '--ctrl-tarfile', DEB, expect=0, errors='replace')
    assert '/etc/x-msrv/x-msrv.conf\n' in control
    listed = run('rpm', '-qp', '--dump', RPM)
    assert re.search(r'^/etc/x-msrv/x-msrv.conf .* 0100640 root x-msrv 1 ', listed, re.MULTILINE)
    assert re.search(r'^/var/lib/x-msrv .* 040750 x-msrv x-msrv ', listed, re.MULTILINE)


def test_they_are_small():
    """Four extensions, one set of libraries."""
    assert DEB.stat().st_size < 4 * MIB and RPM.stat().st_size < 4 * MIB


# ------------------------------------------------------------------------------------------- a system of another Python

@pytest.fixture
def root(tmp_path, deb_tree):
    """A root directory with a shell, and the launcher."""
    if os.geteuid():
        pytest.skip('a root directory of our own needs root')
    for path in ['/bin/sh', *re.findall(r'(/\S+\.so\S*)', run('ldd', '/bin/sh'))]:
        target = tmp_path / path.lstrip('/')
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / 'usr/bin').mkdir(parents=True, exist_ok=True)
    shutil.copy(deb_tree / 'usr/bin/x-msrv', tmp_path / 'usr/bin')
    return tmp_path


def fake(root, name):
    """A Python that only says its name."""
    path = root / 'usr/bin' / name
    path.write_text(f'#!/bin/sh\necho "{name} $*"\n')
    path.chmod(0o755)


def test_on_a_system_of_python_39_the_launcher_says_what_to_install(root):
    """As EL 9 comes; with its python3.12 it runs on that."""
    for name in ('python3', 'python3.9'):
        fake(root, name)
    run('chroot', root, '/usr/bin/x-msrv', 'once', expect=os.EX_SOFTWARE)
    fake(root, 'python3.12')
    assert run('chroot', root, '/usr/bin/x-msrv', 'once') == 'python3.12 -I -S -B /usr/share/x-msrv once\n'
