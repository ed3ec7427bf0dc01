"""``tokprune bench``: parses, times, prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tokprune.runtime.bench import bench
from tokprune.runtime.chat import load
from tokprune.runtime.report import bench_report
from tokprune.runtime.session import ENGINES


@click.command("bench", epilog="Example: tokprune bench bundle --against unpruned-bundle")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The same model exported with --method none.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Measured rounds.")
@click.option("--text-tokens", type=click.IntRange(min=2), default=36, show_default=True, help="Beside the image's.")
@click.option("--new-tokens", type=click.IntRange(min=0), default=8, show_default=True, help="Decode steps a round.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
@click.option(
    "--plugins", type=click.Path(path_type=Path), help="For onnxruntime-tensorrt: a library of TensorRT plugins."
)
@click.option("--threads", default=0, show_default=True, help="CPU threads; 0 lets the engine choose.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    bundle: Path,
    against: Path | None,
    rounds: int,
    text_tokens: int,
    new_tokens: int,
    engine: str,
    plugins: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Time BUNDLE's segments; with --against, also the share of the theoretical saving that was realised."""
    pruned = load(bundle, engine=engine, threads=threads, plugins=plugins).pipeline
    full = None if against is None else load(against, engine=engine, threads=threads, plugins=plugins).pipeline
    with click.progressbar(length=rounds + 2, label="timing", file=sys.stderr) as bar:
        result = bench(
            pruned,
            full,
            text_tokens=text_tokens,
            rounds=rounds,
            new_tokens=new_tokens,
            progress=lambda _: bar.update(1),
        )
    click.echo(json.dumps(result) if as_json else bench_report(result))
