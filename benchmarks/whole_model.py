"""A whole bundle against PyTorch at several batch sizes, each PyTorch answer computed once: what `verify` would take
twice, and more, for models of a billion parameters.

    python benchmarks/whole_model.py BUNDLE --reference CHECKPOINT --data FILE.jsonl --work results.jsonl \
        [--batch-sizes 1 4] [--max-new-tokens 64]

Parity only, by the functions that `tokprune verify` has. Each question's figures are a line of --work, so that a run
that was stopped goes on; one JSON line at the end, and exit code 1 if a greedy token or a kept set differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
from tokprune.export.sides import Engine, Greedy, Original
from tokprune.runtime import verification
from tokprune.runtime.chat import load
from tokprune.runtime.data import Sample, read_samples


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", required=True, help="the checkpoint that the bundle was made from")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="file of results; what it has is not done again")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    samples, largest = read_samples(given.data), max(given.batch_sizes)
    done = [json.loads(line) for line in given.work.read_text().splitlines()] if given.work.exists() else []
    model, checkpoint = load(given.bundle), find_checkpoint(given.reference)
    plan = model.bundle.manifest.plan
    original = Original(
        load_model(checkpoint, dtype=torch.float32), load_processor(checkpoint), checkpoint, given.max_new_tokens
    )
    for at in range(len(done) // len(given.batch_sizes), len(samples), largest):
        group, began = samples[at : at + largest], time.monotonic()
        references = [original.greedy(plan, sample) for sample in group]
        found = []
        for size in given.batch_sizes:
            # image features are computed anew for each size
            engine = Engine(model, given.max_new_tokens)
            for first in range(0, len(group), size):
                part = slice(first, first + size)
                found += _compared(engine, group[part], references[part], size)
        with given.work.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        done += found
        print(f"{at + len(group)} of {len(samples)}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    result = {str(size): _summary([row for row in done if row["batch"] == size]) for size in given.batch_sizes}
    print(json.dumps(result))
    return 0 if all(row["greedy_equal"] and row["kept_equal_margin"] for row in done) else 1


def _compared(
    engine: Engine, samples: Sequence[Sample], references: Sequence[Greedy], size: int
) -> list[dict[str, Any]]:
    """The figures of one batch."""
    forced = [reference.tokens for reference in references]
    runs = engine.forced(samples, forced)
    free = engine.free(samples, [logits for logits, _ in runs], forced)
    rows = []
    for (logits, kept), tokens, reference in zip(runs, free, references, strict=True):
        sets = [(k.indices, s.indices, s.scores) for k, s in zip(kept, reference.selections, strict=True)]
        parity = verification.parity_summary([verification.parity_sample(logits, reference.logits, sets)])
        rows.append({
            "batch": size,
            "tokens": len(tokens),
            "greedy_equal": tokens == reference.tokens,
            **{key: parity[key] for key in ("max_rel_logit_diff", "kept_overlap", "kept_equal_margin")},
        })  # fmt: skip
    return rows


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "samples": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "greedy_agreement": sum(row["greedy_equal"] for row in rows) / len(rows),
        "kept_equal_margin": sum(row["kept_equal_margin"] for row in rows) / len(rows),
        "kept_overlap": sum(row["kept_overlap"] for row in rows) / len(rows),
        # None of a question whose tokens parted at once
        "max_rel_logit_diff": max((d for row in rows if (d := row["max_rel_logit_diff"]) is not None), default=None),
    }


if __name__ == "__main__":
    sys.exit(main())
