"""Runs configurations: one JSON file each, of the samples' outcomes, so that a run that was stopped goes on.

Knows no statistics. Answers and distributions are the engine's; representations, for the IPR, are those of the
PyTorch reference with the same pruning.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from study.grid import Configuration
from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
from tokprune.export.demo.scenes import demo_data
from tokprune.export.lvpruning.modules import Modules
from tokprune.export.pipeline import Graphs, export
from tokprune.export.sides import Engine, Greedy, Original
from tokprune.runtime import bench, flops, metrics
from tokprune.runtime.chat import Model, load
from tokprune.runtime.data import read_samples
from tokprune.runtime.plan import Plan

TEXT_TOKENS = 12  # about what the demo's questions have, for FLOPs and timing
NEW_TOKENS = 16
SPECTRUM = 200  # of the first questions, whose representations are compared
ROUNDS = 20  # of the timing, each with and without pruning


class Study:
    """One model and its questions; everything is kept in ``folder``."""

    def __init__(self, model: str, work: Path, questions: int, seed: int) -> None:
        self.checkpoint = find_checkpoint(model)
        data = work / f"questions-{questions}-{seed}"
        if not data.exists():
            work.mkdir(parents=True, exist_ok=True)
            demo_data(questions, data, seed)
        self._samples = read_samples(data / "data.jsonl")
        self._forms = [json.loads(line)["form"] for line in (data / "data.jsonl").read_text().splitlines()]
        self.folder = work / f"results-{questions}-{seed}"
        self.folder.mkdir(exist_ok=True)
        self._features: dict[Path | None, np.ndarray | None] = {}
        self._graphs: Graphs = {}

    def measure(self, configuration: Configuration, label: str) -> dict[str, Any]:
        """One configuration's outcomes, from their file if it is there; ``label`` begins the progress lines."""
        return self._kept(f"{_file(configuration)}.json", lambda: self._outcomes(configuration, label))

    def time(self, configuration: Configuration, label: str) -> dict[str, Any]:
        """Its prefill timed alternately with the unpruned bundle's, likewise from a file."""
        return self._kept(f"{_file(configuration)}.timing.json", lambda: self._timing(configuration, label))

    def timing(self, configuration: Configuration) -> dict[str, Any] | None:
        """What ``time`` found, if it was called before."""
        path = self.folder / f"{_file(configuration)}.timing.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            partial.write_text(json.dumps(make()))
            partial.rename(path)
        return json.loads(path.read_text())

    def _outcomes(self, configuration: Configuration, label: str) -> dict[str, Any]:
        originals = self._originals
        columns: dict[str, list[Any]] = {key: [] for key in ("full", "pruned", "kl", "top1", "ipr_full", "ipr")}
        with self._bundle(configuration, label) as model:
            engine = Engine(model, NEW_TOKENS, self._features)
            count = flops.from_manifest(model.bundle.manifest)
            begin = time.perf_counter()
            for number, sample in enumerate(self._samples):
                _progress(label, number, len(self._samples))
                tokens, expected = originals[f"tokens-{number}"].tolist(), originals[f"logits-{number}"]
                [(logits, _)] = engine.forced([sample], [tokens])
                columns["full"].append(engine.text(tokens))
                columns["pruned"].append(engine.text(engine.free([sample], [logits], [tokens])[0]))
                columns["kl"].append(metrics.kl_divergence(expected, logits).tolist())
                columns["top1"].append(metrics.top1_matches(expected, logits).tolist())
            seconds = {"engine": time.perf_counter() - begin}
        begin = time.perf_counter()
        _say(f"{label}: spectra")
        original = self._original(1, configuration.modules)
        for number, sample in enumerate(self._samples[:SPECTRUM]):
            columns["ipr_full"].append(originals[f"ipr-{number}"].tolist())
            # without stages it would be the same run
            pruned = configuration.plan.stages and original.greedy(configuration.plan, sample, keep_hidden=True)
            columns["ipr"].append(_spectra(pruned) if pruned else columns["ipr_full"][-1])
        seconds["spectra"] = time.perf_counter() - begin
        return {
            "name": configuration.name,
            "method": configuration.plan.method,
            "stages": configuration.stages,
            "layer": min((stage.layer for stage in configuration.plan.stages), default=None),
            "flops": flops.summary(count, TEXT_TOKENS, "counted from the graph"),
            "seconds": seconds,
            "reference": [sample.answer for sample in self._samples],
            "form": self._forms,
            **columns,
        }

    def _timing(self, configuration: Configuration, label: str) -> dict[str, Any]:
        with self._bundle(configuration, label) as model:
            _say(f"{label}: {ROUNDS} rounds")
            return bench.bench(
                model.pipeline, self._unpruned.pipeline, text_tokens=TEXT_TOKENS, rounds=ROUNDS, new_tokens=0
            )

    @contextmanager
    def _bundle(self, configuration: Configuration, label: str) -> Iterator[Model]:
        """Its bundle, loaded; on disk only so long."""
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            export(
                self.checkpoint,
                configuration.plan,
                Path(folder) / "bundle",
                modules=configuration.modules,
                graphs=self._graphs,
            )
            _say(f"{label}: exported in {time.perf_counter() - begin:.1f} s")
            yield load(Path(folder) / "bundle")

    @functools.cached_property
    def _unpruned(self) -> Model:
        with self._bundle(Configuration("none", Plan("none")), "none") as model:
            return model

    @functools.cached_property
    def _originals(self) -> dict[str, np.ndarray]:
        """Of the unpruned PyTorch model, by question: tokens [T], logits [T, V], and the first ones' IPR [layers]."""
        path = self.folder / "originals.npz"
        if not path.exists():
            arrays = {}
            original = self._original(NEW_TOKENS)
            for number, sample in enumerate(self._samples):
                _progress("PyTorch, unpruned", number, len(self._samples))
                run = original.greedy(Plan("none"), sample, keep_hidden=number < SPECTRUM)
                arrays |= {f"tokens-{number}": np.array(run.tokens), f"logits-{number}": run.logits}
                if number < SPECTRUM:
                    arrays[f"ipr-{number}"] = np.array(_spectra(run))
            partial = path.with_name("partial.npz")
            np.savez(partial, **arrays)
            partial.rename(path)
        with np.load(path) as stored:
            return dict(stored)

    @functools.cached_property
    def _torch(self) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
        return load_model(self.checkpoint, dtype=torch.float32), load_processor(self.checkpoint)

    def _original(self, new_tokens: int, modules: Modules | None = None) -> Original:
        return Original(*self._torch, self.checkpoint, new_tokens, modules)


def _file(configuration: Configuration) -> str:
    return configuration.name + (f"-{configuration.digest}" if configuration.digest else "")


def _spectra(run: Greedy) -> list[float]:
    """IPR of the rows that enter each decoder layer."""
    return [metrics.ipr(states) for _, states in sorted(run.hidden.items())]


def _progress(label: str, done: int, total: int) -> None:
    if done % 100 == 0:
        _say(f"{label}: {done} of {total}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
