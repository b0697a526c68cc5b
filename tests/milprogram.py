"""The program of a Core ML package, computed by torch as Apple's MIL reference says: another reader than Core ML."""

from typing import Any

import numpy
import torch
from torch.nn import functional

from edgekit.formats.coreml import Package


def computed(package: Package, image: torch.Tensor) -> torch.Tensor:
    """The logits (1, K) of one image (1, C, H, W) float32; products of float16 numbers are summed in float32."""
    name, shape = package.input
    assert list(image.shape) == shape
    values: dict[str, torch.Tensor] = {name: image}
    for one in package.operations:
        inputs = {
            key: values[given] if isinstance(given, str) and given in values else given
            for key, given in one.inputs.items()
        }
        values[one.output] = _KINDS[one.kind](**inputs)
    return values[package.output[0]]


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(numpy.array(value))


def _conv(x: Any, weight: Any, strides: Any, dilations: Any, groups: Any, pad_type: str, pad: Any, bias: Any = None):
    assert pad_type == "custom"
    top, bottom, left, right = pad.tolist()
    padded = functional.pad(x.float(), (left, right, top, bottom))
    bias = None if bias is None else _tensor(bias).float()
    about = (tuple(strides.tolist()), 0, tuple(dilations.tolist()), int(groups))
    return functional.conv2d(padded, _tensor(weight).float(), bias, *about).to(x.dtype)


def _linear(x: Any, weight: Any, bias: Any):
    return functional.linear(x.float(), _tensor(weight).float(), _tensor(bias).float()).to(x.dtype)


def _quantize(input: Any, scale: Any, output_dtype: str, zero_point: Any = 0):
    assert output_dtype == "int8"
    return (input.float() / float(scale) + float(zero_point)).round().clamp(-128, 127).to(torch.int8)


def _dequantize(input: Any, scale: Any, zero_point: Any = 0):
    return ((input.float() - float(zero_point)) * float(scale)).to(_tensor(scale).dtype)


def _weights(quantized_data: Any, zero_point: Any, scale: Any, axis: Any):
    data, scale = _tensor(quantized_data), _tensor(scale)
    shape = [-1 if place == int(axis) else 1 for place in range(data.ndim)] if scale.ndim else []
    return (data.float() - float(zero_point)) * scale.float().view(shape)


_KINDS: dict[str, Any] = {
    "add": lambda x, y: _tensor(x) + _tensor(y),
    "cast": lambda x, dtype: x.to({"fp16": torch.float16, "fp32": torch.float32}[dtype]),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "constexpr_affine_dequantize": _weights,
    "conv": _conv,
    "dequantize": _dequantize,
    "linear": _linear,
    "max_pool": lambda x, kernel_sizes, strides, pad_type, pad, ceil_mode: functional.max_pool2d(
        functional.pad(x, [int(pad[place]) for place in (2, 3, 0, 1)], value=-torch.inf),
        tuple(kernel_sizes.tolist()),
        tuple(strides.tolist()),
    ),
    "maximum": lambda x, y: torch.maximum(_tensor(x), _tensor(y)),
    "quantize": _quantize,
    "real_div": lambda x, y: _tensor(x) / _tensor(y),
    "reduce_mean": lambda x, axes, keep_dims: x.float().mean(axes.tolist(), bool(keep_dims)).to(x.dtype),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "sub": lambda x, y: _tensor(x) - _tensor(y),
}
