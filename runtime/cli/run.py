"""``tokprune run``: parses, asks, prints."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tokprune.runtime.chat import load, result_record
from tokprune.runtime.errors import UserError
from tokprune.runtime.generate import Sampling
from tokprune.runtime.overlay import check_overlay_path, draw_overlay
from tokprune.runtime.preprocess import load_image, original_box
from tokprune.runtime.report import run_report
from tokprune.runtime.session import ENGINES


@click.command(
    "run",
    epilog="Example: tokprune run bundle --image cat.png --prompt 'What is this?' --overlay kept.png",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Image of the first question; again for more of them; without it, text only.",
)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Question; give it again for further turns.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Stop after so many tokens an answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the smallest set with this probability.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
@click.option(
    "--plugins", type=click.Path(path_type=Path), help="For onnxruntime-tensorrt: a library of TensorRT plugins."
)
@click.option("--threads", default=0, show_default=True, help="CPU threads; 0 lets the engine choose.")
@click.option("--check-hashes", is_flag=True, help="Hash large files too before running.")
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Write a picture of the kept patches here; of several images one each, numbered from 0.",
)
@click.option("--scores", is_flag=True, help="Add the selector's scores to --json.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the answer.")
def command(
    bundle: Path,
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    engine: str,
    plugins: Path | None,
    threads: int,
    check_hashes: bool,
    overlay: Path | None,
    scores: bool,
    as_json: bool,
) -> None:
    """Answer a question about images with BUNDLE, on this machine, without PyTorch."""
    if overlay is not None and not images:
        raise UserError("--overlay was given without an image to draw on: give --image")
    if overlay is not None:
        check_overlay_path(overlay)
    sampling = Sampling(temperature, top_p, seed)
    pictures = [load_image(image) for image in images]
    model = load(bundle, engine=engine, threads=threads, plugins=plugins, check_hashes=check_hashes)
    chat = model.chat()
    turns = []
    for turn, prompt in enumerate(prompts):
        pieces = []
        for piece in chat.ask(prompt, [] if turn else pictures, sampling=sampling, max_new_tokens=max_new_tokens):
            pieces.append(piece)
            if not as_json:
                click.echo(piece if len(pieces) > 1 else piece.lstrip(), nl=False)
        if not as_json:
            click.echo()
        assert chat.last is not None  # ask() has set it
        turns.append(result_record(model, "".join(pieces).strip(), chat.last, scores=scores))
        if overlay is not None and turn == 0:
            for number, picture in enumerate(pictures):
                stages = [(item.layer, item.indices, item.scores) for item in chat.last.pruned if item.image == number]
                box = original_box(picture.size, model.image_spec)
                path = overlay if len(pictures) == 1 else overlay.with_stem(f"{overlay.stem}-{number}")
                draw_overlay(picture, stages, model.bundle.manifest.model.vision.grid, box, path)
    if as_json:
        click.echo(json.dumps({**turns[-1], "turns": turns} if len(turns) > 1 else turns[0]))
    else:
        click.echo(run_report(turns[0]), err=True)
