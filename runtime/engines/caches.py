"""KV caches of a decoder on TensorRT: memory taken once, of which an engine sees a bucket of rows.

An engine reads each layer's keys and values as a dense [B, H_kv, C, d] and writes the call's own rows, [B, H_kv, S, d],
which are copied into their places. At first C is S, and the engine itself writes them there. Before the next call all
is laid out for a `bucket` of rows, in the same memory: as long as that has places, nothing changes that an engine sees,
neither shapes nor addresses. Rows that are not filled are masked, and zero: what is masked is multiplied all the same,
and memory that was never written may hold NaN.

Buffers lie side by side in a few blocks, so that one copy brings the new rows of many layers into their places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tokprune.runtime.engines.cuda import DeviceTensor, Memory, Pieces
from tokprune.runtime.engines.profiles import bucket

# bytes of a block, if one buffer takes no more: small devices do not have any size in one piece
BLOCK = 128 << 20
ALIGNMENT = 256  # bytes; where TensorRT wants tensors to begin


class Buffers:
    """Dense [B, H_kv, rows, d] for each of some names, in ``blocks``: ``tensors`` by name, which the blocks hold."""

    def __init__(
        self, groups: Sequence[Sequence[str]], blocks: list[DeviceTensor], shape: tuple[int, int, int], rows: int
    ) -> None:
        batch, heads, width = shape
        self.blocks, self.rows = blocks, rows
        self.tensors: dict[str, DeviceTensor] = {}
        for block, names in zip(blocks, groups, strict=True):
            step = batch * heads * rows * width * block.dtype.itemsize
            for index, name in enumerate(names):
                address = block.address + index * step
                self.tensors[name] = DeviceTensor(address, (batch, heads, rows, width), block.dtype)


class Caches:
    """The keys and values of a decoder's layers for B sequences; which of their rows are filled, the caller knows.

    ``filled`` is what an engine reads, by the ``names`` that were given. Memory is for ``most`` rows, and free again
    when nobody holds the object.
    """

    def __init__(
        self,
        memory: Memory,
        names: Sequence[str],
        shape: tuple[int, int, int],  # B, H_kv, d
        dtype: np.dtype,
        rows: int,
        most: int,
    ) -> None:
        self._memory, self._shape, self._dtype, self._most = memory, shape, dtype, most
        self._row = shape[2] * dtype.itemsize  # bytes of one head's
        of_all_heads = math.prod(shape) * dtype.itemsize
        # side by side, each buffer must begin where a tensor may
        count = max(1, BLOCK // (of_all_heads * most)) if of_all_heads % ALIGNMENT == 0 else 1
        self._groups = [names[begin : begin + count] for begin in range(0, len(names), count)]
        blocks = []
        for group in self._groups:
            whole = (len(group), *shape[:2], most, shape[2])
            blocks.append(memory.empty(whole, dtype, math.prod(whole) * dtype.itemsize))
        self.filled = Buffers(self._groups, blocks, shape, rows)
        self._one: Buffers | None = None

    def new_rows(self, count: int) -> Buffers:
        """Memory for ``count`` rows of each, to be given to `append`; that for one row is always the same."""
        if count == 1 and self._one is not None:
            return self._one
        batch, heads, width = self._shape
        blocks = [self._memory.empty((len(group), batch, heads, count, width), self._dtype) for group in self._groups]
        new = Buffers(self._groups, blocks, self._shape, count)
        if count == 1:
            self._one = new
        return new

    def make_room(self, past: int, count: int) -> None:
        """See to it that ``filled`` has places for ``count`` rows behind the first ``past`` ones, which stay."""
        need = past + count
        assert need <= self._most, f"{need} rows, room for {self._most}"
        if need > self.filled.rows:
            self._lay_out(bucket(need, self._most), past)

    def append(self, past: int, new: Buffers) -> None:
        """Copy ``new`` into the places behind the first ``past`` rows, whatever is there."""
        width = new.rows * self._row
        for block, source in zip(self.filled.blocks, new.blocks, strict=True):
            target = Pieces(block.address + past * self._row, self.filled.rows * self._row)
            self._memory.copy_pieces(target, Pieces(source.address, width), width, self._heads(block))

    def _lay_out(self, rows: int, past: int) -> None:
        """Make C ``rows``, more than it was, keep the first ``past`` ones and make the others zero.

        Each buffer begins at or behind its old place, so that from the last one on none is overwritten before it has
        moved; old and new place overlap, hence the way through other memory.
        """
        batch, heads, _ = self._shape
        kept, old, new = past * self._row, self.filled.rows * self._row, rows * self._row
        dense = Pieces(self._memory.scratch(batch * heads * kept).ptr, kept)
        for block, group in zip(self.filled.blocks, self._groups, strict=True):
            for index in reversed(range(len(group))):
                first = index * batch * heads
                source, target = (Pieces(block.address + first * pitch, pitch) for pitch in (old, new))
                self._memory.copy_pieces(dense, source, kept, batch * heads)
                self._memory.copy_pieces(target, dense, kept, batch * heads)
            self._memory.zero_pieces(Pieces(block.address + kept, new), new - kept, self._heads(block))
        self.filled = Buffers(self._groups, self.filled.blocks, self._shape, rows)

    def _heads(self, block: DeviceTensor) -> int:
        """Of all sequences and buffers in a block."""
        return math.prod(block.shape[:3])
