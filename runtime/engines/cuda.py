"""The GPU: what it is, its memory and one stream, over Polygraphy's wrapper of the CUDA runtime.

Memory comes from a pool: a tensor that nobody holds any more gives its memory to the next one of its size. All work is
on one stream, in order, so that this is safe while the GPU still reads. Knows bytes and shapes; knows no engine.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokprune.runtime.errors import UserError

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_CLOCK_KHZ, _PROCESSORS, _MAJOR, _MINOR = 13, 16, 75, 76  # cudaDeviceAttr
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
# FLOPs of dense FP16 products, accumulated in FP32, that a multiprocessor does in one clock: with the vendor's
# multiprocessors and clocks they give the data sheets' 312 TFLOP/s of A100, 42.6 of AGX Orin 64, 989 of H200.
# Others are not known well enough to divide by.
_FLOPS_PER_CLOCK = {(8, 0): 2048, (8, 7): 2048, (9, 0): 4096}


@dataclass(frozen=True)
class Gpu:
    """What CUDA says of the first GPU; ``peak_tflops`` is of dense FP16 at the highest clock that it may take now."""

    capability: tuple[int, int]
    processors: int
    clock_ghz: float
    free_bytes: int

    @property
    def arch(self) -> str:
        return arch_of(self.capability)

    @property
    def peak_tflops(self) -> float | None:
        flops = _FLOPS_PER_CLOCK.get(self.capability)
        return None if flops is None else self.processors * flops * self.clock_ghz / 1e3


def arch_of(capability: tuple[int, int]) -> str:
    """sm87 of (8, 7)."""
    return f"sm{capability[0]}{capability[1]}"


def find_capability() -> tuple[int, int]:
    """The first GPU's compute capability, without taking any of its memory. Raises UserError as `find_gpu`."""
    runtime = _runtime_with_gpu()
    return _attribute(runtime, _MAJOR), _attribute(runtime, _MINOR)


def find_gpu() -> Gpu:
    """The first GPU; CUDA takes some of its memory for this process. Raises UserError saying why there is none."""
    runtime, capability = _runtime_with_gpu(), find_capability()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status = runtime.handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    if status:  # the first call that takes memory: of a GPU that is full, or another process's alone
        what = f"error {status}{', no memory' if status == OUT_OF_MEMORY else ''}"
        raise UserError(f"a GPU was asked for, and CUDA cannot start on it ({what}): close what else uses it")
    clock = _jetson_clock_ghz() or _attribute(runtime, _CLOCK_KHZ) / 1e6
    return Gpu(capability, _attribute(runtime, _PROCESSORS), clock, free.value)


def _runtime_with_gpu() -> Any:
    try:
        runtime = _runtime()
    except OSError as error:
        raise UserError(
            f"a GPU was asked for, and CUDA's runtime library does not load ({error}): install CUDA, and name the "
            "directory of libcudart.so in LD_LIBRARY_PATH"
        ) from None
    count = ctypes.c_int()
    status = runtime.handle.cudaGetDeviceCount(ctypes.byref(count))
    if status or not count.value:
        raise UserError(
            f"a GPU was asked for, and CUDA finds none (error {status}): check the driver with nvidia-smi, or on a "
            "Jetson that the user is in the groups video and render"
        )
    return runtime


def _attribute(runtime: Any, key: int) -> int:
    value = ctypes.c_int()
    runtime.check(runtime.handle.cudaDeviceGetAttribute(ctypes.byref(value), key, 0))
    return value.value


def _jetson_clock_ghz() -> float | None:
    """The highest clock that an Orin's power mode allows; None on other machines. Not tried on a Jetson."""
    for path in sorted(Path("/sys/class/devfreq").glob("*.gpu/max_freq")):
        return int(path.read_text()) / 1e9
    return None


def _runtime() -> Any:
    from polygraphy import cuda
    from polygraphy.logger import G_LOGGER

    before = os.environ.get("LD_LIBRARY_PATH")
    # where Polygraphy looks first; it does not know where CUDA 13's wheels have the library
    wheels = [str(folder) for entry in sys.path for folder in sorted(Path(entry).glob("nvidia/cu[0-9]*/lib"))]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*filter(None, [before]), *wheels])
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # what goes wrong reaches the user as our own sentence
            return cuda.wrapper()
    finally:
        if before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = before


