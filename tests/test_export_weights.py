"""A checkpoint's tensors by one name each and where they lie; what lacks, is too much or does not fit is named."""

import json

import numpy as np
import pytest
import torch
from conftest import redraw_checkpoint
from safetensors.torch import load_file, save_file

from tokprune.export.checkpoint import find_checkpoint, load_model
from tokprune.export.skeleton import expected_shapes, is_tied, skeleton
from tokprune.export.weights import Weights, canonical
from tokprune.runtime.errors import UserError

# canonical name, then as the hub's llava-hf checkpoints, transformers 4 in memory, and transformers 5 spell it
NAMES = [
    ("lm_head.weight", "language_model.lm_head.weight", "lm_head.weight", "lm_head.weight"),
    (
        "language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
    ),
    (
        "language_model.layers.11.mlp.up_proj.weight",
        "language_model.model.layers.11.mlp.up_proj.weight",
        "model.language_model.layers.11.mlp.up_proj.weight",
        "model.language_model.layers.11.mlp.up_proj.weight",
    ),
    (
        "language_model.norm.weight",
        "language_model.model.norm.weight",
        "model.language_model.norm.weight",
        "model.language_model.norm.weight",
    ),
    (
        "multi_modal_projector.linear_2.bias",
        "multi_modal_projector.linear_2.bias",
        "model.multi_modal_projector.linear_2.bias",
        "model.multi_modal_projector.linear_2.bias",
    ),
    (
        "vision_tower.pre_layrnorm.bias",
        "vision_tower.vision_model.pre_layrnorm.bias",
        "model.vision_tower.vision_model.pre_layrnorm.bias",
        "model.vision_tower.pre_layrnorm.bias",
    ),
    (
        "vision_tower.encoder.layers.3.self_attn.k_proj.bias",
        "vision_tower.vision_model.encoder.layers.3.self_attn.k_proj.bias",
        "model.vision_tower.vision_model.encoder.layers.3.self_attn.k_proj.bias",
        "model.vision_tower.encoder.layers.3.self_attn.k_proj.bias",
    ),
]


@pytest.mark.parametrize(("name", "hub", "four", "five"), NAMES)
def test_canonical(name, hub, four, five):
    assert {canonical(name), canonical(hub), canonical(four), canonical(five)} == {name}


