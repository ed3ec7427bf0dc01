"""Training of the demo model, stage by stage: `python -m tokprune.export.demo.train --work DIR --out CHECKPOINT`.

Stages run in the order of `STAGES`, each resumable from `--work`: a step's data depends only on (seed, stage, step),
so a resumed run sees what an uninterrupted one would have seen. Two CPU cores are enough. Where they are shared, set
`OMP_WAIT_POLICY=PASSIVE`: threads that spin while they wait for a core cost more than they gain.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from tokprune.export.demo import tower_stage
from tokprune.export.demo.decoder_stage import DecoderWork
from tokprune.export.demo.evaluate import evaluate
from tokprune.export.demo.model import build_model, save_checkpoint
from tokprune.export.demo.tower import PatchHeads

SEED = 20261121
FINAL, INTERIM = (1000, 1), (180, 556)  # questions and their seed: the final score, and one after every earlier stage


@dataclass(frozen=True)
class Stage:
    """One stage: how many steps, at which peak learning rate, and the module that draws batches and takes losses."""

    name: str
    steps: int
    rate: float
    work: Any
    warmup: int = 100
    cooldown: float = 0.3  # last share of the steps, in which the rate falls to zero


_LOOKUP = (({1: 1, 2: 2}, 56, 0.3), ({3: 2, 4: 3}, 92, 0.7))
_DENSER = (({1: 1, 2: 1, 3: 1, 4: 1}, 128, 0.5), ({1: 1, 2: 1, 3: 1, 4: 1}, 320, 0.5))
_WHOLE = (({1: 1, 2: 1, 3: 2, 4: 4}, 108, 0.5), ({1: 1, 2: 1, 3: 1, 4: 1}, 576, 0.5))
STAGES = (
    Stage("tower", 2400, 1.5e-3, tower_stage),
    Stage("decoder", 1260, 1.5e-3, DecoderWork(_LOOKUP, early=0.5, tower=False, fresh=True), cooldown=0.0),
    Stage("joint", 600, 6e-4, DecoderWork(_DENSER, early=0.2, tower=True)),
    Stage("whole", 600, 2e-4, DecoderWork(_WHOLE, early=0.0, tower=True, dense=0.5), warmup=50, cooldown=0.9),
)


def rate_at(stage: Stage, step: int) -> float:
    """Warm up, stay, fall linearly."""
    falling = (stage.steps - step) / max(1.0, stage.cooldown * stage.steps)
    return stage.rate * min(1.0, (step + 1) / stage.warmup, falling)


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        keep = min(self.decay, (step + 1) / (step + 10))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - keep)


def optimiser(modules: nn.Module, decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors, norms and tables do not."""
    trained = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if p.ndim >= 2 and "embed" not in n]
    others = [p for n, p in trained if not (p.ndim >= 2 and "embed" not in n)]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def prefetch(
    draw: Callable[[int, int], Any], seed: int, steps: range, pool: ProcessPoolExecutor
) -> Iterator[tuple[int, Any]]:
    """Batches of `steps`, drawn two ahead in another process."""
    ahead = {s: pool.submit(draw, seed, s) for s in steps[:2]}
    for step in steps:
        if step + 2 in steps:
            ahead[step + 2] = pool.submit(draw, seed, step + 2)
        yield step, ahead.pop(step).result()


