"""Finds, checks and loads a LLaVA-1.5 checkpoint. Knows Hugging Face's formats; knows no ONNX.

Safetensors only: no pickle is ever opened, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, ProcessorMixin

from tokprune.export import demo
from tokprune.export.weights import canonical, read_header
from tokprune.runtime import names
from tokprune.runtime.config import model_facts
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import ModelFacts, PromptFormat
from tokprune.runtime.preprocess import image_spec

DEMO = "demo"
LLAVA_15 = PromptFormat(image="<image>\n", user="USER: {text} ", assistant="ASSISTANT:")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that passed the checks; nothing of its weights is in memory."""

    path: Path
    facts: ModelFacts
    prompt: PromptFormat
    shards: tuple[Path, ...]


def find_checkpoint(model: str) -> Checkpoint:
    """Check the checkpoint ``model``: "demo", a directory in Hugging Face's format, or a model of the hub.

    A model of the hub is fetched into its cache, and with HF_HUB_OFFLINE taken from there only.
    Raises UserError if there is none, or not one of LLaVA-1.5 with its weights in safetensors.
    """
    path = demo.checkpoint_dir() if model == DEMO else Path(model)
    if path.exists() and not path.is_dir():
        raise UserError(f"the model directory {model} is a file: give a checkpoint's directory, a hub id, or 'demo'")
    is_hub = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None
    if is_hub:
        path = _fetched(model)
    elif not path.exists():
        raise UserError(
            f"the model directory {model} does not exist: give a checkpoint's directory, a hub id such as "
            "llava-hf/llava-1.5-7b-hf, or 'demo'"
        )
    config = _json(path, "config.json")
    facts = model_facts(config, name=model, eos=_eos(path))
    if config.get("quantization_config") is not None:
        raise UserError(f"{path} is quantized already: give the checkpoint as it was before, in FP16 or FP32")
    if facts.image_token_id >= facts.vocabulary:
        raise UserError(
            f"{path} has the image token {facts.image_token_id}, but a vocabulary of {facts.vocabulary}: "
            "give a checkpoint that has an embedding for it, as llava-hf checkpoints do"
        )
    shards = _shards(path)
    for file in (names.TOKENIZER_FILE, "tokenizer_config.json"):
        if not (path / file).is_file():
            raise UserError(f"{path} has no {file}: add the processor's files, as llava-hf checkpoints have them")
    # the bundle names the model, not the exporting machine's directories
    name = model if model == DEMO or is_hub else path.resolve().name
    return Checkpoint(path, dataclasses.replace(facts, name=name), LLAVA_15, shards)


def _fetched(model: str) -> Path:
    """The hub's ``model`` in the cache: configuration, processor and safetensors, no pickle and no code."""
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (OSError, HFValidationError) as error:  # no network, offline and not in the cache, no such model, gated
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{model} is no directory here, and could not be had from the Hugging Face hub ({reason}): "
            "give a checkpoint's directory, or a model of the hub that you may read"
        ) from None


