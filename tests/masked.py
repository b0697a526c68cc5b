"""Small digit classifiers, and masks that hide their gradients or their answers from an attack.

Each mask is the fault of a published defence that did not hold (Athalye et al. 2018; Pintor et al. 2022).
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from edgekit.classifier import Classifier, Wrapped

EPSILON = 0.15


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) float32 in [0, 1] and (1797,) labels; the first 1,200 are for training."""
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()


class Net(nn.Sequential):
    differentiable = True


def regression() -> Net:
    return Net(nn.Flatten(), nn.Linear(64, 10))


def dense() -> Net:
    return Net(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional() -> Net:
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    return Net(*layers, nn.Flatten(), nn.Linear(256, 10))


PLAIN = {"regression": regression, "dense": dense, "convolutional": convolutional}


@functools.cache
def trained(kind: str, *, robust: bool = False) -> Net:
    """One of PLAIN after 8 epochs; `robust`: against one signed step of EPSILON from a random start."""
    images, labels = (part[:1200] for part in digits())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PLAIN[kind]()
        optimizer = torch.optim.Adam(net.parameters(), 0.005)
        for _ in range(8):
            for chosen in torch.randperm(1200).split(64):
                x, y = images[chosen], labels[chosen]
                if robust:
                    start = (x + EPSILON * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
                    (slope,) = torch.autograd.grad(functional.cross_entropy(net(start), y), start)
                    moved = start.detach() + EPSILON * slope.sign()
                    x = moved.clamp(x - EPSILON, x + EPSILON).clamp(0, 1)
                optimizer.zero_grad()
                functional.cross_entropy(net(x), y).backward()
                optimizer.step()
    return net.eval().requires_grad_(False)  # pyright: ignore


def as_file(model: Classifier) -> Wrapped:
    """What a runtime answers: the same numbers, and no gradients."""
    return Wrapped(lambda images: model(images).detach(), differentiable=False)


def saturated(net: Classifier) -> Wrapped:
    """So sure of itself that the cross-entropy is 0 in float32; it decides as the net (defensive distillation)."""
    return Wrapped(lambda images: 500 * net(images), differentiable=True)


def noisy(net: Classifier) -> Wrapped:
    """Its input is shaken anew at every call."""
    generator = torch.Generator().manual_seed(0)
    return Wrapped(
        lambda images: net(images + 0.1 * torch.randn(images.shape, generator=generator)), differentiable=True
    )


def rounded_input(net: Classifier) -> Wrapped:
    """A preprocessing that is not differentiable: thirteen grey levels."""
    return Wrapped(lambda images: net((images * 12).round() / 12), differentiable=True)


def coarse_logits(net: Classifier) -> Wrapped:
    """Logits in steps of 1.5: a staircase, flat almost everywhere."""
    return Wrapped(lambda images: (net(images) / 1.5).round() * 1.5, differentiable=True)


def two_bits(net: nn.Sequential, *, straight_through: bool = False) -> Wrapped:
    """Four levels for every activation; `straight_through` lets gradients pass a rounding as if it were not there."""

    def forward(images: Tensor) -> Tensor:
        for layer in net:
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                top = 2.0
                clipped = images.clamp(max=top)
                levels = (clipped * 3 / top).round() * top / 3
                images = clipped + (levels - clipped).detach() if straight_through else levels
        return images

    return Wrapped(forward, differentiable=True)


def reversed_gradients(net: Classifier) -> Wrapped:
    """The net's answers, and gradients that point the other way."""
    return Wrapped(lambda images: net(2 * images.detach() - images), differentiable=True)
