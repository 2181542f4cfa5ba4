"""What Prometheus and Grafana load, as promtool sees it: `make test-monitoring` runs these, `make test` does not."""
import json
import re
import shutil
import subprocess

import pytest

from prometheus_files import ALERTS, QUERIES, README, RULES, RULES_TEST

VARIABLES = {'$__rate_interval': '5m', '$__range': '1h'}   # Grafana puts something like it in their place


@pytest.fixture
def promtool():
    """A function: runs promtool, which has to be there, and returns what it printed."""
    if not shutil.which('promtool'):
        pytest.fail('no promtool on PATH: apt-get install --no-install-recommends prometheus')

    def run(*arguments, **options):
        ran = subprocess.run(['promtool', *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, timeout=60, check=False, **options)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout
    return run


def test_promtool_takes_the_rules(promtool):
    """Each of them."""
    assert f'{len(ALERTS)} rules found' in promtool('check', 'rules', RULES)


def test_the_alerts_fire_when_they_should(promtool):
    """And do not when they should not."""
    assert 'SUCCESS' in promtool('test', 'rules', RULES_TEST)


def test_promtool_takes_the_queries(promtool, workdir):
    """As rules, for it has no other way to look at an expression; JSON is YAML."""
    rules = []
    for number, query in enumerate(QUERIES):
        expr = query.expr
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        rules.append({'record': f'query:{number}', 'expr': expr})
    file = workdir / 'queries.json'
    file.write_text(json.dumps({'groups': [{'name': 'queries', 'rules': rules}]}))
    assert f'{len(QUERIES)} rules found' in promtool('check', 'rules', file)


def test_promtool_takes_the_names_of_the_metrics(promtool):
    """Prometheus' conventions: units, _total, help."""
    import xmsrv
    text = ''
    for metric in xmsrv.METRIC_DEFINITIONS:
        labels = ','.join(f'{label}="x"' for label in metric.labels)
        text += f'# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n'
        if metric.kind == 'histogram':
            text += f'{metric.name}_bucket{{le="+Inf"}} 1\n{metric.name}_sum 1\n{metric.name}_count 1\n'
        else:
            text += f'{metric.name}{{{labels}}} 1\n'
    promtool('check', 'metrics', input=text)


def test_promtool_takes_the_configuration_of_the_readme(promtool, workdir):
    """As it stands there."""
    file = workdir / 'prometheus.yml'
    file.write_text(re.search(r'```yaml\n(.*?)```', README, re.DOTALL)[1])
    promtool('check', 'config', '--syntax-only', file)
