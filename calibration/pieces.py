"""A segment's graph in pieces that fit into memory one at a time, what its matrices are multiplied with as outputs.

Layers are cut apart at the states between them, which have names (`names.state`). What does not depend on a layer, such
as masks and rotary angles, is computed in every piece anew. A piece is bytes: its weights stay in the bundle's files.
Knows graphs; runs none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tokprune.calibration.graph import products
from tokprune.runtime import names
from tokprune.runtime.weights import is_head

_STATE = re.compile(re.escape(names.state(0)).replace("0", r"\d+"))


@dataclass(frozen=True)
class Piece:
    """Some layers. ``taps`` are matrices by the output that they, and maybe others after them, are multiplied with.

    ``size`` is that of the weights in FP32, in which ONNX Runtime has them on a CPU.
    """

    graph: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taps: Mapping[str, str]
    size: int


def cut(model: ir.Model, most: int, *, tapped: bool = True) -> list[Piece]:
    """``model`` in pieces of at most ``most`` bytes of weights each, or of one layer where that has more.

    Without ``tapped`` none has taps, which keep an engine from joining nodes.
    """
    levels = _levels(model.graph)
    taps: dict[str, str] = {}
    sizes = dict.fromkeys(range(max(levels.values()) + 1), 0)
    for matrix, weight, product in products(model):
        entering = product.inputs[0]
        assert weight.const_value is not None
        assert entering is not None
        sizes[levels[str(product.outputs[0].name)]] += 4 * weight.const_value.size
        if tapped and not is_head(matrix):
            taps.setdefault(str(entering.name), matrix)  # the first of those that read the value
    states = {level: name for name, level in levels.items() if _STATE.fullmatch(name) and level + 1 in sizes}
    runs: list[list[int]] = []
    for level, size in sizes.items():
        if runs and sum(sizes[other] for other in runs[-1]) + size <= most:
            runs[-1].append(level)
        else:
            runs.append([level])
    return [_piece(model, taps, levels, states, run, sum(sizes[level] for level in run)) for run in runs]


def _levels(graph: ir.Graph) -> dict[str, int]:
    """How many states lie before each value: the layer that computes it, counted from the graph's first."""
    levels: dict[str, int] = {}
    for node in graph:
        level = 0
        for value in node.inputs:
            if value is not None and value.name in levels:
                level = max(level, levels[value.name] + bool(_STATE.fullmatch(value.name)))
        levels.update({str(value.name): level for value in node.outputs})
    return levels


def _piece(
    model: ir.Model,
    taps: Mapping[str, str],
    levels: Mapping[str, int],
    states: Mapping[int, str],
    run: Sequence[int],
    size: int,
) -> Piece:
    """The layers ``run``, side by side."""
    outputs = [str(value.name) for value in model.graph.outputs if levels[str(value.name)] in run]
    outputs += [states[run[-1]]] if run[-1] in states else []
    own = {name: matrix for name, matrix in taps.items() if levels.get(name, 0) in run}
    inputs = [str(value.name) for value in model.graph.inputs]
    inputs += [states[run[0] - 1]] if run[0] else []
    # a tap may be an input or an output anyway
    graph = ir.convenience.extract(model.graph, inputs, list(dict.fromkeys([*outputs, *own])))
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    part = ir.Model(graph, ir_version=model.ir_version)
    read = tuple(str(value.name) for value in graph.inputs)
    return Piece(ir.to_proto(part).SerializeToString(), read, tuple(outputs), own, size)
