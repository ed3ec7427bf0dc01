"""The demo model's shape, tokenizer and processor, and how they are saved.

Everything is stock transformers (`LlavaForConditionalGeneration`, `LlavaProcessor`); this module only
fixes sizes and files. It knows nothing about scenes or training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokprune.export.demo.scenes import ANSWERS, GRID, INKS, PATCH, SIZE, all_questions

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
VOCAB_SIZE = 576
PROMPT = "USER: <image>\n{question} ASSISTANT:"

# LLaVA-1.5's template, as llava-hf ships it (no generation-only branches).
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Plain English beside the questions, so that free text does not fall apart into single bytes.
_ENGLISH = """A chat between a curious user and an assistant. The assistant gives helpful and short answers to the
user's questions about the picture. Describe the image. What is in this picture? What is shown here? Is there
anything else in the scene? Where is it, and which one is the largest? How many of them can you see on the left
side, on the right side, at the top, at the bottom and in the middle? Please answer with one word. The digits are
handwritten and drawn with different inks on a light or a dark background. The photo shows a flower and a temple."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, `VOCAB_SIZE` entries; every answer is one token when a space precedes it."""
    corpus = [PROMPT.replace("<image>", "").format(question=q) for q in all_questions()]
    corpus += [f" {a}" for a in ANSWERS for _ in range(20)] + [f"The {i} digit is here." for i in INKS]
    corpus += [_ENGLISH]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD, IMAGE)]
    tok.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor() -> LlavaProcessor:
    """LLaVA-1.5's preprocessing (CLIP, 336 px) with the demo tokenizer."""
    image = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=image,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """About 4.4 M parameters. The tower's last layer is never used (`vision_feature_layer` -2), as in LLaVA-1.5."""
    vision = CLIPVisionConfig(
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=7,
        num_attention_heads=9,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=144,
        hidden_act="quick_gelu",
    )
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model in FP32."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(build_config(build_tokenizer()))


def save_checkpoint(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write `model` (rounded to FP16), tokenizer and processor to `out`, replacing the directory as a whole."""
    temporary, retired = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(temporary)
    text = model.config.text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(max_new_tokens=16, **ids).save_pretrained(temporary)
    processor = build_processor()
    processor.save_pretrained(temporary)
    processor.image_processor.save_pretrained(temporary)  # preprocessor_config.json, which older transformers read
    _name_tokenizer_class(temporary / "tokenizer_config.json")
    for file in temporary.iterdir():
        file.chmod(0o644)
    shutil.rmtree(retired, ignore_errors=True)
    if out.exists():
        out.rename(retired)
    temporary.rename(out)
    shutil.rmtree(retired, ignore_errors=True)


def _name_tokenizer_class(file: Path) -> None:
    """transformers 5 writes a class name that version 4 does not know; both know this one."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
