"""Control selectors: exact positions, distinctness for every k, and the graph's outputs for several images."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tokprune.plugins import grid


def test_uniform_is_the_exact_grid_where_one_fits():
    kept = grid.uniform_indices((24, 24), 576, 64)
    centres = np.arange(1, 24, 3)  # (i + ½) · 24 / 8 = 1.5, 4.5, …
    np.testing.assert_array_equal(kept, (centres[:, None] * 24 + centres).ravel())


@pytest.mark.parametrize("shape", [(24, 24), (1, 17), (17, 1), (5, 7), (7, 5), (3, 40), (40, 3)])
def test_uniform_is_distinct_ascending_and_inside_for_every_k(shape):
    n = shape[0] * shape[1]
    for layout in (shape, None):
        for k in range(1, n + 1):
            kept = grid.uniform_indices(layout, n, k)
            assert kept.dtype == np.int64
            assert kept.shape == (k,)
            assert np.all(np.diff(kept) > 0)
            assert kept[0] >= 0
            assert kept[-1] < n


def test_uniform_leaves_no_hole():
    """No patch lies further from a kept one than two cells of the ideal spacing."""
    for k in (16, 50, 64, 100, 128, 192, 300):
        rows, columns = np.divmod(grid.uniform_indices((24, 24), 576, k), 24)
        patches = np.indices((24, 24)).reshape(2, -1)
        distance = np.maximum(abs(patches[0][:, None] - rows), abs(patches[1][:, None] - columns)).min(axis=1)
        assert distance.max() <= np.ceil(24 / np.sqrt(k)), k


def test_random_is_one_fixed_draw_per_seed():
    kept, draws = grid.random_indices(576, 64, seed=3)
    again, _ = grid.random_indices(576, 64, seed=3)
    other, _ = grid.random_indices(576, 64, seed=4)
    np.testing.assert_array_equal(kept, again)
    assert not np.array_equal(kept, other)
    assert np.all(np.diff(kept) > 0)
    assert draws[kept].min() >= np.delete(draws, kept).max()
    # Pinned: a bundle must not change with NumPy's version.
    np.testing.assert_array_equal(grid.random_indices(20, 5, seed=0)[0], [2, 6, 9, 13, 16])


@pytest.mark.parametrize(("n", "k"), [(576, 64), (35, 1), (9, 9)])
def test_constant_nodes_repeat_for_every_image(n, k):
    kept, scores = grid.random_indices(n, k, seed=1)
    graph = helper.make_graph(
        grid.constant_topk_nodes("x", ("kept_indices", "scores"), kept, scores),
        "control",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["I", n, 8])],
        [
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, ["I", k]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["I", n]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for images in (1, 3):
        got_kept, got_scores = session.run(None, {"x": np.zeros((images, n, 8), np.float16)})
        np.testing.assert_array_equal(got_kept, np.tile(kept, (images, 1)))
        np.testing.assert_array_equal(got_scores, np.tile(scores, (images, 1)))
        assert got_scores.dtype == np.float32


@pytest.mark.parametrize(("layout", "n", "k"), [((24, 24), 575, 8), (None, 5, 6), ((2, 2), 4, 0)])
def test_uniform_refuses_what_cannot_be(layout, n, k):
    with pytest.raises(ValueError, match=r"not 575|between 1 and"):
        grid.uniform_indices(layout, n, k)
