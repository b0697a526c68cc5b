"""Files that onnxruntime's own quantizers write from a mixed network: every format, against ONNX Runtime."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from networks import photos
from onnxfiles import runtime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import nn
from torchnets import FAMILIES, Mixed, export, prepared

from edgekit import twin

U8, S8 = QuantType.QUInt8, QuantType.QInt8
QDQ, OPERATORS = QuantFormat.QDQ, QuantFormat.QOperator


class Photos(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [photos(16, 32, seed=seed) for seed in range(3)]

    def get_next(self) -> dict[str, Any]:
        return {"x": self.left.pop().numpy()} if self.left else {}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    folder = tmp_path_factory.mktemp("float")
    made = {"mixed": prepared(Mixed, 32), "vit": prepared(*FAMILIES["vit"])}
    return {name: (network, export(network, folder / f"{name}.onnx", 32, opset=17)) for name, network in made.items()}


# 7-bit weights: no processor's pair sums saturate, so that the answer is the same on every machine.
WAYS = {
    "QDQ, u8 activations, per channel": dict(quant_format=QDQ, activation_type=U8, per_channel=True),
    "QDQ, u8 activations, per tensor": dict(quant_format=QDQ, activation_type=U8),
    "QDQ, s8 activations, per channel": dict(quant_format=QDQ, activation_type=S8, per_channel=True),
    "operators, s8 weights": dict(quant_format=OPERATORS, activation_type=U8, per_channel=True),
    "operators, u8 weights": dict(quant_format=OPERATORS, activation_type=U8, weight_type=U8),
}


@pytest.mark.parametrize("source", ["mixed", "vit"])
@pytest.mark.parametrize("way", WAYS)
def test_a_statically_quantized_file(tmp_path: Path, sources: Any, source: str, way: str) -> None:
    network, path = sources[source]
    quantized = tmp_path / "int8.onnx"
    options = {"weight_type": S8, "reduce_range": True, **WAYS[way]}
    quantize_static(str(path), str(quantized), Photos(), **options)
    spelled = {node.op_type for node in onnx.load(quantized).graph.node}
    assert ("QLinearConv" in spelled) == way.startswith("operators")
    copy, images = twin.open(quantized), photos(250, 32, seed=11)
    with torch.no_grad():
        mine, theirs = copy(images), runtime(quantized, images)
    assert (mine.argmax(1) == theirs.argmax(1)).float().mean() >= 0.995
    same = (mine - theirs).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.95  # a last bit of a float kernel may move one integer by one
    points_as(copy, network)


@pytest.mark.parametrize("source", ["mixed", "vit"])
def test_a_dynamically_quantized_file_is_asked_image_by_image(tmp_path: Path, sources: Any, source: str) -> None:
    network, path = sources[source]
    quantized = tmp_path / "dynamic.onnx"
    quantize_dynamic(str(path), str(quantized), weight_type=U8)
    assert "DynamicQuantizeLinear" in {node.op_type for node in onnx.load(quantized).graph.node}
    copy, images = twin.open(quantized), photos(60, 32, seed=11)
    with torch.no_grad():
        mine, theirs = copy(images), torch.cat([runtime(quantized, image) for image in images.split(1)])
    assert mine.allclose(theirs, atol=0.05 * theirs.std().item())
    # Their ranges are not those of a batch: asked together, the file answers otherwise.
    assert not runtime(quantized, images).allclose(theirs, atol=1e-3)
    points_as(copy, network)


def points_as(copy: Any, network: nn.Module) -> None:
    images = photos(16, 32, seed=12).requires_grad_()
    (mine,) = torch.autograd.grad(copy(images).logsumexp(1).sum(), images)
    (theirs,) = torch.autograd.grad(network(images).logsumexp(1).sum(), images)
    assert torch.cosine_similarity(mine.flatten(1), theirs.flatten(1)).mean() > 0.6
