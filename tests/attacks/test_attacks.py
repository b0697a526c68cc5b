"""Names of attacks: what they mean, and what is said of those that mean nothing."""

import pytest
import torch

from edgekit.attacks import ATTACKS, parse
from edgekit.attacks.apgd import apgd, targeted
from edgekit.attacks.diva import Pair, diva
from edgekit.attacks.fab import fab
from edgekit.attacks.fgsm import fgsm
from edgekit.attacks.nes import nes
from edgekit.attacks.pgd import pgd
from edgekit.attacks.square import square
from edgekit.attacks.suites import SUITES
from edgekit.errors import EdgekitError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "restarts", "same_as"),
    [
        ("pgd7", 1, lambda *a, **k: pgd(*a, **k, steps=7, step_size=0.02, loss="ce")),
        ("pgd3x5", 5, lambda *a, **k: pgd(*a, **k, steps=3, step_size=0.02, loss="ce")),
        ("pgd7-margin", 1, lambda *a, **k: pgd(*a, **k, steps=7, step_size=0.02, loss="margin")),
        ("pgd3x2-margin", 2, lambda *a, **k: pgd(*a, **k, steps=3, step_size=0.02, loss="margin")),
        ("pgd7@0.01", 1, lambda *a, **k: pgd(*a, **k, steps=7, step_size=0.01)),
        ("pgd3x2-margin@2/255", 2, lambda *a, **k: pgd(*a, **k, steps=3, step_size=2 / 255, loss="margin")),
        ("pgd3-kl", 1, lambda *a, **k: pgd(*a, **k, steps=3, loss="kl")),
        ("apgdt5", 1, lambda *a, **k: targeted(*a, **k, steps=5)),
        ("apgdt5x2", 2, lambda *a, **k: targeted(*a, **k, steps=5, targets=9)),
        ("fab3", 1, lambda *a, **k: fab(*a, **k, steps=3, targets=9)),
        ("nes30x2", 2, lambda *a, **k: nes(*a, **k, queries=30)),
        ("apgd7", 1, lambda *a, **k: apgd(*a, **k, steps=7, loss="ce")),
        ("apgd7x2-dlr", 2, lambda *a, **k: apgd(*a, **k, steps=7, loss="dlr")),
        ("square9", 1, lambda *a, **k: square(*a, **k, queries=9)),
        ("square9x3", 3, lambda *a, **k: square(*a, **k, queries=9)),
        ("fgsm", 1, fgsm),
    ],
)
def test_a_name_says_steps_starts_and_loss(net, digits, name: str, restarts: int, same_as) -> None:
    (attack,) = parse(name)
    assert (attack.name, attack.restarts) == (name, restarts)
    images, labels, seeds = digits[2][:50], digits[3][:50], torch.arange(50)
    ours = attack.run(net, net, images, labels, seeds=seeds, epsilon=0.08)  # a step of PGD is epsilon / 4
    expected = same_as(net, net, images, labels, seeds=seeds, epsilon=0.08)
    assert ours[0].equal(expected[0])
    assert ours[1].equal(expected[1])


@pytest.mark.parametrize("name", ["fgsm", "pgd5-margin", "apgd5", "apgdt3", "fab3", "nes30", "square30"])
def test_the_norm_reaches_the_attack(net, digits, name: str) -> None:
    images, labels, seeds = digits[2][:50], digits[3][:50], torch.arange(50)
    (attack,) = parse(name, norm="L2")
    assert attack.norm == "L2"
    adversarial, fooled = attack.run(net, net, images, labels, seeds=seeds, epsilon=0.8)
    moved = (adversarial - images).flatten(1).norm(dim=1)
    assert moved.max() <= 0.8 + 1e-6
    assert (adversarial - images).abs().max() > 0.2  # no Linf ball
    assert net(adversarial).argmax(1).ne(labels).equal(fooled)


