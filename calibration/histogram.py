"""How large the values of a tensor are: a histogram of |x| that streams, and the ranges that INT8 may give it.

Symmetric: a range t gives the scale t / 127, and codes from -128 to 127. Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BINS = 1 << 14
MOST = 127
PERCENTILE = 99.99  # what "percentile" stands for where no number is said
METHODS = ("max", "percentile", "mse", "entropy")
_CANDIDATES = np.array([0.97**step for step in range(160)])  # of the largest value, down to 0.008 of it
_HALF = 512  # bins of each sign for entropy, whose search takes their square


@dataclass
class Histogram:
    """``counts`` [BINS] int64 of |x| in bins of one width from 0 to ``limit``, a power of two, or 0 of no values.

    When a value is beyond the limit, that doubles and bins are joined in pairs. So the result does not depend on the
    order in which values come.
    """

    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, sizes: NDArray[np.float32]) -> None:
        """Count ``sizes``, |x| of any shape, all finite."""
        largest = float(sizes.max(initial=0.0))
        if largest > self.limit:
            limit = 2.0 ** np.ceil(np.log2(largest))
            while 0 < self.limit < limit:
                self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
                self.limit *= 2
            self.limit = limit
        if not self.limit:
            self.counts[0] += sizes.size
            return
        at = np.minimum((sizes * np.float32(BINS / self.limit)).astype(np.int32), BINS - 1)
        self.counts += np.bincount(at.reshape(-1), minlength=BINS)

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.limit / BINS


def find_range(histogram: Histogram, largest: float, method: str, percentile: float = PERCENTILE) -> float:
    """The range t ≤ ``largest``, which is the largest |x|; 0 if all values are 0.

    max: ``largest``. percentile: that share of all |x|, in percent, is within t. mse: Σ (x − x̂)² is smallest, among 160
    candidates. entropy: TensorRT's calibration (Migacz 2017) as ONNX Runtime has it.
    """
    if method not in METHODS:
        raise ValueError(f"range '{method}' is none of {', '.join(METHODS)}")
    if method == "max" or not histogram.limit:
        return largest
    if method == "percentile":
        within = histogram.counts.cumsum()
        at = int(np.searchsorted(within, percentile / 100 * within[-1]))
        return min(largest, (at + 1) * histogram.width)
    if method == "mse":
        return largest * float(_CANDIDATES[int(np.argmin(_errors(histogram, largest * _CANDIDATES)))])
    return min(largest, _entropy(histogram))


def _errors(histogram: Histogram, ranges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ (x − x̂)² at each of the ``ranges``, every value taken for the middle of its bin."""
    used = np.flatnonzero(histogram.counts)
    counts, middles = histogram.counts[used], (used + 0.5) * histogram.width
    errors = np.empty(len(ranges))
    for index, scale in enumerate(ranges / MOST):
        restored = np.minimum(np.rint(middles / scale), MOST) * scale
        errors[index] = (counts * np.square(middles - restored)).sum()
    return errors


def _entropy(histogram: Histogram) -> float:
    """ONNX Runtime's threshold for what is, with both signs, a histogram of 2 · _HALF - 1 bins."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    joined = histogram.counts.reshape(_HALF, -1).sum(axis=1)
    width = histogram.limit / _HALF
    both = np.concatenate([joined[:0:-1], [2 * joined[0]], joined[1:]])
    edges = (np.arange(len(both) + 1) - len(both) / 2) * width
    collector = HistogramCollector("entropy", True, 128, 128, PERCENTILE, "same")
    low, high, *_ = collector.get_entropy_threshold((both, edges, -histogram.limit, histogram.limit, edges[-1]), 128)
    return float(max(-low, high))
