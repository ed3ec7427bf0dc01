"""From samples' outcomes to numbers: one row a configuration, then what the rows say together. Runs no model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tokprune.runtime import metrics
from tokprune.runtime.verification import ConsistencySample, consistency_summary

Outcomes = dict[str, Any]  # what measure.Study.measure gives
Row = dict[str, Any]
SAVED = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the decoder's FLOPs
SIGNIFICANT = 0.05
ONE_DIGIT = ("digit", "color", "exists")  # forms of the demo's questions that name a digit or its colour


def report(outcomes: Sequence[Outcomes], timings: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Everything that tables and plots show, as JSON."""
    uniform = {item["stages"]: item for item in outcomes if item["method"] == "uniform"}
    rows = [row(item, timing, uniform.get(item["stages"])) for item, timing in zip(outcomes, timings, strict=True)]
    for item in rows:
        item["uniform_at_equal_flops"] = interpolated(item, rows)
    return {
        "questions": len(outcomes[0]["pruned"]),
        "spectrum_questions": len(outcomes[0]["ipr"]),
        "rows": rows,
        "ipr": correlations(outcomes, rows),
        "most_consistent": [best(rows, share) for share in SAVED],
        "silent": [item["name"] for item in rows if is_silent(item)],
    }


def row(item: Outcomes, timing: dict[str, Any] | None, uniform: Outcomes | None) -> Row:
    """One configuration's numbers; ``uniform`` are the outcomes of that method at the same stages."""
    keys = ("full", "pruned", "reference", "kl", "top1")
    samples = [ConsistencySample(*values) for values in zip(*(item[key] for key in keys), strict=True)]
    summary = consistency_summary(samples, _spectra(item))
    change = _right(item, "pruned").astype(int) - _right(item, "full")
    after = item["layer"] or 0
    result: Row = {
        **{key: item[key] for key in ("name", "method", "stages", "layer")},
        **summary,
        "changed": 1 - summary["agreement"],
        "accuracy_change": float(change.mean()),
        "accuracy_change_ci95": list(metrics.bootstrap_interval(change)),
        "delta_ipr": float(_delta(item).mean()),
        "delta_ipr_last": float(np.abs(np.subtract(item["ipr"], item["ipr_full"]))[:, -1].mean()),
        "delta_ipr_signed": float(np.subtract(item["ipr"], item["ipr_full"])[:, after:].mean()),
        "forms": _forms(item),
        "prefill_tflops": item["flops"]["prefill_tflops"],
        "saved": item["flops"]["decoder_reduction"],
        "against_uniform": None,
        "timing": None,
    }
    if uniform is not None and item["method"] != "uniform":
        result["against_uniform"] = _against(item, uniform)
    if timing is not None:
        wanted = ("decoder_ms_median", "decoder_ms_median_full", "decoder_speedup", "realised_share")
        result["timing"] = {key: timing[key] for key in (*wanted, "theoretical_decoder_speedup", "engine")}
    return result


def _against(item: Outcomes, uniform: Outcomes) -> dict[str, Any]:
    """Paired, question by question: who is right, and who says what the original says."""
    found = {}
    for name, mine, other in (
        ("accuracy", _right(item, "pruned"), _right(uniform, "pruned")),
        ("agreement", _same(item), _same(uniform)),
    ):
        lost, won = int((other & ~mine).sum()), int((mine & ~other).sum())
        found |= {
            f"{name}_difference": float(mine.mean() - other.mean()),
            f"{name}_lost": lost,
            f"{name}_won": won,
            f"{name}_mcnemar_p": metrics.mcnemar_p(lost, won),
        }
    return found


def _forms(item: Outcomes) -> dict[str, dict[str, float]]:
    """By form of question, and of those that name one digit together, where all of them were asked."""
    of, full, pruned, same = np.array(item["form"]), _right(item, "full"), _right(item, "pruned"), _same(item)
    groups = {form: (form,) for form in dict.fromkeys(item["form"])}
    if set(ONE_DIGIT) <= set(groups):
        groups["one digit named"] = ONE_DIGIT
    found = {}
    for name, forms in groups.items():
        asked = np.isin(of, forms)
        samples, right = int(asked.sum()), int(pruned[asked].sum())
        found[name] = {
            "samples": samples,
            "accuracy_full": float(full[asked].mean()),
            "accuracy_pruned": float(pruned[asked].mean()),
            "accuracy_wilson95": list(metrics.wilson_interval(right, samples)),
            "agreement": float(same[asked].mean()),
        }
    return found


def _right(item: Outcomes, side: str) -> np.ndarray:
    return _equal(item[side], item["reference"])


def _same(item: Outcomes) -> np.ndarray:
    return _equal(item["pruned"], item["full"])


