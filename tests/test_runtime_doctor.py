"""What `tokprune doctor` says: of this machine, of a Jetson that is made of files, and of what is missing."""

import json
import os
import sys
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

from tokprune.plugins import build
from tokprune.runtime import device
from tokprune.runtime.cli import doctor
from tokprune.runtime.engines import cuda
from tokprune.runtime.errors import UserError

MEMINFO = (
    "MemTotal:        7802652 kB\nMemFree: 1 kB\nMemAvailable:    5123456 kB\nCmaTotal: 262144 kB\nCmaFree: 200000 kB\n"
)
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
DPKG = """Package: nvidia-jetpack-runtime
Status: install ok installed
Version: 1.0

Package: nvidia-jetpack
Status: install ok installed
Architecture: arm64
Version: 6.2+b77
Description: NVIDIA Jetpack Meta Package

Package: zip
Version: 3.0
"""


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path, text in {
        "proc/meminfo": MEMINFO,
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": RELEASE,
        "var/lib/dpkg/status": DPKG,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    tool = tmp_path / "bin" / "nvpmodel"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 2\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_jetson(jetson: Path):
    machine = device.find_machine(jetson)
    assert machine.jetson == device.Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", "6.2+b77", "MAXN_SUPER")
    assert (machine.memory, machine.memory_available) == (1024 * 7802652, 1024 * 5123456)
    assert (machine.cma, machine.cma_free) == (1024 * 262144, 1024 * 200000)


def test_a_jetson_without_jetpack(jetson: Path):
    for path in ("var/lib/dpkg/status", "proc/meminfo", "bin/nvpmodel"):
        (jetson / path).unlink()
    machine = device.find_machine(jetson)
    assert machine.jetson == device.Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", None, None)
    assert machine.memory is None


@pytest.mark.parametrize("script", ["#!/bin/sh\necho 'NV Power Mode: MAXN'\nexec sleep 60\n", "no program"])
def test_a_power_mode_that_is_not_told(jetson: Path, monkeypatch, script: str):
    """nvpmodel that hangs, or does not start, keeps doctor from nothing else."""
    (jetson / "bin" / "nvpmodel").write_text(script)
    monkeypatch.setattr(device, "TIMEOUT_S", 0.2)
    machine = device.find_machine(jetson)
    assert machine.jetson is not None
    assert machine.jetson.power_mode is None
    assert machine.memory == 1024 * 7802652


def test_this_machine():
    machine = device.find_machine()
    assert machine.jetson is None
    assert machine.memory_available is not None
    assert machine.memory is not None
    assert 0 < machine.memory_available <= machine.memory
    assert machine.python_abi.startswith(f"cpython-{sys.version_info[0]}{sys.version_info[1]}")


def call(*options: str) -> str:
    result = CliRunner().invoke(doctor.command, list(options), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def without_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("without_plugins")
def test_json_on_a_machine_without_a_gpu(monkeypatch):
    def none():
        raise UserError("a GPU was asked for, and CUDA finds none: check the driver")

    monkeypatch.setattr(cuda, "find_gpu", none)
    found = json.loads(call("--json"))
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert list(backends) == [
        "onnxruntime-cpu",
        "onnxruntime-cuda",
        "onnxruntime-tensorrt",
        "tensorrt",
        "tensorrt-rtx",
    ]
    for backend in backends.values():  # one that is not available says why
        assert backend["available"] == (not backend["reason"])
    assert backends["onnxruntime-cpu"] == {
        "name": "onnxruntime-cpu",
        "available": True,
        "version": onnxruntime.__version__,
        "reason": "",
    }
    assert "onnxruntime-gpu" in backends["onnxruntime-cuda"]["reason"]
    assert "tensorrt" in backends["tensorrt"]["reason"]
    assert backends["tensorrt-rtx"]["version"].startswith("1.")
    assert "can be built" in backends["tensorrt-rtx"]["reason"]
    assert found["gpu"] == {"available": False, "reason": "a GPU was asked for, and CUDA finds none: check the driver"}
    assert found["plugins"]["available"] is False
    assert "build-plugins" in found["plugins"]["reason"]
    assert found["platform"]["memory"] > 0


@pytest.mark.usefixtures("without_plugins")
def test_the_table_of_a_jetson(jetson, monkeypatch):
    monkeypatch.setattr(doctor, "find_machine", lambda: device.find_machine(jetson))
    monkeypatch.setattr(cuda, "find_gpu", lambda: cuda.Gpu((8, 7), 8, 1.02, 5_000_000_000))
    text = call()
    assert "NVIDIA Jetson Orin Nano Developer Kit, power mode MAXN_SUPER" in text
    assert "6.2+b77, Jetson Linux 36.4.3" in text
    assert "5.2 of 8.0 GB free" in text
    assert "contiguous memory  0.2 of 0.3 GB free" in text
    assert "sm87, 8 multiprocessors at 1.02 GHz, 16.7 TFLOP/s in dense FP16, 5.0 GB free" in text


def test_polygraphy_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert "pip install polygraphy" in json.loads(call("--json"))["gpu"]["reason"]


def test_libraries_of_plugins_are_listed_with_their_hashes(monkeypatch):
    built = build.Built(Path("/c/a.so"), Path("/c/b.so"), "ab" * 32, "cd" * 32, "10.3.0", "12.6", (87,), True)
    monkeypatch.setattr(build, "find_built", lambda: [built])
    text = call()
    assert f"/c/a.so (TensorRT 10.3.0, CUDA 12.6, sm_87, sha256 {'ab' * 8})" in text
    assert json.loads(call("--json"))["plugins"]["libraries"][0]["sha256"] == "ab" * 32
