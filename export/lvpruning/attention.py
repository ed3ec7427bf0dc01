"""Causal attention whose columns carry a decision, with the gradient that the decision needs.

DynamicViT (arXiv 2106.02034) masks a softmax by decisions d_j in {0, 1}: a_ij = e^{s_ij} d_j / Σ_m e^{s_im} d_m,
where row i always sees itself. This is the softmax of s_ij + log d_j, and for a loss ℓ

    ∂ℓ/∂d_j = (1 / d_j) Σ_{i≠j} a_ij (∂ℓ/∂a_ij − Σ_m a_im ∂ℓ/∂a_im),

which does not depend on d_j, as a_ij is proportional to it. So log(d_j + EPS) with straight-through decisions gives
a dropped row the gradient of letting it in again; EPS only has to stay within FP32.

What a dropped row computes reaches the loss by way of d_j = 0 only: no gradient runs through it. So the rows that stay
and those that are dropped go through a layer one after the other, the latter without a gradient: they see the rows
that stay and themselves, and are seen by the decisions' gradient alone. Knows nothing of modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv

ATTENTION = "tokprune-decisions"
EPS = 1e-12  # a dropped row would weigh e^-27.6 of what it weighs if kept
_BLOCK = 128  # rows: what is above the diagonal is computed only within a block


def log_keep(decisions: Tensor) -> Tensor:
    """log(d + EPS), 0 for what is kept, in FP32."""
    return torch.log(decisions.float() + EPS)


@dataclass
class Parted:
    """What one layer's R rows that stay and Q rows that are dropped have to know of each other.

    Positions ascend, with rows that only fill up behind all others; columns are `log_keep` of the decisions. The keys
    and values are left here by the two calls of `attention`, the rows that stay first.
    """

    positions: Tensor  # [B, R] int64
    columns: Tensor  # [B, R] float32, added to each key's scores
    dropped_positions: Tensor  # [B, Q] int64
    dropped_columns: Tensor  # [B, Q] float32
    kept: tuple[Tensor, Tensor] | None = None  # [B, H, R, d] each, without gradient
    dropped: tuple[Tensor, Tensor] | None = None  # [B, H, Q, d] each; None where no row is dropped


@dataclass
class Looked:
    """Which rows' attention is asked for; what they attend to most is left here by `attention`."""

    rows: Tensor  # [B, M] int64, of each sequence
    valid: Tensor  # [B, M] bool, False for rows that only fill up
    most: Tensor | None = None  # [B, S] float32: the largest share that any of the rows gives, in any head


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, S, d]
    key: Tensor,  # [B, H_kv, S, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    staying: Parted | None = None,
    dropped: Parted | None = None,
    looked: Looked | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention, registered with transformers under the name ``ATTENTION``; padding is on the right.

    Rows are all there are, or those ``staying``, or, in a second call, those ``dropped``. Of all rows, ``looked`` is
    told what its rows attend to.
    transformers' own sdpa with a mask that needs a gradient takes 3 times as long (600 rows, two cores).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if staying is not None:
        staying.kept = key.detach(), value.detach()
        mixed = _Staying.apply(query * scaling, key, value, staying.columns, staying.dropped_columns, staying)
    elif dropped is not None:
        dropped.dropped = key, value
        mixed = _dropped(query * scaling, dropped)
    else:
        if looked is not None:
            looked.most = _most(query * scaling, key, looked)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None  # [B, S, H, d]


AttentionInterface.register(ATTENTION, attention)


def _most(query: Tensor, key: Tensor, looked: Looked) -> Tensor:
    """The largest causal share of each column among the rows of ``looked`` and the heads: [B, S]."""
    heads, size = query.shape[1], query.shape[3]
    rows = query.gather(2, looked.rows[:, None, :, None].expand(-1, heads, -1, size))  # [B, H, M, d]
    scores = torch.matmul(rows, key.transpose(2, 3)).float()
    later = torch.arange(key.shape[2], device=key.device) > looked.rows[:, None, :, None]
    shares = scores.masked_fill(later, -torch.inf).softmax(-1) * looked.valid[:, None, :, None]
    return shares.amax((1, 2))


