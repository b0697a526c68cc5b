"""The registry: for every ONNX operator that has one its rule, (node, *inputs) -> output; several are a tuple.

Names without a domain are those of ONNX itself and of com.microsoft.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.twin import elementwise, layers, norms, pooling, quantized, resize, shapes
from edgekit.twin.integers import real

Rule = Callable[..., Any]


def _floats(function: Rule) -> Rule:
    """A rule that sees its inputs as floats."""
    return lambda node, *values: function(node, *(None if value is None else real(value) for value in values))


_SIMPLE = {
    "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "HardSwish": functional.hardswish, "Log": torch.log, "Mish": functional.mish, "Neg": torch.neg,
    "Reciprocal": torch.reciprocal, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Softplus": functional.softplus, "Softsign": functional.softsign, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Tanh": torch.tanh, "Not": torch.logical_not, "IsNaN": torch.isnan,
}  # fmt: skip
_PAIRS = {
    "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "Or": torch.logical_or, "Sub": torch.sub, "Xor": torch.logical_xor,
}  # fmt: skip
_ON_FLOATS = {
    "BatchNormalization": norms.batch, "Celu": elementwise.celu, "Elu": elementwise.elu, "Gelu": elementwise.gelu,
    "GlobalMaxPool": pooling.global_max, "GroupNormalization": norms.group, "HardSigmoid": elementwise.hard_sigmoid,
    "InstanceNormalization": norms.instance, "LRN": norms.local_response, "LayerNormalization": norms.layer,
    "LpNormalization": norms.lp, "QuickGelu": elementwise.quick_gelu, "RMSNormalization": norms.root_mean_square,
    "ScatterElements": shapes.scatter_elements, "ScatterND": shapes.scatter_nd, "Selu": elementwise.selu,
    "Shrink": elementwise.shrink, "SimplifiedLayerNormalization": norms.root_mean_square, "Swish": elementwise.swish,
    "ThresholdedRelu": elementwise.thresholded_relu,
}  # fmt: skip
_MOVED = {
    "DepthToSpace": shapes.depth_to_space, "Expand": shapes.expand, "Flatten": shapes.flatten, "Gather": shapes.gather,
    "GatherElements": shapes.gather_elements, "GatherND": shapes.gather_nd, "MaxPool": pooling.max_pool,
    "Reshape": shapes.reshape, "Slice": shapes.slice_, "SpaceToDepth": shapes.space_to_depth, "Squeeze": shapes.squeeze,
    "Tile": shapes.tile, "Transpose": shapes.transpose, "Trilu": shapes.triangle, "Unsqueeze": shapes.unsqueeze,
}  # fmt: skip

OPERATORS: dict[str, Rule] = {
    **{name: elementwise.unary(function) for name, function in _SIMPLE.items()},
    **{name: elementwise.binary(function) for name, function in _PAIRS.items()},
    **{name: elementwise.reduction(function) for name, function in elementwise.REDUCTIONS.items()},
    **{name: _floats(function) for name, function in _ON_FLOATS.items()},
    **{name: shapes.moved(function) for name, function in _MOVED.items()},
    "Add": elementwise.add,
    "AveragePool": pooling.average_pool,
    "Cast": elementwise.cast,
    "CastLike": lambda node, value, like: real(value).to(real(like).dtype),
    "Clip": elementwise.clip,
    "Concat": shapes.concat,
    "ConstantOfShape": shapes.constant_of_shape,
    "Conv": layers.conv,
    "ConvInteger": quantized.integer_conv,
    "ConvTranspose": layers.conv_transpose,
    "DequantizeLinear": quantized.dequantize,
    "Div": elementwise.divide,
    "Dropout": lambda node, value, *others: value,
    "DynamicQuantizeLinear": quantized.dynamic,
    "Einsum": layers.einsum,
    "Gemm": layers.gemm,
    "GlobalAveragePool": pooling.global_average,
    "Identity": lambda node, value: value,
    "LeakyRelu": elementwise.leaky_relu,
    "LogSoftmax": elementwise.softmax(torch.log_softmax),
    "MatMul": layers.matmul,
    "MatMulInteger": quantized.integer_matmul,
    "Max": elementwise.variadic(torch.maximum),
    "Mean": elementwise.mean_of,
    "Min": elementwise.variadic(torch.minimum),
    "Mod": elementwise.modulo,
    "Mul": elementwise.multiply,
    "PRelu": elementwise.prelu,
    "Pad": shapes.pad,
    "Pow": elementwise.power,
    "QGemm": quantized.gemm,
    "QLinearAdd": quantized.add,
    "QLinearAveragePool": quantized.average,
    "QLinearConcat": quantized.concat,
    "QLinearConv": quantized.conv,
    "QLinearGlobalAveragePool": quantized.global_average,
    "QLinearLeakyRelu": quantized.unary(elementwise.leaky_relu),
    "QLinearMatMul": quantized.matmul,
    "QLinearMul": quantized.multiply,
    "QLinearSigmoid": quantized.unary(elementwise.unary(torch.sigmoid)),
    "QLinearSoftmax": quantized.softmax,
    "QuantizeLinear": quantized.quantize,
    "Range": shapes.range_,
    "Relu": elementwise.relu,
    "Resize": resize.resize,
    "Shape": shapes.shape,
    "Size": shapes.size,
    "Softmax": elementwise.softmax(torch.softmax),
    "Split": shapes.split,
    "Sum": elementwise.variadic(torch.add),
    "Upsample": resize.upsample,
    "Where": elementwise.where,
}
