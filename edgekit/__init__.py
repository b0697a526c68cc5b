"""edgekit: robust training, export to the edge, and the proof that the robustness arrived.

The verbs of the command line stand here too: `edgekit.distill`, `edgekit.export`, `edgekit.verify` and `edgekit.bench`
take the same options as arguments and return what `--json` prints. They are loaded at first use; importing edgekit is
fast.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EdgekitError", "__version__", "bench", "distill", "export", "verify"]

_VERBS = {
    "bench": "edgekit.bencher",
    "distill": "edgekit.train",
    "export": "edgekit.exporter",
    "verify": "edgekit.verifier",
}

if TYPE_CHECKING:
    from edgekit.bencher import bench
    from edgekit.errors import EdgekitError
    from edgekit.exporter import export
    from edgekit.train import distill
    from edgekit.verifier import verify


def __getattr__(name: str) -> Any:
    import importlib

    if name in _VERBS:
        return getattr(importlib.import_module(_VERBS[name]), name)
    if name == "EdgekitError":
        return importlib.import_module("edgekit.errors").EdgekitError
    raise AttributeError(f"module 'edgekit' has no attribute '{name}'")
