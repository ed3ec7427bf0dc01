"""Mixes of a bundle and its quantised form, and what each part costs, on the tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYERS
from PIL import Image

from tokprune.calibration.mixed import Mixed, part_of
from tokprune.calibration.recipe import usual_choices
from tokprune.calibration.sensitivity import (
    SCHEMA,
    Sensitivity,
    bytes_saved,
    choose,
    measure,
    read_sensitivity,
    sensitivity_key,
)
from tokprune.calibration.trial import ANSWER, Trial, greedy
from tokprune.export.quantize import find_matrices, quantize
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.chat import Model, load
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import Recipe

PARTS = [*(f"layers.{layer}" for layer in range(LAYERS)), "lm_head"]


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle, Recipe]:
    base, path = open_bundle(tiny_bundle("lofi")), tmp_path_factory.mktemp("mixed") / "int4"
    choices = usual_choices(list(find_matrices(base)), "int4", "int8")
    _, recipe = quantize(base, path, "int4", choices)
    return base, open_bundle(path), recipe


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [
        Sample("What digit is red?", (folder / "0.png",)),
        Sample("What digit is blue?", (folder / "0.png",)),
        Sample("How many?", (folder / "1.png",)),
        Sample("No picture here?"),
    ]


@pytest.fixture
def trial(bundles, samples):
    base, other, _ = bundles
    trial = Trial(base, other, samples)
    trial.answer(lambda: None)
    yield trial
    trial.close()


def test_parts() -> None:
    found = ["vision_tower.encoder.layers.3.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"]
    found += ["language_model.layers.3.mlp.up_proj.weight", "lm_head.weight.0-4"]
    assert [part_of(name) for name in found] == ["vision", "vision", "layers.3", "lm_head"]


class TestMix:
    def test_of_nothing_is_the_base(self, trial: Trial, bundles, samples) -> None:
        """In pieces, and with an answer's tokens in one call, as in one piece and one by one."""
        found = trial.difference([], lambda: None)
        assert (found.samples, found.agreement, found.top1_agreement) == (len(samples), 1, 1)
        assert found.tokens > len(samples)
        assert found.kl_mean < 1e-9
        whole = trial.of(load(bundles[0].path, engine="onnxruntime"), lambda: None)
        assert dataclasses.replace(whole, kl_mean=0) == dataclasses.replace(found, kl_mean=0)

    def test_of_all_is_the_quantised_bundle(self, trial: Trial, bundles) -> None:
        """But that INT4 in a segment with INT8 rounds its activations in both."""
        mixed = trial.difference(PARTS, lambda: None)
        whole = trial.of(load(bundles[1].path, engine="onnxruntime"), lambda: None)
        assert mixed.kl_mean > 1e-4
        assert mixed == dataclasses.replace(whole, kl_mean=mixed.kl_mean)
        assert mixed.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3)

    def test_each_part_is_its_own(self, trial: Trial) -> None:
        found = [trial.difference([part], lambda: None).kl_mean for part in PARTS]
        assert min(found) > 1e-7
        assert len(set(found)) == len(PARTS)
        assert max(found) < trial.difference(PARTS, lambda: None).kl_mean * 2

    def test_in_little_memory(self, trial: Trial, bundles, samples) -> None:
        """Each part is loaded anew whenever it is needed, and the same comes of it."""
        small = Trial(*bundles[:2], samples[:2], budget=1)
        small.answer(lambda: None)
        few = Trial(*bundles[:2], samples[:2])
        few.answer(lambda: None)
        assert small.difference(["layers.1"], lambda: None) == few.difference(["layers.1"], lambda: None)
        assert len(small.mixed._sessions._loaded) == 1
        assert len(few.mixed._sessions._loaded) > LAYERS
        small.close()
        few.close()

    def test_folded_parts_fit_the_others(self, tiny_bundle, tmp_path: Path, samples) -> None:
        """A tower that is rounded too, alone: its features are its own."""
        base = open_bundle(tiny_bundle("lofi"))
        choices = usual_choices(list(find_matrices(base)), "int8")
        int8 = choices["language_model.layers.0.mlp.up_proj.weight"]
        choices |= {name: int8 for name in choices if part_of(name) == "vision"}
        quantize(base, tmp_path / "int8", "int8", choices)
        trial = Trial(base, open_bundle(tmp_path / "int8"), samples)
        trial.answer(lambda: None)
        assert 1e-9 < trial.difference(["vision"], lambda: None).kl_mean < 0.1
        assert trial.difference([], lambda: None).kl_mean < 1e-9
        trial.close()

    def test_times_in_turns(self, trial: Trial) -> None:
        times = trial.time(["layers.0", "lm_head"])
        assert list(times) == ["layers.0", "lm_head"]
        for found in times.values():
            assert [len(each) for each in (*found.prompt, *found.token)] == [7, 7, 25, 25]
            assert min(map(min, (*found.prompt, *found.token))) > 0


