"""A network in eval mode with its batch normalization folded into the convolutions: the same answers in less time.

Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.2: w' = w * gamma / sigma, b' = beta + (b - mu) * gamma / sigma.
"""

import torch
from torch import nn


def fold(network: nn.Module) -> nn.Module:
    """A frozen eval-mode view of `network`, which is left as it is.

    A convolution directly before a batch normalization in one nn.Sequential becomes one convolution; everything else is
    shared with `network`, so that making a view costs about a thousandth of a pass. It holds the weights of this
    moment: after an optimizer step another one is needed. Answers differ in the last bits only.
    """
    # Mixed precision replaces `forward` on the instance, bound to the network itself; a view runs its class's own.
    view = _view(network)
    view.__dict__.pop("forward", None)
    return view


def _view(module: nn.Module) -> nn.Module:
    view = module.__class__.__new__(module.__class__)
    view.__dict__ = module.__dict__ | {"training": False}
    children = {name: None if child is None else _view(child) for name, child in module._modules.items()}
    if type(module) is nn.Sequential:
        names = list(children)
        for first, second in zip(names, names[1:], strict=False):
            convolution, normalization = module._modules[first], module._modules[second]
            if type(convolution) is nn.Conv2d and type(normalization) is nn.BatchNorm2d and _fixed(normalization):
                children[first] = _merged(convolution, normalization)
                children[second] = nn.Identity()
    view.__dict__["_modules"] = children
    frozen = {name: None if value is None else value.detach() for name, value in module._parameters.items()}
    view.__dict__["_parameters"] = frozen
    return view


def _fixed(normalization: nn.BatchNorm2d) -> bool:
    return normalization.running_mean is not None and normalization.running_var is not None


@torch.no_grad()
def _merged(convolution: nn.Conv2d, normalization: nn.BatchNorm2d) -> nn.Module:
    mean, variance = normalization.running_mean, normalization.running_var
    scale = (variance + normalization.eps).rsqrt()  # pyright: ignore
    if normalization.weight is not None:
        scale = scale * normalization.weight
    shift = -mean if convolution.bias is None else convolution.bias - mean  # pyright: ignore
    bias = shift * scale if normalization.bias is None else shift * scale + normalization.bias
    merged = _view(convolution)
    weight = convolution.weight * scale.view(-1, 1, 1, 1)
    merged.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    return merged
