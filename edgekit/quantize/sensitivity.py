"""What quantizing one layer alone costs, all others in float: the order in which layers are worth leaving in float.

One at a time, as in Wu et al., arXiv:2004.09602 ("Integer Quantization for Deep Learning Inference"), and here also
under attack: one on the float student, recorded with all its iterates, which every file is shown. To follow the
gradients of each file's twin as well would take sixty times as long as it does for the file that ships.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from edgekit import data
from edgekit.attacks import parse
from edgekit.attacks.campaign import CHUNK
from edgekit.classifier import Classifier, Wrapped, predict
from edgekit.data import Split
from edgekit.examine import Trial
from edgekit.formats import onnx as onnx_format
from edgekit.quantize.qdq import layers, quantize
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.settings import Settings
from edgekit.randomness import derive
from edgekit.verdict import Accuracy, Change, accuracy, compare

STEPS = 10
IMAGES = 256
HELD = 2**30  # bytes that the recorded iterates may take: of large photos there are fewer


@dataclass(frozen=True)
class Cost:
    """What a file with some layers in int8 does otherwise than the float student.

    Attributes:
        name: of the layer in int8, as qdq.layers gives it.
        logit_error: mean absolute difference of the logits over the clean images and the attack's last iterates. The
            finest measure: among few images hardly one changes sides because of one layer.
        agreement: share of the clean images that both decide alike.
        clean, robust: paired change of the accuracies, file minus student; robust is what is right on every iterate.
    """

    name: str
    logit_error: float
    agreement: float
    clean: Change
    robust: Change


@dataclass(frozen=True)
class Sensitivity:
    """The cost of every layer, the most sensitive first.

    Attributes:
        together: of all layers in int8, to hold the others against.
        logit_spread: standard deviation of the student's logits on the clean images, to read errors against.
        clean_accuracy, robust_accuracy: the student's, on the same images and iterates.
        attack, epsilon, images: what the student was attacked with, and on how many images of `split`.
    """

    attack: str
    epsilon: float
    images: int
    split: str
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    logit_spread: float
    together: Cost
    layers: tuple[Cost, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """The layers' names, the most sensitive first."""
        return tuple(layer.name for layer in self.layers)


def trial(validation: Split, epsilon: float) -> Trial:
    """The attack and the images: a seeded, stratified draw of IMAGES, or as many as HELD has room for."""
    room = HELD // (validation.images[0].numel() * 4 * (STEPS + 1))
    drawn = validation[data.stratified(validation.labels, max(1, min(IMAGES, room)), 0)]
    return Trial(parse(f"pgd{STEPS}"), drawn.floats(), drawn.labels, drawn.index, epsilon)


def measure(
    model: onnx.ModelProto,
    calibration: Tensor,
    scheme: Scheme,
    settings: Settings,
    student: Classifier,
    trial: Trial,
    note: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
    """Quantize each layer alone, and then all together, and see what becomes of the student's answers.

    Args:
        model, calibration, scheme, settings: as quantize takes them; what settings.in_float names is measured too.
        student: the differentiable network that `model` is the graph of.
        trial: validation images; the first of its attacks is run.
        note: told what is done now.
    """
    torch.set_flush_denormal(True)  # as trained and attacked everywhere else; a session of ONNX Runtime turns it off
    note(f"{trial.attacks[0].name} on the float student")
    clean = predict(student, trial.images, CHUNK)
    iterates = record(student, trial, clean.shape[1])
    last = predict(student, iterates[-1], CHUNK)
    right = clean.argmax(1) == trial.labels
    robust = withstood(student, right, iterates, trial.labels)
    names = layers(model)

    def cost(name: str, in_float: tuple[str, ...]) -> Cost:
        with tempfile.TemporaryDirectory() as folder:
            made = quantize(model, calibration, scheme, replace(settings, in_float=in_float)).model
            onnx_format.write_model(made, Path(folder), {})
            judge = onnx_format.open(Path(folder) / onnx_format.FILE, threads=torch.get_num_threads())
            answers, lasts = predict(judge, trial.images, CHUNK), predict(judge, iterates[-1], CHUNK)
            held = answers.argmax(1) == trial.labels
            return Cost(
                name,
                torch.cat([answers - clean, lasts - last]).abs().mean().item(),
                (answers.argmax(1) == clean.argmax(1)).double().mean().item(),
                compare(right, held),
                compare(robust, withstood(judge, held, iterates, trial.labels)),
            )

    costs = []
    for number, name in enumerate(names, 1):
        note(f"layer {number} of {len(names)} alone")
        costs.append(cost(name, tuple(other for other in names if other != name)))
    return Sensitivity(
        attack=trial.attacks[0].name,
        epsilon=trial.epsilon,
        images=len(trial.labels),
        split="validation",
        clean_accuracy=accuracy(right),
        robust_accuracy=accuracy(robust),
        logit_spread=clean.std().item(),
        together=cost("all layers", ()),
        layers=tuple(sorted(costs, key=lambda one: -one.logit_error)),
    )


def record(source: Classifier, trial: Trial, classes: int) -> list[Tensor]:
    """What the first attack of `trial`, from its first start, shows a judge that nothing fools.

    Returns:
        (N, C, H, W) for each iterate, the start and the last among them.
    """
    attack, parts = trial.attacks[0], []
    for chunk in torch.arange(len(trial.labels)).split(CHUNK):
        images, labels = trial.images[chunk], trial.labels[chunk]
        shown: list[Tensor] = []

        def never_fooled(x: Tensor, truth: Tensor = labels, shown: list[Tensor] = shown) -> Tensor:
            shown.append(x.detach().clone())
            return one_hot(truth, classes).float()

        seeds = derive(trial.seed, 0, samples=trial.index[chunk])
        judge = Wrapped(never_fooled, differentiable=False)
        attack.run(source, judge, images, labels, seeds=seeds, epsilon=trial.epsilon)
        parts.append(shown[1:])  # the first is the clean image
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def withstood(judge: Classifier, right: Tensor, iterates: list[Tensor], labels: Tensor) -> Tensor:
    """(N,) bool: which of the samples that are `right` (N,) when clean stay right on every iterate."""
    robust = right.clone()
    for x in reversed(iterates):  # the last fool most, and what is fooled need not be asked again
        left = robust.nonzero().squeeze(1)
        if len(left):
            robust[left] = predict(judge, x[left], CHUNK).argmax(1) == labels[left]
    return robust
