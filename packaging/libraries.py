#!/usr/bin/env python3
"""Brings the libraries that the packages carry: libraries.py ARCH VENV TREE.

Run by `make vendor`. VENV has the pinned setuptools and wheel, which build pynsq (it has no wheel). The rest are
wheels, downloaded by the hashes of vendor/requirements.txt for each Python that the packages serve, and laid into one
TREE; beside it TREE.txt lists what is in it.
"""
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PYTHONS = ('3.11', '3.12', '3.13', '3.14')
MACHINES = {'amd64': 'x86_64', 'arm64': 'aarch64'}
GLIBC = ('2_28', '2_17', '2_5')   # the newest decides: what the oldest system that is served has (EL 8)
SDISTS = 'pynsq'                  # the one with no wheel

# Libraries that a library brings in its turn: name, files that show its version, and how; whose it is.
EMBEDDED = (('decorator', 'prometheus_client/decorator.py', rb"__version__ = '([\d.]+)'", 'prometheus_client'),
            ('libyaml', 'aerospike.libs/libyaml*', rb'\0(0\.\d\.\d+)\0', 'the aerospike client'),
            ('Lua', 'aerospike.cpython-*.so', rb'\$LuaVersion: Lua (5\.[\d.]+)', 'the aerospike client'),
            ('OpenSSL', 'aerospike.libs/libcrypto*', rb'OpenSSL (3\.[\w.]+ +\d+ \w+ \d+)', 'the aerospike client'))

# What the packages do without: builds' leftovers (they differ between the wheels of one version), tests, stubs for
# type checkers, and what only a person at a shell would use.
PRUNED = re.compile(r'\.dist-info/(WHEEL|RECORD|INSTALLER|top_level\.txt|entry_points\.txt|sboms/.*)$'
                    r'|\.pyi$|/py\.typed$|^tornado/test/|^aerospike-stubs/|^tqdm/(completion\.sh|tqdm\.1)$')


def main(arch, venv, tree):
    """Downloads, merges, strips, and says what came."""
    tree, wheels = Path(tree), Path(f'{tree}.wheels')
    for leftover in (tree, wheels):
        shutil.rmtree(leftover, ignore_errors=True)
    pip = [f'{venv}/bin/python', '-m', 'pip', '--quiet', '--disable-pip-version-check', '--no-input']
    for python in PYTHONS:
        download(pip, arch, python, wheels)
    for sdist in wheels.glob('*.tar.gz'):
        run(*pip, 'wheel', '--no-deps', '--no-index', '--no-build-isolation', '--wheel-dir', wheels, sdist)
    for wheel in sorted(wheels.glob('*.whl')):
        merge(wheel, tree)
    strip(arch, tree)
    text = '\n'.join(sorted(contents(tree), key=str.lower)) + '\n'
    tree.with_name(f'{tree.name}.txt').write_text(text)
    print(text, end='')


def run(*command):
    """Runs a command; ends this one where it fails, for it has said why."""
    if subprocess.run([str(part) for part in command], check=False).returncode:
        sys.exit(f'libraries.py: failed: {" ".join(str(part) for part in command)}')


def download(pip, arch, python, wheels):
    """What the pins name, for one Python, whatever Python this is run by."""
    platforms = [f'manylinux_{glibc}_{MACHINES[arch]}' for glibc in GLIBC] + ['any']
    run(*pip, 'download', '--no-deps', '--require-hashes', '--no-build-isolation', '--dest', wheels,
        '--only-binary', ':all:', '--no-binary', SDISTS, '--implementation', 'cp', '--python-version', python,
        *itertools.chain.from_iterable(('--platform', platform) for platform in platforms),
        *itertools.chain.from_iterable(('--abi', abi) for abi in ('cp' + python.replace('.', ''), 'abi3', 'none')),
        '--requirement', 'vendor/requirements.txt')


def merge(wheel, tree):
    """Lays the files of a wheel into the tree; where one is there already it has to be the very same."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith('/') or PRUNED.search(name):
                continue
            content, target = without_shebang(name, archive.read(name)), tree / name
            if target.exists() and target.read_bytes() != content:
                sys.exit(f'libraries.py: {wheel.name}: {name} differs from the one of another Python')
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def without_shebang(name, content):
    """A module of a library is no command: only the mark of the remark stays, so that no line moves."""
    return re.sub(rb'\A#!.*', b'#', content) if name.endswith('.py') else content


def strip(arch, tree):
    """Takes the debug information, four fifths of all bytes, and the compiler's name out of the shared objects."""
    command = 'strip' if arch == this_arch() else f'{MACHINES[arch]}-linux-gnu-strip'
    run(command, '--strip-unneeded', '--remove-section=.comment', *shared_objects(tree))


def this_arch():
    """The name that the packages have for this machine's architecture."""
    return next((arch for arch, machine in MACHINES.items() if machine == os.uname().machine), None)


def shared_objects(tree):
    """All of them, in order."""
    return sorted(path for path in tree.rglob('*') if re.search(r'\.so(\.|$)', path.name))


def contents(tree):
    """Yields a line for each library, and for those that a library brings in its turn."""
    for metadata in tree.glob('*.dist-info/METADATA'):
        text = metadata.read_text(encoding='utf-8')
        yield ' '.join(re.search(rf'^{name}: (.*)', text, re.MULTILINE)[1] for name in ('Name', 'Version'))
    for name, files, pattern, owner in EMBEDDED:
        versions = {found[1].decode() for path in tree.glob(files) if (found := re.search(pattern, path.read_bytes()))}
        if len(versions) != 1:
            sys.exit(f'libraries.py: {files} should show one version of {name}, and shows {sorted(versions) or "none"}')
        yield f'{name} {versions.pop()} (of {owner})'


if __name__ == '__main__':
    main(*sys.argv[1:])
