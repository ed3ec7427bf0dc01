"""Times a bundle's prefill by segment, alternately with the unpruned bundle. Knows clocks and FLOPs.

What is timed does not depend on what is in the image, so a seeded noise image and filler text will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokprune.runtime import metrics, names
from tokprune.runtime.errors import UserError
from tokprune.runtime.pipeline import Meter, Pipeline


@dataclass
class Timing:
    """Meters of several rounds of one pipeline, prefill and decode steps apart."""

    prefill: list[Meter]
    decode: list[Meter]

    def ms(self, segment: str) -> np.ndarray:
        """Milliseconds of one segment's prefill, by round."""
        return np.array([meter.ms[segment] for meter in self.prefill])

    def decoder_ms(self) -> np.ndarray:
        """Milliseconds of decoders and selectors in prefill, by round."""
        return np.array([sum(ms for name, ms in meter.ms.items() if _in_decoder(name)) for meter in self.prefill])

    def selector_shares(self) -> np.ndarray:
        """Share of the selectors in the time of all segments in prefill, by round."""
        return np.array(
            [
                sum(ms for name, ms in meter.ms.items() if name.startswith("select_")) / sum(meter.ms.values())
                for meter in self.prefill
            ]
        )

    def decoder_flops(self) -> int:
        """FLOPs of decoders and selectors in prefill."""
        return sum(count for name, count in self.prefill[0].flops.items() if _in_decoder(name))


def bench(
    pruned: Pipeline,
    full: Pipeline | None,
    *,
    text_tokens: int,
    rounds: int,
    new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The object that ``tokprune bench --json`` prints; ``full`` is the same model exported with method none.

    The two take turns, so that a drift of the machine's speed meets both. Without ``full`` there is no
    speed-up to tell. Raises UserError if ``full`` prunes, or is another model.
    """
    if full is not None:
        if full.manifest.plan.stages:
            raise UserError(
                f"{full.bundle.path} prunes ({full.manifest.plan}): give a bundle exported with --method none"
            )
        if full.facts != pruned.facts or _precision(full) != _precision(pruned):
            raise UserError(f"{full.bundle.path} is another model, or another precision, than {pruned.bundle.path}")
    pipelines = [pruned] if full is None else [pruned, full]
    count = text_tokens + pruned.facts.vision.tokens + new_tokens
    capacity = min(pipeline.manifest.limits.max_kv_capacity for pipeline in pipelines)
    if count > capacity:
        raise UserError(
            f"--text-tokens {text_tokens} and --new-tokens {new_tokens} make {count} tokens with an image, the model's "
            f"context, or the bundle's KV cache, is {capacity}: ask for fewer"
        )
    timings = [Timing([], []) for _ in pipelines]
    for number in range(rounds + 2):  # the first two warm up: allocations, thread pools
        # who goes first changes from round to round
        order = list(zip(pipelines, timings, strict=True))[:: 1 if number % 2 else -1]
        for pipeline, timing in order:
            prefill, decode = _measure(pipeline, text_tokens, new_tokens)
            if number >= 2:
                timing.prefill.append(prefill)
                timing.decode.append(decode)
        progress(number + 1)
    return _report(pruned, timings, text_tokens, rounds, new_tokens)


def _precision(pipeline: Pipeline) -> tuple[str, str]:
    return pipeline.manifest.precision, pipeline.manifest.base


def _measure(pipeline: Pipeline, text_tokens: int, new_tokens: int) -> tuple[Meter, Meter]:
    facts = pipeline.facts
    noise = np.random.default_rng(0).standard_normal((1, 3, facts.vision.image_size, facts.vision.image_size))
    filler = 0 if facts.image_token_id != 0 else 1
    ids = [filler] + [facts.image_token_id] * facts.vision.tokens + [filler] * (text_tokens - 1)
    prefill, decode = Meter(), Meter()
    state = pipeline.new_state()
    features = pipeline.encode_images(noise.astype(np.float32), prefill)
    logits, _ = pipeline.forward(state, [ids], prefill, image_features=features)
    for _ in range(new_tokens):
        logits, _ = pipeline.forward(state, [[int(logits[0, -1].argmax())]], decode)
    return prefill, decode


def _report(pruned: Pipeline, timings: list[Timing], text_tokens: int, rounds: int, new_tokens: int) -> dict[str, Any]:
    mine = timings[0]
    peak = pruned.backend.peak_tflops if pruned.manifest.base == "fp16" else None
    segments = []
    for name, count in mine.prefill[0].flops.items():
        ms = mine.ms(name)
        median = float(np.median(ms))
        segments.append(
            {
                "name": name,
                "ms_median": median,
                "ms_p90": float(np.percentile(ms, 90)),
                "gflops": count / 1e9,
                "achieved_tflops": count / median / 1e9,
                "peak_share": None if peak is None else count / median / 1e9 / peak,
            }
        )
    result: dict[str, Any] = {
        "engine": pruned.backend.name,
        "plan": str(pruned.manifest.plan),
        "rounds": rounds,
        "text_tokens": text_tokens,
        "segments": segments,
        "decoder_ms_median": float(np.median(mine.decoder_ms())),
        "selector_share": float(np.median(mine.selector_shares())),
        "peak_tflops": peak,
        "remarks": list(pruned.backend.remarks),
        "decode_ms_per_token": _decode_ms(mine, new_tokens),
        "decoder_speedup": None,
        "theoretical_decoder_speedup": None,
        "realised_share": None,
    }
    if len(timings) == 2:
        full = timings[1]
        ours, theirs = float(np.median(mine.decoder_ms())), float(np.median(full.decoder_ms()))
        result["decoder_ms_median_full"] = theirs
        result["decode_ms_per_token_full"] = _decode_ms(full, new_tokens)
        result["decoder_speedup"] = theirs / ours
        result["theoretical_decoder_speedup"] = full.decoder_flops() / mine.decoder_flops()
        result["realised_share"] = metrics.realised_share(ours, theirs, mine.decoder_flops(), full.decoder_flops())
    return result


def _decode_ms(timing: Timing, new_tokens: int) -> float | None:
    return float(np.median([sum(meter.ms.values()) / new_tokens for meter in timing.decode])) if new_tokens else None


def _in_decoder(segment: str) -> bool:
    return segment not in (names.VISION_ENCODER, names.EMBED_TOKENS)
