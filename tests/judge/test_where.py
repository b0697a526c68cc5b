"""The words for where a file was judged."""

import re
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch

from edgekit import judge
from edgekit.formats import FORMATS
from edgekit.judge import where

TORCH = torch.__version__.partition("+")[0]  # which build it is stands in no verdict


def test_where_it_was_judged_is_said_as_the_contract_says():
    for format in FORMATS:
        name = re.escape(where.RUNTIME[format])
        # An extra that is not installed has no version.
        assert re.fullmatch(rf"\S+ \S+, {name}( \d+\.\d+\S*)?", judge.judged_on(format))
    assert judge.judged_on("onnx").endswith(f", onnxruntime {onnxruntime.__version__}")
    assert judge.runtime("torchscript") == f"torch {TORCH}"


def test_the_machine_block_names_what_this_machine_has():
    block = judge.machine_block()
    assert set(block) == {"cpu", "int8_instructions", "runtimes"}
    assert block["runtimes"].items() >= {"onnxruntime": onnxruntime.__version__, "torch": TORCH}.items()
    extra = block["runtimes"].keys() - {"onnxruntime", "torch"}
    assert {name: version(name) for name in extra} == {name: block["runtimes"][name] for name in extra}
    assert extra <= set(where.RUNTIME.values())
    assert block["cpu"]
    if (path := Path("/proc/cpuinfo")).is_file() and block["int8_instructions"] != "unknown":
        assert block["int8_instructions"] in path.read_text().split()
    assert block["int8_instructions"] in judge.judged_on("onnx")
