"""What a manifest must say so that all who read it may trust it: plan, segments and tensors that fit.

Knows the segments' contract in ``names``; opens no file. A manifest that passes gives no KeyError later.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Iterator

from tokprune.runtime import names
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import limit_faults
from tokprune.runtime.manifest import Manifest, ModelFacts, SegmentFacts
from tokprune.runtime.plan import Plan, make_plan
from tokprune.runtime.weights import PRECISIONS

FLOAT_TYPES = {"fp32": "float32", "fp16": "float16"}  # by base precision, of what flows between segments
PLUGIN_METHODS = ("lofi", "lvpruning")  # whose scores are an operator of tokprune's

Shape = tuple[int | str | None, ...]  # None: a length that the tracer writes as a sum, in its own order
Tensors = dict[str, tuple[Shape, str]]  # by name, in their order: (shape, dtype)


@dataclasses.dataclass(frozen=True)
class Contract:
    """What model and plan demand of one segment: its layers, its tensors, the lengths its FLOPs may name."""

    name: str
    layers: tuple[int, int] | None
    inputs: Tensors
    outputs: Tensors
    axes: frozenset[str]
    plugin_file: str | None = None  # of a selector that a TensorRT plugin can run


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raise UserError, naming the manifest's file ``where``, at the first part that does not fit the others."""
    for fault in _faults(manifest):
        raise UserError(f"{where} contradicts itself ({fault}): export the bundle again")


def contracts(manifest: Manifest) -> Iterator[Contract]:
    """The segments that the manifest's plan needs, in the order of prefill."""
    model, plan, dtype = manifest.model, manifest.plan, FLOAT_TYPES[manifest.base]
    tokens, size = model.vision.tokens, model.vision.image_size
    rows = (names.BATCH, names.SEQUENCE)
    yield Contract(
        names.VISION_ENCODER,
        None,
        {names.PIXEL_VALUES: ((names.IMAGES, 3, size, size), dtype)},
        {names.IMAGE_FEATURES: ((names.IMAGES, tokens, model.hidden), dtype)},
        frozenset({names.IMAGES}),
    )
    yield Contract(
        names.EMBED_TOKENS,
        None,
        {names.INPUT_IDS: (rows, "int64")},
        {names.INPUTS_EMBEDS: ((*rows, model.hidden), dtype)},
        frozenset(rows),
    )
    decoders = {index: (first, stop) for index, first, stop in plan.segments(model.layers)}
    for index in range(len(plan.stages) + 1):
        if index in decoders:
            yield decoder_contract(model, plan, index, *decoders[index], dtype)
        if index < len(plan.stages):
            yield selector_contract(model, plan, index, dtype)


def decoder_contract(model: ModelFacts, plan: Plan, index: int, first: int, stop: int, dtype: str) -> Contract:
    """Of the decoder segment ``index`` with layers [first, stop)."""
    rows = (names.BATCH, names.SEQUENCE)
    has_head = stop == model.layers
    inputs: Tensors = {
        names.INPUTS_EMBEDS if first == 0 else names.HIDDEN_STATES: ((*rows, model.hidden), dtype),
        names.POSITION_IDS: (rows, "int64"),
        names.ATTENTION_MASK: ((names.BATCH, names.TOTAL), "int64"),
    }
    outputs: Tensors = {names.LAST_HIDDEN_STATE: ((*rows, model.hidden), dtype)}
    if plan.method == "fastv":
        outputs[names.LAST_ROW_ATTENTION] = (rows, "float32")
    if has_head:
        inputs[names.LOGITS_INDEX] = ((names.BATCH, names.LOGITS_COUNT), "int64")
        outputs = {names.LOGITS: ((names.BATCH, names.LOGITS_COUNT, model.vocabulary), "float32")}
    for layer in range(first, stop):
        for which in ("key", "value"):
            inputs[names.past(layer, which)] = ((names.BATCH, model.kv_heads, names.PAST, model.head_dim), dtype)
            outputs[names.present(layer, which)] = ((names.BATCH, model.kv_heads, None, model.head_dim), dtype)
    axes = frozenset({*rows, names.PAST, names.LOGITS_COUNT})
    return Contract(names.decoder(index), (first, stop), inputs, outputs, axes)


def selector_contract(model: ModelFacts, plan: Plan, index: int, dtype: str) -> Contract:
    """Of the selector of stage ``index``."""
    rows, kept = (names.BATCH, names.SEQUENCE), (names.BATCH, names.ROWS)
    keep = plan.stages[index].keep
    tokens = plan.stages[index - 1].keep if index else model.vision.tokens
    inputs: Tensors = {
        names.HIDDEN_STATES: ((*rows, model.hidden), dtype),
        names.POSITION_IDS: (rows, "int64"),
        names.VISUAL_INDEX: ((names.IMAGES, tokens), "int64"),
        names.ROW_TEMPLATE: (kept, "int64"),
    }
    if plan.method == "lvpruning":
        inputs[names.TEXT_INDEX] = ((names.IMAGES, names.TEXT_ROWS), "int64")
    if plan.method == "fastv":
        inputs[names.LAST_ROW_ATTENTION] = (rows, "float32")
    return Contract(
        names.select(index),
        None,
        inputs,
        {
            names.KEPT_HIDDEN_STATES: ((*kept, model.hidden), dtype),
            names.KEPT_POSITION_IDS: (kept, "int64"),
            names.KEPT_INDICES: ((names.IMAGES, keep), "int64"),
            names.SCORES: ((names.IMAGES, tokens), "float32"),
        },
        frozenset({*rows, names.ROWS, names.TEXT_ROWS, names.IMAGES}),
        names.plugin_graph(index) if plan.method in PLUGIN_METHODS else None,
    )


