import pytest
import torch
from networks import network, photos
from torch import nn

from edgekit.models.fold import fold

IMAGES = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(part, kind) for part in module.modules())


def lively(*parts: nn.Module) -> nn.Sequential:
    """In training mode, with normalization layers that have seen images and scale and shift by what is not 1 and 0."""
    made = nn.Sequential(*parts)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d) and part.affine:
                nn.init.uniform_(part.weight, 0.5, 2)
                nn.init.normal_(part.bias)
        for _ in range(3):
            made(2 + 3 * torch.rand(16, 2, 8, 8))
    return made


@pytest.mark.parametrize("architecture", ["mobilenetv2", "resnet18"])
def test_a_folded_network_answers_alike_has_the_same_gradient_and_no_normalization_left(architecture: str):
    whole, images = network(architecture), photos(8)
    folded = fold(whole)
    assert count(folded, nn.BatchNorm2d) == 0 < count(whole, nn.BatchNorm2d)
    answers, gradients = [], []
    for answer in (whole, folded):
        x = images.clone().requires_grad_()
        logits = answer(x)
        answers.append(logits.detach())
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), x)[0])
    assert answers[1].allclose(answers[0], atol=1e-4)
    assert gradients[1].allclose(gradients[0], atol=1e-3 * gradients[0].abs().max().item())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_every_pair_of_bias_and_scale(bias: bool, affine: bool):
    whole = lively(nn.Conv2d(2, 6, 3, bias=bias, groups=2), nn.BatchNorm2d(6, affine=affine), nn.ReLU())
    expected = whole.eval()(IMAGES)
    assert fold(whole)(IMAGES).allclose(expected, atol=1e-5)
    assert count(fold(whole), nn.BatchNorm2d) == 0


def test_the_network_itself_stays_as_it_was():
    whole = lively(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    folded = fold(whole)
    folded(IMAGES.requires_grad_()).sum().backward()
    assert whole.training
    assert all(part.training for part in whole.modules())
    assert not any(part.training for part in folded.modules())
    assert count(whole, nn.BatchNorm2d) == 2
    assert list(whole.state_dict()) == list(before)
    assert all(value.equal(before[name]) for name, value in whole.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in whole.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_what_cannot_be_folded_stays():
    counting = nn.Conv2d(2, 4, 3)
    counting.register_forward_hook(lambda module, inputs, output: output + 1)
    for parts in (
        (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (counting, nn.BatchNorm2d(4)),
        (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    ):
        whole = lively(*parts)
        expected = whole.eval()(IMAGES)
        assert fold(whole)(IMAGES).equal(expected)
        assert count(fold(whole), nn.BatchNorm2d) == 1


def test_a_view_runs_its_own_layers_where_mixed_precision_replaced_the_forward_of_the_network():
    whole = lively(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    expected = whole(IMAGES)
    whole.forward = lambda images: pytest.fail("the network itself was called")
    assert fold(whole)(IMAGES).allclose(expected, atol=1e-5)
