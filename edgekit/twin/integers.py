"""Integers on grids, held exactly in floats: sums as integer kernels make them, one rounding where a kernel rounds.

ONNX Runtime fuses DequantizeLinear, a layer and QuantizeLinear into one integer kernel. So a layer over grids is not
rounded until the QuantizeLinear that follows says onto which grid: `on`. Whoever needs floats asks `real`. Gradients go
straight through a rounding and stop where a value was clipped: Bengio et al. 2013 (arXiv:1308.3432), with the
clipping-range mask of Choi et al. 2018 (arXiv:1805.06085), without which the attack is far weaker.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy
import torch
from torch import Tensor

EXACT = 2**24  # float32 holds every integer up to here; beyond it sums are made in float64
_CACHED = 2**15  # values at a time: with their float64 copies they lie in a core's own cache

_clipped = torch.ops.aten.hardtanh_backward  # gradient where low < value < high, else 0, in one pass


class Lazy(Protocol):
    """A value of the graph that is not a tensor of floats yet."""

    def real(self) -> Tensor:
        """The value in floats."""
        ...

    def on(self, target: "Target") -> "Grid":
        """The value rounded onto a grid, as the fused integer kernel does it."""
        ...


Value: TypeAlias = Any  # Tensor | Lazy; operators tell by `isinstance(value, Tensor)`


def real(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else value.real()


@dataclass(frozen=True)
class Target:
    """The grid of a QuantizeLinear: real = (integer - zero) * scale, integers from `low` to `high`."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def limits(self) -> tuple[float, float]:
        """The range of integer - zero; of a zero point per channel the widest."""
        if self.zero.numel() == 1:
            zero = int(self.zero)
            return self.low - zero, self.high - zero
        return self.low - int(self.zero.max()), self.high - int(self.zero.min())

    def grid(self, centred: Tensor) -> "Grid":
        return Grid(centred, self.scale, self.zero, self.high - self.low)


class Round(torch.autograd.Function):
    """clamp(round(values * factor), low, high), or values / factor; the gradient is scaled too, 0 where clipped."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor, low: float, high: float, divide: bool) -> Tensor:
        scaled = values / factor if divide else values * factor
        ctx.save_for_backward(scaled)
        ctx.factor, ctx.divide, ctx.range = factor, divide, (low - 0.5, high + 0.5)
        return scaled.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _clipped(gradients[0], ctx.saved_tensors[0], *ctx.range)
        gradient = gradient.div_(ctx.factor) if ctx.divide else gradient.mul_(ctx.factor)
        return gradient, None, None, None, None


def _parts(like: Tensor) -> list[Any]:
    """Parts of the first axis so small that one operation finds in the cache what the one before it left there."""
    if like.device.type != "cpu" or not like.ndim or not like.numel():
        return [...]
    step = max(1, _CACHED * len(like) // like.numel())
    return [slice(start, start + step) for start in range(0, len(like), step)]


class _RoundedSum(torch.autograd.Function):
    """clamp(round(fma(a, ra, fma(b, rb, k)))): ONNX Runtime's QLinearAdd, which rounds after adding the zero point."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, ratios: tuple[Tensor, Tensor], zeros: Sequence[float], low: float, high: float
    ) -> Tensor:
        (ra, rb), (za, zb, zc) = [ratio.item() for ratio in ratios], zeros
        k = float(zc - (ra * za + (ratios[1] * zb).double()).float())
        # A fused multiply-add rounds once: exact in float64, then to float32. The zero points go with the constants:
        # an integer of 8 bits times a ratio of 24, and what is added to it, have room in the 53 bits of a float64.
        shape = torch.broadcast_shapes(a.shape, b.shape)
        wide_a, wide_b = a.expand(shape), b.expand(shape)
        total, rounded = torch.empty_like(wide_a), torch.empty_like(wide_a)
        for part in _parts(total):
            inside = wide_b[part].double().mul_(rb).add_(rb * zb + k).float()
            outside = wide_a[part].double().mul_(ra).add_(inside)
            total[part] = outside.add_(ra * za) if za else outside
            torch.round(total[part], out=rounded[part])
            rounded[part].clamp_(low, high).sub_(zc)
        ctx.save_for_backward(total)
        ctx.range, ctx.ratios, ctx.shapes = (low - 0.5, high + 0.5), (ra, rb), (a.shape, b.shape)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (total,), (ra, rb) = ctx.saved_tensors, ctx.ratios
        a, b = torch.empty_like(total), torch.empty_like(total)
        for part in _parts(total):
            gradient = _clipped(gradients[0][part], total[part], *ctx.range)
            torch.mul(gradient, ra, out=a[part])
            torch.mul(gradient, rb, out=b[part])
        a, b = (made.sum_to_size(shape) for made, shape in zip((a, b), ctx.shapes, strict=True))
        return a, b, None, None, None, None


