"""Debian's chromium without a window, told by its DevTools protocol what to show; for tests of the daemon's page."""
import asyncio
import base64
import itertools
import json
import subprocess

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

from servers import ROOT, spawn, wait_until

PICTURES = ROOT / 'build' / 'page'
OPTIONS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
           '--disable-background-networking', '--disable-component-update', '--hide-scrollbars',
           '--remote-debugging-port=0', 'about:blank']


class Browser:
    """A context manager: a browser with one empty tab, which ends with it."""

    def __init__(self, directory):
        self.directory = directory / 'browser'
        self.directory.mkdir()
        self.process = spawn(['chromium', f'--user-data-dir={self.directory}', *OPTIONS], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()

    def look(self, url, picture, width=1000, height=900, scheme='light'):
        """Loads a page in a window of that size, a phone's where it is narrow: a Look. A picture of it all is kept."""
        file = self.directory / 'DevToolsActivePort'
        wait_until(lambda: file.exists() and file.read_text().count('\n'), 'the browser listens', 30)
        port = int(file.read_text().split('\n')[0])
        return asyncio.run(asyncio.wait_for(self._look(port, url, picture, width, height, scheme), 60))

    async def _look(self, port, url, picture, width, height, scheme):
        tabs = json.loads((await AsyncHTTPClient().fetch(f'http://127.0.0.1:{port}/json/list')).body)
        socket = await websocket_connect(next(tab for tab in tabs if tab['type'] == 'page')['webSocketDebuggerUrl'],
                                         max_message_size=1 << 26)
        tab = _Tab(socket)
        await tab.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                      mobile=width < 600)
        await tab.ask('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
        for domain in 'Network', 'Page', 'Log':
            await tab.ask(f'{domain}.enable')
        await tab.ask('Page.navigate', url=url)
        await tab.event('Page.loadEventFired')
        shot = await tab.ask('Page.captureScreenshot', captureBeyondViewport=True)
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / f'{picture}.png').write_bytes(base64.b64decode(shot['data']))
        look = Look(tab.requests, tab.complaints, {name: await tab.value(code) for name, code in ASKED.items()})
        socket.close()
        return look


ASKED = {   # JavaScript for what a test may ask of a page
    'html': 'document.documentElement.outerHTML', 'title': 'document.title',
    'width': 'document.documentElement.scrollWidth', 'height': 'document.documentElement.scrollHeight',
    'text': 'document.body.innerText',
    'background': 'getComputedStyle(document.body).backgroundColor',
    'fonts': 'Math.min(...[...document.querySelectorAll("text")].map(each => '
             '10 * each.getBoundingClientRect().height / each.getBBox().height))',
}


class Look:
    """What a page was: requests, the URLs that were asked for; complaints of the browser; and what is ASKED."""

    def __init__(self, requests, complaints, values):
        self.requests, self.complaints, self.values = requests, complaints, values

    def __getattr__(self, name):
        return self.values[name]


class _Tab:
    """A tab, by its DevTools socket."""

    def __init__(self, socket):
        self.socket, self.numbers, self.requests, self.complaints, self.seen = socket, itertools.count(1), [], [], []

    async def ask(self, method, **params):
        """The answer to a command."""
        number = next(self.numbers)
        await self.socket.write_message(json.dumps({'id': number, 'method': method, 'params': params}))
        while (message := await self._read()).get('id') != number:
            pass
        assert 'result' in message, message
        return message['result']

    async def value(self, code):
        """What an expression is worth. The page's own policy allows no script; this is none of the page's."""
        return (await self.ask('Runtime.evaluate', expression=code))['result']['value']

    async def event(self, name):
        """Waits for an event, unless it has come by now."""
        while name not in self.seen:
            await self._read()

    async def _read(self):
        message = json.loads(await self.socket.read_message())
        self.seen.append(message.get('method'))
        if message.get('method') == 'Network.requestWillBeSent':
            self.requests.append(message['params']['request']['url'])
        if message.get('method') == 'Log.entryAdded':
            self.complaints.append(message['params']['entry']['text'])
        return message
