"""Builds a stage's ``select`` graph: visual rows out, operator, kept rows and all other rows gathered.

Knows the tensors of the selector's contract and the operators in ``tokprune.plugins``; the scoring itself
is theirs.
"""

from __future__ import annotations

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
from tokprune.plugins.cross_attention_topk.reference import WEIGHTS
from tokprune.plugins.last_row import last_row_topk_nodes
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.runtime import contract, names
from tokprune.runtime.manifest import ModelFacts, SegmentFacts, TensorFacts
from tokprune.runtime.plan import Plan

DOMAIN = "tokprune"
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def save_selector(directory: Path, index: int, plan: Plan, model: ModelFacts, dtype: str) -> SegmentFacts:
    """Write ``select_{index}.onnx`` for states of ``dtype`` and return its manifest entry.

    With method lvpruning, ``directory`` must hold the modules' ``names.MODULES_FILE``: the graph's weights are there.
    """
    agreed = contract.selector_contract(model, plan, index, dtype)
    name, hidden = agreed.name, model.hidden
    inputs, outputs = (_tensor_facts(tensors) for tensors in (agreed.inputs, agreed.outputs))
    scoring, functions = _scoring(plan, index, model)
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", [names.HIDDEN_STATES, "rows_of"], ["states"]),
            # fastv looks at attention alone
            *(_visual_rows() if plan.method != "fastv" else []),
            *scoring,
            *_gather_rows(),
        ],
        name,
        [_value_info(tensor) for tensor in inputs],
        [_value_info(tensor) for tensor in outputs],
        initializer=[
            _int64("rows_of", [-1, hidden]),
            _int64("flat", [-1]),
            _int64("zero", 0),
            _int64("one", 1),
            *(_module_weights(directory, index) if plan.method == "lvpruning" else []),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(DOMAIN, 1)] * bool(functions)
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, producer_name="tokprune", ir_version=10)
    path = directory / f"{name}.onnx"
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    plain = onnx.inliner.inline_local_functions(model)
    plain = onnx.shape_inference.infer_shapes(plain, strict_mode=True, data_prop=True)
    return SegmentFacts(name, path.name, None, tuple(inputs), tuple(outputs), count_flops(ir.from_proto(plain)))


def _visual_rows() -> list[onnx.NodeProto]:
    """X [I, N, D] = rows VISUAL_INDEX of the states, flattened to [B * S, D]."""
    return [helper.make_node("Gather", ["states", names.VISUAL_INDEX], ["visual_rows"], axis=0)]


def _scoring(plan: Plan, index: int, model: ModelFacts) -> tuple[list[onnx.NodeProto], list[onnx.FunctionProto]]:
    """Nodes from "visual_rows" to KEPT_INDICES and SCORES, and the functions that they call."""
    keep, hidden = plan.stages[index].keep, model.hidden
    tokens = plan.stages[index - 1].keep if index else model.vision.tokens
    outputs = (names.KEPT_INDICES, names.SCORES)
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        node, function = leverage.leverage_topk(
            "visual_rows", outputs, tokens, hidden, keep, rank=plan.rank.components, energy=plan.rank.energy
        )
        return [node], [function]
    if plan.method == "fastv":
        return last_row_topk_nodes(names.LAST_ROW_ATTENTION, names.VISUAL_INDEX, outputs, keep), []
    if plan.method == "lvpruning":
        assert plan.module is not None  # make_plan saw to it
        node, function = cross_attention.cross_attention_topk(
            "visual_rows",
            "text_rows",
            "text_valid",
            [_module_weight(index, name) for name in WEIGHTS],
            outputs,
            keep,
            width=plan.module.width,
            heads=plan.module.heads,
        )
        return [*_text_rows(), node], [function]
    if plan.method == "uniform":
        kept = grid.uniform_indices(None if index else model.vision.grid, tokens, keep)
        scores = np.isin(np.arange(tokens), kept).astype(np.float32)
    else:
        kept, scores = grid.random_indices(tokens, keep, plan.seed + index)
    return grid.constant_topk_nodes("visual_rows", outputs, kept, scores), []


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
    for name in (_module_weight(index, weight) for weight in WEIGHTS):
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
