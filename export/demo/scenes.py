"""Scenes of real handwritten digits: pixels, questions, answers and per-patch truth.

Digits come from `sklearn.datasets.load_digits` (images below `HELD_OUT_FROM` train, the rest test), backgrounds are
plain noise or low-contrast crops of scikit-learn's two bundled photographs. Everything follows from a seeded
`numpy` generator. This module needs numpy, Pillow and scikit-learn, and knows nothing about models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokprune.runtime.errors import UserError

SIZE = 336
PATCH = 14
GRID = SIZE // PATCH
HELD_OUT_FROM = 1500
HEIGHTS = (56, 84)  # px, inclusive
MAX_DIGITS = 4
GAP = 6  # px between two digits' boxes, at least
MARGIN = 14  # px by which the highest (leftmost) digit leads, in its edge and in its centre

INKS = {
    "red": (220, 30, 30),
    "green": (30, 165, 45),
    "blue": (35, 65, 225),
    "yellow": (235, 215, 25),
    "magenta": (225, 40, 205),
    "cyan": (35, 205, 220),
}
FORMS = {
    "digit": "What digit is {ink}?",
    "color": "What color is the {digit}?",
    "count": "How many digits are there?",
    "highest": "Which digit is highest?",
    "leftmost": "Which digit is furthest left?",
    "exists": "Is there a {digit}?",
}
ANSWERS = (*(str(d) for d in range(10)), *INKS, "yes", "no")

_CANVAS = 64  # px; glyphs are warped at this size, then scaled to their height


@dataclass(frozen=True)
class Digit:
    """One drawn digit; the box is its ink's, in pixels."""

    value: int
    ink: str
    top: int
    left: int
    height: int
    width: int

    @property
    def middle(self) -> tuple[float, float]:
        """The box's centre (y, x)."""
        return self.top + self.height / 2, self.left + self.width / 2


@dataclass(frozen=True)
class Scene:
    """`pixels` uint8 [336, 336, 3]; `cover` float32 [digits, 24, 24]: share of each patch that a digit's ink covers;
    `ink` uint8 [336, 336]: opacity of the ink."""

    pixels: np.ndarray
    digits: tuple[Digit, ...]
    cover: np.ndarray
    ink: np.ndarray

    @property
    def highest(self) -> Digit:
        """The digit nearest the top edge."""
        return min(self.digits, key=lambda d: d.top)

    @property
    def leftmost(self) -> Digit:
        """The digit nearest the left edge."""
        return min(self.digits, key=lambda d: d.left)


@dataclass(frozen=True)
class Question:
    """A question about one scene, of one of `FORMS`, with its one-word answer."""

    form: str
    prompt: str
    answer: str


def all_questions() -> list[str]:
    """Every question that the forms can make."""
    made = {t.format(ink=i, digit=d): None for t in FORMS.values() for i in INKS for d in range(10)}
    return list(made)


def split_indices(held_out: bool) -> range:
    """Indices into `load_digits().images` of one side of the split."""
    return range(HELD_OUT_FROM, 1797) if held_out else range(HELD_OUT_FROM)


def _datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            "demo scenes need scikit-learn for its handwritten digits, which is not installed: "
            "run `pip install scikit-learn`"
        ) from error
    return datasets


@lru_cache(maxsize=2)
def _glyphs(held_out: bool) -> list[list[np.ndarray]]:
    """Per class, spline coefficients [14, 14] of the 8x8 images, values 0..1, with a border of 3."""
    from scipy.ndimage import spline_filter

    data = _datasets().load_digits()
    by_class: list[list[np.ndarray]] = [[] for _ in range(10)]
    for i in split_indices(held_out):
        padded = np.pad(data.images[i] / 16.0, 3)
        by_class[int(data.target[i])].append(spline_filter(padded, order=3).astype(np.float32))
    return by_class


@lru_cache(maxsize=1)
def _photos() -> list[np.ndarray]:
    return [np.asarray(p, np.uint8) for p in _datasets().load_sample_images().images]


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """A bank of unit Gaussian noise, float32 [1024, 1024, 3]; scenes take crops of it."""
    return np.random.default_rng(0).standard_normal((1024, 1024, 3), np.float32)


