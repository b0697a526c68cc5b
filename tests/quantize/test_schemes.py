"""A scheme is data: whatever it asks for stands in the file, and the twin answers as ONNX Runtime does."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from handmade import agreement, graph, photos, run, save, tensors
from onnx import helper

from edgekit import twin
from edgekit.errors import EdgekitError
from edgekit.quantize import BEFORE, FLOATS, SCHEMES, Settings, layers, quantize, unsafe_pairs
from edgekit.quantize.scheme import Format, Scheme

X86, SYMMETRIC = SCHEMES["x86"], SCHEMES["symmetric"]
BY_CHANNEL, BY_TENSOR = (Format(8, True, True, granularity) for granularity in ("channel", "tensor"))
UNSIGNED, SKEW, SIGNED = Format(8, False, False, "tensor"), Format(8, True, False, "tensor"), SYMMETRIC.activations
CASES = {
    "x86": X86,
    "symmetric": SYMMETRIC,
    "by tensor": Scheme("by tensor", BY_TENSOR, UNSIGNED, True),
    "symmetric by tensor": Scheme("symmetric by tensor", BY_TENSOR, SIGNED, False),
    "skew activations": Scheme("skew activations", BY_CHANNEL, SKEW, False),
    "unsigned weights": Scheme("unsigned weights", Format(8, False, True, "channel"), UNSIGNED, True),
    "skew weights": Scheme("skew weights", Format(8, True, False, "tensor"), UNSIGNED, True),
}
SETTINGS = Settings(method="mse", equalize=True, correct=True, weights="enlarged")


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.parametrize("name", [*CASES, "layers"])
def test_the_twin_answers_as_onnx_runtime_does_under_every_scheme(tmp_path: Path, name: str, activation: str):
    scheme, model, images = CASES.get(name, SCHEMES["layers"]), graph(activation), photos(200, seed=4)
    made = quantize(model, photos(60), scheme, SETTINGS).model
    answered = torch.from_numpy(run(made, images)[0])
    copied = twin.open(save(made, tmp_path / "model.onnx"))(images).detach()
    assert (copied - answered).abs().max() < 0.02 * answered.std()  # a quantum here and there at most
    assert (copied.argmax(1) == answered.argmax(1)).float().mean() >= 0.995
    assert agreement(model, made, images) > 0.97
    if scheme.cannot_saturate:
        assert not any(unsafe_pairs(made).values())


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_stored_as_the_scheme_says(name: str):
    scheme = CASES[name]
    made = tensors(quantize(graph(), photos(60), scheme).model)
    for tensor in ("images", "stem_act", "sum", "pooled"):
        kind = numpy.int8 if scheme.activations.signed else numpy.uint8
        zero = made[f"{tensor}_zero_point"]
        assert (zero.dtype, zero.shape) == (kind, ())
        if scheme.activations.symmetric:
            assert zero == 0
        elif tensor == "stem_act":  # the range of what a ReLU made begins at the smallest integer
            assert zero == numpy.iinfo(kind).min
    for tensor in ("stem", "deep", "dense"):
        stored, zero = made[f"{tensor}.weight_quantized"], made[f"{tensor}.weight_zero_point"]
        assert stored.dtype == zero.dtype == (numpy.int8 if scheme.weights.signed else numpy.uint8)
        count = (len(stored),) if scheme.weights.granularity == "channel" else ()
        assert made[f"{tensor}.weight_scale"].shape == zero.shape == count


def test_a_grid_that_reaches_below_zero_keeps_the_activation_that_cuts_there():
    kinds = [[node.op_type for node in quantize(graph(), photos(60), one).model.graph.node] for one in (X86, SYMMETRIC)]
    assert kinds[0].count("Relu") == 0
    assert kinds[1].count("Relu") == 3
    symmetric = quantize(graph(), photos(60), SYMMETRIC).model
    assert run(symmetric, photos(60, seed=2), "stem_act_dequantized")[0].min() == 0


def test_where_layers_alone_work_on_integers_all_others_read_what_nobody_rounded():
    made = quantize(graph(), photos(60), SCHEMES["layers"])
    nodes = list(made.model.graph.node)
    constants = {tensor.name for tensor in made.model.graph.initializer}
    back = {node.output[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    named = {name: one for one in nodes if one.op_type in ("Conv", "Gemm") for name in one.input[1:2]}
    alone = [node for name, node in named.items() if name not in back]
    assert [[entry.i for entry in node.attribute if entry.name == "group"] for node in alone] == [[16]]  # depthwise
    layered = [node for name, node in named.items() if name in back]
    assert len(layered) >= 2 and all(node.input[0] in back and node.input[1] in back for node in layered)
    kinds = ("Conv", "Gemm", "QuantizeLinear", "DequantizeLinear")
    others = [*alone, *(node for node in nodes if node.op_type not in kinds)]
    assert {"Add", "GlobalAveragePool"} <= {node.op_type for node in others}
    assert not any(name in back for node in others for name in node.input)
    read = {name for node in layered for name in node.input}
    assert all(name in read for name, node in back.items() if node.input[0] not in constants)
    assert {one["operator"]: one["reason"] for one in made.float_layers}["Add"] == FLOATS
    assert SCHEMES["layers"].record()["only"] == ["Conv", "Gemm"] and "only" not in SYMMETRIC.record()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": replace(X86.weights, bits=4)},
        {"activations": replace(UNSIGNED, bits=16)},
        {"activations": replace(UNSIGNED, granularity="channel")},
    ],
)
def test_what_cannot_be_written_is_refused(change: dict):
    with pytest.raises(EdgekitError, match="scheme x86: only 8 bits, and activations by tensor"):
        quantize(graph(), photos(8), replace(X86, **change))


def test_what_stays_float_is_named_with_its_reason():
    model = graph()
    model.graph.node[5].op_type = "Sigmoid"  # behind "wide"
    model.graph.node.insert(0, helper.make_node("Mul", ["images", "six"], ["scaled"]))
    model.graph.node[1].input[0] = "scaled"
    model.graph.node.insert(1, helper.make_node("Neg", ["last.weight"], ["turned"]))
    next(node for node in model.graph.node if node.output[0] == "last").input[1] = "turned"
    assert "last" not in layers(model)
    made = quantize(model, photos(40), X86, Settings(in_float=("next",)))
    assert made.float_layers == [
        {"layer": "scaled", "operator": "Mul", "reason": BEFORE},
        {"layer": "turned", "operator": "Neg", "reason": BEFORE},
        {"layer": "wide_act", "operator": "Sigmoid", "reason": "Sigmoid has no integer form here"},
        {"layer": "next", "operator": "Conv", "reason": "it was chosen to"},
        {"layer": "last", "operator": "Conv", "reason": "its weights are computed"},
    ]
    counted = {"Conv": 2, "Mul": 1, "Neg": 1, "Sigmoid": 1}
    assert made.in_float == counted
    assert agreement(model, made.model, photos(100, seed=3)) > 0.9
