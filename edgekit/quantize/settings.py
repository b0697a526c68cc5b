"""What is chosen, by measurement on validation images, when a graph is quantized; the scheme is the runtime's wish."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The choices; the defaults are the plain ones.

    Attributes:
        in_float: layers that stay float, by the names that `qdq.layers` gives.
        method: how a histogram becomes a range, a key of calibrate.METHODS.
        adversarial: the calibration images hold adversarial ones, which the caller made; this says it in the record.
        equalize: channels are scaled against each other before (equalize.py).
        correct: the mean error of each layer is taken out of its bias (correct.py).
        weights: how dense layers keep pairs of products within 16 bits, a key of weights.RULES.
    """

    in_float: tuple[str, ...] = ()
    method: str = "min-max"
    adversarial: bool = False
    equalize: bool = False
    correct: bool = False
    weights: str = "seven"

    def __str__(self) -> str:
        words = [self.method, "also on adversarial images"] if self.adversarial else [self.method]
        words += ["equalized"] * self.equalize + ["bias corrected"] * self.correct + [f"weights {self.weights}"]
        return ", ".join(words)

    def record(self) -> dict[str, Any]:
        """All but the layers in float, which the record of a file names one by one with their reasons."""
        return {name: value for name, value in asdict(self).items() if name != "in_float"}
