"""What ``tokprune verify`` says: samples reduced to numbers, those to the parts of its JSON, and gates.

Parity compares an engine with PyTorch under the same pruning: is the implementation right? Consistency
compares the pruned model with the unpruned one: what did pruning change? Knows no model; the caller brings
the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tokprune.runtime import metrics

Kept = tuple[ArrayLike, ArrayLike, ArrayLike]  # of one stage: our indices [k], the reference's [k], its scores [N]


@dataclass(frozen=True)
class ParitySample:
    """One teacher-forced sample, reduced: T positions compared, and the kept sets of its stages."""

    positions: int
    max_abs_logit_diff: float  # NaN if logits were not finite
    cosine_min: float
    greedy_matches: int
    first_divergence: int | None  # first position with another greedy token
    kept_overlap: float  # mean over stages; 1 without stages
    kept_equal: bool  # in every stage, to the index
    kept_equal_margin: bool  # in every stage, by the margin rule
    max_rel_logit_diff: float  # the largest difference as a share of the reference's largest logit; NaN as above


def parity_sample(
    ours: ArrayLike, reference: ArrayLike, kept: Sequence[Kept], *, log_odds: bool = False
) -> ParitySample:
    """Compare logits [T, V], and the kept sets of each stage by ``metrics.kept_equal_margin``.

    ``log_odds`` says that the scores are such: lvpruning's. Raises ValueError if the shapes differ.
    """
    difference = metrics.max_abs_diff(ours, reference)
    largest = float(np.abs(np.asarray(reference, dtype=np.float64)).max())
    same = metrics.top1_matches(ours, reference)
    return ParitySample(
        positions=same.size,
        max_abs_logit_diff=difference,
        cosine_min=float(metrics.cosine(ours, reference).min()),
        greedy_matches=int(same.sum()),
        first_divergence=None if same.all() else int(np.argmin(same)),
        kept_overlap=float(np.mean([metrics.kept_overlap(a, b) for a, b, _ in kept])) if kept else 1.0,
        kept_equal=all(np.array_equal(np.sort(a), np.sort(b)) for a, b, _ in kept),
        kept_equal_margin=all(metrics.kept_equal_margin(a, scores, log_odds=log_odds) for a, _, scores in kept),
        max_rel_logit_diff=difference / largest if largest else difference,
    )


def parity_summary(samples: Sequence[ParitySample]) -> dict[str, Any]:
    """The ``parity`` part of a verification, as JSON.

    Logit differences and cosines are those of samples whose kept sets are equal (another set is another
    input), and beside them, with ``_all``, those of all; null where none is left or logits were not finite.
    ``kept_overlap`` is a mean, ``kept_equal`` and ``kept_equal_margin`` are shares of samples,
    ``first_divergence`` is the earliest position of any. Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("parity needs at least one sample")
    equal = [s for s in samples if s.kept_equal]
    positions = sum(s.positions for s in samples)
    return {
        "samples": len(samples),
        "positions": positions,
        "max_abs_logit_diff": _reduce(np.max, [s.max_abs_logit_diff for s in equal]),
        "max_abs_logit_diff_all": _reduce(np.max, [s.max_abs_logit_diff for s in samples]),
        "max_rel_logit_diff": _reduce(np.max, [s.max_rel_logit_diff for s in equal]),
        "cosine_min": _reduce(np.min, [s.cosine_min for s in equal]),
        "cosine_min_all": _reduce(np.min, [s.cosine_min for s in samples]),
        "greedy_agreement": sum(s.greedy_matches for s in samples) / positions,
        "first_divergence": min((s.first_divergence for s in samples if s.first_divergence is not None), default=None),
        "kept_equal": len(equal) / len(samples),
        "kept_equal_margin": sum(s.kept_equal_margin for s in samples) / len(samples),
        "kept_overlap": float(np.mean([s.kept_overlap for s in samples])),
        "kept_overlap_min": min(s.kept_overlap for s in samples),
        "not_finite": sum(math.isnan(s.max_abs_logit_diff) for s in samples),
    }


@dataclass(frozen=True)
class ConsistencySample:
    """One sample answered by both models; ``kl`` and ``top1`` hold one value for each position compared."""

    full: str
    pruned: str
    reference: str | None  # the data file's answer
    kl: ArrayLike  # [T] nats, KL(full‖pruned)
    top1: ArrayLike  # [T] bool


