"""Fused graphs for ONNX Runtime's CPU provider: the same answers as the neutral graphs, or none at all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from tokprune.export.fusion import build as fusion_build
from tokprune.export.fusion import rules
from tokprune.export.fusion.build import build_fused
from tokprune.export.fusion.check import TOLERANCES
from tokprune.export.quantize import quantize
from tokprune.runtime import UserError
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.chat import load
from tokprune.runtime.engines import fused
from tokprune.runtime.engines.fused import ARCH, LIBRARY, find_fused
from tokprune.runtime.pipeline import Meter, Pipeline
from tokprune.runtime.session import make_backend

NEUTRAL = "onnxruntime-neutral"
PLANS = ("none", "random-0", "random-2", "lvpruning", "fastv-2", "lofi", "lofi-2")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def built(tiny_bundle, tmp_path_factory):
    """Gives a copy of a bundle with its slot, to be read only."""
    folder, made = tmp_path_factory.mktemp("fused"), {}

    def build(plan: str) -> Path:
        if plan not in made:
            shutil.copytree(tiny_bundle(plan), folder / plan, dirs_exist_ok=True)
            build_fused(open_bundle(folder / plan))
            made[plan] = folder / plan
        return made[plan]

    return build


def slot_folder(bundle: Path) -> Path:
    (folder,) = (bundle / "engines").iterdir()
    return folder


def turns(model, pictures: list[Image.Image]) -> list[list[int]]:
    """Token ids of two turns, the second on the first one's cache."""
    chat, found = model.chat(), []
    for question, images in (("What is here?", pictures), ("And what else is there to be seen?", [])):
        for _ in chat.ask(question, images, max_new_tokens=6):
            pass
        found.append(chat.last.token_ids)
    return found


def first_logits(path: Path, engine: str) -> np.ndarray:
    """Of a prompt with an image, then of a step: [2, V]."""
    bundle = open_bundle(path)
    pipeline = Pipeline(bundle, make_backend(engine, bundle))
    facts, rng = pipeline.facts, np.random.default_rng(5)
    size = facts.vision.image_size
    features = pipeline.encode_images(rng.standard_normal((1, 3, size, size)), Meter())
    ids = [5, 6, *[facts.image_token_id] * facts.vision.tokens, *rng.integers(10, facts.vocabulary, 9).tolist()]
    state = pipeline.new_state()
    first, _ = pipeline.forward(state, [ids], Meter(), image_features=features)
    first = first.copy()
    second, _ = pipeline.forward(state, [[7]], Meter())
    return np.concatenate([first[0], second[0]])


