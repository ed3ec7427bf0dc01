"""The plugin library as a whole, on a machine without a GPU: NVIDIA's headers, registry, parser and builder.

`make plugin-check` runs this against every directory in TENSORRT_INCLUDE_DIR; nothing is skipped. Registry: TensorRT
lean 11.4. Parser and builder: TensorRT-RTX, which asks the plugin for everything but to compute.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from plugin_harness import compiled, harness, header_sets, version_of, write_case

from tokprune.export import demo
from tokprune.export.checkpoint import find_checkpoint
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.selector import save_selector
from tokprune.plugins.build import LIBRARY, REGISTERING
from tokprune.plugins.cross_attention_topk import body as cross_attention
from tokprune.plugins.cross_attention_topk.reference import WEIGHTS
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.plugins.nodes import for_plugin
from tokprune.plugins.toolchain import tensorrt_version
from tokprune.runtime import names
from tokprune.runtime.engines import compiler
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.plan import Plan, Rank, make_plan

pytestmark = pytest.mark.plugin

ARCH = "87"  # Orin's: one is enough here, kernels are compiled for all in their own tests
HEADER_SETS = header_sets()
LEVERAGE = leverage.leverage_topk_node("X", ("kept", "scores"), 64, energy=0.9)
CROSS_ATTENTION = cross_attention.cross_attention_topk_node(
    cross_attention.ROWS, "text_valid", WEIGHTS, ("kept", "scores"), 48, heads=4
)


@pytest.fixture(scope="module", params=HEADER_SETS, ids=version_of)
def built(request) -> Path:
    """The library's directory, by each set of headers."""
    return compiled(request.param, ARCH)


@pytest.fixture(scope="module")
def newest() -> Path:
    """By the last set of headers."""
    return compiled(HEADER_SETS[-1], ARCH)


def symbols(library: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}


class TestLibrary:
    def test_compiled_without_a_warning(self, built: Path):
        """-Werror stops what compilers warn of; nothing else may have been said either."""
        assert [line for line in (built / "log").read_text().splitlines() if " warning" in line.lower()] == []

    def test_needs_no_library_of_nvidias(self, built: Path):
        assert {"getCreators", "setLoggerFinder"} <= symbols(built / LIBRARY, "--defined-only")
        for name in (LIBRARY, REGISTERING):
            undefined = symbols(built / name, "--undefined-only")
            assert [
                symbol for symbol in undefined if re.match(r"_ZNK?8nvinfer1|_ZT.N8nvinfer1|get[A-Z]|cu[A-Za-z]", symbol)
            ] == []
            done = subprocess.run(["readelf", "-d", built / name], capture_output=True, text=True, check=True)
            needed = {line.rpartition("[")[2].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line}
            assert needed & {"libstdc++.so.6"}
            assert {library for library in needed if "nv" in library or "cuda" in library} == set()
            assert all("[$ORIGIN]" in line for line in done.stdout.splitlines() if "PATH)" in line)

    @pytest.mark.parametrize("node", [LEVERAGE, CROSS_ATTENTION], ids=lambda node: node.op_type)
    def test_fields_come_back_as_the_node_gave_them(self, built: Path, node: onnx.NodeProto, tmp_path: Path):
        """Through creator, plugin, its serialised fields, creator again, and the clone that a context gets."""
        case = write_case(tmp_path, node, {})
        done = harness(built, "fields", case)
        assert (done.returncode, done.stderr) == (0, "")
        given = [line for line in case.read_text().splitlines() if line.startswith(("int", "float"))]
        assert sorted(done.stdout.splitlines()) == sorted(given)
        assert len(given) == len(node.attribute)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda lines: [line for line in lines if " seed " not in line], "attribute seed is missing"),
            (lambda lines: [*lines, "int more 1"], "attribute more is unknown"),
            (lambda lines: [*lines, "int k 2"], "attribute k is given twice"),
            (lambda lines: [line.replace("int k", "float k") for line in lines], "attribute k is not one int32"),
            (lambda lines: [line.replace("rank 0", "rank 3") for line in lines], "not either a rank or an energy"),
            (lambda lines: [line.replace("int k 64", "int k 0") for line in lines], "below its least value"),
        ],
    )
    def test_fields_that_cannot_be(self, built: Path, change, words: str, tmp_path: Path):
        case = write_case(tmp_path, LEVERAGE, {})
        case.write_text("\n".join(change(case.read_text().splitlines())) + "\n")
        done = harness(built, "fields", case)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"tokprune::LeverageTopK: {words}" in done.stderr or words in done.stderr

    def test_all_architectures(self, newest: Path, tmp_path: Path):
        """In one file, by the command that users have: machine code of each operator for each."""
        code = "import sys; from tokprune.runtime.cli import main; sys.argv[0] = 'tokprune'; main()"
        asked = ["--arch", "all", "--tensorrt-include", str(HEADER_SETS[-1]), "--out", str(tmp_path), "--json"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code, "build-plugins", *asked], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["architectures"] == [80, 86, 87, 89, 90, 100, 120]
        assert machine_code(tmp_path / LIBRARY) == [[80, 86, 87, 89, 90, 100, 120]] * 2
        assert machine_code(newest / LIBRARY) == [[int(ARCH)]] * 2


