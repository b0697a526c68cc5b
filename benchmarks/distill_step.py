"""images/s of edgekit's RSLAD training step against plain loops, MobileNetV2 at full width on one thread.

Three loops take the same step on the same images, teacher logits and SGD: edgekit's, as edgekit/train.py runs it; a
plain one whose ten inner passes call loss.backward(); and one that asks autograd for the image's gradient alone, as the
authors' published rslad_loss.py does. Both plain loops keep NCHW and leave denormals alone. Data loading is in none.

    python benchmarks/distill_step.py [--device cuda --batch-size 128] [--quick] [--json]
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as functional
import typer
from accelerate import Accelerator
from common import Row, about_machine, document, publish, start
from torch import Tensor

from edgekit import machine, models
from edgekit.classifier import Wrapped
from edgekit.console import say
from edgekit.errors import EdgekitError
from edgekit.methods.inner import Inner
from edgekit.methods.rslad import rslad
from edgekit.models import Network
from edgekit.randomness import derive, normal, uniform
from edgekit.recipe import Student

GOAL = 1.8  # against the loop with loss.backward(), on one thread at batch 32
# The first losses may differ by this share. Other memory layouts and a folded normalization round otherwise, and where
# a gradient is next to 0 its sign, and so a pixel, goes with it: 2e-3 was measured on an untrained network.
SAME = 5e-3
EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
QUICK_SECONDS = 80  # no new round is begun after these

Step = Callable[[Tensor, Tensor, Tensor], float]  # images, teacher's logits, seeds -> loss


def edgekit_step(student: Network, device: torch.device) -> Step:
    """One step of edgekit/train.py: everything but the data and the progress bar."""
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    student = student.to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(student, _sgd(student))
    inner = Inner(EPSILON, STEP_SIZE, STEPS)

    def step(images: Tensor, logits: Tensor, seeds: Tensor) -> float:
        torch.set_flush_denormal(True)
        images = images.contiguous(memory_format=torch.channels_last)
        teacher = Wrapped(lambda _: logits, differentiable=False)
        labels = logits.argmax(1)
        with accelerator.autocast():
            loss = rslad(model, teacher, images, labels, inner=inner, seeds=seeds).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        return loss.item()

    return step


def plain_step(student: Network, *, all_gradients: bool) -> Step:
    """The same step with no care for speed.

    Args:
        all_gradients: the inner passes call loss.backward(), which computes the parameters' gradients as well.
    """
    optimizer = _sgd(student)

    def step(images: Tensor, logits: Tensor, seeds: Tensor) -> float:
        torch.set_flush_denormal(False)
        target = functional.softmax(logits, dim=1)
        student.eval()
        # Where torch.randn stands in published loops; drawn from the seeds, so that all three start alike.
        x = images.detach() + 0.001 * normal(seeds, images)
        for _ in range(STEPS):
            x.requires_grad_()
            loss = functional.kl_div(functional.log_softmax(student(x), dim=1), target, reduction="none").sum()
            if all_gradients:
                loss.backward()
                gradient = x.grad
            else:
                gradient = torch.autograd.grad(loss, [x])[0]
            if gradient is None:
                raise RuntimeError("the image has no gradient")
            x = x.detach() + STEP_SIZE * torch.sign(gradient.detach())
            x = torch.min(torch.max(x, images - EPSILON), images + EPSILON)
            x = torch.clamp(x, 0.0, 1.0)
        student.train()
        optimizer.zero_grad()
        robust = functional.kl_div(functional.log_softmax(student(x), dim=1), target, reduction="none").mean()
        clean = functional.kl_div(functional.log_softmax(student(images), dim=1), target, reduction="none").mean()
        loss = 5 / 6 * robust + 1 / 6 * clean
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _sgd(student: Network) -> torch.optim.SGD:
    return torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, fewer on a slow machine.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; each takes one step of every loop.")] = 9,
    batch_size: Annotated[int, typer.Option(min=2, help="The goal stands for 32.")] = 32,
    device: Annotated[str, typer.Option(help="The goal stands for the CPU.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """images/s of edgekit's RSLAD step against plain loops."""
    torch.set_num_threads(1)
    place = machine.device(device)
    rounds = min(repetitions, 3) if quick else repetitions
    classes = [str(number) for number in range(10)]
    first = models.build(Student(architecture="mobilenetv2"), classes, (3, 32, 32), [0.5] * 3, [0.25] * 3, seed=0)
    first = first.to(place)
    steps = {
        "ours": edgekit_step(copy.deepcopy(first), place),
        "backward": plain_step(copy.deepcopy(first), all_gradients=True),
        "grad": plain_step(copy.deepcopy(first), all_gradients=False),
    }

    def draw(purpose: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, a teacher's logits and the seeds of the start, the same for every loop."""
        names = torch.arange(count)
        # Away from 0 and 1: edgekit clamps the start as well, the published loop only what follows it.
        images = uniform(derive(0, purpose, 0, samples=names), torch.empty(count, 3, 32, 32), 0.1, 0.9)
        logits = 2 * normal(derive(0, purpose, 1, samples=names), torch.empty(count, 10))
        return images.to(place), logits.to(place), derive(0, purpose, 2, samples=names)

    begin = time.perf_counter()
    # The first step of each, unmeasured, shows that they do the same; kernels are chosen and memory is taken there.
    losses = {name: step(*draw(0, batch_size)) for name, step in steps.items()}
    for name in ("backward", "grad"):
        if abs(losses["ours"] / losses[name] - 1) > SAME:
            raise EdgekitError(f"the loops do not do the same: first losses {losses['ours']} and {losses[name]}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {
        name: [] for name in steps
    }  # of this thread: what a busy neighbour took is not in it
    for count in range(rounds):
        # Interleaved, and in turned order: a busy neighbour and a warm cache are shared fairly.
        names = list(steps)[count % 3 :] + list(steps)[: count % 3]
        batch = draw(count + 1, batch_size)
        for name in names:
            before, before_busy = time.perf_counter(), time.thread_time()
            steps[name](*batch)
            seconds[name].append(time.perf_counter() - before)
            busy[name].append(time.thread_time() - before_busy)
        say(f"round {count + 1} of {rounds}: " + ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in seconds))
        if quick and time.perf_counter() - begin > QUICK_SECONDS:
            break
    cpu = place.type == "cpu"
    decides = cpu and batch_size == 32 and len(seconds["ours"]) >= 3
    where, many = "1 thread" if cpu else str(place), len(seconds["ours"])
    what = f"RSLAD step, MobileNetV2 1.0, batch {batch_size}, {where}, median of {many}"

    def compare(name: str, peer_name: str, times: dict[str, list[float]], clock: str, goal: float | None) -> Row:
        ours, peer = (batch_size / statistics.median(times[side]) for side in ("ours", name))
        return Row(what, ours, peer, peer_name, ours / peer, goal, f"images/{clock}")

    backward = "plain loop, loss.backward() in the inner passes"
    gradient = "plain loop, autograd.grad in the inner passes (the authors' rslad_loss.py)"
    rows = [
        compare("backward", backward, seconds, "s", GOAL if decides else None),
        compare("grad", gradient, seconds, "s", None),
        *([compare("backward", backward, busy, "CPU s", None)] if cpu else []),
        *([compare("grad", gradient, busy, "CPU s", None)] if cpu else []),
        Row(
            f"loss of the first step, which may differ by {SAME:g} of it",
            losses["ours"],
            losses["backward"],
            "plain loop, same start",
            losses["ours"] / losses["backward"],
            None,
            "loss",
        ),
    ]
    publish(
        document(
            "distill_step",
            rows,
            about_machine(threads=1, device=name_of(place)),
            quick=quick,
            seconds=seconds,
            cpu_seconds=busy,
        ),
        as_json=json,
    )


if __name__ == "__main__":
    start(main)
