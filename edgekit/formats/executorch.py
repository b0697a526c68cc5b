"""ExecuTorch: `model.pte`, every operator in its XNNPACK delegate; batch of 1 to 64, NCHW.

An int8 file holds the integers of edgekit's own QDQ graph; `twin.onnx` beside it is that graph, for gradients, and is
no part of what ships. One thing differs: XNNPACK has no kernel from static integers to floats, so that the layer of the
logits quantizes what it reads anew, with a range of its own for each image. Its grid is the finer of the two.
"""

import collections
import contextlib
import importlib.util
import json
import logging
import re
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn import functional

from edgekit import artifact
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.formats import onnx
from edgekit.lite import quiet
from edgekit.models import Network
from edgekit.qdq_program import Program

if TYPE_CHECKING:
    from onnx import ModelProto

FILE = artifact.JUDGED["executorch"]
OPENED = (FILE,)
RUNTIME = "ExecuTorch"
PRECISIONS = ("fp32", "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "executorch")
SCHEME = "signed"

BATCH = 64  # images at once, at most: ExecuTorch wants a bound
_FORWARD = "forward"  # the method that classifies; the others are metadata and take nothing
_DELEGATE = "XnnpackBackend"
_QUANTIZED = "XNNQuantizedTensorValue"
# What begins a .pte file, and an XNNPACK program in it, with the sizes and offsets of its parts.
_HEADER, _DELEGATE_HEADER = struct.Struct("<4x2s2x4sIQQQ"), struct.Struct("<4x4sHIIIQ")
_INFINITE = re.compile(rb"(?<=[:\[,] )(-?)inf\b")  # as flatc writes it, and JSON does not
_NO_OPERATORS = ("Convert",)  # to integers and back: between operators


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Write the student into `folder`; `metadata` travels in the file, each entry a method that answers a string.

    Raises:
        EdgekitError: torch or ExecuTorch does not take the network; (exit code 4) ExecuTorch is not installed.
    """
    program = _exported(network.eval(), network.input_shape)
    _keep_rank(program)
    _lower(program, folder / FILE, metadata)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "int8") -> None:
    """Write a QDQ graph in the scheme "signed", and keep the graph beside the file.

    Raises:
        EdgekitError: the graph is none of edgekit's; (exit code 4) ExecuTorch is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        onnx.write_model(model, Path(scratch), metadata)
        twin = (Path(scratch) / onnx.FILE).read_bytes()
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    program = _exported(Program(model, float_result=_dynamic).eval(), shape)
    _keep_rank(program)
    _lower(program, folder / FILE, metadata)
    (folder / artifact.TWIN).write_bytes(twin)


def open(path: Path, *, threads: int | None = None) -> Classifier:
    """The file in ExecuTorch on the CPU, in this process; more than BATCH images go through it in turn.

    Args:
        threads: of the one pool that all files of this process share; None leaves it as it is, at first one for each
            core.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: ExecuTorch does not take the file; (exit code 4) it is not installed.
    """
    runtime = package()
    _contents(path)
    loaded = _loaded(runtime, path, threads)
    wanted, made = (tuple(of(0).sizes()) for of in _tensors(loaded.method.method_meta()))

    def run(images: Tensor) -> Tensor:
        nonlocal loaded
        if loaded.pool != _pools:  # another file was opened with other threads: the ones that this one knows are gone
            loaded = _loaded(runtime, path, threads)
        pixels = images.detach().to("cpu", torch.float32).contiguous()
        if not len(pixels):
            return images.new_zeros(0, made[1], dtype=torch.float32)
        if tuple(pixels.shape[1:]) != wanted[1:]:
            raise EdgekitError(
                f"takes images of the shape {list(wanted[1:])}, not {list(pixels.shape[1:])}", where=path
            )
        try:
            logits = [loaded.method([part])[0] for part in pixels.split(wanted[0])]
        except RuntimeError as error:
            raise EdgekitError(f"ExecuTorch does not take such images ({_said(error)})", where=path) from None
        return torch.cat(logits).to(images.device)

    return Wrapped(run, differentiable=False)


def describe(path: Path) -> dict[str, Any]:
    """What the file itself holds: operators by precision, bytes, input, metadata. Nothing of it is run.

    Raises:
        EdgekitError: it is no ExecuTorch file; (exit code 4) ExecuTorch is not installed.
    """
    program = _contents(path)
    plans = {plan["name"]: plan for plan in program["execution_plan"]}
    forward = plans.pop(_FORWARD)
    made = _operators(path, program, forward)
    size = forward["values"][forward["inputs"][0]]["val"]["sizes"]
    answers = {name: plan["values"][plan["outputs"][0]]["val"] for name, plan in plans.items()}
    return {
        "format": "executorch",
        "bytes": path.stat().st_size,
        "operators": {precision: dict(sorted(count.items())) for precision, count in made.items() if count},
        "input": {"name": "images", "shape": ["batch", *size[1:]], "batch": size[0]},
        "metadata": {name: value["string_val"] for name, value in sorted(answers.items()) if "string_val" in value},
    }


def running(path: Path) -> dict[str, Any]:
    """What is delegated to XNNPACK, and in which precision; an operator outside has the name of its kernel.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those on floats}}.
    """
    program = _contents(path)
    forward = next(plan for plan in program["execution_plan"] if plan["name"] == _FORWARD)
    made = _operators(path, program, forward)
    return {"int8": made["int8"].total(), "float": dict(sorted(made["float"].items()))}


# Writing --------------------------------------------------------------------------------------------------------------


def _exported(module: torch.nn.Module, shape: Sequence[int]) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))


