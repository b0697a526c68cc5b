"""A Verdict as a table for the terminal, with what each word in it rests on."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgekit.errors import printable
from edgekit.statistics import points
from edgekit.verdict import Accuracy, ArtifactVerdict, Change, Verdict

COLOURS = {"survived": "green", "measured": "cyan", "inconclusive": "yellow", "not_run": "yellow", "lost": "red"}
NONE = "–"


def to_table(verdict: Verdict) -> RenderableType:
    """One row for each file, the reasons below, and the run's verdict in words; made for 80 columns or more.

    No name in the verdict can style the output or move the cursor.
    """
    reasons = (line for one in verdict.artifacts for line in _reasons(one))
    return Group(_heading(verdict), Text(), _table(verdict), *reasons, Text(), _closing(verdict))


def _heading(verdict: Verdict) -> Text:
    drawn = f"{verdict.samples:,} {verdict.data.split} samples of {verdict.data.name}, seed {verdict.seed}"
    looks = f", look {verdict.looks} at this data" if verdict.looks > 1 else ""
    ball = f"{verdict.norm} epsilon {_epsilon(verdict)}"
    paired = any(one.change for one in verdict.artifacts)
    below = ", under an accuracy its change in points" if paired else ""
    return Text(printable(f"{', '.join(verdict.attacks)} within {ball} on {drawn}{looks}")).append(
        f"\nIn brackets {100 * verdict.confidence:g} % intervals{below}", style="dim"
    )


def _epsilon(verdict: Verdict) -> str:
    levels = verdict.epsilon * 255
    whole = verdict.norm == "Linf" and abs(levels - round(levels)) < 1e-6
    return f"{round(levels)}/255" if whole else f"{verdict.epsilon:.4g}"


def _table(verdict: Verdict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), leading=1, show_edge=False)
    table.add_column("file", overflow="fold")
    for figures in ("kB", "clean", "robust"):
        table.add_column(figures, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if verdict.float is not None:
        clean, robust = verdict.float.clean_accuracy, verdict.float.robust_accuracy
        table.add_row("float student,\nown gradients", NONE, _figure(clean, None), _figure(robust, None), NONE)
    for one in verdict.artifacts:
        clean, robust = (one.change.clean, one.change.robust) if one.change else (None, None)
        figures = (_figure(one.clean_accuracy, clean), _figure(one.robust_accuracy, robust))
        table.add_row(Text(printable(one.name)), f"{one.bytes / 1000:,.0f}", *figures, _word(one.verdict))
    return table


def _figure(accuracy: Accuracy | None, change: Change | None) -> Text:
    """The accuracy, and below it its change in points with that change's interval; its own where nothing is paired."""
    if accuracy is None:
        return Text(NONE)
    if change is None:
        return Text(f"{100 * accuracy.value:.1f} %\n[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]")
    ends = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    return Text(f"{100 * accuracy.value:.1f} %\n{100 * change.value:+.1f} {ends}")


def _word(verdict: str) -> Text:
    return Text(verdict.replace("_", " "), style=f"bold {COLOURS[verdict]}")


def _reasons(one: ArtifactVerdict) -> list[RenderableType]:
    """Why the file got its verdict, and indented below it what the figures rest on."""
    why = Text("\n").append(printable(one.name), style="bold").append(": ").append(_word(one.verdict))
    return [
        why.append(printable(f", {one.why}")),
        *(Padding(Text(printable(fact)), (0, 0, 0, 2)) for fact in _facts(one)),
    ]


def _facts(one: ArtifactVerdict) -> list[str]:
    facts = []
    if one.command:
        facts.append(f"judge it there with: {one.command}")
    for attack in one.attacks:
        sources = ", ".join(f"{name} {100 * share:.1f} %" for name, share in attack.sources.items())
        # "scores" is the one source of an attack that follows no gradient (attacks/campaign.py).
        found = (
            "from its scores alone" if set(attack.sources) == {"scores"} else f"by source of the gradients: {sources}"
        )
        facts.append(
            f"{attack.name}: {100 * attack.robust_accuracy:.1f} % withstand it ({found}; {attack.seconds:.1f} s)"
        )
    if one.float_robust_accuracy is not None and one.change is not None:
        robust = one.change.robust
        p_value = "below 0.001" if robust.p_value < 0.001 else f"{robust.p_value:.3f}"
        facts.append(
            f"float student under the same attacks: {100 * one.float_robust_accuracy.value:.1f} %; "
            f"{robust.only_float} samples withstand only there, {robust.only_artifact} only here (McNemar p {p_value})"
        )
    if one.agreement is not None:
        facts.append(f"decides as the float student on {100 * one.agreement:.1f} % of the clean images")
    if one.twin is not None:
        exact = one.twin.max_abs_difference == 0
        away = "bit for bit" if exact else f"logits within {one.twin.max_abs_difference:.2g}"
        facts.append(f"its differentiable twin decides as the file does on {100 * one.twin.agreement:.1f} %, {away}")
    if one.checks:
        facts.append(f"{sum(check.passed for check in one.checks)} of {len(one.checks)} checks passed")
    if one.judged_on:
        facts.append(f"judged on {one.judged_on}")
    return facts


def _closing(verdict: Verdict) -> Text:
    """The run's verdict in words, and what follows from it."""
    named = [one.name for one in verdict.artifacts if one.verdict == verdict.verdict]
    those = f"{', '.join(named)}: " if len(named) < len(verdict.artifacts) else ""
    files = "all files" if len(verdict.artifacts) > 1 else "the file"
    words = {
        "survived": f"robustness survived in {files} (asked: {_asked(verdict)}), on what is named above as judge.",
        "measured": f"{those}measured, and held against nothing; --at-least P would make it a verdict.",
        "lost": f"{those}falls short of what was asked ({_asked(verdict)}). Do not ship it.",
        "inconclusive": (
            f"{those}neither survival nor loss is shown (asked: {_asked(verdict)}); the reason stands above. "
            "It does not mean that robustness was lost. Where the interval is too wide, only a larger sample, "
            "fixed before looking, can decide; repeating this run cannot."
        ),
        "not_run": f"{those}could not run here and is not judged; the reason stands above.",
    }
    line = Text().append(verdict.verdict.replace("_", " ").upper(), style=f"bold {COLOURS[verdict.verdict]}")
    return line.append(printable(f": {words[verdict.verdict]}"))


def _asked(verdict: Verdict) -> str:
    """What the files were held against, as the options said it."""
    robust, clean = points(verdict.tolerance), points(verdict.clean_tolerance)
    asked = []
    if any(one.change for one in verdict.artifacts):
        asked.append(f"at most {robust} of robust and {clean} of clean accuracy lost")
    if verdict.at_least is not None:
        asked.append(f"at least {100 * verdict.at_least:.4g} % robust")
    return ", ".join(asked) or "nothing"
