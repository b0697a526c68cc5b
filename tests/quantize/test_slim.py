from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from networks import network, photos
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgekit import twin
from edgekit.classifier import predict
from edgekit.formats import onnx as format
from edgekit.quantize import SCHEMES, Settings, layers, quantize, slim, unsafe_pairs
from edgekit.quantize.slim import storable
from edgekit.saturation import quantum


def pair(folder: Path, architecture: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A QDQ graph and the slim one, in the files before/model.onnx and after/model.onnx."""
    before = quantize(format.lower(network(architecture)), photos(64, seed=1), SCHEMES["x86"]).model
    after = slim(before)
    for name, model in (("before", before), ("after", after)):
        (folder / name).mkdir()
        format.write_model(model, folder / name, {})
    return before, after


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18"])
def test_a_slim_file_is_smaller_runs_the_same_operators_and_answers_bit_for_bit(tmp_path: Path, architecture: str):
    before, after = pair(tmp_path, architecture)
    first, second = (tmp_path / name / format.FILE for name in ("before", "after"))
    noise = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    images = torch.cat([photos(50), noise])
    expected = predict(format.open(first, threads=1), images)
    assert predict(format.open(second, threads=1), images).equal(expected)
    assert predict(twin.open(second), images).equal(expected)
    for level in ("none", "basic"):
        answers = [predict(format.open(path, threads=1, optimization=level), images) for path in (first, second)]
        assert answers[0].equal(answers[1])
    assert format.running(first) == format.running(second)
    assert format.describe(first)["operators"] == format.describe(second)["operators"]
    assert second.stat().st_size < (0.92 if architecture == "mobilenetv2" else 0.98) * first.stat().st_size
    assert unsafe_pairs(before) == unsafe_pairs(after)
    assert quantum(before, "logits") == quantum(after, "logits")
    weights = sum(len(one.raw_data) for one in after.graph.initializer if one.data_type == TensorProto.INT8)
    assert len(after.SerializeToString()) < 1.7 * weights  # a narrow network: channels are few, operators as many


def dense(scale: numpy.ndarray, bias: numpy.ndarray) -> onnx.ModelProto:
    """A Gemm on integers for each of 64 classes, in front of which nothing stands but its quantized input."""
    arrays = {
        "xs": numpy.float32(0.02), "xz": numpy.uint8(7), "ws": scale, "wz": numpy.zeros(64, numpy.int8),
        "w": numpy.arange(128, dtype=numpy.int8).reshape(64, 2), "b": bias,
        "bs": (numpy.float32(0.02) * scale).astype(numpy.float32), "bz": numpy.zeros(64, numpy.int32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd", "bd"], ["y"], transB=1),
    ]
    ports = [helper.make_tensor_value_info(*one) for one in (("x", 1, ["n", 2]), ("y", 1, ["n", 64]))]
    constants = [numpy_helper.from_array(numpy.asarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("fits", [True, False])
def test_only_what_16_bits_hold_exactly_is_stored_in_16(fits: bool):
    fine = numpy.float32(0.001) * (1 + numpy.arange(64, dtype=numpy.float32) / 977)
    scale = storable(fine) if fits else fine
    bias = numpy.arange(64, dtype=numpy.int32) * 500 + (0 if fits else 2000)  # the last: 31,500 or 33,500
    before = dense(scale, bias)
    after = slim(before)
    kinds = {one.data_type for one in after.graph.initializer if list(one.dims) == [64]}
    halves = {TensorProto.FLOAT16, TensorProto.INT16}
    assert kinds & halves == (halves if fits else set())
    pixels = numpy.random.default_rng(0).random((9, 2), numpy.float32) * 4
    reference = ReferenceEvaluator(after).run(None, {"x": pixels})[0]
    assert numpy.array_equal(ReferenceEvaluator(before).run(None, {"x": pixels})[0], reference)
    sessions = [onnxruntime.InferenceSession(one.SerializeToString()) for one in (before, after)]
    answers = [session.run(None, {"x": pixels})[0] for session in sessions]
    assert numpy.array_equal(*answers)
    assert quantum(after, "y") == quantum(before, "y") == pytest.approx(0.02 * scale.max())


def test_storable_scales_survive_16_bits_unless_they_are_too_small_or_too_large():
    scale = numpy.float32([1e-9, 3e-5, 7e-5, 0.0123, 1.0, 60000, 1e6])
    stored = storable(scale)
    assert stored.dtype == numpy.float32
    assert stored[[0, 1, 6]].tolist() == scale[[0, 1, 6]].tolist()
    inside = stored[2:6]
    assert inside.astype(numpy.float16).astype(numpy.float32).tolist() == inside.tolist()
    assert numpy.abs(inside / scale[2:6] - 1).max() <= 2**-11


@pytest.mark.parametrize("place", [1, 5])
def test_a_layer_that_stays_float_runs_in_float_and_is_counted(tmp_path: Path, place: int):
    """Without the Max behind it ONNX Runtime quantizes it by itself, and the file answers otherwise than its twin."""
    source, images = format.lower(network()), photos(50)
    kept = quantize(source, photos(32), SCHEMES["x86"], Settings(in_float=(layers(source)[place],))).model
    for name, model in (("kept", slim(kept)), ("fp32", source)):
        (tmp_path / name).mkdir()
        format.write_model(model, tmp_path / name, {})
    path = tmp_path / "kept" / format.FILE
    found = format.running(path)
    assert sum(count for kind, count in found["float"].items() if "Conv" in kind) == 1  # fused with its Clip or not
    assert found["float"]["DequantizeLinear"] == 1
    answers = predict(format.open(path, threads=1), images)
    assert (answers - predict(twin.open(path), images)).abs().max() < 1e-3 * answers.std()
    assert format.running(tmp_path / "fp32" / format.FILE)["int8"] == 0
    (tmp_path / "whole").mkdir()
    _, whole = pair(tmp_path / "whole", "mobilenetv2")
    assert not any(node.op_type == "Max" for node in whole.graph.node)
    clean = format.running(tmp_path / "whole" / "after" / format.FILE)
    assert clean["float"] == {"Div": 1, "QuantizeLinear": 1, "Sub": 1}
    assert clean["int8"] >= 52 + 10 + 2  # convolutions, additions, average and dense layer; and what moves integers
