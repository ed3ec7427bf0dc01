"""A LLaVA-1.5 small enough to be traced in seconds, and bundles made from it; each is made once a session."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tokprune.runtime.plan import Plan, Rank, make_plan

LAYERS, TOKENS, CONTEXT = 3, 16, 128  # images of 56 pixels in patches of 14

PLANS: dict[str, Plan] = {
    "none": Plan("none"),
    **{
        key: make_plan(method, stages, layers=LAYERS, visual_tokens=TOKENS, rank=rank, seed=7)
        for key, method, stages, rank in (
            ("random", "random", [(1, 5)], None),
            ("random-0", "random", [(0, 5)], None),
            ("random-2", "random", [(1, 9), (2, 4)], None),
            ("uniform", "uniform", [(1, 4)], None),
            ("lofi", "lofi", [(1, 6)], Rank(components=4)),
            ("lofi-energy", "lofi", [(1, 6)], Rank(energy=0.9)),
            ("lofi-2", "lofi", [(1, 9), (2, 4)], Rank(components=3)),
        )
    },
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it: seeded weights, the demo model's tokenizer, grouped-query attention."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from tokprune.export.demo import checkpoint_dir

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    # ten times the usual spread: with less, attention is flat and a wrong mask or position would not show
    spread = 0.2
    text = LlamaConfig(
        vocab_size=576,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        initializer_range=spread,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=3,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint_dir() / name, path)
    processor = json.loads((checkpoint_dir() / "processor_config.json").read_text())
    processor["image_processor"] |= {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    (path / "processor_config.json").write_text(json.dumps(processor))
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the bundle of one of ``PLANS``, to be read only: copy it before changing anything."""
    from tokprune.export import pipeline
    from tokprune.export.checkpoint import find_checkpoint

    folder = tmp_path_factory.mktemp("bundles")
    graphs: dict[tuple, object] = {}

    def traced_once(function: Callable) -> Callable:
        """Plans share segments of the one model, and tracing one takes seconds."""

        def trace(module, *args):
            key = (function.__name__, getattr(module, "first", None), len(getattr(module, "layers", ())), *args)
            if key not in graphs:
                graphs[key] = function(module, *args)
            return graphs[key]

        return trace

    @functools.cache
    def bundle(plan: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("trace_vision", "trace_embed", "trace_decoder"):
                patch.setattr(pipeline, name, traced_once(getattr(pipeline, name)))
            pipeline.export(find_checkpoint(str(tiny_checkpoint)), PLANS[plan], folder / plan)
        return folder / plan

    return bundle
