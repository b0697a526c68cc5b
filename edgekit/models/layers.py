"""What the architectures share."""

from torch import nn


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Bias-free and padded to keep the image's size at stride 1; He et al. (2015) initialization over the outputs."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of 8 nearest to `channels`, never more than 10 % below it (Sandler et al., 2018)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
