"""Sampling, the generation loop and chats, on a tiny bundle and on logits made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokprune.runtime import UserError
from tokprune.runtime.chat import Model, load, pruning_record
from tokprune.runtime.generate import Sampler, Sampling
from tokprune.runtime.layout import left_pad
from tokprune.runtime.pipeline import Meter


@pytest.fixture(scope="module")
def model(tiny_bundle) -> Model:
    return load(tiny_bundle("lofi-2"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


class TestSampler:
    LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3]))

    def test_greedy_takes_the_lowest_of_equals(self):
        assert Sampler(Sampling()).choose(np.array([1.0, 3.0, 3.0])) == 1

    def test_temperature_follows_the_probabilities(self):
        sampler = Sampler(Sampling(temperature=1.0, seed=1))
        drawn = np.bincount([sampler.choose(self.LOGITS) for _ in range(4000)], minlength=4) / 4000
        # four standard deviations of a share over 4000 draws are at most 0.032
        np.testing.assert_allclose(drawn, np.exp(self.LOGITS), atol=0.032)

    def test_low_temperature_is_nearly_greedy(self):
        sampler = Sampler(Sampling(temperature=0.05, seed=1))
        assert {sampler.choose(self.LOGITS) for _ in range(200)} == {1}

    @pytest.mark.parametrize(
        ("top_p", "nucleus"), [(0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {1, 2, 3})]
    )
    def test_nucleus_is_the_smallest_set_that_reaches_top_p(self, top_p, nucleus):
        sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=2))
        assert {sampler.choose(self.LOGITS) for _ in range(400)} == nucleus

    def test_seeds(self):
        draw = lambda seed: [Sampler(s).choose(self.LOGITS) for s in [Sampling(1.0, seed=seed)] for _ in range(1)]  # noqa: E731
        sequences = [[s.choose(self.LOGITS) for _ in range(50)] for s in map(Sampler, [Sampling(1.0, seed=3)] * 2)]
        assert sequences[0] == sequences[1]
        assert len({draw(seed)[0] for seed in range(20)}) > 1

    @pytest.mark.parametrize(
        "bad", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1}]
    )
    def test_bad_settings(self, bad):
        with pytest.raises(UserError, match="was asked for"):
            Sampling(**bad)


class TestForward:
    def test_prefill_in_pieces_equals_prefill_at_once(self, model):
        """Text behind the image may come later: caches, positions and masks must fit together."""
        facts, pipeline = model.pipeline.facts, model.pipeline
        image = [facts.image_token_id] * facts.vision.tokens
        features = np.random.default_rng(1).standard_normal((1, facts.vision.tokens, facts.hidden)).astype(np.float32)
        ids = [0, 7, *image, 9, 10, 11, 12]
        (whole,), _ = pipeline.forward(
            pipeline.new_state(), [ids], Meter(), image_features=features, logits_rows=[-2, -1]
        )
        state = pipeline.new_state()
        cut = len(ids) - 2
        pipeline.forward(state, [ids[:cut]], Meter(), image_features=features)
        for row, token in enumerate(ids[cut:]):
            (step,), _ = pipeline.forward(state, [[token]], Meter())
            np.testing.assert_allclose(step[-1], whole[row], atol=1e-4)
        assert state.positions.tolist() == [len(ids)]

    def test_each_cache_has_its_own_length(self, model):
        facts, pipeline = model.pipeline.facts, model.pipeline
        features = np.zeros((1, facts.vision.tokens, facts.hidden), dtype=np.float32)
        state = pipeline.new_state()
        ids = [0] + [facts.image_token_id] * facts.vision.tokens + [5]
        pipeline.forward(state, [ids], Meter(), image_features=features)
        keeps = [stage.keep for stage in pipeline.manifest.plan.stages]
        assert [mask.shape[1] for mask in state.masks.values()] == [
            2 + facts.vision.tokens,
            *(2 + keep for keep in keeps),
        ]

    def test_two_images_each_keep_their_own(self, model):
        facts, pipeline = model.pipeline.facts, model.pipeline
        n = facts.vision.tokens
        features = np.random.default_rng(2).standard_normal((2, n, facts.hidden)).astype(np.float32)
        ids = [0, *[facts.image_token_id] * n, 8, *[facts.image_token_id] * n, 9]
        _, [pruned] = pipeline.forward(pipeline.new_state(), [ids], Meter(), image_features=features)
        stages = pipeline.manifest.plan.stages
        assert [(p.layer, p.image, p.kept) for p in pruned] == [(s.layer, i, s.keep) for s in stages for i in range(2)]

    def test_fastv_scores_both_images_by_the_one_last_row(self, tiny_bundle):
        """Shares of one row, of which the text has the rest: together below one, not each image's."""
        pipeline = load(tiny_bundle("fastv-2")).pipeline
        facts, n = pipeline.facts, pipeline.facts.vision.tokens
        features = np.random.default_rng(2).standard_normal((2, n, facts.hidden)).astype(np.float32)
        ids = [0, *[facts.image_token_id] * n, 8, *[facts.image_token_id] * n, 9]
        _, [pruned] = pipeline.forward(pipeline.new_state(), [ids], Meter(), image_features=features)
        assert [(p.layer, p.image, p.kept, p.total) for p in pruned] == [
            (1, 0, 9, 16), (1, 1, 9, 16), (2, 0, 4, 9), (2, 1, 4, 9)
        ]  # fmt: skip
        for stage in (pruned[:2], pruned[2:]):
            assert 0 < sum(p.scores.sum() for p in stage) < 1
        for p in pruned:
            best = p.candidates[np.argsort(-p.scores, kind="stable")[: p.kept]]
            assert set(p.indices) == set(best)

    def test_later_stages_keep_a_subset(self, model, picture):
        chat = model.chat()
        list(chat.ask("What is this?", [picture], max_new_tokens=1))
        first, second = chat.last.pruned
        assert set(second.indices) < set(first.indices) < set(range(model.pipeline.facts.vision.tokens))
        np.testing.assert_array_equal(second.candidates, first.indices)

    def test_features_without_image_tokens_are_refused(self, model):
        features = np.zeros((1, 16, model.pipeline.facts.hidden), dtype=np.float32)
        with pytest.raises(ValueError, match="0 images are in the ids"):
            model.pipeline.forward(model.pipeline.new_state(), [[0, 5]], Meter(), image_features=features)


