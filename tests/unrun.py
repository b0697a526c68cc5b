"""What tests of the formats that cannot run here share: a run whose artifacts are written and not opened."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_exporter import make

from edgekit import runs
from edgekit.exporter import export

LACKED = "a device that is not here"


@contextmanager
def exported(folder: Path, name: str, format: ModuleType) -> Iterator[tuple[runs.Run, dict[str, Any]]]:
    """A run with every precision of a format and onnx-fp32, on a machine that cannot run the format, whatever this one
    can; its folder is the working directory."""
    place = folder / "work"
    make(place / "runs/small-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(format, "lacking", lambda: LACKED)
        export("runs/small-1")
        shutil.rmtree(place / "runs/small-1/artifacts/torchscript-fp32")
        document = export("runs/small-1", int8=True, fp16=True, formats=name, ptq="plain")
        yield runs.Run(Path("runs/small-1")), document