def hub(name: str) -> str:
    for new, old in (
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def four(name: str) -> str:
    name = hub(name) if name.startswith("vision_tower.") else name
    return name if name.startswith("lm_head.") else f"model.{name}"


def five(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def test_spellings_are_those_of_the_table():
    for name, *spelled in NAMES:
        assert [spell(name) for spell in (hub, four, five)] == spelled


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint) -> dict[str, torch.Tensor]:
    """The tiny checkpoint's, by canonical name."""
    return {canonical(key): tensor for key, tensor in load_file(tiny_checkpoint / "model.safetensors").items()}


@pytest.fixture(scope="module")
def expected(tiny_checkpoint) -> dict[str, tuple[int, ...]]:
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    return expected_shapes(skeleton(checkpoint, torch.float32), checkpoint)


@pytest.fixture
def weights(tmp_path):
    def weights(tensors: dict[str, torch.Tensor]) -> Weights:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return Weights(tmp_path, [tmp_path / "model.safetensors"])

    return weights


def test_expected_are_the_tensors_of_transformers_own_model(tiny_checkpoint, expected):
    model = load_model(find_checkpoint(str(tiny_checkpoint)), dtype=torch.float32)
    shapes = {canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected == shapes


@pytest.mark.parametrize("spell", [hub, four, five])
def test_every_spelling_is_read(tmp_path, tensors, expected, weights, spell):
    spelled = {spell(name): tensor for name, tensor in tensors.items()}
    assert len(spelled) == len(tensors)
    found = weights(spelled)
    found.check(expected)
    content = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.dtype, stored.shape) == ("F32", tuple(tensor.shape))
        assert content[stored.offset : stored.offset + stored.length] == tensor.numpy().tobytes(), name


def test_rows(tensors, weights):
    found = weights(tensors)["lm_head.weight"].rows(100, 103)
    assert found.shape == (3, 64)
    data = np.fromfile(found.file, np.float32, found.length // 4, offset=found.offset)
    np.testing.assert_array_equal(data.reshape(3, 64), tensors["lm_head.weight"][100:103])


def test_what_older_versions_computed_and_saved_is_passed_over(tensors, expected, weights):
    weights(
        {
            **tensors,
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        }
    ).check(expected)


NORM, UP = "language_model.norm.weight", "language_model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop(NORM), f"lacks {NORM}:"),
        (lambda found: (found.pop(NORM), found.pop(UP)), f"lacks {UP} and 1 more:"),
        (lambda found: found.update({"model.adapter.a": torch.zeros(2)}), "beyond its architecture, model.adapter.a:"),
        (
            lambda found: found.update({"language_model.model.layers.3.input_layernorm.weight": torch.zeros(64)}),
            "beyond its architecture, language_model.model.layers.3.input_layernorm.weight:",
        ),
        (
            lambda found: found.update({NORM: torch.zeros(65)}),
            rf"{NORM} with the shape \[65\], its config.json says \[64\]",
        ),
        (
            lambda found: found.update({UP: found[UP].T.contiguous()}),
            rf"{UP} with the shape \[64, 96\], its config.json says \[96, 64\]",
        ),
        (lambda found: found.update({UP: found[UP].to(torch.int8)}), f"{UP} in I8, only F16, BF16, F32 are read"),
        (lambda found: found.update({UP: found[UP].double()}), f"{UP} in F64, only"),
        (lambda found: found.pop("lm_head.weight"), "lacks lm_head.weight:"),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(tensors, expected, weights, change, words):
    changed = dict(tensors)
    change(changed)
    with pytest.raises(UserError, match=words) as refusal:
        weights(changed).check(expected)
    assert "\n" not in str(refusal.value)


def test_twice_under_two_spellings(tensors, weights):
    with pytest.raises(UserError, match=r"has \S+norm\.weight twice, also as \S+norm\.weight: fetch") as refusal:
        weights({**tensors, hub(NORM): tensors[NORM].clone()})
    assert hub(NORM) in str(refusal.value)


def test_twice_in_two_shards(tmp_path, tensors):
    for shard in ("a", "b"):
        save_file({NORM: tensors[NORM]}, tmp_path / shard)
    with pytest.raises(UserError, match=f"has {NORM} twice"):
        Weights(tmp_path, [tmp_path / "a", tmp_path / "b"])


class TestTied:
    def test_the_embedding_stands_for_a_head_that_is_not_there(self, tensors, expected, weights):
        found = weights({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
        found.check(expected, tied=True)
        assert found["lm_head.weight"] == found["language_model.embed_tokens.weight"]

    def test_a_head_that_is_there_is_taken(self, tensors, expected, weights):
        found = weights(tensors)
        found.check(expected, tied=True)
        assert found["lm_head.weight"] != found["language_model.embed_tokens.weight"]

    def test_as_transformers_saves_it(self, tiny_checkpoint, tmp_path):
        path = redraw_checkpoint(tiny_checkpoint, tmp_path / "tied", text={"tie_word_embeddings": True})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        stored = load_file(path / "model.safetensors")
        heads = [key for key in stored if canonical(key) == "lm_head.weight"]
        save_file({key: stored[key] for key in stored if key not in heads}, path / "model.safetensors")
        checkpoint = find_checkpoint(str(path))
        model = skeleton(checkpoint, torch.float32)
        assert is_tied(model)
        Weights(path, checkpoint.shards).check(expected_shapes(model, checkpoint), tied=is_tied(model))
