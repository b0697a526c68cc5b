"""The tables and the picture of bench.json."""

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
from documents import HOSTILE
from PIL import Image
from rich.console import Console

from edgekit.report import bench, pareto


def measured(name: str, size: int, latency: float, robust: float | None, *front: str, **judged: Any) -> dict[str, Any]:
    cells = [
        {"threads": threads, "batch": batch, "rounds": 200, "median": seconds, "p90": 1.5 * seconds, "p99": 3 * seconds}
        | {"images_per_second": batch / seconds}
        for threads in (1, 2)
        for batch, seconds in ((1, latency / threads), (32, 20 * latency / threads))
    ]
    one: dict[str, Any] = {
        "name": name,
        "format": "onnx",
        "precision": "int8",
        "run": "runs/a",
        "file": f"artifacts/{name}/model.onnx",
        "bytes": size,
        "operators": {"int8": 67, "float": {"Div": 1, "Sub": 2}},
        "latency": cells,
        "fastest": {"threads": 2, "median": latency / 2},
        "cold_start": {"seconds": 0.0325, "threads": 2},
        "peak_memory": [{"batch": 1, "bytes": 13_537_280}, {"batch": 32, "bytes": 15_974_400}],
        "front": list(front),
    }
    if robust is not None:
        one["robust_accuracy"] = {"value": robust, "low": robust - 0.03, "high": robust + 0.03}
        one["judged"] = {"attacks": ["pgd20"], "norm": "Linf", "epsilon": 8 / 255, "comparable": True} | judged
        one["judged"]["file"] = "runs/a/verdicts/1/verdict.json"
    return one


def document(*files: dict[str, Any], judged: bool = True) -> dict[str, Any]:
    machine = {"cpu": "a cpu", "int8_instructions": "avx512_vnni", "runtimes": {"onnxruntime": "1.32.0"}, "cores": 2}
    under = {"judged_under": {"attacks": ["pgd20"], "norm": "Linf", "epsilon": 8 / 255}} if judged else {}
    return {"machine": machine, "batches": [1, 32], "threads": [1, 2], "cold_starts": 5, "artifacts": [*files]} | under


FULL = measured("onnx-fp32", 2_796_000, 0.0015, 0.327, "latency")
SMALL = measured("onnx-int8", 751_072, 0.0012, 0.315, "latency", "size")
OTHER = measured("onnx-int8-x", 751_000, 0.0011, 0.9, comparable=False, why="other attacks", attacks=["fgsm"])
BARE = measured("torchscript-fp32", 2_800_000, 0.002, None)


def shown(table: object, width: int = 100) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_tables_say_what_was_measured_and_what_is_on_the_front():
    text = shown(bench.to_table(document(FULL, SMALL, OTHER, BARE)))
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("onnx-int8 "))
    assert "1.20 / 1.80 / 3.60" in lines[first] and "24.0 / 36.0 / 72.0" in lines[first]
    assert lines[first].rstrip().endswith("1,333")  # 32 images in 24 ms
    assert "0.60 / 0.90 / 1.80" in lines[first + 1] and not lines[first + 1].startswith("onnx")
    about = next(place for place, line in enumerate(lines) if line.startswith("onnx-int8 ") and place > first)
    for fact in ("751", "32.5", "13.5", "67 / 3", "31.5 %", "latency"):
        assert fact in lines[about]
    assert "[28.5, 34.5]" in lines[about + 1] and "size" in lines[about + 1]
    assert "other attacks" in text and "not verified" in text
    assert "pgd20 within Linf 8/255" in text and "200 rounds" in text


def test_the_tables_fit_into_eighty_columns():
    assert max(map(len, shown(bench.to_table(document(FULL, SMALL, OTHER, BARE)), 80).splitlines())) <= 80
    assert "1.20 / 1.80 / 3.60" in shown(bench.to_table(document(SMALL)), 80)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_no_name_styles_the_terminal_or_breaks_the_picture(name: str, tmp_path: Path):
    one, other = copy.deepcopy(SMALL), copy.deepcopy(BARE)
    one["name"] = other["name"] = one["judged"]["why"] = f"$x_{{1}}$[red]{name}[/red]"
    one["judged"]["comparable"] = False
    text = shown(bench.to_table(document(one, other)))
    assert "\x1b" not in text and "[red]" in text.replace("\n", "")
    pareto.draw(document(one, other), tmp_path / "a.png")


def test_the_next_step_is_to_judge_what_was_not_judged_alike_and_else_to_ship():
    assert bench.closing(document(FULL, SMALL, BARE)) == "Next: edgekit verify runs/a --attack pgd20"
    assert bench.closing(document(FULL, OTHER)) == "Next: edgekit verify runs/a --attack pgd20"
    assert bench.closing(document(BARE, judged=False)) == "Next: edgekit verify runs/a"
    elsewhere = SMALL | {"run": "my runs/b"}
    said = bench.closing(document(FULL, elsewhere, BARE | {"run": "my runs/b"}))
    assert said == "Next: edgekit verify 'my runs/b/artifacts/torchscript-fp32' --attack pgd20"
    said = bench.closing(document(FULL, SMALL))
    assert said == "Next: ship one of the Pareto front: runs/a/artifacts/onnx-fp32, runs/a/artifacts/onnx-int8"
    alone = {key: value for key, value in BARE.items() if key != "run"} | {"file": "plain.onnx"}
    assert bench.closing(document(alone, judged=False)) == "Next: edgekit verify plain.onnx --data FOLDER"
    failed = measured("x", 1, 1.0, 0.5, comparable=False, why="the check a failed")
    assert bench.closing(document(failed)) == "Next: see which check failed, in runs/a/verdicts/1/verdict.json"


def red(path: Path) -> int:
    """Pixels of the colour in which the front is drawn."""
    with Image.open(path) as image:
        pixels = numpy.asarray(image.convert("RGB")).astype(int)
    return int((abs(pixels - (0xD6, 0x27, 0x28)).sum(2) < 12).sum())


def test_the_picture_marks_the_front_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.png"
    behind = [one | {"front": []} for one in (FULL, SMALL, OTHER, BARE)]
    pareto.draw(document(*behind), path)
    assert red(path) == 0
    pareto.draw(document(FULL, SMALL, OTHER, BARE), path)
    many = red(path)
    pareto.draw(document(FULL | {"front": []}, SMALL, OTHER, BARE), path)
    assert many > red(path) > 0
    pareto.draw(document(BARE, judged=False), path)
    assert red(path) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]
