"""``tokprune doctor``: says which backends this machine has, what the others lack, and what it is made of."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import click

from tokprune.runtime.device import Machine, find_machine
from tokprune.runtime.engines import compiler, cuda
from tokprune.runtime.engines.versions import RTX, TENSORRT, Library
from tokprune.runtime.errors import UserError
from tokprune.runtime.version import __version__

EXTRAS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "sklearn", "sympy")
_PLUGINS = "tokprune.plugins.build"  # not imported from here, and not there where the runtime alone is
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@click.command("doctor", epilog="Example: tokprune doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Say what this machine can run, and why it cannot run the rest."""
    machine, gpu = find_machine(), _gpu()
    result: dict[str, Any] = {
        "tokprune": __version__,
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            **machine.record(),
        },
        "gpu": gpu,
        "backends": [*_onnxruntime(), *_tensorrt(gpu)],
        "plugins": _plugins(),
        "export": _export(),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"tokprune {__version__} on {platform.platform()}, Python {platform.python_version()}\n")
    _lines(_facts(machine, gpu))
    click.echo()
    items = [*result["backends"], *({"name": key, **result[key]} for key in ("plugins", "export"))]
    rows = [(item["name"], _yes(item["available"]), item["version"] or "-", item["reason"]) for item in items]
    _lines([("", "available", "version", ""), *rows])


def _lines(rows: Iterable[tuple[str, ...]]) -> None:
    """Print cells under one another, all but the last of a row, which may be a sentence, as wide as their column."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, last in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last]).rstrip())


def _facts(machine: Machine, gpu: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Python ABI", machine.python_abi
    if machine.jetson is not None:
        jetson = machine.jetson
        yield "Jetson", f"{jetson.model}, power mode {jetson.power_mode or 'unknown'}"
        yield "JetPack", f"{jetson.jetpack or 'package not installed'}, Jetson Linux {jetson.l4t or 'unknown'}"
    yield "memory", _of(machine.memory_available, machine.memory)
    if machine.cma:
        yield "contiguous memory", _of(machine.cma_free, machine.cma)
    yield "GPU", gpu["reason"]


def _gpu() -> dict[str, Any]:
    try:
        gpu = cuda.find_gpu()
    except ImportError as error:
        return {"available": False, "reason": f"not asked, {error.name} is not installed: pip install polygraphy"}
    except UserError as error:
        return {"available": False, "reason": str(error)}
    peak = f", {gpu.peak_tflops:.1f} TFLOP/s in dense FP16" if gpu.peak_tflops else ""
    return {
        "available": True,
        "arch": gpu.arch,
        "free_bytes": gpu.free_bytes,
        "clock_ghz": gpu.clock_ghz,
        "peak_tflops": gpu.peak_tflops,
        "reason": f"{gpu.arch}, {gpu.processors} multiprocessors at {gpu.clock_ghz:.2f} GHz{peak}, "
        f"{gpu.free_bytes / 1e9:.1f} GB free",
    }


def _onnxruntime() -> list[dict[str, Any]]:
    names = {key: f"onnxruntime-{key}" for key in _PROVIDERS}
    try:
        import onnxruntime
    except ImportError as error:
        return [_backend(name, None, f"{error}: pip install onnxruntime") for name in names.values()]
    there = onnxruntime.get_available_providers()
    found = []
    for key, provider in _PROVIDERS.items():
        reason = "" if provider in there else "this onnxruntime was built without it: pip install onnxruntime-gpu"
        found.append(_backend(names[key], onnxruntime.__version__, reason))
    return found


def _tensorrt(gpu: dict[str, Any]) -> list[dict[str, Any]]:
    return [_library(TENSORRT, gpu), _library(RTX, gpu)]


def _library(library: Library, gpu: dict[str, Any]) -> dict[str, Any]:
    """Whether its engines run here; one without a GPU may still build."""
    try:
        version = compiler.version(library)
    except UserError as error:
        return _backend(library.name, None, str(error))
    if not gpu["available"]:
        builds = "; engines for RTX cards can be built" if library is RTX else ""
        return _backend(library.name, version, f"no GPU to run on{builds}")
    return _backend(library.name, version, "")


def _backend(name: str, version: str | None, reason: str) -> dict[str, Any]:
    """``reason`` says why it is not available; empty if it is."""
    return {"name": name, "available": not reason, "version": version, "reason": reason}


def _plugins() -> dict[str, Any]:
    """The libraries of plugins that were built here from the sources that are here."""
    if importlib.util.find_spec(_PLUGINS.rpartition(".")[0]) is None:
        return {"available": False, "version": None, "reason": "their sources are not installed", "libraries": []}
    libraries = [built.record() for built in importlib.import_module(_PLUGINS).find_built()]
    if not libraries:
        reason = "none was built from these sources: tokprune build-plugins"
        return {"available": False, "version": None, "reason": reason, "libraries": []}
    reason = "; ".join(
        f"{each['library']} (TensorRT {each['tensorrt']}, CUDA {each['cuda']}, sm_"
        f"{', sm_'.join(map(str, each['architectures']))}, sha256 {each['sha256'][:16]})"
        for each in libraries
    )
    return {"available": True, "version": libraries[0]["sources"][:16], "reason": reason, "libraries": libraries}


def _export() -> dict[str, Any]:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed: pip install 'tokprune[export]'"
        return {"available": False, "version": None, "reason": reason}
    return {"available": True, "version": None, "reason": "export, verify, train, build --target cpu can run"}


def _of(part: int | None, whole: int | None) -> str:
    return "unknown" if part is None or whole is None else f"{part / 1e9:.1f} of {whole / 1e9:.1f} GB free"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
