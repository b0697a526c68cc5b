"""Can the number be believed? Tests of the attack itself, on few samples and in a part of its time.

A robust accuracy is an upper bound: an attack that could not see reads high. What gives such an attack away is listed
by Carlini et al. 2019 (arXiv:1902.06705) and, as indicators of attack failure with their cures, by Pintor et al.,
NeurIPS 2022 (arXiv:2106.09947). The self-test plants an adversarial example and looks whether it is found: Zimmermann
et al., NeurIPS 2022 (arXiv:2206.13991).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgekit import verdict
from edgekit.attacks import Attack, parse
from edgekit.attacks.campaign import CALL, CHUNK, SCORES, TOGETHER, Outcome, followed
from edgekit.attacks.grid import Grid
from edgekit.attacks.losses import LOSSES
from edgekit.attacks.norms import NORMS, slope
from edgekit.classifier import Classifier, Wrapped, predict
from edgekit.randomness import derive, uniform
from edgekit.verdict import Check, Rules, Twin

MOST, FEWEST = 128, 12  # samples that the checks look at
PART = 0.4  # of the attack's passes; with what is not counted they stay below half of its time
# Chance alone may fail a check this often. Four rest on chance: at most one honest file in a hundred is flagged.
ALPHA = 0.0025
FAITHFUL = 0.99  # agreement of a twin with its file below which its gradients are not those of the file
ROUNDING = 1e-4  # two answers of one file that differ by less than this share of its largest logit are the same
HUGE = 0.5  # the radius within which every image can be made the same grey
JUDGED = 5  # of the longer search every fifth iterate is judged
RISING = 0.9  # the share of samples whose loss must have risen at its end
LITTLE = 0.05  # the share of the survivors that a longer search may still fool
VANISHED = 1e-20  # nats per unit of pixel: no float32 sum sees such a gradient beside another
FEW = 0.05  # the share of samples that may be exceptions where chance plays no part
ROBUST, WRONG = -1, -2  # in Outcome.winner
QUERIES = 50  # of the short Square attack
PLANTED, FOUND = 16, 0.9  # samples of the self-test, and the share of their planted examples that must be found
INNER = 100  # points of each ball that the planted place must stand apart from

# The usual cause of each failure and its cure, said where it fails.
CURES = {
    "epsilon_zero_is_clean": (
        "the file answers at random, or the attack leaves its ball: average over the randomness (expectation over "
        "transformation), or mend the projection"
    ),
    "huge_epsilon_fools": (
        "gradients are masked, or the steps are too few or too short to get anywhere: attack with the margin loss, "
        "with a differentiable stand-in for what masks (BPDA), or from another source"
    ),
    "steps_increase_loss": (
        "the steps overshoot, or the loss is flat or noisy: use a smaller step, Auto-PGD, or the margin loss"
    ),
    "more_steps_change_little": "the search stopped before it had converged: use more steps and random starts",
    "gradients_reach_the_input": (
        "a saturated softmax, rounding, or a layer that is not differentiable stops them: use the margin or the DLR "
        "loss, and a differentiable stand-in for that layer (BPDA)"
    ),
    "gradient_free_is_weaker": (
        "gradients are masked: add the margin loss and a longer square attack to the suite, or attack through a "
        "differentiable stand-in (BPDA)"
    ),
    "transfer_is_weaker": (
        "the gradients of the file's own copy are masked, or are not those of the file: keep both sources, and use a "
        "smoother copy"
    ),
    "planted_example_found": "the attack cannot find what is known to be there: use more steps, or another loss",
}


@dataclass(frozen=True)
class Evidence:
    """What is known of an attack once it is over.

    Attributes:
        judge: the file as it was attacked.
        sources: differentiable Classifiers by name, "twin" the file's own copy; maybe none.
        images: (N, C, H, W) float32 in [0, 1]; labels, index: (N,) int64, as `campaign.confront` takes them.
        epsilon: radius, in units of the [0, 1] range.
        outcome: what the attacks did to the N samples.
        norm: of the ball that was searched.    grid: whether only uint8 images were shown to the judge.
        carried: (N, C, H, W), the adversarial images of another model on the same samples; None where there is none.
    """

    judge: Classifier
    sources: Mapping[str, Classifier]
    attacks: Sequence[Attack]
    images: Tensor
    labels: Tensor
    index: Tensor
    epsilon: float
    seed: int
    outcome: Outcome
    carried: Tensor | None = None
    norm: str = "Linf"
    grid: bool = False
    right: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "right", self.outcome.clean.argmax(1) == self.labels)

    @property
    def gradients(self) -> list[Attack]:
        """Those of the attacks that followed a source."""
        return [attack for attack in self.attacks if attack.gradients and attack.name in self.outcome.seconds]

    @property
    def white(self) -> str:
        """The source that is nearest to the file: its own copy, else the first one."""
        return "twin" if "twin" in self.sources else next(iter(self.sources))

    def hits(self, names: Sequence[str]) -> Tensor:
        """(N,) bool: fooled by a gradient attack from one of these sources, or from several of them together."""
        fooled = torch.zeros_like(self.right)
        for (_, source), hit in self.outcome.fooled.items():
            if source != SCORES and set(source.split(TOGETHER)) <= set(names):
                fooled |= hit
        return fooled

    def start(self, attack: Attack, source: Classifier, chosen: Tensor, *, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """One start of `attack` on the samples `chosen`, just as the campaign makes it."""
        shown = Grid(self.judge, self.epsilon, attack.norm) if self.grid else self.judge
        return attack.run(source, shown, self.images[chosen], self.labels[chosen], seeds=seeds, epsilon=self.epsilon)

    def seeds(self, purpose: int, chosen: Tensor) -> Tensor:
        return derive(self.seed, 1 << 20, purpose, samples=self.index[chosen])  # no restart has such a number


def scrutinize(evidence: Evidence, *, self_test: bool = False) -> list[Check]:
    """Test the attack on at most 128 samples that the file gets right, in at most half of the passes that it took.

    Checks that do not apply are left out: those of the gradients where none were followed, all of them where the file
    is always wrong, or answers every image alike: there is nothing that an attack could change.

    Args:
        self_test: also plant adversarial examples and look for them; that costs time of its own.
    """
    chosen = _pick(evidence)
    decided = evidence.outcome.clean.argmax(1)
    if not len(chosen) or (decided == decided[0]).all():
        return []
    found = [_zero(evidence, chosen), _huge(evidence, chosen)]
    if evidence.gradients:
        found += [*_steps(evidence, chosen), _reach(evidence, chosen)]
        found += [_gradient_free(evidence, chosen), *_transfer(evidence, chosen)]
    if self_test:
        found += plant_and_find(evidence, chosen)
    return found


def _pick(evidence: Evidence) -> Tensor:
    """Places of the samples to look at: right when clean, spread over the classes, as many as half the cost allows."""
    right = evidence.right.nonzero().squeeze(1)
    right = right[evidence.labels[right].argsort(stable=True)]
    wide = 12 + 3 * len(evidence.sources) + QUERIES  # calls with all chosen samples, and with half of them
    deep = 3 * _longer(evidence) + _longer(evidence) / JUDGED
    room = (PART * evidence.outcome.passes - CALL * (wide + deep)) / (wide + deep / 2)
    return _spread(right, min(MOST, max(FEWEST, int(room))))


def _spread(places: Tensor, most: int) -> Tensor:
    """At most that many of the places, at even distances."""
    if len(places) <= most:
        return places
    return places[torch.arange(most) * len(places) // most]


# What chance decides ------------------------------------------------------------------------------------------------


def beats(only_first: int, only_second: int) -> float:
    """One-sided p-value of McNemar's exact test: that chance alone gives the second so much against the first."""
    from scipy.special import bdtr

    return float(bdtr(only_first, only_first + only_second, 0.5))


