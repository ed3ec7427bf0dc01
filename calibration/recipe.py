"""Choices for all matrices of a bundle: the usual ones, and those of a recipe that is given. Opens no weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tokprune.calibration.histogram import PERCENTILE
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import Choice, Range, Recipe
from tokprune.runtime.weights import is_head, layer_of

ALPHA = 0.7  # SmoothQuant's; by measurement (docs/methods.md)


def usual_choices(
    matrices: Sequence[str], precision: str, head: str | None = None, form: Choice | None = None
) -> dict[str, Choice]:
    """Decoder layers in ``precision``, as ``form`` says; ``lm_head`` in ``head``, rounded to nearest; the rest stays.

    ``form`` is that of `usual_form`, without one weights are rounded to nearest. Where it rounds activations, tower and
    projector are in ``precision`` too.
    """
    form = form or Choice()
    return {name: _usual(name, precision, head, form) for name in matrices}


def usual_form(scheme: str, method: str = "max") -> Choice:
    """What ``scheme`` asks for of each matrix that it rounds, ``method`` finding the ranges of activations."""
    if scheme != "smoothquant":
        return Choice(scheme=scheme)
    found = Range(method, PERCENTILE if method == "percentile" else None)
    return Choice(scheme=scheme, alpha=ALPHA, activation=found)


def _usual(name: str, precision: str, head: str | None, form: Choice) -> Choice:
    if is_head(name):
        return Choice(head or Choice.precision)
    if layer_of(name) is None and form.activation is None:
        return Choice()
    return dataclasses.replace(form, precision=precision)


def given_choices(recipe: Recipe, where: str, matrices: Mapping[str, tuple[int, int]]) -> dict[str, Choice]:
    """The choices of ``recipe``, read from ``where``, for a bundle that has ``matrices``: shapes [out, in] by name.

    Raises UserError if they are not the recipe's, or a block does not divide its matrix.
    """
    shapes = {matrix.name: matrix.shape for matrix in recipe.matrices}
    advice = "give a recipe that was made for this model, and for this split of its head"
    for name in matrices:
        if name not in shapes:
            raise UserError(f"{where} does not speak of {name}, which the bundle has: {advice}")
    for name, shape in shapes.items():
        if name not in matrices:
            raise UserError(f"{where} speaks of {name}, which the bundle has not: {advice}")
        if shape != matrices[name]:
            raise UserError(f"{where} has {name} as {list(shape)}, the bundle as {list(matrices[name])}: {advice}")
    for name, choice in recipe.choices.items():
        if choice.block is not None and matrices[name][1] % choice.block:
            raise UserError(
                f"{where} asks for blocks of {choice.block} weights in {name}, whose rows have {matrices[name][1]}: "
                "give a block that divides them, or null"
            )
    return {name: recipe.choices[name] for name in matrices}
