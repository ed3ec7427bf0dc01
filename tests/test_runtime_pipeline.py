"""The pipeline with selectors that look at text: wherever text and images stand, each selector sees the right rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import PLANS

from tokprune.export.checkpoint import find_checkpoint, load_model
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.reference import Reference, Seen, choose
from tokprune.runtime import metrics, names
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.ort import OnnxRuntime
from tokprune.runtime.pipeline import Meter, Pipeline, Pruned

PLAN = PLANS["lvpruning"]
IMAGE = [3] * 16
PROMPTS = {
    "image first": [*IMAGE, 20, 21, 22],
    "text before the image": [0, 9, 30, *IMAGE, 20, 21],
    "one row of text": [*IMAGE, 20],
    "two images": [0, *IMAGE, 30, 31, *IMAGE, 20, 21],
    "two images side by side": [0, *IMAGE, *IMAGE, 20],
}


class Watched(Pipeline):
    """Keeps what each selector of the latest call was fed."""

    def _run(self, name, feeds, outputs, meter, **axes):
        if name.startswith("select_"):
            self.fed[name] = {key: self.backend.to_host(tensor) for key, tensor in feeds.items()}
        return super()._run(name, feeds, outputs, meter, **axes)

    def forward(self, state, prompts, meter, **options):
        self.fed: dict[str, dict[str, np.ndarray]] = {}
        return super().forward(state, prompts, meter, **options)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Watched:
    return Watched(open_bundle(tiny_bundle("lvpruning")), OnnxRuntime())


@pytest.fixture(scope="module")
def modules(tiny_modules):
    return load_modules(tiny_modules)


def pixels(images: int, seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, 3, 56, 56)).astype(np.float32)


def assert_right(pipeline: Watched, ids: list[int], records: list[Pruned], modules) -> None:
    """Each stage kept what its reference keeps of the rows it was fed, which rows being worked out from ``ids``."""
    visual = np.array(ids) == 3
    rows = np.where(visual, (np.cumsum(visual) - 1) // 16, -1)  # image of each row, -1 text
    images = rows.max() + 1
    assert len(records) == len(PLAN.stages) * images
    patches = [np.arange(16) for _ in range(images)]
    for index, stage in enumerate(PLAN.stages):
        hidden = pipeline.fed[names.select(index)][names.HIDDEN_STATES][0].astype(np.float64)
        assert len(hidden) == len(rows)
        stays = rows == -1
        for image in range(images):
            seen = Seen(hidden[rows == image], hidden[rows == -1])
            _, scores = choose(PLAN, index, seen, None, modules)
            record = records[index * images + image]
            assert (record.layer, record.image, record.kept, record.total) == (
                stage.layer, image, stage.keep, len(scores),
            )  # fmt: skip
            np.testing.assert_allclose(record.scores, scores, atol=1e-5)
            kept = np.flatnonzero(np.isin(patches[image], record.indices))
            assert metrics.kept_equal_margin(kept, scores, log_odds=True)
            patches[image] = record.indices
            stays[np.flatnonzero(rows == image)[kept]] = True
        rows = rows[stays]


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_first_turn(pipeline, modules, tiny_checkpoint, kind):
    """Against the float64 selector on the same rows, and against PyTorch with its own rows throughout."""
    ids = PROMPTS[kind]
    images = pixels(ids.count(3) // 16)
    features = pipeline.encode_images(images, Meter())
    (logits,), [records] = pipeline.forward(pipeline.new_state(), [ids], Meter(), image_features=features)
    assert_right(pipeline, ids, records, modules)
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    with Reference(load_model(checkpoint, dtype=torch.float32), checkpoint.facts, PLAN, modules) as reference:
        run, expected = reference.prefill(ids, torch.from_numpy(images))
    for record, chosen in itertools.zip_longest(records, run.selections):
        assert record.layer == chosen.layer
        assert metrics.kept_equal_margin(record.indices, chosen.scores, log_odds=True)
        # 3 layers in FP32 on two engines: 1e-4 is 10 times what is seen
        np.testing.assert_allclose(record.scores, chosen.scores[record.candidates], atol=1e-4)
    np.testing.assert_allclose(logits[0], expected, atol=1e-3)


def test_later_turn_with_a_new_image(pipeline, modules):
    """The text that counts is the call's own; what the caches hold is not fed to a selector again."""
    state = pipeline.new_state()
    first = pipeline.encode_images(pixels(1), Meter())
    pipeline.forward(state, [PROMPTS["image first"]], Meter(), image_features=first)
    ids = [40, 41, *IMAGE, 42, 43, 44]
    second = pipeline.encode_images(pixels(1, seed=5), Meter())
    _, [records] = pipeline.forward(state, [ids], Meter(), image_features=second)
    assert_right(pipeline, ids, records, modules)
    _, [alone] = pipeline.forward(pipeline.new_state(), [ids], Meter(), image_features=second)
    assert np.abs(alone[0].scores - records[0].scores).max() > 1e-3  # its rows have seen the first turn


def test_without_an_image_no_selector_runs(pipeline):
    meter = Meter()
    logits, [records] = pipeline.forward(pipeline.new_state(), [[0, 9, 20, 21]], meter)
    assert records == []
    assert not pipeline.fed
    assert not [name for name in meter.ms if name.startswith("select_")]
    assert np.isfinite(logits).all()


def test_flops_count_the_text_rows(pipeline):
    counts = []
    for text in (3, 4, 5):
        meter = Meter()
        features = pipeline.encode_images(pixels(1), meter)
        pipeline.forward(pipeline.new_state(), [[*IMAGE, *range(20, 20 + text)]], meter, image_features=features)
        counts.append(meter.flops["select_0"])
    width, hidden, visual = 8, 64, 16
    a_row = 2 * hidden * width + 2 * 2 * width * width + 2 * 2 * visual * width  # text_proj; k and v; QKᵀ and PV
    assert np.diff(counts).tolist() == [a_row, a_row]
