"""The page: what it shows of the past, and how; without a daemon."""
import html
import re
import types

import pytest

import fakes
import xmsrv
from xmsrv import ChannelDepth, Chart, History, Metrics, MetricTotals, merge_metrics, render_page

UP, DOWN, CLOSED, STARTING = xmsrv.BackendState
STORED_KIND = 'xmsrv_messages_total'


def history_of(*samples, nsqds=1):
    """A History with samples each 10 s, of (messages stored so far, messages waiting)."""
    history = History()
    history.depths = dict.fromkeys(map(str, range(nsqds)))
    for place, (stored, waiting) in enumerate(samples):
        history.samples.append(xmsrv.Sample(place * 10.0, (stored, 0, 0, 0), stored * 2.0, waiting, nsqds))
    return history


class Fake:
    """What render_page() asks of a Daemon."""

    def __init__(self, figures=None, engine=None, **sections):
        self.config = fakes.options(**sections)
        self.history, self.runner = History(), engine
        self.backend_states, self.backend_failures = dict.fromkeys(xmsrv.BACKENDS, UP), {}
        self.status_line = 'last window: nothing came'
        self.metrics = figures or Metrics()

    def total_metrics(self):
        return merge_metrics([self.metrics.take_snapshot()])


def shown(daemon, part):
    """The text of a part of the page, by its id: tags are blanks."""
    text = render_page(daemon).decode()
    found = re.search(rf'<(\w+) id="{part}".*?</\1>', text, re.DOTALL)[0]
    return re.sub(r'\s+', ' ', html.unescape(re.sub('<[^>]*>', ' ', found))).strip()


def test_an_end_is_up_or_down_since_its_last_change():
    history = History()
    for now, state, why in (0, STARTING, 'not up yet'), (5, UP, ''), (9, UP, ''), (60, DOWN, 'a'), (70, DOWN, 'b'):
        history.note_backends({'store': state}, {'store': why} if why else {}, now)
        end = history.backends['store']
        assert (end.state, end.why) == (state, why)
        assert end.since == {0: 0, 5: 5, 9: 5, 60: 60, 70: 60}[now]


def test_samples_are_taken_each_interval_and_the_oldest_go():
    history, metrics = History(), Metrics()
    for second in range(2000):
        if history.is_due(second):
            metrics.increment(STORED_KIND, 30, 'stored')
            history.note_counts(merge_metrics([metrics.take_snapshot()]), second)
    assert [sample.time for sample in history.samples] == list(range(1090, 2000, 10))
    assert history.recent_rates(60) == (60, 180, 0) and history.recent_rates(900) == (900, 2700, 0)


def test_nothing_is_said_of_the_last_minute_before_two_samples():
    assert history_of((5, 0)).recent_rates(60) is None
    assert history_of((5, 0), (25, 0)).recent_rates(60) == (10, 20, 40)


@pytest.mark.parametrize(('waiting', 'words'), [
    ([10, 20, 30], 'not known yet whether it grows'),
    ([10, 20, 30, 40], 'grows by 1/s'),
    ([0, 0, 0, 0], 'steady'),
    ([50_000, 50_003, 50_001, 50_002], 'steady'),
    ([900, 800, 700, 600], 'falls by 10/s, empty in 60 s'),
    ([900, 800, 700, 0], 'falls by 30/s'),
    ([90_000] * 40 + [0] * 31, 'steady'),   # what was long ago does not count
])
def test_the_backlog_grows_falls_or_is_steady(waiting, words):
    history = history_of(*((0, each) for each in waiting))
    assert xmsrv.describe_trend(waiting[-1], history.depth_growth()) == words


def test_an_nsqd_that_says_nothing_for_a_while_makes_no_growth():
    """Its messages are there all the time: only times with the same number of nsqds are compared."""
    history = history_of(*((0, 500) for _ in range(6)), nsqds=2)
    history.samples += [sample._replace(time=60 + sample.time, waiting=100, nsqds=1) for sample in history.samples]
    assert history.depth_growth() == 0
    history.depths.popitem()
    assert history.depth_growth() == 0


