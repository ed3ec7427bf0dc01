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
from tokprune.export.lvpruning.modules import load_modules
from tokprune.export.sides import Engine, Original
from tokprune.runtime import flops, metrics, verification
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Plan


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
    has_image: bool
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

    Returns the JSON object without gates, and each sample's outcome. The spectra of
    those of the first ``spectrum_samples`` samples that have an image give the change of the IPR.
    """
    facts = model.pipeline.facts
    if checkpoint.facts != dataclasses.replace(facts, name=checkpoint.facts.name):
        raise UserError(
            f"the bundle {model.bundle.path} was not made from the checkpoint {checkpoint.path}, their "
            "configurations differ: give the checkpoint it was made from with --reference"
        )
    torch_model = load_model(checkpoint, dtype=torch.float32)
    plan = model.bundle.manifest.plan
    modules = load_modules(model.bundle.path) if plan.method == "lvpruning" else None
    original = Original(torch_model, load_processor(checkpoint), checkpoint, max_new_tokens, modules)
    engine = Engine(model, max_new_tokens)
    outcomes = []
    for number, sample in enumerate(samples):
        spectrum = number < spectrum_samples and sample.image is not None
        outcomes.append(_compare(original, engine, plan, sample, spectrum=spectrum))
        progress(number + 1)
    return _report(model, outcomes), outcomes


def _compare(original: Original, engine: Engine, plan: Plan, sample: Sample, *, spectrum: bool) -> Outcome:
    full = original.greedy(Plan("none"), sample, keep_hidden=spectrum)
    pruned = original.greedy(plan, sample, keep_hidden=spectrum) if plan.stages else full
    logits, kept = engine.forced(sample, pruned.tokens)
    tokens = engine.free(sample, logits, pruned.tokens)
    on_full = logits if full.tokens == pruned.tokens else engine.forced(sample, full.tokens)[0]
    sets = [
        (record.indices, chosen.indices, chosen.scores) for record, chosen in zip(kept, pruned.selections, strict=True)
    ]
    ids = engine.ids(sample)
    return Outcome(
        reference=engine.text(pruned.tokens),
        parity=verification.parity_sample(logits, pruned.logits, sets, log_odds=plan.method == "lvpruning"),
        consistency=verification.ConsistencySample(
            full=engine.text(full.tokens),
            pruned=engine.text(tokens),
            reference=sample.answer,
            kl=metrics.kl_divergence(full.logits, on_full),
            top1=metrics.top1_matches(full.logits, on_full),
        ),
        same_ids=ids == full.ids,
        prompt_tokens=len(ids),
        has_image=sample.image is not None,
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
        "plan": str(model.bundle.manifest.plan),
    }


def _flops(model: Model, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """FLOPs of the median prompt, in the shape of ``tokprune flops``."""
    tokens = model.pipeline.facts.vision.tokens
    with_image = [outcome.prompt_tokens - tokens for outcome in outcomes if outcome.has_image]
    if not with_image:
        return {}
    counter = flops.from_manifest(model.bundle.manifest)
    return flops.summary(counter, int(np.median(with_image)), "counted from the graph")
