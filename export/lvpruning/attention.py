"""Causal attention whose columns carry a decision, with the gradient that the decision needs.

DynamicViT (arXiv 2106.02034) masks a softmax by decisions d_j in {0, 1}: a_ij = e^{s_ij} d_j / Σ_m e^{s_im} d_m,
where row i always sees itself. This is the softmax of s_ij + log d_j, and for a loss ℓ

    ∂ℓ/∂d_j = (1 / d_j) Σ_{i≠j} a_ij (∂ℓ/∂a_ij − Σ_m a_im ∂ℓ/∂a_im),

which does not depend on d_j, as a_ij is proportional to it. So log(d_j + EPS) with straight-through decisions gives
a dropped row the gradient of letting it in again; EPS only has to stay within FP32. Knows nothing of modules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv

ATTENTION = "tokprune-decisions"
EPS = 1e-12  # a dropped row weighs e^-27.6 of what it would
_BLOCK = 128  # rows: what is above the diagonal is computed only within a block


def log_keep(decisions: Tensor) -> Tensor:
    """log(d + EPS), 0 for what is kept, in FP32."""
    return torch.log(decisions.float() + EPS)


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, S, d]
    key: Tensor,  # [B, H_kv, S, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    columns: Tensor | None = None,  # [B, S] float32, added to each key's scores
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention, registered with transformers under the name ``ATTENTION``; padding is on the right.

    transformers' own sdpa with a mask that needs a gradient takes 3 times as long (600 rows, two cores).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if columns is None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        mixed = _Decided.apply(query * scaling, key, value, columns)
    return mixed.transpose(1, 2).contiguous(), None  # [B, S, H, d]


AttentionInterface.register(ATTENTION, attention)


class _Decided(torch.autograd.Function):
    """softmax(Q Kᵀ + columns) V, with the softmax and its gradient in FP32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty_like(query)
        weights = []
        for first, stop in _blocks(query.shape[2]):
            scores = torch.matmul(query[:, :, first:stop], key[:, :, :stop].transpose(2, 3)).float()  # [B, H, R, C]
            bias = columns[:, None, None, :stop].repeat(1, 1, stop - first, 1)  # [B, 1, R, C]
            bias[..., first:].diagonal(dim1=2, dim2=3).zero_()
            bias[..., first:].masked_fill_(_later(stop - first, columns.device), -torch.inf)
            block = scores.add_(bias).softmax(dim=-1)
            out[:, :, first:stop] = torch.matmul(block.to(value.dtype), value[:, :, :stop])
            weights.append(block)
        ctx.save_for_backward(query, key, value, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *weights = ctx.saved_tensors
        inner = any(ctx.needs_input_grad[:3])  # in the first layer of a stage, the columns alone need a gradient
        by_query, by_key, by_value = (torch.zeros_like(x) for x in (query, key, value))
        by_column = torch.zeros(query.shape[0], query.shape[2], device=query.device)
        mean = (grad.float() * out.float()).sum(-1, keepdim=True)  # [B, H, S, 1], Σ_m a_im ∂ℓ/∂a_im
        for (first, stop), block in zip(_blocks(query.shape[2]), weights, strict=True):
            given = grad[:, :, first:stop]
            slope = torch.matmul(given, value[:, :, :stop].transpose(2, 3)).float()  # [B, H, R, C]
            slope.sub_(mean[:, :, first:stop]).mul_(block)
            diagonal = slope[..., first:].diagonal(dim1=2, dim2=3)  # carries no decision
            own = diagonal.clone()
            diagonal.zero_()  # before the sum: next to it, what a dropped row gets would be lost in rounding
            by_column[:, :stop] += slope.sum((1, 2))
            diagonal.copy_(own)
            if inner:
                slope = slope.to(query.dtype)
                by_query[:, :, first:stop] = torch.matmul(slope, key[:, :, :stop])
                by_key[:, :, :stop] += torch.matmul(slope.transpose(2, 3), query[:, :, first:stop])
                by_value[:, :, :stop] += torch.matmul(block.to(value.dtype).transpose(2, 3), given)
        return (by_query, by_key, by_value, by_column) if inner else (None, None, None, by_column)


def _blocks(rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + _BLOCK, rows)) for first in range(0, rows, _BLOCK)]


def _later(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)
