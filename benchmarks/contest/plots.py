"""The contest's report as a picture: the way to the first token, and tokens a second, contestant by contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from study.plots import DPI, SETTINGS

Row = dict[str, Any]
VISION, PREFILL, REST = "#56B4E9", "#0072B2", "#BBBBBB"
OURS, PEER = "#0072B2", "#D55E00"


def save(report: Row, path: Path) -> None:
    """Write the picture to ``path``; rows that did not run are left out."""
    rows = [row for row in report["rows"] if row["reason"] is None][::-1]
    with mpl.rc_context({**SETTINGS, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(10, 1.2 + 0.26 * len(rows)), layout="constrained")
        first, decode = figure.subplots(1, 2, sharey=True)
        names = [row["name"] for row in rows]
        for place, row in enumerate(rows):
            at = 0.0
            for key, color in (("vision_ms", VISION), ("prefill_ms", PREFILL)):
                if row[key] is not None:
                    first.barh(place, row[key]["median"], left=at, color=color)
                    at += row[key]["median"]
            if row["ttft_ms"] is not None:
                first.barh(place, max(0.0, row["ttft_ms"]["median"] - at), left=at, color=REST)
            rate = row["tokens_per_s"]
            error = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
            decode.barh(place, rate["median"], xerr=error, color=OURS if row["is_ours"] else PEER, ecolor="#333333")
            if row["decode_share"]:
                decode.plot(rate["median"] / row["decode_share"], place, "|", color="black", markersize=9)
        first.set_yticks(range(len(rows)), names)
        first.set_xlabel("to the first token, ms (median)")
        decode.set_xlabel("decode, tokens/s at full context (|: limit by reading memory)")
        first.legend(
            handles=[Patch(color=color, label=label) for color, label in ((VISION, "vision"), (PREFILL, "prefill"))],
            loc="lower right",
            fontsize=8,
        )
        figure.savefig(path, dpi=DPI)
