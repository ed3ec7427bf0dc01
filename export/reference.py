"""PyTorch, pruned in the same way: transformers' own model with rows dropped before a layer, in float64.

The model's forward stays transformers'; hooks before its decoder layers drop the rows that the selectors'
float64 references choose. With a plan without stages there is no hook: it is the untouched original.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from tokprune.export.lvpruning.modules import Modules
from tokprune.plugins import grid
from tokprune.plugins.cross_attention_topk import reference as cross_attention
from tokprune.plugins.last_row import last_row_topk
from tokprune.plugins.leverage_topk import reference as leverage
from tokprune.runtime.layout import Layout
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.plan import Plan
from tokprune.runtime.prompt import visual_rows


@dataclass(frozen=True)
class Seen:
    """What the selectors of one stage may look at, for one image, in float64."""

    visual: np.ndarray  # [n, D], rows that enter the stage's layer
    text: np.ndarray  # [M, D], the sequence's other rows, wherever they stand
    attention: np.ndarray | None = None  # [n], the last row's in the layer before; fastv only


@dataclass
class Selection:
    """What the reference chose in one stage for one image. ``indices`` [k] count the image's original patches."""

    layer: int
    indices: np.ndarray
    scores: np.ndarray  # [N] float64 by original patch, NaN where a stage before has dropped it


@dataclass
class Run:
    """One sequence in the making: transformers' cache, and what prefill left behind."""

    cache: DynamicCache = field(default_factory=DynamicCache)
    position: int = 0
    alive: list[np.ndarray] = field(default_factory=list)  # original patches that are left, by image
    selections: list[Selection] = field(default_factory=list)
    hidden: dict[int, np.ndarray] = field(default_factory=dict)  # [R, D] float32 by decoder layer it enters


