"""How prefill time grows with kept tokens, prune layer, context and batch, held against the FLOPs model.

    python benchmarks/scaling.py --work DIR [--docs docs/performance.md]            # about 5 minutes on two cores

Products take almost all of a prefill, so its time should be a + FLOPs / rate: least squares of relative errors over all
points, with FLOPs as the manifest counts them at the true shapes. Where a point is more than 10 % off, a second model
says why: the selector as its own clock has it, and attention, whose products are many small ones beside a softmax, at a
rate of its own. Image features are random, so no vision tower runs. Points take turns, in one process; a round that is
done is a file below --results. Ends in a table, a picture and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from contest.growth import TOLERANCE, fit
from contest.jobs import Failed, run_command, say
from contest.tables import table
from contest.workshop import TOKPRUNE
from hub_files import Size
from make_checkpoint import make_checkpoint
from matplotlib.figure import Figure
from study.plots import DPI, SETTINGS
from study.tables import put

from tokprune.export.checkpoint import Checkpoint, find_checkpoint
from tokprune.export.pipeline import Graphs, export
from tokprune.runtime.chat import load
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import make_limits
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.pipeline import Meter, Pipeline
from tokprune.runtime.plan import Plan, Rank, make_plan

SIZE = Size(hidden=512, intermediate=1408, layers=8, heads=8, vision_hidden=64, vision_intermediate=64, vision_heads=1)
TEXT, LAYER, KEEP, RANK = 40, 2, 64, 8
KEPT, LAYERS = (16, 64, 128, 192, 320, 448), (0, 1, 2, 4, 6)
BATCHES, IMAGES = (1, 2, 4, 8), (1, 2, 3, 4, 5, 6)
TEXTS = (64, 256, 616, 1024, 2048, 4095)

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One prefill: ``series`` is what varies, to ``x``; ``keep`` 0 is unpruned."""

    series: str
    x: int
    layer: int
    keep: int
    text: int
    images: int = 1
    batch: int = 1

    @property
    def bundle(self) -> str:
        return f"lofi-{self.layer}-{self.keep}" if self.keep else "none"


