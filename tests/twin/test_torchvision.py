"""One network of each torchvision family through torch's exporters: answers and gradients are the network's."""

from pathlib import Path

import pytest
import torch
from networks import photos
from onnxfiles import runtime
from torchnets import FAMILIES, export, prepared

from edgekit import twin

# The dynamo exporter takes seconds a network: here are those whose graphs differ most from the other exporter's.
SEEN = [(name, False) for name in FAMILIES] + [("efficientnet", True), ("vit", True)]


@pytest.mark.parametrize(("family", "dynamo"), SEEN)
def test_a_torchvision_network(tmp_path: Path, family: str, dynamo: bool) -> None:
    make, size = FAMILIES[family]
    network = prepared(make, size)
    path = export(network, tmp_path / "model.onnx", size, dynamo=dynamo)
    copy, images = twin.open(path), photos(5, size, seed=7).requires_grad_()
    answer = copy(images)
    spread = answer.detach().std().item()
    assert spread > 0.1
    assert answer.allclose(runtime(path, images), atol=3e-4 * spread, rtol=0)  # each is 1e-4 from float64 on Inception
    (mine,) = torch.autograd.grad(answer.logsumexp(1).sum(), images)
    (theirs,) = torch.autograd.grad(network(images).logsumexp(1).sum(), images)
    difference = (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    assert difference.max() < 1e-2  # near-ties of a maximum may fall otherwise; without any it is 1e-6
    # Inception's padded average pools and its many maxima lie closer together than float32 tells apart.
    assert difference.median() < (1e-2 if family == "inception" else 1e-4)
