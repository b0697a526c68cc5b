"""Model files with a few bytes changed, for what reads them."""

import contextlib
import random
import shutil
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.formats import FORMATS, describe


def described(name: str, whole: Path, scratch: Path, times: int) -> int:
    """Describe copies of the file of a format with three bytes changed each, most of them near its ends, where its
    structure is; any error but EdgekitError is the caller's. How many of them could be described."""
    parts = Path(FORMATS[name].FILE).parts
    content, draw, found = whole.read_bytes(), random.Random(0), 0
    folder = scratch / "damaged"
    shutil.copytree(whole.parents[len(parts) - 1], folder)
    for _ in range(times):
        changed = bytearray(content)
        for _ in range(3):
            near = min(len(content), draw.choice((64, 2048, len(content))))
            place = draw.randrange(near)
            changed[draw.choice((place, len(content) - 1 - place))] = draw.randrange(256)
        (folder / Path(*parts)).write_bytes(changed)
        with contextlib.suppress(EdgekitError):
            describe(name, folder / Path(*parts))
            found += 1
    return found
