"""A model file -> a differentiable copy of that very file.

An interpreter of the ONNX graph in torch. Integer tensors are computed as ONNX Runtime computes them (integers.py),
floats in float32 whatever the file says.
"""

from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.twin.clipping import UNRULED
from edgekit.twin.graph import read
from edgekit.twin.loading import mark_averages, round_weights
from edgekit.twin.module import Twin

__all__ = ["Twin", "open"]


def open(path: Path, output: str | None = None, *, clips: bool = False) -> Twin:
    """The differentiable copy of an ONNX file, in eval mode on the CPU.

    Args:
        output: the name of the output that holds the scores; needed where the file has several outputs.
        clips: sums of two 8-bit products clip, as on x86 without VNNI (clipping.py): for answers, not for gradients.
    Raises:
        EdgekitError: the file is no ONNX graph, an invalid one, one with several inputs or outputs, or it has an
            operator without a rule here (named, with its node).
    """
    graph = read(path, output)
    round_weights(graph)
    mark_averages(graph)
    for node in graph.nodes if clips else ():
        if node.type in UNRULED:
            raise EdgekitError(f"no rule for the clipped sums of {node.type} (node '{node.name}')", where=path)
        node.memo["clips"] = True
    return Twin(graph)
