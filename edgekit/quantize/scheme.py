"""What a runtime wants of an int8 graph, as data."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy

# Scale and zero point: an integer q stands for (q - zero point) * scale. Signed integers have an int8 zero point.
Grid = tuple[numpy.float32, int | numpy.integer]


@dataclass(frozen=True)
class Format:
    """How one kind of tensor is stored. Of `bits` there is one choice yet, 8."""

    bits: int
    signed: bool
    symmetric: bool
    granularity: Literal["tensor", "channel"]

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest integer; symmetric signed ones leave -128 out, as TensorRT does."""
        if not self.signed:
            return 0, 255
        return (-127 if self.symmetric else -128), 127

    def grid(self, low: float, high: float) -> Grid:
        """The grid over [low, high], which is widened to hold zero: zero has an integer of its own."""
        low, high = min(low, 0.0), max(high, 0.0)
        least, most = self.ends
        kind = numpy.int8 if self.signed else numpy.uint8
        if self.symmetric:
            return numpy.float32(max(-low, high) / 127) or numpy.float32(1), kind(0 if self.signed else 128)
        scale = numpy.float32((high - low) / (most - least)) or numpy.float32(1)
        return scale, kind(numpy.clip(least + round(-low / float(scale)), least, most))


@dataclass(frozen=True)
class Scheme:
    """weights, activations: how they are stored. cannot_saturate: dense weights are such that no sum of two products
    with an unsigned 8-bit activation leaves 16 bits, however Settings.weights chooses among such weights.
    only: the operators that work on integers, None for all that can. Then every other one stays float and reads what it
    reads unrounded, and a result becomes integers only where one of them reads it.
    depthwise: whether convolutions of each channel by itself work on integers."""

    name: str
    weights: Format
    activations: Format
    cannot_saturate: bool
    only: tuple[str, ...] | None = None
    depthwise: bool = True

    def record(self) -> dict[str, Any]:
        """The `scheme` of artifact.json."""
        return {
            "weights": asdict(self.weights),
            "activations": asdict(self.activations),
            "cannot_saturate": self.cannot_saturate,
            **({} if self.only is None else {"only": list(self.only)}),
            **({} if self.depthwise else {"depthwise": False}),
        }


SCHEMES: dict[str, Scheme] = {
    # ONNX Runtime on x86 gains nothing from signed activations, and its older kernels clip sums of two products.
    "x86": Scheme("x86", Format(8, True, True, "channel"), Format(8, False, False, "tensor"), cannot_saturate=True),
    # XNNPACK and LiteRT: signed activations with a zero point of their own, summed in 32 bits.
    "signed": Scheme(
        "signed", Format(8, True, True, "channel"), Format(8, True, False, "tensor"), cannot_saturate=False
    ),
    # TensorRT takes zero points of 0 alone, and sums in 32 bits.
    "symmetric": Scheme(
        "symmetric", Format(8, True, True, "channel"), Format(8, True, True, "tensor"), cannot_saturate=False
    ),
    # ncnn does too; it adds, pools and activates floats. On x86 its depthwise kernel for integers is slower than that
    # for floats and takes an approximate reciprocal of the scales, up to 4e-4 off: no two processors need agree.
    "layers": Scheme(
        "layers",
        Format(8, True, True, "channel"),
        Format(8, True, True, "tensor"),
        cannot_saturate=False,
        only=("Conv", "Gemm"),
        depthwise=False,
    ),
}
