"""A small int8 file whose pair sums clip where they are made in 16 bits, and the processors that are set up here."""

from pathlib import Path

import numpy
import onnx
import pytest
from graphs import save
from onnx.helper import make_node

from edgekit import processors

# As it was before the tests got a cache of their own: `make processors` filled that one.
HOME = processors._home()


def emulated(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let this test use processors that are set up on this machine, or skip it."""
    monkeypatch.setattr(processors, "_home", lambda: HOME)
    if missing := [name for name in names if not processors.ready(name)]:
        pytest.skip(f"{', '.join(missing)} not set up here: make processors NAMES='{' '.join(missing)}'")


def saturating(path: Path, largest: int = 127) -> Path:
    """Convolution and linear layer between DequantizeLinear and QuantizeLinear, 10 scores; weights up to `largest`."""
    draw = numpy.random.default_rng(0)
    unsigned, signed = numpy.array(0, "uint8"), numpy.array(0, "int8")
    nodes = [
        make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
        make_node("DequantizeLinear", ["kernel", "sk", "zk"], ["kd"]),
        make_node("Conv", ["xd", "kd"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        make_node("QuantizeLinear", ["c", "sc", "zx"], ["cq"]),
        make_node("DequantizeLinear", ["cq", "sc", "zx"], ["cd"]),
        make_node("Flatten", ["cd"], ["f"]),
        make_node("QuantizeLinear", ["f", "sc", "zx"], ["fq"]),
        make_node("DequantizeLinear", ["fq", "sc", "zx"], ["fd"]),
        make_node("DequantizeLinear", ["weights", "sw", "zw"], ["wd"]),
        make_node("MatMul", ["fd", "wd"], ["m"]),
        make_node("QuantizeLinear", ["m", "sy", "zy"], ["yq"]),
        make_node("DequantizeLinear", ["yq", "sy", "zy"], ["y"]),
    ]
    save(
        path,
        nodes,
        sx=numpy.array(1 / 255, "float32"),
        sw=numpy.array(1 / 127, "float32"),
        sc=numpy.array(0.04, "float32"),
        sy=numpy.array(0.5, "float32"),
        zx=unsigned,
        zw=signed,
        sk=numpy.array(1 / 127, "float32"),  # of their own: the precise arithmetic takes no weights that share them
        zk=signed,
        zy=numpy.array(128, "uint8"),
        kernel=draw.integers(-largest, largest + 1, (16, 3, 3, 3)).astype("int8"),
        weights=draw.integers(-largest, largest + 1, (256, 10)).astype("int8"),
    )
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_param = "n"  # the checker asks for a shape
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 10
    onnx.save(model, path)
    return path
