"""Ranges against the values themselves: NumPy's quantiles, SciPy's divergence, errors of every single value."""

import numpy
import pytest
from handmade import graph, photos, run
from scipy import stats

from edgekit.errors import EdgekitError
from edgekit.quantize import SCHEMES, Settings, quantize
from edgekit.quantize.calibrate import BINS, METHODS, SHARES, Histogram, divergence, histograms, ranges
from edgekit.quantize.scheme import Format

UNSIGNED = SCHEMES["x86"].activations
SIGNED = SCHEMES["symmetric"].activations


def seen(values: numpy.ndarray, bins: int = BINS) -> Histogram:
    low, high = float(values.min()), float(values.max())
    return Histogram(low, high, numpy.histogram(values, bins, (low, high))[0])


def normal(count: int = 100_000, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).normal(size=count)


def test_histograms_count_every_value_of_every_batch_once():
    model, images = graph(), photos(150)
    names = ["stem", "stem_act", "logits"]
    ends = ranges(model, names, images)
    found = histograms(model, ends, images)
    for name, values in zip(names, run(model, images, *names), strict=True):
        assert ends[name] == (pytest.approx(values.min(), abs=1e-5), pytest.approx(values.max(), abs=1e-5))
        expected, _ = numpy.histogram(values, BINS, ends[name])
        assert abs(found[name].counts.sum() - values.size) <= 2  # the extremes' last bits
        # Values beside an edge may fall either way, so the cumulated counts are compared.
        assert numpy.abs(found[name].counts.cumsum() - expected.cumsum()).max() <= max(2, 1e-4 * values.size)


def test_percentile_is_numpys_quantile():
    values = numpy.concatenate([normal(), [40, -25]])
    low, high = METHODS["percentile"](seen(values), UNSIGNED)
    width = 65 / BINS
    assert abs(low - numpy.quantile(values, 0.00005)) < width
    assert abs(high - numpy.quantile(values, 0.99995)) < width
    assert METHODS["min-max"](seen(values), UNSIGNED) == (-25, 40)


def rounded(values: numpy.ndarray, stored: Format, low: float, high: float) -> numpy.ndarray:
    """By numpy, value by value."""
    if stored.symmetric:
        step = max(-low, high) / 127
        return numpy.clip(numpy.round(values / step), -127, 127) * step
    step = (high - low) / 255
    zero = numpy.clip(numpy.round(-low / step), 0, 255)
    return (numpy.clip(numpy.round(values / step) + zero, 0, 255) - zero) * step


@pytest.mark.parametrize("stored", [UNSIGNED, SIGNED])
@pytest.mark.parametrize("kind", ["normal", "rectified", "skew", "mirrored"])
def test_mse_finds_the_range_of_least_error_of_the_values_themselves(stored: Format, kind: str):
    values = normal() ** 3  # long tails: much is gained by clipping
    skew = numpy.where(values < 0, 0.05 * values, values)
    values = {"normal": values, "rectified": values.clip(0), "skew": skew, "mirrored": -skew}[kind]
    low, high = METHODS["mse"](seen(values), stored)

    def error(low: float, high: float) -> float:
        return float(((rounded(values, stored, low, high) - values) ** 2).mean())

    shares = numpy.linspace(0.04, 1, 25)
    tried = (
        [error(a * values.min(), b * values.max()) for a in shares for b in shares]
        if kind != "rectified"
        else [error(0, b * values.max()) for b in shares]
    )
    assert error(low, high) <= 1.05 * min(tried)
    assert error(low, high) < error(values.min(), values.max())


def test_a_normal_distribution_is_clipped_where_the_literature_says():
    """Banner et al., NeurIPS 2019, arXiv:1810.05723, equation 8: the least expected error of 255 levels, integrated."""
    clips = numpy.linspace(2, 6, 400)
    outside = 2 * ((clips**2 + 1) * stats.norm.sf(clips) - clips * stats.norm.pdf(clips))
    optimum = clips[(outside + (2 * clips / 254) ** 2 / 12).argmin()]
    values = numpy.append(stats.norm.ppf((numpy.arange(400_000) + 0.5) / 400_000), [8.0, -8.0])
    _, high = METHODS["mse"](seen(values), SIGNED)
    assert abs(high - optimum) < 0.2
    assert 3.5 < optimum < 4.5


def test_divergence_is_scipys_of_distributions_made_one_value_at_a_time():
    values = numpy.concatenate([numpy.abs(normal(5000)), numpy.zeros(5000)])
    histogram = seen(values, bins=2000)
    high = 2.0
    step = high / 255
    clipped, groups = {}, {}
    for i, (centre, count) in enumerate(zip(histogram.centres, histogram.counts, strict=True)):
        count = histogram.counts[1] if i == 0 else count  # the zeros, which stand exactly on the grid
        level = round(centre / step)
        if level <= 255:
            clipped[i] = float(count)
            groups.setdefault(level, []).append(i)
        else:
            clipped[max(clipped)] += count
    inside = {i: float(histogram.counts[1] if i == 0 else histogram.counts[i]) for i in clipped}
    smeared = {}
    for members in groups.values():
        filled = [i for i in members if inside[i] > 0]
        for i in members:
            smeared[i] = sum(inside[j] for j in members) / len(filled) if inside[i] > 0 else 0
    p, q = (numpy.array([table[i] for i in sorted(table)]) for table in (clipped, smeared))
    kept = p > 0
    expected = stats.entropy(p[kept], q[kept])  # SciPy normalizes both
    assert divergence(histogram, UNSIGNED, 0.0, high) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01


def test_entropy_takes_the_least_divergence_of_all_ranges_that_it_may_take():
    histogram = seen(numpy.abs(normal() ** 3))
    low, high = METHODS["entropy"](histogram, UNSIGNED)
    assert low == 0
    least = min(divergence(histogram, UNSIGNED, 0, share * histogram.high) for share in SHARES)
    assert divergence(histogram, UNSIGNED, low, high) == pytest.approx(least)
    assert high < 0.7 * histogram.high


def test_the_method_reaches_the_file_and_an_unknown_one_is_refused():
    model, images = graph(), photos(40)
    found = {}
    for method in METHODS:
        made = quantize(model, images, SCHEMES["x86"], Settings(method=method))
        found[method] = {t.name: t for t in made.model.graph.initializer}["sum_scale"].float_data or {
            t.name: t.raw_data for t in made.model.graph.initializer
        }["sum_scale"]
        assert made.calibration["method"] == method
    assert len(set(map(str, found.values()))) >= 3
    with pytest.raises(EdgekitError, match="Did you mean 'percentile'"):
        quantize(model, images, SCHEMES["x86"], Settings(method="percentil"))
