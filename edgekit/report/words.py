"""What the terminal, the page, the Markdown table and JUnit all say, written once, and hostile names made harmless."""

import re

from edgekit.errors import printable
from edgekit.processors import NATIVE
from edgekit.statistics import points
from edgekit.verdict import Accuracy, ArtifactVerdict, Change, Place, Planned, Since, Verdict, Versus

NONE = "–"
NAME = 120  # characters of a name that are shown: nobody reads more, and a table has no room for them
SCORES = "scores"  # the one source of an attack that follows no gradient (attacks/campaign.py)

# What `printable` leaves: half of a surrogate pair (a file name that is no UTF-8 holds them), characters that no XML
# document may hold, and the direction marks that came later.
_UNWRITABLE = re.compile("[\ud800-\udfff\ufffe\uffff\u061c\u2060-\u2065\u206a-\u206f]")
_FORMULA = ("=", "+", "-", "@")


def plain(text: object) -> str:
    """`text` with no character in it that a terminal, an XML parser or a text file would choke on or obey."""
    return _UNWRITABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), printable(text))


def name(text: object, longest: int = NAME) -> str:
    """A name from outside, plain, cut in its middle where too long, and no formula when pasted into a spreadsheet."""
    shown = plain(text)
    if len(shown) > longest:
        shown = f"{shown[: longest - longest // 2 - 1]}…{shown[-(longest // 2) :]}"
    # An apostrophe is how a spreadsheet marks text: OWASP, "CSV Injection".
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown


def word(verdict: str) -> str:
    return verdict.replace("_", " ")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ends(accuracy: Accuracy) -> str:
    """An accuracy's interval, in percent."""
    return f"[{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def signed(change: Change | Since) -> str:
    """A change and its interval, in points."""
    return f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def p_value(change: Change | Since) -> str:
    return "below 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"


def epsilon(verdict: Verdict) -> str:
    """The radius as 8/255 where it is a whole number of levels."""
    return level(verdict.epsilon, verdict.norm)


def level(radius: float, norm: str = "Linf") -> str:
    levels = radius * 255
    whole = norm == "Linf" and abs(levels - round(levels)) < 1e-6
    return f"{round(levels)}/255" if whole else f"{radius:.4g}"


def heading(verdict: Verdict) -> str:
    """What was done: the attacks, the ball, the samples."""
    upto = "up to " if any(verdict.drawn(one) != verdict.samples for one in verdict.artifacts) else ""
    drawn = f"{upto}{verdict.samples:,} {verdict.data.split} samples of {verdict.data.name}, seed {verdict.seed}"
    looks = f", look {verdict.looks} at this data" if verdict.looks > 1 else ""
    return f"{', '.join(verdict.attacks)} within {verdict.norm} epsilon {epsilon(verdict)} on {drawn}{looks}"


def brackets(verdict: Verdict) -> str:
    """What stands in brackets."""
    paired = any(one.change for one in verdict.artifacts)
    below = ", under an accuracy its change in points" if paired else ""
    return f"In brackets {confidence(verdict)}{below}"


def confidence(verdict: Verdict) -> str:
    """What the intervals are."""
    said = f"{100 * verdict.confidence:g} % intervals"
    looks = max((one.plan.looks for one in verdict.artifacts if one.plan), default=1)
    return f"{said} that allow for {looks} planned looks" if looks > 1 else said


def facts(one: ArtifactVerdict) -> list[str]:
    """What the figures of one file rest on, a line each."""
    lines = [f"judge it there with: {one.command}"] if one.command else []
    for attack in one.attacks:
        sources = ", ".join(f"{source} {percent(share)}" for source, share in attack.sources.items())
        found = "from its scores alone" if set(attack.sources) == {SCORES} else f"by source of the gradients: {sources}"
        lines.append(f"{attack.name}: {percent(attack.robust_accuracy)} withstand it ({found}; {attack.seconds:.1f} s)")
    return lines + rests_on(one)


