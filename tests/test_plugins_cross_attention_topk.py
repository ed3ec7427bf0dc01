"""CrossAttentionTopK: the float64 reference against PyTorch's own modules, the ONNX body against the reference.

Scores are log-odds of the order of 1 to 10. FP32 sums over D and F (up to some thousand terms) leave an error of
about 1e-6 of the terms' size; they are compared at TOLERANCE, absolute, and kept sets by the margin rule.
"""

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from tokprune.export.flops import count_flops
from tokprune.export.lvpruning.module import DROP, KEEP, SelectorModule
from tokprune.plugins.cross_attention_topk import body, reference
from tokprune.plugins.nodes import Nodes
from tokprune.plugins.topk import top_k
from tokprune.runtime import metrics
from tokprune.runtime.flops import module_flops
from tokprune.runtime.plan import Module

TOLERANCE = 2e-5  # the largest deviation seen is 3e-6, in FP32 with D = 4096
ONNX_TYPES = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT}
TENSORRT_10_3 = {
    "Add", "Cast", "Constant", "MatMul", "Mul", "Reciprocal", "ReduceMean", "Reshape", "Sigmoid", "Softmax", "Split",
    "Sqrt", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def draw(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def random_weights(hidden: int, sizes: Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Nothing is zero or one, so that no weight can be left out unseen; matrices keep the size of normed rows."""
    rng, width, inner = draw(seed), sizes.width, sizes.intermediate
    shapes = {"visual_proj": (width, hidden), "text_proj": (width, hidden), "up_proj": (inner, width)}
    shapes |= {"down_proj": (width, inner), "head": (2, width)}
    weights = {}
    for name in reference.MODULE_WEIGHTS:
        layer, _, kind = name.partition(".")
        if layer.endswith("norm"):
            value = rng.uniform(0.5, 2, hidden if layer in ("visual_norm", "text_norm") else width)
        elif kind == "bias":
            value = rng.standard_normal(shapes[layer][0])
        else:
            shape = shapes.get(layer, (width, width))
            value = rng.standard_normal(shape) / np.sqrt(shape[1])
        weights[name] = value.astype(np.float32)
    return weights


def rows(seed: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """Uneven rows; a few have 100 times the norm, as tokens of massive activation have."""
    rng = draw(seed)
    x = rng.standard_normal(shape) * np.exp(0.5 * rng.standard_normal((*shape[:-1], 1)))
    x[..., ::17, :] *= 100
    return x.astype(dtype)


def model_of(n: int, hidden: int, k: int, sizes: Module, dtype: type = np.float32, seed: int = 0) -> onnx.ModelProto:
    weights = random_weights(hidden, sizes, seed)
    nodes = Nodes("module")
    projected = body.projection_nodes(nodes, "x", "t", {name: name for name in reference.PROJECTIONS})
    node = body.cross_attention_topk_node(
        projected, "valid", reference.WEIGHTS, ("kept_indices", "scores"), k, heads=sizes.heads
    )
    function = body.cross_attention_topk_function(k, width=sizes.width, heads=sizes.heads)
    graph = helper.make_graph(
        [*nodes.protos, node],
        "select",
        [
            helper.make_tensor_value_info("x", ONNX_TYPES[dtype], ["images", n, hidden]),
            helper.make_tensor_value_info("t", ONNX_TYPES[dtype], ["images", "text_rows", hidden]),
            helper.make_tensor_value_info("valid", TensorProto.BOOL, ["images", "text_rows"]),
        ],
        [
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, ["images", k]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["images", n]),
        ],
        initializer=[onnx.numpy_helper.from_array(weights[name], name) for name in reference.MODULE_WEIGHTS],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(body.DOMAIN, body.VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def session(*args, **options) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 2
    model = model_of(*args, **options).SerializeToString()
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def run(session, x, t, valid=None):
    valid = np.ones(t.shape[:2], dtype=bool) if valid is None else valid
    return session.run(None, {"x": x, "t": t, "valid": valid})


def assert_matches(kept, scores, x, t, k, sizes, seed=0) -> None:
    """One image's ``kept`` [k] and ``scores`` [N] against the reference for ``x`` [N, D] and ``t`` [M, D]."""
    weights = random_weights(x.shape[1], sizes, seed)
    expected_kept, expected = reference.module_topk(x, t, k, weights, sizes.heads)
    assert np.ptp(expected) > 1  # scores that hardly differ would test nothing
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(kept, top_k(scores, k))
    assert metrics.kept_equal_margin(kept, expected, log_odds=True)
    assert metrics.kept_overlap(kept, expected_kept) >= 1 - 1 / k  # one near tie at most


def plain(x: np.ndarray, t: np.ndarray, weights: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """The same module put together from PyTorch's own parts, float64: scores [n]."""
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    width = len(w["q_proj.weight"])

    def norm(rows, name):
        return nn.functional.rms_norm(rows, (rows.shape[-1],), w[f"{name}.weight"], 1e-6)

    attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True, dtype=torch.float64)
    together = torch.cat([w[f"{name}_proj.weight"] for name in "qkv"])
    attention.load_state_dict({"in_proj_weight": together, "out_proj.weight": w["o_proj.weight"]})
    v = nn.functional.linear(norm(torch.from_numpy(x).double(), "visual_norm"), w["visual_proj.weight"])
    u = nn.functional.linear(norm(torch.from_numpy(t).double(), "text_norm"), w["text_proj.weight"])
    v = v + attention(v[None], u[None], u[None], need_weights=False)[0][0]
    inner = nn.functional.silu(nn.functional.linear(norm(v, "mlp_norm"), w["up_proj.weight"], w["up_proj.bias"]))
    v = v + nn.functional.linear(inner, w["down_proj.weight"], w["down_proj.bias"])
    logits = nn.functional.linear(norm(v, "head_norm"), w["head.weight"], w["head.bias"])
    return (logits[:, 0] - logits[:, 1]).detach().numpy()


class TestReference:
    @pytest.mark.parametrize("sizes", [Module(16, 4, 64), Module(12, 1, 7), Module(6, 6, 5)])
    @pytest.mark.parametrize("m", [1, 9])
    def test_is_the_module_made_of_pytorchs_parts(self, sizes, m):
        x, t = rows(1, 20, 24), rows(2, m, 24)
        weights = random_weights(24, sizes)
        expected = plain(x, t, weights, sizes.heads)
        np.testing.assert_allclose(reference.keep_scores(x, t, weights, sizes.heads), expected, rtol=0, atol=1e-11)

    def test_is_the_module_that_is_trained(self):
        sizes = Module(16, 4, 64)
        module = SelectorModule(24, sizes)
        weights = random_weights(24, sizes)
        module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        x, t = rows(1, 20, 24), rows(2, 9, 24)
        with torch.no_grad():
            logits = module(*(torch.from_numpy(rows)[None] for rows in (x, t, np.ones(9, dtype=bool))))[0]
        scores = (logits[:, KEEP] - logits[:, DROP]).numpy()
        expected = reference.keep_scores(x, t, weights, sizes.heads)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)

    def test_operator_is_what_follows_the_projections(self):
        """Its reference on its own, as kernels are held against it."""
        sizes = Module(16, 4, 32)
        weights = random_weights(24, sizes)
        x, t = rows(1, 20, 24), rows(2, 9, 24)
        projected = reference.project_rows(x, t, weights)
        assert [part.shape for part in projected] == [(20, 16), (20, 16), (9, 16), (9, 16)]
        own = {name: weights[name] for name in reference.WEIGHTS}
        found = reference.row_scores(*projected, own, sizes.heads)
        np.testing.assert_array_equal(found, reference.keep_scores(x, t, weights, sizes.heads))

    def test_every_weight_counts(self):
        sizes = Module(16, 4, 32)
        x, t = rows(1, 20, 24), rows(2, 9, 24)
        weights = random_weights(24, sizes)
        before = reference.keep_scores(x, t, weights, 4)
        for name in reference.MODULE_WEIGHTS:
            changed = reference.keep_scores(x, t, {**weights, name: weights[name] * 1.5}, 4)
            assert np.abs(changed - before).max() > 1e-3, name

    def test_text_in_another_order_scores_the_same(self):
        x, t, weights = rows(1, 20, 24), rows(2, 9, 24), random_weights(24, Module(16, 4, 32))
        scores = [reference.keep_scores(x, text, weights, 4) for text in (t, t[::-1])]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-12)

    def test_ties_go_to_the_lower_index(self):
        x = np.repeat(rows(1, 4, 24), 3, axis=0)
        kept, scores = reference.module_topk(x, rows(2, 9, 24), 4, random_weights(24, Module(16, 4, 32)), 4)
        best, second = (np.flatnonzero(scores == value) for value in np.unique(scores)[:-3:-1])
        np.testing.assert_array_equal(kept, sorted([*best, second[0]]))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"text": np.ones((0, 24))}, "M > 0"),
            ({"text": np.ones((2, 23))}, "found shapes"),
            ({"heads": 3}, "3 heads do not divide the width 16"),
            ({"weights": {}}, "head.bias"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, message):
        good = {"visual": np.ones((4, 24)), "text": np.ones((2, 24)), "heads": 4}
        with pytest.raises(ValueError, match=message):
            reference.keep_scores(**{**good, "weights": random_weights(24, Module(16, 4, 32)), **change})