def _faults(manifest: Manifest) -> Iterator[str]:
    yield from _model_faults(manifest.model)
    yield from limit_faults(manifest.limits, manifest.model.context)
    plan = manifest.plan
    try:
        checked = make_plan(
            plan.method,
            [(stage.layer, stage.keep) for stage in plan.stages],
            layers=manifest.model.layers,
            visual_tokens=manifest.model.vision.tokens,
            rank=plan.rank,
            seed=plan.seed,
            module=plan.module,
        )
    except UserError as error:
        yield str(error).partition(": ")[0]  # what is wrong; what to do is said by the caller
    else:
        if checked != plan:
            yield f"its plan has a rank, a seed or a module, which method '{plan.method}' has not"
    if manifest.precision not in PRECISIONS:
        yield f"its precision is '{manifest.precision}', not one of {', '.join(PRECISIONS)}"
    if manifest.base not in FLOAT_TYPES:
        yield f"its base is '{manifest.base}', not one of {', '.join(FLOAT_TYPES)}"
    if manifest.precision in FLOAT_TYPES and manifest.precision != manifest.base:
        yield f"its precision is {manifest.precision}, on a base of {manifest.base}"
    if "model" not in manifest.source:
        yield "its source names no model"
    yield from _prompt_faults(manifest)
    needed = list(contracts(manifest))
    found = [segment.name for segment in manifest.segments]
    if found != [contract.name for contract in needed]:
        yield f"its plan needs the segments {', '.join(c.name for c in needed)}, it has {', '.join(found) or 'none'}"
    for segment, contract in zip(manifest.segments, needed, strict=True):
        yield from _segment_faults(segment, contract)
    yield from _file_faults(manifest)
    yield from _memory_faults(manifest)


def _model_faults(model: ModelFacts) -> Iterator[str]:
    for part in (model, model.vision):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, int) and value < (0 if field.name.endswith("token_id") else 1):
                yield f"the model's {field.name} is {value}"
    if model.vision.image_size % model.vision.patch_size:
        yield f"patches of {model.vision.patch_size} do not tile images of {model.vision.image_size}"
    for token in (model.image_token_id, *model.eos_token_ids):
        if not 0 <= token < model.vocabulary:
            yield f"token {token} is outside the vocabulary of {model.vocabulary}"


def _prompt_faults(manifest: Manifest) -> Iterator[str]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(manifest.prompt.user) if name is not None]
    except ValueError as error:
        yield f"its prompt format '{manifest.prompt.user}' has a fault, {error}"
    else:
        if fields != ["text"]:
            yield f"its prompt format '{manifest.prompt.user}' does not hold {{text}} once and nothing else"


def _segment_faults(segment: SegmentFacts, contract: Contract) -> Iterator[str]:
    if segment.layers != contract.layers:
        yield f"{segment.name} has the layers {segment.layers}, its plan {contract.layers}"
    if segment.plugin_file != contract.plugin_file:
        yield f"{segment.name} has the plugin's graph {segment.plugin_file}, its plan {contract.plugin_file}"
    for kind, tensors, wanted in (
        ("reads", segment.inputs, contract.inputs),
        ("writes", segment.outputs, contract.outputs),
    ):
        if [tensor.name for tensor in tensors] != list(wanted):
            yield f"{segment.name} {kind} not the tensors that its plan needs"
        for tensor in tensors:
            shape, dtype = wanted[tensor.name]
            if tensor.dtype != dtype or not _fits(tensor.shape, shape):
                yield f"{tensor.name} of {segment.name} is {tensor.dtype} {list(tensor.shape)}"
    for term in segment.flops:
        if term.coefficient < 0 or not contract.axes >= set(term.powers) or min(term.powers.values(), default=0) < 0:
            yield f"the FLOPs of {segment.name} are no polynomial in {', '.join(sorted(contract.axes))}"


def _fits(shape: tuple[int | str, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(want in (None, dim) for dim, want in zip(shape, wanted, strict=True))


def _file_faults(manifest: Manifest) -> Iterator[str]:
    listed: set[str] = set()
    for file in manifest.files:
        if file.path in listed:
            yield f"it lists the file {file.path} twice"
        listed.add(file.path)
        if file.size < 0:
            yield f"its file {file.path} has {file.size} bytes"
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            yield f"its file {file.path} has no SHA-256"
    modules = [names.MODULES_FILE, names.MODULES_INFO_FILE] if manifest.plan.method == "lvpruning" else []
    segments = [segment.file for segment in manifest.segments]
    segments += [segment.plugin_file for segment in manifest.segments if segment.plugin_file]
    recipe = [] if manifest.precision in FLOAT_TYPES else [names.RECIPE_FILE]
    for needed in [names.TOKENIZER_FILE, names.PREPROCESSOR_FILE, *modules, *recipe, *segments]:
        if needed not in listed:
            yield f"it does not list the file {needed}, which it needs"


def _memory_faults(manifest: Manifest) -> Iterator[str]:
    if [weights.segment for weights in manifest.memory] != [segment.name for segment in manifest.segments]:
        yield "it has not the weights of each segment in order"
    for weights in manifest.memory:
        if not 0 <= weights.largest_bytes <= weights.total:
            yield f"the largest weight of {weights.segment} has {weights.largest_bytes} of {weights.total} bytes"
