"""Small recipes, and edgekit typed as a user types it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TINY = """
[student]
architecture = "mobilenetv2"
width = 0.25
strides = [1, 2, 2, 1, 1, 2, 1]

[data]
name = "digits"
validation = 0.15
calibration = 64
pad = 0
flip = false

[method]
name = "sat"

[inner]
epsilon = 0.05
step_size = 0.03
steps = 2

[train]
epochs = 4
batch_size = 64
schedule = "cosine"
warmup = 0.2
gradient_clip = 1

[evaluate]
steps = 2
samples = 60
"""


# The same, taught for some seconds more, so that it tells the digits apart: TINY's student answers all images alike,
# and most of what `verify` does with a real one (checks, pairs, replays) never runs on that.
LEARNT = TINY.replace("batch_size = 64", "batch_size = 16").replace("steps = 2\n\n[train]", "steps = 1\n\n[train]")


def command(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Type an edgekit command in `cwd`, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def interruptible() -> None:
    """In a child, before its program starts: what a shell runs in the background ignores Ctrl-C, and bequeaths that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
