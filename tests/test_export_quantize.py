"""Bundles in INT8 and INT4: their bytes, their answers against PyTorch with the same matrices, and who refuses what."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import LAYERS, PLANS, redraw_checkpoint
from PIL import Image

from tokprune.export.checkpoint import find_checkpoint, load_model
from tokprune.export.pipeline import export
from tokprune.export.quantize import WEIGHTS, quantize
from tokprune.export.restore import bundle_matrices
from tokprune.export.truncate import truncate
from tokprune.export.verify import verify
from tokprune.export.weights import canonical
from tokprune.runtime import ort
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.chat import Model, load
from tokprune.runtime.data import Sample
from tokprune.runtime.engines import compiler, versions
from tokprune.runtime.engines.profiles import segment_profiles
from tokprune.runtime.errors import UserError
from tokprune.runtime.memory import from_manifest, memory_plan
from tokprune.runtime.recipe import read_recipe
from tokprune.runtime.weights import closed_weights, is_head

INTEGERS = ("int8", "int4")


@pytest.fixture(scope="module")
def quantized(tiny_bundle, tmp_path_factory: pytest.TempPathFactory):
    """Gives the bundle of one of ``PLANS`` in INT8 or INT4 on FP32, to be read only."""
    folder = tmp_path_factory.mktemp("quantized")

    def bundle(plan: str, precision: str) -> Path:
        path = folder / f"{plan}-{precision}"
        if not path.exists():
            quantize(open_bundle(tiny_bundle(plan)), path, precision)
        return path

    return bundle


@pytest.fixture
def half(tiny_bundle) -> Path:
    return tiny_bundle("lofi", "fp16")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 81, 3), dtype=np.uint8)).save(path)
    return [Sample("What digit is red?", (path,), "7"), Sample("No picture here?")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("precision", INTEGERS)
class TestBundle:
    def test_holds_what_it_needs_and_no_more(self, tiny_bundle, quantized, precision: str) -> None:
        before, after = open_bundle(tiny_bundle("lofi")), open_bundle(quantized("lofi", precision), check_hashes=True)
        assert (after.manifest.precision, after.manifest.base) == (precision, "fp32")
        assert after.manifest.segments == before.manifest.segments  # tensors and FLOPs are the same
        assert {path.name for path in after.path.iterdir()} == {
            *(file.path for file in after.manifest.files),
            "tokprune.json",
        }
        read = sum(weights.total for weights in after.manifest.memory)
        assert abs(read - after.file(WEIGHTS).stat().st_size) < 10_000  # constants in graphs; what aligns weights
        assert sum(file.size for file in before.manifest.files) > sum(file.size for file in after.manifest.files)

    def test_bytes_are_those_of_the_plan(self, quantized, precision: str) -> None:
        """The manifest counts the graphs' weights, the memory plan computes them."""
        manifest = open_bundle(quantized("lofi-2", precision)).manifest
        planned = closed_weights(manifest.model, manifest.plan, precision, "fp32")
        for found, wanted in zip(manifest.memory, planned, strict=True):
            if found.segment.startswith("decoder"):
                constants = found.total - wanted.total  # of shapes and masks
                assert 0 <= constants < 1000, found.segment
        plan = from_manifest(manifest)
        fp32 = memory_plan(manifest.model, manifest.plan, "fp32", plan.work, capacity=plan.capacity)
        assert (plan.caches, plan.activations) == (fp32.caches, fp32.activations)
        assert plan.tensorrt_bytes < fp32.tensorrt_bytes

    def test_twice_the_same_bytes(self, tiny_bundle, quantized, tmp_path: Path, precision: str) -> None:
        quantize(open_bundle(tiny_bundle("lvpruning")), tmp_path / "again", precision)
        assert contents(tmp_path / "again") == contents(quantized("lvpruning", precision))

    def test_export_does_the_same(
        self, tiny_checkpoint: Path, export_traced, half: Path, tmp_path: Path, precision: str
    ) -> None:
        quantize(open_bundle(half), tmp_path / "two steps", precision)
        steps: list[str] = []
        checkpoint = find_checkpoint(str(tiny_checkpoint))
        export_traced(checkpoint, PLANS["lofi"], tmp_path / "one", precision=precision, progress=steps.append)
        assert contents(tmp_path / "one") == contents(tmp_path / "two steps")
        assert sorted(steps[-LAYERS:]) == [f"layers.{layer} in {precision}" for layer in (0, 1, 2)]
        assert {path.name for path in tmp_path.iterdir()} == {"one", "two steps"}

    def test_matrices_are_the_checkpoints_but_for_rounding(
        self, quantized, tiny_checkpoint: Path, precision: str
    ) -> None:
        """Against the checkpoint's own, by name: the worst weight within half a step, the mean error by the recipe."""
        bundle = open_bundle(quantized("lofi", precision))
        recipe = read_recipe(bundle)
        model = load_model(find_checkpoint(str(tiny_checkpoint)), dtype=torch.float32)
        own = {canonical(name): tensor.numpy() for name, tensor in model.state_dict().items()}
        found = dict(bundle_matrices(bundle, recipe))
        assert list(found) != []
        assert len(found) == len(recipe.rounded) == 7 * LAYERS
        for matrix in recipe.rounded:
            weights, restored = own[matrix.name].astype(np.float64), found[matrix.name]
            blocks = np.abs(weights).reshape(len(weights), -1, matrix.record.block).max(axis=2)
            steps = np.repeat(blocks / (127 if precision == "int8" else 7), matrix.record.block, axis=1)
            assert (np.abs(weights - restored) <= steps * 0.500001).all(), matrix.name
            ratio = 10 * np.log10(np.square(weights).sum() / np.square(weights - restored).sum())
            assert ratio == pytest.approx(matrix.record.sqnr_db, abs=1e-4)
            assert ratio > (38 if precision == "int8" else 18)
            assert matrix.record.bytes == matrix.shape[0] * matrix.shape[1] * (8 if precision == "int8" else 4) // 8 + (
                4 * matrix.shape[0] * matrix.shape[1] // matrix.record.block
            )

    def test_everything_else_is_the_same(self, tiny_bundle, quantized, precision: str) -> None:
        before, after = open_bundle(tiny_bundle("none")), open_bundle(quantized("none", precision))
        for segment in before.manifest.segments:
            old, new = (ir.load(bundle.file(segment.file)).graph for bundle in (before, after))
            for name, value in new.initializers.items():
                if not name.endswith((".codes", ".scales")):
                    expected = old.initializers[name].const_value.numpy()
                    np.testing.assert_array_equal(value.const_value.numpy(), expected)
            assert "lm_head.weight" in new.initializers or segment.layers is None


