"""Questions that a bundle has answered, and how much a changed one differs on them.

Consistency is with the same bundle unquantised, under the same pruning, forced on the tokens that it answers with: as
long as every best token is the same, so is the greedy answer. Knows pipelines; writes no bundle.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.calibration.mixed import BUDGET, VISION, Mixed, Times
from tokprune.runtime import metrics
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.pipeline import Meter, Pipeline, State

ANSWER = 8  # tokens of an answer
_REPEATS = {True: 7, False: 25}  # of a part that is timed: on a prompt, on one token


@dataclass(frozen=True)
class Difference:
    """Of ``samples`` answers: the share that stays the same, that of best tokens, and the mean KL in nats a token."""

    samples: int
    tokens: int
    agreement: float
    top1_agreement: float
    kl_mean: float

    def record(self) -> dict[str, Any]:
        """For ``--json``, with Wilson's 95 % interval of the agreement."""
        interval = metrics.wilson_interval(round(self.agreement * self.samples), self.samples)
        return dataclasses.asdict(self) | {"agreement_wilson95": list(interval)}


class Trial:
    """Questions with the unquantised bundle's answers, that any mix of parts can be held against.

    The answers' logits are kept in files, so that memory does not grow with the questions.
    """

    def __init__(self, base: Bundle, other: Bundle, samples: Sequence[Sample], budget: int = BUDGET) -> None:
        self.mixed = Mixed(base, other, budget)
        self._model = Model(base, pipeline=Pipeline(base, self.mixed))
        self._samples = samples
        self._folder = tempfile.TemporaryDirectory(prefix="tokprune-")
        self._features: dict[tuple[bool, tuple[Path, ...]], Any] = {}
        self._tokens: list[list[int]] = []

    def answer(self, progress: Callable[[], None]) -> None:
        """Ask the unquantised bundle; ``progress`` hears of each question."""
        self.mixed.rounded = frozenset()
        for number, sample in enumerate(self._samples):
            tokens, logits = greedy(self._model, sample, self._encode(sample))
            self._tokens.append(tokens)
            np.save(self._file(number), logits)
            progress()

    def difference(self, rounded: Iterable[str], progress: Callable[[], None]) -> Difference:
        """Of the mix in which the parts ``rounded`` are, to the unquantised bundle."""
        self.mixed.rounded = frozenset(rounded)
        return difference(self._model, self._samples, self._tokens, self._logits, self._encode, progress)

    def of(self, model: Model, progress: Callable[[], None]) -> Difference:
        """Of a bundle that is loaded, to the unquantised one."""
        return difference(model, self._samples, self._tokens, self._logits, None, progress)

    def time(self, parts: Iterable[str]) -> dict[str, Times]:
        """Time the parts in both forms, side by side, on the first prompt with an image and on one more token."""
        self.mixed.rounded, self.mixed.times = frozenset(), {part: Times() for part in parts}
        sample = next((sample for sample in self._samples if sample.images), self._samples[0])
        state = self._model.pipeline.new_state()
        for is_prompt in (True, False):
            self.mixed.repeats = _REPEATS[is_prompt]
            if is_prompt:
                _prefill(self._model, state, sample, _features(self._model, sample))
            else:
                self._model.pipeline.forward(state, [self._tokens[0][:1]], Meter())
        self.mixed.repeats = 0
        return self.mixed.times

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

    def _logits(self, number: int) -> np.ndarray:
        return np.load(self._file(number), mmap_mode="r")

    def _file(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.npy"

    def _encode(self, sample: Sample) -> Any:
        """Features of the sample's images; those of the last question asked are kept, since many ask of one image."""
        key = (VISION in self.mixed.rounded, sample.images)
        if key not in self._features:
            self._features = {key: _features(self._model, sample)}
        return self._features[key]


def greedy(model: Model, sample: Sample, features: Any) -> tuple[list[int], np.ndarray]:
    """The answer's tokens, its end among them, ``ANSWER`` at most; and the logits [T, V] that they came from."""
    pipeline = model.pipeline
    state = pipeline.new_state()
    rows = [_prefill(model, state, sample, features)]
    tokens = [int(rows[-1].argmax())]
    while tokens[-1] not in pipeline.facts.eos_token_ids and len(tokens) < ANSWER:
        logits, _ = pipeline.forward(state, [tokens[-1:]], Meter())
        rows.append(logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.stack(rows)


def forced(model: Model, sample: Sample, tokens: Sequence[int], features: Any) -> np.ndarray:
    """Logits [T, V] in front of each of ``tokens`` [T]: the prompt, then all but the last token in one call."""
    state = model.pipeline.new_state()
    first = _prefill(model, state, sample, features)[None]
    if len(tokens) == 1:
        return first
    rows = range(len(tokens) - 1)
    logits, _ = model.pipeline.forward(state, [tokens[:-1]], Meter(), logits_rows=list(rows))
    return np.concatenate([first, logits[0]])


def difference(
    model: Model,
    samples: Sequence[Sample],
    answers: Sequence[Sequence[int]],
    logits: Callable[[int], np.ndarray],
    encode: Callable[[Sample], Any] | None,
    progress: Callable[[], None],
) -> Difference:
    """Of ``model``, forced on ``answers``, to the ``logits`` of each sample's number."""
    divergences, matches, same = [], [], 0
    for number, (sample, tokens) in enumerate(zip(samples, answers, strict=True)):
        features = _features(model, sample) if encode is None else encode(sample)
        found = forced(model, sample, tokens, features)
        divergences.append(metrics.kl_divergence(logits(number), found))
        matches.append(metrics.top1_matches(logits(number), found))
        same += bool(matches[-1].all())
        progress()
    every, top1 = np.concatenate(divergences), np.concatenate(matches)
    return Difference(len(samples), len(every), same / len(samples), float(top1.mean()), float(every.mean()))


def _prefill(model: Model, state: State, sample: Sample, features: Any) -> np.ndarray:
    """Logits [V] behind the prompt."""
    prompt = model.prompt(sample.prompt, len(sample.images))
    return model.pipeline.forward(state, [prompt], Meter(), image_features=features)[0][0, -1]


def _features(model: Model, sample: Sample) -> Any:
    pixels = model.pixels(sample.images)
    return None if pixels is None else model.pipeline.encode_images(pixels, Meter())
