"""`verify --baseline verdict.json`: the file against that of an earlier release, paired on the same samples.

What the earlier file did to each sample stands in samples.jsonl beside its verdict. Nothing is compared that was not
attacked alike: the same data, samples, seed, attacks, ball and processors.
"""

import contextlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgekit import processors, verdict
from edgekit.console import say
from edgekit.errors import EdgekitError
from edgekit.examine import Earlier, Trial
from edgekit.verdict import ArtifactVerdict, Data, Rules, Verdict, Versus

COLUMNS = {"index": int, "label": int, "file_clean": bool, "file_robust": bool}


@dataclass(frozen=True)
class Baseline:
    """An earlier verdict, and for each of its artifacts what that did: place in the data -> (label, clean, robust)."""

    verdict: Verdict
    samples: dict[str, dict[int, tuple[int, bool, bool]]]
    where: str


def read(path: str | Path) -> Baseline:
    """A verdict.json and the samples.jsonl beside it.

    Raises:
        EdgekitError: one of them is missing or damaged, or they do not belong together.
    """
    path = Path(path)
    where = f"--baseline {path}"
    if path.is_dir():
        raise EdgekitError("this is a folder, not a verdict.json", where=where, mend="Name the verdict.json in it")
    try:
        document = verdict.from_dict(json.loads(path.read_text(encoding="utf-8")), where=where)
    except FileNotFoundError:
        raise EdgekitError("there is no such verdict", where=where) from None
    except (ValueError, RecursionError):
        raise EdgekitError("not a verdict.json: it is no JSON document", where=where) from None
    beside = path.parent / "samples.jsonl"
    try:
        text = beside.read_text(encoding="utf-8")
    except FileNotFoundError:
        mend = "Keep the folder verdicts/<n>/ whole, and name the verdict.json in it"
        raise EdgekitError("no samples.jsonl lies beside it", where=where, mend=mend) from None
    except ValueError:
        raise EdgekitError("damaged: it is no text", where=beside) from None
    samples: dict[str, dict[int, tuple[int, bool, bool]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, place, told = _sample(line, f"{beside}, line {number}")
        told_before = samples.setdefault(name, {})
        if place in told_before:
            raise EdgekitError(f"damaged: sample {place} stands there twice", where=f"{beside}, line {number}")
        told_before[place] = told
    for one in document.artifacts:
        _agree(document, one, samples.get(one.name, {}), beside)
    return Baseline(document, samples, where)


def _sample(line: str, where: str) -> tuple[str, int, tuple[int, bool, bool]]:
    told: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(line)
    # type(), not isinstance(): True is no place in the data.
    if not (
        isinstance(told, dict)
        and isinstance(told.get("artifact"), str)
        and all(type(told.get(key)) is kind for key, kind in COLUMNS.items())
    ):
        raise EdgekitError("damaged: this is no sample of a verdict", where=where)
    return told["artifact"], told["index"], (told["label"], told["file_clean"], told["file_robust"])


def _agree(document: Verdict, one: ArtifactVerdict, samples: dict[int, tuple[int, bool, bool]], beside: Path) -> None:
    """The samples must add up to what the verdict says: a file that was cut or exchanged does not."""
    if one.clean_accuracy is None or one.robust_accuracy is None:  # it could not run
        return
    count = document.drawn(one)
    clean, robust = (sum(told[column] for told in samples.values()) for column in (1, 2))
    said = (one.clean_accuracy.value, one.robust_accuracy.value)
    if len(samples) != count or (clean / count, robust / count) != said:
        raise EdgekitError(f"damaged: it does not hold the samples of {one.name} that the verdict counts", where=beside)


def held_against(
    baseline: Baseline,
    names: Sequence[str],
    trial: Trial,
    data: Data,
    on: Sequence[str] = (),
    *,
    some: bool = False,
) -> dict[str, Earlier]:
    """For each of the artifacts `names` that has a counterpart in the baseline, what compares the two.

    The counterpart has the same name, or is the only one where there is only one on either side.

    Args:
        on: the processors that each file is judged on, where they are named.
        some: the trial's samples come one look after the other: the baseline may hold more than were drawn in the end.
    Raises:
        EdgekitError: the baseline was attacked otherwise, or on other samples; or none of the files is in it.
    """
    before, where = baseline.verdict, baseline.where
    attacks = [attack.name for attack in trial.attacks]
    asked = [
        ("the data differ", before.data.sha256[:12], data.sha256[:12]),
        ("the attacks differ", ", ".join(before.attacks), ", ".join(attacks)),
        ("the norm differs", before.norm, trial.norm),
        ("epsilon differs", before.epsilon, trial.epsilon),
        ("what --grid asks for differs", _pixels(before.grid), _pixels(trial.grid)),
        ("the seed differs", before.seed, trial.seed),
        *([] if some else [("the number of samples differs", before.samples, len(trial.labels))]),
    ]
    for what, then, now in asked:
        _alike(what, then, now, where)
    judged = [one for one in before.artifacts if one.verdict != "not_run"]
    found: dict[str, Earlier] = {}
    for name in names:
        counterpart = next((one for one in judged if one.name == name), None)
        if counterpart is None and len(names) == len(before.artifacts) == len(judged) == 1:
            counterpart = judged[0]
        if counterpart is None:
            say(f"{name}: the baseline judged no file of that name, and it is not compared")
            continue
        # A sample is robust only where it is so on all of them.
        _alike(f"the processors of {name} differ", _named(counterpart.places), _named(on), where)
        _cover(baseline, counterpart, trial)
        found[name] = _comparison(baseline, counterpart)
    if not found:
        there = ", ".join(one.name for one in judged) or "none"
        raise EdgekitError(f"it judged none of these files ({', '.join(names)}), but {there}", where=where)
    return found


def _alike(what: str, then: object, now: object, where: str) -> None:
    if then != now:
        raise EdgekitError(
            f"another release is compared on like terms only, and {what}: {then} there, {now} here", where=where
        )


def _pixels(grid: bool) -> str:
    return "uint8 values" if grid else "any values"


def _named(names: Sequence[str]) -> str:
    return ", ".join([processors.NATIVE, *sorted(processors.emulated(names))])


def _cover(baseline: Baseline, one: ArtifactVerdict, trial: Trial) -> None:
    samples = baseline.samples[one.name]
    for place, label in zip(trial.index.tolist(), trial.labels.tolist(), strict=True):
        if place not in samples:
            raise EdgekitError(
                f"{one.name} was judged on {len(samples):,} samples there, and sample {place} is none of them",
                where=baseline.where,
                mend="Judge both on the same samples: the same --samples and --seed, and no --until-decided there",
            )
        if samples[place][0] != label:
            raise EdgekitError(f"sample {place} is of another class there", where=baseline.where)


def _comparison(baseline: Baseline, one: ArtifactVerdict) -> Earlier:
    samples = baseline.samples[one.name]
    then = {(attack.name, source) for attack in one.attacks for source in attack.sources}

    def against(
        index: Tensor, clean: Tensor, robust: Tensor, faced: Collection[tuple[str, str]], rules: Rules
    ) -> Versus:
        told = [samples[place] for place in index.tolist()]
        before = [right for _, right, _ in told], [stood for _, _, stood in told]
        about = {"name": one.name, "sha256": one.sha256, "edgekit": baseline.verdict.edgekit}
        doubt = None
        if then != set(faced):  # an attack with a twin to follow finds more than one without
            sources = (", ".join(sorted({source for _, source in pairs})) for pairs in (then, faced))
            doubt = "the two faced other sources: {} then, {} now".format(*sources)
        return verdict.versus(rules, before, (clean, robust), **about, doubt=doubt)

    return against
