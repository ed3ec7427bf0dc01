"""Two pictures as numbers for the template: FLOPs by segment, IPR by layer.

Widths and places are per cent of the drawing, so that it may be as wide as the screen while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.runtime.plan import Stage
from tokprune.runtime.report import NOT_MEASURED, flops, number

_WIDEST = 99.0  # per cent: the outline of the longest bar has to be seen, too
_TOP, _BOTTOM = 4.0, 88.0  # per cent of the height, of IPR 1 and 0; layers are named below
_LAYER_LABELS = 8  # as many as a phone has room for


@dataclass(frozen=True)
class Bar:
    """One segment's FLOPs in prefill; selectors have no unpruned side."""

    name: str
    unpruned: str
    pruned: str
    unpruned_width: float
    pruned_width: float

    @property
    def drawn(self) -> bool:
        """Looking embeddings up and drawing lots multiply nothing: such segments stand in the table only."""
        return bool(self.unpruned_width or self.pruned_width)


def flops_bars(counts: Mapping[str, Any]) -> list[Bar]:
    """Of the object of ``tokprune flops``, segments in the order they run."""
    pruned, unpruned = counts["segments"], counts["segments_unpruned"]
    largest = max(*pruned.values(), *unpruned.values())
    bars = []
    for name, count in pruned.items():
        whole = unpruned.get(name)
        bars.append(
            Bar(
                name,
                NOT_MEASURED if whole is None else flops(1e12 * whole),
                flops(1e12 * count),
                _WIDEST * (whole or 0.0) / largest,
                _WIDEST * count / largest,
            )
        )
    return bars


@dataclass(frozen=True)
class Point:
    """One layer's IPR, unpruned and pruned. ``label`` is empty where layers are too many for all to be named."""

    layer: int
    label: str
    full: str
    pruned: str
    x: float
    full_y: float
    pruned_y: float


@dataclass(frozen=True)
class Chart:
    points: list[Point]
    levels: list[tuple[str, float]]  # values of the axis, and where they are
    stages: list[float]  # where rows are dropped: in front of a stage's layer


def ipr_chart(spectra: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> Chart:
    """Of ``consistency.ipr``, which names layers from 0 on; IPR lies between 0 and 1, so the axis does."""
    width, every = 100 / max(1, len(spectra)), math.ceil(len(spectra) / _LAYER_LABELS)
    points = [
        Point(
            layer=entry["layer"],
            label="" if order % every else str(entry["layer"]),
            full=number(entry["full"]),
            pruned=number(entry["pruned"]),
            x=(order + 0.5) * width,
            full_y=_height(entry["full"]),
            pruned_y=_height(entry["pruned"]),
        )
        for order, entry in enumerate(spectra)
    ]
    order_of = {point.layer: order for order, point in enumerate(points)}
    levels = [(f"{value:g}", _height(value)) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return Chart(points, levels, [order_of[stage.layer] * width for stage in stages if stage.layer in order_of])


def _height(value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * value
