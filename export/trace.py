"""From torch modules to ONNX segments: tracing, cleaning, counting. Knows no plan and no bundle.

One graph serves prefill and decode: batch, sequence and past lengths are dynamic. The opset is 20, the
newest that TensorRT 10.3 documents.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from tokprune.export.flops import count_flops
from tokprune.export.segments import Decoder, EmbedTokens, VisionEncoder
from tokprune.runtime import names
from tokprune.runtime.manifest import ModelFacts, SegmentFacts, TensorFacts

OPSET = 20
_TRACE = {
    "batch": 2,
    "sequence": 5,
    "past": 7,
    "logits": 3,
}  # all different, none 0 or 1, which torch specialises


@dataclass(frozen=True)
class Input:
    """A graph input for tracing: an example tensor, and the axis name of each dynamic dimension."""

    name: str
    example: Tensor
    axes: dict[int, str]


def trace_vision(module: VisionEncoder, facts: ModelFacts, dtype: torch.dtype) -> ir.Model:
    """Trace the vision segment: pixel_values → image_features."""
    size = facts.vision.image_size
    pixels = torch.zeros(_TRACE["batch"], 3, size, size, dtype=dtype)
    return _trace(module, [Input(names.PIXEL_VALUES, pixels, {0: names.IMAGES})], [names.IMAGE_FEATURES])


def trace_embed(module: EmbedTokens) -> ir.Model:
    """Trace the embedding segment: input_ids → inputs_embeds."""
    ids = torch.zeros(_TRACE["batch"], _TRACE["sequence"], dtype=torch.int64)
    return _trace(module, [Input(names.INPUT_IDS, ids, {0: names.BATCH, 1: names.SEQUENCE})], [names.INPUTS_EMBEDS])


def trace_decoder(module: Decoder, facts: ModelFacts, dtype: torch.dtype) -> ir.Model:
    """Trace a decoder segment; tensor names as in ``names``."""
    batch, rows, past, count = (_TRACE[key] for key in ("batch", "sequence", "past", "logits"))
    by_row = {0: names.BATCH, 1: names.SEQUENCE}
    inputs = [
        Input(
            names.INPUTS_EMBEDS if module.first == 0 else names.HIDDEN_STATES,
            torch.zeros(batch, rows, facts.hidden, dtype=dtype),
            by_row,
        ),
        Input(names.POSITION_IDS, torch.arange(past, past + rows).repeat(batch, 1), by_row),
        Input(
            names.ATTENTION_MASK,
            torch.ones(batch, past + rows, dtype=torch.int64),
            {0: names.BATCH, 1: names.TOTAL},
        ),
    ]
    outputs = [names.LOGITS if module.has_head else names.LAST_HIDDEN_STATE]
    if module.last_row:
        outputs.append(names.LAST_ROW_ATTENTION)
    if module.has_head:
        index = torch.zeros(batch, count, dtype=torch.int64)
        inputs.append(Input(names.LOGITS_INDEX, index, {0: names.BATCH, 1: names.LOGITS_COUNT}))
    for layer in range(module.first, module.first + len(module.layers)):
        for which in ("key", "value"):
            cache = torch.zeros(batch, facts.kv_heads, past, facts.head_dim, dtype=dtype)
            inputs.append(Input(names.past(layer, which), cache, {0: names.BATCH, 2: names.PAST}))
            outputs.append(names.present(layer, which))
    return _trace(module, inputs, outputs)


def _trace(module: nn.Module, inputs: list[Input], outputs: list[str]) -> ir.Model:
    dims = {axis: Dim(axis) for item in inputs for axis in item.axes.values()}
    shapes = [{at: dims[axis] for at, axis in item.axes.items()} for item in inputs]
    if isinstance(module, Decoder):  # its forward takes (hidden, positions, mask, *rest)
        dynamic: tuple = (*shapes[:3], tuple(shapes[3:]))
    else:
        dynamic = tuple(shapes)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(item.example for item in inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[item.name for item in inputs],
            output_names=outputs,
            dynamic_shapes=dynamic,
            optimize=True,
            verbose=False,
        )
    assert program is not None  # it is None only for the legacy exporter
    return _clean(program.model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns about torchvision and shared axis names, neither of which a user can act on."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _clean(model: ir.Model) -> ir.Model:
    """Drop the tracer's notes: stack traces with the paths of the machine that exported."""
    model.producer_name, model.producer_version, model.doc_string = "tokprune", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    return model


def save_segment(model: ir.Model, directory: Path, name: str, layers: tuple[int, int] | None) -> SegmentFacts:
    """Write ``name``.onnx, and ``name``.data if it has weights; check it; return its manifest entry.

    Raises onnx.checker.ValidationError if the graph is not valid ONNX with consistent shapes.
    """
    path = directory / f"{name}.onnx"
    model.graph.name = name
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.Tensor) and isinstance(value.const_value.raw, np.ndarray):
            # onnx_ir would write it by NumPy's tofile, which says nothing when the disk has no room for its end
            value.const_value = TorchTensor(torch.tensor(value.const_value.raw), name=value.const_value.name)
    ir.save(model, path, external_data=f"{name}.data")
    onnx.checker.check_model(str(path), full_check=True)
    return SegmentFacts(
        name=name,
        file=path.name,
        layers=layers,
        inputs=tuple(_tensor(value) for value in model.graph.inputs),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
        flops=count_flops(model),
    )


def _tensor(value: ir.Value) -> TensorFacts:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorFacts(value.name, shape, value.dtype.numpy().name)