def exceeds(count: int, n: int, share: float) -> float:
    """One-sided p-value of the exact binomial test: `count` or more of `n`, were the true share only `share`."""
    from scipy.special import bdtrc

    return float(bdtrc(count - 1, n, share)) if count else 1.0


def _p(value: float) -> str:
    return "p below 0.001" if value < 0.001 else f"p {value:.3f}"


def _check(name: str, passed: bool, value: float, why: str) -> Check:
    return Check(name, passed, value, why if passed else f"{why}; the usual cause: {CURES[name]}")


# The checks ---------------------------------------------------------------------------------------------------------


def _zero(evidence: Evidence, chosen: Tensor) -> Check:
    """Every attack at full length with nowhere to go: where the gradients come from does not matter then."""
    chosen = _spread(chosen, min(FEWEST, max(2, len(evidence.labels) // 50)))
    images, labels = evidence.images[chosen], evidence.labels[chosen]
    classes = torch.arange(evidence.outcome.clean.shape[1], dtype=images.dtype)
    stand_in = Wrapped(lambda batch: batch.flatten(1).mean(1, keepdim=True) * classes, differentiable=True)
    kept = torch.ones(len(chosen), dtype=torch.bool)
    for attack in evidence.attacks:
        # As the campaign pairs them: some follow two sources at once, and some had none here and did not run.
        follows = followed(attack, evidence.judge, dict.fromkeys(evidence.sources, stand_in))
        if not follows:
            continue
        source, seeds = next(iter(follows.values())), evidence.seeds(0, chosen)
        moved, fooled = attack.run(source, evidence.judge, images, labels, seeds=seeds, epsilon=0.0)
        kept &= ~fooled & (moved == images).flatten(1).all(1)
    why = f"with epsilon 0 {int(kept.sum())} of {len(kept)} samples stay as they were and are answered rightly"
    return _check("epsilon_zero_is_clean", bool(kept.all()), share(kept), why)


def _huge(evidence: Evidence, chosen: Tensor) -> Check:
    """Every attack within a radius that leaves nothing of the image, from the image itself.

    A random start would be so far away that it fools by itself, and no gradient would be tested.
    """
    chosen = _spread(chosen, 2 * FEWEST)
    far = HUGE if evidence.norm == "Linf" else HUGE * evidence.images[0].numel() ** 0.5
    radius, drawn = max(far, evidence.epsilon), len(chosen)
    for attack, source in _pairs(evidence):
        images, labels = evidence.images[chosen], evidence.labels[chosen]
        chosen = chosen[~attack.run(source, evidence.judge, images, labels, seeds=None, epsilon=radius)[1]]
        if not len(chosen):
            break
    why = f"within epsilon {radius:g} {len(chosen)} of {drawn} samples withstand the attacks; none should"
    return _check("huge_epsilon_fools", len(chosen) <= max(1, int(FEW * drawn)), len(chosen) / drawn, why)


def _pairs(evidence: Evidence) -> list[tuple[Attack, Classifier]]:
    """The attacks with the sources that each of them follows."""
    return [
        (attack, source)
        for attack in evidence.attacks
        for source in followed(attack, evidence.judge, evidence.sources).values()
    ]


def _steps(evidence: Evidence, chosen: Tensor) -> list[Check]:
    """What the suite could not fool, searched again from other starts with more and shorter steps.

    Only a sample whose loss does not rise under the first of the suite's losses is searched under the next.
    """
    survivors = chosen[evidence.outcome.robust[chosen]]
    left = survivors = _spread(survivors, max(FEWEST // 2, len(chosen) // 2))
    if not len(survivors):
        return []
    steps, fooled, first, last = _longer(evidence), 0, 0.0, 0.0
    for place, loss in enumerate(_losses(evidence)):
        values, hit = climb(evidence, left, loss, steps)
        if place == 0:
            first, last = values[0].mean().item(), values[-1].mean().item()
        fooled += int(hit.sum())
        left = left[~hit & ~(values[-1] > values[0])]
        if not len(left):
            break
    risen = 1 - len(left) / len(survivors)
    rise = (
        f"{steps} steps raise the loss of {100 * risen:.1f} % of {len(survivors)} samples that had withstood, "
        f"on average from {first:.3g} to {last:.3g}"
    )
    p = exceeds(fooled, len(survivors), LITTLE)
    more = (
        f"{steps} steps from other starts fool {fooled} of {len(survivors)} samples that had withstood "
        f"(were it {100 * LITTLE:g} % in truth: {_p(p)})"
    )
    return [
        _check("steps_increase_loss", risen >= RISING, risen, rise),
        _check("more_steps_change_little", p >= ALPHA, fooled / len(survivors), more),
    ]


def climb(evidence: Evidence, chosen: Tensor, loss: str, steps: int) -> tuple[Tensor, Tensor]:
    """Plain ascent on the source that is nearest to the file, in steps of epsilon / 10 from a random start.

    Returns:
        values (steps + 1, n): the loss on the source before each step and after the last.
        fooled (n,) bool: whether the file erred on the last iterate, or on one of those before that it was asked about.
    """
    images, labels, epsilon = evidence.images[chosen], evidence.labels[chosen], evidence.epsilon
    source, objective = evidence.sources[evidence.white], LOSSES[loss]
    space = NORMS[evidence.norm]
    x = space.project(space.start(evidence.seeds(1, chosen), images, epsilon), images, epsilon)
    values, fooled = [], torch.zeros(len(chosen), dtype=torch.bool)
    for step in range(steps):
        value = objective(source(x.requires_grad_()), labels)
        values.append(value.detach())
        x = space.project(x.detach() + epsilon / 10 * space.steepest(slope(value, x)), images, epsilon)
        if (steps - 1 - step) % JUDGED == 0:
            # Of a radius that is no whole number of levels the grid holds less: what lies beyond was never allowed.
            shown = Grid(evidence.judge, epsilon, evidence.norm).deliver(x, images) if evidence.grid else x
            fooled |= predict(evidence.judge, shown).argmax(1) != labels
    values.append(objective(predict(source, x), labels))
    return torch.stack(values), fooled


def _losses(evidence: Evidence) -> list[str]:
    """What the suite climbs, by name; the cross-entropy where an attack does not say."""
    named = [getattr(attack.run, "keywords", {}).get("loss", "ce") for attack in evidence.gradients]
    return list(dict.fromkeys(name for name in named if name in LOSSES)) or ["ce"]


def _longer(evidence: Evidence) -> int:
    """Twice the steps of the longest attack, from 20 to 100."""
    named = [getattr(attack.run, "keywords", {}).get("steps", 1) for attack in evidence.gradients]
    return min(100, max(20, 2 * max(named, default=1)))


def _reach(evidence: Evidence, chosen: Tensor) -> Check:
    """The gradients at the clean images, of every source; one of the suite's losses is enough for a sample."""
    images, labels = evidence.images[chosen], evidence.labels[chosen]
    worst, broken, where = 1.0, 0, evidence.white
    for name, source in evidence.sources.items():
        x = images.detach().requires_grad_()
        logits = source(x)
        reached, spoilt = torch.zeros(len(chosen), dtype=torch.bool), torch.zeros(len(chosen), dtype=torch.bool)
        for loss in _losses(evidence):
            (gradient,) = torch.autograd.grad(LOSSES[loss](logits, labels).sum(), x, retain_graph=True)
            steepest = gradient.flatten(1).abs().amax(1)
            spoilt |= ~gradient.flatten(1).isfinite().all(1)
            reached |= steepest > VANISHED
        reached &= ~spoilt
        broken += int(spoilt.sum())
        if share(reached) < worst:
            worst, where = share(reached), name
    missing = round((1 - worst) * len(chosen))
    what = f"{missing} of {len(chosen)} gradients of the source '{where}' are zero, vanishing or no numbers"
    passed = not broken and missing <= max(1, int(FEW * len(chosen)))
    return _check("gradients_reach_the_input", passed, worst, what)


def _gradient_free(evidence: Evidence, chosen: Tensor) -> Check:
    """The scores alone against the gradients: the suite's own such attack where it has one, else a short one."""
    gradients = evidence.hits(list(evidence.sources))[chosen]
    own = [hit for (_, source), hit in evidence.outcome.fooled.items() if source == SCORES]
    if own:
        scores = torch.stack(own).any(0)[chosen]
    else:
        # Square searches in L-infinity alone.
        (short,) = parse(f"{'square' if evidence.norm == 'Linf' else 'nes'}{QUERIES}", evidence.norm)
        scores = evidence.start(short, evidence.judge, chosen, seeds=evidence.seeds(2, chosen))[1]
    return _weaker("gradient_free_is_weaker", "gradients", gradients, "scores alone", scores)


def _transfer(evidence: Evidence, chosen: Tensor) -> list[Check]:
    """Another model's attack against that of the file's own copy; its finished images where the file has no copy."""
    white, others = evidence.white, [name for name in evidence.sources if name != evidence.white]
    if others:
        carried, what = evidence.hits(others)[chosen], f"gradients of {' and '.join(others)}"
    elif evidence.carried is not None:
        answers = predict(evidence.judge, evidence.carried[chosen], CHUNK)
        carried, what = answers.argmax(1) != evidence.labels[chosen], "images made for another model"
    else:
        return []
    return [_weaker("transfer_is_weaker", f"gradients of {white}", evidence.hits([white])[chosen], what, carried)]


def _weaker(name: str, strong: str, first: Tensor, weak: str, second: Tensor) -> Check:
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    p = beats(only_first, only_second)
    why = (
        f"of {len(first)} samples only {strong} fool {only_first} and only {weak} fool {only_second} "
        f"(McNemar, one-sided: {_p(p)})"
    )
    return _check(name, p >= ALPHA, (only_second - only_first) / len(first), why)


# What the file itself must hold to ----------------------------------------------------------------------------------


def settle(outcome: Outcome, replayed: Tensor, labels: Tensor) -> tuple[Outcome, Check]:
    """Hold the outcome against the answers (N, K) that a freshly opened file gives to the adversarial images.

    A sample whose two highest logits are equal up to rounding may change sides with the batch that it sits in. There
    the replay, which others can repeat, decides on the pair (attack, source) whose image it was; see `contested`. Any
    other difference fails the check.
    """
    fooled = replayed.argmax(1) != labels
    differs = fooled == outcome.robust
    others = replayed.scatter(1, labels[:, None], -torch.inf).amax(1)
    tied = (others - replayed.gather(1, labels[:, None])[:, 0]).abs() <= ROUNDING * replayed.abs().max()
    kept = share(~differs)
    passed = bool((tied | ~differs).all())
    saved, lost = differs & tied & ~fooled, differs & tied & fooled
    if saved.any() or lost.any():
        hits = {}
        for place, (pair, hit) in enumerate(outcome.fooled.items()):
            # A sample that is wrong when clean has the clean image under every pair; one that nothing fooled has the
            # first pair's strongest.
            shown = saved & ((outcome.winner == place) | (outcome.winner == WRONG))
            hits[pair] = (hit & ~shown) | (lost if place == 0 else False)
        winner = outcome.winner.masked_fill(saved, ROBUST).masked_fill(lost, 0)
        outcome = replace(outcome, fooled=hits, winner=winner)
    why = f"a freshly opened file repeats its answer to {100 * kept:.2f} % of the adversarial images"
    if not passed:
        why += "; the file answers at random, or depends on what it was asked before: no figure of it can be repeated"
    return outcome, Check("fooled_replayed", passed, kept, why)


def contested(outcome: Outcome) -> Tensor:
    """(N,) bool: the winner's image failed its replay, but other pairs fooled the sample with images not yet seen."""
    return outcome.robust & torch.stack(list(outcome.fooled.values())).any(0)


def settle_all(evidence: Evidence, opened_again: Classifier, replayed: Tensor) -> tuple[Outcome, Tensor, Check]:
    """`settle`, and where it left a sample contested the image of the next pair, replayed in its turn.

    Args:
        opened_again: the freshly opened file.
        replayed: (N, K), what it answers to the adversarial images.
    Returns:
        outcome, the answers (N, K) to its adversarial images, and the check of the first replay.
    """
    outcome, check = settle(evidence.outcome, replayed, evidence.labels)
    replayed = replayed.clone()
    while (open := contested(outcome)).any():  # each turn closes at least one pair of each of these samples
        outcome = _next_image(replace(evidence, outcome=outcome), open)
        replayed[open] = predict(opened_again, outcome.adversarial[open], CHUNK)
        outcome, again = settle(outcome, replayed, evidence.labels)
        check = again if check.passed and not again.passed else check
    return outcome, replayed, check


def _next_image(evidence: Evidence, open: Tensor) -> Outcome:
    """The first pair that is known to fool each open sample is run again, for its image."""
    outcome, attacks = evidence.outcome, {attack.name: attack for attack in evidence.attacks}
    adversarial, winner, hits = outcome.adversarial.clone(), outcome.winner.clone(), {}
    for place, ((name, source), hit) in enumerate(outcome.fooled.items()):
        left = (open & hit & (winner == ROBUST)).nonzero().squeeze(1)
        for restart in range(attacks[name].restarts if len(left) else 0):
            seeds = derive(evidence.seed, restart, samples=evidence.index[left])
            follows = followed(attacks[name], evidence.judge, evidence.sources)[source]
            found, fooled = evidence.start(attacks[name], follows, left, seeds=seeds)
            adversarial[left[fooled]], winner[left[fooled]] = found[fooled], place
            left = left[~fooled]
        hits[name, source] = hit.index_fill(0, left, False)  # what another batch does not repeat was a tie as well
    return replace(outcome, adversarial=adversarial, winner=winner, fooled=hits)


def same_answer_twice(judge: Classifier, clean: Tensor, images: Tensor) -> Check:
    """Whether the file says of the first images what it said before (`clean`, (N, K))."""
    asked = images[:MOST]
    same = share(alike(predict(judge, asked, CHUNK), clean[:MOST]))
    why = f"{100 * same:.2f} % of {len(asked)} images get the same answer when asked again"
    if same < 1:
        why += "; a file with randomness of its own must be attacked in the mean over it, and its figures vary"
    return Check("same_answer_twice", same == 1, same, why)


def alike(first: Tensor, second: Tensor) -> Tensor:
    """(N,) bool: the same logits (N, K) up to rounding."""
    room = ROUNDING * max(first.abs().max().item(), second.abs().max().item())
    return ((first - second).abs() <= room).all(1)


def robust_accuracy_did_not_rise(float_robust: Tensor, robust: Tensor, rules: Rules) -> Check:
    """Both (N,) bool under the same attacks: whether the file withstands significantly more than the student."""
    change = verdict.compare(float_robust, robust, rules.confidence)
    p = beats(change.only_float, change.only_artifact)
    ends = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
    why = f"robust accuracy changed by {100 * change.value:+.1f} points ({ends}; a gain by chance: {_p(p)})"
    if p < ALPHA:
        why += "; a file that gains so much hides its gradients until the contrary is shown"
    return Check("robust_accuracy_did_not_rise", p >= ALPHA, change.value, why)


def twin_fidelity(copy: Classifier, images: Tensor, outcome: Outcome, replayed: Tensor) -> tuple[Twin, Check]:
    """How the twin answers the clean and the adversarial images, against what the file said (`replayed`, (N, K)).

    The largest difference is that of the images to which the twin answers with numbers; where it does not, the check
    fails.
    """
    said = torch.cat([outcome.clean, replayed])
    copied = torch.cat([predict(copy, images, CHUNK), predict(copy, outcome.adversarial, CHUNK)])
    numbers = copied.isfinite().all(1)
    furthest = (said - copied)[numbers].abs().amax().item() if numbers.any() else 0.0
    # What is no number decides nothing, whichever class argmax makes of it.
    fidelity = Twin(share((said.argmax(1) == copied.argmax(1)) & numbers), furthest)
    why = f"the twin decides as the file does on {100 * fidelity.agreement:.2f} % of clean and adversarial images"
    if not numbers.all():
        why += f"; to {int((~numbers).sum())} of {len(numbers)} it answers with infinities, or with no numbers"
        return fidelity, Check("twin_fidelity", False, fidelity.agreement, why)
    return fidelity, Check("twin_fidelity", fidelity.agreement >= FAITHFUL, fidelity.agreement, why)


def share(right: Tensor) -> float:
    """The fraction of (N,) booleans that are true."""
    return int(right.sum()) / len(right)


# The self-test ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """Adversarial examples that are known to be there, in a modified copy of a model.

    The copy answers a sample's own class all over its ball, but for the surroundings of one corner: a linear readout
    of the model's logits separates that corner from points drawn at random inside, and decides (Zimmermann et al.,
    section 4). Whoever follows the model's gradients climbs the readout; whoever guesses does not cross it. The copy
    is as sure of a clean image as the model is, so what saturates there saturates here.

    Attributes:
        images: (n, C, H, W), the clean images; labels: (n,), their classes.
        places: (n, C, H, W), the planted examples.
        readout: (n, K), offset: (n,): planted where readout * logits - offset is positive.
        norm: of the balls.
    """

    images: Tensor
    labels: Tensor
    places: Tensor
    readout: Tensor
    offset: Tensor
    norm: str

    def over(self, classifier: Classifier) -> Classifier:
        """The modified copy of `classifier`; it answers images within the balls only."""
        return _Planted(self, classifier)


class _Planted:
    def __init__(self, plant: Plant, classifier: Classifier) -> None:
        self.plant, self.classifier, self.differentiable = plant, classifier, classifier.differentiable

    def __call__(self, images: Tensor) -> Tensor:
        plant, logits = self.plant, self.classifier(images)
        # Attacks drop the samples that they fooled: whose ball an image lies in is read from the image.
        owner = distances(images.detach(), plant.images, plant.norm).argmin(1)
        score = (logits * plant.readout[owner]).sum(1) - plant.offset[owner]
        others = (-score.detach().abs() - 10)[:, None].expand(logits.shape)  # never the answer
        true = plant.labels[owner][:, None]
        answer = others.scatter(1, true, -score[:, None] / 2)
        return answer.scatter(1, (true + 1) % logits.shape[1], score[:, None] / 2)


@torch.no_grad()
def planted(
    judge: Classifier, images: Tensor, labels: Tensor, seeds: Tensor, epsilon: float, norm: str = "Linf"
) -> Plant:
    """Plant an adversarial example in the ball of each sample where that can be done.

    It cannot where two balls overlap, and where the logits set no corner apart from the inner points.

    Args:
        images: (N, C, H, W) float32 in [0, 1] that `judge` answers rightly; labels, seeds: (N,) int64.
        epsilon: radius, in units of the [0, 1] range.    norm: of the ball, a key of NORMS.
    """
    space = NORMS[norm]
    apart = distances(images, images, norm).fill_diagonal_(torch.inf).amin(1)
    kept = apart > 2 * epsilon
    images, labels, seeds = images[kept], labels[kept], seeds[kept]
    if not len(images):
        return Plant(images, labels, images, images.new_empty(0, 1), images.new_empty(0), norm)
    inner = []
    for number in range(INNER):
        drawn = space.start(derive(number, 0, samples=seeds), images, epsilon)
        inner.append(judge(space.project(drawn, images, epsilon)))
    clean, points_inside = judge(images), torch.stack(inner, 1)  # (n, K) and (n, INNER, K)
    direction = space.steepest(uniform(derive(0, 1, samples=seeds), images, -1, 1))
    corner = space.project(images + epsilon * direction, images, epsilon)
    middle = points_inside.mean(1, keepdim=True)
    around = points_inside - middle
    spread = around.mT @ around / INNER
    # Shrunk towards a multiple of the identity: directions in which nothing moves but rounding must not lead.
    level = spread.diagonal(dim1=1, dim2=2).mean(1)
    spread = spread + (0.1 * level + 1e-20)[:, None, None] * torch.eye(clean.shape[1])
    target = judge(corner)
    readout = torch.linalg.solve(spread, target - middle.squeeze(1))
    inside = torch.cat([(points_inside * readout[:, None]).sum(2), (clean * readout).sum(1)[:, None]], 1)
    reached, highest = (target * readout).sum(1), inside.amax(1)
    offset = (reached + highest) / 2
    lead = clean.scatter(1, labels[:, None], -torch.inf).amax(1)
    sure = clean.gather(1, labels[:, None])[:, 0] - lead
    scale = sure / (offset - inside[:, -1])
    good = (reached > highest) & (sure > 0) & scale.isfinite()
    readout, offset = readout * scale[:, None], offset * scale
    return Plant(images[good], labels[good], corner[good], readout[good], offset[good], norm)


def distances(first: Tensor, second: Tensor, norm: str) -> Tensor:
    """(N, M), between images (N, C, H, W) and (M, C, H, W)."""
    return torch.cdist(first.flatten(1), second.flatten(1), p=torch.inf if norm == "Linf" else 2)


def plant_and_find(evidence: Evidence, chosen: Tensor) -> list[Check]:
    """Whether the suite finds what `planted` has hidden."""
    chosen = _spread(chosen, PLANTED)
    seeds = evidence.seeds(3, chosen)
    images, labels = evidence.images[chosen], evidence.labels[chosen]
    plant = planted(evidence.judge, images, labels, seeds, evidence.epsilon, evidence.norm)
    name, count = "planted_example_found", len(plant.labels)
    if not count:
        why = f"in none of {len(chosen)} samples could an example be planted: the logits hardly move, or balls overlap"
        return [_check(name, False, 0.0, why)]
    judge, found = plant.over(evidence.judge), torch.zeros(count, dtype=torch.bool)
    seeds = derive(evidence.seed, 1 << 20, 4, samples=torch.arange(count))
    # A pair of models has no copy with a planted place in common.
    single = [(attack, source) for attack, source in _pairs(evidence) if not attack.needs]
    if not single:
        return []
    for attack, source in single:
        found |= attack.run(
            plant.over(source), judge, plant.images, plant.labels, seeds=seeds, epsilon=evidence.epsilon
        )[1]
    why = f"{int(found.sum())} of {count} adversarial examples that were planted in a copy of the model are found"
    return [_check(name, share(found) >= FOUND, share(found), why)]
