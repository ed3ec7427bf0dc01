"""Bundles whose matrices were rounded by what was seen of activations: AWQ, and SmoothQuant with INT8 activations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import LAYERS
from PIL import Image

from tokprune.calibration.calibrated import Calibrated
from tokprune.calibration.observe import Settings, observe
from tokprune.calibration.patterns import find_patterns
from tokprune.calibration.recipe import usual_choices, usual_form
from tokprune.export.checkpoint import find_checkpoint, load_model
from tokprune.export.fusion.build import build_fused
from tokprune.export.fusion.check import TOLERANCES
from tokprune.export.quantize import find_matrices, quantize
from tokprune.export.restore import bundle_matrices, entering_scales, folded_tensors, rounded_twin, with_matrices
from tokprune.export.segments import VisionEncoder
from tokprune.export.sides import Engine
from tokprune.export.verify import verify
from tokprune.runtime import ort
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.chat import load
from tokprune.runtime.data import Sample
from tokprune.runtime.engines import compiler, versions
from tokprune.runtime.engines.profiles import segment_profiles
from tokprune.runtime.errors import UserError
from tokprune.runtime.pipeline import Meter
from tokprune.runtime.recipe import Activation, Choice, read_recipe
from tokprune.runtime.weights import closed_weights

TOWER = 2 * 6 + 2  # matrices of the tower's layers that run, and of the projector
FORMS = {"w8a8": ("int8", "smoothquant"), "w4a16": ("int4", "awq"), "w8a16": ("int8", "awq")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = []
    for number in range(4):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(path)
        found.append(Sample("What digit is red?" + " And blue?" * number, (path,), "7"))
    return found


@pytest.fixture(scope="module")
def base(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle "lofi" in FP32, to be observed."""
    path = tmp_path_factory.mktemp("base") / "bundle"
    shutil.copytree(tiny_bundle("lofi"), path)
    return open_bundle(path)


def choices_of(base: Bundle, form: str) -> dict[str, Choice]:
    precision, scheme = FORMS[form]
    return usual_choices(list(find_matrices(base)), precision, form=usual_form(scheme))


@pytest.fixture(scope="module")
def make(base: Bundle, samples: list[Sample]) -> Callable[[str, Path], Bundle]:
    def write(form: str, out: Path) -> Bundle:
        choices = choices_of(base, form)
        scheme = Calibrated(base, choices, observe(base, samples, Settings(4)))
        quantize(base, out, FORMS[form][0], choices, scheme)
        return open_bundle(out, check_hashes=True)

    return write


