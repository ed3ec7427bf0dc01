"""What a contestant is asked for and what it answers. Knows no library: peers have environments of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """``text`` is the question; ``prompt`` the same in the model's chat format, with its ``<image>``; ``tokens`` its
    length, N for the image. ``threads`` are those of every contestant."""

    text: str
    prompt: str
    tokens: int
    new_tokens: int
    threads: int


@dataclass
class Taken:
    """One question's times in ms; ``tokens`` are the ``new_tokens`` greedy ones, whatever they say.

    ``ttft`` is None of a contestant that does not see the image itself. It is from the opened image and the text to
    the first token; ``vision`` and ``prefill`` (decoder, selector and embedding) are parts of it, None where a library
    does not tell. ``decode`` is the mean of a decode step. ``logits`` [V] are the first token's, None if the library
    keeps them to itself: its module then has ``first_logits(job, task)``, which gives them and the greedy tokens.
    """

    ttft: float | None
    vision: float | None
    prefill: float | None
    decode: float
    tokens: list[int] = field(default_factory=list)
    logits: Any = None

    def record(self) -> dict[str, Any]:
        """All but the logits, in JSON's types."""
        return {key: value for key, value in vars(self).items() if key != "logits"}


class Runner(Protocol):
    """A loaded contestant."""

    versions: dict[str, str]
    facts: dict[str, Any]  # decode_bytes: of the weights that a decode step reads; notes a reader must know

    def answer(self, image: str, task: Task) -> Taken:
        """Answer about the image file, ``task.new_tokens`` tokens long."""


def greedy(first: int, step: Callable[[int], int], count: int) -> tuple[list[int], float]:
    """``count`` tokens, EOS or not, of which ``first`` is there: (tokens, mean ms of a step)."""
    tokens, begin = [first], time.perf_counter()
    while len(tokens) < count:
        tokens.append(step(tokens[-1]))
    return tokens, 1e3 * (time.perf_counter() - begin) / max(1, count - 1)
