"""The forms of QuantizeLinear and DequantizeLinear that TensorRT 10.3 fuses with a product, and if a graph has others.

From NVIDIA's page on explicit quantisation: symmetric, so zero points are 0; a weight is a constant in few bits, its
DequantizeLinear directly in front of the product, INT8 with a scale for each output channel, INT4 with a scale for
each block along the contraction; activations are INT8 with one scale, their pair directly in front of the product.
An operator between, or a pair elsewhere, would be computed by itself, in the base's type. Knows graphs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Pattern:
    """A product with a rounded matrix: MatMul(x, DQ(codes)), or MatMul(DQ(Q(x)), DQ(codes)) with ``activations``."""

    name: str
    codes: ir.DataType
    activations: bool
    opset: int  # the first that can say it
    scales: Callable[[ir.Node], bool]  # whether the DQ of the codes has them as TensorRT wants them


def _by_output(node: ir.Node) -> bool:
    """[out], axis 1 of codes [in, out]."""
    codes, scales = _shape(node.inputs[0]), _shape(node.inputs[1])
    return (
        len(codes) == 2
        and scales == codes[1:]
        and node.attributes.get_int("axis", 1) == 1
        and not node.attributes.get_int("block_size", 0)
    )


def _by_block(node: ir.Node) -> bool:
    """[in / block, out], axis 0 of codes [in, out]."""
    codes, scales, block = _shape(node.inputs[0]), _shape(node.inputs[1]), node.attributes.get_int("block_size", 0)
    return (
        len(codes) == 2
        and block > 0
        and scales == (codes[0] // block, codes[1])
        and codes[0] % block == 0
        and node.attributes.get_int("axis", 1) == 0
    )


FUSED = (
    Pattern("W8A8", ir.DataType.INT8, True, 13, _by_output),
    Pattern("W8A16", ir.DataType.INT8, False, 13, _by_output),
    Pattern("W4A16", ir.DataType.INT4, False, 21, _by_block),
)


def find_patterns(model: ir.Model) -> dict[str, str]:
    """The pattern of each product with a rounded matrix, by the name of what the product writes.

    Raises ValueError naming the first QuantizeLinear or DequantizeLinear that is part of none of ``FUSED``.
    """
    found: dict[str, str] = {}
    explained: set[ir.Node] = set()
    opset = model.graph.opset_imports[""]
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        entering, weight = (_producer(value) for value in node.inputs)
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        pair = _pair(entering, node)
        for pattern in FUSED:
            if _matches(pattern, weight, node, bool(pair)) and opset >= pattern.opset:
                found[str(node.outputs[0].name)] = pattern.name
                explained.update([weight, *pair])
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node not in explained:
            raise ValueError(f"{node.op_type} of {node.inputs[0]} is in no form that TensorRT fuses with a product")
    return found


def _matches(pattern: Pattern, weight: ir.Node, product: ir.Node, activations: bool) -> bool:
    codes = weight.inputs[0]
    return (
        codes is not None
        and codes.is_initializer()
        and codes.dtype == pattern.codes
        and activations == pattern.activations
        and _is_symmetric(weight)
        and _only_reader(weight, product)
        and pattern.scales(weight)
    )


def _pair(restore: ir.Node | None, product: ir.Node) -> list[ir.Node]:
    """QuantizeLinear and DequantizeLinear in front of the product; empty if there are none of one INT8 scale."""
    if restore is None or restore.op_type != "DequantizeLinear" or not _only_reader(restore, product):
        return []
    rounding = _producer(restore.inputs[0])
    if rounding is None or rounding.op_type != "QuantizeLinear" or not _only_reader(rounding, restore):
        return []
    same = rounding.inputs[1] is restore.inputs[1] and _shape(rounding.inputs[1]) == ()
    is_int8 = (
        len(rounding.inputs) == 3 and rounding.inputs[2] is not None and rounding.inputs[2].dtype == ir.DataType.INT8
    )
    return [rounding, restore] if same and is_int8 and _is_symmetric(rounding) and _is_symmetric(restore) else []


def _is_symmetric(node: ir.Node) -> bool:
    """Whether its zero point, if it has one, is a constant 0."""
    zero = node.inputs[2] if len(node.inputs) == 3 else None
    return zero is None or (zero.const_value is not None and not np.any(zero.const_value.numpy()))


def _only_reader(node: ir.Node, reader: ir.Node) -> bool:
    (output,) = node.outputs
    return not output.is_graph_output() and [other for other, _ in output.uses()] == [reader]


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    return () if value is None or value.const_value is None else tuple(value.const_value.shape.numpy())
