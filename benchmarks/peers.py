"""The reference model against what one would use instead, on this machine's CPU: time, memory, and the same logits.

    python benchmarks/peers.py --work DIR --only-prepare [--peer-python openvino=PATH]      # checkpoint, conversions
    python benchmarks/peers.py --work DIR [--docs docs/performance.md]                      # on a quiet machine

A prefill is products: its limit is the FP32 GEMM peak. A decode step reads every weight and the caches once: its limit
is the memory's bandwidth. Both are measured in the same run, and each result is held against its limit.

Contestants take turns, A B C A B C, each answer about another image. A turn is a process of its own, so that its
memory and its loading are its own; it answers once to warm up, then --answers times. A turn that is done is a file
below --results, so that a run that was stopped goes on. Ends in tables in Markdown and one JSON line; exit code 1 if
one of ours failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import analysis, bars, plots, tables
from contest.contestants import Contestant, Pruning, contestants
from contest.jobs import Failed, host, run_command, run_job, say
from contest.workshop import TOKPRUNE, Workshop
from study.tables import put
from tokenizers import Tokenizer

from tokprune.runtime.config import model_facts
from tokprune.runtime.errors import UserError

PROMPT = "USER: <image>\n{text} ASSISTANT:"
TEXT = "What is in this picture, and on its left?"  # 40 tokens with the prompt's, of the reference's tokenizer
IMAGES = 9  # the first one warms up
WORKING_SETS = [1 << shift for shift in range(27, 32)]  # 128 MiB to 2 GiB
LIMIT_SECONDS = 0.4
WITHOUT_LOGITS = ("openvino_peer",)  # modules whose answers hold none: they are computed apart

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, make, measure, print; 2 if what was asked for is at fault."""
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Prepare, measure, report: the exit code."""
    page = options.docs
    if page is not None and not page.is_file():
        raise UserError(f"--docs {page} is no file: give the page whose tables are to be written")
    pythons = _pythons(options.peer_python)
    if options.model is not None and not (options.model / "config.json").is_file():
        raise UserError(f"--model {options.model} has no config.json: give a checkpoint's directory")
    task: Row = {"text": TEXT, "prompt": PROMPT.format(text=TEXT)}
    task |= {"new_tokens": options.new_tokens, "threads": options.threads or len(os.sched_getaffinity(0))}
    try:
        workshop = Workshop(options.work, options.model, options.size, task, pythons)
    except Failed as error:
        raise UserError(f"the reference checkpoint could not be made ({error}): see {options.work / 'logs'}") from None
    facts = _facts(workshop.checkpoint)
    task["tokens"] = _tokens(workshop.checkpoint) + facts.vision.tokens
    workshop.draw(IMAGES, facts.vision.image_size)
    chosen = _chosen(contestants(options.layer, options.keep, _has_slot(options.work, task)), options.only)

    made, reasons = _prepared(workshop, chosen)
    if options.only_prepare:
        return int(any(c.is_ours and c.name in reasons for c in chosen))
    load = os.getloadavg()[0]
    results = options.results or options.work / "rounds"
    found, machine = _measured(workshop, chosen, made, reasons, results, options)
    limits = analysis.limits(machine)
    checks = {
        c.name: _checked(workshop, c, made[c.name], results / "0" / f"{c.name}.json")
        for c in chosen
        if c.name not in reasons
    }
    rows = [
        analysis.missing(c, reasons[c.name])
        if c.name in reasons
        else analysis.row(c, made[c.name], found[c.name], checks[c.name], limits, facts, task)
        for c in chosen
    ]
    report = {
        "machine": host(load),
        "limits": limits,
        "task": task | {"text_tokens": task["tokens"] - facts.vision.tokens},
        "rounds": options.rounds,
        "answers": options.answers,
        "rows": rows,
        "bars": bars.bars(rows, limits, options.layer, options.keep[0]),
    }
    shown = tables.all_tables(report)
    plots.save(report, results / "peers.png")
    if page is not None:
        put(page, shown)
        plots.save(report, page.with_suffix(".png"))
    if not options.json:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in shown.items()))
    print(json.dumps(report))
    return int(any(row["is_ours"] and row["reason"] for row in rows))


def _prepared(workshop: Workshop, chosen: Sequence[Contestant]) -> tuple[Row, dict[str, str]]:
    """What each contestant runs, and why others do not; logits that answers do not hold are computed here, too."""
    made: Row = {}
    reasons: dict[str, str] = {}
    for contestant in chosen:
        try:
            made[contestant.name] = workshop.prepare(contestant)
            if contestant.module in WITHOUT_LOGITS:
                _logits(workshop, contestant, made[contestant.name]["path"], made[contestant.name]["key"])
        except Failed as error:
            reasons[contestant.name] = str(error)
            say(f"{contestant.name}: {error}")
    for pruning in dict.fromkeys(c.pruning for c in chosen if c.name not in reasons):
        say(f"PyTorch's logits, {pruning}")
        try:
            _reference(workshop, pruning)
        except Failed as error:
            raise UserError(f"PyTorch gave no logits ({error}): see {workshop.work / 'logits'}") from None
    return made, reasons


def _measured(
    workshop: Workshop,
    chosen: Sequence[Contestant],
    made: Row,
    reasons: dict[str, str],
    results: Path,
    options: argparse.Namespace,
) -> tuple[dict[str, list[Row]], list[Row]]:
    """Each contestant's turns, and the machine's limits, by round; who fails is added to ``reasons`` and left out."""
    found: dict[str, list[Row]] = {}
    machine = []
    for number in range(options.rounds):
        folder = results / str(number)
        machine.append(_limits(workshop, folder))
        order = [c for c in chosen if c.name not in reasons]
        for place, contestant in enumerate(order[:: -1 if number % 2 else 1], 1):
            say(f"round {number + 1} of {options.rounds}, {place} of {len(order)}: {contestant.name}")
            try:
                result = _turn(workshop, contestant, made[contestant.name], folder, number, options)
                found.setdefault(contestant.name, []).append(result)
            except Failed as error:
                reasons[contestant.name] = str(error)
                say(f"{contestant.name}: {error}")
    return found, machine


def _reference(workshop: Workshop, pruning: Pruning) -> tuple[np.ndarray, list[int]]:
    """PyTorch's first-token logits and greedy tokens under that pruning, for the first image. Raises Failed."""
    reference = Contestant(f"reference-{pruning}", "pytorch", "fp32", "fp32", pruning, options=pruning.options)
    return _logits(workshop, reference, str(workshop.checkpoint), "")


