"""ONNX Runtime as edgekit opens it: other batches, other floats and other outputs than it asks for itself."""

from pathlib import Path

import numpy
import pytest
from graphs import convolutional, save
from onnx import TensorProto
from onnx.helper import make_node

from edgekit.errors import EdgekitError
from edgekit.ort import Session

PIXELS = numpy.random.default_rng(1).random((7, 3, 8, 8), "float32")


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_a_file_that_takes_one_number_of_images_answers_any(tmp_path: Path, batch: int):
    free = Session(convolutional(tmp_path / "free.onnx"), threads=1)
    fixed = Session(convolutional(tmp_path / "fixed.onnx", batch=batch), threads=1)
    for count in (7, 3, 1):
        assert numpy.allclose(fixed(PIXELS[:count]), free(PIXELS[:count]), rtol=1e-5, atol=1e-4)
        assert fixed(PIXELS[:count]).shape == (count, 10)
    assert len(fixed(PIXELS[:0])) == 0


def test_half_and_double_precision_files_are_asked_and_answer_in_floats(tmp_path: Path):
    for type, kind in ((TensorProto.FLOAT16, "float16"), (TensorProto.DOUBLE, "float64")):
        nodes = [make_node("Flatten", ["x"], ["f"]), make_node("Mul", ["f", "two"], ["y"])]
        save(tmp_path / "m.onnx", nodes, type=type, two=numpy.array(2, kind))
        answered = Session(tmp_path / "m.onnx")(PIXELS)
        assert answered.dtype == numpy.float32
        assert numpy.array_equal(answered, 2 * PIXELS.reshape(7, -1).astype(kind).astype("float32"))


def test_the_output_that_is_named_holds_the_scores(tmp_path: Path):
    nodes = [make_node("Flatten", ["x"], ["first"]), make_node("Neg", ["first"], ["second"])]
    path = save(tmp_path / "m.onnx", nodes, outputs=("first", "second"))
    assert numpy.array_equal(Session(path)(PIXELS), PIXELS.reshape(7, -1))
    assert numpy.array_equal(Session(path, output="second")(PIXELS), -PIXELS.reshape(7, -1))
    with pytest.raises(EdgekitError, match=r"m\.onnx: there is no output 'secnd'\. Did you mean 'second'\?"):
        Session(path, output="secnd")


def test_scores_with_axes_of_one_are_scores(tmp_path: Path):
    path = save(tmp_path / "m.onnx", [make_node("GlobalAveragePool", ["x"], ["y"])])
    assert numpy.allclose(Session(path)(PIXELS), PIXELS.mean((2, 3)), atol=1e-6)


def test_what_is_no_classifier_of_images_is_one_sentence(tmp_path: Path):
    path = save(tmp_path / "m.onnx", [make_node("ReduceMean", ["x"], ["y"], keepdims=0)])
    with pytest.raises(EdgekitError, match=r"answers scores of shape \(\) to 7 images"):
        Session(path)(PIXELS)
    path = save(tmp_path / "m.onnx", [make_node("Flatten", ["x"], ["y"])], type=TensorProto.INT64)
    with pytest.raises(EdgekitError, match=r"m\.onnx: its input 'x' takes tensor\(int64\), not floats"):
        Session(path)
    with pytest.raises(EdgekitError, match=r"cannot be read \(No such file or directory\)"):
        Session(tmp_path / "none.onnx")
