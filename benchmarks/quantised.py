"""How quantised bundles answer, against the bundle that they were made from: engine against engine.

    python benchmarks/quantised.py BASE BUNDLE… --data FILE.jsonl --work FILE [--max-new-tokens 16] [--batch 4] [--json]

BASE answers each question greedily. Each other bundle is forced on its tokens, and runs by itself where its best
token is another one, as in `tokprune verify`; PyTorch is not asked. A question's KL(base‖bundle) is the mean over
BASE's tokens, in nats, and KL figures are over questions; kept sets are compared as the share of BASE's.

Each batch of questions is appended to --work when it is done, so that a run that was stopped goes on and ends in the
same bytes. Prints each bundle's figures and changed answers; then each pair of bundles, first minus second, question
by question. All bundles are held in memory at once.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from quantised_figures import Row, summary, tables

from tokprune.export.sides import Engine
from tokprune.runtime import metrics, names
from tokprune.runtime.bundle import Bundle, open_bundle, sha256
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample, read_samples
from tokprune.runtime.errors import UserError
from tokprune.runtime.limits import check_batch
from tokprune.runtime.output import check_file, whole_file

Features = dict[Path, np.ndarray]  # [N, D] by image
WORK = "work file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask what was not asked before, print; 2 if what was given is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--data", type=Path, required=True, help="not what they were calibrated on")
    parser.add_argument("--work", type=Path, required=True, help="file of results; what it has is not done again")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="questions at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    given = parser.parse_args(arguments)
    try:
        result = run(given)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if given.json else tables(result))
    return 0


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The summary of all questions; those that the work file lacks are asked now."""
    if given.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {given.max_new_tokens} was asked for: give 1 or more")
    check_file(given.work, WORK)
    samples = read_samples(given.data)
    bundles = [open_bundle(path) for path in (given.base, *given.bundles)]
    _check(bundles, given.batch)
    base, *others = (Model(bundle, "onnxruntime") for bundle in bundles)
    header = {
        "base": _identity(base),
        "bundles": [_identity(model) for model in others],
        "data": _data_digest(samples),
        "settings": {"max_new_tokens": given.max_new_tokens, "batch": given.batch},
    }
    rows = open_work(given.work, header, len(samples))
    caches: dict[str, Features] = {}
    engine = _engine(base, given.max_new_tokens, caches)
    engines = {_name(model.bundle): _engine(model, given.max_new_tokens, caches) for model in others}
    for at in range(len(rows), len(samples), given.batch):
        began = time.monotonic()
        found = compare(engine, engines, samples[at : at + given.batch], at)
        _append(given.work, found)
        rows += found
        # A batch's images are encoded with those of this batch only, so that a run that goes on gives the same bits.
        for cache in caches.values():
            cache.clear()
        print(f"{len(rows)} of {len(samples)}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    remarks = {_name(model.bundle): list(model.pipeline.backend.remarks) for model in others}
    return {**header, "remarks": remarks, **summary(rows)}


def _name(bundle: Bundle) -> str:
    return bundle.path.resolve().name


def _check(bundles: Sequence[Bundle], batch: int) -> None:
    """Raise UserError if they cannot all be of the first one's model and plan, a name is there twice, or ``batch`` is
    too large.
    """
    base, *others = bundles
    ours = base.manifest
    for bundle in bundles:
        theirs = bundle.manifest
        check_batch(theirs.limits, batch)
        parts = {
            "model": (dataclasses.replace(ours.model, name=theirs.model.name), theirs.model),
            "plan": (ours.plan, theirs.plan),
            "prompt": (ours.prompt, theirs.prompt),
        }
        for what, (one, another) in parts.items():
            if one != another:
                raise UserError(
                    f"the bundle {bundle.path} was not made from {base.path}, its {what} is another: give the base "
                    "that it was made from"
                )
    for name, count in collections.Counter(map(_name, others)).items():
        if count > 1:
            raise UserError(f"{count} bundles are named {name}: give each once, or rename them")


def _identity(model: Model) -> dict[str, str]:
    """What its answers follow from; the manifest has the hashes of all files."""
    manifest = sha256(model.bundle.file(names.MANIFEST_FILE))
    return {"name": _name(model.bundle), "manifest_sha256": manifest, "engine": model.pipeline.backend.name}


def _data_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of all that is asked, images included."""
    digests = {image: sha256(image) for sample in samples for image in sample.images}
    data = [(sample.prompt, sample.answer, [digests[image] for image in sample.images]) for sample in samples]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


# --- answers ----------------------------------------------------------------------------------------


def _engine(model: Model, max_new_tokens: int, caches: dict[str, Features]) -> Engine:
    """It shares image features with those whose features would be the same to the bit."""
    engine = model.pipeline.backend.name
    return Engine(model, max_new_tokens, caches.setdefault(tower_digest(model.bundle, engine), {}))


def tower_digest(bundle: Bundle, engine: str) -> str:
    """SHA-256 of all that image features follow from: engine, preprocessing, the encoder's graph and each weight."""
    graph = bundle.file(bundle.manifest.segment(names.VISION_ENCODER).file)
    digest = hashlib.sha256(engine.encode())
    for file in (bundle.file(names.PREPROCESSOR_FILE), graph):
        digest.update(file.read_bytes())
    for value in ir.load(graph).graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):  # read here: onnx_ir refuses files that are hard-linked, as FP16 is
            with bundle.file(str(tensor.location)).open("rb") as file:
                file.seek(tensor.offset or 0)
                digest.update(file.read(tensor.nbytes))
        elif tensor is not None:
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def compare(base: Engine, others: Mapping[str, Engine], samples: Sequence[Sample], first: int) -> list[Row]:
    """Rows of one batch, whose first question has the number ``first``."""
    tokens = base.greedy(samples)
    expected = base.forced(samples, tokens)
    rows: list[Row] = [
        {"question": number, "right": sample.answer, "base": base.text(answer), "bundles": {}}
        for number, (sample, answer) in enumerate(zip(samples, tokens, strict=True), first)
    ]
    for name, engine in others.items():
        found = engine.forced(samples, tokens)
        answers = engine.free(samples, [logits for logits, _ in found], tokens)
        for row, (reference, sets), (logits, kept), answer in zip(rows, expected, found, answers, strict=True):
            overlaps = [metrics.kept_overlap(a.indices, b.indices) for a, b in zip(kept, sets, strict=True)]
            row["bundles"][name] = {
                "answer": engine.text(answer),
                "kl": float(metrics.kl_divergence(reference, logits).mean()),
                "kept_overlap": float(np.mean(overlaps)) if overlaps else None,
            }
    return rows


