"""From a question to token ids and from token ids back to text, as transformers' LLaVA processor does it.

Knows the `tokenizers` library and the prompt format; knows no model. A question is text and nothing else:
what would become a control token, `<image>` above all, is refused, so that there are never more or fewer
image slots than images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import PromptFormat


class Tokenizer:
    """A `tokenizer.json`: byte-level BPE, or Llama's BPE with byte fallback.

    ``special_tokens`` are the texts that become control tokens. Raises UserError if the file cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): export the bundle again") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text: export the bundle again") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"{path} is no tokenizer ({error}): export the bundle again") from None
        # The file may carry what its last user set; a prompt is never cut or filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = frozenset(token.content for token in added if token.special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text that begins a sequence, control tokens such as BOS put before it.

        With ``special`` false the text goes on behind other text: nothing is put before it, neither BOS nor
        the space that Llama's tokenizer gives to the first word of a sequence. Raises UserError if the text
        is no valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the prompt is no valid Unicode: give it as UTF-8") from None
        if special:
            return self._tokenizer.encode(text).ids
        # Behind an anchor that does not merge with the text, the text's ids are what they are in a sequence.
        for anchor in ("a", "\n"):
            before = self._tokenizer.encode(anchor, add_special_tokens=False).ids
            ids = self._tokenizer.encode(anchor + text, add_special_tokens=False).ids
            if ids[: len(before)] == before:
                return ids[len(before) :]
        raise ValueError(f"{text[:20]!r} merges with whatever is before it: begin it with a space")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TokenStream:
        """A decoder for ids that come one by one."""
        return TokenStream(self)


class TokenStream:
    """Decodes ids one by one; all pieces joined are `decode` of all ids, as far as they are valid UTF-8.

    `tokenizers.decoders.DecodeStream` is not used: where a model writes a broken UTF-8 sequence behind a
    valid one through byte fallback, it raises "Invalid prefix encountered" (tokenizers 0.23).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # first context, what was given out last; then what came since
        self._context = 0  # how many of them are context: without it, leading spaces would be lost
        self._given = 0  # characters of the decoded ``_ids`` that were given out

    def push(self, token_id: int) -> str:
        """Take one id and return the text that it completes, often none."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        whole = len(text.rstrip("\ufffd"))  # behind it may be a character that has only begun
        piece = text[self._given : whole]
        self._given += len(piece)
        if piece and whole == len(text):
            del self._ids[: self._context]
            self._context = len(self._ids)
            self._given = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._given += len(piece)
        return piece


def prompt_text(form: PromptFormat, question: str, images: int, reserved: Collection[str] = ()) -> str:
    """Text of the first turn: for LLaVA-1.5 and an image "USER: <image>\\n{question} ASSISTANT:".

    The question may hold neither the image token nor one of ``reserved`` (give `Tokenizer.special_tokens`):
    a user cannot smuggle in image slots or an end of sequence. Such a question and an empty one are
    UserErrors. Role words such as "USER:" are plain text to LLaVA-1.5 and pass.
    """
    if not question.strip():
        raise UserError("the prompt is empty: ask something")
    for token in sorted({form.image.strip(), *reserved}):
        if token and token in question:
            raise UserError(f"the prompt contains '{token}', a control token of the model: take it out")
    return form.user.format(text=form.image * images + question) + form.assistant


def next_turn_text(form: PromptFormat, question: str, images: int = 0, reserved: Collection[str] = ()) -> str:
    """Text of a later turn, to be encoded with ``special=False`` behind an answer without its EOS.

    LLaVA-1.5's template ends an answer with a space and no EOS. Errors as in `prompt_text`.
    """
    return " " + prompt_text(form, question, images, reserved)


def expand_image_tokens(ids: Sequence[int], image_token_id: int, counts: Sequence[int]) -> list[int]:
    """Repeat the i-th image token of ``ids`` ``counts[i]`` times, as the LLaVA processor does.

    Raises UserError unless there are as many image tokens as counts, that is images.
    """
    slots = sum(token == image_token_id for token in ids)
    if slots != len(counts):
        raise UserError(f"the prompt has {slots} image slots for {len(counts)} images: make them equal")
    left = iter(counts)
    expanded: list[int] = []
    for token in ids:
        expanded += [token] * (next(left) if token == image_token_id else 1)
    return expanded


def visual_rows(ids: Sequence[int] | np.ndarray, image_token_id: int, tokens: int) -> np.ndarray:
    """Rows [I, N] int64 of the expanded ``ids`` that hold image tokens, N = ``tokens`` for each image."""
    rows = np.flatnonzero(np.asarray(ids) == image_token_id).astype(np.int64)
    if rows.size % tokens:
        raise ValueError(f"{rows.size} image tokens are no multiple of {tokens}: expand them first")
    return rows.reshape(-1, tokens)
