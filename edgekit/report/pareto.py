"""What to ship, as one PNG: robust accuracy against latency and against size, the Pareto front marked (bench.json)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.files import writing
from edgekit.report import words

_FRONT = "#d62728"  # and of no file
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_MARKS = "osD^vPX"  # one more for each file: two of the same size and accuracy are still told apart


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy with its interval against milliseconds and against kB.

    A file whose accuracy cannot be set beside the others' is hollow; one with none is an upright line at its cost.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = document["artifacts"]
    columns = min(3, len(files) + 1)
    height = 4.2 + 0.2 * -(-(len(files) + 1) // columns)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, height), layout="constrained", sharey=True)
    costs = {
        "latency": ("ms for one image, fastest number of threads", [1000 * one["fastest"]["median"] for one in files]),
        "size": ("kB", [one["bytes"] / 1000 for one in files]),
    }
    for panel, (kind, (unit, values)) in zip(panels, costs.items(), strict=True):
        for number, (cost, one) in enumerate(zip(values, files, strict=True)):
            _file(panel, cost, one, _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)])
        _front(panel, [spot for spot, one in zip(values, files, strict=True) if kind in one["front"]], files, kind)
        panel.set(title=f"robust accuracy against {kind}", xlabel=unit, xlim=(0, 1.1 * max(values)))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=f"robust accuracy, % ({_under(document)})")
    figure.suptitle(_text(document["machine"]["cpu"]), fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, ncols=columns, fontsize=8, loc="outside lower center")
    with writing(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def _file(panel: Any, cost: float, one: Mapping[str, Any], colour: str, mark: str) -> None:
    name, accuracy = _text(one["name"]), one.get("robust_accuracy")
    if accuracy is None:
        panel.axvline(cost, color=colour, linewidth=1, linestyle=":", label=f"{name}, not verified")
        return
    compared = one["judged"]["comparable"]
    panel.errorbar(
        cost,
        100 * accuracy["value"],
        yerr=[[100 * abs(accuracy["value"] - accuracy[end])] for end in ("low", "high")],
        fmt=mark,
        color=colour,
        mfc=colour if compared else "white",
        linewidth=0.8,
        capsize=2,
        label=name if compared else f"{name}, {_text(one['judged']['why'])}",
    )


def _front(panel: Any, costs: list[float], files: list[Mapping[str, Any]], kind: str) -> None:
    """A ring around each file of the front, and a stair through them: between two of them nothing is to be had."""
    if not costs:
        return
    heights = [100 * one["robust_accuracy"]["value"] for one in files if kind in one["front"]]
    across, up = zip(*sorted(zip(costs, heights, strict=True)), strict=True)
    panel.step(across, up, where="post", color=_FRONT, linewidth=1)
    panel.plot(across, up, "o", mfc="none", mec=_FRONT, ms=13, label="Pareto front: none is cheaper and more robust")


def _text(name: object) -> str:
    shown = words.name(name, 40).replace("$", r"\$")  # dollars would set it as a formula
    return f" {shown}" if shown.startswith("_") else shown  # which a legend leaves out


def _under(document: Mapping[str, Any]) -> str:
    """Such as "pgd20; Linf 8/255"; what no file was judged under is nothing."""
    judged = document.get("judged_under")
    if judged is None:
        return "nothing is verified yet"
    return f"{_text(', '.join(judged['attacks']))}; {judged['norm']} {words.level(judged['epsilon'], judged['norm'])}"
