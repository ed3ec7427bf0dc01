"""The study's report as pictures. Knows rows and correlations as `analysis.report` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.grid import RANK

Row = dict[str, Any]
# Okabe and Ito's colours, which stay apart for colour-blind eyes; markers tell the same
STYLE = {
    "lofi": ("#0072B2", "o"),
    "fastv": ("#D55E00", "s"),
    "lvpruning": ("#CC79A7", "D"),
    "uniform": ("#009E73", "^"),
    "random": ("#777777", "v"),
}
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
DPI = 170
PERCENT_TICKS = [0, 0.1, 0.3, 1, 3, 10, 30, 100]


def save_all(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write consistency-*.png to ``folder``; those without rows to show are left out."""
    rows = [row for row in report["rows"] if row["stages"]]
    saved = []
    with mpl.rc_context(SETTINGS):
        for name, figure in (
            ("flops", flops_figure(rows)),
            ("accuracy", accuracy_figure(rows)),
            ("ipr", ipr_figure(rows, report["ipr"])),
            ("forms", forms_figure(rows)),
        ):
            if figure is not None:
                saved.append(folder / f"consistency-{name}.png")
                figure.savefig(saved[-1], dpi=DPI)
    return saved


def flops_figure(rows: Sequence[Row]) -> Figure | None:
    """Answers changed over FLOPs saved: a panel for each prune layer, and one for plans of several stages."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(_where(row), []).append(row)
    if not panels:
        return None
    figure = Figure(figsize=(1.2 + 2.15 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, shown) in zip(axes, sorted(panels.items()), strict=True):
        low, high = _padded([100 * row["saved"] for row in shown], least=6)
        # where methods differ in nothing else, they stand side by side
        step = 0.05 * (high - low) if len({row["stages"] for row in shown}) == 1 else 0
        for place, method in enumerate(STYLE):
            _line(ax, [row for row in shown if row["method"] == method], step * (place - len(STYLE) // 2))
        ax.set_title(title, loc="left")
        ax.set_xlim(low, high)
    _changed_scale(axes[0])
    axes[0].set_ylabel("answers changed, %")
    figure.supxlabel("decoder FLOPs saved in prefill, %", fontsize=9)
    _legend(figure, rows)
    return figure


def _where(row: Row) -> str:
    layers = [stage.partition(":")[0] for stage in row["stages"].split(",")]
    return f"pruned at layer {layers[0]}" if len(layers) == 1 else f"pruned at layers {', '.join(layers)}"


def _line(ax: Axes, rows: Sequence[Row], shift: float) -> None:
    """Defaults joined by a line, with Wilson's intervals; other ranks and draws as hollow points."""
    for row in rows:
        colour, marker = STYLE[row["method"]]
        x, y = 100 * row["saved"] + shift, 100 * row["changed"]
        low, high = (100 * (1 - end) for end in reversed(row["agreement_wilson95"]))
        if is_default(row):
            ax.vlines(x, max(low, 0), high, color=colour, linewidth=1, alpha=0.5)
        face = colour if is_default(row) else "white"
        ax.plot(x, y, marker=marker, markersize=5, color=colour, markerfacecolor=face, linestyle="", zorder=3)
    line = sorted((100 * row["saved"] + shift, 100 * row["changed"]) for row in rows if is_default(row))
    if line:
        ax.plot(*zip(*line, strict=True), color=STYLE[rows[0]["method"]][0], linewidth=1.2)


