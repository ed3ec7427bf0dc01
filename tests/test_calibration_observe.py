"""What is observed, against PyTorch under the same plan with hooks; interrupted, in pieces, and without pruning."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYERS, TOKENS
from PIL import Image

from tokprune.calibration import observe as module
from tokprune.calibration.observe import Settings, observe
from tokprune.calibration.pieces import cut
from tokprune.calibration.statistics import FOLDER, Statistics
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.chat import Model, load
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.pipeline import Meter

SETTINGS = Settings(samples=6)


@pytest.fixture
def bundle(tiny_bundle, tmp_path: Path) -> Bundle:
    """The bundle "lofi-2", which keeps 9 and 4 visual rows, to be written to."""
    shutil.copytree(tiny_bundle("lofi-2"), tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Six of several lengths, so that batches have pads; one has no image."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = [Sample("No picture here?", answer="4")]
    for number in range(5):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(path)
        found.append(Sample("What digit is red?" + " And blue?" * number, (path,), "7 and 3"[: 2 * number + 1]))
    return found


def seen_in_torch(bundle: Bundle, checkpoint: Path, samples: list[Sample]) -> dict[str, np.ndarray]:
    """All rows [R, C] that each linear layer is given, by its weight's name."""
    import torch
    from torch import nn

    from tokprune.export.checkpoint import find_checkpoint, load_model
    from tokprune.export.reference import Reference
    from tokprune.export.weights import canonical

    model, tokenizer = load_model(find_checkpoint(str(checkpoint)), dtype=torch.float32), load(bundle.path)
    rows: dict[str, list[np.ndarray]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            held = rows.setdefault(canonical(f"{path}.weight"), [])
            layer.register_forward_pre_hook(
                lambda _, args, held=held: held.append(args[0].detach().numpy().reshape(-1, args[0].shape[-1]).copy())
            )
    with Reference(model, bundle.manifest.model, bundle.manifest.plan) as reference:
        for sample in samples:
            pixels = tokenizer.pixels(list(sample.images))
            run, _ = reference.prefill(
                tokenizer.prompt(sample.prompt, len(sample.images)),
                None if pixels is None else torch.from_numpy(pixels),
            )
            for token in tokenizer.tokenizer.encode(f" {sample.answer}", special=False):
                reference.step(run, token)
    return {name: np.concatenate(each) for name, each in rows.items() if each}


def same(one: Statistics, other: Statistics, **tolerance: float) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, seen in one.tensors.items():
        assert seen.count == other.tensors[name].count, name
        for part in ("largest", "total", "sample", "keys"):
            np.testing.assert_allclose(
                getattr(seen, part), getattr(other.tensors[name], part), **{"rtol": 0, **tolerance}, err_msg=name
            )


def test_against_pytorch(bundle: Bundle, tiny_checkpoint: Path, samples: list[Sample]) -> None:
    """Every tensor, pads left out, pruned rows gone, answers read: the same rows. FP32 against FP32."""
    statistics = observe(bundle, samples, SETTINGS)
    expected = seen_in_torch(bundle, tiny_checkpoint, samples)
    names = set(statistics.tensors)
    assert len(names) == 2 * 4 + 2 + LAYERS * 4  # of the tower two layers run
    assert {name for name in names if not name.endswith(("q_proj.weight", "gate_proj.weight"))} <= set(expected)
    for name, seen in statistics.tensors.items():
        rows = expected[name]
        if "vision_tower" in name:
            rows = rows[: seen.count]  # transformers runs the last layer, too, whose rows nobody reads
        assert seen.count == len(rows), name
        np.testing.assert_allclose(seen.largest, np.abs(rows).max(axis=0), rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(seen.mean, np.abs(rows).mean(axis=0), rtol=1e-3, atol=1e-4, err_msg=name)
        distance = np.abs(seen.sample[:, None] - rows[None]).max(axis=2).min(axis=1)
        assert distance.max() < 2e-3, name


def test_layers_see_what_is_kept(bundle: Bundle, samples: list[Sample]) -> None:
    """Behind a stage 16 visual rows of an image are 9, then 4; without pruning they stay 16."""
    counts = {
        through: [
            observe(bundle, samples, Settings(6, through=through))
            .tensors[f"language_model.layers.{layer}.self_attn.q_proj.weight"]
            .count
            for layer in range(LAYERS)
        ]
        for through in ("pruned", "unpruned")
    }
    whole = counts["pruned"][0]
    assert counts["pruned"] == [whole, whole - 5 * (TOKENS - 9), whole - 5 * (TOKENS - 4)]
    assert counts["unpruned"] == 3 * [whole]


def test_unpruned_is_the_model_without_pruning(
    bundle: Bundle, tiny_bundle, tmp_path: Path, samples: list[Sample]
) -> None:
    shutil.copytree(tiny_bundle("none"), tmp_path / "none")
    other = observe(open_bundle(tmp_path / "none"), samples, SETTINGS)
    one = observe(bundle, samples, Settings(6, through="unpruned"))
    for name, seen in one.tensors.items():
        np.testing.assert_allclose(seen.largest, other.tensors[name].largest, rtol=1e-4, atol=1e-5, err_msg=name)


def test_in_pieces_it_is_the_same(bundle: Bundle, samples: list[Sample]) -> None:
    whole = observe(bundle, samples, SETTINGS)
    shutil.rmtree(bundle.path / FOLDER)
    same(whole, observe(bundle, samples, SETTINGS, budget=1), rtol=1e-3, atol=1e-3)


def test_pieces_hold_a_layer_each(bundle: Bundle) -> None:
    import onnx_ir as ir

    for segment in bundle.manifest.segments:
        if segment.layers is not None:
            model = ir.load(bundle.file(segment.file))
            layers = segment.layers[1] - segment.layers[0]
            head = segment.outputs[0].name == "logits"
            pieces = cut(model, 1)
            assert len(pieces) == layers + head
            assert [len(piece.taps) for piece in pieces] == [4] * layers + [0] * head
            (whole,) = cut(model, 1 << 40)
            assert whole.size == sum(piece.size for piece in pieces)


class TestResuming:
    def test_goes_on_where_it_was(self, bundle: Bundle, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
        """Interrupted behind the first batch of 4: the same to the bit as without."""
        monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)

        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            observe(bundle, samples, SETTINGS, interrupt)
        steps: list[tuple[int, int]] = []
        found = observe(bundle, samples, SETTINGS, lambda done, total: steps.append((done, total)))
        assert steps == [(6, 6)]
        shutil.rmtree(bundle.path / FOLDER)
        same(found, observe(bundle, samples, SETTINGS), rtol=0)

    def test_is_used_again(self, bundle: Bundle, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
        found = observe(bundle, samples, SETTINGS)
        monkeypatch.setattr(module, "_read", None)  # nothing runs
        same(found, observe(bundle, samples, SETTINGS), rtol=0)

    @pytest.mark.parametrize("settings", [Settings(5), Settings(6, seed=1), Settings(6, through="unpruned")])
    def test_others_have_files_of_their_own(self, bundle: Bundle, samples: list[Sample], settings: Settings) -> None:
        observe(bundle, samples, SETTINGS)
        observe(bundle, samples, settings)
        assert len(list((bundle.path / FOLDER).iterdir())) == 2


def test_without_answers_some_tokens_are_generated(bundle: Bundle, samples: list[Sample]) -> None:
    asked = [Sample(sample.prompt, sample.images) for sample in samples[1:3]]
    statistics = observe(bundle, asked, Settings(2))
    model: Model = load(bundle.path)
    prompts = [model.prompt(sample.prompt, 1) for sample in asked]
    more = 0
    for sample, prompt in zip(asked, prompts, strict=True):
        state = model.pipeline.new_state()
        features = model.pipeline.encode_images(model.pixels(list(sample.images)), Meter())
        logits, _ = model.pipeline.forward(state, [prompt], Meter(), image_features=features)
        for _ in range(4):
            token = int(logits[0, -1].argmax())
            if token in model.pipeline.facts.eos_token_ids:
                break
            logits, _ = model.pipeline.forward(state, [[token]], Meter())
            more += 1
    seen = statistics.tensors["language_model.layers.0.self_attn.q_proj.weight"]
    assert seen.count == sum(map(len, prompts)) + more


class TestRefuses:
    @pytest.mark.parametrize("count", [0, 7])
    def test_numbers(self, bundle: Bundle, samples: list[Sample], count: int) -> None:
        with pytest.raises(UserError, match=rf"{count} samples were asked for, the data has 6: ask for 1 to 6"):
            observe(bundle, samples, Settings(count))

    def test_a_prompt_that_is_too_long(self, bundle: Bundle) -> None:
        with pytest.raises(UserError, match="give a shorter prompt"):
            observe(bundle, [Sample("digit " * 200)], Settings(1))

    def test_a_bundle_that_cannot_be_written_to(self, bundle: Bundle, samples: list[Sample]) -> None:
        (bundle.path / FOLDER).write_text("no folder")
        with pytest.raises(UserError, match="cannot be written"):
            observe(bundle, samples, SETTINGS)
