"""Runs segments on one engine library. Knows tensors by name; knows nothing of layers or pruning.

A backend hands out sessions and owns the tensors that flow between them, so that nothing leaves the
device on the way from segment to segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import EnginesMissing, UserError
from tokprune.runtime.manifest import SegmentFacts

Tensor = Any  # a backend's own handle: opaque to everything but its backend


class Session(Protocol):
    """One segment, ready to run."""

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str], spare: int = 0) -> dict[str, Tensor]:
        """Run once, to the end; give the named outputs. Caches among them may grow by ``spare`` rows in later calls."""


class Backend(Protocol):
    """An engine library on one device."""

    name: str
    remarks: tuple[str, ...]  # what a reader of its results must know, each a sentence's part
    peak_tflops: float | None  # of the device in dense FP16 at its present clocks, where that is known

    def load(self, bundle: Bundle, segment: SegmentFacts) -> Session:
        """Make a session of a segment. Raises UserError if the engine refuses it."""

    def load_all(self, bundle: Bundle, segments: Sequence[SegmentFacts]) -> list[Session]:
        """Sessions of segments, made side by side where that is faster. Raises what `load` does."""

    def to_device(self, array: np.ndarray) -> Tensor: ...

    def to_host(self, tensor: Tensor) -> np.ndarray: ...

    def shape(self, tensor: Tensor) -> tuple[int, ...]: ...

    def place(self, states: Tensor, rows: np.ndarray, features: Tensor) -> Tensor:
        """``states`` [B, S, D] with the rows [I, N] of [B · S, D], N side by side, replaced by features [I, N, D].

        ``states`` may be what is changed: nobody else may hold it.
        """


AUTO, TENSORRT, ONNXRUNTIME = "auto", "tensorrt", "onnxruntime"
ENGINES = (AUTO, TENSORRT, ONNXRUNTIME, "onnxruntime-neutral", "onnxruntime-cuda", "onnxruntime-tensorrt")


def make_backend(engine: str, bundle: Bundle, *, threads: int = 0, plugins: Path | None = None) -> Backend:
    """The backend of that name for ``bundle``; ``plugins`` is a library for ONNX Runtime's TensorRT provider.

    "auto" is TensorRT where the bundle has engines that fit this machine, else ONNX Runtime on the CPU, which runs
    everywhere: with the fused graphs of the bundle's slot where it fits, as "onnxruntime" does too;
    "onnxruntime-neutral" takes the bundle's own graphs. Raises UserError if the engine's library, provider, device or
    engines are not there.
    """
    remarks: tuple[str, ...] = ()
    if threads < 0:
        raise UserError(f"{threads} threads were asked for: give a number, or 0 to let the engine choose")
    if plugins is not None and engine != "onnxruntime-tensorrt":
        raise UserError(
            f"--plugins was given with engine '{engine}': it is for onnxruntime-tensorrt, engines that tokprune build "
            "made have theirs beside them"
        )
    if engine in (AUTO, TENSORRT):
        from tokprune.runtime.engines.tensorrt import find_engines, has_engines, open_tensorrt

        try:
            return open_tensorrt(bundle, find_engines(bundle))
        except EnginesMissing as error:
            if engine == TENSORRT:
                raise
            remarks = (str(error),) if has_engines(bundle) else ()
    try:
        from tokprune.runtime.ort import open_onnxruntime

        name = ONNXRUNTIME if engine == AUTO else engine
        return open_onnxruntime(bundle, name, threads=threads, plugins=plugins, remarks=remarks)
    except ImportError as error:
        raise UserError(
            f"engine '{engine}' needs onnxruntime, which is not there ({error}): pip install onnxruntime"
        ) from None
