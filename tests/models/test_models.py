import sys
from pathlib import Path

import pytest
import torch

from edgekit import models
from edgekit.errors import EdgekitError
from edgekit.recipe import Student

CLASSES = [str(i) for i in range(10)]


def build(**spec) -> models.Network:
    return models.build(Student(**spec), CLASSES, (3, 32, 32), [0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize(
    ("spec", "millions"),
    [
        # Without the thousand classes of ImageNet torchvision's MobileNetV2 counts 2.2369 million parameters, its
        # ResNet-18 11.18; WRN-34-10 is reported with 46.16 million (TRADES).
        ({"architecture": "mobilenetv2"}, 2.2367),
        ({"architecture": "mobilenetv2", "form": "imagenet"}, 2.2367),
        ({"architecture": "resnet18"}, 11.1740),
        ({"architecture": "wideresnet", "depth": 34, "width": 10}, 46.1605),
    ],
)
def test_networks_have_the_published_number_of_parameters(spec: dict, millions: float):
    count = sum(parameter.numel() for parameter in build(**spec).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=2e-3)


def test_mobilenetv2_equals_torchvisions_layer_for_layer():
    import torchvision

    theirs = torchvision.models.mobilenet_v2(num_classes=10).eval()
    mine = build(architecture="mobilenetv2", form="imagenet")
    state = dict(zip(mine.body.state_dict(), theirs.state_dict().values(), strict=True))
    mine.body.load_state_dict(state)
    images = torch.rand(2, 3, 64, 64)
    assert mine.eval()(images).allclose(theirs((images - 0.5) / 0.25), atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (build(architecture="mobilenetv2", width=0.25) for _ in range(2))
    assert torch.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_weights_survive_the_file(tmp_path: Path):
    network = build(architecture="mobilenetv2", width=0.25, strides=(1, 2, 2, 1, 1, 2, 1)).eval()
    models.save(network, tmp_path / "s.safetensors")
    again, images = models.load(tmp_path / "s.safetensors"), torch.rand(2, 3, 32, 32)
    assert again(images).equal(network(images))
    assert (again.classes, again.input_shape) == (network.classes, network.input_shape)


def test_your_own_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(classes, channels, hidden):\n"
        "    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, classes)\n"
        "    return nn.Sequential(nn.Conv2d(channels, hidden, 3), *end)\n"
        "def wrong(classes, channels):\n"
        "    return nn.Flatten()\n"
    )
    monkeypatch.chdir(tmp_path)  # found from the working directory, as with the installed command
    before = list(sys.path)
    network = build(architecture="mine:make", options={"hidden": 5})
    models.save(network, tmp_path / "s.safetensors")
    again = models.load(tmp_path / "s.safetensors", factory="mine:make")
    assert again(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sys.path == before
    with pytest.raises(EdgekitError, match=r"mine:wrong.*\(1, 3072\)"):
        build(architecture="mine:wrong")
    with pytest.raises(EdgekitError, match="cannot import"):
        build(architecture="nowhere:make")
    with pytest.raises(EdgekitError, match=r"mine:make.*cannot be built.*hidden"):
        build(architecture="mine:make")


def test_what_a_weights_file_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = build(architecture="mobilenetv2", width=0.25)
    network.spec = Student(architecture="bomb:make")
    models.save(network, tmp_path / "s.safetensors")
    (tmp_path / "bomb.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    monkeypatch.chdir(tmp_path)
    for factory in (None, "mine:make"):
        with pytest.raises(EdgekitError, match=r"s\.safetensors: the file asks to import 'bomb:make'"):
            models.load(tmp_path / "s.safetensors", factory=factory)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"architecture": "mobilenetv3"}, "Did you mean 'mobilenetv2'"),
        ({"architecture": "mobilenetv2", "strides": (1, 2)}, "strides needs 7 numbers"),
        ({"architecture": "wideresnet", "depth": 30}, "should be 6 n"),
        ({"architecture": "wideresnet", "depth": 10, "width": 0.01}, "cannot be built for images of"),
    ],
)
def test_an_impossible_student_is_refused(spec: dict, said: str):
    with pytest.raises(EdgekitError, match=said):
        build(**spec)


def test_a_pickle_is_never_opened(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    torch.save({"student": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(EdgekitError, match="not a valid safetensors file"):
        models.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
