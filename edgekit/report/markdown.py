"""A Verdict as a short Markdown table, for a comment on a pull request."""

import re
from pathlib import Path

from edgekit.files import write_text
from edgekit.report import words
from edgekit.report.words import NONE
from edgekit.verdict import Accuracy, ArtifactVerdict, Change, Since, Verdict

MARKS = {"survived": "✅", "measured": "ℹ️", "inconclusive": "❔", "not_run": "⏭️", "lost": "❌"}

# No sentence begins a line, so only what acts inside one is here.
_ACTIVE = re.compile(r"[\\`*_\[\]<&~$|]")
# A backslash does not keep GitHub from making links of these, an empty comment in their middle does.
_LINKED = re.compile(r"@|(?<=#)(?=\w)|(?<=GH)(?=-)|(?<=:)(?=//)|(?<=www)(?=\.)")


def write(verdict: Verdict, path: Path) -> None:
    """Write the text whole or not at all."""
    write_text(path, to_markdown(verdict))


def to_markdown(verdict: Verdict) -> str:
    """The verdict in one line, a row for each file, and below the table why each got its verdict."""
    compared = any(one.baseline for one in verdict.artifacts)
    since = ("since baseline, points",) if compared else ()
    header = ("file", "kB", "clean", "robust", "change of robust, points", *since, "verdict")
    lines = [
        f"**{_title(verdict.verdict)}**: {text(words.closing(verdict, 'below'))}",
        "",
        _row(header),
        _row(("---", "--:", "--:", "--:", "--:", *["--:"] * compared, "---")),
    ]
    if verdict.float is not None:
        clean, robust = verdict.float.clean_accuracy, verdict.float.robust_accuracy
        lines.append(
            _row(("float student, own gradients", NONE, _accuracy(clean), _accuracy(robust), *[NONE] * (2 + compared)))
        )
    lines += [_row(_cells(one, compared)) for one in verdict.artifacts]
    lines.append("")
    for one in verdict.artifacts:
        lines.append(f"- {code(one.name)}: {text(_why(one))}")
        if one.judged_on is not None and not isinstance(one.judged_on, str):
            lines += [f"  - {text(words.place(where))}" for where in one.judged_on]
    lines.append("")
    said = f"{words.heading(verdict)}. In brackets {words.confidence(verdict)}. edgekit {verdict.edgekit}."
    return "\n".join([*lines, f"<sub>{text(said)}</sub>", ""])


def code(name: object) -> str:
    """A name as a code span: there nothing is markup, a link, a mention or a formula; safe in a table's cell too."""
    shown = words.name(name)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    # One blank on both sides is taken off again; without it a backtick at the end would lengthen the fence.
    return f"{fence} {shown} {fence}".replace("|", "\\|") if shown.strip() else "(no name)"


def text(prose: object) -> str:
    """A sentence in which all that Markdown would act on is literal, mentions and references to issues included."""
    escaped = _ACTIVE.sub(lambda match: f"\\{match.group()}", words.plain(prose))
    return _LINKED.sub(lambda match: f"{match.group()}<!-- -->", escaped)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _why(one: ArtifactVerdict) -> str:
    """Why the file got its verdict, and what that rests on that no column shows."""
    more = [words.look(one.plan)] if one.plan else []
    return "; ".join([one.why, *more, *([words.since(one.baseline)] if one.baseline else [])])


def _cells(one: ArtifactVerdict, compared: bool) -> tuple[str, ...]:
    robust = one.change.robust if one.change else None
    size = f"{one.bytes / 1000:,.0f}"
    figures = (_accuracy(one.clean_accuracy), _accuracy(one.robust_accuracy), _change(robust))
    since = (_change(one.baseline and one.baseline.robust),) if compared else ()
    return (code(one.name), size, *figures, *since, _title(one.verdict))


def _title(verdict: str) -> str:
    return f"{MARKS[verdict]} {words.word(verdict)}"


def _accuracy(accuracy: Accuracy | None) -> str:
    return NONE if accuracy is None else f"{words.percent(accuracy.value)} {words.ends(accuracy)}"


def _change(change: Change | Since | None) -> str:
    return NONE if change is None else words.signed(change)
