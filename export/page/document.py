"""The page of ``tokprune verify --html``, from page.html and style.css: one file, which loads and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tokprune.export.page.charts import flops_bars, ipr_chart
from tokprune.export.page.flips import Flip, draw_pictures, find_flips
from tokprune.export.text import shorten, visible
from tokprune.export.verify import Outcome
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.output import whole_file
from tokprune.runtime.report import (
    NOT_MEASURED,
    consistency_rows,
    flops,
    number,
    parity_rows,
    percent,
    precision_text,
    verdict,
)

# What one page holds at most, so that a browser on a phone opens it. A picture takes 10 to 40 kB, at worst about 150.
SHOWN = 60  # flips; and samples in which engine and PyTorch differ
PICTURES = 240
_IN_A_CELL = 200  # characters
_KINDS = {
    "correct_to_wrong": "Correct → wrong",
    "wrong_to_correct": "Wrong → correct",
    "wrong_to_other": "Wrong → another wrong one",
    "changed": "Changed, no answer expected",
}


def write_page(
    path: Path, result: Mapping[str, Any], samples: Sequence[Sample], outcomes: Sequence[Outcome], model: Model
) -> None:
    """Write the page of ``tokprune verify``'s JSON object to ``path``, whole or not at all.

    ``samples`` and ``outcomes`` [n] give the flips, whose pictures are drawn as ``model`` saw them. Raises UserError
    if the file cannot be written, or an image cannot be read any more.
    """
    text = render_page(result, samples, outcomes, model)
    with whole_file(path, "page") as partial:
        partial.write_text(text, encoding="utf-8")


def render_page(result: Mapping[str, Any], samples: Sequence[Sample], outcomes: Sequence[Outcome], model: Model) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    flips = find_flips(samples, outcomes)
    differing = [(at, *pair) for at, pair in enumerate(zip(samples, outcomes, strict=True), 1) if not pair[1].is_equal]
    plan = model.bundle.manifest.plan
    return environment.get_template("page.html").render(
        result=result,
        style=Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8")),
        name=Path(result["compared"]["bundle"]).name or result["compared"]["bundle"],
        verdict=verdict(result["passed"]),
        tiles=_tiles(result),
        gates=[{**gate, "limit": number(gate["limit"]), "value": number(gate["value"])} for gate in result["gates"]],
        compared=_compared(result),
        parity=parity_rows(result["parity"]),
        consistency=_consistency(result["consistency"]),
        bars=flops_bars(result["flops"]) if result["flops"] else [],
        flops=flops,
        percent=percent,
        chart=ipr_chart(result["consistency"]["ipr"], plan.stages),
        stages=plan.stages,
        answers=len(outcomes),
        flips=len(flips),
        left_out=max(0, len(flips) - SHOWN),
        groups=_groups(flips, model),
        shown=SHOWN,
        differing=[_difference(*entry) for entry in differing[:SHOWN]],
        differing_left_out=max(0, len(differing) - SHOWN),
    )


def _finalize(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _tiles(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures to look at first: what, how much, and what that is of."""
    parity, consistency, counts = result["parity"], result["consistency"], result["flops"]
    tiles = [
        (
            "answers equal to the original's",
            percent(consistency["agreement"]),
            f"95 % interval {_interval(consistency['agreement_wilson95'])}, {consistency['samples']} samples",
        )
    ]
    if consistency["labelled"]:
        tiles.append(
            (
                "right answers, unpruned → pruned",
                f"{percent(consistency['accuracy_full'])} → {percent(consistency['accuracy_pruned'])}",
                f"of {consistency['labelled']} with an expected one; McNemar p {number(consistency['mcnemar_p'])}",
            )
        )
    tiles += [
        ("mean KL, nats", number(consistency["kl_mean"]), f"99th percentile {number(consistency['kl_p99'])}"),
        (
            "parity: greedy tokens equal",
            percent(parity["greedy_agreement"]),
            f"kept sets within the margin {percent(parity['kept_equal_margin'])}",
        ),
        (
            "parity: largest |Δlogit|",
            number(parity["max_abs_logit_diff"]),
            f"{number(parity['max_rel_logit_diff'])} of the largest logit",
        ),
    ]
    if counts:
        whole, pruned = flops(1e12 * counts["prefill_tflops_unpruned"]), flops(1e12 * counts["prefill_tflops"])
        tiles.append(("saved in prefill", percent(counts["reduction"]), f"{whole} → {pruned}"))
    return tiles


