"""The frozen base model with modules between its layers. Knows tensors and layers; knows no data file and no optimizer.

Before the decoder layer of each stage a module scores the visual rows; what is decided on its logits weighs on the
attention to these rows in all layers from there on (see `attention`). Rows are never removed here, since the decision
to drop one needs a gradient too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from tokprune.export.lvpruning.attention import ATTENTION, Looked, Parted, log_keep
from tokprune.export.lvpruning.batch import Batch
from tokprune.export.segments import VisionEncoder
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.preprocess import load_image

FEATURE_BYTES = 2 << 30  # image features kept in the host's memory
SHARE_BYTES = 1 << 30  # and what `Base.guided` found

K = TypeVar("K")

# decides on a stage's logits [I, N, 2] float32: [I, N] float32 of 0 and 1, differentiable or not
Decide = Callable[[int, Tensor], Tensor]


class Recent(Generic[K]):
    """Tensors in the host's memory by key, up to ``limit`` bytes: those least recently asked for go first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[K, Tensor] = OrderedDict()

    def get(self, key: K) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: K, value: Tensor) -> None:
        """Keep ``value``, whose key is new."""
        self._kept[key] = value.cpu()
        self._bytes += value.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


class ImageFeatures:
    """Tower and projector, image by image: an image's features are the same whatever batch it is in."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: ProcessorMixin, facts: ModelFacts) -> None:
        self._encoder = VisionEncoder(model, facts.vision.layers)
        self._processor = processor.image_processor
        self._like = model.lm_head.weight  # device and dtype
        self._kept: Recent[Path] = Recent(FEATURE_BYTES)

    @torch.no_grad()
    def __call__(self, path: Path) -> Tensor:
        """Features [N, D] of the image file. Raises UserError as `load_image` does."""
        if (known := self._kept.get(path)) is not None:
            return known.to(self._like.device)
        pixels = self._processor(images=load_image(path), return_tensors="pt")["pixel_values"]
        features = self._encoder(pixels.to(self._like))[0]
        self._kept.put(path, features)
        return features


@dataclass(frozen=True)
class Outcome:
    """What a batch gave: logits [T, V] float32 at its predicting rows, and [I, N] of each stage's decisions so far."""

    logits: Tensor
    kept: list[Tensor]


