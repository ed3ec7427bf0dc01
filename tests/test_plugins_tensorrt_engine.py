"""Engines with the plugins in them, on a machine without a GPU. For `make plugin-check`.

Parser and builder are TensorRT-RTX's, which ask the plugin for everything but to compute.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from plugin_harness import compiled, header_sets, version_of

from tokprune.export import demo
from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.selector import save_selector
from tokprune.plugins.build import LIBRARY
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.plugins.nodes import for_plugin
from tokprune.runtime import names
from tokprune.runtime.engines import compiler
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.plan import Plan, Rank, make_plan

pytestmark = pytest.mark.plugin

ARCH = "87"  # the one of test_plugins_tensorrt.py, so that the library is built once
HEADER_SETS = header_sets()
LEVERAGE = leverage.leverage_topk_node("X", ("kept", "scores"), 64, energy=0.9)
AXES = {  # least, usual, greatest
    names.BATCH: (1, 1, 2), names.SEQUENCE: (1, 612, 1300), names.IMAGES: (1, 1, 2), names.ROWS: (1, 100, 800),
    names.TEXT_ROWS: (1, 36, 512),
}  # fmt: skip


@pytest.fixture(scope="module", params=HEADER_SETS, ids=version_of)
def built(request) -> Path:
    """The library's directory, by each set of headers."""
    return compiled(request.param, ARCH)


@pytest.fixture(scope="module")
def newest() -> Path:
    """By the last set of headers."""
    return compiled(HEADER_SETS[-1], ARCH)


def demo_plan(method: str) -> Plan:
    facts, modules = find_checkpoint("demo").facts, load_modules(demo.modules_dir("default"))
    is_trained = method == "lvpruning"
    return make_plan(
        method,
        [(stage.layer, stage.keep) for stage in modules.stages] if is_trained else [(2, 64)],
        layers=facts.layers,
        visual_tokens=facts.vision.tokens,
        rank=None if is_trained else Rank(components=8),
        module=modules.module if is_trained else None,
    )


def demo_selector(method: str, dtype: str, folder: Path) -> SegmentFacts:
    """The demo model's first selector, written into ``folder``."""
    shutil.copy(demo.modules_dir("default") / names.MODULES_FILE, folder)
    return save_selector(folder, 0, demo_plan(method), find_checkpoint("demo").facts, dtype)


def profile(segment: SegmentFacts) -> compiler.ShapeRanges:
    def shape(tensor, which: int) -> tuple[int, ...]:
        return tuple(AXES[dim][which] if isinstance(dim, str) else dim for dim in tensor.shape)

    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in segment.inputs}


class TestEngine:
    """By NVIDIA's parser and builder; an engine that has the plugin in it names it in its bytes."""

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize(("method", "op"), [("lofi", "LeverageTopK"), ("lvpruning", "CrossAttentionTopK")])
    def test_of_the_demo_model(self, built: Path, method: str, op: str, dtype: str, tmp_path: Path):
        segment = demo_selector(method, dtype, tmp_path)
        sizes = {}
        for file, plugins in ((segment.plugin_file, [built / LIBRARY]), (segment.file, [])):
            assert file is not None
            engine = tmp_path / f"{file}.engine"
            report = compiler.build(tmp_path / file, engine, [profile(segment)], plugins=plugins)
            assert report.refusals == ()
            assert [tensor.name for tensor in report.inputs] == [tensor.name for tensor in segment.inputs]
            assert [(tensor.name, tensor.dtype) for tensor in report.outputs] == [
                (tensor.name, tensor.dtype) for tensor in segment.outputs
            ]
            sizes[file] = engine.read_bytes().count(op.encode() + b"\0")
            if method == "lofi" and plugins:
                assert b"oversampling" in engine.read_bytes()  # its fields are in the engine
            if method == "lofi" and dtype == "float32":
                break  # its body of standard operators takes the builder long, and is built elsewhere
        assert sizes.pop(segment.plugin_file) > 0
        assert set(sizes.values()) <= {0}

    def test_bfloat16(self, newest: Path, tmp_path: Path):
        rows = {"rows": (TensorProto.FLOAT, ["images", 576, 4096])}
        cast = helper.make_node("Cast", ["rows"], ["X"], to=TensorProto.BFLOAT16)
        report = build_node(tmp_path, newest, LEVERAGE, rows, cast)
        assert report.refusals == ()
        assert b"LeverageTopK" in (tmp_path / "engine").read_bytes()

    @pytest.mark.parametrize(
        ("change", "inputs", "words"),
        [
            ({"k": 600}, {}, "k = 600 of 576 rows"),
            ({"rank": 576, "energy": 0.0}, {}, "rank = 576 of 576 rows"),
            ({"energy": 1.5}, {}, "not either a rank or an energy"),
            ({}, {"X": (TensorProto.FLOAT, [576, 4096])}, "input 0 has 2 axes, not 3"),
            (
                {},
                {"X": (TensorProto.FLOAT, ["images", "rows", 4096])},
                "axis 1 of input 0 is open, and only axis 0 may",
            ),
            (
                {},
                {"X": (TensorProto.INT32, ["images", 576, 4096])},
                "input 0 is of a type that the operator does not take",
            ),
        ],
    )
    def test_graph_made_wrong_is_told_by_node(self, newest: Path, change, inputs, words: str, tmp_path: Path):
        node = onnx.NodeProto()
        node.CopyFrom(LEVERAGE)
        node.name = "the_selector"
        for attribute in node.attribute:
            if attribute.name in change:
                attribute.CopyFrom(helper.make_attribute(attribute.name, change[attribute.name]))
        report = build_node(tmp_path, newest, node, inputs or {"X": (TensorProto.FLOAT16, ["images", 576, 4096])})
        assert report.refusals
        assert not (tmp_path / "engine").exists()
        assert report.refusals[0].node == "the_selector"
        # what TensorRT's logger was told by the plugin
        assert any(line.startswith("tokprune::LeverageTopK: ") and words in line for line in report.log)

    def test_without_the_library(self, tmp_path: Path):
        compiled(HEADER_SETS[-1], ARCH)  # so that this fails, too, where there are no headers
        segment = demo_selector("lofi", "float16", tmp_path)
        assert segment.plugin_file is not None
        (refusal,) = compiler.parse(tmp_path / segment.plugin_file).refusals
        assert (refusal.node, refusal.operator) == ("LeverageTopK", "LeverageTopK")


def build_node(
    folder: Path, library: Path, node: onnx.NodeProto, inputs: dict, *before: onnx.NodeProto
) -> compiler.Report:
    """An engine of ``node``, behind ``before``, from ``inputs`` of these types and shapes; up to 3 images."""
    graph = helper.make_graph(
        [*before, for_plugin(node, 1)],
        "graph",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [
            helper.make_tensor_value_info("kept", TensorProto.INT64, None),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, None),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("tokprune", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "a.onnx")
    ranges = {
        name: tuple(tuple(images if isinstance(dim, str) else dim for dim in shape) for images in (1, 1, 3))
        for name, (_, shape) in inputs.items()
    }
    return compiler.build(folder / "a.onnx", folder / "engine", [ranges], plugins=[library / LIBRARY])
