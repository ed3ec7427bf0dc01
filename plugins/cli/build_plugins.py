"""``tokprune build-plugins``: parses, builds, prints. Needs neither torch nor transformers nor onnx."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tokprune.plugins.build import build_plugins
from tokprune.plugins.toolchain import ALL, ARCHITECTURES, NATIVE


@click.command("build-plugins", epilog="Example: tokprune build-plugins --arch 87 --out plugins")
@click.option(
    "--arch",
    default=NATIVE,
    show_default=True,
    help=f"Compute capabilities such as 80,86; {NATIVE}: this machine's GPU; {ALL}: "
    f"{','.join(map(str, ARCHITECTURES))} as far as nvcc knows them.",
)
@click.option("--tensorrt-include", type=click.Path(path_type=Path), help="Directory of TensorRT's headers.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to copy the library into.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(arch: str, tensorrt_include: Path | None, out: Path | None, as_json: bool) -> None:
    """Build the library of TensorRT plugins that choose tokens, for this machine.

    It is kept in a cache, and built again only if sources, TensorRT, CUDA or architectures are others.
    """
    is_terminal = sys.stderr.isatty()

    def progress(line: str) -> None:
        if is_terminal:
            click.echo(f"\r\x1b[2K{line[:100]}", err=True, nl=False)

    built = build_plugins(arch, tensorrt_include, out, progress)
    if is_terminal:
        click.echo("\r\x1b[2K", err=True, nl=False)
    if as_json:
        click.echo(json.dumps(built.record()))
        return
    click.echo(f"{built.library}{' (as built before)' if built.cached else ''}")
    click.echo(f"sha256 {built.sha256}")
    click.echo(
        f"for TensorRT {built.tensorrt}, CUDA {built.cuda}, "
        f"sm_{', sm_'.join(map(str, built.architectures))}; sources {built.sources[:16]}"
    )
    click.echo(f"for programs that load plugins by dlopen alone: {built.registering}")
