"""Checkpoints: what is read of one, and what is refused before a weight is loaded or while it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokprune.export.checkpoint import find_checkpoint, load_model, load_processor
from tokprune.export.demo import checkpoint_dir
from tokprune.runtime.errors import UserError


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, path)
    return path


def test_facts(tiny_checkpoint):
    facts = find_checkpoint(str(tiny_checkpoint)).facts
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads, facts.head_dim) == (3, 64, 4, 2, 16)
    assert (facts.vision.layers, facts.vision.tokens, facts.vision.grid) == (2, 16, (4, 4))
    assert (facts.vocabulary, facts.context, facts.image_token_id) == (576, 128, 3)
    assert (facts.bos_token_id, facts.eos_token_ids) == (0, (1,))


def test_demo():
    checkpoint = find_checkpoint("demo")
    assert checkpoint.path == checkpoint_dir()
    assert checkpoint.facts.name == "demo"
    assert checkpoint.facts.vision.tokens == 576


class TestEndOfSequence:
    @pytest.mark.parametrize(("value", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, (1,))])
    def test_generation_config_has_the_last_word(self, copy, value, expected):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert find_checkpoint(str(copy)).facts.eos_token_ids == expected

    def test_without_generation_config(self, copy):
        (copy / "generation_config.json").unlink()
        assert find_checkpoint(str(copy)).facts.eos_token_ids == (1,)


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_loaded_as_they_are(self, tiny_checkpoint, dtype):
        model = load_model(find_checkpoint(str(tiny_checkpoint)), dtype=dtype)
        stored = load_file(tiny_checkpoint / "model.safetensors")
        name = next(name for name in stored if name.endswith("lm_head.weight"))
        assert torch.equal(model.lm_head.weight, stored[name].to(dtype))
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    def test_shards(self, copy):
        weights = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        parts = {"model-1.safetensors": {}, "model-2.safetensors": {}}
        for number, (name, tensor) in enumerate(weights.items()):
            parts[f"model-{1 + number % 2}.safetensors"][name] = tensor
        for file, part in parts.items():
            save_file(part, copy / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        model = load_model(find_checkpoint(str(copy)), dtype=torch.float32)
        name = next(name for name in weights if name.endswith("lm_head.weight"))
        assert torch.equal(model.lm_head.weight, weights[name])

    def test_links_as_in_the_hub_cache(self, copy, tmp_path):
        (copy / "model.safetensors").rename(tmp_path / "blob")
        (copy / "model.safetensors").symlink_to(tmp_path / "blob")
        load_model(find_checkpoint(str(copy)), dtype=torch.float32)

    def test_one_too_many(self, copy):
        """Nothing says what it was for, so the model is not the one that it seems to be."""
        weights = load_file(copy / "model.safetensors")
        save_file({**weights, "model.adapter.weight": torch.zeros(3)}, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"has beyond its architecture model\.adapter\.weight"):
            load_model(find_checkpoint(str(copy)), dtype=torch.float32)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.ckpt", "model.pkl"])
    def test_pickles(self, copy, name):
        (copy / "model.safetensors").rename(copy / name)
        with pytest.raises(UserError, match=f"pickle only .{name}., which is not opened"):
            find_checkpoint(str(copy))


class TestProcessor:
    def test_loads(self, tiny_checkpoint):
        processor = load_processor(find_checkpoint(str(tiny_checkpoint)))
        assert processor.tokenizer.convert_tokens_to_ids("<image>") == 3

    def test_without_chat_template_llava_15_is_assumed(self, copy):
        (copy / "chat_template.jinja").unlink()
        load_processor(find_checkpoint(str(copy)))

    def test_code_of_a_checkpoint_does_not_run(self, copy):
        (copy / "processing_evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Evil: pass\n")
        for name in ("processor_config.json", "tokenizer_config.json"):
            data = json.loads((copy / name).read_text())
            data |= {"processor_class": "Evil", "auto_map": {"AutoProcessor": "processing_evil.Evil"}}
            (copy / name).write_text(json.dumps(data))
        with pytest.raises(UserError, match="processor"):
            load_processor(find_checkpoint(str(copy)))
        assert not (copy / "ran").exists()

    def test_what_the_runtime_could_not_do(self, copy):
        data = json.loads((copy / "processor_config.json").read_text())
        data["image_processor"]["do_center_crop"] = False
        (copy / "processor_config.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match="do_center_crop"):
            load_processor(find_checkpoint(str(copy)))

    def test_more_tokens_than_the_model_has(self, copy):
        data = json.loads((copy / "tokenizer.json").read_text())
        used = len(data["model"]["vocab"])  # the model has room for more, as many have
        image = data["added_tokens"][-1]
        data["added_tokens"] += [{**image, "id": at, "content": f"<new {at}>"} for at in range(used, 577)]
        (copy / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match="has the token 576, the model tokens up to 575"):
            load_processor(find_checkpoint(str(copy)))