class TestChat:
    def test_second_turn_equals_one_long_prompt(self, model, picture):
        """Reused caches give what one prefill of the whole conversation gives, at the unpruned positions."""
        chat = model.chat()
        list(chat.ask("What digit is red?", [picture], max_new_tokens=4))
        first = chat.last
        list(chat.ask("And blue?", max_new_tokens=4))
        form, tokenizer, pipeline = model.bundle.manifest.prompt, model.tokenizer, model.pipeline
        text = form.user.format(text=form.image + "What digit is red?") + form.assistant
        ids = tokenizer.encode(text)
        at = ids.index(pipeline.facts.image_token_id)
        ids[at : at + 1] = [ids[at]] * pipeline.facts.vision.tokens
        ids += first.token_ids + tokenizer.encode(
            " " + form.user.format(text="And blue?") + form.assistant, special=False
        )
        features = pipeline.encode_images(_pixels(model, picture), Meter())
        (logits,), _ = pipeline.forward(pipeline.new_state(), [ids], Meter(), image_features=features)
        assert int(logits[-1].argmax()) == chat.last.token_ids[0]

    def test_pieces_join_to_the_answer_and_the_record_says_what_happened(self, model, picture):
        chat = model.chat()
        pieces = list(chat.ask("What is this?", [picture], max_new_tokens=6))
        assert "".join(pieces) == model.tokenizer.decode(chat.last.token_ids)
        record = pruning_record(model.pipeline, chat.last.pruned, scores=True)
        assert record["applied"] is True
        assert [(s["kept"], len(s["indices"]), len(s["scores"]), s["total"]) for s in record["stages"]] == [
            (9, 9, 16, 16),
            (4, 4, 9, 9),
        ]

    def test_text_only_runs_unpruned_and_says_so(self, model):
        chat = model.chat()
        list(chat.ask("Hello?", max_new_tokens=2))
        record = pruning_record(model.pipeline, chat.last.pruned)
        assert record == {"applied": False, "reason": "the prompt has no image", "stages": []}
        assert "select_0" not in chat.last.prefill.ms

    def test_fastv_runs_text_only_too(self, tiny_bundle):
        fastv = load(tiny_bundle("fastv"))
        chat, unpruned = fastv.chat(), load(tiny_bundle("none")).chat()
        assert list(chat.ask("Hello?", max_new_tokens=3)) == list(unpruned.ask("Hello?", max_new_tokens=3))
        assert pruning_record(fastv.pipeline, chat.last.pruned)["reason"] == "the prompt has no image"

    def test_unpruned_bundle_says_so(self, tiny_bundle, picture):
        unpruned = load(tiny_bundle("none"))
        chat = unpruned.chat()
        list(chat.ask("Hello?", [picture], max_new_tokens=1))
        assert "method none" in pruning_record(unpruned.pipeline, chat.last.pruned)["reason"]

    def test_stops_at_length_and_at_eos(self, model, picture):
        chat = model.chat()
        list(chat.ask("What is this?", [picture], max_new_tokens=3))
        assert (chat.last.stop, len(chat.last.token_ids)) == ("length", 3)
        ended = _with_eos(model, chat.last.token_ids[0])
        chat = ended.chat()
        assert list(chat.ask("What is this?", [picture], max_new_tokens=3)) == []
        assert (chat.last.stop, chat.last.token_ids) == ("eos", [])

    def test_sampled_answers_repeat_with_their_seed(self, model, picture):
        def answer(seed: int) -> list[int]:
            chat = model.chat()
            list(chat.ask("What is this?", [picture], sampling=Sampling(1.5, seed=seed), max_new_tokens=8))
            return chat.last.token_ids

        assert answer(1) == answer(1)
        assert len({tuple(answer(seed)) for seed in range(4)}) > 1

    def test_a_prompt_beyond_the_context_is_refused(self, model, picture):
        with pytest.raises(UserError, match="context"):
            list(model.chat().ask("word " * model.pipeline.facts.context, [picture]))

    def test_generation_ends_at_the_context(self, model):
        chat = model.chat()
        context = model.pipeline.facts.context
        prompt = "a" * 40
        list(chat.ask(prompt, max_new_tokens=10 * context))
        # every position of the context was used: prompt, then answer; the last token is never fed back
        assert chat.last.stop == "eos" or chat.last.prompt_tokens + len(chat.last.token_ids) == context + 1


