"""A QDQ graph as a torch program: ONNX Runtime's answers, in operators that torch.export keeps."""

import numpy
import onnx
import pytest
import torch
from networks import compact, photos
from onnx import helper, numpy_helper
from torch.nn import functional

from edgekit import quantize
from edgekit.errors import EdgekitError
from edgekit.formats import onnx as onnx_format
from edgekit.qdq_program import Program
from edgekit.quantize.settings import Settings


@pytest.fixture(scope="module")
def lowered() -> onnx.ModelProto:
    return onnx_format.lower(compact())


def made(lowered: onnx.ModelProto, **settings) -> onnx.ModelProto:
    return quantize.quantize(lowered, photos(64, 8), quantize.SCHEMES["signed"], Settings(**settings)).model


def answers(model: onnx.ModelProto, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(numpy.asarray(session.run(None, {"images": images.numpy()})[0]))


@pytest.mark.parametrize("settings", [{}, {"in_float": ("body.7", "body.4.path.1.0")}])
@pytest.mark.parametrize("float_biases", [True, False])
def test_the_program_answers_as_onnx_runtime(lowered: onnx.ModelProto, settings, float_biases: bool):
    model, images = made(lowered, **settings), photos(40, 8, seed=2)
    expected = answers(model, images)
    with torch.no_grad():
        answered = Program(model, float_biases=float_biases).eval()(images)
    assert (answered - expected).abs().mean() < 0.01 * expected.std()
    assert answered.argmax(1).equal(expected.argmax(1))


def test_weights_stay_integers_and_each_reader_has_a_dequantize_of_its_own(lowered: onnx.ModelProto):
    model = made(lowered)
    program = torch.export.export(Program(model).eval(), (photos(2, 8),))
    layers = sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)
    buffers = [value for value in program.state_dict.values() if value.ndim > 1]
    assert sum(value.dtype == torch.int8 for value in buffers) == layers
    assert all(value.numel() == 3 for value in buffers if value.dtype != torch.int8)  # the normalization's
    kinds = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("dequantize_per_channel" in kind for kind in kinds) == layers
    dequantized = [node for node in program.graph.nodes if "dequantize" in str(node.target)]
    assert all(len(node.users) == 1 for node in dequantized)
    # One for each input of a layer, an addition, an average and a flattening.
    readers = [node for node in model.graph.node if node.op_type not in ("Sub", "Div", "QuantizeLinear")]
    wanted = sum(2 if node.op_type == "Add" else node.op_type != "DequantizeLinear" for node in readers)
    assert sum("dequantize_per_tensor" in kind for kind in kinds) == wanted


def test_biases_are_the_integers_of_the_graph_in_either_form(lowered: onnx.ModelProto):
    model = made(lowered)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored = arrays["logits_bias_quantized"]
    found = dict(Program(model).named_buffers()).values()
    real = torch.from_numpy((stored * arrays["logits_bias_scale"]).astype(numpy.float32))
    assert any(each.dtype == torch.float32 and each.shape == real.shape and each.equal(real) for each in found)
    found = dict(Program(model, float_biases=False).named_buffers()).values()
    assert any(each.dtype == torch.int32 and each.equal(torch.from_numpy(stored.copy())) for each in found)


def test_only_an_integer_layer_whose_result_stays_float_is_written_in_its_own_way(lowered: onnx.ModelProto):
    def doubled(x, weight, bias=None):
        return 2 * functional.linear(x, weight, bias)

    images = photos(4, 8)
    for settings, factor in (({}, 2), ({"in_float": ("body.7",)}, 1)):
        model = made(lowered, **settings)
        with torch.no_grad():
            plain, own = Program(model)(images), Program(model, float_result=doubled)(images)
        assert own.equal(factor * plain)


@pytest.mark.parametrize(
    ("operator", "attributes", "says"),
    [
        ("Softmax", {}, "Softmax (node 'logits') is not among the operators"),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, "MaxPool (node 'logits') pads its sides unequally"),
        ("Flatten", {"axis": 2}, "Flatten (node 'logits') is not among"),
    ],
)
def test_what_edgekits_graphs_do_not_have_is_refused(operator: str, attributes: dict, says: str):
    node = helper.make_node(operator, ["images"], ["logits"], **attributes)
    value = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4])
    out = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    with pytest.raises(EdgekitError) as caught:
        Program(helper.make_model(helper.make_graph([node], "g", [value], [out])))
    assert says in str(caught.value)
