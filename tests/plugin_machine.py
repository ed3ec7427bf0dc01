"""A machine of scripts on which `build-plugins` finds its tools, so that any real one will do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokprune.plugins import toolchain
from tokprune.plugins.build import LIBRARY, REGISTERING

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
