"""The daemon's page as Debian's chromium shows it: `make test-web` runs these, `make test` does not."""
import re
import subprocess

import servers
from flows import CHANNEL, DEAD, REPLAY, TOPIC, bodies
from servers import wait_until


def stopped(process):
    """SIGTERM ends it well."""
    process.terminate()
    assert process.wait(timeout=10) == 0


def test_the_page_in_a_browser(nsqd, xmsrv):
    """A picture of it is kept in build/page."""
    nsqd.create(TOPIC, CHANNEL)
    nsqd.publish(TOPIC, [*bodies(300), '{"<script>alert(1)</script>": 1, "<script>alert(1)</script>": 2}', '[1]'])
    port = servers.free_ports()
    xmsrv.configure(nsqd, period='300ms', nsq={'max-messages': 40}, metrics={'listen': f'127.0.0.1:{port}'})
    running = xmsrv.start('daemon')
    wait_until(lambda: len(re.findall(r'received [1-9]', xmsrv.log.read_text())) == 8, 'eight windows took all', 20)
    assert (nsqd.left(DEAD, REPLAY), len(xmsrv.rows())) == (2, 300)
    shot = servers.ROOT / 'build' / 'page' / 'windows.png'
    shot.parent.mkdir(parents=True, exist_ok=True)
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
               '--disable-background-networking', '--disable-component-update', '--window-size=900,700',
               f'--user-data-dir={xmsrv.directory}/browser', '--virtual-time-budget=1000']
    url = f'http://127.0.0.1:{port}/'
    dom = browse(*options, '--dump-dom', url)
    browse(*options, f'--screenshot={shot}', url)
    assert '<span id="queue" class="up">' in dom and '<span id="store" class="up">' in dom
    assert len(re.findall(r'<rect class="stored"', dom)) >= 8
    assert 'not-an-object' in dom and 'invalid-json' in dom
    assert '<script' not in dom and 'http' not in dom.replace('http-equiv', '')
    assert shot.stat().st_size > 5000
    stopped(running)


def browse(*options):
    """What Debian's chromium prints."""
    return subprocess.run(['chromium', *options], capture_output=True, text=True, timeout=60, check=True).stdout