def machine_code(library: Path) -> list[list[int]]:
    """Compute capabilities of the cubins in each fat binary: an operator's source has one."""
    content, found = library.read_bytes(), []
    for place in re.finditer(struct.pack("<I", 0xBA55ED50), content):
        _, _, header, size = struct.unpack_from("<IHHQ", content, place.start())
        entry, end, archs = place.start() + header, place.start() + header + size, []
        while entry < end:
            kind, _, entry_header, length = struct.unpack_from("<HHIQ", content, entry)
            assert kind == 2  # machine code, not PTX
            archs.append(struct.unpack_from("<I", content, entry + 28)[0])
            entry += entry_header + length
        found.append(archs)
    return found


REGISTRY = """
import ctypes, gc, sys
import numpy as np
import tensorrt_lean_bindings as trt

LEVERAGE = dict(k=64, rank=8, energy=0.0, max_rank=64, rounds=8, oversampling=16, purifications=45, seed=0)

def make(creator, **values):
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    kept = [(name, np.array([value], kinds[type(value)][0]), kinds[type(value)][1]) for name, value in values.items()]
    fields = trt.PluginFieldCollection([trt.PluginField(*each) for each in kept])  # they point to the arrays
    return creator.create_plugin("node", fields, trt.TensorRTPhase.BUILD)

registry = trt.get_plugin_registry()

def ours():
    return {
        creator.name: [field.name for field in creator.field_names]
        for creator in registry.all_creators
        if creator.plugin_namespace == "tokprune" and creator.plugin_version == "1"
    }
"""
OURS = {"LeverageTopK": list(leverage.ATTRIBUTES), "CrossAttentionTopK": list(cross_attention.ATTRIBUTES)}


def lean(code: str, *args: Path) -> subprocess.CompletedProcess:
    """``code`` in a process of its own, with the registry of TensorRT lean."""
    assert importlib.util.find_spec("tensorrt_lean_bindings"), "pip install 'tokprune[plugin-check]'"
    return subprocess.run([sys.executable, "-c", REGISTRY + code, *map(str, args)], capture_output=True, text=True)


class TestRegistry:
    def test_creators_are_called(self, built: Path):
        done = lean(
            """
handle = registry.load_library(sys.argv[1])
print(ours())
creator = registry.get_creator("LeverageTopK", "1", "tokprune")
plugin = make(creator, **LEVERAGE)
core, runtime, build = (plugin.get_capability_interface(kind) for kind in (
    trt.PluginCapabilityType.CORE, trt.PluginCapabilityType.RUNTIME, trt.PluginCapabilityType.BUILD))
print([part.interface_info.kind for part in (core, build, runtime)])
print(make(creator, **{**LEVERAGE, "rank": 0}))
print(make(registry.get_creator("CrossAttentionTopK", "1", "tokprune"), k=4, heads=2, eps=1e-6) is not None)
del plugin, core, runtime, build, creator
gc.collect()
registry.deregister_library(handle)
print(ours())
""",
            built / LIBRARY,
        )
        assert done.returncode == 0, done.stderr
        before, kinds, refused, other, after = done.stdout.splitlines()
        assert ast.literal_eval(before) == OURS
        assert kinds == "['PLUGIN_V3ONE_CORE', 'PLUGIN_V3ONE_BUILD', 'PLUGIN_V3ONE_RUNTIME']"
        assert (refused, other, after) == ("None", "True", "{}")
        assert "tokprune::LeverageTopK: rank = 0 and energy = 0.0" in done.stderr

    def test_registering_library_loaded_by_dlopen(self, built: Path):
        """By the 11.4 that is here, if it was made for 11; another says so and harms nothing."""
        done = lean("ctypes.CDLL(sys.argv[1]); print(ours())", built / REGISTERING)
        assert done.returncode == 0, done.stderr
        major = tensorrt_version(find_headers_of(built)).partition(".")[0]
        if major == "11":
            assert ast.literal_eval(done.stdout) == OURS
        else:
            assert done.stdout == "{}\n"
            assert f"no TensorRT {major} is loaded in this process" in done.stderr

    def test_registering_library_without_tensorrt(self, built: Path):
        done = subprocess.run(
            [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", built / REGISTERING],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert "so no plugin was registered: load libtokprune_plugins_register.so after TensorRT" in done.stderr


def find_headers_of(built: Path) -> Path:
    (headers,) = [each for each in HEADER_SETS if each and compiled(each, ARCH) == built]
    return headers


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


AXES = {  # least, usual, greatest
    names.BATCH: (1, 1, 2), names.SEQUENCE: (1, 612, 1300), names.IMAGES: (1, 1, 2), names.ROWS: (1, 100, 800),
    names.TEXT_ROWS: (1, 36, 512),
}  # fmt: skip


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
