"""Stages two to four: projector and decoder on a frozen tower, then everything together, then on whole images.

A scene comes with several questions, packed into one sequence. The loss is on the answer, on `</s>` after it, and at
first also on the answer at the question's last words already, which makes the look-up easier to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from tokprune.export.demo import decoder
from tokprune.export.demo.batches import PatchBatch, patch_batch, training_scene
from tokprune.export.demo.decoder import TAIL, Packer, question_logits
from tokprune.export.demo.model import build_tokenizer
from tokprune.export.demo.scenes import FORMS, GRID, Question, Scene, ask, held_out_questions
from tokprune.export.demo.tower import PatchHeads, encode
from tokprune.export.demo.tower_stage import WEIGHTS, dense_losses

PLAN = ("digit", "digit", "digit", "color", "color", "color", "count", "highest", "leftmost", "yes", "no")
STOP = 0.1  # weight of `</s>` after the answer


@lru_cache(maxsize=1)
def packer() -> Packer:
    """The demo tokenizer's packer."""
    return Packer(build_tokenizer())


def questions_for(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(prompt, answer) per entry of `PLAN`; a single digit is asked for its color instead of its place."""
    asked = []
    for form in PLAN:
        if form in ("highest", "leftmost") and len(scene.digits) == 1:
            form = "color"
        question = ask(scene, "exists" if form in ("yes", "no") else form, rng, present=form == "yes")
        asked.append((question.prompt, question.answer))
    return asked


Drawn = list[tuple[PatchBatch, list[list[tuple[str, str]]]]]


@dataclass(frozen=True)
class DecoderWork:
    """How one of the stages draws and learns; `groups` as in `tower_stage.GROUPS`."""

    groups: tuple[tuple[dict[int, int], int, float], ...]
    early: float  # weight of the answer at the words before the last
    tower: bool  # train the tower too, on its own labels beside the answers
    fresh: bool = False  # initialise the decoder
    dense: float = 0.2  # weight of the tower's own losses

    def draw(self, seed: int, step: int) -> Drawn:
        """One step's scenes with their questions, a batch per group."""
        rng = np.random.default_rng([seed, step])
        drawn = []
        for counts, tokens, _ in self.groups:
            scenes = [training_scene(rng, n) for n, share in counts.items() for _ in range(share)]
            drawn.append((patch_batch(scenes, tokens, rng), [questions_for(s, rng) for s in scenes]))
        return drawn

    def prepare(self, model: LlavaForConditionalGeneration, heads: PatchHeads, seed: int) -> None:
        """Choose what trains."""
        torch.manual_seed(seed)
        if self.fresh:
            decoder.initialise(model)
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(self.tower)
        heads.requires_grad_(self.tower)

    def backward(self, model: LlavaForConditionalGeneration, heads: PatchHeads, drawn: Drawn) -> dict[str, float]:
        """Gradients of the weighted losses; returns the losses and the share of right answers."""
        totals: dict[str, float] = {}
        for (batch, questions), (_, _, share) in zip(drawn, self.groups, strict=True):
            cells = torch.from_numpy(batch.cells)
            with torch.set_grad_enabled(self.tower):
                features = encode(model.model.vision_tower, batch.patches(), cells)
            packed = packer().pack(questions)
            logits = question_logits(model, packer(), features[0], cells, packed)  # [B, Q, TAIL + 1, V]
            target = packed.targets[..., None].expand(-1, -1, TAIL).flatten()
            each = F.cross_entropy(logits[:, :, :TAIL].flatten(0, 2), target, reduction="none").view(-1, TAIL).mean(0)
            ends = torch.full_like(packed.targets, packer().eos).flatten()
            stop = F.cross_entropy(logits[:, :, TAIL].flatten(0, 1), ends)
            losses = {"answer": each[-1], "early": each[:-1].mean(), "stop": stop}
            loss = losses["answer"] + self.early * losses["early"] + STOP * stop
            if self.tower:
                dense = dense_losses(heads, features, batch)
                losses["dense"] = torch.stack([WEIGHTS[k] * v for k, v in dense.items()]).sum()
                loss = loss + self.dense * losses["dense"]
            (share * loss).backward()
            right = (logits[:, :, TAIL - 1].argmax(-1) == packed.targets).float().mean(0).tolist()
            by_form = {f: np.mean([r for r, p in zip(right, PLAN, strict=True) if p == f]) for f in dict.fromkeys(PLAN)}
            for name, value in ({k: v.detach() for k, v in losses.items()} | by_form).items():
                totals[name] = totals.get(name, 0.0) + share * float(value)
        return totals

    @torch.no_grad()
    def measure(self, model: LlavaForConditionalGeneration, heads: PatchHeads, count: int = 180) -> dict[str, float]:
        """Held-out accuracy per form on whole images (a seed of its own, not that of the final score)."""
        rng = np.random.default_rng(0)
        right: dict[str, list[bool]] = {form: [] for form in FORMS}
        by_scene: dict[int, tuple[Scene, list[Question]]] = {}
        for number, scene, question in held_out_questions(count, seed=555):
            by_scene.setdefault(number, (scene, []))[1].append(question)
        for scene, asked in by_scene.values():
            batch = patch_batch([scene], GRID * GRID, rng)
            cells = torch.from_numpy(batch.cells)
            features = encode(model.model.vision_tower, batch.patches(), cells)[0]
            packed = packer().pack([[(q.prompt, q.answer) for q in asked]])
            guess = question_logits(model, packer(), features, cells, packed)[0, :, TAIL - 1].argmax(-1)
            for question, hit in zip(asked, (guess == packed.targets[0]).tolist(), strict=True):
                right[question.form].append(hit)
        scores = {form: float(np.mean(hits)) for form, hits in right.items()}
        return scores | {"all": float(np.mean([h for hits in right.values() for h in hits]))}
