"""The worst case over attacks, sources and starts, against the same attacks run one by one."""

import torch
from torch import Tensor

from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import confront
from edgekit.classifier import Wrapped
from edgekit.randomness import derive

torch.set_num_threads(1)


def test_a_sample_is_robust_only_where_no_attack_source_or_start_fools(net, digits) -> None:
    images, labels = digits[2:]
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
