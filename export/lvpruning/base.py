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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from tokprune.export.lvpruning.attention import ATTENTION, Parted, log_keep
from tokprune.export.lvpruning.batch import Batch
from tokprune.export.segments import VisionEncoder
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.preprocess import load_image

FEATURE_BYTES = 2 << 30  # image features kept in the host's memory

# decides on a stage's logits [I, N, 2] float32: [I, N] float32 of 0 and 1, differentiable or not
Decide = Callable[[int, Tensor], Tensor]


class ImageFeatures:
    """Tower and projector, image by image: an image's features are the same whatever batch it is in."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: ProcessorMixin, facts: ModelFacts) -> None:
        self._encoder = VisionEncoder(model, facts.vision.layers)
        self._processor = processor.image_processor
        self._like = model.lm_head.weight  # device and dtype
        self._kept: OrderedDict[Path, Tensor] = OrderedDict()  # the least recently used first
        self._bytes = 0

    @torch.no_grad()
    def __call__(self, path: Path) -> Tensor:
        """Features [N, D] of the image file. Raises UserError as `load_image` does."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path].to(self._like.device)
        pixels = self._processor(images=load_image(path), return_tensors="pt")["pixel_values"]
        features = self._encoder(pixels.to(self._like))[0]
        self._kept[path] = features.cpu()
        self._bytes += features.nbytes
        while self._bytes > FEATURE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
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
