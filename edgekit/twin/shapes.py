"""Operators that only move values, and the arithmetic of shapes. What lay on a grid stays on it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.twin.graph import LARGEST, Node
from edgekit.twin.integers import Grid, Joined, Value, real


def moved(function: Callable[..., Tensor]) -> Callable[..., Value]:
    """An operator that only moves values of its first input."""

    def operator(node: Node, value: Value, *others: Any) -> Value:
        if isinstance(value, Grid) and value.scale.numel() == 1:
            return value.moved(lambda centred: function(node, centred, *others))
        return function(node, real(value), *others)

    return operator


def numbers(value: Tensor | None, default: Any = None) -> Any:
    return default if value is None else value.tolist()


def checked(node: Node, shape: list[int]) -> list[int]:
    if math.prod(shape) > LARGEST:
        raise node.error(f"makes a tensor of {math.prod(shape)} values")
    return shape


def flatten(node: Node, value: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + value.ndim if axis < 0 else axis
    return value.reshape(math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))


def reshape(node: Node, value: Tensor, shape: Tensor) -> Tensor:
    sizes = numbers(shape)
    if not node.get("allowzero", 0):
        sizes = [value.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return value.reshape(sizes)


def transpose(node: Node, value: Tensor) -> Tensor:
    return value.permute(node.get("perm") or list(reversed(range(value.ndim))))


def squeeze(node: Node, value: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = numbers(axes, node.get("axes"))
    return value.squeeze() if chosen is None else value.squeeze(tuple(chosen))


def unsqueeze(node: Node, value: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = numbers(axes, node.get("axes"))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    ndim = value.ndim + len(chosen)
    for axis in sorted(axis % ndim for axis in chosen):
        value = value.unsqueeze(axis)
    return value


def concat(node: Node, *values: Value) -> Value:
    axis = node.attributes["axis"]
    if all(isinstance(value, Grid) and not value.stored and value.scale.numel() == 1 for value in values):
        first = values[0]
        if all(value.scale.equal(first.scale) and value.zero.equal(first.zero) for value in values):
            return first.moved(lambda _: torch.cat([value.centred for value in values], axis))
        return Joined(values, axis)
    tensors = [real(value) for value in values]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    return torch.cat([tensor.to(device) for tensor in tensors], axis)


def split(node: Node, value: Value, sizes: Tensor | None = None) -> tuple[Value, ...]:
    tensor = value.centred if isinstance(value, Grid) else real(value)
    axis = node.get("axis", 0)
    wanted = numbers(sizes, node.get("split"))
    if wanted is None:  # in equal parts, the last may be smaller
        wanted = math.ceil(tensor.shape[axis] / node.get("num_outputs", len(node.outputs)))
    parts = tensor.split(wanted, axis)
    if isinstance(value, Grid):
        return tuple(value.moved(lambda _, part=part: part) for part in parts)
    return parts


def slice_(node: Node, value: Tensor, *inputs: Tensor | None) -> Tensor:
    if inputs:
        starts, ends, axes, steps = (numbers(entry) for entry in (*inputs, None, None)[:4])
    else:
        starts, ends, axes, steps = node.attributes["starts"], node.attributes["ends"], node.get("axes"), None
    axes = list(range(len(starts))) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        if step > 0:
            picked = [slice(None)] * (axis % value.ndim) + [slice(start, end, step)]
            value = value[tuple(picked)]
            continue
        length = value.shape[axis]
        first = min(start + length if start < 0 else start, length - 1)
        last = max(end + length if end < 0 else end, -1)
        index = torch.arange(first, last, step, device=value.device)
        value = value.index_select(axis, index)
    return value


def gather(node: Node, value: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0) % value.ndim
    length = value.shape[axis]
    if index.ndim == 0:
        return value.select(axis, int(index))
    flat = index.to(value.device).flatten().long()
    flat = torch.where(flat < 0, flat + length, flat)
    return value.index_select(axis, flat).reshape(value.shape[:axis] + index.shape + value.shape[axis + 1 :])


def gather_elements(node: Node, value: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    index = index.to(value.device)
    return value.gather(axis, torch.where(index < 0, index + value.shape[axis], index))


def gather_nd(node: Node, value: Tensor, index: Tensor) -> Tensor:
    if node.get("batch_dims", 0):
        raise node.error("batch_dims has no rule here")
    return value[tuple(index.to(value.device).unbind(-1))]


def scatter_nd(node: Node, value: Tensor, index: Tensor, updates: Value) -> Tensor:
    if node.get("reduction", "none") != "none":
        raise node.error("a reduction has no rule here")
    return value.index_put(tuple(index.to(value.device).unbind(-1)), real(updates).to(value))


def scatter_elements(node: Node, value: Tensor, index: Tensor, updates: Value) -> Tensor:
    if node.get("reduction", "none") != "none":
        raise node.error("a reduction has no rule here")
    return value.scatter(node.get("axis", 0), index.to(value.device), real(updates).to(value))


def expand(node: Node, value: Tensor, shape: Tensor) -> Tensor:
    return value.expand(checked(node, list(torch.broadcast_shapes(value.shape, tuple(numbers(shape))))))


def tile(node: Node, value: Tensor, repeats: Tensor) -> Tensor:
    times = numbers(repeats)
    checked(node, [size * count for size, count in zip(value.shape, times, strict=True)])
    return value.repeat(times)


def pad(node: Node, value: Value, pads: Tensor | None = None, fill: Value = None, axes: Tensor | None = None) -> Value:
    mode = node.get("mode", "constant")
    number = float(real(fill)) if fill is not None else node.get("value", 0.0)
    if (
        isinstance(value, Grid)
        and not value.stored
        and value.scale.numel() == 1
        and (mode != "constant" or number == 0)
    ):
        return value.moved(lambda centred: _padded(node, centred, pads, 0.0, axes))
    return _padded(node, real(value), pads, number, axes)


def _padded(node: Node, value: Tensor, pads: Tensor | None, number: float, axes: Tensor | None) -> Tensor:
    listed = numbers(pads, node.get("pads") or node.get("paddings"))
    chosen = [axis % value.ndim for axis in numbers(axes, range(value.ndim))]
    half = len(listed) // 2
    befores, afters = [0] * value.ndim, [0] * value.ndim
    for axis, before, after in zip(chosen, listed[:half], listed[half:], strict=True):
        befores[axis], afters[axis] = before, after
    mode = node.get("mode", "constant")
    if mode == "constant":
        flat = [amount for axis in reversed(range(value.ndim)) for amount in (befores[axis], afters[axis])]
        return functional.pad(value, flat, value=number)
    for axis, (before, after) in enumerate(zip(befores, afters, strict=True)):
        if before or after:
            value = value.index_select(axis, _border(node, mode, value.shape[axis], before, after).to(value.device))
    return value


def _border(node: Node, mode: str, length: int, before: int, after: int) -> Tensor:
    """Which place of an axis each place of the padded axis shows."""
    index = torch.arange(-before, length + after)
    if mode == "edge":
        return index.clamp(0, length - 1)
    if mode == "wrap":
        return index % length
    if mode != "reflect":
        raise node.error(f"there is no padding '{mode}' here")
    period = max(2 * (length - 1), 1)
    folded = index % period
    return torch.where(folded >= length, period - folded, folded)


def depth_to_space(node: Node, value: Tensor) -> Tensor:
    block = node.attributes["blocksize"]
    count, channels, height, width = value.shape
    if node.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(value, block)
    parts = value.reshape(count, block, block, channels // block**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(count, channels // block**2, height * block, width * block)


def space_to_depth(node: Node, value: Tensor) -> Tensor:
    block = node.attributes["blocksize"]
    count, channels, height, width = value.shape
    parts = value.reshape(count, channels, height // block, block, width // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(count, channels * block**2, height // block, width // block)


def triangle(node: Node, value: Tensor, diagonal: Tensor | None = None) -> Tensor:
    offset = 0 if diagonal is None else int(diagonal)
    return value.triu(offset) if node.get("upper", 1) else value.tril(offset)


# Shapes ---------------------------------------------------------------------------------------------------------------


def shape(node: Node, value: Value) -> Tensor:
    sizes = list(extent(value))
    return torch.tensor(sizes[node.get("start", 0) : node.get("end", len(sizes))], dtype=torch.int64)


def extent(value: Value) -> torch.Size:
    return value.centred.shape if isinstance(value, Grid) else real(value).shape


def size(node: Node, value: Value) -> Tensor:
    return torch.tensor(math.prod(extent(value)), dtype=torch.int64)


def range_(node: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def constant_of_shape(node: Node, sizes: Tensor) -> Tensor:
    value = node.get("value")
    fill, kind = (0.0, torch.float32) if value is None else (value.item(), value.dtype)
    return torch.full(checked(node, numbers(sizes)), fill, dtype=kind)
