"""Where a bundle's engines lie: ``engines/<library>-<version>-<arch>/``, each directory with a ``slot.json``.

A slot without its ``slot.json`` is not there: it is written last. Knows files and hashes; loads no engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.runtime import names
from tokprune.runtime.bundle import ALWAYS_HASHED, Bundle, sha256
from tokprune.runtime.engines.compiler import ShapeRanges
from tokprune.runtime.errors import UserError

FOLDER, FILE = "engines", "slot.json"
SCHEMA = 2  # of 1, decoders wrote their caches whole
PLUGIN_LIBRARY = "plugins.so"  # the copy that a slot keeps


@dataclass(frozen=True)
class Weights:
    """A file of weights that a segment's graph reads beside the bundle's own."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SegmentEngine:
    """One segment's engine. ``key`` is a hash of all that went into it: graph, weights, options, library."""

    name: str
    key: str
    file: str
    size: int
    sha256: str
    seconds: float
    layers: int  # of the network, before fusion
    profiles: Mapping[str, ShapeRanges]  # by name, in the engine's order
    difference: float | None = None  # from the neutral graph, where that was measured: of its greatest number
    weights: Weights | None = None

    @property
    def files(self) -> tuple[Weights, ...]:
        """All of the segment's files in the slot."""
        return (Weights(self.file, self.size, self.sha256), *filter(None, [self.weights]))


@dataclass(frozen=True)
class Slot:
    """Engines of one bundle for one library, version and architecture. ``plugins`` is the library's hash, or None."""

    schema: int
    library: str
    version: str
    arch: str
    selector: str
    plugins: str | None
    bundle: str  # SHA-256 of the manifest they were built from
    segments: tuple[SegmentEngine, ...]

    def segment(self, name: str) -> SegmentEngine:
        """The engine of that segment; KeyError without one."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise KeyError(name)


def slot_folder(bundle: Path, slot: str) -> Path:
    return bundle / FOLDER / slot


def manifest_hash(bundle: Path) -> str:
    """What ties a slot to its bundle."""
    return sha256(bundle / names.MANIFEST_FILE)


def make_key(parts: Mapping[str, Any]) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Plain data or a dataclass, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    plain = data if isinstance(data, dict) else dataclasses.asdict(data)
    partial.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_segment(path: Path) -> SegmentEngine | None:
    """What a finished build has left at ``path``; None where there is nothing, or not by this version."""
    try:
        return _segment(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


def read_slots(bundle: Path) -> Iterator[tuple[Path, Slot]]:
    """The bundle's whole slots with their folders. Raises UserError for one that is damaged.

    One of another schema has no segments, and is a `misfit`.
    """
    for path in sorted((bundle / FOLDER).glob(f"*/{FILE}")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = data["schema"] == SCHEMA
            if not known:
                data = {field.name: data[field.name] for field in dataclasses.fields(Slot)}
            slot = Slot(**data | {"segments": tuple(map(_segment, data["segments"])) if known else ()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): remove its folder, or build it again with tokprune build"
            ) from None
        yield path.parent, slot


def file_fault(folder: Path, slot: Slot, *, check_hashes: bool = False) -> str | None:
    """What is wrong with the slot's files: sizes always, hashes of large ones on request."""
    for wanted in (each for segment in slot.segments for each in segment.files):
        file = folder / wanted.file
        size = file.stat().st_size if file.is_file() else None
        if size != wanted.size:
            return f"{wanted.file} has {'nothing' if size is None else size} instead of {wanted.size} bytes"
        if (check_hashes or size <= ALWAYS_HASHED) and sha256(file) != wanted.sha256:
            return f"{wanted.file} was altered"
    library = folder / PLUGIN_LIBRARY
    if slot.plugins is not None and not (library.is_file() and sha256(library) == slot.plugins):
        return f"{PLUGIN_LIBRARY} is not the library of plugins that its engines were built with"
    return None


def misfit(folder: Path, slot: Slot, bundle: Bundle, version: str, arch: str) -> str | None:
    """Why the engines of ``slot`` cannot run here: with this ``version`` of its library, on a GPU of ``arch``."""
    if slot.schema != SCHEMA:
        return f"built by another version of tokprune (schema {slot.schema}, this one's is {SCHEMA})"
    if slot.bundle != manifest_hash(bundle.path):
        return "built from another export than the one beside it"
    if slot.version != version:
        return f"built with {slot.library} {slot.version}, installed is {version}"
    if slot.arch != arch:
        return f"built for {slot.arch}, the GPU is {arch}"
    return file_fault(folder, slot)


def _segment(data: Mapping[str, Any]) -> SegmentEngine:
    profiles = {
        profile: {name: tuple(map(tuple, shapes)) for name, shapes in ranges.items()}
        for profile, ranges in data["profiles"].items()
    }
    weights = None if data["weights"] is None else Weights(**data["weights"])
    return SegmentEngine(**{**data, "profiles": profiles, "weights": weights})
