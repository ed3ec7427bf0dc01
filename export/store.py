"""A bundle's weights: the checkpoint's own shards where a type fits, else converted tensor by tensor.

A shard is hard-linked into the bundle, or copied where the file system cannot link; graphs point into it by offset. No
weight is ever in memory whole. Knows byte ranges and types; knows no model.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tokprune.export.weights import SIZES, Stored, Weights
from tokprune.runtime.errors import UserError

CONVERTED = "weights.data"  # what had to be converted
COPIED = 64 << 20  # bytes; a smaller shard is copied: a link would save nothing and tie two directories together
_PIECE = 16 << 20  # bytes read at a time
_ALIGNMENT = 64
_NOTE = 2 << 30  # bytes between notes of progress
_TYPES = {"fp16": ("F16", ir.DataType.FLOAT16), "fp32": ("F32", ir.DataType.FLOAT)}
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class Source:
    """A checkpoint's tensor by canonical name, or rows [begin, end) of its first axis."""

    name: str
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}.{self.rows[0]}-{self.rows[1]}"


class Store:
    """The weights of the bundle that is written to ``directory``."""

    def __init__(
        self, directory: Path, weights: Weights, precision: str, note: Callable[[str], None] = lambda _: None
    ) -> None:
        """``precision`` is "fp32" or "fp16"; ``note`` hears of progress in what takes long."""
        self.directory = directory
        self._weights, self._note = weights, note
        self._stored_type, self._type = _TYPES[precision]
        self._placed: dict[Source, ir.ExternalTensor] = {}
        self._moved = self._noted = 0  # bytes copied or converted, and at the last note

    def place(self, source: Source) -> ir.ExternalTensor:
        """The tensor as a graph may refer to it; its bytes are in the bundle afterwards.

        Raises UserError if a value is too large for the bundle's type, naming the tensor.
        """
        if source not in self._placed:
            stored = self._weights[source.name]
            if source.rows is not None:
                stored = stored.rows(*source.rows)
            if stored.dtype == self._stored_type:
                location, offset = self._shard(stored.file), stored.offset
            else:
                location, offset = CONVERTED, self._convert(stored, str(source))
            length = stored.length // SIZES[stored.dtype] * SIZES[self._stored_type]
            self._placed[source] = ir.ExternalTensor(
                location,
                offset,
                length,
                self._type,
                shape=ir.Shape(stored.shape),
                name=str(source),
                base_dir=self.directory,
            )
        return self._placed[source]

    def _shard(self, shard: Path) -> str:
        """Bring the file into the bundle, once; its name there."""
        target = self.directory / shard.name
        if target.exists():
            return shard.name
        shard = shard.resolve()  # the hub's cache holds symbolic links
        if shard.stat().st_size > COPIED:
            try:
                os.link(shard, target)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
            else:
                return target.name
        with shard.open("rb") as read, target.open("xb") as write:
            while piece := read.read(_PIECE):
                write.write(piece)
                self._progress(len(piece))
        return target.name

    def _convert(self, stored: Stored, name: str) -> int:
        """Append the tensor in the bundle's type to ``CONVERTED``; its offset there."""
        with stored.file.open("rb") as read, (self.directory / CONVERTED).open("ab") as write:
            read.seek(stored.offset)
            write.write(bytes(-write.tell() % _ALIGNMENT))
            offset = write.tell()
            for begin in range(0, stored.length, _PIECE):
                piece = read.read(min(_PIECE, stored.length - begin))
                write.write(self._converted(piece, stored.dtype, name).tobytes())
                self._progress(len(piece))
        return offset

    def _converted(self, data: bytes, dtype: str, name: str) -> np.ndarray:
        values = _numbers(data, dtype)
        if self._stored_type == "F32":
            return values.astype(np.float32)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        lost = np.isinf(halves) & np.isfinite(values)
        if lost.any():
            raise UserError(
                f"{name} has the value {values[lost][0]:.6g}, which FP16 cannot hold (65504 at most): "
                "export with --precision fp32"
            )
        return halves

    def _progress(self, size: int) -> None:
        self._moved += size
        if self._moved - self._noted >= _NOTE:
            self._noted = self._moved
            self._note(f"{self._moved / 1e9:.0f} GB of weights copied or converted")


def _numbers(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # FP32's upper half
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "F16" else np.float32)
