"""The decoder on many questions at once: one image, several questions that cannot see each other.

Each question follows the image as if it were alone, at the same position ids, so its logits are those of a one-question
sequence. The layers are transformers' own. Knows nothing about how scenes look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tokprune.export.demo.model import PROMPT
from tokprune.export.demo.scenes import GRID

TAIL = 4  # last prompt tokens: the question's key word, "?", " ASSISTANT", ":"


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration) -> None:
    """Wider than transformers' 0.02, which suits a far wider model; layers start by adding little to the stream."""
    spread = {"o_proj.weight": 0.02, "down_proj.weight": 0.02, "embed_tokens.weight": 0.3}
    for part in trained_parts(model):
        for name, weight in part.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=spread.get(".".join(name.split(".")[-2:]), 0.07))


@dataclass
class Packed:
    """Questions of a batch of images with their answers: int64 tokens `ids` [B, Q, S], padded on the right."""

    ids: torch.Tensor
    lengths: torch.Tensor  # [B, Q], without padding
    targets: torch.Tensor  # [B, Q], the answer, which is the last token


class Packer:
    """Turns question and answer text into padded token blocks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        before, after = PROMPT.split("<image>")
        self.prefix = tokenizer(before).input_ids
        self._after = after
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, str], list[int]] = {}

    def block(self, prompt: str, answer: str) -> list[int]:
        """Tokens after the image: the question, "ASSISTANT:" and the answer."""
        key = (prompt, answer)
        if key not in self._known:
            text = self._after.format(question=prompt) + " " + answer
            self._known[key] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[key]

    def pack(self, questions: list[list[tuple[str, str]]]) -> Packed:
        """Blocks of every image's (prompt, answer) pairs; images have equally many."""
        blocks = [[self.block(*q) for q in row] for row in questions]
        longest = max(len(b) for row in blocks for b in row)
        ids = torch.tensor([[b + [self.pad] * (longest - len(b)) for b in row] for row in blocks])
        lengths = torch.tensor([[len(b) for b in row] for row in blocks])
        return Packed(ids, lengths, ids.gather(2, lengths[..., None] - 1)[..., 0])


def attention_mask(cells: int, prefix: int, packed: Packed) -> torch.Tensor:
    """bool [B, 1, L, L], True where attended: causal, a question sees prefix, image and itself."""
    batch, count, size = packed.ids.shape
    shared = prefix + cells
    total = shared + count * size
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    owner = torch.arange(count).repeat_interleave(size)
    mask[shared:, shared:] &= owner[:, None] == owner[None, :]
    return mask[None, None].expand(batch, 1, total, total)


def question_logits(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    features: torch.Tensor,
    cells: torch.Tensor,
    packed: Packed,
) -> torch.Tensor:
    """Logits [B, Q, TAIL + 1, V] of each question's last `TAIL` prompt tokens and of its answer token.

    `features` [B, T, D] are the tower's, of the patches `cells` [B, T] in ascending order.
    """
    language, embed = model.model.language_model, model.model.language_model.embed_tokens
    batch, count, size = packed.ids.shape
    prefix = torch.tensor(packer.prefix).expand(batch, -1)
    image = model.model.multi_modal_projector(features)
    x = torch.cat([embed(prefix), image, embed(packed.ids.flatten(1))], 1)
    first = prefix.shape[1]
    inside = (first + GRID * GRID + torch.arange(size)).repeat(count).expand(batch, -1)
    positions = torch.cat([torch.arange(first).expand(batch, -1), first + cells, inside], 1)
    rope = language.rotary_emb(x, positions)
    mask = attention_mask(cells.shape[1], first, packed)
    for layer in language.layers:
        x = _layer(layer, x, mask, rope)
    tail = x[:, first + cells.shape[1] :].unflatten(1, (count, size))
    at = packed.lengths[..., None] - 1 + torch.arange(-TAIL, 1)  # [B, Q, TAIL + 1]
    picked = tail.gather(2, at[..., None].expand(-1, -1, -1, tail.shape[-1]))
    return model.lm_head(language.norm(picked))


def _layer(layer: Any, x: torch.Tensor, mask: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`layer(x, attention_mask=mask, position_embeddings=rope)` [B, L, D] in fewer, larger operations."""
    attention, mlp = layer.self_attn, layer.mlp
    h = _norm(layer.input_layernorm, x)
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    fused = F.linear(h, weight).unflatten(2, (3, -1, attention.head_dim))  # [B, L, 3, H, D / H]
    cos, sin = (r[:, :, None, None] for r in rope)
    turned, v = fused[:, :, :2], fused[:, :, 2]
    low, high = turned.chunk(2, -1)
    q, k = (turned * cos + torch.cat([-high, low], -1) * sin).unbind(2)
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    h = _norm(layer.post_attention_layernorm, x)
    gate, up = F.linear(h, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])).chunk(2, -1)
    return x + mlp.down_proj(F.silu(gate) * up)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def trained_parts(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """Everything behind the tower."""
    return [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
