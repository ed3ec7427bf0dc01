"""Slots of graphs with ONNX Runtime's fused operators, and the sessions of their decoders. Needs no onnx.

A decoder of such a slot attends by ``GroupQueryAttention``: its cache is one buffer [B, H_kv, C, d] for each layer and
each of key and value, which a call reads and writes in place. A sequence's rows lie at its beginning, without pads, so
that no mask is needed, however the sequences of a batch are padded:

- a call of one row for each sequence runs them together; each has its own length,
- any other runs them one after another, each without its pads and in pieces of `PIECE` rows. That costs nothing, since
  a piece has work enough for the cores; and the operator computes all of [rows, rows so far], half of which a prompt
  read as one piece would throw away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.engines.slot import Slot, misfit, read_slots
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import SegmentFacts

LIBRARY, ARCH = "onnxruntime", "cpu"
LENGTHS, TOTAL = "seqlens_k", "total_sequence_length"  # rows that each sequence has behind the call, less 1; the most
PIECE = 256  # rows
FORM = "attention.json"  # in a slot: milliseconds of a usual question's attention, by form
GROWTH = 64  # rows of room that a cache gets at least when it grows, else a quarter of what it holds

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Found:
    """A slot that fits, its folder, and whether its attention has the flash form."""

    folder: Path
    slot: Slot
    flash: bool

    def graph(self, segment: str) -> Path | None:
        """The segment's graph; None where the neutral one is to be used."""
        return next((self.folder / each.file for each in self.slot.segments if each.name == segment), None)


def find_fused(bundle: Bundle, version: str) -> tuple[Found | None, tuple[str, ...]]:
    """The bundle's slot for ONNX Runtime ``version``, or why those that it has are not used."""
    remarks = []
    for folder, slot in read_slots(bundle.path):
        if slot.library == LIBRARY:
            reason = misfit(folder, slot, bundle, version, ARCH)
            if reason is None:
                try:
                    return Found(folder, slot, read_form(folder)), ()
                except ValueError as error:
                    reason = str(error)
            remarks.append(
                f"{folder.name} is not used, {reason}: build it again with tokprune build {bundle.path} --target cpu"
            )
    return None, tuple(remarks)


