"""MobileNetV2: Sandler et al., CVPR 2018, arXiv:1801.04381, table 2."""

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.models.layers import convolution, round_channels
from edgekit.recipe import Student

# expansion, channels, blocks of each stage
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
STRIDES = {"cifar": (1, 1, 2, 2, 1, 2, 1), "imagenet": (1, 2, 2, 2, 1, 2, 1)}
STEM_STRIDE = {"cifar": 1, "imagenet": 2}


def _unit(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.path = nn.Sequential(
            *([_unit(inputs, hidden, 1)] if expansion > 1 else []),
            _unit(hidden, hidden, 3, stride, groups=hidden),
            convolution(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x) if self.shortcut else self.path(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes: int, channels: int, width: float, strides: tuple[int, ...], stem_stride: int) -> None:
        super().__init__()
        inputs = round_channels(32 * width)
        layers: list[nn.Module] = [_unit(channels, inputs, 3, stem_stride)]
        for (expansion, outputs, blocks), first in zip(STAGES, strides, strict=True):
            outputs = round_channels(outputs * width)
            for block in range(blocks):
                layers.append(InvertedResidual(inputs, outputs, first if block == 0 else 1, expansion))
                inputs = outputs
        head = round_channels(1280 * max(1.0, width))
        self.features = nn.Sequential(*layers, _unit(inputs, head, 1))
        self.classify = nn.Linear(head, classes)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))


def build(spec: Student, classes: int, channels: int) -> nn.Module:
    strides = spec.strides or STRIDES[spec.form]
    if len(strides) != len(STAGES) or not all(stride in (1, 2) for stride in strides):
        raise EdgekitError(f"[student] strides needs {len(STAGES)} numbers, each 1 or 2, not {list(strides)}")
    return MobileNetV2(classes, channels, spec.width, strides, STEM_STRIDE[spec.form])
