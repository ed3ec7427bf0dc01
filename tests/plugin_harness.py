"""Builds the plugin library with its harness, and writes the cases that the harness drives. For marked tests alone."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tokprune.plugins.build import LIBRARY, REGISTERING, TARGETS, compile_sources
from tokprune.plugins.toolchain import HEADERS_VARIABLE, find_toolchain

HARNESS = "tokprune_plugins_harness"
_KEPT: list[tempfile.TemporaryDirectory] = []  # until Python ends
_TYPES = {"float32": "float", "float16": "half", "bool": "bool"}


def header_sets() -> list[Path | None]:
    """The directories that TENSORRT_INCLUDE_DIR names, a colon between them; [None] if it is not set."""
    named = os.environ.get(HEADERS_VARIABLE, "")
    return [Path(folder) for folder in named.split(":") if folder] or [None]


def version_of(headers: Path | None) -> str:
    """For the names of tests."""
    return "unset" if headers is None else headers.parent.name if headers.name == "include" else headers.name


@functools.cache
def compiled(headers: Path | None, architectures: str) -> Path:
    """The directory with both libraries, the harness and ``log``, built once for a test run."""
    if headers is None:
        pytest.fail(
            f"{HEADERS_VARIABLE} is not set: make plugin-check {HEADERS_VARIABLE}=DIR:DIR with a directory of "
            "TensorRT's headers for each version to check, such as the include folder of github.com/NVIDIA/TensorRT"
        )
    build, folder = _folder(architectures), _folder(f"{headers} {architectures}")
    tools = find_toolchain(architectures, headers)
    # in one build folder: kernels, which take long, are compiled once, as they read no header of TensorRT's
    compile_sources(tools, build, (*TARGETS, HARNESS), lambda line: None, folder / "log")
    for name in (LIBRARY, REGISTERING, HARNESS):
        shutil.copy2(build / name, folder)
    return folder


@functools.cache
def _folder(purpose: str) -> Path:
    """A directory for that purpose, which goes when Python ends."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="tokprune-plugins-"))
    return Path(_KEPT[-1].name)


def write_case(folder: Path, node: onnx.NodeProto, inputs: Mapping[str, np.ndarray]) -> Path:
    """A file for the harness with ``node``'s attributes and, in its order, ``inputs``."""
    lines = [f"op {node.op_type}"]
    for attribute in node.attribute:
        kind = {onnx.AttributeProto.INT: "int", onnx.AttributeProto.FLOAT: "float"}[attribute.type]
        lines.append(f"{kind} {attribute.name} {helper.get_attribute_value(attribute):.9g}")
    for index, array in enumerate(inputs.values()):
        path = folder / f"input-{index}"
        path.write_bytes(np.ascontiguousarray(array).tobytes())
        lines.append(f"input {_TYPES[array.dtype.name]} {path} {' '.join(map(str, array.shape))}")
    lines.append(f"out {folder / 'kept'} {folder / 'scores'}")
    case = folder / "case.txt"
    case.write_text("\n".join(lines) + "\n")
    return case


def harness(folder: Path, verb: str, *cases: Path, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run the harness that `compiled` has put into ``folder``."""
    return subprocess.run([*under, folder / HARNESS, verb, *cases], capture_output=True, text=True)
