"""Planned looks against published constants, a multivariate normal integral, and simulated files at the boundary."""

import math

import numpy as np
import pytest
from scipy import stats

from edgekit import planned
from edgekit.errors import EdgekitError
from edgekit.planned import boundaries, plan, spent
from edgekit.statistics import _spread, tango, wilson

EVEN = [0.2, 0.4, 0.6, 0.8, 1.0]


def crossing(quantiles, fractions):
    """P(Z_k > quantile_k at any look): one minus a multivariate normal integral with correlations sqrt(t_i / t_j)."""
    times = np.array(fractions)
    correlation = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
    inside = stats.multivariate_normal(cov=correlation, seed=1, maxpts=4_000_000, abseps=1e-7, releps=1e-7)
    return 1 - inside.cdf(np.array(quantiles))


def test_five_looks_at_even_distances_have_the_published_boundaries():
    # ldbounds and gsDesign (sfLDOF) print these for five looks and a one-sided error of 0.025.
    assert boundaries(EVEN, 0.025) == pytest.approx((4.8769, 3.3569, 2.6803, 2.2898, 2.0310), abs=2e-4)
    # Two looks: Jennison and Turnbull (2000), table 7.1 has 2.963 and 1.969.
    assert boundaries([0.5, 1], 0.025) == pytest.approx((2.963, 1.969), abs=1e-3)


def test_they_come_close_to_the_constants_of_o_brien_and_fleming():
    # O'Brien and Fleming: 2.040 * sqrt(5 / k); the integral says that ours spend the same 2.5 %.
    original = [2.040 * math.sqrt(5 / look) for look in range(1, 6)]
    assert crossing(original, EVEN) == pytest.approx(0.025, abs=2e-4)
    assert boundaries(EVEN, 0.025)[2:] == pytest.approx(original[2:], abs=0.05)


@pytest.mark.parametrize(
    ("fractions", "error"),
    [(EVEN, 0.025), (EVEN, 0.005), ([0.3, 0.35, 1.0], 0.025), ([0.5, 0.9, 1.0], 0.1), ([1.0], 0.025)],
)
def test_what_is_crossed_up_to_each_look_is_what_was_to_be_spent_there(fractions, error):
    found = boundaries(fractions, error)
    for looks in range(1, len(fractions) + 1):
        expected = 2 - 2 * stats.norm.cdf(stats.norm.isf(error / 2) / math.sqrt(fractions[looks - 1]))
        assert spent(fractions[looks - 1], error) == pytest.approx(expected, abs=1e-12)
        crossed = stats.norm.sf(found[0]) if looks == 1 else crossing(found[:looks], fractions[:looks])
        assert crossed == pytest.approx(expected, abs=2e-5)


def test_one_look_is_the_ordinary_interval():
    one = plan(719, looks=1)
    assert one.samples == (719,)
    assert one.confidence(1) == pytest.approx(0.95, abs=1e-12)
    assert tango(12, 5, 719, one.confidence(1)) == pytest.approx(tango(12, 5, 719), abs=1e-12)


def test_a_plan_goes_to_the_last_sample_with_five_looks_at_most():
    for most in (1, 2, 3, 7, 100, 719, 10_000):
        made = plan(most)
        assert made.samples[-1] == most
        assert made.looks == min(5, most)
        assert all(later > earlier for earlier, later in zip(made.samples, made.samples[1:], strict=False))
        assert list(made.boundaries) == sorted(made.boundaries, reverse=True)
        for look in range(1, made.looks + 1):
            quantile = stats.norm.isf((1 - made.confidence(look)) / 2)
            assert quantile == pytest.approx(made.boundaries[look - 1], abs=1e-6)
    assert plan(719).samples == (144, 288, 432, 576, 719)
    assert 1.96 < plan(719).boundaries[-1] < 2.06  # the last look asks for little more than a single one


def decisions(made, shares, tolerance, generator, repeats):
    """(share said to have survived, share said to have lost): the first look whose Tango interval decides counts.

    The interval's ends are compared with -tolerance through the score at -tolerance, for all draws at once.
    """
    first, second = np.zeros(repeats), np.zeros(repeats)
    survived, lost, before = np.zeros(repeats, bool), np.zeros(repeats, bool), 0
    for samples, boundary in zip(made.samples, made.boundaries, strict=True):
        drawn = generator.multinomial(samples - before, shares, size=repeats)
        first, second, before = first + drawn[:, 0], second + drawn[:, 1], samples
        surplus = second - first + samples * tolerance
        reach = boundary * np.sqrt(np.maximum(0, _spread(first, second, samples, -tolerance)))
        undecided = ~survived & ~lost
        survived |= undecided & (surplus > 0) & (surplus >= reach)
        lost |= undecided & (surplus < -reach)
    return survived.mean(), lost.mean()


