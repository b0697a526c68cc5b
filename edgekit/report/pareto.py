"""What to ship, as one PNG: robust accuracy against latency and against size, the Pareto front marked (bench.json)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.files import writing
from edgekit.report import words

_FRONT, _BEHIND = "#d62728", "#555555"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy with its interval against milliseconds and against kB.

    A file whose accuracy cannot be set beside the others' is hollow; one with none is an upright line at its cost.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = document["artifacts"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    costs = {
        "latency": ("ms for one image, fastest number of threads", [1000 * one["fastest"]["median"] for one in files]),
        "size": ("kB", [one["bytes"] / 1000 for one in files]),
    }
    for panel, (kind, (unit, values)) in zip(panels, costs.items(), strict=True):
        _panel(panel, kind, values, files)
        panel.set(title=f"robust accuracy against {kind}", xlabel=unit, xlim=(0, 1.15 * max(values)))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=f"robust accuracy, % ({_under(document)})")
    figure.suptitle(f"{document['machine']['cpu']}; red: nothing is both cheaper and more robust", fontsize=9)
    with writing(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def _panel(panel: Any, kind: str, values: Sequence[float], files: Sequence[Mapping[str, Any]]) -> None:
    best, right = [], max(values)
    for cost, one in zip(values, files, strict=True):
        name = _text(one["name"])
        accuracy = one.get("robust_accuracy")
        if accuracy is None:
            panel.axvline(cost, color=_BEHIND, linewidth=0.8, linestyle=":")
            _label(panel, f"{name}, not verified", (cost, 0.02), "left", panel.get_xaxis_transform(), rotation=90)
            continue
        height, on = 100 * accuracy["value"], kind in one["front"]
        colour = _FRONT if on else _BEHIND
        reach = [[100 * abs(accuracy["value"] - accuracy[end])] for end in ("low", "high")]
        filled = colour if one["judged"]["comparable"] else "white"
        panel.errorbar(cost, height, yerr=reach, fmt="o", color=colour, mfc=filled, linewidth=0.8, capsize=2)
        why = None if one["judged"]["comparable"] else _text(one["judged"]["why"])
        # Away from the edge that the point is near: a name outside of the panel would be cut off.
        side = "right" if cost > 0.6 * right else "left"
        _label(panel, name if why is None else f"{name}, {why}", (cost, height), side, panel.transData)
        best += [(cost, height)] * on
    best.sort()
    # Between two of the front the better one has to be paid for in full: a stair, no slope.
    panel.step(*zip(*best, strict=True), where="post", color=_FRONT, linewidth=1) if best else None


def _label(panel: Any, text: str, spot: tuple[float, float], side: str, coordinates: Any, **more: Any) -> None:
    aside = (-5 if side == "right" else 5, 4)
    drawn = panel.annotate(
        text, spot, aside, xycoords=coordinates, textcoords="offset points", fontsize=7, ha=side, **more
    )
    drawn.set_in_layout(False)  # a long name takes no room from the panel


def _text(name: object) -> str:
    return words.name(name, 40).replace("$", r"\$")  # dollars would set it as a formula


def _under(document: Mapping[str, Any]) -> str:
    """Such as "pgd20, Linf 8/255"; what no file was judged under is nothing."""
    judged = document.get("judged_under")
    if judged is None:
        return "nothing is verified yet"
    return f"{_text(', '.join(judged['attacks']))}; {judged['norm']} {words.level(judged['epsilon'], judged['norm'])}"
