"""An event loop whose time passes only when nothing is left to do: what waits for minutes is tested in milliseconds."""
import asyncio
import selectors


class _Selector(selectors.DefaultSelector):
    """Does not wait: it moves the loop's clock on by what it was to wait."""

    loop = None

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout:
            self.loop.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self):
        return self.now


def run(coroutine):
    """As asyncio.run(), in a time of its own."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)
