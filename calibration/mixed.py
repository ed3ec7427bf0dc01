"""A bundle and its quantised form as one pipeline, in which each part is taken from the one or the other.

A part is a decoder layer, ``lm_head`` with its norm, or the tower with the projector: what is inside of it may be
multiplied by factors whose inverse is in it too, so that parts of both fit together. Runs on ONNX Runtime's CPU
provider; nothing is written. Knows graphs and sessions; judges nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from tokprune.calibration.pieces import Piece, cut
from tokprune.calibration.sessions import Sessions
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.ort import OnnxRuntime
from tokprune.runtime.session import Tensor
from tokprune.runtime.weights import group_of

VISION, HEAD = "vision", "lm_head"
BUDGET = 4 << 30  # bytes of weights that are held at a time


def part_of(matrix: str) -> str:
    """The part that a matrix is in: "vision", "layers.7" or "lm_head"."""
    group = group_of(matrix)
    return VISION if group.startswith(("vision_tower", "projector")) else group


@dataclass
class Times:
    """Milliseconds of a part in the base's form and the other's, in turns: on a prompt or images, and on one token."""

    prompt: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    token: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


class Mixed(OnnxRuntime):
    """Sessions of ``base``'s segments, in which the parts ``rounded`` are those of ``other``, its quantised form.

    Of their weights some ``budget`` bytes are held; what was not used for longest is loaded anew. While ``repeats`` is
    not 0, each part that ``other`` has rounded runs so many times in either form in turns, and ``times`` has how long.
    """

    def __init__(self, base: Bundle, other: Bundle, budget: int = BUDGET) -> None:
        super().__init__()
        self.rounded: frozenset[str] = frozenset()
        self.repeats = 0
        self.times: dict[str, Times] = {}
        self._bundles = (base, other)
        self._sessions = Sessions(budget)

    def load(self, bundle: Bundle, segment: SegmentFacts) -> Any:
        if segment.layers is None and segment.name != names.VISION_ENCODER:
            return super().load(bundle, segment)
        forms = [cut(ir.load(each.file(segment.file)), 0, tapped=False) for each in self._bundles]
        return _Parts(self, segment, list(zip(*forms, strict=True)))

    def run_part(
        self, segment: SegmentFacts, number: int, form: int, piece: Piece, values: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Outputs of the ``piece`` of that number, in the base's form 0 or the other's form 1."""
        bundle, at = self._bundles[form], (segment.name, number, form)
        options = functools.partial(self.segment_options, bundle, segment)
        return self._sessions.run(bundle, segment, at, piece, options, piece.outputs, values)


class _Parts:
    """One segment's session, made of its parts' ones in both forms."""

    def __init__(self, mixed: Mixed, segment: SegmentFacts, pieces: Sequence[tuple[Piece, ...]]) -> None:
        self._mixed, self._segment, self._pieces = mixed, segment, pieces

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str], spare: int = 0) -> dict[str, Tensor]:
        values = dict(feeds)
        is_token = self._segment.layers is not None and self._mixed.shape(feeds[self._segment.inputs[0].name])[1] == 1
        for number, forms in enumerate(self._pieces):
            part = self._part(number)
            if self._mixed.repeats and part in self._mixed.times:
                self._time(number, part, is_token, values)
            form = int(part in self._mixed.rounded)
            found = self._run(number, form, values)
            values.update(zip(forms[form].outputs, found, strict=True))
        return {name: values[name] for name in outputs}

    def _run(self, number: int, form: int, values: Mapping[str, Tensor]) -> list[Tensor]:
        piece = self._pieces[number][form]
        return self._mixed.run_part(self._segment, number, form, piece, values)

    def _time(self, number: int, part: str, is_token: bool, values: Mapping[str, Tensor]) -> None:
        times = self._mixed.times[part].token if is_token else self._mixed.times[part].prompt
        for form in (0, 1):  # load, and warm up
            self._run(number, form, values)
        for _ in range(self._mixed.repeats):
            for form in (0, 1):
                begin = time.perf_counter()
                self._run(number, form, values)
                times[form].append(1e3 * (time.perf_counter() - begin))

    def _part(self, number: int) -> str:
        """Pieces are layers, and behind the last one norm and head; the tower is one piece."""
        if self._segment.layers is None:
            return VISION
        first, stop = self._segment.layers
        return f"layers.{first + number}" if first + number < stop else HEAD
