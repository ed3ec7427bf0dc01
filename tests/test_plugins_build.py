"""``build-plugins`` around the compiler: what is built, and what is kept.

Tools are scripts here, so that any machine has them; real ones run in test_plugins_tensorrt.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plugin_machine import NVCC, Machine

from tokprune.plugins import build
from tokprune.plugins.build import LIBRARY, REGISTERING, build_plugins
from tokprune.runtime.errors import UserError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


class TestCache:
    def test_built_once(self, machine: Machine):
        lines: list[str] = []
        first = build_plugins("87", progress=lines.append)
        assert (first.tensorrt, first.cuda, first.architectures, first.cached) == ("10.3.1", "12.6", (87,), False)
        assert first.sources == build.source_hash()
        assert first.sha256 == build.sha256(first.library)
        assert first.library.is_relative_to(machine.cache / "tokprune" / "plugins")
        assert first.registering.parent == first.library.parent
        assert lines == ["[1/2] Building"] * 2
        configure, make = machine.asked()
        assert f"-DTENSORRT_INCLUDE_DIR={machine.headers}" in configure
        assert "-DCMAKE_CUDA_ARCHITECTURES=87-real" in configure
        assert make.endswith("--target tokprune_plugins tokprune_plugins_register")
        second = build_plugins("87")
        assert second.cached
        assert second.record() == {**first.record(), "cached": True}
        assert len(machine.asked()) == 2

    def test_architectures_tensorrt_cuda_and_sources_are_told_apart(self, machine: Machine, monkeypatch):
        built = [build_plugins("87"), build_plugins("80,87,80")]
        assert built[1].architectures == (80, 87)
        machine.tensorrt("11", "1")
        built.append(build_plugins("87"))
        machine.tool("nvcc", NVCC.replace("12.6", "13.0"))
        built.append(build_plugins("87"))
        monkeypatch.setattr(build, "source_hash", lambda: "0" * 64)
        built.append(build_plugins("87"))
        assert not any(each.cached for each in built)
        assert len({each.library for each in built}) == len(built)

    @pytest.mark.parametrize("file", [LIBRARY, REGISTERING, "build.json"])
    @pytest.mark.parametrize("content", [None, b"{}", b"other"])
    def test_what_is_damaged_is_built_again(self, machine: Machine, file: str, content: bytes | None):
        first = build_plugins("87")
        path = first.library.parent / file
        path.unlink() if content is None else path.write_bytes(content)
        again = build_plugins("87")
        assert not again.cached
        assert again.library == first.library
        assert build_plugins("87").sha256 == again.sha256 == build.sha256(again.library)

    def test_what_is_built_from_these_sources_is_found(self, machine: Machine, monkeypatch):
        assert build.find_built() == []
        monkeypatch.setattr(build, "source_hash", lambda: "0" * 64)
        build_plugins("87")
        monkeypatch.setattr(build, "source_hash", lambda: "1" * 64)
        built = [build_plugins(arch).library for arch in ("87", "90")]
        found = build.find_built()
        assert {each.library for each in found} == set(built)
        assert {each.architectures for each in found} == {(87,), (90,)}
        found[0].registering.unlink()
        assert len(build.find_built()) == 1

    def test_nothing_is_left_of_a_build_that_fails(self, machine: Machine, tmp_path: Path):
        machine.cmake("echo 'launch.cu(7): error: no such thing'; echo more; exit 3")
        with pytest.raises(
            UserError, match=r"not built .launch\.cu.7.: error: no such thing.: .* in (.*\.log)"
        ) as told:
            build_plugins("87", out=tmp_path / "out")
        (log,) = (path for path in (machine.cache / "tokprune" / "plugins").iterdir() if path.name != ".lock")
        assert str(log) in str(told.value)
        assert "more" in log.read_text()
        assert not (tmp_path / "out").exists()

    def test_what_a_killed_build_left_goes_with_the_next(self, machine: Machine):
        """Of whatever it was a build; one that is at work keeps its directory."""
        machine.cmake("exec sleep 60")
        code = "from tokprune.plugins.build import build_plugins; build_plugins('87')"
        builds = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        left = lambda: set((machine.cache / "tokprune" / "plugins").glob(".*.partial-*/build"))  # noqa: E731
        try:
            for _ in range(300):
                if len(left()) == len(builds):
                    break
                time.sleep(0.1)
            before = left()
            assert len(before) == 2
            builds[0].kill()
            builds[0].wait()
            machine.cmake()
            build_plugins("90")
            assert len(left()) == 1
            assert left() < before
        finally:
            for each in builds:
                each.kill()
                each.wait()

    def test_sources_are_hashed_by_name_and_content(self, tmp_path: Path, monkeypatch):
        hashes = [build.source_hash()]
        monkeypatch.setattr(build, "SOURCES", tmp_path)
        for name, text in (("CMakeLists.txt", "x"), ("a.cu", ""), ("b.h", "y"), ("b.h", "z"), ("c.py", "not a source")):
            (tmp_path / name).write_text(text)
            hashes.append(build.source_hash())
        assert hashes[-1] == hashes[-2]
        assert len(set(hashes)) == len(hashes) - 1

    def test_every_source_that_cmake_names_is_hashed(self):
        named = {line.strip(")") for line in (build.SOURCES / "CMakeLists.txt").read_text().split()}
        sources = {path.relative_to(build.SOURCES).as_posix() for path in build.source_files()}
        assert {name for name in named if name.endswith((".cu", ".cpp"))} <= sources
        assert {"cuda/types.h", "tensorrt/selector.h", "leverage_topk/launch.h"} <= sources


class TestOut:
    def test_whole_copy(self, machine: Machine, tmp_path: Path):
        out = tmp_path / "a" / "out"
        built = build_plugins("87", out=out)
        assert (built.library, built.registering) == (out / LIBRARY, out / REGISTERING)
        assert sorted(path.name for path in out.iterdir()) == sorted([LIBRARY, REGISTERING, "build.json"])
        assert json.loads((out / "build.json").read_text())["architectures"] == [87]
        (out / "mine").write_text("stays")
        again = build_plugins("86", out=out)
        assert again.sha256 == build.sha256(out / LIBRARY) != built.sha256
        assert (out / "mine").read_text() == "stays"

    def test_that_is_a_file(self, machine: Machine, tmp_path: Path):
        (tmp_path / "out").write_text("")
        with pytest.raises(UserError, match=r"--out .*out cannot be written .*: choose another"):
            build_plugins("87", out=tmp_path / "out")


class TestCommand:
    def run(self, *args: str) -> subprocess.CompletedProcess:
        code = "import sys; from tokprune.runtime.cli import main; sys.argv[0] = 'tokprune'; main()"
        return subprocess.run([sys.executable, "-c", code, "build-plugins", *args], capture_output=True, text=True)

    def test_prints_path_and_hash(self, machine: Machine, tmp_path: Path, monkeypatch):
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        done = self.run("--arch", "87", "--out", str(tmp_path / "out"), "--json")
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        assert told["library"] == str(tmp_path / "out" / LIBRARY)
        assert told["sha256"] == build.sha256(tmp_path / "out" / LIBRARY)
        plain = self.run("--arch", "87")
        assert told["sha256"] in plain.stdout
        assert "(as built before)" in plain.stdout

    def test_one_sentence_and_exit_code_2(self, machine: Machine):
        done = self.run("--arch", "sm_87")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: --arch sm_87 is neither")
        assert done.stderr.count("\n") == 1

    def test_needs_nothing_that_a_device_lacks(self):
        """Neither what export needs nor an engine's library: numpy and click at most."""
        heavy = ["torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "safetensors", "tensorrt", "polygraphy"]
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({heavy})); import tokprune.plugins.cli.build_plugins; "
            "print([name for name in sys.modules if name.startswith(('tokprune.export', 'tokprune.calibration'))])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
