"""Questions about images in, answers out: the runtime's front door. Ties text, images and the pipeline."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.generate import Generation, Sampling, generate
from tokprune.runtime.pipeline import Pipeline, Pruned
from tokprune.runtime.preprocess import load_image, pixel_values, read_image_spec
from tokprune.runtime.prompt import Tokenizer, expand_image_tokens, next_turn_text, prompt_text
from tokprune.runtime.session import make_backend

Picture = Image.Image | Path | str  # an image, or its file


@dataclass(frozen=True)
class Answer:
    """One answer of a batch; white space around ``text`` is dropped. What ``generation`` took is the batch's."""

    text: str
    generation: Generation


class Model:
    """A bundle, loaded and ready; ``chat()`` starts a conversation, ``answer()`` takes many questions at once."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str = "auto",
        threads: int = 0,
        plugins: Path | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        """``pipeline`` is one of the bundle that is there already, in place of one on ``engine``."""
        self.bundle = bundle
        self.tokenizer = Tokenizer(bundle.file(names.TOKENIZER_FILE))
        self.image_spec = read_image_spec(bundle.file(names.PREPROCESSOR_FILE))
        size = bundle.manifest.model.vision.image_size
        if self.image_spec.size != (size, size):
            raise UserError(
                f"{bundle.file(names.PREPROCESSOR_FILE)} makes images of {self.image_spec.size} pixels, the model "
                f"reads {size}×{size}: export the bundle again"
            )
        if pipeline is None:
            pipeline = Pipeline(bundle, make_backend(engine, bundle, threads=threads, plugins=plugins))
            pipeline.load()
        self.pipeline = pipeline

    def chat(self) -> Chat:
        """A new, empty conversation."""
        return Chat(self)

    def answer(
        self,
        questions: Sequence[str],
        images: Sequence[Picture | Sequence[Picture] | None] | None = None,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
    ) -> list[Answer]:
        """Answer the questions as one batch. ``images`` has an entry for each: an image, several, or None.

        Raises UserError for no or too many questions, images that do not match them, unreadable ones or bad prompts.
        """
        started = time.perf_counter()
        state = self.pipeline.new_state(len(questions))
        given = [None] * len(questions) if images is None else images
        if len(given) != len(questions):
            raise UserError(
                f"{len(questions)} questions were given with images for {len(given)}: give each question an entry, "
                "None where it has no image"
            )
        pictures = [_several(entry) for entry in given]
        pixels = self.pixels([picture for entry in pictures for picture in entry])
        prompts = [self.prompt(text, len(entry)) for text, entry in zip(questions, pictures, strict=True)]
        results = [Generation(prompt_tokens=len(prompt)) for prompt in prompts]
        steps = generate(
            self.pipeline,
            state,
            prompts,
            results,
            pixel_values=pixels,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            started=started,
        )
        for _ in steps:
            pass  # the results fill up
        return [Answer(self.tokenizer.decode(result.token_ids).strip(), result) for result in results]

    def prompt(self, question: str, images: int, *, first: bool = True) -> list[int]:
        """Token ids of a turn with ``images`` images, N tokens for each; of a later turn unless ``first``."""
        form, reserved = self.bundle.manifest.prompt, self.tokenizer.special_tokens
        write = prompt_text if first else next_turn_text
        ids = self.tokenizer.encode(write(form, question, images, reserved), special=first)
        facts = self.bundle.manifest.model
        return expand_image_tokens(ids, facts.image_token_id, [facts.vision.tokens] * images)

    def pixels(self, images: Sequence[Picture]) -> np.ndarray | None:
        """pixel_values [I, 3, H, W] of ``images``; None of none. Raises UserError for unreadable ones."""
        loaded = [image if isinstance(image, Image.Image) else load_image(image) for image in images]
        return np.concatenate([pixel_values(image, self.image_spec) for image in loaded]) if loaded else None


def _several(entry: Picture | Sequence[Picture] | None) -> Sequence[Picture]:
    if entry is None:
        return ()
    return [entry] if isinstance(entry, (Image.Image, Path, str)) else entry


def load(
    path: Path | str,
    *,
    engine: str = "auto",
    threads: int = 0,
    plugins: Path | None = None,
    check_hashes: bool = False,
) -> Model:
    """Open a bundle and load its segments. Raises UserError if anything about it is wrong."""
    return Model(open_bundle(path, check_hashes=check_hashes), engine, threads, plugins)


class Chat:
    """A conversation whose caches are kept from turn to turn; ``last`` is the newest turn's generation."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._state = model.pipeline.new_state()
        self._unread: list[int] = []  # yielded, but not in the caches yet
        self.last: Generation | None = None

    def ask(
        self,
        question: str,
        images: Sequence[Picture] = (),
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
    ) -> Iterator[str]:
        """Yield the answer's text as it grows. Raises UserError for unreadable images or a bad prompt."""
        started = time.perf_counter()
        model = self._model
        pixels = model.pixels(images)
        prompt = model.prompt(question, len(images), first=self.last is None)
        result = Generation(prompt_tokens=len(prompt))
        steps = generate(
            model.pipeline,
            self._state,
            [prompt],
            [result],
            unread=self._unread,
            pixel_values=pixels,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            started=started,
        )
        stream = model.tokenizer.stream()
        for (token,) in steps:
            assert token is not None  # the only sequence ends with the steps
            self.last, self._unread = result, [token]
            if piece := stream.push(token):
                yield piece
        if result.stop == "eos":
            self._unread = []  # the step that gave EOS has read the last token
        self.last = result
        if piece := stream.finish():
            yield piece


def pruning_record(pipeline: Pipeline, pruned: Sequence[Pruned], *, scores: bool = False) -> dict[str, Any]:
    """The ``pruning`` object of every result: what was dropped, or why nothing was."""
    if not pipeline.manifest.plan.stages:
        reason = "the bundle was exported with method none"
    elif not pruned:
        reason = "the prompt has no image"
    else:
        reason = str(pipeline.manifest.plan)
    stages = []
    for item in pruned:
        stage: dict[str, Any] = {
            "layer": item.layer,
            "image": item.image,
            "kept": item.kept,
            "total": item.total,
            "indices": item.indices.tolist(),
        }
        if scores:
            stage["candidates"] = item.candidates.tolist()
            # JSON has no NaN, which an FP16 model that overflowed may give
            stage["scores"] = [float(score) if np.isfinite(score) else None for score in item.scores]
        stages.append(stage)
    return {"applied": bool(pruned), "reason": reason, "stages": stages}


def result_record(model: Model, answer: str, result: Generation, *, scores: bool = False) -> dict[str, Any]:
    """The object that ``tokprune run --json`` prints; times in ms, memory in MB of 10^6 bytes."""
    segments = dict(result.prefill.ms)
    steps = max(1, result.decode_steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "answer": answer,
        "token_ids": result.token_ids,
        "stop": result.stop,
        "prompt_tokens": result.prompt_tokens,
        "pruning": pruning_record(model.pipeline, result.pruned, scores=scores),
        "timing_ms": {
            "ttft": result.ttft_ms,
            "decode_per_token": result.decode_ms / steps if result.decode_steps else None,
            "segments": segments,
        },
        "peak_rss_mb": peak / 1e6,
        "flops": {
            "prefill": sum(result.prefill.flops.values()),
            "decode_per_token": sum(result.decode.flops.values()) // steps if result.decode_steps else None,
            "segments": dict(result.prefill.flops),
        },
        "engine": model.pipeline.backend.name,
        "remarks": list(model.pipeline.backend.remarks),
    }
