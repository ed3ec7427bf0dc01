"""The picture of what was kept: the original, and beside it one panel for each pruning stage.

Knows Pillow and grid cells; knows no model. A panel shows what the model saw: dropped patches grey and
dark, kept ones in colour within a thin line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tokprune.runtime.errors import UserError
from tokprune.runtime.output import check_file, whole_file

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_PANEL = 480  # pixels of a panel's longer edge, about
_GAP = 12
_CAPTION = 28  # height, in pixels
_PAPER, _INK = (250, 250, 250), (25, 25, 25)
_LINE = (255, 205, 0)
_LOW, _HIGH = (0, 110, 255), (255, 205, 0)  # line colours of the lowest and the highest score kept


class OverlayStage(NamedTuple):
    """One stage as the JSON of a run gives it; a plain tuple of two or three will do.

    ``indices`` [K] are grid cells, ascending, row by row from the top left; ``scores`` has one for each token
    that entered the stage.
    """

    layer: int
    indices: Sequence[int] | np.ndarray
    scores: Sequence[float] | np.ndarray | None = None


Stages = Sequence[OverlayStage | tuple[Any, ...]]


def check_overlay_path(path: Path | str) -> None:
    """Raise UserError if a picture cannot go to ``path``; cheap enough to be asked before a long run."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"the overlay {path} has no known extension: choose one of {', '.join(_FORMATS)}")
    check_file(path, "overlay")


def draw_overlay(
    image: Image.Image,
    stages: Stages,
    grid: tuple[int, int],
    box: tuple[float, float, float, float],
    out_path: Path | str,
) -> None:
    """Write ``panels`` side by side to ``out_path``, whole or not at all.

    Raises UserError if the file cannot be written, ValueError as ``panels`` does.
    """
    path = Path(out_path)
    check_overlay_path(path)
    sheet = _sheet(panels(image, stages, grid, box))
    with whole_file(path, "overlay") as partial:
        sheet.save(partial, format=_FORMATS[path.suffix.lower()], quality=90)


def panels(
    image: Image.Image,
    stages: Stages,
    grid: tuple[int, int],
    box: tuple[float, float, float, float],
    edge: int = _PANEL,
) -> list[tuple[Image.Image, str]]:
    """The pictures of ``stages`` over ``image`` (RGB, upright), with their captions: the original, then each stage.

    A stage's longer edge has about ``edge`` pixels, the original is as high and at most twice as wide. ``grid`` is
    (rows, columns) of visual tokens, ``box`` what of the image they cover, as `original_box` gives it. Where a
    stage has scores, the line around a patch goes from blue (lowest kept) to yellow (highest). Without stages the
    original alone is drawn. Raises ValueError if the stages do not fit the grid or one another.
    """
    steps = [OverlayStage(*stage) for stage in stages]
    rows, columns = grid
    cell = max(4, edge // max(rows, columns))
    size = (columns * cell, rows * cell)
    found = [(_original(image, box, size[1]), "original" if steps else "original, nothing pruned")]
    seen = _seen(image, box, size)
    before = np.arange(rows * columns)
    for step in steps:
        cells = np.asarray(step.indices, dtype=np.int64)
        if not np.isin(cells, before).all() or (np.diff(cells) <= 0).any():
            raise ValueError(f"layer {step.layer} keeps tokens it was not given, or not in ascending order")
        ranks = None
        if step.scores is not None:
            if len(step.scores) != before.size:
                raise ValueError(f"layer {step.layer} has {len(step.scores)} scores of {before.size} tokens")
            ranks = np.asarray(step.scores)[np.searchsorted(before, cells)].argsort().argsort()
        caption = f"layer {step.layer}: {cells.size} of {rows * columns}"
        found.append((_kept(seen, cells, ranks, grid, cell), caption))
        before = cells
    return found


def _original(image: Image.Image, box: tuple[float, float, float, float], height: int) -> Image.Image:
    """The whole image, at most ``height`` high and twice as wide, a frame around what the model sees."""
    panel = ImageOps.contain(image, (2 * height, height), Image.Resampling.LANCZOS)
    x, y = panel.width / image.width, panel.height / image.height
    left, top = max(0, round(box[0] * x)), max(0, round(box[1] * y))
    right, bottom = min(panel.width, round(box[2] * x)) - 1, min(panel.height, round(box[3] * y)) - 1
    ImageDraw.Draw(panel).rectangle((left, top, max(left, right), max(top, bottom)), outline=_LINE, width=2)
    return panel


def _seen(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """The part of the image within ``box``, black where the box reaches beyond it, resized to ``size``."""
    left, top, right, bottom = (round(edge) for edge in box)
    part = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return part.resize(size, Image.Resampling.LANCZOS)


def _kept(
    seen: Image.Image, cells: np.ndarray, ranks: np.ndarray | None, grid: tuple[int, int], cell: int
) -> Image.Image:
    """One panel; ``ranks`` [K] orders the kept cells by score."""
    rows, columns = grid
    keep = np.zeros(rows * columns, dtype=np.uint8)
    keep[cells] = 255
    mask = Image.fromarray(keep.reshape(grid)).resize(seen.size, Image.Resampling.NEAREST)
    dark = Image.new("RGB", seen.size, (40, 40, 40))
    grey = Image.blend(ImageOps.grayscale(seen).convert("RGB"), dark, 0.5)
    panel = Image.composite(seen, grey, mask)
    draw = ImageDraw.Draw(panel)
    for order, index in enumerate(cells.tolist()):
        y, x = divmod(index, columns)
        share = 1.0 if ranks is None else float(ranks[order]) / max(1, cells.size - 1)
        colour = tuple(round(low + share * (high - low)) for low, high in zip(_LOW, _HIGH, strict=True))
        draw.rectangle((x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1), outline=colour)
    return panel


def _sheet(panels: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Panels side by side, each with its caption below."""
    font = ImageFont.load_default(size=18)
    widths = [max(panel.width, round(font.getlength(caption))) for panel, caption in panels]
    height = max(panel.height for panel, _ in panels)
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(panels) + 1), height + 2 * _GAP + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _GAP
    for (panel, caption), width in zip(panels, widths, strict=True):
        sheet.paste(panel, (left, _GAP))
        draw.text((left, height + _GAP + 6), caption, fill=_INK, font=font)
        left += width + _GAP
    return sheet