def test_the_simulation_decides_as_the_intervals_do():
    generator = np.random.default_rng(2)
    made = plan(300)
    for look, (samples, boundary) in enumerate(zip(made.samples, made.boundaries, strict=True), 1):
        for first, second, _ in generator.multinomial(samples, [0.03, 0.02, 0.95], size=40):
            low, high = tango(int(first), int(second), samples, made.confidence(look))
            surplus = second - first + samples * 0.02
            reach = boundary * math.sqrt(_spread(int(first), int(second), samples, -0.02))
            assert (low >= -0.02) == (surplus > 0 and surplus >= reach)
            assert (high < -0.02) == (surplus < -reach)


@pytest.mark.parametrize("most", [300, 719, 1000, 10_000])
@pytest.mark.parametrize("tolerance", [0.01, 0.02, 0.05])
def test_at_the_boundary_at_most_one_file_in_forty_is_said_to_have_survived(most, tolerance):
    """The true change is -tolerance. An honest int8 file moves 1 to 5 % of the samples, a bad one 20 %."""
    repeats, made = 100_000, plan(most)
    for discordant in (tolerance, 1.2 * tolerance, 0.03, 0.06, 0.1, 0.2):
        if discordant >= tolerance:
            shares = [(discordant + tolerance) / 2, (discordant - tolerance) / 2, 1 - discordant]
            survived, _ = decisions(made, shares, tolerance, np.random.default_rng(most), repeats)
            assert survived <= 0.025, (discordant, survived)


def test_the_largest_rate_of_a_false_survived_is_below_two_and_a_half_percent():
    """The worst cases of a wide search, with so many draws that the simulation's error is 0.02 points."""
    for most, tolerance, discordant in [(500, 0.05, 0.25), (10_000, 0.05, 0.3)]:
        shares = [(discordant + tolerance) / 2, (discordant - tolerance) / 2, 1 - discordant]
        survived, _ = decisions(plan(most), shares, tolerance, np.random.default_rng(0), 500_000)
        assert 0.02 < survived <= 0.025


def test_looking_five_times_with_the_ordinary_interval_would_err_far_more_often():
    """The control: the simulation can tell an honest plan from the habit that it replaces."""
    ordinary = planned.Plan(plan(1000).samples, (1.959964,) * 5)
    survived, _ = decisions(ordinary, [0.06, 0.04, 0.9], 0.02, np.random.default_rng(0), 50_000)
    assert survived > 0.05


def test_a_plan_decides_sooner_and_nearly_as_often():
    generator, made = np.random.default_rng(3), plan(1000)
    unchanged = [0.01, 0.01, 0.98]
    planned_looks, _ = decisions(made, unchanged, 0.02, generator, 50_000)
    single, _ = decisions(plan(1000, looks=1), unchanged, 0.02, generator, 50_000)
    assert single - 0.02 < planned_looks <= single + 0.01
    early = planned.Plan(made.samples[:3], made.boundaries[:3])
    assert decisions(early, unchanged, 0.02, generator, 50_000)[0] > 0.5
    _, lost = decisions(early, [0.08, 0.01, 0.91], 0.02, generator, 50_000)
    assert 0.95 < lost < 0.98


def test_the_intervals_of_all_looks_hold_a_single_proportion_as_well():
    """--at-least is decided by Wilson's interval: the robust accuracy is just below the floor, 40 %."""
    generator, made, repeats, floor = np.random.default_rng(4), plan(1000), 50_000, 0.4
    right, reached, before = np.zeros(repeats), np.zeros(repeats, bool), 0
    for look, samples in enumerate(made.samples, 1):
        right, before = right + generator.binomial(samples - before, floor, size=repeats), samples
        enough = next(k for k in range(samples + 1) if wilson(k, samples, made.confidence(look))[0] >= floor)
        reached |= right >= enough
    assert 0.015 < reached.mean() <= 0.0265


@pytest.mark.parametrize(
    "call",
    [
        lambda: plan(0),
        lambda: plan(100, looks=0),
        lambda: boundaries([0.5, 0.5, 1], 0.025),
        lambda: boundaries([0.0, 1], 0.025),
        lambda: boundaries([0.5, 0.9], 0.025),
        lambda: boundaries([], 0.025),
        lambda: boundaries([1.0], 0.0),
        lambda: boundaries([1.0], 0.5),
    ],
)
def test_what_is_no_plan_is_refused(call):
    with pytest.raises(EdgekitError):
        call()
