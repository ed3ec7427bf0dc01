"""Bytes of a LLaVA-1.5's weights, segment by segment, from its sizes alone. Opens no weight.

Exact: the sums are those of the tensors that a segment reads. INT8 and INT4 are a precision of the decoder layers'
matrices, and if asked of other ones, on a base, FP32 or FP16, which is that of all else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokprune.runtime import names
from tokprune.runtime.manifest import ModelFacts, SegmentWeights
from tokprune.runtime.plan import Module, Plan

PRECISIONS = ("fp32", "fp16", "int8", "int4")
BASES = ("fp32", "fp16")
# Weights that share a scale in INT4: the largest that divides a matrix's input. Powers of two from 16 to 256 are what
# ONNX Runtime's kernels take, and 128 is usual.
INT4_BLOCKS = (128, 64, 32, 16)
ONNX_BLOCKS = (16, 32, 64, 128, 256)
MATRICES = (  # of a decoder layer
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
TOWER_MATRICES = (  # of a layer of the vision tower
    *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")),
    *(f"mlp.{name}.weight" for name in ("fc1", "fc2")),
)
PROJECTOR_MATRICES = ("linear_1.weight", "linear_2.weight")
DECODER, TOWER, PROJECTOR = "language_model.layers.", "vision_tower.encoder.layers.", "multi_modal_projector."
HEAD = "lm_head.weight"  # whole; a piece of a split one is "lm_head.weight.{begin}-{end}", with its rows


def default_base(precision: str) -> str:
    """The base that a precision stands for where none is said: FP16 for INT8 and INT4."""
    return precision if precision in BASES else "fp16"


def block_size(columns: int, precision: str) -> int | None:
    """Weights to a scale in a row of ``columns``: all of INT8, a block of INT4; None if no block divides them."""
    if precision == "int8":
        return columns
    return next((block for block in INT4_BLOCKS if columns % block == 0), None)


def matrix_names(facts: ModelFacts) -> tuple[str, ...]:
    """Names of matrices that can be rounded, in the order of prefill, but for ``lm_head``, which may be in pieces."""
    return (
        *(f"{TOWER}{layer}.{name}" for layer in range(facts.vision.layers) for name in TOWER_MATRICES),
        *(f"{PROJECTOR}{name}" for name in PROJECTOR_MATRICES),
        *(f"{DECODER}{layer}.{name}" for layer in range(facts.layers) for name in MATRICES),
    )


def group_of(matrix: str) -> str:
    """What a matrix that can be rounded belongs to: "layers.7", "vision_tower.7", "projector" or "lm_head"."""
    for prefix, name in ((DECODER, "layers."), (TOWER, "vision_tower.")):
        if matrix.startswith(prefix):
            return name + matrix.removeprefix(prefix).partition(".")[0]
    return "projector" if matrix.startswith(PROJECTOR) else "lm_head"


def layer_of(matrix: str) -> int | None:
    """The decoder layer that a matrix is in; None of another."""
    group, _, layer = group_of(matrix).partition(".")
    return int(layer) if group == "layers" else None


def is_head(matrix: str) -> bool:
    """Whether that is ``lm_head``, or a piece of it."""
    return matrix == HEAD or matrix.startswith(f"{HEAD}.")


def first_row(head: str) -> int:
    """Where ``lm_head``, or a piece of it, begins."""
    return int(head.removeprefix(HEAD).strip(".").partition("-")[0] or 0)


def segment_weights(segment: str, tensors: Sequence[tuple[str, int]]) -> SegmentWeights:
    """From (name, bytes) of each weight that a segment's graph reads; without any, the largest is ""."""
    largest = max(tensors, key=lambda tensor: tensor[1], default=("", 0))
    return SegmentWeights(segment, sum(size for _, size in tensors), *largest)


def closed_weights(
    facts: ModelFacts,
    plan: Plan,
    precision: str,
    base: str | None = None,
    head: str | None = None,
    tower: str | None = None,
) -> tuple[SegmentWeights, ...]:
    """Weights of each segment by the model's sizes, in the order of prefill; ``base`` None is `default_base`.

    ``head`` is the precision of ``lm_head``, ``tower`` that of vision tower and projector, None the base. INT8 and INT4
    have a scale in the base's type for each `block_size`. lofi, fastv, random and uniform have no weights; lvpruning's
    are FP32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is none of {', '.join(PRECISIONS)}")
    base = base or default_base(precision)
    width = 4 if base == "fp32" else 2
    table = width * facts.vocabulary * facts.hidden
    vision = list(_vision_weights(facts, tower or base, width))
    found = {
        names.VISION_ENCODER: vision,
        names.EMBED_TOKENS: [("embed_tokens.weight", table)],
    }
    layer = []
    for name, shape in _layer_matrices(facts).items():
        layer += [(name, size) for size in matrix_bytes(*shape, precision, width)]
    layer.append(("norms", 2 * width * facts.hidden))
    for index, first, stop in plan.segments(facts.layers):
        found[names.decoder(index)] = layer * (stop - first)
        if stop == facts.layers:
            sizes = matrix_bytes(facts.vocabulary, facts.hidden, head or base, width)
            found[names.decoder(index)] += [("norm.weight", width * facts.hidden), *((HEAD, size) for size in sizes)]
    for index in range(len(plan.stages)):
        module = [] if plan.module is None else _module_weights(facts.hidden, plan.module)
        found[names.select(index)] = [(name, 4 * count) for name, count in module]
    return tuple(segment_weights(name, found[name]) for name in segment_order(facts, plan))


def closed_integers(
    facts: ModelFacts, precision: str, base: str, head: str | None = None, tower: str | None = None
) -> int:
    """Those bytes of `closed_weights` that are codes and scales."""
    wanted = [(shape, precision) for shape in _layer_matrices(facts).values()] * facts.layers
    wanted += [(shape, tower or base) for _, shape in _vision_matrices(facts)]
    wanted.append(((facts.vocabulary, facts.hidden), head or base))
    sizes = (matrix_bytes(*shape, each, 4 if base == "fp32" else 2) for shape, each in wanted)
    return sum(sum(size) for size in sizes if len(size) == 2)


def _vision_weights(facts: ModelFacts, precision: str, width: int) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the tower's used layers and projector, matrices in ``precision``, all else of ``width``."""
    vision, hidden = facts.vision, facts.hidden
    across, inner = vision.hidden, vision.intermediate
    for name, count in (
        ("class_embedding", across),
        ("patch_embedding.weight", 3 * vision.patch_size**2 * across),
        ("position_embedding.weight", (vision.tokens + 1) * across),
        ("pre_layrnorm", 2 * across),
        ("biases and norms", vision.layers * (9 * across + inner) + 2 * hidden),
    ):
        yield name, width * count
    for name, shape in _vision_matrices(facts):
        for size in matrix_bytes(*shape, precision, width):
            yield name, size


def _vision_matrices(facts: ModelFacts) -> list[tuple[str, tuple[int, int]]]:
    """(name, [out, in]) of the matrices in the tower's used layers and the projector."""
    across, inner, hidden = facts.vision.hidden, facts.vision.intermediate, facts.hidden
    shapes = 4 * [(across, across)] + [(inner, across), (across, inner)]
    projector = zip(PROJECTOR_MATRICES, ((hidden, across), (hidden, hidden)), strict=True)
    return [*[*zip(TOWER_MATRICES, shapes, strict=True)] * facts.vision.layers, *projector]


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
