"""Where text and visual rows stand in a sequence, before and after each selection.

Knows row numbers only: pure NumPy, no session. The number of rows that a stage leaves is known before it
runs (K an image), only which visual rows they are is not; so everything here is computed up front.
"""

from __future__ import annotations

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
