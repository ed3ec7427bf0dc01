"""Selector graphs in ONNX Runtime: what they keep, gather and count, against plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tokprune.export.reference import choose
from tokprune.export.selector import save_selector
from tokprune.runtime import metrics, names
from tokprune.runtime.layout import Layout
from tokprune.runtime.plan import Plan, Rank, Stage

TOKENS, HIDDEN = 36, 24
PLANS = {
    "lofi": Plan("lofi", (Stage(1, 9),), Rank(components=5)),
    "lofi-energy": Plan("lofi", (Stage(1, 9),), Rank(energy=0.6)),
    "random": Plan("random", (Stage(1, 9),), seed=3),
    "uniform": Plan("uniform", (Stage(1, 9),)),
}


def sequence(starts: list[int], count: int, dtype: str = "float32"):
    generator = np.random.default_rng(7)
    spectrum = 0.8 ** np.arange(HIDDEN)  # decaying, as hidden states' is
    hidden = (generator.standard_normal((1, count, HIDDEN)) * spectrum).astype(dtype)
    visual = np.array([range(start, start + TOKENS) for start in starts], dtype=np.int64)
    positions = (np.arange(count, dtype=np.int64) * 2 + 5)[None]
    return hidden, visual, positions


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("starts", [[0], [4], [2, 44]])
@pytest.mark.parametrize("key", list(PLANS))
def test_keeps_what_the_reference_keeps(key: str, starts: list[int], dtype: str, tmp_path: Path):
    plan = PLANS[key]
    save_selector(tmp_path, 0, plan, TOKENS, HIDDEN, dtype, (6, 6))
    session = onnxruntime.InferenceSession(tmp_path / "select_0.onnx")
    count = starts[-1] + TOKENS + 5
    hidden, visual, positions = sequence(starts, count, dtype)
    template, after = Layout.of(count, visual).prune(9)
    feeds = {
        names.HIDDEN_STATES: hidden,
        names.POSITION_IDS: positions,
        names.VISUAL_INDEX: visual,
        names.ROW_TEMPLATE: template[None],
    }
    kept_hidden, kept_positions, kept, scores = session.run(None, feeds)
    assert scores.dtype == np.float32
    slots = []
    for image, rows in enumerate(visual):
        _, reference_scores = choose(plan, 0, hidden[0, rows].astype(np.float64), (6, 6))
        assert metrics.kept_equal_margin(kept[image], reference_scores)
        # leverage scores lie in 0..1; FP32 subspace iteration is good to some 1e-4 there
        np.testing.assert_allclose(scores[image], reference_scores, atol=1e-3)
        assert (np.diff(kept[image]) > 0).all()
        slots += rows[kept[image]].tolist()
    rows_left = np.array([*range(count), *slots])[template]
    assert (np.diff(rows_left) > 0).all()  # original order
    np.testing.assert_array_equal(kept_hidden[0], hidden[0, rows_left])
    np.testing.assert_array_equal(kept_positions[0], positions[0, rows_left])
    assert kept_hidden.shape[1] == after.count


@pytest.mark.parametrize("key", list(PLANS))
def test_only_lofi_calls_the_operator_and_only_it_counts_flops(key: str, tmp_path: Path):
    facts = save_selector(tmp_path, 0, PLANS[key], TOKENS, HIDDEN, "float32", (6, 6))
    model = onnx.load(tmp_path / "select_0.onnx")
    calls = [node.op_type for node in model.graph.node if node.domain == "tokprune"]
    assert calls == (["LeverageTopK"] if key.startswith("lofi") else [])
    one, two = (facts.count_flops(images=i, batch=1, sequence=99, rows=9) for i in (1, 2))
    assert two == 2 * one
    # at least XXᵀ applied once, by either of its two forms
    assert one == 0 if not calls else one > 4 * TOKENS * HIDDEN * 5


def test_second_stage_has_no_image_grid_any_more(tmp_path: Path):
    plan = Plan("uniform", (Stage(0, 9), Stage(1, 3)))
    save_selector(tmp_path, 1, plan, 9, HIDDEN, "float32", None)
    session = onnxruntime.InferenceSession(tmp_path / "select_1.onnx")
    layout = Layout.of(12, np.arange(1, 10)[None])
    feeds = {
        names.HIDDEN_STATES: np.zeros((1, 12, HIDDEN), dtype=np.float32),
        names.POSITION_IDS: np.arange(12)[None],
        names.VISUAL_INDEX: layout.visual,
        names.ROW_TEMPLATE: layout.prune(3)[0][None],
    }
    assert session.run([names.KEPT_INDICES], feeds)[0].tolist() == [[1, 4, 7]]
