"""``tokprune flops``: parses, counts, prints. Reads a config or a manifest, never a weight."""

from __future__ import annotations

import json
from typing import Any

import click

from tokprune.runtime import flops, report
from tokprune.runtime.cli.models import asked_plan, model_and_plan_options, read_bundle, read_model
from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Plan

SELECTORS_CLOSED = {
    "lofi": "in closed form",
    "lvpruning": "in closed form",
    "fastv": "no products: the attention row is the decoder's",
    "random": "no products",
    "uniform": "no products",
}


@click.command(
    "flops",
    epilog="Example: tokprune flops --model 7b --stage 2:192 --stage 16:64",
)
@model_and_plan_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    text_tokens: int,
    as_json: bool,
    **asked: Any,
) -> None:
    """Count the FLOPs of a model under a pruning plan.

    Without --method, --stage, --layer and --keep a bundle is counted with its own plan, any other model unpruned.
    """
    manifest = read_bundle(model)
    facts = read_model(model) if manifest is None else manifest.model
    visual = facts.vision.tokens
    if not 1 <= text_tokens <= facts.context - visual:
        raise UserError(
            f"--text-tokens {text_tokens} was asked for, but {facts.name} has room for "
            f"{facts.context} tokens, {visual} of them visual: choose 1 to {facts.context - visual}"
        )
    plan = asked_plan(facts, **asked)
    if plan is not None:
        result = flops.summary(flops.closed_form(facts, plan), text_tokens, SELECTORS_CLOSED[plan.method])
    elif manifest is not None:
        result = flops.summary(flops.from_manifest(manifest), text_tokens, "counted from the graph")
    else:
        result = flops.summary(flops.closed_form(facts, Plan("none")), text_tokens, "none")
    click.echo(json.dumps(result) if as_json else report.flops_report(result))
