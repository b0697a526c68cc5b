"""Students and teachers. Every network eats [0, 1] images: its normalization lives inside it."""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgekit import machine
from edgekit.errors import EdgekitError, choose
from edgekit.files import writing
from edgekit.models import mobilenetv2, resnet18, wideresnet
from edgekit.recipe import Student

# Each takes the recipe's [student], the numbers of classes and of channels: an nn.Module (N, C, H, W) -> (N, K).
ARCHITECTURES: dict[str, Callable[[Student, int, int], nn.Module]] = {
    "mobilenetv2": mobilenetv2.build,
    "resnet18": resnet18.build,
    "wideresnet": wideresnet.build,
}


class Network(nn.Module):
    """A differentiable Classifier: images (N, C, H, W) float32 in [0, 1] -> logits (N, K)."""

    differentiable = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        spec: Student,
        classes: Sequence[str],
        input_shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.body, self.spec, self.classes, self.input_shape = body, spec, tuple(classes), tuple(input_shape)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body((images - self.mean) / self.std)


def build(
    spec: Student,
    classes: Sequence[str],
    input_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
) -> Network:
    """A new network with weights drawn from `seed` alone.

    Args:
        classes: names of the K classes.    input_shape: (C, H, W) of one image.
        mean, std: of each channel, in units of the [0, 1] range.
    Raises:
        EdgekitError: unknown architecture, a factory that cannot be imported, or one whose network has another shape.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
            torch.manual_seed(seed)
            if ":" in spec.architecture:
                body = _factory(spec.architecture)(classes=len(classes), channels=input_shape[0], **spec.options)
            else:
                make = choose(ARCHITECTURES, spec.architecture, "student architecture")
                body = make(spec, len(classes), input_shape[0])
        network = Network(body, spec, classes, input_shape, mean, std)
        with torch.no_grad():
            shape = tuple(network.eval()(torch.zeros(1, *input_shape)).shape)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if machine.out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EdgekitError(
            f"the student '{spec.architecture}' cannot be built for images of {tuple(input_shape)} ({reason})",
            mend="Change [student]",
        ) from error
    if shape != (1, len(classes)):
        raise EdgekitError(f"the student '{spec.architecture}' answers {shape} to one image, not (1, {len(classes)})")
    return network.train()


def _factory(name: str) -> Callable[..., nn.Module]:
    module, _, function = name.partition(":")
    # An installed command does not look into the working directory, where a user's own code stands.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, SyntaxError, NameError, TypeError) as error:
        raise EdgekitError(
            f"cannot import the student factory: {error}", where=name, mend="Write package.module:function"
        ) from error
    finally:
        if here in sys.path:  # the first of its kind is the one that was put there
            sys.path.remove(here)


def save(network: Network, path: Path, state: dict[str, Tensor] | None = None, **metadata: str) -> None:
    """Write weights (the network's own, or `state`) and all that `load` needs to rebuild the network."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in (state or network.state_dict()).items()}
    about = {
        "student": network.spec.model_dump(mode="json", exclude_none=True),
        "classes": network.classes,
        "input_shape": network.input_shape,
        **metadata,
    }
    with writing(path) as part:
        # One key: safetensors writes several in an order that changes from process to process, and the digest with it.
        save_file(tensors, part, {"edgekit": json.dumps(about, sort_keys=True)})


def load(path: str | Path, *, factory: str | None = None) -> Network:
    """The network in a safetensors file that edgekit wrote, in eval mode, on the CPU.

    Args:
        factory: the "module:function" that may be imported to build it. It has to come from whoever opens the file (a
            run's own recipe says it): what a file names by itself is never run.
    Raises:
        EdgekitError: the file is missing, is no safetensors file, does not say which network it holds, or names
            another factory than `factory`.
    """
    path = Path(path)
    if not path.is_file():
        raise EdgekitError("there is no such file", where=path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError:
        raise EdgekitError(
            "not a valid safetensors file", where=path, mend="Weights are read from safetensors only"
        ) from None
    try:
        about: dict[str, Any] = json.loads(metadata["edgekit"])
        spec = Student.model_validate(about["student"])
        classes, shape = about["classes"], about["input_shape"]
        if ":" in spec.architecture and spec.architecture != factory:
            raise EdgekitError(
                f"the file asks to import '{spec.architecture}', which is done only where the recipe names it",
                where=path,
                mend="For a teacher that you trust, set teacher.factory",
            )
        network = build(spec, classes, shape, state["mean"].flatten().tolist(), state["std"].flatten().tolist())
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise EdgekitError(
            "does not hold an edgekit student", where=path, mend="It is written by: edgekit distill"
        ) from None
    return network.eval()
