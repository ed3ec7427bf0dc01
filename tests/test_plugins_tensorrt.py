"""The plugin library as a whole, on a machine without a GPU: NVIDIA's headers and registry, of TensorRT lean 11.4.

`make plugin-check` runs this against every directory in TENSORRT_INCLUDE_DIR; nothing is skipped.
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
from plugin_harness import compiled, harness, header_sets, version_of, write_case

from tokprune.plugins.build import LIBRARY, REGISTERING
from tokprune.plugins.cross_attention_topk import body as cross_attention
from tokprune.plugins.cross_attention_topk.reference import WEIGHTS
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.plugins.toolchain import tensorrt_version

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

    def test_an_operator_is_registered_once(self, built: Path, tmp_path: Path):
        """Why runtime/engines/versions.py loads no library a second time, not even a copy of it."""
        shutil.copy2(built / LIBRARY, tmp_path / "copy.so")
        done = lean(
            "print([registry.load_library(path) is not None for path in (*sys.argv[1:], sys.argv[1])], len(ours()))",
            built / LIBRARY,
            tmp_path / "copy.so",
        )
        assert (done.returncode, done.stdout) == (0, "[True, False, False] 2\n"), done.stderr

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
