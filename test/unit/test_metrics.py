"""What is counted: in this process, of several processes together, and from one run of a timer to the next."""
import math
import os
import re
import subprocess
import sys
import types

import pytest
from prometheus_client import samples

import xmsrv
from xmsrv import BUCKET_BOUNDS, METRIC_DEFINITIONS, SUMMARY_COUNTS, Metrics, MetricTotals, merge_metrics


def numbers(*figures):
    """what so many Metrics have together, by series and labels."""
    return merge_metrics([each.take_snapshot() for each in figures]).numbers


def test_figures_of_the_parts_are_those_of_the_whole():
    parts = [Metrics(), Metrics()]
    for number, part in enumerate(parts, 1):
        part.increment('xmsrv_received_total', number)
        part.set_gauge('xmsrv_store_up', number - 1)
        part.set_gauge('xmsrv_in_flight', number)
        part.set_gauge('xmsrv_period_seconds', 10 * number)
        part.record_batch(400, 0.02, [xmsrv.STORED])
        part.lag.observe_all([-5, number])
    total = numbers(*parts)
    assert (total['xmsrv_received_total',], total['xmsrv_store_up',], total['xmsrv_in_flight',]) == (3, 0, 3)
    assert (total['xmsrv_period_seconds',], total['xmsrv_build_info', xmsrv.__version__]) == (20, 1)
    assert (total['xmsrv_store_batch_records_count',], total['xmsrv_store_batch_records_sum',]) == (2, 800)
    assert [total['xmsrv_store_batch_records_bucket', le] for le in ('200.0', '500.0', '+Inf')] == [0, 2, 2]
    # what comes from the future counts as 0
    assert (total['xmsrv_lag_seconds_count',], total['xmsrv_lag_seconds_sum',]) == (4, 3)
    assert [total['xmsrv_lag_seconds_bucket', le] for le in ('0.01', '0.5', '1.0', '2.0', '+Inf')] == [2, 2, 3, 4, 4]


def test_figures_of_one_that_is_gone_are_its_counts():
    gone, past = Metrics(), MetricTotals()
    gone.increment('xmsrv_received_total', 7)
    gone.set_gauge('xmsrv_in_flight', 7)
    gone.recent.extend((float(n), 'schema', 'detail') for n in range(8))
    for _ in range(2):
        past.merge_snapshot(gone.take_snapshot(), gauges=False)
    assert past.value_of('xmsrv_received_total') == 14
    assert ('xmsrv_in_flight',) not in past.numbers and past.value_of('xmsrv_in_flight') == 0
    assert [when for when, _, _ in past.recent] == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_what_only_a_newer_worker_counts_is_left_out():
    snapshot = Metrics().take_snapshot()
    snapshot['samples'].append(['xmsrv_of_tomorrow_total', 'label', 3.0])
    assert merge_metrics([snapshot]).numbers == numbers(Metrics())


def test_a_reload_keeps_what_was_counted_and_when_all_was_well():
    metrics = Metrics()
    metrics.increment('xmsrv_received_total', 7)
    metrics.set_gauge('xmsrv_store_up', 1)
    metrics.set_gauge(xmsrv.LAST_SUCCESS, 1000)
    metrics.forget_gauges()
    total = numbers(metrics)
    assert (total['xmsrv_received_total',], total[xmsrv.LAST_SUCCESS,]) == (7, 1000)
    assert ('xmsrv_store_up',) not in total and ('xmsrv_build_info', xmsrv.__version__) in total
    metrics.set_gauge('xmsrv_store_up', 0)
    assert numbers(metrics)['xmsrv_store_up',] == 0


def test_a_gauge_that_nobody_has_set_is_not_there_and_a_counter_is():
    """No store is down that nobody has asked yet; and the first of anything can be seen as an increase."""
    names = {key[0] for key in numbers(Metrics())}
    assert names.isdisjoint(metric.name for metric in METRIC_DEFINITIONS if metric.kind == 'gauge'
                            and metric.name != 'xmsrv_build_info')
    assert {metric.name for metric in METRIC_DEFINITIONS
            if metric.kind == 'counter'} - names == {'xmsrv_store_errors_total'}


@pytest.mark.parametrize('name', BUCKET_BOUNDS)
def test_the_sum_of_a_histogram_never_falls(name):
    """A clock that is set back would make it fall, which looks like a restart."""
    metrics = Metrics()
    metrics.record_batch(0, 0.0, [xmsrv.STORED])
    metrics.add_settled(xmsrv.STORED, [types.SimpleNamespace(timestamp=5_000_000_000)], 1.5)
    total = numbers(metrics)
    assert (total[f'{name}_count',], total[f'{name}_sum',]) == (1, 0)
    assert total[f'{name}_bucket', '+Inf'] == 1


def test_a_counter_never_falls():
    """A REQ that was refused is late: requeued goes back by one, and comes again later."""
    metrics, window = Metrics(), types.SimpleNamespace(exported_counts=dict.fromkeys(SUMMARY_COUNTS, 0))
    seen = []
    for requeued, late in (3, 0), (2, 1), (3, 1), (5, 1):
        window.count = dict.fromkeys(SUMMARY_COUNTS, 0) | {'requeued': requeued, 'late': late}
        metrics.sync_counts(window)
        total = numbers(metrics)
        seen.append((total['xmsrv_messages_total', 'requeued'], total['xmsrv_messages_total', 'late']))
    assert seen == [(3, 0), (3, 1), (3, 1), (5, 1)]


