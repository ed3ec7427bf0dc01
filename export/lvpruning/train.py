"""Trains LVPruning's modules on a frozen base model (arXiv 2501.13652).

Decisions are hard straight-through Gumbel-softmax samples in FP32; the loss is the language model's on answers, plus
the squared distance of each image's share of kept rows from the target, as in DynamicViT (arXiv 2106.02034). One
answer's few tokens say little about hundreds of rows, so a training may begin with `guidance`, and keep it beside:
ours, not the paper's. The order of examples and the Gumbel noise depend on (seed, step, micro-batch) only, so that a
training that was stopped goes on as if it had not been. The paper's layers, sizes and rates are not known to us: the
defaults are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tokprune.export.checkpoint import Checkpoint, load_model, load_processor
from tokprune.export.lvpruning.base import Base, Decide
from tokprune.export.lvpruning.batch import Batch, Encoder, collate
from tokprune.export.lvpruning.data import Data
from tokprune.export.lvpruning.module import DROP, KEEP, SelectorModule
from tokprune.export.lvpruning.modules import Modules, check_modules_out, save_modules
from tokprune.export.lvpruning.state import Progress, load_state, save_state, state_path
from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Plan
from tokprune.runtime.version import __version__

TAU = 1.0  # temperature of the Gumbel-softmax
CLIP = 1.0  # norm of the gradient
DECAY = 0.01
RECENT = 50  # steps that the reported figures are means of
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """What a training is asked for. A step takes ``batch_size`` × ``accumulate`` examples.

    In the first ``guided_steps`` `guidance` stands in for the language model's loss; behind them it is added to it
    with ``guidance_weight``.
    """

    steps: int
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    ratio_weight: float = 2.0
    seed: int = 0
    guided_steps: int = 0
    guidance_weight: float = 0.0


@dataclass(frozen=True)
class Report:
    """One step's figures, averaged over the last ``RECENT``; ``kept`` is the mean share of rows kept by stage.

    A guided step has no ``lm``, since nothing is pruned there; others may have no ``guidance``.
    """

    step: int
    steps: int
    loss: float
    kept: list[float]
    samples_per_second: float
    seconds_left: float
    lm: float | None = None
    guidance: float | None = None


def choose_device(name: str) -> tuple[torch.device, torch.dtype]:
    """Device and base model's dtype for "auto", "cpu" or "cuda". Raises UserError if there is no such GPU."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise UserError(
            "--device cuda was asked for, but PyTorch sees no GPU: install a CUDA build, or use --device cpu"
        )
    if name == "cpu" or not cuda:
        return torch.device("cpu"), torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda"), torch.bfloat16 if bf16 else torch.float16


