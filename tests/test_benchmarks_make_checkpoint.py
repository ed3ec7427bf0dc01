"""Random checkpoints in the hub's format: transformers and tokprune read them, and the model is no degenerate one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_files import LEAST_VOCABULARY, SIZES, Size
from make_checkpoint import DTYPES, key, main, make_checkpoint, shards, values, weights
from PIL import Image
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from tokprune.export.checkpoint import Checkpoint, find_checkpoint, load_model, load_processor
from tokprune.runtime import names
from tokprune.runtime.flops import SEVEN_B, THIRTEEN_B
from tokprune.runtime.prompt import Tokenizer

TINY = Size(
    hidden=64,
    intermediate=96,
    layers=4,
    heads=4,
    kv_heads=2,
    context=256,
    vision_hidden=32,
    vision_intermediate=64,
    vision_layers=3,
    vision_heads=4,
    image_size=56,
)
SHARD = 3_000_000  # a table of embeddings, 4 MB, has one of its own


@pytest.fixture(scope="module", params=["old", "new"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("made") / request.param
    make_checkpoint(path, TINY, naming=request.param, limit=SHARD)
    return find_checkpoint(str(path))


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_transformers_loads_every_key_and_the_processor(checkpoint):
    load_model(checkpoint, dtype=torch.float32)  # refuses missing, misshapen and surplus ones
    load_processor(checkpoint)  # refuses other ids, image sizes and prompt formats
    assert (checkpoint.facts.kv_heads, checkpoint.facts.context) == (2, 256)
    assert checkpoint.facts.bos_token_id == 1
    assert checkpoint.facts.eos_token_ids == (2,)
    assert checkpoint.facts.vision.tokens == 16


def test_keys_are_those_that_transformers_writes(checkpoint, tmp_path):
    load_model(checkpoint, dtype=torch.float16).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        written = set(file.keys())
    # it saves with the keys that it loaded, and without a checkpoint with the new ones
    assert written == {key(weight.name, checkpoint.path.name) for weight in weights(TINY)}
    index = json.loads((checkpoint.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {key(weight.name, checkpoint.path.name) for weight in weights(TINY)}
    assert index["metadata"]["total_size"] == 2 * sum(weight.count for weight in weights(TINY))
    assert len(set(index["weight_map"].values())) == len(list(checkpoint.path.glob("*.safetensors"))) > 2


def test_both_namings_hold_the_same_weights(tmp_path):
    models = []
    for naming in ("old", "new"):
        make_checkpoint(tmp_path / naming, TINY, naming=naming)
        models.append(LlavaForConditionalGeneration.from_pretrained(tmp_path / naming).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_checkpoint(tmp_path / name, TINY, seed=seed)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_hold_the_same_values_rounded(dtype, tmp_path):
    make_checkpoint(tmp_path / "made", TINY, dtype=dtype)
    weight = next(w for w in weights(TINY) if w.name.endswith("lm_head.weight"))
    exact = np.concatenate(list(values(weight, "float32", 0))).reshape(weight.shape)
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        tensor = file.get_tensor(weight.name)
    assert tensor.dtype == getattr(torch, dtype)
    assert torch.equal(tensor, torch.tensor(exact).to(tensor.dtype))
    assert exact.std() == pytest.approx(weight.spread, rel=0.01)
    assert abs(exact.mean()) < 0.01 * weight.spread


def test_tokenizer_is_of_llamas_kind(checkpoint):
    processor = load_processor(checkpoint)
    tokenizer = Tokenizer(checkpoint.path / names.TOKENIZER_FILE)
    text = "USER: <image>\nHow many größe digits? 👍 ASSISTANT:"
    ids = tokenizer.encode(text)
    assert ids == processor.tokenizer(text).input_ids
    assert ids[0] == 1
    assert ids.count(32000) == 1
    assert 0 not in ids  # bytes stand for what has no piece
    assert tokenizer.decode(ids) == text.replace("<image>", "")
    assert len(processor.tokenizer) == LEAST_VOCABULARY
    assert tokenizer.special_tokens == {"<unk>", "<s>", "</s>", "<image>", "<pad>"}


def test_prompts_and_images_change_what_is_said(tmp_path):
    make_checkpoint(tmp_path / "made", TINY)
    checkpoint = find_checkpoint(str(tmp_path / "made"))
    model, processor = load_model(checkpoint, dtype=torch.float32), load_processor(checkpoint)
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.new("RGB", (56, 56), "red")]
    logits, said = [], []
    for image in images:
        for question in ("How many digits are there?", "What is it?"):
            inputs = processor(text=f"USER: <image>\n{question} ASSISTANT:", images=image, return_tensors="pt")
            with torch.no_grad():
                logits.append(model(**inputs).logits[0, -1])
                said.append(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, -16:].tolist())
    assert all(torch.isfinite(row).all() for row in logits)
    assert (logits[0] - logits[2]).norm() > 0.1 * logits[0].norm()  # another image; the same words would give 0
    assert len({row.argmax().item() for row in logits}) == 4
    assert all(len(set(ids)) > 4 for ids in said)


@pytest.mark.parametrize(("name", "facts", "gigabytes"), [("7b", SEVEN_B, 14.1), ("13b", THIRTEEN_B, 26.7)])
def test_known_sizes(name, facts, gigabytes):
    size = SIZES[name]
    assert (size.hidden, size.intermediate, size.layers) == (facts.hidden, facts.intermediate, facts.layers)
    assert (size.vocabulary, size.heads, size.context) == (facts.vocabulary, facts.heads, facts.context)
    parts = shards(size, "float16", 5_000_000_000)
    sizes = [2 * sum(weight.count for weight in part) for part in parts]
    assert sum(sizes) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert len(parts) == {"7b": 3, "13b": 6}[name]
    assert max(sizes) <= 5_000_000_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"hidden": 64}', "lacks the size 'intermediate'"),
        ('{"hidden": 64, "width": 3}', "keys among"),
        ('{"hidden": 65, "intermediate": 96, "layers": 2, "heads": 4}', "hidden 65, no multiple of its heads"),
        ('{"hidden": 64, "intermediate": 96, "layers": true, "heads": 4}', "layers True"),
        ('{"hidden": 64, "intermediate": 96, "layers": 2, "heads": 4, "vocabulary": 100}', "vocabulary of 100"),
        ("[", "neither 7b nor 13b nor reference nor a JSON file"),
    ],
)
def test_says_what_is_wrong_with_a_size(text, said, tmp_path, capsys):
    (tmp_path / "size.json").write_text(text)
    assert main(["--size", str(tmp_path / "size.json"), "--out", str(tmp_path / "made")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_leaves_alone_what_is_there(tmp_path, capsys):
    (tmp_path / "size.json").write_text('{"hidden": 64, "intermediate": 96, "layers": 2, "heads": 4}')
    (tmp_path / "made").mkdir()
    assert main(["--size", str(tmp_path / "size.json"), "--out", str(tmp_path / "made")]) == 2
    assert "is there already" in capsys.readouterr().err
