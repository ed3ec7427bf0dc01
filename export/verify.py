"""``verify``: a bundle against PyTorch, sample by sample. Knows both sides; the statistics are runtime's.

Parity is against PyTorch with the same pruning, teacher-forced on PyTorch's tokens, so that one early flip
does not hide the rest. Consistency is against the unpruned original: answers freely generated, next-token
distributions forced on the original's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokprune.export.checkpoint import Checkpoint, load_model, load_processor
from tokprune.export.reference import Reference, Selection
from tokprune.runtime import flops, metrics, verification
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.pipeline import Meter, Pruned
from tokprune.runtime.plan import Plan
from tokprune.runtime.preprocess import load_image, pixel_values
from tokprune.runtime.prompt import expand_image_tokens, prompt_text

# Relative to the reference's k-th best score: kept sets that differ only in scores nearer than this are equal.
MARGIN = 1e-3


@dataclass
class Outcome:
    """One sample's results; ``tokens`` include the end of sequence, ``difference`` says what is not equal."""

    full: str
    reference: str
    engine: str
    parity: verification.ParitySample
    consistency: verification.ConsistencySample
    same_ids: bool
    text_tokens: int
    images: int
    spectrum: list[tuple[int, float, float]] = field(default_factory=list)  # layer, IPR full, IPR pruned


def verify(
    model: Model,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 16,
    spectrum_samples: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Compare the bundle in ``model`` with ``checkpoint`` in PyTorch, FP32, on ``samples``.

    Returns the JSON object without gates, and each sample's outcome. The spectra of the first
    ``spectrum_samples`` samples with an image give the change of the IPR.
    """
    facts = model.pipeline.facts
    if checkpoint.facts != dataclasses.replace(facts, name=checkpoint.facts.name):
        raise UserError(
            f"the bundle {model.bundle.path} was not made from the checkpoint {checkpoint.path}, their "
            "configurations differ: give the checkpoint it was made from with --reference"
        )
    torch_model = load_model(checkpoint, dtype=torch.float32)
    judge = _Judge(model, torch_model, load_processor(checkpoint), max_new_tokens)
    outcomes = []
    for number, sample in enumerate(samples):
        outcomes.append(judge.sample(sample, spectrum=number < spectrum_samples and sample.image is not None))
        progress(number + 1)
    return _report(model, outcomes), outcomes


class _Judge:
    """Both sides of the comparison, loaded once."""

    def __init__(self, model: Model, torch_model: Any, processor: Any, max_new_tokens: int) -> None:
        self._model, self._torch, self._processor = model, torch_model, processor
        self._max_new_tokens = max_new_tokens
        self._plan = model.bundle.manifest.plan
        self._features: tuple[Any, np.ndarray | None] = (None, None)  # of the image seen last

    def sample(self, sample: Sample, *, spectrum: bool) -> Outcome:
        facts, form = self._model.pipeline.facts, self._model.bundle.manifest.prompt
        image = None if sample.image is None else load_image(sample.image)
        text = prompt_text(form, sample.prompt, 0 if image is None else 1, self._model.tokenizer.special_tokens)
        # the reference has its own processor, so that ours is under test too
        batch = self._processor(text=text, images=image, return_tensors="pt")
        ids = batch["input_ids"][0].tolist()
        images = 0 if image is None else 1
        ours = self._model.tokenizer.encode(text)
        ours = expand_image_tokens(ours, facts.image_token_id, [facts.vision.tokens] * images)
        full = self._greedy(Plan("none"), ids, batch.get("pixel_values"), spectrum)
        pruned = self._greedy(self._plan, ids, batch.get("pixel_values"), spectrum) if self._plan.stages else full
        features = self._image_features(sample, image)
        logits, kept = self._forced(ours, features, pruned.tokens)
        engine = self._free(ours, features, logits, pruned.tokens)
        on_full = logits if full.tokens == pruned.tokens else self._forced(ours, features, full.tokens)[0]
        sets = [
            (record.indices, chosen.indices, chosen.scores)
            for record, chosen in zip(kept, pruned.selections, strict=True)
        ]
        margin = MARGIN * min((float(c.scores[c.indices].min()) for c in pruned.selections), default=0.0)
        return Outcome(
            full=self._text(full.tokens),
            reference=self._text(pruned.tokens),
            engine=self._text(engine),
            parity=verification.parity_sample(logits, pruned.logits, sets, margin),
            consistency=verification.ConsistencySample(
                full=self._text(full.tokens),
                pruned=self._text(engine),
                reference=sample.answer,
                kl=metrics.kl_divergence(full.logits, on_full),
                top1=metrics.top1_matches(full.logits, on_full),
            ),
            same_ids=ours == ids,
            text_tokens=len(ids) - images * facts.vision.tokens,
            images=images,
            spectrum=[
                (layer, metrics.ipr(states), metrics.ipr(pruned.hidden[layer]))
                for layer, states in sorted(full.hidden.items())
            ],
        )

    def _greedy(self, plan: Plan, ids: list[int], pixels: torch.Tensor | None, keep_hidden: bool) -> _Run:
        run = _Run()
        with Reference(self._torch, self._model.pipeline.facts, plan) as reference:
            sequence, logits = reference.prefill(ids, pixels, keep_hidden=keep_hidden)
            steps = [logits]
            while self._goes_on(run.tokens, int(logits.argmax())):
                logits = reference.step(sequence, run.tokens[-1])
                steps.append(logits)
        run.logits, run.selections, run.hidden = np.stack(steps), sequence.selections, sequence.hidden
        return run

    def _goes_on(self, tokens: list[int], token: int) -> bool:
        """Append ``token``; whether another one is to follow."""
        tokens.append(token)
        return token not in self._model.pipeline.facts.eos_token_ids and len(tokens) < self._max_new_tokens

    def _image_features(self, sample: Sample, image: Any) -> np.ndarray | None:
        if image is None:
            return None
        if self._features[0] != sample.image:  # questions about one image often stand together
            pixels = pixel_values(image, self._model.image_spec)
            self._features = (sample.image, self._model.pipeline.encode_images(pixels, Meter()))
        return self._features[1]

    def _forced(
        self, ids: list[int], features: np.ndarray | None, tokens: list[int]
    ) -> tuple[np.ndarray, list[Pruned]]:
        """The engine's logits [T, V] in front of each of ``tokens``, which it is fed; and what was pruned."""
        pipeline = self._model.pipeline
        state = pipeline.new_state()
        logits, kept = pipeline.forward(state, ids, Meter(), image_features=features)
        steps = [logits[-1]]
        for token in tokens[:-1]:
            steps.append(pipeline.forward(state, [token], Meter())[0][-1])
        return np.stack(steps), kept

    def _free(self, ids: list[int], features: np.ndarray | None, logits: np.ndarray, forced: list[int]) -> list[int]:
        """The engine's own greedy tokens: those it was forced on if it agrees with each, else a run of its own."""
        if logits.argmax(axis=-1).tolist() == forced:
            return forced
        pipeline = self._model.pipeline
        tokens: list[int] = []
        state = pipeline.new_state()
        step, _ = pipeline.forward(state, ids, Meter(), image_features=features)
        while self._goes_on(tokens, int(step[-1].argmax())):
            step, _ = pipeline.forward(state, [tokens[-1]], Meter())
        return tokens

    def _text(self, tokens: list[int]) -> str:
        return self._model.tokenizer.decode(tokens).strip()


@dataclass
class _Run:
    tokens: list[int] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))  # [T, V]
    selections: list[Selection] = field(default_factory=list)
    hidden: dict[int, np.ndarray] = field(default_factory=dict)


