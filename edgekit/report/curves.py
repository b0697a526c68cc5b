"""The curves of a training run, as one PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.files import writing


def draw(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and validation accuracies against epochs, from the lines of log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [line["epoch"] for line in log]
    left.plot(epochs, [line["loss"] for line in log], color="#555555")
    left.set(title="training loss", xlabel="epoch")
    judged = [line for line in log if "robust_accuracy" in line]
    for key, colour in (("clean_accuracy", "#1f77b4"), ("robust_accuracy", "#d62728")):
        right.plot(
            [line["epoch"] for line in judged],
            [100 * line[key] for line in judged],
            color=colour,
            label=key.replace("_", " "),
        )
    right.set(title="validation", xlabel="epoch", ylabel="%", ylim=(0, 100))
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    with writing(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)
