"""The recipe of a quantised bundle, ``recipe.json``: each matrix, its precision, and what rounding did to it.

Knows JSON; opens no graph and no weight.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import read_as
from tokprune.runtime.weights import BASES, MATRICES

SCHEMA = 1
SCHEME = "symmetric, round to nearest"


@dataclass(frozen=True)
class Matrix:
    """One projection of a decoder layer, ``shape`` [out, in].

    ``precision`` is the recipe's, with ``block`` weights of a row to a scale; or the base's for a matrix that stays as
    it is, for the ``reason`` given, with neither block nor SQNR. ``sqnr_db`` is None also where rounding lost nothing.
    """

    name: str
    shape: tuple[int, int]
    precision: str
    block: int | None
    sqnr_db: float | None
    bytes: int  # codes and scales
    reason: str | None


@dataclass(frozen=True)
class Recipe:
    """All of ``recipe.json``. ``base`` is the precision of everything that is no matrix of a decoder layer."""

    schema: int
    precision: str
    base: str
    scheme: str
    matrices: tuple[Matrix, ...]  # in the order of layers, and of ``MATRICES`` in each

    @property
    def rounded(self) -> tuple[Matrix, ...]:
        """Those that are in the recipe's precision."""
        return tuple(matrix for matrix in self.matrices if matrix.precision == self.precision)

    def to_json(self) -> str:
        """The recipe as it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def totals(self) -> dict[str, Any]:
        """What ``--json`` prints: of the rounded matrices, beside the number of those that stay."""
        size = sum(matrix.bytes for matrix in self.rounded)
        fp32 = sum(4 * matrix.shape[0] * matrix.shape[1] for matrix in self.rounded)
        return {
            "precision": self.precision,
            "base": self.base,
            "matrices": len(self.rounded),
            "matrices_kept": len(self.matrices) - len(self.rounded),
            "bytes": size,
            "bytes_fp32": fp32,
            "ratio_fp32": size / fp32 if fp32 else None,
            "sqnr_db_min": min((m.sqnr_db for m in self.rounded if m.sqnr_db is not None), default=None),
        }


def read_recipe(bundle: Bundle) -> Recipe | None:
    """The recipe of a quantised bundle; None of another. Raises UserError if it is not one, or not this bundle's."""
    manifest = bundle.manifest
    if manifest.precision in BASES:
        return None
    where = bundle.file(names.RECIPE_FILE)
    try:
        data = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): quantise the bundle again") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise UserError(f"{where} is no recipe of version {SCHEMA}: quantise the bundle again with this version")
    recipe: Recipe = read_as(Recipe, data, "recipe", str(where))
    if (recipe.precision, recipe.base) != (manifest.precision, manifest.base):
        raise UserError(
            f"{where} is for {recipe.precision} on {recipe.base}, the bundle is {manifest.precision} on "
            f"{manifest.base}: quantise it again"
        )
    wanted = list(matrix_names(manifest.model.layers))
    if [matrix.name for matrix in recipe.matrices][: len(wanted)] != wanted:  # a bundle that was cut has fewer
        raise UserError(f"{where} has not the matrices of the bundle's layers in order: quantise the bundle again")
    return recipe


def matrix_names(layers: int) -> tuple[str, ...]:
    """Names of the matrices of the first ``layers`` decoder layers."""
    return tuple(f"language_model.layers.{layer}.{name}" for layer in range(layers) for name in MATRICES)
