"""What a verdict leaves on disk: verdicts/<n>/, and the adversarial images of --save-adversarial (CLI.md)."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy
import safetensors
from safetensors.torch import save_file

from edgekit import verdict
from edgekit.attacks.campaign import Outcome, Part
from edgekit.errors import EdgekitError
from edgekit.examine import Examined, Trial
from edgekit.files import digest, write_json, write_text, writing
from edgekit.verdict import Verdict


def looks(verdicts: Path, digests: Sequence[str], data_sha256: str) -> int:
    """1 + how many verdicts the folder holds already on one of these files and the same data."""
    most = 0
    earlier: list[Verdict] = []
    for path in sorted(verdicts.glob("*/verdict.json")):
        with contextlib.suppress(EdgekitError, ValueError, OSError, RecursionError):  # a damaged one cannot be counted
            earlier.append(verdict.from_dict(json.loads(path.read_text(encoding="utf-8")), where=path))
    for sha256 in digests:
        judged = [
            one
            for one in earlier
            if one.data.sha256 == data_sha256
            and any(file.sha256 == sha256 and file.verdict != "not_run" for file in one.artifacts)
        ]
        most = max(most, len(judged))
    return 1 + most


def lines(name: str, trial: Trial, own: Outcome | None, examined: Examined) -> list[dict[str, Any]]:
    outcome = examined.outcome
    attacks, sources = outcome.won()
    columns = {
        "index": trial.index.tolist(),
        "label": trial.labels.tolist(),
        "file_clean": (outcome.clean.argmax(1) == trial.labels).tolist(),
        "file_robust": outcome.robust.tolist(),
        "attack": attacks,
        "source": sources,
    }
    if own is not None and examined.float_robust is not None:
        columns["float_clean"] = (own.clean.argmax(1) == trial.labels).tolist()
        columns["float_robust"] = examined.float_robust.tolist()
    return [{"artifact": name, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def keep(
    verdicts: Path, document: Verdict, lines: Sequence[dict[str, Any]], page: Callable[[Verdict], str]
) -> tuple[Verdict, Path]:
    """Write verdicts/<n>/; the verdict itself comes last, so that a folder with one is whole.

    Returns:
        The verdict, which names its report now, and the folder.
    """
    verdicts.mkdir(exist_ok=True)
    taken = 1
    while True:
        folder = verdicts / str(taken)
        try:  # mkdir, not exists(): two commands at once must not share a folder
            folder.mkdir()
            break
        except FileExistsError:
            taken += 1
    document = dataclasses.replace(document, report=f"{verdicts.name}/{taken}/report.html")
    try:
        write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_text(folder / "report.html", page(document))
        write_json(folder / "verdict.json", verdict.to_dict(document))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return document, folder


class Notebook:
    """The finished parts of an unfinished verdict, in verdicts/.unfinished-<key>/: what --resume continues from.

    The folder is locked while it is used: two commands under the same options have one each, and neither clears the
    other's. What nobody came back to for STALE seconds is removed.

    Args:
        key: a digest of all that the parts depend on; other options never find them.
        fresh: forget what is there.
    """

    def __init__(self, verdicts: Path, key: str, *, fresh: bool) -> None:
        for left in verdicts.glob(".unfinished-*"):
            if _age(left) > STALE and (lock := _locked(left)):
                shutil.rmtree(left, ignore_errors=True)
                lock.close()
        number = 1
        while True:
            self.folder = verdicts / f".unfinished-{key[:16]}{'' if number == 1 else f'-{number}'}"
            self.folder.mkdir(parents=True, exist_ok=True)
            if lock := _locked(self.folder):
                break
            number += 1
        self._lock: IO[bytes] | None = lock
        if fresh:
            for part in self.folder.glob("*.safetensors"):
                part.unlink(missing_ok=True)

    @classmethod
    def joined(cls, folder: str | Path) -> Self:
        """The notebook that another process of the same work opened, which alone removes it."""
        made = cls.__new__(cls)
        made.folder, made._lock = Path(folder), None
        return made

    def page(self, judge: str) -> "Page":
        """The Memory of one judge."""
        return Page(self.folder, judge)

    @property
    def parts(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def leave(self) -> None:
        """Let another command take the parts up; without any, nothing is left behind."""
        if self._lock is None:
            return
        if self.parts:
            self._lock.close()
        else:
            self.close()

    def close(self) -> None:
        """Remove the parts, and the folder of the verdicts where it holds no other."""
        if self._lock is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


STALE = 7 * 24 * 3600.0
_LOCK = "lock"


def _age(folder: Path) -> float:
    """Seconds since something was written into it; 0 where it is gone."""
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0


def _locked(folder: Path) -> IO[bytes] | None:
    """The folder's lock, held until it is closed or this process ends; None where another holds it, or it is gone."""
    try:
        lock = (folder / _LOCK).open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_nlink:  # else its last holder has removed it since
            return lock
    except BlockingIOError:
        pass
    except OSError:  # a file system without locks: there two commands at once are the user's to avoid
        return lock
    lock.close()
    return None


class Page:
    """A campaign.Memory on disk, one file a part."""

    def __init__(self, folder: Path, judge: str) -> None:
        self.folder, self.judge = folder, judge

    def _place(self, attack: str, source: str, chunk: int) -> Path:
        return self.folder / f"{digest(self.judge, attack, source, str(chunk))[:24]}.safetensors"

    def recall(self, attack: str, source: str, chunk: int) -> Part | None:
        try:
            with safetensors.safe_open(self._place(attack, source, chunk), "pt") as file:
                about = file.metadata()
                return Part(
                    file.get_tensor("adversarial"),
                    file.get_tensor("fooled"),
                    float(about["seconds"]),
                    int(about["passes"]),
                )
        except (OSError, safetensors.SafetensorError):  # not there: parts are written whole or not at all
            return None

    def keep(self, attack: str, source: str, chunk: int, part: Part) -> None:
        tensors = {"adversarial": part.adversarial.contiguous(), "fooled": part.fooled.contiguous()}
        about = {"seconds": repr(part.seconds), "passes": str(part.passes)}
        with writing(self._place(attack, source, chunk)) as beside:
            save_file(tensors, beside, about)


@contextlib.contextmanager
def adversarial(path: str | Path) -> Iterator[Callable[[str, Trial, Examined], None]]:
    """An .npz file that grows by one artifact at a time, so that the images of all need not be held at once.

    `images`, `labels` and `index` are those of the artifact that was attacked on most samples; one that was decided
    earlier (looks.py) has the first of them.
    """
    path = Path(path)
    if path.is_dir():
        raise EdgekitError("this is a folder, not a file", where=f"--save-adversarial {path}")
    if not path.parent.is_dir():
        raise EdgekitError("its folder is not there", where=f"--save-adversarial {path}")
    with writing(path) as part, zipfile.ZipFile(part, "w") as archive:

        def put(name: str, value: Any) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                numpy.lib.format.write_array(file, numpy.asarray(value), allow_pickle=False)

        longest: list[Trial] = []

        def add(name: str, trial: Trial, examined: Examined) -> None:
            longest[:] = [max([trial, *longest], key=lambda one: len(one.labels))]
            attacks, sources = examined.outcome.won()
            put(f"{name}/adversarial", examined.outcome.adversarial.numpy())
            put(f"{name}/fooled", ~examined.outcome.robust.numpy())
            put(f"{name}/attack", numpy.array(attacks, dtype=str))
            put(f"{name}/source", numpy.array(sources, dtype=str))

        yield add
        for trial in longest:
            put("images", trial.images.numpy())
            put("labels", trial.labels.numpy())
            put("index", trial.index.numpy())