def read_form(folder: Path) -> bool:
    """Whether attention is to have its flash form in the slot ``folder``: what was faster where it was built.

    Raises ValueError for a file that does not say.
    """
    try:
        times = json.loads((folder / FORM).read_text(encoding="utf-8"))
        return float(times["flash"]) < float(times["whole"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{FORM} does not say which form of attention is faster ({error!r})") from None


@dataclass
class Cache:
    """One layer's keys or values, [B, H_kv, C, d]: sequence b has its rows first. Changed in place."""

    array: np.ndarray
    value: Any  # the same memory as ONNX Runtime has it


class FusedDecoder:
    """A decoder's session; what it gives for a cache is a `Cache`, to be fed back. See `session.Session`."""

    def __init__(self, ort: Any, session: Any, segment: SegmentFacts, path: Path) -> None:
        self._ort, self._session, self._binding, self._path = ort, session, session.io_binding(), path
        self._states = segment.inputs[0].name
        self._outputs = [tensor for tensor in segment.outputs if not tensor.name.startswith("present.")]
        pasts = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
        self._pasts = {item.name: (item.shape[1], item.shape[3], _TYPES[item.type]) for item in pasts}
        self._presents = [tensor.name for tensor in segment.outputs if tensor.name.startswith("present.")]
        self._bound: list[Cache] = []

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str], spare: int = 0) -> dict[str, Any]:
        states, positions = feeds[self._states].numpy(), feeds[names.POSITION_IDS].numpy()
        asked = feeds[names.LOGITS_INDEX].numpy() if names.LOGITS_INDEX in feeds else None
        batch, rows = positions.shape
        mask = feeds[names.ATTENTION_MASK].numpy()
        past, new = (part.sum(axis=1) for part in np.split(mask, [mask.shape[1] - rows], axis=1))  # [B], no pads
        caches = [self._room(feeds[name], name, past, new, spare) for name in self._pasts]
        sizes = {names.BATCH: batch, names.SEQUENCE: rows, names.LOGITS_COUNT: 0 if asked is None else asked.shape[1]}
        results: dict[str, Any] = {}
        for tensor in self._outputs:
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
            # memory of ONNX Runtime's, which what is made of it later holds; NumPy's would end with its array
            results[tensor.name] = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(tensor.dtype).type)
        found = {name: value.numpy() for name, value in results.items()}
        if rows == 1:
            self._call(states, positions, asked, past, caches, found, columns=1)
        else:
            for array in found.values():
                array.fill(0)  # what pads have
            for one in range(batch):
                own = caches if batch == 1 else [self._cache(cache.array[one : one + 1]) for cache in caches]
                self._sequence(one, states, positions, asked, int(past[one]), int(new[one]), own, found)
        results.update(zip(self._presents, caches, strict=True))
        return {name: results[name] for name in outputs}

    def _sequence(
        self,
        one: int,
        states: np.ndarray,
        positions: np.ndarray,
        asked: np.ndarray | None,
        past: int,
        new: int,
        caches: list[Cache],
        found: dict[str, np.ndarray],
    ) -> None:
        """Run the last ``new`` rows of sequence ``one``, piece by piece, and put what comes into ``found``."""
        sequence = slice(one, one + 1)
        rows = positions.shape[1]
        for begin in range(rows - new, rows, PIECE):
            end = min(begin + PIECE, rows)
            piece = {name: array[sequence] for name, array in found.items()}
            index = which = None
            if asked is not None:
                which = (asked[one] >= begin) & (asked[one] < end)
                index = asked[sequence, which] - begin
                piece[names.LOGITS] = piece[names.LOGITS][:, which]
            if names.LAST_HIDDEN_STATE in piece:
                piece[names.LAST_HIDDEN_STATE] = piece[names.LAST_HIDDEN_STATE][:, begin:end]
            self._call(
                states[sequence, begin:end],
                positions[sequence, begin:end],
                index,
                np.array([past + begin - (rows - new)]),
                caches,
                piece,
                columns=new if end == rows else 0,
            )
            if which is not None:
                found[names.LOGITS][one, which] = piece[names.LOGITS][0]

    def _call(
        self,
        states: np.ndarray,  # [B, S, D]
        positions: np.ndarray,  # [B, S]
        asked: np.ndarray | None,  # [B, T]
        past: np.ndarray,  # [B]
        caches: list[Cache],
        found: dict[str, np.ndarray],
        columns: int,
    ) -> None:
        """Run the graph once; the outputs are written into ``found``, the rows' keys and values into ``caches``.

        The last row's attention is wanted to the ``columns`` rows that each sequence then has last, or not at all.
        """
        binding = self._binding
        behind = past + states.shape[1]  # [B]
        feeds = {
            self._states: states,
            names.POSITION_IDS: positions,
            LENGTHS: (behind - 1).astype(np.int32),
            TOTAL: behind.max(keepdims=True).astype(np.int32),
        }
        if asked is not None:
            feeds[names.LOGITS_INDEX] = asked
        written = dict(found)
        if names.LAST_ROW_ATTENTION in found:
            written[names.LAST_ROW_ATTENTION] = np.empty((len(past), caches[0].array.shape[2]), np.float32)
        given, taken = ({name: self._value(array) for name, array in each.items()} for each in (feeds, written))
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in taken.items():
            binding.bind_ortvalue_output(name, value)
        if [*map(id, self._bound)] != [*map(id, caches)]:
            for past_name, present, cache in zip(self._pasts, self._presents, caches, strict=True):
                binding.bind_ortvalue_input(past_name, cache.value)
                binding.bind_ortvalue_output(present, cache.value)
            self._bound = caches
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no narrower base
            raise UserError(
                f"ONNX Runtime cannot run {self._path} ({error}): build the slot again with tokprune build --target cpu"
            ) from error
        if columns and names.LAST_ROW_ATTENTION in found:
            for line, weights, end in zip(
                found[names.LAST_ROW_ATTENTION], written[names.LAST_ROW_ATTENTION], behind.tolist(), strict=True
            ):
                line[len(line) - columns :] = weights[end - columns : end]

    def _room(self, given: Any, name: str, past: np.ndarray, new: np.ndarray, spare: int) -> Cache:
        """``given`` with room for the call's rows: itself, or its copy in more memory. At first it is a tensor."""
        need = int((past + new).max())
        old = given.array if isinstance(given, Cache) else None
        if old is not None and old.shape[2] >= need:
            return given
        heads, width, dtype = self._pasts[name]
        capacity = need + min(spare, max(GROWTH, need // 4))
        array = np.empty((len(past), heads, capacity, width), dtype)
        if old is not None:
            array[:, :, : old.shape[2]] = old
        return self._cache(array)

    def _cache(self, array: np.ndarray) -> Cache:
        return Cache(array, self._value(array))

    def _value(self, array: np.ndarray) -> Any:
        """A tensor over the array's own memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
