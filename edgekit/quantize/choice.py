"""The settings of a quantization, chosen by what they cost on validation images, clean and attacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import onnx
import torch
from torch import Tensor

from edgekit.quantize.calibrate import opened
from edgekit.quantize.qdq import Quantized, quantize
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.settings import Settings

_TUNED = {"equalize": True, "correct": True, "weights": "enlarged"}
# From plain to tuned. Few: every one costs a second or two, and validation images cannot tell many apart.
CANDIDATES: tuple[Settings, ...] = (
    Settings(),
    Settings(correct=True),
    Settings(correct=True, weights="enlarged"),
    Settings(**_TUNED),
    Settings(**_TUNED, method="percentile"),
    Settings(**_TUNED, method="mse"),
    Settings(**_TUNED, method="entropy"),
    Settings(**_TUNED, adversarial=True),
    Settings(**_TUNED, method="mse", adversarial=True),
)


@dataclass(frozen=True)
class Evidence:
    """What a choice rests on; images are (N, C, H, W) float32 in [0, 1].

    Attributes:
        calibration: clean images; attacked: adversarial ones of the calibration split, used beside them.
        clean, adversarial: validation images, and what an attack on the float student made of them.
        expected: the float student's logits (N, K) for both.
    """

    calibration: Tensor
    attacked: Tensor
    clean: Tensor
    adversarial: Tensor
    expected: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Measured:
    """A candidate's agreement with the float student, and the mean difference of its logits: clean, adversarial."""

    settings: Settings
    agreement: tuple[float, float]
    error: tuple[float, float]

    def record(self) -> dict[str, Any]:
        names = ("clean", "adversarial")
        figures = {name: dict(zip(names, getattr(self, name), strict=True)) for name in ("agreement", "error")}
        return {**self.settings.record(), **figures}


def select(
    model: onnx.ModelProto, scheme: Scheme, evidence: Evidence, candidates: Sequence[Settings] = CANDIDATES
) -> tuple[Quantized, list[Measured]]:
    """The best quantization of an fp32 graph, and what was measured of all candidates.

    The agreement, a mean over clean and adversarial images, decides. Candidates that it cannot tell from the best, one
    standard error below it or less, are told apart by the difference of the logits, which is known far more precisely.
    """
    memo: dict[Any, Any] = {}
    both = torch.cat([evidence.calibration, evidence.attacked])
    made, measured = [], []
    for settings in candidates:
        images = both if settings.adversarial else evidence.calibration
        one = quantize(model, images, scheme, settings, memo)
        made.append(one)
        pairs = [
            (_answers(one.model, images), expected)
            for images, expected in zip((evidence.clean, evidence.adversarial), evidence.expected, strict=True)
        ]
        measured.append(Measured(settings, _both(_agreement, pairs), _both(_error, pairs)))
    return made[best(measured, 2 * len(evidence.clean))], measured


def best(measured: Sequence[Measured], images: int) -> int:
    """The place of the best; `images`: how many an agreement rests on."""
    agreement = [sum(one.agreement) / 2 for one in measured]
    highest = max(agreement)
    tied = highest - (highest * (1 - highest) / images) ** 0.5
    return min((i for i, value in enumerate(agreement) if value >= tied), key=lambda i: sum(measured[i].error))


def _answers(model: onnx.ModelProto, images: Tensor) -> Tensor:
    session = opened(model)
    name = session.get_inputs()[0].name
    parts = [numpy.asarray(session.run(None, {name: chunk.contiguous().numpy()})[0]) for chunk in images.split(100)]
    return torch.from_numpy(numpy.concatenate(parts))


def _both(figure: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    clean, adversarial = (figure(*pair) for pair in pairs)
    return clean, adversarial


def _agreement(answered: Tensor, expected: Tensor) -> float:
    return (answered.argmax(1) == expected.argmax(1)).double().mean().item()


def _error(answered: Tensor, expected: Tensor) -> float:
    return (answered - expected).abs().double().mean().item()
