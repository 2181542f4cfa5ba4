"""What Prometheus and Grafana load: all that is asked for exists. What promtool says of it is in test/monitoring."""
import collections
import itertools
import json
import re
import shlex

import pytest

from prometheus_files import ALERTS, DASHBOARD, HERE, QUERIES, README, RULES, RULES_TEST, read_panels

TARGET = {'job', 'instance'}                  # labels that Prometheus adds
OTHERS = {'up': TARGET}                       # series that are Prometheus' own
WORDS = {'and', 'or', 'unless', 'offset', 'bool'}


# -------------------------------------------------------------------------------------------------- what a query names

def existing():
    """The labels of each series that a query may name."""
    import xmsrv
    series = dict(OTHERS)
    for metric in xmsrv.METRIC_DEFINITIONS:
        labels = TARGET | set(metric.labels)
        if metric.kind == 'histogram':
            series |= {f'{metric.name}_bucket': labels | {'le'}, f'{metric.name}_sum': labels,
                       f'{metric.name}_count': labels}
        else:
            series[metric.name] = labels
    return series


def selectors(expr):
    """Of a PromQL expression, its series as [(name, labels it is picked by)], and the labels it is grouped by."""
    expr = re.sub(r'"[^"]*"', '""', expr)
    clause = re.compile(r'\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)')
    grouped = {label for labels in clause.findall(expr) for label in re.findall(r'\w+', labels)}
    expr = re.sub(r'\[[^]]*\]', '', clause.sub('', expr))
    found = re.findall(r'(?<![\w$])([a-zA-Z_:][\w:]*)\b(?!\s*\()(?:\s*\{([^}]*)\})?', expr)
    return [(name, set(re.findall(r'(\w+)\s*[=!]', picked))) for name, picked in found if name not in WORDS], grouped


def faults(expr, labels=frozenset()):
    """What an expression names that does not exist; labels: of its result, those that are shown."""
    series, (named, grouped) = existing(), selectors(expr)
    unknown = [name for name, _ in named if name not in series]
    known = set().union(*(series.get(name, ()) for name, _ in named))
    unknown += [f'{name}{{{label}}}' for name, picked in named for label in picked - series.get(name, picked)]
    return unknown + sorted((grouped | labels) - known)


@pytest.mark.parametrize(('expr', 'unknown'), [
    ('rate(xmsrv_received[5m])', ['xmsrv_received']),
    ('rate(xmsrv_lag_seconds[5m])', ['xmsrv_lag_seconds']),
    ('xmsrv_in_flight_bucket', ['xmsrv_in_flight_bucket']),
    ('up == 0 and node_load1 offset 5m > 1', ['node_load1']),
    ('xmsrv_store_up{job="x", state="up"}', ['xmsrv_store_up{state}']),
    ('sum by (reason, le) (xmsrv_messages_total{outcome!~"le"})', ['le', 'reason']),
    ('sum without (outcome) (rate(xmsrv_messages_total{outcome="reason", instance=~"$instance"}[5m] offset 1h))', []),
])
def test_the_reader_of_queries_sees(expr, unknown):
    """So that the tests below do not pass for a blindness of their own."""
    assert faults(expr) == unknown


# ------------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize('alert', ALERTS, ids=lambda alert: alert.name)
def test_an_alert_is_tested_both_ways(alert):
    """promtool runs what is there; this says what has to be there."""
    cases = re.split(r'\n      - (?=\{?alertname: )|\n  - name: ', RULES_TEST.read_text())
    mine = [case for case in cases if re.match(rf'\{{?alertname: {alert.name}\b', case)]
    assert {'exp_alerts' in case for case in mine} == {True, False}


@pytest.mark.parametrize('alert', ALERTS, ids=lambda alert: alert.name)
def test_an_alert_names_what_exists(alert):
    """Series and labels, also those in its words."""
    assert faults(alert.expr, set(re.findall(r'\$labels\.(\w+)', alert.text))) == []


