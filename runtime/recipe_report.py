"""What people read of a quantised bundle: what became of its matrices, and what that costs. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokprune.runtime.report import NOT_MEASURED, number, percent, precision_text, size, table, times
from tokprune.runtime.weights import group_of


def recipe_report(totals: Mapping[str, Any], matrices: Sequence[Mapping[str, Any]]) -> str:
    """What quantisation did: by kind of matrix, the same of all layers as one; by layer where choices have reasons."""
    by_layer = any(matrix["choice"]["reason"] for matrix in matrices)
    kinds: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for matrix in matrices:
        record = matrix["record"]
        reason = record["reason"] or matrix["choice"]["reason"]
        if record["block"] is None and reason is None:
            continue  # nobody asked for it
        scales = "a scale a row" if record["block"] == matrix["shape"][1] else f"a scale for each {record['block']}"
        name = matrix["name"].partition(".layers.")[2].partition(".")[2] or matrix["name"]
        name = group_of(matrix["name"]) if by_layer else name
        kind = (name.removesuffix(".weight"), record["precision"], reason or scales)
        kinds.setdefault(kind, []).append(record)
    rows = []
    for (name, precision, how), found in kinds.items():
        ratios = [record["sqnr_db"] for record in found if record["sqnr_db"] is not None]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else NOT_MEASURED
        rows.append((name, len(found), precision, spread, size(sum(record["bytes"] for record in found)), how))
    kept = f", {totals['matrices_kept']} stay as they are" if totals["matrices_kept"] else ""
    share = "" if totals["ratio_fp32"] is None else f", {totals['ratio_fp32']:.3f} of FP32"
    headers = ("part", "matrices") if by_layer else ("matrix", "layers")
    lines = [
        table(rows, (*headers, "precision", "SQNR, dB", "size", "")),
        "",
        f"{precision_text(totals)}: {totals['matrices']} matrices of {size(totals['bytes'])}{share}{kept}",
    ]
    return "\n".join(lines)


def budget_text(found: Mapping[str, Any]) -> str:
    """What each part of a model costs, which ones stay, and what the rest was measured to change."""
    rows = [
        (
            part,
            "stays" if part in found["kept"] else "rounded",
            number(cost["difference"]["kl_mean"]),
            percent(1 - cost["difference"]["agreement"]),
            size(cost["bytes_saved"]),
            times(cost["speed_up"]),
        )
        for part, cost in found["parts"].items()
    ]
    measured, verified = found["measured"], found["verified"]
    which = "others" if verified["others"] else "the same ones, for want of others"
    return "\n".join(
        [
            table(rows, ("part, alone", "", "KL", "answers changed", "saves", "speed")),
            "",
            f"budget {' and '.join(found['budget'])}, {'kept' if found['met'] else 'MISSED'}",
            f"while searching: {_difference_text(measured)}",
            f"verified: {_difference_text(verified)}, {which}",
        ]
    )


def _difference_text(found: Mapping[str, Any]) -> str:
    interval = found["agreement_wilson95"]
    return (
        f"answers equal {percent(found['agreement'], interval)}, top-1 tokens {percent(found['top1_agreement'])}, "
        f"KL {number(found['kl_mean'])} over {found['tokens']} tokens of {found['samples']} questions"
    )