def _interval(bounds: Sequence[float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _compared(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    compared = result["compared"]
    rows = [
        ("bundle", compared["bundle"]),
        ("SHA-256 of its manifest", compared["manifest_sha256"]),
        ("plan", result["plan"]),
        ("precision", precision_text(result)),
        ("engine", result["engine"]),
        ("reference, in PyTorch, FP32", compared["reference"]),
        ("data", compared["data"]),
        ("samples", str(result["consistency"]["samples"])),
        ("longest answer, tokens", str(compared["max_new_tokens"])),
        ("samples at a time", str(compared["batch_size"])),
    ]
    if compared["layers"] is not None:
        rows.append(("decoder layers compared", f"the first {compared['layers']}"))
    versions = ", ".join(f"{name} {version}" for name, version in compared["versions"].items())
    return [*rows, ("versions", versions), ("finished, UTC", compared["finished"])]


def _consistency(consistency: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the report in the terminal, and Wilson's interval, which has a width at 0 and 100 %, too."""
    samples, answers, *others = consistency_rows(consistency)
    wilson = _interval(consistency["agreement_wilson95"])
    return [samples, answers, ("the same, Wilson's interval", wilson), *others]


def _groups(flips: Sequence[Flip], model: Model) -> list[dict[str, Any]]:
    """The flips that are shown, by kind, each kind with the number of all it has."""
    room, shown = PICTURES, []
    for flip in flips[:SHOWN]:
        needed = len(flip.sample.images) * (1 + len(model.bundle.manifest.plan.stages))
        pictures = draw_pictures(flip, model) if needed <= room else []
        room -= needed if pictures else 0
        shown.append((flip, {**_answers(flip), "pictures": pictures, "without": bool(needed) and not pictures}))
    return [
        {
            "title": title,
            "count": sum(flip.kind == kind for flip in flips),
            "entries": [entry for flip, entry in shown if flip.kind == kind],
        }
        for kind, title in _KINDS.items()
        if any(flip.kind == kind for flip in flips)
    ]


def _answers(flip: Flip) -> dict[str, Any]:
    consistency = flip.outcome.consistency
    rows = [("unpruned", consistency.full), ("pruned", consistency.pruned)]
    if consistency.reference is not None:
        rows.insert(0, ("expected", consistency.reference))
    if flip.outcome.reference != consistency.pruned:
        rows.append(("pruned, in PyTorch", flip.outcome.reference))
    return {
        "number": flip.number,
        "prompt": shorten(flip.sample.prompt),
        "answers": [(what, shorten(text)) for what, text in rows],
        "kl": number(flip.kl) if math.isfinite(flip.kl) else "not finite",
    }


def _difference(at: int, sample: Sample, outcome: Outcome) -> dict[str, Any]:
    difference = outcome.parity.max_abs_logit_diff
    return {
        "number": at,
        "prompt": shorten(sample.prompt, _IN_A_CELL),
        "reference": shorten(outcome.reference, _IN_A_CELL),
        "engine": shorten(outcome.consistency.pruned, _IN_A_CELL),
        "token": NOT_MEASURED if outcome.parity.first_divergence is None else str(outcome.parity.first_divergence),
        "kept": percent(outcome.parity.kept_overlap),
        "logits": number(difference) if math.isfinite(difference) else "not finite",
    }
