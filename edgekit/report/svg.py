"""The page's charts as inline SVG; colours are classes, which the page's CSS sets for light and dark."""

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from edgekit.report.words import plain

SERIES = 6  # colours that the page has; further lines repeat them dashed

# A chart is as wide as a phone's column, so that its letters are never shrunk below what can be read.
_WIDTH, _HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 22, 10, 42


def lines(
    series: Sequence[tuple[str, Mapping[float, float]]],
    *,
    label: str,
    ticks: Mapping[float, str],
    mark: float | None = None,
    title: str,
) -> Markup:
    """Accuracies (fractions) against a number, one line for each series.

    Args:
        series: (CSS classes, {x: accuracy}).
        label: below the x axis.
        ticks: where the x axis is labelled, and how.
        mark: an x that is marked by a vertical line.
        title: what a screen reader says.
    """
    points = [x for _, values in series for x in values]
    low, high = min(points), max(points)
    span = (high - low) or 1.0

    def across(x: float) -> float:
        return _LEFT + (x - low) / span * (_WIDTH - _LEFT - _RIGHT)

    def up(share: float) -> float:
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid(up)]
    parts += [_text(across(x), _HEIGHT - _BOTTOM + 16, said, "middle") for x, said in _apart(ticks, across)]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, label, "middle"))
    if mark is not None and low <= mark <= high:
        at = f"{across(mark):.1f}"
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{_TOP}" y2="{up(0):.1f}"/>')
    for kind, values in series:
        path = " ".join(f"{across(x):.1f},{up(values[x]):.1f}" for x in sorted(values))
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        parts += [
            f'<circle class="dot {kind}" cx="{across(x):.1f}" cy="{up(share):.1f}" r="2.8"/>'
            for x, share in values.items()
        ]
    return _svg(_WIDTH, _HEIGHT, title, parts)


def colour(place: int) -> str:
    """The CSS classes of the line at `place`."""
    return f"series-{place % SERIES}" + (" dashed" if place >= SERIES else "")


def interval(value: float, low: float, high: float, allowed: float, ends: tuple[float, float], title: str) -> Markup:
    """A change and its interval, all fractions, on an axis between `ends`; what lies beyond -allowed is shaded."""
    width, height, middle = 220, 26, 13.0

    def across(share: float) -> float:
        return 6 + (share - ends[0]) / (ends[1] - ends[0]) * (width - 12)

    def upright(kind: str, share: float, half: float) -> str:
        at = f"{across(share):.1f}"
        return f'<line class="{kind}" x1="{at}" x2="{at}" y1="{middle - half}" y2="{middle + half}"/>'

    parts = [
        f'<rect class="beyond" x="0" y="2" width="{across(-allowed):.1f}" height="{height - 4}"/>',
        upright("zero", 0, 11),
        upright("limit", -allowed, 11),
        f'<line class="whisker" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{middle}" y2="{middle}"/>',
        upright("whisker", low, 4),
        upright("whisker", high, 4),
        f'<circle class="value" cx="{across(value):.1f}" cy="{middle}" r="4"/>',
    ]
    return _svg(width, height, title, parts, "interval")


def stacked(counts: Sequence[tuple[str, int]], title: str) -> Markup:
    """A bar of parts, each (CSS class, count), in proportion."""
    width, height = 400, 14
    total, begin, parts = sum(count for _, count in counts) or 1, 0.0, []
    for kind, count in counts:
        length = width * count / total
        if count:
            parts.append(f'<rect class="{escape(kind)}" x="{begin:.2f}" y="0" width="{length:.2f}" height="{height}"/>')
        begin += length
    return _svg(width, height, title, parts, "stacked", stretch=True)


def pairs(rows: Sequence[tuple[str, float | None, float]], title: str) -> Markup:
    """Shares from 0 to 1, a lane for each (CSS classes, before, after): before is a ring, after a dot, joined."""
    width, lane = 200, 14

    def across(share: float) -> float:
        return 6 + share * (width - 12)

    parts = []
    for place, (kind, before, after) in enumerate(rows):
        y = lane * place + lane / 2 + 1
        parts.append(f'<line class="rail" x1="6" x2="{width - 6}" y1="{y}" y2="{y}"/>')
        if before is not None:
            ends = f'x1="{across(before):.1f}" x2="{across(after):.1f}"'
            parts.append(f'<line class="move {kind}" {ends} y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot {kind}" cx="{across(after):.1f}" cy="{y}" r="4"/>')
        if before is not None:
            parts.append(f'<circle class="ring" cx="{across(before):.1f}" cy="{y}" r="4.5"/>')
    return _svg(width, lane * len(rows) + 2, title, parts, "pairs")


def _apart(ticks: Mapping[float, str], across: Callable[[float], float]) -> list[tuple[float, str]]:
    """The ticks of which no label touches the one before."""
    kept: list[tuple[float, str]] = []
    for x, said in sorted(ticks.items()):
        if not kept or across(x) - across(kept[-1][0]) >= 4 * (len(said) + len(kept[-1][1])):
            kept.append((x, said))
    return kept


def _grid(up: Callable[[float], float]) -> str:
    rows = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = up(share)
        kind = "axis" if share == 0 else "grid"
        rows.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        rows.append(_text(_LEFT - 6, y + 4, f"{100 * share:g} %", "end"))
    return "".join(rows)


def _text(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(plain(said))}</text>'


def _svg(
    width: float, height: float, title: str, parts: Sequence[str], kind: str = "chart", *, stretch: bool = False
) -> Markup:
    aspect = ' preserveAspectRatio="none"' if stretch else ""
    said = escape(plain(title))
    box = f'class="{kind}" viewBox="0 0 {width} {height}"{aspect}'
    return Markup(f'<svg {box} role="img" aria-label="{said}">{"".join(parts)}</svg>')