QUESTIONS = ("What is this?", "Which digit is the highest one here?", "Hello?", "Same?")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    found = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (60 + number, 81, 3), dtype=np.uint8)
        found.append(tmp_path_factory.mktemp("images") / f"{number}.png")
        Image.fromarray(noise).save(found[-1])
    return found


@pytest.fixture(scope="module")
def expected(model, files, tiny_checkpoint) -> list[list[int]]:
    """PyTorch's first eight tokens of each answer."""
    import torch

    from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
    from tokprune.export.sides import Original
    from tokprune.runtime.data import Sample

    checkpoint = find_checkpoint(str(tiny_checkpoint))
    torch_model = load_model(checkpoint, dtype=torch.float32)
    original = Original(torch_model, load_processor(checkpoint), checkpoint, 8)
    images = [tuple(files[:1]), tuple(files[1:]), (), tuple(files)]
    samples = [Sample(text, several) for text, several in zip(QUESTIONS, images, strict=True)]
    return [original.greedy(model.bundle.manifest.plan, sample).tokens for sample in samples]


class TestAnswer:
    """Batches, against PyTorch, which answers each question on its own."""

    def test_one_image_several_and_none(self, model, files, expected):
        answers = model.answer(QUESTIONS, [files[0], str(files[1]), None, files], max_new_tokens=8)
        assert [answer.generation.token_ids for answer in answers] == expected
        assert [answer.text for answer in answers] == [model.tokenizer.decode(tokens).strip() for tokens in expected]
        kept = [[(p.layer, p.image, p.kept) for p in answer.generation.pruned] for answer in answers]
        one, two = [(1, 0, 9), (2, 0, 4)], [(1, 0, 9), (1, 1, 9), (2, 0, 4), (2, 1, 4)]
        assert kept == [one, one, [], two]
        assert [answer.generation.stop for answer in answers] == ["length"] * 4
        assert len({answer.generation.prompt_tokens for answer in answers}) == 4  # pads are no tokens of a prompt
        assert answers[0].generation.prefill.flops["select_0"] > 0

    def test_each_stops_at_its_own_end(self, model, files, expected):
        """The end of sequence is a token that PyTorch writes after other numbers of tokens."""
        end = expected[0][1]
        cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
        assert len({len(tokens) for tokens in cut}) > 1
        answers = _with_eos(model, end).answer(QUESTIONS, [files[0], files[1], None, files], max_new_tokens=8)
        assert [answer.generation.token_ids for answer in answers] == cut
        stops = ["eos" if end in tokens else "length" for tokens in expected]
        assert [answer.generation.stop for answer in answers] == stops

    def test_all_end_at_once(self, model, files, expected):
        ended = _with_eos(model, expected[0][0])
        answers = ended.answer(["What is this?"] * 2, [files[0]] * 2)
        assert [(answer.text, answer.generation.stop) for answer in answers] == [("", "eos")] * 2
        assert answers[0].generation.decode_steps == 0

    def test_the_longest_fills_the_cache_for_all(self, model):
        limited = _with_limits(model, max_kv_capacity=40, max_input_length=40)
        answers = limited.answer(["Hello?", "x" * 20], max_new_tokens=1000)
        longest = max(answer.generation.prompt_tokens for answer in answers)
        assert 20 < longest < 40
        for answer in answers:
            assert answer.generation.stop == "context"
            assert len(answer.generation.token_ids) == 40 - longest + 1  # the last token is never fed back

    def test_sampled_answers_do_not_depend_on_the_batch(self, model, files):
        sampling = Sampling(1.5, seed=3)
        together = model.answer(QUESTIONS[:3], [files[0], files[1], None], sampling=sampling, max_new_tokens=8)
        for question, images, answer in zip(QUESTIONS, ([files[0]], [files[1]], []), together, strict=False):
            chat = model.chat()
            list(chat.ask(question, images, sampling=sampling, max_new_tokens=8))
            assert chat.last.token_ids == answer.generation.token_ids

    def test_what_stands_in_a_pad_changes_nothing(self, model, monkeypatch):
        """Pads of other tokens, at other positions, and behind selections other rows: the same logits."""
        pipeline = model.pipeline
        facts, n = pipeline.facts, pipeline.facts.vision.tokens
        features = np.random.default_rng(2).standard_normal((2, n, facts.hidden)).astype(np.float32)
        image = [facts.image_token_id] * n
        prompts = [[0, *image, 8, *image, 9], [0, 5, 6]]

        def logits():
            state = pipeline.new_state(2)
            first, _ = pipeline.forward(state, prompts, Meter(), image_features=features)
            return np.concatenate([first, pipeline.forward(state, [[20], [21]], Meter())[0]])

        def other_pad(rows):
            padded = left_pad(rows)
            for line, row in zip(padded, rows, strict=True):
                line[: len(line) - len(row)] = row[-1]
            return padded

        before = logits()
        monkeypatch.setattr("tokprune.runtime.pipeline.left_pad", other_pad)
        monkeypatch.setattr("tokprune.runtime.layout.left_pad", other_pad)
        # masked rows have a weight of exactly zero; other pads may be summed in another order, if at all
        np.testing.assert_allclose(logits(), before, atol=1e-6)

    @pytest.mark.parametrize(
        ("questions", "images", "words"),
        [
            ([], None, "no prompts was given: give at least one"),
            (["a"] * 5, None, "a batch of 5 prompts was given, the bundle was exported for 4 at most"),
            (["a", "b"], [None], "2 questions were given with images for 1"),
            (["a", "b"], [None, None, None], "2 questions were given with images for 3"),
            (["a", " "], None, "the prompt is empty"),
            (["a", "word " * 128], None, "the model's context is 128: give a shorter prompt"),
        ],
    )
    def test_refused(self, model, questions, images, words):
        with pytest.raises(UserError, match=words):
            model.answer(questions, images)


