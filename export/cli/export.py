"""``tokprune export``, also ``tokprune-export``: parses, exports, prints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokprune.export.cli.scheme import Asked, scheme_options
from tokprune.plugins.build import LIBRARY
from tokprune.runtime import jetson, memory, report
from tokprune.runtime.engines.targets import JETSON
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import DEFAULT_BATCH, make_limits
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.plan import (
    DEFAULT_KEEP,
    DEFAULT_LAYER,
    DEFAULT_RANK,
    METHODS,
    Plan,
    Rank,
    make_plan,
    parse_keep,
    parse_rank,
    parse_stage,
)
from tokprune.runtime.recipe import check_head, integer_bytes
from tokprune.runtime.weights import BASES, PRECISIONS

ANY = "any"

if TYPE_CHECKING:
    from tokprune.export.lvpruning.modules import Modules


@click.command("export", epilog="Example: tokprune-export --method lofi --layer 2 --keep 64 --out bundle")
@click.option("--model", default="demo", show_default=True, help="Checkpoint directory, hub id, or 'demo'.")
@click.option("--method", type=click.Choice(METHODS), required=True, help="What scores the visual tokens.")
@click.option(
    "--layer",
    type=int,
    help=f"Decoder layer before which to prune; 0 is the first. [default: {DEFAULT_LAYER}]",
)
@click.option("--keep", help=f"Visual tokens kept: a count, or a fraction as 0.1. [default: {DEFAULT_KEEP}]")
@click.option("--rank", help=f"lofi: components, or a fraction of the energy as 0.9. [default: {DEFAULT_RANK}]")
@click.option("--stage", "stage_texts", multiple=True, metavar="L:K", help="Layer and keep; again for more stages.")
@click.option(
    "--modules",
    "modules_dir",
    type=click.Path(path_type=Path),
    help="lvpruning: what 'tokprune train' wrote; its stages are the default. For demo also 'default' and 'early'.",
)
@click.option("--seed", type=click.IntRange(min=0), help="random: seed of the draw. [default: 0]")
@click.option(
    "--target",
    type=click.Choice([ANY, JETSON]),
    default=ANY,
    show_default=True,
    help=f"What it is for. A bundle runs everywhere; {JETSON} means FP16, and says what to do there.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help=f"int8 and int4: of the decoder layers' matrices only. [default: fp32, for {JETSON} fp16]",
)
@click.option(
    "--base",
    type=click.Choice(BASES),
    help=f"int8, int4: precision of all else. [default: fp32, for {JETSON} fp16]",
)
@click.option("--lm-head", "head", type=click.Choice(["int8"]), help="int8, int4: of the head. [default: --base's]")
@scheme_options
@click.option(
    "--split-lm-head",
    "head_pieces",
    type=click.IntRange(min=2, max=64),
    metavar="PIECES",
    help="Store the head, the largest product, in so many weights: for devices that cannot allocate it whole.",
)
@click.option("--max-batch-size", type=click.IntRange(min=1), help=f"Prompts at a time. [default: {DEFAULT_BATCH}]")
@click.option(
    "--max-input-len",
    type=click.IntRange(min=1),
    help="Tokens of a prompt, its images unpruned. [default: as many as fit]",
)
@click.option(
    "--max-kv-cache-capacity",
    type=click.IntRange(min=1),
    help="Tokens of prompt and answer, images unpruned. [default: the model's context]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Bundle to write. [default: MODEL-METHOD]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
def command(
    model: str,
    method: str,
    layer: int | None,
    keep: str | None,
    rank: str | None,
    stage_texts: tuple[str, ...],
    modules_dir: Path | None,
    seed: int | None,
    target: str,
    precision: str | None,
    base: str | None,
    head: str | None,
    head_pieces: int | None,
    max_batch_size: int | None,
    max_input_len: int | None,
    max_kv_cache_capacity: int | None,
    out: Path | None,
    as_json: bool,
    **scheme: Any,
) -> None:
    """Export a LLaVA-1.5 checkpoint to a bundle of ONNX segments, split where visual tokens are pruned."""
    begin = time.perf_counter()
    _progress_line("reading the checkpoint's configuration")
    # imported here, so that --help does not wait for PyTorch
    from tokprune.export.bundle import check_out
    from tokprune.export.checkpoint import find_checkpoint
    from tokprune.export.pipeline import export, steps

    if rank is not None and method != "lofi":
        raise UserError(f"--rank was given for method '{method}': it belongs to lofi only, drop it")
    if seed is not None and method != "random":
        raise UserError(f"--seed was given for method '{method}': it belongs to random only, drop it")
    if modules_dir is not None and method != "lvpruning":
        raise UserError(f"--modules was given for method '{method}': they belong to lvpruning only, drop it")
    checkpoint = find_checkpoint(model)
    if method == "lvpruning":
        if layer is not None or keep is not None:
            raise UserError("method 'lvpruning' prunes at the layers of its modules: give --stage L:K to change a keep")
        modules = _modules(checkpoint.facts, model, modules_dir)
        plan = _plan_of_modules(checkpoint.facts, modules, stage_texts)
    else:
        modules = None
        plan = _plan(checkpoint.facts, method, layer, keep, rank, stage_texts, seed or 0)
    limits = make_limits(
        checkpoint.facts.context,
        max_batch=max_batch_size,
        max_input_length=max_input_len,
        max_kv_capacity=max_kv_cache_capacity,
    )
    usual = "fp16" if target == JETSON else "fp32"
    precision = precision or usual
    if precision in BASES:
        if base is not None:
            raise UserError(f"--base was given for precision '{precision}': it belongs to int8 and int4 only, drop it")
        base = precision
    base = base or usual
    check_head(head, precision)
    asked = Asked(**scheme)
    if precision in BASES:
        asked.refuse(f"for precision '{precision}': it belongs to int8 and int4 only, drop it")
        form = None
    else:
        form = asked.form
        asked.check({"matrices": form}, precision)
    out = out or Path(f"{Path(model).name}-{method}")
    check_out(out)
    total, done = steps(plan, checkpoint.facts, precision, head, form), 0

    def progress(step: str) -> None:
        nonlocal done
        done += 1
        _progress_line(f"[{done}/{total}] {step}")

    manifest = export(
        checkpoint,
        plan,
        out,
        precision=precision,
        base=base,
        head=head,
        head_pieces=head_pieces or 1,
        progress=progress,
        note=_progress_line,
        modules=modules,
        limits=limits,
        form=form,
        scheme=asked.scheme_of,
    )
    seconds = time.perf_counter() - begin
    size = sum(file.size for file in manifest.files)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": str(out),
                    "method": plan.method,
                    "stages": [{"layer": stage.layer, "kept": stage.keep} for stage in plan.stages],
                    "precision": precision,
                    "base": base,
                    "segments": [segment.name for segment in manifest.segments],
                    "size_bytes": size,
                    "seconds": seconds,
                }
            )
        )
    else:
        kind = report.precision_text({"precision": precision, "base": base})
        click.echo(f"{out}: {plan}; {kind}, {len(manifest.segments)} segments, {size / 1e6:.1f} MB, {seconds:.1f} s")
    click.echo(
        report.memory_verdict(jetson.memory_record(memory.from_manifest(manifest, integers=integer_bytes(out)))),
        err=True,
    )
    if target == JETSON:
        plugins = any(segment.plugin_file for segment in manifest.segments)
        make, use = (
            ("tokprune build-plugins --out plugins, then ", f" --plugins plugins/{LIBRARY}") if plugins else ("", "")
        )
        click.echo(f"Next, on the Jetson: {make}tokprune build {out.name} --target {JETSON}{use}", err=True)


def _plan(
    facts: ModelFacts,
    method: str,
    layer: int | None,
    keep: str | None,
    rank: str | None,
    stage_texts: tuple[str, ...],
    seed: int,
) -> Plan:
    tokens = facts.vision.tokens
    if stage_texts and (layer is not None or keep is not None):
        raise UserError("--stage was given together with --layer or --keep: say it one way only")
    if stage_texts:
        stages = [parse_stage(text, tokens) for text in stage_texts]
    elif method == "none":
        if layer is not None or keep is not None:
            raise UserError("method 'none' prunes nothing, but --layer or --keep was given: drop them")
        stages = []
    else:
        kept = parse_keep(DEFAULT_KEEP if keep is None else keep, tokens)
        stages = [(DEFAULT_LAYER if layer is None else layer, kept)]
    components: Rank | None = parse_rank(DEFAULT_RANK if rank is None else rank) if method == "lofi" else None
    return make_plan(method, stages, layers=facts.layers, visual_tokens=tokens, rank=components, seed=seed)


def _modules(facts: ModelFacts, model: str, path: Path | None) -> Modules:
    """The modules at ``path``, or for the demo model a set that ships with it, by name, if they fit the model."""
    from tokprune.export import demo
    from tokprune.export.checkpoint import DEMO
    from tokprune.export.lvpruning.modules import check_fits, load_modules

    if model == DEMO and (path is None or (str(path) in demo.MODULES and not path.exists())):
        path = demo.modules_dir(str(path or demo.MODULES[0]))
    if path is None:
        raise UserError(
            "method 'lvpruning' needs modules trained for the model, and --modules was not given: "
            "make them with 'tokprune train'"
        )
    modules = load_modules(path)
    check_fits(modules, facts)
    return modules


def _plan_of_modules(facts: ModelFacts, modules: Modules, stage_texts: tuple[str, ...]) -> Plan:
    tokens = facts.vision.tokens
    trained = [(stage.layer, stage.keep) for stage in modules.stages]
    stages = [parse_stage(text, tokens) for text in stage_texts] or trained
    layers, trained_layers = ([layer for layer, _ in pairs] for pairs in (stages, trained))
    if layers != trained_layers:
        raise UserError(
            f"stages at the layers {_listed(layers)} were asked for, the modules were trained for the layers "
            f"{_listed(trained_layers)}: give --stage for each of these, in this order, or train others"
        )
    return make_plan("lvpruning", stages, layers=facts.layers, visual_tokens=tokens, module=modules.module)


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _progress_line(text: str) -> None:
    click.echo(text, err=True)
