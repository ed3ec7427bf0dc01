"""Factors by channel for a group of matrices: SmoothQuant's migration, AWQ's search, and the ranges of activations.

    SmoothQuant (Xiao 2023, arXiv 2211.10438)      s_j = max|x_j|^α / max_i|w_ij|^(1−α)
    AWQ (Lin 2024, arXiv 2306.00978)               s_j = mean|x_j|^α, α by search

Searched is the α, none among them, for which Σ ‖X Wᵀ − X̂ Ŵᵀ‖² over the group's matrices is smallest on the rows of X
that were kept: Ŵ is W · s rounded, X̂ is X / s, rounded too where activations are. Knows numbers; opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokprune.calibration.folding import Group
from tokprune.calibration.histogram import MOST, PERCENTILE, Histogram, find_range
from tokprune.calibration.rounding import restore_matrix, round_matrix
from tokprune.calibration.statistics import Seen
from tokprune.runtime.recipe import Activation, Choice

ALPHAS = tuple(step / 20 for step in range(1, 21))
_SEARCH_ROWS = 1024  # of a matrix, evenly spread: more do not change which α is best, and take as much longer
_EXTREME = 1e4  # of a factor


@dataclass(frozen=True)
class Target:
    """What a matrix of a group becomes: ``block`` weights to a scale, None where it stays."""

    weights: NDArray[np.floating]  # [out, in]; may be a mapped file
    precision: str
    block: int | None


@dataclass(frozen=True)
class Found:
    """``factors`` s [C] that X is divided by, None for none; the ``alpha`` behind them; X̂'s one scale.

    ``errors`` are Σ ‖X Wᵀ − X̂ Ŵᵀ‖² / Σ ‖X Wᵀ‖² by matrix that is rounded, on the rows that were kept.
    """

    factors: NDArray[np.float32] | None
    alpha: float | None
    activation: Activation | None
    errors: Mapping[str, float]


def find_factors(
    group: Group,
    choice: Choice,
    seen: Seen,
    targets: Mapping[str, Target],
    scale_type: str,
    norm: NDArray[np.floating] | None,
) -> Found:
    """Factors of a ``group`` whose rounded matrices are chosen as ``choice``; ``norm`` [C] is the weight they go into.

    SmoothQuant takes the choice's α, or searches where that is None; AWQ searches. Without takers there are no factors.
    """
    candidates: Sequence[float | None] = (None, *ALPHAS)
    if choice.scheme == "round" or not group.takers:
        candidates = (None,)
    elif choice.scheme == "smoothquant" and choice.alpha is not None:
        candidates = (choice.alpha,)
    rows = {name: _some_rows(target) for name, target in targets.items()}
    largest = np.maximum.reduce([_columns(target.weights) for target in targets.values()]) if group.takers else None
    best, least = None, np.inf
    for alpha in candidates:
        factors = None
        if alpha is not None:
            assert largest is not None
            factors = _factors(group, choice.scheme, alpha, seen, largest, norm, scale_type)
            if (factors == 1).all():
                factors = None
        activation = find_activation(choice, seen, factors, scale_type)
        errors = _errors(rows, seen.sample, factors, activation, scale_type)
        shares = {name: error / size if size else 0.0 for name, (error, size) in errors.items()}
        found = Found(factors, alpha, activation, shares)
        total = sum(error for error, _ in errors.values())
        if best is None or total < least:
            best, least = found, total
    assert best is not None
    return best


def find_activation(
    choice: Choice, seen: Seen, factors: NDArray[np.float32] | None, scale_type: str
) -> Activation | None:
    """The scale of X / s that ``choice`` asks for.

    The largest |x| is that of all rows. Other methods see all values where there are no factors, else the rows kept.
    """
    if choice.activation is None:
        return None
    histogram, largest = seen.histogram, float(seen.largest.max(initial=0.0))
    if factors is not None:
        largest = float((seen.largest / factors).max(initial=0.0))
        histogram = Histogram()
        histogram.add(np.abs(seen.sample / factors))
    reach = find_range(histogram, largest, choice.activation.method, choice.activation.percentile or PERCENTILE)
    scale = float(np.asarray(reach / MOST, scale_type)) or 1.0
    return Activation(scale, -reach, reach)


def fake_quantize(values: NDArray[np.floating], scale: float) -> NDArray[np.float32]:
    """What is left of ``values`` between QuantizeLinear and DequantizeLinear: in FP32, half to even."""
    wide = np.float32(scale)
    return np.clip(np.rint(values.astype(np.float32) / wide), -MOST - 1, MOST) * wide


def _factors(
    group: Group,
    scheme: str,
    alpha: float,
    seen: Seen,
    weights: NDArray[np.floating],
    norm: NDArray[np.floating] | None,
    scale_type: str,
) -> NDArray[np.float32]:
    """s [C], 1 for channels that were never used; centred, since a common factor changes nothing."""
    sizes = group.tie(seen.largest if scheme == "smoothquant" else seen.mean).astype(np.float64)
    others = group.tie(weights).astype(np.float64)
    used = (sizes > 0) & (others > 0)
    factors = np.ones(len(sizes))
    factors[used] = sizes[used] ** alpha
    if scheme == "smoothquant":
        factors[used] /= others[used] ** (1 - alpha)
    if used.any():
        factors[used] /= np.sqrt(factors[used].max() * factors[used].min())
    factors = np.clip(factors, 1 / _EXTREME, _EXTREME)
    if norm is not None:  # what the norm's weight is rounded to decides, so that rounding it changes nothing
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            folded = (norm.astype(np.float64) / factors).astype(scale_type)
            exact = norm.astype(np.float64) / folded
        normal = np.isfinite(folded) & (np.abs(folded) >= np.finfo(scale_type).tiny)
        factors = np.where(normal, exact, 1.0)
    return group.spread(factors).astype(np.float32)


def _some_rows(target: Target) -> Target:
    count = len(target.weights)
    at = np.linspace(0, count - 1, min(count, _SEARCH_ROWS)).astype(np.int64)
    return Target(np.asarray(target.weights[at], np.float32), target.precision, target.block)


def _columns(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """max |W| of each column, [in], some rows at a time."""
    step = max(1, (16 << 20) // (4 * weights.shape[1]))
    pieces = [np.abs(weights[at : at + step].astype(np.float32)).max(axis=0) for at in range(0, len(weights), step)]
    return np.maximum.reduce(pieces)


def _errors(
    rows: Mapping[str, Target],
    sample: NDArray[np.float32],
    factors: NDArray[np.float32] | None,
    activation: Activation | None,
    scale_type: str,
) -> dict[str, tuple[float, float]]:
    """(Σ ‖X Wᵀ − X̂ Ŵᵀ‖², Σ ‖X Wᵀ‖²) of each matrix that is rounded."""
    entering = sample if factors is None else sample / factors
    if activation is not None:
        entering = fake_quantize(entering, activation.scale)
    found = {}
    for name, target in rows.items():
        if target.block is None:
            continue
        changed = target.weights if factors is None else target.weights * factors
        rounded = round_matrix([changed], changed.shape, target.precision, target.block, scale_type)
        exact = sample @ target.weights.T
        error = exact - entering @ restore_matrix(rounded.codes, rounded.scales).T
        found[name] = _energy(error), _energy(exact)
    return found


def _energy(values: NDArray[np.floating]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
