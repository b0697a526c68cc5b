"""Resize and Upsample: along each axis a product with a matrix of interpolation weights, as ONNX defines them."""

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from edgekit.twin.graph import Node
from edgekit.twin.integers import Grid, Value, real
from edgekit.twin.shapes import extent, numbers

# Where place x of the resized axis lies in the old one: (x, scale, old length, new length).
_COORDINATES: dict[str, Callable[..., Any]] = {
    "half_pixel": lambda x, scale, old, new: (x + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda x, scale, old, new: old / 2 * (1 - new / (old * scale)) + (x + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda x, scale, old, new: (x + 0.5) / scale - 0.5 if new > 1 else 0 * x,
    "align_corners": lambda x, scale, old, new: x * ((old - 1) / (new - 1) if new > 1 else 0.0),
    "asymmetric": lambda x, scale, old, new: x / scale,
    "tf_half_pixel_for_nn": lambda x, scale, old, new: (x + 0.5) / scale,
}
_NEAREST: dict[str, Callable[..., Any]] = {
    "round_prefer_floor": lambda x: numpy.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: numpy.floor(x + 0.5),
    "floor": numpy.floor,
    "ceil": numpy.ceil,
}


def upsample(node: Node, value: Value, scales: Tensor | None = None) -> Value:
    old = Node(
        node.type, node.name, node.inputs, node.outputs,
        {**node.attributes, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        node.opset, node.where, node.memo,
    )  # fmt: skip
    factors = node.get("scales") if scales is None else numbers(scales)
    return _resized(old, value, factors, None, range(len(extent(value))))


def resize(
    node: Node, value: Value, roi: Any = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Value:
    if node.opset < 11:
        return upsample(node, value, roi)  # opset 10: (X, scales)
    axes = node.get("axes") or range(len(extent(value)))
    factors = None if scales is None or scales.numel() == 0 else numbers(scales)
    wanted = None if sizes is None else numbers(sizes)
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.error("keep_aspect_ratio_policy has no rule here")
    return _resized(node, value, factors, wanted, axes)


def _resized(node: Node, value: Value, scales: Any, sizes: Any, axes: Any) -> Value:
    mode = node.get("mode", "nearest")
    transformation = node.get("coordinate_transformation_mode", "half_pixel")
    if transformation not in _COORDINATES or mode not in ("nearest", "linear", "cubic"):
        raise node.error(f"there is no rule for the mode '{mode}' with '{transformation}' here")
    lengths = extent(value)
    changes: dict[int, tuple[int, int, float]] = {}
    for place, axis in enumerate(axes):
        old = lengths[axis]
        new = sizes[place] if sizes is not None else math.floor(old * scales[place])
        scale = scales[place] if sizes is None else new / old
        if new != old or scale != 1:
            changes[axis % len(lengths)] = (old, new, scale)
    if mode == "linear" and isinstance(value, Grid) and list(changes) == [2, 3] and not node.get("antialias", 0):
        return _bilinear(node, value.real(), changes[2], changes[3])
    for axis, change in changes.items():
        value = _along(node, value, axis, change)
    return value


def _bilinear(node: Node, x: Tensor, rows: tuple[int, int, float], columns: tuple[int, int, float]) -> Tensor:
    """Of integers on a grid: the four terms in ONNX Runtime's order, as ties between two integers are the rule here."""
    key = ("bilinear", rows, columns)
    if key not in node.memo:
        node.memo[key] = [_neighbours(node, *change) for change in (rows, columns)]
    vertical, horizontal = ([part.to(x.device) for part in half] for half in node.memo[key])
    (above, below, dy2, dy1), (left, right, dx2, dx1) = vertical, horizontal
    upper, lower = x.index_select(2, above), x.index_select(2, below)
    terms = [
        (across * down[:, None]).to(x.dtype) * line.index_select(3, side)
        for line, down in ((upper, dy2), (lower, dy1))
        for across, side in ((dx2, left), (dx1, right))
    ]
    return terms[0] + terms[1] + terms[2] + terms[3]


def _neighbours(node: Node, old: int, new: int, scale: float) -> list[Tensor]:
    """Of each new place the old ones before and behind, and the shares of both, float32."""
    places = _places(node, old, new, scale).astype(numpy.float32).clip(0, old - 1)
    before = places.astype(numpy.int64)
    behind = (before + 1).clip(max=old - 1)
    first, second = numpy.abs(places - behind), numpy.abs(places - before)
    first[before == behind] = second[before == behind] = 0.5
    return [torch.from_numpy(part) for part in (before, behind, first, second)]


def _along(node: Node, value: Value, axis: int, resized: tuple[int, int, float]) -> Value:
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        index = node.memo.setdefault(resized, torch.from_numpy(_nearest(node, *resized)))

        def picked(tensor: Tensor) -> Tensor:
            return tensor.index_select(axis, index.to(tensor.device))

        return value.moved(picked) if isinstance(value, Grid) else picked(real(value))
    if resized not in node.memo:
        node.memo[resized] = torch.from_numpy(_weights(node, mode, *resized)).float()
    x = real(value)
    return (x.movedim(axis, -1) @ node.memo[resized].to(x).T).movedim(-1, axis)


def _places(node: Node, old: int, new: int, scale: float) -> numpy.ndarray:
    transformation = node.get("coordinate_transformation_mode", "half_pixel")
    # In float32, as the runtimes compute: where a place falls between two, the last bit decides which is nearest.
    return _COORDINATES[transformation](numpy.arange(new, dtype=numpy.float32), numpy.float32(scale), old, new)


def _nearest(node: Node, old: int, new: int, scale: float) -> numpy.ndarray:
    rounding = _NEAREST[node.get("nearest_mode", "round_prefer_floor")]
    return rounding(_places(node, old, new, scale)).clip(0, old - 1).astype(numpy.int64)


def _weights(node: Node, mode: str, old: int, new: int, scale: float) -> numpy.ndarray:
    """(new, old): how much of each old place is in each new one."""
    # With antialias the kernel is as wide as a new pixel, where that is wider than an old one.
    stretch = min(scale, 1.0) if node.get("antialias", 0) else 1.0
    kernel = _triangle if mode == "linear" else _cubic(node.get("cubic_coeff_a", -0.75))
    reach = (1 if mode == "linear" else 2) / stretch
    matrix = numpy.zeros((new, old))
    for row, place in enumerate(_places(node, old, new, scale)):
        near = numpy.arange(math.floor(place - reach) + 1, math.ceil(place + reach))
        weights = kernel((near - place) * stretch)
        if node.get("exclude_outside", 0) or stretch < 1:
            weights = numpy.where((near < 0) | (near >= old), 0, weights)
        numpy.add.at(matrix[row], near.clip(0, old - 1), weights / weights.sum())
    return matrix


def _triangle(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.maximum(1 - numpy.abs(x), 0)


def _cubic(a: float) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Keys, IEEE Trans. ASSP 1981: the convolution kernel of bicubic interpolation."""

    def kernel(x: numpy.ndarray) -> numpy.ndarray:
        x = numpy.abs(x)
        inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
        outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return numpy.where(x <= 1, inner, numpy.where(x < 2, outer, 0))

    return kernel
