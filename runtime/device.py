"""What the operating system says of this machine: JetPack, power mode, memory. Needs no GPU and no engine library.

Every figure is None where the machine does not tell it. Nothing of the Jetson part has been read from a Jetson: files
and formats are those of NVIDIA's documentation.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path("/")
TIMEOUT_S = 10.0  # for nvpmodel


@dataclass(frozen=True)
class Jetson:
    """``model`` as the device tree names it, ``l4t`` the release of Jetson Linux, ``jetpack`` the installed package's
    version, ``power_mode`` as nvpmodel has it."""

    model: str
    l4t: str | None
    jetpack: str | None
    power_mode: str | None


@dataclass(frozen=True)
class Machine:
    """Memory in bytes; ``cma_free`` is what is left of the pool for allocations that must be contiguous."""

    python_abi: str
    memory: int | None
    memory_available: int | None
    cma: int | None
    cma_free: int | None
    jetson: Jetson | None

    def record(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return asdict(self)


def find_machine(root: Path = ROOT) -> Machine:
    """This machine; ``root`` is where its files begin."""
    memory = memory_facts(root)
    return Machine(
        python_abi=sysconfig.get_config_var("SOABI") or "unknown",
        memory=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        cma=memory.get("CmaTotal"),
        cma_free=memory.get("CmaFree"),
        jetson=_jetson(root),
    )


def memory_facts(root: Path = ROOT) -> dict[str, int]:
    """Linux's account of memory in bytes, by its own names; on a Jetson it is the GPU's too."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return {name: 1024 * int(value) for name, value in found}


def _jetson(root: Path) -> Jetson | None:
    # "# R36 (release), REVISION: 4.3, GCID: …"; the file is there on Jetsons alone
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    model = _read(root / "proc/device-tree/model").strip("\0\n ")
    if release is None and "jetson" not in model.lower():
        return None
    package = re.search(
        r"^Package: nvidia-jetpack$(?:\n.+)*?\nVersion: (\S+)$", _read(root / "var/lib/dpkg/status"), re.MULTILINE
    )
    return Jetson(
        model or "unknown",
        ".".join(release.groups()) if release else None,
        package[1] if package else None,
        _power_mode(),
    )


def _power_mode() -> str | None:
    """What ``nvpmodel -q`` says: "NV Power Mode: MAXN", and the mode's number below."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        said = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    mode = re.search(r"NV Power Mode: *(\S+)", said)
    return mode[1] if mode else None


def _read(path: Path) -> str:
    """The file's text; nothing where there is none that may be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