@dataclass(frozen=True)
class Grid:
    """Integers on a grid.

    `centred` holds integer - zero in floats and `span` is their largest distance. The value is centred * scale; of a
    `stored` one, the output of QuantizeLinear that nothing has dequantized yet, it is the integer itself.
    """

    centred: Tensor
    scale: Tensor
    zero: Tensor
    span: int = 255
    stored: bool = False

    def real(self) -> Tensor:
        if self.stored:
            return self.centred + self.zero.float()
        return (self.centred * self.scale).float()

    def on(self, target: Target) -> "Grid":
        if torch.equal(target.scale, self.scale) and torch.equal(target.zero, self.zero):
            return self
        return target.grid(Round.apply(self.real(), target.scale, *target.limits(), True))  # pyright: ignore

    def moved(self, function: Callable[..., Tensor], *others: Any) -> "Grid":
        """The same integers elsewhere."""
        return replace(self, centred=function(self.centred, *others))

    def read(self, scale: Tensor, zero: Tensor) -> "Grid":
        """What a DequantizeLinear with this scale and zero point reads in the integers."""
        if torch.equal(zero, self.zero):
            return replace(self, scale=scale, stored=False)
        return replace(
            self, centred=self.centred + (self.zero.float() - zero.float()), scale=scale, zero=zero, stored=False
        )

    def to(self, work: Callable[[Tensor], Tensor]) -> "Grid":
        return replace(self, centred=work(self.centred), scale=work(self.scale), zero=work(self.zero))


class Layer(Protocol):
    """A linear layer of constant integer weights."""

    def sums(self, centred: Tensor) -> Tensor:
        """Exact sums, float32, a tensor of their own."""
        ...

    def gradient(self, gradient: Tensor, centred: Tensor, factor: Tensor) -> Tensor:
        """The gradient of sums * factor."""
        ...


