"""Rules for weights, against every pair of weights looked at one by one."""

import numpy
import pytest

from edgekit.errors import EdgekitError
from edgekit.quantize.scheme import Format
from edgekit.quantize.slim import storable
from edgekit.quantize.weights import RULES, STEP, weigh

CHANNEL, TENSOR = (Format(8, True, True, granularity) for granularity in ("channel", "tensor"))


def drawn(*shape: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).normal(size=shape).astype("float32")


def saturates(integers: numpy.ndarray) -> list[bool]:
    """Of each output channel, by the extremes of two unsigned inputs; K runs over kernel places, then channels."""
    found = []
    for row in integers.astype(int):
        order = [row[c, y, x] for y in range(row.shape[1]) for x in range(row.shape[2]) for c in range(row.shape[0])]
        order += [0] * (len(order) % 2)
        sums = [x * order[i] + y * order[i + 1] for i in range(0, len(order), 2) for x in (0, 255) for y in (0, 255)]
        found.append(not all(-32768 <= total <= 32767 for total in sums))
    return found


def error(integers: numpy.ndarray, scale: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    scale = scale.reshape(-1, 1, 1, 1)
    return ((integers * scale - weights) ** 2).reshape(len(weights), -1).sum(1)


@pytest.mark.parametrize("stored", [CHANNEL, TENSOR])
@pytest.mark.parametrize("rule", RULES)
def test_no_rule_lets_a_pair_saturate(stored: Format, rule: str):
    weights = drawn(12, 5, 3, 3)
    integers, scale, zero = weigh(weights, stored, pairs=True, rule=rule)
    assert not any(saturates(integers))
    assert scale.shape == zero.shape == (() if stored is TENSOR else (12,))
    assert not zero.any()
    step = scale.reshape(-1, 1, 1, 1)
    assert (numpy.abs(integers * step - weights) <= 0.501 * step).all()
    assert any(saturates(weigh(weights, stored, pairs=False, rule=rule)[0]))  # there was something to mend


def test_enlarged_is_the_first_safe_scale_and_never_above_seven_bits():
    weights = drawn(40, 5, 3, 3)
    integers, scale, _ = weigh(weights, CHANNEL, pairs=True, rule="enlarged")
    full = weigh(weights, CHANNEL, pairs=False, rule="enlarged")[1]
    seven, ends, _ = weigh(weights, CHANNEL, pairs=True, rule="seven")
    assert numpy.abs(seven.reshape(40, -1)).max(1).tolist() == [64] * 40
    assert (scale <= ends).all()
    grown = scale > full
    assert 5 < grown.sum() < 40
    for row, made, step, end in zip(weights, scale, full, ends, strict=True):  # one after the other, and by brute force
        while step < end and any(saturates(numpy.rint(row[None] / numpy.float64(step)))):
            step = storable(numpy.asarray(step * STEP, numpy.float32))
        assert made == min(step, end)
    assert error(integers, scale, weights).sum() < 0.8 * error(seven, ends, weights).sum()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_any_format_holds_weights_within_half_a_step(signed: bool, symmetric: bool, granularity):
    weights = drawn(7, 4, 3, 3) + 0.7
    integers, scale, zero = weigh(weights, Format(8, signed, symmetric, granularity), pairs=False, rule="seven")
    assert integers.dtype == zero.dtype == (numpy.int8 if signed else numpy.uint8)
    assert scale.shape == zero.shape == ((7,) if granularity == "channel" else ())
    step, middle = (entry.reshape(-1, 1, 1, 1) for entry in (scale, zero.astype(int)))
    assert (numpy.abs((integers - middle) * step - weights) <= 0.501 * step).all()
    if symmetric:
        assert set(zero.flatten().tolist()) == {0 if signed else 128}
    else:  # the skew is made use of
        wide = weigh(weights, Format(8, signed, True, granularity), pairs=False, rule="seven")[1]
        assert (scale < wide).all()


def test_weights_of_zero_have_a_scale_and_an_unknown_rule_is_refused():
    integers, scale, _ = weigh(numpy.zeros((2, 2, 1, 1), "float32"), CHANNEL, pairs=True, rule="enlarged")
    assert not integers.any()
    assert (scale > 0).all()
    with pytest.raises(EdgekitError, match="Did you mean 'seven'"):
        weigh(drawn(1, 2, 1, 1), CHANNEL, pairs=True, rule="sevn")
