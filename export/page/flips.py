"""Samples whose answer changed: which, of what kind, and their pictures as data URIs."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tokprune.export.verify import Outcome
from tokprune.runtime import metrics
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.overlay import OverlayStage, panels
from tokprune.runtime.preprocess import load_image, original_box
from tokprune.runtime.verification import ConsistencySample

_EDGE = 288  # pixels of a picture's longer edge, about: two of them fit beside each other on a phone held upright
_QUALITY = 80  # with full colour resolution: 10 to 40 kB a picture


@dataclass(frozen=True)
class Flip:
    """A sample, the ``number``-th of the data, whose answer is another one than the original's."""

    number: int
    kind: str  # a field of metrics.Flips, or "changed" without a reference answer
    sample: Sample
    outcome: Outcome
    kl: float  # nats, mean of the answer's positions; not finite if logits were not


@dataclass(frozen=True)
class Picture:
    uri: str
    alt: str
    caption: str
    width: int
    height: int


def find_flips(samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> list[Flip]:
    """All flips, the greatest KL first, those that are not finite before it."""
    flips = []
    for number, (sample, outcome) in enumerate(zip(samples, outcomes, strict=True), 1):
        if kind := _kind(outcome.consistency):
            kl = float(np.asarray(outcome.consistency.kl, dtype=np.float64).mean())
            flips.append(Flip(number, kind, sample, outcome, kl))
    return sorted(flips, key=lambda flip: -flip.kl if math.isfinite(flip.kl) else -math.inf)


def _kind(answers: ConsistencySample) -> str | None:
    if answers.reference is None:
        same = metrics.normalise_answer(answers.full) == metrics.normalise_answer(answers.pruned)
        return None if same else "changed"
    counts = metrics.count_flips([answers.full], [answers.pruned], [answers.reference])
    return next((kind for kind, count in dataclasses.asdict(counts).items() if count), None)


def draw_pictures(flip: Flip, model: Model) -> list[list[Picture]]:
    """Of each image the original, and what the engine kept of it in each stage. Raises UserError as load_image does."""
    rows = []
    for order, path in enumerate(flip.sample.images):
        image = load_image(path)
        kept = [item for item in flip.outcome.kept if item.image == order]
        stages = [OverlayStage(item.layer, item.indices, item.scores) for item in kept]
        box = original_box(image.size, model.image_spec)
        found = panels(image, stages, model.bundle.manifest.model.vision.grid, box, _EDGE)
        pictures = []
        for panel, (picture, caption) in enumerate(found):
            shows = "patches kept in colour, the others grey" if panel else "a line around what the model sees"
            alt = f"{path.name}, {caption}: {shows}"
            under = caption if panel else f"{caption}, {path.name}"
            pictures.append(Picture(_data_uri(picture), alt, under, picture.width, picture.height))
        rows.append(pictures)
    return rows


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
