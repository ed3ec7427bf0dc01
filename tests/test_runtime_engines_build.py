"""``tokprune build``: segments by NVIDIA's own builder, on this CPU; slots, resuming, sizes, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import helper
from plugin_harness import compiled, header_sets

from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.pipeline import export
from tokprune.plugins.build import LIBRARY
from tokprune.runtime import UserError, names
from tokprune.runtime.bundle import ALWAYS_HASHED, open_bundle, sha256
from tokprune.runtime.cli.build import command
from tokprune.runtime.engines import build as building
from tokprune.runtime.engines import compiler, slot, targets
from tokprune.runtime.engines.profiles import DECODE, PREFILL
from tokprune.runtime.engines.targets import RTX_CARDS, find_target
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.plan import make_plan


@pytest.fixture(scope="module")
def tiny_fp16(tiny_bundle) -> Path:
    return tiny_bundle("lofi", "fp16")


@pytest.fixture(scope="module")
def progress() -> list[tuple[str, str, int, int]]:
    """All that is told while ``built`` is made."""
    return []


@pytest.fixture(scope="module")
def built(
    tiny_fp16: Path, progress: list[tuple[str, str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """A bundle with its engines, and what the command printed; to be read only."""
    path = shutil.copytree(tiny_fp16, tmp_path_factory.mktemp("built") / "bundle")

    def listened(*arguments, **options):
        show = options.pop("progress")
        return building.build(*arguments, **options, progress=lambda *step: (progress.append(step), show(*step)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokprune.runtime.cli.build.build", listened)
        done = CliRunner().invoke(command, [str(path), "--target", "rtx", "--json"])
    assert done.exit_code == 0, done.output
    return path, json.loads(done.stdout)


@pytest.fixture
def copy(built: tuple[Path, dict], tmp_path: Path) -> Path:
    return shutil.copytree(built[0], tmp_path / "bundle")


def cli(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "from tokprune.runtime.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


def again(bundle: Path, **options) -> list[str]:
    """Build what is missing; the segments that were built now."""
    result = building.build(open_bundle(bundle), find_target(RTX_CARDS), building.NATIVE, **options)
    return [segment["name"] for segment in result["segments"] if segment["built"]]


def new_rows(report: compiler.Report, first: list[str], layers: range, facts: ModelFacts) -> None:
    """The engine writes no caches: of each layer the call's own keys and values, of any number of rows, in FP16."""
    written = [names.new(layer, which) for layer in layers for which in ("key", "value")]
    assert [tensor.name for tensor in report.outputs] == first + written
    for tensor in report.outputs[len(first) :]:
        assert (tensor.shape, tensor.dtype) == ((-1, facts.kv_heads, -1, facts.head_dim), "float16")


