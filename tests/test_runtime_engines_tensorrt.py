"""Sessions on TensorRT, with a GPU and a library that are not there (``fake_tensorrt``): all but the kernels is ours.

What a whole model says must be what ONNX Runtime makes it say, since the fake engines run the same graphs. Then which
engines are taken, and what is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tokprune.runtime import UserError
from tokprune.runtime.bench import bench
from tokprune.runtime.chat import Model, load, result_record
from tokprune.runtime.cli.run import command
from tokprune.runtime.engines import profiles
from tokprune.runtime.engines.slot import PLUGIN_LIBRARY
from tokprune.runtime.pipeline import Meter
from tokprune.runtime.report import bench_report

IMAGE = [3] * 16


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


@pytest.fixture
def bundle(tiny_bundle, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle("lofi-2"), tmp_path / "bundle")


@pytest.fixture
def trt(monkeypatch) -> fake_tensorrt.FakeTensorRt:
    return fake_tensorrt.install(monkeypatch)


def turns(model: Model, picture) -> list:
    chat, found = model.chat(), []
    for question, images in (("What is this?", [picture, picture]), ("And red?", []), ("Which digit?", [picture])):
        list(chat.ask(question, images, max_new_tokens=4))
        found.append((chat.last.token_ids, [pruned.indices.tolist() for pruned in chat.last.pruned]))
    return found


class TestAnswers:
    @pytest.mark.parametrize("key", ["none", "random-0", "uniform", "lvpruning", "fastv-2", "lofi-2"])
    def test_as_onnxruntime_gives_them(self, tiny_bundle, tmp_path, trt, picture, key):
        """Three turns, images in the first and the last; and a batch of prompts with two images, one and none."""
        path = shutil.copytree(tiny_bundle(key), tmp_path / key)
        fake_tensorrt.write_slot(path)
        ours, theirs = load(path, engine="tensorrt"), load(path, engine="onnxruntime")
        assert turns(ours, picture) == turns(theirs, picture)
        questions, images = ["What is this?", "Which?", "Red"], [[picture, picture], picture, None]
        answers = [
            [(answer.text, answer.generation.token_ids) for answer in model.answer(questions, images, max_new_tokens=5)]
            for model in (ours, theirs)
        ]
        assert answers[0] == answers[1]
        assert {name: context.runs > 0 for name, context in trt.contexts.items()} == {
            segment.name: True for segment in ours.bundle.manifest.segments
        }

    @pytest.mark.parametrize("key", ["none", "random-0", "uniform", "lvpruning", "fastv-2", "lofi-2"])
    def test_with_caches_laid_out_every_few_rows(self, tiny_bundle, tmp_path, trt, picture, key, monkeypatch):
        monkeypatch.setattr(profiles, "BUCKET", 5)
        self.test_as_onnxruntime_gives_them(tiny_bundle, tmp_path, trt, picture, key)

    @pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("fp16", 2e-3)])
    def test_logits(self, tiny_bundle, tmp_path, trt, precision, tolerance):
        """To the bit at first; then rows that are masked are 0 in a longer sum, which is taken in another order."""
        bundle = shutil.copytree(tiny_bundle("lofi-2", precision), tmp_path / "bundle")
        fake_tensorrt.write_slot(bundle)
        dtype = {"fp32": np.float32, "fp16": np.float16}[precision]
        features = np.random.default_rng(1).standard_normal((1, 16, 64)).astype(dtype)
        found = []
        for engine in ("tensorrt", "onnxruntime"):
            pipeline = load(bundle, engine=engine).pipeline
            state = pipeline.new_state()
            logits = [pipeline.forward(state, [[0, 7, *IMAGE, 9]], Meter(), image_features=features)[0]]
            prompts = ([20], [21], [22, 23], [24], [25], [26])
            logits += [pipeline.forward(state, [prompt], Meter())[0] for prompt in prompts]
            found.append(np.concatenate(logits))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=tolerance * np.abs(found[1]).max())

    @pytest.mark.parametrize("given", [np.float32, np.float64])
    def test_features_of_another_type(self, given, tiny_bundle, tmp_path, trt):
        """From the host they are put into place as bytes, so they are brought to the bundle's type first."""
        path = shutil.copytree(tiny_bundle("lofi-2", "fp16"), tmp_path / "bundle")
        fake_tensorrt.write_slot(path)
        found = []
        for dtype in (np.float16, given):
            pipeline = load(path, engine="tensorrt").pipeline
            values = np.random.default_rng(3).standard_normal((1, 16, pipeline.facts.hidden)).astype(np.float16)
            ids = [[0, 7, *IMAGE, 9]]
            logits, _ = pipeline.forward(pipeline.new_state(), ids, Meter(), image_features=values.astype(dtype))
            found.append(logits.copy())
        np.testing.assert_array_equal(*found)

    def test_conversations_in_turns(self, bundle, trt):
        """What two say on one backend is what each says alone."""
        fake_tensorrt.write_slot(bundle)
        pipeline = load(bundle, engine="tensorrt").pipeline
        prompts = ([0, 7, 9], [0, 5, 30, 31, 8])

        def steps(states) -> list[np.ndarray]:
            found = [pipeline.forward(state, [prompt], Meter())[0] for state, prompt in states]
            for token in range(20, 26):
                found += [pipeline.forward(state, [[token]], Meter())[0] for state, _ in states]
            return found

        together = steps([(pipeline.new_state(), prompt) for prompt in prompts])
        for which, prompt in enumerate(prompts):
            alone = steps([(pipeline.new_state(), prompt)])
            np.testing.assert_array_equal(together[which::2], alone)

    def test_the_result_says_what_ran(self, bundle, trt, picture):
        fake_tensorrt.write_slot(bundle)
        model = load(bundle)  # auto, where engines fit
        chat = model.chat()
        list(chat.ask("What is this?", [picture], max_new_tokens=2))
        record = result_record(model, "", chat.last)
        assert record["engine"] == "tensorrt-10.3.0-sm87, selector native"
        assert record["remarks"] == []

    def test_on_the_command_line(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        options = [str(bundle), "--prompt", "What?", "--max-new-tokens", "3", "--json", "--engine"]
        ours, theirs = (json.loads(CliRunner().invoke(command, [*options, e]).output) for e in ("auto", "onnxruntime"))
        assert ours["engine"].startswith("tensorrt-10.3.0")
        assert theirs["engine"].startswith("onnxruntime-")
        assert ours["token_ids"] == theirs["token_ids"]


class TestFit:
    def refused(self, bundle: Path) -> str:
        with pytest.raises(UserError) as error:
            load(bundle, engine="tensorrt")
        backend = load(bundle).pipeline.backend  # auto goes on with what runs, and says so
        assert backend.name.startswith("onnxruntime-")
        assert backend.remarks == ((str(error.value),) if list(bundle.glob("engines/*/slot.json")) else ())
        return str(error.value)

    def test_no_engines(self, bundle, trt):
        assert f"{bundle} has no TensorRT engines: build them here with tokprune build" in self.refused(bundle)

    def test_every_slot_has_its_reason(self, bundle, trt):
        fake_tensorrt.write_slot(bundle, version="10.16.1")
        fake_tensorrt.write_slot(bundle, arch="sm90")
        fake_tensorrt.write_slot(bundle, version="10.7.0").joinpath("slot.json").unlink()  # unfinished: not there
        said = self.refused(bundle)
        assert "tensorrt-10.16.1-sm87: built with tensorrt 10.16.1, installed is 10.3.0" in said
        assert "tensorrt-10.3.0-sm90: built for sm90, the GPU is sm87" in said
        assert "10.7.0" not in said

    def test_the_fitting_slot_is_chosen(self, bundle, trt):
        fake_tensorrt.write_slot(bundle, version="10.16.1")
        fake_tensorrt.write_slot(bundle)
        assert load(bundle, engine="tensorrt").pipeline.backend.name.startswith("tensorrt-10.3.0-sm87")

    def test_engines_of_another_export(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        (bundle / "tokprune.json").write_text((bundle / "tokprune.json").read_text() + "\n")
        assert "built from another export than the one beside it" in self.refused(bundle)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda file: file.unlink(), "has nothing instead of"),
            (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"has \d+ instead of \d+ bytes"),
            (lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]), "decoder_1.engine was altered"),
        ],
    )
    def test_an_engine_that_was_changed(self, bundle, trt, change, words):
        folder = fake_tensorrt.write_slot(bundle)
        change(folder / "decoder_1.engine")
        with pytest.raises(UserError, match=words):
            load(bundle, engine="tensorrt")

    def test_plugins_are_loaded_from_the_slot(self, bundle, trt):
        folder = fake_tensorrt.write_slot(bundle, plugins=b"library")
        for _ in range(2):  # the registry is the process's
            backend = load(bundle, engine="tensorrt").pipeline.backend
        assert trt.plugins == [str(folder / PLUGIN_LIBRARY)]
        assert backend.name.endswith("selector plugin")

    @pytest.mark.parametrize("content", [b"another", None])
    def test_other_plugins(self, bundle, trt, content):
        folder = fake_tensorrt.write_slot(bundle, plugins=b"library")
        (folder / PLUGIN_LIBRARY).unlink() if content is None else (folder / PLUGIN_LIBRARY).write_bytes(content)
        assert "plugins.so is not the library of plugins that its engines were built with" in self.refused(bundle)
        assert trt.plugins == []

    def test_a_slot_of_another_version_of_tokprune(self, bundle, trt):
        """A reason like others, so that ONNX Runtime answers where that is allowed."""
        fake_tensorrt.write_slot(bundle)
        (path,) = bundle.glob("engines/*/slot.json")
        data = json.loads(path.read_text()) | {"schema": 1}
        path.write_text(json.dumps(data | {"segments": [{"name": "decoder_0", "what": "it had then"}]}))
        assert "built by another version of tokprune (schema 1" in self.refused(bundle)
        backend = load(bundle).pipeline.backend
        assert backend.name.startswith("onnxruntime")
        assert any("schema 1" in remark for remark in backend.remarks)

    def test_no_gpu(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        trt.cuda.handle.cudaGetDeviceCount = lambda out: 35
        assert "cannot run: a GPU was asked for, and CUDA finds none (error 35)" in self.refused(bundle)

    def test_no_library(self, bundle, trt, monkeypatch):
        fake_tensorrt.write_slot(bundle)
        monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
        assert "tensorrt 10.3.0 is needed (" in self.refused(bundle)

    def test_a_library_that_is_too_old(self, bundle, monkeypatch):
        fake_tensorrt.install(monkeypatch, version="10.0.1")
        fake_tensorrt.write_slot(bundle, version="10.0.1")
        assert "tensorrt 10.0.1 was found, 10.3 or newer is needed" in self.refused(bundle)

    def test_a_slot_that_is_damaged(self, bundle, trt):
        folder = fake_tensorrt.write_slot(bundle)
        (folder / "slot.json").write_text("{}")
        with pytest.raises(UserError, match=r"slot\.json cannot be read .*: remove its folder, or build it again"):
            load(bundle, engine="tensorrt")


class TestRefusals:
    def test_an_engine_that_does_not_load(self, bundle, trt):
        folder = fake_tensorrt.write_slot(bundle)
        slot = json.loads((folder / "slot.json").read_text())
        text = '{"fault": "Cuda Runtime (out of memory)"}'
        (folder / "decoder_0.engine").write_text(text)
        (facts,) = [each for each in slot["segments"] if each["name"] == "decoder_0"]
        facts["size"], facts["sha256"] = len(text), fake_tensorrt.sha256(folder / "decoder_0.engine")
        (folder / "slot.json").write_text(json.dumps(slot))
        with pytest.raises(UserError, match=r"cannot load .*decoder_0.engine \(Cuda .*memory\)\) \(planned: "):
            load(bundle, engine="tensorrt")

    def test_an_engine_of_another_graph(self, bundle, trt, monkeypatch):
        fake_tensorrt.write_slot(bundle)
        monkeypatch.setattr(fake_tensorrt.FakeEngine, "get_tensor_name", lambda self, index: "x")
        with pytest.raises(UserError, match=r"vision_encoder\.engine is the engine of another graph"):
            load(bundle, engine="tensorrt")

    def test_a_step_that_fails(self, bundle, trt):
        fake_tensorrt.write_slot(bundle)
        model = load(bundle, engine="tensorrt")
        trt.refuses = "decoder_1"
        with pytest.raises(UserError, match=r"TensorRT refused to run in decoder_1 \(an illegal value\): build"):
            list(model.chat().ask("What?"))


def test_bench_tells_the_share_of_the_peak(tiny_bundle, tmp_path, trt):
    """The fake's times are ONNX Runtime's; what is divided by what is the matter."""
    shutil.copytree(tiny_bundle("lofi", "fp16"), tmp_path / "fp16")
    fake_tensorrt.write_slot(tmp_path / "fp16")
    result = bench(load(tmp_path / "fp16").pipeline, None, text_tokens=8, rounds=2, new_tokens=1)
    assert result["peak_tflops"] == pytest.approx(42.6, abs=0.05)
    for segment in result["segments"]:
        assert segment["peak_share"] == pytest.approx(segment["achieved_tflops"] / result["peak_tflops"])
    assert 0 < result["selector_share"] < 1
    assert "of peak" in bench_report(result)
