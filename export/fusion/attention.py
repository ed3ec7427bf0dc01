"""Attention in ONNX Runtime's own operators.

Decoder: ``GroupQueryAttention`` over caches in place. What was ``past`` and ``present`` is one buffer [B, H_kv, C, d]
of any capacity C, whose first ``seqlens_k`` + 1 rows are a sequence's when the call is done; causal by row. There is no
mask: rows that are pads are never given to it. Tower: ``MultiHeadAttention``.
Knows graphs; raises ValueError for one that it cannot read.
"""

from __future__ import annotations

import onnx_ir as ir

from tokprune.export.fusion.rules import MICROSOFT
from tokprune.runtime import names
from tokprune.runtime.engines.fused import LENGTHS, TOTAL

CAPACITY = "capacity"


def fuse_decoder(model: ir.Model) -> None:
    """Rewrite a decoder's attention, in place: `attention_mask` goes, `LENGTHS` and `TOTAL` come."""
    graph = model.graph
    lengths = _input(graph, LENGTHS, [names.BATCH])
    total = _input(graph, TOTAL, [1])
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    for node in softmaxes:
        if _reader(node.outputs[0]).op_type == "ReduceMean":
            _last_row(graph, node, lengths)
    for node in softmaxes:
        if _reader(node.outputs[0]).op_type == "MatMul":
            _group_query(graph, node, lengths, total)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == names.ATTENTION_MASK))


def fuse_tower(model: ir.Model) -> None:
    """Rewrite the vision tower's attention, in place."""
    graph = model.graph
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        scores = _maker(softmax.inputs[0], "MatMul")
        query, scale = _scaled(scores.inputs[0])
        keys = _maker(_maker(scores.inputs[1], "Transpose").inputs[0], "Reshape").inputs[0]
        product = _reader(softmax.outputs[0], "MatMul")
        out = _reader(_reader(product.outputs[0], "Transpose").outputs[0], "Reshape")
        new = _put(
            graph,
            out,
            "MultiHeadAttention",
            [_rows(query), keys, _rows(product.inputs[1])],
            {"num_heads": _size(query, 1), "scale": scale},
            1,
        )
        out.outputs[0].replace_all_uses_with(new[0])