def _json(path: Path, file: str) -> dict[str, Any]:
    try:
        data = json.loads((path / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} has no {file}: give the directory of a LLaVA-1.5 checkpoint") from None
    except (ValueError, RecursionError) as error:  # also no UTF-8, numbers too long, nesting too deep
        raise UserError(f"{path / file} is not valid JSON ({error}): fetch the checkpoint again") from None
    except OSError as error:
        raise UserError(f"{path / file} cannot be read ({error.strerror}): check the checkpoint") from None
    if not isinstance(data, dict):
        raise UserError(f"{path / file} holds no JSON object: fetch the checkpoint again")
    return data


def _eos(path: Path) -> tuple[int, ...] | None:
    """End-of-sequence ids of generation_config.json, which has the last word in transformers; None if silent."""
    if not (path / "generation_config.json").is_file():
        return None
    found = _json(path, "generation_config.json").get("eos_token_id")
    return None if found is None else tuple(found) if isinstance(found, list) else (found,)


def _shards(path: Path) -> tuple[Path, ...]:
    """The checkpoint's weight files, all of them whole."""
    present = [file for file in _WEIGHTS if (path / file).is_file()]
    if not present:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise UserError(
                f"{path} has its weights as a pickle only ({pickles[0]}), which is not opened: "
                "convert them to safetensors"
            )
        raise UserError(f"{path} has no weights ({_WEIGHTS[0]} or its index): fetch the checkpoint again")
    shards = [path / present[0]]
    if present[0].endswith(".json"):
        index = _json(path, present[0]).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise UserError(f"{path / present[0]} has no map of weights to shards: fetch the checkpoint again")
        shards = [path / shard for shard in sorted(set(index.values()))]
    for shard in shards:
        if shard.parent != path or shard.name == "..":
            raise UserError(
                f"{path / present[0]} names the shard {shard}, which is outside the checkpoint: do not use it"
            )
        if shard.suffix != ".safetensors" or shard.name == names.MODULES_FILE:
            raise UserError(f"{path / present[0]} names the shard {shard.name}, which cannot be one: do not use it")
        read_header(shard)
    return tuple(shards)


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """Load the weights into transformers' model, in eval mode on the CPU.

    Only as many decoder layers are loaded as ``checkpoint.facts`` has, which may be fewer than the checkpoint's.
    Raises UserError if weights are missing or of the wrong shape: transformers would make up what it lacks.
    """
    with _transformers(checkpoint, "weights"):
        config = LlavaConfig.from_pretrained(checkpoint.path, local_files_only=True)
        left_out = range(checkpoint.facts.layers, config.text_config.num_hidden_layers)
        config.text_config.num_hidden_layers = checkpoint.facts.layers
        model, info = LlavaForConditionalGeneration.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    for kind, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has with another shape"),
        ("unexpected_keys", "has beyond its architecture"),
    ):
        prefixes = tuple(f"language_model.layers.{layer}." for layer in left_out)
        keys = sorted(str(key) for key in info[kind] if not canonical(str(key)).startswith(prefixes))
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"the checkpoint {checkpoint.path} {what} {keys[0]}{more}: it is no whole LLaVA-1.5 checkpoint"
            )
    return model.eval()


def load_processor(checkpoint: Checkpoint) -> ProcessorMixin:
    """Load the processor, and check that tokens and chat format are those that the bundle will use.

    Raises UserError if they are others, or if transformers cannot load it.
    """
    facts, form = checkpoint.facts, checkpoint.prompt
    with _transformers(checkpoint, "processor"):
        processor = AutoProcessor.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        tokenizer = getattr(processor, "tokenizer", None)
        image_processor = getattr(processor, "image_processor", None)
    if tokenizer is None or image_processor is None:
        raise UserError(
            f"{checkpoint.path} has no processor of images and text: add the files of the llava-hf checkpoint"
        )
    last = max(tokenizer.get_vocab().values())
    if last >= facts.vocabulary:
        raise UserError(
            f"the tokenizer of {checkpoint.path} has the token {last}, the model tokens up to {facts.vocabulary - 1}: "
            "give the tokenizer that belongs to the model"
        )
    token = tokenizer.convert_tokens_to_ids(form.image.strip())
    if token != facts.image_token_id:
        raise UserError(
            f"the tokenizer of {checkpoint.path} reads {form.image.strip()} as token {token}, the model's image token "
            f"is {facts.image_token_id}: give the tokenizer that belongs to the model"
        )
    size = facts.vision.image_size
    spec = image_spec(json.loads(image_processor.to_json_string()), f"the image processor of {checkpoint.path}")
    if spec.size != (size, size):
        raise UserError(
            f"the image processor of {checkpoint.path} makes images of {spec.size} pixels, the model reads "
            f"{size}×{size}: give the processor that belongs to the model"
        )
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        with _transformers(checkpoint, "chat template"):
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ours = form.user.format(text=form.image + "What is this?") + form.assistant
        if text != ours:
            raise UserError(
                f"the chat template of {checkpoint.path} gives {text!r}, only LLaVA-1.5's {ours!r} is supported"
            )
    return processor


@contextlib.contextmanager
def _transformers(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Keep transformers' bars and notes away while it loads; what it raises is the checkpoint's fault."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # there is no narrower type for files that it cannot read
        raise UserError(
            f"transformers cannot load the {what} of {checkpoint.path} ({error}): fetch the checkpoint again"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