def accuracy_figure(rows: Sequence[Row]) -> Figure | None:
    """Answers changed over the change of accuracy, all and near zero.

    On the black line every changed answer counts for accuracy, or against it; above, some cancel out.
    """
    if not rows:
        return None
    figure = Figure(figsize=(8.2, 3.8), layout="constrained")
    changed = sorted(100 * row["changed"] for row in rows)
    tops = (changed[-1], changed[len(changed) // 2])  # the right panel shows the less changed half
    for ax, top in zip(figure.subplots(1, 2), tops, strict=True):
        shown = [row for row in rows if 100 * row["changed"] <= top]
        low, high = _padded([0, *(100 * row["accuracy_change"] for row in shown)], least=2)
        ax.plot([low, 0, high], [-low, 0, high], color="black", linewidth=0.8)
        _points(ax, shown, "accuracy_change", "changed")
        ax.set_xlim(low, high)
        ax.set_ylim(-0.03 * (top + 1), 1.06 * top + 0.1)
        _name_furthest(ax, shown, low + 0.7 * (high - low))
    figure.axes[0].set_ylabel("answers changed, %")
    figure.axes[0].set_title("all", loc="left")
    figure.axes[1].set_title("the half that changes least", loc="left")
    figure.supxlabel("accuracy, pruned − original, percentage points", fontsize=9)
    _legend(figure, rows)
    return figure


def _name_furthest(ax: Axes, rows: Sequence[Row], right: float) -> None:
    """Name at the point that is furthest above the line; on its left where x is beyond ``right``."""
    row = min(rows, key=lambda row: abs(row["accuracy_change"]) - row["changed"])
    x, y = 100 * row["accuracy_change"], 100 * row["changed"]
    side, shift = ("right", -6) if x > right else ("left", 6)
    ax.annotate(row["name"], (x, y), xytext=(shift, 4), textcoords="offset points", fontsize=7, ha=side)


def ipr_figure(rows: Sequence[Row], correlations: Sequence[dict[str, Any]]) -> Figure | None:
    """|ΔIPR| against what changed, a point for each configuration."""
    if not rows:
        return None
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    for ax, outcome, label in zip(
        figure.subplots(1, 2, sharex=True), ("changed", "kl_mean"), ("answers changed, %", "mean KL, nats"), strict=True
    ):
        _points(ax, rows, "delta_ipr", outcome, scale=(1, 100 if outcome == "changed" else 1))
        if outcome == "changed":
            _changed_scale(ax)
        else:
            ax.set_yscale("log")
        ax.set_xlabel("|ΔIPR|, mean of questions and layers")
        ax.set_ylabel(label)
        for entry in correlations:
            if (entry["over"], entry["by"], entry["outcome"]) == ("configurations", "delta_ipr", outcome):
                low, high = entry["ci95"]
                ax.set_title(f"Spearman's ρ = {entry['rho']:+.2f} [{low:+.2f}, {high:+.2f}]", loc="left")
    _legend(figure, rows)
    return figure


def forms_figure(rows: Sequence[Row]) -> Figure | None:
    """Accuracy by form of question at the stages where all methods stand, a panel each."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        if is_default(row):
            stages.setdefault(row["stages"], []).append(row)
    most = max((len(group) for group in stages.values()), default=0)
    shown = {text: group for text, group in stages.items() if len(group) == most}
    if most < 2:
        return None
    figure = Figure(figsize=(1.6 + 3.3 * len(shown), 4.4), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, (text, group) in zip(axes, shown.items(), strict=True):
        forms = list(group[0]["forms"])
        for at, form in enumerate(forms):
            full = 100 * group[0]["forms"][form]["accuracy_full"]
            ax.vlines(full, at - 0.42, at + 0.42, color="black", linewidth=1.2)
            for place, row in enumerate(sorted(group, key=lambda row: list(STYLE).index(row["method"]))):
                y = at + 0.15 * (place - (len(group) - 1) / 2)
                colour, marker = STYLE[row["method"]]
                low, high = (100 * end for end in row["forms"][form]["accuracy_wilson95"])
                ax.hlines(y, low, high, color=colour, linewidth=1, alpha=0.5)
                accuracy = 100 * row["forms"][form]["accuracy_pruned"]
                ax.plot(accuracy, y, marker=marker, color=colour, markersize=4.5, linestyle="")
        ax.set_yticks(range(len(forms)), forms)
        ax.set_ylim(len(forms) - 0.4, -0.6)
        ax.set_title(f"pruned at {text.replace(',', ', ')}", loc="left")
        ax.grid(axis="y", visible=False)
    figure.supxlabel("accuracy, %; the black line is the unpruned original's", fontsize=9)
    _legend(figure, rows)
    return figure


def is_default(row: Row) -> bool:
    """Whether the row has the default rank, or the first draw."""
    return row["name"].removeprefix(f"{row['method']}-{row['stages']}") in ("", f"-r{RANK}", "-s0")


def _points(ax: Axes, rows: Sequence[Row], x: str, y: str, scale: tuple[float, float] = (100, 100)) -> None:
    for row in rows:
        colour, marker = STYLE[row["method"]]
        at = (scale[0] * row[x], scale[1] * row[y])
        ax.plot(*at, marker=marker, color=colour, markersize=5, linestyle="", alpha=0.85)


def _changed_scale(ax: Axes) -> None:
    """Logarithmic, but with a zero: 1 of 1,000 answers is one linear step above none."""
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.4)
    ax.set_yticks(PERCENT_TICKS, [f"{tick:g}" for tick in PERCENT_TICKS])
    ax.minorticks_off()
    ax.set_ylim(-0.02, 100)


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """Limits around ``values``, at least ``least`` apart."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (least - (high - low)) / 2)
    return low - pad, high + pad


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    present = [method for method in STYLE if any(row["method"] == method for row in rows)]
    handles = [Line2D([], [], color=STYLE[m][0], marker=STYLE[m][1], markersize=5, linewidth=1.2) for m in present]
    figure.legend(handles, present, loc="outside upper center", ncols=len(present), frameon=False)