class TestSameAnswers:
    """As the neutral graphs of the same bundle, which are held against PyTorch elsewhere."""

    @pytest.mark.parametrize("plan", PLANS)
    def test_turns_and_images(self, plan, built, pictures, monkeypatch):
        monkeypatch.setattr(fused, "PIECE", 8)  # prompts are of 30 rows
        monkeypatch.setattr(fused, "GROWTH", 2)  # so that caches grow while tokens come
        model, neutral = load(built(plan)), load(built(plan), engine=NEUTRAL)
        assert model.pipeline.backend.name.endswith(", fused graphs")
        assert "fused" not in neutral.pipeline.backend.name
        for count in (0, 1, 2):
            assert turns(model, pictures[:count]) == turns(neutral, pictures[:count])

    @pytest.mark.parametrize("plan", ["none", "fastv-2", "lofi-2", "lvpruning"])
    def test_batch_with_pads(self, plan, built, pictures):
        questions = ["What is here?", "Is it?", "What is there to be seen in both of these two?"]
        images = [pictures[0], None, pictures]
        found, wanted = (
            load(built(plan), engine=engine).answer(questions, images, max_new_tokens=6) for engine in ("auto", NEUTRAL)
        )
        assert [each.generation.token_ids for each in found] == [each.generation.token_ids for each in wanted]

    def test_batch_goes_on_behind_a_cache(self, built):
        """Prompts of several rows for several sequences that have some: what ``GroupQueryAttention`` itself refuses."""
        bundle, results = open_bundle(built("none")), []
        for engine in ("onnxruntime", NEUTRAL):
            pipeline = Pipeline(bundle, make_backend(engine, bundle))
            state = pipeline.new_state(3)
            for prompts in ([[5, 6, 7], [8], [9, 10]], [[11], [12], [13]], [[14, 15], [16, 17, 18], [19]]):
                logits, _ = pipeline.forward(state, prompts, Meter())
            results.append(logits.copy())
        np.testing.assert_allclose(results[0], results[1], atol=1e-5 * np.abs(results[1]).max())

    @pytest.mark.parametrize("precision", ["int8", "int4"])
    def test_quantized(self, precision, tiny_bundle, tmp_path):
        """Rounding activations moves logits; by how much the build has measured on harder inputs."""
        quantize(open_bundle(tiny_bundle("lofi")), tmp_path / "bundle", precision)
        result = build_fused(open_bundle(tmp_path / "bundle"))
        allowed = max(segment["difference"] for segment in result["segments"])
        assert allowed <= TOLERANCES[precision]
        found, wanted = (first_logits(tmp_path / "bundle", engine) for engine in ("onnxruntime", NEUTRAL))
        assert np.abs(found - wanted).max() <= 2 * allowed * np.abs(wanted).max()

    def test_fp16_is_computed_in_fp32(self, tiny_bundle, tmp_path):
        """Which is nearer to the FP32 bundle than FP16 is."""
        shutil.copytree(tiny_bundle("uniform", "fp16"), tmp_path / "fp16")
        build_fused(open_bundle(tmp_path / "fp16"))
        wanted = first_logits(tiny_bundle("uniform"), NEUTRAL)
        apart = [np.abs(first_logits(tmp_path / "fp16", e) - wanted).max() for e in ("onnxruntime", NEUTRAL)]
        assert 0 < apart[0] < apart[1]

    def test_parity_with_pytorch(self, call, built, tiny_checkpoint, tmp_path):
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        lines = [{"image": "a.png", "prompt": text} for text in ("What is here?", "What else?")]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
        done = call("verify", built("lofi"), "--reference", tiny_checkpoint, "--data", "data.jsonl", "--json")
        result = json.loads(done.out)
        assert result["engine"].endswith("fused graphs")
        assert result["parity"]["greedy_agreement"] == 1
        assert result["parity"]["kept_equal"] == 1
        assert result["parity"]["max_rel_logit_diff"] < 1e-4  # as the neutral graphs are held


