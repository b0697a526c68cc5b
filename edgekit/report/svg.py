"""The page's charts as inline SVG; colours are classes, which the page's CSS sets for light and dark."""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from edgekit.report.words import plain

SERIES = 6  # colours that the page has; further lines repeat them dashed

# A chart is as wide as a phone's column, so that its letters are never shrunk below what can be read.
_WIDTH, _HEIGHT = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 12, 40


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


def interval(value: float, low: float, high: float, allowed: float, reach: float, title: str) -> Markup:
    """A change and its interval on an axis from -reach to reach, all fractions; what lies beyond -allowed is shaded."""
    width, height, middle = 220, 26, 13.0

    def across(share: float) -> float:
        return 4 + (min(max(share, -reach), reach) + reach) / (2 * reach) * (width - 8)

    parts = [
        f'<rect class="beyond" x="4" y="2" width="{across(-allowed) - 4:.1f}" height="{height - 4}"/>',
        f'<line class="zero" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="2" y2="{height - 2}"/>',
        f'<line class="limit" x1="{across(-allowed):.1f}" x2="{across(-allowed):.1f}" y1="2" y2="{height - 2}"/>',
        f'<line class="whisker" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{middle}" y2="{middle}"/>',
        *(
            f'<line class="whisker" x1="{across(end):.1f}" x2="{across(end):.1f}" y1="{middle - 4}" y2="{middle + 4}"/>'
            for end in (low, high)
        ),
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


def pair(first: float | None, second: float, title: str) -> Markup:
    """Two shares on an axis from 0 to 1, joined: the float student's as a ring, the file's as a dot."""
    width, height, middle = 200, 16, 8.0

    def across(share: float) -> float:
        return 6 + share * (width - 12)

    parts = [f'<line class="axis" x1="6" x2="{width - 6}" y1="{middle}" y2="{middle}"/>']
    if first is not None:
        kind = "fall" if second < first else "rise"
        parts.append(f'<line class="{kind}" x1="{across(first):.1f}" x2="{across(second):.1f}" y1="8" y2="8"/>')
    parts.append(f'<circle class="value" cx="{across(second):.1f}" cy="{middle}" r="4"/>')
    if first is not None:
        parts.append(f'<circle class="ring" cx="{across(first):.1f}" cy="{middle}" r="4.5"/>')
    return _svg(width, height, title, parts, "pair")


def reach(ends: Sequence[float]) -> float:
    """A round half-width, in fractions, of an axis that holds all `ends`."""
    largest = max((abs(end) for end in ends), default=0.0)
    steps = (0.02, 0.05, 0.1, 0.2, 0.5)
    return next((step for step in steps if largest <= step), 1.0)


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most about `most` round numbers from low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]


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
