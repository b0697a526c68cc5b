"""Wide residual networks: Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, as in TRADES."""

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.models.layers import convolution
from edgekit.recipe import Student


class Block(nn.Module):
    """Pre-activation; where the shape changes the shortcut starts behind the first normalization and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.path = nn.Sequential(
            convolution(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs, 3),
        )
        self.shortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.before(x)
        return self.path(active) + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    def __init__(self, classes: int, channels: int, depth: int, width: float) -> None:
        super().__init__()
        inputs, blocks = 16, []
        stem = convolution(channels, inputs, 3)
        for outputs, first in zip((16, 32, 64), (1, 2, 2), strict=True):
            outputs = round(outputs * width)
            for block in range((depth - 4) // 6):
                blocks.append(Block(inputs, outputs, first if block == 0 else 1))
                inputs = outputs
        self.features = nn.Sequential(stem, *blocks, nn.BatchNorm2d(inputs), nn.ReLU())
        self.classify = nn.Linear(inputs, classes)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))


def build(spec: Student, classes: int, channels: int) -> nn.Module:
    if (spec.depth - 4) % 6:
        raise EdgekitError(f"[student] depth of a wideresnet should be 6 n + 4 (10, 16, 28, 34, …), not {spec.depth}")
    return WideResNet(classes, channels, spec.depth, spec.width)
