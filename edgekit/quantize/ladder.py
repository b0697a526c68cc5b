"""The smallest int8 file whose robustness holds on validation images: tries from cheap to expensive, until one does.

The drop of a try is what `edgekit verify` would call `change.robust`: attacks from the float student and from the
file's own twin, every iterate judged by the file, the student facing all that the file faced. Its estimate decides.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from edgekit import __version__, twin, verdict
from edgekit import judge as judges
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Outcome
from edgekit.classifier import Classifier
from edgekit.console import say
from edgekit.data import Split
from edgekit.examine import Advance, Beside, Subject, Trial, face, prepare
from edgekit.files import digest, sha256, write_json
from edgekit.formats import onnx as onnx_format
from edgekit.machine import interleaved
from edgekit.quantize import sensitivity
from edgekit.quantize.qdq import Quantized, quantize
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.sensitivity import Sensitivity
from edgekit.quantize.settings import Settings
from edgekit.quantize.slim import slim
from edgekit.report import words
from edgekit.statistics import CONFIDENCE, points
from edgekit.verdict import Accuracy, Change

ATTACKS = "pgd20,pgd20-margin"
BATCHES = (1, 32)  # at which a file is timed beside fp32
ROUNDING = 1e-9  # of 5 / 1000 against 0.5 / 100


class Kept:
    """Finished work in one JSON file, so that the same command goes on where it was interrupted.

    What is kept is found by a digest of all that it depends on, and so never by another student, recipe or machine.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, Any]()
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: the work is done again
            self.found = dict(json.loads(path.read_text(encoding="utf-8")))

    def keep(self, name: str, value: Any) -> None:
        self.found[name] = value
        write_json(self.path, self.found)

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Nothing is kept of what came to its end."""
        if error is None:
            self.path.unlink(missing_ok=True)
        elif error is KeyboardInterrupt and self.found:
            say(f"Interrupted; {len(self.found)} finished measurements are kept: the same command goes on from there.")


@dataclass(frozen=True)
class Material:
    """What every try is made of and measured with.

    Attributes:
        model, calibration, scheme, settings: as quantize takes them.
        student: the differentiable network that `model` is the graph of.
        validation: the images that choices are made on.
        epsilon: radius of the attacks, in units of the [0, 1] range.
        kept: finished work of an interrupted search.
        note: told what is done now.
    """

    model: onnx.ModelProto
    calibration: Tensor
    scheme: Scheme
    settings: Settings
    student: Classifier
    validation: Split
    epsilon: float
    kept: Kept
    note: Callable[[str], None] = lambda text: None

    @property
    def measured(self) -> bool:
        """Whether somebody has asked for the sensitivity."""
        return "sensitivity" in vars(self)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """The cost of each layer, measured when it is first asked for."""
        name = f"sensitivity {self.digest}"
        if name not in self.kept.found:
            trial = sensitivity.trial(self.validation, self.epsilon)
            about = (self.model, self.calibration, self.scheme, self.settings)
            measured = sensitivity.measure(*about, self.student, trial, self.note)
            self.kept.keep(name, verdict.to_dict(measured))
        return verdict.read_as(Sensitivity, self.kept.found[name])

    @cached_property
    def trial(self) -> Trial:
        drawn = self.validation
        return Trial(parse(ATTACKS), drawn.floats(), drawn.labels, drawn.index, self.epsilon)

    @cached_property
    def own(self) -> Outcome:
        """What the student goes through under its own gradients."""
        self.note("attacks on the float student")
        return self.trial.run(self.student, {"float": self.student})

    @cached_property
    def digest(self) -> str:
        about = [__version__, judges.machine_block(), torch.get_num_threads(), self.epsilon, ATTACKS, sensitivity.STEPS]
        return digest(
            json.dumps(about),
            repr((self.scheme, self.settings)),
            self.model.SerializeToString(deterministic=True),
            *(part.numpy().tobytes() for part in (self.calibration, self.validation.images, self.validation.labels)),
        )


@dataclass(frozen=True)
class Rung:
    """One try before it is made: its name, the layers that it leaves in float, and how its graph comes about."""

    name: str
    in_float: tuple[str, ...]
    make: Callable[[], Quantized]


def post_training(material: Material) -> Iterator[Rung]:
    """Every layer in int8."""
    yield _rung("post-training", material, material.settings.in_float)


def sensitive_in_float(material: Material) -> Iterator[Rung]:
    """The 1, 2, 4, 8 … most sensitive layers in float, up to half of all: beyond that little is int8 any more.

    Only layers with weights: what a float layer reads and hands on is rounded to eight bits by its integer neighbours,
    so that an addition or an average in float between them would be slower and no better.
    """
    already, constants = material.settings.in_float, {tensor.name for tensor in material.model.graph.initializer}
    order = [name for name in material.sensitivity.order if name not in already and f"{name}.weight" in constants]
    count = 1
    while count <= len(order) // 2:
        name = f"{count} layer{'s' if count > 1 else ''} in float"
        yield _rung(name, material, (*already, *order[:count]))
        count *= 2


def _rung(name: str, material: Material, in_float: tuple[str, ...]) -> Rung:
    settings = replace(material.settings, in_float=in_float)
    make = partial(quantize, material.model, material.calibration, material.scheme, settings)
    return Rung(name, in_float, make)


Step = Callable[[Material], Iterator[Rung]]
# From cheap to expensive. What trains the student further comes last.
STEPS: tuple[Step, ...] = (post_training, sensitive_in_float)


@dataclass(frozen=True)
class Try:
    """One file that was made and measured.

    Attributes:
        in_float: the layers that were left in float.
        speed: fp32 time / int8 time, by batch size ("1", "32"): one thread, medians.
        float_robust_accuracy: the student's, under all that the file faced.
        change: paired change of robust accuracy, file minus student.
        held, why: whether no more was lost than is allowed, and that in words.
    """

    name: str
    in_float: tuple[str, ...]
    bytes: int
    sha256: str
    speed: dict[str, float]
    robust_accuracy: Accuracy
    float_robust_accuracy: Accuracy
    change: Change
    held: bool = False
    why: str = ""

    def judged(self, allowed: float) -> "Try":
        """The same, held against the drop that is allowed, a fraction."""
        held = self.change.value >= -allowed - ROUNDING
        limit = f"{'at most' if held else 'more than'} {points(allowed)} lost"
        return replace(self, held=held, why=f"robust accuracy changes by {words.signed(self.change)} points: {limit}")


@dataclass(frozen=True)
class Found:
    """How a search ended: `kept`, the place in `tries` of what is kept, and its graph `made`."""

    allowed: float
    tries: tuple[Try, ...]
    kept: int
    made: Quantized
    about: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The `robust_drop` of artifact.json."""
        best = self.tries[self.kept]
        ended = {"allowed": self.allowed, "held": best.held, "kept": best.name}
        return {**ended, **self.about, "tries": verdict.to_dict(self.tries)}


