"""The sizes that engines are made for: a bundle's limits as ranges of each segment's open axes.

Decoders get two profiles over one set of weights, prefill and decode. TensorRT works the greatest sizes of a profile
out together, so they have to fit one another: a mask of C + S columns for a cache of C rows, those not yet filled
among them, and S new ones. Knows sizes only; letters are those of ``names``.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokprune.runtime import names
from tokprune.runtime.engines.compiler import ShapeRanges
from tokprune.runtime.manifest import Manifest, SegmentFacts
from tokprune.runtime.memory import usual_work

PREFILL, DECODE = "prefill", "decode"
BUCKET = 128  # rows: what engines see of a cache grows by so many, so that decode steps keep their shapes meanwhile
LOGITS_ROWS = 64  # at most, of one call: generation asks for one row, `verify` for as many as it compares (16)

Range = tuple[int, int, int]  # least, usual, greatest


def segment_profiles(manifest: Manifest, segment: SegmentFacts) -> dict[str, ShapeRanges]:
    """Profiles of ``segment`` by name: shapes of each input, least, usual and greatest.

    ``decode`` is for one new row behind cached ones, and missing where no row can be cached. ``prefill`` is for all
    else, a later turn's rows behind cached ones too. A cache may have as many rows as the limit says while not all of
    them are filled.
    """
    ranges = {PREFILL: _prefill(manifest, segment)}
    if segment.layers is not None and manifest.limits.max_kv_capacity > 1:
        ranges[DECODE] = _decode(manifest)
    return {name: _shapes(segment, axes) for name, axes in ranges.items()}


def _prefill(manifest: Manifest, segment: SegmentFacts) -> dict[str, Range]:
    """A prompt of the usual length with one image, alone and without a cache; the greatest are the limits."""
    limits, tokens = manifest.limits, manifest.model.vision.tokens
    work = usual_work(manifest.model)
    rows = limits.max_input_length
    before, after = _visual_rows(manifest, segment)
    images = max(1, limits.max_batch * (rows // tokens))
    # a selector runs on calls with an image only: its rows and a row of text at least
    least = 1 if after is None else before + 1
    return {
        names.BATCH: (1, 1, limits.max_batch),
        names.SEQUENCE: _range(least, before + work.text_tokens, rows),
        names.PAST: (0, 0, limits.max_kv_capacity),
        names.TOTAL: _range(least, before + work.text_tokens, rows, more=limits.max_kv_capacity),
        names.LOGITS_COUNT: (1, 1, min(LOGITS_ROWS, rows)),
        names.IMAGES: (1, 1, images),
        names.ROWS: _range(1 + (after or 0), (after or 0) + work.text_tokens, rows),
        names.TEXT_ROWS: _range(1, work.text_tokens, rows),
    }


def _decode(manifest: Manifest) -> dict[str, Range]:
    """One row behind any cache; usual is one that holds a prompt of the usual length, unpruned, and some answer."""
    limits, work = manifest.limits, usual_work(manifest.model)
    past = limits.max_kv_capacity
    usual = bucket(1 + work.text_tokens + work.images * manifest.model.vision.tokens, past)
    return {
        names.BATCH: (1, 1, limits.max_batch),
        names.SEQUENCE: (1, 1, 1),
        names.PAST: (1, usual, past),
        names.TOTAL: (2, usual + 1, past + 1),
        names.LOGITS_COUNT: (1, 1, 1),
    }


def bucket(rows: int, most: int) -> int:
    """Rows of a cache that is to hold ``rows`` and never more than ``most``."""
    return min(-(-rows // BUCKET) * BUCKET, most)


def _visual_rows(manifest: Manifest, segment: SegmentFacts) -> tuple[int, int | None]:
    """Visual tokens of an image in front of ``segment``, and behind it if that is a selector."""
    visual = [manifest.model.vision.tokens, *(stage.keep for stage in manifest.plan.stages)]
    for index in range(len(visual)):
        if segment.name == names.select(index):
            return visual[index], visual[index + 1]
        if segment.name == names.decoder(index):
            return visual[index], None
    return visual[0], None


def _range(least: int, usual: int, greatest: int, more: int = 0) -> Range:
    """Ordered, whatever the limits; ``more`` is what the greatest has on top."""
    greatest = max(least, greatest)
    return least, min(max(least, usual), greatest), greatest + more


def _shapes(segment: SegmentFacts, axes: Mapping[str, Range]) -> ShapeRanges:
    """Of inputs with open axes; the others are in the graph."""
    found = {}
    for tensor in segment.inputs:
        if any(isinstance(dim, str) for dim in tensor.shape):
            least, usual, greatest = (
                tuple(axes[dim][which] if isinstance(dim, str) else dim for dim in tensor.shape) for which in range(3)
            )
            found[tensor.name] = (least, usual, greatest)
    return found