def _keep_rank(program: ExportedProgram) -> None:
    """Averages over height and width keep these axes, and what flattens them names no size of the batch: XNNPACK has
    no other form of either, and they would run outside it."""
    aten, graph = torch.ops.aten, program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        shape = list(value.shape) if isinstance(value, Tensor) else []
        averages = node.target is aten.mean.dim and len(node.args) < 3 and len(shape) == 2
        flattens = node.target is aten.flatten.using_ints and node.args[1:] == (1,)
        if not (averages or flattens):
            continue
        with graph.inserting_before(node):
            source = node.args[0]
            if averages:
                source = graph.call_function(aten.mean.dim, (source, node.args[1], True))
            flat = graph.call_function(aten.view.default, (source, [-1, shape[1]]))
        flat.meta = dict(node.meta)
        if averages:
            source.meta = {**node.meta, "val": node.meta["val"][:, :, None, None]}
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
    program.graph_module.recompile()


def _dynamic(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of int8 weights that answers floats, as XNNPACK has it: `x` is quantized image by image."""
    quantized = torch.ops.quantized_decomposed
    scale, zero = quantized.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    whole = quantized.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
    back = quantized.dequantize_per_token.default(whole, scale, zero, -128, 127, torch.int8, torch.float32)
    return functional.linear(back, weight, bias)


def _lower(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    package()
    noise = [logging.getLogger(name) for name in ("torch", "executorch", "root")]
    levels = [each.level for each in noise]
    with warnings.catch_warnings(), contextlib.ExitStack() as after:
        warnings.simplefilter("ignore")
        for each, level in zip(noise, levels, strict=True):
            after.callback(each.setLevel, level)
            each.setLevel(logging.ERROR)
        # Not in `package`: only writing needs these, and they take ten seconds to import.
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower  # pyright: ignore
        from executorch.exir.passes import MemoryPlanningPass  # pyright: ignore

        try:
            lowered = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods=dict(sorted(metadata.items()))
            )
            made = lowered.to_executorch(
                # The images stay where the app has them: planned memory would be that of the largest batch.
                ExecutorchBackendConfig(
                    sym_shape_eval_pass=_Bounded(), memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)
                )
            )
        except RuntimeError as error:
            raise EdgekitError(f"ExecuTorch does not take this network ({_said(error)})") from None
    path.write_bytes(made.buffer)


class _Bounded(PassBase):
    """A pass that gives each tensor the size that it has for BATCH images.

    ExecuTorch's own goes by the ranges of symbols, which get lost where the delegate's part is traced again.
    """

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        from executorch.exir.tensor import TensorSpec  # pyright: ignore
        from torch.utils._pytree import tree_flatten

        for graph in graph_module.modules():
            for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
                for spec in tree_flatten(node.meta.get("spec", []))[0]:
                    if isinstance(spec, TensorSpec):
                        spec.shape = [_largest(size) for size in spec.shape]
                        spec.stride = tuple(map(_largest, spec.stride))  # pyright: ignore (of one size only)
        return PassResult(graph_module, True)


def _largest(size: Any) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, BATCH)))


# Reading --------------------------------------------------------------------------------------------------------------


def package() -> Any:
    """The runtime, and no more of the package: all of it takes ten seconds to import.

    Raises:
        EdgekitError: (exit code 4) it is not installed.
    """
    try:
        from executorch.extension.pybindings import _C  # pyright: ignore
    except ImportError:
        raise _missing() from None
    return _C


def _missing() -> EdgekitError:
    mend = "Run: pip install 'edgekit[executorch]'"
    return EdgekitError("the package executorch is not installed", where=RUNTIME, mend=mend, exit_code=ENVIRONMENT)


_DECODING = 60  # seconds: a whole file takes less than one
_pools = 0  # how often the threads of this process were replaced


@dataclass(frozen=True)
class _Loaded:
    """A method, the program that has to outlive it, and the pool of threads that it was loaded with."""

    program: Any
    method: Any
    pool: int


def _loaded(runtime: Any, path: Path, threads: int | None) -> _Loaded:
    global _pools
    with quiet():  # it reports on the processor, and says on stderr what it says in its errors
        try:
            if threads is not None and runtime._threadpool_get_thread_count() != threads:
                runtime._unsafe_reset_threadpool(threads)
                _pools += 1
            program = runtime._load_program(str(path), program_verification=runtime.Verification.InternalConsistency)
            return _Loaded(program, program.load_method(_FORWARD), _pools)
        except RuntimeError as error:
            raise EdgekitError(f"ExecuTorch does not take the file ({_said(error)})", where=path) from None


def _tensors(meta: Any) -> Iterator[Any]:
    """How a method describes its inputs, and its outputs."""
    yield from (meta.input_tensor_meta, meta.output_tensor_meta)


def _contents(path: Path) -> dict[str, Any]:
    """The program in a .pte file, without the segments behind it.

    Raises:
        EdgekitError: it is none, or not whole; (exit code 4) ExecuTorch is not installed.
    """
    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        try:
            kind, extended, _, length, begin, size = _HEADER.unpack(head)
        except struct.error:
            kind = extended = b""
            length = begin = size = 0
        if (kind, extended) != (b"ET", b"eh00") or max(length, begin + size) > path.stat().st_size:
            raise EdgekitError("not an ExecuTorch file, or not a whole one", where=path)
        file.seek(0)
        program = _decoded(file.read(length), "exir/_serialize/program.fbs", path)
    program["begin"] = begin
    forward = [plan for plan in program["execution_plan"] if plan["name"] == _FORWARD]
    if not forward or not len(forward[0]["inputs"]) == len(forward[0]["outputs"]) == 1:
        raise EdgekitError(f"the file has no method '{_FORWARD}' that takes images and answers scores", where=path)
    return program


def _decoded(content: bytes, schema: str, path: Path) -> dict[str, Any]:
    """A flatbuffer, read by the decoder that comes with ExecuTorch, in a process of its own: it may be damaged."""
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise _missing()
    root = Path(next(iter(found.submodule_search_locations)))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "it.bin").write_bytes(content)
        command = [str(root / "data/bin/flatc"), "--json", "--defaults-json", "--strict-json", "--raw-binary"]
        command += ["-o", scratch, str(root / schema), "--", f"{scratch}/it.bin"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_DECODING)
        except subprocess.TimeoutExpired:
            raise EdgekitError(f"not a valid ExecuTorch file (flatc reads for {_DECODING} s)", where=path) from None
        try:
            text = (Path(scratch) / "it.json").read_bytes()
            return json.loads(_INFINITE.sub(rb"\1Infinity", text))
        except (OSError, ValueError):
            raise EdgekitError(f"not a valid ExecuTorch file (flatc ends with {done.returncode})", where=path) from None


def _operators(path: Path, program: dict[str, Any], plan: dict[str, Any]) -> dict[str, collections.Counter[str]]:
    """Operators of the method, delegated or not, by precision."""
    made: dict[str, collections.Counter[str]] = {"int8": collections.Counter(), "float": collections.Counter()}
    for operator in plan["operators"]:
        made["float"][operator["name"]] += 1
    for delegate in plan["delegates"]:
        if delegate["id"] != _DELEGATE:
            made["float"][delegate["id"]] += 1
            continue
        graph = _delegated(path, program, delegate)
        kinds = {}
        for value in graph["xvalues"]:
            union = value["xvalue_union"]
            quantized = value["xvalue_union_type"] == _QUANTIZED
            kinds[(union["tensor_value"] if quantized else union)["id_out"]] = quantized
        for node in graph["xnodes"]:
            name = node["xnode_union_type"].removeprefix("XNN").lstrip("_")
            if name not in _NO_OPERATORS:
                used = [value for key, value in node["xnode_union"].items() if key.endswith("_id")]
                whole = any(kinds.get(value, False) for value in used)
                made["int8" if whole else "float"][name] += 1
    return made


def _delegated(path: Path, program: dict[str, Any], delegate: dict[str, Any]) -> dict[str, Any]:
    """XNNPACK's part of the file, without the weights."""
    try:
        segment = program["segments"][delegate["processed"]["index"]]
        with path.open("rb") as file:
            file.seek(program["begin"] + segment["offset"])
            content = file.read(segment["size"])
        magic, _, begin, length, *_ = _DELEGATE_HEADER.unpack_from(content)
        if magic != b"XH00":
            raise ValueError(magic)
    except (IndexError, KeyError, OverflowError, ValueError, struct.error):
        raise EdgekitError("its part for XNNPACK is damaged", where=path) from None
    return _decoded(content[begin : begin + length], "backends/xnnpack/serialization/schema.fbs", path)


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
