"""Where text and visual rows stand in sequences and in batches of them, before and after each selection.

Knows row numbers only: pure NumPy, no session. The number of rows that a stage leaves is known before it
runs (K an image), only which visual rows they are is not; so everything here is computed up front.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """One sequence of ``count`` rows; ``visual`` [I, N] are the rows of each image, contiguous, ascending.

    ``origin`` [count] is the row of the call that a text row came from, and -1 for visual rows.
    """

    count: int
    visual: Rows
    origin: Rows

    @classmethod
    def of(cls, count: int, visual: Rows) -> Layout:
        """The layout of a call before any selection."""
        origin = np.arange(count, dtype=np.int64)
        origin[visual.reshape(-1)] = -1
        return cls(count, visual, origin)

    def prune(self, keep: int) -> tuple[Rows, Layout]:
        """Leave ``keep`` visual rows an image: (row template [R], layout behind the selection).

        The template's entry for an output row is the input row of the same text, or ``count`` + j for the
        j-th kept row of all images, in order (see ``names.ROW_TEMPLATE``).
        """
        images = len(self.visual)
        stays = np.ones(self.count, dtype=bool)
        stays[self.visual[:, keep:].reshape(-1)] = False
        source = np.arange(self.count, dtype=np.int64)
        source[self.visual[:, :keep].reshape(-1)] = self.count + np.arange(images * keep)
        new_row = np.cumsum(stays) - 1
        visual = new_row[self.visual[:, :keep]].astype(np.int64).reshape(images, keep)
        return source[stays], Layout(int(stays.sum()), visual, self.origin[stays])

    @property
    def text(self) -> Rows:
        """Rows [M] that hold text, wherever it stands."""
        return np.flatnonzero(self.origin >= 0).astype(np.int64)

    def rows_of(self, text_rows: Rows) -> Rows:
        """Rows of this layout that hold the call's ``text_rows``. Raises ValueError if one is no text row."""
        where = np.full(int(self.origin.max(initial=-1)) + 1, -1, dtype=np.int64)
        is_text = self.origin >= 0
        where[self.origin[is_text]] = np.flatnonzero(is_text)
        if text_rows.size and (text_rows.max() >= len(where) or (where[text_rows] < 0).any()):
            raise ValueError(f"rows {text_rows.tolist()} are not all text rows")
        return where[text_rows]


@dataclass(frozen=True)
class Batch:
    """The sequences of one call side by side, [B, S]: each stands on the right, pads fill up on the left.

    On the right, so that every sequence's last row is the call's last row. A pad repeats its sequence's first
    row: it is masked out, and what is computed for it is as finite as that row.
    """

    sequences: tuple[Layout, ...]

    @functools.cached_property
    def count(self) -> int:
        """Rows S of the longest sequence."""
        return max(layout.count for layout in self.sequences)

    @functools.cached_property
    def mask(self) -> Rows:
        """[B, S]: 1 for rows of a sequence, 0 for pads."""
        mask = np.zeros((len(self.sequences), self.count), dtype=np.int64)
        for line, layout in zip(mask, self.sequences, strict=True):
            line[self.count - layout.count :] = 1
        return mask

    @property
    def visual(self) -> Rows:
        """Rows [I, N] of each image in the states flattened to [B · S, D], sequence after sequence."""
        starts = self._starts()
        return np.concatenate([start + layout.visual for start, layout in zip(starts, self.sequences, strict=True)])

    @property
    def text(self) -> Rows:
        """Flat rows [I, M] of the text in each image's sequence, filled up with -1 behind the shorter ones."""
        starts = self._starts()
        rows = [
            start + layout.text
            for start, layout in zip(starts, self.sequences, strict=True)
            for _ in range(len(layout.visual))
        ]
        filled = np.full((len(rows), max((len(text) for text in rows), default=0)), -1, dtype=np.int64)
        for line, text in zip(filled, rows, strict=True):
            line[: len(text)] = text
        return filled

    def prune(self, keep: int) -> tuple[Rows, Batch]:
        """Leave ``keep`` visual rows an image: (row template [B, R], batch behind the selection).

        Sequences with more images lose more rows: R is what the longest then has, pads are counted anew.
        """
        slot = len(self.sequences) * self.count  # of the next sequence's first kept row
        templates, after = [], []
        for start, layout in zip(self._starts(), self.sequences, strict=True):
            source, left = layout.prune(keep)
            templates.append(np.where(source < layout.count, start + source, slot + source - layout.count))
            after.append(left)
            slot += len(layout.visual) * keep
        return left_pad(templates), Batch(tuple(after))

    def rows_of(self, text_rows: Rows) -> Rows:
        """Rows [B, T] of [B, S] that hold the ``text_rows`` [B, T] of each sequence's call, pads not counted.

        Raises ValueError if one is no text row.
        """
        found = np.empty_like(text_rows)
        for line, layout, rows in zip(found, self.sequences, text_rows, strict=True):
            line[:] = self.count - layout.count + layout.rows_of(rows)
        return found

    def _starts(self) -> list[int]:
        """Flat row of each sequence's first row."""
        return [(index + 1) * self.count - layout.count for index, layout in enumerate(self.sequences)]


def left_pad(rows: Sequence[Rows]) -> Rows:
    """[B, S] of B sequences ``rows``, none empty: the shorter ones repeat their first entry on the left."""
    count = max(map(len, rows))
    padded = np.empty((len(rows), count), dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: count - len(row)] = row[0]
        line[count - len(row) :] = row
    return padded
