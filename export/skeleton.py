"""A LLaVA-1.5 without weights, for tracing: of any size, in next to no memory.

Its parameters are one zero each, expanded to their shapes. All decoder layers are alike, and so are the tower's: two of
each are enough to trace (see `layers`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration

from tokprune.export.checkpoint import Checkpoint
from tokprune.export.segments import ATTENTION, attention
from tokprune.export.weights import canonical

LAYERS = 2


class Fp32LayerNorm(nn.LayerNorm):
    """A layer norm computed in FP32 whatever its input: squares of outliers overflow FP16."""

    def forward(self, input: Tensor) -> Tensor:
        normed = F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(input.dtype)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The checkpoint's model with ``LAYERS`` layers in decoder and tower, every weight zero."""
    AttentionInterface.register(ATTENTION, attention)
    config = LlavaConfig.from_pretrained(checkpoint.path, local_files_only=True)
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = min(LAYERS, part.num_hidden_layers)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    language, embeddings = model.model.language_model, model.model.vision_tower.embeddings
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zero, requires_grad=False)
        for name, child in list(module.named_children()):
            if type(child) is nn.LayerNorm:
                norm = Fp32LayerNorm(child.normalized_shape, child.eps, device="meta")
                norm._parameters = child._parameters
                setattr(module, name, norm)
    # what is computed, not loaded
    language.rotary_emb = type(language.rotary_emb)(config=language.config)
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    left = [name for name, tensor in [*model.named_buffers(), *model.named_parameters()] if tensor.is_meta]
    assert not left, left
    return model.eval()


def expected_shapes(model: LlavaForConditionalGeneration, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the checkpoint of ``model``'s skeleton must have, by canonical name."""
    config = LlavaConfig.from_pretrained(checkpoint.path, local_files_only=True)
    counts = {
        "language_model.layers.0.": config.text_config.num_hidden_layers,
        "vision_tower.encoder.layers.0.": config.vision_config.num_hidden_layers,
    }
    shapes = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        name, shape = canonical(key), tuple(parameter.shape)
        first = next((prefix for prefix in counts if name.startswith(prefix)), None)
        if first is None and ".layers." not in name:
            shapes[name] = shape
        if first is not None:
            for layer in range(counts[first]):
                shapes[first.replace(".0.", f".{layer}.") + name.removeprefix(first)] = shape
    return shapes


def is_tied(model: LlavaForConditionalGeneration) -> bool:
    """Whether the head's weight is the embedding's."""
    return bool(model.config.text_config.tie_word_embeddings or model.config.tie_word_embeddings)
