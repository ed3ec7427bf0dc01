"""Bytes of a LLaVA-1.5's weights, segment by segment, from its sizes alone. Opens no weight.

Exact: the sums are those of the tensors that a segment reads. INT8 and INT4 are weight-only: a precision of the
decoder layers' matrices, on a base, FP32 or FP16, which is that of all else.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.runtime import names
from tokprune.runtime.manifest import ModelFacts, SegmentWeights
from tokprune.runtime.plan import Module, Plan

PRECISIONS = ("fp32", "fp16", "int8", "int4")
BASES = ("fp32", "fp16")
# Weights that share a scale in INT4: the largest that divides a matrix's input. Powers of two from 16 to 256 are what
# ONNX Runtime's kernels take, and 128 is usual.
INT4_BLOCKS = (128, 64, 32, 16)
MATRICES = (  # of a decoder layer
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def default_base(precision: str) -> str:
    """The base that a precision stands for where none is said: FP16 for INT8 and INT4."""
    return precision if precision in BASES else "fp16"


def block_size(columns: int, precision: str) -> int | None:
    """Weights to a scale in a row of ``columns``: all of INT8, a block of INT4; None if no block divides them."""
    if precision == "int8":
        return columns
    return next((block for block in INT4_BLOCKS if columns % block == 0), None)


def segment_weights(segment: str, tensors: Sequence[tuple[str, int]]) -> SegmentWeights:
    """From (name, bytes) of each weight that a segment's graph reads; without any, the largest is ""."""
    largest = max(tensors, key=lambda tensor: tensor[1], default=("", 0))
    return SegmentWeights(segment, sum(size for _, size in tensors), *largest)


def closed_weights(
    facts: ModelFacts, plan: Plan, precision: str, base: str | None = None
) -> tuple[SegmentWeights, ...]:
    """Weights of each segment by the model's sizes, in the order of prefill; ``base`` None is `default_base`.

    INT8 and INT4 have a scale in the base's type for each `block_size`. lofi, fastv, random and uniform have no
    weights; lvpruning's are FP32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is none of {', '.join(PRECISIONS)}")
    width = 4 if (base or default_base(precision)) == "fp32" else 2
    table = width * facts.vocabulary * facts.hidden
    vision = [(name, width * count) for name, count in _vision_weights(facts)]
    found = {
        names.VISION_ENCODER: vision,
        names.EMBED_TOKENS: [("embed_tokens.weight", table)],
    }
    layer = []
    for name, shape in _layer_matrices(facts).items():
        layer += [(name, size) for size in matrix_bytes(*shape, precision, width)]
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
    q, k, v, o, gate, up, down = MATRICES
    return {
        q: (queries, facts.hidden),
        k: (keys, facts.hidden),
        v: (keys, facts.hidden),
        o: (facts.hidden, queries),
        gate: (facts.intermediate, facts.hidden),
        up: (facts.intermediate, facts.hidden),
        down: (facts.hidden, facts.intermediate),
    }


def matrix_bytes(rows: int, columns: int, precision: str, width: int) -> tuple[int, ...]:
    """Of a matrix [rows, columns]: its codes and its scales, or all of it where it stays; the base has ``width``."""
    count = rows * columns
    block = None if precision in BASES else block_size(columns, precision)
    if block is None:
        return (count * width,)
    return (count if precision == "int8" else (count + 1) // 2, width * count // block)


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
