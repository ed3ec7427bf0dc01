"""Selection by an attention row: nodes in ONNX Runtime against NumPy, and the order rule."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, checker, helper

from tokprune.plugins.last_row import last_row_topk, last_row_topk_nodes
from tokprune.plugins.nodes import OPSET


def session(k: int, n: int) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        last_row_topk_nodes("row", "visual", ("kept", "scores"), k),
        "select",
        [
            helper.make_tensor_value_info("row", TensorProto.FLOAT, ("batch", "sequence")),
            helper.make_tensor_value_info("visual", TensorProto.INT64, ("images", n)),
        ],
        [
            helper.make_tensor_value_info("kept", TensorProto.INT64, ("images", k)),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("images", n)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize(
    ("shape", "starts", "n", "k"),
    [
        ((1, 9), [2], 5, 3),
        ((1, 9), [0], 9, 1),
        ((1, 31), [3, 17], 7, 7),
        ((3, 13), [1, 15, 28], 11, 4),
        ((1, 700), [35], 576, 64),
    ],
)
def test_nodes_equal_the_reference(shape: tuple[int, int], starts: list[int], n: int, k: int):
    row = np.random.default_rng(n).dirichlet(np.ones(shape[1]), shape[0]).astype(np.float32)
    visual = np.array([range(start, start + n) for start in starts], dtype=np.int64)
    kept, scores = session(k, n).run(None, {"row": row, "visual": visual})
    for image, rows in enumerate(visual):
        expected_kept, expected_scores = last_row_topk(row.reshape(-1), rows, k)
        np.testing.assert_array_equal(scores[image], expected_scores)  # gathered, not computed
        np.testing.assert_array_equal(kept[image], expected_kept)


def test_best_first_ties_to_the_lower_index_result_ascending():
    row = np.array([[9, 0.1, 0.3, 0.2, 0.3, 0.3, 9]], dtype=np.float32)  # the text around has more
    visual = np.arange(1, 6)[None]
    assert last_row_topk(row[0], visual[0], 2)[0].tolist() == [1, 3]
    assert session(2, 5).run(["kept"], {"row": row, "visual": visual})[0].tolist() == [[1, 3]]
    assert session(4, 5).run(["kept"], {"row": row, "visual": visual})[0].tolist() == [[1, 2, 3, 4]]


def test_rows_of_flattened_batch_are_those_of_their_sequence():
    """The second sequence's row scores the second sequence's image."""
    row = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32)
    kept, scores = session(1, 3).run(None, {"row": row, "visual": np.array([[0, 1, 2], [5, 6, 7]])})
    assert kept.tolist() == [[0], [2]]
    np.testing.assert_array_equal(scores, [row[0, :3], row[1, 1:]])
