"""``build --target cpu``: a bundle's decoders and tower as graphs of ONNX Runtime's fused operators, in a slot.

The graphs read the bundle's own weights, but for matrices of INT8 and INT4: they are in the slot once more, as the
kernels read them. What is checked when it is built need not be checked when it runs: a slot
is for one version of ONNX Runtime and one export. It is for any CPU: nothing in it is laid out for one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tokprune.export.fusion import attention, rules
from tokprune.export.fusion.blocks import put_blocks
from tokprune.export.fusion.check import TOLERANCES, difference
from tokprune.export.fusion.form import measure_forms
from tokprune.export.fusion.widen import widen, widen_weights
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, sha256
from tokprune.runtime.engines import slot
from tokprune.runtime.engines.build import fill_slot
from tokprune.runtime.engines.fused import ARCH, FORM, LIBRARY, Found, read_form
from tokprune.runtime.engines.slot import SegmentEngine, Slot
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.ort import OnnxRuntime


def build_fused(
    bundle: Bundle, *, finished: Callable[[SegmentEngine, bool], None] = lambda engine, is_new: None
) -> dict[str, Any]:
    """Build what is missing in the slot of this ONNX Runtime: the object that ``tokprune build --json`` prints.

    Raises UserError for a graph that cannot be read, and for one that is further from the neutral one than its
    precision explains.
    """
    import onnxruntime

    folder = slot.slot_folder(bundle.path, f"{LIBRARY}-{onnxruntime.__version__}-{ARCH}")
    segments = [
        each for each in bundle.manifest.segments if each.layers is not None or each.name == names.VISION_ENCODER
    ]
    keys = [(segment, slot.make_key(_inputs(bundle, segment, onnxruntime.__version__))) for segment in segments]

    def prepare(missing: list[str]) -> None:
        if missing or not _has_form(folder):
            slot.write_json(folder / FORM, measure_forms(bundle.manifest))

    def make(segment: SegmentFacts, key: str, building: Path) -> SegmentEngine:
        return _build_segment(bundle, segment, key, folder, building)

    built_for = (LIBRARY, onnxruntime.__version__, ARCH, "native", None)
    result = fill_slot(bundle, folder, built_for, keys, make, prepare=prepare, finished=finished)
    return result | {"attention_ms": json.loads((folder / FORM).read_text(encoding="utf-8"))}


def _has_form(folder: Path) -> bool:
    try:
        read_form(folder)
    except ValueError:
        return False
    return True


def _inputs(bundle: Bundle, segment: SegmentFacts, version: str) -> dict[str, Any]:
    """All that a graph depends on: the one that it is made of, this code, and what it was checked with."""
    return {
        "library": [LIBRARY, version, ARCH],
        "graph": next(file.sha256 for file in bundle.manifest.files if file.path == segment.file),
        "weights": {
            file.path: file.sha256 for file in bundle.manifest.files if file.path.endswith((".data", ".safetensors"))
        },
        "code": [sha256(file) for file in sorted(Path(__file__).parent.glob("*.py"))],
        "context": bundle.manifest.model.context,
    }


def _build_segment(bundle: Bundle, segment: SegmentFacts, key: str, folder: Path, building: Path) -> SegmentEngine:
    begin = time.perf_counter()
    model = ir.load(bundle.file(segment.file))
    data = folder / f"{segment.name}.data"  # in its place from the start: the graph says where it is
    data.unlink(missing_ok=True)
    try:
        fuse(model, segment, bundle.manifest.model.context, data, bundle.path)
    except ValueError as error:
        raise UserError(
            f"{bundle.file(segment.file)} has an attention that is not rewritten ({error}): export the bundle again"
        ) from None
    file = f"{segment.name}.onnx"
    ir.save(model, building / file)
    weights = slot.Weights(data.name, data.stat().st_size, sha256(data)) if data.exists() else None
    size, digest = (building / file).stat().st_size, sha256(building / file)
    made = SegmentEngine(segment.name, key, file, size, digest, 0.0, len(model.graph), {}, weights=weights)
    apart = _check(bundle, segment, made, building, folder)
    os.replace(building / file, folder / file)
    return dataclasses.replace(made, seconds=round(time.perf_counter() - begin, 3), difference=apart)


def fuse(model: ir.Model, segment: SegmentFacts, positions: int, data: Path, root: Path) -> None:
    """Rewrite a segment's graph, in place; what its products read of their own goes to ``data``, below ``root``.

    Raises ValueError if its attention is not as it is known.
    """
    widen(model)
    if segment.layers is None:
        attention.fuse_tower(model)
    else:
        rules.apply_rotary(model, positions)
        attention.fuse_decoder(model)
    rules.apply_rules(model)
    put_blocks(model, data, root)
    rules.clean(model)
    widen_weights(model)


def _check(bundle: Bundle, segment: SegmentFacts, made: SegmentEngine, building: Path, folder: Path) -> float:
    """The difference from the neutral graph. Raises UserError if it is beyond the precision's tolerance."""
    here = Slot(slot.SCHEMA, LIBRARY, "", ARCH, "native", None, "", (made,))
    backend = OnnxRuntime()
    neutral = backend.load(bundle, segment)
    fused = OnnxRuntime(slot=Found(building, here, read_form(folder))).load(bundle, segment)
    apart = difference(bundle.manifest, segment, backend, neutral, fused)
    allowed = TOLERANCES[bundle.manifest.precision]
    if not apart <= allowed:
        found = "not finite" if math.isnan(apart) else f"{apart:.2g} of its greatest number"
        raise UserError(
            f"the fused {segment.name} differs from {bundle.file(segment.file)} by {found}, and {allowed:.0e} is "
            "allowed: run the bundle with --engine onnxruntime-neutral, and report this"
        )
    return apart
