"""A Verdict as a table for the terminal, with what each word in it rests on."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgekit.report import words
from edgekit.report.words import NONE, plain
from edgekit.verdict import Accuracy, ArtifactVerdict, Change, Verdict

COLOURS = {"survived": "green", "measured": "cyan", "inconclusive": "yellow", "not_run": "yellow", "lost": "red"}


def to_table(verdict: Verdict) -> RenderableType:
    """One row for each file, the reasons below, and the run's verdict in words; made for 80 columns or more.

    No name in the verdict can style the output or move the cursor.
    """
    reasons = (line for one in verdict.artifacts for line in _reasons(one))
    return Group(_heading(verdict), Text(), _table(verdict), *reasons, Text(), _closing(verdict))


def _heading(verdict: Verdict) -> Text:
    return Text(plain(words.heading(verdict))).append(f"\n{words.brackets(verdict)}", style="dim")


def _table(verdict: Verdict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), leading=1, show_edge=False)
    table.add_column("file", overflow="fold")
    for figures in ("kB", "clean", "robust"):
        table.add_column(figures, justify="right", no_wrap=True)
    compared = any(one.baseline for one in verdict.artifacts)
    if compared:
        table.add_column("robust since\nbaseline", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if verdict.float is not None:
        clean, robust = verdict.float.clean_accuracy, verdict.float.robust_accuracy
        table.add_row(
            "float student,\nown gradients", NONE, _figure(clean, None), _figure(robust, None), *[NONE] * (1 + compared)
        )
    for one in verdict.artifacts:
        clean, robust = (one.change.clean, one.change.robust) if one.change else (None, None)
        figures = (_figure(one.clean_accuracy, clean), _figure(one.robust_accuracy, robust))
        since = [_since(one)] if compared else []
        table.add_row(Text(plain(one.name)), f"{one.bytes / 1000:,.0f}", *figures, *since, _word(one.verdict))
    return table


def _figure(accuracy: Accuracy | None, change: Change | None) -> Text:
    """The accuracy, and below it its change in points with that change's interval; its own where nothing is paired."""
    if accuracy is None:
        return Text(NONE)
    below = words.ends(accuracy) if change is None else words.signed(change)
    return Text(f"{words.percent(accuracy.value)}\n{below}")


def _since(one: ArtifactVerdict) -> Text:
    """The change against an earlier release, its interval below."""
    if one.baseline is None:
        return Text(NONE)
    value, _, ends = words.signed(one.baseline.robust).partition(" ")
    return Text(f"{value}\n{ends}")


def _word(verdict: str) -> Text:
    return Text(words.word(verdict), style=f"bold {COLOURS[verdict]}")


def _reasons(one: ArtifactVerdict) -> list[RenderableType]:
    """Why the file got its verdict, and indented below it what the figures rest on."""
    why = Text("\n").append(plain(one.name), style="bold").append(": ").append(_word(one.verdict))
    return [
        why.append(plain(f", {one.why}")),
        *(Padding(Text(plain(fact)), (0, 0, 0, 2)) for fact in words.facts(one)),
    ]


def _closing(verdict: Verdict) -> Text:
    """The run's verdict in words, and what follows from it."""
    line = Text().append(words.word(verdict.verdict).upper(), style=f"bold {COLOURS[verdict.verdict]}")
    return line.append(plain(f": {words.closing(verdict)}"))
