"""Run folders: runs/<recipe>-<n>, and runs/latest, which only a finished run moves."""

import errno
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import shipped
from edgekit.errors import EdgekitError
from edgekit.files import sha256, write_json, write_text
from edgekit.recipe import Recipe, read, split_override, to_toml

ROOT = Path("runs")


@dataclass(frozen=True)
class Run:
    """One training run on disk, laid out as CLI.md says."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint" / "state.pt"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def verdicts(self) -> Path:
        return self.folder / "verdicts"

    def info(self) -> dict[str, Any]:
        """run.json, or an empty dict where nothing was saved yet.

        Raises:
            EdgekitError: the file is damaged.
        """
        path = self.folder / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise EdgekitError("not valid JSON", where=path, mend="Train again into a new folder") from None

    def save_info(self, info: dict[str, Any]) -> None:
        write_json(self.folder / "run.json", info)

    @property
    def begun(self) -> bool:
        """Whether something was recorded; until then a folder may be started from its beginning."""
        return (self.folder / "run.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether there is a student: trained to its end, or brought along (imported.py)."""
        return self.info().get("status") in ("finished", "imported")

    def begin(self, recipe: str | Path, plan: Recipe, *, latest: bool) -> None:
        """Record what is to be trained: `plan`, which is `recipe` with every key and override resolved.

        Args:
            latest: runs/latest is to name this run when it has finished.
        """
        write_text(self.recipe_file, to_toml(plan))
        source = shipped.find(recipe, "recipes")
        about = {"file": source.name, "sha256": sha256(source), "resolved_sha256": sha256(self.recipe_file)}
        # Last: a run counts as begun once run.json is there.
        self.save_info({"schema": 1, "status": "running", "seed": plan.seed, "recipe": about, "latest": latest})


def create(stem: str, folder: Path | None) -> Run:
    """A new run folder: `folder` as given, else the first free runs/<stem>-<n>.

    Raises:
        EdgekitError: `folder` exists and is not empty, or no folder of this name can be made.
    """
    asked = ROOT / f"{stem}-1" if folder is None else folder
    try:
        # The longest path that will be made inside: a name that has no room for it is refused before it exists.
        (asked.absolute() / "checkpoint" / f".state.pt.{8 * 'x'}.part").lstat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES):
            raise EdgekitError(f"no run folder can be made here ({error.strerror})", where=asked) from None
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EdgekitError("the run folder exists", where=folder, mend="Continue it with --resume, or name another")
        folder.mkdir(parents=True, exist_ok=True)
        return Run(folder)
    ROOT.mkdir(exist_ok=True)
    number = 1
    while True:
        try:  # mkdir, not exists(): two commands started together must not share a folder
            (ROOT / f"{stem}-{number}").mkdir()
            return Run(ROOT / f"{stem}-{number}")
        except FileExistsError:
            number += 1


def to_resume(stem: str, folder: Path | None) -> Run | None:
    """The run that `--resume` means: the one in `folder`, else the newest of this recipe; None where there is none.

    Raises:
        EdgekitError: `folder` holds something else.
    """
    run = newest(stem) if folder is None else Run(folder)
    if run is None or not os.path.lexists(run.folder):
        return None
    # A kill between the first two files leaves a recipe alone, or a file that was not renamed into place yet.
    leftover = run.folder.is_dir() and all(
        path.name == "recipe.toml" or (path.name.startswith(".") and path.suffix == ".part")
        for path in run.folder.iterdir()
    )
    if not run.begun and not leftover:
        raise EdgekitError("this is not a run folder (it has no run.json)", where=run.folder, mend="Name another")
    return run


def recorded(run: Run, recipe: str | Path, overrides: Sequence[str], seed: int | None) -> Recipe:
    """The recipe that `run` was begun with; what is asked for again must say the same.

    Args:
        recipe: the file that the run was begun with, or the run's own recipe.toml.
        overrides, seed: those of the beginning, or fewer.
    Raises:
        EdgekitError: another recipe, override or seed, or a recipe.toml that was changed since.
    """
    plan = read(run.recipe_file)
    about, own, asked = run.info().get("recipe", {}), sha256(run.recipe_file), shipped.find(recipe, "recipes")
    if about.get("resolved_sha256", own) != own:
        raise EdgekitError("the run's recipe was changed after it was begun", where=run.recipe_file, mend=_NEW)
    if sha256(asked) not in (own, about.get("sha256")):
        other = read(recipe, overrides, seed)
        if other != plan:
            raise EdgekitError(
                f"the run was begun with another recipe ({_difference(plan, other)})", where=run.folder, mend=_NEW
            )
        return plan
    for override in overrides:
        if read(run.recipe_file, [override]) != plan:
            key, _ = split_override(override)
            raise EdgekitError(
                f"the run was begun with another '{'.'.join(key)}'",
                where=f"--set {override}",
                mend=f"Leave it out. {_NEW}",
            )
    if seed is not None and seed != plan.seed:
        raise EdgekitError(
            f"the run was begun with seed {plan.seed}", where=f"--seed {seed}", mend=f"Leave it out. {_NEW}"
        )
    return plan


_NEW = "A new run is started without --resume"


def _difference(begun: Recipe, asked: Recipe) -> str:
    """The first key in which two recipes differ: "its train.epochs is 5, not 9"."""
    first, second = (
        {
            f"{name}.{key}" if key else name: item
            for name, value in one.model_dump(mode="json").items()
            for key, item in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for one in (begun, asked)
    )
    key = next(key for key in [*first, *second] if first.get(key) != second.get(key))
    return f"its {key} is {first.get(key)!r}, not {second.get(key)!r}"


def newest(stem: str) -> Run | None:
    """The run of this recipe with the highest number, finished or not."""
    found = [path for path in ROOT.glob(f"{stem}-*") if path.is_dir() and path.name[len(stem) + 1 :].isdigit()]
    return Run(max(found, key=lambda path: int(path.name[len(stem) + 1 :]))) if found else None


def set_latest(run: Run) -> None:
    """Point runs/latest at `run`: a symlink, or a text file where links are not allowed."""
    link = run.folder.parent / "latest"
    part = link.with_name(f".latest.{os.getpid()}")
    try:
        part.symlink_to(run.name)
        part.replace(link)
    except OSError:
        write_text(link, run.name + "\n")
    finally:
        part.unlink(missing_ok=True)


def latest() -> Run:
    """The run that runs/latest names.

    Raises:
        EdgekitError: there is none.
    """
    link = ROOT / "latest"
    folder = ROOT / link.read_text(encoding="utf-8").strip() if link.is_file() else link
    if not folder.is_dir():
        raise EdgekitError(
            "there is no finished run here yet", where=ROOT, mend="Run: edgekit distill recipes/mobilenet.toml"
        )
    # Under its own name, which does not move with the link, and relative, as people read it in what is printed.
    return Run(ROOT / link.readlink() if link.is_symlink() else folder)


def find(folder: str | Path | None) -> Run:
    """The run in `folder`, else the latest; it must be finished.

    Raises:
        EdgekitError: there is no such run, or it has not finished.
    """
    run = latest() if folder is None else Run(Path(folder))
    if not (run.folder / "run.json").is_file():
        raise EdgekitError("this is not a run folder (it has no run.json)", where=run.folder)
    if not run.finished or not run.student.is_file():
        raise EdgekitError("the run has not finished", where=run.folder, mend=f"Run: {continue_command(run)}")
    return run


def continue_command(run: Run) -> str:
    return f"edgekit distill {shlex.quote(str(run.recipe_file))} --run {shlex.quote(str(run.folder))} --resume"