def test_diva_follows_a_pair(net, digits) -> None:
    (attack,) = parse("diva4@0.01")
    assert attack.needs == ("twin", "float")
    arguments = (Pair(net, net), net, digits[2][:50], digits[3][:50])
    ours = attack.run(*arguments, seeds=torch.arange(50), epsilon=0.08)
    assert ours[0].equal(diva(*arguments, seeds=torch.arange(50), epsilon=0.08, steps=4, step_size=0.01)[0])


def test_a_suite_stands_for_its_attacks_and_overlaps_are_run_once() -> None:
    def names(text: str) -> list[str]:
        return [attack.name for attack in parse(text)]

    assert names("autoattack") == ["apgd100", "apgdt100", "fab100", "square5000"]
    assert names("rslad") == ["fgsm", "pgd20@2/255", "pgd20@0.003", "pgd30-margin", *names("autoattack")]
    assert names("square5000,autoattack") == ["square5000", "apgd100", "apgdt100", "fab100"]
    assert names("deployed") == ["pgd20-margin", "apgdt10", "nes500"]
    assert names("deployed,apgdt10") == names("deployed")
    assert all(names(suite) for suite in SUITES)


def test_a_list_keeps_its_order() -> None:
    assert [attack.name for attack in parse("fgsm, pgd20,pgd100x5")] == ["fgsm", "pgd20", "pgd100x5"]


def test_everything_listed_can_be_parsed() -> None:
    assert [attack.name for attack in parse(",".join(ATTACKS))] == list(ATTACKS)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("pgd0", "steps goes from 1 to 10,000. Did you mean 'pgd20'?"),
        ("pdg20", "there is no attack 'pdg20'. Did you mean 'pgd20'?"),
        ("PGD20", "Did you mean 'pgd20'?"),
        ("fgsn", "Did you mean 'fgsm'?"),
        ("pgd20-margn", "Did you mean 'margin'?"),
        ("pgd10001", "from 1 to 10,000"),
        ("pgd" + "9" * 5000, "from 1 to 10,000"),
        ("pgd020", "from 1 to 10,000"),
        ("pgd20x0", "starts goes from 1 to 100"),
        ("pgd20x101", "starts goes from 1 to 100"),
        ("pgd", "there is no attack 'pgd'"),
        ("apgd0", "steps goes from 1 to 10,000"),
        ("square0", "queries goes from 1 to 10,000. Did you mean 'square1000'?"),
        ("square", "Did you mean 'square1000'?"),
        ("pgd٢٠", "there is no attack"),
        ("", "there is no attack ''"),
        ("pgd20,", "there is no attack ''"),
        ("pgd20,fgsm,pgd20", "'pgd20' is named twice"),
        ("autoattack,autoattack", "'autoattack' is named twice"),
        ("autoatack", "Did you mean 'autoattack'?"),
        ("pgd20@0", "the step is a number above 0"),
        ("pgd20@1/0", "the step is a number above 0"),
        ("pgd20@1.2.3", "the step is a number above 0"),
        ("pgd20@" + "9" * 400, "the step is a number above 0"),
        ("pgd20@", "there is no attack"),
        ("pgd20@-1", "there is no attack"),
        ("apgd20@2/255", "there is no attack"),
        ("fab10x2", "there is no attack"),
        ("fab10-dlr", "there is no attack"),
        ("fgsm20", "there is no attack"),
        ("nes500-ce", "there is no attack"),
        ("diva20-margin", "there is no attack"),
        ("pgd20\x1b[31m", r"there is no attack 'pgd20\x1b[31m'"),
    ],
)
def test_what_means_nothing_is_refused_in_one_sentence(names: str, said: str) -> None:
    with pytest.raises(EdgekitError) as caught:
        parse(names)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_norm_is_refused() -> None:
    assert [attack.norm for attack in parse("autoattack", norm="L2")] == ["L2"] * 4
    with pytest.raises(EdgekitError, match="Did you mean 'L2'"):
        parse("pgd20", norm="l2")
