"""What engines can be built for on this machine, or why not: the libraries and the GPU that are there.

There is no building for another machine: an engine is timed on the GPU that will run it. TensorRT-RTX alone builds
without one, for RTX cards.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.runtime.engines import compiler, cuda
from tokprune.runtime.engines.versions import RTX, RTX_ARCH, TENSORRT, Library
from tokprune.runtime.errors import UserError

JETSON, DATACENTER, RTX_CARDS, CPU, AUTO = "jetson-orin", "datacenter", "rtx", "cpu", "auto"
TARGETS = (JETSON, DATACENTER, RTX_CARDS, CPU, AUTO)  # cpu has no engines, its graphs are made by tokprune.export
ORIN = (8, 7)
_GET = {
    JETSON: "run this on the Jetson itself, after sudo apt install python3-libnvinfer, in an environment made with "
    "python3 -m venv --system-site-packages, and pip install polygraphy",
    DATACENTER: "run this on the machine with the GPU, after pip install 'tokprune[gpu]'",
}


@dataclass(frozen=True)
class Target:
    """A library, its version, and the GPUs that its engines are for; ``has_gpu`` says that one of them is here."""

    name: str
    library: Library
    version: str
    arch: str
    has_gpu: bool

    @property
    def slot(self) -> str:
        """Name of the directory with this target's engines: library, three parts of the version, architecture."""
        return f"{self.library.name}-{'.'.join(self.version.split('.')[:3])}-{self.arch}"


def find_target(name: str) -> Target:
    """The target ``name``, or for "auto" what this machine has. Raises UserError saying what is missing."""
    if name == AUTO:
        name = _auto()
    if name == RTX_CARDS:
        return Target(name, RTX, compiler.version(RTX), RTX_ARCH, False)
    if missing := compiler.missing_modules(TENSORRT):
        raise UserError(
            f"--target {name} was asked for, and {' and '.join(missing)} not found in this Python: {_GET[name]}"
        )
    capability = cuda.find_capability()
    arch = cuda.arch_of(capability)
    if (capability == ORIN) != (name == JETSON):
        other = JETSON if capability == ORIN else DATACENTER
        raise UserError(f"--target {name} was given, and the GPU here is {arch}: give --target {other}")
    return Target(name, TENSORRT, compiler.version(TENSORRT), arch, True)


def _auto() -> str:
    reasons = []
    try:
        compiler.check_installed(TENSORRT)
        return JETSON if cuda.find_capability() == ORIN else DATACENTER
    except UserError as error:
        reasons.append(str(error))
    try:
        compiler.check_installed(RTX)
        return RTX_CARDS
    except UserError as error:
        reasons.append(str(error))
    raise UserError(f"no engine can be built here: {'; or '.join(reasons)}")
