"""Runs a bundle's segments in order: prefill with selection between the decoders, then decode steps.

Knows row layouts, caches and positions; knows no text and no image files. One sequence at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.layout import Layout
from tokprune.runtime.prompt import visual_rows
from tokprune.runtime.session import Backend, Session, Tensor


@dataclass(frozen=True)
class Pruned:
    """What one stage did to one image. ``indices`` count the image's original patches, row by row.

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
    """A sequence so far: KV cache and cached rows of each decoder, and the next unpruned position."""

    caches: dict[str, Tensor]  # by past_key_values name
    lengths: dict[str, int]  # rows in the cache, by decoder segment
    position: int = 0


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
        for segment in self.manifest.segments:
            self._session(segment.name)

    def new_state(self) -> State:
        """An empty sequence."""
        caches = {}
        for _, name, _ in self._decoders:
            for tensor in self.manifest.segment(name).inputs:
                if tensor.name.startswith("past_key_values."):
                    dynamic = {names.BATCH: 1, names.PAST: 0}
                    shape = [dim if isinstance(dim, int) else dynamic[dim] for dim in tensor.shape]
                    caches[tensor.name] = self.backend.to_device(np.zeros(shape, dtype=tensor.dtype))
        return State(caches, {name: 0 for _, name, _ in self._decoders})

    def encode_images(self, pixel_values: np.ndarray, meter: Meter) -> np.ndarray:
        """pixel_values [I, 3, H, W] → image features [I, N, D]."""
        dtype = self.manifest.segment(names.VISION_ENCODER).inputs[0].dtype
        feeds = {names.PIXEL_VALUES: self.backend.to_device(pixel_values.astype(dtype, copy=False))}
        out = self._run(names.VISION_ENCODER, feeds, [names.IMAGE_FEATURES], meter, images=len(pixel_values))
        return self.backend.to_host(out[names.IMAGE_FEATURES])

    def forward(
        self,
        state: State,
        ids: Sequence[int],
        meter: Meter,
        *,
        image_features: np.ndarray | None = None,
        logits_rows: Sequence[int] = (-1,),
    ) -> tuple[np.ndarray, list[Pruned]]:
        """Append ``ids`` to the sequence: logits [T, V] float32 of the asked text rows, and what was pruned.

        With ``image_features`` [I, N, D], each run of N image tokens in ``ids`` stands for one image. Rows of
        the call may be asked for from the end, as -1. A call without images runs unpruned.
        Raises ValueError if images and image tokens do not match.
        """
        count = len(ids)
        tokens = self.facts.vision.tokens
        # without images, an image token is one that the model has written: an embedding like any other
        visual = (
            np.empty((0, tokens), dtype=np.int64)
            if image_features is None
            else visual_rows(ids, self.facts.image_token_id, tokens)
        )
        if len(visual) != (0 if image_features is None else len(image_features)):
            raise ValueError(f"{len(visual)} images are in the ids, but features of others were given")
        hidden = self._embed(ids, visual, image_features, meter)
        positions = self.backend.to_device(np.arange(state.position, state.position + count)[None])
        layout = Layout.of(count, visual)
        wanted = np.array([row % count for row in logits_rows], dtype=np.int64)
        selections: list[tuple[int, Tensor, Tensor]] = []
        logits = attention = None
        stages = self.manifest.plan.stages
        done = 0  # stages behind us
        for index, name, _ in self._decoders:
            while done < index:
                if len(visual):
                    rows = (hidden, positions, attention)
                    hidden, positions, layout, kept, scores = self._select(done, rows, layout, meter)
                    selections.append((done, kept, scores))
                done += 1
            out = self._decode(state, name, hidden, positions, layout, wanted, meter)
            hidden, logits, attention = (
                out.get(key) for key in (names.LAST_HIDDEN_STATE, names.LOGITS, names.LAST_ROW_ATTENTION)
            )
        state.position += count
        assert logits is not None  # the last decoder always has the head
        picked = [(stages[i].layer, self.backend.to_host(k), self.backend.to_host(s)) for i, k, s in selections]
        return self.backend.to_host(logits)[0], _records(picked, len(visual), self.facts.vision.tokens)

    def _embed(self, ids: Sequence[int], visual: np.ndarray, features: np.ndarray | None, meter: Meter) -> Tensor:
        feeds = {names.INPUT_IDS: self.backend.to_device(np.asarray(ids, dtype=np.int64)[None])}
        out = self._run(names.EMBED_TOKENS, feeds, [names.INPUTS_EMBEDS], meter, batch=1, sequence=len(ids))
        if features is None:
            return out[names.INPUTS_EMBEDS]
        embeds = self.backend.to_host(out[names.INPUTS_EMBEDS]).copy()  # [1, S, D]
        embeds[0, visual] = features
        return self.backend.to_device(embeds)

    def _select(
        self, stage: int, rows: tuple[Tensor, Tensor, Tensor | None], layout: Layout, meter: Meter
    ) -> tuple[Tensor, Tensor, Layout, Tensor, Tensor]:
        template, after = layout.prune(self.manifest.plan.stages[stage].keep)
        at_hand = dict(zip((names.HIDDEN_STATES, names.POSITION_IDS, names.LAST_ROW_ATTENTION), rows, strict=True))
        indices = {
            names.VISUAL_INDEX: layout.visual,
            names.ROW_TEMPLATE: template[None],
            names.TEXT_INDEX: np.tile(layout.text, (len(layout.visual), 1)),
        }
        # methods differ in what their selectors look at
        wanted = [tensor.name for tensor in self.manifest.segment(names.select(stage)).inputs]
        feeds = {name: self.backend.to_device(indices[name]) if name in indices else at_hand[name] for name in wanted}
        outputs = [names.KEPT_HIDDEN_STATES, names.KEPT_POSITION_IDS, names.KEPT_INDICES, names.SCORES]
        out = self._run(
            names.select(stage),
            feeds,
            outputs,
            meter,
            batch=1,
            sequence=layout.count,
            rows=after.count,
            images=len(layout.visual),
            text_rows=len(layout.text),
        )
        kept_hidden, kept_positions, kept, scores = (out[name] for name in outputs)
        return kept_hidden, kept_positions, after, kept, scores

    def _decode(
        self,
        state: State,
        name: str,
        hidden: Tensor,
        positions: Tensor,
        layout: Layout,
        wanted: np.ndarray,
        meter: Meter,
    ) -> dict[str, Tensor]:
        """One decoder's outputs; those for its cache go to ``state``."""
        segment = self.manifest.segment(name)
        past = state.lengths[name]
        feeds = {
            segment.inputs[0].name: hidden,
            names.POSITION_IDS: positions,
            names.ATTENTION_MASK: self.backend.to_device(np.ones((1, past + layout.count), dtype=np.int64)),
        }
        if segment.outputs[0].name == names.LOGITS:
            feeds[names.LOGITS_INDEX] = self.backend.to_device(layout.rows_of(wanted)[None])
        cache_inputs = [tensor.name for tensor in segment.inputs if tensor.name in state.caches]
        feeds.update({cache: state.caches[cache] for cache in cache_inputs})
        out = self._run(
            name,
            feeds,
            [tensor.name for tensor in segment.outputs],
            meter,
            batch=1,
            sequence=layout.count,
            past_sequence=past,
            logits_count=len(wanted),
        )
        # presents are in the order of the past inputs
        presents = [tensor.name for tensor in segment.outputs if tensor.name.startswith("present.")]
        for cache, present in zip(cache_inputs, presents, strict=True):
            state.caches[cache] = out.pop(present)
        state.lengths[name] = past + layout.count
        return out

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = self.backend.load(self.bundle.file(self.manifest.segment(name).file))
        return self._sessions[name]

    def _run(
        self, name: str, feeds: dict[str, Tensor], outputs: list[str], meter: Meter, **axes: int
    ) -> dict[str, Tensor]:
        session = self._session(name)
        begin = time.perf_counter()
        out = session.run(feeds, outputs)
        meter.add(name, 1e3 * (time.perf_counter() - begin), self.manifest.segment(name).count_flops(**axes))
        return out


def _records(picked: list[tuple[int, np.ndarray, np.ndarray]], images: int, tokens: int) -> list[Pruned]:
    """Resolve each stage's indices, which count what the stage before kept, to original patches."""
    records = []
    alive = [np.arange(tokens) for _ in range(images)]
    for layer, kept, scores in picked:
        for image in range(images):
            before = alive[image]
            alive[image] = before[kept[image]]
            records.append(Pruned(layer, image, len(alive[image]), len(before), alive[image], before, scores[image]))
    return records
