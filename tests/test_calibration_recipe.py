"""The recipe as a file format: pinned to the byte, read strictly, and added up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_runtime_manifest import MANIFEST

from tokprune.calibration.recipe import Matrix, Recipe, matrix_names, read_recipe
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.report import recipe_report

RECIPE = Recipe(
    schema=1,
    precision="int4",
    base="fp16",
    scheme="symmetric, round to nearest",
    matrices=(
        Matrix("language_model.layers.0.self_attn.q_proj.weight", (4, 128), "int4", 128, 19.25, 264, None),
        Matrix("language_model.layers.0.self_attn.k_proj.weight", (4, 128), "int4", 128, None, 264, None),
        Matrix("language_model.layers.0.mlp.down_proj.weight", (4, 100), "fp16", None, None, 800, "its input is odd"),
    ),
)
TEXT = """{
 "schema": 1,
 "precision": "int4",
 "base": "fp16",
 "scheme": "symmetric, round to nearest",
 "matrices": [
  {
   "name": "language_model.layers.0.self_attn.q_proj.weight",
   "shape": [
    4,
    128
   ],
   "precision": "int4",
   "block": 128,
   "sqnr_db": 19.25,
   "bytes": 264,
   "reason": null
  },
"""


def whole(layers: int = 3) -> Recipe:
    """A recipe for the layers of ``MANIFEST``."""
    matrices = (Matrix(name, (4, 128), "int4", 128, 20.0, 264, None) for name in matrix_names(layers))
    return dataclasses.replace(RECIPE, matrices=tuple(matrices))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "recipe.json").write_text(whole().to_json())
    return Bundle(tmp_path, dataclasses.replace(MANIFEST, precision="int4", base="fp16"))


def test_format() -> None:
    assert RECIPE.to_json().startswith(TEXT)
    assert RECIPE.to_json().endswith("\n")


def test_round_trip_to_the_byte(bundle: Bundle) -> None:
    found = read_recipe(bundle)
    assert found == whole()
    assert found.to_json() == bundle.file("recipe.json").read_text()


def test_names() -> None:
    assert len(matrix_names(3)) == len(set(matrix_names(3))) == 21
    assert matrix_names(2)[7:9] == (
        "language_model.layers.1.self_attn.q_proj.weight",
        "language_model.layers.1.self_attn.k_proj.weight",
    )


def test_totals() -> None:
    """By hand: 2 · (4 · 128 / 2 codes + 4 scales of 2 bytes), of 2 · 4 · 128 weights of 4 bytes."""
    assert RECIPE.totals() == {
        "precision": "int4",
        "base": "fp16",
        "matrices": 2,
        "matrices_kept": 1,
        "bytes": 528,
        "bytes_fp32": 4096,
        "ratio_fp32": 528 / 4096,
        "sqnr_db_min": 19.25,
    }


def test_report() -> None:
    lines = recipe_report(RECIPE.totals(), [dataclasses.asdict(matrix) for matrix in RECIPE.matrices]).splitlines()
    assert lines[2].split() == [
        "self_attn.q_proj",
        "1",
        "int4",
        "19.2",
        "to",
        "19.2",
        "264",
        "B",
        "a",
        "scale",
        "a",
        "row",
    ]
    assert lines[4].split()[:6] == ["mlp.down_proj", "1", "fp16", "-", "800", "B"]
    assert "its input is odd" in lines[4]
    assert lines[-1] == "int4 on fp16: 2 matrices of 528 B, 0.129 of FP32, 1 stay as they are"


def test_other_bundles_have_none(tmp_path: Path) -> None:
    assert read_recipe(Bundle(tmp_path, MANIFEST)) is None


def test_more_layers_than_a_bundle_that_was_cut(bundle: Bundle) -> None:
    bundle.file("recipe.json").write_text(whole(5).to_json())
    assert read_recipe(bundle) == whole(5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("base"), "recipe.base"),
        (lambda data: data.update(spare=1), "recipe.spare"),
        (lambda data: data.update(schema=2), "no recipe of version 1"),
        (lambda data: data.update(schema=True), "no recipe of version 1"),
        (lambda data: data.update(precision="int8"), "is for int8 on fp16, the bundle is int4 on fp16"),
        (lambda data: data.update(base="fp32"), "is for int4 on fp32"),
        (lambda data: data["matrices"][0].update(block="128"), r"recipe.matrices\[0\].block"),
        (lambda data: data["matrices"][0].update(name="q"), "has not the matrices"),
        (lambda data: data["matrices"].pop(), "has not the matrices"),
        (lambda data: data["matrices"].reverse(), "has not the matrices"),
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
    with pytest.raises(UserError, match=r"recipe.json .*: quantise the bundle again"):
        read_recipe(bundle)
