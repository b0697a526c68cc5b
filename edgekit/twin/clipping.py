"""The arithmetic of x86 without VNNI: sums of two products that clip in signed 16 bits, as its kernels make them.

Bit-exact with ONNX Runtime's kernels where it was measured: two K indices 2i, 2i + 1 are paired, K being kernel row,
kernel column, input channel fastest; raw unsigned activations with raw signed weights; all else is exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOW, HIGH = -(2**15), 2**15 - 1
SAFE = 128  # 255 times it is the largest product of a pair that fits
# Operators whose sums are no layers of the twin: no rule here clips them.
UNRULED = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


class Clipping:
    """A layer whose sums clip: its exact sums, and what clipping adds to them.

    Args:
        layer: convolution or matrix product of constant weights, as `layers` makes it.
        rows: (O, C, *kernel), the raw weights, a matrix product's as a kernel of no size.
        zero: of the activations, as the unsigned kernel sees them.    window: stride, padding, dilation; none of a
            matrix product.
    """

    def __init__(self, layer: Any, rows: Tensor, zero: float, window: Any = None, groups: int = 1) -> None:
        self.layer, self.zero, self.window, self.groups = layer, zero, window, groups
        # Depthwise with multiplier 1 runs in another kernel.
        self.alone = window is not None and groups == len(rows) and rows.shape[1] == 1
        self.kernel = rows.shape[2:]
        self.rows = [part.movedim(1, -1).flatten(1) for part in rows.chunk(groups)]

    def sums(self, centred: Tensor) -> Tensor:
        exact = self.layer.sums(centred)
        if self.alone or not any(unsafe(rows).any() for rows in self.rows):
            return exact
        raw = centred.float() + self.zero
        if self.window is None:
            flat = raw.reshape(-1, raw.shape[-1], 1)
            return exact + excess(self.rows[0], flat)[..., 0].reshape(exact.shape)
        stride, padding, dilation = self.window
        around = [pad for pad in reversed(padding) for _ in range(2)]
        raw = functional.pad(raw, around, value=self.zero)
        parts = []
        for rows, group in zip(self.rows, raw.chunk(self.groups, 1), strict=True):
            columns = functional.unfold(group, self.kernel, dilation, 0, stride)  # (N, C * kernel, L), kernel fastest
            columns = columns.view(len(columns), group.shape[1], -1, columns.shape[2]).transpose(1, 2).flatten(1, 2)
            parts.append(excess(rows, columns))
        return exact + torch.cat(parts, 1).view(exact.shape)

    def gradient(self, gradient: Tensor, centred: Tensor, factor: Tensor) -> Tensor:
        return self.layer.gradient(gradient, centred, factor)


def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(O, K) -> twice (O, ceil(K / 2)); an odd K pairs its last weight with zero."""
    rows = functional.pad(rows, (0, rows.shape[1] % 2))
    return rows[:, 0::2], rows[:, 1::2]


def unsafe(rows: Tensor) -> Tensor:
    """bool (O, ceil(K / 2)): whether some unsigned 8-bit input makes the pair clip."""
    a, b = pairs(rows)
    return (a.clamp(min=0) + b.clamp(min=0) > SAFE) | (a.clamp(max=0) + b.clamp(max=0) < -SAFE)


def excess(rows: Tensor, columns: Tensor) -> Tensor:
    """(N, O, L), what clipping adds to the sums of raw weights (O, K) and raw activations (N, K, L)."""
    (a, b), bad = pairs(rows.float()), unsafe(rows)
    columns = functional.pad(columns, (0, 0, 0, columns.shape[1] % 2))
    out = columns.new_zeros(len(columns), len(rows), columns.shape[2])
    for pair in bad.any(0).nonzero()[:, 0].tolist():
        hit = bad[:, pair].nonzero()[:, 0]
        sums = columns[:, None, 2 * pair] * a[hit, pair, None] + columns[:, None, 2 * pair + 1] * b[hit, pair, None]
        out.index_add_(1, hit, sums.clamp(LOW, HIGH) - sums)
    return out


def clipped(
    node: Any, layer: Any, x: Any, weight: Any, rows: Tensor, window: Sequence[Any] | None = None, groups: int = 1
) -> Any:
    """`layer`, or where the node is to clip and its weights are signed one that does.

    Args:
        x, weight: the grids of the activations and of the weights.
        rows: the weights without their zero point taken off, outputs first: (O, C, *kernel) or (O, K).
    """
    if not node.memo.get("clips") or weight.zero.dtype != torch.int8:
        return layer
    if "clipping" not in node.memo or node.memo["clipping"].layer is not layer:
        # Signed activations are moved by 128 first, and so is their zero point.
        moved = 128.0 if x.zero.dtype == torch.int8 else 0.0
        node.memo["clipping"] = Clipping(layer, rows, float(x.zero) + moved, window, groups)
    return node.memo["clipping"]
