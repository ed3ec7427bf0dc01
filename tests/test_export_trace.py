"""Saving segments: nothing that could not be written may pass for written."""

import resource

import numpy as np
import onnx_ir as ir
import pytest

from tokprune.export.trace import OPSET, save_segment


def segment(weights: np.ndarray) -> ir.Model:
    """y = x + weights, the weights held as a NumPy array, as the tracer's constant folding leaves them."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", weights.size]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(weights, name="w"), shape=ir.Shape([weights.size]))
    w.type = ir.TensorType(ir.DataType.FLOAT)
    node = ir.node("Add", [x, w])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", x.shape, x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": OPSET}, name="sum")
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def weights():
    return np.arange(2348, dtype=np.float32)  # 9392 bytes: two pages, and a third that is not full


def test_weights_are_written(tmp_path, weights):
    facts = save_segment(segment(weights), tmp_path, "sum", None)
    assert [tensor.name for tensor in facts.inputs + facts.outputs] == ["x", "y"]
    assert (tmp_path / "sum.data").read_bytes() == weights.tobytes()


def test_a_graph_can_be_saved_again(tmp_path, weights):
    """Exports may share traced graphs, under other names."""
    shared = segment(weights)
    for folder, name in (("first", "one"), ("second", "two"), ("third", "one")):
        (tmp_path / folder).mkdir()
        save_segment(shared, tmp_path / folder, name, None)
    for file in ("one.onnx", "one.data"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()
    assert (tmp_path / "second" / "two.data").read_bytes() == weights.tobytes()


def test_end_of_weights_has_no_room(tmp_path, weights):
    """The last page alone does not fit, and the graph, which is small, would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_segment(segment(weights), tmp_path, "sum", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
