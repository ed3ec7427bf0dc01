"""Weights as they are read from graphs, against those that sizes give."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tokprune.export.memory import bundle_weights, weights_of
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.weights import closed_weights


def test_counts_bytes_of_initializers():
    values = []
    for name, array in (("a", np.zeros((3, 5), np.float16)), ("b", np.zeros(7, np.float32))):
        values.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 20})
    assert weights_of(ir.Model(graph, ir_version=10)) == [("a", 30), ("b", 28)]


@pytest.mark.parametrize("plan", ["random", "lofi", "lvpruning"])
def test_graphs_read_what_the_sizes_say(plan, tiny_bundle):
    manifest = open_bundle(tiny_bundle(plan)).manifest
    found = bundle_weights(tiny_bundle(plan), manifest.segments)
    closed = closed_weights(manifest.model, manifest.plan, manifest.precision)
    assert [segment.segment for segment in found] == [segment.segment for segment in closed]
    for graph, sizes in zip(found, closed, strict=True):
        # graphs also hold shapes, scalars and rotary frequencies; of biases that are all zero they hold one
        assert abs(graph.total - sizes.total) < 4096, graph.segment
        if graph.segment not in ("vision_encoder", "select_0", "select_1"):  # whose smaller weights are summed up
            assert graph.largest_bytes == sizes.largest_bytes