class _Requantized(torch.autograd.Function):
    """clamp(round(layer.sums(x) * factor), low, high) and its gradient, in few more passes than conv and ReLU6."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor, layer: Layer, factor: Tensor, low: float, high: float) -> Tensor:
        scaled = layer.sums(centred)
        rounded = torch.empty_like(scaled)
        for part in _parts(scaled):
            torch.round(scaled[part].mul_(factor), out=rounded[part])
            rounded[part].clamp_(low, high)
        ctx.save_for_backward(centred, scaled)
        ctx.layer, ctx.factor, ctx.range = layer, factor, (low - 0.5, high + 0.5)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        centred, scaled = ctx.saved_tensors
        gradient = _clipped(gradients[0], scaled, *ctx.range)
        return ctx.layer.gradient(gradient, centred, ctx.factor), None, None, None, None


class _Scaled(torch.autograd.Function):
    """layer.sums(x) * factor, not rounded."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor, layer: Layer, factor: Tensor) -> Tensor:
        ctx.save_for_backward(centred)
        ctx.layer, ctx.factor = layer, factor
        return layer.sums(centred).mul_(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layer.gradient(gradients[0], ctx.saved_tensors[0], ctx.factor), None, None


@dataclass(frozen=True)
class Products:
    """A layer over a grid, not computed yet; the real value is layer.sums(centred) * scale."""

    centred: Tensor
    layer: Layer
    scale: Tensor

    def real(self) -> Tensor:
        return _Scaled.apply(self.centred, self.layer, self.scale)  # pyright: ignore

    def on(self, target: Target) -> Grid:
        factor = self.scale / target.scale
        return target.grid(_Requantized.apply(self.centred, self.layer, factor, *target.limits()))  # pyright: ignore


@dataclass(frozen=True)
class Sums:
    """Exact integers, not rounded yet; the real value is sums * scale / count."""

    sums: Tensor
    scale: Tensor
    count: int = 1

    def real(self) -> Tensor:
        return self.sums * (self.scale / self.count)

    def on(self, target: Target) -> Grid:
        # ONNX Runtime divides the output's scale by the area, so a mean is one more factor of the requantization.
        factor = self.scale / (target.scale * self.count)
        return target.grid(Round.apply(self.sums, factor, *target.limits(), False))  # pyright: ignore


@dataclass(frozen=True)
class Added:
    """Two grids to be added, not rounded yet."""

    a: Grid
    b: Grid

    def real(self) -> Tensor:
        return self.a.real() + self.b.real()

    def on(self, target: Target) -> Grid:
        ratios = self.a.scale / target.scale, self.b.scale / target.scale
        zeros = [float(zero) for zero in (self.a.zero, self.b.zero, target.zero)]
        summed: Tensor = _RoundedSum.apply(  # pyright: ignore
            self.a.centred, self.b.centred, ratios, zeros, target.low, target.high
        )
        return target.grid(summed)


@dataclass(frozen=True)
class Averaged:
    """An average of a grid: QLinearAveragePool rounds after adding the zero point, so that ties fall by its parity.

    `unsigned`: a signed zero point is added as the unsigned one that the runtime makes of it, whose size rounds, too.
    """

    value: Tensor
    unsigned: bool = False

    def real(self) -> Tensor:
        return self.value

    def on(self, target: Target) -> Grid:
        zero = target.zero.float() - (target.low if self.unsigned else 0)
        low = 0 if self.unsigned else target.low
        rounded: Tensor = Round.apply(  # pyright: ignore
            self.value / target.scale + zero, torch.ones_like(zero), low, low + target.high - target.low, False
        )
        return target.grid(rounded - zero)


@dataclass(frozen=True)
class Softened:
    """A softmax of a grid: QLinearSoftmax multiplies by the whole part of 1 / scale."""

    value: Tensor

    def real(self) -> Tensor:
        return self.value

    def on(self, target: Target) -> Grid:
        factor = (1 / target.scale).floor()
        return target.grid(Round.apply(self.value, factor, *target.limits(), False))  # pyright: ignore


@dataclass(frozen=True)
class Bounded:
    """A value between Relu or Clip and its QuantizeLinear; the bounds are needless where the grid ends there."""

    inner: Lazy
    low: float
    high: float

    def real(self) -> Tensor:
        return bounded(self.inner.real(), self.low, self.high)

    def on(self, target: Target) -> Grid:
        low, high = target.limits()
        if (
            target.scale.numel() == 1
            and self.low <= low * target.scale.item()
            and high * target.scale.item() <= self.high
        ):
            return self.inner.on(target)
        return target.grid(Round.apply(self.real(), target.scale, low, high, True))  # pyright: ignore


@dataclass(frozen=True)
class Joined:
    """Grids to be concatenated, each rounded onto the common grid by itself."""

    parts: Sequence[Lazy]
    axis: int

    def real(self) -> Tensor:
        return torch.cat([part.real() for part in self.parts], self.axis)

    def on(self, target: Target) -> Grid:
        return target.grid(torch.cat([part.on(target).centred for part in self.parts], self.axis))


class _Clip(torch.autograd.Function):
    """clamp whose gradient, in one pass, is 1 on the bounds too: pixels at 0 and 1 would be frozen otherwise."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        below, above = numpy.nextafter(
            numpy.array([low, high], numpy.float32), numpy.array([-numpy.inf, numpy.inf], numpy.float32)
        )
        ctx.range = float(below), float(above)
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _clipped(gradients[0], ctx.saved_tensors[0], *ctx.range), None, None


def bounded(value: Tensor, low: float, high: float) -> Tensor:
    """Relu and Clip."""
    if (low, high) == (0, math.inf):
        return value.relu()
    return _Clip.apply(value, low, high) if value.is_floating_point() else value.clamp(low, high)  # pyright: ignore
