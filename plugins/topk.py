"""The order rule that all selectors share: best score first, ties to the lower index, result ascending.

Once in NumPy, once as ONNX nodes. Knows nothing of where scores come from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokprune.plugins.nodes import Nodes


def top_k(scores: npt.ArrayLike, k: int) -> npt.NDArray[np.int64]:
    """Indices [k] int64, ascending, of the ``k`` best of ``scores`` [N]; ties go to the lower index."""
    scores = np.asarray(scores)
    if not 1 <= k <= scores.size:
        raise ValueError(f"k = {k} must lie between 1 and the number of scores {scores.size}")
    return np.sort(np.argsort(-scores, kind="stable")[:k]).astype(np.int64)


def top_k_nodes(nodes: Nodes, scores: str, k: int, output: str) -> None:
    """Add nodes that compute `top_k` of ``scores`` [I, N] float32 into ``output`` [I, k] int64.

    ONNX's TopK gives ties to the lower index. The indices are then sorted as int32, which TensorRT 10.3's
    TopK takes (int64 it does not).
    """
    _, best = nodes.add_many("TopK", 2, scores, nodes.int64([k]), axis=1)
    as_int32 = nodes.add("Cast", best, to=nodes.INT32)
    ascending, _ = nodes.add_many("TopK", 2, as_int32, nodes.int64([k]), axis=1, largest=0)
    nodes.add("Cast", ascending, to=nodes.INT64, output=output)
