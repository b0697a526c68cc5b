"""The worst case over attacks, sources and starts, against the same attacks run one by one."""

import pytest
import torch
from torch import Tensor

from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Outcome, Part, confront
from edgekit.attacks.grid import Grid
from edgekit.classifier import Wrapped
from edgekit.errors import EdgekitError
from edgekit.randomness import derive

torch.set_num_threads(1)


def test_a_sample_is_robust_only_where_no_attack_source_or_start_fools(net, digits) -> None:
    images, labels = digits[2][:120], digits[3][:120]
    index = torch.arange(1000, 1000 + len(labels))
    blurred = Wrapped(lambda batch: net(0.7 * batch + 0.1), differentiable=True)
    judge = Wrapped(lambda batch: net(batch).detach(), differentiable=False)
    attacks = parse("fgsm,pgd8x2")
    outcome = confront(judge, {"float": net, "twin": blurred}, attacks, images, labels, index, seed=5, epsilon=0.06)
    clean = net(images)
    assert outcome.clean.equal(clean)
    assert list(outcome.fooled) == [("fgsm", "float"), ("fgsm", "twin"), ("pgd8x2", "float"), ("pgd8x2", "twin")]
    expected: list[Tensor] = []
    for attack in attacks:
        for source in (net, blurred):
            hits = torch.zeros(len(labels), dtype=torch.bool)
            for i in range(len(labels)):  # one sample at a time, every start: another order, the same answer
                for restart in range(attack.restarts):
                    seeds = derive(5, restart, samples=index[i : i + 1])
                    hits[i] |= attack.run(
                        source, judge, images[i : i + 1], labels[i : i + 1], seeds=seeds, epsilon=0.06
                    )[1][0]
            expected.append(hits)
    assert all(ours.equal(theirs) for ours, theirs in zip(outcome.fooled.values(), expected, strict=True))
    union = torch.stack(expected).any(0)
    assert outcome.robust.equal(~union)
    assert judge(outcome.adversarial).argmax(1).ne(labels).equal(union)
    assert (outcome.adversarial - images).abs().max() <= 0.06 + 1e-6
    names, sources = outcome.won()
    for i, (name, source) in enumerate(zip(names, sources, strict=True)):
        if clean[i].argmax() != labels[i]:
            assert (name, source) == ("clean", "")
            assert outcome.adversarial[i].equal(images[i])
        else:
            first = next((pair for pair, hits in zip(outcome.fooled, expected, strict=True) if hits[i]), ("", ""))
            assert (name, source) == first
    assert {"fgsm", "pgd8x2", "clean", ""} <= set(names)  # or the test could not tell them apart
    assert sum(e.sum() for e in expected[:1]) < union.sum()


def test_a_result_does_not_depend_on_which_samples_share_the_draw(net, digits) -> None:
    images, labels, index = digits[2], digits[3], torch.arange(297)
    whole = confront(net, {"float": net}, parse("pgd5"), images, labels, index, seed=0, epsilon=0.04)
    part = torch.arange(0, 297, 3)
    alone = confront(net, {"float": net}, parse("pgd5"), images[part], labels[part], index[part], seed=0, epsilon=0.04)
    assert alone.robust.equal(whole.robust[part])
    other = confront(net, {"float": net}, parse("pgd5"), images, labels, index, seed=1, epsilon=0.04)
    assert not other.adversarial.equal(whole.adversarial)


def test_progress_counts_every_sample_once_for_each_source(net, digits) -> None:
    images, labels = digits[2:]
    told: dict[str, int] = {}

    def advance(attack: Attack, samples: int) -> None:
        told[attack.name] = told.get(attack.name, 0) + samples

    sources = {"float": net, "twin": net}
    outcome = confront(
        net, sources, parse("fgsm,pgd1x4"), images, labels, labels, seed=0, epsilon=0.01, advance=advance
    )
    assert told == {"fgsm": 2 * 297, "pgd1x4": 2 * 297}
    assert set(outcome.seconds) == {"fgsm", "pgd1x4"}


def test_an_attack_without_gradients_runs_once_against_the_scores_whatever_sources_there_are(net, digits) -> None:
    images, labels = digits[2][:60], digits[3][:60]
    told: dict[str, int] = {}
    outcome = confront(
        net,
        {"float": net, "twin": net},
        parse("fgsm,square20"),
        images,
        labels,
        labels,
        seed=0,
        epsilon=0.05,
        advance=lambda attack, samples: told.update({attack.name: told.get(attack.name, 0) + samples}),
    )
    assert list(outcome.fooled) == [("fgsm", "float"), ("fgsm", "twin"), ("square20", "scores")]
    assert told == {"fgsm": 120, "square20": 60}
    (alone,) = parse("square20")
    expected = alone.run(net, net, images, labels, seeds=derive(0, 0, samples=labels), epsilon=0.05)[1]
    assert outcome.fooled["square20", "scores"].equal(expected)
    assert outcome.robust.equal(~torch.stack(list(outcome.fooled.values())).any(0))


def alike(one: Outcome, other: Outcome) -> bool:
    same = all(one.fooled[pair].equal(other.fooled[pair]) for pair in one.fooled)
    return (
        same
        and list(one.fooled) == list(other.fooled)
        and one.adversarial.equal(other.adversarial)
        and one.winner.equal(other.winner)
    )


