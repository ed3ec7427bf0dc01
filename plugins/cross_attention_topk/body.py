"""CrossAttentionTopK as an ONNX function of standard operators: what runs where no plugin does.

The module's projections stand before it, as nodes of the graph. Everything is FP32: rows are cast once, so that
squares of FP16 rows of massive activation do not overflow. The number of text rows is open; rows that only fill up
get no attention. Weights are inputs in the checkpoint's [out, in] layout, under a Transpose that engines fold away.
Only operators that TensorRT 10.3 has. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import FunctionProto, NodeProto, helper

from tokprune.plugins.cross_attention_topk.reference import EPS, PROJECTIONS, WEIGHTS
from tokprune.plugins.nodes import DOMAIN, OPSET, Nodes
from tokprune.plugins.topk import top_k_nodes

OP_TYPE, VERSION = "CrossAttentionTopK", 1
ATTRIBUTES = ("k", "heads", "eps")

_MASKED = -1e30  # as a logit: its share is exactly 0 beside any other


ROWS = ("v", "q", "k", "u")  # the operator's first inputs


def projection_nodes(nodes: Nodes, visual: str, text: str, weights: Mapping[str, str]) -> list[str]:
    """Add nodes that make the operator's `ROWS` of ``visual`` [I, N, D] and ``text`` [I, M, D]; return their names.

    Rows are of any float type and finite; ``weights`` gives the name of each tensor of `PROJECTIONS`.
    """
    if set(weights) != set(PROJECTIONS):
        raise ValueError(f"weights were given for {sorted(weights)}, the projections are {sorted(PROJECTIONS)}")
    v, t = (
        _linear(nodes, _norm(nodes, nodes.add("Cast", rows, to=Nodes.FLOAT), norm), projection)
        for rows, norm, projection in (
            (visual, weights["visual_norm.weight"], weights["visual_proj.weight"]),  # [I, N, W]
            (text, weights["text_norm.weight"], weights["text_proj.weight"]),  # [I, M, W]
        )
    )
    sources = (("q_proj.weight", v), ("k_proj.weight", t), ("v_proj.weight", t))
    return [v, *(_linear(nodes, rows, weights[name]) for name, rows in sources)]


def cross_attention_topk_node(
    rows: Sequence[str], text_valid: str, weights: Sequence[str], outputs: Sequence[str], k: int, *, heads: int
) -> NodeProto:
    """The node that maps its inputs to ``outputs`` (kept_indices, scores).

    ``rows`` are names of tensors in the order of `ROWS`, ``weights`` in that of `WEIGHTS`.
    """
    if (len(rows), len(weights)) != (len(ROWS), len(WEIGHTS)):
        raise ValueError(
            f"{len(rows)} rows and {len(weights)} weights were given, the operator has {len(ROWS)} and {len(WEIGHTS)}"
        )
    inputs = [*rows, text_valid, *weights]
    return helper.make_node(OP_TYPE, inputs, list(outputs), name=OP_TYPE, domain=DOMAIN, k=k, heads=heads, eps=EPS)


def cross_attention_topk_function(k: int, *, width: int, heads: int) -> FunctionProto:
    """The op, specialised to its attributes and its module's width W: a model holds one such function.

    Inputs v and q [I, N, W], k and u [I, M, W], all float32 and finite, text_valid [I, M] bool with a true in each
    row, and `WEIGHTS` in float32; outputs kept_indices [I, k] int64 and scores [I, N] float32.
    """
    if k < 1:
        raise ValueError(f"k = {k} must be 1 at least")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    body = _Body(width, heads)
    body.scores()
    top_k_nodes(body.nodes, "scores", k, "kept_indices")
    return helper.make_function(
        DOMAIN, OP_TYPE, [*ROWS, "text_valid", *WEIGHTS], ["kept_indices", "scores"], body.nodes.protos,
        [helper.make_opsetid("", OPSET)], attributes=list(ATTRIBUTES),
    )  # fmt: skip


def _norm(nodes: Nodes, x: str, weight: str) -> str:
    """RMSNorm of float32 ``x`` [I, ·, ·]."""
    mean = nodes.add("ReduceMean", nodes.add("Mul", x, x), nodes.int64([2]))
    scale = nodes.add("Reciprocal", nodes.add("Sqrt", nodes.add("Add", mean, nodes.float32(EPS))))
    return nodes.add("Mul", nodes.add("Mul", x, scale), weight)


def _linear(nodes: Nodes, x: str, weight: str, bias: str | None = None) -> str:
    y = nodes.add("MatMul", x, nodes.add("Transpose", weight, perm=[1, 0]))
    return nodes.add("Add", y, bias) if bias else y


class _Body:
    """The nodes of one function. Shapes leave out the leading axis I."""

    def __init__(self, width: int, heads: int) -> None:
        self.nodes = Nodes("cross_attention")
        self._width, self._heads = width, heads

    def scores(self) -> None:
        """Nodes up to the output "scores" [N]."""
        add, nodes = self.nodes.add, self.nodes
        v = add("Add", "v", _linear(nodes, self._attention(), "o_proj.weight"))
        inner = _linear(nodes, _norm(nodes, v, "mlp_norm.weight"), "up_proj.weight", "up_proj.bias")  # [N, F]
        inner = add("Mul", inner, add("Sigmoid", inner))
        v = add("Add", v, _linear(nodes, inner, "down_proj.weight", "down_proj.bias"))
        logits = _linear(nodes, _norm(nodes, v, "head_norm.weight"), "head.weight", "head.bias")  # [N, 2]
        keep, drop = nodes.add_many("Split", 2, logits, nodes.int64([1, 1]), axis=2)
        add("Squeeze", add("Sub", keep, drop), nodes.int64([2]), output="scores")

    def _attention(self) -> str:
        """Mixed values [N, W]."""
        add, nodes = self.nodes.add, self.nodes
        scale = nodes.float32((self._width // self._heads) ** -0.5)
        q = self._split(add("Mul", "q", scale), [0, 2, 1, 3])  # [heads, N, W / heads]
        k = self._split("k", [0, 2, 3, 1])  # [heads, W / heads, M]
        u = self._split("u", [0, 2, 1, 3])  # [heads, M, W / heads]
        valid = add("Unsqueeze", "text_valid", nodes.int64([1, 2]))  # [1, 1, M]
        logits = add("Where", valid, add("MatMul", q, k), nodes.float32(_MASKED))  # [heads, N, M]
        mixed = add("MatMul", add("Softmax", logits, axis=3), u)  # [heads, N, W / heads]
        together = add("Transpose", mixed, perm=[0, 2, 1, 3])
        return add("Reshape", together, nodes.int64([0, 0, self._width]))

    def _split(self, x: str, order: list[int]) -> str:
        """``x`` [·, W] by heads, its axes in ``order`` of [I, ·, heads, W / heads]."""
        by_head = self.nodes.int64([0, 0, self._heads, self._width // self._heads])
        return self.nodes.add("Transpose", self.nodes.add("Reshape", x, by_head), perm=order)
