"""Sums of two grids that every processor rounds alike.

An integer addition is a few operations in float32, then one rounding. ONNX Runtime's kernels differ in the order of
the operations, in which of them are fused, and in where an exact half goes: to the even number on x86, away from zero
on ARM. So a sum next to the middle between two integers falls up on one processor and down on another. There are only
65,536 sums: the scale is enlarged until none of them lies nearer to a middle than float32 can err.
"""

import numpy

from edgekit.quantize.scheme import Grid

# One rounding of a number between 128 and 256 errs by 2**-17 at most; a kernel makes four or five of them, most of them
# of smaller numbers.
MARGIN = 2**-14
STEP, TRIES = 2**-16, 4096  # the scale grows by so much at a time: a sixteenth at most


def settle(a: Grid, b: Grid, made: Grid) -> Grid:
    """`made`, the grid of the sum of `a` and `b`, its scale enlarged as little as keeps all sums off the middles.

    Where no scale up to a sixteenth larger does, `made` as it is: that kernels agree is measured, never assumed.
    """
    for turn in range(TRIES):
        candidate = numpy.float32(made[0] * (1 + STEP * turn)), made[1]
        if distance(a, b, candidate) >= MARGIN:
            return candidate
    return made


def distance(a: Grid, b: Grid, made: Grid) -> float:
    """How near the nearest sum of two integers comes to the middle between two integers of `made`, at most 1/2."""
    left, right = (numpy.float64(numpy.float32(grid[0] / made[0])) for grid in (a, b))
    values = numpy.arange(256.0)
    # Signed integers count from -128: moved, they are the same grid.
    first, second, zero = (
        int(grid[1]) + 128 * (getattr(grid[1], "dtype", None) == numpy.int8) for grid in (a, b, made)
    )
    sums = left * (values - first)[:, None] + right * (values - second) + zero
    middles = numpy.floor(sums) + 0.5
    inside = (middles > 0) & (middles < 255)  # beyond, either way is cut to the same end
    return float(numpy.abs(sums - middles)[inside].min(initial=0.5))
