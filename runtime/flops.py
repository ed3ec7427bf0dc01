"""How many FLOPs a LLaVA-1.5 takes, exactly, with and without pruning; and the literature's forms of it.

A FLOP count here is 2 per multiply-add of every MatMul, Gemm and Conv at its true shape: what is added
as a bias or done element by element (norms, softmax, activations, rotary products) is not counted.
Attention counts as the graphs compute it, the full S×(P+S) square, the masked half included.
Letters are those of ``names``. Knows sizes and plans; opens no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.runtime import leverage, names
from tokprune.runtime.manifest import Manifest, ModelFacts, VisionFacts
from tokprune.runtime.plan import Module, Plan


def _llava_15(name: str, layers: int, hidden: int, intermediate: int, heads: int) -> ModelFacts:
    return ModelFacts(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        vocabulary=32064,
        context=4096,
        vision=VisionFacts(image_size=336, patch_size=14, layers=23, hidden=1024, intermediate=4096, heads=16),
        image_token_id=32000,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


SEVEN_B = _llava_15("LLaVA-1.5-7B", layers=32, hidden=4096, intermediate=11008, heads=32)
THIRTEEN_B = _llava_15("LLaVA-1.5-13B", layers=40, hidden=5120, intermediate=13824, heads=40)


# --- closed forms of the segments -------------------------------------------------------------------


def vision_encoder_flops(facts: ModelFacts, images: int = 1) -> int:
    """FLOPs of tower and projector on I images: patches [N, 3p²] -> features [N, D].

    The tower's layers run on N + 1 rows (class token), the projector on N.
    """
    vision = facts.vision
    n, width = vision.tokens, vision.hidden
    rows = n + 1
    patches = 2 * n * 3 * vision.patch_size**2 * width
    layer = 4 * 2 * rows * width * width  # q, k, v and out
    layer += 2 * 2 * rows * rows * width  # QKᵀ and PV over all heads
    layer += 2 * 2 * rows * width * vision.intermediate  # fc1 and fc2
    projector = 2 * n * (width * facts.hidden + facts.hidden * facts.hidden)
    return images * (patches + vision.layers * layer + projector)


def decoder_layer_flops(facts: ModelFacts, rows: int, past: int) -> int:
    """FLOPs of one decoder layer on S ``rows`` with P rows ``past`` in its cache."""
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    total = 2 * rows * facts.hidden * queries  # q
    total += 2 * 2 * rows * facts.hidden * keys  # k and v
    total += 2 * 2 * rows * (past + rows) * queries  # QKᵀ and PV; every query head sees its (repeated) keys
    total += 2 * rows * queries * facts.hidden  # o
    total += 3 * 2 * rows * facts.hidden * facts.intermediate  # gate, up and down
    return total


def decoder_flops(facts: ModelFacts, first: int, stop: int, rows: int, past: int, logits_rows: int) -> int:
    """FLOPs of decoder layers [first, stop), with lm_head on T ``logits_rows`` if the last is among them."""
    total = (stop - first) * decoder_layer_flops(facts, rows, past)
    if stop == facts.layers:
        total += 2 * logits_rows * facts.hidden * facts.vocabulary
    return total


def attention_row_flops(facts: ModelFacts, rows: int, past: int) -> int:
    """FLOPs of fastv's attention row, which each call of a decoder in front of a stage computes: q Kᵀ of one query."""
    return 2 * facts.heads * facts.head_dim * (past + rows)


