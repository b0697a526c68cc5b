"""Writes the paddle-*.onnx files beside it: small PaddlePaddle classifiers through paddle2onnx.

Not run by any test: it needs paddlepaddle, which edgekit does not. In an environment of its own, with what made the
files (Python 3.11, paddlepaddle 3.3.1, paddle2onnx 2.1.0, onnx 1.17.0, numpy 2.4.6):

    pip install paddlepaddle==3.3.1 paddle2onnx==2.1.0 onnx_graphsurgeon sympy setuptools
    python tests/twin/foreign/make_paddle2onnx.py [NAME ...]

Weights are random and seeded; batch normalization holds the statistics of smooth random images, and the last layer
spreads its scores over all classes, so that no file answers every image alike.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import onnx
import paddle
from paddle import nn
from paddle.nn import functional

HERE = Path(__file__).parent


def photos(count: int, size: int, seed: int) -> paddle.Tensor:
    """Random images (N, 3, size, size) float32 in [0, 1], every other one smooth, the others noise."""
    draw = numpy.random.default_rng(seed)
    coarse = draw.uniform(-0.2, 1.2, (count, 3, 4, 4)).astype(numpy.float32)
    images = functional.interpolate(paddle.to_tensor(coarse), size=(size, size), mode="bicubic").clip(0, 1).numpy()
    images[1::2] = draw.uniform(0, 1, images[1::2].shape)
    return paddle.to_tensor(images)


def norm(channels: int) -> nn.Layer:
    """Batch normalization whose statistics are those of the last batch seen in training mode."""
    return nn.BatchNorm2D(
        channels, momentum=0.0,
        weight_attr=paddle.ParamAttr(initializer=nn.initializer.Uniform(0.8, 1.5)),
        bias_attr=paddle.ParamAttr(initializer=nn.initializer.Normal(0, 0.3)),
    )  # fmt: skip


def block(inside: int, outside: int, kernel: int, stride: int, act: nn.Layer | None, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2D(inside, outside, kernel, stride, kernel // 2, groups=groups, bias_attr=False)
    return nn.Sequential(conv, norm(outside), *([] if act is None else [act]))


# Networks: images -> features; `classifier` adds the head ------------------------------------------------------------


class MobileNet(nn.Layer):
    """ReLU6, depthwise separable blocks, SAME with a stride of 2, a residual."""

    features = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2D(3, 8, 3, 2, "SAME", bias_attr=False), norm(8), nn.ReLU6(),
            block(8, 8, 3, 2, nn.ReLU6(), groups=8), block(8, 16, 1, 1, nn.ReLU6()),
        )  # fmt: skip
        self.deep = nn.Sequential(
            block(16, 32, 1, 1, nn.ReLU6()), block(32, 32, 3, 1, nn.ReLU6(), groups=32), block(32, 16, 1, 1, None)
        )
        self.pool = nn.AdaptiveAvgPool2D(1)

    def forward(self, x):
        x = self.stem(x)
        return self.pool(x + self.deep(x)).flatten(1)


class Squeeze(nn.Layer):
    """MobileNetV3's block: squeeze and excitation with a hard sigmoid, hard swish."""

    features = 24

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = block(3, 16, 3, 2, nn.Hardswish()), block(16, 16, 5, 2, None, groups=16)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2D(1), nn.Conv2D(16, 8, 1), nn.ReLU(), nn.Conv2D(8, 16, 1), nn.Hardsigmoid()
        )
        self.last = nn.Sequential(nn.Hardswish(), block(16, 24, 1, 1, nn.Swish()), nn.AdaptiveAvgPool2D(1))

    def forward(self, x):
        x = self.deep(self.stem(x))
        return self.last(x * self.squeeze(x)).squeeze([2, 3])


class Pools(nn.Layer):
    """Pools of every kind, padding of every kind, a flatten and two dense layers.

    Zeros are the convolution's own: paddle2onnx 2.1.0 fills its constant Pad with what lies in memory.
    """

    features = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(3, 8, 3, 2, [0, 1, 0, 1]), nn.ReLU(), nn.Pad2D(1, "reflect"))
        self.pools = nn.LayerList(
            [
                nn.AvgPool2D(3, 2, 1), nn.AvgPool2D(3, 2, 1, exclusive=False), nn.MaxPool2D(3, 2, 1),
                nn.AvgPool2D(2, 2, ceil_mode=True), nn.MaxPool2D(2, 2, ceil_mode=True),
            ]
        )  # fmt: skip
        self.mix = nn.Sequential(nn.Pad2D([1, 0, 0, 1], "replicate"), nn.Conv2D(40, 8, 3, dilation=2), nn.ELU())
        self.grid, self.largest = nn.AdaptiveAvgPool2D(2), nn.AdaptiveMaxPool2D(1)
        self.dense = nn.Linear(4 * 8 + 8, 16)

    def forward(self, x):
        x = self.stem(x)
        x = self.mix(paddle.concat([pool(x) for pool in self.pools], 1))
        x = paddle.concat([self.grid(x).flatten(1), self.largest(x).flatten(1)], 1)
        return functional.relu(self.dense(x))


