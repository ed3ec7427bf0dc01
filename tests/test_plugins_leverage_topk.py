"""LeverageTopK: the float64 reference against algebra, the ONNX body in ONNX Runtime against the reference.

Scores are compared at MARGIN, relative to themselves and to the k-th best; with 3 rounds instead of 8 the body
misses it.
"""

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tokprune.export.flops import count_flops
from tokprune.plugins.leverage_topk import body, reference
from tokprune.plugins.topk import top_k
from tokprune.runtime import leverage, metrics, names
from tokprune.runtime.leverage import Settings

ONNX_TYPES = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT}
TENSORRT_10_3 = {
    "Add", "Cast", "Concat", "Constant", "CumSum", "Div", "Gather", "Greater", "Less", "MatMul", "Max", "Min", "Mul",
    "Abs", "Reciprocal", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Split", "Sqrt", "Sub", "TopK",
    "Transpose", "Where",
}  # fmt: skip


def hidden_states(seed: int, n: int, d: int, dtype: type, decay: float = 1.0, massive: int = 3, factor: float = 100):
    """[n, d]: singular values j^-decay over noise, uneven rows, ``massive`` of them with ``factor`` times the norm."""
    rng = np.random.Generator(np.random.Philox(seed))
    width = min(n, d, 128)
    u, v = (np.linalg.qr(rng.standard_normal((rows, width)))[0] for rows in (n, d))
    x = (u * np.exp(0.5 * rng.standard_normal((n, 1))) * np.arange(1, width + 1) ** -decay) @ v.T
    x = x / np.sqrt(np.mean(x**2)) + 0.1 * rng.standard_normal((n, d))
    x[rng.choice(n, massive, replace=False)] *= factor
    return x.astype(dtype)


def with_gap(seed: int, n: int, d: int, rank: int, gap: float) -> np.ndarray:
    """float32 [n, d] of singular values 1/j, but that σ² at ``rank`` and the next one differ by the share ``gap``."""
    rng = np.random.Generator(np.random.Philox(seed))
    u, v = (np.linalg.qr(rng.standard_normal((rows, min(n, d))))[0] for rows in (n, d))
    sigma = 1 / np.arange(1, min(n, d) + 1)
    sigma[rank] = sigma[rank - 1] * np.sqrt(1 - gap)
    return ((u * sigma) @ v.T).astype(np.float32)


def model(n: int, d: int, k: int, dtype: type = np.float32, **options) -> onnx.ModelProto:
    node, function = body.leverage_topk("x", ("kept_indices", "scores"), n, d, k, **options)
    graph = helper.make_graph(
        [node],
        "select",
        [helper.make_tensor_value_info("x", ONNX_TYPES[dtype], [names.IMAGES, n, d])],
        [
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, [names.IMAGES, k]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [names.IMAGES, n]),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(body.DOMAIN, body.VERSION)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def session(n: int, d: int, k: int, dtype: type = np.float32, **options) -> onnxruntime.InferenceSession:
    made = model(n, d, k, dtype, **options)
    onnx.checker.check_model(made, full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(made.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def assert_matches(kept, scores, x, k, **options) -> None:
    """One image's ``kept`` [k] and ``scores`` [N] against the reference for ``x`` [N, D]."""
    expected = reference.leverage_scores(x, **options)
    assert np.all(np.isfinite(scores))
    assert np.all(scores >= 0)
    np.testing.assert_array_equal(kept, top_k(scores, k))
    allowed = metrics.MARGIN * max(np.sort(expected)[-k], metrics.NEGLIGIBLE * expected.max())
    np.testing.assert_allclose(scores, expected, rtol=metrics.MARGIN, atol=allowed + 1e-6)
    assert metrics.kept_equal_margin(kept, expected)


class TestReference:
    def test_scores_are_the_diagonal_of_the_projector_onto_the_leading_subspace(self):
        x = hidden_states(0, 40, 24, np.float32).astype(np.float64)
        values, vectors = np.linalg.eigh(x @ x.T)
        leading = vectors[:, np.argsort(values)[-5:]]
        np.testing.assert_allclose(reference.leverage_scores(x, rank=5), np.diag(leading @ leading.T), atol=1e-9)

    def test_energy_takes_the_fewest_directions_and_its_cap(self):
        x = np.diag([4.0, 2.0, 1.0, 0.5])[:, :3]  # σ² = 16, 4, 1: shares 0.762, 0.952, 1
        for energy, used in ((0.5, 1), (0.77, 2), (0.96, 3)):
            assert reference.leverage_scores(x, energy=energy).sum() == pytest.approx(used)
        assert reference.leverage_scores(x, energy=0.96, max_rank=2).sum() == pytest.approx(2)

    def test_full_rank_is_refused(self):
        with pytest.raises(ValueError, match="all scores are 1"):
            reference.leverage_scores(np.eye(4), rank=4)

    @pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}])
    def test_rank_or_energy_must_be_given(self, options):
        with pytest.raises(ValueError, match="either rank or energy"):
            reference.leverage_scores(np.eye(4), **options)

    def test_ties_go_to_the_lower_index(self):
        np.testing.assert_array_equal(top_k([1.0, 3.0, 1.0, 3.0, 1.0], 3), [0, 1, 3])


