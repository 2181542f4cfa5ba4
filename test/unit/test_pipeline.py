"""Opening and closing both ends, with ends that are objects of the test, by a clock of its own."""
import asyncio

import pytest

import clock
from xmsrv import Figures, Health, Store, open_pipeline


class SlowQueue:
    """A Source that takes a second to close, and has a task in the background."""

    in_flight = ()

    def __init__(self, tasks, opens):
        self.tasks, self.opens, self.closing, self.closed = tasks, opens, asyncio.Event(), False

    async def open(self):
        self.tasks.start(asyncio.sleep(1000))
        if not self.opens:
            await asyncio.sleep(1000)

    async def close(self):
        self.closing.set()
        await asyncio.sleep(1)
        self.closed = True


@pytest.mark.parametrize('opens', [True, False], ids=['once it is open', 'while it opens'])
def test_what_is_told_to_end_while_it_closes_is_closed_all_the_same(opens):
    # A reload in an outage, and at once another one, or SIGTERM: what is left open would go on beside its successor.
    async def use(queues):
        def new_queue(tasks):
            queues.append(SlowQueue(tasks, opens))
            return queues[0]
        async with open_pipeline(None, Store(), new_queue, Figures(), Health()):
            await asyncio.sleep(1000)

    async def main():
        queues = []
        task = asyncio.ensure_future(use(queues))
        await asyncio.sleep(10)
        task.cancel()
        await queues[0].closing.wait()
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return queues[0].closed, queues[0].tasks.tasks

    assert clock.run(main()) == (True, set())
