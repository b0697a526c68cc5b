"""What a gradient attack climbs: one value per sample, higher where the classifier errs more."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.errors import EdgekitError


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N,) in nats of `logits` (N, K) against `labels` (N,); never summed, so that samples stay apart."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Highest wrong logit minus the true one (N,): Carlini and Wagner, S&P 2017, arXiv:1608.04644.

    Positive exactly where the answer is wrong; its gradient does not vanish where the classifier is sure.
    """
    true = labels[:, None]
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (N,): the margin over the distance of the highest logit from the third highest.

    Croce and Hein, ICML 2020, arXiv:2003.01690, equation 6. Multiplying all logits by a number changes nothing, so a
    classifier cannot hide its gradients behind a large one.

    Raises:
        EdgekitError: there are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise EdgekitError("the loss 'dlr' needs three classes", mend="Use the loss 'margin'")
    ordered = logits.topk(3, 1).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
