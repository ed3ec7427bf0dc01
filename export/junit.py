"""``tokprune verify --junit``: gates as test cases in JUnit XML, which CI systems read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tokprune.export.text import shorten, visible
from tokprune.export.verify import Outcome
from tokprune.runtime.data import Sample
from tokprune.runtime.output import whole_file
from tokprune.runtime.report import number

_LISTED = 60  # samples whose differences are written out


def write_junit(
    path: Path, result: Mapping[str, Any], samples: Sequence[Sample], outcomes: Sequence[Outcome], seconds: float
) -> None:
    """Write ``tokprune verify``'s JSON object, the gates in it, as JUnit XML to ``path``, whole or not at all.

    A gate is a test case. Samples in which the engine and PyTorch with the same pruning differ are one more, skipped
    if there are any: what they may be is for gates to say, and the suite fails just when ``verify`` does.
    Raises UserError if the file cannot be written.
    """
    root = junit(result, samples, outcomes, seconds)
    with whole_file(path, "JUnit file") as partial:
        ElementTree.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)


def junit(
    result: Mapping[str, Any], samples: Sequence[Sample], outcomes: Sequence[Outcome], seconds: float
) -> ElementTree.Element:
    """The document; ``seconds`` is what all of it took."""
    differing = [(at, *pair) for at, pair in enumerate(zip(samples, outcomes, strict=True), 1) if not pair[1].is_equal]
    counts = {
        "name": "tokprune verify",
        "tests": str(len(result["gates"]) + 1),
        "failures": str(sum(not gate["passed"] for gate in result["gates"])),
        "errors": "0",
        "time": f"{seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", counts)  # whose schema knows no skipped
    skipped = {"skipped": str(int(bool(differing))), "timestamp": result["compared"]["finished"]}
    suite = ElementTree.SubElement(root, "testsuite", {**counts, **skipped})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _figures("", {key: part for key, part in result.items() if key != "gates"}):
        ElementTree.SubElement(properties, "property", {"name": visible(name), "value": visible(value)})
    for gate in result["gates"]:
        case = _case(suite, gate["name"])
        if not gate["passed"]:
            value = "none: nothing was left to compare" if gate["value"] is None else number(gate["value"])
            message = f"limit {number(gate['limit'])}, value {value}"
            failure = ElementTree.SubElement(case, "failure", {"message": message, "type": "gate"})
            failure.text = f"{gate['name']}: {message}"
    case = _case(suite, "samples_equal_pytorch")
    if differing:
        message = f"{len(differing)} of {len(outcomes)} samples differ from PyTorch with the same pruning; no gate"
        ElementTree.SubElement(case, "skipped", {"message": message})
        lines = [_difference(*entry) for entry in differing[:_LISTED]]
        if len(differing) > _LISTED:
            lines.append(f"{len(differing) - _LISTED} more are left out")
        ElementTree.SubElement(case, "system-out").text = visible("\n".join(lines))
    ElementTree.indent(root)
    return root


def _case(suite: ElementTree.Element, name: str) -> ElementTree.Element:
    """A test case: a comparison that takes no time of its own."""
    return ElementTree.SubElement(suite, "testcase", {"classname": "tokprune.verify", "name": name, "time": "0"})


def _figures(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """All numbers and texts in a JSON value, their keys joined by dots; null has none."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _figures(f"{name}.{key}" if name else key, part)
    elif isinstance(value, (list, tuple)):
        for order, part in enumerate(value):
            yield from _figures(f"{name}.{order}", part)
    elif value is not None:
        yield name, str(value)


def _difference(at: int, sample: Sample, outcome: Outcome) -> str:
    parity = outcome.parity
    logits = number(parity.max_abs_logit_diff) if math.isfinite(parity.max_abs_logit_diff) else "not finite"
    return (
        f"sample {at}: {shorten(sample.prompt)!r}: PyTorch {shorten(outcome.reference)!r}, "
        f"engine {shorten(outcome.consistency.pruned)!r}, first other token {parity.first_divergence}, "
        f"kept tokens shared {parity.kept_overlap:.4f}, largest logit difference {logits}"
    )
