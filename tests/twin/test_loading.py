"""What the runtime changes as it loads a file, and so does the twin: float weights between grids, signed averages."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from onnx import NodeProto, helper
from onnxfiles import draw, runtime, save

from edgekit import twin

node = helper.make_node
HELD = {
    "step": numpy.float32(4 / 255), "zero": numpy.uint8(128), "coarse": numpy.float32(0.05), "middle": numpy.uint8(120),
    "weight": draw(6, 4, 3, 3) + 0.3, "matrix": draw(256, 6) / 8 - 0.02, "across": draw(4, 6, 2, 2) + 0.1,
    "bias": draw(6, seed=1), "low": numpy.float32(0), "high": numpy.float32(1.5),
    "shape": numpy.array([0, -1]), "lowest": numpy.float32(numpy.finfo(numpy.float32).min),
}  # fmt: skip
CONV = [node("Conv", ["real", "weight", "bias"], ["made"])]
GEMM = node("Gemm", ["flat", "matrix", "bias"], ["made"])
RELU6 = [node("Clip", ["made", "low", "high"], ["clipped"])]
# name -> the nodes between DequantizeLinear's output "real" and QuantizeLinear's input, whether weights are rounded
CASES: dict[str, tuple[list[NodeProto], bool]] = {
    "conv": (CONV, True),
    "conv without bias": ([node("Conv", ["real", "weight"], ["made"], strides=[2, 2])], True),
    "conv, clip": (CONV + RELU6, True),
    "conv, relu": ([*CONV, node("Relu", ["made"], ["positive"])], True),
    "transposed before and after": (
        [
            node("Transpose", ["real"], ["turned"], perm=[0, 1, 3, 2]), node("Conv", ["turned", "weight"], ["made"]),
            node("Transpose", ["made"], ["back"], perm=[0, 2, 3, 1]),
        ],
        True,
    ),
    "product": ([node("Reshape", ["real", "shape"], ["flat"]), GEMM], True),
    "flattened": ([node("Flatten", ["real"], ["flat"]), GEMM], False),
    "transposed conv": ([node("ConvTranspose", ["real", "across", "bias"], ["made"], strides=[2, 2])], True),
    "another operator between": ([*CONV, node("Max", ["made", "lowest"], ["largest"])], False),
    "read twice": ([*CONV, node("Sigmoid", ["made"], ["gate"]), node("Mul", ["made", "gate"], ["product"])], False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_float_weights_are_rounded_where_the_runtime_rounds_them(tmp_path: Path, name: str) -> None:
    between, rounded = CASES[name]
    used = {entry for one in between for entry in one.input} | {"step", "zero", "coarse", "middle"}
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["integers"]),
        node("DequantizeLinear", ["integers", "step", "zero"], ["real"]),
        *between,
        node("QuantizeLinear", [between[-1].output[0], "coarse", "middle"], ["rounded"]),
        node("DequantizeLinear", ["rounded", "coarse", "middle"], ["y"]),
    ]
    held: dict[str, Any] = {key: value for key, value in HELD.items() if key in used}
    path = save(tmp_path / "it.onnx", nodes, held, shape=(3, 4, 8, 8), opset=13)
    images = torch.from_numpy(draw(3, 4, 8, 8, seed=7))
    copy, theirs = twin.open(path), runtime(path, images)
    made = [name for name in copy.constants if name.endswith("/rounded")]
    assert bool(made) is rounded
    # A last bit of a float kernel may move one value in a thousand by one step of the grid.
    assert copy(images).isclose(theirs, atol=1e-6).float().mean() > 0.998


def test_weights_that_are_integers_stay_and_their_bias_is_rounded(tmp_path: Path) -> None:
    scale = numpy.abs(HELD["weight"]).max((1, 2, 3)) / 127
    held = {key: HELD[key] for key in ("step", "zero", "coarse", "middle", "bias")}
    held |= {"fine": scale, "none": numpy.zeros(6, numpy.int8)}
    held["eight"] = (HELD["weight"] / scale.reshape(-1, 1, 1, 1)).round().astype(numpy.int8)
    held["bias"] = 0.4 * numpy.float32(4 / 255) * scale  # less than half a step of the sums: nothing is left of it
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["integers"]),
        node("DequantizeLinear", ["integers", "step", "zero"], ["real"]),
        node("DequantizeLinear", ["eight", "fine", "none"], ["weight"], axis=0),
        node("Conv", ["real", "weight", "bias"], ["made"]),
        node("QuantizeLinear", ["made", "coarse", "middle"], ["rounded"]),
        node("DequantizeLinear", ["rounded", "coarse", "middle"], ["y"]),
    ]
    path = save(tmp_path / "it.onnx", nodes, held, shape=(3, 4, 8, 8), opset=13)
    images = torch.from_numpy(draw(3, 4, 8, 8, seed=7))
    copy = twin.open(path)
    assert copy(images).equal(runtime(path, images))
    (grid,) = (value for name, value in copy.constants.items() if "bias" in name and name.endswith("rounded"))
    assert grid.centred.count_nonzero() == 0  # pyright: ignore[reportAttributeAccessIssue]


def grids(value: str, made: str, step: str = "step", zero: str = "zero") -> list[NodeProto]:
    """QuantizeLinear and DequantizeLinear of `value`."""
    return [
        node("QuantizeLinear", [value, step, zero], [f"{made}/integers"]),
        node("DequantizeLinear", [f"{made}/integers", step, zero], [made]),
    ]


TURNED = [
    node("QuantizeLinear", ["mean", "other", "middle"], ["integers"]),
    node("Transpose", ["integers"], ["turned"], perm=[0, 2, 3, 1]),
    node("DequantizeLinear", ["turned", "other", "middle"], ["y"]),
]
# name -> what reads the pool's input "real" and its output "mean"; whether signed pools are run on integers there
AVERAGES: dict[str, tuple[list[NodeProto], bool]] = {
    "alone": (grids("mean", "y", "other", "middle"), True),
    "input read twice": (
        [
            *grids("mean", "back", "other", "middle"), node("GlobalMaxPool", ["real"], ["largest"]),
            node("Add", ["back", "largest"], ["y"]),
        ],
        False,
    ),
    "both read twice": (
        [
            *grids("mean", "back", "other", "middle"), node("GlobalMaxPool", ["real"], ["largest"]),
            node("Add", ["back", "largest"], ["sum"]), node("GlobalMaxPool", ["back"], ["other largest"]),
            node("Add", ["sum", "other largest"], ["y"]),
        ],
        True,
    ),
    "integers turned": (TURNED, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", [numpy.int8, numpy.uint8])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_round_as_in_the_runtime(tmp_path: Path, name: str, kind: type) -> None:
    readers, fused = AVERAGES[name]
    held: dict[str, Any] = {"step": numpy.float32(0.05), "other": numpy.float32(0.04)}
    held |= {"zero": kind(3), "middle": kind(4)}
    pads = [0, 0, 1, 1] if fused or kind is numpy.uint8 else [0, 0, 0, 0]  # on floats a padded mean has other last bits
    pool = node("AveragePool", ["real"], ["mean"], kernel_shape=[4, 4], strides=[4, 4], pads=pads)
    path = save(tmp_path / "it.onnx", [*grids("x", "real"), pool, *readers], held, shape=("n", 4, 16, 16), opset=13)
    images = torch.from_numpy(2 * draw(8, 4, 16, 16))
    copy = twin.open(path)
    (marked,) = [step.attributes["fused"] for step in copy.steps if step.type == "AveragePool"]
    assert marked is (fused or kind is numpy.uint8)
    assert copy(images).isclose(runtime(path, images), atol=1e-6).all()


@pytest.mark.parametrize("transformation", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize("factor", [2.0, 1.5, 0.75])
def test_bilinear_integers_round_as_in_the_runtime(tmp_path: Path, transformation: str, factor: float) -> None:
    held: dict[str, Any] = {"step": numpy.float32(0.05), "zero": numpy.int8(3), "none": numpy.zeros(0, numpy.float32)}
    held["factors"] = numpy.array([1, 1, factor, factor], numpy.float32)
    resize = node(
        "Resize", ["real", "none", "factors"], ["large"], mode="linear", coordinate_transformation_mode=transformation
    )
    path = save(
        tmp_path / "it.onnx", [*grids("x", "real"), resize, *grids("large", "y")], held, shape=("n", 4, 8, 8), opset=13
    )
    images = torch.from_numpy(2 * draw(8, 4, 8, 8))
    assert twin.open(path)(images).isclose(runtime(path, images), atol=1e-6).all()
