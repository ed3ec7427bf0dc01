"""How much memory a LLaVA-1.5 takes, with and without pruning: weights, KV caches, activations, predicted peaks.

Everything is in bytes, 10⁹ a GB. Letters are those of ``names``. Weights and caches are exact; activations are an
estimate: what the largest step of a segment holds at once if nothing is fused, and no engine is asked. Peaks add
them up by rules that are stated where they stand. Knows sizes and plans; opens no graph, and knows no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokprune.runtime import leverage, names
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest, ModelFacts, SegmentWeights
from tokprune.runtime.plan import Plan
from tokprune.runtime.weights import closed_integers, closed_weights, default_base, segment_order

TEXT_TOKENS = 36  # with 576 visual tokens n = 612, which FastV's published table assumes
NEW_TOKENS = 128  # what `run` generates at most if nothing else is said
# An engine's build was seen to take 3 to 4 times its weights by users of TensorRT on Jetson; the larger is planned for.
BUILD_FACTOR = 4
# Measured with ONNX Runtime 1.31 (docs/jetson.md): its arenas grow in powers of two, and weights that are transposed
# when loaded lie in them; two models took 1.15 and 1.19 times the sum.
ARENA_FACTOR = 1.2


@dataclass(frozen=True)
class Work:
    """What a plan is made for: prompts of M ``text_tokens`` and I ``images``, B at a time, and their answers."""

    text_tokens: int = TEXT_TOKENS
    new_tokens: int = NEW_TOKENS
    images: int = 1  # in each prompt
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("text_tokens", 1), ("new_tokens", 0), ("images", 0), ("batch", 1)):
            if getattr(self, name) < least:
                what = name.replace("_", " ")
                raise UserError(f"{getattr(self, name)} {what} were asked for: give {least} or more")

    def length(self, facts: ModelFacts) -> int:
        """Tokens of a prompt and its answer."""
        return self.text_tokens + self.images * facts.vision.tokens + self.new_tokens

    def check_fits(self, facts: ModelFacts, capacity: int) -> None:
        """Raise UserError if a prompt with its answer is longer than the model's context, or the KV cache."""
        length = self.length(facts)
        if length > min(facts.context, capacity):
            whose = facts.name if capacity >= facts.context else "the KV cache"
            raise UserError(
                f"prompt and answer of {length} tokens were asked for, {self.images * facts.vision.tokens} of them "
                f"visual, but {whose} has room for {min(facts.context, capacity)}: ask for fewer"
            )


def usual_work(facts: ModelFacts, capacity: int | None = None) -> Work:
    """One prompt with one image and its answer, as long as by default or as context and ``capacity`` let them be."""
    most = facts.context if capacity is None else min(facts.context, capacity)
    images = 1 if facts.vision.tokens < most else 0
    room = most - images * facts.vision.tokens
    text = min(TEXT_TOKENS, room)
    return Work(text, min(NEW_TOKENS, room - text), images)


# --- caches -----------------------------------------------------------------------------------------


def kv_bytes_per_token(facts: ModelFacts, plan: Plan, precision: str) -> dict[str, int]:
    """Of one token in each decoder segment: keys and values of its layers. INT8 and INT4 keep FP16 caches."""
    row = 2 * facts.kv_heads * facts.head_dim * (4 if precision == "fp32" else 2)
    return {names.decoder(index): (stop - first) * row for index, first, stop in plan.segments(facts.layers)}


def kv_bytes(facts: ModelFacts, plan: Plan, precision: str, work: Work) -> dict[str, int]:
    """Of each decoder segment's caches when the answer is whole: all visual rows before a stage, the kept ones after.

    The difference is what pruning saves: 7B in FP16 takes 0.5 MiB a token in all its layers.
    """
    per_token = kv_bytes_per_token(facts, plan, precision)
    rows = _rows(facts, plan, work)
    return {
        names.decoder(index): work.batch * (rows[index] + work.new_tokens) * per_token[names.decoder(index)]
        for index, _, _ in plan.segments(facts.layers)
    }


def _rows(facts: ModelFacts, plan: Plan, work: Work) -> list[int]:
    """Prompt rows of one sequence in front of the first stage, and behind each."""
    visual = [facts.vision.tokens, *(stage.keep for stage in plan.stages)]
    return [work.text_tokens + work.images * tokens for tokens in visual]


# --- activations ------------------------------------------------------------------------------------


