"""Token by token: sampling and the loop around decode steps. Knows logits and ids; knows no text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokprune.runtime.errors import UserError
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
    """What one turn gave and what it took. ``stop`` is "eos", "length" or "context".

    Times are milliseconds; the prefill's meter includes the vision tower.
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
    ids: Sequence[int],
    result: Generation,
    *,
    unread: Sequence[int] = (),
    pixel_values: np.ndarray | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    started: float | None = None,
) -> Iterator[int]:
    """Append ``ids`` to the sequence and yield new tokens, filling ``result``; EOS is not yielded.

    ``unread`` is what the turn before yielded last, if it was never fed back: it is read first, on its own,
    because an image token that the model wrote is none of this turn's images.
    ``started`` is the ``time.perf_counter()`` that time to first token counts from. Afterwards the caches
    hold the prompt and every yielded token but the last; ``State`` can take a next turn.
    Raises UserError if the prompt does not fit the model's context.
    """
    begin = time.perf_counter() if started is None else started
    context = pipeline.facts.context
    length = state.position + len(unread) + len(ids)
    if length >= context:
        raise UserError(
            f"the prompt has {length} tokens with its images and earlier turns, the model's context "
            f"is {context}: give a shorter prompt"
        )
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} new tokens were asked for: give at least 1")
    sampler = Sampler(sampling or Sampling())
    features = None if pixel_values is None else pipeline.encode_images(pixel_values, result.prefill)
    if unread:
        pipeline.forward(state, unread, result.prefill)
    logits, result.pruned = pipeline.forward(state, ids, result.prefill, image_features=features)
    token = sampler.choose(logits[-1])
    result.ttft_ms = 1e3 * (time.perf_counter() - begin)
    while True:
        if token in pipeline.facts.eos_token_ids:
            result.stop = "eos"
            return
        result.token_ids.append(token)
        yield token
        if len(result.token_ids) == max_new_tokens:
            result.stop = "length"
            return
        if state.position == context:
            result.stop = "context"
            return
        begin = time.perf_counter()
        logits, _ = pipeline.forward(state, [token], result.decode)
        token = sampler.choose(logits[-1])
        result.decode_ms += 1e3 * (time.perf_counter() - begin)
        result.decode_steps += 1
