"""Rows of ``quantised.py``, a question each, to figures of bundles and of pairs of them, and tables. Runs no model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokprune.runtime import metrics, report
from tokprune.runtime.verification import ConsistencySample, consistency_summary

RESAMPLES = 10_000  # of the bootstrap of a pair's differences

# Of a question: its number as "question", the answers "right" (None where the data has none) and "base", and in
# "bundles" by name the "answer", the "kl" and the "kept_overlap" (None where nothing was pruned) of each.
Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of each bundle, and of each pair of them in their order."""
    bundles = list(rows[0]["bundles"])
    return {
        "figures": {name: figures(rows, name) for name in bundles},
        "pairs": [difference(rows, *pair) for pair in itertools.combinations(bundles, 2)],
    }


def figures(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """A bundle's answers against the base's; accuracies, flips' kinds and McNemar's p are of labelled questions."""
    answers = [row["bundles"][name] for row in rows]
    found = consistency_summary([
        ConsistencySample(row["base"], answer["answer"], row["right"], [answer["kl"]], [])
        for row, answer in zip(rows, answers, strict=True)
    ])  # fmt: skip
    overlaps = [answer["kept_overlap"] for answer in answers if answer["kept_overlap"] is not None]
    same = ("agreement", "agreement_wilson95", "labelled", "correct_to_wrong", "wrong_to_correct", "wrong_to_other")
    return {
        "questions": len(rows),
        **{key: found[key] for key in (*same, "mcnemar_p", "kl_mean", "kl_median", "kl_p99")},
        "accuracy_base": found["accuracy_full"],
        "accuracy": found["accuracy_pruned"],
        "kept_overlap_mean": float(np.mean(overlaps)) if overlaps else None,
        "kept_overlap_min": min(overlaps, default=None),
        "flips": [_flip(row, name) for row in rows if not _agrees(row, name)],
    }


def _agrees(row: Row, name: str) -> bool:
    answer = row["bundles"][name]["answer"]
    return metrics.normalise_answer(row["base"]) == metrics.normalise_answer(answer)


def _flip(row: Row, name: str) -> dict[str, Any]:
    """A changed answer; its kind is one of the three, or None where the right answer is not known."""
    base, answer, right = row["base"], row["bundles"][name]["answer"], row["right"]
    kind = None
    if right is not None:
        counts = dataclasses.asdict(metrics.count_flips([base], [answer], [right]))
        [kind] = [key for key, count in counts.items() if count]
    return {"question": row["question"], "kind": kind, "base": base, "answer": answer, "right": right}


def difference(rows: Sequence[Row], first: str, second: str) -> dict[str, Any]:
    """``first`` less ``second``, question by question: agreement in points, KL in nats (None if one is not finite)."""
    found: dict[str, Any] = {"first": first, "second": second}
    for what, of, scale in (
        ("agreement_points", _agrees, 100),
        ("kl", lambda row, name: row["bundles"][name]["kl"], 1),
    ):
        values = [scale * (float(of(row, first)) - float(of(row, second))) for row in rows]
        known = np.isfinite(values).all()
        found[what] = float(np.mean(values)) if known else None
        found[f"{what}_ci95"] = list(metrics.bootstrap_interval(values, RESAMPLES)) if known else None
    return found


def tables(result: Mapping[str, Any]) -> str:
    """What people read of ``quantised.run``'s result."""
    by_name = result["figures"]
    columns = [_column(found) for found in by_name.values()]
    lines = [(label, *(column[label] for column in columns)) for label in columns[0]]
    parts = [report.table(lines, (f"against {result['base']['name']}", *by_name))]
    flips = [_changed(name, flip) for name, found in by_name.items() for flip in found["flips"]]
    if flips:
        parts.append(report.table(flips, ("changed answers", "question", "", "base", "bundle", "right")))
    if result["pairs"]:
        pairs = [
            (
                f"{pair['first']} − {pair['second']}",
                _signed(pair["agreement_points"], pair["agreement_points_ci95"], ".2f"),
                _signed(pair["kl"], pair["kl_ci95"], ".1e"),
            )
            for pair in result["pairs"]
        ]
        parts.append(report.table(pairs, ("paired", "answers equal, points", "KL")))
    parts += [f"{name}: {remark}" for name, remarks in result["remarks"].items() for remark in remarks]
    return "\n\n".join(parts)


def _changed(name: str, flip: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = "changed" if flip["kind"] is None else flip["kind"].replace("_", " ")
    right = report.NOT_MEASURED if flip["right"] is None else repr(flip["right"])
    return name, flip["question"], kind, repr(flip["base"]), repr(flip["answer"]), right


def _column(found: Mapping[str, Any]) -> dict[str, str]:
    return {
        "questions": str(found["questions"]),
        "answers equal": report.percent(found["agreement"], found["agreement_wilson95"]),
        "accuracy, base": report.percent(found["accuracy_base"]),
        "accuracy, bundle": report.percent(found["accuracy"]),
        "correct → wrong": report.number(found["correct_to_wrong"]),
        "wrong → correct": report.number(found["wrong_to_correct"]),
        "wrong → other wrong": report.number(found["wrong_to_other"]),
        "McNemar p": report.number(found["mcnemar_p"]),
        "KL mean": report.number(found["kl_mean"]),
        "KL median": report.number(found["kl_median"]),
        "KL p99": report.number(found["kl_p99"]),
        "kept tokens shared, mean": report.percent(found["kept_overlap_mean"]),
        "kept tokens shared, least": report.percent(found["kept_overlap_min"]),
    }


def _signed(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    if value is None or interval is None:
        return report.NOT_MEASURED
    return f"{value:+{form}} [{interval[0]:+{form}}, {interval[1]:+{form}}]"
