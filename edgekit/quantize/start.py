"""What an int8 graph of a student begins with: settings chosen on validation images, or the plain ones."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor

from edgekit import data
from edgekit.attacks.losses import cross_entropy
from edgekit.classifier import predict
from edgekit.console import say
from edgekit.data import Dataset, Split
from edgekit.methods.inner import Inner
from edgekit.models import Network
from edgekit.quantize.choice import Evidence, select
from edgekit.quantize.qdq import Quantized, quantize
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.settings import Settings
from edgekit.randomness import derive

# Of the choice: validation images, calibration images that are attacked too, steps of PGD.
MEASURED, ATTACKED, STEPS = 400, 128, 20


@dataclass(frozen=True)
class Start:
    """What further work on an int8 graph needs to know of how it began.

    Attributes:
        model: the student as an fp32 graph.    scheme, settings, images: what `quantize` made of it `made` with.
        record: what artifact.json's `calibration` says beside made.calibration.
    """

    model: onnx.ModelProto
    scheme: Scheme
    settings: Settings
    images: Tensor
    made: Quantized
    record: dict[str, Any]


def plain(model: onnx.ModelProto, scheme: Scheme, images: Tensor, rests: Callable[[], Evidence]) -> Start:
    """Min-max ranges over the clean calibration `images`, and nothing else."""
    settings = Settings()
    return Start(model, scheme, settings, images, quantize(model, images, scheme, settings), {"ptq": "plain"})


def tuned(model: onnx.ModelProto, scheme: Scheme, images: Tensor, rests: Callable[[], Evidence]) -> Start:
    """The best of choice.CANDIDATES on the validation images that it `rests` on, clean and attacked; no test image."""
    evidence = rests()
    made, candidates = select(model, scheme, evidence)
    taken = next(one for one in candidates if one.settings.record().items() <= made.calibration.items())
    clean, hostile = (f"{100 * value:.1f} %" for value in taken.agreement)
    say(
        f"Of {len(candidates)} int8 quantizations chosen: {taken.settings}; agrees with the student on {clean} of "
        f"{len(evidence.clean)} validation images, on {hostile} of them attacked (PGD-{STEPS} on the student)"
    )
    if taken.settings.adversarial:
        images = torch.cat([images, evidence.attacked])
    record = {"ptq": "tuned", "measured_on": len(evidence.clean), "candidates": [one.record() for one in candidates]}
    return Start(model, scheme, taken.settings, images, made, record)


def evidence(student: Network, dataset: Dataset, epsilon: float) -> Evidence:
    """What the choice rests on: images of the validation and calibration splits, clean and attacked."""
    measured = dataset.validation[data.stratified(dataset.validation.labels, MEASURED, 0)]
    attacked = dataset.calibration[data.stratified(dataset.calibration.labels, ATTACKED, 0)]
    adversarial = iterates(student, measured, epsilon)
    return Evidence(
        dataset.calibration.floats(),
        iterates(student, attacked, epsilon),
        measured.floats(),
        adversarial,
        (predict(student, measured.floats()), predict(student, adversarial)),
    )


Begin = Callable[[onnx.ModelProto, Scheme, Tensor, Callable[[], Evidence]], Start]
PTQ: dict[str, Begin] = {"tuned": tuned, "plain": plain}


def iterates(student: Network, split: Split, epsilon: float) -> Tensor:
    """The last iterates of PGD on the float student, whether they fool it or not."""
    attack, seeds = Inner(epsilon, epsilon / 4, STEPS), derive(0, samples=split.index)
    # A copy: an attack is faster where channels lie together, and what is exported stays as it was.
    attacked = copy.deepcopy(student).to(memory_format=torch.channels_last)  # pyright: ignore
    parts = zip(split.floats().split(100), split.labels.split(100), seeds.split(100), strict=True)
    return torch.cat(
        [
            attack(attacked, images, lambda logits, labels=labels: cross_entropy(logits, labels), drawn, spread=True)
            for images, labels, drawn in parts
        ]
    )
