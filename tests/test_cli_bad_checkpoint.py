"""Checkpoints that are broken and places that cannot be written to: one sentence, exit code 2, nothing left behind."""

import json
import shutil

import pytest
from commands import edit_json, truncate, write
from safetensors.numpy import load_file, save_file


def only_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def without_a_weight(path):
    weights = load_file(path / "model.safetensors")
    weights.pop(sorted(weights)[5])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def with_another_shape(path):
    weights = load_file(path / "model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[name] = weights[name][:, :-1].copy()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def index_of(*shards):
    def change(path):
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        index = {"weight_map": {f"weight_{i}": shard for i, shard in enumerate(shards)}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def config(**changes):
    return lambda path: edit_json(path / "config.json", lambda data: data.update(changes))


def other_image_token(path):
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace("<image>", "<photo>"))
    edit_json(path / "tokenizer_config.json", lambda data: data.update(image_token="<photo>"))


CHECKPOINTS = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["has no weights"]),
    "pickle": (only_pickle, ["pickle", "pytorch_model.bin", "safetensors"]),
    "truncated": (truncate("model.safetensors", 50_000), ["model.safetensors"]),
    "pointer": (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ["safetensors"]),
    "weight missing": (without_a_weight, ["lacks"]),
    "weight of another shape": (with_another_shape, ["shape", "lm_head"]),
    "shard missing": (index_of("model-1.safetensors", "model-2.safetensors"), ["lacks its shard model-2"]),
    "shard outside": (index_of("../model-1.safetensors"), ["outside the checkpoint"]),
    "shard is the parent": (index_of(".."), ["outside the checkpoint"]),
    "shard is no text": (index_of(7), ["no map of weights"]),
    "index without map": (write("model.safetensors.index.json", "{}"), ["no map of weights"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["no config.json"]),
    "config is no JSON": (write("config.json", "{"), ["not valid JSON"]),
    "config is nested too deep": (write("config.json", "[" * 100_000), ["not valid JSON"]),
    "config is a list": (write("config.json", "[]"), ["no JSON object"]),
    "architecture": (config(model_type="llama"), ["llama", "llava"]),
    "llava-next": (config(model_type="llava_next"), ["llava_next"]),
    "text_config": (config(text_config=[1]), ["text_config"]),
    "quantized": (config(quantization_config={"quant_method": "awq"}), ["quantized"]),
    "image token": (config(image_token_index=9), ["<image>", "token 3", "9"]),
    "image token outside": (config(image_token_index=576), ["576"]),
    "eos": (write("generation_config.json", '{"eos_token_id": "x"}'), ["eos_token_id"]),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "tokenizer": (write("tokenizer.json", '{"model": 3}'), ["processor"]),
    "other tokenizer": (other_image_token, ["<image>"]),
    "no processor": (lambda path: (path / "processor_config.json").unlink(), ["processor"]),
    "processor of another size": (
        lambda path: edit_json(
            path / "processor_config.json",
            lambda data: data["image_processor"].update(crop_size={"height": 336, "width": 336}),
        ),
        ["336", "56"],
    ),
    "chat template": (write("chat_template.jinja", "[INST]{{ messages }}"), ["chat template"]),
    "broken chat template": (write("chat_template.jinja", "{% if %}"), ["chat template"]),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint(call, tiny_checkpoint, tmp_path, kind):
    break_it, words = CHECKPOINTS[kind]
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    if kind == "index without map":
        (tmp_path / "model" / "model.safetensors").unlink()
    break_it(tmp_path / "model")
    call("export", "--model", "model", "--method", "none", "--out", "new/bundle").refused("model", *words)


def test_pickle_is_never_opened(call, tiny_checkpoint, tmp_path):
    """Beside safetensors a pickle is ignored; one that runs code when opened must not run."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    truncate("model.safetensors", 50_000)(tmp_path / "model")
    call("export", "--model", "model", "--method", "none", "--out", "bundle").refused("model.safetensors")
    assert not (tmp_path / "opened").exists()


def test_model_is_not_there(call):
    call("export", "--model", "nowhere", "--method", "none").refused("nowhere does not exist")


def test_model_is_a_file(call, picture):
    call("export", "--model", picture, "--method", "none").refused("is a file")


# where to write


def test_out_holds_something_else(call, tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("my only copy")
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "out").refused("is not a bundle")


def test_out_is_a_bundle_with_something_else_in_it(call, tiny_checkpoint, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle("random"), tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("my only copy")
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "out").refused("thesis.tex", "lost")


def test_out_is_a_file(call, tiny_checkpoint, picture):
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", picture).refused("is not a directory")


def test_out_is_below_a_file(call, tiny_checkpoint, picture):
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", picture / "b").refused("is a file")


def test_out_is_a_link_to_nothing(call, tiny_checkpoint, tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "out").refused("is not a directory")


def test_out_has_too_long_a_name(call, tiny_checkpoint):
    call("export", "--model", tiny_checkpoint, "--method", "none", "--out", "x" * 300).refused("too long")


def test_out_is_the_checkpoint(call, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    call("export", "--model", "model", "--method", "none", "--out", "model").refused("is not a bundle")
