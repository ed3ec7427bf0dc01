"""What a scheme that looks at activations gives to the writer of a bundle. Knows neither graph nor file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokprune.runtime.recipe import Activation


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor [out, in] or [out] before it is rounded or written.

    Row i is multiplied by ``rows``[i], column j by ``columns``[j].
    """

    rows: NDArray[np.float32] | None = None
    columns: NDArray[np.float32] | None = None

    def apply(self, piece: NDArray[np.floating], begin: int) -> NDArray[np.float32]:
        """Rows ``begin`` and on of the tensor, multiplied, in FP32."""
        found = piece.astype(np.float32)
        if self.rows is not None:
            rows = self.rows[begin : begin + len(found)]
            found *= rows.reshape(-1, *[1] * (found.ndim - 1))
        if self.columns is not None:
            found *= self.columns
        return found


class Scheme(Protocol):
    """Asked once for each tensor of the bundle when its turn comes, so that it may compute then."""

    def change(self, tensor: str) -> Change | None:
        """Of a matrix, a norm's weight or a bias, by name; None leaves it as it is."""

    def activation(self, matrix: str) -> Activation | None:
        """The scale of what ``matrix`` is multiplied with, if its choice asks for one."""

    def alpha(self, matrix: str) -> float | None:
        """The migration strength that was used."""

    def output_sqnr_db(self, matrix: str) -> float | None:
        """10·log₁₀ Σ ‖X Wᵀ‖² / Σ ‖X Wᵀ − X̂ Ŵᵀ‖² on rows that were kept, in dB; None if nothing was lost or seen."""