class TestParity:
    """Verify compares with PyTorch that has the bundle's own matrices, so that any other difference is a fault."""

    @pytest.mark.parametrize("plan", ["none", "lofi", "lvpruning", "fastv", "random-0"])
    @pytest.mark.parametrize("precision", INTEGERS)
    def test_exact_where_activations_stay(
        self, quantized, tiny_checkpoint, samples, monkeypatch, plan: str, precision: str
    ) -> None:
        monkeypatch.setitem(ort.ACCURACY, precision, 1)
        checkpoint = find_checkpoint(str(tiny_checkpoint))
        result, outcomes = verify(load(quantized(plan, precision)), checkpoint, samples, max_new_tokens=4)
        assert result["parity"]["max_abs_logit_diff"] < 2e-4  # FP32 against FP32, logits of some 10
        assert result["parity"]["greedy_agreement"] == result["parity"]["kept_equal_margin"] == 1
        assert (result["precision"], result["base"]) == (precision, "fp32")
        assert result["consistency"]["kl_mean"] > 1e-6  # to the original, which has other matrices
        assert len(outcomes) == 2

    def test_close_where_activations_are_rounded(self, quantized, tiny_checkpoint, samples) -> None:
        """As it runs: INT8 products of ONNX Runtime round what they read, by 1 part in 254 of a block's largest."""
        model = load(quantized("none", "int8"))
        assert ort.INTEGER in model.pipeline.backend.remarks
        result, _ = verify(model, find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=4)
        assert 1e-4 < result["parity"]["max_rel_logit_diff"] < 0.1
        assert ort.INTEGER not in load(quantized("none", "int4")).pipeline.backend.remarks

    @pytest.mark.parametrize("precision", INTEGERS)
    def test_on_fp16(self, half, tiny_checkpoint, samples, tmp_path, monkeypatch, precision: str) -> None:
        """Against PyTorch in FP32: what is left are the other weights' and the states' rounding to FP16."""
        monkeypatch.setitem(ort.ACCURACY, precision, 1)
        quantize(open_bundle(half), tmp_path / "bundle", precision)
        result, _ = verify(load(tmp_path / "bundle"), find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=4)
        assert result["parity"]["max_rel_logit_diff"] < 0.02

    def test_first_layers_alone(self, quantized, tiny_checkpoint, samples, tmp_path, monkeypatch) -> None:
        checkpoint = find_checkpoint(str(tiny_checkpoint))
        checkpoint = dataclasses.replace(checkpoint, facts=dataclasses.replace(checkpoint.facts, layers=2))
        model = Model(truncate(open_bundle(quantized("lofi", "int4")), 2, tmp_path), "onnxruntime", 0, None)
        result, _ = verify(model, checkpoint, samples, max_new_tokens=4)
        assert result["parity"]["max_abs_logit_diff"] < 2e-4


