import itertools
from pathlib import Path

import numpy
import onnx
import pytest
from networks import network, photos
from onnx import numpy_helper

from edgekit.classifier import predict
from edgekit.errors import EdgekitError
from edgekit.formats import onnx as format
from edgekit.quantize import SCHEMES, Settings, layers, quantize, unsafe_pairs
from edgekit.saturation import clips

SCHEME = SCHEMES["x86"]


def tensors(model: onnx.ModelProto) -> dict[str, numpy.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18"])
def test_int8_file_agrees_with_the_network_and_keeps_no_float_island(tmp_path: Path, architecture: str):
    student, images = network(architecture), photos(300)
    made = quantize(format.lower(student), photos(64, seed=1), SCHEME)
    format.write_model(made.model, tmp_path, {})
    answered = predict(format.open(tmp_path / "model.onnx", threads=1), images)
    expected = predict(student, images)
    assert (
        answered.argmax(1) == expected.argmax(1)
    ).float().mean() >= 0.85  # random weights lie close to their borders
    assert (answered - expected).abs().mean() < 0.1 * expected.std()
    assert made.in_float == {"Div": 1, "Sub": 1}  # the normalization of the input alone
    assert "int8" in format.describe(tmp_path / "model.onnx")["operators"]


def test_weights_are_within_half_a_step_of_the_float_ones():
    student = network()
    source = format.lower(student)
    before, after = tensors(source), tensors(quantize(source, photos(32), SCHEME).model)
    checked = 0
    for name, weights in before.items():
        if f"{name}_quantized" in after and weights.ndim > 1:
            scale = after[f"{name}_scale"].reshape(-1, *[1] * (weights.ndim - 1))
            assert numpy.abs(after[f"{name}_quantized"] * scale - weights).max() <= 0.5 * scale.max() * (1 + 1e-5)
            assert numpy.abs(after[f"{name}_quantized"].astype(int)).max() == (127 if weights.shape[1] == 1 else 64)
            checked += 1
    assert checked == 53


def test_ranges_hold_zero_and_the_largest_calibrated_value():
    source = format.lower(network())
    made = tensors(quantize(source, photos(32), SCHEME).model)
    for name in ("div", "hardtanh"):
        scale, zero = float(made[f"{name}_scale"]), int(made[f"{name}_zero_point"])
        assert 0 <= zero <= 255
        if name == "hardtanh":
            assert zero == 0
            assert 255 * scale <= 6 + 1e-5  # the range does the work of the Clip that is left out
    assert not any(node.op_type in ("Clip", "Relu") for node in quantize(source, photos(32), SCHEME).model.graph.node)


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18"])
def test_layers_named_stay_float_and_all_of_them_give_the_network_back(tmp_path: Path, architecture: str):
    source, images = format.lower(network(architecture)), photos(50)
    names = layers(source)
    assert len(names) == len(set(names))
    weights = {name.removesuffix(".weight") for name, value in tensors(source).items() if value.ndim > 1}
    assert weights - {"mean", "std"} <= set(names)
    one = names[1]
    made = quantize(source, photos(32, seed=1), SCHEME, Settings(in_float=(one,)))
    assert f"{one}.weight" in tensors(made.model)
    assert f"{one}.weight_quantized" not in tensors(made.model)
    assert made.in_float["Conv"] == 1
    none = quantize(source, photos(32, seed=1), SCHEME, Settings(in_float=tuple(names))).model
    answers = []
    for place, model in (("float", source), ("none", none), ("one", made.model)):
        (tmp_path / place).mkdir()
        format.write_model(model, tmp_path / place, {})
        answers.append(predict(format.open(tmp_path / place / "model.onnx", threads=1), images))
    assert (answers[0] - answers[1]).abs().max() < 1e-4
    assert (answers[0] - answers[2]).abs().max() > 1e-4
    with pytest.raises(EdgekitError, match="Did you mean"):
        quantize(source, images, SCHEME, Settings(in_float=(f"{one}x",)))


def test_same_student_and_images_give_the_same_bytes():
    student = network()
    first, second = (quantize(format.lower(student), photos(32), SCHEME).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_no_pair_can_saturate_and_a_naive_file_is_found_out():
    import dataclasses

    source = format.lower(network())
    assert set(unsafe_pairs(quantize(source, photos(32), SCHEME).model).values()) == {0}
    naive = dataclasses.replace(SCHEME, cannot_saturate=False)
    assert sum(unsafe_pairs(quantize(source, photos(32), naive).model).values()) > 100


def test_clips_by_trying_every_extreme_input():
    """The kernel sums two products in signed 16 bits; the extremes of two unsigned inputs are their corners."""
    values = [-128, -127, -65, -64, -1, 0, 1, 63, 64, 65, 127]
    for a, b in itertools.product(values, values):
        sums = [x * a + y * b for x in (0, 255) for y in (0, 255)]
        assert bool(clips(numpy.array([[a, b]]))[0, 0]) == any(not -32768 <= total <= 32767 for total in sums), (a, b)
    assert clips(numpy.array([[1, 2, 127]])).tolist() == [[False, False]]  # an odd last weight meets a zero


def test_pairs_run_over_input_channels_first():
    """127 and 127 in one pair clip; where the layout puts them in different pairs they do not."""
    weights = numpy.zeros((1, 2, 1, 2), numpy.int8)

    def count(places: list[tuple[int, int]]) -> int:
        chosen = weights.copy()
        for channel, column in places:
            chosen[0, channel, 0, column] = 127
        nodes = [
            onnx.helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
            onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
            onnx.helper.make_node("Conv", ["xd", "wd"], ["y"]),
        ]
        graph = onnx.helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(chosen, "w")])
        return unsafe_pairs(onnx.helper.make_model(graph))["w"]

    assert count([(0, 0), (1, 0)]) == 1
    assert count([(0, 0), (0, 1)]) == 0
