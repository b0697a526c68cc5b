"""Measuring by turns, on a clock that the test turns."""

import gc
import math

import pytest

from edgekit import machine


class Clock:
    """A clock that stands still but for the work that is done: piece `name` takes costs[name] each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **costs: float) -> None:
        self.now, self.order, self.costs = 0.0, [], costs
        monkeypatch.setattr(machine.time, "perf_counter", lambda: self.now)

    def works(self):
        return [lambda name=name: self.run(name) for name in self.costs]

    def run(self, name: str) -> None:
        self.order.append(name)
        self.now += self.costs[name]


def test_turns_times_every_round_but_those_that_warm_up(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch, a=1.0, b=2.0)
    between = []

    def after() -> None:
        between.append(len(clock.order))
        clock.now += 100.0  # what is done between rounds is not timed
        clock.costs["a"] += 1.0

    times = machine.turns(clock.works(), 3, warm_up=2, after=after)
    assert times == [[3.0, 4.0, 5.0], [2.0, 2.0, 2.0]]
    assert clock.order == ["a", "b"] * 5
    assert between == [2, 4, 6, 8, 10]


def test_turns_end_early_only_when_enough_were_made(monkeypatch: pytest.MonkeyPatch):
    for seconds, fewest, made in ((math.inf, 1, 9), (6.0, 1, 2), (6.1, 1, 3), (0.0, 4, 4), (0.0, 20, 9)):
        clock = Clock(monkeypatch, a=1.0, b=2.0)
        first, second = machine.turns(clock.works(), 9, warm_up=5, seconds=seconds, fewest=fewest)
        assert (len(first), len(second)) == (made, made)


def test_with_a_seed_every_piece_follows_every_other_alike(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch, a=1.0, b=2.0, c=4.0)
    times = machine.turns(clock.works(), 500, warm_up=0, seed=0)
    assert times == [[1.0] * 500, [2.0] * 500, [4.0] * 500]  # each in its own place, whatever the order
    rounds = [tuple(clock.order[start : start + 3]) for start in range(0, 1500, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    counts = [rounds.count(order) for order in set(rounds)]
    assert len(counts) == 6 and min(counts) > 50  # of 83 on average
    again = Clock(monkeypatch, a=1.0, b=2.0, c=4.0)
    machine.turns(again.works(), 500, warm_up=0, seed=0)
    assert again.order == clock.order


def test_no_garbage_is_collected_while_the_clock_runs():
    during = []
    machine.turns([lambda: during.append(gc.isenabled())], 2)
    assert during == [False] * 4
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        machine.turns([lambda: 1 / 0], 2)
    assert gc.isenabled()
