"""``build``: every segment of a bundle into an engine, one after another, in a slot beside the graphs.

A segment that is there already, made from the same graph, weights and options by the same library, is not built again;
so a build that was stopped goes on where it was. Nothing loads until all segments are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokprune.runtime import memory, names
from tokprune.runtime.bundle import Bundle, sha256
from tokprune.runtime.device import memory_facts
from tokprune.runtime.engines import compiler, slot
from tokprune.runtime.engines.profiles import segment_profiles
from tokprune.runtime.engines.slot import SegmentEngine, Slot
from tokprune.runtime.engines.targets import RTX_CARDS, Target
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.weights import PRECISIONS

PLUGIN, NATIVE = "plugin", "native"
SELECTORS = (PLUGIN, NATIVE)
TIMING_CACHE = "timing.cache"
_BUILDING = ".building-"  # directories with what is being written; a killed build leaves one, the next removes it

Progress = Callable[[str, str, int, int], None]  # segment, TensorRT's phase, its steps done, its steps


def choose_selector(bundle: Bundle, target: Target, selector: str | None, plugins: Path | None) -> str:
    """``selector``, or what suits ``target`` if None. Raises UserError if the plugin is wanted and cannot be had."""
    has_graph = any(segment.plugin_file for segment in bundle.manifest.segments)
    whose = f", the choice for {target.name}," if selector is None else ""
    if selector is None:
        native = not has_graph or (target.name == RTX_CARDS and plugins is None)
        selector = NATIVE if native else PLUGIN
    method = bundle.manifest.plan.method
    if selector == NATIVE and plugins is not None:
        raise UserError(f"--plugins {plugins} was given, and the selectors are {NATIVE} ({method}): drop one of them")
    if selector == PLUGIN and not has_graph:
        raise UserError(f"--selector {PLUGIN} was given, and method '{method}' needs none: give --selector {NATIVE}")
    if selector == PLUGIN and plugins is None:
        raise UserError(
            f"--selector {PLUGIN}{whose} needs the library of plugins: give it with --plugins, "
            f"tokprune build-plugins makes it; or give --selector {NATIVE}"
        )
    if plugins is not None and not plugins.is_file():
        raise UserError(f"--plugins {plugins} is no file: tokprune build-plugins makes it and prints where")
    return selector


def build(
    bundle: Bundle,
    target: Target,
    selector: str,
    *,
    plugins: Path | None = None,
    force: bool = False,
    progress: Progress = lambda segment, phase, done, steps: None,
    finished: Callable[[SegmentEngine, bool], None] = lambda engine, is_new: None,
) -> dict[str, Any]:
    """Build what is missing in ``target``'s slot: the object that ``tokprune build --json`` prints.

    ``finished`` is told of each segment, and whether it was built now. Without ``force`` no segment is begun that is
    expected to need more memory than there is. Raises UserError for that, for a graph that TensorRT refuses (by
    node), and if another build is at work there.
    """
    folder = slot.slot_folder(bundle.path, target.slot)
    plugin_hash = None if plugins is None else sha256(plugins)
    keys = [
        (segment, slot.make_key(_inputs(bundle, segment, target, selector, plugin_hash)))
        for segment in bundle.manifest.segments
    ]

    def prepare(missing: list[str]) -> None:
        if not force:
            _check_memory(bundle, missing)
        if plugins is None:  # until slot.json is new too, the old one does not fit
            (folder / slot.PLUGIN_LIBRARY).unlink(missing_ok=True)
        else:
            _copy(plugins, folder / slot.PLUGIN_LIBRARY)

    def make(segment: SegmentFacts, key: str, building: Path) -> SegmentEngine:
        return _build_segment(bundle, segment, key, folder, building, target, selector, plugins, progress)

    built_for = (target.library.name, target.version, target.arch, selector, plugin_hash)
    return fill_slot(bundle, folder, built_for, keys, make, prepare=prepare, finished=finished)


def fill_slot(
    bundle: Bundle,
    folder: Path,
    built_for: tuple[str, str, str, str, str | None],
    keys: list[tuple[SegmentFacts, str]],
    make: Callable[[SegmentFacts, str, Path], SegmentEngine],
    *,
    prepare: Callable[[list[str]], None] = lambda missing: None,
    finished: Callable[[SegmentEngine, bool], None] = lambda engine, is_new: None,
) -> dict[str, Any]:
    """Make what is missing in the slot ``folder``: of each segment what its key says, then slot.json.

    ``built_for`` are library, version, architecture, selector and hash of the plugins. ``prepare`` hears first what is
    missing; ``make`` writes a segment into its last argument and moves it. Gives what ``tokprune build --json`` does.
    """
    begin = time.perf_counter()
    with _locked(folder), _scratch(folder) as building:
        made: dict[str, SegmentEngine] = {}
        missing = []
        for segment, key in keys:
            found = slot.read_segment(folder / f"{segment.name}.json")
            if found is not None and found.key == key and _is_whole(folder, found):
                made[segment.name] = found
                finished(found, False)
            else:
                missing.append((segment, key))
        prepare([segment.name for segment, _ in missing])
        if missing:
            (folder / slot.FILE).unlink(missing_ok=True)  # until all fit one another again
        for segment, key in missing:
            (folder / f"{segment.name}.json").unlink(missing_ok=True)
            made[segment.name] = make(segment, key, building)
            slot.write_json(folder / f"{segment.name}.json", made[segment.name])
            finished(made[segment.name], True)
        engines = tuple(made[segment.name] for segment, _ in keys)
        result = Slot(slot.SCHEMA, *built_for, slot.manifest_hash(bundle.path), engines)
        slot.write_json(folder / slot.FILE, result)
    return _record(folder, result, {segment.name for segment, _ in missing}, time.perf_counter() - begin)


def _graph(segment: SegmentFacts, selector: str) -> str:
    return segment.plugin_file if selector == PLUGIN and segment.plugin_file else segment.file


def _inputs(
    bundle: Bundle, segment: SegmentFacts, target: Target, selector: str, plugin_hash: str | None
) -> dict[str, Any]:
    """All that an engine depends on, as hashes and plain data."""
    graph = _graph(segment, selector)
    # which weights a graph reads is not known here: any of them may be
    data = {graph, *(file.path for file in bundle.manifest.files if file.path.endswith((".safetensors", ".data")))}
    return {
        "library": [target.library.name, target.version, target.arch],
        "files": {file.path: file.sha256 for file in bundle.manifest.files if file.path in data},
        "graph": graph,
        "plugins": plugin_hash if graph == segment.plugin_file else None,
        "profiles": segment_profiles(bundle.manifest, segment),
        "appended": _caches(segment),
    }


def _caches(segment: SegmentFacts) -> list[tuple[str, str, str]]:
    """Of each cache that ``segment`` gives: its name, that of the rows it had before, and that of the new ones."""
    presents = [tensor.name for tensor in segment.outputs if tensor.name.startswith("present.")]
    return [(present, *names.beside_present(present)) for present in presents]


def _is_whole(folder: Path, engine: SegmentEngine) -> bool:
    return all(
        (file := folder / each.file).is_file() and file.stat().st_size == each.size and sha256(file) == each.sha256
        for each in engine.files
    )


def _build_segment(
    bundle: Bundle,
    segment: SegmentFacts,
    key: str,
    folder: Path,
    building: Path,
    target: Target,
    selector: str,
    plugins: Path | None,
    progress: Progress,
) -> SegmentEngine:
    name, graph = segment.name, bundle.file(_graph(segment, selector))
    profiles = segment_profiles(bundle.manifest, segment)
    files = {kind: building / f"{name}.{kind}" for kind in ("engine", "log", "layers.json")}
    report = compiler.build(
        graph,
        files["engine"],
        list(profiles.values()),
        library=target.library,
        plugins=[] if plugins is None or graph.name != segment.plugin_file else [plugins],
        appended=_caches(segment),
        beside=compiler.Beside(files["log"], files["layers.json"], folder / TIMING_CACHE, target.has_gpu),
        progress=lambda phase, done, steps: progress(name, phase, done, steps),
    )
    if report.refusals:
        os.replace(files["log"], folder / f"{name}.log")
        raise UserError(_sentence(graph, report.refusals[0], folder / f"{name}.log"))
    engine = SegmentEngine(
        name,
        key,
        f"{name}.engine",
        files["engine"].stat().st_size,
        sha256(files["engine"]),
        round(report.seconds, 3),
        report.layers,
        profiles,
    )
    for file in files.values():
        os.replace(file, folder / file.name)
    return engine


def _sentence(graph: Path, refusal: compiler.Refusal, log: Path) -> str:
    node = f"at node '{refusal.node}'" if refusal.node else "at no node that it names"
    operator = f" ({refusal.operator})" if refusal.operator else ""
    return (
        f"no engine can be made of {graph} {node}{operator}, {refusal.message.rstrip('.')}: export the bundle again, "
        f"or report this with {log}"
    )


def _check_memory(bundle: Bundle, segments: list[str]) -> None:
    """Raise UserError if the greatest of ``segments`` is expected to need more than this machine has free."""
    plan = memory.from_manifest(bundle.manifest)
    weights = [each for each in plan.weights if each.segment in segments]
    if not weights:
        return
    greatest = max(weights, key=lambda each: each.total)
    need, room = memory.BUILD_FACTOR * greatest.total, available_bytes()
    if need <= room:
        return
    lower = PRECISIONS[PRECISIONS.index(plan.precision) + 1 :]
    smaller = [memory.memory_plan(plan.facts, plan.plan, precision, plan.work) for precision in lower]
    fitting = next((other for other in smaller if other.build_bytes <= room), None)
    instead = f"{fitting.precision} would take {fitting.build_bytes / 1e9:.1f} GB, " if fitting else ""
    raise UserError(
        f"building {greatest.segment} is expected to take {need / 1e9:.1f} GB, {memory.BUILD_FACTOR} times its "
        f"weights, and {room / 1e9:.1f} GB of memory are free: {instead}shorter segments (a stage more) less each; "
        "else end other programs, add swap, or try it with --force"
    )


def available_bytes() -> int:
    """Memory that is free or can be freed. Raises UserError where Linux does not say."""
    available = memory_facts().get("MemAvailable")
    if available is None:
        raise UserError("/proc/meminfo does not say what memory is available: give --force to build without asking")
    return available


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The slot's folder, made if need be, for this build alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"engines are built into {folder}, where none can be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another build is at work in {folder}: wait for it") from None
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A directory in ``folder``, locked, that ends with the block.

    Each has a name of its own, since a child that outlives its killed parent goes on writing into the old one's.
    """
    for left in folder.glob(f"{_BUILDING}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=folder) as path:
        yield Path(path)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _record(folder: Path, result: Slot, built: set[str], seconds: float) -> dict[str, Any]:
    return {
        "slot": str(folder),
        "library": result.library,
        "version": result.version,
        "arch": result.arch,
        "selector": result.selector,
        "plugins": result.plugins,
        "segments": [
            {
                "name": each.name,
                "built": each.name in built,
                "bytes": sum(file.size for file in each.files),
                "seconds": each.seconds,
                "layers": each.layers,
                "profiles": list(each.profiles),
                "difference": each.difference,
            }
            for each in result.segments
        ],
        "bytes": sum(file.size for each in result.segments for file in each.files),
        "seconds": round(seconds, 3),
    }