@dataclass(eq=False)
class DeviceTensor:
    """A tensor on the GPU, dense, at ``address``; its memory is the pool's again when nobody holds the tensor."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Pieces(NamedTuple):
    """Where the first of some pieces of memory begins, and how many bytes behind one the next does."""

    address: int
    pitch: int


class Memory:
    """The process's GPU memory and stream. ``plan`` says in errors what was planned for."""

    def __init__(self, plan: str = "") -> None:
        from polygraphy import cuda

        self.cuda = _runtime()
        self._new = cuda.DeviceArray.raw
        self.stream = cuda.Stream()
        self._plan = plan
        self._free: dict[int, list[Any]] = {}  # by size: arrays that no tensor uses
        self._scratch: Any = None
        self.held_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, room: int | None = None) -> DeviceTensor:
        """A tensor whose content is anything; ``room`` bytes are what others of its kind may need, and exactly held.

        Without it, sizes are powers of two: prompts of all lengths then share a few pieces of memory.
        """
        need = math.prod(shape) * dtype.itemsize
        size = max(256, 1 << (need - 1).bit_length() if room is None else room)  # an empty tensor has an address too
        assert size >= need
        free = self._free.setdefault(size, [])
        array = free.pop() if free else self._allocate(size)
        tensor = DeviceTensor(array.ptr, shape, dtype)
        weakref.finalize(tensor, free.append, array).atexit = False
        return tensor

    def upload(self, array: np.ndarray) -> DeviceTensor:
        """A copy of ``array`` on the GPU."""
        array = np.ascontiguousarray(array)
        tensor = self.empty(array.shape, array.dtype)
        self._copy(tensor.address, array.ctypes.data, array.nbytes, _TO_DEVICE)
        self.stream.synchronize()  # CUDA does not promise to have read pageable memory when the call returns
        return tensor

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """A copy of ``tensor`` on the host, when all work before is done."""
        array = np.empty(tensor.shape, tensor.dtype)
        self._copy(array.ctypes.data, tensor.address, tensor.nbytes, _TO_HOST)
        self.stream.synchronize()
        return array

    def copy(self, target: DeviceTensor, at: int, source: DeviceTensor, begin: int, count: int) -> None:
        """Write ``count`` elements of ``source`` from ``begin`` on into ``target`` from ``at`` on."""
        width = target.dtype.itemsize
        self._copy(target.address + at * width, source.address + begin * width, count * width, _ON_DEVICE)

    def copy_pieces(self, target: Pieces, source: Pieces, width: int, count: int) -> None:
        """Copy ``count`` pieces of ``width`` bytes, where each is one pitch behind the one before; none may overlap."""
        if width and count:
            self.cuda.check(
                self.cuda.handle.cudaMemcpy2DAsync(
                    ctypes.c_void_p(target.address),
                    ctypes.c_size_t(target.pitch),
                    ctypes.c_void_p(source.address),
                    ctypes.c_size_t(source.pitch),
                    ctypes.c_size_t(width),
                    ctypes.c_size_t(count),
                    ctypes.c_int(_ON_DEVICE),
                    ctypes.c_void_p(self.stream.ptr),
                )
            )

    def zero_pieces(self, target: Pieces, width: int, count: int) -> None:
        """Make ``count`` pieces of ``width`` bytes zero."""
        if width and count:
            self.cuda.check(
                self.cuda.handle.cudaMemset2DAsync(
                    ctypes.c_void_p(target.address),
                    ctypes.c_size_t(target.pitch),
                    ctypes.c_int(0),
                    ctypes.c_size_t(width),
                    ctypes.c_size_t(count),
                    ctypes.c_void_p(self.stream.ptr),
                )
            )

    def scratch(self, size: int) -> Any:
        """One piece of memory for whoever works now: at least ``size`` bytes, larger and elsewhere after a request for
        more. Has ``ptr`` and ``allocated_nbytes``."""
        if self._scratch is None or size > self._scratch.allocated_nbytes:
            if self._scratch is not None:
                self.stream.synchronize()
                self.held_bytes -= self._scratch.allocated_nbytes
                self._scratch.free()
                self._scratch = None  # also if there is no more to be had
            self._scratch = self._allocate(max(256, size))
        return self._scratch

    def _copy(self, to: int, source: int, count: int, kind: int) -> None:
        if count:
            self.cuda.memcpy(to, source, count, ctypes.c_int(kind), self.stream.ptr)

    def _allocate(self, size: int) -> Any:
        array = self._malloc(size)
        if array is None:  # what other batches have left is of no use to this one
            self.stream.synchronize()
            for free in self._free.values():
                while free:
                    left = free.pop()
                    self.held_bytes -= left.allocated_nbytes
                    left.free()
            array = self._malloc(size)
        if array is None:
            raise UserError(
                f"the GPU has no {size / 1e6:.1f} MB left beside the {self.held_bytes / 1e6:.1f} MB that are held for "
                f"caches and activations{self._plan}: close what else uses it, ask shorter questions, or export with "
                "a smaller --max-kv-cache-capacity, --max-input-len or --max-batch-size"
            )
        self.held_bytes += size
        return array

    def _malloc(self, size: int) -> Any:
        """None if the GPU has not so much."""
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        try:
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
                return self._new((size,))
        except PolygraphyException as error:
            if f"CUDA Error: {OUT_OF_MEMORY}." not in str(error):
                raise
            return None
