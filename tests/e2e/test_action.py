"""The steps of action.yml, typed in a shell as a runner types them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_foreign import desk  # noqa: F401 (a fixture)

ACTION = Path(__file__).parents[2] / "action.yml"


def script() -> str:
    """The last `run: |` block of the action."""
    _, _, block = ACTION.read_text(encoding="utf-8").rpartition("run: |\n")
    return textwrap.dedent(block)


@pytest.mark.parametrize(("floor", "code"), [("1", 0), ("99", 1)])
def test_the_action_fails_the_job_unless_the_file_reaches_the_floor(desk, floor, code) -> None:  # noqa: F811
    (desk / "edgekit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgekit "$@"\n')
    (desk / "edgekit").chmod(0o755)
    given = {"FILE": "net.onnx", "DATA": "photos", "AT_LEAST": floor, "ATTACK": "fgsm", "OPTIONS": "--epsilon 0.001"}
    summary = {"GITHUB_STEP_SUMMARY": str(desk / "summary.md"), "PATH": f"{desk}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script()], cwd=desk, env=os.environ | given | summary, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "| file |" in (desk / "summary.md").read_text()
    assert {"edgekit.html", "edgekit.md", "edgekit.xml"} <= {path.name for path in desk.iterdir()}
