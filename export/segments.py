"""The torch modules that become segments: slices of transformers' own LLaVA, with tensors in and out.

Knows the model and its layers; knows no ONNX, no bundle and no pruning. Every module here runs in eager
PyTorch too, so that a test can hold a traced graph against it.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import repeat_kv

from tokprune.export.store import Source

ATTENTION = "tokprune"


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, S, d]
    key: Tensor,  # [B, H_kv, P + S, d]
    value: Tensor,
    attention_mask: Tensor | None,  # added to the weights; broadcasts to [B, H, S, P + S]
    scaling: float,
    last_row: list[Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Plain attention for tracing, registered with transformers under the name ``ATTENTION``.

    The query is scaled before the product and the softmax runs in FP32: in FP16 neither overflows. A list given as
    ``last_row`` gets `_last_row` appended; transformers hands the argument through the layer to here.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if last_row is not None:
        last_row.append(_last_row(query, key, attention_mask, scaling))
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.float().softmax(dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None  # [B, S, H, d]


def _last_row(query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
    """What the call's last row gives to each row of the call, [B, S] FP32: softmax over P + S keys, mean over heads.

    Computed beside the attention, not read from its weights: an engine that fuses those away may still do so. The
    last row is that of index S - 1, so a sequence that is padded has its padding on the left.
    """
    rows = query.shape[2]
    weights = torch.matmul(query[:, :, -1:] * scaling, key.transpose(2, 3))  # [B, H, 1, P + S]
    if attention_mask is not None:
        weights = weights + attention_mask[:, :, -1:]
    return weights.float().softmax(dim=-1).mean(dim=1)[:, 0, key.shape[2] - rows :]


class Segment(nn.Module):
    """A part of the model that becomes one graph. ``weights``: whole-model prefixes of its parameters' prefixes."""

    weights: ClassVar[dict[str, str]]


def source(module: Segment, parameter: str) -> Source:
    """Which of the checkpoint's tensors ``module``'s ``parameter`` is."""
    own = next(prefix for prefix in module.weights if parameter.startswith(prefix))
    name = module.weights[own] + parameter.removeprefix(own)
    if piece := re.fullmatch(r"(.+)\.rows_(\d+)_(\d+)(\..+)", name):
        return Source(piece[1] + piece[4], (int(piece[2]), int(piece[3])))
    return Source(name)


class VisionEncoder(Segment):
    """pixel_values [I, 3, H, W] → image_features [I, N, D]: tower up to the feature layer, then projector."""

    weights: ClassVar = {
        "embeddings.": "vision_tower.embeddings.",
        "pre_layrnorm.": "vision_tower.pre_layrnorm.",
        "layers.": "vision_tower.encoder.layers.",
        "projector.": "multi_modal_projector.",
    }

    def __init__(self, model: LlavaForConditionalGeneration, layers: int) -> None:
        super().__init__()
        tower = model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)  # transformers 5 merged the two classes
        self.embeddings, self.pre_layrnorm = tower.embeddings, tower.pre_layrnorm
        self.layers = nn.ModuleList(tower.encoder.layers[:layers])
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        return self.projector(hidden[:, 1:])  # the class token is dropped


class EmbedTokens(Segment):
    """input_ids [B, S] → inputs_embeds [B, S, D]."""

    weights: ClassVar = {"embedding.": "language_model.embed_tokens."}

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.embedding = model.model.language_model.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)


class _Cache:
    """What transformers' attention asks of a cache: appends to given tensors and keeps the results."""

    def __init__(self, tensors: tuple[Tensor, ...], first_layer: int) -> None:
        self._past, self._first = tensors, first_layer
        self.present: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        at = 2 * (layer - self._first)
        key = torch.cat([self._past[at], key], dim=2)  # [B, H_kv, P + S, d]
        value = torch.cat([self._past[at + 1], value], dim=2)
        self.present += [key, value]
        return key, value


class SplitHead(nn.Module):
    """A linear map [.., D] → [.., V] in pieces of its outputs, since some devices cannot allocate a large one whole."""

    def __init__(self, head: nn.Linear, pieces: int) -> None:
        super().__init__()
        bounds = [head.out_features * piece // pieces for piece in range(pieces + 1)]
        self.pieces = []
        for begin, end in itertools.pairwise(bounds):
            piece = nn.Linear(head.in_features, end - begin, bias=False, device="meta")
            piece.weight = nn.Parameter(head.weight[begin:end], requires_grad=False)
            self.add_module(f"rows_{begin}_{end}", piece)  # `source` reads it
            self.pieces.append(piece)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([piece(hidden) for piece in self.pieces], dim=-1)


class Decoder(Segment):
    """Decoder layers [first, stop), for prefill and decode alike; with norm and head if they are the last.

    Inputs: hidden states [B, S, D], position_ids [B, S], attention_mask [B, P + S], logits_index [B, T]
    (with the head only), then past key and value of each layer, [B, H_kv, P, d].
    Outputs: last_hidden_state [B, S, D] or logits [B, T, V] in FP32; with ``last_row`` the attention of the call's
    last row in the last layer, [B, S] in FP32; then present keys and values.
    """

    weights: ClassVar = {"layers.": "language_model.layers.", "norm.": "language_model.norm.", "head.": "lm_head."}

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        first: int,
        stop: int,
        *,
        last_row: bool = False,
        head_pieces: int | None = None,
    ) -> None:
        """``head_pieces`` 0 is without norm and head; None is 1 behind the model's last layer, else 0."""
        super().__init__()
        self.last_row = last_row
        language = model.model.language_model
        if head_pieces is None:
            head_pieces = int(stop == len(language.layers))
        self.first, self.has_head = first, head_pieces > 0
        self.layers = nn.ModuleList(language.layers[first:stop])
        self.rotary = language.rotary_emb
        if self.has_head:
            self.norm = language.norm
            self.head = model.lm_head if head_pieces == 1 else SplitHead(model.lm_head, head_pieces)

    def forward(
        self, hidden: Tensor, position_ids: Tensor, attention_mask: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        logits_index, past = (rest[0], rest[1:]) if self.has_head else (None, rest)
        cache = _Cache(past, self.first)
        bias = _causal_bias(attention_mask, hidden)
        rotation = self.rotary(hidden, position_ids)
        row: list[Tensor] = []
        for number, layer in enumerate(self.layers, start=1):
            is_asked = self.last_row and number == len(self.layers)
            hidden = layer(
                hidden,
                attention_mask=bias,
                position_ids=position_ids,
                past_key_values=cache,
                position_embeddings=rotation,
                last_row=row if is_asked else None,
            )
        if logits_index is not None:
            rows = logits_index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            hidden = self.head(self.norm(hidden.gather(1, rows))).float()
        return hidden, *row, *cache.present


def _causal_bias(attention_mask: Tensor, hidden: Tensor) -> Tensor:
    """[B, P + S] of 0 and 1 → [B, 1, S, P + S] of 0 and the dtype's lowest number.

    Rows are in order of position, before and after pruning, so row i of this call may see rows 0 .. P + i. Every row
    sees itself, masked out or not: with nothing to see a row of FP16 would become NaN, and NaN times 0 in others'.
    """
    rows, total = hidden.shape[1], attention_mask.shape[1]
    last = torch.arange(rows, device=hidden.device) + (total - rows)
    columns = torch.arange(total, device=hidden.device)
    causal, own = columns[None, :] <= last[:, None], columns[None, :] == last[:, None]  # [S, P + S]
    allowed = (causal[None, None] & (attention_mask[:, None, None, :] != 0)) | own[None, None]
    zero = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(allowed, zero, torch.finfo(hidden.dtype).min)
