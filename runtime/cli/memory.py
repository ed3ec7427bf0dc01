"""``tokprune memory``: parses, plans, prints. Reads a config or a manifest, never a weight."""

from __future__ import annotations

import json
from typing import Any

import click

from tokprune.runtime import jetson, memory, report
from tokprune.runtime.cli.models import asked_plan, model_and_plan_options, read_bundle, read_model
from tokprune.runtime.plan import Plan
from tokprune.runtime.weights import PRECISIONS


@click.command(
    "memory",
    epilog="Example: tokprune memory --model 7b --stage 2:64 --precision fp16 --new-tokens 512",
)
@model_and_plan_options
@click.option("--new-tokens", default=memory.NEW_TOKENS, show_default=True, help="Tokens of the answer.")
@click.option("--images", default=1, show_default=True, help="Images in each prompt.")
@click.option("--batch", default=1, show_default=True, help="Prompts at once.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: the bundle's, or fp16]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    text_tokens: int,
    new_tokens: int,
    images: int,
    batch: int,
    precision: str | None,
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
    if manifest is not None and plan is None and precision in (None, manifest.precision):
        found = memory.from_manifest(manifest, work)
    else:
        if plan is None:
            plan = Plan("none") if manifest is None else manifest.plan
        precision = precision or ("fp16" if manifest is None else manifest.precision)
        found = memory.memory_plan(facts, plan, precision, work)
    result = jetson.memory_record(found)
    click.echo(json.dumps(result) if as_json else report.memory_report(result))
