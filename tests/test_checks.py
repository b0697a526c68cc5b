"""Can the number be believed: masked models are flagged by name, honest ones are not, and the statistics are exact."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from masked import (
    EPSILON,
    PLAIN,
    as_file,
    coarse_logits,
    digits,
    noisy,
    reversed_gradients,
    rounded_input,
    saturated,
    trained,
    two_bits,
)
from scipy.stats import binomtest
from torch import Tensor

from edgekit import checks, models, quantize, twin
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import Meter, Outcome, confront
from edgekit.attacks.pgd import pgd
from edgekit.checks import Evidence, beats, contested, exceeds, planted, scrutinize, settle, settle_all
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import EdgekitError
from edgekit.examine import Beside, Subject, Trial, examine
from edgekit.formats import onnx
from edgekit.models import Network
from edgekit.randomness import uniform
from edgekit.verdict import Check, Rules

IMAGES, LABELS = (part[1200:1500] for part in digits())
INDEX = torch.arange(1200, 1500)


def evidence(
    judge: Classifier,
    sources: Mapping[str, Classifier],
    attacks: str | tuple[Attack, ...] = "pgd10",
    *,
    seed: int = 0,
    carried: Tensor | None = None,
) -> Evidence:
    """What an attack on `judge` leaves behind."""
    suite = parse(attacks) if isinstance(attacks, str) else attacks
    outcome = confront(judge, sources, suite, IMAGES, LABELS, INDEX, seed=seed, epsilon=EPSILON)
    return Evidence(judge, sources, suite, IMAGES, LABELS, INDEX, EPSILON, seed, outcome, carried)


def failed(found: list[Check]) -> set[str]:
    return {check.name for check in found if not check.passed}


def robust_accuracy(judge: Classifier, source: Classifier) -> float:
    outcome = evidence(judge, {"float": source}, "pgd20-margin").outcome
    return checks.share(outcome.robust)


@pytest.fixture(scope="module")
def net() -> Classifier:
    return trained("convolutional", robust=True)


def test_what_no_camera_delivers_is_not_held_against_a_suite_on_the_grid() -> None:
    # Names the brightest colour. Within 0.9/255 the grid holds the image alone, between its points a third is fooled.
    brightest = Wrapped(lambda images: 20 * images.mean((2, 3)), differentiable=True)
    draw, epsilon, index = torch.Generator().manual_seed(0), 0.9 / 255, torch.arange(300)
    levels = torch.randint(-6, 7, (300, 3, 1, 1), generator=draw) + torch.randint(-3, 4, (300, 3, 8, 8), generator=draw)
    images = (128 + levels) / 255
    labels, suite = brightest(images).argmax(1), parse("pgd20")
    found = {}
    for grid in (False, True):
        outcome = confront(
            brightest, {"twin": brightest}, suite, images, labels, index, seed=0, epsilon=epsilon, grid=grid
        )
        found[grid] = outcome.robust.float().mean().item()
        seen = Evidence(brightest, {"twin": brightest}, suite, images, labels, index, epsilon, 0, outcome, grid=grid)
        assert not failed(scrutinize(seen))
    assert found[False] < 0.8 < found[True] == 1


@pytest.mark.parametrize("names", [("twin", "float"), ("float",)])
def test_an_attack_that_follows_a_pair_is_checked_where_it_ran_and_nowhere_else(net, names: tuple[str, ...]) -> None:
    one = evidence(as_file(net), {name: net for name in names}, "pgd5,diva3")
    assert (("diva3", "twin+float") in one.outcome.fooled) == (len(names) == 2)
    found = scrutinize(one, self_test=True)
    assert failed(found) == set()
    assert {"epsilon_zero_is_clean", "planted_example_found"} <= {check.name for check in found}


def test_a_pair_alone_leaves_nothing_to_plant(net) -> None:
    found = scrutinize(evidence(as_file(net), {"twin": net, "float": net}, "diva3"), self_test=True)
    assert "planted_example_found" not in {check.name for check in found}


# Masked models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [saturated, rounded_input, coarse_logits, two_bits])
def test_a_mask_over_the_gradients_is_flagged_by_name(net, mask) -> None:
    hidden = mask(net)
    one = evidence(as_file(hidden), {"twin": hidden})
    found = scrutinize(one)
    assert {"gradients_reach_the_input", "huge_epsilon_fools", "steps_increase_loss"} <= failed(found)
    # Or the test could not see a mask: the attack overstates what a better one finds.
    assert checks.share(one.outcome.robust) > robust_accuracy(as_file(hidden), net) + 0.05
    for check in found:
        assert check.passed or checks.CURES.get(check.name, "") in check.why


def test_a_loss_that_sees_through_the_mask_is_not_flagged(net) -> None:
    hidden = saturated(net)
    one = evidence(as_file(hidden), {"twin": hidden}, "pgd10,pgd10-margin")
    assert failed(scrutinize(one)) == set()
    assert checks.share(one.outcome.robust) <= robust_accuracy(as_file(net), net) + 0.02


@pytest.mark.parametrize("mask", [coarse_logits, two_bits])
def test_a_mask_is_flagged_under_the_default_suite(net, mask) -> None:
    hidden = mask(net)
    found = scrutinize(evidence(as_file(hidden), {"twin": hidden}, "deployed"))
    assert {"gradients_reach_the_input", "gradient_free_is_weaker", "steps_increase_loss"} <= failed(found)


def test_the_default_suite_sees_through_a_saturated_softmax(net) -> None:
    hidden = saturated(net)
    one = evidence(as_file(hidden), {"twin": hidden}, "deployed")
    assert failed(scrutinize(one)) == set()
    assert checks.share(one.outcome.robust) <= robust_accuracy(as_file(net), net)


def test_straight_through_gradients_reach_what_is_known_of_two_bits(net) -> None:
    hidden, copy = two_bits(net), two_bits(net, straight_through=True)
    one = evidence(as_file(hidden), {"float": net, "twin": copy}, "pgd20,pgd20-margin,square300")
    assert failed(scrutinize(one)) == set()
    assert checks.share(one.outcome.robust) <= robust_accuracy(as_file(hidden), copy) + 0.02


def test_a_file_that_answers_at_random_is_flagged_by_name(net) -> None:
    hidden = noisy(net)
    subject = Subject("f", "onnx", "fp32", "model.onnx", 1, "00", "here", lambda: as_file(hidden))
    trial = Trial(parse("pgd10"), IMAGES, LABELS, INDEX, EPSILON)
    one = examine(subject, Beside(net, trial.run(net, {"float": net})), trial, Rules())
    assert {"same_answer_twice", "fooled_replayed"} <= failed(list(one.verdict.checks))


def test_gradients_that_point_elsewhere_lose_to_scores_and_to_another_model(net) -> None:
    wrong = reversed_gradients(net)
    alone = scrutinize(evidence(as_file(net), {"twin": wrong}, "pgd60"))
    assert {"gradient_free_is_weaker", "steps_increase_loss", "huge_epsilon_fools"} <= failed(alone)
    assert "transfer_is_weaker" not in {check.name for check in alone}  # from nothing, nothing is carried over
    assert "transfer_is_weaker" in failed(scrutinize(evidence(as_file(net), {"float": net, "twin": wrong})))
    carried = evidence(as_file(net), {"float": net}).outcome.adversarial
    assert "transfer_is_weaker" in failed(scrutinize(evidence(as_file(net), {"float": wrong}, carried=carried)))


def test_an_attack_that_stops_too_early_is_flagged_by_name(net) -> None:
    def timid(source, judge, images, labels, *, seeds, epsilon):
        return pgd(source, judge, images, labels, seeds=seeds, epsilon=epsilon / 10, steps=60)

    found = failed(scrutinize(evidence(as_file(net), {"twin": net}, (Attack("timid", 1, timid),))))
    assert {"more_steps_change_little", "huge_epsilon_fools", "gradient_free_is_weaker"} <= found
    assert not found & {"epsilon_zero_is_clean", "steps_increase_loss", "gradients_reach_the_input"}


def test_an_attack_that_leaves_its_ball_is_flagged_by_name(net) -> None:
    def loose(source, judge, images, labels, *, seeds, epsilon):
        moved = (images + 0.01).clamp(0, 1)
        return moved, judge(moved).argmax(1) != labels

    assert "epsilon_zero_is_clean" in failed(
        scrutinize(evidence(as_file(net), {"float": net}, (Attack("loose", 1, loose),)))
    )


def test_gradients_that_are_no_numbers_are_flagged(net) -> None:
    broken = Wrapped(
        lambda images: net(images) + 0 * (images.flatten(1)[:, :1] - images.flatten(1)[:, :1]).sqrt(),
        differentiable=True,
    )
    assert "gradients_reach_the_input" in failed(scrutinize(evidence(as_file(net), {"twin": broken})))


# Honest ones ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("seed", range(5))
def test_a_plainly_trained_model_raises_no_flag(kind: str, seed: int) -> None:
    plain = trained(kind)
    one = evidence(as_file(plain), {"float": plain, "twin": plain}, seed=seed)
    found = scrutinize(one, self_test=seed == 0)
    assert failed(found) == set(), [check for check in found if not check.passed]
    assert [check.name for check in found[:7]] == [
        "epsilon_zero_is_clean",
        "huge_epsilon_fools",
        *(["steps_increase_loss", "more_steps_change_little"] if one.outcome.robust.any() else []),
        "gradients_reach_the_input",
        "gradient_free_is_weaker",
        "transfer_is_weaker",
    ][: len(found)]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path, Trial]:
    """The CIFAR-10 student that benchmarks use, its int8 file as the exporter makes it, and 100 test images."""
    folder = Path(__file__).parents[1] / "benchmarks/students/cifar10-mobilenet-cpu"
    with numpy.load(folder / "images.npz") as archive:
        images = torch.from_numpy(archive["images"]).float() / 255
        labels, index = torch.from_numpy(archive["labels"]), torch.from_numpy(archive["index"])
    student = models.load(folder / "student.safetensors").requires_grad_(False)
    place = tmp_path_factory.mktemp("int8")
    onnx.write_model(quantize.quantize(onnx.lower(student), images, quantize.SCHEMES["x86"]).model, place, {})
    return student, place / onnx.FILE, Trial(parse("pgd20"), images, labels, index, 8 / 255)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_robust_student_and_its_honest_int8_file_raise_no_flag(cifar, seed: int) -> None:
    student, file, trial = cifar
    trial = replace(trial, seed=seed)
    own = trial.run(student, {"float": student})
    for open, copy in ((lambda: as_file(student), None), (lambda: onnx.open(file, threads=1), twin.open(file))):
        subject = Subject("f", "onnx", "int8", "model.onnx", 1, "00", "here", open, copy)
        one = examine(subject, Beside(student, own), trial, Rules(), self_test=seed == 0)
        assert failed(list(one.verdict.checks)) == set(), one.verdict.checks
        assert one.verdict.robust_accuracy is not None
        assert 0.2 < one.verdict.robust_accuracy.value < 0.5
        assert one.verdict.checks_seconds is not None and one.verdict.checks_seconds > 0


# The self-test --------------------------------------------------------------------------------------------------------


def test_what_is_planted_is_there_and_nowhere_else(net) -> None:
    images, labels = IMAGES[:40], LABELS[:40]
    right = net(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    plant = planted(as_file(net), images, labels, torch.arange(len(labels)), EPSILON)
    assert len(plant.labels) > len(labels) / 2
    copy = plant.over(net)
    assert copy(plant.images).argmax(1).equal(plant.labels)
    assert copy(plant.places).argmax(1).equal((plant.labels + 1) % 10)
    assert copy(plant.places.flip(0)).argmax(1).equal((plant.labels.flip(0) + 1) % 10)  # whatever stands beside it
    assert (plant.places - plant.images).abs().max() <= EPSILON + 1e-6
    # As sure of the clean image as the model itself.
    truth = plant.labels[:, None]
    logits, copied = net(plant.images), copy(plant.images)
    lead = logits.gather(1, truth) - logits.scatter(1, truth, -torch.inf).amax(1, keepdim=True)
    copied_lead = copied.gather(1, truth) - copied.scatter(1, truth, -torch.inf).amax(1, keepdim=True)
    assert copied_lead.allclose(lead, rtol=1e-2, atol=1e-2)
    # Points that were not looked at when it was planted: guessing finds next to nothing.
    found = 0
    for number in range(20):
        noise = uniform(torch.arange(len(plant.labels)) + 10_000 * (number + 1), plant.images, -EPSILON, EPSILON)
        found += int((copy((plant.images + noise).clamp(0, 1)).argmax(1) != plant.labels).sum())
    assert found < 0.02 * 20 * len(plant.labels)


def test_the_planted_example_is_found_by_an_attack_that_sees_and_by_no_other(net) -> None:
    def verdict_on(model: Classifier, source: Classifier) -> Check:
        return scrutinize(evidence(as_file(model), {"twin": source}), self_test=True)[-1]

    assert verdict_on(net, net).name == "planted_example_found"
    assert verdict_on(net, net).passed
    assert not verdict_on(saturated(net), saturated(net)).passed
    assert not verdict_on(net, reversed_gradients(net)).passed
    # Logits that do not move have no corner to set apart.
    flat = Wrapped(lambda images: (net(images) / 100).round() * 100 + 1e-3 * net(images).detach(), differentiable=True)
    assert "planted" in verdict_on(flat, flat).why


# What is the file's own -----------------------------------------------------------------------------------------------


def outcome_of(fooled: dict[tuple[str, str], list[bool]], winner: list[int]) -> Outcome:
    hits = {pair: torch.tensor(hit) for pair, hit in fooled.items()}
    return Outcome(torch.zeros(len(winner), 2), hits, torch.zeros(len(winner), 1, 1, 1), torch.tensor(winner), {})


def test_a_tie_changes_the_pair_whose_image_was_replayed_and_no_other() -> None:
    before = outcome_of(
        {("a", "float"): [True, True, False, True], ("a", "twin"): [True, False, True, True]}, [0, 0, 1, -2]
    )
    tie = torch.tensor([[9.0, 9.0]]).expand(4, 2)  # argmax says class 0: the true one
    after, check = settle(before, tie, torch.zeros(4, dtype=torch.int64))
    assert check.passed
    assert after.fooled["a", "float"].tolist() == [False, False, False, False]
    assert after.fooled["a", "twin"].tolist() == [True, False, False, False]
    assert contested(after).tolist() == [True, False, False, False]


def test_a_contested_sample_gets_the_image_of_the_next_pair(net) -> None:
    one = evidence(as_file(net), {"float": net}, "pgd10,pgd10-margin")
    both = one.outcome.fooled["pgd10", "float"] & one.outcome.fooled["pgd10-margin", "float"] & one.right
    place = int(both.nonzero()[0])
    replayed = as_file(net)(one.outcome.adversarial)
    replayed[place] = 0
    replayed[place, LABELS[place]] = 1e-6  # right, at a tie
    outcome, answers, check = settle_all(one, as_file(net), replayed)
    assert check.passed
    assert outcome.winner[place] == 1
    assert not outcome.fooled["pgd10", "float"][place]
    expected = one.attacks[1].run(
        net, net, IMAGES[place : place + 1], LABELS[place : place + 1],
        seeds=checks.derive(0, 0, samples=INDEX[place : place + 1]), epsilon=EPSILON,
    )[0]  # fmt: skip
    assert outcome.adversarial[place].allclose(expected[0], atol=1e-6)
    assert answers[place].allclose(net(expected)[0], atol=1e-4)
    assert outcome.robust.equal(one.outcome.robust)


def test_replayed_answers_that_are_no_numbers_are_refused(net) -> None:
    opened = iter([as_file(net), Wrapped(lambda images: net(images) / 0, differentiable=False)])
    subject = Subject("f", "onnx", "fp32", "broken.onnx", 1, "00", "here", lambda: next(opened))
    trial = Trial(parse("fgsm"), IMAGES, LABELS, INDEX, EPSILON)
    with pytest.raises(EdgekitError, match=r"broken\.onnx: .*numbers that are none"):
        examine(subject, Beside(net, trial.run(net, {"float": net})), trial, Rules())


# Statistics, and the cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(0, 0), (0, 9), (0, 10), (3, 17), (12, 5)])
def test_the_paired_test_is_a_fair_coin_toss(counts: tuple[int, int]) -> None:
    first, second = counts
    tosses = first + second
    expected = sum(math.comb(tosses, heads) for heads in range(second, tosses + 1)) / 2**tosses
    assert beats(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [(0, 8), (3, 8), (4, 8), (12, 60)])
def test_an_excess_is_judged_by_the_exact_binomial_test(counts: tuple[int, int]) -> None:
    count, n = counts
    assert exceeds(count, n, 0.05) == pytest.approx(binomtest(count, n, 0.05, "greater").pvalue, rel=1e-12)


def test_a_gain_by_chance_is_no_flag_and_a_large_one_is() -> None:
    before = torch.zeros(200, dtype=torch.bool)
    some, many = before.clone(), before.clone()
    some[:8], many[:9] = True, True  # 2 ** -8 is above 0.0025, 2 ** -9 below
    assert checks.robust_accuracy_did_not_rise(before, some, Rules()).passed
    assert not checks.robust_accuracy_did_not_rise(before, many, Rules()).passed


def test_the_checks_cost_at_most_half_of_the_attack_and_the_same_seed_says_the_same(net) -> None:
    one = evidence(as_file(net), {"float": net, "twin": net}, "pgd40")
    spent = Meter()
    judge, sources = spent.over(one.judge, one.sources)
    found = scrutinize(replace(one, judge=judge, sources=sources))
    assert 0 < spent.passes <= one.outcome.passes / 2
    assert scrutinize(one) == found


def test_a_file_without_gradients_is_asked_only_what_applies(net) -> None:
    names = [check.name for check in scrutinize(evidence(as_file(net), {}, "square30"))]
    assert names == ["epsilon_zero_is_clean", "huge_epsilon_fools"]
    constant = Wrapped(lambda images: torch.eye(10)[torch.full((len(images),), 3)], differentiable=False)
    assert scrutinize(evidence(constant, {}, "square30")) == []
