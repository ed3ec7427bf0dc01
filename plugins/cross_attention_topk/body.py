"""CrossAttentionTopK as an ONNX function of standard operators: what runs where no plugin does.

Everything is FP32: rows are cast once, so that squares of FP16 rows of massive activation do not overflow. The
number of text rows is open; rows that only fill up get no attention. Weights are inputs in the checkpoint's
[out, in] layout, under a Transpose that engines fold away. Only operators that TensorRT 10.3 has. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import FunctionProto, NodeProto, helper

from tokprune.plugins.cross_attention_topk.reference import EPS, WEIGHTS
from tokprune.plugins.nodes import OPSET, Nodes
from tokprune.plugins.topk import top_k_nodes

DOMAIN, OP_TYPE, VERSION = "tokprune", "CrossAttentionTopK", 1
ATTRIBUTES = ("k", "heads", "eps")

_MASKED = -1e30  # as a logit: its share is exactly 0 beside any other


def cross_attention_topk(
    visual: str,
    text: str,
    text_valid: str,
    weights: Sequence[str],
    outputs: Sequence[str],
    k: int,
    *,
    width: int,
    heads: int,
) -> tuple[NodeProto, FunctionProto]:
    """The node that maps its inputs to ``outputs`` (kept_indices, scores), and the function that it calls."""
    node = cross_attention_topk_node(visual, text, text_valid, weights, outputs, k, heads=heads)
    return node, cross_attention_topk_function(k, width=width, heads=heads)


def cross_attention_topk_node(
    visual: str, text: str, text_valid: str, weights: Sequence[str], outputs: Sequence[str], k: int, *, heads: int
) -> NodeProto:
    """The node alone, as a plugin needs it; ``weights`` are names of tensors in the order of `WEIGHTS`."""
    if len(weights) != len(WEIGHTS):
        raise ValueError(f"{len(weights)} weights were given, the operator has {len(WEIGHTS)}")
    inputs = [visual, text, text_valid, *weights]
    return helper.make_node(OP_TYPE, inputs, list(outputs), name=OP_TYPE, domain=DOMAIN, k=k, heads=heads, eps=EPS)


def cross_attention_topk_function(k: int, *, width: int, heads: int) -> FunctionProto:
    """The op, specialised to its attributes and its module's width W: a model holds one such function.

    Inputs X [I, N, D] and T [I, M, D] of any float type, text_valid [I, M] bool with a true in each row, and
    `WEIGHTS` in float32; outputs kept_indices [I, k] int64 and scores [I, N] float32. X and T must be finite.
    """
    if k < 1:
        raise ValueError(f"k = {k} must be 1 at least")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    body = _Body(width, heads)
    body.scores()
    top_k_nodes(body.nodes, "scores", k, "kept_indices")
    return helper.make_function(
        DOMAIN, OP_TYPE, ["X", "T", "text_valid", *WEIGHTS], ["kept_indices", "scores"], body.nodes.protos,
        [helper.make_opsetid("", OPSET)], attributes=list(ATTRIBUTES),
    )  # fmt: skip


class _Body:
    """The nodes of one function. Shapes leave out the leading axis I."""

    def __init__(self, width: int, heads: int) -> None:
        self.nodes = Nodes("cross_attention")
        self._width, self._heads = width, heads

    def scores(self) -> None:
        """Nodes up to the output "scores" [N]."""
        add, nodes = self.nodes.add, self.nodes
        v = self._linear(self._norm(add("Cast", "X", to=Nodes.FLOAT), "visual_norm"), "visual_proj")  # [N, W]
        t = self._linear(self._norm(add("Cast", "T", to=Nodes.FLOAT), "text_norm"), "text_proj")  # [M, W]
        v = add("Add", v, self._linear(self._attention(v, t), "o_proj"))
        inner = self._linear(self._norm(v, "mlp_norm"), "up_proj", bias=True)  # [N, F]
        inner = add("Mul", inner, add("Sigmoid", inner))
        v = add("Add", v, self._linear(inner, "down_proj", bias=True))
        logits = self._linear(self._norm(v, "head_norm"), "head", bias=True)  # [N, 2]
        keep, drop = nodes.add_many("Split", 2, logits, nodes.int64([1, 1]), axis=2)
        add("Squeeze", add("Sub", keep, drop), nodes.int64([2]), output="scores")

    def _norm(self, x: str, name: str) -> str:
        """RMSNorm of float32 ``x``."""
        add, nodes = self.nodes.add, self.nodes
        mean = add("ReduceMean", add("Mul", x, x), nodes.int64([2]))
        scale = add("Reciprocal", add("Sqrt", add("Add", mean, nodes.float32(EPS))))
        return add("Mul", add("Mul", x, scale), f"{name}.weight")

    def _linear(self, x: str, name: str, bias: bool = False) -> str:
        y = self.nodes.add("MatMul", x, self.nodes.add("Transpose", f"{name}.weight", perm=[1, 0]))
        return self.nodes.add("Add", y, f"{name}.bias") if bias else y

    def _attention(self, v: str, t: str) -> str:
        """Mixed values [N, W] of ``t`` [M, W] for queries from ``v`` [N, W]."""
        add, nodes = self.nodes.add, self.nodes
        scale = nodes.float32((self._width // self._heads) ** -0.5)
        q = self._split(add("Mul", self._linear(v, "q_proj"), scale), [0, 2, 1, 3])  # [heads, N, W / heads]
        k = self._split(self._linear(t, "k_proj"), [0, 2, 3, 1])  # [heads, W / heads, M]
        u = self._split(self._linear(t, "v_proj"), [0, 2, 1, 3])  # [heads, M, W / heads]
        valid = add("Unsqueeze", "text_valid", nodes.int64([1, 2]))  # [1, 1, M]
        logits = add("Where", valid, add("MatMul", q, k), nodes.float32(_MASKED))  # [heads, N, M]
        mixed = add("MatMul", add("Softmax", logits, axis=3), u)  # [heads, N, W / heads]
        together = add("Transpose", mixed, perm=[0, 2, 1, 3])
        return add("Reshape", together, nodes.int64([0, 0, self._width]))

    def _split(self, x: str, order: list[int]) -> str:
        """``x`` [·, W] by heads, its axes in ``order`` of [I, ·, heads, W / heads]."""
        by_head = self.nodes.int64([0, 0, self._heads, self._width // self._heads])
        return self.nodes.add("Transpose", self.nodes.add("Reshape", x, by_head), perm=order)
