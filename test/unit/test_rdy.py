"""RDY: budget, connections and the time in, new values out."""
import types

import pytest

from xmsrv import allocate_rdy, reduced_rdy


def connection(rdy=0, idle=False, rdy_since=0.0, max_rdy=2500, set_aside=0):
    return types.SimpleNamespace(rdy=rdy, idle=idle, rdy_since=rdy_since, max_rdy=max_rdy, set_aside=set_aside)


def allocated(connections, budget, keep=True):
    """The RDY of each, in the order of the connections; on the way the sum never exceeds what it may."""
    total, most = sum(c.rdy for c in connections), max(budget, sum(c.rdy for c in connections))
    new = allocate_rdy(connections, budget, keep)
    set_aside = sum(each.set_aside for each in connections)
    for each, rdy in new:
        total += rdy - each.rdy
        assert total <= most + set_aside
    rdys = {id(each): rdy for each, rdy in new}
    return [rdys[id(each)] for each in connections]


@pytest.mark.parametrize(('connections', 'budget', 'expected'), [
    ([connection()], 0, [0]),
    ([connection()], 10, [10]),
    ([connection()], 5000, [2500]),
    ([connection(max_rdy=7), connection()], 100, [7, 93]),
    ([connection(max_rdy=1, idle=True), connection(max_rdy=3, idle=True)], 10, [1, 3]),
    ([connection(), connection(), connection(idle=True)], 12, [6, 5, 1]),
    ([connection(), connection(), connection()], 2, [1, 1, 0]),
    ([connection(idle=True, rdy_since=3.0), connection(idle=True, rdy_since=1.0), connection(idle=True, rdy_since=2.0)],
     1, [0, 1, 0]),
    ([connection(idle=True), connection(), connection(idle=True)], 1, [0, 1, 0]),
    ([connection(rdy=8), connection()], 10, [8, 2]),
    ([connection(rdy=8), connection(rdy=8)], 10, [8, 2]),
    ([connection(rdy=3, set_aside=3)], 10, [13]),
    ([connection(rdy=2500, set_aside=2500)], 10, [0]),
])
def test_the_budget_is_dealt_out(connections, budget, expected):
    assert allocated(connections, budget) == expected


def test_with_plenty_left_nobody_keeps_what_another_could_use():
    assert allocated([connection(rdy=100), connection()], 100, keep=False) == [50, 50]


@pytest.mark.parametrize('budget', [0, 1, 5, 99, 100, 101, 250])
def test_with_a_hundred_nsqds_the_sum_is_the_budget_and_all_take_turns(budget):
    connections = [connection(idle=True, rdy_since=float(n)) for n in range(100)]
    heard, now = set(), 100.0
    for _ in range(200):
        new = allocated(connections, budget)
        assert sum(new) == budget
        for each, rdy in zip(connections, new, strict=True):
            if rdy > each.rdy:
                each.rdy_since = now = now + 1
            heard |= {id(each)} if rdy else set()
            each.rdy = 0    # each had its turn
    assert len(heard) == (100 if budget else 0)


@pytest.mark.parametrize(('rdys', 'budget', 'expected'), [
    ([10], 10, 10), ([10], 4, 4), ([10], 0, 0), ([10, 5], 12, 7), ([2, 100], 50, 0), ([2, 2], 100, 2),
])
def test_what_came_is_taken_off_the_connection_that_it_came_on(rdys, budget, expected):
    connections = [connection(rdy=rdy) for rdy in rdys]
    assert reduced_rdy(connections[0], connections, budget) == expected
