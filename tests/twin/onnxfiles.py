"""Small ONNX files made by hand, and ONNX Runtime's answers to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    *,
    shape: Sequence[int | str] = ("n", 4, 8, 8),
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    microsoft: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """A file of one float input `x`; constants are initializers."""
    held = [numpy_helper.from_array(numpy.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        held,
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid("com.microsoft", 1)] if microsoft else []
    opsets += [helper.make_opsetid(domain, 1) for domain in {function.domain for function in functions}]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=list(functions), ir_version=8 if opset < 21 else 10
    )
    onnx.save(model, path)
    return path


def runtime(path: Path, images: Tensor, optimized: bool = True) -> Tensor:
    """The answers of a file of one input to images as it takes them; to a file for bytes they go as bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    kind = numpy.uint8 if given.type == "tensor(uint8)" else numpy.float32
    return torch.from_numpy(session.run(None, {given.name: images.detach().numpy().astype(kind)})[0])


def draw(*shape: int, seed: int = 0) -> numpy.ndarray:
    """Normal numbers, float32."""
    return numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)
