"""Training batches: scenes as a subset of patches with per-patch labels. Knows scenes, not models.

Most of a scene is background, so a training scene keeps every patch near a digit and a random share of the others,
each with its true position (as masked autoencoders do); at inference the model sees all 576.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from tokprune.export.demo.scenes import GRID, INKS, PATCH, Scene, draw_background, make_scene

IGNORE = -100
BACKGROUNDS = 384  # drawn once; drawing one a scene would be half the cost of a scene
MIN_COVER = 0.12  # a patch carries a digit's labels from this much ink on
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass
class PatchBatch:
    """`pixels` uint8 [B, T, 588] (channel, row, column), `cells` int64 [B, T]: the patches' places in the 24x24 grid.

    `labels`: int64 [B, T] each; digit and ink are 0 on background, the others are `IGNORE` there.
    `ink`: uint8 [B, T, 49], opacity of the ink, sampled every other pixel. `shape`: uint8 [B, T, 64], the
    whole digit that a patch belongs to, its box scaled to 8x8 (zero on background).
    `frame`: float32 [B, T, 2], where a patch's centre lies (down, right) of its digit's centre, in digit heights.
    """

    pixels: np.ndarray
    cells: np.ndarray
    labels: dict[str, np.ndarray]
    ink: np.ndarray
    shape: np.ndarray
    frame: np.ndarray

    def patches(self) -> torch.Tensor:
        """The CLIP-normalised patches, float32 [B, T, 588]."""
        area = PATCH * PATCH
        scale = torch.from_numpy(np.repeat(1 / (255 * CLIP_STD), area))
        shift = torch.from_numpy(np.repeat(CLIP_MEAN / CLIP_STD, area))
        return torch.from_numpy(self.pixels).float().mul_(scale).sub_(shift)


@lru_cache(maxsize=2)
def _backgrounds(held_out: bool) -> list[np.ndarray]:
    rng = np.random.default_rng([7, int(held_out)])
    return [draw_background(rng) for _ in range(BACKGROUNDS)]


def training_scene(rng: np.random.Generator, digits: int, held_out: bool = False) -> Scene:
    """A scene on one of a pool of backgrounds, rolled at random; augmented unless held out."""
    pool = _backgrounds(held_out)
    down, right = rng.integers(0, 8, 2) * 42
    background = np.roll(pool[rng.integers(len(pool))], (int(down), int(right)), (0, 1))
    return make_scene(rng, held_out, digits, not held_out, background)


def scene_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Labels per patch, int64 [576]; patches that a digit only grazes are `IGNORE`."""
    cover = scene.cover.reshape(len(scene.digits), -1)
    owner, most = cover.argmax(0), cover.max(0)
    on, grazed = most >= MIN_COVER, (most > 0) & (most < MIN_COVER)

    def spread(per_digit: list[int], background: int) -> np.ndarray:
        label = np.where(on, np.array(per_digit)[owner], background)
        return np.where(grazed, IGNORE, label).astype(np.int64)

    inks = list(INKS)
    several = len(scene.digits) > 1
    return {
        "digit": spread([d.value + 1 for d in scene.digits], 0),
        "ink": spread([inks.index(d.ink) + 1 for d in scene.digits], 0),
        "highest": spread([int(d is scene.highest) if several else IGNORE for d in scene.digits], IGNORE),
        "leftmost": spread([int(d is scene.leftmost) if several else IGNORE for d in scene.digits], IGNORE),
        "count": spread([len(scene.digits) - 1] * len(scene.digits), IGNORE),
    }


def scene_shapes(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Per patch its digit's 8x8 picture, uint8 [576, 64], and its place in the digit, float32 [576, 2]."""
    centres = (np.stack(np.unravel_index(np.arange(GRID * GRID), (GRID, GRID)), -1) + 0.5) * PATCH
    shapes, frames = [np.zeros((8, 8), np.uint8)], [np.zeros_like(centres)]
    for d in scene.digits:
        box = Image.fromarray(scene.ink[d.top : d.top + d.height, d.left : d.left + d.width])
        shapes.append(np.asarray(box.resize((8, 8), Image.Resampling.BOX)))
        frames.append((centres - d.middle) / d.height)
    cover = scene.cover.reshape(len(scene.digits), -1)
    owner = np.where(cover.max(0) >= MIN_COVER, cover.argmax(0) + 1, 0)
    shape = np.stack(shapes).reshape(-1, 64)[owner]
    return shape, np.stack(frames)[owner, np.arange(len(owner))].astype(np.float32)


def choose_cells(scene: Scene, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of `tokens` patches: inked ones first, then their neighbours, then any."""
    if tokens >= GRID * GRID:
        return np.arange(GRID * GRID)
    inked = (scene.cover.max(0) > 0).astype(np.float32)
    padded = np.pad(inked, 1)
    near = np.max([padded[y : y + GRID, x : x + GRID] for y in range(3) for x in range(3)], 0)
    order = rng.random(GRID * GRID) + 2 * inked.ravel() + near.ravel() * (rng.random() < 0.7)
    return np.sort(np.argpartition(-order, tokens)[:tokens])


def patch_batch(scenes: list[Scene], tokens: int, rng: np.random.Generator) -> PatchBatch:
    """The chosen patches of `scenes`, normalised, with labels."""
    patches, cells, labels, inks, shapes, frames = [], [], [], [], [], []
    for scene in scenes:
        chosen = choose_cells(scene, tokens, rng)
        grid = scene.pixels.reshape(GRID, PATCH, GRID, PATCH, 3)
        patches.append(grid[chosen // GRID, :, chosen % GRID])  # [T, 14, 14, 3]
        cells.append(chosen)
        fine = scene.ink[::2, ::2].reshape(GRID, PATCH // 2, GRID, PATCH // 2)
        inks.append(fine[chosen // GRID, :, chosen % GRID].reshape(tokens, -1))
        shape, frame = scene_shapes(scene)
        shapes.append(shape[chosen])
        frames.append(frame[chosen])
        labels.append({k: v[chosen] for k, v in scene_labels(scene).items()})
    pixels = np.stack(patches).transpose(0, 1, 4, 2, 3)  # [B, T, 3, 14, 14]
    flat = np.ascontiguousarray(pixels).reshape(*pixels.shape[:2], -1)
    stacked = {k: np.stack([x[k] for x in labels]) for k in labels[0]}
    return PatchBatch(flat, np.stack(cells), stacked, np.stack(inks), np.stack(shapes), np.stack(frames))
