"""The two sides of a comparison, each answering the same samples: PyTorch, and an engine.

Each has its own tokenizer and its own preprocessing, so that both are under test too. Knows nothing of
how the answers are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from tokprune.export.checkpoint import Checkpoint
from tokprune.export.lvpruning.modules import Modules
from tokprune.export.reference import Reference, Selection
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.pipeline import Meter, Pruned, State
from tokprune.runtime.plan import Plan
from tokprune.runtime.preprocess import load_image
from tokprune.runtime.prompt import prompt_text


@dataclass
class Greedy:
    """One greedy answer: T ``tokens``, the end of sequence among them, and the logits [T, V] they came from."""

    ids: list[int]  # of the prompt, image tokens expanded
    tokens: list[int] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    selections: list[Selection] = field(default_factory=list)
    hidden: dict[int, np.ndarray] = field(default_factory=dict)  # [R, D] by decoder layer it enters


class Original:
    """A checkpoint in transformers, FP32, with transformers' processor; pruned on request by the reference."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: ProcessorMixin,
        checkpoint: Checkpoint,
        max_new_tokens: int,
        modules: Modules | None = None,
    ) -> None:
        """``modules`` are those of the lvpruning plans that it is to answer under."""
        self._model, self._processor, self._checkpoint = model, processor, checkpoint
        self._max_new_tokens, self._modules = max_new_tokens, modules

    def greedy(self, plan: Plan, sample: Sample, *, keep_hidden: bool = False) -> Greedy:
        """Answer ``sample`` under ``plan``; with ``keep_hidden`` the prefill's rows are kept, layer by layer."""
        images = [load_image(image) for image in sample.images]
        text = prompt_text(self._checkpoint.prompt, sample.prompt, len(images))
        batch = self._processor(text=text, images=images or None, return_tensors="pt")
        answer = Greedy(batch["input_ids"][0].tolist())
        facts = self._checkpoint.facts
        with Reference(self._model, facts, plan, self._modules) as reference:
            run, logits = reference.prefill(answer.ids, batch.get("pixel_values"), keep_hidden=keep_hidden)
            steps = [logits]
            while _goes_on(answer.tokens, logits, facts.eos_token_ids, self._max_new_tokens):
                logits = reference.step(run, answer.tokens[-1])
                steps.append(logits)
        answer.logits, answer.selections, answer.hidden = np.stack(steps), run.selections, run.hidden
        return answer


class Engine:
    """A loaded bundle. Image features are kept, since many questions are about one image.

    Samples that are given together are one batch.
    """

    def __init__(self, model: Model, max_new_tokens: int, features: dict[Path, np.ndarray] | None = None) -> None:
        """``features`` may be shared by engines of the same checkpoint and precision, whatever their plans."""
        self._model, self._max_new_tokens = model, max_new_tokens
        self._features = {} if features is None else features  # [N, D] by image

    def ids(self, sample: Sample) -> list[int]:
        """Token ids of the sample's prompt, image tokens expanded."""
        return self._model.prompt(sample.prompt, len(sample.images))

    def greedy(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Greedy tokens of each sample."""
        eos, limit = self._model.pipeline.facts.eos_token_ids, self._max_new_tokens
        state, logits, _ = self._prefill(samples)
        answers: list[list[int]] = [[] for _ in samples]
        goes_on = [_goes_on(tokens, row, eos, limit) for tokens, row in zip(answers, logits, strict=True)]
        while any(goes_on):
            logits = self._step(state, [tokens[-1] for tokens in answers])
            goes_on = [
                alive and _goes_on(tokens, row, eos, limit)
                for alive, tokens, row in zip(goes_on, answers, logits, strict=True)
            ]
        return answers

    def forced(self, samples: Sequence[Sample], tokens: Sequence[list[int]]) -> list[tuple[np.ndarray, list[Pruned]]]:
        """Of each sample the logits [T, V] in front of each of its ``tokens`` [T], which it is fed; what was pruned."""
        state, logits, pruned = self._prefill(samples)
        steps = [logits]
        for at in range(max(map(len, tokens)) - 1):
            # a sample whose tokens have run out is fed the last one again, for the others' sake
            steps.append(self._step(state, [row[min(at, len(row) - 1)] for row in tokens]))
        stacked = np.stack(steps, axis=1)  # [B, T, V]
        return [(rows[: len(row)], kept) for rows, row, kept in zip(stacked, tokens, pruned, strict=True)]

    def free(
        self, samples: Sequence[Sample], logits: Sequence[np.ndarray], forced: Sequence[list[int]]
    ) -> list[list[int]]:
        """Greedy tokens of each: those it was ``forced`` on if its ``logits`` agree with each, else of its own run."""
        found = list(forced)
        others = [i for i, rows in enumerate(logits) if rows.argmax(axis=-1).tolist() != forced[i]]
        if others:
            for i, tokens in zip(others, self.greedy([samples[i] for i in others]), strict=True):
                found[i] = tokens
        return found

    def text(self, tokens: list[int]) -> str:
        """The answer that ``tokens`` spell."""
        return self._model.tokenizer.decode(tokens).strip()

    def _prefill(self, samples: Sequence[Sample]) -> tuple[State, np.ndarray, list[list[Pruned]]]:
        """The sequences, the logits [B, V] of their last rows, and what was pruned of each."""
        pipeline = self._model.pipeline
        state, prompts = pipeline.new_state(len(samples)), [self.ids(sample) for sample in samples]
        logits, pruned = pipeline.forward(state, prompts, Meter(), image_features=self._encode(samples))
        return state, logits[:, -1], pruned

    def _step(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        """Append a token to each sequence: logits [B, V]."""
        return self._model.pipeline.forward(state, [[token] for token in tokens], Meter())[0][:, -1]

    def _encode(self, samples: Sequence[Sample]) -> np.ndarray | None:
        """Features [I, N, D] of the samples' images, in order; None of none."""
        images = [image for sample in samples for image in sample.images]
        new = [image for image in dict.fromkeys(images) if image not in self._features]
        pixels = self._model.pixels(new)
        if pixels is not None:
            pipeline = self._model.pipeline
            features = pipeline.backend.to_host(pipeline.encode_images(pixels, Meter()))
            self._features.update(zip(new, features, strict=True))
        return np.stack([self._features[image] for image in images]) if images else None


def _goes_on(tokens: list[int], logits: np.ndarray, eos: tuple[int, ...], limit: int) -> bool:
    """Append the best token of ``logits`` [V]; whether another one is to follow."""
    tokens.append(int(logits.argmax()))
    return tokens[-1] not in eos and len(tokens) < limit
