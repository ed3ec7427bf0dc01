"""CrossAttentionTopK's CUDA kernels against the float64 reference, run on this CPU (cuda_host/).

The projections before them are the graph's: here NumPy makes them, and rounds them to float32. Tolerances as for the
ONNX body (test_plugins_cross_attention_topk.py).
"""

import ctypes

import numpy as np
import pytest
from cuda_host import host
from test_plugins_cross_attention_topk import assert_matches, random_weights, rows

from tokprune.runtime.plan import Module


def run(x, t, k, sizes, valid=None, order=0):
    valid = np.ones(t.shape[:2], dtype=bool) if valid is None else valid
    return host.cross_attention_topk(x, t, valid, k, random_weights(x.shape[2], sizes), sizes.heads, order=order)


@pytest.mark.parametrize(
    ("n", "m", "hidden", "k", "sizes"),
    [
        (576, 36, 192, 64, Module(64, 2, 256)),
        (37, 5, 53, 5, Module(24, 3, 50)),
        (53, 1, 37, 20, Module(16, 16, 8)),
        (31, 80, 400, 31, Module(32, 1, 32)),
        (9, 2, 24, 1, Module(40, 5, 16)),
        (20, 33, 24, 6, Module(2, 1, 3)),
        (1, 3, 24, 1, Module(256, 1, 70)),
    ],
)
def test_sizes_and_heads(n, m, hidden, k, sizes):
    x, t = rows(1, 1, n, hidden), rows(2, 1, m, hidden)
    kept, scores = run(x, t, k, sizes)
    if n > 1:
        assert_matches(kept[0], scores[0], x[0], t[0], k, sizes)
    else:
        np.testing.assert_array_equal(kept, [[0]])


def test_default_sizes_of_7b():
    sizes = Module(256, 8, 1024)
    x, t = rows(1, 1, 100, 512), rows(2, 1, 40, 512)
    kept, scores = run(x, t, 30, sizes)
    assert_matches(kept[0], scores[0], x[0], t[0], 30, sizes)


def test_rows_that_fill_up_are_not_read_and_images_do_not_mix():
    sizes = Module(16, 4, 32)
    x, t = rows(1, 3, 20, 24), rows(2, 3, 75, 24)
    valid = np.ones((3, 75), dtype=bool)
    valid[0, 7:], valid[1, :40], valid[2, 1:] = False, False, False
    filled = np.where(valid[:, :, None], t, 0)
    kept, scores = run(x, filled, 6, sizes, valid)
    for image in range(3):
        assert_matches(kept[image], scores[image], x[image], t[image, valid[image]], 6, sizes)
        alone = run(x[image : image + 1], filled[image : image + 1], 6, sizes, valid[image : image + 1])[1]
        np.testing.assert_array_equal(alone[0], scores[image])
    filled[~valid] = np.nan
    assert run(x, filled, 6, sizes, valid)[1].tobytes() == scores.tobytes()


def test_ties_go_to_the_lower_index():
    x = np.repeat(rows(1, 1, 4, 24), 3, axis=1)
    kept, scores = run(x, rows(2, 1, 9, 24), 4, Module(16, 4, 32))
    scores = scores[0].reshape(4, 3)
    assert (np.ptp(scores, axis=1) == 0).all()
    first, second = np.argsort(-scores[:, 0])[:2]
    np.testing.assert_array_equal(kept[0], sorted([*range(3 * first, 3 * first + 3), 3 * second]))


def test_any_order_of_threads_and_blocks_gives_the_same_bits():
    x, t = rows(1, 2, 70, 24), rows(2, 2, 40, 24)
    runs = [run(x, t, 6, Module(24, 3, 70), order=order) for order in (0, 0, 1, 7)]
    assert len({(kept.tobytes(), scores.tobytes()) for kept, scores in runs}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"images": 0}, {"n": 0}, {"n": 4097}, {"m": 0}, {"k": 0}, {"k": 65}, {"heads": 0}, {"heads": 3},
        {"width": 0}, {"width": 2048}, {"intermediate": 0}, {"images": 65535, "n": 4096, "heads": 0},
    ],
)  # fmt: skip
def test_refuses_sizes_that_it_does_not_take(change):
    call = host.CrossAttentionTopK(1, 64, 8, 32, 4, 16, 64, 1e-6)
    assert host.library().cross_attention_workspace(ctypes.byref(call)) > 0
    for name, value in change.items():
        setattr(call, name, value)
    assert host.library().cross_attention_workspace(ctypes.byref(call)) == 0
    weights, inputs = (ctypes.c_void_p * 9)(), (ctypes.c_void_p * 5)()
    status = host.library().cross_attention(ctypes.byref(call), inputs, weights, None, None, None)
    assert status == host.INVALID_VALUE
