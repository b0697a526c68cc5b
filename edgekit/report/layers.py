"""What quantizing each layer alone costs, as a table and as one PNG; made from the document in sensitivity.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from edgekit.files import writing
from edgekit.report import listing, words
from edgekit.verdict import Change

FILE = "sensitivity.json"
SHOWN = 10  # rows of the table
DRAWN = 40  # bars of the plot: of deeper networks the most sensitive


def to_table(document: Mapping[str, Any]) -> Table:
    """The most sensitive layers, and below them all layers at once."""
    header = ("in int8 alone", "logit error", "agreement", "clean, points", "robust, points")
    costs = [*document["layers"][:SHOWN], document["together"]]
    return listing.to_table(header, [_row(cost) for cost in costs])


def _row(cost: Mapping[str, Any]) -> tuple[str, ...]:
    changes = (words.signed(Change(**cost[key])) for key in ("clean", "robust"))
    return words.name(cost["name"], 48), f"{cost['logit_error']:.4f}", words.percent(cost["agreement"]), *changes


def note(document: Mapping[str, Any]) -> str:
    """What the figures rest on."""
    return (
        f"{min(SHOWN, len(document['layers']))} of {len(document['layers'])} layers, the most sensitive first, on "
        f"{document['images']} {document['split']} images; the logits' standard deviation is "
        f"{document['logit_spread']:.2f}; {document['attack']} on the float student, every iterate judged by the file"
    )


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Each layer's logit error as a bar, and beside it what it costs in robust accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = document["layers"][:DRAWN]
    places = range(len(costs))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 1.6 + 0.17 * len(costs)), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    left.barh(places, [cost["logit_error"] for cost in costs], color="#555555")
    names = [words.name(cost["name"], 40).replace("$", r"\$") for cost in costs]  # dollars would set it as a formula
    left.set_yticks(places, names, fontsize=7)
    left.set(title="one layer alone in int8", xlabel="mean logit error", ylim=(len(costs) - 0.4, -0.6))
    for key, colour, shift in (("clean", "#1f77b4", -0.15), ("robust", "#d62728", 0.15)):
        values = [100 * cost[key]["value"] for cost in costs]
        reach = [[100 * abs(cost[key]["value"] - cost[key][end]) for cost in costs] for end in ("low", "high")]
        spots = [place + shift for place in places]
        right.errorbar(values, spots, xerr=reach, fmt="o", color=colour, markersize=3, linewidth=0.8, label=key)
    right.axvline(0, color="#555555", linewidth=0.8)
    title = f"{document['images']} {document['split']} images"
    right.set(title=title, xlabel="change of accuracy, points (95 %)")
    figure.legend(frameon=False, ncols=2, loc="outside lower right")  # inside it would cover intervals
    right.grid(alpha=0.3)
    with writing(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)
