"""``verify``: a bundle against PyTorch, sample by sample. Knows both sides; the statistics are runtime's.

Parity is against PyTorch with the same pruning, teacher-forced on PyTorch's tokens, so that one early flip
does not hide the rest. Consistency is against the unpruned original: answers freely generated, next-token
distributions forced on the original's tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tokprune.export.checkpoint import Checkpoint, load_model, load_processor
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.restore import rounded_twin
from tokprune.export.sides import Engine, Greedy, Original
from tokprune.runtime import flops, metrics, verification
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import check_batch
from tokprune.runtime.pipeline import Pruned
from tokprune.runtime.plan import Plan
from tokprune.runtime.recipe import read_recipe


@dataclass
class Outcome:
    """One sample's results. ``reference`` is PyTorch's answer with the same pruning; both answers of the
    consistency sample, the original's and the engine's, were freely generated.
    """

    reference: str
    parity: verification.ParitySample
    consistency: verification.ConsistencySample
    same_ids: bool  # our tokenizer's and transformers'
    prompt_tokens: int
    images: int
    kept: list[Pruned]  # by the engine, in the order of stages and images
    spectrum: list[tuple[int, float, float]] = field(default_factory=list)  # layer, IPR full, IPR pruned

    @property
    def is_equal(self) -> bool:
        """Whether engine and PyTorch agree: every greedy token, kept sets within the margin, finite logits."""
        parity = self.parity
        return parity.first_divergence is None and parity.kept_equal_margin and math.isfinite(parity.max_abs_logit_diff)


def verify(
    model: Model,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 16,
    spectrum_samples: int = 32,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Compare the bundle in ``model`` with ``checkpoint`` in PyTorch, FP32, on ``samples``.

    Parity of a quantised bundle is with the matrices that it has, restored, and activations rounded where its are;
    consistency with the checkpoint's own.
    The bundle takes ``batch_size`` samples at a time, PyTorch always one. Returns the JSON object without gates, and
    each sample's outcome. The spectra of those of the first ``spectrum_samples`` samples that have an image give the
    change of the IPR.
    Raises UserError if the checkpoint is another one, or the batch or a sample is too large for the bundle.
    """
    check_batch(model.bundle.manifest.limits, batch_size)
    facts = model.pipeline.facts
    if checkpoint.facts != dataclasses.replace(facts, name=checkpoint.facts.name):
        raise UserError(
            f"the bundle {model.bundle.path} was not made from the checkpoint {checkpoint.path}, their "
            "configurations differ: give the checkpoint it was made from with --reference"
        )
    recipe = read_recipe(model.bundle)
    torch_model = load_model(checkpoint, dtype=torch.float32)
    plan = model.bundle.manifest.plan
    modules = load_modules(model.bundle.path) if plan.method == "lvpruning" else None
    processor = load_processor(checkpoint)
    original = Original(torch_model, processor, checkpoint, max_new_tokens, modules)
    same = original  # PyTorch with what the bundle has: its pruning, its matrices
    if recipe is not None:
        rounded = rounded_twin(torch_model, model.bundle, recipe)
        same = Original(rounded, processor, checkpoint, max_new_tokens, modules)
    engine = Engine(model, max_new_tokens)
    outcomes: list[Outcome] = []
    for at in range(0, len(samples), batch_size):
        batch = samples[at : at + batch_size]
        answers = []
        for number, sample in enumerate(batch, at):
            spectrum = number < spectrum_samples and bool(sample.images)
            full = original.greedy(Plan("none"), sample, keep_hidden=spectrum)
            unlike = plan.stages or same is not original
            pruned = same.greedy(plan, sample, keep_hidden=spectrum) if unlike else full
            answers.append((full, pruned))
        for sample, (full, pruned), answer in zip(batch, answers, _engine_answers(engine, batch, answers), strict=True):
            outcomes.append(_outcome(engine, plan, sample, full, pruned, answer))
            progress(len(outcomes))
    return _report(model, outcomes), outcomes


@dataclass
class _EngineAnswer:
    """The engine's side of one sample."""

    logits: np.ndarray  # [T, V], forced on the pruned reference's tokens
    kept: list[Pruned]
    tokens: list[int]  # freely generated
    on_full: np.ndarray  # [T, V], forced on the original's tokens


def _engine_answers(
    engine: Engine, samples: Sequence[Sample], references: Sequence[tuple[Greedy, Greedy]]
) -> list[_EngineAnswer]:
    """Of one batch; ``references`` are the unpruned and the pruned PyTorch answer of each sample."""
    forced = [pruned.tokens for _, pruned in references]
    runs = engine.forced(samples, forced)
    free = engine.free(samples, [logits for logits, _ in runs], forced)
    answers = [_EngineAnswer(logits, kept, tokens, logits) for (logits, kept), tokens in zip(runs, free, strict=True)]
    others = [i for i, (full, pruned) in enumerate(references) if full.tokens != pruned.tokens]
    if others:
        on_full = engine.forced([samples[i] for i in others], [references[i][0].tokens for i in others])
        for i, (logits, _) in zip(others, on_full, strict=True):
            answers[i].on_full = logits
    return answers


def _outcome(
    engine: Engine, plan: Plan, sample: Sample, full: Greedy, pruned: Greedy, answer: _EngineAnswer
) -> Outcome:
    logits, on_full = answer.logits, answer.on_full
    sets = [
        (record.indices, chosen.indices, chosen.scores)
        for record, chosen in zip(answer.kept, pruned.selections, strict=True)
    ]
    ids = engine.ids(sample)
    return Outcome(
        reference=engine.text(pruned.tokens),
        parity=verification.parity_sample(logits, pruned.logits, sets, log_odds=plan.method == "lvpruning"),
        consistency=verification.ConsistencySample(
            full=engine.text(full.tokens),
            pruned=engine.text(answer.tokens),
            reference=sample.answer,
            kl=metrics.kl_divergence(full.logits, on_full),
            top1=metrics.top1_matches(full.logits, on_full),
        ),
        same_ids=ids == full.ids,
        prompt_tokens=len(ids),
        images=len(sample.images),
        kept=answer.kept,
        spectrum=[
            (layer, metrics.ipr(states), metrics.ipr(pruned.hidden[layer]))
            for layer, states in sorted(full.hidden.items())
        ],
    )


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
    equal = [outcome.consistency.pruned == outcome.reference for outcome in outcomes]
    parity["answers_equal"] = sum(equal) / len(outcomes)
    return {
        "parity": parity,
        "consistency": verification.consistency_summary([outcome.consistency for outcome in outcomes], spectra),
        "flops": _flops(model, outcomes),
        "engine": model.pipeline.backend.name,
        "remarks": list(model.pipeline.backend.remarks),
        "plan": str(model.bundle.manifest.plan),
        "precision": model.bundle.manifest.precision,
        "base": model.bundle.manifest.base,
    }


def _flops(model: Model, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """FLOPs of the median prompt with one image, in the shape of ``tokprune flops``."""
    tokens = model.pipeline.facts.vision.tokens
    with_image = [outcome.prompt_tokens - tokens for outcome in outcomes if outcome.images == 1]
    if not with_image:
        return {}
    counter = flops.from_manifest(model.bundle.manifest)
    return flops.summary(counter, int(np.median(with_image)), "counted from the graph")
