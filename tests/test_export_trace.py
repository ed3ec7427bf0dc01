"""Saving segments: where their weights go, and that nothing that could not be written passes for written."""

import resource
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import save_file

from tokprune.export.store import CONVERTED, Source, Store
from tokprune.export.trace import OPSET, WEIGHT, save_segment
from tokprune.export.weights import Weights


def segment(size: int) -> ir.Model:
    """y = x + weights, the weights as the tracer leaves them: a name in the checkpoint, and no bytes."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", size]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.FLOAT))
    w.meta[WEIGHT] = Source("w")
    node = ir.node("Add", [x, w])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", x.shape, x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": OPSET}, name="sum")
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def weights():
    return np.arange(2348, dtype=np.float32)  # 9392 bytes: two pages, and a third that is not full


def store(directory: Path, weights: np.ndarray) -> Store:
    """A bundle in FP32 to be, of a checkpoint with these weights."""
    shard = directory.parent / f"{directory.name}.safetensors"
    save_file({"w": weights}, shard)
    directory.mkdir()
    return Store(directory, Weights(shard.parent, [shard]), "fp32")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_are_written(tmp_path, weights, dtype):
    weights = weights.astype(dtype)  # which rounds some of those beyond 2048 in FP16
    facts = save_segment(segment(weights.size), store(tmp_path / "out", weights), "sum", None)
    assert [tensor.name for tensor in facts.inputs + facts.outputs] == ["x", "y"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "sum.onnx",
        "out.safetensors" if dtype == np.float32 else CONVERTED,
    }
    ones = np.ones((1, weights.size), dtype=np.float32)
    (sums,) = onnxruntime.InferenceSession(tmp_path / "out" / "sum.onnx").run(None, {"x": ones})
    np.testing.assert_array_equal(sums[0], weights.astype(np.float32) + 1)


def test_a_graph_can_be_saved_again(tmp_path, weights):
    """Exports may share traced graphs, under other names and with other weights."""
    shared = segment(weights.size)
    for folder, name, factor in (("first", "one", 1), ("second", "two", 2), ("third", "one", 1)):
        directory = tmp_path / folder / "out"
        directory.parent.mkdir()
        save_segment(shared, store(directory, weights * factor), name, None)
        ones = np.ones((1, weights.size), dtype=np.float32)
        (sums,) = onnxruntime.InferenceSession(directory / f"{name}.onnx").run(None, {"x": ones})
        np.testing.assert_array_equal(sums[0], weights * factor + 1)
    first, third = (tmp_path / folder / "out" / "one.onnx" for folder in ("first", "third"))
    assert first.read_bytes() == third.read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_end_of_weights_has_no_room(tmp_path, weights, dtype):
    """The last page alone does not fit, and the graph, which is small, would; converted or copied."""
    target = store(tmp_path / "out", weights.astype(dtype))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_segment(segment(weights.size), target, "sum", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