def _group_query(graph: ir.Graph, softmax: ir.Node, lengths: ir.Value, total: ir.Value) -> None:
    scores = _maker(_maker(softmax.inputs[0], "Add").inputs[0], "MatMul")
    query, scale = _scaled(scores.inputs[0])
    present_key = _unrepeated(_maker(scores.inputs[1], "Transpose").inputs[0])
    product = _reader(softmax.outputs[0], "MatMul")
    present_value = _unrepeated(product.inputs[1])
    out = _reader(_reader(product.outputs[0], "Transpose").outputs[0], "Reshape")
    (past_key, key), (past_value, value) = (_maker(each, "Concat").inputs for each in (present_key, present_value))
    attention, *presents = _put(
        graph,
        out,
        "GroupQueryAttention",
        [_rows(query), _rows(key), _rows(value), past_key, past_value, lengths, total],
        {"num_heads": _size(query, 1), "kv_num_heads": _size(past_key, 1), "scale": scale},
        3,
    )
    out.outputs[0].replace_all_uses_with(attention)
    for old, new, past in zip((present_key, present_value), presents, (past_key, past_value), strict=True):
        assert past is not None  # `_size` has read it
        past.shape = new.shape = ir.Shape([names.BATCH, _size(past, 1), CAPACITY, _size(past, 3)])
        new.type = old.type
        old.name, new.name = f"{old.name}.grown", old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _last_row(graph: ir.Graph, softmax: ir.Node, lengths: ir.Value) -> None:
    """What the last row gives to each row of the cache, [B, C]: 0 to those behind the sequence's last.

    The neutral graph gives that to the call's own rows only; a call in pieces is not one of this graph's calls.
    """
    product = _maker(_maker(softmax.inputs[0], "Add").inputs[0], "MatMul")
    query, keys = product.inputs[0], _unrepeated(_maker(product.inputs[1], "Transpose").inputs[0])
    heads, kv_heads, width = _size(query, 1), _size(keys, 1), _size(keys, 3)
    tape = ir.tape.Tape()

    def number(value: float, kind: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return tape.op("Constant", [], {"value": ir.tensor(value, dtype=kind)})

    def shape(*sizes: int) -> ir.Value:
        return tape.op("Constant", [], {"value": ir.tensor(sizes)})

    grouped = tape.op("Reshape", [query, shape(0, kv_heads, heads // kv_heads, width)])
    turned = tape.op("Transpose", [keys], {"perm": [0, 1, 3, 2]})
    scores = tape.op("Reshape", [tape.op("MatMul", [grouped, turned]), shape(0, heads, 1, -1)])  # [B, H, 1, C]
    last = tape.op("Cast", [lengths], {"to": ir.DataType.INT64})
    last = tape.op("Unsqueeze", [last, shape(1, 2, 3)])  # [B, 1, 1, 1]
    count = tape.op("Squeeze", [tape.op("Shape", [keys], {"start": 2, "end": 3})])
    columns = tape.op("Range", [number(0), count, number(1)])
    seen = tape.op("LessOrEqual", [columns, last])
    scores = tape.op("Where", [seen, scores, number(-1e30, ir.DataType.FLOAT)])
    graph.insert_before(softmax, tape.nodes)
    softmax.replace_input_with(0, scores)
    cut = next(value for value in graph.outputs if value.name == names.LAST_ROW_ATTENTION)
    whole = _maker(cut, "Slice").inputs[0]
    assert whole is not None
    whole.name, cut.name = cut.name, f"{cut.name}.cut"
    whole.shape = ir.Shape([names.BATCH, CAPACITY])
    graph.outputs[list(graph.outputs).index(cut)] = whole


def _input(graph: ir.Graph, name: str, shape: list) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.append(value)
    return value


def _put(graph: ir.Graph, before: ir.Node, kind: str, inputs: list, attributes: dict, outputs: int) -> list[ir.Value]:
    node = ir.Node(
        MICROSOFT,
        kind,
        inputs,
        ir.convenience.convert_attributes(attributes),
        num_outputs=outputs,
    )
    graph.insert_before(before, node)
    first = node.outputs[0]
    first.shape, first.type = before.outputs[0].shape, before.outputs[0].type
    return list(node.outputs)


def _maker(value: ir.Value | None, kind: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != kind:
        raise ValueError(f"{_name(value)} is made by {node.op_type if node else 'nothing'}, not by {kind}")
    return node


def _reader(value: ir.Value, kind: str | None = None) -> ir.Node:
    readers = [node for node, _ in value.uses()]
    if len(readers) != 1 or kind not in (None, readers[0].op_type):
        raise ValueError(f"{_name(value)} is read by {[node.op_type for node in readers]}, not by one {kind or 'node'}")
    return readers[0]


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """The value, and the number that it is multiplied with."""
    rows, scale = _maker(value, "Mul").inputs
    if rows is None or scale is None or scale.const_value is None:
        raise ValueError(f"{_name(value)} is scaled by {_name(scale)}, which is no constant")
    return rows, float(scale.const_value.numpy().reshape(()))


def _rows(heads: ir.Value | None) -> ir.Value | None:
    """[B, S, H · d] of what was reshaped and transposed to [B, H, S, d]."""
    return _maker(_maker(heads, "Transpose").inputs[0], "Reshape").inputs[0]


def _unrepeated(value: ir.Value | None) -> ir.Value:
    """Keys or values before they were repeated for the queries' heads, if they were."""
    if value is not None and (node := value.producer()) is not None and node.op_type == "Reshape":
        value = _maker(_maker(node.inputs[0], "Expand").inputs[0], "Unsqueeze").inputs[0]
    if value is None:
        raise ValueError("keys or values are missing")
    return value


def _size(value: ir.Value | None, axis: int) -> int:
    size = None if value is None or value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"axis {axis} of {_name(value)} is {size}, not a number")
    return size


def _name(value: ir.Value | None) -> str:
    return "an input that is left out" if value is None else str(value.name)
