"""A network in eval mode with its batch normalization folded into the convolutions: the same answers in less time.

Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.2: w' = w * gamma / sigma, b' = beta + (b - mu) * gamma / sigma.
"""

from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def fold(network: Module) -> Module:
    """A frozen eval-mode view of `network`, which is left as it is.

    A convolution directly before a batch normalization in one nn.Sequential becomes one convolution; everything else is
    shared with `network`; making a view costs some percent of a training step. It holds the weights of this
    moment: after an optimizer step another one is needed. Answers differ in the last bits only; but what lies between
    the two is gone, for a module that reaches into its nn.Sequential.
    """
    # Mixed precision replaces `forward` on the instance, bound to the network itself; a view runs its class's own.
    view = _view(network)
    view.__dict__.pop("forward", None)
    return view


def _view(module: Module) -> Module:
    view = module.__class__.__new__(module.__class__)
    view.__dict__ = module.__dict__ | {"training": False}
    children = {name: None if child is None else _view(child) for name, child in module._modules.items()}
    if type(module) is nn.Sequential:
        for first, second in pairwise(list(children)):
            convolution, normalization = module._modules[first], module._modules[second]
            if not (type(convolution) is nn.Conv2d and type(normalization) is nn.BatchNorm2d):
                continue
            if _fixed(normalization) and not (_hooked(convolution) or _hooked(normalization)):
                children[first] = _merged(convolution, normalization)
                children[second] = nn.Identity().eval()
    view.__dict__["_modules"] = children
    frozen = {name: None if value is None else value.detach() for name, value in module._parameters.items()}
    view.__dict__["_parameters"] = frozen
    return view


def _fixed(normalization: nn.BatchNorm2d) -> bool:
    return normalization.running_mean is not None and normalization.running_var is not None


def _hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says, as weight normalization by hooks does."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


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
