"""Normalization layers that were not folded away."""

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.twin.graph import Node


def batch(node: Node, value: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0):
        raise node.error("normalizes by the batch at hand (training_mode)", "Export the model in eval mode")
    return functional.batch_norm(value, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


def layer(node: Node, value: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = node.get("axis", -1) % value.ndim
    shape = value.shape[axis:]
    bias = None if bias is None else bias.expand(shape)
    return functional.layer_norm(value, shape, scale.expand(shape), bias, node.get("epsilon", 1e-5))


def instance(node: Node, value: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(value, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


def group(node: Node, value: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.attributes["num_groups"]
    if scale.numel() == groups != value.shape[1]:  # before operator set 21 one scale per group
        scale, bias = (entry.repeat_interleave(value.shape[1] // groups) for entry in (scale, bias))
    return functional.group_norm(value, groups, scale, bias, node.get("epsilon", 1e-5))


def root_mean_square(node: Node, value: Tensor, scale: Tensor) -> Tensor:
    axis = node.get("axis", -1) % value.ndim
    return functional.rms_norm(value, value.shape[axis:], scale.expand(value.shape[axis:]), node.get("epsilon", 1e-5))


def local_response(node: Node, value: Tensor) -> Tensor:
    size = node.attributes["size"]
    before, after = (size - 1) // 2, size // 2
    squares = functional.pad(value.square(), [0, 0] * (value.ndim - 2) + [before, after])
    total = squares.unfold(1, size, 1).sum(-1)
    alpha, beta = node.get("alpha", 1e-4), node.get("beta", 0.75)
    return value / (node.get("bias", 1.0) + alpha / size * total).pow(beta)


def lp(node: Node, value: Tensor) -> Tensor:
    return functional.normalize(value, p=node.get("p", 2), dim=node.get("axis", -1), eps=torch.finfo(value.dtype).tiny)
