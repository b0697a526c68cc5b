"""Several processors, of which one answers otherwise: the worst case of each sample, and the list that says so."""

import json
from pathlib import Path

import pytest
import torch
from commandline import command
from PIL import Image
from saturating import saturating
from torch import Tensor

from edgekit import verdict
from edgekit.attacks import parse
from edgekit.attacks.campaign import Part
from edgekit.classifier import Wrapped
from edgekit.elsewhere import Compared, _Counting, everywhere
from edgekit.examine import Beside, Examined, Other, Subject, Trial, examine
from edgekit.report import words
from edgekit.verdict import Place, Rules

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 48, generator=GENERATOR)
IMAGES = torch.rand(80, 3, 4, 4, generator=GENERATOR)


def linear(weight: Tensor, differentiable: bool = False) -> Wrapped:
    return Wrapped(lambda images: images.flatten(1) @ weight.T, differentiable=differentiable)


STUDENT, FILE = linear(WEIGHT, differentiable=True), linear(WEIGHT)
# Another rounding of the first class: some samples that stand here fall there.
OTHER = linear(WEIGHT + torch.tensor([0.15, 0, 0, 0])[:, None])
LABELS = FILE(IMAGES).argmax(1)


def judged(others: tuple[Other, ...], attack: str = "pgd10") -> tuple[Examined, Trial]:
    trial = Trial(parse(attack), IMAGES, LABELS, torch.arange(len(LABELS)), 0.02)
    subject = Subject("file", "onnx", "int8", "f.onnx", 1, "0" * 64, "here", lambda: FILE, others=others)
    beside = Beside(STUDENT, trial.run(STUDENT, {"float": STUDENT}))
    examined = examine(subject, beside, trial, Rules())
    return everywhere(examined, subject, beside, trial, Rules()), trial


def placed(examined: Examined) -> dict[str, Place]:
    assert isinstance(examined.verdict.judged_on, tuple)
    return {place.processor: place for place in examined.verdict.judged_on}


def test_a_sample_is_robust_only_where_it_is_robust_on_all_processors():
    others = (Other("arm64", "there", lambda: OTHER), Other("x86-sse", "same", lambda: FILE))
    examined, trial = judged(others)
    places = placed(examined)
    assert list(places) == ["native", "arm64", "x86-sse"]
    clean_there = OTHER(IMAGES).argmax(1) == LABELS
    assert places["arm64"].clean_accuracy == verdict.accuracy(clean_there)
    # What an attack on that judge alone finds, which the search here cannot know of.
    there = trial.run(OTHER, {"float": STUDENT}).robust
    robust = examined.outcome.robust & there
    assert places["arm64"].robust_accuracy == verdict.accuracy(there)
    assert examined.verdict.robust_accuracy == verdict.accuracy(robust)
    assert examined.verdict.clean_accuracy == verdict.accuracy(clean_there)
    assert 0 < robust.sum() < min(examined.outcome.robust.sum(), there.sum() + 1)
    assert examined.verdict.change is not None
    assert examined.verdict.change.clean.only_float == int((~clean_there).sum())
    same = places["x86-sse"]
    assert (same.agreement, same.max_abs_difference, same.verdict) == (1.0, 0.0, places["native"].verdict)
    assert "answers bit for bit as native on x86-sse" in examined.verdict.why
    assert 0 < (places["arm64"].agreement or 0) < 1
    assert places["arm64"].every_iterate_of == ("pgd10",)
    assert (places["arm64"].images or 0) > 5 * len(LABELS)


def test_of_an_attack_on_scores_what_it_found_is_judged_elsewhere():
    examined, _ = judged((Other("arm64", "there", lambda: FILE),), attack="pgd5,square30")
    place = placed(examined)["arm64"]
    assert place.every_iterate_of == ("pgd5",)
    assert place.robust_accuracy == placed(examined)["native"].robust_accuracy


def test_a_processor_that_no_runtime_is_there_for_is_not_run_and_so_is_the_file():
    examined, _ = judged((Other("arm64", "torchscript", None, "no such runtime"),))
    assert examined.verdict.verdict in ("not_run", "inconclusive")
    assert placed(examined)["arm64"].verdict == "not_run"
    assert "not judged on arm64 (no such runtime)" in examined.verdict.why


def test_the_list_is_read_back_and_shown():
    examined, _ = judged((Other("arm64", "there", lambda: OTHER), Other("wasm", "w", None, "no reason")))
    written = verdict.to_dict(examined.verdict)
    assert verdict.read_as(verdict.ArtifactVerdict, json.loads(json.dumps(written)), "it") == examined.verdict
    shown = words.rests_on(examined.verdict)
    assert any(line.startswith("on arm64 (there): ") and "decides as native on " in line for line in shown)
    assert "wasm: not run, no reason" in shown


class Kept:
    """A memory in a dict."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str, int], Part] = {}

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        return self.parts.get((attack, source, chunk))

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None:
        self.parts[attack, source, chunk] = part


def test_a_resumed_comparison_counts_what_an_undisturbed_one_does():
    memory = Kept()
    trial = Trial(parse("pgd5,pgd3-margin"), IMAGES, LABELS, torch.arange(len(LABELS)), 0.02)
    counts = []
    for forgotten in ((), ("pgd3-margin",), ("pgd5", "pgd3-margin"), ()):
        memory.parts = {key: part for key, part in memory.parts.items() if key[0] not in forgotten}
        compared = Compared(OTHER, FILE)
        counting = _Counting(memory, compared)
        outcome = trial.run(compared, {"float": STUDENT}, memory=counting)
        counting.end()
        counts.append((compared.agreed, compared.asked, compared.difference, outcome.robust.tolist()))
    assert counts[0][0] < counts[0][1]
    assert all(count == counts[0] for count in counts)


def test_a_file_that_can_saturate_is_judged_under_both_arithmetics_unasked(tmp_path: Path):
    saturating(tmp_path / "clips.onnx")
    saturating(tmp_path / "safe.onnx", largest=64)
    for number in range(40):
        folder = tmp_path / "photos" / f"{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=GENERATOR).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    found = {}
    for name in ("clips", "safe"):
        words = ("verify", f"{name}.onnx", "--data", "photos", "--attack", "pgd2", "--json")
        done = command(*words, cwd=tmp_path)
        assert done.stdout, done.stderr
        (found[name],) = json.loads(done.stdout)["artifacts"]
        assert 0 <= found[name]["within_one_quantum"] <= 1
    native, other = found["clips"]["judged_on"]
    assert native["processor"] == "native"
    assert other["processor"] in ("exact", "clipping")
    assert other["agreement"] < 1
    assert found["clips"]["saturating_pairs"] > 40
    assert found["safe"]["saturating_pairs"] == 0
    assert isinstance(found["safe"]["judged_on"], str)


@pytest.mark.parametrize("value", [3, [3], [{"processor": "native"}]])
def test_a_list_of_something_else_is_refused(value: object):
    examined, _ = judged(())
    written = verdict.to_dict(examined.verdict) | {"judged_on": value}
    with pytest.raises(ValueError, match="judged_on"):
        verdict.read_as(verdict.ArtifactVerdict, written, "it")