def test_answers_end(bundles, samples) -> None:
    """By length, or behind the end of sequence; logits stand in front of each token."""
    base = bundles[0]
    model = load(base.path, engine="onnxruntime")
    features = model.pipeline.encode_images(model.pixels(samples[0].images), _meter())
    tokens, logits = greedy(model, samples[0], features)
    (answer,) = model.answer([samples[0].prompt], [samples[0].images], max_new_tokens=ANSWER)
    eos = model.pipeline.facts.eos_token_ids
    assert [token for token in tokens if token not in eos] == answer.generation.token_ids
    assert logits.argmax(axis=-1).tolist() == tokens


def _meter():
    from tokprune.runtime.pipeline import Meter

    return Meter()


class TestMeasure:
    def sensitivity(self, bundles, samples) -> Sensitivity:
        key = sensitivity_key(*bundles[:2], samples)
        return Sensitivity(SCHEMA, key, "int4", 0, ANSWER, (0, 1, 2, 3), {})

    def test_goes_on_where_it_was(self, trial: Trial, bundles, samples, tmp_path: Path) -> None:
        recipe, fresh, where = bundles[2], self.sensitivity(bundles, samples), tmp_path / "calibration" / "found.json"
        calls = 0

        def stop_in_the_third_part() -> None:
            nonlocal calls
            calls += 1
            if calls == 2 * len(samples) + 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(trial, fresh, recipe, where, stop_in_the_third_part)
        kept = read_sensitivity(where, fresh.key)
        assert list(kept.parts) == PARTS[:2]
        asked: list[None] = []
        found = measure(trial, kept, recipe, where, lambda: asked.append(None))
        assert len(asked) == 2 * len(samples)  # the two that were missing
        assert list(found.parts) == PARTS
        assert read_sensitivity(where, fresh.key) == found
        again = measure(trial, self.sensitivity(bundles, samples), recipe, tmp_path / "again.json", lambda: None)
        for part in PARTS:
            assert again.parts[part].difference == found.parts[part].difference
            assert found.parts[part].bytes_saved == bytes_saved(recipe)[part] > 0

    def test_bytes_saved(self, bundles) -> None:
        recipe = bundles[2]
        matrices = [matrix for matrix in recipe.rounded if part_of(matrix.name) == "layers.1"]
        assert len(matrices) == 7
        fp32 = sum(4 * matrix.shape[0] * matrix.shape[1] for matrix in matrices)
        assert bytes_saved(recipe)["layers.1"] == fp32 - sum(matrix.record.bytes for matrix in matrices)

    def test_key_is_of_all_it_follows_from(self, bundles, samples) -> None:
        base, other, _ = bundles
        keys = {
            sensitivity_key(base, other, samples),
            sensitivity_key(other, base, samples),
            sensitivity_key(base, other, samples[:-1]),
            sensitivity_key(base, other, [dataclasses.replace(samples[0], prompt="?"), *samples[1:]]),
        }
        assert len(keys) == 4
        assert sensitivity_key(base, other, samples) in keys

    def test_kept_file(self, bundles, samples, tmp_path: Path) -> None:
        where, fresh = tmp_path / "found.json", self.sensitivity(bundles, samples)
        assert read_sensitivity(where, fresh.key) is None
        where.write_text(fresh.to_json())
        assert read_sensitivity(where, "other") is None
        where.write_text(fresh.to_json()[:-20])
        with pytest.raises(UserError, match="cannot be read as JSON"):
            read_sensitivity(where, fresh.key)


class TestQuestions:
    def test_others_verify(self) -> None:
        first, others = choose(100, 30, seed=1)
        assert len(set(first)) == len(set(others)) == 30
        assert not set(first) & set(others)
        assert choose(100, 30, seed=1) == (first, others) != choose(100, 30, seed=2)

    def test_too_few(self) -> None:
        assert choose(40, 30, seed=1)[1] != choose(40, 40, seed=1)[1] == tuple(range(40))
        assert len(choose(40, 30, seed=1)[1]) == 10
        with pytest.raises(UserError, match="41 questions were asked for, the data has 40"):
            choose(40, 41, seed=1)


def test_sessions_say_what_is_wrong(bundles, tmp_path: Path) -> None:
    base, other, _ = bundles
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in other.path.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "weights.data").write_bytes(b"")
    mixed = Mixed(base, Bundle(broken, other.manifest))
    mixed.rounded = frozenset(["layers.0"])
    from tokprune.runtime.pipeline import Pipeline

    model = Model(base, pipeline=Pipeline(base, mixed))
    with pytest.raises(UserError, match=r"cannot load .*decoder_0.onnx"):
        greedy(model, Sample("No picture?"), None)
