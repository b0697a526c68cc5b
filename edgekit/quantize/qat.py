"""Quantization-aware training: robust distillation goes on with the int8 graph as the student.

The student is the fake-quantized graph (trainable.py), and so the inner maximization attacks the quantized network; the
objective is RSLAD (Zi et al., ICCV 2021, arXiv:2108.07969) with the float student, or the run's teacher, as the source
of soft labels. Ranges are measured anew now and then, and frozen later, as in Krishnamoorthi 2018 (arXiv:1806.08342).
The control is the float graph with the same batches, loss and learning rate.
"""

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from onnx import ModelProto
from torch import Tensor

from edgekit import machine, train
from edgekit.data import Dataset
from edgekit.errors import EdgekitError
from edgekit.files import digest, sha256, write_text
from edgekit.models import Network
from edgekit.quantize.qdq import Quantized, quantize
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.settings import Settings
from edgekit.quantize.trainable import FakeQuantized, Folded
from edgekit.recipe import Method, Recipe, to_toml
from edgekit.runs import Run

MEASURED = 10  # times that the ranges are measured anew, evenly spread, before they are frozen


@dataclasses.dataclass(frozen=True)
class Learnt:
    """model: the int8 graph, or the control's fp32 graph. record: artifact.json's `qat`. made: the quantization that
    training began with."""

    model: ModelProto
    record: dict[str, Any]
    made: Quantized


def asked(recipe: Recipe, *, control: bool) -> dict[str, Any]:
    """What artifact.json says of a training that was asked for, whatever came of it."""
    plan = _plan(recipe)
    return {
        **plan.qat.model_dump(),
        "control": control,
        "batch_size": plan.train.batch_size,
        "method": plan.method.model_dump(include={"name", "robust_weight", "scale"}),
        "inner": plan.inner.model_dump(),
        "seed": plan.seed,
    }


def learn(
    model: ModelProto,
    student: Network,
    recipe: Recipe,
    dataset: Dataset,
    calibration: Tensor,
    scheme: Scheme,
    run: Run,
    *,
    student_sha256: str,
    settings: Settings = Settings(),
    control: bool = False,
    threads: int = 1,
    restart: bool = False,
) -> Learnt:
    """Train the int8 graph of a student, in the folder `run` and from its checkpoint where there is one.

    Args:
        model: `student` as an fp32 graph.
        recipe: the run's; its table [qat], and what it trained the student with: data, batches, inner attack.
        calibration: (M, C, H, W) float32 in [0, 1], the images that set the ranges.
        control: train the float graph instead.
        restart: begin again where the folder holds a training of something else, which is refused otherwise.
    Raises:
        EdgekitError: the folder holds a training of something else; the loss is no number; the teacher is not there.
    """
    # Weights that move may come to saturate with scales that were enlarged for other pairs; within seven bits none can.
    settings = dataclasses.replace(settings, weights="seven")
    made = quantize(model, calibration, scheme, settings)
    network = Folded(made.source, student) if control else FakeQuantized(made, student)
    plan = _plan(recipe)
    identity = digest(
        to_toml(plan), code_version(), made.model.SerializeToString(deterministic=True), dataset.sha256, str(control)
    )
    begun = run.info().get("identity") if run.begun else None
    if begun is not None and begun != identity and not restart:
        raise EdgekitError(
            "this training was begun with other options, another student or other code",
            where=run.folder,
            mend="Use --force to begin it again, or --label to keep both",
        )
    if begun != identity:
        if begun is not None:
            shutil.rmtree(run.folder)
        write_text(run.recipe_file, to_toml(plan))
        run.save_info({"schema": 1, "status": "running", "identity": identity, "threads": threads})
    if not run.finished:
        device = machine.device(run.info().get("device"))
        prepared = train.Prepared(
            network, _measuring(network, calibration, scheme, settings, plan), code_version(), _MEND
        )
        name = "control of qat" if control else "qat"
        teacher = _soft_labels(recipe, student, student_sha256, dataset, device)
        train.fit(plan, dataset, teacher, run, device, name=name, prepared=prepared)
    info = run.info()
    if sha256(run.student) != info.get("student_sha256"):
        raise EdgekitError("the trained weights have changed since they were written", where=run.student, mend=_AGAIN)
    network = network.to("cpu")
    network.load_state_dict(safetensors.torch.load_file(run.student))
    return Learnt(network.model(), asked(recipe, control=control) | {"validation": info["metrics"]}, made)


_MEND = "Lower qat.learning_rate: --set qat.learning_rate=0.001"
_AGAIN = "Remove the folder to train again"


@functools.cache
def code_version() -> str:
    """A digest of the sources that decide what quantization-aware training gives."""
    root = Path(__file__).parents[1]
    found = [*sorted(root.glob("quantize/*.py")), *sorted(root.glob("twin/*.py"))]
    parts = (part for path in found for part in (str(path.relative_to(root)), path.read_bytes()))
    return digest(train.code_version(), *parts)


def _plan(recipe: Recipe) -> Recipe:
    """The recipe of the training that goes on: the run's, but for the objective and the schedule."""
    method = Method(name="rslad", robust_weight=recipe.method.robust_weight, scale=recipe.method.scale)
    schedule = {
        "epochs": recipe.qat.epochs,
        "learning_rate": recipe.qat.learning_rate,
        "schedule": "cosine",
        "warmup": 0.0,
        # Weights before batch normalization have no scale of their own, folded ones do: decay shrinks the answers.
        "weight_decay": 0.0,
        "gradient_clip": recipe.train.gradient_clip or 1.0,
        "precision": "fp32",  # integers up to 2^24 are exact in no narrower float
    }
    return recipe.model_copy(update={"method": method, "train": recipe.train.model_copy(update=schedule)})


def _soft_labels(
    recipe: Recipe, student: Network, student_sha256: str, dataset: Dataset, device: torch.device
) -> tuple[Network, dict[str, str]]:
    if recipe.qat.soft_labels == "student":
        # A copy: training moves its teacher to the device and into another layout.
        frozen = copy.deepcopy(student).requires_grad_(False)
        return frozen, {"file": "student.safetensors", "sha256": student_sha256}
    if recipe.teacher is None:
        raise EdgekitError(
            "the recipe of this run names no teacher",
            where="qat.soft_labels = 'teacher'",
            mend="Set qat.soft_labels=student",
        )
    return train.teacher_of(recipe, dataset, device)


def _measuring(
    network: Folded, calibration: Tensor, scheme: Scheme, settings: Settings, plan: Recipe
) -> Callable[[int, int], None]:
    """What is done before each step: the ranges of the weights of this moment, ten times in the first part of the run.

    By the step alone, so that a resumed run measures where an undisturbed one does.
    """
    # What has changed the float weights once must not do so again.
    once = {"equalize", "correct"} & {field.name for field in dataclasses.fields(settings)}
    again = dataclasses.replace(settings, **dict.fromkeys(once, False))

    def before_step(done: int, steps: int) -> None:
        if not isinstance(network, FakeQuantized) or done == 0:
            return
        observed = plan.qat.frozen_after * steps
        if done not in {round(observed * turn / MEASURED) for turn in range(1, MEASURED + 1)}:
            return
        try:
            if not all(weight.isfinite().all() for weight in network.weights):
                raise ValueError("a weight is infinite")
            network.measure(quantize(Folded.model(network), calibration, scheme, again))
        except (ValueError, OverflowError) as error:  # infinite weights, or activations that overflow: no range
            raise EdgekitError(
                f"training diverged: no range of activations could be measured ({error})", mend=_MEND
            ) from error

    return before_step
