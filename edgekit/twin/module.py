"""A graph as a torch module: constants folded, arithmetic of shapes done once per input shape."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.twin.graph import Graph, Node, strip_softmax
from edgekit.twin.integers import Grid, Value, real
from edgekit.twin.operators import OPERATORS

_SHAPES_KEPT = 8  # input shapes whose arithmetic is remembered
# What one of these answers depends on the sizes of its input alone.
_SIZES = ("Shape", "Size")


class Twin(nn.Module):
    """images, as the file takes them -> logits (N, K) float32; a differentiable Classifier.

    Attributes:
        before_softmax: the final Softmax, LogSoftmax or Sigmoid that the file has and the twin leaves out, else None.
        batch: images that the file takes at once, None for any number. The twin takes any number.
    """

    differentiable = True

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.where, self.batch = graph.where, graph.batch
        self.before_softmax = strip_softmax(graph)
        self.input, self.output = graph.input, graph.output
        self.constants: dict[str, Value] = dict(graph.constants)
        self.steps = [step for step in graph.nodes if not self._folded(step)]
        self.sized = _sized(self.steps, self.constants)
        # A file for a fixed number of images, or whose grids depend on the batch, is asked in the batches it was made
        # for, unless a trial shows that more at once makes no difference.
        self._dynamic = [node for node in self.steps if node.type == "DynamicQuantizeLinear"]
        self._at_once = graph.batch or (1 if self._dynamic else None)
        self._tried: dict[tuple[int, ...], bool] = {}
        self._known: dict[Any, dict[str, Value]] = {}
        self._dead = _last_reads(self.steps, self.output)
        used = {name for node in self.steps for name in node.inputs} | {self.output}
        self.constants = {name: value for name, value in self.constants.items() if name in used}
        self.eval().requires_grad_(False)

    def _folded(self, node: Node) -> bool:
        """Whether the node depends on constants only; its outputs are constants then."""
        if node.type not in OPERATORS:
            raise EdgekitError(f"no gradients through the operator {node.type} (node '{node.name}')", where=self.where)
        if not all(name in self.constants for name in node.inputs if name):
            return False
        with torch.no_grad():
            self.constants.update(_outputs(node, _run(node, [self.constants.get(name) for name in node.inputs])))
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Twin":
        def move(value: Value) -> Value:
            if isinstance(value, Grid):
                return value.to(fn)
            # Integers are indices and shapes; these are read on the CPU.
            return fn(value) if isinstance(value, Tensor) and value.dtype != torch.int64 else value

        self.constants = {name: move(value) for name, value in self.constants.items()}
        self._known.clear()
        for node in self.steps:
            node.memo.clear()
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        count = self._at_once
        if count is None or len(images) == count or (len(images) > 1 and self._together(images, count)):
            return self.answer(images)
        chunks = list(images.split(count))
        missing = count - len(chunks[-1])
        if missing:  # filled up with its last image, whose answers are then dropped
            chunks[-1] = torch.cat([chunks[-1], chunks[-1][-1:].expand(missing, *images.shape[1:])])
        return torch.cat([self.answer(chunk) for chunk in chunks])[: len(images)]

    @torch.no_grad()
    def _together(self, images: Tensor, count: int) -> bool:
        """Whether a larger batch gets the answers that its images get in batches of `count`."""
        shape = tuple(images.shape[1:])
        if shape not in self._tried:
            some = images.detach()[: 2 * count]
            some = torch.cat([some, some[-1:].expand(2 * count - len(some), *some.shape[1:])])
            apart = torch.cat([self.answer(chunk) for chunk in some.split(count)])
            try:
                joined = self.answer(some)
            except EdgekitError:
                joined = None
            self._tried[shape] = (
                joined is not None and joined.shape == apart.shape and joined.allclose(apart, rtol=1e-4, atol=1e-4)
            )
        return self._tried[shape]

    def answer(self, images: Tensor, others: Mapping[str, Value] | None = None) -> Tensor:
        """The logits of one batch, with `others` in the place of the constants of these names."""
        values: dict[str, Value] = {**self.constants, **(others or {}), self.input: images}
        key = (tuple(images.shape), images.device)
        known = self._known.get(key)
        kept: dict[str, Value] = {}
        for node in self._dynamic:
            node.memo["images"] = len(images)
        if known is not None:
            values.update(known)
        for place, (node, dead) in enumerate(zip(self.steps, self._dead, strict=True)):
            sized = place in self.sized
            if not (sized and known is not None):
                # What is remembered must serve any later call, with gradients or without.
                guard = torch.inference_mode(False) if sized else contextlib.nullcontext()
                try:
                    with guard:
                        made = _outputs(node, _run(node, [values[name] if name else None for name in node.inputs]))
                except KeyError as error:
                    raise node.error(f"the value {error} is not there") from None
                values.update(made)
                if sized:
                    kept.update(made)
            for name in dead:  # what nobody reads again must not fill the memory
                values.pop(name, None)
        if known is None:
            if len(self._known) >= _SHAPES_KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = kept
        return real(values[self.output]).float()


def _run(node: Node, inputs: list[Value]) -> Value:
    while inputs and inputs[-1] is None:  # trailing inputs may be left out by an empty name
        inputs.pop()
    try:
        return OPERATORS[node.type](node, *inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise node.error(f"cannot be computed: {first[:200]}") from error


def _outputs(node: Node, made: Value) -> dict[str, Value]:
    return dict(zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False))


def _sized(steps: list[Node], constants: dict[str, Value]) -> set[int]:
    """The places of steps whose answers depend on the shape of the images only."""
    known, places = set(constants) | {""}, set()
    for place, node in enumerate(steps):
        if node.type in _SIZES or known.issuperset(node.inputs):
            known.update(node.outputs)
            places.add(place)
    return places


def _last_reads(steps: list[Node], output: str) -> list[list[str]]:
    """For each step the names that no later one reads."""
    last = {name: place for place, node in enumerate(steps) for name in node.inputs}
    dead: list[list[str]] = [[] for _ in steps]
    for name, place in last.items():
        if name != output:
            dead[place].append(name)
    return dead
