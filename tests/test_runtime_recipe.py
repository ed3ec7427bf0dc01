"""The recipe as a file format: pinned to the byte, read strictly, and added up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_runtime_manifest import MANIFEST

from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import (
    Activation,
    Choice,
    Matrix,
    Range,
    Recipe,
    Record,
    chosen_groups,
    load_recipe,
    read_recipe,
)
from tokprune.runtime.recipe_report import recipe_report
from tokprune.runtime.weights import group_of, is_head, layer_of, matrix_names

LAYER = "language_model.layers.0."
INT4 = Record("int4", 128, None, None, 19.25, 264, None)
RECIPE = Recipe(
    schema=2,
    precision="int4",
    base="fp16",
    folded=("language_model.layers.0.input_layernorm.weight",),
    matrices=(
        Matrix("multi_modal_projector.linear_1.weight", (4, 8), Choice(), Record("fp16", *[None] * 4, 64, None)),
        Matrix(
            f"{LAYER}self_attn.q_proj.weight",
            (4, 128),
            Choice("int4", 128, "awq", "max", None, None, "it is cheap"),
            dataclasses.replace(INT4, alpha=0.25),
        ),
        Matrix(
            f"{LAYER}self_attn.k_proj.weight",
            (4, 128),
            Choice("int8", None, "smoothquant", "max", 0.5, Range("percentile", 99.9)),
            Record("int8", 128, 0.5, Activation(0.1, -12.7, 0.3), None, 520, None),
        ),
        Matrix(
            f"{LAYER}mlp.down_proj.weight",
            (4, 100),
            Choice("int4"),
            Record("fp16", None, None, None, None, 800, "its input is odd"),
        ),
        Matrix("lm_head.weight", (9, 4), Choice(reason="it costs 0.3"), Record("fp16", *[None] * 4, 72, None)),
    ),
)
TEXT = """  {
   "name": "language_model.layers.0.self_attn.k_proj.weight",
   "shape": [
    4,
    128
   ],
   "choice": {
    "precision": "int8",
    "block": null,
    "scheme": "smoothquant",
    "scale": "max",
    "alpha": 0.5,
    "activation": {
     "method": "percentile",
     "percentile": 99.9
    },
    "reason": null
   },
   "record": {
    "precision": "int8",
    "block": 128,
    "alpha": 0.5,
    "activation": {
     "scale": 0.1,
     "low": -12.7,
     "high": 0.3
    },
    "sqnr_db": null,
    "bytes": 520,
    "reason": null,
    "output_sqnr_db": null
   }
  },
