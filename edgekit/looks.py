"""`verify --until-decided`: further samples are drawn until a file's intervals decide, at looks that were planned.

Each look attacks only the samples that are new to it. What an attack does to a sample is drawn from the seed and the
sample, so that no outcome depends on the look at which it was seen. A file is left alone once its intervals decide;
its verdict, its figures and its checks are those of that look. The checks are made once, at that look, and not at
every look: a doubtful attack has one chance to be found out and not five to pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgekit import verdict
from edgekit.attacks.campaign import Memory, Outcome
from edgekit.classifier import Classifier
from edgekit.console import say
from edgekit.examine import Beside, Earlier, Examined, Faced, Subject, Trial, Watch, conclude, face, judge, prepare
from edgekit.planned import Plan
from edgekit.randomness import derive
from edgekit.verdict import ArtifactVerdict, FloatStudent, Planned, Rules

PURPOSE = 1 << 21  # of the seeds that order the samples; no attack has such a number of restarts


def ordered(labels: Tensor, index: Tensor, seed: int) -> Tensor:
    """Places (N,) in an order of which every beginning has nearly each class's share, drawn from (seed, sample).

    Args:
        labels: (N,) int64.    index: (N,) int64, each sample's place in the data.
    """
    drawn = derive(seed, PURPOSE, samples=index).argsort()
    due = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = drawn[labels[drawn] == label]
        due[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return drawn[due[drawn].argsort(stable=True)]


@dataclass
class Looks:
    """The samples of all looks, and what the float student did on those that were attacked so far.

    Attributes:
        trial: all samples, in the order in which they are drawn.
        surrogates: further sources by name.
        watch: how many samples -> what is told of the progress.
        memory: the name of a judge -> what remembers the finished parts of the attack on it.
    """

    plan: Plan
    trial: Trial
    student: Classifier | None = None
    surrogates: Mapping[str, Classifier] = field(default_factory=dict)
    watch: Callable[[int], Watch] = lambda samples: lambda name, sources: lambda attack, count: None
    memory: Callable[[str], Memory | None] = lambda judge: None
    _own: list[Outcome] = field(default_factory=list)

    def new(self, look: int) -> Trial:
        """The samples that no earlier look has seen; looks are counted from 1."""
        return self.trial[slice(self.plan.samples[look - 2] if look > 1 else 0, self.plan.samples[look - 1])]

    def beside(self, look: int) -> Beside | None:
        """The student on the new samples of a look, attacked once for all files."""
        if self.student is None:
            return None
        while len(self._own) < look:
            self._own.append(self._attacked(self.student, len(self._own) + 1))
        return Beside(self.student, self._own[look - 1])

    def _attacked(self, student: Classifier, look: int) -> Outcome:
        sources, new = {"float": student, **self.surrogates}, self.new(look)
        advance = self.watch(len(new.labels))(_named("float student", look), len(sources))
        return new.run(student, sources, advance, self.memory(_named("float student", look)))

    def drawn(self) -> int:
        """How many samples the file that took longest was attacked on, as far as the student tells."""
        return self.plan.samples[len(self._own) - 1] if self._own else 0

    def float_student(self) -> FloatStudent | None:
        """The student on all samples that any file needed, with the intervals of that look."""
        if not self._own:
            return None
        own, confidence = joined(*self._own), self.plan.confidence(len(self._own))
        clean = own.clean.argmax(1) == self.trial.labels[: self.drawn()]
        return FloatStudent(verdict.accuracy(clean, confidence), verdict.accuracy(own.robust, confidence))


def _named(name: str, look: int) -> str:
    return f"{name}, look {look}"


def until_decided(
    subject: Subject, looks: Looks, rules: Rules, *, self_test: bool = False, earlier: Earlier | None = None
) -> tuple[Examined, Faced]:
    """Attack one file on more and more samples until its intervals decide, or the samples come to their end.

    Args:
        rules: their `confidence` is not used, each look has its own.
        self_test, earlier: as examine.examine explains them.
    Returns:
        The verdict on the file, and what it faced: the samples of the looks up to the one that decided.
    Raises:
        EdgekitError: as examine.examine.
    """
    opened = prepare(subject, looks.student, looks.new(1), looks.surrogates)
    plan, faced = looks.plan, None
    for look in range(1, plan.looks + 1):
        new = looks.new(look)
        watch = looks.watch(len(new.labels))
        seen = face(
            opened,
            looks.beside(look),
            new,
            lambda name, sources, watch=watch, look=look: watch(_named(name, look), sources),
            lambda name, look=look: looks.memory(_named(name, look)),
        )
        faced = seen if faced is None else _more(faced, seen)
        rules = replace(rules, confidence=plan.confidence(look))
        at = judge(opened, faced, rules, earlier=earlier)
        decided = at.verdict in ("survived", "lost")
        say(_line(at, plan, look, decided))
        if decided or look == plan.looks:
            planned = Planned(
                plan.looks,
                look,
                plan.samples,
                plan.boundaries,
                plan.boundaries[look - 1],
                plan.confidence(look),
                decided,
            )
            return conclude(opened, faced, rules, self_test=self_test, earlier=earlier, planned=planned), faced
    raise AssertionError("a plan has at least one look")


def _line(at: ArtifactVerdict, plan: Plan, look: int, decided: bool) -> str:
    """What is said of a look."""
    if at.change is None and at.robust_accuracy is not None:
        robust = at.robust_accuracy
        figures = f"robust accuracy {100 * robust.value:.1f} % ({100 * robust.low:.1f} to {100 * robust.high:.1f})"
    else:
        pairs = [] if at.change is None else [("robust", at.change.robust), ("clean", at.change.clean)]
        figures = ", ".join(
            f"{kind} {100 * one.value:+.1f} points ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
            for kind, one in pairs
        )
    if decided:
        end = f"decided, {at.verdict}"
    else:
        end = "not decided, and no sample is left" if look == plan.looks else "not decided"
    return f"{at.name}: look {look} of {plan.looks}, {plan.samples[look - 1]:,} samples: {figures}: {end}"


def _more(before: Faced, new: Faced) -> Faced:
    trial = replace(
        before.trial,
        images=torch.cat([before.trial.images, new.trial.images]),
        labels=torch.cat([before.trial.labels, new.trial.labels]),
        index=torch.cat([before.trial.index, new.trial.index]),
    )
    return Faced(
        trial,
        joined(before.outcome, new.outcome),
        torch.cat([before.replayed, new.replayed]),
        min(before.repeats, new.repeats, key=lambda check: (check.passed, check.value)),
        None if before.own is None or new.own is None else joined(before.own, new.own),
        None
        if before.float_robust is None or new.float_robust is None
        else torch.cat([before.float_robust, new.float_robust]),
    )


def joined(*parts: Outcome) -> Outcome:
    """One Outcome of what the same judge went through on several sets of samples, in their order."""
    first = parts[0]
    return Outcome(
        clean=torch.cat([part.clean for part in parts]),
        fooled={pair: torch.cat([part.fooled[pair] for part in parts]) for pair in first.fooled},
        adversarial=torch.cat([part.adversarial for part in parts]),
        winner=torch.cat([part.winner for part in parts]),
        seconds={attack: sum(part.seconds[attack] for part in parts) for attack in first.seconds},
        skipped=first.skipped,
        passes=sum(part.passes for part in parts),
    )
