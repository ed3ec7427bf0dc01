"""NVIDIA's ONNX parser and builder, out of the TensorRT-RTX wheels, on a machine that needs no GPU.

Everything happens in a child process: the library must be on the loader's path before its process starts, and a
graph that makes it abort takes nothing else along. Knows files and shapes; knows no bundle, and runs no engine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.runtime.errors import UserError

MODULES = ("tensorrt_rtx_bindings", "tensorrt_rtx_libs")
LIBRARY = "libtensorrt_rtx.so"  # as the parser asks the loader for it; the wheel has it with a version behind
_REPORT = "report.json"

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # least, usual and greatest shape of each input that has open axes


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


def parse(path: Path) -> Report:
    """Have the ONNX file at ``path`` parsed, with the external data beside it.

    A graph at fault is told by the report. Raises UserError if TensorRT-RTX is missing, or ends without a report.
    """
    return _run({"path": str(path.resolve())})


def build(path: Path, out: Path, profiles: Sequence[Profile]) -> Report:
    """Parse the ONNX file at ``path`` and write an engine with these optimisation profiles to ``out``.

    TF32 is off: FP32 products are FP32. A graph or profile at fault is told by the report; ``out`` is then not
    written. Raises UserError like `parse`.
    """
    return _run({"path": str(path.resolve()), "out": str(out.resolve()), "profiles": [dict(each) for each in profiles]})


def _run(job: dict[str, Any]) -> Report:
    """Do ``job`` in a child process that finds the library under the name that the parser knows."""
    library = _library()
    with tempfile.TemporaryDirectory(prefix="tokprune-rtx-") as folder:
        (Path(folder) / LIBRARY).symlink_to(library)
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        child = subprocess.run(
            [sys.executable, "-m", "tokprune.runtime.rtx"],
            cwd=folder,
            env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)},
            input=json.dumps(job),
            capture_output=True,
            text=True,
        )
        if child.returncode:
            code = child.returncode
            how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            said = (child.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            raise UserError(
                f"TensorRT-RTX was to read {job['path']} and ended with {how} ({said}): unless that names the cause, "
                "install its two packages in one version, pip install --upgrade 'tokprune[rtx]', or report this file"
            )
        report = json.loads((Path(folder) / _REPORT).read_text(encoding="utf-8"))
    return Report(
        engine=report["engine"],
        layers=report["layers"],
        inputs=tuple(TensorSeen(name, tuple(shape), dtype) for name, shape, dtype in report["inputs"]),
        outputs=tuple(TensorSeen(name, tuple(shape), dtype) for name, shape, dtype in report["outputs"]),
        refusals=tuple(Refusal(*each) for each in report["refusals"]),
        log=tuple(report["log"]),
        seconds=report["seconds"],
    )


def _library() -> Path:
    """The library in the installed wheel. Raises UserError."""
    specs = {name: importlib.util.find_spec(name) for name in MODULES}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise UserError(
            f"NVIDIA's ONNX parser was asked for, and {' and '.join(missing)} not found in this Python: "
            "pip install 'tokprune[rtx]'"
        )
    spec = specs["tensorrt_rtx_libs"]
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or []]
    found = sorted(file for folder in folders for file in folder.glob(f"{LIBRARY}*"))
    if not found:
        raise UserError(
            f"NVIDIA's ONNX parser was asked for, and {', '.join(map(str, folders))} holds no {LIBRARY}: "
            "pip install --force-reinstall tensorrt-rtx-cu13-libs"
        )
    return found[-1]


def _child(job: dict[str, Any]) -> dict[str, Any]:
    """The report on ``job``, in the process that may load the library."""
    import tensorrt_rtx_bindings as trt

    log: list[tuple[bool, str]] = []  # is it an error, text

    class Log(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                log.append((severity != trt.ILogger.WARNING, message))

    logger = Log()
    begin = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    is_parsed = parser.parse_from_file(job["path"])
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    refusals = [(error.node_name(), error.node_operator(), error.desc()) for error in errors]
    if is_parsed and not network.num_outputs:  # of an empty file the parser makes an empty network
        refusals.append(("", "", "the file holds no graph"))
    if not is_parsed and not refusals:
        refusals.append(("", "", "the parser refused the file without a reason"))
    if "out" in job and not refusals:
        before = len(log)
        engine = _engine(trt, builder, network, job["profiles"])
        if engine is None:
            reasons = [text for is_error, text in log[before:] if is_error]
            refusals.append(("", "", reasons[0] if reasons else "no engine was built, without a reason"))
        else:
            Path(job["out"]).write_bytes(engine)
    return {
        "engine": f"tensorrt-rtx-{trt.__version__}",
        "layers": network.num_layers,
        "inputs": [_seen(trt, network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_seen(trt, network.get_output(index)) for index in range(network.num_outputs)],
        "refusals": refusals,
        "log": [text for _, text in log],
        "seconds": time.perf_counter() - begin,
    }


def _engine(trt: Any, builder: Any, network: Any, profiles: list[dict[str, Any]]) -> Any:
    """The serialized engine, or None if TensorRT will not build it and has logged why."""
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, greatest) in shapes.items():
            profile.set_shape(name, least, usual, greatest)
        if config.add_optimization_profile(profile) < 0:
            return None
    return builder.build_serialized_network(network, config)


def _seen(trt: Any, tensor: Any) -> tuple[str, list[int], str]:
    return tensor.name, list(tensor.shape), trt.nptype(tensor.dtype).__name__


if __name__ == "__main__":
    Path(_REPORT).write_text(json.dumps(_child(json.load(sys.stdin))), encoding="utf-8")
