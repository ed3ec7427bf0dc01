"""Rewrites what a layer has wherever it is: matrices read as they lie, norms, gates, rotary embeddings.

onnxscript's own rules for ONNX Runtime do the RMS norms. Its rules for rotary embeddings and attention are for other
exporters' graphs: of ours they match none. Knows patterns; a graph in which one is not found keeps its operators.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

from tokprune.runtime import names

MICROSOFT = "com.microsoft"


def _verdict(is_match: bool) -> pattern.MatchResult:
    result = pattern.MatchResult()
    return result if is_match else result.fail("not a constant")


class _Linear(pattern.RewriteRuleClassBase):
    """x · Wᵀ with W [out, in] as the checkpoint has it: packed from there, no transposed copy is made first."""

    def pattern(self, op, x, weight):
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def check(self, op, weight, **_):
        return _verdict(weight.is_initializer())

    def rewrite(self, op, x, weight):
        return op.FusedMatMul(x, weight, transA=0, transB=1, alpha=1.0, _domain=MICROSOFT)


class _Silu(pattern.RewriteRuleClassBase):
    """x · σ(x)."""

    def pattern(self, op, x):
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op, x):
        return op.QuickGelu(x, alpha=1.0, _domain=MICROSOFT)


class _QuickGelu(pattern.RewriteRuleClassBase):
    """x · σ(alpha · x)."""

    def pattern(self, op, x, alpha):
        return op.Mul(x, op.Sigmoid(op.Mul(x, alpha)))

    def check(self, op, alpha, **_):
        return _verdict(alpha.const_value is not None and alpha.const_value.size == 1)

    def rewrite(self, op, x, alpha):
        return op.QuickGelu(x, alpha=float(alpha.const_value.numpy().reshape(())), _domain=MICROSOFT)


class _Rotary(pattern.RewriteRuleClassBase):
    """x · cos + (−x₂, x₁) · sin, of heads side by side, [B, S, H · d]; positions are the graph's own input."""

    def __init__(self, name: str, positions: ir.Value, cos: ir.Value, sin: ir.Value) -> None:
        super().__init__(name)
        self._positions, self._cos, self._sin = positions, cos, sin

    def pattern(self, op, x, shape, cos, sin, zero, half, end, axis, step):
        heads = op.Transpose(op.Reshape(x, shape, _allow_other_attributes=True), perm=[0, 2, 1, 3], _outputs=["heads"])
        turned = op.Concat(
            op.Neg(op.Slice(heads, half, end, axis, step)), op.Slice(heads, zero, half, axis, step), axis=-1
        )
        return op.Add(op.Mul(heads, cos), op.Mul(turned, sin))

    def rewrite(self, op, x, heads, **_):
        turned = op.RotaryEmbedding(
            x, self._positions, self._cos, self._sin, interleaved=0, num_heads=heads.shape[1], _domain=MICROSOFT
        )
        sizes = op.Constant(
            value_ints=[0, 0, heads.shape[1], heads.shape[3]]
        )  # not ``shape``, made of other inputs' sizes
        return op.Transpose(op.Reshape(turned, sizes), perm=[0, 2, 1, 3])


def apply_rules(model: ir.Model) -> None:
    """Rewrite what any segment may have, in place."""
    pattern.RewriteRuleSet([_Linear.rule(), _QuickGelu.rule(), _Silu.rule()]).apply_to_model(model)
    fuse_rms_normalization(model)
    fuse_skip_rms_normalization(model)  # not fuse_skip_layer_normalization: its operator takes 3.6 times the two's time


def apply_rotary(model: ir.Model, positions: int) -> None:
    """Rewrite a decoder's rotary embeddings, in place: tables of ``positions`` rows, looked up by position_ids."""
    graph = model.graph
    tables = [
        _initializer(graph, f"rotary.{name}", table)
        for name, table in zip(("cos", "sin"), rotary_tables(model, positions), strict=True)
    ]
    given = next(value for value in graph.inputs if value.name == names.POSITION_IDS)
    pattern.RewriteRuleSet([_Rotary.rule("rotary", given, *tables)]).apply_to_model(model)


def rotary_tables(model: ir.Model, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [positions, d / 2], computed by the part of the graph that computes them."""
    import onnxruntime

    nodes = {node.op_type: node for node in model.graph if node.op_type in ("Cos", "Sin")}
    found = [nodes[name].outputs[0] for name in ("Cos", "Sin")]
    part = ir.Model(
        ir.convenience.extract(model.graph, [names.POSITION_IDS], [str(v.name) for v in found]), ir_version=10
    )
    session = onnxruntime.InferenceSession(ir.to_proto(part).SerializeToString(), providers=["CPUExecutionProvider"])
    rows = session.run(None, {names.POSITION_IDS: np.arange(positions, dtype=np.int64)[None]})
    cos, sin = (row[0, :, : row.shape[-1] // 2] for row in rows)
    return cos, sin


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def clean(model: ir.Model) -> None:
    """Drop what nothing reads any more, in place."""
    passes.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[MICROSOFT] = 1
