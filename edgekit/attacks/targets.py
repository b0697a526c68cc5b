"""The wrong classes that targeted attacks try, from the likeliest downwards."""

import torch
from torch import Tensor

from edgekit.classifier import Classifier


def likeliest(source: Classifier, images: Tensor, labels: Tensor, most: int) -> list[Tensor]:
    """Up to `most` wrong classes (N,) int64 of each image, in the order of `source`'s logits; all where fewer exist."""
    with torch.no_grad():
        logits = source(images)
    # The true class goes to the end, and is left out there, also where the source errs.
    order = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    return list(order[:, : min(most, logits.shape[1] - 1)].unbind(1))
