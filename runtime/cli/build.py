"""``tokprune build``: parses, builds, prints. Needs neither torch nor transformers, onnx only for ``--target cpu``."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import click

from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.engines.build import PLUGIN, SELECTORS, build, choose_selector
from tokprune.runtime.engines.slot import SegmentEngine
from tokprune.runtime.engines.targets import AUTO, CPU, TARGETS, find_target
from tokprune.runtime.errors import UserError
from tokprune.runtime.report import build_report


@click.command("build", epilog="Example: tokprune build bundle --target jetson-orin --plugins libtokprune_plugins.so")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), default=AUTO, show_default=True, help="auto: what is here.")
@click.option(
    "--selector",
    type=click.Choice(SELECTORS),
    help="What chooses tokens: our plugin, or standard operators. [default: plugin, for rtx native]",
)
@click.option("--plugins", type=click.Path(path_type=Path), help="The library that tokprune build-plugins made.")
@click.option("--force", is_flag=True, help="Build even if memory is expected not to do.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(bundle: Path, target: str, selector: str | None, plugins: Path | None, force: bool, as_json: bool) -> None:
    """Build BUNDLE's segments into TensorRT engines, beside its graphs, for this machine's GPU.

    --target rtx needs no GPU. --target cpu makes graphs of ONNX Runtime's fused operators instead, which need the
    export extra to build and nothing to run. Segments that were built before, and have not changed, are left as
    they are.
    """
    opened = open_bundle(bundle)
    is_terminal = sys.stderr.isatty()

    def progress(segment: str, phase: str, done: int, steps: int) -> None:
        if is_terminal:
            click.echo(f"\r\x1b[2K{segment}: {phase} {done} of {steps}", err=True, nl=False)

    def finished(engine: SegmentEngine, is_new: bool) -> None:
        what = f"built in {engine.seconds:.1f} s" if is_new else "as it was"
        click.echo(f"{chr(13) + chr(27) + '[2K' if is_terminal else ''}{engine.name}: {what}", err=True)

    if target == CPU:
        if selector == PLUGIN or plugins is not None:
            raise UserError(
                f"--target {CPU} was given with a plugin, which TensorRT alone takes: drop --selector and --plugins"
            )
        build_fused = importlib.import_module("tokprune.export.fusion.build").build_fused
        result = build_fused(opened, finished=finished)
    else:
        found = find_target(target)
        chosen = choose_selector(opened, found, selector, plugins)
        result = build(opened, found, chosen, plugins=plugins, force=force, progress=progress, finished=finished)
    click.echo(json.dumps(result) if as_json else build_report(result))
