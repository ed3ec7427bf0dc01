"""NVIDIA's parser, from file, on every graph that an export writes; and what it says of graphs that are broken.

Nothing here is skipped: without the TensorRT-RTX wheels, which need no GPU, the tests fail.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import PLANS
from onnx import TensorProto, helper, numpy_helper

from tokprune.export import demo
from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.pipeline import Graphs, export
from tokprune.export.selector import save_selector
from tokprune.runtime import UserError, names
from tokprune.runtime.bundle import read_manifest
from tokprune.runtime.engines import compiler
from tokprune.runtime.engines.versions import RTX
from tokprune.runtime.flops import SEVEN_B
from tokprune.runtime.manifest import ModelFacts, SegmentFacts, TensorFacts
from tokprune.runtime.plan import METHODS, Plan, Rank, Stage, make_plan


def is_accepted_as(segment: SegmentFacts, report: compiler.Report) -> None:
    """TensorRT has read the tensors that the manifest promises, and has no complaint."""
    assert report.refusals == ()
    assert report.inputs == seen(segment.inputs)
    assert report.outputs == seen(segment.outputs)
    # the one thing it says of every graph: int64 tensors are to be bound as int64
    assert [line for line in report.log if not line.endswith("has Int64 binding.")] == []


def seen(tensors: tuple[TensorFacts, ...]) -> tuple[compiler.TensorSeen, ...]:
    return tuple(
        compiler.TensorSeen(
            tensor.name, tuple(-1 if isinstance(dim, str) else dim for dim in tensor.shape), tensor.dtype
        )
        for tensor in tensors
    )


def all_accepted(bundle: Path) -> None:
    for segment in read_manifest(bundle).segments:
        is_accepted_as(segment, compiler.parse(bundle / segment.file))


def demo_plan(method: str, facts: ModelFacts) -> Plan:
    modules = load_modules(demo.modules_dir("default"))
    stages = {"none": [], "lvpruning": [(stage.layer, stage.keep) for stage in modules.stages]}
    return make_plan(
        method,
        stages.get(method, [(2, 64)]),
        layers=facts.layers,
        visual_tokens=facts.vision.tokens,
        rank=Rank(components=8) if method == "lofi" else None,
        module=modules.module if method == "lvpruning" else None,
    )


class TestBundles:
    @pytest.mark.parametrize("key", PLANS)
    def test_every_graph_is_accepted(self, tiny_bundle, key: str):
        all_accepted(tiny_bundle(key))

    def test_every_graph_is_accepted_in_fp16(self, tiny_bundle):
        all_accepted(tiny_bundle("lofi", "fp16"))

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_every_graph_of_the_demo_model_is_accepted(self, tmp_path: Path, precision: str):
        checkpoint, graphs = find_checkpoint("demo"), Graphs()
        modules = load_modules(demo.modules_dir("default"))
        for method in METHODS:
            plan, out = demo_plan(method, checkpoint.facts), tmp_path / method
            given = modules if method == "lvpruning" else None
            export(checkpoint, plan, out, precision=precision, graphs=graphs, modules=given)
            all_accepted(out)


class TestSelectors:
    """Of real sizes: TopK of 64 of 576 rows, trained modules at offsets in their safetensors file, LoFi's full body."""

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
    def test_of_the_demo_model(self, method: str, dtype: str, tmp_path: Path):
        facts = find_checkpoint("demo").facts
        plan = demo_plan(method, facts)
        shutil.copy(demo.modules_dir("default") / names.MODULES_FILE, tmp_path)
        for index in range(len(plan.stages)):
            segment = save_selector(tmp_path, index, plan, facts, dtype)
            is_accepted_as(segment, compiler.parse(tmp_path / segment.file))

    def test_of_7b(self, tmp_path: Path):
        plan = Plan("lofi", (Stage(2, 192),), Rank(components=32))
        segment = save_selector(tmp_path, 0, plan, SEVEN_B, "float16")
        is_accepted_as(segment, compiler.parse(tmp_path / segment.file))