class Trainer:
    """The model, its training-only heads, and the files in `work`."""

    def __init__(self, work: Path, out: Path | None, seed: int, stages: tuple[Stage, ...]) -> None:
        self.work, self.out, self.seed, self.stages = work, out, seed, stages
        self.work.mkdir(parents=True, exist_ok=True)
        self.model: LlavaForConditionalGeneration = build_model(seed)
        self.heads = PatchHeads(self.model.config.vision_config.hidden_size)
        self.all = nn.ModuleDict({"model": self.model, "heads": self.heads})

    def log(self, **row: Any) -> None:
        """One JSON line to stdout and to `log.jsonl`."""
        line = json.dumps({"at": time.strftime("%H:%M:%S"), **row})
        print(line, flush=True)
        with open(self.work / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def run(self) -> None:
        """All stages that have not finished yet; the checkpoint is written after each, and at the end in any case."""
        for number, stage in enumerate(self.stages):
            finished = self.work / f"{stage.name}.pt"
            if not finished.exists():
                self.run_stage(number, stage)
                torch.save(self.all.state_dict(), finished)
                if self.out is not None and stage is not self.stages[-1]:
                    self.export(self.out, *INTERIM)
            self.all.load_state_dict(torch.load(finished, weights_only=True))
        if self.out is not None:
            self.export(self.out, *FINAL)

    def export(self, out: Path, questions: int, seed: int) -> None:
        """Write the checkpoint, score it as a user would run it, and note both in its `training.json`."""
        save_checkpoint(self.model, out)
        done = [json.loads(line) for line in (self.work / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        seconds = {row["stage"]: row["seconds"] for row in done if row.get("done")}
        note = {
            "command": "python -m tokprune.export.demo.train --work DIR --out CHECKPOINT",
            "seed": self.seed,
            "stages": [
                {"name": s.name, "steps": s.steps, "rate": s.rate, "seconds": seconds[s.name]}
                for s in self.stages
                if s.name in seconds
            ],
            "accuracy": evaluate(out, questions, seed),
            "questions": {"count": questions, "seed": seed},
        }
        (out / "training.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        self.log(**note)

    def run_stage(self, number: int, stage: Stage) -> None:
        """Train one stage; the average of its weights is what the next one starts from."""
        state = self.work / f"{stage.name}.state.pt"
        stage.work.prepare(self.model, self.heads, self.seed)
        optimizer, average, start, spent = optimiser(self.all), Average(self.all), 0, 0.0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.all.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            average.values, start, spent = saved["average"], saved["step"], saved["seconds"]
        began, last_save = time.time() - spent, time.time()
        smooth: dict[str, float] = {}
        with ProcessPoolExecutor(1) as pool:
            draw = stage.work.draw
            for step, batch in prefetch(draw, self.seed * 10 + number, range(start, stage.steps), pool):
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(stage, step)
                losses = stage.work.backward(self.model, self.heads, batch)
                trained = [p for p in self.all.parameters() if p.grad is not None]
                losses["norm"] = float(nn.utils.clip_grad_norm_(trained, 1.0))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                average.update(self.all, step)
                smooth = {k: 0.95 * smooth.get(k, v) + 0.05 * v for k, v in losses.items()}
                if step % 50 == 49:
                    shown = {k: round(v, 4) for k, v in smooth.items()}
                    self.log(stage=stage.name, step=step + 1, seconds=round(time.time() - began), **shown)
                if step % 250 == 249:
                    self.log(stage=stage.name, step=step + 1, **self.measured(stage, average))
                if time.time() - last_save > 150:
                    last_save = time.time()
                    torch.save(
                        {
                            "weights": self.all.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "average": average.values,
                            "step": step + 1,
                            "seconds": time.time() - began,
                        },
                        state.with_suffix(".tmp"),
                    )
                    state.with_suffix(".tmp").rename(state)
        self.all.load_state_dict(average.values)
        self.log(stage=stage.name, done=True, seconds=round(time.time() - began))

    def measured(self, stage: Stage, average: Average) -> dict[str, float]:
        """Held-out scores of the averaged weights."""
        current = {k: v.clone() for k, v in self.all.state_dict().items()}
        self.all.load_state_dict(average.values)
        scores = stage.work.measure(self.model, self.heads)
        self.all.load_state_dict(current)
        return {k: round(v, 4) for k, v in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for resumable state and logs")
    parser.add_argument("--out", type=Path, help="checkpoint directory to write after each stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    Trainer(arguments.work, arguments.out, arguments.seed, STAGES).run()


if __name__ == "__main__":
    main()
