"""``tokprune demo-data``: parses, draws, prints."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo-data", epilog="Example: tokprune demo-data --n 100 --out scenes")
@click.option("--n", "count", type=click.IntRange(min=1), required=True, help="Questions to write.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory to write: images and data.jsonl."
)
@click.option("--seed", default=0, show_default=True, help="Another seed, other scenes.")
@click.option(
    "--split",
    type=click.Choice(["held-out", "train"]),
    default="held-out",
    show_default=True,
    help="Handwriting to draw from; train is augmented, and for 'tokprune train' only.",
)
def command(count: int, out: Path, seed: int, split: str) -> None:
    """Draw scenes of handwritten digits, with questions and answers, for the demo model."""
    from tokprune.export.demo.scenes import demo_data

    demo_data(count, out, seed, held_out=split == "held-out")
    click.echo(f"{out / 'data.jsonl'}: {count} questions")