def _logits(workshop: Workshop, contestant: Contestant, path: str, key: str) -> tuple[np.ndarray, list[int]]:
    """Of a contestant whose answers do not hold them."""
    folder = workshop.work / "logits"
    job = workshop.job(contestant, path, workshop.images[:1])
    job |= {"do": "logits", "to": str(folder / f"{contestant.name}.npy")}
    result = _once(workshop.python(contestant), job, folder / f"{contestant.name}.json", key)
    return np.load(job["to"]), result["tokens"]


def _checked(workshop: Workshop, contestant: Contestant, made: Row, turn: Path) -> Row:
    """First-token logits of a contestant's first turn against PyTorch's with the same pruning."""
    wanted, expected = _reference(workshop, contestant.pruning)
    if contestant.module in WITHOUT_LOGITS:
        logits, _ = _logits(workshop, contestant, made["path"], made["key"])
    else:
        logits = np.load(turn.with_suffix(".npy"))
    tokens = json.loads(turn.read_text(encoding="utf-8"))["first"]["tokens"]
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(tokens))
    return analysis.compared(logits, wanted) | {"same_tokens": same, "tokens": len(tokens)}


def _turn(
    workshop: Workshop, contestant: Contestant, made: Row, folder: Path, number: int, options: argparse.Namespace
) -> Row:
    """One contestant's turn in round ``number``."""
    warm, *others = workshop.images
    first = number * options.answers
    images = [others[(first + i) % len(others)] for i in range(options.answers)]
    job = workshop.job(contestant, made["path"], [warm, *images])
    job |= {"do": "measure", "to": str(folder / f"{contestant.name}.npy")}
    # tokens are compared in the first round
    job["warm_tokens"] = options.new_tokens if number == 0 else min(2, options.new_tokens)
    return _once(workshop.python(contestant), job, folder / f"{contestant.name}.json", made["key"])


