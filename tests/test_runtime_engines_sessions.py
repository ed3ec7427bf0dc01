"""Sessions on a TensorRT that is not there (``fake_tensorrt``): memory, copies, profiles and CUDA graphs, counted."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import FakeCuda
from PIL import Image

from tokprune.runtime import UserError, names
from tokprune.runtime.chat import load, result_record
from tokprune.runtime.engines import profiles
from tokprune.runtime.engines.sessions import GRAPHS
from tokprune.runtime.pipeline import Meter, Pipeline, State

IMAGE = [3] * 16


@pytest.fixture
def bundle(tiny_bundle, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle("lofi-2"), tmp_path / "bundle")


@pytest.fixture
def trt(monkeypatch) -> fake_tensorrt.FakeTensorRt:
    return fake_tensorrt.install(monkeypatch)


class TestMemory:
    def test_a_decode_step_copies_tokens_logits_and_new_rows_only(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        state, facts = pipeline.new_state(), pipeline.facts
        features = pipeline.encode_images(np.zeros((1, 3, 56, 56), np.float32), Meter())
        pipeline.forward(state, [[0, *IMAGE, 9]], Meter(), image_features=features)
        pipeline.forward(state, [[19]], Meter())  # before which the caches are laid out
        rows = [mask.shape[1] + 1 for mask in state.masks.values()]
        trt.cuda.copied.clear()
        pipeline.forward(state, [[20]], Meter())
        # int64: the token, its position, where the logits are wanted, and each decoder's mask
        assert (trt.cuda.copied["to device"], trt.cuda.copied["to host"]) == (8 * (3 + sum(rows)), 4 * facts.vocabulary)
        states = 2 * 3 * 4 * facts.hidden - 4 * facts.hidden + 4 * facts.vocabulary  # of three decoders, in and out
        new_rows = 2 * facts.layers * facts.kv_heads * facts.head_dim * 4
        assert trt.cuda.copied["on device"] == states + 8 * (3 + 1 + sum(rows)) + new_rows

    def test_features_reach_the_embeddings_on_the_device(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        trt.cuda.copied.clear()
        features = pipeline.encode_images(np.zeros((2, 3, 56, 56), np.float32), Meter())
        assert trt.cuda.copied == {"to device": 2 * 3 * 56 * 56 * 4}
        pipeline.forward(pipeline.new_state(), [[0, *IMAGE, 9, *IMAGE, 8]], Meter(), image_features=features)
        assert trt.cuda.copied["on device"] == 2 * 16 * 64 * 4

    def test_caches_stay_where_they_are_and_nothing_grows(self, bundle, trt, monkeypatch):
        """Each is there once, made for the capacity, and stays to the last step, however often it is laid out."""
        monkeypatch.setattr(profiles, "BUCKET", 7)
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        state, limits, facts = pipeline.new_state(), pipeline.manifest.limits, pipeline.facts
        pipeline.forward(state, [[0, 9, 8]], Meter())
        free, places = [], set()
        for _ in range(3, limits.max_kv_capacity):
            pipeline.forward(state, [[20]], Meter())
            addresses = trt.contexts["decoder_0"].addresses
            places.add(tuple(addresses[names.past(0, which)] for which in ("key", "value")))
            free.append(trt.cuda.free_bytes)
        assert len(places) == 1
        cache = facts.kv_heads * limits.max_kv_capacity * facts.head_dim * 4
        assert free[2] - free[-1] < cache  # masks become longer, and nothing else
        assert sum(len(buffer) == cache for buffer in trt.cuda.memory.values()) == 2 * facts.layers

    def test_pruned_rows_take_no_cache(self, bundle, trt):
        """A cache is made for the capacity less what was pruned before it."""
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        state, limits, facts = pipeline.new_state(), pipeline.manifest.limits, pipeline.facts
        features = np.zeros((1, facts.vision.tokens, facts.hidden), np.float32)
        pipeline.forward(state, [[0, *IMAGE, 9]], Meter(), image_features=features)
        keeps = [facts.vision.tokens, *(stage.keep for stage in pipeline.manifest.plan.stages)]
        row = facts.kv_heads * facts.head_dim * 4
        for token in range(20, 30):
            pipeline.forward(state, [[token]], Meter())
            for index, name, _ in pipeline._decoders:
                context = trt.contexts[name]
                held = {key: len(trt.cuda.memory[context.addresses[key]]) for key in context.addresses if "past" in key}
                rows = limits.max_kv_capacity - facts.vision.tokens + keeps[index]
                assert set(held.values()) == {row * rows}

    def test_contexts_share_the_memory_of_the_greediest(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        model = load(bundle, engine="tensorrt")
        list(model.chat().ask("What?", max_new_tokens=2))
        list(model.chat().ask("What?", [Image.new("RGB", (56, 56))], max_new_tokens=2))
        greediest = max(context.most_needed for context in trt.contexts.values())  # of its call's shapes
        sizes = [len(buffer) for buffer in trt.cuda.memory.values()]
        assert sizes.count(greediest) == 1
        assert {size for size in sizes if size > 100_000} == {greediest}

    def test_out_of_memory_is_told_with_the_plan(self, bundle, monkeypatch, picture):
        fake_tensorrt.install(monkeypatch, FakeCuda(limit=330_000))
        fake_tensorrt.write_slot(bundle)
        model = load(bundle, engine="tensorrt")
        with pytest.raises(UserError, match=r"the GPU has no .* MB left .*planned: \d+ MB of weights, .* for 128 tok"):
            list(model.chat().ask("What?", [picture]))


class TestProfiles:
    def test_one_row_behind_a_cache_is_decoded(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        state = pipeline.new_state()
        for prompt in ([5], [6], [7], [8, 9], [10]):  # the first is a prompt of one row
            pipeline.forward(state, [prompt], Meter())
        assert trt.contexts["decoder_0"].switches == [0, 1, 0, 1]
        assert trt.contexts["embed_tokens"].switches == [0]

    def test_sizes_that_no_profile_takes(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        rows = list(range(-70, 0))
        with pytest.raises(UserError, match=r"decoder_2 was given logits_index of shape \[1, 70\], .*\[4, 64\]: ask"):
            pipeline.forward(pipeline.new_state(), [list(range(10, 90))], Meter(), logits_rows=rows)


def pipeline_of(bundle: Path, engine: str = "tensorrt") -> Pipeline:
    if engine == "tensorrt":
        fake_tensorrt.write_slot(bundle)
    return load(bundle, engine=engine).pipeline


def steps(pipeline: Pipeline, state: State, count: int, first: int = 20) -> list[np.ndarray]:
    """The logits of ``count`` decode steps."""
    return [pipeline.forward(state, [[first + step]], Meter())[0] for step in range(count)]


class TestGraphs:
    """Of three decoders."""

    def test_launched_from_the_second_step_in_the_same_shapes_on(self, bundle, trt):
        pipeline = pipeline_of(bundle)
        state = pipeline.new_state()
        pipeline.forward(state, [[0, 9, 8]], Meter())
        launched = []
        for _ in range(6):
            steps(pipeline, state, 1)
            launched.append(trt.cuda.calls["cudaGraphLaunch"] // 3)
        assert launched == [0, 1, 2, 3, 4, 5]
        assert trt.cuda.calls["cudaGraphInstantiateWithFlags"] == 3
        assert (len(trt.cuda.graphs), len(trt.cuda.executable)) == (0, 3)
        assert {trt.contexts[name].runs for _, name, _ in pipeline._decoders} == {7}

    def test_recorded_anew_for_each_bucket(self, bundle, trt, monkeypatch):
        """And all others are destroyed, the last ones with their sessions."""
        monkeypatch.setattr(profiles, "BUCKET", 8)
        pipeline = pipeline_of(bundle)
        state = pipeline.new_state()
        pipeline.forward(state, [[0, 9, 8]], Meter())
        steps(pipeline, state, 5 + 8 + 8 + 3)  # caches of 8, 16, 24 and 32 rows
        assert trt.cuda.calls["cudaGraphInstantiateWithFlags"] == 3 * 4
        assert trt.cuda.calls["cudaGraphLaunch"] == 3 * (4 + 7 + 7 + 2)
        assert len(trt.cuda.executable) == 3
        del pipeline, state
        gc.collect()
        assert not trt.cuda.executable

    def test_answers_are_the_same_to_the_bit(self, bundle, trt):
        found = []
        for _ in range(2):
            pipeline = pipeline_of(bundle) if not found else load(bundle, engine="tensorrt").pipeline
            state = pipeline.new_state(2)
            pipeline.forward(state, [[0, 9, 8], [0, 5]], Meter())
            found.append(
                np.stack([pipeline.forward(state, [[token], [50 - token]], Meter())[0] for token in range(20, 30)])
            )
            trt.cuda.fails["cudaStreamBeginCapture"] = 900  # for the second model
        np.testing.assert_array_equal(*found)
        assert trt.cuda.calls["cudaGraphLaunch"] == 3 * (10 - 1)

    def test_conversations_in_turns(self, bundle, trt):
        """Each takes the graphs from the other; one of them needs more of the contexts' memory."""
        pipeline = pipeline_of(bundle)
        prompts = ([0, 7, 9], list(range(5, 40)))

        def alternate(*which: int) -> dict[int, list[np.ndarray]]:
            states, found = {}, {each: [] for each in which}
            for turn in range(3):
                for each in which:
                    if not turn:
                        states[each] = pipeline.new_state()
                        pipeline.forward(states[each], [prompts[each]], Meter())
                    found[each] += steps(pipeline, states[each], 5, first=20 + 5 * turn)
            return found

        together = alternate(0, 1)
        launched = trt.cuda.calls["cudaGraphLaunch"]
        assert launched == 3 * 2 * 3 * 4
        for each in (0, 1):
            np.testing.assert_array_equal(together[each], alternate(each)[each])
        assert trt.cuda.calls["cudaGraphLaunch"] > launched

    def test_a_turn_between(self, bundle, trt):
        """Rows behind a cache that is not full, in the other profile, then steps again; as ONNX Runtime has it."""
        found = []
        for engine in ("tensorrt", "onnxruntime"):
            pipeline = pipeline_of(bundle, engine)
            state = pipeline.new_state()
            features = np.random.default_rng(1).standard_normal((1, 16, 64)).astype(np.float32)
            logits = [pipeline.forward(state, [[0, *IMAGE, 9]], Meter(), image_features=features)[0]]
            logits += steps(pipeline, state, 5)
            logits.append(pipeline.forward(state, [[7, *IMAGE, 9, 8]], Meter(), image_features=-features)[0])
            found.append(np.concatenate(logits + steps(pipeline, state, 5)))
        assert trt.cuda.calls["cudaGraphLaunch"] == 3 * (4 + 4)
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=3e-6 * np.abs(found[1]).max())

    def test_what_was_handed_out_stays(self, bundle, trt, monkeypatch):
        """However long somebody holds it, a step writes elsewhere."""
        pipeline = pipeline_of(bundle)
        state, held = pipeline.new_state(), []
        run = pipeline._run

        def kept(name, *arguments, **options):
            out = run(name, *arguments, **options)
            small = [out[key] for key in (names.LAST_HIDDEN_STATE, names.LOGITS) if key in out]
            held.extend((tensor, pipeline.backend.to_host(tensor)) for tensor in small)
            return out

        monkeypatch.setattr(pipeline, "_run", kept)
        pipeline.forward(state, [[0, 9, 8]], Meter())
        steps(pipeline, state, 6)
        assert len({tensor.address for tensor, _ in held}) == len(held) == 3 * 7
        for tensor, then in held:
            np.testing.assert_array_equal(pipeline.backend.to_host(tensor), then)


