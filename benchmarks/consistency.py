"""How consistent each method is with the unpruned original, at several keeps: a table, resumable.

    python benchmarks/consistency.py --work DIR [--questions 1000] [--method lofi ...] [--keep 192 ...]

Draws held-out demo questions, answers them once with the unpruned model in PyTorch, then with every pruned
bundle in ONNX Runtime: answers freely generated, distributions forced on the original's tokens. Each
configuration's result is a JSON file in the work directory, so that a run that was stopped goes on where it
was. Ends with a Markdown table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
from tokprune.export.demo.scenes import demo_data
from tokprune.export.pipeline import export
from tokprune.export.verify import Engine, Original
from tokprune.runtime import flops, metrics
from tokprune.runtime.chat import load
from tokprune.runtime.data import Sample, read_samples
from tokprune.runtime.plan import Plan, make_plan, parse_rank
from tokprune.runtime.verification import ConsistencySample, consistency_summary

TEXT_TOKENS = 12  # about what the demo's questions have, for the FLOPs column


def main() -> None:
    """Parse, measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", nargs="+", default=["lofi", "random", "uniform"])
    parser.add_argument("--keep", nargs="+", type=int, default=[192, 128, 64, 32])
    parser.add_argument("--layer", nargs="+", type=int, default=[2])
    parser.add_argument("--rank", nargs="+", default=["8"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / f"questions-{options.questions}-{options.seed}"
    if not data.exists():
        demo_data(options.questions, data, options.seed)
    samples = read_samples(data / "data.jsonl")
    study = Study(options.model, options.work / data.name.replace("questions", "results"), samples)
    rows = [study.measure("none", Plan("none"))]
    for method, layer, keep in itertools.product(options.method, options.layer, options.keep):
        for rank in options.rank if method == "lofi" else [None]:
            name = f"{method}-{layer}-{keep}" + (f"-r{rank}" if rank else "")
            rows.append(study.measure(name, study.plan(method, layer, keep, rank)))
    print(markdown(rows))
    print(json.dumps(rows))


class Study:
    """One model and its questions; results are kept in ``folder``."""

    def __init__(self, model: str, folder: Path, samples: list[Sample]) -> None:
        self._checkpoint, self._folder, self._samples = find_checkpoint(model), folder, samples
        self._folder.mkdir(exist_ok=True)
        self._features: dict[Path | None, np.ndarray | None] = {}

    def plan(self, method: str, layer: int, keep: int, rank: str | None) -> Plan:
        facts = self._checkpoint.facts
        return make_plan(
            method,
            [(layer, keep)],
            layers=facts.layers,
            visual_tokens=facts.vision.tokens,
            rank=parse_rank(rank) if rank else None,
        )

    def measure(self, name: str, plan: Plan) -> dict[str, Any]:
        """The result of one plan, from its file if it has one."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            result = self._run(name, plan)
            path.write_text(json.dumps(result))
        return json.loads(path.read_text())

    def _originals(self) -> list[dict[str, Any]]:
        """Tokens and logits of the unpruned PyTorch model, from their file if there is one."""
        path = self._folder / "originals.npz"
        if not path.exists():
            model = load_model(self._checkpoint, dtype=torch.float32)
            original = Original(model, load_processor(self._checkpoint), self._checkpoint, max_new_tokens=16)
            arrays = {}
            for number, sample in enumerate(self._samples):
                _progress("PyTorch, unpruned", number, len(self._samples))
                run = original.greedy(Plan("none"), sample)
                arrays |= {f"tokens-{number}": np.array(run.tokens), f"logits-{number}": run.logits}
            np.savez(path, **arrays)
        stored = np.load(path)
        return [
            {"tokens": stored[f"tokens-{n}"].tolist(), "logits": stored[f"logits-{n}"]}
            for n in range(len(self._samples))
        ]

    def _run(self, name: str, plan: Plan) -> dict[str, Any]:
        originals = self._originals()
        bundle = self._folder / f"{name}.bundle"
        if not bundle.exists():
            export(self._checkpoint, plan, bundle)
        engine = Engine(load(bundle), max_new_tokens=16, features=self._features)
        records = []
        for number, (sample, full) in enumerate(zip(self._samples, originals, strict=True)):
            _progress(name, number, len(self._samples))
            logits, _ = engine.forced(sample, full["tokens"])
            tokens = engine.free(sample, logits, full["tokens"])
            records.append(
                ConsistencySample(
                    full=engine.text(full["tokens"]),
                    pruned=engine.text(tokens),
                    reference=sample.answer,
                    kl=metrics.kl_divergence(full["logits"], logits),
                    top1=metrics.top1_matches(full["logits"], logits),
                )
            )
        counter = flops.from_manifest(load(bundle).bundle.manifest)
        summary = flops.summary(counter, TEXT_TOKENS, "counted from the graph")
        return {
            "name": name,
            **consistency_summary(records),
            "prefill_gflops": 1e3 * summary["prefill_tflops"],
            "decoder_reduction": summary["decoder_reduction"],
        }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        "| bundle | decoder FLOPs saved | answers equal [95 %] | accuracy | correct → wrong | wrong → correct "
        "| wrong → other | McNemar p | KL mean | KL p99 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["agreement_wilson95"]
        lines.append(
            f"| {row['name']} | {100 * row['decoder_reduction']:.1f} % "
            f"| {100 * row['agreement']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] "
            f"| {100 * row['accuracy_pruned']:.1f} % | {row['correct_to_wrong']} | {row['wrong_to_correct']} "
            f"| {row['wrong_to_other']} | {row['mcnemar_p']:.2g} | {row['kl_mean']:.3g} | {row['kl_p99']:.3g} |"
        )
    return "\n".join(lines)


def _progress(name: str, done: int, total: int) -> None:
    if done % 50 == 0:
        print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
