"""Sums of two grids that every processor rounds alike.

An integer addition is a few operations in float32, then one rounding. Kernels differ in their order and in which of
them are fused (x86 against ARM in ONNX Runtime; part of it is the compiler's choice), so a sum that lies next to the
middle between two integers falls up on one processor and down on another. There are only 65,536 sums: all are tried,
and a scale under which the kernels could differ is enlarged until they cannot.
"""

from collections.abc import Iterator
from typing import Any

import numpy

Grid = tuple[numpy.float32, int | numpy.integer]  # scale, zero point of unsigned 8-bit integers

STEP, TRIES = 1 / 4096, 400  # the scale grows by so much at a time: a tenth at most


def settle(a: Grid, b: Grid, made: Grid) -> Grid:
    """`made`, the grid of the sum of `a` and `b`, its scale enlarged as little as makes all kernels agree.

    Where no scale up to a tenth larger does, `made` as it is: that kernels agree is measured, never assumed.
    """
    for turn in range(TRIES):
        candidate = numpy.float32(made[0] * (1 + STEP * turn)), made[1]
        if agree(a, b, candidate):
            return candidate
    return made


def agree(a: Grid, b: Grid, made: Grid) -> bool:
    """Whether all ways to compute it round each sum of two integers onto `made` alike."""
    ways = _ways(a, b, made)
    first = next(ways)
    return all(numpy.array_equal(first, other) for other in ways)


def _ways(a: Grid, b: Grid, made: Grid) -> Iterator[numpy.ndarray]:
    """The 65,536 results in each order of operations, with and without fused multiply-adds."""
    single, double = numpy.float32, numpy.float64
    za, zb, zc = (double(grid[1]) for grid in (a, b, made))
    ra, rb = (double(single(single(grid[0]) / single(made[0]))) for grid in (a, b))
    left, right = (values.astype(double) for values in numpy.meshgrid(numpy.arange(256), numpy.arange(256)))

    def rounded(value: Any) -> numpy.ndarray:
        """To float32, and on in float64, where a product of two float32 is exact and a fused sum rounds once."""
        return numpy.asarray(value, double).astype(single).astype(double)

    def result(value: numpy.ndarray) -> numpy.ndarray:
        return numpy.rint(value).clip(0, 255)

    product = rounded(rb * zb)
    for fixed in {
        float(rounded(zc - rounded(ra * za + product))),  # x86
        float(rounded(zc - rounded(rounded(ra * za) + product))),
        float(rounded(zc - rounded(rb * zb + rounded(ra * za)))),
        float(rounded(-ra * za + rounded(-rb * zb + zc))),  # ARM
    }:
        yield result(rounded(left * ra + rounded(right * rb + fixed)))  # x86
        yield result(rounded(right * rb + rounded(left * ra + fixed)))  # ARM
        yield result(rounded(rounded(rounded(left * ra) + fixed) + rounded(right * rb)))
        yield result(rounded(rounded(rounded(right * rb) + fixed) + rounded(left * ra)))
        yield result(rounded(rounded(rounded(left * ra) + rounded(right * rb)) + fixed))
    floats = rounded(rounded((left - za) * double(a[0])) + rounded((right - zb) * double(b[0])))
    yield result(rounded(floats / double(made[0])) + zc)