def _equal(ours: Iterable[str], theirs: Iterable[str]) -> np.ndarray:
    pairs = zip(ours, theirs, strict=True)
    return np.array([metrics.normalise_answer(a) == metrics.normalise_answer(b) for a, b in pairs])


# --- IPR --------------------------------------------------------------------------------------------


def _delta(item: Outcomes) -> np.ndarray:
    """|ΔIPR| of each sample [m]: mean over the layers behind the first stage; those before are what they were."""
    return np.abs(np.subtract(item["ipr"], item["ipr_full"]))[:, item["layer"] or 0 :].mean(axis=1)


def _spectra(item: Outcomes) -> list[dict[str, Any]]:
    means = zip(np.mean(item["ipr_full"], axis=0), np.mean(item["ipr"], axis=0), strict=True)
    return [{"layer": layer, "full": float(f), "pruned": float(p)} for layer, (f, p) in enumerate(means)]


def correlations(outcomes: Sequence[Outcomes], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Spearman's ρ with |ΔIPR|, at three levels, and with the FLOPs saved for comparison.

    "configurations": across all, each its means. "same stages": between methods, ranks and draws at equal stages,
    mean of the groups' ρ and its bootstrap interval over groups. "samples": across the questions of a
    configuration, likewise over configurations; ``above`` and ``below`` count intervals of single ones that
    leave out zero.
    """
    pruned = [item for item in rows if item["stages"]]
    found = []
    for by, outcome in itertools.product(("delta_ipr", "delta_ipr_last", "saved"), ("kl_mean", "changed")):
        x, y = ([item[key] for item in pruned] for key in (by, outcome))
        if len(pruned) > 2:
            rho = {"rho": metrics.spearman(x, y), "ci95": list(metrics.spearman_interval(x, y))}
            found.append({"over": "configurations", "by": by, "outcome": outcome, "n": len(pruned), **rho})
        groups = [[item for item in pruned if item["stages"] == stages] for stages in {i["stages"]: 0 for i in pruned}]
        rhos = [metrics.spearman([i[by] for i in g], [i[outcome] for i in g]) for g in groups if len(g) > 2]
        found += _mean_rho("same stages", by, outcome, rhos)
    for outcome in ("kl_mean", "changed"):
        rhos, above, below = [], 0, 0
        for item in outcomes:
            if item["stages"]:
                count = len(item["ipr"])
                y = [np.mean(kl) for kl in item["kl"][:count]] if outcome == "kl_mean" else ~_same(item)[:count]
                rhos.append(metrics.spearman(_delta(item), y))
                low, high = metrics.spearman_interval(_delta(item), y)
                above, below = above + (low > 0), below + (high < 0)
        found += [
            {**entry, "above": above, "below": below} for entry in _mean_rho("samples", "delta_ipr", outcome, rhos)
        ]
    return found


def _mean_rho(over: str, by: str, outcome: str, rhos: list[float]) -> list[dict[str, Any]]:
    defined = [rho for rho in rhos if math.isfinite(rho)]
    if not defined:
        return []
    ends = {"rho": float(np.mean(defined)), "ci95": list(metrics.bootstrap_interval(defined))}
    return [
        {
            "over": over,
            "by": by,
            "outcome": outcome,
            "n": len(defined),
            **ends,
            "min": min(defined),
            "max": max(defined),
        }
    ]


# --- equal FLOPs, silent changes ----------------------------------------------------------------------


def interpolated(item: Row, rows: Iterable[Row]) -> float | None:
    """Agreement of ``uniform`` at the item's layer and FLOPs, linear between its keeps; None where it has none."""
    if item["method"] in ("none", "uniform") or "," in item["stages"]:
        return None
    line = [
        (r["saved"], r["agreement"])
        for r in rows
        if r["method"] == "uniform" and r["stages"].startswith(f"{item['layer']}:")
    ]
    line = sorted([*line, *((r["saved"], r["agreement"]) for r in rows if r["method"] == "none")])
    if not line or not line[0][0] <= item["saved"] <= line[-1][0]:
        return None
    return float(np.interp(item["saved"], *zip(*line, strict=True)))


def best(rows: Iterable[Row], share: float) -> dict[str, Any]:
    """By method the most consistent configuration that saves ``share`` or more: agreement, then mean KL."""
    methods: dict[str, Row] = {}
    for item in sorted(rows, key=lambda r: (-r["agreement"], r["kl_mean"])):
        if item["saved"] >= share:
            methods.setdefault(item["method"], item)
    keys = ("name", "agreement", "kl_mean", "saved")
    return {"saved": share, "methods": {name: {key: r[key] for key in keys} for name, r in methods.items()}}


def is_silent(item: Row) -> bool:
    """Accuracy stays, as far as McNemar can tell, and answers change: more than in 1 of 100 questions."""
    return bool(item["stages"]) and item["mcnemar_p"] >= SIGNIFICANT and item["changed"] > 0.01
