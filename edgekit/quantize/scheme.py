"""What a runtime wants of an int8 graph, as data."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Format:
    """How one kind of tensor is stored."""

    bits: int
    signed: bool
    symmetric: bool
    granularity: Literal["tensor", "channel"]


@dataclass(frozen=True)
class Scheme:
    """weights, activations: how they are stored. cannot_saturate: dense weights keep to [-64, 64], so that no sum of
    two products with an unsigned 8-bit activation leaves 16 bits (255 * 64 * 2 < 2^15)."""

    name: str
    weights: Format
    activations: Format
    cannot_saturate: bool

    def record(self) -> dict[str, Any]:
        """The `scheme` of artifact.json."""
        return {
            "weights": asdict(self.weights),
            "activations": asdict(self.activations),
            "cannot_saturate": self.cannot_saturate,
        }


SCHEMES: dict[str, Scheme] = {
    # ONNX Runtime on x86 gains nothing from signed activations, and its older kernels clip sums of two products.
    "x86": Scheme("x86", Format(8, True, True, "channel"), Format(8, False, False, "tensor"), cannot_saturate=True),
}
