"""Selector graphs in ONNX Runtime: what they keep, gather and count, against plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import random_modules

from tokprune.export.lvpruning.modules import Modules, save_modules
from tokprune.export.reference import Seen, choose
from tokprune.export.selector import save_selector
from tokprune.plugins.cross_attention_topk.reference import MODULE_WEIGHTS
from tokprune.runtime import metrics, names
from tokprune.runtime.contract import PLUGIN_METHODS
from tokprune.runtime.flops import module_flops
from tokprune.runtime.layout import Layout
from tokprune.runtime.manifest import ModelFacts, VisionFacts
from tokprune.runtime.plan import Module, Plan, Rank, Stage

TOKENS, HIDDEN, LAYERS = 36, 24, 4
FACTS = ModelFacts(
    name="small",
    layers=LAYERS,
    hidden=HIDDEN,
    intermediate=32,
    heads=2,
    kv_heads=2,
    head_dim=12,
    vocabulary=99,
    context=256,
    vision=VisionFacts(image_size=84, patch_size=14, layers=2, hidden=16, intermediate=32, heads=2),
    image_token_id=3,
    bos_token_id=0,
    eos_token_ids=(1,),
)
SIZES = Module(width=16, heads=4, intermediate=40)
PLANS = {
    "lofi": Plan("lofi", (Stage(1, 9),), Rank(components=5)),
    "lofi-energy": Plan("lofi", (Stage(1, 9),), Rank(energy=0.6)),
    "lvpruning": Plan("lvpruning", (Stage(1, 9),), module=SIZES),
    "fastv": Plan("fastv", (Stage(1, 9),)),
    "random": Plan("random", (Stage(1, 9),), seed=3),
    "uniform": Plan("uniform", (Stage(1, 9),)),
}


def sequence(starts: list[int], count: int, dtype: str = "float32", tokens: int = TOKENS):
    generator = np.random.default_rng(7)
    spectrum = 0.8 ** np.arange(HIDDEN)  # decaying, as hidden states' is
    hidden = (generator.standard_normal((1, count, HIDDEN)) * spectrum).astype(dtype)
    visual = np.array([range(start, start + tokens) for start in starts], dtype=np.int64)
    positions = (np.arange(count, dtype=np.int64) * 2 + 5)[None]
    attention = generator.dirichlet(np.ones(count))[None].astype(np.float32)
    return hidden, Layout.of(count, visual), positions, attention


def modules_of(plan: Plan, folder: Path) -> Modules | None:
    """The modules that ``plan`` needs, saved where a bundle has them."""
    if plan.module is None:
        return None
    modules = random_modules(HIDDEN, LAYERS, TOKENS, plan.stages, plan.module)
    save_modules(folder, modules)
    return modules


def run(path: Path, layout: Layout, keep: int, hidden, positions, attention, text=None) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    feeds = {
        names.HIDDEN_STATES: hidden,
        names.POSITION_IDS: positions,
        names.VISUAL_INDEX: layout.visual,
        names.ROW_TEMPLATE: layout.prune(keep)[0][None],
        names.TEXT_INDEX: np.tile(layout.text, (len(layout.visual), 1)) if text is None else text,
        names.LAST_ROW_ATTENTION: attention,
    }
    wanted = {tensor.name for tensor in session.get_inputs()}
    return session.run(None, {name: value for name, value in feeds.items() if name in wanted})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("starts", [[0], [4], [2, 44]])
@pytest.mark.parametrize("key", list(PLANS))
def test_keeps_what_the_reference_keeps(key: str, starts: list[int], dtype: str, tmp_path: Path):
    plan = PLANS[key]
    modules = modules_of(plan, tmp_path)
    save_selector(tmp_path, 0, plan, FACTS, dtype)
    count = starts[-1] + TOKENS + 5
    hidden, layout, positions, attention = sequence(starts, count, dtype)
    kept_hidden, kept_positions, kept, scores = run(tmp_path / "select_0.onnx", layout, 9, hidden, positions, attention)
    assert scores.dtype == np.float32
    states = hidden[0].astype(np.float64)
    slots = []
    for image, rows in enumerate(layout.visual):
        seen = Seen(states[rows], states[layout.text], attention[0, rows].astype(np.float64))
        _, reference_scores = choose(plan, 0, seen, (6, 6), modules)
        assert metrics.kept_equal_margin(kept[image], reference_scores, log_odds=key == "lvpruning")
        # leverage scores lie in 0..1; FP32 subspace iteration is good to some 1e-4 there, modules to 1e-5
        np.testing.assert_allclose(scores[image], reference_scores, atol=1e-5 if key == "lvpruning" else 1e-3)
        assert (np.diff(kept[image]) > 0).all()
        slots += rows[kept[image]].tolist()
    template, after = layout.prune(9)
    rows_left = np.array([*range(count), *slots])[template]
    assert (np.diff(rows_left) > 0).all()  # original order
    np.testing.assert_array_equal(kept_hidden[0], hidden[0, rows_left])
    np.testing.assert_array_equal(kept_positions[0], positions[0, rows_left])
    assert kept_hidden.shape[1] == after.count


@pytest.mark.parametrize("key", list(PLANS))
def test_lofi_and_lvpruning_call_their_operators_and_only_they_count_flops(key: str, tmp_path: Path):
    modules_of(PLANS[key], tmp_path)
    facts = save_selector(tmp_path, 0, PLANS[key], FACTS, "float32")
    model = onnx.load(tmp_path / "select_0.onnx", load_external_data=False)
    calls = [node.op_type for node in model.graph.node if node.domain == "tokprune"]
    operators = {"lofi": ["LeverageTopK"], "lvpruning": ["CrossAttentionTopK"]}
    assert calls == operators.get(PLANS[key].method, [])
    one, two = (facts.count_flops(images=i, batch=1, sequence=99, rows=9, text_rows=7) for i in (1, 2))
    assert two == 2 * one
    if key == "lvpruning":
        assert one == module_flops(TOKENS, HIDDEN, 7, SIZES)
    elif calls:
        assert one > 4 * TOKENS * HIDDEN * 5  # at least XXᵀ applied once, by either of its two forms
    else:
        assert one == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("key", list(PLANS))
def test_graph_for_the_plugin_differs_by_the_function_alone(key: str, dtype: str, tmp_path: Path):
    modules_of(PLANS[key], tmp_path)
    facts = save_selector(tmp_path, 0, PLANS[key], FACTS, dtype)
    if PLANS[key].method not in PLUGIN_METHODS:
        assert facts.plugin_file is None
        assert not list(tmp_path.glob("*.plugin.onnx"))
        return
    native, plugin = (onnx.load(tmp_path / file, load_external_data=False) for file in (facts.file, facts.plugin_file))
    (function,) = native.functions
    assert [node.op_type for node in native.graph.node if node.domain] == [function.name]
    (call,) = [node for node in plugin.graph.node if node.domain]
    marks = {mark.name: mark for mark in call.attribute if mark.name.startswith("plugin_")}
    assert {name: mark.s for name, mark in marks.items()} == {"plugin_version": b"1", "plugin_namespace": b"tokprune"}
    for mark in marks.values():
        call.attribute.remove(mark)
    assert not plugin.functions
    plugin.functions.append(function)
    assert plugin.SerializeToString(deterministic=True) == native.SerializeToString(deterministic=True)


def test_second_stage_has_no_image_grid_any_more(tmp_path: Path):
    plan = Plan("uniform", (Stage(0, 9), Stage(1, 3)))
    save_selector(tmp_path, 1, plan, FACTS, "float32")
    hidden, layout, positions, attention = sequence([1], 12, tokens=9)
    kept = run(tmp_path / "select_1.onnx", layout, 3, hidden, positions, attention)[2]
    assert kept.tolist() == [[1, 4, 7]]


class TestModules:
    """What lvpruning's selectors have that others have not: text rows, and weights in a file of their own."""

    PLAN = Plan("lvpruning", (Stage(1, 20), Stage(2, 6)), module=SIZES)

    def test_each_stage_has_its_own_module(self, tmp_path: Path):
        modules = modules_of(self.PLAN, tmp_path)
        for index, (tokens, keep) in enumerate([(TOKENS, 20), (20, 6)]):
            facts = save_selector(tmp_path, index, self.PLAN, FACTS, "float32")
            hidden, layout, positions, attention = sequence([3], 3 + tokens + 4, tokens=tokens)
            _, _, kept, scores = run(tmp_path / facts.file, layout, keep, hidden, positions, attention)
            seen = Seen(hidden[0, layout.visual[0]], hidden[0, layout.text])
            by_stage = [choose(self.PLAN, stage, seen, None, modules)[1] for stage in (0, 1)]
            np.testing.assert_allclose(scores[0], by_stage[index], atol=1e-5)
            assert np.abs(by_stage[0] - by_stage[1]).max() > 0.1  # the other stage's module would have shown
            assert metrics.kept_equal_margin(kept[0], by_stage[index], log_odds=True)

    def test_text_on_either_side_of_the_image_counts(self, tmp_path: Path):
        modules_of(self.PLAN, tmp_path)
        save_selector(tmp_path, 0, self.PLAN, FACTS, "float32")
        hidden, layout, positions, attention = sequence([4], TOKENS + 9)
        path = tmp_path / "select_0.onnx"
        before = run(path, layout, 20, hidden, positions, attention)[3]
        for row in (1, TOKENS + 6):
            changed = hidden.copy()
            changed[0, row] = 1.0
            assert np.abs(run(path, layout, 20, changed, positions, attention)[3] - before).max() > 1e-3

    def test_images_of_sequences_with_texts_of_other_lengths(self, tmp_path: Path):
        """Two sequences in a batch: the shorter text is filled up with -1, and each image has its own."""
        modules = modules_of(self.PLAN, tmp_path)
        save_selector(tmp_path, 0, self.PLAN, FACTS, "float32")
        count = TOKENS + 7
        hidden, _, _, _ = sequence([0], 2 * count)
        hidden = hidden.reshape(2, count, HIDDEN)
        visual = np.stack([np.arange(2, 2 + TOKENS), count + np.arange(5, 5 + TOKENS)])
        text = np.full((2, 7), -1, dtype=np.int64)
        text[0] = [0, 1, *range(2 + TOKENS, count)]
        text[1, [0, 2, 3, 6]] = count + np.array([0, 1, 2, 4])  # pads in between do no harm either
        session = onnxruntime.InferenceSession(tmp_path / "select_0.onnx")
        feeds = {
            names.HIDDEN_STATES: hidden,
            names.POSITION_IDS: np.tile(np.arange(count), (2, 1)),
            names.VISUAL_INDEX: visual,
            names.ROW_TEMPLATE: np.zeros((2, 1), dtype=np.int64),
            names.TEXT_INDEX: text,
        }
        kept, scores = session.run([names.KEPT_INDICES, names.SCORES], feeds)
        states = hidden.reshape(-1, HIDDEN).astype(np.float64)
        for image in (0, 1):
            seen = Seen(states[visual[image]], states[text[image][text[image] >= 0]])
            _, expected = choose(self.PLAN, 0, seen, None, modules)
            np.testing.assert_allclose(scores[image], expected, atol=1e-5)
            assert metrics.kept_equal_margin(kept[image], expected, log_odds=True)

    def test_weights_stay_in_the_modules_file(self, tmp_path: Path):
        modules = modules_of(self.PLAN, tmp_path)
        assert modules is not None
        before = (tmp_path / names.MODULES_FILE).read_bytes()
        save_selector(tmp_path, 1, self.PLAN, FACTS, "float16")
        assert (tmp_path / names.MODULES_FILE).read_bytes() == before
        assert (tmp_path / "select_1.onnx").stat().st_size < 20_000
        loaded = {tensor.name: tensor for tensor in onnx.load(tmp_path / "select_1.onnx").graph.initializer}
        for name in MODULE_WEIGHTS:
            found = onnx.numpy_helper.to_array(loaded[f"stages.1.{name}"])
            np.testing.assert_array_equal(found, modules.weights[f"stages.1.{name}"])
