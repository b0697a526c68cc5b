"""Small networks with realistic statistics, for tests of what happens after training."""

import torch

from edgekit import models
from edgekit.models import Network
from edgekit.models.mobilenetv2 import InvertedResidual
from edgekit.recipe import Student


def network(architecture: str = "mobilenetv2", size: int = 16, width: float = 0.25, seed: int = 0) -> Network:
    """An untrained network whose normalization layers have seen images and whose logits are spread out."""
    spec = Student(architecture=architecture, width=width)
    made = models.build(
        spec, [f"class {i}" for i in range(10)], (3, size, size), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], seed
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.5)
                module.bias.normal_(0, 0.3)
        for _ in range(4):
            made(photos(32, size))
        torch.nn.init.normal_(made.body.classify.weight, std=0.5)  # pyright: ignore
    return made.eval()


def compact() -> Network:
    """A stem, a block with a shortcut, two pools and a linear layer, for 4 classes and images (3, 8, 8)."""
    nn = torch.nn
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)]
        body = nn.Sequential(
            *stem, InvertedResidual(8, 8, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        spec = Student(architecture="mobilenetv2")
        made = Network(body, spec, ("ä\n", '"b"', "c", "d"), (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
        for _ in range(4):
            made(photos(64, 8))
    return made.eval()


def photos(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth random images (N, 3, size, size) in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
