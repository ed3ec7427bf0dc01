"""Reading config.json: the hub's file, which omits most values, against transformers' own reading of it."""

from __future__ import annotations

from typing import Any

import pytest

from tokprune.runtime.config import model_facts
from tokprune.runtime.errors import UserError
from tokprune.runtime.flops import SEVEN_B


def hub_config() -> dict[str, Any]:
    """What llava-hf/llava-1.5-7b-hf states: few of Llama's sizes, all of CLIP's."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def changed(**changes: Any) -> dict[str, Any]:
    """The hub's config with ``a__b=value`` set at a.b."""
    config = hub_config()
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[key] = value
    return config


class TestReading:
    def test_hub_config_is_the_preset(self) -> None:
        assert model_facts(hub_config(), SEVEN_B.name) == SEVEN_B

    def test_omitted_values_are_those_of_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        bare = {
            "model_type": "llava",
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model"},
        }
        theirs = transformers.LlavaConfig.from_dict(bare)
        text, vision = theirs.text_config, theirs.vision_config
        ours = model_facts(bare, "bare")
        assert (ours.layers, ours.hidden, ours.intermediate) == (
            text.num_hidden_layers, text.hidden_size, text.intermediate_size
        )  # fmt: skip
        assert (ours.heads, ours.kv_heads, ours.head_dim) == (
            text.num_attention_heads, text.num_key_value_heads, text.head_dim
        )  # fmt: skip
        assert (ours.vocabulary, ours.context) == (text.vocab_size, text.max_position_embeddings)
        assert (ours.bos_token_id, ours.eos_token_ids) == (text.bos_token_id, (text.eos_token_id,))
        assert ours.image_token_id == theirs.image_token_id
        assert (ours.vision.image_size, ours.vision.patch_size) == (vision.image_size, vision.patch_size)
        assert ours.vision.layers == vision.num_hidden_layers + 1 + theirs.vision_feature_layer
        assert (ours.vision.hidden, ours.vision.intermediate, ours.vision.heads) == (
            vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
        )  # fmt: skip

    def test_what_transformers_writes_reads_back(self) -> None:
        transformers = pytest.importorskip("transformers")
        written = transformers.LlavaConfig.from_dict(hub_config()).to_dict()
        assert model_facts(written, SEVEN_B.name) == SEVEN_B

    def test_both_spellings_of_the_image_token(self) -> None:
        config = changed(image_token_id=7)
        del config["image_token_index"]
        assert model_facts(config, "m").image_token_id == 7
        assert model_facts(changed(image_token_index=8), "m").image_token_id == 8

    def test_grouped_keys_and_head_dim(self) -> None:
        facts = model_facts(changed(text_config__num_key_value_heads=8, text_config__head_dim=64), "m")
        assert (facts.heads, facts.kv_heads, facts.head_dim) == (32, 8, 64)
        facts = model_facts(changed(text_config__num_key_value_heads=None, text_config__head_dim=None), "m")
        assert (facts.kv_heads, facts.head_dim) == (32, 128)

    @pytest.mark.parametrize(("layer", "run"), [(-1, 24), (-2, 23), (-24, 1), (1, 1), (23, 23), (24, 24)])
    def test_feature_layer(self, layer: int, run: int) -> None:
        assert model_facts(changed(vision_feature_layer=layer), "m").vision.layers == run

    @pytest.mark.parametrize(("stated", "ids"), [(5, (5,)), ([5, 6], (5, 6)), (None, ())])
    def test_eos(self, stated: Any, ids: tuple[int, ...]) -> None:
        assert model_facts(changed(text_config__eos_token_id=stated), "m").eos_token_ids == ids
        assert model_facts(changed(text_config__eos_token_id=stated), "m", eos=[9]).eos_token_ids == (9,)

    def test_no_bos(self) -> None:
        assert model_facts(changed(text_config__bos_token_id=None), "m").bos_token_id is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model_type": "llava_next"}, "m has model_type 'llava_next', LLaVA-1.5 has 'llava'"),
            ({"text_config__model_type": "mistral"}, "text_config.model_type 'mistral'"),
            ({"vision_config__model_type": "siglip_vision_model"}, "'siglip_vision_model'"),
            ({"text_config": None}, "no text_config"),
            ({"vision_config": []}, "no vision_config"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
            ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]"),
            ({"vision_feature_layer": -25}, "-25, but its tower has 24 layers"),
            ({"vision_feature_layer": 25}, "25, but its tower has 24 layers"),
            ({"vision_feature_layer": True}, "vision_feature_layer True"),
            (
                {"text_config__hidden_size": "4096"},
                "m has text_config.hidden_size '4096', which is no positive integer",
            ),
            ({"text_config__num_hidden_layers": 0}, "text_config.num_hidden_layers 0"),
            ({"text_config__num_hidden_layers": None}, "num_hidden_layers None"),
            ({"text_config__num_key_value_heads": 5}, "32, no multiple of num_key_value_heads 5"),
            ({"vision_config__patch_size": 1.5}, "vision_config.patch_size 1.5"),
            ({"vision_config__image_size": 335}, "image_size 335, no multiple of patch_size 14"),
            ({"vision_config__num_attention_heads": 15}, "1024, no multiple of heads 15"),
            ({"image_token_index": -1}, "image_token_index -1, which is no token id"),
            ({"text_config__eos_token_id": "</s>"}, "eos_token_id '</s>', which is no token id"),
        ],
    )
    def test_says_what_was_found(self, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            model_facts(changed(**changes), "m")

    def test_original_llava_repository_is_told_the_mend(self) -> None:
        with pytest.raises(UserError, match="give a converted checkpoint"):
            model_facts({"model_type": "llava", "mm_vision_tower": "openai/clip", "hidden_size": 4096}, "m")
