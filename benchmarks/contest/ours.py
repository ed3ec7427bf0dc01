"""tokprune's runtime on a bundle: what `tokprune run` does, step by step, so that parts can be timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image

from contest.task import Taken, Task, greedy
from tokprune.runtime import memory, names
from tokprune.runtime.chat import load as load_bundle
from tokprune.runtime.pipeline import Meter, State
from tokprune.runtime.version import __version__


def load(job: dict[str, Any]) -> Bundle:
    """Raises ValueError if fused graphs were asked for, and others are run."""
    options = job["options"]
    bundle = Bundle(Path(job["path"]), options["engine"], job["task"]["threads"])
    if (options["graphs"] == "slot") != ("fused" in bundle.versions["engine"]):
        raise ValueError(f"{bundle.versions['engine']} runs, not the {options['graphs']}: {bundle.facts['remarks']}")
    return bundle


class Bundle:
    """A loaded bundle; what follows from its manifest, the least bytes and the FLOPs, is among ``facts``."""

    def __init__(self, path: Path, engine: str, threads: int) -> None:
        self._model = load_bundle(path, engine=engine, threads=threads)
        self._pipeline = self._model.pipeline
        backend = self._pipeline.backend
        self.versions = {"tokprune": __version__, "engine": backend.name}
        manifest = self._pipeline.manifest
        decoders = [names.decoder(index) for index, _, _ in manifest.plan.segments(manifest.model.layers)]
        weights = {segment.segment: segment.total for segment in manifest.memory}
        self.facts: dict[str, Any] = {
            "decode_bytes": sum(weights[name] for name in decoders),
            "weights_bytes": sum(weights.values()),
            "remarks": list(backend.remarks),
        }

    def answer(self, image: str, task: Task) -> Taken:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
        begin = time.perf_counter()
        pixels, ids = self._model.pixels([picture]), self._model.prompt(task.text, 1)
        seen, read = Meter(), Meter()
        assert pixels is not None  # of one image
        features = self._pipeline.encode_images(pixels, seen)
        state = self._pipeline.new_state()
        began = time.perf_counter()
        logits, _ = self._pipeline.forward(state, [ids], read, image_features=features)
        first = int(logits[0, -1].argmax())
        now = time.perf_counter()
        self._note(ids, task)
        tokens, decode = greedy(first, lambda token: self._step(state, token), task.new_tokens)
        return Taken(1e3 * (now - begin), sum(seen.ms.values()), 1e3 * (now - began), decode, tokens, logits[0, -1])

    def _step(self, state: State, token: int) -> int:
        return int(self._pipeline.forward(state, [[token]], Meter())[0][0, -1].argmax())

    def _note(self, ids: list[int], task: Task) -> None:
        """The memory that this question cannot do without: weights, caches, the largest segment's activations."""
        tokens = self._pipeline.facts.vision.tokens
        work = memory.Work(len(ids) - tokens, task.new_tokens, 1)
        plan = memory.from_manifest(self._pipeline.manifest, work)
        caches = sum(plan.caches.values())
        self.facts["kv_bytes"] = caches
        self.facts["least_bytes"] = plan.weights_bytes + caches + max(plan.activations.values())
        self.facts["tokens"] = len(ids)
