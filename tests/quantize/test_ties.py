"""Sums that every processor rounds alike, against ONNX Runtime's own addition of all 65,536 pairs."""

import numpy
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgekit.quantize.ties import agree, settle

# Of an exported file: ten of 15,360 sums fell otherwise on ARM.
A, B = (numpy.float32(0.0263), 122), (numpy.float32(0.0381), 131)


def differing() -> tuple[numpy.float32, int]:
    """A grid on which the kernels' orders of operations do not agree."""
    return next(grid for turn in range(200) if not agree(A, B, grid := (numpy.float32(0.04 + turn * 1e-5), 128)))


def test_the_scale_grows_by_little_until_no_order_of_operations_matters():
    before = differing()
    after = settle(A, B, before)
    assert agree(A, B, after)
    assert before[0] < after[0] <= before[0] * 1.05
    assert after[1] == before[1]
    assert settle(A, B, after) == after
    # In exact arithmetic the sums that remain are further from the middle than float32 errs.
    a, b = numpy.meshgrid(numpy.arange(256.0), numpy.arange(256.0))
    exact = ((a - A[1]) * float(A[0]) + (b - B[1]) * float(B[0])) / float(after[0]) + after[1]
    inside = exact[(exact > 0) & (exact < 255)]
    assert numpy.abs(inside % 1 - 0.5).min() > 1e-7


def added(grid: tuple[numpy.float32, int]):
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
    a, b = (values.ravel().astype("uint8") for values in numpy.meshgrid(numpy.arange(256), numpy.arange(256)))
    grid = settle(A, B, differing())
    session = onnxruntime.InferenceSession(added(grid).SerializeToString(), providers=["CPUExecutionProvider"])
    exact = ((a - float(A[1])) * float(A[0]) + (b - float(B[1])) * float(B[0])) / float(grid[0]) + grid[1]
    assert numpy.array_equal(session.run(None, {"a": a, "b": b})[0], numpy.rint(exact).clip(0, 255))
