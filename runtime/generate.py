"""Token by token: sampling and the loop around decode steps. Knows logits and ids; knows no text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import check_rows
from tokprune.runtime.pipeline import Meter, Pipeline, Pruned, State


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_p`` in (0, 1]."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} was asked for: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} was asked for: give a number above 0 and up to 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} was asked for: give 0 or a positive number")


class Sampler:
    """Chooses tokens; two samplers made alike choose alike."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """Choose from logits [V]: the lowest of the best ids, or by temperature and nucleus (Holtzman 2020)."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self._sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        # the nucleus is the shortest prefix that reaches top_p: those whose mass before them is still below it
        mass_before = np.cumsum(probabilities[order]) - probabilities[order]
        nucleus = order[mass_before < self._sampling.top_p]
        weights = probabilities[nucleus] / probabilities[nucleus].sum()
        return int(self._random.choice(nucleus, p=weights))


@dataclass
class Generation:
    """What one turn of a sequence gave, and what it took. ``stop`` is "eos", "length" or "context".

    Times are milliseconds; the prefill's meter includes the vision tower. In a batch, times, steps and meters are the
    whole batch's, the same for each of its sequences.
    """

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)  # without the end-of-sequence token
    pruned: list[Pruned] = field(default_factory=list)
    stop: str = ""
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0
    prefill: Meter = field(default_factory=Meter)
    decode: Meter = field(default_factory=Meter)


def generate(
    pipeline: Pipeline,
    state: State,
    prompts: Sequence[Sequence[int]],
    results: Sequence[Generation],
    *,
    unread: Sequence[int] = (),
    pixel_values: np.ndarray | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    started: float | None = None,
) -> Iterator[list[int | None]]:
    """Append ``prompts`` [B] to the sequences and yield each step's tokens [B], filling ``results`` [B].

    A sequence that has ended yields None; EOS is not yielded. ``pixel_values`` [I, 3, H, W] are the images of all
    prompts, in order. Each sequence has a sampler of its own, so an answer does not depend on the batch it is in.
    ``unread`` is what the turn before yielded last in a sequence on its own, if it was never fed back: it is read
    first, by itself, because an image token that the model wrote is none of this turn's images.
    ``started`` is the ``time.perf_counter()`` that time to first token counts from. Afterwards the caches of a
    sequence on its own hold the prompt and every yielded token but the last; ``State`` can take a next turn. Those of
    a batch cannot: a sequence that has ended is fed on until the last one has.
    Raises UserError if the prompts are longer than the bundle's limits.
    """
    begin = time.perf_counter() if started is None else started
    longest = max(map(len, prompts))
    check_rows(pipeline.manifest, state.rows + len(unread), longest, room=1)
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} new tokens were asked for: give at least 1")
    samplers = [Sampler(sampling or Sampling()) for _ in prompts]
    prefill, decode = Meter(), Meter()
    for result in results:
        result.prefill, result.decode = prefill, decode
    features = None if pixel_values is None else pipeline.encode_images(pixel_values, prefill)
    if unread:
        pipeline.forward(state, [unread], prefill)
    logits, pruned = pipeline.forward(state, prompts, prefill, image_features=features)
    tokens = [sampler.choose(rows[-1]) for sampler, rows in zip(samplers, logits, strict=True)]
    ttft_ms = 1e3 * (time.perf_counter() - begin)
    for result, records in zip(results, pruned, strict=True):
        result.pruned, result.ttft_ms = records, ttft_ms
    while True:
        step: list[int | None] = [None] * len(tokens)
        for index, (result, token) in enumerate(zip(results, tokens, strict=True)):
            if not result.stop and token in pipeline.facts.eos_token_ids:
                result.stop = "eos"
            elif not result.stop:
                result.token_ids.append(token)
                step[index] = token
        if all(result.stop for result in results):
            return
        yield step
        for result in results:
            if not result.stop and len(result.token_ids) == max_new_tokens:
                result.stop = "length"
            elif not result.stop and state.rows == pipeline.manifest.limits.max_kv_capacity:
                result.stop = "context"
        if all(result.stop for result in results):
            return
        begin = time.perf_counter()
        logits, _ = pipeline.forward(state, [[token] for token in tokens], decode)
        for index, (result, sampler) in enumerate(zip(results, samplers, strict=True)):
            if not result.stop:
                tokens[index] = sampler.choose(logits[index, -1])
        step_ms = 1e3 * (time.perf_counter() - begin)
        for result in results:
            result.decode_ms += step_ms
            result.decode_steps += 1
