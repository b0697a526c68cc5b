"""TensorRT: `model.engine`, built from an ONNX graph by `tensorrt`, else by `tensorrt_rtx`, run on NVIDIA GPUs.

TensorRT-RTX builds engines on a machine with no GPU; none run there. An engine holds the machine code of a network, for
one release of the library: it has no room for metadata, which stands in artifact.json alone, and opening one runs
code of it. Two builds are never the same bytes. Batches of 1 to BATCH images; `open` cuts larger ones.

int8 is explicit and strongly typed: the engine computes in the types of its graph and in no other. TensorRT takes
no int32 behind a DequantizeLinear (only 8 bits and fewer), so biases are floats, with the values that edgekit rounded
them to; `twin.onnx` beside the engine is the very graph that it was built from.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekit import artifact
from edgekit.classifier import Classifier, Wrapped
from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.formats import onnx
from edgekit.formats.half import halved
from edgekit.models import Network

if TYPE_CHECKING:
    from onnx import ModelProto

FILE = artifact.JUDGED["tensorrt"]
OPENED = (FILE,)
RUNTIME = "TensorRT"
PRECISIONS = ("fp32", "fp16", "int8")
_MODULE = "tensorrt" if find_spec("tensorrt") else "tensorrt_rtx"
PACKAGES = ("torch", "onnx", "onnxscript", _MODULE)
SCHEME = "symmetric"
EXTRA = "tensorrt-rtx"  # which installs, and builds engines, where there is no GPU
BATCH, USUAL = 64, 8  # the largest batch, and the one that kernels are chosen for

_ALIGNED = 256  # bytes: what TensorRT asks of an address
_SIZED = b"vtrt"  # begins the engines of TensorRT-RTX, whose header holds their size and the library's release
_ENGINES = {_SIZED: "TensorRT-RTX", b"ftrt": "TensorRT"}
_loggers: dict[str, Any] = {}


def lacking() -> str | None:
    """What this machine lacks to run an engine."""
    return None if torch.cuda.is_available() else "a GPU that CUDA can use"


def write(network: Network, folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Build the student's engine; fp16: weights and products, float32 image and logits."""
    write_model(onnx.lower(network), folder, metadata, precision)


def write_model(model: "ModelProto", folder: Path, metadata: dict[str, str], precision: str = "fp32") -> None:
    """Build the engine of an ONNX graph.

    Args:
        metadata: of the graph that is kept beside an int8 engine; an engine holds none.
        precision: "fp16" halves the graph; "int8" says that it is a QDQ one.
    Raises:
        EdgekitError: TensorRT does not take the graph; (exit code 4) it is not installed, or builds nothing here.
    """
    trt = package()
    if precision == "int8":
        model = float_biases(model)
    elif precision == "fp16":
        model = halved(model)
    data = _built(trt, model)
    about = _header(data)
    if about["size"] not in (None, len(data)):
        raise EdgekitError(f"{about['by']} has built an engine of another size than it says", where=RUNTIME)
    if precision == "int8":
        onnx.write_model(model, folder, metadata)
        (folder / onnx.FILE).rename(folder / artifact.TWIN)
    (folder / FILE).write_bytes(data)


