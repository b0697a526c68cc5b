"""PGD against what can be computed otherwise: Hölder's inequality, brute force over corners, a second PGD."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from edgekit.attacks.norms import NORMS, slope
from edgekit.attacks.pgd import pgd
from edgekit.classifier import Wrapped
from edgekit.errors import EdgekitError
from edgekit.randomness import derive

torch.set_num_threads(1)
SEEDS = derive(0, 0, samples=torch.arange(297))


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: float = 0.0) -> Wrapped:
    """Logits (s, -s), s = <weight, x> + bias: summed row by row, so that a batch cannot change a bit of them."""

    def logits(images: Tensor) -> Tensor:
        score = (images * weight).flatten(1).sum(1) + bias
        return torch.stack([score, -score], 1)

    return Wrapped(logits, differentiable=True)


class Recorder:
    """A judge that remembers every batch it was shown."""

    differentiable = False

    def __init__(self, judge: nn.Module | Wrapped) -> None:
        self.judge, self.seen = judge, []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.judge(images).detach()


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_linear_judge_is_fooled_exactly_where_hoelder_says(loss: str, shared: bool) -> None:
    weight, images = torch.linspace(-1, 1, 48).view(3, 4, 4), 0.4 + 0.2 * random_images(96, 3, 4, 4)
    middle = (images * weight).flatten(1).sum(1).median().item()
    judge = linear(weight, -middle)
    source = judge if shared else linear(weight, 1.0)  # the same gradients, another border
    labels = judge(images).argmax(1)
    distance = judge(images)[:, 0].abs() / weight.abs().sum()
    epsilon = 1.001 * distance.median().item()
    adversarial, fooled = pgd(
        source, judge, images, labels, seeds=SEEDS[:96], epsilon=epsilon, step_size=epsilon, steps=2, loss=loss
    )
    assert fooled.equal(distance < epsilon)
    assert 40 < fooled.sum() < 56
    assert judge(adversarial).argmax(1).ne(labels).equal(fooled)
    assert (adversarial - images).abs().max() <= epsilon + 1e-6


def test_near_the_border_of_the_pixel_range_only_the_corners_inside_it_count() -> None:
    # 6 pixels, so that all 2^6 corners of ball and range together can be tried: the best of them decides a linear net.
    weight, images = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7]).view(1, 2, 3), random_images(200, 1, 2, 3, seed=3)
    judge, epsilon = linear(weight, -0.6), 0.15
    labels = judge(images).argmax(1)
    reachable = torch.zeros(200, dtype=torch.bool)
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        corner = (images + epsilon * torch.tensor(signs).view(1, 2, 3)).clamp(0, 1)
        reachable |= judge(corner).argmax(1) != labels
    adversarial, fooled = pgd(judge, judge, images, labels, seeds=derive(1, samples=torch.arange(200)), epsilon=epsilon)
    assert fooled.equal(reachable)
    assert 20 < fooled.sum() < 180
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= epsilon + 1e-6


@pytest.mark.parametrize("shared", [False, True])
def test_what_happens_to_a_sample_does_not_depend_on_its_neighbours(shared: bool) -> None:
    weight = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1))
    judge = linear(weight)
    source = judge if shared else linear(weight, 0.3)
    images = random_images(60, 3, 5, 5)
    labels = judge(images).argmax(1)
    labels[::7] = 1 - labels[::7]  # some are wrong already
    together = pgd(source, judge, images, labels, seeds=SEEDS[:60], epsilon=0.05, steps=5)
    assert 0 < together[1].sum() < 60
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = pgd(source, judge, images[order], labels[order], seeds=SEEDS[order], epsilon=0.05, steps=5)
    assert shuffled[0].equal(together[0][order])
    assert shuffled[1].equal(together[1][order])
    for i in (0, 1, 31):
        alone = pgd(source, judge, images[i : i + 1], labels[i : i + 1], seeds=SEEDS[i : i + 1], epsilon=0.05, steps=5)
        assert alone[0][0].equal(together[0][i])
        assert alone[1][0] == together[1][i]


def test_a_slope_as_small_as_float32_allows_is_not_lost_in_a_large_batch() -> None:
    torch.set_flush_denormal(True)  # as verify does
    try:
        x = torch.ones(200, 1, 2, 2, requires_grad=True)
        gradient = slope((4e-38 * x).flatten(1).sum(1), x)
        assert NORMS["Linf"].steepest(gradient).equal(torch.ones(200, 1, 2, 2))
        assert NORMS["L2"].steepest(gradient).allclose(torch.full((200, 1, 2, 2), 0.5))
    finally:
        torch.set_flush_denormal(False)


def test_the_start_is_uniform_in_the_ball() -> None:
    images = torch.full((50, 3, 8, 8), 0.5)
    judge = Recorder(linear(torch.ones(3, 8, 8)))
    pgd(linear(torch.ones(3, 8, 8)), judge, images, torch.zeros(50).long(), seeds=SEEDS[:50], epsilon=0.1, steps=1)
    offset = (judge.seen[1] - images).flatten() / 0.1
    quarters = torch.histc(offset, bins=4, min=-1, max=1) / len(offset)
    assert offset.abs().max() <= 1 + 1e-5
    assert (quarters - 0.25).abs().max() < 0.02  # 9,600 draws: four standard deviations


def test_the_first_iterate_that_fools_is_kept_though_its_loss_is_lower() -> None:
    # One pixel that walks upwards; the judge hesitates among three classes, then is nearly sure of two.
    def answer(batch: Tensor) -> Tensor:
        return torch.where(batch.flatten(1) < 0.55, torch.tensor([[0.1, 0.0, 0.0]]), torch.tensor([[2.0, 2.1, -50.0]]))

    upwards = Wrapped(lambda batch: torch.cat([-batch.flatten(1), batch.flatten(1)], 1), differentiable=True)
    judge = Recorder(Wrapped(answer, differentiable=False))
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    adversarial, fooled = pgd(upwards, judge, image, label, seeds=None, epsilon=0.2, step_size=0.04, steps=5)
    assert fooled.item()
    assert adversarial.item() == pytest.approx(0.58)
    assert len(judge.seen) == 4  # clean, 0.50, 0.54, 0.58


def test_the_same_seeds_give_the_same_images_and_others_do_not(net, digits) -> None:
    images, labels = digits[2][:40], digits[3][:40]
    first, again = (pgd(net, net, images, labels, seeds=SEEDS[:40], epsilon=0.02, steps=2)[0] for _ in range(2))
    other = pgd(net, net, images, labels, seeds=derive(0, 1, samples=torch.arange(40)), epsilon=0.02, steps=2)[0]
    assert first.equal(again)
    assert not first.equal(other)


def test_epsilon_zero_changes_no_image_and_no_answer(net, digits) -> None:
    images, labels = digits[2:]
    adversarial, fooled = pgd(net, net, images, labels, seeds=SEEDS, epsilon=0.0, steps=3)
    assert adversarial.equal(images)
    assert fooled.equal(net(images).argmax(1) != labels)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_huge_epsilon_leaves_nothing(net, digits, loss: str) -> None:
    images, labels = digits[2:]
    assert pgd(net, net, images, labels, seeds=SEEDS, epsilon=1.0, loss=loss)[1].all()


def test_more_steps_find_a_higher_loss(net, digits) -> None:
    images, labels = digits[2:]
    found = [
        pgd(net, net, images, labels, seeds=SEEDS, epsilon=0.05, step_size=0.01, steps=steps) for steps in (1, 2, 5, 20)
    ]
    for (_, fewer), (_, more) in itertools.pairwise(found):
        assert (more | ~fewer).all()  # a longer run repeats the shorter one and goes on
    robust = ~found[-1][1]
    means = [nn.functional.cross_entropy(net(x[robust]), labels[robust]).item() for x, _ in found]
    assert means == sorted(means)
    assert means[-1] > 1.2 * means[0]


def test_the_result_is_the_clean_image_where_that_is_wrong_already(net, digits) -> None:
    images, labels = digits[2][:50], digits[3][:50].clone()
    labels[:10] = (labels[:10] + 1) % 10
    adversarial, fooled = pgd(net, net, images, labels, seeds=SEEDS[:50], epsilon=0.05)
    assert fooled[:10].all()
    assert adversarial[:10].equal(images[:10])


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_judge_sees_every_iterate_and_what_fooled_leaves_the_batch(net, digits, loss: str) -> None:
    images, labels = digits[2:]
    judge = Recorder(net)
    adversarial, fooled = pgd(net, judge, images, labels, seeds=SEEDS, epsilon=0.06, steps=6, loss=loss)
    assert len(judge.seen) == 1 + 6 + 1  # the clean images, the start, and what each step made of it
    assert judge.seen[0].equal(images)
    # Followed by hand: who is left after each answer is exactly who comes next, in order.
    active = (net(images).argmax(1) == labels).nonzero().squeeze(1)
    best = torch.full((len(images),), -torch.inf)
    expected, wrong = images.clone(), net(images).argmax(1) != labels
    for batch in judge.seen[1:]:
        assert len(batch) == len(active)
        logits = net(batch)
        margin = torch.tensor(
            [max(row[j] for j in range(10) if j != y) - row[y] for row, y in zip(logits, labels[active], strict=True)]
        )
        for place, sample in enumerate(active.tolist()):
            value = margin[place]  # whatever is climbed
            if logits[place].argmax() != labels[sample]:
                wrong[sample], expected[sample] = True, batch[place]
            elif value > best[sample]:
                best[sample], expected[sample] = value, batch[place]
        active = active[logits.argmax(1) == labels[active]]
    assert fooled.equal(wrong)
    assert adversarial.equal(expected)
    assert 0 < len(active) < len(images) - 30


def test_the_source_is_followed_and_the_judge_is_believed(net, digits) -> None:
    images, labels = digits[2:]
    blind = Wrapped(lambda batch: net(batch).detach().round(), differentiable=False)  # coarse, and without gradients
    adversarial, fooled = pgd(net, blind, images, labels, seeds=SEEDS, epsilon=0.06)
    assert blind(adversarial).argmax(1).ne(labels).equal(fooled)
    assert not net(adversarial).argmax(1).ne(labels).equal(fooled)  # or the test could not tell the two apart


def test_one_network_as_source_and_judge_costs_the_textbook_number_of_passes(net, digits) -> None:
    images, labels = digits[2][:30], digits[3][:30]
    calls = []
    counted = Wrapped(lambda batch: calls.append(len(batch)) or net(batch), differentiable=True)
    pgd(counted, counted, images, labels, seeds=SEEDS[:30], epsilon=0.001, steps=20)
    assert len(calls) == 1 + 20 + 1  # clean, one a step, and the last iterate
    calls.clear()
    pgd(
        counted,
        Wrapped(lambda batch: counted(batch), differentiable=True),
        images,
        labels,
        seeds=SEEDS[:30],
        epsilon=0.001,
        steps=20,
    )
    assert len(calls) == 1 + 2 * 20 + 1


def textbook_pgd(net, images, labels, start, epsilon, step_size, steps):
    """Written from the paper and from nothing else here: returns (fooled at the end, fooled at any iterate)."""
    delta, ever = start.clone(), torch.zeros(len(images), dtype=torch.bool)
    for _ in range(steps):
        point = (images + delta).clamp(0, 1).detach().requires_grad_()
        logits = net(point)
        ever |= logits.argmax(1) != labels
        nn.functional.cross_entropy(logits, labels).backward()
        delta = (point.detach() + step_size * torch.sign(point.grad) - images).clamp(-epsilon, epsilon)
    last = net((images + delta).clamp(0, 1)).argmax(1) != labels
    return last, ever | last


@pytest.mark.parametrize("epsilon", [0.03, 0.06, 0.1])
def test_it_is_never_weaker_than_a_second_textbook_pgd(net, digits, epsilon: float) -> None:
    images, labels = digits[2:]
    noise = (2 * random_images(*images.shape, seed=9) - 1) * epsilon
    last, ever = textbook_pgd(net, images, labels, noise, epsilon, epsilon / 4, 20)
    _, fooled = pgd(net, net, images, labels, seeds=SEEDS, epsilon=epsilon)
    assert fooled.float().mean() >= last.float().mean() - 0.004  # the starts differ: one image of 297
    # From the same start, the centre, the two must agree on every image.
    last, ever = textbook_pgd(net, images, labels, torch.zeros_like(images), epsilon, epsilon / 4, 20)
    _, fooled = pgd(net, net, images, labels, seeds=None, epsilon=epsilon)
    assert fooled.equal(ever)
    assert (fooled | ~last).all()


def test_a_source_without_usable_gradients_spoils_no_image(net, digits) -> None:
    images, labels = digits[2][:20], digits[3][:20]
    broken = Wrapped(lambda batch: (batch - batch).flatten(1)[:, :10].sqrt() * torch.nan, differentiable=True)
    adversarial, _ = pgd(broken, Recorder(net), images, labels, seeds=SEEDS[:20], epsilon=0.05, steps=3)
    assert adversarial.isfinite().all()
    assert (adversarial - images).abs().max() <= 0.05 + 1e-6


def test_under_l2_a_linear_judge_is_fooled_exactly_where_cauchy_and_schwarz_say() -> None:
    weight, images = torch.linspace(-1, 1, 48).view(3, 4, 4), 0.4 + 0.2 * random_images(96, 3, 4, 4)
    judge = linear(weight, -(images * weight).flatten(1).sum(1).median().item())
    labels = judge(images).argmax(1)
    distance = judge(images)[:, 0].abs() / weight.square().sum().sqrt()
    epsilon = 1.001 * distance.median().item()
    arguments = {"seeds": None, "epsilon": epsilon, "step_size": 2 * epsilon, "steps": 2}
    adversarial, fooled = pgd(judge, judge, images, labels, **arguments, norm="L2")
    assert fooled.equal(distance < epsilon)
    assert 40 < fooled.sum() < 56
    assert (adversarial - images).square().sum((1, 2, 3)).max() <= (epsilon + 1e-6) ** 2
    everywhere = pgd(judge, judge, images, labels, **arguments)[1]  # the cube around the same ball
    assert everywhere.sum() > 90


def test_kl_leaves_the_clean_answer_behind_as_trades_does(net, digits) -> None:
    images, labels = digits[2:]
    clean = net(images).double().softmax(1)

    def divergence(x: Tensor) -> Tensor:  # by its definition
        now = net(x).double().softmax(1)
        return (clean * (clean / now).log()).sum(1)

    unmoved = Recorder(Wrapped(lambda batch: torch.eye(10)[:1].expand(len(batch), 10), differentiable=False))
    pgd(net, unmoved, images, torch.zeros_like(labels), seeds=SEEDS, epsilon=0.06, loss="kl")
    start, last = unmoved.seen[1], unmoved.seen[-1]
    noise = (images + 0.06 * (2 * random_images(*images.shape) - 1).sign()).clamp(0, 1)
    assert (divergence(last) > divergence(noise)).float().mean() > 0.95
    assert (start - images)[(images > 0.01) & (images < 0.99)].std().item() == pytest.approx(0.001, rel=0.05)
    fooled = [pgd(net, net, images, labels, seeds=SEEDS, epsilon=0.06, loss=loss)[1].sum() for loss in ("kl", "ce")]
    assert 0.6 * fooled[1] < fooled[0] < fooled[1]  # it names no true class, so some answers only grow surer


def test_an_unknown_loss_is_named() -> None:
    image = torch.rand(1, 1, 2, 2)
    with pytest.raises(EdgekitError, match="Did you mean 'margin'"):
        pgd(linear(image[0]), linear(image[0]), image, torch.tensor([0]), seeds=None, loss="margn")
    with pytest.raises(EdgekitError, match="Did you mean 'L2'"):
        pgd(linear(image[0]), linear(image[0]), image, torch.tensor([0]), seeds=None, norm="l2")


def test_a_step_that_nobody_names_is_a_quarter_of_the_radius(net, digits) -> None:
    images, labels = digits[2][:30], digits[3][:30]
    quarter = pgd(net, net, images, labels, seeds=None, epsilon=0.08, step_size=0.02, steps=2)[0]
    assert pgd(net, net, images, labels, seeds=None, epsilon=0.08, steps=2)[0].equal(quarter)
    assert not pgd(net, net, images, labels, seeds=None, epsilon=0.08, step_size=0.04, steps=2)[0].equal(quarter)
