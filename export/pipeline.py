"""``export``: checkpoint and plan in, bundle out. Ties the parts of this folder together."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
import transformers

from tokprune.calibration.recipe import usual_choices
from tokprune.calibration.scheme import Scheme
from tokprune.export.bundle import describe_files, staged
from tokprune.export.checkpoint import Checkpoint, load_processor
from tokprune.export.lvpruning.modules import Modules, write_modules
from tokprune.export.memory import bundle_weights
from tokprune.export.quantize import find_matrices, write_quantized
from tokprune.export.selector import save_selector
from tokprune.export.skeleton import expected_shapes, is_tied, skeleton
from tokprune.export.store import Store
from tokprune.export.trace import save_segment, trace_decoder, trace_embed, trace_vision
from tokprune.export.weights import Weights
from tokprune.plugins.build import source_hash
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, sha256
from tokprune.runtime.contract import FLOAT_TYPES
from tokprune.runtime.limits import make_limits
from tokprune.runtime.manifest import SCHEMA, Limits, Manifest, ModelFacts, SegmentFacts
from tokprune.runtime.plan import Plan
from tokprune.runtime.recipe import Choice, chosen_groups
from tokprune.runtime.version import __version__
from tokprune.runtime.weights import BASES, HEAD, default_base, matrix_names

TYPES = {"fp32": torch.float32, "fp16": torch.float16}
_BASE = "base"  # where an export to INT8 or INT4 has the bundle that it is made from, for a while
Graphs = dict[tuple, ir.Model]  # traced segments, with their weights, by checkpoint, precision and what they compute


def export(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    precision: str = "fp32",
    base: str | None = None,
    head: str | None = None,
    head_pieces: int = 1,
    progress: Callable[[str], None] = lambda step: None,
    note: Callable[[str], None] = lambda text: None,
    graphs: Graphs | None = None,
    modules: Modules | None = None,
    limits: Limits | None = None,
    form: Choice | None = None,
    scheme: Callable[[Bundle, Mapping[str, Choice]], Scheme | None] = lambda base, choices: None,
) -> Manifest:
    """Write the bundle of ``checkpoint`` under ``plan`` to ``out``; ``progress`` hears each step's name.

    ``note`` hears how far a long step is. The head is cut into ``head_pieces`` weights. The bundle appears whole or
    not at all. ``graphs`` may be shared by exports under several plans: what one has traced, the next need not.
    ``modules`` belong to plans of lvpruning, which may keep other numbers of tokens than those in training. ``limits``
    are those of `make_limits` if not given. INT8 and INT4 are made from the bundle in ``base``, by default FP16, as
    `quantize` makes them, and of the head what ``head`` says; other matrices as ``form`` says, for which ``scheme`` is
    made from that bundle. Raises UserError for a checkpoint or an ``out`` at fault.
    """
    _check_modules(plan, modules)
    base = base or default_base(precision)
    with staged(out) as stage:
        room = stage if precision == base else stage / _BASE
        room.mkdir(exist_ok=True)
        if modules is not None:
            write_modules(room, modules)
        progress("checkpoint")
        processor = load_processor(checkpoint)
        model = skeleton(checkpoint, TYPES[base])
        weights = Weights(checkpoint.path, checkpoint.shards)
        weights.check(expected_shapes(model, checkpoint), tied=is_tied(model))
        store = Store(room, weights, base, note)
        segments = _segments(model, checkpoint, plan, base, store, head_pieces, progress, graphs)
        progress("manifest")
        tokenizer = (checkpoint.path / names.TOKENIZER_FILE).read_bytes()
        (room / names.TOKENIZER_FILE).write_bytes(tokenizer)
        preprocessor = processor.image_processor.to_json_string()
        (room / names.PREPROCESSOR_FILE).write_text(preprocessor, encoding="utf-8")
        manifest = Manifest(
            schema=SCHEMA,
            tools={
                "tokprune": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "onnx": onnx.__version__,
                "python": platform.python_version(),
                "plugin_source": source_hash(),  # of what plugin libraries built with this version are made of
            },
            source={"model": checkpoint.facts.name, "config_sha256": sha256(checkpoint.path / "config.json")},
            model=checkpoint.facts,
            plan=plan,
            precision=base,
            base=base,
            prompt=checkpoint.prompt,
            limits=limits or make_limits(checkpoint.facts.context),
            segments=tuple(segments),
            files=describe_files(room, [path for path in room.rglob("*") if path.is_file()]),
            memory=bundle_weights(room, segments),
        )
        (room / names.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        if room != stage:
            whole = Bundle(room, manifest)
            choices = usual_choices(list(find_matrices(whole)), precision, head, form)
            manifest, _ = write_quantized(whole, stage, precision, choices, scheme(whole, choices), progress)
            shutil.rmtree(room)
    return manifest


def _check_modules(plan: Plan, modules: Modules | None) -> None:
    wanted = (plan.module, [stage.layer for stage in plan.stages]) if plan.method == "lvpruning" else None
    given = (modules.module, [stage.layer for stage in modules.stages]) if modules is not None else None
    if given != wanted:
        raise ValueError(f"the plan needs modules of {wanted}, given were {given}")


def steps(plan: Plan, facts: ModelFacts, precision: str, head: str | None = None, form: Choice | None = None) -> int:
    """How many steps ``export`` reports to ``progress``."""
    groups = 0
    if precision not in BASES:
        groups = len(chosen_groups(usual_choices([*matrix_names(facts), HEAD], precision, head, form)))
    return 2 + 2 + len(plan.stages) + len(list(plan.segments(facts.layers))) + groups


def _segments(
    model: transformers.LlavaForConditionalGeneration,
    checkpoint: Checkpoint,
    plan: Plan,
    precision: str,
    store: Store,
    head_pieces: int,
    progress: Callable[[str], None],
    graphs: Graphs | None,
) -> list[SegmentFacts]:
    facts = checkpoint.facts

    def traced(key: tuple, trace: Callable[[], ir.Model]) -> ir.Model:
        if graphs is None:
            return trace()
        key = (checkpoint.path, precision, *key)
        if key not in graphs:
            graphs[key] = trace()
        return graphs[key]

    progress(names.VISION_ENCODER)
    graph = traced((names.VISION_ENCODER,), functools.partial(trace_vision, model, facts))
    segments = [save_segment(graph, store, names.VISION_ENCODER, None)]
    progress(names.EMBED_TOKENS)
    graph = traced((names.EMBED_TOKENS,), functools.partial(trace_embed, model))
    segments.append(save_segment(graph, store, names.EMBED_TOKENS, None))
    decoders = {index: (first, stop) for index, first, stop in plan.segments(facts.layers)}
    for index in range(len(plan.stages) + 1):
        if index in decoders:
            first, stop = decoders[index]
            progress(names.decoder(index))
            last_row = plan.method == "fastv" and index < len(plan.stages)
            trace = functools.partial(
                trace_decoder, model, facts, first, stop, last_row=last_row, head_pieces=head_pieces
            )
            graph = traced((first, stop, last_row, head_pieces), trace)
            segments.append(save_segment(graph, store, names.decoder(index), (first, stop)))
        if index < len(plan.stages):
            progress(names.select(index))
            segments.append(save_selector(store.directory, index, plan, facts, FLOAT_TYPES[precision]))
    return segments
