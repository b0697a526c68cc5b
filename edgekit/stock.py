"""What the files of an export are made of: each graph, and what artifact.json says of how it came about."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import artifact as artifacts
from edgekit import data, quantize
from edgekit.assignment import attackable
from edgekit.console import say
from edgekit.data import Dataset, Split
from edgekit.formats import FORMATS, onnx
from edgekit.jobs import Job, Order
from edgekit.quantize import ladder
from edgekit.quantize.ladder import Kept, Material
from edgekit.quantize.start import PTQ, Evidence, Start, evidence
from edgekit.runs import Run

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekit.quantize.qat import Learnt

COMPARED = 1000  # validation images at most


@dataclass(frozen=True)
class Made:
    """A graph to be written as it is, and its part of artifact.json."""

    model: "ModelProto"
    record: dict[str, Any]


@dataclass(frozen=True)
class Stock:
    """What int8 graphs of the student are made of; each part is made when it is first needed, and once."""

    order: Order
    dataset: Dataset

    @cached_property
    def chosen(self) -> Split:
        """The validation images that files are compared on."""
        validation = self.dataset.validation
        return validation[data.stratified(validation.labels, COMPARED, 0)]

    @cached_property
    def starts(self) -> dict[str, Start]:
        """By scheme, as they are made."""
        return {}

    @cached_property
    def evidence(self) -> Evidence:
        return evidence(self.order.student, self.dataset, self.order.recipe.inner.epsilon)

    def start(self, job: Job) -> Start:
        """What int8 graphs in the scheme of the job's format begin with."""
        scheme = quantize.SCHEMES[FORMATS[job.format].SCHEME]
        if scheme.name not in self.starts:
            lowered, images = onnx.lower(self.order.student), self.dataset.calibration.floats()
            self.starts[scheme.name] = PTQ[self.order.ptq](lowered, scheme, images, lambda: self.evidence)
        return self.starts[scheme.name]

    def material(self, job: Job, kept: Kept, note: Callable[[str], None]) -> Material:
        """What tries of a search are made of and measured with."""
        start, network = self.start(job), attackable(copy.deepcopy(self.order.student))
        about = (start.model, start.images, start.scheme, start.settings)
        return Material(*about, network, self.chosen, self.order.recipe.inner.epsilon, kept, note)

    def make(self, job: Job, material: Material | None, full: Path | None) -> Made | None:
        """The graph of a job, with what artifact.json says of it; None for the student as it is.

        Args:
            full: the fp32 artifact that a search holds its tries against.
        """
        if job.precision != "int8":
            return Made(learnt.model, {"qat": learnt.record}) if job.trained and (learnt := self._learn(job)) else None
        start = self.start(job)
        more: dict[str, Any] = {}
        if self.order.robust_drop is not None:
            if material is None or full is None:
                raise ValueError("a search needs its material and an fp32 file to be held against")
            steps = (*ladder.STEPS, lambda _: self._last_step(job)) if self.order.qat else ladder.STEPS
            about = (artifacts.load(full).path, self.order.metadata("onnx"))
            found = ladder.search(material, self.order.robust_drop, *about, steps)
            made, more = found.made, {"robust_drop": found.record() | self.order.last(job)}
        elif job.trained:
            made = self._further(job)
        else:
            made = start.made
        if made.trained is not None:
            more["qat"] = made.trained
        record = {
            "scheme": start.scheme.record(),
            "calibration": made.calibration | start.record,
            "in_float": made.in_float,
            "float_layers": made.float_layers,
        }
        # The short spelling is one that ONNX Runtime reads; others look for plain pairs of QuantizeLinear and back.
        model = quantize.slim(made.model) if job.format == "onnx" else made.model
        return Made(model, record | more)

    def _last_step(self, job: Job) -> Iterator[ladder.Rung]:
        yield ladder.Rung("trained further", self.start(job).settings.in_float, partial(self._further, job))

    def _further(self, job: Job) -> quantize.Quantized:
        learnt = self._learn(job)
        return replace(learnt.made, model=learnt.model, trained=learnt.record)

    def _learn(self, job: Job) -> "Learnt":
        """Train what the job is to hold, in runs/NAME/qat/LABEL, from where it was interrupted."""
        from edgekit import train
        from edgekit.quantize import qat

        train.alone()
        order, start = self.order, self.start(job)
        label = job.label or "qat"
        try:
            return qat.learn(
                start.model,
                order.student,
                order.recipe,
                self.dataset,
                start.images,
                start.scheme,
                Run(order.place.folder / "qat" / label),
                student_sha256=order.made_from["student_sha256"],
                settings=start.settings,
                control=job.precision == "fp32",
                threads=order.place.info().get("threads", 1),
                restart=order.force,
            )
        except KeyboardInterrupt:
            say(f"Interrupted. Continue with: {order.typed}")
            raise
