"""CrossAttentionTopK in NumPy float64: the ground truth that every implementation is compared with.

LVPruning's module (arXiv 2501.13652) at inference: cross-attention from visual to text rows, an MLP, two logits. The
operator is its second part, what follows the projections, whose matrix products engines do best in the graph.
Knows nothing of ONNX, of PyTorch or of any engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tokprune.plugins.topk import top_k

F64 = npt.NDArray[np.float64]
EPS = 1e-6  # of every norm

# The module's weights; D hidden size, W width, F width of the MLP. These turn rows into what the operator reads,
PROJECTIONS = (
    "visual_norm.weight",  # [D]
    "text_norm.weight",  # [D]
    "visual_proj.weight",  # [W, D]
    "text_proj.weight",  # [W, D]
    "q_proj.weight",  # [W, W]
    "k_proj.weight",  # [W, W]
    "v_proj.weight",  # [W, W]
)
# and these are the operator's own, in the order of its inputs.
WEIGHTS = (
    "o_proj.weight",  # [W, W]
    "mlp_norm.weight",  # [W]
    "up_proj.weight",  # [F, W]
    "up_proj.bias",  # [F]
    "down_proj.weight",  # [W, F]
    "down_proj.bias",  # [W]
    "head_norm.weight",  # [W]
    "head.weight",  # [2, W]: keep, drop
    "head.bias",  # [2]
)
MODULE_WEIGHTS = PROJECTIONS + WEIGHTS


def keep_scores(visual: npt.ArrayLike, text: npt.ArrayLike, weights: Mapping[str, npt.ArrayLike], heads: int) -> F64:
    """Log-odds keep − drop, [n] float64, of the rows of ``visual`` [n, D], given ``text`` [M, D]: the whole module.

    Rows are of any float type; ``weights`` are those of `MODULE_WEIGHTS`. Raises ValueError naming what does not fit.
    """
    if set(weights) != set(MODULE_WEIGHTS):
        raise ValueError(f"the weights lack or have beside what is needed {sorted(set(weights) ^ set(MODULE_WEIGHTS))}")
    own = {name: weights[name] for name in WEIGHTS}
    return row_scores(*project_rows(visual, text, {name: weights[name] for name in PROJECTIONS}), own, heads)


def project_rows(
    visual: npt.ArrayLike, text: npt.ArrayLike, weights: Mapping[str, npt.ArrayLike]
) -> tuple[F64, F64, F64, F64]:
    """What the operator reads of ``visual`` [n, D] and ``text`` [M, D]: v and q [n, W], k and u [M, W], float64.

    ``weights`` are those of `PROJECTIONS`. v is the visual rows' residual stream, u the values. Raises ValueError.
    """
    x, t = np.asarray(visual, dtype=np.float64), np.asarray(text, dtype=np.float64)
    if x.ndim != 2 or t.ndim != 2 or x.shape[1] != t.shape[1] or not len(t):
        raise ValueError(f"expected visual [n, D] and text [M, D] with M > 0, found shapes {x.shape} and {t.shape}")
    w = {name: np.asarray(weights[name], dtype=np.float64) for name in PROJECTIONS}
    v = _norm(x, w["visual_norm.weight"]) @ w["visual_proj.weight"].T  # [n, W]
    t = _norm(t, w["text_norm.weight"]) @ w["text_proj.weight"].T  # [M, W]
    return v, v @ w["q_proj.weight"].T, t @ w["k_proj.weight"].T, t @ w["v_proj.weight"].T


def row_scores(
    v: npt.ArrayLike,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    u: npt.ArrayLike,
    weights: Mapping[str, npt.ArrayLike],
    heads: int,
) -> F64:
    """The operator's scores, [n] float64, of one image: ``v`` and ``q`` [n, W], ``k`` and ``u`` [M, W] of valid text.

    ``weights`` are those of `WEIGHTS`; q is not scaled yet. Raises ValueError if ``heads`` do not divide W.
    """
    w = {name: np.asarray(weights[name], dtype=np.float64) for name in WEIGHTS}
    rows = np.asarray(v, dtype=np.float64)
    width = rows.shape[1]
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    by_head = [np.asarray(x, dtype=np.float64).reshape(len(np.asarray(x)), heads, -1) for x in (q, k, u)]
    logits = np.einsum("nhc,mhc->hnm", by_head[0], by_head[1]) / np.sqrt(width // heads)
    shares = np.exp(logits - logits.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    rows = rows + np.einsum("hnm,mhc->nhc", shares, by_head[2]).reshape(len(rows), width) @ w["o_proj.weight"].T
    inner = _norm(rows, w["mlp_norm.weight"]) @ w["up_proj.weight"].T + w["up_proj.bias"]  # [n, F]
    inner *= 0.5 * (1 + np.tanh(0.5 * inner))  # the logistic function, without overflow
    rows = rows + inner @ w["down_proj.weight"].T + w["down_proj.bias"]
    keep, drop = (_norm(rows, w["head_norm.weight"]) @ w["head.weight"].T + w["head.bias"]).T
    return np.asarray(keep - drop)


def module_topk(
    visual: npt.ArrayLike, text: npt.ArrayLike, keep: int, weights: Mapping[str, npt.ArrayLike], heads: int
) -> tuple[npt.NDArray[np.int64], F64]:
    """(kept [keep] int64 ascending, scores [n] float64) of `keep_scores`."""
    scores = keep_scores(visual, text, weights, heads)
    return top_k(scores, keep), scores


def _norm(x: F64, weight: F64) -> F64:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + EPS) * weight
