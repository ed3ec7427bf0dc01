"""The consistency study: what each pruning method changes in the demo model's answers, and whether ΔIPR tells.

    python benchmarks/consistency.py --work DIR [--modules DIR ...] [--config NAME ...] [--docs docs/consistency.md]
    python benchmarks/consistency.py --work DIR --timing ...      # on a quiet machine

Draws held-out demo questions, answers them once with the unpruned model in PyTorch, then with every pruned
bundle in ONNX Runtime: answers freely generated, distributions forced on the original's tokens. Each
configuration's outcomes are a JSON file in the work directory, so that a run that was stopped goes on where it
was, and statistics, tables and plots can be made again without a run. Ends with tables in Markdown and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from study import analysis, grid, plots, tables
from study.measure import Study
from threadpoolctl import threadpool_limits

from tokprune.export.demo import MODULES, modules_dir


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for questions and results")
    parser.add_argument("--model", default="demo", help="checkpoint directory, or 'demo'")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="another seed, other questions")
    parser.add_argument("--config", nargs="+", metavar="NAME", help="as lofi-1:16-r8, random-1:16-s2, none [grid]")
    parser.add_argument("--modules", nargs="*", type=Path, help="lvpruning's, each for its stages [those shipped]")
    parser.add_argument("--timing", action="store_true", help="time every configuration's prefill, too")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to put tables into, and plots beside")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args(arguments)
    study = Study(options.model, options.work, options.questions, options.seed)
    facts = study.checkpoint.facts
    configurations = [grid.named(name, facts) for name in options.config or grid.default_grid(facts)]
    shipped = [modules_dir(name) for name in MODULES] if options.model == "demo" else []
    for directory in shipped if options.modules is None else options.modules:
        configurations += grid.trained(directory, facts)
    labels = [f"[{number}/{len(configurations)}] {c.name}" for number, c in enumerate(configurations, 1)]
    with threadpool_limits(1, "blas"):  # the reference's small SVDs were up to twenty times slower on all cores
        outcomes = [study.measure(*pair) for pair in zip(configurations, labels, strict=True)]
    if options.timing:
        for pair in zip(configurations, labels, strict=True):
            study.time(*pair)
    report = analysis.report(outcomes, [study.timing(configuration) for configuration in configurations])
    found = tables.all_tables(report)
    if options.docs is not None:
        tables.put(options.docs, found)
        plots.save_all(report, options.docs.parent)
    if not options.json:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in found.items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
