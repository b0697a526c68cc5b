"""Each operator by itself, over its spellings, against ONNX Runtime; its gradient against finite differences."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from onnx import TensorProto, helper
from onnxfiles import draw, runtime, save
from torch import Tensor

from edgekit import twin

INT64 = numpy.int64


def op(type: str, *constants: Any, opset: int = 17, domain: str = "", shape: Any = (2, 4, 8, 8), **attributes: Any):
    """One case: x is the first input, the others are constants; None leaves one out."""
    variant = " ".join(f"{key}={value}" for key, value in attributes.items())
    return pytest.param(type, constants, opset, domain, shape, attributes, id=f"{type}-{opset} {variant}"[:80])


MS = "com.microsoft"
WEIGHT, BIAS = draw(6, 4, 3, 3), draw(6)
FOUR = [draw(4, seed=seed) for seed in range(3)]
HALF = numpy.float32(0.5)
CASES = [
    op("Conv", WEIGHT, BIAS, pads=[1, 1, 1, 1]),
    op("Conv", WEIGHT, pads=[0, 1, 2, 0], strides=[2, 1]),
    op("Conv", WEIGHT, BIAS, auto_pad="SAME_UPPER", strides=[2, 2]),
    op("Conv", WEIGHT, BIAS, auto_pad="SAME_LOWER", strides=[2, 2]),
    op("Conv", WEIGHT, BIAS, auto_pad="VALID", dilations=[2, 2]),
    op("Conv", draw(8, 1, 3, 3), draw(8), group=4),
    op("Conv", draw(5, 4, 3), draw(5), shape=(2, 4, 9), pads=[1, 1]),
    op("ConvTranspose", draw(4, 3, 3, 3), draw(3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    op("ConvTranspose", draw(4, 3, 2, 2), strides=[2, 2]),
    op("Gemm", draw(8, 5), draw(5), shape=(3, 8)),
    op("Gemm", draw(5, 8), draw(5), shape=(3, 8), transB=1, alpha=0.5, beta=2.0),
    op("Gemm", draw(3, 5), draw(3, 5), shape=(3, 3), transA=1),
    op("Gemm", draw(8, 5), shape=(3, 8)),
    op("MatMul", draw(8, 5)),
    op("MatMul", draw(4, 8, 5)),
    op("Einsum", draw(8, 5), equation="nchw,wk->nchk"),
    op("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    op("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    op("MaxPool", kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER", shape=(2, 4, 7, 7)),
    op("MaxPool", kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
    op("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]),
    op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0], count_include_pad=1),
    op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, opset=19),
    op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1] * 4, count_include_pad=1, opset=19),
    op("AveragePool", kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    op("GlobalAveragePool"),
    op("GlobalMaxPool"),
    op("BatchNormalization", *FOUR, abs(FOUR[0]) + 0.1, epsilon=1e-3),
    op("InstanceNormalization", FOUR[0], FOUR[1], epsilon=1e-3),
    op("LayerNormalization", draw(8), draw(8)),
    op("LayerNormalization", draw(4, 8, 8), axis=1),
    op("GroupNormalization", FOUR[0], FOUR[1], num_groups=2, opset=21),
    op("LRN", size=3, alpha=0.1, beta=0.7, bias=2.0),
    op("LRN", size=5, alpha=0.1),
    op("LpNormalization", axis=1),
    op("Add", draw(4, 1, 1)),
    op("Sub", draw(8)),
    op("Mul", draw(2, 4, 1, 1)),
    op("Div", abs(draw(8)) + 1),
    op("Pow", numpy.float32(2)),
    op("Max", draw(8), draw(4, 1, 1)),
    op("Min", draw(8)),
    op("Sum", draw(8), draw(4, 1, 1)),
    op("Mean", draw(8), draw(4, 1, 1)),
    op("PRelu", draw(4, 1, 1)),
    *[
        op(name)
        for name in ("Abs", "Erf", "Exp", "Neg", "Sigmoid", "Tanh", "Softplus", "Softsign", "Relu", "HardSwish")
    ],
    *[op(name) for name in ("Sin", "Cos", "Identity", "Selu", "Celu", "ThresholdedRelu")],
    op("Elu", alpha=0.5),
    op("LeakyRelu", alpha=0.2),
    op("HardSigmoid"),
    op("HardSigmoid", alpha=1 / 6, beta=0.5),
    op("Gelu", opset=20),
    op("Gelu", opset=20, approximate="tanh"),
    op("Gelu", domain=MS),
    op("QuickGelu", domain=MS, alpha=1.5),
    op("Clip", min=0.0, max=0.9, opset=9),
    op("Clip", max=0.9, opset=9),
    op("Clip", numpy.float32(0), numpy.float32(0.9), opset=11),
    op("Clip", numpy.float32(0), opset=13),
    op("Clip", None, HALF, opset=13),
    op("Softmax", opset=11, axis=1),
    op("Softmax", opset=9),
    op("Softmax", opset=13),
    op("Softmax", opset=13, axis=1),
    op("LogSoftmax", opset=13, axis=1),
    op("ReduceMean", axes=[2, 3], opset=13),
    op("ReduceMean", axes=[2, 3], keepdims=0, opset=11),
    op("ReduceMean", numpy.array([2, 3], INT64), opset=18),
    op("ReduceMean", opset=18),
    op("ReduceSum", numpy.array([-1], INT64), keepdims=0, opset=13),
    op("ReduceSum", noop_with_empty_axes=1, opset=13),
    op("ReduceMax", axes=[1], opset=13),
    op("ReduceMin", numpy.array([1], INT64), opset=18),
    op("ReduceL2", axes=[1], opset=13),
    op("ReduceL1", axes=[1, 2], opset=13),
    op("ReduceSumSquare", axes=[1], opset=13),
    op("ReduceLogSumExp", axes=[1], opset=13),
    op("ReduceProd", axes=[3, 1], opset=13, keepdims=0),
    op("Flatten"),
    op("Flatten", axis=-1),
    op("Flatten", axis=0),
    op("Reshape", numpy.array([0, -1, 2], INT64)),
    op("Transpose", perm=[0, 2, 3, 1]),
    op("Transpose"),
    op("Squeeze", axes=[1], opset=11, shape=(2, 1, 3)),
    op("Squeeze", numpy.array([-2], INT64), opset=13, shape=(2, 1, 3)),
    op("Unsqueeze", axes=[1, 3], opset=11, shape=(2, 3)),
    op("Unsqueeze", numpy.array([-1, 0], INT64), opset=13, shape=(2, 3)),
    op("Slice", starts=[1, -3], ends=[3, 100], axes=[1, 3], opset=9),
    op("Slice", numpy.array([1, -3], INT64), numpy.array([3, 100], INT64), opset=10, shape=(5, 8)),
    op("Slice", *(numpy.array(v, INT64) for v in ([7, 3], [-100, 0], [3, 2], [-2, -1]))),
    op("Slice", *(numpy.array(v, INT64) for v in ([0], [8], [-1], [3]))),
    op("Gather", numpy.array([[0, -1], [2, 2]], INT64), axis=1),
    op("Gather", numpy.array(1, INT64), axis=2),
    op("GatherElements", numpy.array([[0, -1, 2]], INT64), axis=1, shape=(2, 4)),
    op("GatherND", numpy.array([[0, 1], [1, 3]], INT64)),
    op("ScatterND", numpy.array([[0], [2]], INT64), draw(2, 3), shape=(4, 3)),
    op("ScatterElements", numpy.array([[1, 0, 2]], INT64), draw(1, 3), axis=0, shape=(4, 3)),
    op("Expand", numpy.array([3, 2, 1, 4], INT64), shape=(2, 1, 1)),
    op("Tile", numpy.array([1, 2, 1, 3], INT64)),
    op("Pad", pads=[0, 0, 1, 2, 0, 0, 3, 0], opset=9, value=0.5),
    op("Pad", pads=[0, 0, 1, 2, 0, 0, 3, 0], opset=10, mode="reflect"),
    op("Pad", numpy.array([0, 0, 1, 2, 0, 0, 3, 0], INT64), HALF, opset=13),
    op("Pad", numpy.array([0, 1, 0, 0, 0, 0, -1, 0], INT64), opset=13),
    op("Pad", numpy.array([0, 0, 1, 2, 0, 0, 3, 0], INT64), mode="edge", opset=13),
    op("Pad", numpy.array([1, 2, 3, 0], INT64), None, numpy.array([2, -1], INT64), mode="reflect", opset=18),
    op("Pad", numpy.array([1, 2, 3, 0], INT64), None, numpy.array([2, -1], INT64), mode="wrap", opset=19),
    op("DepthToSpace", blocksize=2, mode="DCR"),
    op("DepthToSpace", blocksize=2, mode="CRD"),
    op("SpaceToDepth", blocksize=2),
    op("Trilu", upper=0),
    op("Dropout", opset=12),
    op("Cast", to=TensorProto.DOUBLE),
    op("Shrink", lambd=0.3, bias=0.3),
    op("Mish", opset=18),
]


@pytest.mark.parametrize(("type", "constants", "opset", "domain", "shape", "attributes"), CASES)
def test_an_operator_answers_as_in_onnx_runtime(
    tmp_path: Path, type: str, constants: Any, opset: int, domain: str, shape: Any, attributes: Any
) -> None:
    held = {f"c{place}": value for place, value in enumerate(constants) if value is not None}
    inputs = ["x", *("" if value is None else f"c{place}" for place, value in enumerate(constants))]
    nodes = [helper.make_node(type, inputs, ["made"], name="it", domain=domain, **attributes)]
    # A last Add keeps a softmax from being the final one, and a type cast from being the output's.
    nodes += [helper.make_node("Cast", ["made"], ["float"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Add", ["float", "zero"], ["y"])]
    held["zero"] = numpy.float32(0)
    path = save(tmp_path / "it.onnx", nodes, held, shape=shape, opset=opset, microsoft=domain == MS)
    images = torch.from_numpy(draw(*shape, seed=9))
    copy = twin.open(path)
    answer = copy(images)
    assert answer.shape == runtime(path, images).shape
    assert answer.allclose(runtime(path, images), rtol=1e-4, atol=1e-5)
    agrees_with_differences(copy, images)


def agrees_with_differences(copy: Any, images: Tensor) -> None:
    """The directional derivative by autograd is that of differences in float64 of the answers, where it is smooth."""
    weights = torch.from_numpy(draw(*copy(images).shape, seed=5)).double()
    direction = torch.from_numpy(draw(*images.shape, seed=6))
    x = images.clone().requires_grad_()
    total = (copy(x).double() * weights).sum()
    if not total.requires_grad:  # an answer that depends on shapes only
        return
    (gradient,) = torch.autograd.grad(total, x)
    step = 1e-3
    with torch.no_grad():
        ahead, behind = (((copy(images + sign * step * direction)).double() * weights).sum() for sign in (1, -1))
    expected = ((ahead - behind) / (2 * step)).item()
    found = (gradient * direction).sum().item()
    scale = (gradient.abs() * direction.abs()).sum().item() + 1e-3
    assert abs(found - expected) < 0.02 * scale


RESIZES = [
    dict(mode=mode, coordinate_transformation_mode=transformation, **more)
    for mode, transformation, more in [
        *(
            ("nearest", "asymmetric", {"nearest_mode": rounding})
            for rounding in ("floor", "ceil", "round_prefer_floor")
        ),
        ("nearest", "half_pixel", {"nearest_mode": "round_prefer_ceil"}),
        ("nearest", "half_pixel", {}),
        ("nearest", "align_corners", {}),
        *(("linear", transformation, {}) for transformation in ("half_pixel", "asymmetric", "align_corners")),
        ("linear", "pytorch_half_pixel", {}),
        ("cubic", "half_pixel", {}),
        ("cubic", "half_pixel", {"cubic_coeff_a": -0.5, "exclude_outside": 1}),
        ("cubic", "align_corners", {}),
    ]
]


@pytest.mark.parametrize("attributes", RESIZES, ids=lambda value: " ".join(map(str, value.values())))
@pytest.mark.parametrize(
    "how", [("scales", 2.0), ("scales", 1.5), ("scales", 0.6), ("sizes", 11), ("sizes", 5)], ids=str
)
def test_resize_answers_as_in_onnx_runtime(tmp_path: Path, attributes: dict[str, Any], how: tuple[str, float]) -> None:
    spelled, amount = how
    if spelled == "scales":
        held = {"amount": numpy.array([1, 1, amount, amount], numpy.float32)}
        inputs = ["x", "", "amount"]
    else:
        held, inputs = {"amount": numpy.array([2, 4, amount, amount], INT64)}, ["x", "", "", "amount"]
    nodes = [helper.make_node("Resize", inputs, ["y"], **attributes)]
    path = save(tmp_path / "resize.onnx", nodes, held, shape=(2, 4, 8, 8), opset=13)
    images = torch.from_numpy(draw(2, 4, 8, 8))
    assert twin.open(path)(images).allclose(runtime(path, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample_of_operator_set_9(tmp_path: Path, mode: str) -> None:
    nodes = [helper.make_node("Upsample", ["x", "scales"], ["y"], mode=mode)]
    held = {"scales": numpy.array([1, 1, 2, 2], numpy.float32)}
    path = save(tmp_path / "upsample.onnx", nodes, held, opset=9)
    images = torch.from_numpy(draw(2, 4, 8, 8))
    assert twin.open(path)(images).allclose(runtime(path, images), atol=1e-5)
