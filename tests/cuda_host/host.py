"""The CUDA kernels on this CPU: built by the C++ compiler under cuda_host.h's emulation, driven by ctypes.

Buffers that a kernel writes are poisoned first and have guards on both sides, which are looked at afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tokprune.plugins.cross_attention_topk import reference
from tokprune.runtime import leverage
from tokprune.runtime.leverage import Settings

HERE = Path(__file__).parent
PLUGINS = HERE.parents[1] / "plugins"
KERNELS = [PLUGINS / op / "launch.cu" for op in ("leverage_topk", "cross_attention_topk")]
EMULATION = [HERE / name for name in ("cuda_host.cpp", "arithmetic.cpp", "fiber.cpp")]
DATA_TYPES = {"float32": 0, "float16": 1, "uint16": 2}  # uint16: the bits of bfloat16
GUARD, POISON, GUARD_BYTE = 256, 0xFF, 0xA5
INVALID_VALUE = 1  # cudaErrorInvalidValue


class LeverageTopK(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("images", "n", "d", "k", "rank")),
        ("energy", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("max_rank", "rounds", "oversampling", "purifications", "seed")),
    ]


class CrossAttentionTopK(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("images", "n", "m", "width", "heads", "intermediate", "k")),
        ("eps", ctypes.c_float),
    ]


def compile_host(target: Path, sources: list[Path], *options: str) -> Path:
    """Build ``target`` from C++ and CUDA ``sources`` with the machine's C++ compiler; warnings are errors."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the kernels' tests need a C++ compiler: install g++"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}"]
    command += [f"-I{PLUGINS}", *options, "-x", "c++", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """Both operators and the faulty kernels, built once a process."""
    # kept until the process ends: the library stays loaded
    folder = Path(_folder().name)
    sources = [*KERNELS, *EMULATION, HERE / "library.cpp", HERE / "faulty.cpp"]
    loaded = ctypes.CDLL(str(compile_host(folder / "kernels.so", sources, "-march=native", "-fPIC", "-shared")))
    for name in ("leverage_workspace", "cross_attention_workspace"):
        getattr(loaded, name).restype = ctypes.c_size_t
    loaded.last_error.restype = ctypes.c_char_p
    return loaded


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


class Buffer:
    """Poisoned memory of ``size`` bytes between guards, 256-byte aligned."""

    def __init__(self, size: int) -> None:
        self._all = np.full(size + 3 * GUARD, GUARD_BYTE, np.uint8)
        self._start = -self._all.ctypes.data % GUARD + GUARD
        self.bytes = self._all[self._start : self._start + size]
        self.bytes[:] = POISON

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._all.ctypes.data + self._start)

    def check(self) -> None:
        before, behind = self._all[: self._start], self._all[self._start + self.bytes.size :]
        assert (before == GUARD_BYTE).all(), "written before the buffer"
        assert (behind == GUARD_BYTE).all(), "written behind the buffer"


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def leverage_call(
    shape: tuple[int, int, int],
    k: int,
    *,
    rank: int | None = None,
    energy: float | None = None,
    settings: Settings | None = None,
) -> LeverageTopK:
    """The call's sizes for X of ``shape`` [I, N, D], its attributes as the node has them."""
    settings = settings or Settings()
    return LeverageTopK(
        *shape, k, rank or 0, energy or 0, settings.max_rank, leverage.rounds(rank, settings),
        leverage.oversampling(rank, settings), leverage.purifications(rank, settings), settings.seed,
    )  # fmt: skip


def leverage_topk(x: np.ndarray, k: int, *, order: int = 0, **options) -> tuple[np.ndarray, np.ndarray]:
    """(kept [I, k] int64, scores [I, N] float32) of ``x`` [I, N, D]; threads and blocks run in ``order``."""
    call = leverage_call(x.shape, k, **options)
    size = library().leverage_workspace(ctypes.byref(call))
    assert size, "the sizes are refused"

    def launch(kept: Buffer, scores: Buffer, workspace: Buffer) -> int:
        type_ = DATA_TYPES[x.dtype.name]
        return library().leverage(
            ctypes.byref(call), type_, pointer(x), kept.pointer, scores.pointer, workspace.pointer
        )

    return _run(launch, x.shape[:2], k, size, order)


def cross_attention_topk(
    visual: np.ndarray, text: np.ndarray, valid: np.ndarray, k: int, weights, heads: int, *, order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(kept, scores) of ``visual`` [I, N, D] and ``text`` [I, M, D]; the projections before are made by NumPy.

    ``weights`` are the whole module's. Rows of ``text`` that are not ``valid`` reach the kernels as they are.
    """
    images = [reference.project_rows(x, t, weights) for x, t in zip(visual, text, strict=True)]
    v, *others = (np.stack(rows).astype(np.float32) for rows in zip(*images, strict=True))
    inputs = [v, *others, np.ascontiguousarray(valid)]
    matrices = [np.ascontiguousarray(weights[name], dtype=np.float32) for name in reference.WEIGHTS]
    inner = len(weights["up_proj.bias"])
    call = CrossAttentionTopK(*v.shape[:2], text.shape[1], v.shape[2], heads, inner, k, reference.EPS)
    size = library().cross_attention_workspace(ctypes.byref(call))
    assert size, "the sizes are refused"

    def launch(kept: Buffer, scores: Buffer, workspace: Buffer) -> int:
        given = (ctypes.c_void_p * 5)(*(pointer(array) for array in inputs))
        of_module = (ctypes.c_void_p * 9)(*(pointer(array) for array in matrices))
        return library().cross_attention(
            ctypes.byref(call), given, of_module, kept.pointer, scores.pointer, workspace.pointer
        )

    return _run(launch, visual.shape[:2], k, size, order)


def _run(launch, rows: tuple[int, int], k: int, size: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    images, n = rows
    buffers = kept, scores, workspace = Buffer(8 * images * k), Buffer(4 * images * n), Buffer(size)
    library().set_order(order)
    status = launch(kept, scores, workspace)
    assert status == 0, f"error {status}: {library().last_error().decode()}"
    for buffer in buffers:
        buffer.check()
    return kept.bytes.view(np.int64).reshape(images, k).copy(), scores.bytes.view(np.float32).reshape(rows).copy()