@lru_cache(maxsize=1)
def _bumps() -> tuple[np.ndarray, np.ndarray]:
    """Canvas coordinates -1..1 [2, P] and a smooth basis [16, P] for elastic displacements, P = canvas pixels."""
    axis = np.linspace(-1, 1, _CANVAS, dtype=np.float32)
    y, x = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    knots = np.linspace(-1, 1, 4)
    basis = [np.exp(-((y - a) ** 2 + (x - b) ** 2) / 0.4) for a in knots for b in knots]
    return np.stack([y, x]), np.stack(basis).astype(np.float32)


def draw_glyph(coefficients: np.ndarray, height: int, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """Ink opacity, uint8 [height, width], cut to the ink; `augment` bends, slants and thickens the stroke."""
    from scipy.ndimage import map_coordinates

    grid, basis = _bumps()
    low, high = 0.3, 0.7
    at = grid * 5.2
    if augment:
        angle, shear = rng.uniform(-0.26, 0.26), rng.uniform(-0.25, 0.25)
        stretch = rng.uniform(0.82, 1.2)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1, 0], [shear, stretch]])
        at = turn.astype(np.float32) @ at + (rng.normal(0, 0.28, (2, 16)).astype(np.float32) @ basis)
        low = rng.uniform(0.08, 0.4)
        high = low + rng.uniform(0.2, 0.5)
    value = map_coordinates(coefficients, at + 6.5, order=3, prefilter=False, output=np.float32)
    alpha = np.clip((value.reshape(_CANVAS, _CANVAS) - low) / (high - low), 0, 1)
    inked = alpha > 0.35
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    cut = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(10, round(cut.shape[1] * height / cut.shape[0]))
    image = Image.fromarray((cut * 255).astype(np.uint8))
    return np.asarray(image.resize((min(width, 96), height), Image.Resampling.BICUBIC))


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """uint8 [336, 336, 3]: plain light, plain dark, or a low-contrast crop of a photograph; all noisy."""
    kind = rng.integers(4)
    top, left = rng.integers(0, 1024 - SIZE, 2)
    noise = _noise()[top : top + SIZE, left : left + SIZE]
    light = bool(rng.integers(2))
    base = rng.uniform(190, 245) if light else rng.uniform(10, 65)
    tint = np.asarray(base + rng.normal(0, 6, 3), np.float32)
    if kind < 2:
        return np.clip(noise * np.float32(rng.uniform(3, 12)) + tint, 0, 255).astype(np.uint8)
    photo = _photos()[rng.integers(2)]
    top, left = rng.integers(0, photo.shape[0] - SIZE), rng.integers(0, photo.shape[1] - SIZE)
    crop = photo[top : top + SIZE, left : left + SIZE]
    if rng.integers(2):
        crop = crop[:, ::-1]
    contrast = np.float32(rng.uniform(0.12, 0.3))
    drawn = noise * np.float32(rng.uniform(1, 6)) + (crop - np.float32(128)) * contrast + tint
    return np.clip(drawn, 0, 255).astype(np.uint8)


def _leads(values: list[float]) -> bool:
    """True when the smallest value leads the others by `MARGIN`."""
    ordered = sorted(values)
    return len(ordered) == 1 or ordered[1] - ordered[0] >= MARGIN


