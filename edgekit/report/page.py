"""A Verdict and its evidence as one self-contained HTML page: no script, no network, light and dark, printable.

Every text that the template prints goes through `words.plain` and Jinja's escaping, whatever it is; only the charts,
which svg.py escapes itself, pass as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import statistics
from edgekit.files import write_text
from edgekit.report import pictures, svg, words
from edgekit.report.checks import EXPLAINED, Explanation
from edgekit.report.evidence import ClassCount, Crossing, Curves, Evidence, FileEvidence, Picture
from edgekit.verdict import Accuracy, ArtifactVerdict, Check, Verdict

CLASSES = 40  # rows of a table of classes: beyond them, those that lost most are shown

FLOAT = "float student"


def write(verdict: Verdict, evidence: Evidence | None, path: Path, command: str = "") -> None:
    """Write the page whole or not at all.

    Args:
        evidence: what is known beside the verdict; the sections that need it are left out without it.
        command: the command line that was run, to be shown.
    """
    write_text(path, to_html(verdict, evidence, command))


def to_html(verdict: Verdict, evidence: Evidence | None = None, command: str = "") -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else words.plain(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"name": words.name, "word": words.word, "percent": words.percent, "ends": words.ends}
    environment.filters |= {"signed": words.signed, "p_value": words.p_value}
    known = evidence or Evidence()
    files = [_file(verdict, one, known, svg.colour(place)) for place, one in enumerate(verdict.artifacts)]
    classes, classes_left_out = _classes(files, known)
    return environment.get_template("page.html").render(
        verdict=verdict,
        closing=words.closing(verdict, "below"),
        heading=words.heading(verdict),
        epsilon=words.epsilon(verdict),
        asked=words.asked(verdict),
        intervals=words.confidence(verdict),
        compared=any(one.baseline for one in verdict.artifacts),
        float_name=FLOAT,
        files=files,
        attacks=_attacks(verdict),
        legend=_legend(files, known),
        charts=_charts(verdict, files, known),
        checks=_checks(verdict),
        facts=_facts(verdict, known, command),
        classes=classes,
        class_files=[file.one.name for file in files if file.seen.classes],
        classes_left_out=classes_left_out,
    )


@dataclass(frozen=True)
class _File:
    """What the template shows of one file."""

    one: ArtifactVerdict
    kind: str  # CSS classes of its colour
    seen: FileEvidence
    change: Any  # a chart, or None
    crossings: list[tuple[str, Crossing, Any]]
    gallery: list[dict[str, Any]]
    won: list[tuple[str, int]]
    rests_on: list[str]


def _file(verdict: Verdict, one: ArtifactVerdict, known: Evidence, kind: str) -> _File:
    seen = next((file for file in known.files if file.name == one.name), FileEvidence(one.name))
    return _File(
        one=one,
        kind=kind,
        seen=seen,
        change=_change(verdict, one),
        crossings=_crossings(seen),
        gallery=[_card(verdict, known, picture) for picture in seen.pictures],
        won=sorted(((_winner(*pair), count) for pair, count in seen.won.items()), key=lambda item: -item[1]),
        rests_on=words.rests_on(one),
    )


def _class(known: Evidence, label: int) -> str:
    return words.name(known.classes[label]) if 0 <= label < len(known.classes) else f"class {label}"


def _classes(files: list[_File], known: Evidence) -> tuple[list[dict[str, Any]], int]:
    """The rows of the table of classes, and how many of them are left out."""
    judged = [(file.kind, {count.label: count for count in file.seen.classes}) for file in files if file.seen.classes]
    labels = sorted({label for _, counts in judged for label in counts})

    def lost(label: int) -> float:
        return max(_lost(counts[label]) for _, counts in judged if label in counts)

    shown = labels if len(labels) <= CLASSES else sorted(labels, key=lost, reverse=True)[:CLASSES]
    rows = []
    for label in shown:
        here = [(kind, counts.get(label)) for kind, counts in judged]
        lanes = [(kind, *_lane(count)) for kind, count in here if count]
        samples = max(count.samples for _, count in here if count)
        name = _class(known, label)
        chart = svg.pairs(lanes, f"robust accuracy on {name}")
        rows.append({"name": name, "samples": samples, "counts": [count for _, count in here], "chart": chart})
    return rows, len(labels) - len(shown)


def _lost(count: ClassCount) -> float:
    before = count.file_clean if count.float_robust is None else count.float_robust
    return (before - count.file_robust) / count.samples


def _lane(count: ClassCount) -> tuple[float | None, float]:
    before = None if count.float_robust is None else count.float_robust / count.samples
    return before, count.file_robust / count.samples


def _winner(attack: str, source: str) -> str:
    """Who fooled a sample first, in words."""
    if not attack:
        return "withstand everything"
    if attack == "clean":
        return "wrong without an attack"
    return words.name(attack) + ("" if source in ("", words.SCORES) else f" from {words.name(source)}")


def _change(verdict: Verdict, one: ArtifactVerdict) -> Any:
    if one.change is None:
        return None
    paired = [file.change.robust for file in verdict.artifacts if file.change]
    # One axis for all files, wide enough for the longest interval and for the limit with room on its left.
    lowest = min([change.low for change in paired] + [-1.5 * verdict.tolerance])
    highest = max([change.high for change in paired] + [0.25 * verdict.tolerance, 0.002])
    robust = one.change.robust
    said = f"change of robust accuracy in points: {words.signed(robust)}"
    return svg.interval(robust.value, robust.low, robust.high, verdict.tolerance, (lowest, highest), said)


def _crossings(seen: FileEvidence) -> list[tuple[str, Crossing, Any]]:
    rows = []
    for said, crossing in (("clean", seen.clean), ("under attack", seen.robust)):
        if crossing is not None:
            kinds = ("both", "only_float", "only_file", "neither")
            counts = [(kind.replace("_", "-"), getattr(crossing, kind)) for kind in kinds]
            spoken = ", ".join(f"{kind.replace('-', ' ')} {count}" for kind, count in counts)
            rows.append((said, crossing, svg.stacked(counts, f"{said}: {spoken}")))
    return rows


def _card(verdict: Verdict, known: Evidence, picture: Picture) -> dict[str, Any]:
    """A picture of the gallery: three images, and who said what."""
    gain = 0.5 / verdict.epsilon if verdict.norm == "Linf" else pictures.gain(picture.clean, picture.adversarial)
    changed = pictures.enlarged(picture.clean, picture.adversarial, gain)
    return {
        "images": [
            ("clean", pictures.uri(picture.clean)),
            (f"change × {gain:.3g}", pictures.uri(changed)),
            ("attacked", pictures.uri(picture.adversarial)),
        ],
        "label": _class(known, picture.label),
        "float_says": None if picture.float_says is None else _class(known, picture.float_says),
        "file_says": _class(known, picture.file_says),
        "float_right": picture.float_says == picture.label,
        "file_right": picture.file_says == picture.label,
        "index": picture.index,
        "winner": _winner(picture.attack, picture.source),
    }


def _attacks(verdict: Verdict) -> list[dict[str, Any]]:
    """The rows of files x attacks: what is called so, and for each file its share and interval, or None."""

    def figure(one: ArtifactVerdict, share: float | None) -> Accuracy | None:
        if share is None:
            return None
        drawn, confidence = verdict.drawn(one), one.plan.confidence if one.plan else verdict.confidence
        return Accuracy(share, *statistics.wilson(round(share * drawn), drawn, confidence))

    rows: list[dict[str, Any]] = []
    by_file = [{attack.name: attack for attack in one.attacks} for one in verdict.artifacts]
    for attack in dict.fromkeys(name for found in by_file for name in found):
        here = [found.get(attack) for found in by_file]
        sources = list(dict.fromkeys(source for one in here if one for source in one.sources))
        seconds = sum(one.seconds for one in here if one)
        note = "from scores alone" if sources == [words.SCORES] else "worst of its sources"
        pairs = list(zip(verdict.artifacts, here, strict=True))
        cells = [figure(one, found.robust_accuracy if found else None) for one, found in pairs]
        rows.append({"name": words.name(attack), "note": note, "seconds": seconds, "cells": cells, "sub": False})
        for source in sources if len(sources) > 1 else ():
            cells = [figure(one, found.sources.get(source) if found else None) for one, found in pairs]
            rows.append({"name": f"from {words.name(source)}", "note": "", "seconds": 0.0, "cells": cells, "sub": True})
    return rows


def _legend(files: list[_File], known: Evidence) -> list[tuple[str, str]]:
    """(CSS classes, name) of every line that a chart has."""
    drawn = [(file.kind, file.one.name) for file in files if file.seen.curves.epsilon or file.seen.curves.steps]
    return [("series-float", FLOAT), *drawn] if known.float_curves != Curves() else drawn


def _charts(verdict: Verdict, files: list[_File], known: Evidence) -> list[tuple[str, Any]]:
    curves = [("series-float", known.float_curves), *((file.kind, file.seen.curves) for file in files)]
    charts = []
    by_epsilon = [(kind, dict(one.epsilon)) for kind, one in curves if one.epsilon]
    if by_epsilon:
        ticks = {x: words.level(x, verdict.norm) for _, values in by_epsilon for x in values}
        title = "Accuracy against epsilon"
        chart = svg.lines(by_epsilon, label=f"{verdict.norm} epsilon", ticks=ticks, mark=verdict.epsilon, title=title)
        charts.append((title, chart))
    by_steps = [(kind, {float(x): share for x, share in one.steps.items()}) for kind, one in curves if one.steps]
    if by_steps:
        ticks = {x: f"{x:g}" for _, values in by_steps for x in values}
        title = "Accuracy against the attack's steps"
        charts.append((title, svg.lines(by_steps, label="steps", ticks=ticks, title=title)))
    return charts


def _checks(verdict: Verdict) -> list[tuple[str, Explanation | None, list[tuple[str, Check]]]]:
    """(name, explanation, results by file), the failed ones first, then in the order of EXPLAINED."""
    found: dict[str, list[tuple[str, Check]]] = {}
    for one in verdict.artifacts:
        for check in one.checks:
            found.setdefault(check.name, []).append((one.name, check))
    order = {name: place for place, name in enumerate(EXPLAINED)}

    def rank(item: tuple[str, list[tuple[str, Check]]]) -> tuple[bool, int]:
        return all(check.passed for _, check in item[1]), order.get(item[0], len(order))

    return [(name, EXPLAINED.get(name), results) for name, results in sorted(found.items(), key=rank)]


def _facts(verdict: Verdict, known: Evidence, command: str) -> list[tuple[str, str]]:
    """What was run, as (what, value)."""
    looks = f", look {verdict.looks} of this file at this data" if verdict.looks > 1 else ""
    facts = {"command": command} if command else {}
    facts |= {
        "attacks": ", ".join(map(words.name, verdict.attacks)),
        "ball": f"{verdict.norm}, epsilon {words.epsilon(verdict)} ({verdict.epsilon!r} of the range [0, 1])",
        "samples": f"{verdict.samples:,} of the {verdict.data.split} split, seed {verdict.seed}{looks}",
        "asked": words.asked(verdict),
        "confidence": f"{words.confidence(verdict)}; Wilson for accuracies, Tango for paired changes",
        "data": f"{words.name(verdict.data.name)}, sha256 {verdict.data.sha256}",
        "processor": f"{verdict.machine.cpu}, int8 by {verdict.machine.int8_instructions}",
    }
    versions: Mapping[str, str] = {"edgekit": verdict.edgekit, **verdict.machine.runtimes, **known.versions}
    facts["versions"] = ", ".join(f"{words.name(name)} {version}" for name, version in versions.items())
    return [*facts.items(), *known.facts.items()]