"""
START = """{
 "schema": 2,
 "precision": "int4",
 "base": "fp16",
 "folded": [
  "language_model.layers.0.input_layernorm.weight"
 ],
 "matrices": [
  {
"""


def whole(layers: int = 3) -> Recipe:
    """A recipe for ``MANIFEST`` with so many decoder layers, its head in two pieces."""
    facts = dataclasses.replace(MANIFEST.model, layers=layers)
    stay = Record("fp16", None, None, None, None, 1024, None)
    matrices = [Matrix(name, (4, 128), Choice("int4"), INT4) for name in matrix_names(facts)]
    matrices += [Matrix(f"lm_head.weight.{at}-{at + 4}", (4, 128), Choice(), stay) for at in (0, 4)]
    return dataclasses.replace(RECIPE, matrices=tuple(matrices))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "recipe.json").write_text(whole().to_json())
    return Bundle(tmp_path, dataclasses.replace(MANIFEST, precision="int4", base="fp16"))


def test_format() -> None:
    assert RECIPE.to_json().startswith(START)
    assert TEXT in RECIPE.to_json()
    assert RECIPE.to_json().endswith("\n")


@pytest.mark.parametrize("recipe", [RECIPE, whole()])
def test_round_trip_to_the_byte(tmp_path: Path, recipe: Recipe) -> None:
    where = tmp_path / "recipe.json"
    where.write_text(recipe.to_json())
    assert load_recipe(where) == recipe
    assert load_recipe(where).to_json().encode() == where.read_bytes()


def test_names() -> None:
    found = matrix_names(MANIFEST.model)
    assert len(found) == len(set(found)) == 2 * 6 + 2 + 3 * 7
    assert found[5:8] == (
        "vision_tower.encoder.layers.0.mlp.fc2.weight",
        "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
        "vision_tower.encoder.layers.1.self_attn.k_proj.weight",
    )
    assert found[13:15] == ("multi_modal_projector.linear_2.weight", "language_model.layers.0.self_attn.q_proj.weight")
    assert [layer_of(name) for name in (found[-1], found[0], found[13], "lm_head.weight")] == [2, None, None, None]
    assert [group_of(name) for name in (found[7], found[13], found[21], "lm_head.weight.0-4")] == [
        "vision_tower.1",
        "projector",
        "layers.1",
        "lm_head",
    ]
    assert [is_head(name) for name in ("lm_head.weight", "lm_head.weight.4-8", "lm_head.weights", found[0])] == [
        True,
        True,
        False,
        False,
    ]


def test_groups_that_are_to_be_integers() -> None:
    assert chosen_groups(RECIPE.choices) == {
        "layers.0": [
            f"{LAYER}self_attn.q_proj.weight",
            f"{LAYER}self_attn.k_proj.weight",
            f"{LAYER}mlp.down_proj.weight",
        ]
    }


def test_totals() -> None:
    """By hand: 4 · 128 / 2 codes and 4 scales of 2 bytes, 4 · 128 codes and 4 scales, of 2 · 4 · 128 weights of 4."""
    assert RECIPE.totals() == {
        "precision": "int4",
        "base": "fp16",
        "matrices": 2,
        "matrices_by_precision": {"int8": 1, "int4": 1},
        "matrices_kept": 2,
        "bytes": 264 + 520,
        "bytes_fp32": 4096,
        "ratio_fp32": 784 / 4096,
        "sqnr_db_min": 19.25,
    }


def test_other_bundles_have_none(tmp_path: Path) -> None:
    assert read_recipe(Bundle(tmp_path, MANIFEST)) is None


@pytest.mark.parametrize("layers", [3, 5])
def test_layers_of_a_bundle_that_may_have_been_cut(bundle: Bundle, layers: int) -> None:
    bundle.file("recipe.json").write_text(whole(layers).to_json())
    assert read_recipe(bundle) == whole(layers)


def choice(**changes: object):
    return lambda data: data["matrices"][0]["choice"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("base"), "recipe.base"),
        (lambda data: data.update(spare=1), "recipe.spare"),
        (lambda data: data.update(schema=1), "no recipe of version 2"),
        (lambda data: data.update(schema=True), "no recipe of version 2"),
        (lambda data: data.update(precision="int8"), "is for int8 on fp16, the bundle is int4 on fp16"),
        (lambda data: data.update(base="fp32"), "is for int4 on fp32"),
        (lambda data: data["matrices"][0]["record"].update(block="128"), r"recipe.matrices\[0\].record.block"),
        (lambda data: data["matrices"][0].update(name="q"), "has not the matrices"),
        (lambda data: data["matrices"].pop(17), "has not the matrices"),
        (lambda data: [data["matrices"].pop() for _ in range(2)], "has not the matrices"),
        (lambda data: data["matrices"].reverse(), "has not the matrices"),
        (choice(precision="fp8"), "precision 'fp8': there are base, int8, int4"),
        (choice(scheme="gptq"), "scheme 'gptq': there are round, awq, smoothquant"),
        (choice(scale="min"), "scale 'min': there are max"),
        (choice(precision="base", alpha=0.5), "precision 'base' and more"),
        (choice(block=48), "a block of 48 in 'int4'"),
        (choice(precision="int8", block=128), "a block of 128 in 'int8'"),
        (choice(activation={"method": "max", "percentile": None}), "an activation in 'int4'"),
        (choice(precision="int8", activation={"method": "mean", "percentile": None}), "activation.method 'mean'"),
        (choice(precision="int8", activation={"method": "max", "percentile": 99}), "percentile 99.0"),
        (choice(precision="int8", activation={"method": "percentile", "percentile": None}), "percentile None"),
    ],
)
def test_faults(bundle: Bundle, change, words: str) -> None:
    data = json.loads(whole().to_json())
    change(data)
    bundle.file("recipe.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=words):
        read_recipe(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_no_recipe_at_all(bundle: Bundle, text: str) -> None:
    bundle.file("recipe.json").write_text(text)
    with pytest.raises(UserError, match=r"recipe.json (cannot be read as JSON|is no recipe of version 2)"):
        read_recipe(bundle)


def test_report_by_layer() -> None:
    """Where choices have reasons, what has the same one stands together."""
    lines = recipe_report(RECIPE.totals(), [dataclasses.asdict(matrix) for matrix in RECIPE.matrices]).splitlines()
    assert [" ".join(line.split()) for line in (lines[0], *lines[2:6])] == [
        "part matrices precision SQNR, dB size",
        "layers.0 1 int4 19.2 to 19.2 264 B it is cheap",
        "layers.0 1 int8 - 520 B a scale a row",
        "layers.0 1 fp16 - 800 B its input is odd",
        "lm_head 1 fp16 - 72 B it costs 0.3",
    ]


def test_report() -> None:
    plain = [dataclasses.replace(m, choice=dataclasses.replace(m.choice, reason=None)) for m in RECIPE.matrices]
    lines = recipe_report(RECIPE.totals(), list(map(dataclasses.asdict, plain))).splitlines()
    assert len(lines) == 2 + 3 + 2  # projector and head, which nobody asked for, are not there
    assert [" ".join(line.split()) for line in lines[2:5]] == [
        "self_attn.q_proj 1 int4 19.2 to 19.2 264 B a scale a row",
        "self_attn.k_proj 1 int8 - 520 B a scale a row",
        "mlp.down_proj 1 fp16 - 800 B its input is odd",
    ]
    assert lines[-1] == "int4 on fp16: 2 matrices of 784 B, 0.191 of FP32, 2 stay as they are"