class TestBody:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize(
        ("n", "d", "k", "rank"), [(576, 160, 64, 16), (37, 53, 5, 7), (53, 37, 20, 1), (31, 400, 31, 6), (64, 9, 1, 9)]
    )
    def test_shapes_and_dtypes(self, dtype, n, d, k, rank):
        x = hidden_states(1, n, d, dtype)
        kept, scores = session(n, d, k, dtype, rank=rank).run(None, {"x": x[None]})
        assert (kept.dtype, scores.dtype) == (np.int64, np.float32)
        assert_matches(kept[0], scores[0], x, k, rank=rank)

    @pytest.mark.parametrize("decay", [0.5, 1.0, 1.5])
    def test_massive_rows_do_not_drown_the_others(self, decay):
        run = session(576, 160, 128, rank=16)
        for factor in (1, 100, 1000):  # λ_1/λ_16 up to 1e7
            x = hidden_states(int(factor), 576, 160, np.float32, decay, factor=factor)
            expected = reference.leverage_scores(x, rank=16)
            kept, _ = run.run(None, {"x": x[None]})
            assert metrics.kept_equal_margin(kept[0], expected)
            assert metrics.kept_overlap(kept[0], top_k(expected, 128)) >= 0.98

    @pytest.mark.parametrize("gap", [0.05, 5e-4])
    def test_small_gap_at_a_large_rank(self, gap):
        x = with_gap(7, 160, 200, 64, gap)
        kept, scores = session(160, 200, 40, rank=64).run(None, {"x": x[None]})
        assert_matches(kept[0], scores[0], x, 40, rank=64)

    def test_width_of_7b_with_fp16_input(self):
        x = hidden_states(2, 144, 4096, np.float16)  # 144 of the 576 rows: float64 SVD takes a second at 576
        kept, scores = session(144, 4096, 64, np.float16, rank=16).run(None, {"x": x[None]})
        assert_matches(kept[0], scores[0], x, 64, rank=16)

    def test_images_do_not_mix_and_runs_repeat_bit_for_bit(self):
        x = np.stack([hidden_states(seed, 64, 40, np.float32) for seed in range(3)])
        run = session(64, 40, 20, rank=8)
        kept, scores = run.run(None, {"x": x})
        for image in range(3):
            assert_matches(kept[image], scores[image], x[image], 20, rank=8)
        assert run.run(None, {"x": x})[1].tobytes() == scores.tobytes()

    @pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
    def test_energy(self, energy):
        x = hidden_states(3, 100, 48, np.float32, massive=0)
        kept, scores = session(100, 48, 20, energy=energy, settings=Settings(max_rank=24)).run(None, {"x": x[None]})
        assert_matches(kept[0], scores[0], x, 20, energy=energy, max_rank=24)

    @pytest.mark.parametrize("case", ["zero rows", "duplicate rows", "low rank", "zero", "huge", "largest FP16"])
    def test_degenerate_input(self, case):
        x = hidden_states(4, 100, 48, np.float32)
        dtype = np.float32
        if case == "zero rows":
            x[::3] = 0
        elif case == "duplicate rows":
            x[50:] = x[:50]
        elif case == "low rank":
            rng = np.random.Generator(np.random.Philox(5))
            x = (rng.standard_normal((100, 5)) @ rng.standard_normal((5, 48))).astype(np.float32)
        elif case == "zero":
            x[:] = 0
        else:
            dtype = np.float16
            x = np.clip(x * 2000, -65000, 65000) if case == "huge" else np.full_like(x, 65504)
            assert np.square(x).sum(axis=1).max() > 65504
        x = x.astype(dtype)
        kept, scores = session(100, 48, 20, dtype, rank=8).run(None, {"x": x[None]})
        assert_matches(kept[0], scores[0], x, 20, rank=8)

    def test_only_operators_of_tensorrt_10_3_and_no_fp64(self):
        for options in ({"rank": 8}, {"energy": 0.9, "settings": Settings(max_rank=8)}):
            for width in (40, 400):
                function = body.leverage_topk_function(64, width, 20, **options)
                assert {node.op_type for node in function.node} <= TENSORRT_10_3
                kinds = {a.t.data_type for node in function.node for a in node.attribute if a.name == "value"}
                assert kinds <= {TensorProto.FLOAT, TensorProto.INT64}

    def test_node_says_all_that_a_plugin_needs(self):
        node = body.leverage_topk_node("x", ("kept_indices", "scores"), 64, energy=0.9)
        assert (node.domain, node.op_type) == ("tokprune", "LeverageTopK")
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert set(values) == set(body.ATTRIBUTES)
        assert (values["k"], values["rank"], values["energy"]) == (64, 0, pytest.approx(0.9))

    @pytest.mark.parametrize(
        ("k", "options", "message"),
        [
            (0, {"rank": 2}, "k = 0"),
            (9, {"rank": 2}, "k = 9"),
            (2, {"rank": 8}, "smaller than the number of rows"),
            (2, {}, "either rank or energy"),
            (2, {"energy": 1.5}, "between 0 and 1"),
        ],
    )
    def test_refuses_what_cannot_be(self, k, options, message):
        with pytest.raises(ValueError, match=message):
            body.leverage_topk_function(8, 8, k, **options)


