#!/usr/bin/env python3
"""Lays out the tree that a package is built from: stage.py ARCH DIRECTORY; prints VERSION and SOURCE_DATE_EPOCH.

Changelogs are made from CHANGELOG.md, the version is that of xmsrv.py, and the rpm declares the libraries of `make
vendor` as bundled. The date of all files is SOURCE_DATE_EPOCH where it is set, else the day of the release in
CHANGELOG.md, else (unreleased) that of the last commit.
"""
import calendar
import email.utils
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

SOURCES = ('CHANGELOG.md', 'LICENSE', 'Makefile', 'README.md', 'bin', 'debian', 'etc', 'kubernetes', 'man',
           'monitoring', 'packaging', 'rpm', 'runit', 'systemd', 'test/nsq', 'xmsrv.py')
REVISION = 1   # of the packages, where the program is the same
MAINTAINER = 'the x-msrv authors <x-msrv@users.noreply.invalid>'
BUNDLED_MARK = '# bundled:\n'
LEFTOVERS = shutil.ignore_patterns('__pycache__')


def main(arch, directory):
    """Copies what `make install` needs, and writes the changelogs."""
    stage, version = Path(directory), program_version()
    changes = releases(Path('CHANGELOG.md').read_text(encoding='utf-8'))
    if changes[0][0] != version:
        sys.exit(f'stage.py: CHANGELOG.md begins with {changes[0][0]}, __version__ in xmsrv.py is {version}')
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for name in SOURCES:
        if os.path.isdir(name):
            shutil.copytree(name, stage / name, ignore=LEFTOVERS)
        elif os.path.exists(name):
            shutil.copy(name, stage / name)
    vendor = Path('build/vendor')
    shutil.copytree(vendor / arch, stage / vendor / arch, ignore=LEFTOVERS)
    shutil.copy(vendor / f'{arch}.txt', stage / vendor)
    date = source_date(changes[0][1])
    (stage / 'debian/changelog').write_text(debian_changelog(changes, date), encoding='utf-8')
    spec, libraries = stage / 'rpm/x-msrv.spec', (vendor / f'{arch}.txt').read_text(encoding='utf-8')
    text = with_bundled(spec.read_text(encoding='utf-8'), libraries)
    spec.write_text(text + rpm_changelog(changes, date), encoding='utf-8')
    print(version, date)


def program_version():
    """The one place where it stands."""
    return re.search(r"^__version__ = '([^']+)'", Path('xmsrv.py').read_text(encoding='utf-8'), re.MULTILINE)[1]


def releases(text):
    """The releases of a CHANGELOG.md as (version, date or `unreleased`, [change, ...]), newest first."""
    found = []
    for head, body in re.findall(r'^## (.+?)$(.*?)(?=^## |\Z)', text, re.MULTILINE | re.DOTALL):
        version, date = re.fullmatch(r'(\S+) \((unreleased|\d{4}-\d\d-\d\d)\)', head).groups()
        items = re.split(r'^- ', body, flags=re.MULTILINE)[1:]
        found.append((version, date, [' '.join(item.split()) for item in items]))
    return found


def source_date(date):
    """The seconds since 1970 that all files bear."""
    if os.environ.get('SOURCE_DATE_EPOCH'):
        return int(os.environ['SOURCE_DATE_EPOCH'])
    if date != 'unreleased':
        return day(date)
    git = subprocess.run(['git', 'log', '-1', '--format=%ct'], capture_output=True, text=True, check=False)
    return int(git.stdout) if git.stdout.strip() else int(os.stat('CHANGELOG.md').st_mtime)


def day(date):
    """Noon of YYYY-MM-DD (UTC): the same day nearly everywhere."""
    return calendar.timegm(time.strptime(date, '%Y-%m-%d')) + 12 * 3600


def dated(changes, unreleased):
    """The releases with their dates in seconds."""
    return [(version, unreleased if date == 'unreleased' else day(date), items) for version, date, items in changes]


def debian_changelog(changes, unreleased):
    """debian/changelog; see deb-changelog(5)."""
    return '\n'.join(
        f'x-msrv ({version}-{REVISION}) unstable; urgency=medium\n\n' + bullets(items, '  * ', 78)
        + f'\n -- {MAINTAINER}  {email.utils.formatdate(date)}\n'
        for version, date, items in dated(changes, unreleased))


def rpm_changelog(changes, unreleased):
    """The %changelog of the spec: the names of days and months in English, whatever the locale."""
    def when(date):
        weekday, day_, month, year = email.utils.formatdate(date).replace(',', '').split()[:4]
        return f'{weekday} {month} {day_} {year}'
    return '\n%changelog\n' + '\n'.join(
        f'* {when(date)} {MAINTAINER} - {version}-{REVISION}\n'
        + bullets([item.replace('%', '%%') for item in items], '- ', 78)
        for version, date, items in dated(changes, unreleased))


def with_bundled(spec, libraries):
    """The spec with what Fedora asks of bundled libraries, a Provides for each, in the place of its mark."""
    assert spec.count(BUNDLED_MARK) == 1
    return spec.replace(BUNDLED_MARK, ''.join(f'Provides: {name}\n' for name in bundled(libraries)))


def bundled(libraries):
    """Yields `bundled(NAME) = VERSION` for each line of `make vendor`'s list; Python's are called as Fedora does."""
    for line in libraries.splitlines():
        name, version = line.lower().replace('_', '-').split()[:2]
        python = '' if '(of the aerospike client)' in line else 'python3-'
        yield f'bundled({python}{name}) = {version}'


def bullets(items, mark, width):
    """Wrapped items, a mark before each."""
    return ''.join(textwrap.fill(item, width, initial_indent=mark, subsequent_indent=' ' * len(mark),
                                 break_long_words=False, break_on_hyphens=False) + '\n' for item in items)


if __name__ == '__main__':
    main(*sys.argv[1:])
