"""Choices for a bundle's matrices: the usual ones, and what of a given recipe does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_runtime_recipe import whole

from tokprune.calibration.recipe import given_choices, usual_choices
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import Choice

SHAPES = {matrix.name: matrix.shape for matrix in whole().matrices}
WHERE = str(Path("recipe.json"))


@pytest.mark.parametrize("head", [None, "int8"])
def test_usual(head: str | None) -> None:
    """Decoder layers; the tower and the projector stay, the head too unless it was asked for, in all its pieces."""
    found = usual_choices(list(SHAPES), "int4", head)
    assert list(found) == list(SHAPES)
    wanted = [Choice()] * (2 * 6 + 2) + [Choice("int4")] * 21 + [Choice(head or "base")] * 2
    assert list(found.values()) == wanted


def test_given() -> None:
    assert given_choices(whole(), WHERE, SHAPES) == whole().choices
    assert list(given_choices(whole(), WHERE, dict(reversed(SHAPES.items())))) == list(SHAPES)[::-1]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({**SHAPES, "lm_head.weight": (8, 128)}, "does not speak of lm_head.weight, which the bundle has"),
        (dict(list(SHAPES.items())[:-1]), "speaks of lm_head.weight.4-8, which the bundle has not"),
        ({**SHAPES, "lm_head.weight.0-4": (4, 64)}, r"has lm_head.weight.0-4 as \[4, 128\], the bundle as \[4, 64\]"),
    ],
)
def test_of_another_model(shapes: dict[str, tuple[int, int]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        given_choices(whole(), WHERE, shapes)


def test_block_that_does_not_divide() -> None:
    recipe = whole()
    first = dataclasses.replace(recipe.matrices[0], choice=Choice("int4", 256))
    with pytest.raises(UserError, match=r"blocks of 256 weights in .*, whose rows have 128"):
        given_choices(dataclasses.replace(recipe, matrices=(first, *recipe.matrices[1:])), WHERE, SHAPES)
