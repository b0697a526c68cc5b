"""What all attacks share: whom they ask, what they keep of it, and how long a sample takes part.

Every attack is a function of the same form: `attack(source, judge, images, labels, *, seeds, epsilon, …)`.

- source: differentiable Classifier in eval mode; its gradients are followed, its answers are not believed.
- judge: Classifier to fool. It sees the clean image and every candidate, until one of them fools it.
- images: (N, C, H, W) float32 in [0, 1]; labels: (N,) int64, the true classes.
- seeds: (N,) int64; all that sample i draws comes from seeds[i], whatever batch it sits in.
- epsilon: radius of the ball around each image, in units of the [0, 1] range; norm: which ball, a key of NORMS.

It returns (adversarial, fooled) as Search keeps them. Where source and judge are the same object, one forward pass
answers and gives the gradient.
"""

import torch
from torch import Tensor

from edgekit.attacks.grid import Grid
from edgekit.attacks.losses import margin
from edgekit.classifier import Classifier


class Search:
    """What one attack on N samples has found.

    Attributes:
        adversarial: (N, C, H, W): the clean image where that is wrong already, else the first candidate that fooled,
            else the one of highest margin on the judge.
        fooled: (N,) bool: whether the judge errs on it.
        active: (M,) int64, the places of the samples that nothing fooled yet, in rising order.
        center: (M, C, H, W), their clean images.
    """

    def __init__(self, judge: Classifier, images: Tensor, labels: Tensor) -> None:
        self._judge, self._labels = judge, labels
        with torch.no_grad():
            self.fooled = judge(images).argmax(1) != labels
        self.adversarial = images.clone()
        self._highest = torch.full(labels.shape, -torch.inf, device=images.device)
        self.active = (~self.fooled).nonzero().squeeze(1)
        self.center = images[self.active]

    @property
    def over(self) -> bool:
        """Whether no sample is left."""
        return not len(self.active)

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """What an attack returns."""
        return self.adversarial, self.fooled

    def show(self, x: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Show the judge one candidate of each active sample, and let those go that it errs on.

        Args:
            x: (M, C, H, W), inside the ball.
            graph: whether gradients shall flow from the logits to `x`, which must be a leaf.

        Returns:
            logits (M, K), and hit (M,) bool: which of the M samples are active no more.
        """
        if isinstance(self._judge, Grid):
            x = self._judge.deliver(x, self.center)
        with torch.set_grad_enabled(graph):
            logits = self._judge(x.requires_grad_(graph))
        answered, x, place = logits.detach(), x.detach(), self.active
        truth = self._labels[place]
        hit, value = answered.argmax(1) != truth, margin(answered, truth).to(self._highest)
        keep = hit | (value > self._highest[place])
        self.adversarial[place[keep]], self._highest[place[keep]] = x[keep], value[keep]
        self.fooled[place[hit]] = True
        self.active, self.center = place[~hit], self.center[~hit]
        return logits, hit
