"""The table and the plot of sensitivity.json, and the table of tries."""

from pathlib import Path

from PIL import Image
from rich.console import Console

from edgekit.report import layers, tries

HOSTILE = "[red]a[/red]\x1b[2J$x_{1}$\n"
CHANGE = {"value": -0.0123, "low": -0.02, "high": 0.001, "p_value": 0.1, "only_float": 4, "only_artifact": 1}


def cost(name: str, error: float) -> dict:
    return {"name": name, "logit_error": error, "agreement": 0.985, "clean": CHANGE, "robust": CHANGE}


def document(count: int) -> dict:
    return {
        "attack": "pgd10",
        "epsilon": 8 / 255,
        "images": 256,
        "split": "validation",
        "logit_spread": 1.5,
        "together": cost("all layers", 0.5),
        "layers": [cost(HOSTILE, 0.4), *(cost(f"layer.{number}", 0.3 / (1 + number)) for number in range(count))],
    }


def shown(table: object) -> str:
    console = Console(width=160, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_holds_the_most_sensitive_and_all_together():
    text = shown(layers.to_table(document(12)))
    assert "\x1b" not in text and "[red]a[/red]" in text
    assert "layer.8" in text and "layer.9" not in text
    line = next(line for line in text.splitlines() if "all layers" in line)
    assert "0.5000" in line and "98.5 %" in line and "-1.2 [-2.0, +0.1]" in line
    assert layers.note(document(12)).startswith("10 of 13 layers")


def test_the_plot_is_drawn_for_one_layer_and_for_many(tmp_path: Path):
    heights = []
    for count in (0, 20, 90):
        layers.draw(document(count), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert image.format == "PNG"
            heights.append(image.height)
    assert heights[0] < heights[1] < heights[2] < 1200
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_tries_say_which_was_kept_and_why():
    one = {"bytes": 912_345, "speed": {"1": 1.5, "32": 2.25}, "change": CHANGE}
    record = {
        "allowed": 0.005,
        "held": True,
        "kept": "2 layers in float",
        "attacks": ["pgd20"],
        "images": 1000,
        "split": "validation",
        "tries": [one | {"name": HOSTILE, "held": False}, one | {"name": "2 layers in float", "held": True}],
    }
    text = shown(tries.to_table(record))
    assert "\x1b" not in text and "[red]a[/red]" in text
    lines = [line for line in text.splitlines() if "912" in line]
    assert "x fp32 at 1 / 32" in text and "1.50 / 2.25 " in lines[0] and lines[0].rstrip().endswith("missed")
    assert lines[1].rstrip().endswith("held, kept")
    assert "at most 0.5 points on 1,000 validation images" in tries.closing(record)
    assert tries.closing(record | {"held": False}).startswith("No try")
