"""Builds a stage's ``select`` graphs: visual rows out, operator, kept rows and all other rows gathered.

Where a method has an operator of its own there are two: one holds the operator's function, for engines that have no
plugin, one leaves it out. Knows the tensors of the selector's contract and the operators in ``tokprune.plugins``;
the scoring itself is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx import TensorProto, helper

from tokprune.export.flops import count_flops
from tokprune.export.trace import OPSET
from tokprune.export.weights import read_header
from tokprune.plugins import grid
from tokprune.plugins.cross_attention_topk import body as cross_attention
from tokprune.plugins.cross_attention_topk.reference import MODULE_WEIGHTS, PROJECTIONS, WEIGHTS
from tokprune.plugins.last_row import last_row_topk_nodes
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.plugins.nodes import DOMAIN, Nodes, for_plugin
from tokprune.runtime import contract, names
from tokprune.runtime.manifest import ModelFacts, SegmentFacts, TensorFacts
from tokprune.runtime.plan import Plan

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
_OUTPUTS = (names.KEPT_INDICES, names.SCORES)


@dataclass(frozen=True)
class _Scoring:
    """Nodes that end in KEPT_INDICES and SCORES, with and without a plugin (None where the method has none)."""

    native: list[onnx.NodeProto]
    plugin: list[onnx.NodeProto] | None = None
    functions: tuple[onnx.FunctionProto, ...] = ()  # that the native nodes call


def save_selector(directory: Path, index: int, plan: Plan, model: ModelFacts, dtype: str) -> SegmentFacts:
    """Write the graphs of stage ``index`` for states of ``dtype`` and return their manifest entry.

    They are ``select_{index}.onnx`` and, for methods that have an operator, ``select_{index}.plugin.onnx``.
    With method lvpruning, ``directory`` must hold the modules' ``names.MODULES_FILE``: the graphs' weights are there.
    """
    agreed = contract.selector_contract(model, plan, index, dtype)
    inputs, outputs = (_tensor_facts(tensors) for tensors in (agreed.inputs, agreed.outputs))
    scoring = _scoring(plan, index, model)
    constants = [
        _int64("rows_of", [-1, model.hidden]),
        _int64("flat", [-1]),
        _int64("zero", 0),
        _int64("one", 1),
        *(_module_weights(directory, index) if plan.method == "lvpruning" else []),
    ]

    def save(file: str, nodes: list[onnx.NodeProto], functions: tuple[onnx.FunctionProto, ...]) -> onnx.ModelProto:
        graph = helper.make_graph(
            [helper.make_node("Reshape", [names.HIDDEN_STATES, "rows_of"], ["states"]), *nodes, *_gather_rows()],
            agreed.name,
            [_value_info(tensor) for tensor in inputs],
            [_value_info(tensor) for tensor in outputs],
            initializer=constants,
        )
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(DOMAIN, 1)] * (scoring.plugin is not None)
        proto = helper.make_model(
            graph, functions=functions, opset_imports=opsets, producer_name="tokprune", ir_version=10
        )
        onnx.save(proto, directory / file)
        onnx.checker.check_model(str(directory / file), full_check=True)
        return proto

    file = f"{agreed.name}.onnx"
    native = onnx.inliner.inline_local_functions(save(file, scoring.native, scoring.functions))
    native = onnx.shape_inference.infer_shapes(native, strict_mode=True, data_prop=True)
    plugin_file = None
    if scoring.plugin is not None:
        plugin_file = names.plugin_graph(index)
        save(plugin_file, scoring.plugin, ())
    flops = count_flops(ir.from_proto(native))
    return SegmentFacts(agreed.name, file, None, tuple(inputs), tuple(outputs), flops, plugin_file)


def _visual_rows() -> list[onnx.NodeProto]:
    """X [I, N, D] = rows VISUAL_INDEX of the states, flattened to [B * S, D]."""
    return [helper.make_node("Gather", ["states", names.VISUAL_INDEX], ["visual_rows"], axis=0)]


def _scoring(plan: Plan, index: int, model: ModelFacts) -> _Scoring:
    keep, hidden = plan.stages[index].keep, model.hidden
    tokens = plan.stages[index - 1].keep if index else model.vision.tokens
    if plan.method == "fastv":  # looks at attention alone
        return _Scoring(last_row_topk_nodes(names.LAST_ROW_ATTENTION, names.VISUAL_INDEX, _OUTPUTS, keep))
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        node, function = leverage.leverage_topk(
            "visual_rows", _OUTPUTS, tokens, hidden, keep, rank=plan.rank.components, energy=plan.rank.energy
        )
        return _with_plugin(_visual_rows(), node, leverage.VERSION, function)
    if plan.method == "lvpruning":
        assert plan.module is not None  # make_plan saw to it
        module = Nodes("module")
        weights = {name: _module_weight(index, name) for name in MODULE_WEIGHTS}
        rows = cross_attention.projection_nodes(
            module, "visual_rows", "text_rows", {name: weights[name] for name in PROJECTIONS}
        )
        heads, own = plan.module.heads, [weights[name] for name in WEIGHTS]
        node = cross_attention.cross_attention_topk_node(rows, "text_valid", own, _OUTPUTS, keep, heads=heads)
        function = cross_attention.cross_attention_topk_function(keep, width=plan.module.width, heads=heads)
        before = [*_visual_rows(), *_text_rows(), *module.protos]
        return _with_plugin(before, node, cross_attention.VERSION, function)
    if plan.method == "uniform":
        kept = grid.uniform_indices(None if index else model.vision.grid, tokens, keep)
        scores = np.isin(np.arange(tokens), kept).astype(np.float32)
    else:
        kept, scores = grid.random_indices(tokens, keep, plan.seed + index)
    return _Scoring([*_visual_rows(), *grid.constant_topk_nodes("visual_rows", _OUTPUTS, kept, scores)])


def _with_plugin(
    before: list[onnx.NodeProto], node: onnx.NodeProto, version: int, function: onnx.FunctionProto
) -> _Scoring:
    """``before`` and then ``node``, which is ``function`` or the plugin of that ``version``."""
    return _Scoring([*before, node], [*before, for_plugin(node, version)], (function,))


def _text_rows() -> list[onnx.NodeProto]:
    """T [I, M, D] = rows TEXT_INDEX of the states, and which of them [I, M] are text; pads read row 0."""
    return [
        helper.make_node("GreaterOrEqual", [names.TEXT_INDEX, "zero"], ["text_valid"]),
        helper.make_node("Max", [names.TEXT_INDEX, "zero"], ["text_slots"]),
        helper.make_node("Gather", ["states", "text_slots"], ["text_rows"], axis=0),
    ]


def _module_weight(index: int, name: str) -> str:
    """Name of a weight of stage ``index``'s module, in the modules' file and in the graph."""
    return f"stages.{index}.{name}"


def _module_weights(directory: Path, index: int) -> list[TensorProto]:
    """Stage ``index``'s module as initializers that point into the modules' file: nothing is copied."""
    stored = read_header(directory / names.MODULES_FILE)
    tensors = []
    for name in (_module_weight(index, weight) for weight in MODULE_WEIGHTS):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=stored[name].shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": names.MODULES_FILE, "offset": stored[name].offset, "length": stored[name].length}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors


def _gather_rows() -> list[onnx.NodeProto]:
    """Kept rows and text rows in the order that ROW_TEMPLATE gives, with their positions."""
    return [
        helper.make_node("GatherElements", [names.VISUAL_INDEX, names.KEPT_INDICES], ["kept_rows"], axis=1),
        helper.make_node("Reshape", ["kept_rows", "flat"], ["kept_slots"]),
        helper.make_node("Reshape", [names.POSITION_IDS, "flat"], ["positions"]),
        helper.make_node("Size", ["positions"], ["row_count"]),
        helper.make_node("Range", ["zero", "row_count", "one"], ["all_rows"]),
        helper.make_node("Concat", ["all_rows", "kept_slots"], ["sources"], axis=0),
        helper.make_node("Gather", ["sources", names.ROW_TEMPLATE], ["rows_kept"], axis=0),
        helper.make_node("Gather", ["states", "rows_kept"], [names.KEPT_HIDDEN_STATES], axis=0),
        helper.make_node("Gather", ["positions", "rows_kept"], [names.KEPT_POSITION_IDS], axis=0),
    ]


def _value_info(tensor: TensorFacts) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, _TYPES[tensor.dtype], tensor.shape)


def _tensor_facts(tensors: contract.Tensors) -> list[TensorFacts]:
    return [
        TensorFacts(name, tuple(dim for dim in shape if dim is not None), dtype)
        for name, (shape, dtype) in tensors.items()
    ]


def _int64(name: str, value: int | list[int]) -> TensorProto:
    return onnx.numpy_helper.from_array(np.array(value, dtype=np.int64), name)
