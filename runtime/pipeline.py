"""Runs a bundle's segments in order: prefill with selection between the decoders, then decode steps.

Knows row layouts, caches and positions; knows no text and no image files. Sequences run in batches, of one or more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.layout import Batch, Layout, left_pad
from tokprune.runtime.limits import check_batch, check_rows
from tokprune.runtime.prompt import visual_rows
from tokprune.runtime.session import Backend, Session, Tensor


@dataclass(frozen=True)
class Pruned:
    """What one stage did to one image. ``indices`` count the image's original patches, row by row.

    ``image`` counts the images that its sequence has in the call.
    ``scores`` [total] belong to the tokens that entered the stage, ``candidates`` [total] says which
    original patches those are.
    """

    layer: int
    image: int
    kept: int
    total: int
    indices: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray


@dataclass
class Meter:
    """Milliseconds and FLOPs by segment, summed over the calls since it was made."""

    ms: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    def add(self, segment: str, ms: float, flops: int) -> None:
        self.ms[segment] = self.ms.get(segment, 0.0) + ms
        self.flops[segment] = self.flops.get(segment, 0) + flops


@dataclass
class State:
    """B sequences so far: each decoder's KV cache, and where the sequences go on."""

    caches: dict[str, Tensor]  # by past_key_values name
    masks: dict[str, np.ndarray]  # [B, P] int64 by decoder segment: 0 for the cache's pads
    positions: np.ndarray  # [B] int64, the next unpruned position of each
    rows: int = 0  # read so far as if nothing were pruned, pads among them: what the limits are held against


