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

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor
from torch.export import Dim
from transformers import LlavaForConditionalGeneration

from tokprune.export.flops import count_flops
from tokprune.export.layers import repeat
from tokprune.export.segments import Decoder, EmbedTokens, Segment, VisionEncoder, source
from tokprune.export.skeleton import LAYERS
from tokprune.export.store import Store
from tokprune.runtime import names
from tokprune.runtime.manifest import ModelFacts, SegmentFacts, TensorFacts

OPSET = 20
WEIGHT = "weight"  # key of a graph value's notes: where its data comes from
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


def trace_vision(model: LlavaForConditionalGeneration, facts: ModelFacts) -> ir.Model:
    """Trace the vision segment of a skeleton: pixel_values → image_features."""
    size = facts.vision.image_size
    module = VisionEncoder(model, min(LAYERS, facts.vision.layers))
    pixels = torch.zeros(_TRACE["batch"], 3, size, size, dtype=model.dtype)
    inputs = [Input(names.PIXEL_VALUES, pixels, {0: names.IMAGES})]
    return _trace(module, inputs, [names.IMAGE_FEATURES], (0, facts.vision.layers))


def trace_embed(model: LlavaForConditionalGeneration) -> ir.Model:
    """Trace the embedding segment of a skeleton: input_ids → inputs_embeds."""
    ids = torch.zeros(_TRACE["batch"], _TRACE["sequence"], dtype=torch.int64)
    inputs = [Input(names.INPUT_IDS, ids, {0: names.BATCH, 1: names.SEQUENCE})]
    return _trace(EmbedTokens(model), inputs, [names.INPUTS_EMBEDS])


def trace_decoder(
    model: LlavaForConditionalGeneration,
    facts: ModelFacts,
    first: int,
    stop: int,
    *,
    last_row: bool = False,
    head_pieces: int = 1,
) -> ir.Model:
    """Trace the decoder segment of layers [first, stop) of a skeleton; tensor names as in ``names``."""
    head = head_pieces if stop == facts.layers else 0
    module = Decoder(model, 0, min(LAYERS, stop - first), head_pieces=head, last_row=last_row)
    dtype = model.dtype
    batch, rows, past, count = (_TRACE[key] for key in ("batch", "sequence", "past", "logits"))
    by_row = {0: names.BATCH, 1: names.SEQUENCE}
    inputs = [
        Input(
            names.INPUTS_EMBEDS if first == 0 else names.HIDDEN_STATES,
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
    for layer in range(len(module.layers)):
        for which in ("key", "value"):
            cache = torch.zeros(batch, facts.kv_heads, past, facts.head_dim, dtype=dtype)
            inputs.append(Input(names.past(layer, which), cache, {0: names.BATCH, 2: names.PAST}))
            outputs.append(names.present(layer, which))
    return _trace(module, inputs, outputs, (first, stop))


def _trace(module: Segment, inputs: list[Input], outputs: list[str], layers: tuple[int, int] | None = None) -> ir.Model:
    """The graph of ``module``, its two layers repeated to be ``layers`` [first, stop)."""
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
            optimize=False,
            verbose=False,
        )
    assert program is not None  # it is None only for the legacy exporter
    model = program.model
    weights = {name for name, _ in module.named_parameters()}
    with _unknown(model.graph, weights):
        onnxscript.optimizer.optimize_ir(model)
    constants = set(model.graph.initializers) - weights
    if layers is not None:
        repeat(model, *layers)
    for value in list(model.graph.initializers.values()):
        if value.name not in constants:
            assert value.name is not None
            value.meta[WEIGHT] = source(module, value.name)
            value.name = str(value.meta[WEIGHT])
    return _clean(model)


@contextlib.contextmanager
def _unknown(graph: ir.Graph, weights: set[str]) -> Iterator[None]:
    """Make inputs of the ``weights`` for a while: nothing is computed from them, nor are equal ones made one."""
    held = [value for name, value in graph.initializers.items() if name in weights]
    for value in held:
        assert value.name is not None
        graph.initializers.pop(value.name)
        graph.inputs.append(value)
    try:
        yield
    finally:
        for value in held:
            graph.inputs.remove(value)
            if value.uses():
                graph.register_initializer(value)


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


def save_segment(model: ir.Model, store: Store, name: str, layers: tuple[int, int] | None) -> SegmentFacts:
    """Write ``name``.onnx beside the weights of ``store``, which it points to; check it; return its manifest entry.

    Raises onnx.checker.ValidationError if the graph is not valid ONNX with consistent shapes.
    """
    path = store.directory / f"{name}.onnx"
    model.graph.name = name
    for value in model.graph.initializers.values():
        if WEIGHT in value.meta:
            value.const_value = store.place(value.meta[WEIGHT])
    # the checker takes linked files for an attack, so it does not see where the weights are
    with _unknown(model.graph, {name for name, value in model.graph.initializers.items() if WEIGHT in value.meta}):
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    ir.save(model, path)
    return segment_facts(model, name, layers)


def segment_facts(model: ir.Model, name: str, layers: tuple[int, int] | None) -> SegmentFacts:
    """The manifest's entry of the graph ``model``, the segment ``name``."""
    return SegmentFacts(
        name=name,
        file=f"{name}.onnx",
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