# --- work file --------------------------------------------------------------------------------------


def open_work(path: Path, header: Row, total: int) -> list[Row]:
    """Rows that the work file has, in whole batches; what is behind them was interrupted, and is cut off.

    A new one gets ``header`` as its first line. Raises UserError if it is of another run, or the file system refuses.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        stored = [json.loads(line) for line in lines[:-1]]  # a last line without an end is half a line
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the {WORK} {path} cannot be read ({error}): name another one, or delete it") from None
    if lines != [""]:
        before = stored[0] if stored and isinstance(stored[0], dict) else {}
        differing = [key for key in header if before.get(key) != header[key]]
        if differing or [row.get("question") for row in stored[1:]] != list(range(len(stored) - 1)):
            what = f"its {', '.join(differing)} differ" if differing else "its questions are not in order"
            raise UserError(f"the {WORK} {path} is not this run's, {what}: name another one, or delete it")
    rows = stored[1:]
    if len(rows) != total:
        del rows[len(rows) // header["settings"]["batch"] * header["settings"]["batch"] :]
    with whole_file(path, WORK) as partial:
        partial.write_text(_lines([header, *rows]), encoding="utf-8")
    return rows


def _append(path: Path, rows: Sequence[Row]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_lines(rows))
    except OSError as error:
        raise UserError(
            f"the {WORK} {path} cannot be written ({error.strerror}): make room, and run the same again"
        ) from None


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
