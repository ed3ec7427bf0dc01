"""PyTorch, eager, FP32: transformers' own model, unpruned or with rows dropped by `tokprune.export.reference`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from contest.contestants import plan_of
from contest.task import Taken, Task, greedy
from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
from tokprune.export.reference import Reference, Run


def load(job: dict[str, Any]) -> Eager:
    torch.set_num_threads(job["task"]["threads"])
    return Eager(job["path"], job["options"])


def first_logits(job: dict[str, Any], task: Task) -> tuple[np.ndarray, list[int]]:
    """Of the reference, whatever it is compared with."""
    taken = load(job).answer(job["images"][0], task)
    return taken.logits, taken.tokens


class Eager:
    """The checkpoint in transformers, with hooks that time the vision part and, under a plan, drop rows."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        checkpoint = find_checkpoint(path)
        self._model, self._processor = load_model(checkpoint, dtype=torch.float32), load_processor(checkpoint)
        facts = checkpoint.facts
        plan = plan_of(options, facts.layers, facts.vision.tokens)
        self._reference = Reference(self._model, facts, plan).__enter__()  # as long as the process
        self._vision: list[float] = []
        inner = self._model.model
        inner.vision_tower.register_forward_pre_hook(lambda *_: self._vision.append(time.perf_counter()))
        inner.multi_modal_projector.register_forward_hook(lambda *_: self._vision.append(time.perf_counter()))
        decoder = [*inner.language_model.layers.parameters(), *self._model.lm_head.parameters()]
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.facts = {"decode_bytes": sum(p.numel() * p.element_size() for p in decoder)}

    def answer(self, image: str, task: Task) -> Taken:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
        self._vision.clear()
        begin = time.perf_counter()
        ids, pixels = self._inputs(picture, task)
        run, logits = self._reference.prefill(ids, pixels)
        first = int(logits.argmax())
        now = time.perf_counter()
        start, stop = self._vision
        tokens, decode = greedy(first, lambda token: self._step(run, token), task.new_tokens)
        return Taken(1e3 * (now - begin), 1e3 * (stop - start), 1e3 * (now - stop), decode, tokens, logits)

    def _inputs(self, picture: Image.Image, task: Task) -> tuple[list[int], Tensor]:
        batch = self._processor(text=task.prompt, images=picture, return_tensors="pt")
        return batch["input_ids"][0].tolist(), batch["pixel_values"]

    def _step(self, run: Run, token: int) -> int:
        return int(self._reference.step(run, token).argmax())
