"""An FP16 graph that computes in FP32. On a CPU, ONNX Runtime would cast weights and states around every operator, in
every call. Weights stay FP16 on disk, under a ``Cast`` that is folded when the graph is loaded: FP32 in memory.

States between segments keep FP16, whose rounding they have anyway; caches become FP32. Knows types only.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def widen(model: ir.Model) -> None:
    """Have all of ``model`` but its weights in FP32, in place; a graph without FP16 stays as it is."""
    graph = model.graph
    outside = [value for value in graph.outputs if value.dtype == HALF and not _is_cache(value)]
    for node in list(graph):
        if node.op_type == "Cast":
            _widen_cast(graph, node)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype == HALF:
                value.type = ir.TensorType(SINGLE)
    for value in [*graph.initializers.values(), *graph.inputs]:
        if value.dtype == HALF and value in graph.inputs and _is_cache(value):
            value.type = ir.TensorType(SINGLE)
        elif value.dtype == HALF and value in graph.inputs:
            _put_cast(graph, value)
        elif value.dtype == HALF and not isinstance(value.const_value, ir.ExternalTensor):  # the graph's own numbers
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(SINGLE)
    for value in outside:
        name, value.name = value.name, f"{value.name}.wide"
        cast = ir.Node("", "Cast", [value], ir.convenience.convert_attributes({"to": HALF}))
        graph.append(cast)
        narrow = cast.outputs[0]
        narrow.name, narrow.shape, narrow.type = name, value.shape, ir.TensorType(HALF)
        graph.outputs[list(graph.outputs).index(value)] = narrow


def widen_weights(model: ir.Model) -> None:
    """Have the weights read in FP32, in place: last, since the rules know weights without a ``Cast`` on them."""
    for value in list(model.graph.initializers.values()):
        if value.dtype == HALF and value.uses():
            _put_cast(model.graph, value)


def _widen_cast(graph: ir.Graph, node: ir.Node) -> None:
    """A cast between the two types is nothing any more; one of other types gives FP32."""
    given, made = node.inputs[0], node.outputs[0]
    assert given is not None
    if HALF not in (given.dtype, made.dtype):
        return
    if {given.dtype, made.dtype} <= {HALF, SINGLE} and not made.is_graph_output():
        made.replace_all_uses_with(given)
        graph.remove(node, safe=True)
    elif made.dtype == HALF:
        node.attributes["to"] = ir.AttrInt64("to", SINGLE)


def _put_cast(graph: ir.Graph, value: ir.Value) -> None:
    """Have all that reads ``value`` read it in FP32."""
    cast = ir.Node("", "Cast", [value], ir.convenience.convert_attributes({"to": SINGLE}))
    wide = cast.outputs[0]
    wide.shape, wide.type = value.shape, ir.TensorType(SINGLE)
    for node, at in list(value.uses()):
        if node is not cast:
            node.replace_input_with(at, wide)
    graph.insert_before(graph[0], cast)


def _is_cache(value: ir.Value) -> bool:
    return str(value.name).startswith(("past_key_values.", "present."))