def float_biases(model: "ModelProto") -> "ModelProto":
    """The QDQ graph with each int32 constant behind a DequantizeLinear as the floats that this makes of it."""
    import numpy
    import onnx as library
    from onnx import numpy_helper

    made = library.ModelProto()
    made.CopyFrom(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    kept, floats = [], []
    for node in made.graph.node:
        integers = arrays.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if integers is None or integers.dtype != numpy.int32:
            kept.append(node)
        else:
            value = integers.astype(numpy.float32) * arrays[node.input[1]]
            floats.append(numpy_helper.from_array(value.astype(numpy.float32), node.output[0]))
    nodes = [library.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in (*made.graph.initializer, *floats) if tensor.name in read]
    constants = [library.TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del made.graph.initializer[:]
    made.graph.initializer.extend(constants)
    return made


def _built(trt: Any, model: "ModelProto") -> bytes:
    log = _logger(trt)
    log.forget()
    try:
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    except (TypeError, RuntimeError):  # what the bindings make of a null pointer
        raise EdgekitError(
            f"{_MODULE} builds no engine on this machine ({log.said()})", where=RUNTIME, exit_code=ENVIRONMENT
        ) from None
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        raise EdgekitError(f"{RUNTIME} does not take this graph ({log.said()})")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default: float products of 10 bits
    image = network.get_input(0)
    size = tuple(image.shape)[1:]
    profile.set_shape(image.name, (1, *size), (USUAL, *size), (BATCH, *size))
    config.add_optimization_profile(profile)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise EdgekitError(f"{RUNTIME} builds no engine of this graph ({log.said()})")
    return bytes(made)


def open(path: Path, *, threads: int | None = None) -> Classifier:
    """The engine on this machine's GPU, in this process; code of the file may run.

    Args:
        threads: not used; a GPU has its own.
    Returns:
        Classifier: (N, C, H, W) float32 in [0, 1] on any device -> (N, K) float32 logits there; no gradients.
    Raises:
        EdgekitError: it is no engine, or one of another release or GPU; (exit code 4) there is no GPU, or no TensorRT.
    """
    data = _read(path)
    if (missing := lacking()) is not None:
        raise EdgekitError(f"a TensorRT engine needs {missing}", where=path, exit_code=ENVIRONMENT)
    trt = package()
    log = _logger(trt)
    log.forget()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EdgekitError(f"TensorRT does not take the file ({log.said()})", where=path)
    return classifier(trt, engine, torch.device("cuda"), path)


def classifier(trt: Any, engine: Any, device: torch.device, path: Path) -> Classifier:
    """An engine that is loaded, as `open` gives it; its memory lies in torch's tensors on `device`.

    Raises:
        EdgekitError: it is not a classifier of float32 images, or has no memory left for its own work.
    """
    image, logits = _ports(trt, engine, path)
    least, _, most = (tuple(shape) for shape in engine.get_tensor_profile_shape(image, 0))
    classes = tuple(engine.get_tensor_shape(logits))[-1]
    context = engine.create_execution_context()
    if context is None:
        raise EdgekitError("TensorRT has no memory for it", where=path, exit_code=ENVIRONMENT)
    # A stream of its own: on CUDA's default one TensorRT waits more often than it must.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def infer(pixels: Tensor) -> Tensor:
        if pixels.data_ptr() % _ALIGNED:
            pixels = pixels.clone()  # torch's own memory begins at an even larger multiple
        answer = torch.empty(len(pixels), classes, device=device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # which may still be making the images
        taken = [
            context.set_input_shape(image, tuple(pixels.shape)),
            context.set_tensor_address(image, pixels.data_ptr()),
            context.set_tensor_address(logits, answer.data_ptr()),
        ]
        if not all(taken) or not context.execute_async_v3(0 if stream is None else stream.cuda_stream):
            raise EdgekitError("TensorRT does not compute these images", where=path)
        if stream is not None:
            stream.synchronize()
        return answer

    def run(images: Tensor) -> Tensor:
        pixels = images.detach().to(device, torch.float32).contiguous()
        if tuple(pixels.shape[1:]) != most[1:]:
            raise EdgekitError(f"takes images of the shape {list(most[1:])}, not {list(pixels.shape[1:])}", where=path)
        answers = [infer(part) for part in pixels.split(most[0]) if len(part)]
        return torch.cat(answers or [torch.empty(0, classes, device=device)]).to(images.device)

    if least[0] != 1 or least[1:] != most[1:]:
        raise EdgekitError(f"takes batches from {list(least)} to {list(most)}, not single images too", where=path)
    return Wrapped(run, differentiable=False)


def _ports(trt: Any, engine: Any, path: Path) -> tuple[str, str]:
    """The names of the one input and the one output.

    Raises:
        EdgekitError: there are others, or they are not float32.
    """
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    ins = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outs = [name for name in names if name not in ins]
    if len(ins) != 1 or len(outs) != 1:
        raise EdgekitError(f"has {len(ins)} inputs and {len(outs)} outputs: no classifier of images", where=path)
    for name in (*ins, *outs):
        if engine.get_tensor_dtype(name) != trt.float32:
            raise EdgekitError(f"its '{name}' is not float32", where=path)
    if len(tuple(engine.get_tensor_shape(ins[0]))) != 4 or len(tuple(engine.get_tensor_shape(outs[0]))) != 2:
        raise EdgekitError("does not make (N, K) scores of (N, C, H, W) images", where=path)
    return ins[0], outs[0]


def describe(path: Path) -> dict[str, Any]:
    """What can be read of an engine without a GPU: its header, and the graph that lies beside an int8 one.

    Raises:
        EdgekitError: it is no engine.
    """
    data = _read(path)
    about, graph = _header(data), path.with_name(artifact.TWIN)
    beside = onnx.describe(graph) if graph.is_file() else {}
    return {
        "format": "tensorrt",
        "bytes": len(data),
        "built by": f"{about['by']} {about['release']}".strip(),
        "operators": beside.get("operators", {}),
        "input": beside.get("input"),
        "metadata": {},
        "note": "an engine holds no metadata: artifact.json does"
        + (f"; operators and input are those of {graph.name}, which it was built from" if beside else ""),
    }


def running(path: Path) -> dict[str, Any]:
    """The operators of the graph beside an int8 engine: it is strongly typed, so that these are the types it computes
    in. TensorRT fuses all of them into a few kernels, and says no more of those.

    Returns:
        {"int8": number of operators on integers, "float": {operator: number of those on floats}}; both empty where no
        graph stands beside the engine, as of a float one: it does not say itself.
    """
    if not path.with_name(artifact.TWIN).is_file():
        return {"int8": 0, "float": {}}
    operators = onnx.describe(path.with_name(artifact.TWIN))["operators"]
    return {"int8": sum(operators.get("int8", {}).values()), "float": operators.get("float", {})}


def package() -> Any:
    """`tensorrt`, else `tensorrt_rtx`.

    Raises:
        EdgekitError: (exit code 4) neither is installed.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        raise EdgekitError(
            "neither the package tensorrt nor tensorrt_rtx is installed",
            where=RUNTIME,
            mend="Run: pip install 'edgekit[tensorrt-rtx]', which needs no GPU, or 'edgekit[tensorrt]'",
            exit_code=ENVIRONMENT,
        ) from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    data = path.read_bytes()
    about = _header(data)
    if about["by"] is None:
        raise EdgekitError("not a TensorRT engine", where=path)
    if about["size"] not in (None, len(data)):
        raise EdgekitError(f"the engine has {len(data):,} bytes and says {about['size']:,}", where=path)
    return data


def _header(data: bytes) -> dict[str, Any]:
    """{"by": the library that built it, None where it is no engine, "release", "size": None where it is not known}.

    The header is documented nowhere: this is what the engines of TensorRT-RTX 1.7 begin with.
    """
    by = _ENGINES.get(data[:4])
    if data[:4] != _SIZED or len(data) < 28:
        return {"by": by if len(data) >= 28 else None, "release": "", "size": None}
    return {"by": by, "release": ".".join(map(str, data[24:28])), "size": int.from_bytes(data[16:24], "little")}


def _logger(trt: Any) -> Any:
    """TensorRT takes the first logger of a process for all that follow: there is one, and it prints nothing."""
    if _MODULE not in _loggers:

        class Log(trt.ILogger):
            """Keeps what went wrong since it was told to forget."""

            def __init__(self) -> None:
                super().__init__()
                self.lines: list[str] = []

            def forget(self) -> None:
                self.lines.clear()

            def log(self, severity: Any, message: str) -> None:
                # Without a driver for CUDA each complaint has a second one beside it, of that.
                if severity <= trt.ILogger.ERROR and "catchCudaError" not in message:
                    self.lines.append(message)

            def said(self) -> str:
                """The first complaint, in one line."""
                return " ".join((self.lines or ["it does not say why"])[0].split())[:200]

        _loggers[_MODULE] = Log()
    return _loggers[_MODULE]