@pytest.mark.parametrize(('most', 'end'), [(0, 1), (0.3, 0.5), (1, 1), (1.01, 2), (2, 2), (4, 5), (7, 10), (100, 100),
                                           (101, 200), (12_345, 20_000)])
def test_an_axis_ends_at_a_round_number(most, end):
    assert xmsrv.axis_end(most) == pytest.approx(end)


@pytest.mark.parametrize(('number', 'text'), [(0, '0'), (0.25, '0.25'), (7.5, '7.5'), (940, '940'), (12_500, '12.5k'),
                                              (3_000_000, '3M'), (4.56e9, '4.56G'),
                                              (999.4, '999'), (999.7, '1k'), (999_999, '1M')])
def test_numbers_are_brief(number, text):
    assert xmsrv.format_number(number) == text


@pytest.mark.parametrize(('seconds', 'text'), [(-1, '0 s'), (45, '45 s'), (119, '119 s'), (120, '2 min'),
                                               (7199, '120 min'), (7200, '2 h'), (108_000, '30 h'), (432_000, '5 d')])
def test_durations_are_rounded(seconds, text):
    assert xmsrv.format_duration(seconds) == text


def test_a_moment_has_its_day_where_it_was_another():
    now = 1_700_000_000
    assert xmsrv.format_moment(now - 30, now) == '22:12:50Z (30 s)'
    assert xmsrv.format_moment(now - 86400 * 3, now) == '2023-11-11 22:13:20Z (3 d)'


def test_the_chart_of_rates_has_an_axis_and_a_bar_for_each_kind():
    history = History()
    for time, counts in (0, (0, 0, 0, 0)), (10, (600, 0, 0, 0)), (20, (600, 0, 0, 0)), (30, (1000, 0, 200, 0)):
        history.samples.append(xmsrv.Sample(float(time), counts, 0.0, 0, 0))
    made = xmsrv.rate_chart(history)
    assert isinstance(made, Chart) and [text for _, text in made.ticks] == ['0', '50', '100']
    assert [text for _, text in made.times] == ['-15 min', '-10 min', '-5 min', 'now']
    by_kind = [(bar.kind, bar.label, bar.height) for bar in made.bars]
    assert by_kind == [('stored', 'stored 60, 20 s ago', 62.4), ('stored', 'stored 40, 0 s ago', 41.6),
                       ('dead', 'dead 20, 0 s ago', 20.8)]
    last, dead = made.bars[1:]
    assert dead.x == last.x and dead.y + dead.height == pytest.approx(last.y) and last.y + last.height == 112
    assert max(bar.x for bar in made.bars) + made.width <= 356
    assert xmsrv.depth_chart(history).bars == []   # nothing is known of what waits


def test_a_chart_of_all_samples_stays_in_its_frame():
    made = xmsrv.depth_chart(history_of(*((0, 7 * n) for n in range(1, 92))))
    assert len(made.bars) == 91 and min(bar.x for bar in made.bars[1:]) >= 39.9
    assert min(bar.y for bar in made.bars) >= 8 and {bar.kind for bar in made.bars} == {'waiting'}


def test_the_page_escapes_whatever_it_shows():
    """Detail of a dead letter, status, nsqd, failure and topic, each with all that HTML takes apart."""
    nasty = '</td><i title="a" lang=\'b\'>&amp;{{ 1 }}'
    total = MetricTotals()
    total.recent.append((1_700_000_000.5, 'schema', nasty))
    daemon = Fake(engine=types.SimpleNamespace(connections={nasty: (0, 0, nasty)}))
    daemon.config.nsq.topic, daemon.total_metrics, daemon.status_line, daemon.backend_failures = (
        nasty, lambda: total, nasty, {'store': nasty})
    daemon.backend_states['store'] = DOWN
    daemon.history.depths = {nasty: ChannelDepth(1, nasty)}
    text = render_page(daemon).decode()
    assert '<i' not in text and text.count(html.escape(nasty)) == 8   # five and 3 of the nsqd
    assert '<td>2023-11-14T22:13:20Z</td>' in text and 'class="down">store: down<' in text
    assert 'http:' not in text and 'https:' not in text and '<script' not in text


