"""An fp32 ONNX graph -> the same in float16, which takes and answers float32.

What works on the image alone, before the first layer, stays float32: a pixel keeps all its digits until it is
normalized.
"""

from typing import TYPE_CHECKING

import numpy

from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_LAYERS = ("Conv", "Gemm", "MatMul", "DequantizeLinear")


def halved(model: "ModelProto") -> "ModelProto":
    """The graph with float16 weights and operators; its input and its logits stay float32.

    Raises:
        EdgekitError: a weight is larger than float16 can hold.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in made.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    before, integers = _before(made)
    outputs = {value.name for value in made.graph.output}
    shared, fresh = dict[str, str](), []
    nodes: list[NodeProto] = []

    def half(name: str) -> str:
        """The float16 form of what the float32 part of the graph makes, and of a float32 constant."""
        if name in constants:
            if name not in shared:
                shared[name] = f"{name}_half"
                fresh.append(numpy_helper.from_array(_rounded(constants[name]), shared[name]))
        elif name in before and name not in shared:
            shared[name] = f"{name}_half"
            nodes.append(helper.make_node("Cast", [name], [shared[name]], to=TensorProto.FLOAT16))
        return shared.get(name, name)

    for node in made.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.output[0] not in before | integers:
            named = [half(name) for name in node.input]
            copy.input[:] = named
            copy.output[:] = [f"{name}_half" if name in outputs else name for name in node.output]
        nodes.append(copy)
    nodes += [helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT) for name in sorted(outputs)]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in made.graph.initializer if tensor.name in read]
    body = helper.make_graph(nodes, made.graph.name, made.graph.input, made.graph.output, [*kept, *fresh])
    return helper.make_model(body, opset_imports=made.opset_import, ir_version=made.ir_version)


def _before(model: "ModelProto") -> tuple[set[str], set[str]]:
    """The image and what is made of it and of constants alone before the first layer: floats, and integers."""
    found, integers = {value.name for value in model.graph.input}, set[str]()
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    for node in model.graph.node:
        if node.op_type not in _LAYERS and (found | constants).issuperset(node.input):
            (integers if node.op_type == "QuantizeLinear" else found).update(node.output)
    return found, integers


def _rounded(tensor: "TensorProto") -> numpy.ndarray:
    from onnx import numpy_helper

    value = numpy_helper.to_array(tensor)
    if not value.ndim:  # a bound, which may be the largest number of all
        value = value.clip(numpy.finfo(numpy.float16).min, numpy.finfo(numpy.float16).max)
    with numpy.errstate(over="ignore"):
        made = value.astype(numpy.float16)
    if not numpy.isfinite(made).all():
        raise EdgekitError(f"a number of {tensor.name} is larger than float16 can hold", where="fp16")
    return made
