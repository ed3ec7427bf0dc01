"""The small files of a LLaVA-1.5 checkpoint as the hub has them: config, tokenizer, processor, chat template.

Knows sizes and formats; knows no weight. The tokenizer is made here, by rule instead of by training: Llama's kind
(BPE over "▁" for spaces, bytes for what it lacks) with Llama's special ids, 32000 pieces, `<image>` and `<pad>`.
"""

from __future__ import annotations

import itertools
import json
import string
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokprune.runtime.config import LLAMA_DEFAULTS
from tokprune.runtime.errors import UserError

BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, LEAST_VOCABULARY = 1, 2, 32000, 32001, 32002
_SPECIAL = {0: "<unk>", BOS_ID: "<s>", EOS_ID: "</s>", IMAGE_ID: "<image>", PAD_ID: "<pad>"}
_DEMO = Path(__file__).resolve().parent.parent / "export" / "demo" / "checkpoint"  # has llava-hf's template


@dataclass(frozen=True)
class Size:
    """Sizes of a LLaVA-1.5; also the keys of a size file. ``vision_layers`` are all of the tower's, the last unused."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int = 0  # 0: as many as heads
    vocabulary: int = 32064
    context: int = 4096
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 336
    patch_size: int = 14

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < (0 if field.name == "kv_heads" else 1):
                raise UserError(f"the size has {field.name} {value!r}, which is no positive integer: correct it")
        if self.vocabulary < LEAST_VOCABULARY:
            raise UserError(f"a vocabulary of {self.vocabulary} was asked for: the tokenizer has {LEAST_VOCABULARY}")
        for name, divisor in (("hidden", "heads"), ("heads", "key_heads"), ("vision_hidden", "vision_heads")):
            if getattr(self, name) % getattr(self, divisor):
                raise UserError(f"the size has {name} {getattr(self, name)}, no multiple of its {divisor}: correct it")
        if self.hidden // self.heads % 2:
            raise UserError(f"heads of {self.hidden // self.heads} were asked for: rotary positions need an even width")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def key_width(self) -> int:
        """Rows of k_proj and v_proj."""
        return self.hidden // self.heads * self.key_heads


SIZES = {
    "7b": Size(hidden=4096, intermediate=11008, layers=32, heads=32),
    "13b": Size(hidden=5120, intermediate=13824, layers=40, heads=40),
    # CLIP-L/14-336 whole, and a decoder small enough for FP32 on a CPU: what peers.py measures
    "reference": Size(hidden=1024, intermediate=2816, layers=16, heads=16),
}


def read_size(text: str) -> Size:
    """The size of that name, or of that JSON file. Raises UserError, naming the key at fault."""
    if text in SIZES:
        return SIZES[text]
    try:
        data = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--size {text} is neither {' nor '.join(SIZES)} nor a JSON file ({error})") from None
    known = {field.name for field in fields(Size)}
    if not isinstance(data, dict) or not set(data) <= known:
        raise UserError(f"{text} must hold one JSON object with keys among {', '.join(sorted(known))}")
    missing = [key for key in ("hidden", "intermediate", "layers", "heads") if key not in data]
    if missing:
        raise UserError(f"{text} lacks the size '{missing[0]}': add it")
    return Size(**data)


def write_files(out: Path, size: Size, dtype: str, naming: str) -> None:
    """Write all but the weights to ``out``; ``naming`` "old" is the hub's, "new" what transformers 5 writes."""
    files = {
        "config.json": config(size, dtype, naming),
        "generation_config.json": {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
        "preprocessor_config.json": _preprocessor(size),
        "processor_config.json": {
            "image_token": _SPECIAL[IMAGE_ID],
            "num_additional_image_tokens": 1,
            "patch_size": size.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": _tokenizer_config(size),
    }
    template = (_DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    if naming == "old":
        files["chat_template.json"] = {"chat_template": template}
    else:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, data in files.items():
        (out / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config(size: Size, dtype: str, naming: str) -> dict[str, Any]:
    """config.json. The hub's leaves out, in the text part, what transformers assumes anyway."""
    text = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": size.context,
    }
    if naming == "old":
        assumed = {**LLAMA_DEFAULTS, "num_key_value_heads": size.heads}
        text = {key: value for key, value in text.items() if value != assumed[key]}
    vision = {
        "hidden_size": size.vision_hidden,
        "image_size": size.image_size,
        "intermediate_size": size.vision_intermediate,
        "model_type": "clip_vision_model",
        "num_attention_heads": size.vision_heads,
        "num_hidden_layers": size.vision_layers,
        "patch_size": size.patch_size,
        "projection_dim": 768,
    }
    text_config: dict[str, Any] = {**text, "model_type": "llama", "rms_norm_eps": 1e-5}
    if naming == "new":
        ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": None}
        rope = {"rope_theta": 10000.0, "rope_type": "default"}
        text_config |= {"head_dim": size.hidden // size.heads, "rope_parameters": rope, **ids}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": (size.image_size // size.patch_size) ** 2,
        "image_token_index": IMAGE_ID,
        "model_type": "llava",
        "pad_token_id": PAD_ID,
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "tie_word_embeddings": False,
        "torch_dtype" if naming == "old" else "dtype": dtype,
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _preprocessor(size: Size) -> dict[str, Any]:
    data = json.loads((_DEMO / "preprocessor_config.json").read_text(encoding="utf-8"))
    data |= {"crop_size": {"height": size.image_size, "width": size.image_size}, "processor_class": "LlavaProcessor"}
    return {**data, "size": {"shortest_edge": size.image_size}}


def _added(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **flags}


def _tokenizer_config(size: Size) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token): _added(content) for token, content in _SPECIAL.items()},
        "bos_token": _SPECIAL[BOS_ID],
        "clean_up_tokenization_spaces": False,
        "eos_token": _SPECIAL[EOS_ID],
        "image_token": _SPECIAL[IMAGE_ID],
        "legacy": False,
        "model_max_length": size.context,
        "pad_token": _SPECIAL[PAD_ID],
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def tokenizer() -> dict[str, Any]:
    """tokenizer.json with IMAGE_ID pieces: special ones, 256 bytes, characters, then two and four letters joined.

    Spaces are handled as in Llama's tokenizers behind their `legacy` switch: only a text's first word gets a "▁".
    """
    single = ["▁", "\n", *(chr(code) for code in range(0x21, 0x7F))]
    lower = string.ascii_lowercase
    pairs = [("▁", letter) for letter in string.ascii_letters]
    pairs += list(itertools.product(lower, lower))
    syllables = [a + b for a, b in itertools.product(lower, lower) if (a in "aeiou") != (b in "aeiou")]
    pairs += list(itertools.product([f"▁{letter}" for letter in lower], lower))
    pairs += list(itertools.product(syllables, syllables))
    pieces = [_SPECIAL[0], _SPECIAL[BOS_ID], _SPECIAL[EOS_ID], *(f"<0x{byte:02X}>" for byte in range(256)), *single]
    longer = [(a, b) for a, b in itertools.product([f"▁{s}" for s in syllables], syllables)]
    merges = (pairs + longer)[: IMAGE_ID - len(pieces)]
    pieces += [a + b for a, b in merges]
    bos = {"SpecialToken": {"id": _SPECIAL[BOS_ID], "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, **_added(content)} for token, content in _SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {_SPECIAL[BOS_ID]: {"id": _SPECIAL[BOS_ID], "ids": [BOS_ID], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }
