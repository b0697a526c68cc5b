"""Run in .venv-peers: attacks of other libraries, one request after the other, over stdin and stdout.

A request is a line of JSON: attack, images (an .npz of images and labels), epsilon, seed, steps, device, and where the
adversarial images go. The answer, {"seconds"}, counts the attack alone: no start of a process, no files.
"""

import json
import sys
import time
from collections.abc import Callable

import foolbox  # pyright: ignore
import numpy
import torch
import torchattacks  # pyright: ignore
from torch import Tensor, nn

from edgekit import models

CHUNK = 250  # samples attacked together on a CPU, as edgekit's campaign does

Found = Callable[[Tensor, Tensor], Tensor]  # images, labels -> adversarial images


def torchattacks_pgd(model: nn.Module, epsilon: float, steps: int, seed: int) -> Found:
    return torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=steps, random_start=True)


def foolbox_pgd(model: nn.Module, epsilon: float, steps: int, seed: int) -> Found:
    attack = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 4, steps=steps, random_start=True)
    asked = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    return lambda images, labels: attack(asked, images, labels, epsilons=epsilon)[1]


def torchattacks_autoattack(model: nn.Module, epsilon: float, steps: int, seed: int) -> Found:
    """torchattacks.AutoAttack's four members, with `steps` where its wrapper leaves 10 and the authors say 100."""
    given = {"eps": epsilon, "norm": "Linf", "seed": seed, "n_restarts": 1}
    members = [
        torchattacks.APGD(model, **given, loss="ce", steps=steps),
        torchattacks.APGDT(model, **given, n_classes=10, steps=steps),
        torchattacks.FAB(model, **given, multi_targeted=True, n_classes=10, steps=steps),
        torchattacks.Square(model, **given, n_queries=5000),
    ]
    return torchattacks.MultiAttack(members)


RIVALS = {
    "torchattacks-pgd": torchattacks_pgd,
    "foolbox-pgd": foolbox_pgd,
    "torchattacks-autoattack": torchattacks_autoattack,
}


def answer(student: str, request: dict) -> dict[str, float]:
    torch.manual_seed(request["seed"])
    with numpy.load(request["images"]) as archive:
        images, labels = (torch.from_numpy(archive[name]).to(request["device"]) for name in ("images", "labels"))
    model = models.load(student).requires_grad_(False).to(request["device"])
    attack = RIVALS[request["attack"]](model, request["epsilon"], request["steps"], request["seed"])
    begin = time.perf_counter()
    size = CHUNK if request["device"] == "cpu" else len(images)  # a GPU takes them all at once
    chunks = [attack(x, y) for x, y in zip(images.split(size), labels.split(size), strict=True)]
    adversarial = torch.cat(chunks).detach().cpu()  # waits for a GPU
    seconds = time.perf_counter() - begin
    numpy.savez(request["adversarial"], adversarial=adversarial.numpy())
    return {"seconds": seconds}


if __name__ == "__main__":
    student, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        print(json.dumps(answer(student, json.loads(line))), file=answers, flush=True)