def _dropped(query: Tensor, rows: Parted) -> Tensor:
    """Each dropped row over the rows that stay before it, and itself: [B, H, Q, d]."""
    assert rows.kept is not None  # left there by the first call
    assert rows.dropped is not None
    (key, value), (own_key, own_value) = rows.kept, rows.dropped
    hidden = rows.positions[:, None, None, :] > rows.dropped_positions[:, None, :, None]  # [B, 1, Q, R]
    scores = torch.matmul(query, key.transpose(2, 3)).float() + rows.columns[:, None, None]
    own = (query.float() * own_key.float()).sum(-1, keepdim=True)  # [B, H, Q, 1]
    weights = torch.cat([scores.masked_fill(hidden, -torch.inf), own], -1).softmax(-1).to(value.dtype)
    return torch.matmul(weights[..., :-1], value) + weights[..., -1:] * own_value


class _Staying(torch.autograd.Function):
    """softmax(Q Kᵀ + columns) V over the rows that stay, with the softmax and its gradient in FP32."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, columns: Tensor, dropped_columns: Tensor, rows: Parted
    ) -> Tensor:
        out = torch.empty_like(query)
        blocks, sums = [], []
        for first, stop in _blocks(query.shape[2]):
            scores = torch.matmul(query[:, :, first:stop], key[:, :, :stop].transpose(2, 3)).float()  # [B, H, r, C]
            bias = columns[:, None, None, :stop].repeat(1, 1, stop - first, 1)  # [B, 1, r, C]
            bias[..., first:].diagonal(dim1=2, dim2=3).zero_()
            bias[..., first:].masked_fill_(_later(stop - first, columns.device), -torch.inf)
            scores.add_(bias)
            sums.append(scores.logsumexp(-1, keepdim=True))  # [B, H, r, 1]
            block = scores.sub_(sums[-1]).exp_()
            out[:, :, first:stop] = torch.matmul(block.to(value.dtype), value[:, :, :stop])
            blocks.append(block)
        ctx.rows = rows
        ctx.save_for_backward(query, key, value, dropped_columns, out, *blocks, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, dropped_columns, out, *saved = ctx.saved_tensors
        blocks, sums = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        inner = any(ctx.needs_input_grad[:3])  # in the first layer of a stage, the columns alone need a gradient
        by_query, by_key, by_value = (torch.zeros_like(x) for x in (query, key, value))
        by_column = torch.zeros(query.shape[0], query.shape[2], device=query.device)
        by_dropped = torch.zeros_like(dropped_columns)
        mean = (grad.float() * out.float()).sum(-1, keepdim=True)  # [B, H, R, 1], Σ_m a_im ∂ℓ/∂a_im
        for (first, stop), block, total in zip(_blocks(query.shape[2]), blocks, sums, strict=True):
            given = grad[:, :, first:stop]
            slope = torch.matmul(given, value[:, :, :stop].transpose(2, 3)).float()  # [B, H, r, C]
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
            if ctx.rows.dropped is not None:
                dropped_key, dropped_value = ctx.rows.dropped  # [B, H, Q, d]
                scores = torch.matmul(query[:, :, first:stop], dropped_key.transpose(2, 3)).float()  # [B, H, r, Q]
                before = ctx.rows.dropped_positions[:, None, None] < ctx.rows.positions[:, None, first:stop, None]
                weight = scores.add_(dropped_columns[:, None, None]).sub_(total).exp_().mul_(before)
                slope = torch.matmul(given, dropped_value.transpose(2, 3)).float().sub_(mean[:, :, first:stop])
                by_dropped += slope.mul_(weight).sum((1, 2))
        by_rows = (by_query, by_key, by_value) if inner else (None, None, None)
        return (*by_rows, by_column, by_dropped, None)


def _blocks(rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + _BLOCK, rows)) for first in range(0, rows, _BLOCK)]


def _later(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)
