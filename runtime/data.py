"""Data files: JSON lines of {"image", "prompt", "answer"}. Knows paths and text; opens no image.

"image" is a path, or a list of several that belong to the one prompt, in order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokprune.runtime.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One question; ``images`` are existing files, often one, ``answer`` is the correct one if it is known."""

    prompt: str
    images: tuple[Path, ...] = ()
    answer: str | None = None


def read_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """Read a data file, at most its first ``limit`` samples; images are relative to the file.

    Raises UserError naming the line that is at fault.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the data file {path} cannot be read ({error}): give a file of JSON lines") from None
    samples: list[Sample] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at a U+2028 in a text, too
        if line.strip() and (limit is None or len(samples) < limit):
            samples.append(_sample(line, path, f"line {number} of {path}"))
    if not samples:
        raise UserError(f"the data file {path} holds no samples: give JSON lines with image, prompt and answer")
    return samples


def _sample(line: str, path: Path, where: str) -> Sample:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers too long, and nesting too deep, for Python
        raise UserError(f"{where} is not valid JSON ({error}): one object a line is needed") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        raise UserError(f'{where} has no "prompt" text: write {{"image": …, "prompt": …, "answer": …}}')
    if not isinstance(data.get("answer"), (str, type(None))):
        raise UserError(f'{where} has an "answer" that is no text: write it in quotes, or leave it out')
    given = data.get("image") or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f'{where} has an "image" that is no path or list of paths: write it in quotes, or leave it out')
    images = tuple(path.parent / name for name in names)
    for image in images:
        if not image.is_file():
            raise UserError(f"{where} names the image {image}, which is not there: paths are relative to the data file")
    return Sample(data["prompt"], images, data.get("answer"))