class Reference:
    """A LLaVA-1.5 in PyTorch under a plan; use it as a context manager, the hooks end with it."""

    def __init__(
        self, model: LlavaForConditionalGeneration, facts: ModelFacts, plan: Plan, modules: Modules | None = None
    ) -> None:
        """``model`` must run with sdpa attention: one sequence then needs no mask that would have to be cut.

        ``modules`` are those of an lvpruning plan.
        """
        if model.config.text_config._attn_implementation != "sdpa":
            raise ValueError(f"the reference needs sdpa attention, not {model.config.text_config._attn_implementation}")
        self._model, self._facts, self._plan, self._modules = model, facts, plan, modules
        self._stages = {stage.layer: index for index, stage in enumerate(plan.stages)}
        self._layout: Layout | None = None  # of the prefill under way
        self._rows: Tensor | None = None  # rows of the call that are still there
        self._attention: np.ndarray | None = None  # [R], the last row's in the layer before a stage; fastv only
        self._record: Run | None = None
        self._keep_hidden = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Reference:
        for number, layer in enumerate(self._model.model.language_model.layers):
            before = functools.partial(self._before, number)
            self._hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.inference_mode()
    def prefill(
        self, ids: Sequence[int], pixel_values: Tensor | None, *, keep_hidden: bool = False
    ) -> tuple[Run, np.ndarray]:
        """Run the prompt: (sequence, logits [V] float32 of its last row).

        ``ids`` hold N image tokens an image of ``pixel_values`` [I, 3, H, W]. With ``keep_hidden`` the
        sequence keeps the rows that enter each decoder layer, those dropped before it not among them.
        """
        sequence = Run()
        tokens = self._facts.vision.tokens
        visual = visual_rows([] if pixel_values is None else ids, self._facts.image_token_id, tokens)
        sequence.alive = [np.arange(tokens) for _ in visual]
        self._record, self._layout, self._rows = sequence, Layout.of(len(ids), visual), None
        self._keep_hidden = keep_hidden
        logits = self._forward(sequence, ids, pixel_values)
        self._record = self._layout = self._rows = self._attention = None
        return sequence, logits

    @torch.inference_mode()
    def step(self, sequence: Run, token: int) -> np.ndarray:
        """Append one token: logits [V] float32."""
        return self._forward(sequence, [token], None)

    def _forward(self, sequence: Run, ids: Sequence[int], pixel_values: Tensor | None) -> np.ndarray:
        tensor = torch.tensor([list(ids)])
        out = self._model(
            input_ids=tensor,
            pixel_values=pixel_values,
            position_ids=torch.arange(sequence.position, sequence.position + len(ids))[None],
            past_key_values=sequence.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        sequence.position += len(ids)
        return out.logits[0, -1].float().numpy()

    def _before(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Drop rows before layer ``number``; behind a stage, cut what the outer loop still passes whole."""
        if self._record is None or self._layout is None:  # a decode step
            return None
        hidden, *rest = args  # [1, R, D]
        if number in self._stages and len(self._layout.visual):
            source, self._layout = self._select(self._stages[number], hidden[0])
            hidden = hidden[:, source]
            self._rows = source if self._rows is None else self._rows[source]
        if self._keep_hidden:
            self._record.hidden[number] = hidden[0].float().numpy()
        cos, sin = kwargs["position_embeddings"]  # [1, S, d] each
        if self._rows is not None:
            cos, sin = cos[:, self._rows], sin[:, self._rows]
        if self._plan.method == "fastv" and number + 1 in self._stages:
            assert isinstance(layer, LlamaDecoderLayer)
            self._attention = last_row_attention(layer, hidden[0], cos, sin)
        if self._rows is None:
            return None
        if kwargs.get("attention_mask") is not None:
            raise ValueError("transformers made an attention mask for a single sequence: it cannot be cut here")
        cut = {"position_embeddings": (cos, sin)}
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = kwargs["position_ids"][:, self._rows]
        return (hidden, *rest), {**kwargs, **cut}

    def _select(self, index: int, hidden: Tensor) -> tuple[Tensor, Layout]:
        """Rows [R] of ``hidden`` [S, D] that go on, and their layout."""
        assert self._layout is not None  # both are set for the time of a prefill
        assert self._record is not None
        stage = self._plan.stages[index]
        image_grid = self._facts.vision.grid if index == 0 else None
        states = hidden.double().numpy()
        chosen = []
        alive = self._record.alive
        for image, rows in enumerate(self._layout.visual):
            attention = None if self._attention is None else self._attention[rows]
            seen = Seen(states[rows], states[self._layout.text], attention)
            kept, scores = choose(self._plan, index, seen, image_grid, self._modules)
            by_patch = np.full(self._facts.vision.tokens, np.nan)
            by_patch[alive[image]] = scores
            alive[image] = alive[image][kept]
            self._record.selections.append(Selection(stage.layer, alive[image], by_patch))
            chosen.append(rows[kept])
        template, after = self._layout.prune(stage.keep)
        source = np.concatenate([np.arange(self._layout.count), *chosen])
        return torch.from_numpy(source[template]), after


@torch.inference_mode()
def last_row_attention(layer: LlamaDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> np.ndarray:
    """What the last of ``hidden`` [R, D], which enter ``layer``, attends to: [R] float64, a mean over heads.

    FastV's row (arXiv 2403.06764), written out: softmax(q Kᵀ / √d), with ``cos`` and ``sin`` [1, R, d] of the rows'
    positions. The last row sees all rows, so no mask is needed.
    """
    norm, attention, rows = layer.input_layernorm, layer.self_attn, len(hidden)
    x = hidden.double()
    # LlamaRMSNorm itself computes in FP32, whatever its weights are
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.double()
    query, key = (
        copy.deepcopy(linear).double()(x).view(1, rows, -1, attention.head_dim).transpose(1, 2)  # [1, H, R, d]
        for linear in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos.double(), sin.double())
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    weights = (query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling).softmax(dim=-1)  # [1, H, 1, R]
    return weights.mean(dim=1)[0, 0].numpy()


def choose(
    plan: Plan, index: int, seen: Seen, image_grid: tuple[int, int] | None, modules: Modules | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The float64 reference of stage ``index``'s selector: (kept indices [k], scores [n]) for what it has ``seen``.

    ``image_grid`` is that of the n visual rows, if they still are a whole one.
    """
    keep, n = plan.stages[index].keep, len(seen.visual)
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        return leverage.leverage_topk(seen.visual, keep, rank=plan.rank.components, energy=plan.rank.energy)
    if plan.method == "lvpruning":
        assert modules is not None  # the caller's to give
        weights = modules.of_stage(index)
        return cross_attention.module_topk(seen.visual, seen.text, keep, weights, modules.module.heads)
    if plan.method == "fastv":
        assert seen.attention is not None  # the caller's to give
        return last_row_topk(seen.attention, np.arange(n), keep)
    if plan.method == "uniform":
        kept = grid.uniform_indices(image_grid, n, keep)
        return kept, np.isin(np.arange(n), kept).astype(np.float64)
    kept, scores = grid.random_indices(n, keep, plan.seed + index)
    return kept, scores.astype(np.float64)
