"""What was seen of the activations that matrices are multiplied with: statistics, not activations, and their file.

Each tensor has a `Seen`; its size depends on the channels alone, not on how much came by. A file holds all of them and
says what they are of, so that an observation that was interrupted goes on where it was. Knows no graph and no model.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokprune.calibration.histogram import Histogram
from tokprune.runtime.errors import UserError

ROWS = 128  # of each tensor that are kept, drawn evenly from all
FOLDER = "calibration"  # in the bundle that was observed
_HEADER = "tokprune"


@dataclass
class Seen:
    """Of a tensor [rows, C] that came in pieces: |x| by channel and over all, and ``ROWS`` of its rows.

    ``largest`` [C] and ``total`` [C] are max |x| and Σ |x| over ``count`` rows. ``sample`` [≤ ROWS, C] are the rows
    with the smallest ``keys``, which are drawn, so that it does not matter how rows come in pieces.
    """

    channels: int
    count: int = 0
    histogram: Histogram = field(default_factory=Histogram)

    def __post_init__(self) -> None:
        self.largest = np.zeros(self.channels, np.float32)
        self.total = np.zeros(self.channels, np.float64)
        self.sample = np.empty((0, self.channels), np.float32)
        self.keys = np.empty(0, np.float64)

    def add(self, rows: NDArray[np.float32], random: np.random.Generator) -> None:
        """Look at ``rows`` [R, C]. Raises ValueError if a value is not finite."""
        sizes = np.abs(rows)
        largest = sizes.max(axis=0, initial=0.0)
        if not np.isfinite(largest).all():
            raise ValueError("a value is not finite")
        self.count += len(rows)
        self.largest = np.maximum(self.largest, largest)
        self.total += sizes.sum(axis=0, dtype=np.float64)
        self.histogram.add(sizes)
        keys = random.random(len(rows))
        best = np.argsort(keys, kind="stable")[:ROWS]
        self.keys = np.concatenate([self.keys, keys[best]])
        kept = np.argsort(self.keys, kind="stable")[:ROWS]
        self.sample = np.concatenate([self.sample, rows[best]])[kept]
        self.keys = self.keys[kept]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean |x| by channel, [C]."""
        return self.total / max(self.count, 1)


@dataclass
class Statistics:
    """Of a whole bundle: what it is of (``key``, ``settings``), how many ``samples`` came by, each tensor by name."""

    key: str
    settings: dict[str, int | str]
    samples: int = 0
    tensors: dict[str, Seen] = field(default_factory=dict)

    def add(self, tensor: str, rows: NDArray[np.float32], seed: tuple[int, ...]) -> None:
        """Look at ``rows`` [R, C] of ``tensor``; draws follow from its name and ``seed``."""
        seen = self.tensors.setdefault(tensor, Seen(rows.shape[1]))
        try:
            seen.add(rows, np.random.default_rng((zlib.crc32(tensor.encode()), *seed)))
        except ValueError:
            raise UserError(
                f"what {tensor} is multiplied with is not finite for some sample: export the bundle in FP32, or leave "
                "that sample out"
            ) from None


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write the file, in place of an older one, whole or not at all."""
    arrays: dict[str, NDArray] = {}
    info: dict[str, tuple[int, float]] = {}
    for name, seen in statistics.tensors.items():
        info[name] = (seen.count, seen.histogram.limit)
        parts: dict[str, NDArray] = {"counts": seen.histogram.counts, "largest": seen.largest, "total": seen.total}
        arrays |= {f"{name}/{part}": array for part, array in parts.items()}
        arrays |= {f"{name}/sample": seen.sample, f"{name}/keys": seen.keys}
    head = {
        "key": statistics.key,
        "settings": statistics.settings,
        "samples": statistics.samples,
        "tensors": info,
    }
    draft = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(exist_ok=True)
        try:
            save_file(arrays, draft, {_HEADER: json.dumps(head)})
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the statistics {path} cannot be written ({error}): copy the bundle to a place that can be written to"
        ) from None


def load_statistics(path: Path, key: str) -> Statistics | None:
    """What the file holds; None if it is not there. Raises UserError if it is no file of ours, or not of ``key``."""
    if not path.exists():
        return None
    again = "remove it, so that it is made again"
    try:
        with safe_open(path, "numpy") as file:
            head = json.loads((file.metadata() or {})[_HEADER])
            arrays: Mapping[str, NDArray] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        statistics = Statistics(head["key"], head["settings"], int(head["samples"]))
        for name, (count, limit) in head["tensors"].items():
            seen = Seen(arrays[f"{name}/largest"].size, int(count), Histogram(limit, arrays[f"{name}/counts"].copy()))
            seen.largest, seen.total, seen.sample, seen.keys = (
                arrays[f"{name}/{part}"].copy() for part in ("largest", "total", "sample", "keys")
            )
            statistics.tensors[name] = seen
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"the statistics {path} cannot be read ({error}): {again}") from None
    if statistics.key != key:
        raise UserError(f"the statistics {path} are of another bundle, other data or other settings: {again}")
    return statistics
