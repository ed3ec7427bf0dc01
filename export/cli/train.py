"""``tokprune train``: parses, trains LVPruning's modules, prints."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Module, default_module, lvpruning_stages, make_plan, parse_stage

if TYPE_CHECKING:
    from tokprune.export.lvpruning.train import Report


@click.command("train", epilog="Example: tokprune train --model demo --data data.jsonl --steps 1000 --out modules")
@click.option("--model", default="demo", show_default=True, help="Checkpoint directory, hub id, or 'demo'.")
@click.option(
    "--data",
    "data_file",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON lines of image, prompt and answer, or a JSON list of LLaVA's conversations.",
)
@click.option("--images", type=click.Path(path_type=Path), help="Conversations: what their images are relative to.")
@click.option(
    "--stage",
    "stage_texts",
    multiple=True,
    metavar="L:K",
    help="Layer and visual tokens kept; again for more stages. [default: three, 10 % left from the middle on]",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of modules to write.")
@click.option("--width", type=int, help="Inner width of a module. [default: about hidden size / 16]")
@click.option("--heads", type=int, help="Attention heads of a module. [default: width / 32]")
@click.option("--intermediate", type=int, help="MLP width of a module. [default: 4 × width]")
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Examples at a time.")
@click.option(
    "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches that make one step."
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="At its peak.")
@click.option(
    "--ratio-weight", type=float, default=2.0, show_default=True, help="Weight of (tokens kept − target)² in the loss."
)
@click.option(
    "--guided-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps to begin with that learn what the text attends to, not what the answer needs.",
)
@click.option(
    "--guidance-weight",
    type=float,
    default=0.0,
    show_default=True,
    help="Weight of the same in the loss of later steps.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--checkpointing", is_flag=True, help="Less memory: compute layers again for the gradient.")
@click.option("--restart", is_flag=True, help="Begin again where an earlier training was stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
def command(
    model: str,
    data_file: Path,
    images: Path | None,
    stage_texts: tuple[str, ...],
    out: Path,
    width: int | None,
    heads: int | None,
    intermediate: int | None,
    steps: int,
    batch_size: int,
    accumulate: int,
    learning_rate: float,
    ratio_weight: float,
    guided_steps: int,
    guidance_weight: float,
    seed: int,
    device: str,
    checkpointing: bool,
    restart: bool,
    as_json: bool,
) -> int:
    """Train LVPruning's modules, which score visual tokens by the question, on a frozen LLaVA-1.5.

    A training that was stopped goes on where it was when the same command is given again.
    """
    _echo("reading the checkpoint's configuration")
    # imported here, so that --help does not wait for PyTorch
    import torch

    from tokprune.export.checkpoint import find_checkpoint
    from tokprune.export.lvpruning.data import read_examples
    from tokprune.export.lvpruning.modules import check_modules_out
    from tokprune.export.lvpruning.train import Settings, choose_device, train

    for option, value in (("--learning-rate", learning_rate), ("--ratio-weight", ratio_weight)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{option} {value} was asked for: give a positive number")
    if not (math.isfinite(guidance_weight) and guidance_weight >= 0):
        raise UserError(f"--guidance-weight {guidance_weight} was asked for: give 0 or a positive number")
    if guided_steps > steps:
        raise UserError(f"{guided_steps} guided steps of {steps} were asked for: give a greater --steps")
    checkpoint = find_checkpoint(model)
    facts = checkpoint.facts
    tokens = facts.vision.tokens
    stages = [parse_stage(text, tokens) for text in stage_texts] or lvpruning_stages(facts.layers, tokens)
    sizes = _sizes(default_module(facts.hidden), width, heads, intermediate)
    plan = make_plan("lvpruning", stages, layers=facts.layers, visual_tokens=tokens, module=sizes)
    check_modules_out(out)
    where, dtype = choose_device(device)
    data = read_examples(data_file, images)
    if data.without_image:
        _echo(f"left out for want of an image: {data.without_image}")
    _echo(f"{len(data.examples)} questions; {plan}; {where.type}, {str(dtype).removeprefix('torch.')}")
    printed, at = time.monotonic(), 0

    def report(now: Report) -> None:
        nonlocal printed, at
        at = now.step
        if now.step in (1, now.steps) or time.monotonic() - printed >= 5:
            printed = time.monotonic()
            _echo(_line(now))

    try:
        modules = train(
            checkpoint,
            plan,
            data,
            Settings(steps, batch_size, accumulate, learning_rate, ratio_weight, seed, guided_steps, guidance_weight),
            out,
            device=where,
            dtype=dtype,
            checkpointing=checkpointing,
            restart=restart,
            report=report,
        )
    except KeyboardInterrupt:
        _echo(f"Stopped at step {at}: the same command goes on from the last minute, with --restart it begins again.")
        return 130
    except torch.OutOfMemoryError:
        raise UserError(
            f"the GPU's memory is full with --batch-size {batch_size}: give fewer, with --accumulate for as many a "
            "step, or --checkpointing"
        ) from None
    training = modules.training
    if as_json:
        result = {
            "modules": str(out),
            "method": plan.method,
            "stages": [{"layer": stage.layer, "kept": stage.keep} for stage in plan.stages],
            "steps": steps,
            "final": training["final"],
            "seconds": training["seconds"],
        }
        click.echo(json.dumps(result))
    else:
        click.echo(f"{out}: {plan}; {_losses(training['final'])}, {_duration(training['seconds'])}")
        click.echo(f"Next: tokprune-export --model {model} --method lvpruning --modules {out}")
    return 0


def _sizes(default: Module, width: int | None, heads: int | None, intermediate: int | None) -> Module:
    """The sizes that were asked for; what was not follows the width, as in `default_module`."""
    if width is None:
        width = default.width
    if heads is None:
        heads = max(1, width // 32)
    return Module(width, heads, 4 * width if intermediate is None else intermediate)


def _line(now: Report) -> str:
    """What is printed of a step."""
    kept = f"kept {' '.join(f'{share:.1%}' for share in now.kept)}"
    losses = _losses({"loss": now.loss, "lm": now.lm, "guidance": now.guidance})
    left = f"{now.samples_per_second:.1f} samples/s  {_duration(now.seconds_left)} left"
    return f"step {now.step}/{now.steps}  {losses}  {kept}  {left}"


def _losses(figures: dict[str, Any]) -> str:
    """The loss and those of its parts that were measured."""
    return "  ".join(
        f"{name} {figures[name]:.4f}" for name in ("loss", "lm", "guidance") if figures.get(name) is not None
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _echo(text: str) -> None:
    click.echo(text, err=True)
