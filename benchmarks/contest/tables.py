"""The contest's report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
GB = 1e9


def all_tables(report: Row) -> dict[str, str]:
    """Every table by its name on the page."""
    ran = [row for row in report["rows"] if row["reason"] is None]
    return {
        "machine": _machine(report),
        "bars": _bars(report["bars"]),
        "speed": _speed(ran),
        "cost": _cost(ran),
        "logits": _logits(ran),
        "absent": _absent([row for row in report["rows"] if row["reason"] is not None]),
    }


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in rows)


def _machine(report: Row) -> str:
    limits, machine = report["limits"], report["machine"]
    read = ", ".join(
        f"{size / 2**20:.0f} MiB {rate / GB:.1f}" for size, rate in sorted(limits["read"].items(), key=lambda x: x[0])
    )
    task = report["task"]
    versions: dict[str, set[str]] = {}
    for row in report["rows"]:
        for name, version in row.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    listed = ", ".join(f"{name} {' / '.join(sorted(known))}" for name, known in sorted(versions.items()))
    return table(
        ["", ""],
        [
            ["measured", machine["date"]],
            ["CPU", f"{machine['cpu']}, {task['threads']} threads for everyone; {machine['memory'] / GB:.0f} GB"],
            [
                "busy with other work",
                f"{machine['load']} processes waiting or running, mean of a minute, before it began",
            ],
            ["FP32 products, most", f"{limits['gemm_fp32'] / 1e9:.0f} GFLOP/s"],
            ["bfloat16 products, most", f"{limits['gemm_bf16'] / 1e9:.0f} GFLOP/s"],
            ["reading memory, GB/s by working set", read],
            ["question", f"one image and {task['text_tokens']} text tokens, {task['new_tokens']} new ones"],
            ["rounds", f"{report['rounds']} of {report['answers']} answers each, a process each"],
            ["versions", listed],
        ],
    )


def _bars(bars: Sequence[Row]) -> str:
    lines = []
    for bar in bars:
        value, suffix = bar["value"], bar["target"][-2:] if bar["target"].endswith(" s") else ""
        suffix = "×" if bar["target"].endswith("×") else suffix
        said = "not measured" if value is None else f"{value['median']:.2f}{suffix}"
        if value is not None and value["n"] > 1:
            said += f" [{value['low']:.2f}, {value['high']:.2f}]"
        met = {True: "met", False: "**not met**", None: "–"}[bar["met"]]
        lines.append([bar["bar"], bar["target"], said, bar["against"] or "", met])
    return table(["bar", "target", "measured [rounds]", "against", ""], lines)


def _speed(rows: Sequence[Row]) -> str:
    head = ["contestant", "first token ms", "vision ms", "share", "prefill ms", "share", "decode tok/s", "share"]
    lines = [
        [
            row["name"],
            _spread(row["ttft_ms"], "{:.0f}"),
            _spread(row["vision_ms"], "{:.0f}"),
            _percent(row["vision_share"]),
            _spread(row["prefill_ms"], "{:.0f}"),
            _percent(row["prefill_share"]),
            _spread(row["tokens_per_s"], "{:.1f}"),
            _percent(row["decode_share"]),
        ]
        for row in rows
    ]
    return table(head, lines)


def _cost(rows: Sequence[Row]) -> str:
    head = ["contestant", "peak memory MB", "needs at least MB", "load s", "import s"]
    head += ["on disk MB", "conversion CPU s", "conversion peak MB"]
    lines = [
        [
            row["name"],
            _mb(row["peak_bytes"]),
            _mb(row["facts"].get("least_bytes")),
            _spread(row["load_s"], "{:.2f}"),
            _spread(row["import_s"], "{:.2f}"),
            _mb(row["size_bytes"]),
            f"{row['convert_cpu_s']:.0f}" if row["convert_s"] else "none",
            _mb(row["convert_peak_bytes"]) if row["convert_s"] else "",
        ]
        for row in rows
    ]
    return table(head, lines)


def _logits(rows: Sequence[Row]) -> str:
    head = ["contestant", "pruning", "max abs difference", "relative to the greatest", "cosine", "same first token"]
    head += ["same tokens"]
    lines = []
    for row in rows:
        found = row["logits"]
        same = f"{found['same_tokens']} of {found['tokens']}"
        values = [f"{found['max_abs']:.2g}", f"{found['max_rel']:.2g}", f"{found['cosine']:.7f}"]
        lines.append([row["name"], row["pruning"], *values, "yes" if found["top1"] else "**no**", same])
    return table(head, lines)


def _absent(rows: Sequence[Row]) -> str:
    if not rows:
        return "Everyone took part."
    return table(["contestant", "why it did not run"], [[row["name"], row["reason"]] for row in rows])


def _spread(value: Row | None, form: str) -> str:
    if value is None:
        return "–"
    said = form.format(value["median"])
    return f"{said} [{form.format(value['low'])}, {form.format(value['high'])}]" if value["n"] > 1 else said


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _mb(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:.0f}"
