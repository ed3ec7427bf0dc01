"""What building the plugin library takes, found on this machine: cmake, nvcc, TensorRT's headers, GPU architectures.

Whatever is missing is told in one sentence, with the way to get it on this platform. Runs nothing but the tools' own
questions for their versions; knows no source and builds nothing. Needs no package but tokprune's runtime.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokprune.runtime.errors import UserError

NATIVE, ALL = "native", "all"
# Compute capabilities that "all" stands for: A100, RTX 30, Orin, RTX 40 and L4, H100 and H200, B200, RTX 50.
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
OLDEST_TENSORRT = (10, 3)  # JetPack 6.1's; 8.6 has no IPluginV3
HEADER, VERSION_HEADER = "NvInferRuntime.h", "NvInferVersion.h"
HEADERS_VARIABLE = "TENSORRT_INCLUDE_DIR"
_USUAL_CUDA = Path("/usr/local/cuda")
_USUAL_HEADERS = (
    f"/usr/include/{os.uname().machine}-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
_DEVICE_TREE = Path("/proc/device-tree/compatible")
_JETSONS = {"nvidia,tegra234": 87, "nvidia,tegra264": 110}  # Orin, Thor


@dataclass(frozen=True)
class Toolchain:
    """Tools by path, TensorRT and CUDA by version ("10.3.0", "12.6"), architectures as compute capabilities, rising."""

    cmake: Path
    generator: str
    nvcc: Path
    cuda: str
    headers: Path
    tensorrt: str
    architectures: tuple[int, ...]


def find_toolchain(architectures: str = NATIVE, headers: Path | None = None) -> Toolchain:
    """All that is needed, or UserError for the first thing that is missing.

    ``architectures`` is "native", "all" or capabilities such as "80,86"; ``headers`` a directory with TensorRT's.
    """
    nvcc = find_nvcc()
    headers = find_headers(headers)
    tensorrt = tensorrt_version(headers)
    cmake, generator = _find_cmake()
    return Toolchain(
        cmake, generator, nvcc, cuda_version(nvcc), headers, tensorrt, find_architectures(architectures, nvcc)
    )


# --- CUDA -------------------------------------------------------------------------------------------


def find_nvcc() -> Path:
    """nvcc on PATH, of CUDA_HOME, of the usual place, or of the package from PyPI. Raises UserError."""
    on_path, home = shutil.which("nvcc"), os.environ.get("CUDA_HOME")
    candidates = [Path(on_path)] if on_path else []
    candidates += [Path(folder, "bin", "nvcc") for folder in (home, _USUAL_CUDA) if folder]
    for path in [*candidates, *_packaged_nvcc()]:
        if path.is_file():
            return path
    if jetson():
        how = "sudo apt install cuda-nvcc-12-6 cuda-cudart-dev-12-6 on JetPack 6, the same with -13-2 on JetPack 7.2"
    else:
        how = "install CUDA 12.2 or later, or pip install nvidia-cuda-nvcc"
    raise UserError(
        f"the plugin's kernels need nvcc, which is neither on PATH, nor in CUDA_HOME, nor in {_USUAL_CUDA}: {how}"
    )


def _packaged_nvcc() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        yield from sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)


def cuda_version(nvcc: Path) -> str:
    """Such as "13.0". Raises UserError if ``nvcc`` does not say."""
    return _found(r"release (\d+\.\d+)", _ask(nvcc, "--version"), f"{nvcc} does not tell its version")


def find_architectures(wanted: str, nvcc: Path) -> tuple[int, ...]:
    """The capabilities that ``wanted`` stands for, all known to ``nvcc``. Raises UserError."""
    known = {int(arch) for arch in re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch"))}
    if wanted == ALL:
        return tuple(arch for arch in ARCHITECTURES if arch in known)
    if wanted == NATIVE:
        asked = _native()
    elif re.fullmatch(r"\d+(,\d+)*", wanted):
        asked = [int(arch) for arch in wanted.split(",")]
    else:
        raise UserError(f"--arch {wanted} is neither {NATIVE}, {ALL} nor capabilities: give them as in --arch 80,87")
    if unknown := sorted(set(asked) - known):
        raise UserError(
            f"--arch {wanted} means {', '.join(map(str, unknown))}, which {nvcc} of CUDA {cuda_version(nvcc)} does not "
            f"compile for: choose from {', '.join(map(str, sorted(known)))}, or use another CUDA"
        )
    return tuple(sorted(set(asked)))


def _native() -> list[int]:
    """Of the GPUs in this machine. Raises UserError if there are none."""
    if arch := jetson():
        return [arch]
    smi = shutil.which("nvidia-smi")
    answer = _ask(Path(smi), "--query-gpu=compute_cap", "--format=csv,noheader") if smi else ""
    found = [int(major) * 10 + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", answer, re.MULTILINE)]
    if not found:
        reason = "nvidia-smi lists none" if smi else "there is no nvidia-smi"
        raise UserError(
            f"no GPU was found to build the plugin for ({reason}): say which with --arch, such as --arch 87 for Orin, "
            f"or --arch {ALL}"
        )
    return found


def jetson() -> int | None:
    """The capability of the Jetson that this is; None on other machines."""
    if not _DEVICE_TREE.is_file():
        return None
    names = _DEVICE_TREE.read_bytes().decode("utf-8", "replace").split("\0")
    return next((arch for name, arch in _JETSONS.items() if name in names), None)


# --- TensorRT ---------------------------------------------------------------------------------------


def find_headers(given: Path | None = None) -> Path:
    """``given``, or the directory in TENSORRT_INCLUDE_DIR, or a usual one that has TensorRT's headers.

    Raises UserError if there is none.
    """
    variable = os.environ.get(HEADERS_VARIABLE)
    named = given or (Path(variable) if variable else None)
    if named is not None:
        if (named / HEADER).is_file():
            return named.resolve()
        where = "--tensorrt-include" if given else HEADERS_VARIABLE
        raise UserError(f"{where} names {named}, which has no {HEADER}: give the directory that holds it")
    for folder in map(Path, _USUAL_HEADERS):
        if (folder / HEADER).is_file():
            return folder
    if jetson():
        how = "sudo apt install libnvinfer-headers-dev"
    else:
        how = (
            "sudo apt install libnvinfer-headers-dev, or take the include folder of TensorRT's archive or of "
            "github.com/NVIDIA/TensorRT at the branch of your version, and name it by --tensorrt-include or "
            f"{HEADERS_VARIABLE}"
        )
    where = ", ".join(_USUAL_HEADERS)
    raise UserError(f"the plugin needs TensorRT's headers, and {HEADER} is in none of {where}: {how}")


def tensorrt_version(headers: Path) -> str:
    """Such as "10.3.0". Raises UserError if the headers do not say, or are too old."""
    path = headers / VERSION_HEADER
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # 10.3 gives the number itself, later versions give it to TRT_…_ENTERPRISE
    parts = [
        _found(
            rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)",
            text,
            f"{path} does not tell TensorRT's version",
        )
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    if (int(parts[0]), int(parts[1])) < OLDEST_TENSORRT:
        raise UserError(
            f"{headers} holds TensorRT {'.'.join(parts)}, the plugin needs {'.'.join(map(str, OLDEST_TENSORRT))} or "
            "later: JetPack 6.1 and later have it"
        )
    return ".".join(parts)


# --- cmake ------------------------------------------------------------------------------------------


def _find_cmake() -> tuple[Path, str]:
    """cmake and a generator that works. Raises UserError."""
    beside = str(Path(sys.executable).parent)  # pip's, where the environment is not activated
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), beside])
    cmake, ninja, make = (shutil.which(tool, path=path) for tool in ("cmake", "ninja", "make"))
    needed = {"cmake": cmake, "ninja or make": ninja or make, "g++": _compiler()}
    missing = [name for name, found in needed.items() if not found]
    if missing or cmake is None:
        raise UserError(
            f"building the plugin needs {', '.join(missing)}: sudo apt install cmake ninja-build g++, "
            "or pip install cmake ninja for all but g++"
        )
    return Path(cmake), "Ninja" if ninja else "Unix Makefiles"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _ask(tool: Path, *question: str) -> str:
    """What ``tool`` prints. Raises UserError if it cannot be run."""
    command: Sequence[str] = [str(tool), *question]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{' '.join(command)} was asked and failed ({error}): mend or reinstall it") from None


def _found(pattern: str, text: str, otherwise: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise UserError(f"{otherwise}: install it again, or name another")
    return match[1]
