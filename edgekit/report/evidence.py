"""What the page shows beside the verdict: how each sample fared on the float student and on a file, and some images.

`gather` makes it from plain arrays or CPU tensors, in the order in which the samples were attacked; it copies the few
images that are shown and keeps no reference to the others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.errors import EdgekitError

PICTURES = 12


@dataclass(frozen=True)
class Curves:
    """Robust accuracy (a fraction) against the radius, in [0, 1] pixels, and against an attack's steps."""

    epsilon: Mapping[float, float] = field(default_factory=dict)
    steps: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Crossing:
    """How many samples the float student and a file get right; the four add up to all."""

    both: int
    only_float: int
    only_file: int
    neither: int


@dataclass(frozen=True)
class ClassCount:
    """The samples of one class, and how many of them are right; float counts are None where there is no student."""

    label: int
    samples: int
    file_clean: int
    file_robust: int
    float_clean: int | None = None
    float_robust: int | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """One sample: clean and adversarial (C, H, W) float32 in [0, 1], and what was answered to the adversarial image.

    Attributes:
        index: the sample's place in the data.
        float_says: None where there is no float student.
    """

    index: int
    label: int
    clean: Any
    adversarial: Any
    file_says: int
    float_says: int | None
    attack: str
    source: str


@dataclass(frozen=True, eq=False)
class FileEvidence:
    """One file. `won` counts the samples by the (attack, source) that fooled the file first.

    Attributes:
        name: as in the verdict.
        clean, robust: against the float student; None where there is none.
        classes: one for each class that occurs.
        pictures: some of the images that the float student withstands and the file does not; without a student, some
            of those that fooled the file.
        candidates: how many such images there are.
    """

    name: str
    classes: tuple[ClassCount, ...] = ()
    pictures: tuple[Picture, ...] = ()
    candidates: int = 0
    won: Mapping[tuple[str, str], int] = field(default_factory=dict)
    clean: Crossing | None = None
    robust: Crossing | None = None
    curves: Curves = Curves()


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that the page shows beside the verdict.

    Attributes:
        classes: names, by label; a label beyond them is shown as its number.
        versions: of what took part, by name.
        facts: further lines of "what was run", such as the student's digest.
    """

    files: tuple[FileEvidence, ...] = ()
    classes: tuple[str, ...] = ()
    float_curves: Curves = Curves()
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def gather(
    name: str,
    *,
    images: Any,
    labels: Any,
    index: Any,
    file_clean: Any,
    file_robust: Any,
    adversarial: Any,
    file_says: Any,
    attacks: Sequence[str],
    sources: Sequence[str],
    float_clean: Any = None,
    float_robust: Any = None,
    float_says: Any = None,
    curves: Curves | None = None,
    pictures: int = PICTURES,
) -> FileEvidence:
    """The evidence on one file from what each of N samples did.

    Args:
        images, adversarial: (N, C, H, W), in [0, 1].
        labels, index: (N,) int, the true class and the place in the data.
        file_clean, file_robust, float_clean, float_robust: (N,) bool, right when clean, right under all attacks.
        file_says, float_says: (N,) int, the class answered to `adversarial`.
        attacks, sources: N names, as Outcome.won() gives them: "" where the sample is robust.
        pictures: how many images are kept at most.
    Raises:
        EdgekitError: the arrays are of different lengths.
    """
    import numpy

    given = {"labels": labels, "index": index, "file_clean": file_clean, "file_robust": file_robust}
    given |= {"file_says": file_says, "float_clean": float_clean, "float_robust": float_robust}
    given |= {"float_says": float_says, "attacks": attacks, "sources": sources}
    lengths = {key: len(value) for key, value in given.items() if value is not None}
    lengths |= {"images": len(images), "adversarial": len(adversarial)}
    if len(set(lengths.values())) != 1:
        raise EdgekitError(f"the samples of {name} do not pair: {lengths}")
    columns = {key: numpy.asarray(value) for key, value in given.items() if value is not None}
    truth, clean = columns["labels"], columns["file_clean"].astype(bool)
    robust = clean & columns["file_robust"].astype(bool)
    student = "float_clean" in columns and "float_robust" in columns
    float_right: Any = columns["float_clean"].astype(bool) if student else None
    float_stands: Any = float_right & columns["float_robust"].astype(bool) if student else None
    # Wrong when clean is no success of an attack: there is no perturbation to show.
    candidates = numpy.flatnonzero(clean & ~robust & float_stands if student else clean & ~robust)
    kept = [_picture(place, images, adversarial, columns) for place in _spread(candidates, truth)[:pictures]]
    return FileEvidence(
        name=name,
        classes=tuple(_classes(truth, clean, robust, float_right, float_stands)),
        pictures=tuple(kept),
        candidates=len(candidates),
        won=dict(Counter(zip(attacks, sources, strict=True))),
        clean=_cross(float_right, clean) if student else None,
        robust=_cross(float_stands, robust) if student else None,
        curves=curves or Curves(),
    )


def _cross(first: Any, second: Any) -> Crossing:
    pairs = ((first & second), (first & ~second), (~first & second), (~first & ~second))
    return Crossing(*(int(pair.sum()) for pair in pairs))


def _classes(truth: Any, clean: Any, robust: Any, float_clean: Any, float_robust: Any) -> list[ClassCount]:
    counted = []
    for label in sorted(set(truth.tolist())):
        here = truth == label
        right = (None if column is None else int(column[here].sum()) for column in (float_clean, float_robust))
        counted.append(ClassCount(label, int(here.sum()), int(clean[here].sum()), int(robust[here].sum()), *right))
    return counted


def _spread(candidates: Any, truth: Any) -> list[int]:
    """The candidates with the first of every class before the second of any: what is shown is not chosen by looks."""
    seen: Counter[int] = Counter()
    ranked = []
    for place in candidates.tolist():
        label = int(truth[place])
        ranked.append((seen[label], place))
        seen[label] += 1
    return [place for _, place in sorted(ranked)]


def _picture(place: int, images: Any, adversarial: Any, columns: Mapping[str, Any]) -> Picture:
    import numpy

    clean, found = (numpy.array(batch[place], dtype=numpy.float32) for batch in (images, adversarial))
    says = columns.get("float_says")
    return Picture(
        index=int(columns["index"][place]),
        label=int(columns["labels"][place]),
        clean=clean,
        adversarial=found,
        file_says=int(columns["file_says"][place]),
        float_says=None if says is None else int(says[place]),
        attack=str(columns["attacks"][place]),
        source=str(columns["sources"][place]),
    )
