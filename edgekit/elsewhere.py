"""The same file on other processors: searched again with each as the judge, and the worst case of each sample.

The attacks that follow gradients are run against every processor, and each of their iterates is judged there. Those
that follow scores ask thousands of times for each image, which no emulator answers in time: they search on this
machine, and what they found is judged elsewhere too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edgekit import checks, verdict
from edgekit.attacks.campaign import CHUNK, Memory, Part, followed
from edgekit.classifier import Classifier, predict
from edgekit.console import say
from edgekit.examine import Beside, Examined, Other, Subject, Trial, Watch, guessing, one_by_one_where_needed
from edgekit.processors import NATIVE
from edgekit.verdict import Accuracy, Changes, Place, Rules, accuracy, compare

AGREEMENT = "agreement"  # beside the parts of an attack in its memory: how often two judges agreed in it


class Compared:
    """The judge of another processor, each of whose answers is compared with that of this machine's.

    Attributes:
        agreed, asked: images on which both decided alike; all.    difference: the largest of two scores.
    """

    differentiable = False

    def __init__(self, judge: Classifier, native: Classifier) -> None:
        self.judge, self.native = judge, native
        self.agreed, self.asked, self.difference = 0, 0, 0.0

    def __call__(self, images: Tensor) -> Tensor:
        if not len(images):
            return self.native(images)
        answers, here = self.judge(images), self.native(images)
        self.add(int((answers.argmax(1) == here.argmax(1)).sum()), len(images), (answers - here).abs().max().item())
        return answers

    def add(self, agreed: int, asked: int, difference: float) -> None:
        self.agreed, self.asked = self.agreed + agreed, self.asked + asked
        self.difference = max(self.difference, difference)


class _Counting:
    """A Memory that keeps with each part how often the judges agreed in it, so that a resumed count is whole."""

    def __init__(self, memory: Memory, compared: Compared) -> None:
        self.memory, self.compared = memory, compared
        self._begin()

    def _begin(self) -> None:
        self._total, self._worst = (self.compared.agreed, self.compared.asked), self.compared.difference
        self.compared.difference = 0.0

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        part = self.memory.recall(attack, source, chunk)
        counted = self.memory.recall(attack, f"{source} {AGREEMENT}", chunk)
        if part is not None and counted is not None:
            agreed, asked, difference = counted.adversarial.tolist()
            self.compared.add(int(agreed), int(asked), difference)
        self.compared.difference = max(self.compared.difference, self._worst)
        self._begin()
        return part if counted is not None else None

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None:
        agreed, asked = self.compared.agreed - self._total[0], self.compared.asked - self._total[1]
        counted = torch.tensor([agreed, asked, self.compared.difference], dtype=torch.float64)
        self.memory.keep(attack, f"{source} {AGREEMENT}", chunk, Part(counted, torch.zeros(0, dtype=torch.bool), 0.0))
        self.memory.keep(attack, source, chunk, part)
        self.compared.difference = max(self.compared.difference, self._worst)
        self._begin()

    def end(self) -> None:
        self.compared.difference = max(self.compared.difference, self._worst)


def everywhere(
    examined: Examined,
    subject: Subject,
    beside: Beside | None,
    trial: Trial,
    rules: Rules,
    surrogates: Mapping[str, Classifier] | None = None,
    watch: Watch = lambda name, sources: lambda attack, samples: None,
    memory: Callable[[str], Memory | None] = lambda judge: None,
) -> Examined:
    """`examined` with `subject.others` judged as well: each with a verdict of its own, the file with their worst case.

    What is kept of single samples (`outcome`, the archive, the report's pictures) stays that of this machine.

    Raises:
        EdgekitError: the file dies of another processor's runtime, or answers with numbers that are none.
    """
    if not subject.others:
        return examined
    outcome = examined.outcome
    right = outcome.clean.argmax(1) == trial.labels
    told = examined.verdict
    native = Place(
        processor=NATIVE,
        runtime=subject.judged_on,
        clean_accuracy=told.clean_accuracy,
        robust_accuracy=told.robust_accuracy,
        agreement=1.0,
        max_abs_difference=0.0,
        images=len(trial.labels),
        every_iterate_of=tuple(attack.name for attack in trial.attacks if attack.name in outcome.seconds),
        verdict=told.verdict,
        why=told.why,
    )
    places, clean, robust = [native], right, outcome.robust
    sources = {"float": beside.student} if beside else {}
    sources |= ({"twin": subject.twin} if subject.twin else {}) | dict(surrogates or {})
    for other in subject.others:
        if other.open is None:
            missing = Place(processor=other.processor, runtime=other.runtime, verdict="not_run", why=other.why)
            places.append(missing)
            continue
        clean_there, robust_there, compared, names = _attacked(
            other, other.open, examined, subject, sources, trial, watch, memory
        )
        figures = _figures(rules, examined, subject, beside, trial, clean_there, robust_there)
        places.append(
            Place(
                processor=other.processor,
                runtime=other.runtime,
                clean_accuracy=figures[0],
                robust_accuracy=figures[1],
                agreement=compared.agreed / compared.asked,
                max_abs_difference=compared.difference,
                images=compared.asked,
                every_iterate_of=names,
                verdict=figures[3],
                why=figures[4],
            )
        )
        say(f"{subject.name} on {other.processor}: {100 * robust_there.double().mean().item():.1f} % robust")
        clean, robust = clean & clean_there, robust & robust_there
    clean_accuracy, robust_accuracy, change, word, why = _figures(
        rules, examined, subject, beside, trial, clean, robust
    )
    worst = verdict.worst([word, *(place.verdict for place in places)])
    return replace(
        examined,
        verdict=replace(
            told,
            clean_accuracy=clean_accuracy,
            robust_accuracy=robust_accuracy,
            change=change,
            judged_on=tuple(places),
            verdict=worst,
            why=holds(places, worst, word, why),
        ),
    )


def holds(places: Sequence[Place], worst: str, word: str, why: str) -> str:
    """The sentence that says on which processors a verdict holds."""
    judged = [place for place in places if place.verdict != "not_run"]
    absent = [place for place in places if place.verdict == "not_run"]
    said = [("" if word == worst else f"{word} ") + f"on {_names(judged)} together: {why}"]
    if any(place.verdict != word for place in judged):
        said.append("alone: " + ", ".join(f"{place.verdict} on {place.processor}" for place in judged))
    alike = [place.processor for place in judged[1:] if place.max_abs_difference == 0]
    if alike:
        said.append(f"answers bit for bit as native on {', '.join(alike)}")
    said += [f"not judged on {place.processor} ({place.why})" for place in absent]
    return "; ".join(said)


def _names(places: Sequence[Place]) -> str:
    return ", ".join(place.processor for place in places)


def _attacked(
    other: Other,
    opener: Callable[[], Classifier],
    examined: Examined,
    subject: Subject,
    sources: Mapping[str, Classifier],
    trial: Trial,
    watch: Watch,
    memory: Callable[[str], Memory | None],
) -> tuple[Tensor, Tensor, Compared, tuple[str, ...]]:
    """(N,) bool, right when clean and robust on the other processor; its comparison; attacks judged at each iterate."""
    compared = Compared(one_by_one_where_needed(opener(), trial.images), examined.judged)
    name = f"{subject.name} on {other.processor}"
    attacks = tuple(one for one in trial.attacks if one.gradients and followed(one, compared, sources))
    if attacks:
        page = memory(name)
        counting = None if page is None else _Counting(page, compared)
        found = replace(trial, attacks=attacks).run(
            compared, sources, watch(name, len(sources)), counting, shared=False
        )
        if counting is not None:
            counting.end()
        clean, robust = found.clean, found.robust
    else:
        clean = predict(compared, trial.images, CHUNK)
        robust = clean.argmax(1) == trial.labels
    # Of attacks that follow scores, and of a search that a sample's luck ended early here: what it came to.
    brought = predict(compared, examined.outcome.adversarial, CHUNK).argmax(1) == trial.labels
    return clean.argmax(1) == trial.labels, robust & brought, compared, tuple(one.name for one in attacks)


def _figures(
    rules: Rules,
    examined: Examined,
    subject: Subject,
    beside: Beside | None,
    trial: Trial,
    clean: Tensor,
    robust: Tensor,
) -> tuple[Accuracy, Accuracy, Changes | None, str, str]:
    """Clean and robust accuracy, their change against the float student, and the verdict with its reason."""
    robust = robust & clean
    float_robust, change, float_clean = examined.verdict.float_robust_accuracy, None, None
    found = list(examined.verdict.checks)
    if beside is not None and examined.float_robust is not None:
        float_clean = beside.own.clean.argmax(1) == trial.labels
        stands = float_clean & examined.float_robust
        change = Changes(compare(float_clean, clean, rules.confidence), compare(stands, robust, rules.confidence))
        rose = checks.robust_accuracy_did_not_rise(examined.float_robust, robust, rules)
        found = [rose if check.name == rose.name else check for check in found]
    robust_accuracy = accuracy(robust, rules.confidence)
    word, why = verdict.decide(
        rules,
        robust_accuracy,
        float_robust_accuracy=float_robust,
        change=change,
        samples=len(clean),
        checks=found,
        undecidable=guessing(subject, clean, float_clean, rules),
    )
    return accuracy(clean, rules.confidence), robust_accuracy, change, word, why
