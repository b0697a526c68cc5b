"""Torch networks for exports: one of each torchvision family, as small as its constructor allows, and a mixed one."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from networks import photos
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext, densenet, efficientnet, maxvit, regnet, resnet, shufflenetv2, vgg
from torchvision.models import swin_transformer as swin
from torchvision.models import vision_transformer as vit


def _headed(network: nn.Module, channels: int) -> nn.Module:
    """With a small head in place of millions of weights."""
    network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(), nn.Linear(channels, 10))
    return network


def _swin(**more: object) -> nn.Module:
    return swin.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], num_classes=10, **more)  # type: ignore


# name -> how to make it, and the size of its images
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (lambda: _headed(models.AlexNet(num_classes=10), 256), 64),
    "vgg": (lambda: _headed(vgg.VGG(vgg.make_layers([8, "M", 16, "M"], True), 10, False), 16), 32),
    "resnet": (lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 10), 32),
    "resnext": (lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, groups=4, width_per_group=4), 32),
    "squeezenet": (lambda: models.SqueezeNet("1_1", 10), 48),
    "densenet": (lambda: densenet.DenseNet(8, (2, 2), 16, num_classes=10), 32),
    "googlenet": (lambda: models.GoogLeNet(10, aux_logits=False, init_weights=False), 32),
    "inception": (lambda: models.Inception3(10, aux_logits=False, init_weights=False), 80),
    "mobilenet_v2": (lambda: models.MobileNetV2(10, 0.25), 32),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=10, reduced_tail=True, width_mult=0.5), 64),
    "efficientnet": (
        lambda: efficientnet.EfficientNet(
            [efficientnet.MBConvConfig(1, 3, 1, 16, 8, 1), efficientnet.MBConvConfig(4, 5, 2, 8, 16, 2)],
            0.2,
            num_classes=10,
        ),
        32,
    ),
    "regnet": (
        lambda: regnet.RegNet(
            regnet.BlockParams.from_init_params(depth=4, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25), 10
        ),
        32,
    ),
    "shufflenet": (lambda: shufflenetv2.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], 10), 32),
    "mnasnet": (lambda: models.MNASNet(0.25, 10), 32),
    "convnext": (
        lambda: convnext.ConvNeXt(
            [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)], 0.0, 0.5, 10
        ),
        32,
    ),
    "vit": (lambda: vit.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 32),
    "swin": (_swin, 32),
    "swin_v2": (lambda: _swin(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2), 32),
    "maxvit": (lambda: maxvit.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.1, num_classes=10), 32),
}


class Mixed(nn.Module):
    """What quantizers meet: a residual, squeeze and excitation, a concatenation, pools and several activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6(), nn.Conv2d(16, 16, 1))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1))
        self.left = nn.Sequential(nn.Conv2d(16, 12, 3, 2, 1), nn.LeakyReLU(0.1))
        self.right = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 12, 1), nn.Hardswish())
        self.last = nn.Conv2d(24, 32, 3, 1, 1)
        self.classify = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.deep(x)
        x = x * self.squeeze(x).sigmoid()
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = nn.functional.max_pool2d(self.last(x).relu(), 2)
        return self.classify(x.mean((2, 3)))


def prepared(make: Callable[[], nn.Module], size: int, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics of images and logits that are spread out."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = make().train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # The mean over all batches: after three steps of a moving one, activations that are all but constant
                # would be blown up to logits, and float32's rounding with them.
                module.momentum = None
        for start in range(3):
            network(photos(8, size, seed=start))
        network.eval()
        last = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
        nn.init.normal_(last.weight)
        last.weight *= 3 / network(photos(32, size)).std(0).mean()
        if last.bias is not None:
            last.bias -= network(photos(32, size)).mean(0)
    return network


def export(
    network: nn.Module, path: Path, size: int, *, dynamo: bool = False, opset: int = 17, batch: bool = True
) -> Path:
    """The network as an ONNX file by one of torch's two exporters."""
    example, noise = photos(2, size), io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            if dynamo:
                shapes = ({0: torch.export.Dim("n")},) if batch else None
                torch.onnx.export(
                    network, (example,), str(path), dynamo=True, input_names=["x"], dynamic_shapes=shapes,
                    external_data=False, verbose=False,
                )  # fmt: skip
            else:
                axes = {"x": {0: "n"}} if batch else None
                torch.onnx.export(
                    network, (example,), str(path), dynamo=False, opset_version=opset, input_names=["x"],
                    dynamic_axes=axes,
                )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return path
