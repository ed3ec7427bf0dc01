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
from tokprune.plugins import grid
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.runtime import names
from tokprune.runtime.manifest import SegmentFacts, TensorFacts
from tokprune.runtime.plan import Plan

DOMAIN = "tokprune"
_FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def save_selector(
    directory: Path,
    index: int,
    plan: Plan,
    tokens: int,
    hidden: int,
    dtype: str,
    image_grid: tuple[int, int] | None,
) -> SegmentFacts:
    """Write ``select_{index}.onnx`` and return its manifest entry.

    ``tokens`` is the number of visual rows an image has before this stage, ``hidden`` the width D, and
    ``image_grid`` their (rows, columns) if they still are the image's whole grid, else None.
    """
    name = names.select(index)
    inputs = [
        TensorFacts(names.HIDDEN_STATES, (names.BATCH, names.SEQUENCE, hidden), dtype),
        TensorFacts(names.POSITION_IDS, (names.BATCH, names.SEQUENCE), "int64"),
        TensorFacts(names.VISUAL_INDEX, (names.IMAGES, tokens), "int64"),
        TensorFacts(names.ROW_TEMPLATE, (names.BATCH, names.ROWS), "int64"),
    ]
    keep = plan.stages[index].keep
    outputs = [
        TensorFacts(names.KEPT_HIDDEN_STATES, (names.BATCH, names.ROWS, hidden), dtype),
        TensorFacts(names.KEPT_POSITION_IDS, (names.BATCH, names.ROWS), "int64"),
        TensorFacts(names.KEPT_INDICES, (names.IMAGES, keep), "int64"),
        TensorFacts(names.SCORES, (names.IMAGES, tokens), "float32"),
    ]
    scoring, functions = _scoring(plan, index, tokens, hidden, image_grid)
    graph = helper.make_graph(
        [*_visual_rows(hidden), *scoring, *_gather_rows()],
        name,
        [_value_info(tensor) for tensor in inputs],
        [_value_info(tensor) for tensor in outputs],
        initializer=[
            _int64("rows_of", [-1, hidden]),
            _int64("flat", [-1]),
            _int64("zero", 0),
            _int64("one", 1),
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


def _visual_rows(hidden: int) -> list[onnx.NodeProto]:
    """X [I, N, D] = rows VISUAL_INDEX of the states, flattened to [B * S, D]."""
    return [
        helper.make_node("Reshape", [names.HIDDEN_STATES, "rows_of"], ["states"]),
        helper.make_node("Gather", ["states", names.VISUAL_INDEX], ["visual_rows"], axis=0),
    ]


def _scoring(
    plan: Plan, index: int, tokens: int, hidden: int, image_grid: tuple[int, int] | None
) -> tuple[list[onnx.NodeProto], list[onnx.FunctionProto]]:
    """Nodes from "visual_rows" to KEPT_INDICES and SCORES, and the functions that they call."""
    keep = plan.stages[index].keep
    outputs = (names.KEPT_INDICES, names.SCORES)
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        node, function = leverage.leverage_topk(
            "visual_rows", outputs, tokens, hidden, keep, rank=plan.rank.components, energy=plan.rank.energy
        )
        return [node], [function]
    if plan.method == "uniform":
        kept = grid.uniform_indices(image_grid, tokens, keep)
        scores = np.isin(np.arange(tokens), kept).astype(np.float32)
    else:
        kept, scores = grid.random_indices(tokens, keep, plan.seed + index)
    return grid.constant_topk_nodes("visual_rows", outputs, kept, scores), []


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
    kind = TensorProto.INT64 if tensor.dtype == "int64" else _FLOATS[tensor.dtype]
    return helper.make_tensor_value_info(tensor.name, kind, tensor.shape)


def _int64(name: str, value: int | list[int]) -> TensorProto:
    return onnx.numpy_helper.from_array(np.array(value, dtype=np.int64), name)
