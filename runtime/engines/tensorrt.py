"""Engines behind the runtime's sessions, on TensorRT or TensorRT-RTX: tensors stay on the GPU from segment to segment.

KV caches: a decoder writes its cache whole into other memory than it reads it from, each made for all rows that its
sequence may come to have there: the bundle's capacity, less what was pruned in front of it. What it has read is free
for the next decoder, so that there are as many as caches, and one decoder's more.

A decode step is not captured in a CUDA graph. A graph replays fixed addresses and shapes, while a cache that grows by
concatenation has another shape in each step. With caches at full capacity, the unused part masked, shapes would stay,
and each new row be copied into its place; but each step would read, write and read again the whole capacity: 3 GiB for
7B in FP16 and 2048 tokens, 16 ms of an AGX Orin's bandwidth, against 5 ms for 700 tokens and less where they were
pruned. What a graph saves is launching, some 300 kernels of a few µs, while the GPU reads 13.5 GB of weights, 66 ms
there and 3 ms on an H200: most of it is hidden. These are estimates: measure before changing this. Caches that are
updated in place (TensorScatter, TensorRT 10.15) would change it, and need other graphs than 10.3 reads.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.runtime import memory
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.engines import cuda, versions
from tokprune.runtime.engines.cuda import DeviceTensor, Memory
from tokprune.runtime.engines.fused import LIBRARY as FUSED
from tokprune.runtime.engines.profiles import DECODE, PREFILL
from tokprune.runtime.engines.slot import PLUGIN_LIBRARY, SegmentEngine, Slot, misfit, read_slots
from tokprune.runtime.errors import EnginesMissing, UserError
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.session import Session

NO_GRAPH = "decode steps are launched kernel by kernel, not as a CUDA graph: the caches' shapes grow with each"


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
        self.remarks: tuple[str, ...] = (NO_GRAPH,)
        if found.slot.plugins is not None:
            versions.load_plugins(self._trt, self._folder / PLUGIN_LIBRARY)
        self._logger = _logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)

    def load_all(self, bundle: Bundle, segments: Sequence[SegmentFacts]) -> list[Session]:
        return [self.load(bundle, segment) for segment in segments]

    def load(self, bundle: Bundle, segment: SegmentFacts) -> _Session:
        engine = self._slot.segment(segment.name)
        path = self._folder / engine.file
        # mapped, not read: where CPU and GPU share memory, a copy would take as much as the weights
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            loaded = self._runtime.deserialize_cuda_engine(plan)
        context = None if loaded is None else versions.create_context(self._trt, loaded)
        if context is None:
            said = self._logger.errors[-1] if self._logger.errors else "without a reason"
            raise UserError(
                f"TensorRT cannot load {path} ({said}){self._planned}: if memory was short, close what else uses it; "
                "else build it again with tokprune build"
            )
        found = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
        if set(found) != {tensor.name for tensor in (*segment.inputs, *segment.outputs)}:
            raise UserError(f"{path} is the engine of another graph than {segment.file}: build it again")
        return _Session(self._memory, self._logger, loaded, context, engine, segment)

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


class _Session:
    """One engine and its context. Its own memory is what all contexts share: they take turns."""

    def __init__(
        self, memory: Memory, logger: Any, engine: Any, context: Any, facts: SegmentEngine, segment: SegmentFacts
    ) -> None:
        self._memory, self._logger, self._engine, self._context = memory, logger, engine, context
        self._facts = facts
        self._outputs = {tensor.name: np.dtype(tensor.dtype) for tensor in segment.outputs}
        self._profile: int | None = None

    def run(self, feeds: Mapping[str, DeviceTensor], outputs: Sequence[str], spare: int = 0) -> dict[str, DeviceTensor]:
        context, stream = self._context, self._memory.stream
        self._choose_profile(feeds)
        for name, tensor in feeds.items():
            self._check(context.set_input_shape(name, tensor.shape), f"{name} of shape {list(tensor.shape)}")
            self._check(context.set_tensor_address(name, tensor.address), f"an address for {name}")
        given = {}
        for name, dtype in self._outputs.items():
            given[name] = self._empty(name, tuple(context.get_tensor_shape(name)), dtype, spare)
            self._check(context.set_tensor_address(name, given[name].address), f"an address for {name}")
        scratch = self._memory.scratch(versions.context_bytes(context))
        context.set_device_memory(scratch.ptr, scratch.allocated_nbytes)
        self._check(context.execute_async_v3(stream.ptr), "to run")
        stream.synchronize()  # its time is its own, and so are its errors
        return {name: given[name] for name in outputs}

    def _empty(self, name: str, shape: tuple[int, ...], dtype: np.dtype, spare: int) -> DeviceTensor:
        """Memory for an output; a cache's is for all rows to come, so that its next step finds some of its size."""
        if not name.startswith("present."):
            return self._memory.empty(shape, dtype)
        batch, heads, rows, width = shape
        return self._memory.empty(shape, dtype, batch * heads * (rows + spare) * width * dtype.itemsize)

    def _choose_profile(self, feeds: Mapping[str, DeviceTensor]) -> None:
        """Decode's if the call is one row behind a cache. Raises UserError if no profile takes the shapes."""
        names = list(self._facts.profiles)
        fault = ""
        for name in sorted(names, key=(DECODE, PREFILL).index):
            wrong = next((item for item in feeds.items() if not self._takes(name, *item)), None)
            if wrong is None:
                index = names.index(name)
                if index != self._profile:
                    switched = self._context.set_optimization_profile_async(index, self._memory.stream.ptr)
                    self._check(switched, f"profile {name}")
                    self._profile = index
                return
            ranges = self._facts.profiles[name][wrong[0]]
            fault = (
                f"{wrong[0]} of shape {list(wrong[1].shape)}, its engine takes {list(ranges[0])} to {list(ranges[2])}"
            )
        raise UserError(
            f"{self._facts.name} was given {fault}: ask for less at a time, or export with greater limits and build "
            "engines anew"
        )

    def _takes(self, profile: str, name: str, tensor: DeviceTensor) -> bool:
        ranges = self._facts.profiles[profile].get(name)
        if ranges is None:  # no open axes
            return True
        return all(least <= dim <= most for least, dim, most in zip(ranges[0], tensor.shape, ranges[2], strict=True))

    def _check(self, done: bool, what: str) -> None:
        """What TensorRT answers to a call that it takes is True."""
        if not done:
            said = self._logger.errors[-1] if self._logger.errors else "without a reason"
            raise UserError(
                f"TensorRT refused {what} in {self._facts.name} ({said}): build the engines again with tokprune build"
            )


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps errors, which reach the user as sentences; everything else is dropped."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Log()