def rests_on(one: ArtifactVerdict) -> list[str]:
    """The facts beside the attacks: the float student, the twin, the checks, the judge."""
    lines = []
    if one.plan is not None:
        lines.append(look(one.plan))
    if one.float_robust_accuracy is not None and one.change is not None:
        robust = one.change.robust
        samples = "sample withstands" if robust.only_float == 1 else "samples withstand"
        lines.append(
            f"float student under the same attacks: {percent(one.float_robust_accuracy.value)}; {robust.only_float} "
            f"{samples} only there, {robust.only_artifact} only here (McNemar p {p_value(robust)})"
        )
    if one.baseline is not None:
        lines.append(since(one.baseline))
    if one.agreement is not None:
        lines.append(f"decides as the float student on {percent(one.agreement)} of the clean images")
    if one.twin is not None:
        exact = one.twin.max_abs_difference == 0
        away = "bit for bit" if exact else f"logits within {one.twin.max_abs_difference:.2g}"
        lines.append(f"its differentiable twin decides as the file does on {percent(one.twin.agreement)}, {away}")
    if one.checks:
        lines.append(f"{sum(check.passed for check in one.checks)} of {len(one.checks)} checks passed")
    if one.saturating_pairs:
        lines.append(f"{one.saturating_pairs:,} pairs of its weights can saturate 16-bit sums (x86 without VNNI)")
    if one.within_one_quantum is not None:
        lines.append(f"the two best scores lie within one quantum on {percent(one.within_one_quantum)} of clean images")
    if isinstance(one.judged_on, str):
        lines.append(f"judged on {one.judged_on}")
    return lines + [place(where) for where in one.judged_on or () if isinstance(where, Place)]


def place(where: Place) -> str:
    """One processor of several, in a line."""
    if where.clean_accuracy is None or where.robust_accuracy is None or where.agreement is None:
        return f"{where.processor}: {word(where.verdict)}, {where.why}"
    said = f"{percent(where.clean_accuracy.value)} clean, {percent(where.robust_accuracy.value)} robust"
    line = f"on {where.processor} ({where.runtime}): {word(where.verdict)}, {said}"
    if where.processor == NATIVE:
        return line
    exact = where.max_abs_difference == 0
    away = "bit for bit" if exact else f"scores within {where.max_abs_difference:.2g}"
    return f"{line}; decides as native on {percent(where.agreement)} of {where.images or 0:,} images, {away}"


def look(plan: Planned) -> str:
    """Which of the planned looks the figures are of."""
    samples = f"{plan.samples[plan.look - 1]:,} of at most {plan.samples[-1]:,} samples"
    end = "its intervals decide" if plan.decided else "no sample is left"
    return f"look {plan.look} of {plan.looks}, at {samples}: {end}, made with {plan.boundary:.2f} standard errors"


def since(versus: Versus) -> str:
    """How the file stands against that of an earlier release."""
    return (
        f"against {name(versus.name)} of the baseline (sha256 {name(versus.sha256)[:12]}, edgekit "
        f"{name(versus.edgekit)}): robust {signed(versus.robust)}, clean {signed(versus.clean)} points; "
        f"{versus.robust.only_baseline} withstood only there, {versus.robust.only_artifact} only here "
        f"(McNemar p {p_value(versus.robust)}): {word(versus.verdict)}"
    )


def closing(verdict: Verdict, where: str = "above") -> str:
    """The run's verdict as a sentence without its word; `where` the reasons stand, seen from there."""
    named = [one.name for one in verdict.artifacts if one.verdict == verdict.verdict]
    those = f"{', '.join(map(name, named))}: " if len(named) < len(verdict.artifacts) else ""
    files = "all files" if len(verdict.artifacts) > 1 else "the file"
    said = {
        "survived": f"robustness survived in {files} (asked: {asked(verdict)}), on what is named {where} as judge.",
        "measured": f"{those}measured, and held against nothing; --at-least P would make it a verdict.",
        "lost": f"{those}falls short of what was asked ({asked(verdict)}). Do not ship it.",
        "inconclusive": (
            f"{those}neither survival nor loss is shown (asked: {asked(verdict)}); the reason stands {where}. "
            "It does not mean that robustness was lost. Where the interval is too wide, only a larger sample, "
            "fixed before looking, can decide; repeating this run cannot."
        ),
        "not_run": f"{those}could not run here and is not judged; the reason stands {where}.",
    }
    return said[verdict.verdict]


def asked(verdict: Verdict) -> str:
    """What the files were held against, as the options said it."""
    robust, clean = points(verdict.tolerance), points(verdict.clean_tolerance)
    said = []
    if any(one.change for one in verdict.artifacts):
        said.append(f"at most {robust} of robust and {clean} of clean accuracy lost")
    if any(one.baseline for one in verdict.artifacts):
        said.append("the same against the baseline" if said else f"at most {robust} robust, {clean} clean lost since")
    if verdict.at_least is not None:
        said.append(f"at least {100 * verdict.at_least:.4g} % robust")
    return ", ".join(said) or "nothing"
