"""What verbs that only compute have in common: a model by name or directory, and a plan from options.

Reads a config or a manifest, never a weight.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tokprune.runtime import flops, names
from tokprune.runtime.bundle import read_manifest
from tokprune.runtime.config import model_facts
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest, ModelFacts
from tokprune.runtime.memory import TEXT_TOKENS
from tokprune.runtime.plan import (
    DEFAULT_KEEP,
    DEFAULT_LAYER,
    DEFAULT_RANK,
    METHODS,
    Plan,
    default_module,
    lvpruning_stages,
    make_plan,
    parse_keep,
    parse_rank,
    parse_stage,
)

PRESETS = {"7b": flops.SEVEN_B, "13b": flops.THIRTEEN_B}

_OPTIONS = (
    click.option(
        "--model", default="demo", show_default=True, help="7b, 13b, demo, or a directory: checkpoint, bundle."
    ),
    click.option("--text-tokens", default=TEXT_TOKENS, show_default=True, help="Prompt tokens beside the image's."),
    click.option("--stage", "stages", multiple=True, metavar="L:K", help="Keep K tokens from layer L on."),
    click.option("--layer", type=int, help="With --keep: the one layer in front of which to prune."),
    click.option("--keep", metavar="K", help="With --layer: visual tokens kept, or a fraction of them, as 0.25."),
    click.option(
        "--method",
        type=click.Choice([method for method in METHODS if method != "none"]),
        help="What selects, lofi if not given; alone, with its default stages.",
    ),
    click.option("--rank", help=f"lofi: components, or a fraction of the energy as 0.9. [default: {DEFAULT_RANK}]"),
)


def model_and_plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--model, --text-tokens and the options of a plan, as arguments of ``function``."""
    return functools.reduce(lambda command, option: option(command), reversed(_OPTIONS), function)


def asked_plan(
    facts: ModelFacts,
    stages: tuple[str, ...],
    layer: int | None,
    keep: str | None,
    method: str | None,
    rank: str | None,
) -> Plan | None:
    """The plan that options ask for; None if they ask for none. Raises UserError if they do not fit together."""
    visual = facts.vision.tokens
    pairs = [parse_stage(stage, visual) for stage in stages]
    if (layer is None) != (keep is None):
        raise UserError("--layer and --keep name one stage together: give both, or --stage L:K")
    if layer is not None and keep is not None:
        if pairs:
            raise UserError("--stage was given beside --layer and --keep: give all stages as --stage L:K")
        pairs = [(layer, parse_keep(keep, visual))]
    if method == "lvpruning" and not pairs:
        pairs = lvpruning_stages(facts.layers, visual)
    elif method is not None and not pairs:
        pairs = [(DEFAULT_LAYER, parse_keep(DEFAULT_KEEP, visual))]
    if rank is not None and not pairs:
        raise UserError(f"--rank {rank} was given without a stage to use it at: add --stage L:K")
    if not pairs:
        return None
    method = method or "lofi"
    if rank is not None and method != "lofi":
        raise UserError(f"--rank was given for method '{method}': it belongs to lofi only, drop it")
    asked = parse_rank(rank or DEFAULT_RANK) if method == "lofi" else None
    module = default_module(facts.hidden) if method == "lvpruning" else None
    return make_plan(method, pairs, layers=facts.layers, visual_tokens=visual, rank=asked, module=module)


def read_bundle(model: str) -> Manifest | None:
    """The manifest at ``model``, if that is a bundle's directory; its other files are not looked at."""
    path = Path(model)
    return read_manifest(path) if (path / names.MANIFEST_FILE).is_file() else None


def read_model(model: str) -> ModelFacts:
    """Facts of a preset, of the demo model or of a checkpoint's directory. Raises UserError if it is none."""
    if model in PRESETS:
        return PRESETS[model]
    path = demo_config() if model == "demo" else Path(model) / "config.json"
    if not path.is_file():
        raise UserError(
            f"--model {model} is neither {', '.join(PRESETS)} nor demo, nor a directory with a config.json "
            f"or a {names.MANIFEST_FILE}: give one of these"
        )
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download the checkpoint again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: download the checkpoint again")
    return model_facts(config, model)


def demo_config() -> Path:
    """The shipped checkpoint's config.json, found without importing ``tokprune.export`` and its torch."""
    spec = importlib.util.find_spec("tokprune.export")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("--model demo needs the demo checkpoint of tokprune.export, which is not installed here")
    return Path(spec.submodule_search_locations[0]) / "demo" / "checkpoint" / "config.json"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): check the file") from None
