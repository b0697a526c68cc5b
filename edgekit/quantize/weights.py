"""Float weights -> integers and their scales: by channel or by tensor, and so that no pair of products can saturate.

A scale is what the largest weight asks for, unless pairs of products are summed in 16 bits (saturation.py): then one
of RULES enlarges it. All are safe; they differ in how much error they pay for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy

from edgekit.errors import choose
from edgekit.quantize.scheme import Format
from edgekit.quantize.slim import storable
from edgekit.saturation import clips, paired

STEP = 1.002  # of a scale that grows


@dataclass(frozen=True)
class Rows:
    """Weights (O, …) of which each of `count` equal parts has a scale of its own; symmetric integers."""

    weights: numpy.ndarray
    count: int

    def __getitem__(self, chosen: numpy.ndarray) -> "Rows":
        """The chosen parts of `count`."""
        if chosen.all():
            return self
        return Rows(self.weights[chosen], int(chosen.sum()))  # more than one part: each is a row

    def integers(self, scale: numpy.ndarray) -> numpy.ndarray:
        """(O, …) in [-127, 127]."""
        divided = self.weights.reshape(self.count, -1) / scale[:, None]
        return numpy.clip(numpy.rint(divided, out=divided), -127, 127, out=divided).reshape(self.weights.shape)

    def unsafe(self, scale: numpy.ndarray) -> numpy.ndarray:
        """Whether a part (count,) holds a pair that can clip."""
        bad = numpy.asarray(clips(paired(self.integers(scale))))
        return numpy.asarray(bad.reshape(self.count, -1).any(1))


def weigh(
    weights: numpy.ndarray, stored: Format, *, pairs: bool, rule: str
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Integers shaped as `weights` (O, …), their scale and their zero point: (O,) by channel, () by tensor.

    Args:
        pairs: the layer's products are summed in pairs that must not saturate. Those of unsigned weights are not.
    Raises:
        EdgekitError: `rule` is not in RULES.
    """
    enlarge = choose(RULES, rule, "rule for weights")
    rows = Rows(weights.astype(numpy.float64), len(weights) if stored.granularity == "channel" else 1)
    flat = rows.weights.reshape(rows.count, -1)
    risky = pairs and stored.signed
    if stored.symmetric:
        scale = _single(numpy.abs(flat).max(1) / 127)
        scale = enlarge(rows, scale) if risky else scale
        zero = numpy.full(rows.count, 0 if stored.signed else 128)
        made = rows.integers(scale).reshape(flat.shape) + zero[:, None]
    else:
        low, high = numpy.minimum(flat.min(1), 0), numpy.maximum(flat.max(1), 0)
        least, most = (-64, 64) if risky else stored.ends  # raw integers are paired, zero points still in
        scale = _single((high - low) / (most - least))
        zero = numpy.clip(numpy.rint(least - low / scale), least, most)
        made = numpy.clip(numpy.rint(flat / scale[:, None]) + zero[:, None], least, most)
    kind, shape = (numpy.int8 if stored.signed else numpy.uint8), (-1 if stored.granularity == "channel" else ())
    return (
        made.reshape(weights.shape).astype(kind),
        scale.astype(numpy.float32).reshape(shape),
        zero.astype(kind).reshape(shape),
    )


def _single(scale: numpy.ndarray) -> numpy.ndarray:
    """Scales that a slim file holds, none of them 0."""
    return storable(numpy.where(scale > 0, scale, 1).astype(numpy.float32)).astype(numpy.float64)


# Ways to enlarge the scale of each part until none of its pairs is unsafe ---------------------------------------------


def seven(rows: Rows, scale: numpy.ndarray) -> numpy.ndarray:
    """Integers within [-64, 64]: safe whatever is paired with what, so on kernels of another order too."""
    return _single(scale * 127 / 64)


def enlarged(rows: Rows, scale: numpy.ndarray) -> numpy.ndarray:
    """As little as makes this very pairing safe; at most to seven bits."""
    scale, ends = scale.copy(), seven(rows, scale)
    bad = rows.unsafe(scale)
    while bad.any():
        scale[bad] = numpy.minimum(_single(scale[bad] * STEP), ends[bad])
        bad[bad] = rows[bad].unsafe(scale[bad])
    return scale


RULES: dict[str, Callable[[Rows, numpy.ndarray], numpy.ndarray]] = {
    "seven": seven,
    "enlarged": enlarged,
}
