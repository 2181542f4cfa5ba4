"""README.md and docs/: each command of theirs runs, and prints what they say."""
import re

import pytest

import servers
from documents import Stage, answers, commands

# make: it runs these tests. The others: tools that a system on which the tests run need not have.
ELSEWHERE = {'make', 'docker', 'kubectl'}
DOCUMENTS = ['README.md', *sorted(str(path.relative_to(servers.ROOT)) for path in (servers.ROOT / 'docs').glob('*.md'))]
PLAYED = [(file, heading) for file in DOCUMENTS for heading, blocks in answers(file).items()
          if any(kind in ('sh', 'ini') for kind, _ in blocks)]


@pytest.fixture
def stage(workdir, nsqlookupd, standin):
    """A Stage with two nsqds, which nsqlookupd names, and the stand-in of a cluster."""
    with servers.Nsqd(workdir, lookupd=[nsqlookupd]) as one, servers.Nsqd(workdir, lookupd=[nsqlookupd]) as two:
        yield Stage(workdir, [one, two], nsqlookupd, standin)


@pytest.mark.parametrize(('file', 'heading'), PLAYED)
def test_an_answer_does_what_it_says(stage, file, heading):
    stage.play(answers(file)[heading])


@pytest.mark.parametrize('file', DOCUMENTS)
def test_what_is_not_run_is_what_cannot_be_had(file):
    for script in commands(file, 'sh elsewhere').values():
        assert {line.split()[0] for line in script.splitlines() if line and line[0] not in '# '} <= ELSEWHERE


@pytest.mark.parametrize('file', DOCUMENTS)
def test_links_lead_somewhere(file):
    path = servers.ROOT / file
    text = path.read_text()
    headings = {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
                for heading in re.findall(r'^#+ (.+)$', text, re.MULTILINE)}
    for target in re.findall(r'\]\(([^)#]*#?[^)]*)\)', text):
        file_part, _, anchor = target.partition('#')
        if not file_part.startswith('http'):
            assert not file_part or (path.parent / file_part).exists(), target
            assert not anchor or file_part or anchor in headings, target


def test_readme_is_short():
    assert len((servers.ROOT / 'README.md').read_text().splitlines()) <= 150
