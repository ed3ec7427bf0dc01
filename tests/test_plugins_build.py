"""``build-plugins`` around the compiler: what is looked for, what is said when it is missing, what is kept.

Tools are scripts here, so that any machine has them; real ones run in test_plugins_tensorrt.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokprune.plugins import build, toolchain
from tokprune.plugins.build import LIBRARY, REGISTERING, build_plugins
from tokprune.runtime.errors import UserError

NVCC = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release 12.6, V12.6.68" ;;
--list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_87\\ncompute_90\\n' ;;
esac
"""
# Leaves a library of its own for each call, and a line of what it was asked
CMAKE = """#!/bin/sh
echo "$@" >> {calls}
if [ "$1" = --build ]; then
  head -c 100 /dev/urandom > "$2/{library}"
  echo registering > "$2/{registering}"
else
  mkdir -p "$4"
fi
echo "[1/2] Building"
{end}
"""


class Machine:
    """A PATH with nothing but ``tools``, and TensorRT's headers beside it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.headers, self.calls = folder / "bin", folder / "include", folder / "calls"
        self.cache = folder / "cache"
        for path in (self.bin, self.headers):
            path.mkdir()
        for name in ("ninja", "c++"):
            self.tool(name, "#!/bin/sh\n")
        self.tool("nvcc", NVCC)
        self.cmake()
        self.tensorrt("10", "3")
        monkeypatch.setenv("PATH", os.pathsep.join([str(self.bin), "/usr/bin", "/bin"]))  # the scripts' own needs
        monkeypatch.setattr(toolchain.shutil, "which", self.which)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(self.headers))
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setattr(toolchain, "_DEVICE_TREE", folder / "compatible")
        monkeypatch.setattr(toolchain, "_packaged_nvcc", lambda: iter(()))

    def which(self, name: str, path: str | None = None) -> str | None:
        return str(self.bin / name) if (self.bin / name).is_file() else None

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def cmake(self, end: str = "exit 0") -> None:
        self.tool("cmake", CMAKE.format(calls=self.calls, library=LIBRARY, registering=REGISTERING, end=end))

    def tensorrt(self, major: str, minor: str, name: str = "TRT_{}_ENTERPRISE") -> None:
        (self.headers / "NvInferRuntime.h").write_text("")
        parts = {"MAJOR": major, "MINOR": minor, "PATCH": "1"}
        lines = [f"#define {name.format(part)} {value} //!< version\n" for part, value in parts.items()]
        (self.headers / "NvInferVersion.h").write_text("".join(lines))

    def asked(self) -> list[str]:
        """What cmake was called with."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []


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
        (log,) = (machine.cache / "tokprune" / "plugins").iterdir()
        assert str(log) in str(told.value)
        assert "more" in log.read_text()
        assert not (tmp_path / "out").exists()

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