class TestFlops:
    """The closed form against the graph, function inlined, as export counts it."""

    @pytest.mark.parametrize(
        ("n", "d", "options"),
        [
            (576, 160, {"rank": 8}),
            (64, 160, {"rank": 16}),
            (53, 37, {"rank": 1}),
            (20, 400, {"rank": 7}),  # forms XXᵀ
            (16, 48, {"energy": 0.9}),  # as wide as X has rows
            (100, 96, {"energy": 0.5}),
            (90, 200, {"rank": 40}),  # wide
            (30, 1, {"rank": 1}),  # products over a single term count nothing
            (40, 30, {"rank": 4, "settings": Settings(rounds=3, oversampling=5, purifications=2)}),
        ],
    )
    def test_closed_form_is_what_the_graph_multiplies(self, n, d, options):
        inlined = onnx.inliner.inline_local_functions(model(n, d, 10, **options))
        inlined = onnx.shape_inference.infer_shapes(inlined, strict_mode=True, data_prop=True)
        (term,) = count_flops(ir.from_proto(inlined))
        assert term.powers == {names.IMAGES: 1}
        assert leverage.flops(n, d, options.get("rank"), options.get("settings")) == term.coefficient

    @pytest.mark.parametrize(
        ("rank", "width", "rounds"), [(1, 9, 8), (16, 32, 8), (17, 34, 6), (64, 96, 6), (None, 96, 6), (112, 128, 6)]
    )
    def test_wider_subspaces_take_fewer_rounds_and_what_the_kernels_take(self, rank, width, rounds):
        assert leverage.subspace_width(576, 4096, rank, Settings()) == width
        assert leverage.rounds(rank, Settings()) == rounds

    def test_both_ways_to_apply_the_gram_matrix_are_covered(self):
        assert leverage.forms_gram(20, 400, 15, rounds=8)
        assert not leverage.forms_gram(576, 160, 16, rounds=8)
