import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from edgekit import statistics
from edgekit.errors import EdgekitError
from edgekit.statistics import fewest, mcnemar, power, power_sentence, power_to_lose, smallest_loss_found, tango, wilson


@st.composite
def paired_counts(draw):
    n = draw(st.integers(1, 3000))
    first = draw(st.integers(0, n))
    return first, draw(st.integers(0, n - first)), n


def restricted_score(first, second, n, difference):
    """Tango's statistic with the nuisance parameter found by maximizing the multinomial likelihood numerically."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def minus_log_likelihood(q):
        shares = np.array([q, q + difference, 1 - 2 * q - difference])
        return -stats.multinomial.logpmf([first, second, n - first - second], n, shares / shares.sum())

    found = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    )
    q = min((low, high, found.x), key=minus_log_likelihood)
    return (second - first - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 719), (719, 719), (1, 719), (287, 719), (400, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_wilson_is_that_of_statsmodels(successes, n, confidence):
    expected = proportion_confint(successes, n, 1 - confidence, "wilson")
    assert wilson(successes, n, confidence) == pytest.approx(expected, abs=1e-13)


def test_wilson_ends_exactly_at_none_and_all():
    for n in range(1, 400):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0


@pytest.mark.parametrize(
    ("first", "second", "n"),
    [
        (1, 7, 21),
        (40, 20, 160),
        (12, 5, 719),
        (0, 1, 719),
        (1, 0, 719),
        (30, 30, 100),
        (0, 9, 10),
        (3, 4, 7),
        (49, 1, 50),
    ],
)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_tango_ends_where_the_brute_force_score_is_the_quantile(first, second, n, confidence):
    z = stats.norm.ppf((1 + confidence) / 2)
    low, high = tango(first, second, n, confidence)
    assert restricted_score(first, second, n, low) == pytest.approx(z, abs=1e-5)
    assert restricted_score(first, second, n, high) == pytest.approx(-z, abs=1e-5)


def test_tango_keeps_exactly_the_differences_that_are_not_rejected():
    for first, second in [(12, 5), (0, 3), (0, 0), (7, 7)]:
        low, high = tango(first, second, 100)
        for difference in np.linspace(-0.995, 0.995, 41):
            inside = abs(restricted_score(first, second, 100, difference)) <= stats.norm.ppf(0.975)
            assert inside == (low <= difference <= high)


def test_tango_of_a_published_table():
    # Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009), 1 and 7 of 21 pairs changed:
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) give -0.517 to -0.026 for before minus after.
    assert tango(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_at_the_edges_solves_by_hand():
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (1, 3, 4, 20, 719, 10**6):
        assert tango(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-12)
        assert tango(0, n, n) == pytest.approx(((n - z2) / (n + z2), 1.0), rel=1e-12)
        assert tango(n, 0, n) == pytest.approx((-1.0, (z2 - n) / (n + z2)), rel=1e-12)


@given(paired_counts(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_tango_holds_the_estimate_mirrors_and_narrows(counts, confidence):
    first, second, n = counts
    low, high = tango(first, second, n, confidence)
    assert -1 <= low <= (second - first) / n <= high <= 1
    assert tango(second, first, n, confidence) == (-high, -low)
    wider = tango(first, second, n, 0.9999)
    assert wider[0] <= low
    assert high <= wider[1]


@given(paired_counts())
@settings(max_examples=50)
def test_tango_excludes_zero_exactly_where_the_asymptotic_mcnemar_test_rejects(counts):
    first, second, n = counts
    low, high = tango(first, second, n)
    rejected = (second - first) ** 2 > stats.norm.ppf(0.975) ** 2 * (first + second)
    assert (low > 0 or high < 0) == rejected


def test_tango_covers_the_truth():
    generator = np.random.default_rng(0)
    for shares in ([0.04, 0.02, 0.94], [0.01, 0.01, 0.98], [0.3, 0.1, 0.6]):
        draws = generator.multinomial(300, shares, size=2000)
        intervals = np.array([tango(int(first), int(second), 300) for first, second, _ in draws])
        truth = shares[1] - shares[0]
        covered = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
        assert 0.935 <= covered <= 0.97


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (12, 5), (5, 12), (8, 8), (300, 200), (0, 40)])
def test_mcnemar_is_that_of_statsmodels(first, second):
    expected = statsmodels_mcnemar([[100, first], [second, 50]], exact=True).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "discordant", "tolerance", "change"),
    [
        (40, 0.3, 0.2, 0.0),
        (40, 0.3, 0.2, -0.25),
        (30, 0.0, 0.2, 0.0),
        (25, 1.0, 0.1, 0.4),
        (35, 0.2, 0.0, 0.1),
        (1, 0.5, 0.0, 0.0),
    ],
)
def test_power_is_the_sum_over_every_table(n, discordant, tolerance, change):
    survived = lost = 0.0
    for first, second in itertools.product(range(n + 1), repeat=2):
        if first + second <= n:
            shares = [(discordant - change) / 2, (discordant + change) / 2, 1 - discordant]
            chance = stats.multinomial.pmf([first, second, n - first - second], n, shares)
            low, high = tango(first, second, n)
            survived += chance * (low >= -tolerance)
            lost += chance * (high < -tolerance)
    assert power(n, discordant, tolerance, change) == pytest.approx(survived, abs=1e-9)
    assert power_to_lose(n, discordant, tolerance, change) == pytest.approx(lost, abs=1e-9)


def test_power_is_what_a_simulation_finds():
    generator = np.random.default_rng(1)
    draws = generator.multinomial(719, [0.01, 0.01, 0.98], size=4000)
    survived = np.mean([tango(int(first), int(second), 719)[0] >= -0.02 for first, second, _ in draws])
    assert power(719, 0.02, 0.02) == pytest.approx(survived, abs=0.015)


def test_a_false_survived_at_the_boundary_is_as_rare_as_the_confidence_says():
    for n, discordant in [(500, 0.03), (1000, 0.03), (1000, 0.1), (719, 0.06)]:
        assert power(n, discordant, 0.02, change=-0.02) <= 0.03
        assert power_to_lose(n, discordant, 0.02, change=-0.02) <= 0.03


def test_power_grows_with_samples_and_shrinks_with_loss():
    powers = [power(n, 0.02, 0.02) for n in (100, 300, 1000, 3000, 30000)]
    assert powers == sorted(powers)
    assert powers[0] < 0.15
    assert powers[-1] > 0.999999
    assert power(1000, 0.03, 0.02) > power(1000, 0.03, 0.02, change=-0.01) > power(1000, 0.03, 0.02, change=-0.03)


@pytest.mark.parametrize("tolerance", [0.01, 0.02, 0.05, 0.5])
def test_fewest_is_the_smallest_sample_whose_untouched_file_survives(tolerance):
    n = fewest(tolerance)
    assert tango(0, 0, n)[0] >= -tolerance
    assert n == 1 or tango(0, 0, n - 1)[0] < -tolerance


def test_smallest_loss_found_is_found_and_a_smaller_one_is_not():
    loss = smallest_loss_found(719, 0.02)
    assert loss is not None
    assert power_to_lose(719, 0.02 + loss, 0.02, -loss) >= 0.9
    assert power_to_lose(719, 0.02 + loss - 0.001, 0.02, -loss + 0.001) < 0.9
    assert smallest_loss_found(1, 0.02) is None


def test_power_sentence_says_what_the_sample_can_and_cannot_decide():
    said = power_sentence(719, 0.02)
    assert said.startswith("719 samples: ")
    assert f"probability {power(719, 0.02, 0.02):.2f};" in said
    assert f"a real loss of {100 * smallest_loss_found(719, 0.02):g} points" in said
    few = power_sentence(50, 0.02)
    assert "too few to say 'survived' within 2 points" in few
    assert "takes 189" in few
    assert "within 0.5 points" in power_sentence(719, 0.02, 0.005)
    assert "no loss, however large" in power_sentence(1, 0.02)
    assert "any number" in power_sentence(719, 0.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(1, 0),
        lambda: wilson(2, 1),
        lambda: wilson(-1, 1),
        lambda: tango(3, 3, 5),
        lambda: tango(0, 0, 0),
        lambda: tango(1, 1, 5, confidence=1.0),
        lambda: power(100, 0.01, 0.02, change=-0.05),
        lambda: power(100, 1.2, 0.02),
        lambda: power(0, 0.02, 0.02),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(EdgekitError):
        call()


def test_points_are_said_in_words():
    assert [statistics.points(share) for share in (0.02, 0.01, 0.005, 0.0)] == [
        "2 points",
        "1 point",
        "0.5 points",
        "0 points",
    ]


@given(st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=300), st.integers(1, 100))
def test_nearest_rank_is_numpys_inverted_distribution(values, percent):
    found = statistics.nearest_rank(values, percent)
    # By its definition, in whole numbers, and as numpy has it; numpy multiplies in floats and so may miss a whole rank.
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert 100 * sum(value < found for value in values) < percent * len(values)
    if percent * len(values) % 100:
        assert found == np.percentile(values, percent, method="inverted_cdf")


def test_nearest_rank_of_whole_ranks_and_of_nothing():
    assert statistics.nearest_rank(range(1, 101), 7) == 7  # 0.07 * 100 is above 7 in floats
    assert [statistics.nearest_rank([3, 1, 2], percent) for percent in (33, 34, 66, 67, 100)] == [1, 2, 2, 3, 3]
    for values, percent in (([], 50), ([1], 0), ([1], 101)):
        with pytest.raises(EdgekitError):
            statistics.nearest_rank(values, percent)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))  # small, so that many are equal
def test_the_front_is_what_nothing_dominates(points):
    costs, gains = [cost for cost, _ in points], [gain for _, gain in points]

    def dominated(cost, gain):
        return any(a <= cost and b >= gain and (a < cost or b > gain) for a, b in points)

    assert statistics.front(costs, gains) == [not dominated(*point) for point in points]
