"""``tokprune verify``: parses, compares, prints; exit code 1 if a gate fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tokprune.runtime.errors import UserError
from tokprune.runtime.report import verify_report
from tokprune.runtime.session import ENGINES


@click.command("verify", epilog="Example: tokprune verify bundle --data questions.jsonl --min-agreement 0.95")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    metavar="MODEL",
    help="Checkpoint to compare with. [default: demo, if it was made from it]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSON lines of image, prompt, answer. [default: demo scenes]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first so many samples only.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--spectrum-samples",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Samples for the IPR.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples that BUNDLE takes at a time; PyTorch takes one.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Compare the first decoder layers only, with norm and head behind them: a large model in small memory.",
)
@click.option("--min-agreement", type=float, help="Gate: share of answers equal to the unpruned original's.")
@click.option("--max-kl", type=float, help="Gate: mean KL of next-token distributions, in nats.")
@click.option("--max-logit-diff", type=float, help="Gate: parity, where the kept sets are equal.")
@click.option("--min-greedy-agreement", type=float, help="Gate: parity of greedy tokens.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
@click.option(
    "--plugins", type=click.Path(path_type=Path), help="For onnxruntime-tensorrt: a library of TensorRT plugins."
)
@click.option("--threads", default=0, show_default=True, help="CPU threads; 0 lets the engine choose.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    bundle: Path,
    reference: str | None,
    data: Path | None,
    limit: int | None,
    max_new_tokens: int,
    spectrum_samples: int,
    batch_size: int,
    layers: int | None,
    engine: str,
    plugins: Path | None,
    threads: int,
    as_json: bool,
    **limits: float | None,
) -> int:
    """Compare BUNDLE with PyTorch: parity with the same pruning, consistency with the unpruned original."""
    from tokprune.runtime.bundle import open_bundle
    from tokprune.runtime.chat import Model
    from tokprune.runtime.data import read_samples
    from tokprune.runtime.verification import gates

    opened = open_bundle(bundle, check_hashes=True)
    made_from = opened.manifest.source["model"]
    if reference is None and made_from != "demo":
        raise UserError(f"{bundle} was made from '{made_from}': give that checkpoint's directory with --reference")
    source = reference or made_from
    if data is None and source != "demo":
        raise UserError("--data was not given, and only the demo model comes with questions: give --data FILE.jsonl")
    with contextlib.ExitStack() as stack:
        if layers is not None:
            from tokprune.export.truncate import truncate

            opened = truncate(opened, layers, stack.enter_context(_beside(bundle)))
        if data is None:
            from tokprune.export.demo.scenes import demo_data

            data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "scenes" / "data.jsonl"
            demo_data(24 if limit is None else limit, data.parent, 0)
        model = Model(opened, engine, threads, plugins)
        result, lines = _compare(model, source, read_samples(data, limit), max_new_tokens, spectrum_samples, batch_size)
    result["gates"] = gates(result["parity"], result["consistency"], **limits)
    result["passed"] = all(gate["passed"] for gate in result["gates"])
    if as_json:
        click.echo(json.dumps({**result, "different": lines}))
    else:
        click.echo(verify_report(result))
        for line in lines:
            click.echo(
                f"{line['image'] or 'no image'}: {line['prompt']} — PyTorch {line['full']!r}, "
                f"pruned in PyTorch {line['reference']!r}, engine {line['engine']!r}"
            )
    return 0 if result["passed"] else 1


@contextlib.contextmanager
def _beside(bundle: Path) -> Iterator[Path]:
    """A directory that ends with the block, on the file system of ``bundle``."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".tokprune-", dir=bundle.resolve().parent)
    except OSError as error:
        raise UserError(
            f"--layers needs a directory beside {bundle}, where none can be made ({error.strerror}): "
            "copy the bundle to where you may write"
        ) from None
    with scratch as path:
        yield Path(path)


def _compare(
    model: Any, source: str, samples: list[Any], max_new_tokens: int, spectrum_samples: int, batch_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The comparison's result, and the samples in which any two of the three answers or kept sets differ."""
    click.echo(f"loading {source} in PyTorch", err=True)
    from tokprune.export.checkpoint import find_checkpoint
    from tokprune.export.verify import verify

    checkpoint = find_checkpoint(source)
    facts, layers = checkpoint.facts, model.pipeline.facts.layers  # fewer, if the bundle was cut
    checkpoint = dataclasses.replace(checkpoint, facts=dataclasses.replace(facts, layers=min(facts.layers, layers)))
    with click.progressbar(length=len(samples), label="comparing", file=sys.stderr) as bar:
        result, outcomes = verify(
            model,
            checkpoint,
            samples,
            max_new_tokens=max_new_tokens,
            spectrum_samples=spectrum_samples,
            batch_size=batch_size,
            progress=lambda done: bar.update(1),
        )
    lines: list[dict[str, Any]] = []
    for sample, outcome in zip(samples, outcomes, strict=True):
        difference = outcome.parity.max_abs_logit_diff
        full, engine = outcome.consistency.full, outcome.consistency.pruned
        answers = {full, outcome.reference, engine}
        if len(answers) > 1 or not outcome.parity.kept_equal:
            lines.append(
                {
                    "image": ", ".join(image.name for image in sample.images) or None,
                    "prompt": sample.prompt,
                    "full": full,
                    "reference": outcome.reference,
                    "engine": engine,
                    "kept_equal": outcome.parity.kept_equal,
                    "kept_equal_margin": outcome.parity.kept_equal_margin,
                    "kept_overlap": outcome.parity.kept_overlap,
                    "max_abs_logit_diff": difference if math.isfinite(difference) else None,
                }
            )
    return result, lines
