"""What waits on each nsqd: of those that say so, whatever the others do."""
import asyncio

import pytest

import clock
import fakes
import xmsrv
from xmsrv import ChannelDepth, channel_depths

ORDERS = {'depth': 3, 'channels': [{'channel_name': 'other', 'depth': 9}, {'channel_name': 'x-msrv', 'depth': 40}]}


def asked(monkeypatch, answers, seconds=100):
    """What channel_depths() makes of the answers of so many nsqds, and how long it took."""
    hosts = [f'10.0.0.{n}:4150' for n in range(len(answers))]
    config = fakes.options(nsq={'nsqd-tcp-address': hosts})

    async def stats(address, http_port, topic):
        assert (http_port, topic) == (None, 'orders')
        answer = answers[hosts.index(xmsrv.format_address(address))]
        if answer == 'hangs':
            await asyncio.sleep(1e6)
        return answer

    async def main():
        begun = asyncio.get_running_loop().time()
        found = await asyncio.wait_for(channel_depths(config, 'orders', 'x-msrv'), seconds)
        return list(found.values()), asyncio.get_running_loop().time() - begun
    monkeypatch.setattr(xmsrv, 'topic_stats', stats)
    return clock.run(main())


def test_what_waits_is_in_the_topic_and_in_the_channel(monkeypatch):
    paused = {**ORDERS, 'paused': True, 'channels': [{'channel_name': 'x-msrv', 'depth': 1, 'paused': True}]}
    assert asked(monkeypatch, [ORDERS, {}, {'depth': 7}, paused])[0] == [
        ChannelDepth(43, ''), ChannelDepth(0, ''), ChannelDepth(7, ''), ChannelDepth(4, 'topic, channel')]


@pytest.mark.parametrize('nonsense', [
    None, 'text', [1], {'depth': 'much'}, {'channels': [{}]}, {'channels': 3}, {'channels': ['x']}, {'depth': None}])
def test_one_that_says_nothing_or_nonsense_is_left_out(monkeypatch, nonsense):
    assert asked(monkeypatch, [nonsense, ORDERS])[0] == [ChannelDepth(43, '')]


def test_those_that_hang_cost_a_bounded_time_and_keep_back_no_other(monkeypatch):
    found, seconds = asked(monkeypatch, [*['hangs'] * 30, ORDERS])
    assert found == [ChannelDepth(43, '')] and seconds <= 3.1
