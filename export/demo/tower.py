"""The vision tower: a convolution-like start, and its forward pass on a subset of patches.

A ViT learns locality only from much data. Here the first layers' heads start out attending to one neighbour each (the
3x3 neighbourhood), through a sinusoidal position code on which a shift is a rotation; attention then is a 3x3
convolution that training may leave behind. The modules are transformers' own. Knows nothing about text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionModel

from tokprune.export.demo.scenes import GRID, INKS, MAX_DIGITS

CODE = 16  # dimensions of the residual stream that start as position code
CODE_SIZE = 3.0  # its amplitude beside the patch content, whose own scale is CONTENT_SIZE
CONTENT_SIZE = 1.5
WAVELENGTHS = (32.0, 16.0, 8.0, 4.0)  # patches
SHARPNESS = 3.0  # logits a head starts with: this times the cosine agreement of two position codes
DILATIONS = (1, 1, 2, 1)  # of the convolution-like layers; later layers start as usual
MASK_LAYER = 2  # layers after which a patch is asked for its ink's mask
FRAME_LAYER = 4  # layers after which it is asked where in its digit it lies

LABELS = {"digit": 11, "ink": len(INKS) + 1, "highest": 2, "leftmost": 2, "count": MAX_DIGITS}


def position_code() -> torch.Tensor:
    """Sines and cosines of a patch's row and column, [576, 16]: per wavelength (sin y, cos y), then the same for x."""
    index = torch.arange(GRID, dtype=torch.float32)
    waves = [f(2 * math.pi * index / w) for w in WAVELENGTHS for f in (torch.sin, torch.cos)]
    axis = torch.stack(waves, 1)  # [24, 8]
    rows = axis[:, None].expand(GRID, GRID, 8)
    columns = axis[None, :].expand(GRID, GRID, 8)
    return torch.cat([rows, columns], 2).reshape(GRID * GRID, CODE)


def shift_rotation(down: int, right: int) -> torch.Tensor:
    """[16, 16] matrix that turns a patch's code into that of the patch `down`, `right` of it."""
    turn = torch.zeros(CODE, CODE)
    for axis, step in enumerate((down, right)):
        for k, wave in enumerate(WAVELENGTHS):
            angle = 2 * math.pi * step / wave
            at = axis * 8 + 2 * k
            turn[at : at + 2, at : at + 2] = torch.tensor(
                [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
            )
    return turn


@torch.no_grad()
def initialise(tower: CLIPVisionModel, patches: torch.Tensor) -> None:
    """Start `tower` as a convolution-like network; `patches` [P, 588] are samples for the patch filters."""
    vision = vision_part(tower)
    width = vision.embeddings.embed_dim
    content = width - CODE
    centred = patches - patches.mean(0)
    value, vector = torch.linalg.eigh(centred.T @ centred / len(patches))
    value, vector = value.flip(0)[:content], vector.flip(1)[:, :content]
    mix = torch.linalg.qr(torch.randn(content, content)).Q
    filters = mix @ (vector / (value + 0.01 * value[0]).sqrt()).T * CONTENT_SIZE
    weight = vision.embeddings.patch_embedding.weight
    weight.zero_()
    weight[CODE:] = filters.reshape(content, *weight.shape[1:])
    table = vision.embeddings.position_embedding.weight
    table.normal_(std=0.02)
    table[1:, :CODE] += CODE_SIZE * position_code()
    for layer, dilation in zip(vision.encoder.layers, DILATIONS, strict=False):
        attention = layer.self_attn
        depth = width // attention.num_heads
        values = torch.linalg.qr(torch.randn(width, width)).Q
        attention.v_proj.weight.copy_(values)
        attention.v_proj.weight[:, :CODE] *= 0.1
        attention.out_proj.weight.copy_(torch.linalg.qr(torch.randn(width, width)).Q * 0.5)
        attention.out_proj.weight[:CODE] = 0  # leave the position code alone
        attention.q_proj.weight.normal_(std=0.01)
        attention.k_proj.weight.normal_(std=0.01)
        scale = math.sqrt(SHARPNESS * math.sqrt(depth)) / CODE_SIZE
        for head in range(attention.num_heads):
            rows = slice(head * depth, head * depth + CODE)
            down, right = dilation * (head // 3 - 1), dilation * (head % 3 - 1)
            attention.q_proj.weight[rows, :CODE] += scale * shift_rotation(down, right)
            attention.k_proj.weight[rows, :CODE] += scale * torch.eye(CODE)


def vision_part(tower: CLIPVisionModel) -> Any:
    """The module that holds `embeddings`, `pre_layrnorm` and `encoder` (a level deeper in older transformers)."""
    return getattr(tower, "vision_model", tower)


def encode(tower: CLIPVisionModel, patches: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Features of patches [B, T, 588] at cells [B, T], [B, T, D] each: those that LLaVA reads (`hidden_states[-2]`
    without CLS), and those after `MASK_LAYER` and `FRAME_LAYER` layers."""
    vision = vision_part(tower)
    embeddings = vision.embeddings
    weight = embeddings.patch_embedding.weight
    table = embeddings.position_embedding.weight
    x = patches @ weight.reshape(weight.shape[0], -1).T + table[cells + 1]
    first = (embeddings.class_embedding + table[0]).expand(len(x), 1, -1)
    x = vision.pre_layrnorm(torch.cat([first, x], 1))
    after = [x]
    for layer in vision.encoder.layers[:-1]:
        after.append(_block(layer, after[-1]))
    return tuple(h[:, 1:] for h in (after[-1], after[MASK_LAYER], after[FRAME_LAYER]))


def _block(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` [B, T, D] in fewer, larger operations: a fused QKV, and x·sigmoid(1.702x) as silu(1.702x)/1.702."""
    attention, mlp = layer.self_attn, layer.mlp
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    fused = F.linear(layer.layer_norm1(x), torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
    q, k, v = fused.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + attention.out_proj(mixed)
    inner = F.linear(layer.layer_norm2(x), mlp.fc1.weight * 1.702, mlp.fc1.bias * 1.702)
    return x + F.linear(F.silu(inner), mlp.fc2.weight / 1.702, mlp.fc2.bias)


class PatchHeads(nn.Module):
    """Linear read-outs of a patch's features, used in training only.

    `labels`: one per entry of `LABELS`; `shape`: its digit's 8x8 picture (64 logits); from earlier layers `mask`: its
    own ink (49 logits), and `frame`: its place in the digit (2 coordinates).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.labels = nn.ModuleDict({name: nn.Linear(width, n) for name, n in LABELS.items()})
        self.shape, self.mask, self.frame = nn.Linear(width, 64), nn.Linear(width, 49), nn.Linear(width, 2)
