"""The judge: a file in its own runtime, in a child process, or any program that speaks the protocol of CLI.md.

What stands here is loaded at first use: the child (`child.py`) lives in this package and must not load torch, which
takes ten times as long to import as ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Remote", "connect", "judged_on", "machine_block", "open", "runtime", "start", "start_on"]

_ROOMS = {
    "Remote": "remote",
    "connect": "opening",
    "judged_on": "where",
    "machine_block": "where",
    "open": "opening",
    "runtime": "where",
    "start": "opening",
    "start_on": "opening",
}

if TYPE_CHECKING:
    from edgekit.judge.opening import connect, open, start, start_on
    from edgekit.judge.remote import Remote
    from edgekit.judge.where import judged_on, machine_block, runtime


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"edgekit.judge.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'edgekit.judge' has no attribute '{name}'")
