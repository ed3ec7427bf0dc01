"""Training data: questions about images with their answers, from two file formats. Opens no image.

JSON lines as everywhere in tokprune (`tokprune.runtime.data`), with an answer in every line; or LLaVA's
conversations, one JSON list. A conversation's turns become examples of their own, each as if it were the first:
rows are selected when the image is read, by the question that comes with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.runtime.bundle import sha256
from tokprune.runtime.data import read_samples
from tokprune.runtime.errors import UserError

_MARKER = "<image>"
_SHAPE = '{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}'


@dataclass(frozen=True)
class Example:
    """A question about ``images``, at least one, with its answer; ``where`` names its origin in errors."""

    prompt: str
    answer: str
    images: tuple[Path, ...]
    where: str


@dataclass(frozen=True)
class Data:
    """What a data file holds: examples, how many entries had no image, and the file's SHA-256."""

    examples: list[Example]
    without_image: int
    sha256: str


def read_examples(path: Path, images: Path | None = None) -> Data:
    """Read a data file of either format; a file that begins with ``[`` holds conversations.

    ``images`` is the directory that conversations' images are relative to, else the file's own.
    Raises UserError naming the line or entry at fault: not readable, no answer, an image that is not there.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(4096).lstrip()[:1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the data file {path} cannot be read ({error}): give JSON lines or conversations") from None
    if start == "[":
        examples, without = _conversations(path, images or path.parent)
    elif images is not None:
        raise UserError(f"--images was given, but {path} holds JSON lines, whose images are relative to it: drop it")
    else:
        examples, without = _lines(path)
    if not examples:
        raise UserError(f"the data file {path} has no question about an image: there is nothing to learn from it")
    return Data(examples, without, sha256(path))


def _lines(path: Path) -> tuple[list[Example], int]:
    examples, without = [], 0
    for number, sample in enumerate(read_samples(path), 1):
        where = f"sample {number} of {path}"
        if not (sample.answer or "").strip():
            raise UserError(f'{where} has no "answer": training needs one in every line')
        if not sample.images:
            without += 1
        else:
            examples.append(Example(sample.prompt, str(sample.answer).strip(), sample.images, where))
    return examples, without


def _conversations(path: Path, images: Path) -> tuple[list[Example], int]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # also no UTF-8, numbers too long, nesting too deep
        raise UserError(f"{path} is not valid JSON ({error}): give a list of conversations") from None
    examples: list[Example] = []
    without = 0
    for number, entry in enumerate(entries, 1):
        where = f"entry {number} of {path}"
        turns = _turns(entry, where)
        if entry.get("image") is None:
            without += 1
            continue
        if not isinstance(entry["image"], str) or not entry["image"]:
            raise UserError(f'{where} has an "image" that is no text: write the path of one image, or leave it out')
        image = images / entry["image"]
        if not image.is_file():
            raise UserError(f"{where} names the image {image}, which is not there: say where with --images")
        examples += [Example(question, answer, (image,), where) for question, answer in turns]
    return examples, without


def _turns(entry: Any, where: str) -> list[tuple[str, str]]:
    """(question, answer) of each turn; image markers are taken out of the questions."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise UserError(f"{where} has no conversations in pairs of question and answer: write {_SHAPE}")
    texts = []
    for index, turn in enumerate(turns):
        speaker = ("human", "gpt")[index % 2]
        text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == speaker else None
        text = text.replace(_MARKER, "").strip() if isinstance(text, str) else ""
        if not text:
            raise UserError(f'{where} has at place {index + 1} no text "from" "{speaker}": write {_SHAPE}')
        texts.append(text)
    return list(zip(texts[::2], texts[1::2], strict=True))
