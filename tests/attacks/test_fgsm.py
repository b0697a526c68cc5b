import torch

from edgekit.attacks.fgsm import fgsm
from edgekit.classifier import Wrapped

torch.set_num_threads(1)


def test_it_is_the_one_step_of_the_paper(net, digits) -> None:
    images, labels = digits[2:]
    epsilon = 0.1
    x = images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(net(x), labels).backward()
    expected = torch.minimum(torch.maximum(images + epsilon * torch.sign(x.grad), torch.tensor(0.0)), torch.tensor(1.0))
    clean = net(images).argmax(1) == labels
    adversarial, fooled = fgsm(net, net, images, labels, seeds=None, epsilon=epsilon)
    assert torch.allclose(adversarial[clean], expected[clean], atol=1e-6)
    assert adversarial[~clean].equal(images[~clean])
    assert fooled.equal(net(adversarial).argmax(1) != labels)
    assert fooled[~clean].all()
    assert 0.1 < fooled[clean].float().mean() < 0.99
    assert (adversarial - images).abs().max() <= epsilon + 1e-6


def test_the_judge_sees_the_clean_image_and_the_result(net, digits) -> None:
    images, labels = digits[2][:64], digits[3][:64]
    seen = []
    judge = Wrapped(lambda batch: seen.append(batch.clone()) or net(batch).detach().flip(1), differentiable=False)
    clean = judge(images).argmax(1) == labels
    seen.clear()
    adversarial, fooled = fgsm(net, judge, images, labels, seeds=None, epsilon=0.1)
    assert [len(batch) for batch in seen] == [64, int(clean.sum())]
    assert seen[1].equal(adversarial[clean])
    assert fooled.equal(net(adversarial).flip(1).argmax(1) != labels)
