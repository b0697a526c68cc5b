"""benchmarks/int8.py: how it compares, without the peers."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import edgekit
from edgekit.classifier import Wrapped

ROOT = Path(edgekit.__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("int8")


def first(count: int, of: int = 200) -> Tensor:
    return torch.arange(of) < count


def measured(benchmark: ModuleType, name: str, agrees: int, robust: int, float_robust: int = 60):
    right = first(120)
    return benchmark.Measured(
        name, 1000, 0, right, first(agrees), first(agrees), first(robust), first(float_robust), 1.0, ""
    )


def test_rows_are_against_the_best_peer_and_say_which_goals_are_reached(benchmark: ModuleType):
    ours = measured(benchmark, "edgekit", 198, 58)
    rest = [measured(benchmark, "weak", 190, 50), measured(benchmark, "strong", 199, 60)]
    rows = {row.what: row for row in benchmark.accuracy_rows([ours, *rest], False)}
    clean = next(row for what, row in rows.items() if what.startswith("decides as the float student"))
    assert (clean.ours, clean.peer, clean.peer_name) == (99.0, 99.5, "strong")
    assert "goal 98.5: reached" in clean.what
    # One sample of 200 changed sides, for the worse: a paired score interval holds the estimate and reaches above 0.
    low, high = benchmark.paired(rest[1].agrees, ours.agrees)
    assert low < -0.5 < high
    assert f"-0.50 [{low:+.2f}, {high:+.2f}]" in clean.what
    change = next(what for what in rows if what.startswith("robust change of edgekit"))
    assert "robust change of edgekit -1.00 [" in change
    assert "goal at worst -0.5: missed" in change
    assert not any("goal" in what for what in (row.what for row in benchmark.accuracy_rows([ours, *rest], True)))


def test_last_iterates_stand_where_plain_pgd_on_a_linear_model_ends(benchmark: ModuleType):
    """Two classes, scores (w.x, -w.x): the sign of the gradient never changes, so the last iterate is a corner."""
    weight = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    images = 0.3 + 0.4 * torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    student = Wrapped(
        lambda x: torch.stack([(x * weight).sum((1, 2, 3)), -(x * weight).sum((1, 2, 3))], 1), differentiable=True
    )
    labels = torch.arange(8) % 2
    made = benchmark.last_iterates(student, benchmark.Samples(images, labels, torch.arange(8)), 20)
    towards = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1) * weight.sign()
    assert made.allclose(images + 8 / 255 * towards, atol=1e-6)


def test_every_session_is_asked_in_every_round_and_another_one_first(benchmark: ModuleType):
    asked: list[str] = []
    sessions = {name: lambda images, name=name: asked.append(name) for name in "abc"}
    times = benchmark.in_turn(sessions, None, 3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(asked[start : start + 3]) for start in range(0, len(asked), 3)]
    assert rounds[2:] == ["abc", "bca", "cab"]