class TestEverySegment:
    def test_of_the_tiny_model_in_fp16(self, built):
        path, result = built
        manifest = open_bundle(path).manifest
        assert [segment["name"] for segment in result["segments"]] == [segment.name for segment in manifest.segments]
        assert all(segment["built"] for segment in result["segments"])
        folder = Path(result["slot"])
        assert folder.name == f"tensorrt-rtx-{'.'.join(result['version'].split('.')[:3])}-cc-any"
        ((_, found),) = slot.read_slots(path)
        assert found.bundle == sha256(path / names.MANIFEST_FILE)
        assert (found.selector, found.plugins) == ("native", None)
        for segment, weights in zip(found.segments, manifest.memory, strict=True):
            assert segment.size > weights.total  # the weights are in it
            assert segment.sha256 == sha256(folder / segment.file)
            decodes = manifest.segment(segment.name).layers is not None
            assert list(segment.profiles) == ([PREFILL, DECODE] if decodes else [PREFILL])
        assert slot.file_fault(folder, found) is None

    def test_of_the_demo_model_in_fp16(self, tmp_path, monkeypatch):
        """What users have: real widths, 576 tokens, LoFi's whole body."""
        checkpoint = find_checkpoint("demo")
        facts = checkpoint.facts
        from tokprune.runtime.plan import Rank

        plan = make_plan(
            "lofi", [(2, 64)], layers=facts.layers, visual_tokens=facts.vision.tokens, rank=Rank(components=8)
        )
        export(checkpoint, plan, tmp_path / "demo", precision="fp16")
        reports = {}
        compile_ = building.compiler.build

        def spied(graph: Path, *arguments, **options):
            reports[graph.stem] = report = compile_(graph, *arguments, **options)
            return report

        monkeypatch.setattr(building.compiler, "build", spied)
        built_now = again(tmp_path / "demo")
        assert built_now == ["vision_encoder", "embed_tokens", "decoder_0", "select_0", "decoder_1"]
        new_rows(reports["decoder_0"], ["last_hidden_state"], range(2), facts)
        new_rows(reports["decoder_1"], ["logits"], range(2, facts.layers), facts)

    def test_log_and_layers_lie_beside(self, built):
        _, result = built
        for segment in result["segments"]:
            stem = Path(result["slot"]) / segment["name"]
            assert "Opset version:    20" in stem.with_name(f"{stem.name}.log").read_text()
            layers = json.loads(stem.with_name(f"{stem.name}.layers.json").read_text())
            assert layers["layers_of"] == "network"
            assert len(layers["layers"]) == segment["layers"] > 0
            assert {"name", "type", "outputs"} <= set(layers["layers"][0])
        assert (Path(result["slot"]) / building.TIMING_CACHE).is_file()
        assert not list(Path(result["slot"]).glob(".building*"))

    def test_progress_is_told(self, built, progress):
        segments = {segment.name for segment in open_bundle(built[0]).manifest.segments}
        assert {segment for segment, *_ in progress} == segments
        assert all(0 <= done <= total for _, _, done, total in progress)
        assert any(phase == "Building engine" and done == total for _, phase, done, total in progress)


class TestResuming:
    def test_nothing_is_built_twice(self, copy):
        before = {file: file.stat().st_mtime_ns for file in copy.rglob("*.engine")}
        assert again(copy) == []
        assert {file: file.stat().st_mtime_ns for file in copy.rglob("*.engine")} == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda engine: engine.unlink(),
            lambda engine: engine.with_suffix(".json").unlink(),
            lambda engine: engine.with_suffix(".json").write_text("{}"),
            lambda engine: engine.write_bytes(b"x" + engine.read_bytes()[1:]),
        ],
        ids=["no engine", "no record", "empty record", "altered"],
    )
    def test_what_is_not_whole_is_built_again(self, copy, change: Callable[[Path], None]):
        (engine,) = copy.rglob("embed_tokens.engine")
        change(engine)
        assert again(copy) == ["embed_tokens"]

    def test_other_sizes_are_another_engine(self, copy):
        """Graphs and weights as before: keys hold the profiles too."""
        manifest = open_bundle(copy).manifest
        limits = dataclasses.replace(manifest.limits, max_batch=2)
        (copy / names.MANIFEST_FILE).write_text(dataclasses.replace(manifest, limits=limits).to_json())
        assert again(copy) == [segment.name for segment in manifest.segments]

    def test_killed_build_leaves_nothing_that_loads_and_goes_on(self, tiny_fp16, tmp_path):
        path = shutil.copytree(tiny_fp16, tmp_path / "bundle")
        code = "from tokprune.runtime.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "build", str(path), "--target", "rtx"], stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while not list(path.rglob("embed_tokens.json")):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(slot.read_slots(path)) == []
        rebuilt = again(path)
        assert "vision_encoder" not in rebuilt
        assert "embed_tokens" not in rebuilt
        assert rebuilt
        assert not list(path.rglob(".building*"))
        assert len(list(slot.read_slots(path))) == 1

    def test_two_builds_at_once(self, copy):
        folder = next(copy.glob("engines/*"))
        with building._locked(folder), pytest.raises(UserError, match="another build is at work"):
            again(copy)


