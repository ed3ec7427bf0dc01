"""Which form of attention a CPU's slot takes: the one that was faster, the same answers in both."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tokprune.export.fusion import build as fusion_build
from tokprune.export.fusion import form
from tokprune.export.fusion.build import build_fused
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.chat import load
from tokprune.runtime.engines.fused import FORM
from tokprune.runtime.making import NO_FLASH
from tokprune.runtime.session import make_backend

HEADS, KV_HEADS, WIDTH = 4, 2, 8


@pytest.fixture
def seen(monkeypatch) -> list[str | None]:
    """What the variable is, whenever ONNX Runtime makes a session."""
    found, make = [], onnxruntime.InferenceSession

    def spy(*given, **named):
        found.append(os.environ.get(NO_FLASH))
        return make(*given, **named)

    monkeypatch.delenv(NO_FLASH, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    return found


@pytest.mark.parametrize("flash", [True, False])
def test_the_call_that_is_timed_is_attention(flash, seen):
    """Two pieces of a prompt and a step behind it, against softmax in float64."""
    attention = form._Attention((HEADS, KV_HEADS, WIDTH), flash)
    assert seen == ["0" if flash else "1"]
    rows, rng = 12, np.random.default_rng(0)
    states = rng.standard_normal((1, rows, HEADS * WIDTH)).astype(np.float32)
    cache = np.zeros((2, 1, KV_HEADS, rows + 1, WIDTH), np.float32)
    assert attention.run(states, [cache], [(0, 7), (7, rows), (rows, rows + 1)]) > 0
    # each call reads the first rows of ``states``, and writes its keys and values where they belong
    given = np.concatenate([states[0, :7], states[0, :5], states[0, :1]])[:, : KV_HEADS * WIDTH]
    wanted = given.reshape(rows + 1, KV_HEADS, WIDTH).transpose(1, 0, 2)
    np.testing.assert_array_equal(cache[0, 0], wanted)
    np.testing.assert_array_equal(cache[1, 0], wanted)


def test_both_forms_of_all_decoders_are_timed(tiny_bundle, seen, monkeypatch):
    """Whatever the user has set, which would make them the same."""
    monkeypatch.setenv(NO_FLASH, "1")
    found = form.measure_forms(open_bundle(tiny_bundle("lofi")).manifest)
    assert set(found) == {"whole", "flash"}
    assert all(ms > 0 for ms in found.values())
    assert seen == ["1", "0"] * 2
    assert os.environ[NO_FLASH] == "1"


def test_times_are_medians_behind_a_warm_up(monkeypatch):
    """Of a prompt in two pieces and of a step, each form's own."""
    script = {False: [99, 3, 1, 2, 5, 4], True: [99, 30, 10, 20, 50, 40]}

    class Scripted:
        def __init__(self, shape, flash):
            self.rounds = iter([ms for ms in script[flash] for _ in range(2)])

        def run(self, states, caches, calls):
            assert calls in ([(0, 256), (256, 300)], [(300, 301)])
            return float(next(self.rounds))

    monkeypatch.setattr(form, "_Attention", Scripted)
    assert form._times((HEADS, KV_HEADS, WIDTH), 300, 2) == {"whole": (3.0, 3.0), "flash": (30.0, 30.0)}


def test_a_token_counts_as_often_as_it_is_made(tiny_bundle, monkeypatch):
    """Of three layers, two of them behind the selector, by times that are given."""
    asked = []

    def times(shape, rows, layers):
        asked.append((rows, layers))
        return {"whole": (10.0, 1.0), "flash": (20.0, 0.5)}

    monkeypatch.setattr(form, "_times", times)
    manifest = open_bundle(tiny_bundle("lofi")).manifest
    work = form.usual_work(manifest.model, manifest.limits.max_kv_capacity)
    found = form.measure_forms(manifest)
    assert asked == [(work.text_tokens + 16, 1), (work.text_tokens + 6, 2)]
    assert found == {"whole": 3 * (10 + work.new_tokens), "flash": 3 * (20 + 0.5 * work.new_tokens)}


class TestSlot:
    @pytest.fixture
    def bundle(self, tiny_bundle, tmp_path, monkeypatch) -> Path:
        """Built where the flash form was faster."""
        monkeypatch.setattr(fusion_build, "measure_forms", lambda manifest: {"whole": 2.0, "flash": 1.0})
        path = shutil.copytree(tiny_bundle("lofi-2"), tmp_path / "bundle")
        assert build_fused(open_bundle(path))["attention_ms"] == {"whole": 2.0, "flash": 1.0}
        return path

    def file(self, bundle: Path) -> Path:
        (folder,) = (bundle / "engines").iterdir()
        return folder / FORM

    def answer(self, bundle: Path, engine: str = "auto") -> list[int]:
        chat = load(bundle, engine=engine).chat()
        list(chat.ask("What is there to be seen here?", [], max_new_tokens=6))
        return chat.last.token_ids

    def test_the_faster_form_runs_and_answers_are_the_same(self, bundle, seen):
        found = self.answer(bundle)
        assert set(seen) == {"0"}
        seen.clear()
        self.file(bundle).write_text(json.dumps({"whole": 1.0, "flash": 2.0}))
        assert self.answer(bundle) == found == self.answer(bundle, "onnxruntime-neutral")
        assert set(seen) == {"1"}

    def test_what_the_user_sets_stays(self, bundle, seen, monkeypatch):
        monkeypatch.setenv(NO_FLASH, "1")
        self.answer(bundle)
        assert set(seen) == {"1"}

    def test_it_is_measured_once(self, bundle, monkeypatch):
        monkeypatch.setattr(fusion_build, "measure_forms", lambda manifest: pytest.fail("measured again"))
        assert build_fused(open_bundle(bundle))["attention_ms"]["flash"] == 1.0
        self.file(bundle).unlink()
        monkeypatch.setattr(fusion_build, "measure_forms", lambda manifest: {"whole": 1.0, "flash": 3.0})
        result = build_fused(open_bundle(bundle))
        assert result["attention_ms"]["flash"] == 3.0
        assert not any(segment["built"] for segment in result["segments"])

    @pytest.mark.parametrize("text", ["", "{}", '{"whole": "x", "flash": 1}', "[1]"])
    def test_a_damaged_file_is_told_and_mended(self, text, bundle):
        self.file(bundle).write_text(text)
        backend = make_backend("auto", open_bundle(bundle))
        assert "fused" not in backend.name
        assert any(FORM in remark and "--target cpu" in remark for remark in backend.remarks)
        result = build_fused(open_bundle(bundle))
        assert result["attention_ms"] == {"whole": 2.0, "flash": 1.0}
        assert not any(segment["built"] for segment in result["segments"])
        assert "fused" in make_backend("auto", open_bundle(bundle)).name
