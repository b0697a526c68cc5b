"""The one error that users see: what is wrong, where, and the mend."""

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TypeVar

BAD_INPUT, ENVIRONMENT = 2, 4  # the two exit codes that an error can carry (CLI.md)

T = TypeVar("T")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


class EdgekitError(Exception):
    """Bad input or a missing part of the environment, said in one sentence.

    Args:
        what: the fault, without a final full stop.
        where: the file, line or option at fault; printed first.
        mend: what the user can do about it; printed last.
        exit_code: 2 for bad input, 4 where the environment cannot do what was asked.
    """

    def __init__(self, what: str, *, where: object = None, mend: str | None = None, exit_code: int = BAD_INPUT) -> None:
        self.what, self.where, self.mend, self.exit_code = what, where, mend, exit_code
        super().__init__(str(self))

    def __str__(self) -> str:
        place = "" if self.where is None else f"{self.where}: "
        return printable(place + self.what + (f". {self.mend}" if self.mend else ""))


def printable(text: object) -> str:
    """`text` with control and direction-changing characters shown as escapes, so that no name can drive a terminal."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), str(text))


def nearest(name: str, names: Iterable[str]) -> str:
    """The sentence that names the closest known name, or all of them where none is close."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}"


def choose(table: Mapping[str, T], name: str, kind: str, *, where: object = None) -> T:
    """`table[name]`, or an error that names the nearest key.

    Raises:
        EdgekitError: `name` is not in `table`.
    """
    if name not in table:
        raise EdgekitError(f"there is no {kind} '{name}'", where=where, mend=nearest(name, table))
    return table[name]


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which `pip install` brings it.

    Raises:
        EdgekitError: (exit code 4) the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:  # installed but broken: the real fault must show
            raise
        raise EdgekitError(
            f"{module} is not installed", mend=f"Run: pip install 'edgekit[{extra}]'", exit_code=ENVIRONMENT
        ) from None
