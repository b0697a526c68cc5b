"""RSLAD, TRADES and SAT on the digits in equal time: what distillation is worth, its teacher paid for.

The same student (recipes/mobilenet.toml) is trained by each method from several seeds. RSLAD trains as long as the
recipe says; the others get the epochs that fill RSLAD's seconds plus the teacher's. An epoch is timed first;
every training's real seconds stand in the result. The checkpoint is chosen on validation, the figures are of all test
digits. What is finished is kept in the --state file: a killed benchmark goes on where it was.

    python benchmarks/methods.py [--quick] [--json] [--state FILE]
"""

import json as jsonlib
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from common import Row, document, made_with, publish, read_state, start
from rich import box
from rich.console import Console
from rich.table import Table

import edgekit
from edgekit.console import say
from edgekit.errors import EdgekitError
from edgekit.files import write_json

RECIPE, TEACHER = "recipes/mobilenet.toml", "recipes/digits-teacher.toml"
METHODS = ("rslad", "trades", "sat")
FIGURES = ("clean_accuracy", "robust_accuracy")
PROBE = 3  # epochs of which the median is taken


class Comparison:
    """All trainings, each kept in `state` as soon as it is finished; their run folders lie beside that file."""

    def __init__(self, state: Path, seeds: int, quick: bool) -> None:
        self.file, self.folder = state, state.parent / f"{state.stem}-runs"
        self.seeds = range(seeds)
        # As the recipes say, unless this is quick.
        self.short = ["train.epochs=2"] if quick else []
        self.probe_epochs = 1 if quick else PROBE
        self.state = read_state(state, {"seeds": seeds, "quick": quick, **made_with(RECIPE, TEACHER)})

    def run(self) -> None:
        if "teacher" not in self.state:
            info = self._distill("teacher", TEACHER, self.short, seed=0)
            self._keep("teacher", {"seconds": info["seconds"], "student_sha256": info["student_sha256"]})
        epoch: dict[str, float] = self.state.get("seconds_per_epoch", {})
        for method in METHODS:
            if method not in epoch:
                name = f"probe-{method}"
                self._distill(name, RECIPE, [*self._choice(method), f"train.epochs={self.probe_epochs}"], seed=0)
                epoch[method] = statistics.median(self._epochs(name))
                self._keep("seconds_per_epoch", epoch)
        if "epochs" not in self.state:
            self._keep("epochs", self._plan(epoch))
        trainings: list[dict[str, Any]] = self.state.get("trainings", [])
        for seed in self.seeds:
            for method in METHODS:
                if not any(one["method"] == method and one["seed"] == seed for one in trainings):
                    trainings.append(self._train(method, seed))
                    self._keep("trainings", trainings)

    def _plan(self, seconds: dict[str, float]) -> dict[str, int]:
        from edgekit.recipe import read

        epochs = read(RECIPE, self.short).train.epochs
        total = self.state["teacher"]["seconds"] + epochs * seconds["rslad"]
        return {method: epochs if method == "rslad" else max(1, round(total / seconds[method])) for method in METHODS}

    def _train(self, method: str, seed: int) -> dict[str, Any]:
        epochs, name = self.state["epochs"][method], f"{method}-{seed}"
        say(f"{name}: {epochs} epochs")
        info = self._distill(name, RECIPE, [*self._choice(method), f"train.epochs={epochs}"], seed=seed)
        seconds = info["seconds"]
        training = {"method": method, "seed": seed, "epochs": epochs, "chosen_epoch": info["metrics"]["epoch"]}
        training |= {"seconds": seconds, "total_seconds": seconds}
        if method == "rslad":
            training["total_seconds"] += self.state["teacher"]["seconds"]
        return training | test(self.folder / name)

    def _choice(self, method: str) -> list[str]:
        if method == "rslad":  # [method] as the recipe has it, and the teacher that was timed here
            return [f"teacher={self.folder / 'teacher' / 'student.safetensors'}"]
        return [f"method={method}"]

    def _distill(self, name: str, recipe: str, overrides: Sequence[str], seed: int) -> dict[str, Any]:
        from edgekit.train import code_version

        folder = self.folder / name
        info = edgekit.distill(recipe, overrides=overrides, run=folder, resume=True, device="cpu", seed=seed)
        # Resuming refuses another recipe; a finished run is taken as it is, whatever code or teacher it had.
        teacher = info["teacher"] and info["teacher"]["sha256"]
        expected = self.state["teacher"]["student_sha256"] if teacher else None
        if info["versions"]["code"] != code_version() or teacher != expected:
            raise EdgekitError("the run is of other code, or of another teacher", where=folder, mend="Remove it")
        return info

    def _epochs(self, name: str) -> list[float]:
        lines = (self.folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [jsonlib.loads(line)["seconds"] for line in lines]

    def _keep(self, key: str, value: Any) -> None:
        self.state[key] = value
        write_json(self.file, self.state)


def test(folder: Path) -> dict[str, float]:
    """Accuracy of a run's student on all test images, clean and under PGD-20 of the recipe's epsilon."""
    from edgekit import data, models
    from edgekit.attacks.pgd import pgd
    from edgekit.classifier import predict
    from edgekit.randomness import derive
    from edgekit.recipe import read

    recipe = read(folder / "recipe.toml")
    split = data.load(recipe.data).test
    student = models.load(folder / "student.safetensors")
    images, seeds = split.floats(), derive(0, samples=split.index)  # the same starts for every student
    clean = (predict(student, images).argmax(1) == split.labels).double().mean().item()
    _, fooled = pgd(student, student, images, split.labels, seeds=seeds, epsilon=recipe.inner.epsilon, steps=20)
    return {"images": len(split), "clean_accuracy": clean, "robust_accuracy": (~fooled).double().mean().item()}


def points(trainings: Sequence[dict[str, Any]], method: str, figure: str) -> list[float]:
    return [100 * one[figure] for one in trainings if one["method"] == method]


def spread(values: Sequence[float]) -> float:
    """Standard deviation between seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def compare(trainings: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    for figure, name in zip(FIGURES, ("clean", "PGD-20"), strict=True):
        ours = points(trainings, "rslad", figure)
        for method in METHODS[1:]:
            theirs = points(trainings, method, figure)
            paired = [one - other for one, other in zip(ours, theirs, strict=True)]
            change = f"{statistics.mean(paired):+.2f} points, per seed {', '.join(f'{value:+.2f}' for value in paired)}"
            what = f"{name} accuracy of RSLAD, mean of {len(ours)} seeds ({change})"
            mine, other = statistics.mean(ours), statistics.mean(theirs)
            rows.append(Row(what, mine, other, f"{method.upper()}, equal seconds", mine / other, None, "%"))
    return rows


def show(state: dict[str, Any], people: Console) -> None:
    each = Table(title="every training", box=box.SIMPLE_HEAD)
    columns = ("method", "seed", "epochs", "chosen", "seconds", "with teacher", "clean %", "PGD-20 %")
    for place, name in enumerate(columns):
        each.add_column(name, justify="right" if place else "left")
    for one in state["trainings"]:
        numbers = (one[key] for key in ("seed", "epochs", "chosen_epoch"))
        seconds = (f"{one[key]:.0f}" for key in ("seconds", "total_seconds"))
        each.add_row(one["method"], *map(str, numbers), *seconds, *(f"{100 * one[key]:.2f}" for key in FIGURES))
    for method in METHODS:
        figures = [points(state["trainings"], method, figure) for figure in FIGURES]
        cells = (f"{statistics.mean(values):.2f} ± {spread(values):.2f}" for values in figures)
        each.add_row(f"{method}, mean ± sd", "", "", "", "", "", *cells)
    people.print(each)
    people.print(f"The teacher took {state['teacher']['seconds']:.0f} s.", highlight=False)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One seed, two epochs of RSLAD.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method.")] = 3,
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Kept results.  [default: runs/methods.json; quick: none]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """RSLAD against TRADES and SAT in equal total seconds, the teacher's included."""
    with tempfile.TemporaryDirectory() as scratch:
        place = state or (Path(scratch) / "methods.json" if quick else Path("runs/methods.json"))
        comparison = Comparison(place, 1 if quick else seeds, quick)
        comparison.run()
        kept = comparison.state
    rows = compare(kept["trainings"])
    measured = {key: kept[key] for key in ("teacher", "seconds_per_epoch", "epochs", "trainings")}
    publish(
        document("methods", rows, quick=quick, **measured), as_json=json, show=lambda people: show(measured, people)
    )


if __name__ == "__main__":
    start(main)
