"""Counts a graph's FLOPs from its own shapes, as polynomials in its dynamic axes. Knows no model.

Counted are the operators that multiply and add: MatMul, Gemm and Conv, 2 FLOPs per multiply-add. Products
over a contraction of length 1 (the rotary angles) add nothing up and are not counted; nor are biases,
softmax, norms and activations. Bodies of functions count for the nodes that call them.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import sympy

from tokprune.runtime import names
from tokprune.runtime.manifest import FlopsTerm

_AXES = (
    names.BATCH,
    names.SEQUENCE,
    names.PAST,
    names.LOGITS_COUNT,
    names.IMAGES,
    names.ROWS,
    names.TEXT_ROWS,
)


def count_flops(model: ir.Model) -> tuple[FlopsTerm, ...]:
    """The FLOPs of one run of ``model``, as terms over the axes in ``names``.

    Every value that a counted operator touches must have its shape in the graph. Raises ValueError if one
    has not, or if its shape is no polynomial in the axes.
    """
    total: sympy.Expr = sympy.Integer(0)
    for node in model.graph.all_nodes():
        total += _node(node)
    symbols = [sympy.Symbol(axis) for axis in _AXES]
    polynomial = sympy.Poly(sympy.expand(total), *symbols)
    terms = []
    for powers, coefficient in polynomial.terms():
        if not coefficient.is_Integer:
            raise ValueError(f"the FLOPs of graph '{model.graph.name}' are no polynomial: {total}")
        if coefficient:
            used = {axis: power for axis, power in zip(_AXES, powers, strict=True) if power}
            terms.append(FlopsTerm(int(coefficient), used))
    return tuple(terms)


def _node(node: ir.Node) -> sympy.Expr:
    if node.op_type == "MatMul":
        left, right, out = _shape(node.inputs[0]), _shape(node.inputs[1]), _shape(node.outputs[0])
        contraction = left[-1] if len(left) > 1 or len(right) == 1 else right[-2]
    elif node.op_type == "Gemm":
        left, out = _shape(node.inputs[0]), _shape(node.outputs[0])
        contraction = left[0] if node.attributes.get_int("transA", 0) else left[1]
    elif node.op_type == "Conv":
        weight, out = _shape(node.inputs[1]), _shape(node.outputs[0])
        contraction = math.prod(weight[1:])
    else:
        return sympy.Integer(0)
    return sympy.Integer(0) if contraction == 1 else 2 * contraction * math.prod(out)


def _shape(value: ir.Value | None) -> list[sympy.Expr]:
    if value is None or value.shape is None:
        raise ValueError(f"the graph does not say the shape of '{value.name if value else None}'")
    return [
        sympy.Integer(dim) if isinstance(dim, int) else sympy.sympify(dim.value, {a: sympy.Symbol(a) for a in _AXES})
        for dim in value.shape
    ]
