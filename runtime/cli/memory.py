"""``tokprune memory``: parses, plans, prints. Reads a config or a manifest, never a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tokprune.runtime import jetson, memory, report
from tokprune.runtime.cli.models import asked_plan, model_and_plan_options, read_bundle, read_model
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import make_limits
from tokprune.runtime.plan import Plan
from tokprune.runtime.recipe import check_head, integer_bytes
from tokprune.runtime.weights import PRECISIONS


@click.command(
    "memory",
    epilog="Example: tokprune memory --model 7b --stage 2:64 --precision fp16 --new-tokens 512",
)
@model_and_plan_options
@click.option("--new-tokens", default=memory.NEW_TOKENS, show_default=True, help="Tokens of the answer.")
@click.option("--images", default=1, show_default=True, help="Images in each prompt.")
@click.option("--batch", default=1, show_default=True, help="Prompts at once.")
@click.option(
    "--max-kv-cache-capacity",
    "capacity",
    type=int,
    help="Tokens that TensorRT's KV caches are made for. [default: the bundle's, or the model's context]",
)
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: the bundle's, or fp16]")
@click.option(
    "--tower",
    type=click.Choice(["int8"]),
    help="Of vision tower and projector, as --scheme smoothquant has them.",
)
@click.option("--lm-head", "head", type=click.Choice(["int8"]), help="int8, int4: of the head. [default: all else's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    text_tokens: int,
    new_tokens: int,
    images: int,
    batch: int,
    capacity: int | None,
    precision: str | None,
    head: str | None,
    tower: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Predict the memory that a model takes under a pruning plan, and which Jetson modules have it.

    Without --method, --stage, --layer and --keep a bundle is planned as it is, any other model unpruned.
    """
    manifest = read_bundle(model)
    facts = read_model(model) if manifest is None else manifest.model
    plan = asked_plan(facts, **asked)
    work = memory.Work(text_tokens, new_tokens, images, batch)
    weights = base = integers = None
    if manifest is not None:
        if plan is None and precision in (None, manifest.precision) and head is None and tower is None:
            weights, integers = manifest.memory, integer_bytes(Path(model))
        plan, precision = plan or manifest.plan, precision or manifest.precision
        base = manifest.base if precision == manifest.precision else None
        capacity = manifest.limits.max_kv_capacity if capacity is None else capacity
    check_head(head, precision or "fp16")
    if tower is not None and precision != tower:
        raise UserError(f"--tower {tower} was given for precision '{precision or 'fp16'}': it belongs to int8, drop it")
    capacity = make_limits(facts.context, max_kv_capacity=capacity).max_kv_capacity
    plan, precision = plan or Plan("none"), precision or "fp16"
    found = memory.memory_plan(facts, plan, precision, work, weights, capacity, base, head, tower, integers)
    result = jetson.memory_record(found)
    click.echo(json.dumps(result) if as_json else report.memory_report(result))
