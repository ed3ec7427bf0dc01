"""``tokprune quantize``: parses, quantises, prints."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import click

from tokprune.runtime import report
from tokprune.runtime.weights import BASES, PRECISIONS


@click.command("quantize", epilog="Example: tokprune quantize bundle --precision int4 --out bundle-int4")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice([precision for precision in PRECISIONS if precision not in BASES]),
    required=True,
    help="Of the decoder layers' matrices; all else stays as it is.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
def command(bundle: Path, precision: str, out: Path, as_json: bool) -> None:
    """Round the matrices in BUNDLE's decoder layers to INT8 or INT4, weights only, to nearest.

    BUNDLE is in FP32 or FP16, which its activations and all other weights keep.
    """
    from tokprune.export.bundle import check_out
    from tokprune.export.quantize import quantize
    from tokprune.runtime.bundle import open_bundle

    begin = time.perf_counter()
    check_out(out)
    opened = open_bundle(bundle, check_hashes=True)
    with click.progressbar(length=opened.manifest.model.layers, label="quantising layers", file=sys.stderr) as bar:
        manifest, recipe = quantize(opened, out, precision, lambda layer: bar.update(1))
    seconds, totals = time.perf_counter() - begin, recipe.totals()
    if as_json:
        size = sum(file.size for file in manifest.files)
        click.echo(json.dumps({"bundle": str(out), **totals, "size_bytes": size, "seconds": seconds}))
    else:
        click.echo(report.recipe_report(totals, [dataclasses.asdict(matrix) for matrix in recipe.matrices]))
        click.echo(f"{out}: written in {seconds:.1f} s")