def search(
    material: Material, allowed: float, full: Path, metadata: dict[str, str], steps: Sequence[Step] = STEPS
) -> Found:
    """Climb `steps` until a file's measured drop is within `allowed`; where none is, the smallest drop is kept.

    Args:
        allowed: loss of robust accuracy, a fraction.
        full: the fp32 file that latencies are held against.
        metadata: of the file that will ship, so that what is measured is that file to the byte.
    """
    tries: list[Try] = []
    best: tuple[int, Quantized] | None = None
    for rung in (rung for step in steps for rung in step(material)):
        material.note(rung.name)
        made = rung.make()
        one = _measured(material, rung, made, full, metadata).judged(allowed)
        say(f"{one.name}: {one.why}")
        if best is None or one.change.value > tries[best[0]].change.value:
            best = len(tries), made
        tries.append(one)
        if one.held:
            break
    if best is None:
        raise ValueError("a ladder without steps")
    trial = material.trial
    about = {
        "attacks": [attack.name for attack in trial.attacks],
        "epsilon": trial.epsilon,
        "seed": trial.seed,
        "images": len(trial.labels),
        "split": "validation",
        "confidence": CONFIDENCE,
    }
    return Found(allowed, tuple(tries), *best, about)


def _measured(material: Material, rung: Rung, made: Quantized, full: Path, metadata: dict[str, str]) -> Try:
    with tempfile.TemporaryDirectory() as folder:
        onnx_format.write_model(slim(made.model), Path(folder), metadata)
        path = Path(folder) / onnx_format.FILE
        file = sha256(path)
        name = f"try {file} {material.digest}"
        if name in material.kept.found:
            say(f"{rung.name}: measured before the interruption")
            known = verdict.read_as(Try, material.kept.found[name])
            return replace(known, name=rung.name, in_float=rung.in_float)
        done = attacked(material, path, partial(_watch, material.note, rung.name))
        one = Try(rung.name, rung.in_float, path.stat().st_size, file, _speed(path, full, material.validation), *done)
    material.kept.keep(name, verdict.to_dict(one))
    return one


def attacked(
    material: Material, path: Path, watch: Callable[[str, int], Advance] = lambda name, sources: lambda *_: None
) -> tuple[Accuracy, Accuracy, Change]:
    """Robust accuracy of a file, of the student under all that the file faced, and the paired change between them."""
    trial = material.trial
    subject = Subject(
        name="int8",
        format="onnx",
        precision="int8",
        file=path.name,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        judged_on=judges.judged_on("onnx"),
        open=partial(onnx_format.open, path, threads=torch.get_num_threads()),  # no child process: the file is ours
        twin=twin.open(path),
    )
    beside = Beside(material.student, material.own)
    faced = face(prepare(subject, material.student, trial), beside, trial, watch)
    robust, float_robust = faced.outcome.robust, faced.float_robust
    return verdict.accuracy(robust), verdict.accuracy(float_robust), verdict.compare(float_robust, robust)


def _watch(note: Callable[[str], None], rung: str, judge: str, sources: int) -> Advance:
    done = 0

    def advance(attack: Attack, samples: int) -> None:
        nonlocal done
        done += samples
        note(f"{rung}: {attack.name} on {judge}, {done} images")

    return advance


def _speed(path: Path, full: Path, validation: Split) -> dict[str, float]:
    files = [onnx_format.open(file, threads=1) for file in (path, full)]
    found = {}
    for batch in BATCHES:
        pixels = validation[torch.arange(batch) % len(validation)].floats()
        low, high = interleaved([partial(file, pixels) for file in files])
        found[str(batch)] = high / low
    return found