class TestRefusals:
    def test_a_graph_at_fault_is_told_by_its_node(self, copy):
        """Broken behind the manifest's back, and the manifest made to fit: what an exporter's defect would be."""
        path = copy / "embed_tokens.onnx"
        model = onnx.load(path, load_external_data=False)
        model.graph.node[0].name = "broken"
        model.graph.node[0].op_type = "NoSuchOperator"
        model.opset_import.append(helper.make_opsetid("nowhere", 1))
        model.graph.node[0].domain = "nowhere"
        onnx.save(model, path)
        forge(copy, "embed_tokens.onnx")
        with pytest.raises(UserError, match=r"embed_tokens\.onnx at node 'broken' \(NoSuchOperator\), .*\.log"):
            again(copy)
        assert list(slot.read_slots(copy)) == []  # the slot is not whole any more
        assert not list(copy.rglob(".building*"))

    def test_a_cache_that_is_made_in_another_way(self, copy):
        """Its new rows cannot be had alone, and a wrong answer is worse than none."""
        path = copy / "decoder_1.onnx"
        model = onnx.load(path, load_external_data=False)
        (node,) = [node for node in model.graph.node if names.present(1, "key") in node.output]
        node.input[:] = node.input[::-1]
        onnx.save(model, path)
        forge(copy, "decoder_1.onnx")
        said = r"decoder_1\.onnx at node '.+' \(CONCATENATION\), present\.1\.key is not past_key_values\.1\.key with"
        with pytest.raises(UserError, match=said):
            again(copy)
        assert list(slot.read_slots(copy)) == []

    def test_a_slot_of_engines_that_wrote_whole_caches(self, copy):
        """They fit nothing any more; a build makes the decoders again, whose keys are others now, and nothing else."""
        (path,) = copy.glob("engines/*/slot.json")
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"schema": 1}))
        ((folder, old),) = slot.read_slots(copy)
        reason = slot.misfit(folder, old, open_bundle(copy), data["version"], data["arch"])
        assert reason == "built by another version of tokprune (schema 1, this one's is 2)"
        for file in copy.rglob("decoder_*.json"):
            if "layers" not in file.name:
                file.write_text(json.dumps(json.loads(file.read_text()) | {"key": "another"}))
        assert again(copy) == ["decoder_0", "decoder_1"]
        assert len(list(slot.read_slots(copy))) == 1

    def test_exit_code_and_sentence(self, copy):
        (copy / "embed_tokens.onnx").write_bytes(b"")
        forge(copy, "embed_tokens.onnx")
        done = cli("build", copy, "--target", "rtx")
        assert done.returncode == 2
        assert "no engine can be made of" in done.stderr
        assert "the file holds no graph" in done.stderr
        assert "Traceback" not in done.stderr

    def test_no_bundle(self, tmp_path):
        done = cli("build", tmp_path / "nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not there: make one with tokprune-export" in done.stderr

    def test_memory_that_is_not_there(self, copy, monkeypatch):
        next(copy.rglob("decoder_1.engine")).unlink()
        monkeypatch.setattr(building, "available_bytes", lambda: 1000)
        with pytest.raises(UserError, match=r"building decoder_1 is expected to take .* 4 times its weights, and"):
            again(copy)
        assert again(copy, force=True) == ["decoder_1"]
        assert again(copy) == []  # what is built needs no memory

    def test_lower_precision_is_named_if_it_fits(self, copy, monkeypatch):
        bundle = open_bundle(copy)
        need = 4 * max(weights.total for weights in bundle.manifest.memory)
        monkeypatch.setattr(building, "available_bytes", lambda: need - 1)
        with pytest.raises(UserError, match="int8 would take"):
            building._check_memory(bundle, [segment.name for segment in bundle.manifest.segments])

    def test_available_memory_is_this_machines(self):
        assert 10**8 < building.available_bytes() < 10**14

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"selector": "plugin"}, "--selector plugin.* needs the library of plugins"),
            ({"selector": "native", "plugins": "x.so"}, "the selectors are native"),
            ({"plugins": "x.so"}, "x.so is no file: tokprune build-plugins"),
        ],
    )
    def test_selectors_and_plugins_that_do_not_go_together(self, built, options, words):
        plugins = options.get("plugins")
        with pytest.raises(UserError, match=words):
            building.choose_selector(
                open_bundle(built[0]), find_target(RTX_CARDS), options.get("selector"), plugins and Path(plugins)
            )

    def test_a_jetson_wants_the_plugin_unless_told_otherwise(self, built, tiny_bundle):
        target = dataclasses.replace(find_target(RTX_CARDS), name=targets.JETSON)
        with pytest.raises(UserError, match="the choice for jetson-orin, needs the library"):
            building.choose_selector(open_bundle(built[0]), target, None, None)
        assert building.choose_selector(open_bundle(built[0]), target, "native", None) == "native"
        assert building.choose_selector(open_bundle(tiny_bundle("uniform")), target, None, None) == "native"
        with pytest.raises(UserError, match="method 'uniform' needs none"):
            building.choose_selector(open_bundle(tiny_bundle("uniform")), target, "plugin", None)

    def test_a_library_that_is_none(self, copy, tmp_path):
        (tmp_path / "x.so").write_text("no library")
        with pytest.raises(UserError, match=r"x\.so cannot be loaded as a library of plugins: build it"):
            building.build(open_bundle(copy), find_target(RTX_CARDS), building.PLUGIN, plugins=tmp_path / "x.so")
        assert list(slot.read_slots(copy)) == []


