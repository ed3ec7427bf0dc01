"""The ``tokprune`` command group: verbs by name, each imported only when it runs.

A user's mistake ends as one sentence on stderr and exit code 2; a failed gate as exit code 1.
"""

from __future__ import annotations

import importlib
import io
import os
import sys

import click

from tokprune.runtime.errors import UserError
from tokprune.runtime.version import __version__

RUNTIME = ("click", "numpy", "PIL", "tokenizers", "onnxruntime")  # what comes without the export extra
VERBS = {  # verb: (module with ``command``, help in the list of verbs)
    "export": (
        "tokprune.export.cli.export",
        "Export a checkpoint to a bundle, split where tokens are pruned.",
    ),
    "quantize": ("tokprune.export.cli.quantize", "Round a bundle's decoder matrices to INT8 or INT4."),
    "train": ("tokprune.export.cli.train", "Train LVPruning's modules, which choose tokens by the question."),
    "build": ("tokprune.runtime.cli.build", "Build a bundle's TensorRT engines, on the machine that will run them."),
    "build-plugins": ("tokprune.plugins.cli.build_plugins", "Build the TensorRT plugins that choose tokens."),
    "run": ("tokprune.runtime.cli.run", "Answer a question about an image."),
    "verify": ("tokprune.export.cli.verify", "Compare a bundle with PyTorch: parity and consistency."),
    "bench": (
        "tokprune.runtime.cli.bench",
        "Time segments, and the share of the theoretical saving realised.",
    ),
    "flops": ("tokprune.runtime.cli.flops", "Count FLOPs of a model under a pruning plan."),
    "memory": ("tokprune.runtime.cli.memory", "Predict the memory of a model, and which Jetson modules have it."),
    "demo-data": ("tokprune.export.cli.demo_data", "Draw scenes and questions for the demo model."),
    "doctor": ("tokprune.runtime.cli.doctor", "Say what this machine can run."),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_verb(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


def load_verb(verb: str) -> click.Command:
    """Import a verb's command."""
    return importlib.import_module(VERBS[verb][0]).command


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    epilog="Example: tokprune-export --method lofi --out bundle && tokprune run bundle --help",
)
@click.version_option(__version__, prog_name="tokprune")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Export, run and verify LLaVA-1.5 with its visual tokens pruned inside the language model."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Entry point of ``tokprune``."""
    _run(None)


def main_export() -> None:
    """Entry point of ``tokprune-export``, which is ``tokprune export``."""
    _run("export")


def _run(verb: str | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _call(verb)
    except UserError as error:
        code = _fail(str(error))
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        program = "tokprune" if context is None else context.command_path
        code = _fail(f"{error.format_message().rstrip('.')}: see '{program} --help'")
    except ImportError as error:
        if not _is_missing(error):
            raise
        code = _fail(_what_to_install(error))
    except KeyboardInterrupt:
        click.echo("Interrupted: nothing unfinished was left behind.", err=True)
        code = 130
    except BrokenPipeError:
        code = 141  # the reader went away, which is no fault; as the shell says it
        for stream in (sys.stdout, sys.stderr):  # what Python flushes at exit has to go somewhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as error:
        if error.errno is None:  # a library's own error, not the system's
            raise
        code = _fail(f"the system refused ({error}): mend that, or use another file")
    sys.exit(code)


def _call(verb: str | None) -> int:
    """Run the command line. Unlike click's ``main``, this lets a closed pipe and an interrupt through."""
    command = group if verb is None else load_verb(verb)
    try:
        with command.make_context("tokprune" if verb is None else f"tokprune-{verb}", sys.argv[1:]) as context:
            code = command.invoke(context)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    return code if isinstance(code, int) else 0


def _fail(sentence: str) -> int:
    click.echo(f"Error: {' '.join(sentence.split())}", err=True)  # what libraries say may have several lines
    return 2


def _is_missing(error: ImportError) -> bool:
    """Whether an installation lacks something, or has it broken; else the fault is in tokprune itself."""
    folders = ("tokprune.export", "tokprune.plugins", "tokprune.calibration")
    return not (error.name or "").startswith("tokprune") or (
        isinstance(error, ModuleNotFoundError) and error.name in folders  # a device has the runtime alone
    )


def _what_to_install(error: ImportError) -> str:
    found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
    package = "tokprune" if (error.name or "").split(".")[0] in RUNTIME else "'tokprune[export]'"
    return f"this command needs {error.name}, which {found}: pip install --upgrade {package}"