class TestLimits:
    """What the manifest allows, at the front door and in front of the segments."""

    def test_a_prompt_as_long_as_allowed_and_one_token_longer(self, model):
        limited = _with_limits(model, max_input_length=20)
        longest, longer = (
            next("x" * n for n in range(1, 100) if len(model.prompt("x" * n, 0)) == length) for length in (20, 21)
        )
        list(limited.chat().ask(longest, max_new_tokens=1))
        with pytest.raises(UserError, match=r"the prompt has 21 tokens .* exported for 20 at most: .* --max-input-len"):
            list(limited.chat().ask(longer, max_new_tokens=1))

    def test_images_count_unpruned(self, model, picture):
        limited = _with_limits(model, max_input_length=30)
        with pytest.raises(UserError, match="--max-input-len"):
            list(limited.chat().ask("What is this?", [picture, picture]))

    def test_earlier_turns_count_for_the_cache(self, model, picture):
        chat = _with_limits(model, max_kv_capacity=60, max_input_length=60).chat()
        list(chat.ask("x", [picture], max_new_tokens=4))
        with pytest.raises(UserError, match=r"the bundle's KV cache holds 60: .* --max-kv-cache-capacity"):
            list(chat.ask("x", [picture, picture], max_new_tokens=4))

    def test_steps_beyond_the_cache_are_refused(self, model):
        pipeline = _with_limits(model, max_kv_capacity=4, max_input_length=4).pipeline
        state = pipeline.new_state()
        pipeline.forward(state, [[0, 5, 6, 7]], Meter())
        with pytest.raises(UserError, match="KV cache holds 4"):
            pipeline.forward(state, [[8]], Meter())

    def test_prompts_must_be_as_many_as_sequences(self, model):
        for prompts in ([[0, 5]], [[0, 5], []]):
            with pytest.raises(ValueError, match="2 sequences"):
                model.pipeline.forward(model.pipeline.new_state(2), prompts, Meter())