class Notebook:
    """A memory that breaks off after some parts, as a process does that is killed."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str, int], Part] = {}
        self.left = 0

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        return self.parts.get((attack, source, chunk))

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        assert (attack, source, chunk) not in self.parts
        self.parts[attack, source, chunk] = part


def test_a_run_that_is_interrupted_again_and_again_ends_as_one_that_never_was(net, digits) -> None:
    images, labels = digits[2:]
    asked: list[int] = []
    judge = Wrapped(lambda batch: asked.append(len(batch)) or net(batch).detach(), differentiable=False)
    arguments = (judge, {"float": net, "twin": net}, parse("fgsm,pgd3x2,square5"), images, labels, labels)
    undisturbed = confront(*arguments, seed=3, epsilon=0.05)
    all_of_it = sum(asked)
    asked.clear()
    memory = Notebook()
    for budget in range(4):  # 10 parts: 2 chunks of 2 + 2 + 1 pairs
        memory.left = budget
        with pytest.raises(KeyboardInterrupt):
            confront(*arguments, seed=3, epsilon=0.05, memory=memory)
    assert len(memory.parts) == 0 + 1 + 2 + 3
    memory.left, before = 10, dict(memory.parts)
    asked.clear()
    resumed = confront(*arguments, seed=3, epsilon=0.05, memory=memory)
    assert alike(resumed, undisturbed)
    assert sum(asked) < all_of_it
    assert all(memory.parts[key] is part for key, part in before.items())
    asked.clear()
    assert alike(confront(*arguments, seed=3, epsilon=0.05, memory=memory), undisturbed)
    assert sum(asked) == len(images)  # nothing but the clean images
    assert resumed.seconds["fgsm"] == sum(part.seconds for key, part in memory.parts.items() if key[0] == "fgsm")


def test_an_attack_whose_sources_are_missing_is_skipped_and_named(net, digits) -> None:
    images, labels = digits[2][:60], digits[3][:60]
    attacks = parse("diva4,fgsm,square5")

    def run(sources: dict) -> Outcome:
        return confront(net, sources, attacks, images, labels, labels, seed=0, epsilon=0.05)

    both = run({"float": net, "twin": net})
    assert both.skipped == ()
    assert ("diva4", "twin+float") in both.fooled
    one = run({"float": net})
    assert one.skipped == ("diva4",)
    assert list(one.fooled) == [("fgsm", "float"), ("square5", "scores")]
    none = run({})
    assert none.skipped == ("diva4", "fgsm")
    nothing = confront(net, {}, parse("diva4"), images, labels, labels, seed=0, epsilon=0.05)
    assert nothing.skipped == ("diva4",)
    assert nothing.robust.equal(net(images).argmax(1) == labels)
    assert nothing.adversarial.equal(images)
    assert set(nothing.won()[0]) == {"", "clean"}


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 20 / 255), ("Linf", 0.07), ("L2", 0.7)])
def test_on_the_grid_the_judge_sees_what_is_returned_and_both_are_uint8_images_in_the_ball(
    net, digits, norm: str, epsilon: float
) -> None:
    images, labels = (digits[2] * 255).round() / 255, digits[3]
    seen: list[Tensor] = []
    judge = Wrapped(lambda batch: seen.append(batch.clone()) or net(batch).detach(), differentiable=False)
    names = "pgd6,fab4,nes20" if norm == "L2" else "pgd6,apgd6,square20"
    arguments = (judge, {"float": net}, parse(names, norm), images, labels, labels)
    outcome = confront(*arguments, seed=0, epsilon=epsilon, grid=True)
    for batch in [*seen, outcome.adversarial]:
        assert batch.equal((batch * 255).round().clamp(0, 255) / 255)
    order = float("inf") if norm == "Linf" else 2
    moved = torch.linalg.vector_norm(outcome.adversarial - images, ord=order, dim=(1, 2, 3))
    assert moved.max() <= epsilon + 1e-6
    assert moved.max() > 0.9 * epsilon
    fooled = outcome.winner >= 0
    assert net(outcome.adversarial).argmax(1).ne(labels).equal(~outcome.robust)
    shown = {bytes(image.numpy().tobytes()) for batch in seen for image in batch}
    assert all(image.numpy().tobytes() in shown for image in outcome.adversarial[fooled])
    free = confront(*arguments, seed=0, epsilon=epsilon)
    assert 0.7 * (~free.robust).sum() < (~outcome.robust).sum()
    assert not free.adversarial.equal((free.adversarial * 255).round() / 255)


def test_on_the_grid_what_only_rounds_out_of_the_ball_stays_inside() -> None:
    """All nearest grid points lie outside, one step away in each pixel: nothing but the clean image is left."""
    center = torch.full((1, 1, 1, 2), 100 / 255)
    away = torch.tensor([0.6, -0.6]).view(1, 1, 1, 2) / 255
    grid = Grid(Wrapped(lambda batch: batch.flatten(1), differentiable=False), 0.85 / 255, "L2")
    assert grid.deliver(center + away, center).equal(center)
    # Of a longer step the whole levels towards the image are kept.
    wider = Grid(Wrapped(lambda batch: batch.flatten(1), differentiable=False), 2.27 / 255, "L2")
    assert (wider.deliver(center + away * 1.6 / 0.6, center) * 255).round().flatten().tolist() == [101, 99]


def test_on_the_grid_clean_images_off_it_are_refused(net, digits) -> None:
    with pytest.raises(EdgekitError, match="not uint8 values"):
        confront(
            net, {"float": net}, parse("pgd2"), digits[2] + 0.001, digits[3], digits[3], seed=0, epsilon=0.1, grid=True
        )
