"""The house: imports run one way, and what must be fast loads nothing slow."""

import ast
import subprocess
import sys
from pathlib import Path

import edgekit

ROOT = Path(edgekit.__file__).parent
# From the top of the house to the bottom: a module may import from below its own line only.
FLOORS = [
    "__main__", "cli", "doctor", "trial", "exporter", "stock", "jobs", "inspector", "bencher", "lineup", "quantize",
    "train", "verifier", "archive", "sweep", "assignment", "looks", "baseline", "elsewhere", "places", "examine",
    "checks", "crew", "script",
    "foreign", "report", "methods", "attacks", "twin", "judge", "formats", "qdq_program", "models", "data", "artifact",
    "verdict", "planned", "statistics", "runs", "recipe", "machine", "saturation", "processors", "console", "shipped",
    "classifier", "lite", "ort", "randomness", "files", "errors",
]  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_run_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        here = room(path)
        if here == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "edgekit":
                names = [node.module] if node.module != "edgekit" else [f"edgekit.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("edgekit.")]
            for name in names:
                there = (name or "").split(".")[1]
                if there in FLOORS and there != here and FLOORS.index(there) < FLOORS.index(here):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong
    assert {room(path) for path in ROOT.rglob("*.py")} <= {*FLOORS, "__init__"}


def test_importing_edgekit_and_its_commands_loads_nothing_slow():
    slow = ["torch", "onnx", "onnxruntime", "scipy", "numpy", "matplotlib", "pydantic", "PIL", "sklearn"]
    code = f"import sys, edgekit, edgekit.cli; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_help_loads_no_parser_of_markdown_or_of_source_code():
    slow = ["markdown_it", "pygments", "torch", "onnx"]
    code = (
        "import atexit, sys; from edgekit.cli import main; sys.argv = ['edgekit', 'verify', '--help']\n"
        f"atexit.register(lambda: print([name for name in {slow} if name in sys.modules])); main()"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "--attack" in shown
    assert shown.splitlines()[-1] == "[]"