def test_the_page_says_since_when_and_why_an_end_is_down():
    daemon = Fake()
    daemon.backend_states['store'], daemon.backend_failures = DOWN, {'store': 'no answer of the cluster'}
    assert re.fullmatch(r'queue: up since \S+Z \(0 s\); 1 of 1 nsqds are not connected '
                        r'store: down since \S+Z \(0 s\); no answer of the cluster dead letters: up since \S+Z \(0 s\)',
                        shown(daemon, 'backends'))
    assert '<title>DOWN: x-msrv orders/x-msrv</title>' in render_page(daemon).decode()
    daemon.backend_states['store'] = UP
    assert '<title>x-msrv orders/x-msrv</title>' in render_page(daemon).decode()


@pytest.mark.parametrize(('queue', 'store', 'page'), [
    (CLOSED, DOWN, 'DOWN'), (STARTING, STARTING, 'STARTING'), (DOWN, UP, 'DOWN')])
def test_the_page_marks_as_down_only_what_fails(queue, store, page):
    """Neither an end that is closed on purpose nor its nsqds, nor what is just starting."""
    daemon = Fake()
    daemon.backend_states |= {'queue': queue, 'store': store}
    text = render_page(daemon).decode()
    assert f'<title>{page}: x-msrv' in text and f'<p id="status" class="{page.lower()}">' in text
    assert f'<span id="queue" class="{queue}">queue: {queue}</span>' in text
    assert f'<td>127.0.0.1:4150</td><td class="{queue}">{queue}</td>' in text
    assert ('nsqds are not connected' in text) is (queue is DOWN)


def test_the_page_has_a_line_for_each_nsqd():
    """Those that are configured, those that are connected, those that answer by HTTP."""
    engine = types.SimpleNamespace(
        connections={'10.0.0.2:4150': (2, 40, ''), '10.0.0.3:4150': (1, 7, 'Connection refused')})
    daemon = Fake(engine=engine, workers='2', nsq={'nsqd-tcp-address': ['10.0.0.1:4150', '10.0.0.2:4150']})
    daemon.history.depths = {'10.0.0.2:4150': ChannelDepth(12_345, ''), '10.0.0.4:4150': ChannelDepth(0, 'channel')}
    assert shown(daemon, 'nsqds') == (
        'nsqd connection waiting in flight 10.0.0.1:4150 down not known 0 10.0.0.2:4150 up 12,345 40 '
        '10.0.0.3:4150 1 of 2 workers not known 7 Connection refused 10.0.0.4:4150 down 0 0 channel paused')
    assert '3 of 4 nsqds are not connected' in shown(daemon, 'backends')


def test_an_nsqd_that_a_worker_is_just_about_to_connect_to_is_not_away():
    engine = types.SimpleNamespace(connections={'127.0.0.1:4150': (1, 7, '')})
    daemon = Fake(engine=engine, workers='2')
    assert '127.0.0.1:4150 1 of 2 workers not known 7' in shown(daemon, 'nsqds')
    assert 'not connected' not in shown(daemon, 'backends')


def test_the_numbers_of_the_page():
    metrics = Metrics()
    metrics.increment(STORED_KIND, 12_000, 'stored')
    metrics.set_gauge('xmsrv_in_flight', 42)
    metrics.lag.observe_all([2.0] * 12_000)
    daemon = Fake(metrics)
    assert 'not known no nsqd answers by HTTP' in shown(daemon, 'depth')
    assert shown(daemon, 'rate') == 'stored/s, last minute none yet'
    for second in 0, 10, 20, 30:
        daemon.history.depths = {'a': ChannelDepth(900 - 10 * second, '')}
        daemon.history.note_counts(daemon.total_metrics(), second)
        metrics.increment(STORED_KIND, 1000, 'stored')
        metrics.lag.observe_all([0.5] * 1000)
    assert shown(daemon, 'depth') == 'waiting in the channel 600 falls by 10/s, empty in 60 s'
    assert shown(daemon, 'rate') == 'stored/s, last minute 100 100 in 30 s'
    assert shown(daemon, 'lag') == 'mean age when stored 0.5 s 0.5 s in 30 s'
    assert shown(daemon, 'stored') == 'stored 16,000 deleted 0, requeued 0'
    assert shown(daemon, 'in-flight') == 'in flight 42'
