"""Run folders with small files and verdicts in them, made in milliseconds: no training, no exporter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from graphs import convolutional, save

from edgekit import verdict
from edgekit.files import sha256
from edgekit.verdict import Check, Data, Machine, Place, Rules

SHAPE = [None, 3, 8, 8]


def run(folder: Path, *names: str) -> Path:
    """A finished run with artifacts of these names, <format>-<precision>…, each of other weights."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    (folder / "recipe.toml").write_text("")
    (folder / "student.safetensors").write_bytes(b"")
    for number, name in enumerate(names):
        artifact(folder / "artifacts" / name, number)
    return folder


def artifact(folder: Path, number: int = 0) -> Path:
    """One artifact folder; `number` makes its file another one."""
    format, precision = folder.name.split("-")[:2]
    folder.mkdir(parents=True)
    if format == "onnx":
        path = convolutional(folder / "model.onnx")
        with path.open("ab") as file:
            file.write(bytes([0x32, 1 + number, *b"edgekit"[: 1 + number]]))  # a doc string: field 6 of the model
    else:
        path = folder / "model.pt"
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        torch.jit.freeze(torch.jit.trace(network.eval(), torch.zeros(2, 3, 8, 8))).save(str(path))
    record = {
        "format": format,
        "precision": precision,
        "files": [{"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}],
        "input": {"shape": SHAPE, "layout": "NCHW"},
    }
    (folder / "artifact.json").write_text(json.dumps(record))
    return folder


def plain(path: Path, nodes: Sequence[onnx.NodeProto] = (), *, sized: bool = True, **more: Any) -> Path:
    """An ONNX file of no run, by default a convolutional one; its output has the shape that a checker asks for.

    Args:
        sized: its input says how large the images are.
    """
    made = save(path, list(nodes), **more) if nodes else convolutional(path)
    model = onnx.load(made)
    if not sized:
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    for name in ("n", "k"):
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_param = name
    onnx.save(model, made)
    return made


def place(processor: str) -> Place:
    return Place(processor=processor, runtime="a runtime", verdict="survived", why="because")


def judge(
    verdicts: Path,
    path: Path,
    robust: int,
    *,
    of: int = 200,
    attacks: Sequence[str] = ("pgd20",),
    epsilon: float = 8 / 255,
    data: str = "1",
    grid: bool = False,
    on: Sequence[str] = (),
    seed: int = 0,
    passed: bool = True,
) -> Path:
    """The next verdict in the folder, on the file at `path`: `robust` of `of` samples."""
    right = numpy.arange(of) < robust
    one = verdict.judged(
        Rules(),
        numpy.ones(of, bool),
        right,
        name=path.parent.name,
        format="onnx",
        precision="int8",
        file=path.name,
        bytes=path.stat().st_size,
        sha256=sha256(path),
        attacks=[],
        judged_on=tuple(map(place, on)) or "here",
        checks=[Check("steps_increase_loss", passed, 1.0, "because")],
    )
    document = verdict.summarize(
        Rules(),
        [one],
        attacks=list(attacks),
        norm="Linf",
        epsilon=epsilon,
        samples=of,
        seed=seed,
        grid=grid,
        data=Data("photos", "test", data * 64),
        machine=Machine("a cpu", "avx512_vnni", {}),
        float_student=None,
    )
    folder = verdicts / str(1 + len(list(verdicts.glob("*"))))
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text(json.dumps(verdict.to_dict(document)))
    return folder / "verdict.json"
