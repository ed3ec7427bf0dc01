"""Repeats a traced layer: a graph traced with two layers becomes one of as many as the model has.

Tracing takes seconds a layer, and all layers of a decoder, or of a tower, are alike but for their weights and caches.
The last of the two traced layers stays the last, since it may do more (`segments.Decoder` with ``last_row``).
Knows graphs only; which node belongs to which layer is in the tracer's notes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import MutableSequence

import onnx_ir as ir

from tokprune.runtime import names

_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata: ['', 'layers.0', 'layers.0.mlp', 'add_3'], from the outside in
_WEIGHT = re.compile(r"layers\.(\d+)\.(.+)")
_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


def repeat(model: ir.Model, first: int, stop: int) -> None:
    """Turn the traced layers, 0 and (if there are several) 1, into the layers [first, stop), in place.

    Weights, caches and the states between layers are named by the layer's number in the whole model.
    """
    graph = model.graph
    bodies: dict[int, list[ir.Node]] = {}
    for node in graph:
        layer, _ = _place(node)
        if layer is not None:
            bodies.setdefault(layer, []).append(node)
    if sorted(bodies) != list(range(min(2, stop - first))):
        raise ValueError(f"layers {sorted(bodies)} were traced, wanted are {first} to {stop - 1}")
    outputs = {layer: _output(body) for layer, body in bodies.items()}
    if len(bodies) == 2:
        _renumber(graph, 1, stop - 1)
        state = outputs[0]
        entry = _entry(bodies, state)
        behind = [(node, at) for node, at in state.uses() if _place(node)[0] != 0]
        for layer in range(first + 1, stop - 1):
            state = _copy(graph, bodies[0], entry, state, layer)
        for node, at in behind:
            node.replace_input_with(at, state)
        _name_state(outputs[1], stop)
    _renumber(graph, 0, first)
    _name_state(outputs[0], first + 1)
    graph.sort()


def _place(node: ir.Node) -> tuple[int | None, str]:
    """The traced layer that ``node`` is part of, if any, and the module within it ("" for the layer itself)."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    modules = [scope for scope in scopes[:-1] if scope]  # the last one is the operator's
    match = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", modules[-1]) if modules else None
    return (int(match[1]), match[2] or "") if match else (None, "")


def _output(body: list[ir.Node]) -> ir.Value:
    """The layer's output: what its own forward computes last, the second residual sum."""
    return [node for node in body if _place(node)[1] == ""][-1].outputs[0]


def _entry(bodies: dict[int, list[ir.Node]], state: ir.Value) -> ir.Value:
    """What layer 0 reads where layer 1 reads ``state``, layer 0's output."""
    reader = next(node for node in bodies[1] if state in node.inputs)
    same = next(node for node in bodies[0] if (node.op_type, _place(node)[1]) == (reader.op_type, _place(reader)[1]))
    entry = same.inputs[reader.inputs.index(state)]
    assert entry is not None
    return entry


def _copy(graph: ir.Graph, body: list[ir.Node], entry: ir.Value, state: ir.Value, layer: int) -> ir.Value:
    """Append layer 0's nodes once more, as ``layer`` that reads ``state``; what it writes."""
    changed: dict[ir.Value | None, ir.Value] = {entry: state}
    for value in [*graph.initializers.values(), *graph.inputs]:
        if _layer_of(value) == 0:
            fresh = _like(value, _numbered(value, layer))
            changed[value] = fresh
            if value.is_initializer():
                fresh.const_value = value.const_value
                graph.register_initializer(fresh)
            else:
                _insert(graph.inputs, fresh)
    for node in body:
        if not any(value in changed for value in node.inputs):
            continue  # the same for all layers
        fresh_outputs = [_like(value, _numbered(value, layer)) for value in node.outputs]
        changed.update(zip(node.outputs, fresh_outputs, strict=True))
        graph.append(
            ir.Node(
                node.domain,
                node.op_type,
                [changed.get(value, value) for value in node.inputs],
                node.attributes.values(),
                outputs=fresh_outputs,
                metadata_props={},
            )
        )
    for value in list(graph.outputs):
        if _layer_of(value) == 0:
            _insert(graph.outputs, changed[value])
    output = changed[_output(body)]
    _name_state(output, layer + 1)
    return output


def _layer_of(value: ir.Value) -> int | None:
    """The layer that a weight or a cache is of."""
    assert value.name is not None
    match = _WEIGHT.fullmatch(value.name)
    cache = _CACHE.fullmatch(value.name)
    return int(match[1]) if match else int(cache[2]) if cache else None


def _numbered(value: ir.Value, layer: int) -> str:
    """The name of a traced layer's ``value`` in the layer numbered ``layer``."""
    assert value.name is not None
    if match := _WEIGHT.fullmatch(value.name):
        return f"layers.{layer}.{match[2]}"
    if cache := _CACHE.fullmatch(value.name):
        return f"{cache[1]}.{layer}.{cache[3]}"
    return f"{value.name}.{layer}"


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _insert(values: MutableSequence[ir.Value], fresh: ir.Value) -> None:
    """Put a cache in its place: caches ascend by layer, behind what is of no layer."""
    layer = _layer_of(fresh)
    assert layer is not None
    later = (at for at, value in enumerate(values) if (other := _layer_of(value)) is not None and other > layer)
    values.insert(next(later, len(values)), fresh)


def _renumber(graph: ir.Graph, traced: int, layer: int) -> None:
    """Name weights and caches of the ``traced`` layer as those of ``layer``."""
    for value in [*graph.initializers.values(), *graph.inputs, *graph.outputs]:
        if _layer_of(value) == traced:
            value.name = _numbered(value, layer)


def _name_state(value: ir.Value, layer: int) -> None:
    """Name the states that enter ``layer``, so that a graph can be cut there; an output has its name."""
    if not value.is_graph_output():
        value.name = names.state(layer)