def train(
    checkpoint: Checkpoint,
    plan: Plan,
    data: Data,
    settings: Settings,
    out: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: bool = False,
    restart: bool = False,
    report: Callable[[Report], None] = lambda _: None,
    save_seconds: float = SAVE_SECONDS,
) -> Modules:
    """Train one module for each stage of ``plan`` and write them to ``out``.

    The state is saved beside ``out`` every ``save_seconds``, taken up by the next call with the same settings
    unless ``restart``, and removed at the end. Raises UserError for what is at fault in checkpoint, data, ``out`` or
    a state that is there, and if the training diverges.
    """
    assert plan.module is not None  # make_plan saw to it
    check_modules_out(out)
    state = state_path(out)
    if restart:
        state.unlink(missing_ok=True)
    facts, generator = checkpoint.facts, torch.Generator().manual_seed(settings.seed)
    fresh = [SelectorModule(facts.hidden, plan.module) for _ in plan.stages]
    for module in fresh:
        module.initialise(generator)
    modules = nn.ModuleList(fresh).to(device)
    optimizer = torch.optim.AdamW(modules.parameters(), betas=(0.9, 0.98), weight_decay=DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    asked = _asked(checkpoint, plan, data, settings, device, dtype)
    done = load_state(state, modules, optimizer, asked) or Progress(0, 0.0, [], scaler.state_dict())
    scaler.load_state_dict(done.scaler)
    processor = load_processor(checkpoint)
    model = load_model(checkpoint, dtype=dtype).to(device)
    base = Base(model, processor, facts, [stage.layer for stage in plan.stages], checkpointing=checkpointing)
    batches = Batches(Encoder(checkpoint), data, checkpoint, settings)
    targets = [stage.keep / facts.vision.tokens for stage in plan.stages]

    began, first, saved = time.monotonic() - done.seconds, done.step, time.monotonic()
    entered = time.monotonic()
    while done.step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done.step, settings)
        done.recent.append(_step(base, modules, batches(done.step), targets, settings, done.step, scaler, device))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(modules.parameters(), CLIP)
        if not scaler.is_enabled() and not norm.isfinite():  # with loss scaling, the scaler skips the step
            raise UserError(
                f"the gradient of step {done.step + 1} is not finite: give a smaller --learning-rate and --restart"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done.step, done.seconds = done.step + 1, time.monotonic() - began
        del done.recent[:-RECENT]
        if time.monotonic() - saved >= save_seconds and done.step < settings.steps:
            done.scaler, saved = scaler.state_dict(), time.monotonic()
            save_state(state, modules, optimizer, asked, done)
        per_step = (time.monotonic() - entered) / (done.step - first)
        samples = settings.batch_size * settings.accumulate / per_step
        report(
            Report(
                done.step,
                settings.steps,
                samples_per_second=samples,
                seconds_left=per_step * (settings.steps - done.step),
                **_mean(done.recent),
            )
        )
    weights = {f"stages.{name}": p.detach().cpu().numpy() for name, p in modules.named_parameters()}
    training = {
        **asked,
        "final": _mean(done.recent),
        "seconds": round(done.seconds, 1),
        "versions": {"tokprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    result = Modules(
        facts.name, facts.hidden, facts.layers, facts.vision.tokens, plan.stages, plan.module, weights, training
    )
    save_modules(out, result)
    state.unlink(missing_ok=True)
    return result


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate of a step: warmed up over the first twentieth (at most 200 steps), then half a cosine to 0."""
    warmup = min(200, max(1, settings.steps // 20))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def gumbel_decisions(seed: int, step: int, micro: int) -> Decide:
    """Decisions of a micro-batch: 1 or 0 as sampled, with the gradient of the soft probability to keep."""

    def decide(stage: int, logits: Tensor) -> Tensor:
        noise = np.random.default_rng([seed, step, micro, stage]).gumbel(size=tuple(logits.shape)).astype(np.float32)
        soft = ((logits + torch.from_numpy(noise).to(logits.device)) / TAU).softmax(-1)[..., KEEP]  # [I, N]
        return (soft > 0.5).float() + soft - soft.detach()

    return decide


class Batches:
    """The micro-batches of each step: every epoch takes all examples once, in an order of its own."""

    def __init__(self, encoder: Encoder, data: Data, checkpoint: Checkpoint, settings: Settings) -> None:
        self._encoder, self._examples, self._facts = encoder, data.examples, checkpoint.facts
        self._settings = settings
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> list[Batch]:
        size, count = self._settings.batch_size, self._settings.accumulate
        start = step * size * count
        return [self._batch(range(start + m * size, start + (m + 1) * size)) for m in range(count)]

    def _batch(self, places: range) -> Batch:
        sequences = [self._encoder(self._examples[self._index(place)]) for place in places]
        return collate(sequences, self._facts.image_token_id, self._facts.vision.tokens)

    def _index(self, place: int) -> int:
        epoch, at = divmod(place, len(self._examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._examples))
        return int(self._order[at])


def _step(
    base: Base,
    modules: nn.ModuleList,
    batches: list[Batch],
    targets: list[float],
    settings: Settings,
    step: int,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> dict[str, Any]:
    """Add the gradients of one step; its figures."""
    answers = sum(len(batch.targets) for batch in batches)
    is_guided = step < settings.guided_steps
    figures: list[dict[str, Any]] = []
    for micro, batch in enumerate(batches):
        batch = batch.to(device)
        found: dict[str, Any] = {}
        losses = []
        if is_guided or settings.guidance_weight:
            scored, shares = base.guided(batch, modules)
            by_guide = guidance(scored, shares) / len(batches)
            losses.append(by_guide if is_guided else settings.guidance_weight * by_guide)
            found["guidance"] = by_guide.item()
        if is_guided:  # nothing is sampled, so that shares are probabilities
            keeping = torch.stack([logits.softmax(-1)[..., KEEP] for logits in scored]).cumprod(0)
        else:
            outcome = base(batch, modules, gumbel_decisions(settings.seed, step, micro))
            lm = F.cross_entropy(outcome.logits, batch.targets, reduction="sum") / answers
            losses.append(lm)
            found["lm"] = lm.item()
            keeping = torch.stack(outcome.kept)
        kept = keeping.mean(2)  # [stages, I]
        off = (kept - torch.tensor(targets, device=device)[:, None]).square().mean(1).sum() / len(batches)
        losses.append(settings.ratio_weight * off)
        found["kept"] = (kept.detach().mean(1) / len(batches)).cpu().numpy()
        loss = torch.stack(losses).sum()
        scaler.scale(loss).backward()
        figures.append({"loss": loss.item(), **found})
    totals = {key: sum(row[key] for row in figures) for key in figures[0]}
    return totals | {"kept": totals["kept"].tolist()}


def guidance(scored: list[Tensor], shares: Tensor) -> Tensor:
    """Σ over stages of the mean KL(p ‖ softmax(keep − drop)) of images, in nats.

    ``scored`` [I, N, 2] by stage and ``shares`` p [stages, I, N] are as `Base.guided` gives them. Adding to all of an
    image's log-odds changes nothing: how many rows are kept is for the ratio's loss to say.
    """
    total = scored[0].new_zeros(())
    for logits, share in zip(scored, shares, strict=True):
        odds = (logits[..., KEEP] - logits[..., DROP]).log_softmax(1)
        total = total + F.kl_div(odds, share, reduction="batchmean")
    return total


def _mean(recent: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the steps that are of the last one's kind."""
    alike = [row for row in recent if row.keys() == recent[-1].keys()]
    return {key: np.mean([row[key] for row in alike], axis=0).tolist() for key in recent[-1]}


def _asked(
    checkpoint: Checkpoint, plan: Plan, data: Data, settings: Settings, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All that decides on the outcome, in JSON's types."""
    assert plan.module is not None
    weights = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
    return {
        "model": checkpoint.facts.name,
        "model_bytes": weights,
        "data_sha256": data.sha256,
        "stages": [[stage.layer, stage.keep] for stage in plan.stages],
        "module": asdict(plan.module),
        **asdict(settings),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