def write_graph(path: Path, *nodes: onnx.NodeProto, width: int = 4, functions=()) -> Path:
    """A graph from x [width, width] to y; what TensorRT makes of ``nodes`` is the tests' matter."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [width, width]) for name in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("tokprune", 1)]
    graph = helper.make_graph(nodes, "graph", [x], [y])
    onnx.save(helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10), path)
    return path


class TestRefusals:
    def test_operator_that_nobody_knows(self, tmp_path: Path):
        fine = helper.make_node("Abs", ["x"], ["a"], name="fine")
        odd = helper.make_node("LeverageTopK", ["a"], ["y"], name="odd", domain="tokprune")
        report = compiler.parse(write_graph(tmp_path / "a.onnx", fine, odd))
        assert not report.accepted
        ((node, operator, message),) = ((r.node, r.operator, r.message) for r in report.refusals)
        assert (node, operator) == ("odd", "LeverageTopK")
        assert "Plugin not found" in message

    def test_operator_that_tensorrt_lacks_in_a_function(self, tmp_path: Path):
        """Valid ONNX, so that only TensorRT can say so: functions are looked into."""
        inner = helper.make_node("Det", ["X"], ["Y"], name="inner")
        function = helper.make_function("tokprune", "F", ["X"], ["Y"], [inner], [helper.make_opsetid("", 20)])
        call = helper.make_node("F", ["x"], ["y"], domain="tokprune")
        report = compiler.parse(write_graph(tmp_path / "a.onnx", call, functions=[function]))
        assert [(r.node, r.operator) for r in report.refusals] == [("inner", "Det")]

    @pytest.mark.parametrize(("left", "word"), [(None, "Failed to open"), (100, "out of range")])
    def test_weights_missing_or_cut(self, tiny_bundle, tmp_path: Path, left: int | None, word: str):
        bundle = tiny_bundle("lofi")
        shutil.copy(bundle / "decoder_0.onnx", tmp_path)
        if left is not None:
            (tmp_path / "model.safetensors").write_bytes((bundle / "model.safetensors").read_bytes()[:left])
        report = compiler.parse(tmp_path / "decoder_0.onnx")
        assert "Failed to import initializer" in report.refusals[0].message
        assert any(word in line and str(tmp_path / "model.safetensors") in line for line in report.log)

    @pytest.mark.parametrize("content", [b"", b"hello world" * 99, None])
    def test_no_graph(self, tmp_path: Path, content: bytes | None):
        """Of bytes that pass for unknown fields, or of none, the parser makes an empty network: a success."""
        if content is not None:
            (tmp_path / "a.onnx").write_bytes(content)
        (refusal,) = compiler.parse(tmp_path / "a.onnx").refusals
        assert ("no graph" if content is not None else "cannot be found") in refusal.message


AXES = (names.BATCH, names.SEQUENCE, names.PAST, names.TOTAL, names.LOGITS_COUNT, names.IMAGES, names.ROWS)
ONE = (1, 1, 1)
PREFILL = dict(zip(AXES, (ONE, (1, 30, 64), (0, 0, 0), (1, 30, 64), ONE, ONE, (1, 9, 64)), strict=True))
DECODE = dict(zip(AXES, (ONE, ONE, (1, 30, 64), (2, 31, 65), ONE, ONE, ONE), strict=True))


def profile(segment: SegmentFacts, sizes: dict[str, tuple[int, int, int]]) -> compiler.ShapeRanges:
    def shape(tensor: TensorFacts, which: int) -> compiler.Shape:
        return tuple(sizes[dim][which] if isinstance(dim, str) else dim for dim in tensor.shape)

    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in segment.inputs}


class TestBuild:
    def test_decoder_for_prefill_and_decode(self, tiny_bundle, tmp_path: Path):
        """One engine, two profiles; an engine with one of them is another."""
        bundle = tiny_bundle("lofi")
        manifest = read_manifest(bundle)
        segment = manifest.segment("decoder_1")
        (weights,) = [each.total for each in manifest.memory if each.segment == "decoder_1"]
        profiles = [profile(segment, PREFILL), profile(segment, DECODE)]
        sizes = []
        for count in (1, 2):
            report = compiler.build(bundle / segment.file, tmp_path / "engine", profiles[:count])
            is_accepted_as(segment, report)
            sizes.append((tmp_path / "engine").stat().st_size)
        assert sizes[0] > weights  # the weights are in it
        assert sizes[1] > sizes[0]

    @pytest.mark.parametrize("key", ["lofi", "fastv", "random"])
    def test_selectors(self, tiny_bundle, tmp_path: Path, key: str):
        bundle = tiny_bundle(key)
        segment = next(each for each in read_manifest(bundle).segments if each.name == "select_0")
        is_accepted_as(segment, compiler.build(bundle / segment.file, tmp_path / "engine", [profile(segment, PREFILL)]))
        assert (tmp_path / "engine").stat().st_size > 0

    @pytest.mark.parametrize(
        ("profiles", "word"),
        [([], "profile"), ([{}], "input_ids"), ([{"input_ids": ((1, 9), (1, 5), (1, 9))}], "MIN<=OPT<=MAX")],
    )
    def test_profile_that_does_not_fit(
        self, tiny_bundle, tmp_path: Path, profiles: list[compiler.ShapeRanges], word: str
    ):
        (refusal,) = compiler.build(tiny_bundle("lofi") / "embed_tokens.onnx", tmp_path / "engine", profiles).refusals
        assert word in refusal.message
        assert not (tmp_path / "engine").exists()

    @pytest.mark.parametrize(
        ("node", "said"),
        [
            (helper.make_node("Concat", ["x", "x"], ["y"], name="wrong", axis=0), ("wrong", "CONCATENATION")),
            (helper.make_node("Concat", ["x", "x", "x"], ["y"], name="wrong", axis=2), ("wrong", "CONCATENATION")),
            (helper.make_node("Abs", ["x"], ["y"], name="wrong"), ("wrong", "UNARY")),
        ],
    )
    def test_output_that_is_not_an_input_and_new_rows(self, tmp_path: Path, node: onnx.NodeProto, said: tuple):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 3, 4])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "graph", [x], [y])
        opsets = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "a.onnx")
        report = compiler.build(tmp_path / "a.onnx", tmp_path / "engine", [], appended=[("y", "x", "new")])
        (refusal,) = report.refusals
        assert (refusal.node, refusal.operator) == said
        assert refusal.message == "y is not x with new rows behind it"
        assert not (tmp_path / "engine").exists()

    def test_restriction_that_only_building_finds(self, tmp_path: Path):
        """TopK takes at most 3840: far above the 576 tokens of LLaVA-1.5, and parsed without a word."""
        k = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array([3841])))
        node = helper.make_node("TopK", ["x", "k"], ["y", "indices"], name="top")
        path = write_graph(tmp_path / "a.onnx", k, node, width=4000)
        assert compiler.parse(path).accepted
        assert "3840" in compiler.build(path, tmp_path / "engine", []).refusals[0].message


class TestEnvironment:
    def test_version_that_was_pinned(self, tiny_bundle):
        """The constraints' version is what ran, and the library's directory leaves no trace in this process."""
        import os

        before = dict(os.environ)
        pins = (Path(__file__).parent / "constraints.txt").read_text().split()
        engine = compiler.parse(tiny_bundle("none") / "embed_tokens.onnx").engine
        assert f"tensorrt-rtx-cu13-bindings=={engine.removeprefix('tensorrt-rtx-')}" in pins
        assert dict(os.environ) == before
        assert "tensorrt_rtx_bindings" not in sys.modules

    @pytest.mark.parametrize("module", RTX.modules)
    def test_wheel_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"tensorrt-rtx was asked for, and {module} not found .*tokprune\[rtx\]"):
            compiler.parse(tmp_path / "a.onnx")

    def test_wheel_without_its_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "tensorrt_rtx_libs").mkdir()
        (tmp_path / "tensorrt_rtx_libs" / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=rf"{tmp_path}/tensorrt_rtx_libs holds no libtensorrt_rtx\.so: pip install"):
            compiler.parse(tmp_path / "a.onnx")

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("import os; print('could not open', file=__import__('sys').stderr); os.abort()", "SIGABRT .could not op"),
            ("raise ImportError('another version')", "exit code 1 .ImportError: another version"),
        ],
    )
    def test_process_that_ends_without_a_report(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
    ):
        """As it does where libraries do not fit: the parser aborts, the bindings do not import."""
        (tmp_path / "tensorrt_rtx_bindings.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(UserError, match=rf"{tmp_path}/a\.onnx and ended with .*{words}"):
            compiler.parse(tmp_path / "a.onnx")


def test_process_that_ends_before_it_has_read_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job is longer than a pipe holds; that nobody reads it must not pass for a reader of ours that went away."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ranges = {f"past_key_values.{layer}.key": ((1, 2, 0, 64),) * 3 for layer in range(3000)}
    with pytest.raises(UserError, match=r"ended with exit code 1 \(nothing was printed\)"):
        compiler.build(tmp_path / "a.onnx", tmp_path / "engine", [ranges])
