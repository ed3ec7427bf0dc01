"""FLOPs counted from graphs against the closed forms, exactly, and against hand counts."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tokprune.export.flops import count_flops
from tokprune.runtime import flops
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.manifest import FlopsTerm

KEYS = [
    *("none", "random", "uniform", "random-0", "random-2", "fastv", "fastv-2", "lvpruning"),
    *("lofi", "lofi-2", "lofi-energy"),
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("text", "generated"), [(7, 0), (20, 3)])
def test_graphs_and_closed_forms_agree(tiny_bundle, key: str, text: int, generated: int):
    manifest = open_bundle(tiny_bundle(key)).manifest
    graphs, closed = flops.from_manifest(manifest), flops.closed_form(manifest.model, manifest.plan)
    assert graphs.prefill(text) == closed.prefill(text)
    assert graphs.prefill(text, images=0) == closed.prefill(text, images=0)
    assert graphs.decode(text, generated=generated) == closed.decode(text, generated=generated)


def graph(nodes, inputs, outputs, values=()) -> ir.Model:
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    made = helper.make_graph(
        nodes, "g", [info(*i) for i in inputs], [info(*o) for o in outputs], value_info=[info(*v) for v in values]
    )
    return ir.from_proto(helper.make_model(made))


class TestCounting:
    def test_batched_matmul_with_symbolic_sum(self):
        model = graph(
            [helper.make_node("MatMul", ["a", "b"], ["c"])],
            [("a", ("batch", 4, "sequence", 16)), ("b", ("batch", 4, 16, "past_sequence + sequence"))],
            [("c", ("batch", 4, "sequence", "past_sequence + sequence"))],
        )
        terms = {tuple(sorted(term.powers.items())): term.coefficient for term in count_flops(model)}
        assert terms == {
            (("batch", 1), ("sequence", 2)): 2 * 4 * 16,
            (("batch", 1), ("past_sequence", 1), ("sequence", 1)): 2 * 4 * 16,
        }

    def test_conv_counts_its_window(self):
        model = graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])],
            [("x", ("images", 3, 8, 8)), ("w", (5, 3, 2, 2))],
            [("y", ("images", 5, 4, 4))],
        )
        assert count_flops(model) == (FlopsTerm(2 * 3 * 4 * 5 * 16, {"images": 1}),)

    def test_gemm(self):
        model = graph(
            [helper.make_node("Gemm", ["a", "b"], ["c"], transA=1)],
            [("a", (7, 3)), ("b", (7, 5))],
            [("c", (3, 5))],
        )
        assert count_flops(model) == (FlopsTerm(2 * 7 * 3 * 5, {}),)

    def test_outer_product_adds_nothing_up(self):
        model = graph(
            [helper.make_node("MatMul", ["a", "b"], ["c"])],
            [("a", (4, 1)), ("b", (1, "sequence"))],
            [("c", (4, "sequence"))],
        )
        assert count_flops(model) == ()

    def test_a_missing_shape_is_an_error(self):
        model = graph(
            [helper.make_node("Relu", ["a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["c"])],
            [("a", (4, 2)), ("b", (2, 3))],
            [("c", (4, 3))],
        )
        with pytest.raises(ValueError, match="does not say the shape of 'h'"):
            count_flops(model)


def test_a_bundle_states_the_flops_of_each_file(tiny_bundle):
    path: Path = tiny_bundle("lofi-2")
    segments = open_bundle(path).manifest.segments
    assert {segment.name for segment in segments if not segment.flops} <= {"embed_tokens", "select_0", "select_1"}