class TestBody:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize(
        ("n", "m", "hidden", "k", "sizes"),
        [
            (576, 36, 192, 64, Module(64, 2, 256)),
            (37, 5, 53, 5, Module(24, 3, 50)),
            (53, 1, 37, 20, Module(16, 16, 8)),
            (31, 80, 400, 31, Module(32, 1, 32)),
            (9, 2, 24, 1, Module(40, 5, 16)),
        ],
    )
    def test_sizes_heads_and_dtypes(self, dtype, n, m, hidden, k, sizes):
        x, t = rows(1, 1, n, hidden, dtype=dtype), rows(2, 1, m, hidden, dtype=dtype)
        kept, scores = run(session(n, hidden, k, sizes, dtype), x, t)
        assert (kept.dtype, scores.dtype) == (np.int64, np.float32)
        assert_matches(kept[0], scores[0], x[0], t[0], k, sizes)

    def test_width_of_7b_with_fp16_rows(self):
        sizes = Module(256, 8, 1024)
        x, t = rows(1, 1, 144, 4096, dtype=np.float16), rows(2, 1, 40, 4096, dtype=np.float16)
        kept, scores = run(session(144, 4096, 64, sizes, np.float16), x, t)
        assert_matches(kept[0], scores[0], x[0], t[0], 64, sizes)

    def test_one_graph_serves_any_number_of_text_rows(self):
        sizes = Module(16, 4, 32)
        graph = session(20, 24, 6, sizes)
        for m in (1, 2, 17, 200):
            x, t = rows(m, 1, 20, 24), rows(m + 1, 1, m, 24)
            kept, scores = run(graph, x, t)
            assert_matches(kept[0], scores[0], x[0], t[0], 6, sizes)

    def test_rows_that_fill_up_change_nothing(self):
        """Their content is another row's, as the selector graph makes it, or huge."""
        sizes = Module(16, 4, 32)
        graph = session(20, 24, 6, sizes)
        x, t = rows(1, 3, 20, 24), rows(2, 3, 11, 24)
        valid = np.ones((3, 11), dtype=bool)
        valid[0, 7:], valid[1, :4], valid[2, 1:] = False, False, False
        t[0, 7:], t[1, :4], t[2, 1:] = t[0, 0], 1e4 * t[1, :4], -1e4
        kept, scores = run(graph, x, t, valid)
        for image in range(3):
            assert_matches(kept[image], scores[image], x[image], t[image, valid[image]], 6, sizes)
        t[~valid] = 5.0  # another content, the same bits
        assert run(graph, x, t, valid)[1].tobytes() == scores.tobytes()

    def test_rows_whose_squares_pass_fp16(self):
        """Elements of 1e4 have squares of 1e8; RMSNorm then divides by them, and the small rows stay as they are."""
        sizes = Module(16, 4, 32)
        x, t = rows(1, 1, 20, 24), rows(2, 1, 9, 24)
        x[0, ::2] *= 1e4 / np.abs(x[0, ::2]).max(axis=1, keepdims=True)
        t[0, ::2] *= 1e4 / np.abs(t[0, ::2]).max(axis=1, keepdims=True)
        x, t = x.astype(np.float16), t.astype(np.float16)
        kept, scores = run(session(20, 24, 6, sizes, np.float16), x, t)
        assert_matches(kept[0], scores[0], x[0], t[0], 6, sizes)

    def test_zero_rows(self):
        sizes = Module(16, 4, 32)
        x, t = rows(1, 1, 20, 24), rows(2, 1, 9, 24)
        x[0, :3], t[0, 2] = 0, 0
        kept, scores = run(session(20, 24, 6, sizes), x, t)
        assert_matches(kept[0], scores[0], x[0], t[0], 6, sizes)

    def test_ties_go_to_the_lower_index(self):
        x = np.repeat(rows(1, 1, 4, 24), 3, axis=1)
        kept, scores = run(session(12, 24, 4, Module(16, 4, 32)), x, rows(2, 1, 9, 24))
        scores = scores[0].reshape(4, 3)
        assert (np.ptp(scores, axis=1) == 0).all()  # equal rows have equal scores, bit for bit
        first, second = np.argsort(-scores[:, 0])[:2]
        np.testing.assert_array_equal(kept[0], sorted([*range(3 * first, 3 * first + 3), 3 * second]))

    def test_images_do_not_mix_and_runs_repeat_bit_for_bit(self):
        sizes = Module(16, 4, 32)
        graph = session(20, 24, 6, sizes)
        x, t = rows(1, 3, 20, 24), rows(2, 3, 9, 24)
        kept, scores = run(graph, x, t)
        for image in range(3):
            assert_matches(kept[image], scores[image], x[image], t[image], 6, sizes)
            alone = run(graph, x[image : image + 1], t[image : image + 1])[1]
            # matrix products of another size may add up in another order
            np.testing.assert_allclose(alone[0], scores[image], rtol=0, atol=TOLERANCE)
        assert run(graph, x, t)[1].tobytes() == scores.tobytes()

    @pytest.mark.parametrize("sizes", [Module(16, 4, 64), Module(6, 6, 5), Module(4, 1, 1), Module(1, 1, 3)])
    def test_flops_of_the_graph_are_the_closed_form(self, sizes):
        plain = onnx.inliner.inline_local_functions(model_of(20, 24, 6, sizes))
        plain = onnx.shape_inference.infer_shapes(plain, strict_mode=True, data_prop=True)
        terms = count_flops(ir.from_proto(plain))
        for images, m in ((1, 7), (3, 1), (2, 40)):
            counted = sum(
                t.coefficient * images ** t.powers["images"] * m ** t.powers.get("text_rows", 0) for t in terms
            )
            assert counted == images * module_flops(20, 24, m, sizes)

    def test_only_operators_of_tensorrt_10_3_and_no_fp64(self):
        found = [*model_of(20, 24, 6, Module(16, 4, 32)).graph.node]
        found.pop()  # the operator itself
        found += body.cross_attention_topk_function(6, width=16, heads=4).node
        assert {node.op_type for node in found} == TENSORRT_10_3
        kinds = {a.t.data_type for node in found for a in node.attribute if a.name == "value"}
        assert kinds == {TensorProto.FLOAT, TensorProto.INT64}

    def test_node_says_all_that_a_plugin_needs(self):
        rows = ("v", "q", "k", "u")
        node = body.cross_attention_topk_node(rows, "valid", reference.WEIGHTS, ("kept", "scores"), 64, heads=4)
        assert (node.domain, node.op_type) == ("tokprune", "CrossAttentionTopK")
        assert list(node.input) == ["v", "q", "k", "u", "valid", *reference.WEIGHTS]
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert values == {"k": 64, "heads": 4, "eps": pytest.approx(1e-6)}
        assert set(values) == set(body.ATTRIBUTES)

    def test_refuses_what_cannot_be(self):
        with pytest.raises(ValueError, match="k = 0"):
            body.cross_attention_topk_function(0, width=16, heads=4)
        with pytest.raises(ValueError, match="5 heads do not divide"):
            body.cross_attention_topk_function(6, width=16, heads=5)
        with pytest.raises(ValueError, match="4 rows and 2 weights were given, the operator has 4 and 9"):
            body.cross_attention_topk_node(body.ROWS, "valid", ["a", "b"], ("kept", "scores"), 6, heads=4)
        with pytest.raises(ValueError, match="weights were given for"):
            body.projection_nodes(Nodes("module"), "x", "t", {"q_proj.weight": "q"})
