"""``tokprune quantize``: parses, quantises, prints."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tokprune.calibration.recipe import given_choices, usual_choices
from tokprune.export.cli.scheme import Asked, scheme_options
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest
from tokprune.runtime.recipe import INTEGERS, Choice, Recipe, chosen_groups, load_recipe
from tokprune.runtime.recipe_report import budget_text, recipe_report

INTEGER_CHOICE = click.Choice(INTEGERS)
PURPOSES = ("size", "speed")
SAMPLES = 128  # questions that costs are measured on, and as many to verify on


@click.command("quantize", epilog="Example: tokprune quantize bundle --precision int4 --out bundle-int4")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", type=INTEGER_CHOICE, help="Of the decoder layers' matrices; all else stays as it is.")
@click.option("--lm-head", "head", type=click.Choice(["int8"]), help="Of the head, weights only. [default: it stays]")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="A recipe.json: what it asks for, matrix by matrix, instead of --precision and --lm-head.",
)
@scheme_options
@click.option("--seed", type=click.IntRange(min=0), help="Of the draw of --samples. [default: 0]")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="NAME=X",
    help="What must be kept of the bundle's answers to --data: agreement=0.99 or top1=0.99 at least, a mean kl=0.01 at "
    "most. What costs most stays as it is, until the rest keeps to it; again for more.",
)
@click.option(
    "--for",
    "purpose",
    type=click.Choice(PURPOSES),
    help="--budget: round all that it allows, or of that only what is measured to be faster here. "
    "[default: speed with smoothquant, else size]",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
def command(
    bundle: Path,
    precision: str | None,
    head: str | None,
    recipe_file: Path | None,
    budgets: tuple[str, ...],
    purpose: str | None,
    out: Path,
    as_json: bool,
    **scheme: Any,
) -> None:
    """Round matrices of BUNDLE, which is in FP32 or FP16, to INT8 or INT4.

    By default those of decoder layers, weights only, to nearest, which needs no data. All else keeps BUNDLE's type.
    With --scheme smoothquant activations are rounded as well, and so are vision tower and projector.
    """
    from tokprune.export.bundle import check_out
    from tokprune.export.quantize import check_base, find_matrices, quantize
    from tokprune.runtime.bundle import open_bundle

    begin = time.perf_counter()
    check_out(out)
    given = None if recipe_file is None else load_recipe(recipe_file)
    asked = Asked(**scheme)
    precision = _precision(precision, head, given, asked)
    opened = open_bundle(bundle, check_hashes=True)
    check_base(opened, precision)
    matrices = find_matrices(opened)
    if given is None:
        choices = usual_choices(list(matrices), precision, head, asked.form)
    else:
        choices = given_choices(given, str(recipe_file), matrices)
    asked.check(choices, precision, uses_data=bool(budgets))
    found: dict[str, Any] = {}
    if budgets:
        manifest, recipe, found = _within(opened, out, precision, choices, asked, budgets, purpose, as_json)
    elif purpose is not None:
        raise UserError(f"--for {purpose} was given without --budget, which it is about: add one, or drop it")
    else:
        calibrated = asked.scheme_of(opened, choices)
        groups = len(chosen_groups(choices))
        with click.progressbar(length=groups, label="quantising layers", file=sys.stderr) as bar:
            manifest, recipe = quantize(opened, out, precision, choices, calibrated, lambda group: bar.update(1))
    seconds, totals = time.perf_counter() - begin, recipe.totals()
    if as_json:
        size = sum(file.size for file in manifest.files)
        click.echo(json.dumps({"bundle": str(out), **totals, **found, "size_bytes": size, "seconds": seconds}))
    else:
        click.echo(recipe_report(totals, [dataclasses.asdict(matrix) for matrix in recipe.matrices]))
        if found:
            click.echo(budget_text(found))
        click.echo(f"{out}: written in {seconds:.1f} s")


def _within(
    bundle: Bundle,
    out: Path,
    precision: str,
    choices: Mapping[str, Choice],
    asked: Asked,
    budgets: Sequence[str],
    purpose: str | None,
    as_json: bool,
) -> tuple[Manifest, Recipe, dict[str, Any]]:
    """The bundle within the budgets, and what ``--json`` says of it. Ends with 1 if there is none."""
    from tokprune.calibration.budget import parse_budget
    from tokprune.export.within import BudgetMissed, Wanted, quantize_within
    from tokprune.runtime.data import read_samples

    limits = tuple(map(parse_budget, budgets))
    if asked.data is None:
        raise UserError(
            "--budget is held against answers, and --data was not given: give JSON lines of image and prompt"
        )
    samples = read_samples(asked.data)
    count = asked.samples or max(1, min(SAMPLES, len(samples) // 2))  # as many others to verify on
    asked = dataclasses.replace(asked, samples=count)
    rounds = any(choice.activation is not None for choice in choices.values())
    wanted = Wanted(limits, purpose or PURPOSES[rounds], count, asked.seed or 0)
    try:
        manifest, recipe, outcome = quantize_within(
            bundle, out, precision, choices, samples, wanted, lambda c: asked.scheme_of(bundle, c), _progress()
        )
    except BudgetMissed as error:
        found = error.outcome.record() | {"budget": list(map(str, limits)), "met": False}
        if as_json:
            click.echo(json.dumps(found))
        click.echo(f"no recipe keeps to {' and '.join(map(str, limits))}: nothing was written", err=True)
        click.echo(budget_text(found), err=True)
        sys.exit(1)
    return manifest, recipe, outcome.record() | {"budget": list(map(str, limits)), "met": True}


def _progress() -> Callable[[str, int, int], None]:
    """A line on stderr for each step, and for each tenth of it."""
    told = ("", 0)

    def tell(step: str, done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // total
        if (step, tenth) != told:
            told = (step, tenth)
            click.echo(f"{step}: {done} of {total}", err=True)

    return tell


def _precision(asked: str | None, head: str | None, given: Recipe | None, scheme: Asked) -> str:
    """What is asked for, by one of the ways to say it. Raises UserError if it is said twice, or not at all."""
    if given is None:
        if asked is None:
            raise UserError("neither --precision nor --recipe was given: say what matrices are to become")
        return asked
    if head is not None or asked not in (None, given.precision):
        option = "--lm-head" if head is not None else f"--precision {asked}"
        raise UserError(f"{option} was given beside a recipe in {given.precision}, which says it already: drop one")
    said = next((f"--{name}" for name in ("scheme", "range") if getattr(scheme, name) is not None), None)
    if said is not None:
        raise UserError(f"{said} was given beside a recipe, which says it already: drop one")
    return given.precision
