"""What Prometheus and Grafana load, taken apart: for the tests of it with promtool and without."""
import collections
import json
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parents[2] / 'monitoring'
RULES, RULES_TEST = HERE / 'x-msrv.rules.yml', HERE / 'x-msrv.rules.test.yml'
DASHBOARD = json.loads((HERE / 'x-msrv.dashboard.json').read_text())
README = (HERE / 'README.md').read_text()

# An alert: its name, expression and the whole of its lines. A query: where it stands, the expression and its legend.
Alert = collections.namedtuple('Alert', 'name expr text')
Query = collections.namedtuple('Query', 'panel expr legend')


def read_alerts():
    """The alerts of the rule file, which is plain enough to do without a YAML parser."""
    for text in RULES.read_text().split('\n      - alert: ')[1:]:
        expr = re.search(r'^ {8}expr: \|\n((?: {10}.*\n)+)', text, re.MULTILINE)
        yield Alert(text.split('\n')[0], expr[1], text)


def read_panels(kind=None):
    """The panels of the dashboard, rows or others where a kind is named."""
    return [panel for panel in DASHBOARD['panels'] if kind is None or (panel['type'] == 'row') == (kind == 'row')]


def read_queries():
    """The queries of all panels."""
    for panel in read_panels('other'):
        for target in panel['targets']:
            yield Query(panel['title'], target['expr'], target['legendFormat'])


ALERTS, QUERIES = list(read_alerts()), list(read_queries())
