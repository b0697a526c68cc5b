"""A small recipe, and edgekit typed as a user types it."""

import os
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
