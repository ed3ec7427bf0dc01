"""How far a fused segment is from the neutral one: both run on the same seeded inputs, by the sessions that users get.

Prompts with pruned positions and longer than one piece, later rows on a cache, batches with pads. Knows segments and
their tensors; builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokprune.runtime import names
from tokprune.runtime.engines.fused import Cache
from tokprune.runtime.layout import Batch, Layout, left_pad
from tokprune.runtime.manifest import Manifest, SegmentFacts
from tokprune.runtime.session import Backend, Session

PROMPT = 300  # rows of the longest, more than a piece
LATER = 8  # rows at most of all calls behind the first
# Of the greatest number.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2, "int4": 1e-1}


def difference(
    manifest: Manifest, segment: SegmentFacts, backend: Backend, neutral: Session, fused: Session, seed: int = 0
) -> float:
    """max |fused - neutral| / max |neutral|, of the output where that is greatest."""
    random = np.random.default_rng(seed)
    if segment.layers is None:
        return _tower(segment, backend, neutral, fused, random)
    return max(
        max(_Conversation(manifest, segment, backend, neutral, fused, random).run(turns)) for turns in _turns(manifest)
    )


def _tower(segment: SegmentFacts, backend: Backend, neutral: Session, fused: Session, random: Any) -> float:
    (given,), (taken,) = segment.inputs, segment.outputs
    shape = [1, *given.shape[1:]]
    feeds = {given.name: backend.to_device(random.standard_normal(shape).astype(given.dtype))}
    wanted, found = (backend.to_host(each.run(feeds, [taken.name])[taken.name]) for each in (neutral, fused))
    return _apart(found, wanted)


def _turns(manifest: Manifest) -> Iterator[list[list[int]]]:
    """Conversations: rows of each sequence in each of their calls, within the bundle's limits."""
    limits = manifest.limits
    room = limits.max_kv_capacity - 1
    prompt = min(PROMPT, limits.max_input_length, room - 6)
    yield [[prompt], [1], [4], [1]] if prompt > 0 else [[min(limits.max_input_length, room)], [1]]
    short = min(9, limits.max_input_length, room - 4)
    if limits.max_batch > 1 and short > 0:
        lengths = [short, 1, (short + 1) // 2][: limits.max_batch]
        yield [lengths, [1] * len(lengths), [min(3, short), 1, 2][: len(lengths)], [1] * len(lengths)]


class _Conversation:
    """The same calls to both sessions."""

    def __init__(
        self,
        manifest: Manifest,
        segment: SegmentFacts,
        backend: Backend,
        neutral: Session,
        fused: Session,
        random: np.random.Generator,
    ) -> None:
        self._manifest, self._segment, self._backend, self._random = manifest, segment, backend, random
        self._sessions = (neutral, fused)
        self._pasts = [tensor for tensor in segment.inputs if tensor.name.startswith("past_key_values.")]
        self._presents = [tensor.name for tensor in segment.outputs if tensor.name.startswith("present.")]

    def run(self, turns: Sequence[Sequence[int]]) -> Iterator[float]:
        batch = len(turns[0])
        device = self._backend.to_device
        caches: list[dict[str, Any]] = [{}, {}]
        for own in caches:
            for tensor in self._pasts:
                shape = [dim if isinstance(dim, int) else {names.BATCH: batch}.get(dim, 0) for dim in tensor.shape]
                own[tensor.name] = device(np.zeros(shape, tensor.dtype))
        mask = np.ones((batch, 0), np.int64)
        positions = np.zeros(batch, np.int64)
        spare = self._manifest.limits.max_kv_capacity
        for lengths in turns:
            is_first = mask.shape[1] == 0
            places = [
                first + (self._pruned(count) if is_first else np.arange(count))
                for first, count in zip(positions, lengths, strict=True)
            ]
            positions = np.array([line[-1] + 1 for line in places])
            new = Batch(tuple(Layout.of(count, np.empty((0, 1), np.int64)) for count in lengths)).mask
            mask = np.concatenate([mask, new], axis=1)
            spare -= new.shape[1]
            feeds = {
                self._segment.inputs[0].name: device(self._states(new)),
                names.POSITION_IDS: device(left_pad(places)),
                names.ATTENTION_MASK: device(mask),
            }
            if names.LOGITS_INDEX in {tensor.name for tensor in self._segment.inputs}:
                feeds[names.LOGITS_INDEX] = device(np.full((batch, 1), new.shape[1] - 1))
            outputs = [tensor.name for tensor in self._segment.outputs]
            wanted, found = (
                session.run({**feeds, **own}, outputs, spare)
                for session, own in zip(self._sessions, caches, strict=True)
            )
            for own, results in zip(caches, (wanted, found), strict=True):
                own.update({t.name: results[name] for t, name in zip(self._pasts, self._presents, strict=True)})
            for name in outputs:
                yield self._compare(name, wanted[name], found[name], mask, new)

    def _pruned(self, count: int) -> np.ndarray:
        """Ascending positions from which some are left out, if the context has room for them and for later rows."""
        room = min(3 * count, self._manifest.model.context - LATER)
        return np.sort(self._random.choice(room, count, replace=False)) if room > count else np.arange(count)

    def _states(self, new: np.ndarray) -> np.ndarray:
        tensor = self._segment.inputs[0]
        states = self._random.standard_normal((*new.shape, self._manifest.model.hidden))
        return states.astype(tensor.dtype)

    def _compare(self, name: str, wanted: Any, found: Any, mask: np.ndarray, new: np.ndarray) -> float:
        """Of rows that are no pads."""
        expected = self._backend.to_host(wanted)
        if isinstance(found, Cache):
            lines = [(line[:, own != 0], rows) for line, own, rows in zip(expected, mask, found.array, strict=True)]
            return max(_apart(rows[:, : line.shape[1]], line) for line, rows in lines)
        actual = self._backend.to_host(found)
        if name == names.LOGITS:
            return _apart(actual, expected)
        return _apart(actual[new != 0], expected[new != 0])


def _apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """NaN where one of them has it, which no tolerance passes."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