def activation_bytes(facts: ModelFacts, plan: Plan, precision: str, work: Work) -> dict[str, int]:
    """Estimated peak of each segment in prefill, inputs and outputs included, weights and caches not.

    Of a layer it is the larger of attention and MLP: five widths beside scores, which stand twice in FP32, before and
    behind the softmax; or two widths beside three of the MLP (gate, up or sigmoid, product). Fused attention takes
    less. Without an image only ``embed_tokens`` and the decoders run.
    """
    width, rows = 4 if precision == "fp32" else 2, _rows(facts, plan, work)
    found = {names.EMBED_TOKENS: work.batch * rows[0] * (8 + width * facts.hidden)}
    if work.images:
        found[names.VISION_ENCODER] = work.batch * work.images * _vision_activations(facts, width)
    for index, _, stop in plan.segments(facts.layers):
        found[names.decoder(index)] = work.batch * _decoder_activations(facts, rows[index], width, stop)
    for index in range(len(plan.stages) if work.images else 0):
        states = width * facts.hidden * (rows[index] + rows[index + 1])
        workspace = work.images * selector_workspace(facts, plan, index, work.text_tokens)
        found[names.select(index)] = work.batch * (states + workspace)
    return {name: found[name] for name in segment_order(facts, plan) if name in found}


def _vision_activations(facts: ModelFacts, width: int) -> int:
    """Of one image."""
    vision = facts.vision
    rows = vision.tokens + 1
    attention = 5 * rows * vision.hidden * width + 2 * 4 * vision.heads * rows * rows
    mlp = rows * width * (2 * vision.hidden + 3 * vision.intermediate)
    projector = vision.tokens * width * (vision.hidden + 3 * facts.hidden)
    return 3 * vision.image_size**2 * width + max(attention, mlp, projector)


def _decoder_activations(facts: ModelFacts, rows: int, width: int, stop: int) -> int:
    """Of one sequence of S ``rows`` in a prefill, with the logits of one position."""
    states, inner = rows * facts.hidden * width, rows * facts.intermediate * width
    scores = 2 * 4 * facts.heads * rows * rows
    mask = rows * rows * (width + 1)
    logits = 4 * facts.vocabulary if stop == facts.layers else 0
    return mask + max(5 * states + scores, 2 * states + 3 * inner) + logits


def selector_workspace(facts: ModelFacts, plan: Plan, index: int, text_tokens: int) -> int:
    """Estimated bytes that a selector takes for one image beside the states: it computes in FP32.

    lofi: X, its transpose, XXᵀ where that is formed, and five [N, q] of the subspace. lvpruning: X and M text rows,
    normalised too, five inner widths, the attention's shares twice, the MLP. Others: scores.
    """
    tokens = plan.stages[index - 1].keep if index else facts.vision.tokens
    values = 2 * tokens
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        settings = leverage.Settings()
        q = leverage.subspace_width(tokens, facts.hidden, plan.rank.components, settings)
        rounds = leverage.rounds(plan.rank.components, settings)
        gram = tokens * tokens if leverage.forms_gram(tokens, facts.hidden, q, rounds) else 0
        values += 2 * tokens * facts.hidden + gram + 5 * tokens * q + facts.hidden * q
    if plan.module is not None:
        both = tokens + text_tokens
        values += 2 * both * facts.hidden + 5 * both * plan.module.width
        values += 2 * plan.module.heads * tokens * text_tokens + 2 * tokens * plan.module.intermediate
    return 4 * values


