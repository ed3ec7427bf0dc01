"""From examples to the tensors of a micro-batch. Knows tokens and rows; knows no weights.

Sequences are padded on the right, so that causal attention keeps padding out of sight by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokprune.export.checkpoint import Checkpoint
from tokprune.export.lvpruning.data import Example
from tokprune.runtime import names
from tokprune.runtime.errors import UserError
from tokprune.runtime.prompt import Tokenizer, expand_image_tokens, prompt_text, visual_rows


@dataclass(frozen=True)
class TokenSequence:
    """One example in tokens: ``ids`` are ``prompt`` ones, image tokens expanded, then answer and end of sequence."""

    ids: list[int]
    prompt: int
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Batch:
    """B sequences of up to S rows with I images in all; flat rows count through [B · S]."""

    ids: Tensor  # [B, S] int64
    images: tuple[Path, ...]  # I
    owner: Tensor  # [I] int64, the sequence of each image
    visual: Tensor  # [I, N] int64, flat rows of each image
    text: Tensor  # [B, M] int64, flat rows of the prompt's text, padded with the sequence's first row
    text_valid: Tensor  # [B, M] bool
    predicting: Tensor  # [T] int64, flat rows whose logits are to give ``targets``
    targets: Tensor  # [T] int64, answers' tokens and ends of sequence

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**tensors, images=self.images)


class Encoder:
    """Turns examples into sequences, as LLaVA-1.5 was trained: "USER: <image>\\n… ASSISTANT: answer</s>"."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._facts, self._form = checkpoint.facts, checkpoint.prompt
        self._tokenizer = Tokenizer(checkpoint.path / names.TOKENIZER_FILE)
        if not self._facts.eos_token_ids:
            raise UserError(f"{checkpoint.path} names no end-of-sequence token: add eos_token_id to its config.json")

    def __call__(self, example: Example) -> TokenSequence:
        """Encode one example; an answer that passes the model's context is cut there.

        Raises UserError naming the example if its question holds control tokens or leaves no room for an answer.
        """
        try:
            text = prompt_text(self._form, example.prompt, len(example.images), reserved=self._tokenizer.special_tokens)
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from None
        counts = [self._facts.vision.tokens] * len(example.images)
        prompt = expand_image_tokens(self._tokenizer.encode(text), self._facts.image_token_id, counts)
        answer = self._tokenizer.encode(" " + example.answer, special=False)
        if self._facts.image_token_id in answer:
            raise UserError(f"{example.where} has the image token in its answer: take it out")
        if len(prompt) >= self._facts.context:
            raise UserError(
                f"{example.where} makes a prompt of {len(prompt)} tokens, the model's context has "
                f"{self._facts.context}: shorten the question, or leave it out"
            )
        ids = [*prompt, *answer, self._facts.eos_token_ids[0]]
        return TokenSequence(ids[: self._facts.context], len(prompt), example.images)


def collate(sequences: Sequence[TokenSequence], image_token_id: int, visual_tokens: int) -> Batch:
    """Make one micro-batch; every sequence has an image, and text and an answer around it."""
    size = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), size, dtype=torch.int64)
    owner, visual, text, predicting, targets = [], [], [], [], []
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence.ids)] = torch.tensor(sequence.ids)
        prompt = sequence.ids[: sequence.prompt]
        rows = visual_rows(prompt, image_token_id, visual_tokens)  # [images, N]
        owner += [index] * len(rows)
        visual.append(rows + index * size)
        text.append(np.flatnonzero(np.array(prompt) != image_token_id) + index * size)
        predicting.append(np.arange(sequence.prompt - 1, len(sequence.ids) - 1) + index * size)
        targets += sequence.ids[sequence.prompt :]
    longest = max(len(rows) for rows in text)
    padded = [np.pad(rows, (0, longest - len(rows)), constant_values=rows[0]) for rows in text]
    return Batch(
        ids=ids,
        images=tuple(image for sequence in sequences for image in sequence.images),
        owner=torch.tensor(owner),
        visual=torch.from_numpy(np.concatenate(visual)),
        text=torch.from_numpy(np.stack(padded)),
        text_valid=torch.tensor([[at < len(rows) for at in range(longest)] for rows in text]),
        predicting=torch.from_numpy(np.concatenate(predicting)),
        targets=torch.tensor(targets),
    )