class Base:
    """A LLaVA-1.5 whose weights get no gradient, run layer by layer with one module a stage."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: ProcessorMixin,
        facts: ModelFacts,
        layers: Sequence[int],
        *,
        checkpointing: bool = False,
    ) -> None:
        """``layers`` ascending: before which decoder layers the stages are. ``model`` is loaded with sdpa.

        With ``checkpointing`` a layer's inner activations are computed again for the gradient, not kept.
        """
        model.requires_grad_(False)
        self._language, self._head = model.model.language_model, model.lm_head
        self._language.config._attn_implementation = ATTENTION
        self._stages = {layer: index for index, layer in enumerate(layers)}
        self._features = ImageFeatures(model, processor, facts)
        self._checkpointing = checkpointing
        self._shares: Recent[tuple[Path, bytes]] = Recent(SHARE_BYTES)  # [stages, N] of an image under a prompt

    def __call__(self, batch: Batch, modules: nn.ModuleList, decide: Decide) -> Outcome:
        """Run ``batch``, already on the base's device, through the stages that ``decide`` decides on.

        A row that an earlier stage dropped stays dropped: decisions are multiplied.
        """
        hidden = self._embed(batch)  # [B, S, D]
        positions = torch.arange(hidden.shape[1] + 1, device=hidden.device)[None]  # one more, for rows that fill up
        rotation = self._language.rotary_emb(hidden, positions)
        parts: Parts | None = None
        kept: list[Tensor] = []
        for number, layer in enumerate(self._language.layers):
            if number in self._stages:
                stage = self._stages[number]
                hidden = parts.join() if parts else hidden
                decisions = decide(stage, self._score(modules[stage], batch, hidden))
                kept.append(decisions * kept[-1] if kept else decisions)
                parts = Parts(hidden, *self._decided(batch, kept[-1]), rotation)
            if parts:
                parts.through(layer, checkpointing=self._checkpointing)
            else:
                hidden = layer(hidden, position_embeddings=tuple(x[:, :-1] for x in rotation))
        rows = (parts.join() if parts else hidden).flatten(0, 1)[batch.predicting]
        return Outcome(self._head(self._language.norm(rows)).float(), kept)

    def guided(self, batch: Batch, modules: nn.ModuleList) -> tuple[list[Tensor], Tensor]:
        """With nothing pruned: by stage the module's logits [I, N, 2]; and [stages, I, N] float32, each visual row's
        share of what the prompt's text looks at in the stage's two first layers.

        A row counts as much as the row of text and the head that give it most do; shares of an image sum to 1. Layers
        behind those do not run, and shares that were found before are not sought again.
        """
        keys = _prompts(batch)
        known = [self._shares.get(key) for key in keys]
        wanted = any(shares is None for shares in known)
        layers = self._language.layers
        stop = min(max(self._stages) + 2, len(layers)) if wanted else max(self._stages) + 1
        scored, most = [], []
        with torch.no_grad():
            hidden = self._embed(batch)
            rotation = self._language.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        for number, layer in enumerate(layers[:stop]):
            if number in self._stages:
                scored.append(self._score(modules[self._stages[number]], batch, hidden))
            looked = Looked(batch.text % hidden.shape[1], batch.text_valid) if wanted else None
            with torch.no_grad():
                if number + 1 < stop:
                    hidden = layer(hidden, position_embeddings=rotation, looked=looked)
                elif looked:  # its attention is all that is wanted of it
                    layer.self_attn(layer.input_layernorm(hidden), rotation, None, looked=looked)
            if looked and looked.most is not None:
                most.append(looked.most.flatten()[batch.visual])
        if wanted:
            totals = torch.stack([torch.stack(most[first : first + 2]).sum(0) for first in self._stages])
            found = totals / totals.sum(2, keepdim=True)
            new = {
                key: shares for key, shares, before in zip(keys, found.unbind(1), known, strict=True) if before is None
            }
            for key, shares in new.items():  # a prompt that is in the batch twice is kept once
                self._shares.put(key, shares.clone())  # not a view, which would hold the batch's
            return scored, found
        return scored, torch.stack([shares for shares in known if shares is not None], 1).to(hidden.device)

    def _embed(self, batch: Batch) -> Tensor:
        hidden = self._language.embed_tokens(batch.ids)
        features = torch.cat([self._features(image) for image in batch.images])  # [I · N, D]
        hidden.view(-1, hidden.shape[-1])[batch.visual.flatten()] = features
        return hidden

    @staticmethod
    def _score(module: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
        """[I, N, 2]: the module sees each image with the text of its sequence, the answer's rows never."""
        rows = hidden.flatten(0, 1)
        return module(rows[batch.visual], rows[batch.text[batch.owner]], batch.text_valid[batch.owner])

    @staticmethod
    def _decided(batch: Batch, kept: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] bool, the rows that are dropped; [B, S] float32, log(d + eps) at visual rows, 0 at text."""
        flat, visual = torch.zeros(batch.ids.numel(), device=kept.device), batch.visual.flatten()
        dropped = flat.index_copy(0, visual, (kept.detach() == 0).flatten().float()).bool()
        return dropped.view(batch.ids.shape), flat.index_copy(0, visual, log_keep(kept).flatten()).view(batch.ids.shape)


def _prompts(batch: Batch) -> list[tuple[Path, bytes]]:
    """What tells one image under one prompt from others: its file, its first row, and the text with its rows."""
    flat, size = batch.ids.flatten(), batch.ids.shape[1]
    found = []
    for image, owner, visual in zip(batch.images, batch.owner.tolist(), batch.visual, strict=True):
        text = batch.text[owner][batch.text_valid[owner]]
        found.append((image, torch.cat([visual[:1] % size, text % size, flat[text]]).cpu().numpy().tobytes()))
    return found


class Parts:
    """A batch's rows from a stage on, parted into those that stay and those that are dropped (see `attention`).

    With K of N visual rows kept, a gradient costs what K rows cost, and so does most of the memory.
    """

    def __init__(self, hidden: Tensor, dropped: Tensor, columns: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        """hidden [B, S, D], dropped [B, S] bool, columns [B, S] float32, rotation two of [1, S + 1, d]."""
        self._stay, self._drop = _places(~dropped), _places(dropped)  # [B, R], [B, Q]
        filled = F.pad(hidden, (0, 0, 0, 1))
        self._staying = _take(filled, self._stay)
        self._dropped = _take(filled.detach(), self._drop)
        self._rotations = [tuple(x[0][places] for x in rotation) for places in (self._stay, self._drop)]
        columns = F.pad(columns, (0, 1))
        self._columns = columns.gather(1, self._stay), columns.gather(1, self._drop)
        self._shape = filled.shape

    def through(self, layer: nn.Module, *, checkpointing: bool) -> None:
        """Run both parts through a decoder layer."""
        rows = Parted(self._stay, self._columns[0], self._drop, self._columns[1])
        staying, dropped = self._rotations
        if checkpointing and torch.is_grad_enabled():
            after = checkpointed(layer, self._staying, position_embeddings=staying, staying=rows, use_reentrant=False)
        else:
            after = layer(self._staying, position_embeddings=staying, staying=rows)
        if self._drop.shape[1]:
            with torch.no_grad():
                self._dropped = layer(self._dropped, position_embeddings=dropped, dropped=rows)
        self._staying = after

    def join(self) -> Tensor:
        """[B, S, D] again; what was dropped has no gradient."""
        joined = self._staying.new_zeros(self._shape)
        for places, rows in ((self._drop, self._dropped), (self._stay, self._staying)):
            joined = joined.scatter(1, places[..., None].expand_as(rows), rows)
        return joined[:, :-1]


def _places(chosen: Tensor) -> Tensor:
    """Chosen columns of each row of [B, S], ascending: [B, most]; S, a column that is not there, fills up."""
    counts = chosen.sum(1, keepdim=True)
    most = int(counts.max())
    places = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return places.masked_fill(torch.arange(most, device=chosen.device) >= counts, chosen.shape[1])


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """rows [B, ·, D] at places [B, R] → [B, R, D]."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))