class TestArchitectures:
    def test_all_that_this_nvcc_knows(self, machine: Machine):
        assert build_plugins("all").architectures == (80, 86, 87, 90)

    def test_native_is_every_gpu_here(self, machine: Machine):
        machine.tool("nvidia-smi", "#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
        assert build_plugins().architectures == (86, 90)

    @pytest.mark.parametrize(("name", "arch"), [("nvidia,tegra234", 87), ("nvidia,tegra264", 110)])
    def test_native_on_a_jetson(self, machine: Machine, tmp_path: Path, name: str, arch: int):
        """Where nvidia-smi, if there is one, does not say."""
        (tmp_path / "compatible").write_bytes(f"nvidia,p3737-0000+p3701-0000\0{name}\0".encode())
        machine.tool("nvidia-smi", "#!/bin/sh\necho '[N/A]'\n")
        machine.tool("nvcc", NVCC.replace("compute_90", "compute_110"))
        assert build_plugins().architectures == (arch,)

    @pytest.mark.parametrize(
        ("wanted", "words"),
        [
            ("sm_87", "--arch sm_87 is neither native, all nor capabilities"),
            ("", "neither native"),
            ("87,120", "means 120, which .*nvcc of CUDA 12.6 does not compile for: choose from 80, 86, 87, 90"),
            ("native", "no GPU was found .* .there is no nvidia-smi.: .* --arch 87 for Orin"),
        ],
    )
    def test_refused(self, machine: Machine, wanted: str, words: str):
        with pytest.raises(UserError, match=words):
            build_plugins(wanted)

    def test_native_where_the_driver_lists_none(self, machine: Machine):
        machine.tool("nvidia-smi", "#!/bin/sh\n")
        with pytest.raises(UserError, match="nvidia-smi lists none"):
            build_plugins()

    def test_native_where_the_driver_fails(self, machine: Machine):
        machine.tool("nvidia-smi", "#!/bin/sh\nexit 9\n")
        with pytest.raises(UserError, match=r"nvidia-smi --query-gpu=compute_cap .* failed .*exit status 9"):
            build_plugins()


class TestMissing:
    JETSON = b"nvidia,p3768-0000\0nvidia,tegra234\0"

    @pytest.mark.parametrize(
        ("tool", "words"),
        [
            ("nvcc", "need nvcc, .*: install CUDA 12.2 or later, or pip install nvidia-cuda-nvcc"),
            ("cmake", "needs cmake: sudo apt install cmake"),
            ("ninja", "needs ninja or make: "),
            ("c++", r"needs g\+\+: "),
        ],
    )
    def test_tool(self, machine: Machine, tool: str, words: str, monkeypatch):
        (machine.bin / tool).unlink()
        monkeypatch.setattr(toolchain, "_USUAL_CUDA", machine.bin / "none")
        with pytest.raises(UserError, match=words):
            build_plugins("87")
        assert machine.asked() == []

    def test_make_does_where_ninja_is_missing(self, machine: Machine):
        (machine.bin / "ninja").rename(machine.bin / "make")
        build_plugins("87")
        assert "-G Unix Makefiles" in machine.asked()[0]

    def test_nvcc_of_cuda_home_or_of_the_package(self, machine: Machine, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(toolchain, "_USUAL_CUDA", machine.bin / "none")
        home = tmp_path / "home"
        (home / "bin").mkdir(parents=True)
        (machine.bin / "nvcc").rename(home / "bin" / "nvcc")
        monkeypatch.setattr(toolchain, "_packaged_nvcc", lambda: iter([home / "bin" / "nvcc"]))
        assert toolchain.find_nvcc() == home / "bin" / "nvcc"
        monkeypatch.setattr(toolchain, "_packaged_nvcc", lambda: iter(()))
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert toolchain.find_nvcc() == home / "bin" / "nvcc"

    def test_on_a_jetson_it_is_apt(self, machine: Machine, tmp_path: Path, monkeypatch):
        (tmp_path / "compatible").write_bytes(self.JETSON)
        monkeypatch.setattr(toolchain, "_USUAL_CUDA", machine.bin / "none")
        monkeypatch.setattr(toolchain, "_USUAL_HEADERS", ("/nowhere",))
        monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
        with pytest.raises(UserError, match=r"in none of /nowhere: sudo apt install libnvinfer-headers-dev$"):
            build_plugins()
        (machine.bin / "nvcc").unlink()
        with pytest.raises(UserError, match=r"need nvcc.*: sudo apt install cuda-nvcc-12-6 .* JetPack 7\.2$"):
            build_plugins()

    def test_headers(self, machine: Machine, tmp_path: Path, monkeypatch):
        with pytest.raises(UserError, match=r"--tensorrt-include names .*bin, which has no NvInferRuntime\.h: give"):
            build_plugins("87", machine.bin)
        monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(machine.bin))
        with pytest.raises(UserError, match=r"TENSORRT_INCLUDE_DIR names .*bin, which has no NvInferRuntime\.h"):
            build_plugins("87")
        assert build_plugins("87", machine.headers).tensorrt == "10.3.1"
        monkeypatch.setattr(toolchain, "_USUAL_HEADERS", ("/nowhere", str(machine.headers)))
        monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
        assert build_plugins("87").cached

    def test_headers_of_10_3_say_their_version_in_another_way(self, machine: Machine):
        machine.tensorrt("10", "3", "NV_TENSORRT_{}")
        assert build_plugins("87").tensorrt == "10.3.1"

    @pytest.mark.parametrize(("version", "words"), [(("8", "6"), r"holds TensorRT 8\.6\.1, the plugin needs 10\.3")])
    def test_headers_too_old(self, machine: Machine, version: tuple[str, str], words: str):
        machine.tensorrt(*version)
        with pytest.raises(UserError, match=words):
            build_plugins("87")

    def test_headers_without_a_version(self, machine: Machine):
        (machine.headers / "NvInferVersion.h").unlink()
        with pytest.raises(UserError, match=r"NvInferVersion\.h does not tell TensorRT's version"):
            build_plugins("87")


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
