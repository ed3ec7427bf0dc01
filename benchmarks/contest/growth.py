"""How prefill time grows: two models of it, fitted. Knows times and FLOPs; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

Row = dict[str, Any]
TOLERANCE = 0.1


def fit(rows: Sequence[Row]) -> Row:
    """Both models' constants, and what they say of each of ``rows``, which it is added to.

    ``model`` is a + FLOPs / rate; ``explained`` the selector's measured time + a + linear / rate + attention / rate.
    """
    ms = np.array([row["ms"] for row in rows])
    flops, attention = (np.array([row[key] for row in rows], dtype=float) for key in ("flops", "attention_flops"))
    selector = np.array([row["selector_ms"] for row in rows])
    one = np.ones(len(rows))
    simple = _relative(np.stack([one, flops], 1), ms, ms)
    split = _relative(np.stack([one, flops - attention, attention], 1), ms - selector, ms)
    guess, explained = simple[0] + simple[1] * flops, selector + split @ np.stack([one, flops - attention, attention])
    for i, row in enumerate(rows):
        row["deviation"] = float(ms[i] / guess[i] - 1)
        row["deviation_explained"] = float(ms[i] / explained[i] - 1)
        row["shares"] = {
            "selector": float(selector[i] / ms[i]),
            "attention": float(split[2] * attention[i] / ms[i]),
            "overhead": float(split[0] / ms[i]),
        }
    rate = [1e-6 / slope if slope else None for slope in (simple[1], split[1], split[2])]  # GFLOP/s of ms a FLOP
    return {
        "model": {"overhead_ms": float(simple[0]), "gflops": rate[0]},
        "explained": {"overhead_ms": float(split[0]), "linear_gflops": rate[1], "attention_gflops": rate[2]},
    }


def _relative(columns: np.ndarray, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Least squares of errors relative to ``scale``, no coefficient below 0."""
    size = np.abs(columns / scale[:, None]).max(axis=0)
    size[size == 0] = 1
    return nnls(columns / scale[:, None] / size, values / scale)[0] / size
