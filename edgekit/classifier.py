"""The Classifier: images in, logits out. Every model, session, engine and device behind a socket is one."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Classifier(Protocol):
    """images (N, C, H, W) float32 in [0, 1], on any device -> logits (N, K) float32, on the same device."""

    differentiable: bool  # whether gradients flow from the logits back to the images

    def __call__(self, images: Tensor) -> Tensor: ...


class Wrapped:
    """A function as a Classifier."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, differentiable: bool) -> None:
        self.function, self.differentiable = function, differentiable

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(images)


@torch.no_grad()
def predict(classifier: Callable[[Tensor], Tensor], images: Tensor, batch: int = 250) -> Tensor:
    """Logits (N, K) of many images, in chunks of `batch`, without gradients."""
    return torch.cat([classifier(chunk) for chunk in images.split(batch)])
