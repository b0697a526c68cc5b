"""Finished parts of an unfinished verdict: one folder a command, and nothing that stays for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from edgekit.archive import STALE, Notebook
from edgekit.attacks.campaign import Part

KEY = 64 * "a"


def part(value: float) -> Part:
    return Part(torch.full((2, 1, 4, 4), value), torch.tensor([True, False]), 1.0, 3)


def kept(notebook: Notebook) -> float | None:
    found = notebook.page("file").recall("pgd20", "float", 0)
    return None if found is None else found.adversarial.mean().item()


def test_two_commands_under_the_same_options_have_a_folder_each(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts"
    first = Notebook(verdicts, KEY, fresh=True)
    first.page("file").keep("pgd20", "float", 0, part(0.25))
    second = Notebook(verdicts, KEY, fresh=True)
    assert (kept(first), kept(second)) == (0.25, None)
    second.page("file").keep("pgd20", "float", 0, part(0.75))
    second.close()
    assert kept(first) == 0.25
    first.leave()
    resumed = Notebook(verdicts, KEY, fresh=False)
    assert (resumed.parts, kept(resumed)) == (1, 0.25)
    resumed.leave()
    afresh = Notebook(verdicts, KEY, fresh=True)
    assert afresh.parts == 0
    afresh.leave()  # nothing was finished: nothing stays, not even the folder that was made for it
    assert not verdicts.exists()


def test_what_a_killed_command_left_is_free(tmp_path: Path) -> None:
    killed = (
        "import os, sys; from pathlib import Path; from edgekit.archive import Notebook; "
        "one = Notebook(Path(sys.argv[1]), sys.argv[2], fresh=True); "
        "(one.folder / 'x.safetensors').touch(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path), KEY]).returncode == -9
    resumed = Notebook(tmp_path, KEY, fresh=False)
    assert (resumed.folder.name, resumed.parts) == (f".unfinished-{KEY[:16]}", 1)
    resumed.close()


def test_what_nobody_came_back_to_is_removed_unless_it_is_in_use(tmp_path: Path) -> None:
    names = {"old": 64 * "b", "busy": 64 * "c", "recent": 64 * "d"}
    books = {name: Notebook(tmp_path, key, fresh=True) for name, key in names.items()}
    for name, book in books.items():
        book.page("file").keep("pgd20", "float", 0, part(0.5))
        if name != "busy":
            book.leave()
        if name != "recent":
            long_ago = time.time() - STALE - 60
            os.utime(book.folder, (long_ago, long_ago))
    Notebook(tmp_path, KEY, fresh=True).close()
    left = {path.name.removeprefix(".unfinished-")[0] for path in tmp_path.iterdir()}
    assert left == {"c", "d"}
    books["busy"].close()
