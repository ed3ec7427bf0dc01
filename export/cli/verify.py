"""``tokprune verify``: parses, compares, prints; exit code 1 if a gate fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from tokprune.runtime import names
from tokprune.runtime.errors import UserError
from tokprune.runtime.output import check_file
from tokprune.runtime.report import verify_report
from tokprune.runtime.session import ENGINES
from tokprune.runtime.version import __version__


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
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write one page: figures, charts, changed answers with their images.",
)
@click.option("--junit", type=click.Path(path_type=Path), metavar="OUT", help="Write the gates as JUnit XML, for CI.")
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
    html: Path | None,
    junit: Path | None,
    **limits: float | None,
) -> int:
    """Compare BUNDLE with PyTorch: parity with the same pruning, consistency with the unpruned original."""
    from tokprune.runtime.bundle import open_bundle, sha256
    from tokprune.runtime.chat import Model
    from tokprune.runtime.data import read_samples
    from tokprune.runtime.verification import gates

    started = time.monotonic()
    _check_outputs(html, junit)
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
        data_name = str(data)
        if data is None:
            from tokprune.export.demo.scenes import demo_data

            data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "scenes" / "data.jsonl"
            demo_data(24 if limit is None else limit, data.parent, 0)
            data_name = "the demo model's scenes, seed 0"
        model = Model(opened, engine, threads, plugins)
        samples = read_samples(data, limit)
        result, outcomes = _compare(model, source, samples, max_new_tokens, spectrum_samples, batch_size)
        result["gates"] = gates(result["parity"], result["consistency"], **limits)
        result["passed"] = all(gate["passed"] for gate in result["gates"])
        result["compared"] = {
            "bundle": str(bundle),
            "manifest_sha256": sha256(bundle / names.MANIFEST_FILE),
            "reference": source,
            "data": data_name,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "layers": layers,
            "versions": _versions(opened.manifest.tools),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        try:
            if junit is not None:
                from tokprune.export.junit import write_junit

                write_junit(junit, result, samples, outcomes, time.monotonic() - started)
            if html is not None:
                from tokprune.export.page.document import write_page

                write_page(html, result, samples, outcomes, model)
        finally:  # a full disk must not cost the result, nor a closed pipe the files
            _show(result, _different(samples, outcomes), as_json)
    return 0 if result["passed"] else 1


def _check_outputs(html: Path | None, junit: Path | None) -> None:
    """Before the long work: can the files be written that it is to end in?"""
    if html is not None and junit is not None and html.resolve() == junit.resolve():
        raise UserError(f"--html and --junit both name {html}: give each a file of its own")
    for path, what in ((html, "page"), (junit, "JUnit file")):
        if path is not None:
            check_file(path, what)


def _versions(exported: dict[str, str]) -> dict[str, str]:
    """What compares, and what the bundle was made with; the engine's is in its name."""
    import torch
    import transformers

    return {
        "tokprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{f"exported by {tool}": exported[tool] for tool in ("tokprune", "torch") if tool in exported},
    }


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
) -> tuple[dict[str, Any], list[Any]]:
    """The comparison's result, and each sample's outcome; with a progress bar."""
    click.echo(f"loading {source} in PyTorch", err=True)
    from tokprune.export.checkpoint import find_checkpoint
    from tokprune.export.verify import verify

    checkpoint = find_checkpoint(source)
    facts, layers = checkpoint.facts, model.pipeline.facts.layers  # fewer, if the bundle was cut
    checkpoint = dataclasses.replace(checkpoint, facts=dataclasses.replace(facts, layers=min(facts.layers, layers)))
    with click.progressbar(length=len(samples), label="comparing", file=sys.stderr) as bar:
        return verify(
            model,
            checkpoint,
            samples,
            max_new_tokens=max_new_tokens,
            spectrum_samples=spectrum_samples,
            batch_size=batch_size,
            progress=lambda done: bar.update(1),
        )


def _show(result: dict[str, Any], lines: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**result, "different": lines}))
        return
    click.echo(verify_report(result))
    for line in lines:
        click.echo(
            f"{line['image'] or 'no image'}: {line['prompt']} — PyTorch {line['full']!r}, "
            f"pruned in PyTorch {line['reference']!r}, engine {line['engine']!r}"
        )


def _different(samples: Sequence[Any], outcomes: Sequence[Any]) -> list[dict[str, Any]]:
    """The samples in which any two of the three answers or kept sets differ."""
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
    return lines