@pytest.fixture(scope="module")
def made(make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Gives the bundle of one of ``FORMS``, to be read only."""
    folder = tmp_path_factory.mktemp("made")
    return lambda form: open_bundle(folder / form) if (folder / form).exists() else make(form, folder / form)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logits(bundle: Bundle, sample: Sample) -> np.ndarray:
    model = load(bundle.path)
    features = model.pipeline.encode_images(model.pixels(list(sample.images)), Meter())
    found, _ = model.pipeline.forward(
        model.pipeline.new_state(), [model.prompt(sample.prompt, 1)], Meter(), image_features=features
    )
    return found


class Folding:
    """A scheme that changes tensors as another does, and rounds nothing."""

    def __init__(self, scheme: Calibrated) -> None:
        self.change, self.alpha = scheme.change, scheme.alpha

    def activation(self, matrix: str) -> Activation | None:
        return None

    def output_sqnr_db(self, matrix: str) -> float | None:
        return None


@pytest.mark.parametrize("form", FORMS)
def test_folding_changes_no_answer(base: Bundle, samples, tmp_path: Path, form: str) -> None:
    """All factors folded, nothing rounded, in FP32: the same function, to FP32's rounding."""
    choices = choices_of(base, form)
    scheme = Calibrated(base, choices, observe(base, samples, Settings(4)))
    factors = [scheme.change(name) for name in choices]
    assert any(change is not None and np.ptp(change.columns) > 0.1 for change in factors if change is not None)
    quantize(base, tmp_path / "out", "int8", {name: Choice() for name in choices}, Folding(scheme))
    before, after = logits(base, samples[1]), logits(open_bundle(tmp_path / "out"), samples[1])
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("form", FORMS)
class TestBundle:
    def test_twice_the_same_bytes(self, made, make, tmp_path: Path, form: str) -> None:
        assert contents(make(form, tmp_path / "again").path) == contents(made(form).path)

    def test_recipe_says_it_all(self, made, form: str) -> None:
        bundle, (precision, scheme) = made(form), FORMS[form]
        recipe = read_recipe(bundle)
        assert recipe is not None
        assert len(recipe.rounded) == 7 * LAYERS + (TOWER if form == "w8a8" else 0)
        for matrix in recipe.rounded:
            assert (matrix.record.precision, matrix.choice.scheme) == (precision, scheme), matrix.name
            assert (matrix.record.activation is not None) == (form == "w8a8")
            assert matrix.record.sqnr_db > (30 if precision == "int8" else 15), matrix.name
            assert matrix.record.output_sqnr_db > (28 if precision == "int8" else 14), matrix.name
        without = {matrix.name for matrix in recipe.rounded if matrix.record.alpha is None}
        nowhere = ("fc2.weight", "linear_1.weight", "linear_2.weight")
        assert {name for name in without if name.endswith(nowhere)} == (
            {name for name in (matrix.name for matrix in recipe.rounded) if name.endswith(nowhere)}
        )
        if form == "w8a8":
            assert without == {name for name in without if name.endswith(nowhere)}
            assert {matrix.record.alpha for matrix in recipe.rounded} == {None, 0.7}
        text = (bundle.path / "recipe.json").read_text()
        assert recipe.to_json() == text
        assert json.loads(text)["folded"] == sorted(recipe.folded)

    def test_every_pair_is_one_that_tensorrt_fuses(self, made, form: str) -> None:
        bundle, found = made(form), Counter()
        for segment in bundle.manifest.segments:
            model = ir.load(bundle.file(segment.file))
            found.update(find_patterns(model).values())
            assert model.graph.opset_imports[""] == (21 if form == "w4a16" and segment.layers else 20)
        assert found == {form.upper(): 7 * LAYERS + (TOWER if form == "w8a8" else 0)}

    def test_memory_is_exact(self, made, form: str) -> None:
        manifest = made(form).manifest
        tower = "int8" if form == "w8a8" else None
        planned = closed_weights(manifest.model, manifest.plan, FORMS[form][0], "fp32", tower=tower)
        for found, wanted in zip(manifest.memory, planned, strict=True):
            assert 0 <= found.total - wanted.total < 1100, (
                found.segment
            )  # constants of shapes, masks; the scales of pairs

    @pytest.mark.skipif(compiler.missing_modules(versions.RTX) != [], reason="needs the extra rtx")
    def test_nvidia_builds_it(self, made, tmp_path: Path, form: str) -> None:
        bundle = made(form)
        for segment in bundle.manifest.segments:
            if segment.layers is not None or segment.name == "vision_encoder":
                profiles = list(segment_profiles(bundle.manifest, segment).values())
                report = compiler.build(bundle.file(segment.file), tmp_path / segment.name, profiles)
                assert report.refusals == (), segment.name
                assert (tmp_path / segment.name).stat().st_size > 0


class TestActivations:
    def test_run_in_integers(self, made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """ONNX Runtime makes an integer product of each, and dequantises no matrix."""
        bundle, backend, found = made("w8a8"), ort.OnnxRuntime(), Counter()
        keep = ort._keep_pairs

        def keep_and_save(options) -> None:
            keep(options)
            options.optimized_model_filepath = str(tmp_path / "optimised.onnx")

        monkeypatch.setattr(ort, "_keep_pairs", keep_and_save)
        for segment in bundle.manifest.segments:
            if segment.layers is not None or segment.name == "vision_encoder":
                backend.load(bundle, segment)
                graph = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph
                found.update(node.op_type for node in graph.node)
        assert found["MatMulIntegerToFloat"] == 7 * LAYERS + TOWER
        assert found["DequantizeLinear"] == found["MatMulNBits"] == 0
        assert backend.remarks == ()  # nothing is rounded that the graph does not round

    def test_parity_is_with_the_same_rounding(self, made, tiny_checkpoint: Path, samples) -> None:
        """PyTorch rounds the same activations: image features are the bundle's but for some codes next to a tie.

        Where two FP32 sums differ in their last bit a code may be another one, so there is no closer bound behind
        several layers; PyTorch with the same matrices that rounds no activations is far off.
        """
        import torch

        bundle, checkpoint = made("w8a8"), find_checkpoint(str(tiny_checkpoint))
        recipe = read_recipe(bundle)
        assert recipe is not None
        model, torch_model = load(bundle.path), load_model(checkpoint, dtype=torch.float32)
        pixels = model.pixels(list(samples[0].images))
        found = model.pipeline.backend.to_host(model.pipeline.encode_images(pixels, Meter()))

        def distance(twin) -> float:
            with torch.inference_mode():
                expected = VisionEncoder(twin, 2)(torch.from_numpy(pixels)).numpy()
            return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

        rounded = distance(rounded_twin(torch_model, bundle, recipe))
        others = itertools.chain(bundle_matrices(bundle, recipe), folded_tensors(bundle, recipe))
        assert rounded < 0.25 * distance(with_matrices(torch_model, others))
        assert rounded < 2e-3

    def test_verify(self, made, tiny_checkpoint: Path, samples) -> None:
        result, _ = verify(load(made("w8a8").path), find_checkpoint(str(tiny_checkpoint)), samples, max_new_tokens=3)
        assert result["parity"]["cosine_min"] > 0.99
        assert result["parity"]["not_finite"] == 0

    def test_recipe_with_other_scales(self, made, tmp_path: Path) -> None:
        shutil.copytree(made("w8a8").path, tmp_path / "bundle")
        bundle = open_bundle(tmp_path / "bundle")
        recipe = read_recipe(bundle)
        assert recipe is not None
        assert len(entering_scales(bundle, recipe)) == 7 * LAYERS + TOWER
        model = ir.load(bundle.file("decoder_0.onnx"))
        name = "language_model.layers.0.self_attn.o_proj.weight"
        model.graph.initializers[f"{name}.activation"].const_value = ir.tensor(np.array(7, np.float32))
        ir.save(model, bundle.file("decoder_0.onnx"))
        with pytest.raises(UserError, match=r"o_proj\.weight is multiplied with by 7\.0, its recipe says 0"):
            entering_scales(bundle, recipe)

    def test_folded_tensor_that_is_not_there(self, made) -> None:
        bundle = made("w8a8")
        recipe = read_recipe(bundle)
        assert recipe is not None
        assert dict(folded_tensors(bundle, recipe)).keys() == set(recipe.folded)
        with pytest.raises(UserError, match=r"recipe\.json speaks of nothing\.weight, which no graph reads"):
            list(folded_tensors(bundle, dataclasses.replace(recipe, folded=("nothing.weight",))))


def test_fused_graphs_compute_in_integers_too(made, samples, tmp_path):
    """Rounding takes most of what differs; where it does not, a last bit changes a code."""
    path = shutil.copytree(made("w8a8").path, tmp_path / "bundle")
    result = build_fused(open_bundle(path))
    assert max(segment["difference"] for segment in result["segments"]) <= TOLERANCES["int8"]
    (folder,) = (path / "engines").iterdir()
    for segment in result["segments"]:
        file = f"{segment['name']}.onnx"
        neutral, fused = (Counter(node.op_type for node in ir.load(where / file).graph) for where in (path, folder))
        assert fused["QuantizeLinear"] == neutral["QuantizeLinear"] > 0
    sides = [Engine(load(path, engine=engine), 4) for engine in ("onnxruntime", "onnxruntime-neutral")]
    tokens = sides[1].greedy(samples)
    found, wanted = (side.forced(samples, tokens) for side in sides)
    for (logits, kept), (expected, others) in zip(found, wanted, strict=True):
        assert np.abs(logits - expected).max() <= 0.02 * np.abs(expected).max()
        assert [each.indices.tolist() for each in kept] == [each.indices.tolist() for each in others]