def points(facts: ModelFacts) -> list[Point]:
    """What is measured of a model: less of each where it is smaller than the default one."""
    tokens, room = facts.vision.tokens, facts.context - 1
    text, layer = min(TEXT, room - tokens), min(LAYER, facts.layers - 1)
    keep = KEEP if tokens > KEEP else max(1, tokens // 4)
    kept = sorted({max(1, value * tokens // 576) for value in KEPT})
    found = [Point("kept tokens", value, layer, value, text) for value in kept]
    found.append(Point("kept tokens", tokens, 0, 0, text))
    layers = [value for value in LAYERS if value < facts.layers]
    found += [Point("prune layer", value, value, keep, text) for value in layers]
    counts = [count for count in IMAGES if text + count * tokens <= room]
    found += [Point("images, pruned", text + n * tokens, layer, keep, text, n) for n in counts]
    found += [Point("images, unpruned", text + n * tokens, 0, 0, text, n) for n in counts]
    found += [Point("text alone", value, 0, 0, value, 0) for value in TEXTS if value <= room]
    found += [Point("batch, pruned", value, layer, keep, text, 1, value) for value in BATCHES]
    found += [Point("batch, unpruned", value, 0, 0, text, 1, value) for value in BATCHES]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, make, measure, print; 2 if what was asked for is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoint, bundles and rounds")
    parser.add_argument("--results", type=Path, help="directory for rounds that are done [WORK/rounds]")
    parser.add_argument("--model", help="a checkpoint in place of the one that is made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--graphs", choices=("slot", "neutral"), default="slot", help="of --target cpu, or the bundle's"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to put tables into, and a picture beside")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args(arguments)
    try:
        if options.rounds < 1:
            raise UserError(f"--rounds {options.rounds} was asked for: give 1 or more")
        if options.docs is not None and not options.docs.is_file():
            raise UserError(f"--docs {options.docs} is no file: give the page whose tables are to be written")
        report = run(options)
    except (UserError, Failed) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    shown = tables(report)
    if options.docs is not None:
        put(options.docs, shown)
        plot(report, options.docs.with_name(f"{options.docs.stem}-scaling.png"))
    if not options.json:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in shown.items()))
    print(json.dumps(report))
    return 0


def run(options: argparse.Namespace) -> Row:
    """Measure what is missing, and fit."""
    options.work.mkdir(parents=True, exist_ok=True)
    own = options.work / "checkpoint"
    if options.model is None and not own.exists():
        make_checkpoint(own, SIZE, dtype="float32")
    checkpoint = find_checkpoint(options.model or str(own))
    wanted = points(checkpoint.facts)
    pipelines = _pipelines(checkpoint, wanted, options)
    rounds = [_round(number, wanted, pipelines, options) for number in range(options.rounds)]
    rows = []
    for index, point in enumerate(wanted):
        ms = [found[index]["ms"] for found in rounds]
        rows.append({
            **vars(point),
            "ms": float(np.median(ms)),
            "ms_low": min(ms),
            "ms_high": max(ms),
            "selector_ms": float(np.median([found[index]["selector_ms"] for found in rounds])),
            "flops": rounds[0][index]["flops"],
            "attention_flops": attention_flops(checkpoint.facts, point),
        })  # fmt: skip
    threads = options.threads or _cores()
    machine = {"date": time.strftime("%Y-%m-%d"), "load": round(os.getloadavg()[0], 2), "threads": threads}
    engine = next(iter(pipelines.values())).backend.name
    return {"engine": engine, "rounds": options.rounds, "machine": machine, **fit(rows), "rows": rows}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _pipelines(checkpoint: Checkpoint, wanted: Sequence[Point], options: argparse.Namespace) -> dict[str, Pipeline]:
    graphs: Graphs = {}
    facts, found = checkpoint.facts, {}
    limits = make_limits(facts.context, max_batch=max(BATCHES))
    for point in wanted:
        out = options.work / point.bundle
        if point.bundle not in found:
            if not out.exists():
                say(f"exporting {point.bundle}")
                stages = [(point.layer, point.keep)]
                sizes = {"layers": facts.layers, "visual_tokens": facts.vision.tokens, "rank": Rank(components=RANK)}
                plan = make_plan("lofi", stages, **sizes) if point.keep else Plan("none")
                export(checkpoint, plan, out, graphs=graphs, limits=limits)
            if options.graphs == "slot":  # quick where it is there
                build = [*TOKPRUNE, "build", str(out), "--target", "cpu"]
                run_command(build, options.work / f"{point.bundle}.log", options.threads or _cores())
            engine = "auto" if options.graphs == "slot" else "onnxruntime-neutral"
            found[point.bundle] = load(out, engine=engine, threads=options.threads).pipeline
    return found


def _round(
    number: int, wanted: Sequence[Point], pipelines: dict[str, Pipeline], options: argparse.Namespace
) -> list[Row]:
    """Each point once, backwards in every other round; the first round's are warmed up."""
    folder = options.results or options.work / "rounds"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{number}.json"
    key = [options.model, options.threads, pipelines["none"].backend.name, [vars(point) for point in wanted]]
    if file.exists() and (known := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
        return known["found"]
    say(f"round {number + 1} of {options.rounds}")
    found: list[Row] = [{} for _ in wanted]
    for index, point in list(enumerate(wanted))[:: -1 if number % 2 else 1]:
        for _ in range(2 if number == 0 else 1):
            found[index] = prefill(pipelines[point.bundle], point)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "found": found}), encoding="utf-8")
    partial.rename(file)
    return found


def prefill(pipeline: Pipeline, point: Point) -> Row:
    """One prefill, all but the vision tower: ms from ids to logits, the selector's ms, FLOPs."""
    facts = pipeline.facts
    shape = (point.batch * point.images, facts.vision.tokens, facts.hidden)
    features = np.random.default_rng(point.x).standard_normal(shape, dtype=np.float32) if point.images else None
    filler = 0 if facts.image_token_id != 0 else 1
    ids = [facts.image_token_id] * facts.vision.tokens * point.images + [filler] * point.text
    meter, state = Meter(), pipeline.new_state(point.batch)
    begin = time.perf_counter()
    pipeline.forward(state, [ids] * point.batch, meter, image_features=features)
    selector = sum(ms for name, ms in meter.ms.items() if name.startswith("select_"))
    return {"ms": 1e3 * (time.perf_counter() - begin), "selector_ms": selector, "flops": sum(meter.flops.values())}


def attention_flops(facts: ModelFacts, point: Point) -> int:
    """QKᵀ and PV of a point's decoder layers; of the FLOPs that the manifest counts, those that grow with S²."""
    before = point.text + point.images * facts.vision.tokens
    pruned = point.keep and point.images
    after = point.text + point.images * point.keep if pruned else before
    first = point.layer if pruned else facts.layers
    squares = first * before**2 + (facts.layers - first) * after**2
    return 4 * point.batch * squares * facts.heads * facts.head_dim


def tables(report: Row) -> dict[str, str]:
    """By their names on the page."""
    model, explained, machine = report["model"], report["explained"], report["machine"]
    head = ["varies", "", "ms [least, most]", "GFLOP", "model ms", "deviation"]
    lines = []
    for row in report["rows"]:
        times = f"{row['ms']:.1f} [{row['ms_low']:.1f}, {row['ms_high']:.1f}]"
        guess = f"{row['ms'] / (1 + row['deviation']):.1f}"
        lines.append(
            [row["series"], row["x"], times, f"{row['flops'] / 1e9:.1f}", guess, f"{100 * row['deviation']:+.0f} %"]
        )
    off = [row for row in report["rows"] if abs(row["deviation"]) > TOLERANCE]
    shares = [
        [row["series"], row["x"], f"{100 * row['deviation']:+.0f} %"]
        + [f"{100 * row['shares'][key]:.0f} %" for key in ("selector", "attention", "overhead")]
        + [f"{100 * row['deviation_explained']:+.0f} %"]
        for row in off
    ]
    attention = explained["attention_gflops"]
    said = (
        f"{machine['date']}, {report['engine']}, {machine['threads']} threads, {report['rounds']} rounds, load "
        f"{machine['load']}: {model['overhead_ms']:.1f} ms + FLOPs at {model['gflops'] or 0:.0f} GFLOP/s. Explained: "
        f"selector as measured, {explained['overhead_ms']:.1f} ms, products with weights at "
        f"{explained['linear_gflops'] or 0:.0f} GFLOP/s, attention at "
        + (f"{attention:.0f} GFLOP/s." if attention else "no cost that shows.")
    )
    columns = ["varies", "", "deviation", "selector", "attention", "overhead", "left when explained"]
    return {
        "scaling": f"{said}\n\n{table(head, lines)}",
        "deviations": table(columns, shares) if shares else "None is more than 10 % off.",
    }


def plot(report: Row, path: Path) -> None:
    """Measured over FLOPs, with the model's line; a panel for each of what varies."""
    series = list(dict.fromkeys(row["series"] for row in report["rows"]))
    model = report["model"]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(1 + 1.9 * len(series), 3), layout="constrained")
        for ax, name in zip(figure.subplots(1, len(series)), series, strict=True):
            rows = [row for row in report["rows"] if row["series"] == name]
            x, ms = [row["x"] for row in rows], [row["ms"] for row in rows]
            low, high = ([abs(row["ms"] - row[key]) for row in rows] for key in ("ms_low", "ms_high"))
            ax.errorbar(x, ms, [low, high], fmt="o", color="#0072B2", markersize=4, label="measured")
            guess = [row["ms"] / (1 + row["deviation"]) for row in rows]
            ax.plot(x, guess, color="#D55E00", label=f"{model['overhead_ms']:.0f} ms + FLOPs")
            ax.set_title(name, loc="left")
            ax.set_ylim(bottom=0)
        figure.axes[0].set_ylabel("prefill, ms")
        figure.axes[0].legend(fontsize=7)
        figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    sys.exit(main())
