"""What a gradient attack climbs: one value per sample, higher where the classifier errs more.

Each compares logits (N, K) with a goal that is fixed before the attack begins, one row a sample: the true classes, or
what `aim` makes of the clean images.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.classifier import Classifier
from edgekit.errors import EdgekitError

Loss = Callable[[Tensor, Tensor], Tensor]


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


def targeted_dlr(logits: Tensor, pairs: Tensor) -> Tensor:
    """The same for one wrong class (N,), which `pairs` (N, 2) holds behind the true one: equation 7 there.

    Raises:
        EdgekitError: there are fewer than four classes.
    """
    if logits.shape[1] < 4:
        raise EdgekitError("the targeted dlr loss needs four classes", mend="Use the loss 'margin'")
    true, target = logits.gather(1, pairs).unbind(1)
    ordered = logits.topk(4, 1).values
    return (target - true) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def towards(logits: Tensor, pairs: Tensor) -> Tensor:
    """`targeted_dlr`; its numerator alone where fewer than four classes leave nothing to divide by."""
    if logits.shape[1] >= 4:
        return targeted_dlr(logits, pairs)
    true, target = logits.gather(1, pairs).unbind(1)
    return target - true


def kl(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(clean || now) (N,) in nats of `logits` (N, K) against `clean` (N, K), the log-probabilities of clean images.

    What TRADES maximizes (Zhang et al., ICML 2019, arXiv:1901.08573). It is least, and flat, at the clean image, and
    names no true class: it only drives the answer away from what it was.
    """
    return functional.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl}


def aim(loss: str, source: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """The goal (N, ...) of a key of LOSSES: `labels`, or what `source` says to the clean images."""
    if loss != "kl":
        return labels
    with torch.no_grad():
        return source(images).log_softmax(1)
