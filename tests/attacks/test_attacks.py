"""Names of attacks: what they mean, and what is said of those that mean nothing."""

import pytest
import torch

from edgekit.attacks import ATTACKS, parse
from edgekit.attacks.apgd import apgd
from edgekit.attacks.fgsm import fgsm
from edgekit.attacks.pgd import pgd
from edgekit.attacks.square import square
from edgekit.errors import EdgekitError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "restarts", "same_as"),
    [
        ("pgd7", 1, lambda *a, **k: pgd(*a, **k, steps=7, step_size=0.02, loss="ce")),
        ("pgd3x5", 5, lambda *a, **k: pgd(*a, **k, steps=3, step_size=0.02, loss="ce")),
        ("pgd7-margin", 1, lambda *a, **k: pgd(*a, **k, steps=7, step_size=0.02, loss="margin")),
        ("pgd3x2-margin", 2, lambda *a, **k: pgd(*a, **k, steps=3, step_size=0.02, loss="margin")),
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
        ("pgd20\x1b[31m", r"there is no attack 'pgd20\x1b[31m'"),
    ],
)
def test_what_means_nothing_is_refused_in_one_sentence(names: str, said: str) -> None:
    with pytest.raises(EdgekitError) as caught:
        parse(names)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
