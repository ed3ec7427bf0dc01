"""How near two models are: of their answers, logits, representations and kept tokens, in float64.

Knows arrays and strings; runs no model. ``verification`` puts these numbers together into reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
RESAMPLES, SEED = 2000, 0  # of the bootstrap: fixed, so that the same samples give the same interval
# Two rows may change places if their scores differ by less than this share of the k-th score: about what the FP32
# body of LeverageTopK attains at a 2 % spectral gap (1.7e-3 at worst in 48 synthetic cases, 2e-4 in 90 % of them).
MARGIN = 1e-3
# Scores below this share of the best one are zero: what is left of them is rounding, in the reference too.
NEGLIGIBLE = 1e-6
NORMAL_975 = 1.959963984540054  # the normal distribution's 97.5 % quantile

# --- answers ----------------------------------------------------------------------------------------


def normalise_answer(text: str) -> str:
    """What exact match compares: case folded, white space made single blanks, trailing ``.,;:!?`` dropped."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


@dataclass(frozen=True)
class Flips:
    """Samples by what pruning did to their answer.

    After Dutta et al., "Accuracy is not all you need", NeurIPS 2024.
    """

    correct_to_wrong: int
    wrong_to_correct: int
    wrong_to_other: int  # wrong before and after, but another answer


def count_flips(full: Sequence[str], pruned: Sequence[str], reference: Sequence[str]) -> Flips:
    """Count flips of normalised answers, sample by sample; ``reference`` holds the correct ones."""
    lost = won = other = 0
    for texts in zip(full, pruned, reference, strict=True):
        before, after, correct = map(normalise_answer, texts)
        lost += before == correct != after
        won += before != correct == after
        other += correct not in (before, after) and before != after
    return Flips(lost, won, other)


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided McNemar p of paired answers: lost ~ Binomial(lost + won, ½) if pruning changes nothing.

    p = min(1, 2·P[X ≤ min(lost, won)]), in exact integers; 1 without discordant pairs.
    """
    discordant = lost + won
    tail = sum(math.comb(discordant, i) for i in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def bootstrap_interval(values: ArrayLike, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean of ``values`` [n], samples drawn with replacement.

    It has no width when all values are equal: see ``wilson_interval``. Raises ValueError without values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a bootstrap needs a list of values, this has shape {array.shape}")
    generator = np.random.default_rng(SEED)
    block = max(1, 2**20 // array.size)  # resamples at a time, so that memory stays small
    means = [
        array[generator.integers(array.size, size=(min(block, resamples - start), array.size))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share; it has a width at 0 and 100 % too.

    Raises ValueError without trials.
    """
    if trials < 1:
        raise ValueError("a share needs at least one trial")
    z2, share = NORMAL_975**2, successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_975 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def average_ranks(values: ArrayLike) -> F64:
    """Ranks of ``values`` [n] from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's ρ of pairs: Pearson's correlation of their average ranks.

    It is NaN if x or y is all the same, or holds a NaN. Raises ValueError if the lengths differ.
    """
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    a, b = average_ranks(x), average_ranks(y)
    if a.size != b.size:
        raise ValueError(f"{a.size} and {b.size} values are no pairs")
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def spearman_interval(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of Spearman's ρ, pairs drawn with replacement.

    Resamples in which all values are equal have no ρ and are left out; NaN where ρ itself is.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if math.isnan(spearman(a, b)):
        return math.nan, math.nan
    generator = np.random.default_rng(SEED)
    draws = (generator.integers(a.size, size=a.size) for _ in range(RESAMPLES))
    low, high = np.nanpercentile([spearman(a[draw], b[draw]) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


# --- logits -----------------------------------------------------------------------------------------


def log_softmax(logits: ArrayLike) -> F64:
    """Log-probabilities over the last axis, [..., V] float64."""
    array = np.asarray(logits, dtype=np.float64)
    shifted = array - array.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(p_logits: ArrayLike, q_logits: ArrayLike) -> F64:
    """KL(P‖Q) in nats at each position: logits [..., V] -> [...]. P is the reference."""
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    with np.errstate(invalid="ignore"):  # 0·(−∞ + ∞) where both rule a token out
        terms = np.exp(log_p) * (log_p - log_q)
    # rounding can make the sum of a zero divergence −1e-17
    return np.maximum(np.where(np.isneginf(log_p), 0.0, terms).sum(axis=-1), 0.0)


def top1_matches(a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
    """Whether both put the same token first: logits [..., V] -> [...]. Ties go to the lower id."""
    return np.asarray(a).argmax(axis=-1) == np.asarray(b).argmax(axis=-1)


def cosine(a: ArrayLike, b: ArrayLike) -> F64:
    """Cosine similarity over the last axis: [..., V] -> [...]; NaN where a vector is zero or not finite."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def max_abs_diff(a: ArrayLike, b: ArrayLike) -> float:
    """Largest |a − b|; NaN if either is not finite. Raises ValueError if the shapes differ."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"arrays of shapes {x.shape} and {y.shape} cannot be compared")
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(x - y).max())
    return difference if math.isfinite(difference) else math.nan


# --- representations, kept tokens, time --------------------------------------------------------------


def ipr(representation: ArrayLike) -> float:
    """Inverse participation ratio of the singular spectrum of H [N, D]: Σp_j², p_j = σ_j²/Σσ².

    It lies between 1/min(N, D), all σ equal, and 1, rank one.
    Σσ⁴ = ‖G‖²_F and Σσ² = tr G for the smaller Gram matrix G of H: no decomposition is needed.
    Raises ValueError if H is all zero or not finite.
    """
    h = np.asarray(representation, dtype=np.float64)
    gram = h @ h.T if h.shape[0] <= h.shape[1] else h.T @ h
    trace = float(np.trace(gram))
    if not (math.isfinite(trace) and trace > 0):
        raise ValueError(f"no singular spectrum: the sum of squares of the representation is {trace}")
    return float(np.square(gram / trace).sum())


def kept_overlap(ours: ArrayLike, reference: ArrayLike) -> float:
    """Share of the reference's kept indices [k] that ours [k] holds too."""
    return float(np.isin(np.asarray(reference), np.asarray(ours)).mean())


def kept_equal_margin(kept: ArrayLike, scores: ArrayLike, margin: float = MARGIN, *, log_odds: bool = False) -> bool:
    """Whether ``kept`` [k] is a right answer for the reference's ``scores`` [N], near-ties aside.

    It is if no row left out outscores a row kept by more than ``margin`` times the k-th best score, or by more than
    ``margin`` itself if scores are ``log_odds``, which may be negative: that is the same share of the odds. False,
    too, if ``kept`` is not ascending, repeats a row, or holds one whose score is NaN: dropped before.
    """
    values = np.asarray(scores, dtype=np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    rows = np.asarray(kept)
    if np.any(np.diff(rows) <= 0) or rows[0] < 0 or rows[-1] >= len(values):
        return False
    left_out = np.ones(len(values), dtype=bool)
    left_out[rows] = False
    if np.isneginf(values[rows]).any() or not left_out.any():
        return not left_out.any()
    kth_best = np.sort(values)[-len(rows)]
    allowed = margin if log_odds else margin * max(kth_best, NEGLIGIBLE * values.max())
    return bool(values[left_out].max() - values[rows].min() <= allowed)


def realised_share(t_pruned: float, t_full: float, f_pruned: float, f_full: float) -> float | None:
    """(1 − t_pruned/t_full) / (1 − F_pruned/F_full): what the clock shows of the theoretical saving.

    Both times are in one unit. Negative where pruning made it slower, None where there was nothing to save.
    """
    return None if f_pruned == f_full else (1 - t_pruned / t_full) / (1 - f_pruned / f_full)