class TestNoGraphs:
    """Where none can be had, steps run kernel by kernel, and the result says why."""

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            ("cudaStreamBeginCapture", "cudaStreamBeginCapture: what 900 means, error 900"),
            ("cudaStreamEndCapture", "cudaStreamEndCapture: what 900 means, error 900"),
            ("cudaGraphInstantiateWithFlags", "cudaGraphInstantiateWithFlags: what 900 means, error 900"),
            ("cudaGraphLaunch", "cudaGraphLaunch: what 900 means, error 900"),
            ("", "TensorRT: operation not permitted when stream is capturing"),
        ],
    )
    def test_is_told_and_not_tried_again(self, bundle, trt, function, words, monkeypatch):
        monkeypatch.setattr(profiles, "BUCKET", 8)  # shapes change, and still
        trt.cuda.fails = {function: 900} if function else {}
        trt.refuses_recording = not function
        answers = []
        for engine in ("tensorrt", "onnxruntime"):
            if engine == "tensorrt":
                fake_tensorrt.write_slot(bundle)
            model = load(bundle, engine=engine)
            chat = model.chat()
            list(chat.ask("What is this?", [Image.new("RGB", (56, 56))], max_new_tokens=20))
            answers.append(chat.last.token_ids)
            if engine == "tensorrt":
                remarks = result_record(model, "", chat.last)["remarks"]
        assert answers[0] == answers[1]
        assert len(answers[0]) > 5
        assert remarks == [
            f"decode steps of decoder_{index} are launched kernel by kernel, a CUDA graph of them failed ({words})"
            for index in range(3)
        ]
        assert trt.cuda.calls["cudaStreamBeginCapture"] == 3
        assert (trt.cuda.graphs, trt.cuda.executable, trt.cuda.last_error) == ({}, {}, 0)

    def test_where_none_are_wanted(self, bundle, trt, monkeypatch):
        monkeypatch.setenv(GRAPHS, "0")
        fake_tensorrt.write_slot(bundle)
        model = load(bundle, engine="tensorrt")
        list(model.chat().ask("What is this?", max_new_tokens=6))
        assert trt.cuda.calls["cudaStreamBeginCapture"] == 0
        assert model.pipeline.backend.remarks == tuple(
            f"decode steps of decoder_{index} are launched kernel by kernel, as TOKPRUNE_CUDA_GRAPHS=0 asks"
            for index in range(3)
        )

    def test_short_answers_need_none(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        model = load(bundle, engine="tensorrt")
        list(model.chat().ask("What?", max_new_tokens=2))  # one of them by the prompt's own logits
        assert (model.pipeline.backend.remarks, trt.cuda.calls["cudaStreamBeginCapture"]) == ((), 0)

    def test_an_engine_that_fails_is_no_matter_of_graphs(self, bundle, trt):
        pipeline = pipeline_of(bundle)
        state = pipeline.new_state()
        pipeline.forward(state, [[0, 9, 8]], Meter())
        trt.refuses = "decoder_1"
        with pytest.raises(UserError, match=r"TensorRT refused to run in decoder_1 \(an illegal value\)"):
            steps(pipeline, state, 2)
