"""One ONNX file through NVIDIA's parser and builder, in a child process.

A process of its own, because TensorRT-RTX must be on the loader's path before it starts, because a graph that makes the
library abort takes nothing else along, and because what a build took is given back when it ends. Knows files and
shapes; knows no bundle, and runs no engine. TensorRT-RTX needs no GPU for any of this.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.runtime.engines.child import PROGRESS, REPORT
from tokprune.runtime.engines.versions import LIBRARIES, RTX, Library
from tokprune.runtime.errors import UserError

RTX_LIBRARY = "libtensorrt_rtx.so"  # as the parser asks the loader for it; the wheel has it with a version behind

Shape = tuple[int, ...]
ShapeRanges = Mapping[str, tuple[Shape, Shape, Shape]]  # least, usual, greatest shape of each input with open axes
Progress = Callable[[str, int, int], None]  # phase, steps done, steps
Appended = Sequence[tuple[str, str, str]]  # output, the input that it begins with, a name for the rows behind it


@dataclass(frozen=True)
class Refusal:
    """What TensorRT has against a graph; ``node`` is empty for a node without a name, both where it blames none."""

    node: str
    operator: str
    message: str


@dataclass(frozen=True)
class TensorSeen:
    """A network's input or output as TensorRT understood it: an open axis is -1, ``dtype`` NumPy's name."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Report:
    """What became of one graph; ``log`` holds TensorRT's warnings and errors, which name files too."""

    engine: str  # library and version
    layers: int
    inputs: tuple[TensorSeen, ...]
    outputs: tuple[TensorSeen, ...]
    refusals: tuple[Refusal, ...]
    log: tuple[str, ...]
    seconds: float  # of parsing and, if asked for, building; without the process's start

    @property
    def accepted(self) -> bool:
        return not self.refusals


@dataclass(frozen=True)
class Beside:
    """Files that a build reads and writes beside its engine; ``inspect`` wants the engine's device for the layers."""

    log: Path
    layers: Path
    timing_cache: Path
    inspect: bool


def version(library: Library) -> str:
    """The installed version of ``library``. Raises UserError if it is missing, too old, or does not load."""
    return _run({"library": library.name})["engine"].removeprefix(f"{library.name}-")


def parse(path: Path, *, library: Library = RTX, plugins: Sequence[Path] = ()) -> Report:
    """Have the ONNX file at ``path`` parsed, with the external data beside it and the libraries of ``plugins``.

    A graph at fault is told by the report. Raises UserError if the library is missing, or ends without a report.
    """
    return _report(_run(_job(path, library, plugins)))


def build(
    path: Path,
    out: Path,
    profiles: Sequence[ShapeRanges],
    *,
    library: Library = RTX,
    plugins: Sequence[Path] = (),
    appended: Appended = (),
    beside: Beside | None = None,
    progress: Progress = lambda phase, done, steps: None,
) -> Report:
    """Parse the ONNX file at ``path`` and write an engine with these optimisation profiles to ``out``.

    Types are those of the graph, and TF32 is off: FP32 products are FP32. Of each of the ``appended`` outputs, the
    engine has the new rows only. A graph or profile at fault is told by the report; ``out`` is then not written.
    Raises UserError like `parse`.
    """
    job = _job(path, library, plugins) | {
        "out": str(out.resolve()),
        "profiles": [dict(each) for each in profiles],
        "appended": [list(each) for each in appended],
    }
    if beside is not None:
        job |= {key: str(getattr(beside, key).resolve()) for key in ("log", "layers", "timing_cache")}
        job["inspect"] = beside.inspect
    return _report(_run(job, progress))


def _job(path: Path, library: Library, plugins: Sequence[Path]) -> dict[str, Any]:
    return {
        "library": library.name,
        "path": str(path.resolve()),
        "plugins": [str(plugin.resolve()) for plugin in plugins],
    }


def _report(report: Mapping[str, Any]) -> Report:
    return Report(
        engine=report["engine"],
        layers=report["layers"],
        inputs=tuple(TensorSeen(name, tuple(shape), dtype) for name, shape, dtype in report["inputs"]),
        outputs=tuple(TensorSeen(name, tuple(shape), dtype) for name, shape, dtype in report["outputs"]),
        refusals=tuple(Refusal(*each) for each in report["refusals"]),
        log=tuple(report["log"]),
        seconds=report["seconds"],
    )


def _run(job: Mapping[str, Any], progress: Progress = lambda phase, done, steps: None) -> dict[str, Any]:
    """Do ``job`` in a child process. Raises UserError with the child's own sentence, or if it has left none."""
    library = LIBRARIES[job["library"]]
    check_installed(library)
    with tempfile.TemporaryDirectory(prefix="tokprune-engine-") as folder:
        paths = [*filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        if library is RTX:
            (Path(folder) / RTX_LIBRARY).symlink_to(_rtx_library())
            paths.insert(0, folder)
        code, said = _wait(job, folder, os.pathsep.join(paths), progress)
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            raise UserError(
                f"{library.name} was to read {job.get('path', 'nothing yet')} and ended with {how} ({said}): unless "
                f"that names the cause, install it again ({library.install}), or report this file"
            )
        report = json.loads((Path(folder) / REPORT).read_text(encoding="utf-8"))
    if "sentence" in report:
        raise UserError(report["sentence"])
    return report


def _wait(job: Mapping[str, Any], folder: str, library_path: str, progress: Progress) -> tuple[int, str]:
    """The child's exit code, and the last line that it has printed."""
    ours, theirs = os.pipe()
    with os.fdopen(ours, encoding="utf-8") as told, tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "tokprune.runtime.engines.child"],
            cwd=folder,
            env={**os.environ, "LD_LIBRARY_PATH": library_path, PROGRESS: str(theirs)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs],
            text=True,
        )
        os.close(theirs)
        try:
            assert child.stdin is not None  # a pipe was asked for
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:  # how the child ended is told below
                stdin.write(json.dumps(job))
            for line in told:  # until the child ends
                progress(*json.loads(line))
            code = child.wait()
        finally:  # an interrupt must not leave a build behind
            child.kill()
            child.wait()
        output.seek(0)
        return code, ([line for line in output.read().splitlines() if line.strip()] or ["nothing was printed"])[-1]


def check_installed(library: Library) -> None:
    """Raise UserError if Python has not what ``library`` needs."""
    if missing := missing_modules(library):
        raise UserError(
            f"{library.name} was asked for, and {' and '.join(missing)} not found in this Python: {library.install}"
        )


def missing_modules(library: Library) -> list[str]:
    """What Python lacks for ``library``; loads none of it."""
    return [name for name in (*library.modules, "polygraphy") if importlib.util.find_spec(name) is None]


def _rtx_library() -> Path:
    """The library in the installed wheel. Raises UserError."""
    spec = importlib.util.find_spec(RTX.modules[1])
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or []]
    found = sorted(file for folder in folders for file in folder.glob(f"{RTX_LIBRARY}*"))
    if not found:
        raise UserError(
            f"{RTX.name} was asked for, and {', '.join(map(str, folders))} holds no {RTX_LIBRARY}: "
            "pip install --force-reinstall tensorrt-rtx-cu13-libs"
        )
    return found[-1]
