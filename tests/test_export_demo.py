"""The demo model: its scenes keep their rules, its data has its format, its checkpoint loads and answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokprune.export.demo import checkpoint_dir
from tokprune.export.demo import scenes as s
from tokprune.runtime.errors import UserError

pytest.importorskip("sklearn", reason="scenes draw scikit-learn's digits")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread: where cores are shared, threads that spin for a second one cost three times the time."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_scene(seed: int, digits: int) -> s.Scene:
    return s.make_scene(np.random.default_rng(seed), held_out=True, digits=digits)


class TestScenes:
    def test_follow_from_the_seed(self) -> None:
        once, again, other = a_scene(3, 4), a_scene(3, 4), a_scene(4, 4)
        assert once.digits == again.digits
        assert np.array_equal(once.pixels, again.pixels)
        assert not np.array_equal(once.pixels, other.pixels)

    def test_splits_share_no_digit(self) -> None:
        train, held_out = s.split_indices(held_out=False), s.split_indices(held_out=True)
        assert (train.start, train.stop, held_out.start, held_out.stop) == (0, 1500, 1500, 1797)
        assert not set(train) & set(held_out)
        assert sum(map(len, s._glyphs(False))) == 1500
        assert sum(map(len, s._glyphs(True))) == 297

    @pytest.mark.parametrize("digits", [1, 2, 3, 4])
    def test_geometry(self, digits: int) -> None:
        for seed in range(25):
            scene = a_scene(seed, digits)
            assert scene.pixels.shape == (336, 336, 3)
            assert scene.pixels.dtype == np.uint8
            assert len({d.value for d in scene.digits}) == len({d.ink for d in scene.digits}) == digits
            for i, d in enumerate(scene.digits):
                assert 56 <= d.height <= 84
                assert d.top >= 0 <= d.left
                assert d.top + d.height <= 336 >= d.left + d.width
                for e in scene.digits[:i]:
                    apart_y = d.top + d.height <= e.top or e.top + e.height <= d.top
                    apart_x = d.left + d.width <= e.left or e.left + e.width <= d.left
                    assert apart_y or apart_x

    def test_highest_and_leftmost_lead_by_edge_and_centre(self) -> None:
        for seed in range(25):
            scene = a_scene(seed, 3)
            for d in set(scene.digits) - {scene.highest}:
                assert d.top - scene.highest.top >= s.MARGIN
                assert d.middle[0] - scene.highest.middle[0] >= s.MARGIN
            for d in set(scene.digits) - {scene.leftmost}:
                assert d.left - scene.leftmost.left >= s.MARGIN
                assert d.middle[1] - scene.leftmost.middle[1] >= s.MARGIN

    def test_ink_is_where_it_is_said_to_be(self) -> None:
        scene = a_scene(0, 2)
        for k, d in enumerate(scene.digits):
            box = scene.ink[d.top : d.top + d.height, d.left : d.left + d.width]
            region = scene.pixels[d.top : d.top + d.height, d.left : d.left + d.width]
            solid = region[box > 250].astype(float).mean(0)
            nearest = min(s.INKS, key=lambda name: float(np.abs(solid - np.array(s.INKS[name])).sum()))
            assert nearest == d.ink
            assert scene.cover[k].sum() * s.PATCH**2 == pytest.approx((box / 255).sum(), rel=1e-3)


class TestQuestions:
    def test_forms_take_turns_and_yes_balances_no(self) -> None:
        asked = [q for _, _, q in s.held_out_questions(240, seed=8)]
        assert set(Counter(q.form for q in asked).values()) == {40}
        assert Counter(q.answer for q in asked if q.form == "exists") == {"yes": 20, "no": 20}
        assert all(q.answer in s.ANSWERS for q in asked)

    def test_answers_are_the_scenes(self) -> None:
        for _, scene, q in s.held_out_questions(120, seed=9):
            word = q.prompt.rstrip("?").split()[-1]
            expected = {
                "digit": lambda w, scene: next(str(d.value) for d in scene.digits if d.ink == w),
                "color": lambda w, scene: next(d.ink for d in scene.digits if str(d.value) == w),
                "count": lambda w, scene: str(len(scene.digits)),
                "highest": lambda w, scene: str(min(scene.digits, key=lambda d: d.middle[0]).value),
                "leftmost": lambda w, scene: str(min(scene.digits, key=lambda d: d.middle[1]).value),
                "exists": lambda w, scene: "yes" if w in [str(d.value) for d in scene.digits] else "no",
            }[q.form](word, scene)
            assert q.answer == expected


class TestDemoData:
    def test_writes_what_it_says(self, tmp_path: Path) -> None:
        lines = s.demo_data(14, tmp_path / "data", seed=2).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 14
        for row in rows:
            assert {"image", "prompt", "answer"} <= set(row)
            assert "USER" not in row["prompt"]
            with Image.open(tmp_path / "data" / row["image"]) as image:
                assert image.size == (336, 336)
        assert len({row["image"] for row in rows}) < len(rows)
        again = s.demo_data(14, tmp_path / "again", seed=2)
        assert again.read_text().splitlines() == lines
        assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "data"]

    @pytest.mark.parametrize("held_out", [True, False])
    def test_splits_share_no_handwriting(self, held_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[bool] = []
        glyphs = s._glyphs
        monkeypatch.setattr(s, "_glyphs", lambda held_out: asked.append(held_out) or glyphs(held_out))
        s.demo_data(3, tmp_path / "data", held_out=held_out)
        assert set(asked) == {held_out}
        assert not set(s.split_indices(True)) & set(s.split_indices(False))

    def test_refuses_a_directory_with_content(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        with pytest.raises(UserError, match="not empty"):
            s.demo_data(3, tmp_path)
        assert (tmp_path / "mine.txt").read_text() == "keep"

    def test_refuses_no_questions(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="at least 1"):
            s.demo_data(0, tmp_path / "data")


class TestCheckpoint:
    def test_is_small_and_complete(self) -> None:
        files = {f.name: f.stat().st_size for f in checkpoint_dir().iterdir()}
        assert sum(files.values()) <= 12_000_000
        assert {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "processor_config.json",
            "preprocessor_config.json",
            "generation_config.json",
            "training.json",
        } <= set(files)

    def test_loads_with_plain_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
            checkpoint_dir(), output_loading_info=True
        )
        assert not any(report.values()), report
        config = model.config
        assert config.text_config.num_hidden_layers >= 8
        assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
        assert (config.vision_config.image_size, config.vision_config.patch_size) == (336, 14)

    def test_prompt_and_answers_tokenise(self) -> None:
        transformers = pytest.importorskip("transformers")
        processor = transformers.AutoProcessor.from_pretrained(checkpoint_dir())
        tokenizer = processor.tokenizer
        for answer in s.ANSWERS:
            assert len(tokenizer(f" {answer}", add_special_tokens=False).input_ids) == 1
        for text in ("Déjà vu: 世界 🙂\n\tok", "What digit is red?"):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
        said = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a 5?"}]}
        prompt = processor.apply_chat_template([said], add_generation_prompt=True)
        assert prompt == "USER: <image>\nIs there a 5? ASSISTANT:"
        inputs = processor(images=Image.new("RGB", (500, 400)), text=prompt, return_tensors="pt")
        image = tokenizer.convert_tokens_to_ids("<image>")
        assert int((inputs["input_ids"] == image).sum()) == 576
        assert int(inputs["input_ids"][0, 0]) == tokenizer.bos_token_id

    @pytest.mark.usefixtures("one_thread")
    def test_answers_held_out_questions(self) -> None:
        """A floor far below the recorded score: 60 questions have a standard error of about 3 points."""
        pytest.importorskip("transformers")
        from tokprune.export.demo.evaluate import evaluate

        assert evaluate(checkpoint_dir(), n=60, seed=31)["all"] >= 0.85


class TestTraining:
    """The fast forward passes of training are the model's own."""

    @pytest.mark.usefixtures("one_thread")
    def test_packed_questions_match_separate_ones(self) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        from tokprune.export.demo.batches import patch_batch
        from tokprune.export.demo.decoder import Packer, question_logits
        from tokprune.export.demo.model import PROMPT
        from tokprune.export.demo.tower import encode

        processor = transformers.AutoProcessor.from_pretrained(checkpoint_dir())
        model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint_dir(), dtype=torch.float32).eval()
        scene = a_scene(5, 3)
        asked = [("What digit is red?", "3"), ("How many digits are there?", "3"), ("Is there a 7?", "no")]
        batch = patch_batch([scene], s.GRID**2, np.random.default_rng(0))
        packer, cells = Packer(processor.tokenizer), torch.from_numpy(batch.cells)
        with torch.no_grad():
            features = encode(model.model.vision_tower, batch.patches(), cells)[0]
            packed = question_logits(model, packer, features, cells, packer.pack([asked]))
            for row, (prompt, answer) in enumerate(asked):
                text = PROMPT.format(question=prompt) + " " + answer
                inputs = processor(images=Image.fromarray(scene.pixels), text=text, return_tensors="pt")
                expected = model(**inputs).logits[0, -2:]
                # FP32 sums in another order over 588 tokens and 14 layers
                torch.testing.assert_close(packed[0, row, -2:], expected, rtol=1e-3, atol=1e-3)
