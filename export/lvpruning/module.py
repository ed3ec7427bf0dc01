"""LVPruning's module: cross-attention from visual rows to text rows, then two logits a visual row.

Knows tensors only: no model, no stage, no file. Whatever the base model's dtype, everything here is FP32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokprune.plugins.cross_attention_topk.reference import EPS
from tokprune.runtime.plan import Module

KEEP, DROP = 0, 1  # places of the two logits
_KEEP_AT_FIRST = 2.0  # bias between them: training starts with about 88 % kept, where the base model still answers


class RMSNorm(nn.Module):
    """x [..., D] → x / √(mean x² + EPS) · weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


class SelectorModule(nn.Module):
    """Scores the visual rows of one stage; the score at inference is the log-odds keep − drop."""

    def __init__(self, hidden: int, sizes: Module) -> None:
        super().__init__()
        width = sizes.width
        self._heads = sizes.heads
        self.visual_norm, self.text_norm = RMSNorm(hidden), RMSNorm(hidden)
        self.visual_proj = nn.Linear(hidden, width, bias=False)
        self.text_proj = nn.Linear(hidden, width, bias=False)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width)
        self.up_proj = nn.Linear(width, sizes.intermediate)
        self.down_proj = nn.Linear(sizes.intermediate, width)
        self.head_norm = RMSNorm(width)
        self.head = nn.Linear(width, 2)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights: variance 1 / inputs, so that normed rows stay normed; the head leans to keep."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
            self.head.weight.mul_(0.1)  # the rows differ little at first
            self.head.bias[KEEP], self.head.bias[DROP] = _KEEP_AT_FIRST / 2, -_KEEP_AT_FIRST / 2

    def forward(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """visual [B, N, D], text [B, M, D], text_valid [B, M] bool (one at least in a row) → [B, N, 2] float32."""
        v = self.visual_proj(self.visual_norm(visual.float()))  # [B, N, W]
        t = self.text_proj(self.text_norm(text.float()))  # [B, M, W]
        q, k, w = (self._split(x) for x in (self.q_proj(v), self.k_proj(t), self.v_proj(t)))  # [B, heads, ·, W / heads]
        mixed = F.scaled_dot_product_attention(q, k, w, attn_mask=text_valid[:, None, None, :])
        v = v + self.o_proj(mixed.transpose(1, 2).flatten(2))
        v = v + self.down_proj(F.silu(self.up_proj(self.mlp_norm(v))))
        return self.head(self.head_norm(v))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self._heads, -1)).transpose(1, 2)
