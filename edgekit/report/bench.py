"""What `edgekit bench` measured, for the terminal; made from the document in bench.json, for 80 columns or more."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgekit.report import words
from edgekit.report.words import NONE, plain
from edgekit.verdict import Accuracy

UNVERIFIED = "not verified"


def to_table(document: Mapping[str, Any]) -> RenderableType:
    """How fast each file is, then what each of them is, and what the figures rest on.

    No name in the document can style the output or move the cursor.
    """
    machine = document["machine"]
    heading = Text(plain(f"{machine['cpu']}, {machine['cores']} cores, {machine['int8_instructions']}"))
    runtimes = ", ".join(f"{name} {version}" for name, version in machine["runtimes"].items())
    heading.append("\n").append(plain(f"{runtimes}; times are median / p90 / p99"), style="dim")
    return Group(heading, Text(), _latency(document), Text(), _files(document), Text(), _notes(document))


def _latency(document: Mapping[str, Any]) -> Table:
    table = _empty("file", "threads", *(f"batch {size}, ms" for size in document["batches"]), "images/s")
    for one in document["artifacts"]:
        cells = {(cell["threads"], cell["batch"]): cell for cell in one["latency"]}
        for place, threads in enumerate(document["threads"]):
            row = [cells[threads, size] for size in document["batches"]]
            table.add_row(
                Text("" if place else plain(one["name"])),
                str(threads),
                *(_times(cell) for cell in row),
                f"{max(cell['images_per_second'] for cell in row):,.0f}",
            )
    return table


def _times(cell: Mapping[str, Any]) -> str:
    return " / ".join(_milliseconds(cell[key]) for key in ("median", "p90", "p99"))


def _milliseconds(seconds: float) -> str:
    """Three digits, as many as a repetition would confirm."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _files(document: Mapping[str, Any]) -> Table:
    table = _empty("file", "kB", "cold\nstart, ms", "peak\nMB", "operators\nint8 / float", "robust", "Pareto front")
    table.columns[-1].justify = "left"
    for one in document["artifacts"]:
        floats = sum(one["operators"]["float"].values())
        table.add_row(
            Text(plain(one["name"])),
            f"{one['bytes'] / 1000:,.0f}",
            _milliseconds(one["cold_start"]["seconds"]),
            f"{one['peak_memory'][0]['bytes'] / 1e6:.1f}",
            f"{one['operators']['int8']} / {floats}",
            _robust(one),
            Text("\n".join(one["front"]) or NONE, style="bold green" if one["front"] else ""),
        )
    return table


def _robust(one: Mapping[str, Any]) -> Text:
    if "robust_accuracy" not in one:
        return Text(UNVERIFIED, style="yellow")
    accuracy = Accuracy(**one["robust_accuracy"])
    below = words.ends(accuracy) if one["judged"]["comparable"] else one["judged"]["why"]
    return Text(plain(words.percent(accuracy.value))).append("\n").append(plain(below))


def _empty(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(names[0], overflow="fold")
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _notes(document: Mapping[str, Any]) -> Text:
    rounds = [cell["rounds"] for one in document["artifacts"] for cell in one["latency"]]
    shown = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    starts = f"{document['cold_starts']} fresh processes"
    lines = [
        f"{shown} rounds after a warm-up, all files in turn. Cold start and peak memory: opening and the first answer,",
        f"beside the imported runtime, in {starts}.",
        _judged(document),
    ]
    return Text(plain(" ".join(lines)), style="dim")


def _judged(document: Mapping[str, Any]) -> str:
    judged = document.get("judged_under")
    if judged is None:
        return "No verdict has judged these files, so there is no Pareto front."
    level = words.level(judged["epsilon"], judged["norm"])
    attacks = words.name(", ".join(judged["attacks"]))
    return f"Robust accuracy: {attacks} within {judged['norm']} {level}, from the newest verdicts on these very files."


def closing(document: Mapping[str, Any]) -> str:
    """What to do next: judge what was not judged alike, and else ship one of the front."""
    files: Sequence[Mapping[str, Any]] = document["artifacts"]
    under = document.get("judged_under", {})
    attacks = ",".join(under.get("attacks", ()))
    for one in files:
        if "judged" not in one or any(one["judged"][key] != under[key] for key in ("attacks", "norm", "epsilon")):
            what = one["run"] if "run" in one and len({other.get("run") for other in files}) == 1 else _place(one)
            data = "" if "run" in one else " --data FOLDER"
            more = f" --attack {shlex.quote(attacks)}" if attacks else ""
            return f"Next: edgekit verify {shlex.quote(what)}{data}{more}"
    best = [one for one in files if one["front"]]
    if not best:
        return f"Next: see which check failed, in {files[0]['judged']['file']}"
    return f"Next: ship one of the Pareto front: {', '.join(_place(one) for one in best)}"


def _place(one: Mapping[str, Any]) -> str:
    """The artifact's folder, or the file that lies in none."""
    return f"{one['run']}/{one['file'].rpartition('/')[0]}" if "run" in one else one["file"]