@pytest.mark.plugin
def test_selector_by_our_plugin(copy):
    """The real library in the real builder; of the other segments none is built again, to and fro."""
    library = compiled(header_sets()[0], "87") / LIBRARY
    done = CliRunner().invoke(command, [str(copy), "--target", "rtx", "--plugins", str(library), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [segment["name"] for segment in result["segments"] if segment["built"]] == ["select_0"]
    assert (result["selector"], result["plugins"]) == ("plugin", sha256(library))
    folder = Path(result["slot"])
    assert b"LeverageTopK" in (folder / "select_0.engine").read_bytes()
    assert b"LeverageTopK" not in (folder / "decoder_1.engine").read_bytes()
    ((_, found),) = slot.read_slots(copy)
    assert slot.file_fault(folder, found) is None
    assert again(copy) == ["select_0"]
    assert not (folder / slot.PLUGIN_LIBRARY).exists()


def forge(bundle: Path, name: str) -> None:
    """Make the manifest state what the file ``name`` now is."""
    manifest = open_manifest(bundle)
    files = tuple(
        dataclasses.replace(file, size=(bundle / name).stat().st_size, sha256=sha256(bundle / name))
        if file.path == name
        else file
        for file in manifest.files
    )
    (bundle / names.MANIFEST_FILE).write_text(dataclasses.replace(manifest, files=files).to_json())


def open_manifest(bundle: Path):
    from tokprune.runtime.bundle import read_manifest

    return read_manifest(bundle)


def test_build_needs_nothing_heavy(tiny_fp16, tmp_path):
    """In interpreters, the builder's child too, that have no torch, transformers or onnx, nor anything of export."""
    path = shutil.copytree(tiny_fp16, tmp_path / "bundle")
    for module in ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "safetensors", "scipy", "sklearn"):
        (tmp_path / "blocked").mkdir(exist_ok=True)
        (tmp_path / "blocked" / f"{module}.py").write_text(f"raise ImportError('{module} is blocked')")
    done = cli("build", path, "--target", "rtx", "--json", PYTHONPATH=str(tmp_path / "blocked"))
    assert done.returncode == 0, done.stderr
    assert all(segment["built"] for segment in json.loads(done.stdout)["segments"])


def test_tiny_engines_are_hashed_when_opened(built):
    ((_, found),) = slot.read_slots(built[0])
    assert all(segment.size < ALWAYS_HASHED for segment in found.segments)
