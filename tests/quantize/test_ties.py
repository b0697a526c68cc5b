"""Sums that every processor rounds alike, against ONNX Runtime's own addition of all 65,536 pairs."""

import os
import subprocess

import numpy
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from saturating import emulated

from edgekit import processors
from edgekit.quantize import ties
from edgekit.quantize.ties import MARGIN, distance, settle

# Of an exported file: two sums fell otherwise on ARM, one by its rounding of halves, in every order of operations.
A, B, SUM = (numpy.float32(0.02519476), 129), (numpy.float32(0.014875027), 126), (numpy.float32(0.029129982), 127)
LEFT, RIGHT = (values.ravel() for values in numpy.meshgrid(numpy.arange(256.0), numpy.arange(256.0)))


def exact(grid) -> numpy.ndarray:
    by_a, by_b = (float(scale) / float(grid[0]) for scale in (A[0], B[0]))
    return (LEFT - A[1]) * by_a + (RIGHT - B[1]) * by_b + grid[1]


def test_the_distance_is_that_of_the_sum_nearest_to_a_middle():
    inside = exact(SUM)[(exact(SUM) > 0.1) & (exact(SUM) < 254.9)]
    nearest = numpy.abs(inside - numpy.floor(inside) - 0.5).min()
    assert abs(distance(A, B, SUM) - nearest) < 1e-5  # the kernels' ratios are float32
    half = (numpy.float32(0.5), 0)
    assert distance(half, half, (numpy.float32(1), 0)) == 0  # every second sum is a half


def test_the_scale_grows_by_little_until_no_sum_is_near_a_middle():
    assert distance(A, B, SUM) < 1e-5
    after = settle(A, B, SUM)
    assert distance(A, B, after) >= MARGIN
    assert SUM[0] < after[0] <= SUM[0] * 1.0625
    assert after[1] == SUM[1]
    assert settle(A, B, after) == after
    # No smaller step would have done.
    tried = numpy.float32(SUM[0] * (1 + numpy.arange(4096) / 65536))
    assert all(distance(A, B, (scale, SUM[1])) < MARGIN for scale in tried[tried < after[0]])


def test_a_grid_that_no_scale_settles_stays_as_it_is(monkeypatch):
    needed = round((float(settle(A, B, SUM)[0]) / float(SUM[0]) - 1) / ties.STEP)
    assert needed > 1
    monkeypatch.setattr(ties, "TRIES", needed)  # the last of them is one step short
    assert settle(A, B, SUM) == SUM


def added(grid):
    constants = {"sa": A[0], "sb": B[0], "sc": grid[0]} | {
        name: numpy.uint8(value) for name, value in {"za": A[1], "zb": B[1], "zc": grid[1]}.items()
    }
    node = helper.make_node("QLinearAdd", ["a", "sa", "za", "b", "sb", "zb", "sc", "zc"], ["c"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, [65536]) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.UINT8, [65536])],
        [numpy_helper.from_array(numpy.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_onnx_runtime_adds_as_the_settled_sums_say():
    grid = settle(A, B, SUM)
    session = onnxruntime.InferenceSession(added(grid).SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"a": LEFT.astype("uint8"), "b": RIGHT.astype("uint8")}
    assert numpy.array_equal(session.run(None, given)[0], numpy.rint(exact(grid)).clip(0, 255))


_THERE = """
import sys, numpy, onnxruntime
given = numpy.load(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"a": given[0], "b": given[1]})[0])
"""


def test_arm_adds_alike_once_the_sums_are_settled_and_otherwise_before(tmp_path, monkeypatch):
    emulated(monkeypatch, "arm64")
    python, search = processors.interpreter("arm64")
    given = numpy.stack([LEFT, RIGHT]).astype("uint8")
    numpy.save(tmp_path / "given.npy", given)
    differing = []
    for grid in (SUM, settle(A, B, SUM)):
        (tmp_path / "add.onnx").write_bytes(added(grid).SerializeToString())
        files = [str(tmp_path / name) for name in ("given.npy", "add.onnx", "sums.npy")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(search or [])}
        subprocess.run([*python, "-P", "-c", _THERE, *files], env=environment, check=True)
        native = onnxruntime.InferenceSession(tmp_path / "add.onnx", providers=["CPUExecutionProvider"])
        here = numpy.asarray(native.run(None, {"a": given[0], "b": given[1]})[0])
        differing.append(int((numpy.load(tmp_path / "sums.npy") != here).sum()))
    assert differing[0] > 0
    assert differing[1] == 0


def test_a_signed_grid_is_the_unsigned_one_moved():
    moved = [(grid[0], numpy.int8(grid[1] - 128)) for grid in (A, B, SUM)]
    assert distance(moved[0], moved[1], moved[2]) == distance(A, B, SUM)
    assert settle(moved[0], moved[1], moved[2]) == (settle(A, B, SUM)[0], moved[2][1])
