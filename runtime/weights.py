"""Bytes of a LLaVA-1.5's weights, segment by segment, from its sizes alone. Opens no weight.

Exact for FP32 and FP16: the sums are those of the checkpoint's tensors that a segment reads. INT8 and INT4 are not
exported yet; their bytes are those of the weight-only formats that the precision's name stands for.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.runtime import names
from tokprune.runtime.manifest import ModelFacts, SegmentWeights
from tokprune.runtime.plan import Module, Plan

PRECISIONS = ("fp32", "fp16", "int8", "int4")
INT4_GROUP = 128  # weights that share a scale, as weight-only INT4 usually has it


def segment_weights(segment: str, tensors: Sequence[tuple[str, int]]) -> SegmentWeights:
    """From (name, bytes) of each weight that a segment's graph reads; without any, the largest is ""."""
    largest = max(tensors, key=lambda tensor: tensor[1], default=("", 0))
    return SegmentWeights(segment, sum(size for _, size in tensors), *largest)


def closed_weights(facts: ModelFacts, plan: Plan, precision: str) -> tuple[SegmentWeights, ...]:
    """Weights of each segment by the model's sizes, in the order of prefill.

    INT8 and INT4 are weight-only: the decoder layers' matrices, with an FP16 scale for each row (INT8) or group of
    INT4_GROUP (INT4); all else stays FP16. lofi, fastv, random and uniform have no weights; lvpruning's are FP32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is none of {', '.join(PRECISIONS)}")
    width = 4 if precision == "fp32" else 2
    table = width * facts.vocabulary * facts.hidden
    vision = [(name, width * count) for name, count in _vision_weights(facts)]
    found = {
        names.VISION_ENCODER: vision,
        names.EMBED_TOKENS: [("embed_tokens.weight", table)],
    }
    layer = [(name, _matrix_bytes(*shape, precision)) for name, shape in _layer_matrices(facts).items()]
    layer.append(("norms", 2 * width * facts.hidden))
    for index, first, stop in plan.segments(facts.layers):
        head = [("norm.weight", width * facts.hidden), ("lm_head.weight", table)] if stop == facts.layers else []
        found[names.decoder(index)] = layer * (stop - first) + head
    for index in range(len(plan.stages)):
        module = [] if plan.module is None else _module_weights(facts.hidden, plan.module)
        found[names.select(index)] = [(name, 4 * count) for name, count in module]
    return tuple(segment_weights(name, found[name]) for name in segment_order(facts, plan))


def _vision_weights(facts: ModelFacts) -> list[tuple[str, int]]:
    """(name, parameters) of the tower's used layers and of the projector."""
    vision, hidden = facts.vision, facts.hidden
    width, inner = vision.hidden, vision.intermediate
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return [
        ("class_embedding", width),
        ("patch_embedding.weight", 3 * vision.patch_size**2 * width),
        ("position_embedding.weight", (vision.tokens + 1) * width),
        ("pre_layrnorm", 2 * width),
        *[("fc1.weight", width * inner), ("layer", layer - width * inner)] * vision.layers,
        ("linear_1.weight", width * hidden),
        ("linear_2.weight", hidden * hidden),
        ("biases", 2 * hidden),
    ]


def _layer_matrices(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices in one decoder layer."""
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    return {
        "q_proj.weight": (queries, facts.hidden),
        "k_proj.weight": (keys, facts.hidden),
        "v_proj.weight": (keys, facts.hidden),
        "o_proj.weight": (facts.hidden, queries),
        "gate_proj.weight": (facts.intermediate, facts.hidden),
        "up_proj.weight": (facts.intermediate, facts.hidden),
        "down_proj.weight": (facts.hidden, facts.intermediate),
    }


def _matrix_bytes(rows: int, columns: int, precision: str) -> int:
    count = rows * columns
    if precision == "int8":
        return count + 2 * rows
    if precision == "int4":
        return count // 2 + 2 * rows * -(-columns // INT4_GROUP)
    return count * (4 if precision == "fp32" else 2)


def _module_weights(hidden: int, module: Module) -> list[tuple[str, int]]:
    """(name, parameters) of lvpruning's module, one a stage: projections, attention, MLP; norms, biases and head."""
    width, inner = module.width, module.intermediate
    return [
        *[("visual_proj.weight", hidden * width), ("text_proj.weight", hidden * width)],
        *[("up_proj.weight", inner * width), ("down_proj.weight", inner * width)],
        ("attention", 4 * width * width),
        ("rest", 2 * hidden + inner + width + 2 * width + 2 * width + 2),
    ]


def segment_order(facts: ModelFacts, plan: Plan) -> list[str]:
    """Names of the plan's segments, in the order of prefill."""
    decoders = {index for index, _, _ in plan.segments(facts.layers)}
    order = [names.VISION_ENCODER, names.EMBED_TOKENS]
    for index in range(len(plan.stages) + 1):
        order += [names.decoder(index)] if index in decoders else []
        order += [names.select(index)] if index < len(plan.stages) else []
    return order
