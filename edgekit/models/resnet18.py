"""ResNet-18: He et al., CVPR 2016, arXiv:1512.03385; in the CIFAR form the stem keeps the image's size."""

from torch import Tensor, nn

from edgekit.models.layers import convolution, round_channels
from edgekit.recipe import Student


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            convolution(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs, 3),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.path(x) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, classes: int, channels: int, width: float, form: str) -> None:
        super().__init__()
        inputs = round_channels(64 * width)
        stem: list[nn.Module] = [convolution(channels, inputs, 3), nn.BatchNorm2d(inputs), nn.ReLU()]
        if form == "imagenet":
            stem = [convolution(channels, inputs, 7, 2), nn.BatchNorm2d(inputs), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        blocks = []
        for outputs, stride in zip((64, 128, 256, 512), (1, 2, 2, 2), strict=True):
            outputs = round_channels(outputs * width)
            blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
            inputs = outputs
        self.features = nn.Sequential(*stem, *blocks)
        self.classify = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))


def build(spec: Student, classes: int, channels: int) -> nn.Module:
    return ResNet18(classes, channels, spec.width, spec.form)