# --- the plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by segment for one model, pruning plan, precision and work; and what engines make of them.

    ``base`` is the precision of all but the decoder layers' matrices, of caches and activations too. ``capacity`` is
    the tokens of a sequence that TensorRT's caches are made for, visual ones counted before pruning. ``integers`` are
    those bytes of the weights that are codes and scales.
    """

    facts: ModelFacts
    plan: Plan
    precision: str
    base: str
    work: Work
    capacity: int
    weights: tuple[SegmentWeights, ...]
    integers: int
    caches: Mapping[str, int]
    activations: Mapping[str, int]

    @property
    def weights_bytes(self) -> int:
        return sum(segment.total for segment in self.weights)

    @property
    def largest_weight(self) -> SegmentWeights:
        """The segment that holds the largest single weight; of several the last, which has ``lm_head``."""
        return max(reversed(self.weights), key=lambda segment: segment.largest_bytes)

    @property
    def onnxruntime_cpu_bytes(self) -> int:
        """Predicted peak on ONNX Runtime's CPU provider over what its libraries take.

        A decoder writes its caches anew beside the old ones. Each session keeps what its arena once had, so
        activations of all segments add up; ARENA_FACTOR is what arenas round up. FP16 is computed in FP32, for which
        weights are converted when loaded; codes of INT8 and INT4 stay as small as they are.
        """
        weights = self.integers + (self.weights_bytes - self.integers) * (2 if self.base == "fp16" else 1)
        caches = sum(self.caches.values()) + max(self.caches.values())
        activations = activation_bytes(self.facts, self.plan, "fp32", self.work)
        return round(ARENA_FACTOR * (weights + caches + sum(activations.values())))

    @property
    def tensorrt_bytes(self) -> int:
        """Predicted peak on TensorRT over what its libraries take: weights, caches, activations.

        Execution contexts, of which one runs at a time, share the memory of the greediest.
        """
        return self.weights_bytes + self.tensorrt_cache_bytes + max(self.activations.values())

    @property
    def tensorrt_cache_bytes(self) -> int:
        """What TensorRT's caches take: full ones of all decoders, from the first token on, and the row of a step.

        Rows are copied into their places and laid out within the same memory.
        """
        new_tokens = self.capacity - self.work.length(self.facts) + self.work.new_tokens
        caches = kv_bytes(self.facts, self.plan, self.base, replace(self.work, new_tokens=new_tokens)).values()
        row = kv_bytes_per_token(self.facts, self.plan, self.base).values()
        return sum(caches) + self.work.batch * sum(row)

    @property
    def build_bytes(self) -> int:
        """Predicted peak of building engines one after another: BUILD_FACTOR times the largest segment's weights."""
        return BUILD_FACTOR * max(segment.total for segment in self.weights)

    def record(self) -> dict[str, Any]:
        """All of it under the keys of ``tokprune memory --json``."""
        unpruned = kv_bytes(self.facts, Plan("none"), self.base, self.work)
        largest = self.largest_weight
        return {
            "model": self.facts.name,
            "plan": str(self.plan),
            "precision": self.precision,
            "base": self.base,
            "text_tokens": self.work.text_tokens,
            "visual_tokens": self.work.images * self.facts.vision.tokens,
            "new_tokens": self.work.new_tokens,
            "batch": self.work.batch,
            "max_kv_capacity": self.capacity,
            "weights_bytes": {segment.segment: segment.total for segment in self.weights},
            "largest_weight": {"name": largest.largest, "segment": largest.segment, "bytes": largest.largest_bytes},
            "kv_bytes_per_token": kv_bytes_per_token(self.facts, self.plan, self.base),
            "kv_bytes": dict(self.caches),
            "kv_bytes_unpruned": sum(unpruned.values()),
            "kv_bytes_tensorrt": self.tensorrt_cache_bytes,
            "activation_bytes": dict(self.activations),
            "peak_bytes": {"onnxruntime_cpu": self.onnxruntime_cpu_bytes, "tensorrt": self.tensorrt_bytes},
            "build_bytes": self.build_bytes,
        }


def memory_plan(
    facts: ModelFacts,
    plan: Plan,
    precision: str,
    work: Work | None = None,
    weights: tuple[SegmentWeights, ...] | None = None,
    capacity: int | None = None,
    base: str | None = None,
    head: str | None = None,
    tower: str | None = None,
    integers: int | None = None,
) -> MemoryPlan:
    """Plan ``work``, the usual if None; ``weights`` are a bundle's own, without them they are computed.

    ``capacity`` None is the model's context, as export chooses it, ``base`` None `default_base`, ``head`` the precision
    of ``lm_head``, ``tower`` that of vision tower and projector, None the base; ``integers`` are a bundle's own bytes
    of codes and scales. Raises UserError if prompt and answer do not fit the capacity.
    """
    capacity = facts.context if capacity is None else capacity
    base = base or default_base(precision)
    work = work or usual_work(facts, capacity)
    work.check_fits(facts, capacity)
    return MemoryPlan(
        facts,
        plan,
        precision,
        base,
        work,
        capacity,
        weights or closed_weights(facts, plan, precision, base, head, tower),
        closed_integers(facts, precision, base, head, tower) if integers is None else integers,
        kv_bytes(facts, plan, base, work),
        activation_bytes(facts, plan, base, work),
    )


def from_manifest(manifest: Manifest, work: Work | None = None, integers: int | None = None) -> MemoryPlan:
    """The plan of a bundle, with the weights that its graphs have and the caches that its limits allow.

    ``integers`` are its recipe's; None is as if only the decoder layers were rounded.
    """
    return memory_plan(
        manifest.model,
        manifest.plan,
        manifest.precision,
        work,
        manifest.memory,
        manifest.limits.max_kv_capacity,
        manifest.base,
        integers=integers,
    )
