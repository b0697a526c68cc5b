"""The inner maximization of adversarial training: it only has to be strong and cheap, it judges nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekit.models.fold import fold
from edgekit.randomness import normal, uniform


@dataclass(frozen=True)
class Inner:
    """epsilon and step_size in units of [0, 1]; `steps` sign-gradient steps under L-infinity."""

    epsilon: float
    step_size: float
    steps: int

    def __call__(
        self,
        student: nn.Module,
        images: Tensor,
        loss: Callable[[Tensor], Tensor],
        seeds: Tensor,
        *,
        spread: bool = False,
    ) -> Tensor:
        """Images (N, C, H, W) inside the ball around `images` where `loss(logits)` (a value per sample) is high.

        Args:
            spread: start uniformly in the ball (Madry et al.), not 0.001 of a standard normal from its centre (TRADES).
        """
        # In eval mode: batch statistics must neither leak between samples nor be moved by the attack. The student as
        # well as its view: a user's module may hold a layer in a list, where no view replaces it.
        training, attacked = student.training, fold(student.eval())
        low, high = (images - self.epsilon).clamp(min=0), (images + self.epsilon).clamp(max=1)
        start = uniform(seeds, images, -self.epsilon, self.epsilon) if spread else 0.001 * normal(seeds, images)
        x = torch.minimum(torch.maximum(images + start, low), high)
        for _ in range(self.steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(attacked(x)).sum(), x)
            x = x.detach() + self.step_size * gradient.sign()
            x = torch.minimum(torch.maximum(x, low), high)
        student.train(training)
        return x.detach()


def divergence(student: Tensor, target: Tensor) -> Tensor:
    """KL(target || student) of each sample and class (N, K): target * (log target - log student).

    Args:
        student, target: (N, K) log-probabilities. Where a target probability is 0 its term is 0.
    """
    return target.exp() * (target - student)
