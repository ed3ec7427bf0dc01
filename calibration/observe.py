"""What a bundle's matrices are multiplied with, observed where they run: in its own segments, in order, pruned.

The segments run through ONNX Runtime in pieces (`pieces`), as many at a time as fit, so that a large model needs not
much more than its largest layer. Prompts come first, then their answers: with a KV cache, as when decoding. Knows the
pipeline; decides nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tokprune.calibration.pieces import Piece, cut
from tokprune.calibration.sessions import Sessions
from tokprune.calibration.statistics import FOLDER, ROWS, Statistics, load_statistics, save_statistics
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, sha256
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.layout import Batch
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.ort import OnnxRuntime
from tokprune.runtime.pipeline import Meter, Pipeline
from tokprune.runtime.session import Tensor

PRUNED, UNPRUNED = "pruned", "unpruned"
SAMPLES = 128
BATCH = 4  # samples at a time
ANSWER = 32  # tokens of an answer that are read
GENERATED = 4  # tokens that are generated where no answer is known
BUDGET = 1 << 30  # bytes of weights that are held at a time
_SAVE_EVERY = 30.0  # seconds
_VERSION = 1  # of what is observed: another one makes other files


@dataclass(frozen=True)
class Settings:
    """``samples`` drawn by ``seed``; ``through`` "pruned", or "unpruned": the same segments without selection."""

    samples: int = SAMPLES
    seed: int = 0
    through: str = PRUNED


def observe(
    bundle: Bundle,
    samples: Sequence[Sample],
    settings: Settings,
    progress: Callable[[int, int], None] = lambda done, total: None,
    budget: int = BUDGET,
) -> Statistics:
    """Statistics of each tensor that a matrix of the FP32 or FP16 ``bundle`` is multiplied with, ``lm_head``'s not.

    They are named by the first matrix that reads them. The answers of ``samples`` are read where they have one, else
    some tokens are generated. What was seen is kept in the bundle, from where it is taken if bundle, samples and
    settings are the same, be it whole or interrupted. ``progress`` hears (samples done, of how many). Raises UserError
    for too few samples, ones that the bundle cannot take, and a bundle that cannot be written to.
    """
    chosen = _choose(samples, settings)
    key = _key(bundle, chosen, settings)
    path = bundle.path / FOLDER / f"{key[:16]}.safetensors"
    seen = load_statistics(path, key) or Statistics(key, dataclasses.asdict(settings))
    if seen.samples == len(chosen):
        progress(len(chosen), len(chosen))
        return seen
    limits = dataclasses.replace(bundle.manifest.limits, max_batch=max(BATCH, bundle.manifest.limits.max_batch))
    wide = Bundle(bundle.path, dataclasses.replace(bundle.manifest, limits=limits))
    observer = _Observer(seen, settings.seed, budget)
    pipeline = (Pipeline if settings.through == PRUNED else _Unpruned)(wide, observer)
    model = Model(wide, pipeline=pipeline)
    saved = time.monotonic()
    while seen.samples < len(chosen):
        batch = chosen[seen.samples : seen.samples + BATCH]
        observer.begin(seen.samples, len(batch))
        _read(model, observer, batch)
        seen.samples += len(batch)
        if time.monotonic() - saved > _SAVE_EVERY or seen.samples == len(chosen):
            save_statistics(seen, path)  # between batches only: half a batch must not be seen twice
            saved = time.monotonic()
        progress(seen.samples, len(chosen))
    return seen


def _choose(samples: Sequence[Sample], settings: Settings) -> list[Sample]:
    """Those that are looked at, ones with answers first, so that batches are alike."""
    if not 1 <= settings.samples <= len(samples):
        raise UserError(
            f"{settings.samples} samples were asked for, the data has {len(samples)}: ask for 1 to {len(samples)}"
        )
    order = np.random.default_rng(settings.seed).permutation(len(samples))[: settings.samples]
    return sorted((samples[at] for at in order), key=lambda sample: not sample.answer)


def _key(bundle: Bundle, samples: Sequence[Sample], settings: Settings) -> str:
    """SHA-256 of all that statistics follow from."""
    digests = {image: sha256(image) for sample in samples for image in sample.images}
    data = [(sample.prompt, sample.answer, [digests[image] for image in sample.images]) for sample in samples]
    what = (_VERSION, BATCH, ROWS, sha256(bundle.file(names.MANIFEST_FILE)), dataclasses.asdict(settings), data)
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(model: Model, observer: _Observer, samples: Sequence[Sample]) -> None:
    """Run the prompts, then what comes behind them."""
    pipeline, meter = model.pipeline, Meter()
    prompts = [model.prompt(sample.prompt, len(sample.images)) for sample in samples]
    pixels = model.pixels([image for sample in samples for image in sample.images])
    features = None if pixels is None else pipeline.encode_images(pixels, meter)
    state = pipeline.new_state(len(samples))
    logits, _ = pipeline.forward(state, prompts, meter, image_features=features)
    if all(sample.answer for sample in samples):
        answers = [model.tokenizer.encode(f" {str(sample.answer).strip()}", special=False) for sample in samples]
        pipeline.forward(state, [tokens[:ANSWER] for tokens in answers], meter)
        return
    for _ in range(GENERATED):
        tokens = logits[:, -1].argmax(axis=-1)
        observer.watched &= ~np.isin(tokens, pipeline.facts.eos_token_ids)
        if not observer.watched.any():
            return
        logits, _ = pipeline.forward(state, tokens[:, None].tolist(), meter)


class _Unpruned(Pipeline):
    """The same segments, with every visual row kept."""

    def _select(
        self, stage: int, rows: tuple[Tensor, Tensor, Tensor | None], batch: Batch, meter: Meter
    ) -> tuple[Tensor, Tensor, Batch, Tensor, Tensor]:
        hidden, positions, _ = rows
        every = np.tile(np.arange(batch.visual.shape[1]), (len(batch.visual), 1))
        return hidden, positions, batch, *(self.backend.to_device(array) for array in (every, np.zeros(every.shape)))


class _Observer(OnnxRuntime):
    """ONNX Runtime on the CPU, with sessions that look at what passes through them.

    ``watched`` [B] says of which sequences.
    """

    def __init__(self, seen: Statistics, seed: int, budget: int) -> None:
        super().__init__()
        self.watched = np.ones(0, dtype=bool)
        self._seen, self._seed, self._budget = seen, seed, budget
        self._at = self._calls = 0
        self._sessions = Sessions(budget)

    def begin(self, at: int, size: int) -> None:
        """A batch of ``size`` samples, the first of which is number ``at``."""
        self._at, self._calls = at, 0
        self.watched = np.ones(size, dtype=bool)

    def load(self, bundle: Bundle, segment: SegmentFacts) -> Any:
        if segment.layers is None and segment.name != names.VISION_ENCODER:
            return super().load(bundle, segment)
        model = ir.load(bundle.file(segment.file))
        return _Observed(self, bundle, segment, cut(model, self._budget))

    def run_piece(
        self, bundle: Bundle, segment: SegmentFacts, number: int, piece: Piece, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs and taps of the ``piece`` of that number."""
        wanted = [*dict.fromkeys([*piece.outputs, *piece.taps])]
        at = (segment.name, number)
        found = self._sessions.run(bundle, segment, at, piece, self._piece_options, wanted, values)
        return dict(zip(wanted, found, strict=True))

    def _piece_options(self) -> Any:
        options = self._options(1)
        # What a session gives keeps its arena, with its weights, alive: of a cache, as long as a batch lasts.
        options.enable_cpu_mem_arena = False
        return options

    def look(self, tensor: str, values: np.ndarray, mask: np.ndarray | None) -> None:
        """``values`` [B, S, C]; ``mask`` [B, S] is 0 for pads. Without one, B are images."""
        rows = values.reshape(-1, values.shape[-1])
        if mask is not None:
            rows = rows[((mask != 0) & self.watched[:, None]).reshape(-1)]
        self._calls += 1
        self._seen.add(tensor, rows.astype(np.float32, copy=False), (self._seed, self._at, self._calls))


class _Observed:
    """One segment's session, made of its pieces' ones."""

    def __init__(self, observer: _Observer, bundle: Bundle, segment: SegmentFacts, pieces: Sequence[Piece]) -> None:
        self._observer, self._bundle, self._segment, self._pieces = observer, bundle, segment, pieces

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str], spare: int = 0) -> dict[str, Tensor]:
        values = dict(feeds)
        mask = None
        if names.ATTENTION_MASK in feeds:
            rows = self._observer.shape(feeds[self._segment.inputs[0].name])[1]
            mask = self._observer.to_host(feeds[names.ATTENTION_MASK])[:, -rows:]
        for number, piece in enumerate(self._pieces):
            values.update(self._observer.run_piece(self._bundle, self._segment, number, piece, values))
            for output, tensor in piece.taps.items():
                self._observer.look(tensor, self._observer.to_host(values[output]), mask)
                if output not in piece.outputs:
                    del values[output]
        return {name: values[name] for name in outputs}
