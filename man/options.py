#!/usr/bin/env python3
"""The option list of x-msrv.conf(5), from the table of options in xmsrv.py.

options.py prints it; options.py FILE writes it between the two marks of the page (`make man`).
"""
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the module as it is edited, not as it is installed
import xmsrv

BEGIN = '.\\" options: made by man/options.py\n'
END = '.\\" options: end\n'


def page_list():
    """The mdoc source: a subsection for each section, an item for each option."""
    lines, section = [], None
    for option in xmsrv.OPTIONS:
        if option.section != section:
            lines += ['.El'] * (section is not None) + [*heading(option.section), '.Bl -tag -width Ds']
            section = option.section
        lines += item(option)
    return '\n'.join([*lines, '.El']) + '\n'


def heading(section):
    """The title of a section as the file has it; the first options stand before any."""
    if not section:
        return ['.Ss Before any section']
    parts = ['[' * depth + part + ']' * depth for depth, part in enumerate(section.split('.'), 1)]
    return [f'.Ss {" ".join(parts)}\\&']   # \\&: else the last bracket is taken for a delimiter


def item(option):
    """One option: name, what it means, default."""
    if option.default is None:
        return [f'.It Cm [[{plain(option.name)}]]', *sentences(option.help)]
    default = [f'Default:\n.Ql {plain(option.default)} .'] if option.default else []
    return [f'.It Cm {plain(option.name)}', *sentences(option.help), *default]


def plain(text):
    """Text for mdoc, its hyphens such as can be copied."""
    return text.replace('\\', '\\e').replace('-', '\\-')


def sentences(text):
    """Lines of text: a new sentence begins a new line, and none is taken for a macro."""
    for sentence in re.split(r'(?<=\.) (?=[A-Z])', text.replace('\\', '\\e')):
        for line in textwrap.wrap(sentence, 76, break_on_hyphens=False):
            yield '\\&' * (line[0] in ".'") + line


def main(filename=None):
    """Prints the list, or writes it into the page."""
    if not filename:
        print(page_list(), end='')
        return
    page = Path(filename)
    head, rest = page.read_text(encoding='utf-8').split(BEGIN)
    page.write_text(head + BEGIN + page_list() + END + rest.split(END)[1], encoding='utf-8')


if __name__ == '__main__':
    main(*sys.argv[1:])
