"""The schemes that look at activations, for one bundle: what becomes of each of its tensors, from what was seen.

Ties `folding`, `search` and the bundle's weights, which are read where they lie, a group's at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokprune.calibration.folding import Group, find_groups
from tokprune.calibration.scheme import Change
from tokprune.calibration.search import Found, Target, find_factors
from tokprune.calibration.statistics import Statistics
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.contract import FLOAT_TYPES
from tokprune.runtime.recipe import BASE, Activation, Choice
from tokprune.runtime.weights import block_size


class Calibrated:
    """A `Scheme` for the matrices of ``bundle`` whose ``choices`` look at activations."""

    def __init__(self, bundle: Bundle, choices: Mapping[str, Choice], statistics: Statistics) -> None:
        self._choices, self._statistics = choices, statistics
        self._scale_type = FLOAT_TYPES[bundle.manifest.base]
        self._tensors: dict[str, ir.ExternalTensor] = {}
        for segment in bundle.manifest.segments:
            for name, value in ir.load(bundle.file(segment.file)).graph.initializers.items():
                if isinstance(value.const_value, ir.ExternalTensor):
                    self._tensors[name] = value.const_value
        groups = [group for group in find_groups(bundle.manifest.model) if self._choice(group) is not None]
        self._reads = {name: group for group in groups for name in group.matrices}
        self._takes = {name: group for group in groups for name in group.takers}
        self._found: dict[Group, Found] = {}

    def change(self, tensor: str) -> Change | None:
        """Columns by the factors of what the tensor is multiplied with, rows by the inverse of those it takes."""
        columns = self._factors(self._reads.get(tensor))
        taken = self._factors(self._takes.get(tensor))
        if columns is None and taken is None:
            return None
        rows = None
        if taken is not None:
            group = self._takes[tensor]
            rows = np.float32(1) / group.take(taken)
        return Change(rows, columns)

    def activation(self, matrix: str) -> Activation | None:
        """Of what the matrix is multiplied with, if its choice asks for it."""
        return self._solution(matrix).activation if self._asks(matrix) else None

    def alpha(self, matrix: str) -> float | None:
        """Of the matrix's group; None if it has no factors."""
        group = self._reads.get(matrix)
        return None if self._factors(group) is None else self._solution(matrix).alpha

    def output_sqnr_db(self, matrix: str) -> float | None:
        """Of the product, on the rows that were kept."""
        error = self._solution(matrix).errors.get(matrix) if matrix in self._reads else None
        return -10 * math.log10(error) if error else None

    def _asks(self, matrix: str) -> bool:
        return matrix in self._reads and self._choices[matrix].activation is not None

    def _choice(self, group: Group) -> Choice | None:
        """The first of its matrices' that is calibrated: they read one tensor, so they share factors and range."""
        chosen = (self._choices[name] for name in group.matrices)
        return next((choice for choice in chosen if choice.precision != BASE and choice.calibrated), None)

    def _factors(self, group: Group | None) -> NDArray[np.float32] | None:
        return None if group is None else self._solution(group.matrices[0]).factors

    def _solution(self, matrix: str) -> Found:
        group = self._reads[matrix]
        if group not in self._found:
            choice = self._choice(group)
            assert choice is not None
            norm = np.asarray(self._read(group.takers[0])) if group.norm else None
            targets = {name: self._target(name) for name in group.matrices}
            seen = self._statistics.tensors[group.matrices[0]]
            self._found[group] = find_factors(group, choice, seen, targets, self._scale_type, norm)
        return self._found[group]

    def _target(self, name: str) -> Target:
        weights, choice = self._read(name), self._choices[name]
        block = None if choice.precision == BASE else choice.block or block_size(weights.shape[1], choice.precision)
        return Target(weights, choice.precision, block)

    def _read(self, name: str) -> NDArray[np.floating]:
        """The tensor, mapped: onnx_ir would refuse linked files."""
        tensor = self._tensors[name]
        return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy()))
