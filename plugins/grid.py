"""Control selectors that see no content: an even grid and one seeded draw. Every table needs them.

Their indices are constants of the export. Knows nothing of models; a grid is (rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from tokprune.plugins.nodes import Nodes
from tokprune.plugins.topk import top_k


def uniform_indices(grid: tuple[int, int] | None, n: int, k: int) -> npt.NDArray[np.int64]:
    """Indices [k] int64, ascending and distinct, of ``k`` rows spread evenly over ``n``.

    On a ``grid`` (h, w) of n patches in row-major order, k are spread over R = round(√(kh/w)) patch rows as
    evenly as they go, at the centres (i + ½)h/R and (j + ½)w/c_i. Without a grid, as after an earlier stage,
    the n rows are a line.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} must lie between 1 and the number of rows {n}")
    if grid is None:
        return _centres(n, k)
    height, width = grid
    if height * width != n:
        raise ValueError(f"a grid of {height} x {width} has {height * width} patches, not {n}")
    least = math.ceil(k / width)  # fewer patch rows could not hold k
    used = min(max(round(math.sqrt(k * height / width)), least), height, k)
    ends = np.arange(used + 1) * k // used
    chosen = [
        row * width + _centres(width, int(count))
        for row, count in zip(_centres(height, used), np.diff(ends), strict=True)
    ]
    return np.concatenate(chosen)


def random_indices(n: int, k: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(kept [k] int64 ascending, draws [n] float32 in [0, 1)): the k largest of n draws of Philox(``seed``)."""
    draws = np.random.Generator(np.random.Philox(seed)).random(n, dtype=np.float32)
    return top_k(draws, k), draws


def constant_topk_nodes(
    x: str, outputs: Sequence[str], kept: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
) -> list[NodeProto]:
    """Nodes that give ``outputs`` (kept_indices [I, k] int64, scores [I, n] float32) for ``x`` [I, n, D].

    The same contract as LeverageTopK, the same values for every image; only the number of images is taken from ``x``.
    """
    nodes = Nodes(f"{outputs[0]}_constant")
    images = nodes.add("Shape", x, start=0, end=1)
    rows: tuple[npt.NDArray[Any], ...] = (kept.astype(np.int64), scores.astype(np.float32))
    for output, row in zip(outputs, rows, strict=True):
        shape = nodes.add("Concat", images, nodes.int64([row.size]), axis=0)
        nodes.add("Expand", nodes.constant(row[None]), shape, output=output)
    return nodes.protos


def _centres(length: int, count: int) -> npt.NDArray[np.int64]:
    """⌊(i + ½) length / count⌋ for i < count: distinct for count ≤ length."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * length // (2 * count)
