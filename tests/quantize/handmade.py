"""A small network written as an ONNX graph node by node: no exporter, and so no wait for one."""

from pathlib import Path

import numpy
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node
from torch import Tensor


def graph(activation: str = "Relu", huge: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """Convolution, depthwise, 1x1, a shortcut around another convolution, average, dense: images (N, 3, 8, 8) -> 10.

    Args:
        activation: "Relu", or "Clip": at 6, as ReLU6.
        huge: channel 0 of the 1x1 convolution is so many times as large and read by weights as much smaller: the same
            function, of weights with one huge channel.
    """
    draw = numpy.random.default_rng(seed)
    constants: dict[str, numpy.ndarray] = {"zero": numpy.float32(0), "six": numpy.float32(6)}  # pyright: ignore

    def weights(name: str, *shape: int) -> list[str]:
        fan = int(numpy.prod(shape[1:]))
        constants[f"{name}.weight"] = (draw.normal(size=shape) * (3 / fan) ** 0.5).astype("float32")
        constants[f"{name}.bias"] = draw.normal(size=shape[0], scale=0.2).astype("float32")
        return [f"{name}.weight", f"{name}.bias"]

    def act(name: str) -> onnx.NodeProto:
        return make_node(activation, [name, "zero", "six"] if activation == "Clip" else [name], [f"{name}_act"])

    nodes = [
        *(make_node("Conv", ["images", *weights("stem", 16, 3, 3, 3)], ["stem"], pads=[1, 1, 1, 1]), act("stem")),
        make_node("Conv", ["stem_act", *weights("deep", 16, 1, 3, 3)], ["deep"], pads=[1, 1, 1, 1], group=16),
        act("deep"),
        *(make_node("Conv", ["deep_act", *weights("wide", 24, 16, 1, 1)], ["wide"]), act("wide")),
        make_node("Conv", ["wide_act", *weights("next", 24, 24, 1, 1)], ["next"]),
        make_node("Conv", ["next", *weights("last", 24, 24, 3, 3)], ["last"], pads=[1, 1, 1, 1]),
        make_node("Add", ["next", "last"], ["sum"]),
        make_node("GlobalAveragePool", ["sum"], ["pooled"]),
        make_node("Flatten", ["pooled"], ["flat"]),
        make_node("Gemm", ["flat", *weights("dense", 10, 24)], ["logits"], transB=1),
    ]
    constants["dense.weight"] *= 3
    if huge != 1:
        constants["wide.weight"][0] *= huge
        constants["wide.bias"][0] *= huge
        constants["next.weight"][:, 0] /= huge
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(numpy.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def photos(count: int, seed: int = 0) -> Tensor:
    """Smooth random images (N, 3, 8, 8) in [0, 1]."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bicubic").clamp(0, 1)


def run(model: onnx.ModelProto, images: Tensor, *tensors: str, plain: bool = False) -> list[numpy.ndarray]:
    """What ONNX Runtime answers; with `tensors` these in its place. plain: operator by operator, nothing fused."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if tensors:
        del copy.graph.output[:]
        copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [numpy.asarray(value) for value in session.run(None, {"images": images.numpy()})]


def agreement(model: onnx.ModelProto, other: onnx.ModelProto, images: Tensor) -> float:
    answers = [run(each, images)[0].argmax(1) for each in (model, other)]
    return float((answers[0] == answers[1]).mean())


def tensors(model: onnx.ModelProto) -> dict[str, numpy.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
