"""The daemon's page as Debian's chromium shows it: `make test-web` runs these, `make test` does not.

The pictures are in build/page.
"""
import contextlib
import re

import pytest

import servers
from browser import Browser
from flows import CHANNEL, TOPIC, bodies, fill
from http_answers import get
from servers import wait_until

HASTE = 'import xmsrv\nxmsrv.SAMPLE_INTERVAL = 0.5\n'   # so that there is something on the charts
BAD = ['{"<script>alert(1)</script>": 1, "<script>alert(1)</script>": 2}', '[1]']


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    """One for all tests: it takes a second to start."""
    with Browser(tmp_path_factory.mktemp('browser')) as started:
        yield started


def stopped(process):
    """SIGTERM ends it well."""
    process.terminate()
    assert process.wait(timeout=10) == 0


def bars(look, kind):
    """How many bars of a kind are on a page."""
    return len(re.findall(f'<rect class="{kind}"', look.html))


def plain(look, url):
    """Whether a page asked for nothing but itself, takes nothing of a message for HTML, and pleases the browser."""
    return look.requests == [url] and not look.complaints and '<script' not in look.html


@pytest.fixture
def site(nsqds, program, changed, standin):
    """A daemon with windows of 40 on two nsqds, of which one has more than it takes: (nsqds, xmsrv, URL, standin)."""
    changed(HASTE)
    started = nsqds(2)
    fill(started[0], 20_000)
    fill(started[1], 20, 20_000)
    started[0].publish(TOPIC, BAD)
    port = servers.free_ports()
    program.configure(started, period='300ms', nsq={'max-messages': 40, 'max-in-flight': 40},
                      metrics={'listen': f'127.0.0.1:{port}', 'depth-interval': '300ms'},
                      **standin.settings(**{'total-timeout': '300ms'}))
    running = program.start('daemon')
    wait_until(lambda: get(port, '/')[1].count('<rect class="waiting"') > 8 and standin.stored() > 200,
               'there is something to see', 30)
    yield started, program, f'http://127.0.0.1:{port}/', standin
    stopped(running)


def test_the_page_in_a_browser(site, browser):
    """The ends with since when, the backlog, both charts with their axes, a line for each nsqd."""
    nsqds, _, url, _ = site
    nsqds[0].publish(TOPIC, BAD)
    look = browser.look(url, 'windows')
    assert plain(look, url) and look.title == f'x-msrv {TOPIC}/{CHANNEL}'
    assert re.search(r'queue: up\s+since \d\d:\d\d:\d\dZ \(\d+ s\)', look.text)
    assert bars(look, 'stored') >= 4 and bars(look, 'waiting') >= 4
    assert re.search(r'waiting in the channel\s+1\d,\d\d\d\s+(not known yet|falls by)', look.text)
    for nsqd in nsqds:
        assert re.search(rf'{re.escape(nsqd.tcp)}\s+up\s+[\d,]+\s+\d+', look.text)


def test_the_page_on_a_phone_and_in_the_dark(site, browser):
    """Nothing is cut off at the side, and the words of the charts are large enough to be read."""
    _, _, url, _ = site
    day, night = browser.look(url, 'phone', 360, 740), browser.look(url, 'phone-dark', 360, 740, 'dark')
    for look in day, night:
        assert plain(look, url) and look.width <= 360 and look.fonts >= 9
    assert day.background == 'rgb(255, 255, 255)' and sum(map(int, re.findall(r'\d+', night.background))) < 100
    wide = browser.look(url, 'dark', 1400, 900, 'dark')
    assert wide.width <= 1400 and wide.background == night.background


def test_the_page_in_an_outage(site, browser):
    """Which end is down, since when and why, at a glance: in the title, too."""
    nsqds, xmsrv, url, standin = site
    nsqds[1].kill()
    standin.server.refuse()
    wait_until(lambda: 'store: down' in browser.look(url, 'outage').text, 'it is on the page', 20)
    look = browser.look(url, 'outage')
    assert plain(look, url) and look.title == f'DOWN: x-msrv {TOPIC}/{CHANNEL}'
    assert re.search(r'store: down\s+since \S+ \(\d+ s\); \S+', look.text)
    assert re.search(rf'{re.escape(nsqds[1].tcp)}\s+down\s+not known\s+0', look.text)
    phone = browser.look(url, 'outage-phone', 360, 740)
    assert phone.width <= 360 and phone.height < 1600   # no column is squeezed to a letter a line
    standin.server.listen()


def test_the_page_in_streaming_mode_with_workers(nsqd, program, changed, browser):
    """As much as with windows; and dead letters, of which nothing is taken for HTML."""
    changed(HASTE)
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*bodies(3000), *BAD])
    port = servers.free_ports()
    program.configure(nsqd, period='0', workers=2, metrics={'listen': f'127.0.0.1:{port}', 'depth-interval': '300ms'})
    running = program.start('daemon')
    with contextlib.ExitStack() as stack:
        stack.callback(stopped, running)
        wait_until(lambda: len(program.rows()) == 3000, 'all are stored', 20)
        nsqd.publish(TOPIC, bodies(500, 3000))
        url = f'http://127.0.0.1:{port}/'
        wait_until(lambda: get(port, '/')[1].count('<rect class="stored"') > 0, 'they are on the chart', 20)
        look = browser.look(url, 'streaming')
        assert plain(look, url) and 'flowing: 3500 stored' in look.text
        assert 'not-an-object' in look.text and '"<script>alert(1)</script>": the name comes twice' in look.text
        assert re.search(rf'{re.escape(nsqd.tcp)}\s+up\s+0\s+0', look.text)
