"""The process that may load TensorRT: reads a job from stdin, parses and builds, writes a report into its folder.

``compiler`` is its only caller. A graph's fault goes into the report, everything else ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tokprune.runtime.engines import versions

REPORT, PROGRESS = "report.json", "TOKPRUNE_PROGRESS"  # the latter names the variable with the pipe's number


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The report on ``job``, which ``compiler`` describes."""
    library = versions.LIBRARIES[job["library"]]
    trt = versions.load(library)
    report: dict[str, Any] = {"engine": f"{library.name}-{trt.__version__}"}
    if "path" not in job:
        return report
    logger = _logger(trt, job.get("log"))
    for plugins in job["plugins"]:
        versions.load_plugins(trt, Path(plugins))
    begin = time.perf_counter()
    builder = trt.Builder(logger)
    network = versions.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    is_parsed = parser.parse_from_file(job["path"])
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    refusals = [(error.node_name(), error.node_operator(), error.desc()) for error in errors]
    if is_parsed and not network.num_outputs:  # of an empty file the parser makes an empty network
        refusals.append(("", "", "the file holds no graph"))
    if not is_parsed and not refusals:
        refusals.append(("", "", "the parser refused the file without a reason"))
    if "out" in job and not refusals:
        refusals = _mark_new_rows(trt, network, job["appended"])
    if "out" in job and not refusals:
        refusals = _build(trt, library, builder, network, logger, job)
    return {
        **report,
        "layers": network.num_layers,
        "inputs": [_seen(trt, network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_seen(trt, network.get_output(index)) for index in range(network.num_outputs)],
        "refusals": refusals,
        "log": [text for _, text in logger.kept],
        "seconds": time.perf_counter() - begin,
    }


def _mark_new_rows(trt: Any, network: Any, appended: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Have ``network`` write, instead of an output that is an input and new rows behind it, those rows alone.

    Of an output that is made in another way a refusal, which names the layer that makes it.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    marked = {tensor.name: tensor for tensor in outputs}
    refusals = []
    for output, begin, name in appended:
        maker = makers.get(output)
        if output not in marked or maker is None:
            refusals.append(("", "", f"no node makes its output {output}"))
            continue
        if maker.type == trt.LayerType.CONCATENATION:
            maker.__class__ = trt.IConcatenationLayer  # get_layer gives the base class, in some versions
            if maker.axis == 2 and [maker.get_input(0).name, maker.num_inputs] == [begin, 2]:
                rows = maker.get_input(1)
                network.unmark_output(marked[output])
                rows.name = name
                network.mark_output(rows)
                continue
        refusals.append((maker.name, maker.type.name, f"{output} is not {begin} with new rows behind it"))
    return refusals


def _build(
    trt: Any, library: versions.Library, builder: Any, network: Any, logger: Any, job: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Write the engine and what it is made of; what TensorRT has against it, if it will not build."""
    from polygraphy.backend.trt import Profile, engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    profiles: list[Profile] = []
    for shapes in job["profiles"]:
        for tensor in inputs:
            if -1 in tensor.shape and tensor.name not in shapes:  # for which Polygraphy would make shapes up
                return [("", "", f"profile {len(profiles)} has no shapes for {tensor.name}")]
        profile = Profile()
        for name, (least, usual, greatest) in shapes.items():
            profile.add(name, min=least, opt=usual, max=greatest)
        profiles.append(profile)
    cache = Path(job["timing_cache"]) if job.get("timing_cache") else None
    before = len(logger.kept)
    try:
        config = versions.create_config(trt, library, profiles, _monitor(trt), cache)
        engine = engine_bytes_from_network((builder, network), config, save_timing_cache=cache and str(cache))
    except PolygraphyException as error:
        reasons = [text for is_error, text in logger.kept[before:] if is_error]
        message = reasons[0] if reasons else str(error)
        said = " ".join([message, *reasons])  # where a plugin refuses, only a later line names its node
        layer = max((name for name in _names(network) if name in said), key=len, default="")
        return [(layer, "", message)]
    Path(job["out"]).write_bytes(engine)
    if "layers" in job:
        Path(job["layers"]).write_text(_layers(trt, network, engine, job["inspect"], logger), encoding="utf-8")
    return []


def _layers(trt: Any, network: Any, engine: Any, inspect: bool, logger: Any) -> str:
    """JSON: TensorRT's own account of the engine where that can be loaded, else the network's layers, and why."""
    reason = "no device to load it on"
    if inspect:
        loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
        if loaded is not None:
            return versions.layer_report(trt, loaded)
        reason = logger.kept[-1][1] if logger.kept else "it did not load"
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return json.dumps(
        {
            "layers_of": "network",  # before fusion
            "reason": reason,  # that they are not the engine's
            "layers": [
                {
                    "name": layer.name,
                    "type": layer.type.name,
                    "outputs": [_described(layer.get_output(index)) for index in range(layer.num_outputs)],
                }
                for layer in layers
            ],
        },
        indent=1,
    )


def _described(tensor: Any) -> dict[str, Any]:
    try:
        shape = list(tensor.shape)
    except ValueError:  # of a rank that the data decide
        shape = None
    return {"name": tensor.name, "shape": shape, "dtype": tensor.dtype.name}


def _names(network: Any) -> list[str]:
    return [name for index in range(network.num_layers) if (name := network.get_layer(index).name)]


def _logger(trt: Any, path: str | None) -> Any:
    """Keeps warnings and errors; all but the most talkative lines go to the file at ``path``."""
    # open until the process ends
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "w", buffering=1) if path else None

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[tuple[bool, str]] = []  # is it an error, text

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.kept.append((severity != trt.ILogger.WARNING, message))
            if file is not None and severity != trt.ILogger.VERBOSE:
                file.write(f"{severity.name}: {message}\n")

    return Log()


def _monitor(trt: Any) -> Any:
    """Writes TensorRT's phases and steps into the pipe that ``compiler`` reads; None without one."""
    if PROGRESS not in os.environ:
        return None
    pipe = os.fdopen(int(os.environ[PROGRESS]), "w", encoding="utf-8", buffering=1)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            self._tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, step + 1)
            return True

        def phase_finish(self, phase: str) -> None:
            self._tell(phase, self._steps[phase])

        def _tell(self, phase: str, done: int) -> None:
            print(json.dumps([phase, done, self._steps[phase]]), file=pipe)

    return Monitor()


def _seen(trt: Any, tensor: Any) -> tuple[str, list[int], str]:
    return tensor.name, list(tensor.shape), trt.nptype(tensor.dtype).__name__


if __name__ == "__main__":
    from tokprune.runtime.errors import UserError

    try:
        result = run(json.load(sys.stdin))
    except UserError as error:
        result = {"sentence": str(error)}
    Path(REPORT).write_text(json.dumps(result), encoding="utf-8")