class Pipeline:
    """The segments of a bundle on a backend. Sessions are made on first use and kept."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest
        self.facts = bundle.manifest.model
        self._sessions: dict[str, Session] = {}
        self._decoders = [
            (index, names.decoder(index), (first, stop))
            for index, first, stop in self.manifest.plan.segments(self.facts.layers)
        ]

    def load(self) -> None:
        """Make all sessions now, so that no first call pays for it."""
        missing = [segment for segment in self.manifest.segments if segment.name not in self._sessions]
        sessions = self.backend.load_all(self.bundle, missing)
        self._sessions.update(zip((segment.name for segment in missing), sessions, strict=True))

    def new_state(self, batch: int = 1) -> State:
        """``batch`` empty sequences. Raises UserError if there are none, or more than the bundle is made for."""
        check_batch(self.manifest.limits, batch)
        caches = {}
        for _, name, _ in self._decoders:
            for tensor in self.manifest.segment(name).inputs:
                if tensor.name.startswith("past_key_values."):
                    dynamic = {names.BATCH: batch, names.PAST: 0}
                    shape = [dim if isinstance(dim, int) else dynamic[dim] for dim in tensor.shape]
                    caches[tensor.name] = self.backend.to_device(np.zeros(shape, dtype=tensor.dtype))
        masks = {name: np.ones((batch, 0), dtype=np.int64) for _, name, _ in self._decoders}
        return State(caches, masks, np.zeros(batch, dtype=np.int64))

    def encode_images(self, pixel_values: np.ndarray, meter: Meter) -> Tensor:
        """pixel_values [I, 3, H, W] → image features [I, N, D], where the backend has them."""
        dtype = self.manifest.segment(names.VISION_ENCODER).inputs[0].dtype
        feeds = {names.PIXEL_VALUES: self.backend.to_device(pixel_values.astype(dtype, copy=False))}
        out = self._run(names.VISION_ENCODER, feeds, [names.IMAGE_FEATURES], meter, images=len(pixel_values))
        return out[names.IMAGE_FEATURES]

    def forward(
        self,
        state: State,
        prompts: Sequence[Sequence[int]],
        meter: Meter,
        *,
        image_features: np.ndarray | Tensor | None = None,
        logits_rows: Sequence[int] = (-1,),
    ) -> tuple[np.ndarray, list[list[Pruned]]]:
        """Append ``prompts``, of any lengths, to the B sequences: (logits [B, T, V] float32, what was pruned of each).

        With ``image_features`` [I, N, D], a host array or what `encode_images` gave, each run of N image tokens in the
        prompts stands for one image, in order.
        ``logits_rows`` [T] are text rows of each prompt, from the end as -1. A call without images runs unpruned.
        Raises UserError if the call is larger than the bundle's limits, ValueError if prompts and sequences, or images
        and image tokens, do not match.
        """
        ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        if len(ids) != len(state.positions) or not all(map(len, ids)):
            raise ValueError(f"{len(ids)} prompts, none of them empty, are needed for {len(state.positions)} sequences")
        tokens = self.facts.vision.tokens
        # without images, an image token is one that the model has written: an embedding like any other
        no_image = np.empty((0, tokens), dtype=np.int64)
        visual = [
            no_image if image_features is None else visual_rows(row, self.facts.image_token_id, tokens) for row in ids
        ]
        images = [len(rows) for rows in visual]
        if isinstance(image_features, np.ndarray):
            dtype = self.manifest.segment(names.VISION_ENCODER).outputs[0].dtype  # on a GPU, bytes are put into place
            image_features = self.backend.to_device(image_features.astype(dtype, copy=False))
        if sum(images) != (0 if image_features is None else self.backend.shape(image_features)[0]):
            raise ValueError(f"{sum(images)} images are in the ids, but features of others were given")
        batch = Batch(tuple(Layout.of(len(row), rows) for row, rows in zip(ids, visual, strict=True)))
        check_rows(self.manifest, state.rows, batch.count)
        wanted = np.array([[row % len(prompt) for row in logits_rows] for prompt in ids], dtype=np.int64)  # [B, T]
        hidden = self._embed(left_pad(ids), batch, image_features, meter)
        positions = self.backend.to_device(
            left_pad([first + np.arange(len(row)) for first, row in zip(state.positions, ids, strict=True)])
        )
        selections: list[tuple[int, Tensor, Tensor]] = []
        logits = attention = None
        done = 0  # stages behind us
        state.rows += batch.count
        for index, name, _ in self._decoders:
            while done < index:
                if sum(images):
                    rows = (hidden, positions, attention)
                    hidden, positions, batch, kept, scores = self._select(done, rows, batch, meter)
                    selections.append((done, kept, scores))
                done += 1
            out = self._decode(state, name, hidden, positions, batch, wanted, meter)
            hidden, logits, attention = (
                out.get(key) for key in (names.LAST_HIDDEN_STATE, names.LOGITS, names.LAST_ROW_ATTENTION)
            )
        state.positions = state.positions + [len(row) for row in ids]
        assert logits is not None  # the last decoder always has the head
        stages = self.manifest.plan.stages
        picked = [(stages[i].layer, self.backend.to_host(k), self.backend.to_host(s)) for i, k, s in selections]
        return self.backend.to_host(logits), _records(picked, images, tokens)

    def _embed(self, ids: np.ndarray, batch: Batch, features: Tensor | None, meter: Meter) -> Tensor:
        feeds = {names.INPUT_IDS: self.backend.to_device(ids)}
        sizes = {"batch": len(ids), "sequence": batch.count}
        out = self._run(names.EMBED_TOKENS, feeds, [names.INPUTS_EMBEDS], meter, **sizes)
        embeds = out[names.INPUTS_EMBEDS]  # [B, S, D]
        return embeds if features is None else self.backend.place(embeds, batch.visual, features)

    def _select(
        self, stage: int, rows: tuple[Tensor, Tensor, Tensor | None], batch: Batch, meter: Meter
    ) -> tuple[Tensor, Tensor, Batch, Tensor, Tensor]:
        template, after = batch.prune(self.manifest.plan.stages[stage].keep)
        at_hand = dict(zip((names.HIDDEN_STATES, names.POSITION_IDS, names.LAST_ROW_ATTENTION), rows, strict=True))
        visual, text = batch.visual, batch.text
        indices = {names.VISUAL_INDEX: visual, names.ROW_TEMPLATE: template, names.TEXT_INDEX: text}
        # methods differ in what their selectors look at
        wanted = [tensor.name for tensor in self.manifest.segment(names.select(stage)).inputs]
        feeds = {name: self.backend.to_device(indices[name]) if name in indices else at_hand[name] for name in wanted}
        outputs = [names.KEPT_HIDDEN_STATES, names.KEPT_POSITION_IDS, names.KEPT_INDICES, names.SCORES]
        out = self._run(
            names.select(stage),
            feeds,
            outputs,
            meter,
            batch=len(batch.sequences),
            sequence=batch.count,
            rows=after.count,
            images=len(visual),
            text_rows=text.shape[1],
        )
        kept_hidden, kept_positions, kept, scores = (out[name] for name in outputs)
        return kept_hidden, kept_positions, after, kept, scores

    def _decode(
        self,
        state: State,
        name: str,
        hidden: Tensor,
        positions: Tensor,
        batch: Batch,
        wanted: np.ndarray,
        meter: Meter,
    ) -> dict[str, Tensor]:
        """One decoder's outputs; those for its cache go to ``state``."""
        segment = self.manifest.segment(name)
        past = state.masks[name].shape[1]
        mask = np.concatenate([state.masks[name], batch.mask], axis=1)
        feeds = {
            segment.inputs[0].name: hidden,
            names.POSITION_IDS: positions,
            names.ATTENTION_MASK: self.backend.to_device(mask),
        }
        if segment.outputs[0].name == names.LOGITS:
            feeds[names.LOGITS_INDEX] = self.backend.to_device(batch.rows_of(wanted))
        cache_inputs = [tensor.name for tensor in segment.inputs if tensor.name in state.caches]
        feeds.update({cache: state.caches[cache] for cache in cache_inputs})
        out = self._run(
            name,
            feeds,
            [tensor.name for tensor in segment.outputs],
            meter,
            batch=len(batch.sequences),
            sequence=batch.count,
            past_sequence=past,
            logits_count=wanted.shape[1],
            spare=self.manifest.limits.max_kv_capacity - state.rows,
        )
        # presents are in the order of the past inputs
        presents = [tensor.name for tensor in segment.outputs if tensor.name.startswith("present.")]
        for cache, present in zip(cache_inputs, presents, strict=True):
            state.caches[cache] = out.pop(present)
        state.masks[name] = mask
        return out

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = self.backend.load(self.bundle, self.manifest.segment(name))
        return self._sessions[name]

    def _run(
        self, name: str, feeds: dict[str, Tensor], outputs: list[str], meter: Meter, *, spare: int = 0, **axes: int
    ) -> dict[str, Tensor]:
        session = self._session(name)
        begin = time.perf_counter()
        out = session.run(feeds, outputs, spare)
        meter.add(name, 1e3 * (time.perf_counter() - begin), self.manifest.segment(name).count_flops(**axes))
        return out


def _records(picked: list[tuple[int, np.ndarray, np.ndarray]], images: list[int], tokens: int) -> list[list[Pruned]]:
    """Resolve each stage's indices, which count what the stage before kept, to original patches, by sequence."""
    records: list[list[Pruned]] = [[] for _ in images]
    owners = [(sequence, image) for sequence, count in enumerate(images) for image in range(count)]
    alive = [np.arange(tokens) for _ in owners]
    for layer, kept, scores in picked:
        for slot, (sequence, image) in enumerate(owners):
            before, after = alive[slot], alive[slot][kept[slot]]
            records[sequence].append(Pruned(layer, image, len(after), len(before), after, before, scores[slot]))
            alive[slot] = after
    return records
