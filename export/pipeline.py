"""``export``: checkpoint and plan in, bundle out. Ties the parts of this folder together."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
import transformers
from transformers import AttentionInterface

from tokprune.export.bundle import describe_files, staged
from tokprune.export.checkpoint import Checkpoint, load_model, load_processor
from tokprune.export.segments import ATTENTION, Decoder, EmbedTokens, VisionEncoder, attention
from tokprune.export.selector import save_selector
from tokprune.export.trace import save_segment, trace_decoder, trace_embed, trace_vision
from tokprune.runtime import names
from tokprune.runtime.bundle import sha256
from tokprune.runtime.manifest import SCHEMA, Manifest, SegmentFacts
from tokprune.runtime.plan import Plan
from tokprune.runtime.version import __version__

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def export(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    precision: str = "fp32",
    progress: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Write the bundle of ``checkpoint`` under ``plan`` to ``out``; ``progress`` hears each step's name.

    The bundle appears whole or not at all. Raises UserError for a checkpoint or an ``out`` at fault.
    """
    with staged(out) as stage:
        progress("checkpoint")
        AttentionInterface.register(ATTENTION, attention)
        processor = load_processor(checkpoint)
        model = load_model(checkpoint, dtype=PRECISIONS[precision], attention=ATTENTION)
        segments = _segments(model, checkpoint, plan, precision, stage, progress)
        del model
        progress("manifest")
        tokenizer = (checkpoint.path / names.TOKENIZER_FILE).read_bytes()
        (stage / names.TOKENIZER_FILE).write_bytes(tokenizer)
        preprocessor = processor.image_processor.to_json_string()
        (stage / names.PREPROCESSOR_FILE).write_text(preprocessor, encoding="utf-8")
        manifest = Manifest(
            schema=SCHEMA,
            tools={
                "tokprune": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "onnx": onnx.__version__,
                "python": platform.python_version(),
            },
            source={"model": checkpoint.facts.name, "config_sha256": sha256(checkpoint.path / "config.json")},
            model=checkpoint.facts,
            plan=plan,
            precision=precision,
            prompt=checkpoint.prompt,
            segments=tuple(segments),
            files=describe_files(stage, [path for path in stage.rglob("*") if path.is_file()]),
        )
        (stage / names.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def steps(plan: Plan, layers: int) -> int:
    """How many steps ``export`` reports to ``progress``."""
    return 2 + 2 + len(plan.stages) + len(list(plan.segments(layers)))


def _segments(
    model: transformers.LlavaForConditionalGeneration,
    checkpoint: Checkpoint,
    plan: Plan,
    precision: str,
    stage: Path,
    progress: Callable[[str], None],
) -> list[SegmentFacts]:
    facts, dtype = checkpoint.facts, PRECISIONS[precision]
    progress(names.VISION_ENCODER)
    vision = trace_vision(VisionEncoder(model, facts.vision.layers), facts, dtype)
    segments = [save_segment(vision, stage, names.VISION_ENCODER, None)]
    progress(names.EMBED_TOKENS)
    segments.append(save_segment(trace_embed(EmbedTokens(model)), stage, names.EMBED_TOKENS, None))
    tokens, grid = facts.vision.tokens, facts.vision.grid
    decoders = {index: (first, stop) for index, first, stop in plan.segments(facts.layers)}
    for index in range(len(plan.stages) + 1):
        if index in decoders:
            first, stop = decoders[index]
            progress(names.decoder(index))
            graph = trace_decoder(Decoder(model, first, stop), facts, dtype)
            segments.append(save_segment(graph, stage, names.decoder(index), (first, stop)))
        if index < len(plan.stages):
            progress(names.select(index))
            tensor_dtype = str(dtype).removeprefix("torch.")
            segments.append(
                save_selector(stage, index, plan, tokens, facts.hidden, tensor_dtype, grid if index == 0 else None)
            )
            tokens = plan.stages[index].keep
    return segments