def module_flops(tokens: int, hidden: int, text_tokens: int, module: Module) -> int:
    """FLOPs of one run of an lvpruning selector on one image's N visual ``tokens`` and M ``text_tokens``."""

    def product(rows: int, inner: int, columns: int) -> int:
        return 2 * rows * inner * columns if inner > 1 else 0  # where nothing is added up, nothing counts

    width, text = module.width, text_tokens
    total = product(tokens, hidden, width) + product(text, hidden, width)  # visual_proj and text_proj
    total += (2 * tokens + 2 * text) * product(1, width, width)  # q and o; k and v
    total += tokens * text * module.heads * product(1, width // module.heads, 1)  # QKᵀ
    total += 2 * tokens * text * width  # PV, whose contraction M is open and counts even where it is 1
    total += product(tokens, width, module.intermediate) + product(tokens, module.intermediate, width)  # up and down
    return total + product(tokens, width, 2)  # head


def selector_flops(facts: ModelFacts, plan: Plan, tokens: int, text_tokens: int) -> int:
    """FLOPs of a stage's selector on one image, of which N visual ``tokens`` enter it beside ``text_tokens``."""
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        return leverage.flops(tokens, facts.hidden, plan.rank.components)
    if plan.method == "lvpruning":
        assert plan.module is not None  # make_plan saw to it
        return module_flops(tokens, facts.hidden, text_tokens, plan.module)
    return 0  # fastv, random and uniform multiply nothing


# --- a whole model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlopsCounter:
    """FLOPs of a model under a plan. ``segment`` counts one run of a segment, given its axes by name."""

    facts: ModelFacts
    plan: Plan
    segment: Callable[[str, Mapping[str, int]], int]

    def rows(self, text_tokens: int, images: int = 1) -> list[int]:
        """Rows of the sequence in front of the first stage, and behind each stage."""
        visual = [self.facts.vision.tokens, *(stage.keep for stage in self.plan.stages)]
        return [text_tokens + images * tokens for tokens in visual]

    def prefill(self, text_tokens: int, images: int = 1, logits_rows: int = 1) -> dict[str, int]:
        """FLOPs of each segment, in the order it runs; without an image there is no tower and no selector."""
        rows = self.rows(text_tokens, images)
        decoders = self._prefill(rows, images, logits_rows)
        if not images:
            return decoders
        counts = {name: decoders.pop(name) for name in (names.VISION_ENCODER, names.EMBED_TOKENS)}
        for index, kept_rows in enumerate(rows):
            if index:
                name = names.select(index - 1)
                counts[name] = self._run(
                    name, rows=rows[index - 1], images=images, kept_rows=kept_rows, text_rows=text_tokens
                )
            if names.decoder(index) in decoders:
                counts[names.decoder(index)] = decoders[names.decoder(index)]
        return counts

    def unpruned_prefill(self, text_tokens: int, images: int = 1, logits_rows: int = 1) -> dict[str, int]:
        """FLOPs of the same segments if no stage pruned: all rows in every decoder, and no selector.

        fastv's attention rows are part of its segments and counted here too: under a millionth of a 7B prefill.
        """
        rows = self.rows(text_tokens, images)
        return self._prefill([rows[0]] * len(rows), images, logits_rows)

    def _prefill(self, rows: list[int], images: int, logits_rows: int) -> dict[str, int]:
        """All but the selectors, ``rows[i]`` being those of decoder i."""
        counts = {names.VISION_ENCODER: self._run(names.VISION_ENCODER, images=images)} if images else {}
        counts[names.EMBED_TOKENS] = self._run(names.EMBED_TOKENS, rows=rows[0])
        for index, _, _ in self.plan.segments(self.facts.layers):
            name = names.decoder(index)
            counts[name] = self._run(name, rows=rows[index], logits_rows=logits_rows)
        return counts

    def decode(self, text_tokens: int, images: int = 1, generated: int = 0) -> int:
        """FLOPs of one decode step, ``generated`` tokens being in the caches behind the prompt's rows."""
        return self._decode([rows + generated for rows in self.rows(text_tokens, images)])

    def unpruned_decode(self, text_tokens: int, images: int = 1, generated: int = 0) -> int:
        """FLOPs of one decode step if no stage had pruned: every cache holds all rows."""
        rows = self.rows(text_tokens, images)
        return self._decode([rows[0] + generated] * len(rows))

    def _decode(self, past: list[int]) -> int:
        """One row through all decoders, ``past[i]`` rows being in the cache of decoder i."""
        total = self._run(names.EMBED_TOKENS, rows=1)
        for index, _, _ in self.plan.segments(self.facts.layers):
            total += self._run(names.decoder(index), rows=1, past=past[index])
        return total

    def _run(
        self,
        name: str,
        rows: int = 0,
        past: int = 0,
        images: int = 0,
        kept_rows: int = 0,
        text_rows: int = 0,
        logits_rows: int = 1,
    ) -> int:
        axes = {
            names.BATCH: 1,
            names.SEQUENCE: rows,
            names.PAST: past,
            names.TOTAL: past + rows,
            names.IMAGES: images,
            names.ROWS: kept_rows,
            names.TEXT_ROWS: text_rows,
            names.LOGITS_COUNT: logits_rows,
        }
        return self.segment(name, axes)


def closed_form(facts: ModelFacts, plan: Plan) -> FlopsCounter:
    """Count by the closed forms above."""
    spans = {names.decoder(index): (first, stop) for index, first, stop in plan.segments(facts.layers)}
    tokens = [facts.vision.tokens, *(stage.keep for stage in plan.stages)]
    selectors = {names.select(index): tokens[index] for index in range(len(plan.stages))}

    def segment(name: str, axes: Mapping[str, int]) -> int:
        if name in spans:
            rows, past, logits_rows = axes[names.SEQUENCE], axes[names.PAST], axes[names.LOGITS_COUNT]
            total = decoder_flops(facts, *spans[name], rows, past, logits_rows)
            if plan.method == "fastv" and spans[name][1] < facts.layers:
                total += attention_row_flops(facts, rows, past)
            return total
        if name in selectors:
            return axes[names.IMAGES] * selector_flops(facts, plan, selectors[name], axes[names.TEXT_ROWS])
        return vision_encoder_flops(facts, axes[names.IMAGES]) if name == names.VISION_ENCODER else 0

    return FlopsCounter(facts, plan, segment)


def from_manifest(manifest: Manifest) -> FlopsCounter:
    """Count by what export has counted from the graphs of a bundle, its selectors included."""

    def segment(name: str, axes: Mapping[str, int]) -> int:
        return manifest.segment(name).count_flops(**axes)

    return FlopsCounter(manifest.model, manifest.plan, segment)


# --- the literature's forms -------------------------------------------------------------------------


def form_a(n: float, d: int, m: int) -> float:
    """One layer on n tokens as FastV (arXiv 2403.06764) counts it: 4nd² + 2n²d + 2ndm.

    FastV calls them FLOPs; they are multiply-adds, with two of the gated MLP's three matrices.
    """
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def form_b(n: float, d: int, m: int) -> float:
    """One layer on n visual tokens as PyramidDrop (arXiv 2410.17247) counts it: 4nd² + 2n²d + 3ndm.

    These are multiply-adds: the FLOPs are twice as many.
    """
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def visual_spans(facts: ModelFacts, plan: Plan) -> list[tuple[int, int]]:
    """(number of layers, visual tokens in them) of each decoder segment of the plan."""
    tokens = [facts.vision.tokens, *(stage.keep for stage in plan.stages)]
    return [(stop - first, tokens[index]) for index, first, stop in plan.segments(facts.layers)]


def fastv_gflops_per_layer(facts: ModelFacts, spans: Iterable[tuple[int, float]], text_tokens: int) -> float:
    """Form A in 1e9, a mean over layers: Σ layers·F(text + visual) / T. FastV's Table 1, "Flops(B)".

    For FastV with its first K layers full and a share R pruned behind them the spans are (K, 576) and
    (T − K, 576·(1 − R)). Its printed figures come out with 36 text tokens, n = 612, and 576·(1 − R) as it
    is: at R = 90 %, 57.6 tokens give the published 29.7, a whole 57 or 58 would give 29.6 or 29.8.
    """
    total = sum(layers * form_a(text_tokens + n, facts.hidden, facts.intermediate) for layers, n in spans)
    return total / facts.layers / 1e9


def pyramid_tmacs(facts: ModelFacts, spans: Iterable[tuple[int, float]]) -> float:
    """Form B in 1e12 multiply-adds, summed over layers, visual tokens only."""
    return sum(layers * form_b(n, facts.hidden, facts.intermediate) for layers, n in spans) / 1e12


# --- the report ---------------------------------------------------------------------------------------


def summary(counter: FlopsCounter, text_tokens: int, selectors: str) -> dict[str, Any]:
    """The object that ``tokprune flops --json`` prints, for one image.

    ``selectors`` says how their FLOPs have been counted.
    """
    facts, plan = counter.facts, counter.plan
    segments = counter.prefill(text_tokens)
    unpruned = counter.unpruned_prefill(text_tokens)
    total, total_unpruned = sum(segments.values()), sum(unpruned.values())
    vision = segments[names.VISION_ENCODER]
    spans = visual_spans(facts, plan)
    return {
        "model": facts.name,
        "plan": str(plan),
        "method": plan.method,
        "stages": [{"layer": stage.layer, "kept": stage.keep} for stage in plan.stages],
        "text_tokens": text_tokens,
        "visual_tokens": facts.vision.tokens,
        "selectors": selectors,
        "prefill_tflops": total / 1e12,
        "prefill_tflops_unpruned": total_unpruned / 1e12,
        "reduction": 1 - total / total_unpruned,
        "decoder_reduction": 1 - (total - vision) / (total_unpruned - vision),
        "segments": {name: value / 1e12 for name, value in segments.items()},
        "segments_unpruned": {name: value / 1e12 for name, value in unpruned.items()},
        "decode_gflops_per_token": counter.decode(text_tokens) / 1e9,
        "decode_gflops_per_token_unpruned": counter.unpruned_decode(text_tokens) / 1e9,
        "form_a_gflops_per_layer": fastv_gflops_per_layer(facts, spans, text_tokens),
        "form_a_n": text_tokens + facts.vision.tokens,
        "form_b_tmacs": pyramid_tmacs(facts, spans),
    }
