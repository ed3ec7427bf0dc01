"""The two sides of a comparison, each answering the same samples: PyTorch, and an engine.

Each has its own tokenizer and its own preprocessing, so that both are under test too. Knows nothing of
how the answers are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from tokprune.export.checkpoint import Checkpoint
from tokprune.export.lvpruning.modules import Modules
from tokprune.export.reference import Reference, Selection
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.pipeline import Meter, Pruned
from tokprune.runtime.plan import Plan
from tokprune.runtime.preprocess import load_image, pixel_values
from tokprune.runtime.prompt import expand_image_tokens, prompt_text


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
        image = None if sample.image is None else load_image(sample.image)
        text = prompt_text(self._checkpoint.prompt, sample.prompt, 0 if image is None else 1)
        batch = self._processor(text=text, images=image, return_tensors="pt")
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
    """A loaded bundle. Image features are kept, since many questions are about one image."""

    def __init__(
        self, model: Model, max_new_tokens: int, features: dict[Path | None, np.ndarray | None] | None = None
    ) -> None:
        """``features`` may be shared by engines of the same checkpoint and precision, whatever their plans."""
        self._model, self._max_new_tokens = model, max_new_tokens
        self._features = {} if features is None else features

    def ids(self, sample: Sample) -> list[int]:
        """Token ids of the sample's prompt, image tokens expanded."""
        facts, images = self._model.pipeline.facts, 0 if sample.image is None else 1
        form, reserved = self._model.bundle.manifest.prompt, self._model.tokenizer.special_tokens
        ids = self._model.tokenizer.encode(prompt_text(form, sample.prompt, images, reserved))
        return expand_image_tokens(ids, facts.image_token_id, [facts.vision.tokens] * images)

    def forced(self, sample: Sample, tokens: list[int]) -> tuple[np.ndarray, list[Pruned]]:
        """Logits [T, V] in front of each of ``tokens`` [T], which it is fed; and what was pruned."""
        pipeline, state = self._model.pipeline, self._model.pipeline.new_state()
        logits, kept = pipeline.forward(state, self.ids(sample), Meter(), image_features=self._encode(sample))
        steps = [logits[-1]]
        for token in tokens[:-1]:
            steps.append(pipeline.forward(state, [token], Meter())[0][-1])
        return np.stack(steps), kept

    def free(self, sample: Sample, logits: np.ndarray, forced: list[int]) -> list[int]:
        """Greedy tokens: those it was ``forced`` on if its ``logits`` agree with each, else a run of its own."""
        if logits.argmax(axis=-1).tolist() == forced:
            return forced
        pipeline, state = self._model.pipeline, self._model.pipeline.new_state()
        tokens: list[int] = []
        step, _ = pipeline.forward(state, self.ids(sample), Meter(), image_features=self._encode(sample))
        while _goes_on(tokens, step[-1], pipeline.facts.eos_token_ids, self._max_new_tokens):
            step, _ = pipeline.forward(state, [tokens[-1]], Meter())
        return tokens

    def text(self, tokens: list[int]) -> str:
        """The answer that ``tokens`` spell."""
        return self._model.tokenizer.decode(tokens).strip()

    def _encode(self, sample: Sample) -> np.ndarray | None:
        if sample.image is not None and sample.image not in self._features:
            pixels = pixel_values(load_image(sample.image), self._model.image_spec)
            self._features[sample.image] = self._model.pipeline.encode_images(pixels, Meter())
        return self._features.get(sample.image)


def _goes_on(tokens: list[int], logits: np.ndarray, eos: tuple[int, ...], limit: int) -> bool:
    """Append the best token of ``logits`` [V]; whether another one is to follow."""
    tokens.append(int(logits.argmax()))
    return tokens[-1] not in eos and len(tokens) < limit
