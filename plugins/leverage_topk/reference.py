"""LeverageTopK in NumPy float64: the ground truth that every implementation is compared with.

Knows nothing of ONNX or of any engine. ``runtime.metrics`` has the rule by which two selections count as equal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokprune.plugins.topk import top_k
from tokprune.runtime.leverage import Settings

# Directions with σ_j ≤ RANK_TOLERANCE · σ_1 are rounding noise to an FP32 implementation and carry no leverage.
RANK_TOLERANCE = 1e-5
_MAX_RANK = Settings().max_rank


def effective_rank(
    singular_values: npt.NDArray[np.float64],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = _MAX_RANK,
) -> int:
    """How many leading singular directions count.

    ``rank`` gives the number itself; ``energy`` ρ the smallest r with Σ_{j≤r} σ² ≥ ρ Σσ², at most
    ``max_rank``. Directions below `RANK_TOLERANCE` never count. ``singular_values`` descend.
    """
    if bool(rank) == bool(energy):
        raise ValueError(f"give either rank or energy, not rank={rank} and energy={energy}")
    significant = int(np.sum(singular_values > RANK_TOLERANCE * singular_values[0]))
    if rank:
        return min(rank, significant)
    assert energy
    power = np.cumsum(singular_values**2)
    return min(int(np.sum(power < energy * power[-1])) + 1, max_rank, significant)


def leverage_scores(
    x: npt.ArrayLike, *, rank: int | None = None, energy: float | None = None, max_rank: int = _MAX_RANK
) -> npt.NDArray[np.float64]:
    """ℓ_i = Σ_{j≤r} U_ij² of X = UΣVᵀ, uncentred.

    ``x`` [N, D] of any float type; returns [N] float64, which sums to the rank used. Raises ValueError unless
    exactly one of ``rank`` and ``energy`` is given and rank < N: at full rank every score is 1.
    """
    x = np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"expected X [N, D], found shape {x.shape}")
    if rank and not rank < len(x):
        raise ValueError(f"rank {rank} must be smaller than the number of rows {len(x)}: at full rank all scores are 1")
    return scores_of(*left_singular(x), rank=rank, energy=energy, max_rank=max_rank)


def left_singular(x: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(U [N, m], σ [m] descending) of ``x`` [N, D] = UΣVᵀ, m being min(N, D)."""
    matrix: npt.NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    if matrix.shape[1] > matrix.shape[0]:
        matrix = np.linalg.qr(matrix.T)[1].T  # Xᵀ = QR: Rᵀ has X's U and σ, and costs a fraction of the SVD
    u, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
    return u, sigma


def scores_of(
    u: npt.NDArray[np.float64],
    sigma: npt.NDArray[np.float64],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = _MAX_RANK,
) -> npt.NDArray[np.float64]:
    """`leverage_scores` of the X whose `left_singular` are ``u`` [N, m] and ``sigma`` [m]."""
    used = effective_rank(sigma, rank=rank, energy=energy, max_rank=min(max_rank, len(u) - 1))
    return np.square(u[:, :used]).sum(axis=1)


def leverage_topk(
    x: npt.ArrayLike, k: int, *, rank: int | None = None, energy: float | None = None, max_rank: int = _MAX_RANK
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """(kept [k] int64 ascending, scores [N] float64) of ``x`` [N, D]."""
    scores = leverage_scores(x, rank=rank, energy=energy, max_rank=max_rank)
    return top_k(scores, k), scores
