"""What is done to a graph before it runs: softmax left out, batches, branches, functions, and what is refused."""

from pathlib import Path

import numpy
import onnx
import pytest
import torch
from networks import photos
from onnx import TensorProto, helper, numpy_helper
from onnxfiles import draw, runtime, save
from torchnets import Mixed, export, prepared

from edgekit import twin
from edgekit.errors import EdgekitError

NODE = helper.make_node
IMAGES = torch.from_numpy(draw(6, 4, 8, 8, seed=3))
HEAD = [NODE("GlobalAveragePool", ["x"], ["mean"]), NODE("Flatten", ["mean"], ["flat"])]
HEAD += [NODE("Gemm", ["flat", "weight"], ["logits"])]
WEIGHT = {"weight": draw(4, 5)}


@pytest.mark.parametrize("type", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_gradients_are_taken_before_a_final_softmax(tmp_path: Path, type: str) -> None:
    nodes = [*HEAD, NODE(type, ["logits"], ["p"]), NODE("Identity", ["p"], ["y"])]
    path = save(tmp_path / "it.onnx", nodes, WEIGHT)
    copy = twin.open(path)
    assert copy.before_softmax == type
    logits = IMAGES.mean((2, 3)) @ torch.from_numpy(WEIGHT["weight"])
    assert copy(IMAGES).allclose(logits, atol=1e-6)
    assert runtime(path, IMAGES).argmax(1).equal(copy(IMAGES).argmax(1))
    assert (
        twin.open(save(tmp_path / "plain.onnx", [*HEAD, NODE("Identity", ["logits"], ["y"])], WEIGHT)).before_softmax
        is None
    )


def test_a_quantized_softmax_is_left_out_too(tmp_path: Path) -> None:
    grid = {"s": numpy.float32(1 / 256), "z": numpy.uint8(0)}
    nodes = [*HEAD, NODE("Softmax", ["logits"], ["p"]), NODE("QuantizeLinear", ["p", "s", "z"], ["q"])]
    nodes += [NODE("DequantizeLinear", ["q", "s", "z"], ["y"])]
    copy = twin.open(save(tmp_path / "it.onnx", nodes, WEIGHT | grid))
    assert copy(IMAGES).allclose(IMAGES.mean((2, 3)) @ torch.from_numpy(WEIGHT["weight"]), atol=1e-6)


def test_a_file_for_one_image_takes_any_number(tmp_path: Path) -> None:
    # Told apart from a file that can be asked at once: reshaping to one row would mix the images.
    shape = {"shape": numpy.array([1, -1], numpy.int64), "wide": draw(256, 5)}
    nodes = [NODE("Reshape", ["x", "shape"], ["row"]), NODE("MatMul", ["row", "wide"], ["y"])]
    path = save(tmp_path / "one.onnx", nodes, shape, shape=(1, 4, 8, 8))
    copy = twin.open(path)
    assert copy.batch == 1
    expected = torch.cat([runtime(path, image) for image in IMAGES.split(1)])
    assert copy(IMAGES).allclose(expected, atol=1e-4)
    pair = save(tmp_path / "two.onnx", [*HEAD, NODE("Identity", ["logits"], ["y"])], WEIGHT, shape=(2, 4, 8, 8))
    assert twin.open(pair)(IMAGES[:5]).allclose(twin.open(pair)(IMAGES)[:5], atol=1e-6)


def test_shape_arithmetic_follows_the_batch_and_is_remembered(tmp_path: Path) -> None:
    constants = {"first": numpy.array(0, numpy.int64), "axes": numpy.array([0], numpy.int64)} | {"wide": draw(256, 5)}
    nodes = [NODE("Shape", ["x"], ["sizes"]), NODE("Gather", ["sizes", "first"], ["n"])]
    nodes += [NODE("Unsqueeze", ["n", "axes"], ["n1"]), NODE("Concat", ["n1", "rest"], ["shape"], axis=0)]
    nodes += [NODE("Reshape", ["x", "shape"], ["row"]), NODE("MatMul", ["row", "wide"], ["y"])]
    path = save(tmp_path / "it.onnx", nodes, constants | {"rest": numpy.array([-1], numpy.int64)})
    copy = twin.open(path)
    with torch.inference_mode():
        copy(IMAGES)
    for images in (IMAGES, IMAGES[:2], IMAGES):
        assert copy(images.clone().requires_grad_()).allclose(runtime(path, images), atol=1e-4)


def test_a_branch_with_a_constant_condition_and_a_function_are_resolved(tmp_path: Path) -> None:
    def branch(name: str, by: float) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        held = [numpy_helper.from_array(numpy.float32(by), f"{name}_by")]
        return helper.make_graph([NODE("Mul", ["logits", f"{name}_by"], [name])], name, [], [out], held)

    double = helper.make_function(
        "own", "Double", ["a"], ["b"], [NODE("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    nodes = [*HEAD, NODE("If", ["so"], ["chosen"], then_branch=branch("yes", 3.0), else_branch=branch("no", -1.0))]
    nodes += [NODE("Double", ["chosen"], ["y"], domain="own")]
    path = save(tmp_path / "it.onnx", nodes, WEIGHT | {"so": numpy.array(True)}, functions=[double])
    assert twin.open(path)(IMAGES).allclose(6 * IMAGES.mean((2, 3)) @ torch.from_numpy(WEIGHT["weight"]), atol=1e-5)


def test_a_half_precision_file_is_computed_in_single_precision(tmp_path: Path) -> None:
    weight = WEIGHT["weight"].astype(numpy.float16)
    nodes = [NODE("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), NODE("GlobalAveragePool", ["h"], ["mean"])]
    nodes += [NODE("Flatten", ["mean"], ["flat"]), NODE("Gemm", ["flat", "weight"], ["l"])]
    nodes += [NODE("Cast", ["l"], ["y"], to=TensorProto.FLOAT)]
    path = save(tmp_path / "half.onnx", nodes, {"weight": weight})
    assert twin.open(path)(IMAGES).allclose(runtime(path, IMAGES), atol=2e-3)


def test_a_mixed_network_at_operator_set_9(tmp_path: Path) -> None:
    path = export(prepared(Mixed, 32), tmp_path / "old.onnx", 32, opset=9)
    images = photos(8, 32, seed=5)
    assert twin.open(path)(images).allclose(runtime(path, images), atol=1e-4)


def refused(path: Path, message: str, **options: str) -> None:
    with pytest.raises(EdgekitError, match=message) as caught:
        twin.open(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_taken_is_said_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "it.onnx"
    path.write_bytes(b"not a model at all")
    refused(path, "not an ONNX file")
    refused(tmp_path / "none.onnx", "not there")
    refused(save(path, [NODE("ArgMax", ["x"], ["y"], name="pick")]), r"ArgMax \(node 'pick'\)")
    refused(save(path, [NODE("Relu", ["missing"], ["y"])]), "an invalid graph.*missing")
    refused(save(path, [NODE("Relu", ["x"], ["y"])], opset=5), "operator set 5")
    several = save(path, [*HEAD, NODE("Neg", ["logits"], ["other"])], WEIGHT, outputs=("logits", "other"))
    refused(several, r"several outputs \(logits, other\).*--output")
    refused(several, "there is no output 'logit'.*'logits'", output="logit")
    assert twin.open(several, "other")(IMAGES).equal(-twin.open(several, "logits")(IMAGES))
    condition = [NODE("ReduceMax", ["x"], ["m"], keepdims=0), NODE("Cast", ["m"], ["c"], to=TensorProto.BOOL)]
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph([NODE("Relu", ["x"], ["b"])], "g", [], [out])
    nodes = [*condition, NODE("If", ["c"], ["y"], name="fork", then_branch=branch, else_branch=branch)]
    refused(save(path, nodes), "If.*fork.*depends on the input")
    huge = {"shape": numpy.array([10**5, 10**5], numpy.int64)}
    refused(
        save(path, [NODE("ConstantOfShape", ["shape"], ["k"]), NODE("Add", ["x", "k"], ["y"])], huge), "10000000000"
    )


def test_per_channel_scales_before_operator_set_13_are_refused(tmp_path: Path) -> None:
    held = {"q": numpy.ones((4, 5), numpy.int8), "s": numpy.ones(5, numpy.float32), "z": numpy.zeros(5, numpy.int8)}
    nodes = [*HEAD[:2], NODE("DequantizeLinear", ["q", "s", "z"], ["w"]), NODE("MatMul", ["flat", "w"], ["y"])]
    refused(save(tmp_path / "it.onnx", nodes, held, opset=11), "operator set 13")


def test_external_data_is_read_beside_the_file_only(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    path = save(inside / "it.onnx", [*HEAD, NODE("Identity", ["logits"], ["y"])], WEIGHT)
    expected, model = twin.open(path)(IMAGES), onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (inside / "weights.bin").exists()
    assert twin.open(path)(IMAGES).equal(expected)
    (inside / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = "../weights.bin" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    refused(path, "graph|outside|not there")