def _report(model: Model, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    by_layer: dict[int, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        for layer, full, pruned in outcome.spectrum:
            by_layer.setdefault(layer, []).append((full, pruned))
    spectra = [
        {
            "layer": layer,
            "full": float(np.mean([f for f, _ in values])),
            "pruned": float(np.mean([p for _, p in values])),
        }
        for layer, values in sorted(by_layer.items())
    ]
    parity = verification.parity_summary([outcome.parity for outcome in outcomes])
    parity["same_token_ids"] = sum(outcome.same_ids for outcome in outcomes) / len(outcomes)
    parity["answers_equal"] = sum(outcome.engine == outcome.reference for outcome in outcomes) / len(outcomes)
    return {
        "parity": parity,
        "consistency": verification.consistency_summary([outcome.consistency for outcome in outcomes], spectra),
        "flops": _flops(model, outcomes),
        "engine": model.pipeline.backend.name,
        "plan": str(model.bundle.manifest.plan),
    }


def _flops(model: Model, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """FLOPs of the median prompt, in the shape of ``tokprune flops``."""
    with_image = [outcome.text_tokens for outcome in outcomes if outcome.images]
    if not with_image:
        return {}
    counter = flops.from_manifest(model.bundle.manifest)
    return flops.summary(counter, int(np.median(with_image)), "counted from the graph")