def _pixels(model: Model, picture: Image.Image) -> np.ndarray:
    from tokprune.runtime.preprocess import pixel_values

    return pixel_values(picture, model.image_spec)


def _with_eos(model: Model, token: int) -> Model:
    return _with(model, model=dataclasses.replace(model.bundle.manifest.model, eos_token_ids=(token,)))


def _with_limits(model: Model, **limits: int) -> Model:
    return _with(model, limits=dataclasses.replace(model.bundle.manifest.limits, **limits))


def _with(loaded: Model, **changes) -> Model:
    return Model(dataclasses.replace(loaded.bundle, manifest=dataclasses.replace(loaded.bundle.manifest, **changes)))


def test_flops_of_a_run_are_those_of_its_lengths(model, picture):
    chat = model.chat()
    list(chat.ask("What is this?", [picture], max_new_tokens=3))
    from tokprune.runtime import flops

    text = chat.last.prompt_tokens - model.pipeline.facts.vision.tokens
    counter = flops.from_manifest(model.bundle.manifest)
    assert chat.last.prefill.flops == counter.prefill(text)
    steps = sum(counter.decode(text, generated=i) for i in range(2))
    assert sum(chat.last.decode.flops.values()) == steps


def test_load_refuses_what_is_no_bundle(tmp_path: Path):
    with pytest.raises(UserError, match="not a bundle"):
        load(tmp_path)