def _layout(shapes: list[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(top, left) per box (height, width): apart by `GAP`, with one clear highest and one clear leftmost."""
    while True:
        spots = [(int(rng.integers(2, SIZE - h - 1)), int(rng.integers(2, SIZE - w - 1))) for h, w in shapes]
        boxes = [(y, x, h, w) for (y, x), (h, w) in zip(spots, shapes, strict=True)]
        apart = all(
            a[0] + a[2] + GAP <= b[0]
            or b[0] + b[2] + GAP <= a[0]
            or a[1] + a[3] + GAP <= b[1]
            or b[1] + b[3] + GAP <= a[1]
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )
        if not apart:
            continue
        first = {
            min(range(len(boxes)), key=lambda i: key(boxes[i])) == lead
            for lead, key in (
                (min(range(len(boxes)), key=lambda i: boxes[i][0]), lambda b: b[0] + b[2] / 2),
                (min(range(len(boxes)), key=lambda i: boxes[i][1]), lambda b: b[1] + b[3] / 2),
            )
        }
        clear = all(
            _leads([key(b) for b in boxes])
            for key in (lambda b: b[0], lambda b: b[0] + b[2] / 2, lambda b: b[1], lambda b: b[1] + b[3] / 2)
        )
        if clear and first == {True}:
            return spots


def make_scene(
    rng: np.random.Generator,
    held_out: bool,
    digits: int,
    augment: bool = False,
    background: np.ndarray | None = None,
) -> Scene:
    """A scene of `digits` (1..4) different digits in different inks, on a fresh background unless one is given."""
    values = [int(v) for v in rng.permutation(10)[:digits]]
    inks = [list(INKS)[i] for i in rng.permutation(len(INKS))[:digits]]
    alphas = []
    for value in values:
        pool = _glyphs(held_out)[value]
        height = int(rng.integers(HEIGHTS[0], HEIGHTS[1] + 1))
        alphas.append(draw_glyph(pool[rng.integers(len(pool))], height, rng, augment))
    spots = _layout([a.shape for a in alphas], rng)
    pixels = draw_background(rng) if background is None else background.copy()
    mask, drawn, cover = np.zeros((SIZE, SIZE), np.uint8), [], []
    for value, name, opacity, (top, left) in zip(values, inks, alphas, spots, strict=True):
        height, width = opacity.shape
        ink = np.asarray(np.array(INKS[name]) + rng.normal(0, 12, 3), np.float32)
        alpha = opacity.astype(np.float32) / 255
        region = pixels[top : top + height, left : left + width]
        region[:] = np.clip(region + alpha[..., None] * (ink - region), 0, 255)
        alone = np.zeros((SIZE, SIZE), np.uint8)
        alone[top : top + height, left : left + width] = opacity
        mask += alone
        cover.append(alone.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3), dtype=np.float32) / 255)
        drawn.append(Digit(value, name, top, left, height, width))
    return Scene(pixels, tuple(drawn), np.stack(cover), mask)


def ask(scene: Scene, form: str, rng: np.random.Generator, present: bool = True) -> Question:
    """A question of one form; `present` decides the answer of "exists". Position forms want two digits or more."""
    digit = scene.digits[rng.integers(len(scene.digits))]
    if form == "exists" and not present:
        absent = sorted(set(range(10)) - {d.value for d in scene.digits})
        return Question(form, FORMS[form].format(digit=absent[rng.integers(len(absent))]), "no")
    answer = {
        "digit": str(digit.value),
        "color": digit.ink,
        "count": str(len(scene.digits)),
        "highest": str(scene.highest.value),
        "leftmost": str(scene.leftmost.value),
        "exists": "yes",
    }[form]
    return Question(form, FORMS[form].format(ink=digit.ink, digit=digit.value), answer)


def held_out_questions(n: int, seed: int) -> Iterator[tuple[int, Scene, Question]]:
    """`questions` of the digits that no training has seen."""
    return questions(n, seed, held_out=True)


def questions(n: int, seed: int, held_out: bool) -> Iterator[tuple[int, Scene, Question]]:
    """`n` questions as (scene number, scene, question), forms in turn, up to three to a scene.

    Digits are bent and slanted for training.
    """
    forms = list(FORMS)
    for number in range(-(-n // 3)):
        rng = np.random.default_rng([seed, number])
        wanted = [forms[k % len(forms)] for k in range(3 * number, min(n, 3 * number + 3))]
        fewest = 2 if {"highest", "leftmost"} & set(wanted) else 1
        scene = make_scene(rng, held_out, int(rng.integers(fewest, MAX_DIGITS + 1)), augment=not held_out)
        for form in wanted:
            yield number, scene, ask(scene, form, rng, present=number % 4 < 2)


def demo_data(n: int, out: Path, seed: int = 0, held_out: bool = True) -> Path:
    """Write `n` questions to `out/data.jsonl` with their images; returns that file.

    Lines are `{"image", "prompt", "answer", "form"}`, the image's path relative to `out`. The directory is written
    beside `out` and renamed when whole. UserError if `out` holds something already, or `n` is not positive.
    """
    out = Path(out)
    if n < 1:
        raise UserError(f"demo-data was asked for {n} questions: give a number of at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"demo-data was asked to write to {out}, which is not empty: name a new or empty directory")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "images").mkdir(parents=True)
        with open(temporary / "data.jsonl", "w", encoding="utf-8") as lines:
            last = -1
            for number, scene, question in questions(n, seed, held_out):
                image = f"images/{number:05d}.png"
                if number != last:
                    Image.fromarray(scene.pixels).save(temporary / image, compress_level=3)
                    last = number
                row = {"image": image, "prompt": question.prompt, "answer": question.answer, "form": question.form}
                lines.write(json.dumps(row) + "\n")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed by now, or half written
    return out / "data.jsonl"
