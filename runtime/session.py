"""Runs segments on one engine library. Knows tensors by name; knows nothing of layers or pruning.

A backend hands out sessions and owns the tensors that flow between them, so that nothing leaves the
device on the way from segment to segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokprune.runtime.errors import UserError

Tensor = Any  # a backend's own handle: opaque to everything but its backend


class Session(Protocol):
    """One segment, ready to run."""

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once; give the named outputs."""


class Backend(Protocol):
    """An engine library on one device."""

    name: str

    def load(self, path: Path) -> Session:
        """Make a session of an ONNX file. Raises UserError if the engine refuses it."""

    def to_device(self, array: np.ndarray) -> Tensor: ...

    def to_host(self, tensor: Tensor) -> np.ndarray: ...


class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider: the embedded default, on every machine."""

    def __init__(self, threads: int = 0) -> None:
        """``threads`` 0 leaves the number to ONNX Runtime: one for each physical core."""
        import onnxruntime

        self._ort = onnxruntime
        self.name = f"onnxruntime-{onnxruntime.__version__}-cpu"
        self._options = onnxruntime.SessionOptions()
        # Each session has threads of its own. Left spinning after a run, they take the cores from the next segment's:
        # on two cores everything was 2.5 times slower (docs/log.md).
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        self._options.intra_op_num_threads = threads
        self._options.log_severity_level = 3  # errors; what they say reaches the user as an exception

    def load(self, path: Path) -> Session:
        try:
            session = self._ort.InferenceSession(path, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no narrower base
            raise UserError(f"ONNX Runtime cannot load {path} ({error}): export the bundle again") from error
        return _OrtSession(session, path)

    def to_device(self, array: np.ndarray) -> Tensor:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def to_host(self, tensor: Tensor) -> np.ndarray:
        return tensor.numpy()


class _OrtSession:
    def __init__(self, session: Any, path: Path) -> None:
        self._session, self._path = session, path

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        try:
            values = self._session.run_with_ort_values(list(outputs), dict(feeds))
        except Exception as error:  # as above; what is fed follows from the manifest, so the graph is another one
            raise UserError(f"ONNX Runtime cannot run {self._path} ({error}): export the bundle again") from error
        return dict(zip(outputs, values, strict=True))


ENGINES = ("auto", "onnxruntime")


def make_backend(engine: str, threads: int = 0) -> Backend:
    """The backend of that name; "auto" is ONNX Runtime on the CPU, the one that runs everywhere.

    Raises UserError if its library is not installed.
    """
    if threads < 0:
        raise UserError(f"{threads} threads were asked for: give a number, or 0 to let the engine choose")
    try:
        return OnnxRuntimeCpu(threads)
    except ImportError as error:
        raise UserError(
            f"engine '{engine}' needs onnxruntime, which is not there ({error}): pip install onnxruntime"
        ) from None
