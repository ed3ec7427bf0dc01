"""PyTorch, pruned in the same way: transformers' own model with rows dropped before a layer, in float64.

The model's forward stays transformers'; hooks before its decoder layers drop the rows that the selectors'
float64 references choose. With a plan without stages there is no hook: it is the untouched original.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from tokprune.plugins import grid
from tokprune.plugins.leverage_topk import reference as leverage
from tokprune.runtime.layout import Layout
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.plan import Plan
from tokprune.runtime.prompt import visual_rows


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

    def __init__(self, model: LlavaForConditionalGeneration, facts: ModelFacts, plan: Plan) -> None:
        """``model`` must run with sdpa attention: one sequence then needs no mask that would have to be cut."""
        if model.config.text_config._attn_implementation != "sdpa":
            raise ValueError(f"the reference needs sdpa attention, not {model.config.text_config._attn_implementation}")
        self._model, self._facts, self._plan = model, facts, plan
        self._stages = {stage.layer: index for index, stage in enumerate(plan.stages)}
        self._layout: Layout | None = None  # of the prefill under way
        self._rows: Tensor | None = None  # rows of the call that are still there
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
        self._record = self._layout = self._rows = None
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
        self, number: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        if self._rows is None:
            return None
        if kwargs.get("attention_mask") is not None:
            raise ValueError("transformers made an attention mask for a single sequence: it cannot be cut here")
        cos, sin = kwargs["position_embeddings"]
        cut = {"position_embeddings": (cos[:, self._rows], sin[:, self._rows])}
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = kwargs["position_ids"][:, self._rows]
        return (hidden, *rest), {**kwargs, **cut}

    def _select(self, index: int, hidden: Tensor) -> tuple[Tensor, Layout]:
        """Rows [R] of ``hidden`` [S, D] that go on, and their layout."""
        assert self._layout is not None  # both are set for the time of a prefill
        assert self._record is not None
        stage = self._plan.stages[index]
        image_grid = self._facts.vision.grid if index == 0 else None
        chosen = []
        alive = self._record.alive
        for image, rows in enumerate(self._layout.visual):
            x = hidden[torch.from_numpy(rows)].double().numpy()  # [n, D]
            kept, scores = choose(self._plan, index, x, image_grid)
            by_patch = np.full(self._facts.vision.tokens, np.nan)
            by_patch[alive[image]] = scores
            alive[image] = alive[image][kept]
            self._record.selections.append(Selection(stage.layer, alive[image], by_patch))
            chosen.append(rows[kept])
        template, after = self._layout.prune(stage.keep)
        source = np.concatenate([np.arange(self._layout.count), *chosen])
        return torch.from_numpy(source[template]), after


def choose(plan: Plan, index: int, x: np.ndarray, image_grid: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The float64 reference of stage ``index``'s selector: (kept indices [k], scores [n]) for rows ``x`` [n, D]."""
    keep = plan.stages[index].keep
    if plan.method == "lofi":
        assert plan.rank is not None  # make_plan saw to it
        return leverage.leverage_topk(x, keep, rank=plan.rank.components, energy=plan.rank.energy)
    if plan.method == "uniform":
        kept = grid.uniform_indices(image_grid, len(x), keep)
        return kept, np.isin(np.arange(len(x)), kept).astype(np.float64)
    kept, scores = grid.random_indices(len(x), keep, plan.seed + index)
    return kept, scores.astype(np.float64)