def consistency_summary(samples: Sequence[ConsistencySample], ipr: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The ``consistency`` part of a verification, as JSON; KL in nats, pooled over positions.

    Accuracies, flips and McNemar's p are over the ``labelled`` samples, null if none has a reference answer.
    Two unpruned engines in place of full and pruned give the noise floor. ``ipr`` is passed through.
    Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("consistency needs at least one sample")
    same = [_equal(s.full, s.pruned) for s in samples]
    kl = np.concatenate([np.asarray(s.kl, dtype=np.float64) for s in samples])
    top1 = np.concatenate([np.asarray(s.top1, dtype=bool) for s in samples])
    return {
        "samples": len(samples),
        "positions": kl.size,
        "agreement": float(np.mean(same)),
        "agreement_ci95": list(metrics.bootstrap_interval(same)),
        "agreement_wilson95": list(metrics.wilson_interval(sum(same), len(same))),
        **_accuracy(samples),
        "top1_agreement": _reduce(np.mean, top1),
        "kl_mean": _reduce(np.mean, kl),
        "kl_median": _reduce(np.median, kl),
        "kl_p99": _reduce(lambda values: np.percentile(values, 99), kl),
        "ipr": [dict(entry) for entry in ipr],
    }


def _accuracy(samples: Sequence[ConsistencySample]) -> dict[str, Any]:
    labelled = [(s.full, s.pruned, s.reference) for s in samples if s.reference is not None]
    result: dict[str, Any] = {
        "labelled": len(labelled),
        "accuracy_full": None,
        "accuracy_pruned": None,
        "correct_to_wrong": None,
        "wrong_to_correct": None,
        "wrong_to_other": None,
        "mcnemar_p": None,
    }
    if labelled:
        flips = metrics.count_flips(*zip(*labelled, strict=True))
        result["accuracy_full"] = float(np.mean([_equal(full, answer) for full, _, answer in labelled]))
        result["accuracy_pruned"] = float(np.mean([_equal(pruned, answer) for _, pruned, answer in labelled]))
        result |= {
            "correct_to_wrong": flips.correct_to_wrong,
            "wrong_to_correct": flips.wrong_to_correct,
            "wrong_to_other": flips.wrong_to_other,
            "mcnemar_p": metrics.mcnemar_p(flips.correct_to_wrong, flips.wrong_to_correct),
        }
    return result


def gates(
    parity: Mapping[str, Any] | None,
    consistency: Mapping[str, Any] | None,
    *,
    min_agreement: float | None = None,
    max_kl: float | None = None,
    max_logit_diff: float | None = None,
    min_greedy_agreement: float | None = None,
) -> list[dict[str, Any]]:
    """Hold summaries against the limits that were given: [{"name", "limit", "value", "passed"}].

    ``min_agreement`` is held against the agreement of answers, ``max_kl`` against the mean KL, and
    ``max_logit_diff`` against the samples with equal kept sets, ``min_greedy_agreement`` against parity's
    greedy tokens. A gate without a value fails. With parity there is always the gate ``not_finite``: no
    sample may have NaN or infinite logits.
    """
    found = []
    if parity is not None:
        found.append(_gate("not_finite", 0, parity["not_finite"]))
    if min_agreement is not None:
        agreement = None if consistency is None else consistency["agreement"]
        found.append(_gate("min_agreement", min_agreement, agreement, at_least=True))
    if max_kl is not None:
        found.append(_gate("max_kl", max_kl, None if consistency is None else consistency["kl_mean"]))
    if max_logit_diff is not None:
        found.append(_gate("max_logit_diff", max_logit_diff, None if parity is None else parity["max_abs_logit_diff"]))
    if min_greedy_agreement is not None:
        value = None if parity is None else parity["greedy_agreement"]
        found.append(_gate("min_greedy_agreement", min_greedy_agreement, value, at_least=True))
    return found


def _gate(name: str, limit: float, value: float | None, at_least: bool = False) -> dict[str, Any]:
    passed = value is not None and (value >= limit if at_least else value <= limit)
    return {"name": name, "limit": limit, "value": value, "passed": passed}


def _equal(one: str, other: str) -> bool:
    return metrics.normalise_answer(one) == metrics.normalise_answer(other)


def _reduce(how: Any, values: Any) -> float | None:
    """``how(values)`` as JSON can say it: None without values, or if the result is not finite."""
    with np.errstate(invalid="ignore"):  # percentiles subtract neighbours, which may be infinite
        result = float(how(values)) if len(values) else math.nan
    return result if math.isfinite(result) else None
