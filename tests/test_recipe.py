from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import shipped
from edgekit.errors import EdgekitError
from edgekit.recipe import read, to_toml

MINIMAL = '[student]\narchitecture = "resnet18"\n\n[data]\nname = "digits"\n\n[method]\nname = "sat"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "[inner]\nepsilom = 0.1\n", "line 10: [inner] has no key 'epsilom'. Did you mean 'epsilon'?"),
        (MINIMAL + "[iner]\nepsilon = 0.1\n", "line 9: the recipe has no key 'iner'. Did you mean 'inner'?"),
        (
            MINIMAL + "[inner]\nepsilon = 1.5\n",
            "line 10: [inner]: 'epsilon' should be less than or equal to 1, not 1.5",
        ),
        (MINIMAL + '[inner]\nepsilon = "8/0"\n', "line 10: [inner]: 'epsilon' should be a number or a fraction"),
        (MINIMAL + '[train]\nepochs = "many"\n', "line 10: [train]: 'epochs' should be a valid integer"),
        (MINIMAL + '[train]\nepochs = "5"\n', "line 10: [train]: 'epochs' should be a valid integer, not '5'"),
        (MINIMAL + "[train]\nepochs = 1.5\n", "line 10: [train]: 'epochs' should be a valid integer, not 1.5"),
        (MINIMAL + "[train]\nepochs = 5.0\n", "line 10: [train]: 'epochs' should be a valid integer, not 5.0"),
        (MINIMAL + "[train]\nlearning_rate = true\n", "line 10: [train]: 'learning_rate' should be a valid number"),
        (MINIMAL + "[inner]\nepsilon = true\n", "line 10: [inner]: 'epsilon' should be a valid number, not True"),
        (MINIMAL + '[inner]\nepsilon = "0.1"\n', "line 10: [inner]: 'epsilon' should be a number or a fraction"),
        (MINIMAL + "[train]\nchannels_last = 1\n", "line 10: [train]: 'channels_last' should be a valid boolean"),
        (MINIMAL + "[train]\nmilestones = [0.5, true]\n", "line 10: [train]: 'milestones' should be a valid number"),
        ("seed = true\n" + MINIMAL, "line 1: the recipe: 'seed' should be a valid integer, not True"),
        (MINIMAL + '[teacher]\nweights = "a"\nrecipe = "b"\n', "exactly one of the keys 'recipe' and 'weights'"),
        (MINIMAL.replace('name = "sat"', ""), "line 7: [method] needs the key 'name'"),
        ("", "the recipe needs the key 'student'"),
        ("[student", "not valid TOML"),
    ],
)
def test_a_fault_is_one_sentence_with_its_place(tmp_path: Path, text: str, expected: str):
    with pytest.raises(EdgekitError) as caught:
        read(write(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_and_seed_win_and_their_faults_name_the_option(tmp_path: Path):
    path = write(tmp_path, MINIMAL)
    recipe = read(path, ["train.epochs=5", "inner.epsilon=4/255", "data.name=photos"], seed=7)
    assert (recipe.train.epochs, recipe.inner.epsilon, recipe.data.name, recipe.seed) == (5, 4 / 255, "photos", 7)
    with pytest.raises(EdgekitError, match=r"--set train\.epoch=5: \[train\] has no key 'epoch'"):
        read(path, ["train.epoch=5"])
    with pytest.raises(EdgekitError, match=r"--set train\.epochs: should look like"):
        read(path, ["train.epochs"])


def test_a_string_is_short_for_a_table(tmp_path: Path):
    short = read(write(tmp_path, 'student = "resnet18"\ndata = "digits"\nmethod = "rslad"\nteacher = "t.toml"\n'))
    assert short.student.architecture == "resnet18"
    assert short.teacher is not None
    assert (short.teacher.recipe, short.teacher.weights) == ("t.toml", None)


@given(epsilon=st.floats(1e-6, 1), name=st.text(max_size=20), epochs=st.integers(1, 10**6))
def test_a_resolved_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, epsilon: float, name: str, epochs: int
):
    folder = tmp_path_factory.mktemp("recipe")
    recipe = read(write(folder, MINIMAL))
    inner = recipe.inner.model_copy(update={"epsilon": epsilon})
    recipe = recipe.model_copy(
        update={
            "inner": inner,
            "data": recipe.data.model_copy(update={"name": name}),
            "train": recipe.train.model_copy(update={"epochs": epochs}),
        }
    )
    again = folder / "again.toml"
    again.write_text(to_toml(recipe), encoding="utf-8")
    assert read(again) == recipe


@pytest.mark.parametrize("name", shipped.names("recipes"))
def test_every_shipped_recipe_is_valid_and_takes_a_shorter_run(name: str):
    assert read(name, ["train.epochs=2"]).train.epochs == 2


def test_shipped_recipes_are_there_and_show_every_default():
    names = shipped.names("recipes")
    assert "recipes/mobilenet.toml" in names
    import tomllib

    document = tomllib.loads(shipped.find("recipes/mobilenet.toml", "recipes").read_text())
    for table in ("inner", "train", "evaluate"):
        optional = {"milestones", "gamma"}  # of the multi-step schedule, which the CIFAR recipe shows
        assert set(type(getattr(read("recipes/mobilenet.toml"), table)).model_fields) - optional <= set(document[table])
