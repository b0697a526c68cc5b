"""What people see: everything goes to stderr, so that stdout stays free for `--json` and for results."""

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgekit.errors import printable


def rank() -> int:
    """The number of this process among those that a launcher started for one piece of work; 0 speaks for all."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(value) for name in names if (value := os.environ.get(name, "")).isdigit()), 0)


console = Console(stderr=True, highlight=False, quiet=rank() > 0)


def say(text: object) -> None:
    """One line to stderr; names in it can neither style it nor move the cursor."""
    console.print(printable(text), markup=False, soft_wrap=True)


def progress(*, by_itself: bool = True) -> Progress:
    """A progress bar with ETA; where stderr is no terminal it stays silent, and `say` marks the milestones.

    Args:
        by_itself: a thread draws it anew, which takes time from what is measured; False: only `refresh` draws it.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not sys.stderr.isatty(),
        auto_refresh=by_itself,
    )
