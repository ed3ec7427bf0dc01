"""What `build-plugins` looks for, and what is said when it is missing; tools are scripts (plugin_machine.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_machine import NVCC, Machine

from tokprune.plugins import toolchain
from tokprune.plugins.build import build_plugins
from tokprune.runtime.errors import UserError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


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
