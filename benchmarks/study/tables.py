"""The study's report as Markdown tables, and the page they are put into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LABELS = {
    "delta_ipr": "\\|ΔIPR\\|, mean of the layers behind the prune layer",
    "delta_ipr_last": "\\|ΔIPR\\| at the last layer",
    "saved": "FLOPs saved, for comparison",
    "kl_mean": "mean KL",
    "changed": "answers changed",
    "configurations": "configurations",
    "same stages": "methods at the same stages, mean of groups",
    "samples": "questions of one configuration, mean of configurations",
}


def all_tables(report: dict[str, Any]) -> dict[str, str]:
    """Every table by name."""
    rows = report["rows"]
    tables = {
        "results": _results(rows),
        "uniform": _against_uniform(rows),
        "equal-flops": _most_consistent(report["most_consistent"]),
        "silent": _silent([row for row in rows if row["name"] in report["silent"]]),
        "forms": _forms(rows),
        "ipr": _ipr(report["ipr"]),
        "ipr-values": _ipr_values(rows),
    }
    if any(row["timing"] for row in rows):
        tables["timing"] = _timing([row for row in rows if row["timing"]])
    return tables


def put(page: Path, tables: dict[str, str]) -> None:
    """Replace what stands between ``<!-- table:NAME -->`` and ``<!-- end -->`` in the page."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def _results(rows: Sequence[Row]) -> str:
    head = (
        "configuration, decoder FLOPs saved, prefill GFLOP, answers equal [95 %], accuracy, change [95 %], "
        "correct → wrong, wrong → correct, wrong → other, McNemar p, KL mean, KL p99, \\|ΔIPR\\|"
    )
    lines = (
        (
            row["name"],
            percent(row["saved"]),
            f"{1e3 * row['prefill_tflops']:.2f}",
            f"{percent(row['agreement'])} {_interval(row['agreement_wilson95'])}",
            percent(row["accuracy_pruned"]),
            f"{100 * row['accuracy_change']:+.1f} {_interval(row['accuracy_change_ci95'])}",
            row["correct_to_wrong"],
            row["wrong_to_correct"],
            row["wrong_to_other"],
            f"{row['mcnemar_p']:.2g}",
            f"{row['kl_mean']:.3g}",
            f"{row['kl_p99']:.3g}",
            f"{row['delta_ipr']:.3g}",
        )
        for row in rows
    )
    return _table(head, lines)


def _against_uniform(rows: Sequence[Row]) -> str:
    head = (
        "configuration, accuracy − uniform's, right where uniform is wrong / wrong where right, McNemar p, "
        "answers equal − uniform's, p, answers equal − uniform's at equal FLOPs"
    )
    lines = []
    for row in rows:
        if (paired := row["against_uniform"]) is not None:
            line = row["uniform_at_equal_flops"]
            lines.append(
                (
                    row["name"],
                    f"{100 * paired['accuracy_difference']:+.1f}",
                    f"{paired['accuracy_won']} / {paired['accuracy_lost']}",
                    f"{paired['accuracy_mcnemar_p']:.2g}",
                    f"{100 * paired['agreement_difference']:+.1f}",
                    f"{paired['agreement_mcnemar_p']:.2g}",
                    "–" if line is None else f"{100 * (row['agreement'] - line):+.1f}",
                )
            )
    return _table(head, lines)


def _most_consistent(entries: Sequence[dict[str, Any]]) -> str:
    methods = list(dict.fromkeys(method for entry in entries for method in entry["methods"]))
    lines = [
        (
            f"≥ {100 * entry['saved']:.0f} %",
            *(
                f"{percent(found['agreement'])}, KL {found['kl_mean']:.2g} ({found['name'].partition('-')[2]})"
                if (found := entry["methods"].get(method))
                else "–"
                for method in methods
            ),
        )
        for entry in entries
    ]
    return _table(", ".join(["decoder FLOPs saved", *methods]), lines)


def _silent(rows: Sequence[Row]) -> str:
    head = "configuration, accuracy change [95 %], McNemar p, answers changed, changed per answer of accuracy lost"
    lines = []
    for row in sorted(rows, key=lambda row: -row["changed"]):
        net = abs(row["correct_to_wrong"] - row["wrong_to_correct"])
        count = round(row["changed"] * row["samples"])
        lines.append(
            (
                row["name"],
                f"{100 * row['accuracy_change']:+.1f} {_interval(row['accuracy_change_ci95'])}",
                f"{row['mcnemar_p']:.2g}",
                f"{count} of {row['samples']}",
                f"{count / net:.1f}" if net else "none was lost",
            )
        )
    return _table(head, lines)


def _forms(rows: Sequence[Row]) -> str:
    forms = list(rows[0]["forms"])
    lines = [
        (
            row["name"],
            *(
                f"{percent(row['forms'][f]['accuracy_pruned'])} ({percent(row['forms'][f]['agreement'])})"
                for f in forms
            ),
        )
        for row in rows
    ]
    return _table(", ".join(["accuracy (answers equal)", *forms]), lines)


def _ipr(entries: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            LABELS[entry["over"]],
            LABELS[entry["by"]],
            LABELS[entry["outcome"]],
            entry["n"],
            f"{entry['rho']:+.2f} [{entry['ci95'][0]:+.2f}, {entry['ci95'][1]:+.2f}]",
            f"{entry['min']:+.2f} … {entry['max']:+.2f}" if "min" in entry else "–",
            f"{entry['above']} / {entry['below']}" if "above" in entry else "–",
        )
        for entry in entries
    ]
    return _table("across, of, with, n, Spearman's ρ [95 %], range, intervals above / below 0", lines)


def _ipr_values(rows: Sequence[Row]) -> str:
    layers = [entry["layer"] for entry in rows[0]["ipr"]]
    lines = [
        (row["name"], *(f"{entry['pruned']:.3f}" for entry in row["ipr"]), f"{row['delta_ipr_signed']:+.3f}")
        for row in rows
    ]
    return _table(", ".join(["IPR of what enters", *(f"layer {layer}" for layer in layers), "mean ΔIPR"]), lines)


def _timing(rows: Sequence[Row]) -> str:
    head = "configuration, decoders and selectors ms, unpruned ms, speed-up, in theory, share realised"
    lines = []
    for row in rows:
        timing = row["timing"]
        share = timing["realised_share"]
        lines.append(
            (
                row["name"],
                f"{timing['decoder_ms_median']:.1f}",
                f"{timing['decoder_ms_median_full']:.1f}",
                f"{timing['decoder_speedup']:.2f}×",
                f"{timing['theoretical_decoder_speedup']:.2f}×",
                "–" if share is None else f"{share:.2f}",
            )
        )
    return _table(head, lines)


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.1f} %"


def _interval(ends: Sequence[float]) -> str:
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _table(head: str, lines: Iterable[Sequence[object]]) -> str:
    columns = head.split(", ")
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)
