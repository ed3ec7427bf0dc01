"""CrossAttentionTopK in NumPy float64: the ground truth that every implementation is compared with.

LVPruning's module (arXiv 2501.13652) at inference: cross-attention from visual to text rows, an MLP, two logits.
Knows nothing of ONNX, of PyTorch or of any engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tokprune.plugins.topk import top_k

F64 = npt.NDArray[np.float64]
EPS = 1e-6  # of every norm

# The module's weights in the order of the operator's inputs; D hidden size, W width, F width of the MLP.
WEIGHTS = (
    "visual_norm.weight",  # [D]
    "text_norm.weight",  # [D]
    "visual_proj.weight",  # [W, D]
    "text_proj.weight",  # [W, D]
    "q_proj.weight",  # [W, W]
    "k_proj.weight",  # [W, W]
    "v_proj.weight",  # [W, W]
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


def keep_scores(visual: npt.ArrayLike, text: npt.ArrayLike, weights: Mapping[str, npt.ArrayLike], heads: int) -> F64:
    """Log-odds keep − drop, [n] float64, of the rows of ``visual`` [n, D], given ``text`` [M, D].

    Rows are of any float type; ``weights`` are those of `WEIGHTS`. Raises ValueError naming what does not fit.
    """
    x, t = np.asarray(visual, dtype=np.float64), np.asarray(text, dtype=np.float64)
    if x.ndim != 2 or t.ndim != 2 or x.shape[1] != t.shape[1] or not len(t):
        raise ValueError(f"expected visual [n, D] and text [M, D] with M > 0, found shapes {x.shape} and {t.shape}")
    if set(weights) != set(WEIGHTS):
        raise ValueError(f"the weights lack or have beside what is needed {sorted(set(weights) ^ set(WEIGHTS))}")
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    width = len(w["q_proj.weight"])
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    v = _norm(x, w["visual_norm.weight"]) @ w["visual_proj.weight"].T  # [n, W]
    t = _norm(t, w["text_norm.weight"]) @ w["text_proj.weight"].T  # [M, W]
    q, k, u = (
        (rows @ w[name].T).reshape(len(rows), heads, -1)  # [·, heads, W / heads]
        for rows, name in ((v, "q_proj.weight"), (t, "k_proj.weight"), (t, "v_proj.weight"))
    )
    logits = np.einsum("nhc,mhc->hnm", q, k) / np.sqrt(width // heads)
    shares = np.exp(logits - logits.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    v = v + np.einsum("hnm,mhc->nhc", shares, u).reshape(len(v), width) @ w["o_proj.weight"].T
    inner = _norm(v, w["mlp_norm.weight"]) @ w["up_proj.weight"].T + w["up_proj.bias"]  # [n, F]
    inner *= 0.5 * (1 + np.tanh(0.5 * inner))  # the logistic function, without overflow
    v = v + inner @ w["down_proj.weight"].T + w["down_proj.bias"]
    keep, drop = (_norm(v, w["head_norm.weight"]) @ w["head.weight"].T + w["head.bias"]).T
    return np.asarray(keep - drop)


def cross_attention_topk(
    visual: npt.ArrayLike, text: npt.ArrayLike, keep: int, weights: Mapping[str, npt.ArrayLike], heads: int
) -> tuple[npt.NDArray[np.int64], F64]:
    """(kept [keep] int64 ascending, scores [n] float64) of `keep_scores`."""
    scores = keep_scores(visual, text, weights, heads)
    return top_k(scores, keep), scores


def _norm(x: F64, weight: F64) -> F64:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + EPS) * weight
