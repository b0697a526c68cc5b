"""Students and teachers. Every network eats [0, 1] images: its normalization lives inside it."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        torch.manual_seed(seed)
        if ":" in spec.architecture:
            body = _factory(spec.architecture)(classes=len(classes), channels=input_shape[0], **spec.options)
        else:
            body = choose(ARCHITECTURES, spec.architecture, "student architecture")(spec, len(classes), input_shape[0])
    network = Network(body, spec, classes, input_shape, mean, std)
    with torch.no_grad():
        shape = tuple(network.eval()(torch.zeros(1, *input_shape)).shape)
    if shape != (1, len(classes)):
        raise EdgekitError(f"the student '{spec.architecture}' answers {shape} to one image, not (1, {len(classes)})")
    return network.train()


def _factory(name: str) -> Callable[..., nn.Module]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise EdgekitError(
            f"cannot import the student factory: {error}", where=name, mend="Write package.module:function"
        ) from None


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


def load(path: str | Path) -> Network:
    """The network in a safetensors file that edgekit wrote, in eval mode, on the CPU.

    Raises:
        EdgekitError: the file is missing, is no safetensors file, or does not say which network it holds.
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
        network = build(spec, classes, shape, state["mean"].flatten().tolist(), state["std"].flatten().tolist())
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise EdgekitError(
            "does not hold an edgekit student", where=path, mend="It is written by: edgekit distill"
        ) from None
    return network.eval()
