"""Ten fixed seeds of recipes/mobilenet.toml, each distilled, exported and verified: none may lose its robustness.

Every step is the command that a user types. The teacher is trained once, and kept in the cache folder. Finished steps
are skipped, so that the same command goes on after a kill; a folder of other recipes or of another edgekit is refused.
Exit code 1 where any verdict is lost.

    nohup python benchmarks/seeds.py --folder runs/seeds > seeds.md 2> seeds.log &
"""

import json as jsonlib
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from common import Row, document, made_with, publish, read_state, start

from edgekit.console import say
from edgekit.errors import ENVIRONMENT, EdgekitError, printable
from edgekit.files import write_json

RECIPE, TEACHER = "recipes/mobilenet.toml", "recipes/digits-teacher.toml"
QUICK = ("train.epochs=4",)
VERDICTS = (0, 1, 3)  # the exit codes of verify that carry a verdict


def edgekit(*words: object, codes: tuple[int, ...] = (0,)) -> None:
    """Run one edgekit command; its own messages go to stderr as they come.

    Raises:
        EdgekitError: it ended with another exit code.
    """
    say(f"edgekit {' '.join(map(str, words))}")
    command = [sys.executable, "-m", "edgekit", *map(str, words)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code not in codes:
        raise EdgekitError(f"edgekit {words[0]} ended with exit code {code}", where=words[1], exit_code=ENVIRONMENT)


def claim(place: Path, overrides: tuple[str, ...]) -> None:
    """Let what is kept in `place` be of one recipe and one code.

    Raises:
        EdgekitError: it was begun with others, or nobody knows with which.
    """
    settings = {"overrides": list(overrides), **made_with(RECIPE, TEACHER)}
    file = place / "settings.json"
    if not file.is_file() and place.is_dir() and any(place.iterdir()):
        raise EdgekitError("what is kept here does not say what made it", where=place, mend="Name another --folder")
    write_json(file, read_state(file, settings))


def distil(recipe: str, folder: Path, seed: int, overrides: tuple[str, ...]) -> None:
    try:
        status = jsonlib.loads((folder / "run.json").read_text(encoding="utf-8")).get("status")
    except FileNotFoundError:
        status = None
    if status != "finished":
        options = [word for override in overrides for word in ("--set", override)]
        resume = ["--resume"] if (folder / "recipe.toml").is_file() else []
        edgekit("distill", recipe, "--seed", seed, "--run", folder, "--device", "cpu", *options, *resume)


def judge(folder: Path, seed: int, overrides: tuple[str, ...], samples: int | None) -> dict[str, Any]:
    """The verdict on one seed's files, from the run folder if it was given before."""
    verdict = folder / "verdicts" / "1" / "verdict.json"
    if not verdict.is_file():
        distil(RECIPE, folder, seed, overrides)
        edgekit("export", folder, "--int8")
        fewer = [] if samples is None else ["--samples", samples]
        edgekit("verify", folder, "--attack", "pgd20", "--json", *fewer, codes=VERDICTS)
    return jsonlib.loads(verdict.read_text(encoding="utf-8"))


def markdown(verdicts: dict[int, dict[str, Any]]) -> str:
    """One row for each seed and file; changes in points with their 95 % intervals."""
    lines = [
        "| seed | file | clean % | PGD-20 % | float student % | change, clean | change, PGD-20 | verdict |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for seed, verdict in verdicts.items():
        for one in verdict["artifacts"]:
            accuracies = (one[key]["value"] for key in ("clean_accuracy", "robust_accuracy", "float_robust_accuracy"))
            changes = (one["change"][key] for key in ("clean", "robust"))
            cells = [
                str(seed),
                one["name"],
                *(f"{100 * value:.2f}" for value in accuracies),
                *(f"{100 * c['value']:+.2f} ({100 * c['low']:+.2f} … {100 * c['high']:+.2f})" for c in changes),
                one["verdict"],
            ]
            lines.append(f"| {' | '.join(printable(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One seed, a short training, 200 samples.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to this, itself left out.")] = 10,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The runs.  [default: runs/seeds; quick: none is kept]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, the table on stderr.")] = False,
) -> None:
    """Distil, export and verify ten seeds; exit code 1 if any verdict is lost."""
    overrides: tuple[str, ...] = ()
    verdicts: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or (Path(scratch) if quick else Path("runs/seeds"))
        claim(place, QUICK if quick else ())
        if quick:  # a teacher of its own: the recipe's takes longer than all the rest
            distil(TEACHER, place / "teacher", 0, ("train.epochs=2",))
            overrides = (f"teacher={place / 'teacher' / 'student.safetensors'}", *QUICK)
        for seed in range(1 if quick else seeds):
            verdicts[seed] = judge(place / str(seed), seed, overrides, 200 if quick else None)
            words = ", ".join(f"{one['name']} {one['verdict']}" for one in verdicts[seed]["artifacts"])
            say(f"seed {seed}: {words}")
        counts = Counter(one["verdict"] for verdict in verdicts.values() for one in verdict["artifacts"])
        total = counts.total()
        kept = total - counts["lost"]
        what = f"verdicts of {len(verdicts)} seeds that do not say lost ({counts['survived']} survived)"
        rows = [Row(what, kept, total, "all verdicts", kept / total, None if quick else 1.0, "verdicts")]
        found = [{"seed": seed, **verdict} for seed, verdict in verdicts.items()]
        result = document("seeds", rows, quick=quick, verdicts=dict(counts), seeds=found)
        write_json(place / "seeds.json", result)
    publish(
        result,
        as_json=json,
        show=lambda people: people.print(markdown(verdicts) + "\n", markup=False, soft_wrap=True),
    )
    raise typer.Exit(1 if counts["lost"] else 0)


if __name__ == "__main__":
    start(main)
