"""Matrices in INT8 and INT4, symmetric and rounded to nearest, in NumPy. Knows no graph and no file.

W ∈ ℝ^{out×in}. A scale s belongs to a row (INT8) or to a block of a row (INT4):

    m = 127 or 7        s = max |W| / m over row or block, rounded to the scales' type
    q = clip(round(W / s), −m, m)        Ŵ = q · s

round is half to even, as NumPy and ONNX have it. Where s is 0 in that type, it is 1 and every q is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Rounded:
    """``codes`` [out, in] int8, within ±7 for INT4; ``scales`` [out, in / block], a block of INT8 being the row.

    ``signal`` and ``noise`` are Σ W² and Σ (W − Ŵ)².
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.floating]
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float | None:
        """10·log₁₀ Σ W² / Σ (W − Ŵ)² in dB; None if Ŵ is W."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else None


def round_matrix(
    pieces: Iterable[NDArray[np.floating]],
    shape: tuple[int, int],
    precision: str,
    block: int,
    scale_type: str,
) -> Rounded:
    """Round a matrix of ``shape`` [out, in] that comes in ``pieces`` of whole rows, in any floating-point type.

    ``block`` divides in; ``scale_type`` is "float16" or "float32". Beside one piece in FP32 only codes and scales are
    held. Raises ValueError if a value is not finite.
    """
    rows, columns = shape
    most = 2 ** (BITS[precision] - 1) - 1
    codes = np.empty(shape, np.int8)
    scales = np.empty((rows, columns // block), scale_type)
    signal = noise = 0.0
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        blocks = piece.astype(np.float32).reshape(len(piece), -1, block)  # [r, in / block, block]
        if not np.isfinite(blocks).all():
            raise ValueError("a value is not finite")
        scale = (np.abs(blocks).max(axis=2) / np.float32(most)).astype(scale_type)
        scale[scale == 0] = 1
        wide = scale.astype(np.float32)[..., None]
        code = np.clip(np.rint(blocks / wide), -most, most)
        signal += float(np.square(blocks, dtype=np.float64).sum())
        noise += float(np.square(blocks - code * wide, dtype=np.float64).sum())
        codes[begin:end], scales[begin:end] = code.reshape(len(piece), columns), scale
        begin = end
    return Rounded(codes, scales, signal, noise)


def restore_matrix(codes: NDArray[np.int8], scales: NDArray[np.floating]) -> NDArray[np.float32]:
    """Ŵ [out, in] in FP32, where q · s is exact for FP16 scales."""
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32)
    return (blocks * scales.astype(np.float32)[..., None]).reshape(codes.shape)


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """INT4 codes in row-major order, two a byte, the first in the lower half, as ONNX stores them."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return np.bitwise_or(flat[0::2], flat[1::2] << 4, dtype=np.uint8)


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The codes of that ``shape`` that `pack_int4` has packed."""
    halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: math.prod(shape)].astype(np.int8)
    return np.where(halves > 7, halves - 16, halves).astype(np.int8).reshape(shape)
