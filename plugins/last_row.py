"""Selection by one attention row: what the last prompt row gave to each visual row, as FastV scores.

The row is a decoder's output: nothing here knows attention. Standard operators only, so there is no operator of its
own and no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from tokprune.plugins.nodes import Nodes
from tokprune.plugins.topk import top_k, top_k_nodes


def last_row_topk(row: npt.ArrayLike, visual: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray]:
    """(kept [k] int64 ascending, scores [n] of ``row``'s dtype) for an attention row [S] and ``visual`` rows [n] of it.

    The score of FastV (arXiv 2403.06764): the attention that the row's query gives to the visual row.
    """
    scores = np.asarray(row)[np.asarray(visual)]
    return top_k(scores, k), scores


def last_row_topk_nodes(row: str, visual: str, outputs: Sequence[str], k: int) -> list[NodeProto]:
    """Nodes that give ``outputs`` (kept_indices [I, k] int64, scores [I, n] float32).

    ``row`` [B, S] float32 is each sequence's attention row, ``visual`` [I, n] int64 counts in the flattened [B * S].
    """
    kept, scores = outputs
    nodes = Nodes(f"{kept}_last_row")
    nodes.add("Gather", nodes.add("Reshape", row, nodes.int64([-1])), visual, output=scores, axis=0)
    top_k_nodes(nodes, scores, k, kept)
    return nodes.protos
