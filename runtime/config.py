"""From the ``config.json`` of a Hugging Face LLaVA-1.5 to the facts that tokprune works with.

Knows the keys of that file, what transformers assumes where one is left out, and which models are no
LLaVA-1.5. Opens no file and no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import ModelFacts, VisionFacts

# What transformers (5.23, LlamaConfig, CLIPVisionConfig and LlavaConfig) takes where config.json is silent.
# The hub's LLaVA files name few of the Llama values and rely on these.
LLAMA_DEFAULTS = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
CLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
LLAMA_BOS, LLAMA_EOS, LLAVA_IMAGE_TOKEN, LLAVA_FEATURE_LAYER = 1, 2, 32000, -2


def model_facts(config: Mapping[str, Any], name: str, eos: Sequence[int] | None = None) -> ModelFacts:
    """Facts of the LLaVA-1.5 that ``config`` (a parsed config.json) describes; reports call it ``name``.

    ``eos`` overrides the end-of-sequence ids, for callers that have read generation_config.json.
    Raises UserError, naming what was found, for whatever is no LLaVA-1.5: another model, tower or decoder,
    several feature layers, kept class tokens, or sizes that are no positive integers.
    """
    _require(config, "model_type", "llava", name)
    text, tower = _section(config, "text_config", name), _section(config, "vision_config", name)
    _require(text, "text_config.model_type", "llama", name, omitted="llama")
    _require(tower, "vision_config.model_type", "clip_vision_model", name, omitted="clip_vision_model")
    _require(config, "vision_feature_select_strategy", "default", name, omitted="default")

    decoder = {key: _size(text, f"text_config.{key}", default, name) for key, default in LLAMA_DEFAULTS.items()}
    clip = {key: _size(tower, f"vision_config.{key}", default, name) for key, default in CLIP_DEFAULTS.items()}
    heads = decoder["num_attention_heads"]
    kv_heads = _size(text, "text_config.num_key_value_heads", heads, name, nullable=True)
    head_dim = _size(text, "text_config.head_dim", decoder["hidden_size"] // heads, name, nullable=True)
    _require_multiple(name, "num_attention_heads", heads, kv_heads, "num_key_value_heads")
    _require_multiple(name, "the tower's hidden_size", clip["hidden_size"], clip["num_attention_heads"], "heads")
    _require_multiple(name, "image_size", clip["image_size"], clip["patch_size"], "patch_size")

    # transformers 5 reads and writes both spellings
    image_token = config.get("image_token_id", config.get("image_token_index", LLAVA_IMAGE_TOKEN))
    bos = text.get("bos_token_id", LLAMA_BOS)
    return ModelFacts(
        name=name,
        layers=decoder["num_hidden_layers"],
        hidden=decoder["hidden_size"],
        intermediate=decoder["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=decoder["vocab_size"],
        context=decoder["max_position_embeddings"],
        vision=VisionFacts(
            image_size=clip["image_size"],
            patch_size=clip["patch_size"],
            layers=_layers_run(config, clip["num_hidden_layers"], name),
            hidden=clip["hidden_size"],
            intermediate=clip["intermediate_size"],
            heads=clip["num_attention_heads"],
        ),
        image_token_id=_token(image_token, "image_token_index", name),
        bos_token_id=None if bos is None else _token(bos, "bos_token_id", name),
        eos_token_ids=_eos(text.get("eos_token_id", LLAMA_EOS) if eos is None else eos, name),
    )


def _section(config: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, Mapping):
        raise UserError(
            f"the config of {name} has no {key}, as Hugging Face's LLaVA-1.5 checkpoints have: "
            "give a converted checkpoint, for example llava-hf/llava-1.5-7b-hf"
        )
    return section


def _require(section: Mapping[str, Any], key: str, wanted: str, name: str, omitted: str = "") -> None:
    found = section.get(key.rpartition(".")[2], omitted)
    if found != wanted:
        raise UserError(f"{name} has {key} {found!r}, LLaVA-1.5 has {wanted!r}: give a LLaVA-1.5 checkpoint")


def _require_multiple(name: str, what: str, value: int, divisor: int, of: str) -> None:
    if value % divisor:
        raise UserError(f"{name} has {what} {value}, no multiple of {of} {divisor}: correct its config.json")


def _size(section: Mapping[str, Any], key: str, default: int, name: str, nullable: bool = False) -> int:
    value = section.get(key.rpartition(".")[2], default)
    if value is None and nullable:
        return default
    if not _is_int(value) or value < 1:
        raise UserError(f"{name} has {key} {value!r}, which is no positive integer: correct its config.json")
    return value


def _token(value: Any, key: str, name: str) -> int:
    if not _is_int(value) or value < 0:
        raise UserError(f"{name} has {key} {value!r}, which is no token id: correct its config.json")
    return value


def _eos(value: Any, name: str) -> tuple[int, ...]:
    ids = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_token(item, "eos_token_id", name) for item in ids)


def _layers_run(config: Mapping[str, Any], layers: int, name: str) -> int:
    """Tower layers in front of the feature layer: hidden state i of 0..layers lies behind i layers."""
    found = config.get("vision_feature_layer", LLAVA_FEATURE_LAYER)
    if not _is_int(found):
        raise UserError(f"{name} has vision_feature_layer {found!r}: tokprune reads one layer, as LLaVA-1.5 does (-2)")
    run = found if found >= 0 else layers + 1 + found
    if not 1 <= run <= layers:
        raise UserError(f"{name} has vision_feature_layer {found}, but its tower has {layers} layers")
    return run


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