class Upsampled(nn.Layer):
    """A small feature pyramid: nearest and bilinear upsampling, a transposed convolution, shuffled pixels, a crop.

    Sizes and no scale factors, which paddle2onnx 2.1.0 cannot read; no LeakyReLU, whose slope it takes from anywhere.
    """

    features = 16

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 8, 3, 2, nn.ReLU()), block(8, 12, 3, 2, nn.ReLU())
        self.near = nn.Upsample(size=[8, 8], mode="nearest")
        self.smooth = nn.Sequential(nn.Conv2D(12, 8, 1), nn.Upsample(size=[8, 8], mode="bilinear"))
        self.corners = nn.Sequential(nn.Conv2D(12, 8, 1), nn.Upsample(size=[8, 8], mode="bilinear", align_corners=True))
        self.learnt = nn.Sequential(nn.Conv2DTranspose(12, 8, 3, 2, 1, 1), nn.Tanh())
        self.shuffled = nn.Sequential(nn.Conv2D(12, 32, 1), nn.PixelShuffle(2), nn.Softsign())
        self.last = nn.Sequential(nn.PReLU(20), nn.Conv2D(20, 16, 3), nn.SELU())

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        x = x + self.smooth(y) + self.corners(y) + self.learnt(y) + self.shuffled(y)
        x = paddle.concat([x, self.near(y)], 1)[:, :, 1:, :-1]
        return self.last(x).mean([2, 3])


class Attention(nn.Layer):
    """A vision transformer of one block: patches, layer normalization, attention over heads, GELU."""

    features = 16

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2D(3, 16, 4, 4)
        self.before, self.between, self.after = (nn.LayerNorm(16) for _ in range(3))
        self.attend = nn.MultiHeadAttention(16, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(approximate=True))
        self.place = self.create_parameter([1, 16, 16], default_initializer=nn.initializer.Normal(0, 0.3))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose([0, 2, 1]) + self.place
        x = x + self.attend(self.before(x))
        return self.after(x + self.mlp(self.between(x))).mean(1)


class Shuffled(nn.Layer):
    """ShuffleNet's channel shuffle, splits, group and instance normalization, and a product in place of a pool."""

    features = 24

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.Silu())
        self.branch = nn.Sequential(nn.Conv2D(8, 8, 3, 1, 1, groups=8), nn.InstanceNorm2D(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2D(16, 24, 3, 2, 1), nn.BatchNorm2D(24), nn.Hardtanh(-1, 2), nn.LogSigmoid())

    def forward(self, x):
        kept, moved = paddle.split(self.stem(x), 2, 1)
        x = paddle.concat([kept, self.branch(moved)], 1)
        x = self.deep(x.reshape([-1, 2, 8, 8, 8]).transpose([0, 2, 1, 3, 4]).reshape([-1, 16, 8, 8]))
        return functional.normalize(functional.adaptive_avg_pool2d(x, 1).flatten(1), axis=1)


class Classifier(nn.Layer):
    def __init__(self, body: nn.Layer, softmax: bool) -> None:
        super().__init__()
        self.body, self.head, self.softmax = body, nn.Linear(body.features, 10), softmax

    def forward(self, images):
        scores = self.head(self.body(images))
        return functional.softmax(scores) if self.softmax else scores


def classifier(body: Callable[[], nn.Layer], size: int, softmax: bool) -> nn.Layer:
    """The body with ten classes, its statistics and the spread of its scores set by random images."""
    paddle.seed(7)
    made = Classifier(body(), False)
    with paddle.no_grad():
        for seed in range(3):
            made(photos(64, size, seed))
        made.eval()
        made.head.weight.set_value(made.head.weight * 3 / made(photos(256, size, 9)).std(0).mean())
        made.head.bias.set_value(made.head.bias - made(photos(256, size, 9)).mean(0))
    made.softmax = softmax
    return made


# Files ----------------------------------------------------------------------------------------------------------------


def write(
    name: str, body: Callable[[], nn.Layer], size: int, opset: int, *, softmax: bool = True, batch: int | None = None
) -> None:
    given = paddle.static.InputSpec([batch, 3, size, size], "float32", "images")
    model = classifier(body, size, softmax)
    paddle.onnx.export(model, str(HERE / f"paddle-{name}"), input_spec=[given], opset_version=opset)
    report(name)


def report(name: str) -> None:
    made = onnx.load(HERE / f"paddle-{name}.onnx")
    kinds: dict[str, int] = {}
    for node in made.graph.node:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    print(name, made.ByteSize(), {entry.domain: entry.version for entry in made.opset_import}, kinds, flush=True)


FILES: dict[str, Callable[[str], None]] = {
    "mobilenet-9": lambda name: write(name, MobileNet, 32, 9),
    "squeeze-15": lambda name: write(name, Squeeze, 32, 15, softmax=False, batch=1),
    "pools-11": lambda name: write(name, Pools, 30, 11),
    "upsampled-13": lambda name: write(name, Upsampled, 16, 13),
    "attention-17": lambda name: write(name, Attention, 16, 17),
    "shuffled-13": lambda name: write(name, Shuffled, 16, 13),
}


def main(names: Sequence[str]) -> None:
    for name in names or FILES:
        FILES[name](name)


if __name__ == "__main__":
    main(sys.argv[1:])