def test_a_matrix_that_no_block_divides_stays(tiny_checkpoint, samples, tmp_path, monkeypatch) -> None:
    odd = redraw_checkpoint(tiny_checkpoint, tmp_path / "model", text={"intermediate_size": 100})
    checkpoint = find_checkpoint(str(odd))
    export(checkpoint, PLANS["none"], tmp_path / "bundle", precision="int4", base="fp32")
    recipe = read_recipe(open_bundle(tmp_path / "bundle"))
    stay = [matrix for matrix in recipe.matrices if matrix.record.reason]
    assert [matrix.name.rpartition("layers.")[2] for matrix in stay] == [f"{i}.mlp.down_proj.weight" for i in range(3)]
    records = {(m.record.precision, m.record.block, m.record.sqnr_db, m.record.bytes) for m in stay}
    assert records == {("fp32", None, None, 4 * 64 * 100)}
    assert stay[0].record.reason == "its input of 100 has no block of 16 to 128 weights"
    result, _ = verify(load(tmp_path / "bundle"), checkpoint, samples, max_new_tokens=4)
    assert result["parity"]["max_abs_logit_diff"] < 2e-4


class TestHead:
    """``lm_head`` in INT8, whole and in pieces."""

    @pytest.fixture(scope="class")
    @classmethod
    def bundles(cls, tiny_checkpoint: Path, export_traced, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        folder, checkpoint = tmp_path_factory.mktemp("heads"), find_checkpoint(str(tiny_checkpoint))
        for pieces in (1, 3):
            path = folder / str(pieces)
            options = {"precision": "int4", "base": "fp32", "head": "int8", "head_pieces": pieces}
            export_traced(checkpoint, PLANS["lofi"], path, **options)
        return [folder / "1", folder / "3"]

    def test_pieces_are_the_whole(self, bundles: list[Path]) -> None:
        """A scale belongs to a row, so a piece has the codes that its rows have in the whole."""
        whole, pieces = (
            [matrix for matrix in read_recipe(open_bundle(path)).rounded if is_head(matrix.name)] for path in bundles
        )
        assert [matrix.shape for matrix in (*whole, *pieces)] == [(576, 64), (192, 64), (192, 64), (192, 64)]
        assert sum(matrix.record.bytes for matrix in pieces) == whole[0].record.bytes == 576 * 64 + 576 * 4
        assert {matrix.record.precision for matrix in (*whole, *pieces)} == {"int8"}
        (found, *_), parts = (
            [
                matrix
                for name, matrix in bundle_matrices(open_bundle(path), read_recipe(open_bundle(path)))
                if is_head(name)
            ]
            for path in bundles
        )
        np.testing.assert_array_equal(found, np.concatenate(parts))

    def test_bytes_are_those_of_the_plan(self, bundles: list[Path]) -> None:
        for path in bundles:
            manifest = open_bundle(path).manifest
            planned = closed_weights(manifest.model, manifest.plan, "int4", "fp32", "int8")
            assert 0 <= manifest.memory[-1].total - planned[-1].total < 1000  # constants of shapes and masks
            stays = closed_weights(manifest.model, manifest.plan, "int4", "fp32")
            assert stays[-1].total - planned[-1].total == 576 * (4 * 64 - 64 - 4)

    def test_parity(self, bundles: list[Path], tiny_checkpoint, samples, monkeypatch) -> None:
        monkeypatch.setitem(ort.ACCURACY, "int8", 1)
        for path in bundles:
            result, _ = verify(load(path), find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=4)
            assert result["parity"]["max_abs_logit_diff"] < 2e-4

    def test_level_is_the_segments(self, bundles: list[Path]) -> None:
        """INT8 is in the last decoder only, so the first one's products stay exact."""
        bundle = open_bundle(bundles[1])
        backend = load(bundles[1]).pipeline.backend
        entry = "session.qdq_matmulnbits_accuracy_level"
        segments = bundle.manifest.segments
        levels = {each.name: backend.segment_options(bundle, each).get_session_config_entry(entry) for each in segments}
        assert {name for name, level in levels.items() if level == "4"} == {"decoder_1"}
        assert ort.INTEGER in backend.remarks


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.skipif(compiler.missing_modules(versions.RTX) != [], reason="needs the extra rtx")
def test_nvidia_builds_every_decoder(half: Path, tmp_path: Path, precision: str) -> None:
    """On FP16, with the profiles that an engine has on a device."""
    manifest, _ = quantize(open_bundle(half), tmp_path / "bundle", precision)
    for segment in manifest.segments:
        if segment.layers is not None:
            profiles = list(segment_profiles(manifest, segment).values())
            report = compiler.build(tmp_path / "bundle" / segment.file, tmp_path / segment.name, profiles)
            assert report.refusals == (), segment.name
            assert (tmp_path / segment.name).stat().st_size > 0


class TestFaults:
    def test_already_quantized(self, quantized, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is in int8 already, int4 is made from FP32 or FP16"):
            quantize(open_bundle(quantized("none", "int8")), tmp_path / "out", "int4")
        assert not list(tmp_path.iterdir())

    def test_weight_that_is_not_finite(self, tiny_bundle, tmp_path: Path) -> None:
        bundle = open_bundle(tiny_bundle("none"))
        graph = ir.load(bundle.file("decoder_0.onnx")).graph
        tensor = graph.initializers["language_model.layers.1.mlp.up_proj.weight"].const_value
        copy = tmp_path / "bundle"
        copy.mkdir()
        for path in bundle.path.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        with (copy / tensor.location).open("r+b") as file:
            file.seek(tensor.offset + 4 * 70)
            file.write(np.float32(np.nan).tobytes())
        altered = type(bundle)(copy, bundle.manifest)
        with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has a value that is not finite"):
            quantize(altered, tmp_path / "out", "int4")
        assert not (tmp_path / "out").exists()

    def test_recipe_of_other_blocks(self, quantized, tiny_checkpoint, samples, tmp_path: Path) -> None:
        bundle = open_bundle(quantized("none", "int4"))
        recipe = read_recipe(bundle)
        other = json.loads(recipe.to_json())
        (matrix,) = [m for m in other["matrices"] if m["name"] == "language_model.layers.0.self_attn.o_proj.weight"]
        matrix["record"]["block"] = 16
        path = tmp_path / "bundle"
        path.mkdir()
        for file in bundle.path.iterdir():
            os.link(file, path / file.name)
        (path / "recipe.json").unlink()
        (path / "recipe.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"recipe.json was altered|recipe.json has .* bytes"):
            load(path)
        # with a manifest that goes along
        model = Model(type(bundle)(path, bundle.manifest), "onnxruntime", 0, None)
        with pytest.raises(UserError, match=r"decoder_0.onnx has not .*o_proj.weight as the recipe says"):
            verify(model, find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=1)