@pytest.mark.parametrize('alert', ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_what_to_do(alert):
    """How urgent it is, what it is, and a command."""
    assert re.search(r'^ {10}severity: (critical|warning)$', alert.text, re.MULTILINE)
    assert re.search(r'^ {10}summary: .*\$labels\.instance', alert.text, re.MULTILINE)
    assert re.search(r'^ {10}description: >-\n.{60}', alert.text, re.MULTILINE)
    assert re.search(r'`(x-msrv|journalctl|systemctl)\s', alert.text)


def test_the_commands_in_the_alerts_exist():
    """As the parser of the command line has them."""
    import xmsrv
    commands = set(re.findall(r'`x-msrv ([^`]+)`', re.sub(r'\s+', ' ', RULES.read_text())))
    assert {'check --connect', 'replay --list'} <= commands
    for command in commands:
        xmsrv.build_parser().parse_args(shlex.split(command))


# -------------------------------------------------------------------------------------------------------- the dashboard

def test_the_dashboard_is_of_no_real_system():
    """It picks its data source by a variable, and runs on Grafana 10."""
    assert 38 <= DASHBOARD['schemaVersion'] <= 41 and 'id' not in DASHBOARD
    assert [(variable['name'], variable['type']) for variable in DASHBOARD['templating']['list']] == [
        ('datasource', 'datasource'), ('instance', 'query')]
    assert set(re.findall(r'"uid": "(.*?)"', json.dumps(DASHBOARD))) == {'x-msrv', '${datasource}'}


def test_the_instances_are_those_of_a_series_that_exists():
    """The query of the variable is no PromQL."""
    query = DASHBOARD['templating']['list'][1]['query']['query']
    name, label = re.fullmatch(r'label_values\((\w+), (\w+)\)', query).groups()
    assert label in existing()[name]


def test_panels_have_ids_of_their_own():
    """Grafana links to a panel by its id."""
    ids = [panel['id'] for panel in read_panels()]
    assert len(set(ids)) == len(ids)


def test_panels_do_not_overlap():
    """And none is wider than the 24 columns."""
    taken = collections.Counter()
    for panel in read_panels():
        x, y, w, h = (panel['gridPos'][name] for name in 'xywh')
        assert 0 <= x < x + w <= 24, panel['title']
        taken.update(itertools.product(range(x, x + w), range(y, y + h)))
    assert [place for place, number in taken.items() if number > 1] == []


@pytest.mark.parametrize('panel', read_panels('other'), ids=lambda panel: panel['title'])
def test_a_panel_is_whole(panel):
    """A data source, a unit, and a letter for each query."""
    assert panel['datasource']['uid'] == '${datasource}'
    assert panel['fieldConfig']['defaults']['unit']
    assert [target['refId'] for target in panel['targets']] == list('ABCD'[:len(panel['targets'])])


@pytest.mark.parametrize('query', QUERIES, ids=lambda query: f'{query.panel}: {query.legend}')
def test_a_query_names_what_exists(query):
    """Series, and labels, also those of the legend; each looks at the chosen instances only."""
    assert query.legend
    assert faults(query.expr, set(re.findall(r'\{\{(\w+)\}\}', query.legend))) == []
    assert query.expr.count('instance=~"$instance"') == len(selectors(query.expr)[0])


# ---------------------------------------------------------------------------------------------------------- the metrics

def test_each_metric_is_looked_at():
    """On the dashboard or by a rule; what nobody looks at need not be counted."""
    import xmsrv
    named = {name for asked in (*ALERTS, *QUERIES) for name, _ in selectors(asked.expr)[0]}
    seen = named | {re.sub(r'_(bucket|sum|count)$', '', name) for name in named}
    assert [metric.name for metric in xmsrv.METRIC_DEFINITIONS if metric.name not in seen] == []


# ----------------------------------------------------------------------------------------------------------- the README

def test_the_readme_names_each_file():
    """And none that is not there."""
    assert set(re.findall(r'^\| `(.*?)`', README, re.MULTILINE)) == {
        file.name for file in HERE.iterdir() if file.name != 'README.md'}
