"""A small network, plainly trained on real digits in about two seconds: something that attacks can break."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """images (N, 1, 8, 8) float32 in [0, 1] and labels: 1,500 to train on, then 297 to attack."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


@pytest.fixture(scope="session")
def net(digits) -> nn.Module:
    images, labels = digits[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for batch in torch.randperm(len(images)).split(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    model.differentiable = True
    return model.eval().requires_grad_(False)
