"""What weights a segment's graph reads, for the manifest. Knows ONNX; reads no weight's data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from tokprune.runtime.manifest import SegmentFacts, SegmentWeights
from tokprune.runtime.weights import segment_weights


def weights_of(model: ir.Model) -> list[tuple[str, int]]:
    """(name, bytes) of each initializer of the graph, wherever its data lies."""
    found = []
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None  # the checker refuses an initializer without data
        found.append((name, value.const_value.nbytes))
    return found


def bundle_weights(directory: Path, segments: Iterable[SegmentFacts]) -> tuple[SegmentWeights, ...]:
    """Of each segment whose graph lies in ``directory``."""
    return tuple(segment_weights(segment.name, weights_of(ir.load(directory / segment.file))) for segment in segments)
