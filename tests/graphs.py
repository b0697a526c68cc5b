"""Small ONNX files, made node by node: no exporter, and so no wait for one."""

from pathlib import Path

import numpy
import onnx
from onnx import TensorProto
from onnx.helper import make_node


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    batch: int | str = "n",
    type: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    **constants: numpy.ndarray,
) -> Path:
    """A graph from "x" (batch, 3, 8, 8) to the outputs, with the named constants."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", type, [batch, 3, 8, 8])],
        [value(name, type, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def convolutional(path: Path, **more: int | str) -> Path:
    """Convolution, rectification, a linear layer with 10 outputs; the weights are random and always the same."""
    draw = numpy.random.default_rng(0)
    nodes = [
        make_node("Conv", ["x", "kernel"], ["c"]),
        make_node("Relu", ["c"], ["r"]),
        make_node("Flatten", ["r"], ["f"]),
        make_node("MatMul", ["f", "weights"], ["y"]),
    ]
    kernel = draw.normal(size=(16, 3, 3, 3)).astype("float32")
    weights = draw.normal(size=(576, 10)).astype("float32")
    return save(path, nodes, kernel=kernel, weights=weights, **more)  # pyright: ignore