def test_figures_as_prometheus_reads_them():
    metrics = Metrics()
    metrics.increment('xmsrv_store_errors_total', 2, '"\n\\')
    text = xmsrv.format_exposition(merge_metrics([metrics.take_snapshot()], {'topic': 'a"b'})).decode()
    assert '# HELP xmsrv_received_total Messages that came, those that came again too.\n' in text
    assert '# TYPE xmsrv_lag_seconds histogram\nxmsrv_lag_seconds_bucket{le="0.01",topic="a\\"b"} 0.0\n' in text
    assert 'xmsrv_store_errors_total{code="\\"\\n\\\\",topic="a\\"b"} 2.0\n' in text
    assert set(re.findall(r'^# TYPE (\S+ \S+)$', text, re.MULTILINE)) == {
        f'{metric.name} {metric.kind}' for metric in METRIC_DEFINITIONS}
    assert '_created' not in text


def test_no_variable_of_somebody_elses_has_the_numbers_kept_in_files(monkeypatch):
    for name in ('PROMETHEUS_MULTIPROC_DIR', 'prometheus_multiproc_dir'):
        monkeypatch.setenv(name, '/nonexistent')
    xmsrv.import_prometheus()
    assert not [name for name in os.environ if 'multiproc' in name.lower()]


# --------------------------------------------------------------------------------------------- from one run to the next

def lasting(*kept):
    """What the next run goes on with, of samples as (name, value, labels)."""
    return {tuple(key): number for *key, number in xmsrv.lasting_samples(
        samples.Sample(name, labels, value) for name, value, labels in kept)}


def buckets(bounds, value=4.0, name='xmsrv_store_batch_records'):
    """All samples of a histogram."""
    return [*((f'{name}_bucket', value, {'le': bound}) for bound in bounds),
            (f'{name}_sum', 9.0, {}), (f'{name}_count', value, {})]


RECORDS = [str(bound) for bound in BUCKET_BOUNDS['xmsrv_store_batch_records']]


def test_counts_are_carried_over_and_gauges_are_not():
    assert lasting(('xmsrv_received_total', 7.0, {'topic': 'a'}), ('xmsrv_store_up', 1.0, {}),
                   ('xmsrv_messages_total', 3.0, {'topic': 'a', 'outcome': 'dead'})) == {
        ('xmsrv_received_total',): 7, ('xmsrv_messages_total', 'dead'): 3}


def test_a_histogram_of_an_earlier_version_is_carried_over():
    """Its bounds were written 1, not 1.0."""
    carried = lasting(*buckets([*RECORDS, '+Inf']))
    assert carried['xmsrv_store_batch_records_bucket', '1.0'] == carried['xmsrv_store_batch_records_count',] == 4
    assert carried == lasting(*buckets([*(f'{bound}.0' for bound in RECORDS), '+Inf']))


@pytest.mark.parametrize('bounds', [RECORDS, [*RECORDS, '5000', '+Inf'], ['+Inf'], []])
def test_a_histogram_of_other_bounds_begins_anew(bounds):
    assert lasting(*buckets(bounds)) == {}


@pytest.mark.parametrize('value', [-1.0, math.inf, math.nan])
def test_what_is_no_count_is_refused(value):
    for wrong in [('xmsrv_received_total', value, {})], buckets([*RECORDS, '+Inf'], value):
        with pytest.raises(ValueError, match='xmsrv_'):
            lasting(*wrong)


def test_a_success_in_the_future_is_one_now(monkeypatch):
    monkeypatch.setattr(xmsrv.time, 'time', lambda: 1000.0)
    assert [lasting((xmsrv.LAST_SUCCESS, when, {})) for when in (900.0, 9000.0)] == [
        {(xmsrv.LAST_SUCCESS,): 900}, {(xmsrv.LAST_SUCCESS,): 1000}]


# ----------------------------------------------------------------------------------------------- a run that writes none

def test_figures_that_nobody_reads_take_all_that_the_others_take():
    """And import nothing: prometheus_client takes a tenth of a short run."""
    code = '''
import sys, types, xmsrv
figures = xmsrv.NullMetrics()
figures.record_batch(3, 0.5, [xmsrv.WriteResult('retry', -15)])
figures.add_settled(xmsrv.STORED, [types.SimpleNamespace(timestamp=1)], 2.0)
figures.add_settled(xmsrv.DEAD, [types.SimpleNamespace(rejection=types.SimpleNamespace(reason='key', detail=''))], 2.0)
counts = dict.fromkeys(xmsrv.SUMMARY_COUNTS, 1)
window = types.SimpleNamespace(count=counts, exported_counts=dict.fromkeys(counts, 0), failed=False)
figures.record_window(window)
figures.set_period(types.SimpleNamespace(endless=False, period=1, timeout=2))
figures.record_consumer(types.SimpleNamespace(connections=[], in_flight=[], addresses=[]))
figures.set_depths({'a': 1})
figures.record_unavailable({'queue'})
print(sorted(name for name in sys.modules if name.startswith('prometheus_client')))
'''
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=30)
    assert ran.stdout == '[]\n'
