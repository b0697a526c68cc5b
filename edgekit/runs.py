"""Run folders: runs/<recipe>-<n>, and runs/latest, which only a finished run moves."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.files import write_json, write_text

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
    def finished(self) -> bool:
        return self.info().get("status") == "finished"


def create(stem: str, folder: Path | None) -> Run:
    """A new run folder: `folder` as given, else the first free runs/<stem>-<n>.

    Raises:
        EdgekitError: `folder` exists and is not empty.
    """
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


def newest(stem: str) -> Run | None:
    """The run of this recipe with the highest number, finished or not."""
    found = [path for path in ROOT.glob(f"{stem}-*") if path.is_dir() and path.name[len(stem) + 1 :].isdigit()]
    return Run(max(found, key=lambda path: int(path.name[len(stem) + 1 :]))) if found else None


def set_latest(run: Run) -> None:
    """Point runs/latest at `run`: a symlink, or a text file where links are not allowed."""
    link, part = ROOT / "latest", ROOT / f".latest.{os.getpid()}"
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
    return f"edgekit distill {run.recipe_file} --run {run.folder} --resume"
