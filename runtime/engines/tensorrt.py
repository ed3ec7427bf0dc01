"""Engines behind the runtime's sessions, on TensorRT or RTX: tensors stay on the GPU from segment to segment."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.runtime import memory, names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.engines import cuda, versions
from tokprune.runtime.engines.cuda import DeviceTensor, Memory
from tokprune.runtime.engines.fused import LIBRARY as FUSED
from tokprune.runtime.engines.sessions import DecoderSession, EngineSession
from tokprune.runtime.engines.slot import PLUGIN_LIBRARY, Slot, misfit, read_slots
from tokprune.runtime.errors import EnginesMissing, UserError
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.session import Session


@dataclass(frozen=True)
class Found:
    """A slot whose engines run here, its library, imported, and the GPU."""

    folder: Path
    slot: Slot
    trt: Any
    gpu: cuda.Gpu


def _slots(bundle: Bundle) -> Iterator[tuple[Path, Slot]]:
    """All but those of ONNX Runtime's graphs."""
    return ((folder, slot) for folder, slot in read_slots(bundle.path) if slot.library != FUSED)


def has_engines(bundle: Bundle) -> bool:
    """Whether the bundle has engines of TensorRT, whatever they are for. Raises UserError for a damaged slot."""
    return any(_slots(bundle))


def find_engines(bundle: Bundle) -> Found:
    """The bundle's slot for this machine. Raises EnginesMissing saying why none of them fits."""
    slots = list(_slots(bundle))
    how = f"build them here with tokprune build {bundle.path}"
    if not slots:
        raise EnginesMissing(f"{bundle.path} has no TensorRT engines: {how}")
    try:
        gpu = cuda.find_gpu()
    except (ImportError, UserError) as error:
        raise EnginesMissing(f"the TensorRT engines of {bundle.path} cannot run: {error}") from None
    reasons = []
    for folder, slot in slots:
        library = versions.LIBRARIES.get(slot.library)
        if library is None:
            reason: str | None = f"its library '{slot.library}' is unknown to this tokprune"
        else:
            try:
                trt = versions.load(library)
            except (ImportError, UserError) as error:
                reason = f"{slot.library} {slot.version} is needed ({error})"
            else:
                arch = versions.RTX_ARCH if runs_rtx_engines(slot, gpu) else gpu.arch
                reason = misfit(folder, slot, bundle, trt.__version__, arch)
                if reason is None:
                    return Found(folder, slot, trt, gpu)
        reasons.append(f"{folder.name}: {reason}")
    raise EnginesMissing(f"no TensorRT engines of {bundle.path} fit this machine ({'; '.join(reasons)}): {how}")


def runs_rtx_engines(slot: Slot, gpu: cuda.Gpu) -> bool:
    return slot.arch == versions.RTX_ARCH and gpu.capability in versions.RTX_CAPABILITIES


def open_tensorrt(bundle: Bundle, found: Found) -> TensorRt:
    """The backend for the engines ``found``. Raises UserError if TensorRT does not start with them."""
    planned = _planned(bundle)
    return TensorRt(found, Memory(planned), planned)


def _planned(bundle: Bundle) -> str:
    """What errors say of the memory that was to be expected, for one sequence."""
    plan = memory.from_manifest(bundle.manifest)
    return (
        f" (planned: {plan.weights_bytes / 1e6:.0f} MB of weights, {max(plan.activations.values()) / 1e6:.0f} MB of "
        f"activations for {plan.work.text_tokens} text tokens and {plan.work.images} image, and for each prompt of a "
        f"batch {plan.tensorrt_cache_bytes / 1e6:.0f} MB of caches for {plan.capacity} tokens)"
    )


class TensorRt:
    """The engines of one slot on the GPU."""

    def __init__(self, found: Found, memory: Memory, planned: str) -> None:
        self._slot, self._folder, self._trt, self._memory = found.slot, found.folder, found.trt, memory
        self._planned = planned
        self.peak_tflops = found.gpu.peak_tflops
        self.name = f"{found.slot.library}-{found.slot.version}-{found.gpu.arch}, selector {found.slot.selector}"
        self.remarks: tuple[str, ...] = ()
        if found.slot.plugins is not None:
            versions.load_plugins(self._trt, self._folder / PLUGIN_LIBRARY)
        self._logger = _logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)

    def load_all(self, bundle: Bundle, segments: Sequence[SegmentFacts]) -> list[Session]:
        return [self.load(bundle, segment) for segment in segments]

    def load(self, bundle: Bundle, segment: SegmentFacts) -> EngineSession:
        engine = self._slot.segment(segment.name)
        path = self._folder / engine.file
        # mapped, not read: where CPU and GPU share memory, a copy would take as much as the weights
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            loaded = self._runtime.deserialize_cuda_engine(plan)
        context = None if loaded is None else versions.create_context(self._trt, loaded)
        if context is None:
            raise UserError(
                f"TensorRT cannot load {path} ({self._logger.last}){self._planned}: if memory was short, close what "
                "else uses it; else build it again with tokprune build"
            )
        found = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
        if set(found) != {*(tensor.name for tensor in segment.inputs), *_written(segment)}:
            raise UserError(f"{path} is the engine of another graph than {segment.file}: build it again")
        made = (self._memory, self._logger, loaded, context, engine, segment)
        return EngineSession(*made) if segment.layers is None else DecoderSession(*made, self._remark)

    def _remark(self, text: str) -> None:
        self.remarks += (text,)

    def to_device(self, array: np.ndarray) -> DeviceTensor:
        return self._memory.upload(array)

    def to_host(self, tensor: DeviceTensor) -> np.ndarray:
        return self._memory.download(tensor)

    def shape(self, tensor: DeviceTensor) -> tuple[int, ...]:
        return tensor.shape

    def place(self, states: DeviceTensor, rows: np.ndarray, features: DeviceTensor) -> DeviceTensor:
        width = states.shape[-1]
        for image, (first, *_) in enumerate(rows.tolist()):
            count = rows.shape[1] * width
            self._memory.copy(states, first * width, features, image * count, count)
        return states


def _written(segment: SegmentFacts) -> list[str]:
    """The outputs of an engine: of caches the new rows."""
    outputs = [tensor.name for tensor in segment.outputs]
    return [names.beside_present(name)[1] if name.startswith("present.") else name for name in outputs]


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps the last error, which reaches the user in a sentence; everything else is dropped."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "without a reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last = message

    return Log()
