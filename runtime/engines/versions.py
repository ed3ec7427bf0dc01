"""All that differs between TensorRT 10.3 … 11.x and TensorRT-RTX; the rest of the code knows one TensorRT.

What they share is used without a question: strongly typed networks, explicit Q/DQ, IPluginV3, named tensors. Imports
a library only when asked to, and the RTX one only in a process that has it on its loader's path (see ``compiler``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.runtime.bundle import sha256
from tokprune.runtime.errors import UserError


@dataclass(frozen=True)
class Library:
    """A TensorRT: ``name`` as slots have it, the modules it needs, how to get it."""

    name: str
    modules: tuple[str, ...]  # the first is the one to import
    install: str
    oldest: tuple[int, int]


TENSORRT = Library(
    "tensorrt",
    ("tensorrt",),
    "on a Jetson it is the system's (sudo apt install python3-libnvinfer, and an environment made with "
    "--system-site-packages), elsewhere pip install 'tokprune[gpu]'",
    (10, 3),  # JetPack 6.1; older ones have no IPluginV3, or not its fields
)
RTX = Library("tensorrt-rtx", ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"), "pip install 'tokprune[rtx]'", (1, 5))
LIBRARIES = {library.name: library for library in (TENSORRT, RTX)}

# Compute capabilities that an engine of TensorRT-RTX runs on if none was named at its build: 8.0, 8.6, 8.9, 12.0 and
# later (its documentation, "CPU-only AOT"); not 7.5, which wants an engine of its own, nor 8.7 and 9.0.
RTX_ARCH = "cc-any"
RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))

_registered: dict[str, str] = {}  # by module: SHA-256 of the library of plugins in its registry


def load(library: Library) -> Any:
    """Import ``library``, as Polygraphy will from now on. Raises ImportError, or UserError if it is too old."""
    from polygraphy import config

    if library is RTX:
        import tensorrt_rtx_bindings as trt

        sys.modules["tensorrt_rtx"] = trt  # the name that Polygraphy imports, which a package of its own would give
        config.USE_TENSORRT_RTX = True
    else:
        import tensorrt as trt
    found = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if found < library.oldest:
        oldest = ".".join(map(str, library.oldest))
        raise UserError(
            f"{library.name} {trt.__version__} was found, {oldest} or newer is needed: upgrade it (JetPack 6.1 and "
            "newer have it)"
        )
    return trt


def create_network(trt: Any, builder: Any) -> Any:
    """A strongly typed network: said with a flag in 10.x, always so in 11 and RTX, where the flag may be gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def create_config(trt: Any, library: Library, profiles: list[Any], monitor: Any, timing_cache: Path | None) -> Any:
    """Polygraphy's loader of a builder configuration: TF32 off, tactics timed before remembered.

    Its loader for RTX leaves TF32 as it is, which is on. Engines of RTX may take memory while they run, which a CUDA
    graph cannot record, unless that is ruled out.
    """

    def settle(builder: Any, network: Any, config: Any) -> None:
        config.clear_flag(trt.BuilderFlag.TF32)
        if library is RTX:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    known = str(timing_cache) if timing_cache is not None and timing_cache.is_file() else None
    make = CreateConfigRTX if library is RTX else CreateConfig
    config = make(profiles=profiles, progress_monitor=monitor, load_timing_cache=known)
    return PostprocessConfig(config, settle)


def load_plugins(trt: Any, library: Path) -> None:
    """Register the plugins of ``library`` through its ``getCreators``.

    A registry is its process's, and takes no operator twice: the same library again, from anywhere, is there already.
    Raises UserError if another one is, or if TensorRT will not.
    """
    digest = sha256(library)
    there = _registered.get(trt.__name__)
    if there not in (None, digest):
        raise UserError(
            f"{library} is another library of plugins than the one that this process has loaded: run bundles whose "
            "engines differ in it in a process each, or build both with the same one"
        )
    if there is None and trt.get_plugin_registry().load_library(str(library)) is None:
        raise UserError(
            f"{library} cannot be loaded as a library of plugins: build it for this machine with tokprune build-plugins"
        )
    _registered[trt.__name__] = digest


def create_context(trt: Any, engine: Any) -> Any:
    """An execution context without memory of its own: contexts that take turns share one piece."""
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def context_bytes(context: Any) -> int:
    """Memory that ``context`` needs for the shapes that were set: a profile's own figure is of its greatest ones."""
    return context.update_device_memory_size_for_shapes()


def layer_report(trt: Any, engine: Any) -> str:
    """JSON of what ``engine`` is made of; needs its device."""
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