class TestSlot:
    def copy(self, built, tmp_path) -> Path:
        return shutil.copytree(built("lofi"), tmp_path / "bundle")

    def remarks(self, path: Path) -> tuple[str, ...]:
        backend = make_backend("auto", open_bundle(path))
        assert "fused" not in backend.name
        return backend.remarks

    def test_what_was_built(self, call, tiny_bundle, tmp_path):
        shutil.copytree(tiny_bundle("lofi"), tmp_path / "bundle")
        result = json.loads(call("build", "bundle", "--target", "cpu", "--json").out)
        assert [(s["name"], s["built"]) for s in result["segments"]] == [
            ("vision_encoder", True),
            ("decoder_0", True),
            ("decoder_1", True),
        ]
        assert all(0 <= s["difference"] < 1e-5 for s in result["segments"])
        again = call("build", "bundle", "--target", "cpu")
        assert "as it was" in again.err
        assert "difference from neutral" in again.out
        done = call("run", "bundle", "--prompt", "What is here?", "--max-new-tokens", "2", "--json")
        assert json.loads(done.out)["engine"].endswith(", fused graphs")
        weights = sum(file.stat().st_size for file in slot_folder(tmp_path / "bundle").iterdir())
        assert weights < 400_000  # graphs and the tables of positions alone

    def test_operators(self, built):
        kinds = [node.op_type for node in ir.load(slot_folder(built("lofi")) / "decoder_1.onnx").graph]
        assert kinds.count("GroupQueryAttention") == 2
        assert kinds.count("RotaryEmbedding") == 4
        assert kinds.count("FusedMatMul") == 15  # with the head
        assert not {"Softmax", "Pow", "Sigmoid", "Transpose", "Concat", "Cos"} & set(kinds)
        tower = [node.op_type for node in ir.load(slot_folder(built("lofi")) / "vision_encoder.onnx").graph]
        assert tower.count("MultiHeadAttention") == tower.count("QuickGelu") == 2

    def test_other_version(self, built, tmp_path):
        path = self.copy(built, tmp_path)
        file = slot_folder(path) / "slot.json"
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"version": "1.20.0"}))
        (remark,) = self.remarks(path)
        assert "built with onnxruntime 1.20.0" in remark
        assert "--target cpu" in remark

    def test_other_export(self, built, tiny_bundle, tmp_path):
        path = shutil.copytree(tiny_bundle("uniform"), tmp_path / "other")
        shutil.copytree(built("lofi") / "engines", path / "engines")
        (remark,) = self.remarks(path)
        assert "built from another export" in remark

    def test_altered_graph(self, built, tmp_path):
        path = self.copy(built, tmp_path)
        file = slot_folder(path) / "decoder_1.onnx"
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        (remark,) = self.remarks(path)
        assert "decoder_1.onnx was altered" in remark

    def test_stopped_build_goes_on(self, tiny_bundle, tmp_path, monkeypatch):
        path = shutil.copytree(tiny_bundle("lofi"), tmp_path / "bundle")
        check, seen = fusion_build._check, []

        def stop(bundle, segment, *rest):
            seen.append(segment.name)
            if segment.name == "decoder_1":
                raise KeyboardInterrupt
            return check(bundle, segment, *rest)

        monkeypatch.setattr(fusion_build, "_check", stop)
        with pytest.raises(KeyboardInterrupt):
            build_fused(open_bundle(path))
        assert find_fused(open_bundle(path), "1") == (None, ())
        assert self.remarks(path) == ()
        monkeypatch.setattr(fusion_build, "_check", check)
        built_now = {s["name"]: s["built"] for s in build_fused(open_bundle(path))["segments"]}
        assert built_now == {"vision_encoder": False, "decoder_0": False, "decoder_1": True}
        assert "fused" in make_backend("auto", open_bundle(path)).name

    @pytest.mark.parametrize("wrong", ["position", "scale", "norm"])
    def test_wrong_graph_is_caught(self, wrong, tiny_bundle, tmp_path, monkeypatch):
        path = shutil.copytree(tiny_bundle("lofi"), tmp_path / "bundle")
        fuse = fusion_build.fuse

        def spoil(model, *rest):
            fuse(model, *rest)
            kind, name, number = {
                "scale": ("GroupQueryAttention", "scale", 0.24),
                "norm": ("SkipSimplifiedLayerNormalization", "epsilon", 1e-2),
                "position": ("", "", 0.0),
            }[wrong]
            for node in model.graph:
                if node.op_type == kind:
                    node.attributes[name] = ir.AttrFloat32(name, number)

        monkeypatch.setattr(fusion_build, "fuse", spoil)
        tables = rules.rotary_tables
        if wrong == "position":
            monkeypatch.setattr(rules, "rotary_tables", lambda *given: tuple(t[::-1].copy() for t in tables(*given)))
        with pytest.raises(UserError, match=r"fused decoder_0 differs from .*1e-04 is allowed.*onnxruntime-neutral"):
            build_fused(open_bundle(path))
        assert find_fused(open_bundle(path), "1") == (None, ())

    def test_plugins_are_refused(self, call, tiny_bundle):
        call("build", tiny_bundle("lofi"), "--target", "cpu", "--plugins", "a.so").refused("--target cpu", "--plugins")

    def test_without_the_export_extra(self, call, tiny_bundle, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("tokprune.export.fusion")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "onnx_ir", None)
        call("build", tiny_bundle("lofi"), "--target", "cpu").refused("needs onnx_ir", "tokprune[export]")

    def test_slots_of_others_are_left_alone(self, built):
        from tokprune.runtime.engines.tensorrt import has_engines

        bundle = open_bundle(built("lofi"))
        assert not has_engines(bundle)
        found, remarks = find_fused(bundle, json.loads((slot_folder(bundle.path) / "slot.json").read_text())["version"])
        assert found is not None
        assert (found.slot.library, found.slot.arch, remarks) == (LIBRARY, ARCH, ())