def _limits(workshop: Workshop, folder: Path) -> Row:
    say("the machine's limits")
    options = {"seconds": LIMIT_SECONDS, "working_sets": WORKING_SETS}
    machine = Contestant("limits", "machine", "", "", options=options)
    job = workshop.job(machine, "", workshop.images[:1]) | {"do": "measure", "to": "", "warm_tokens": 1}
    try:
        return _once(sys.executable, job, folder / "limits.json", "")
    except Failed as error:
        raise UserError(f"the machine's limits could not be measured ({error}): see {folder}") from None


def _once(python: str, job: Row, result: Path, key: str) -> Row:
    """The job's result, from its file if the same job has been done on what is the same by ``key``."""
    known = hashlib.sha256(json.dumps([job, key], sort_keys=True).encode()).hexdigest()
    note = result.with_suffix(".key")
    if result.exists() and note.exists() and note.read_text(encoding="utf-8") == known:
        return json.loads(result.read_text(encoding="utf-8"))
    note.unlink(missing_ok=True)
    found = run_job(python, job, result)
    note.write_text(known, encoding="utf-8")
    return found


def _has_slot(work: Path, task: Row) -> bool:
    """Whether this tokprune builds for the CPU."""
    work.mkdir(parents=True, exist_ok=True)
    said = run_command([*TOKPRUNE, "build", "--help"], work / "help.log", task["threads"])["output"]
    targets = re.search(r"--target \[([^\]]*)\]", said.replace("\n", ""))
    return targets is not None and "cpu" in re.split(r"[|\s]+", targets[1])


def _facts(checkpoint: Path) -> Any:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return model_facts(config, checkpoint.name)


def _tokens(checkpoint: Path) -> int:
    """Text tokens of the prompt."""
    return len(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(PROMPT.format(text=TEXT)).ids) - 1


def _chosen(known: list[Contestant], wanted: list[str] | None) -> list[Contestant]:
    names = [contestant.name for contestant in known]
    for name in wanted or []:
        if name not in names:
            raise UserError(f"--only names {name}, which is none of {', '.join(names)}: give one of these")
    return [contestant for contestant in known if not wanted or contestant.name in wanted]


def _pythons(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in ("openvino", "llama") or not os.access(path, os.X_OK):
            raise UserError(f"--peer-python {text} is not openvino=PATH or llama=PATH of a Python: correct it")
        found[name] = path
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoint, bundles, conversions")
    parser.add_argument("--results", type=Path, help="directory for turns that are done [WORK/rounds]")
    parser.add_argument("--size", default="reference", help="of the checkpoint that is made (see make_checkpoint.py)")
    parser.add_argument("--model", type=Path, help="a checkpoint in place of one that is made")
    parser.add_argument("--layer", type=int, default=2, help="before which ours prune")
    parser.add_argument("--keep", type=int, nargs="+", default=[64, 192], help="visual tokens that they keep")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants; others do not take part")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="openvino, llama")
    parser.add_argument("--rounds", type=_positive, default=3)
    parser.add_argument("--answers", type=_positive, default=2, help="measured in each turn")
    parser.add_argument("--new-tokens", type=_positive, default=32)
    parser.add_argument("--threads", type=int, default=0, help="of each contestant; 0: all cores")
    parser.add_argument("--only-prepare", action="store_true", help="make and check everything, measure nothing")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to put tables into, and a picture beside")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestant at work ends, too
    sys.exit(main())
