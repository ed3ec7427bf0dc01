"""The recipe of a quantised bundle, ``recipe.json``: of each matrix what was asked for, and what came of it.

Knows JSON; opens no graph and no weight.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest, read_as
from tokprune.runtime.weights import BASES, ONNX_BLOCKS, PRECISIONS, group_of, is_head, layer_of, matrix_names

SCHEMA = 2
BASE = "base"
INTEGERS = tuple(precision for precision in PRECISIONS if precision not in BASES)
SCHEMES = ("round", "awq", "smoothquant")
SCALES = ("max",)
RANGES = ("max", "percentile", "entropy", "mse")


@dataclass(frozen=True)
class Range:
    """How the range of activations is taken from what was seen of them; ``percentile`` belongs to that method only."""

    method: str
    percentile: float | None = None


@dataclass(frozen=True)
class Choice:
    """What is asked for one matrix. All but ``precision`` and ``reason`` concern integers only.

    ``precision`` is "base", "int8" or "int4". ``block`` weights of a row share a scale, None is `block_size`. ``scale``
    says how a scale is found, ``alpha`` how much of the activations' spread goes into the weights. ``activation`` None
    is weight-only.
    """

    precision: str = BASE
    block: int | None = None
    scheme: str = "round"
    scale: str = "max"
    alpha: float | None = None
    activation: Range | None = None
    reason: str | None = None  # None: because it was asked for

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self.scheme != "round" or self.activation is not None


@dataclass(frozen=True)
class Activation:
    """The one scale of what a matrix is multiplied with, from a range [``low``, ``high``] that was seen."""

    scale: float
    low: float
    high: float


@dataclass(frozen=True)
class Record:
    """What came of a choice. ``precision`` is an integer's, or the base's, then with neither block nor SQNR.

    ``sqnr_db`` is None also where rounding lost nothing. ``bytes`` are those of codes and scales, or of the matrix.
    ``output_sqnr_db`` is of the product, on rows that calibration kept; None of a choice that looked at none.
    """

    precision: str
    block: int | None
    alpha: float | None
    activation: Activation | None
    sqnr_db: float | None
    bytes: int
    reason: str | None  # why the matrix stays although an integer was asked for
    output_sqnr_db: float | None = None


@dataclass(frozen=True)
class Matrix:
    """One matrix that can be rounded, ``shape`` [out, in]."""

    name: str
    shape: tuple[int, int]
    choice: Choice
    record: Record


@dataclass(frozen=True)
class Recipe:
    """All of ``recipe.json``. ``precision`` is what was asked for, ``base`` that of everything which is not rounded.

    ``folded`` names other tensors that were multiplied by factors, so that matrices could be by their inverse.
    """

    schema: int
    precision: str
    base: str
    folded: tuple[str, ...]
    matrices: tuple[Matrix, ...]  # all that can be rounded, in the order of `matrix_names`

    @property
    def rounded(self) -> tuple[Matrix, ...]:
        """Those that became integers."""
        return tuple(matrix for matrix in self.matrices if matrix.record.precision in INTEGERS)

    @property
    def choices(self) -> dict[str, Choice]:
        """What was asked for, by matrix."""
        return {matrix.name: matrix.choice for matrix in self.matrices}

    def to_json(self) -> str:
        """The recipe as it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def totals(self) -> dict[str, Any]:
        """What ``--json`` prints: of the rounded matrices, beside the number of those that stay although asked for."""
        size = sum(matrix.record.bytes for matrix in self.rounded)
        fp32 = sum(4 * matrix.shape[0] * matrix.shape[1] for matrix in self.rounded)
        stay = [m for m in self.matrices if m.record.precision not in INTEGERS and (m.record.reason or m.choice.reason)]
        counts = {kind: sum(m.record.precision == kind for m in self.rounded) for kind in INTEGERS}
        ratios = [matrix.record.sqnr_db for matrix in self.rounded if matrix.record.sqnr_db is not None]
        return {
            "precision": self.precision,
            "base": self.base,
            "matrices": len(self.rounded),
            "matrices_by_precision": counts,
            "matrices_kept": len(stay),
            "bytes": size,
            "bytes_fp32": fp32,
            "ratio_fp32": size / fp32 if fp32 else None,
            "sqnr_db_min": min(ratios, default=None),
        }


def chosen_groups(choices: Mapping[str, Choice]) -> dict[str, list[str]]:
    """The matrices that are to be integers, by what they belong to, in their order."""
    groups: dict[str, list[str]] = {}
    for name, choice in choices.items():
        if choice.precision != BASE:
            groups.setdefault(group_of(name), []).append(name)
    return groups


def check_head(head: str | None, precision: str) -> None:
    """Raise UserError if a precision of ``lm_head`` was asked for beside one that is no integer's."""
    if head is not None and precision not in INTEGERS:
        raise UserError(f"--lm-head was given for precision '{precision}': it belongs to int8 and int4 only, drop it")


def segment_of(matrix: str, manifest: Manifest) -> str | None:
    """The segment whose graph reads a matrix; None of a layer that a bundle which was cut has not."""
    layer = manifest.model.layers - 1 if is_head(matrix) else layer_of(matrix)
    if layer is None:
        return names.VISION_ENCODER
    ranges = {segment.name: range(*segment.layers) for segment in manifest.segments if segment.layers is not None}
    return next((name for name, layers in ranges.items() if layer in layers), None)


def integer_bytes(path: Path) -> int | None:
    """Bytes of codes and scales in the bundle at ``path``; None without a recipe. Raises UserError if that is none."""
    where = path / names.RECIPE_FILE
    if not where.is_file():
        return None
    return sum(matrix.record.bytes for matrix in load_recipe(where).rounded)


def load_recipe(where: Path) -> Recipe:
    """The recipe in the file ``where``. Raises UserError if it is not one."""
    try:
        data = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} cannot be read as JSON ({error}): give the recipe.json of a quantised bundle"
        ) from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise UserError(f"{where} is no recipe of version {SCHEMA}: quantise the bundle again with this version")
    recipe: Recipe = read_as(Recipe, data, "recipe", str(where))
    for matrix in recipe.matrices:
        if fault := _fault(matrix.choice):
            raise UserError(f"{where} asks for {matrix.name} with {fault}")
    return recipe


def read_recipe(bundle: Bundle) -> Recipe | None:
    """The recipe of a quantised bundle; None of another. Raises UserError if it is not one, or not this bundle's."""
    manifest = bundle.manifest
    if manifest.precision in BASES:
        return None
    where = bundle.file(names.RECIPE_FILE)
    recipe = load_recipe(where)
    if (recipe.precision, recipe.base) != (manifest.precision, manifest.base):
        raise UserError(
            f"{where} is for {recipe.precision} on {recipe.base}, the bundle is {manifest.precision} on "
            f"{manifest.base}: quantise it again"
        )
    layers = manifest.model.layers  # a bundle that was cut has fewer than its recipe
    found = [matrix.name for matrix in recipe.matrices if (layer_of(matrix.name) or 0) < layers]
    heads = sum(map(is_head, found))
    if not heads or found[: len(found) - heads] != list(matrix_names(manifest.model)):
        raise UserError(f"{where} has not the matrices of the bundle's layers in order: quantise the bundle again")
    return recipe


def _fault(choice: Choice) -> str | None:
    """What is wrong with a choice in itself, and what there is; None if nothing is."""
    asked: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        ("precision", choice.precision, (BASE, *INTEGERS)),
        ("scheme", choice.scheme, SCHEMES),
        ("scale", choice.scale, SCALES),
        ("activation.method", choice.activation and choice.activation.method, (*RANGES,)),
    )
    for key, value, known in asked:
        if value is not None and value not in known:
            return f"{key} '{value}': there are {', '.join(known)}"
    if choice.precision == BASE and dataclasses.replace(choice, reason=None) != Choice():
        return "precision 'base' and more: leave all else at what a matrix that stays has"
    if choice.block is not None and (choice.precision != "int4" or choice.block not in ONNX_BLOCKS):
        blocks = ", ".join(map(str, ONNX_BLOCKS))
        return f"a block of {choice.block} in '{choice.precision}': INT8 has none, INT4 those of {blocks}"
    if choice.activation is not None:
        if choice.precision != "int8":
            return f"an activation in '{choice.precision}': only INT8 has them"
        if (choice.activation.percentile is None) == (choice.activation.method == "percentile"):
            return f"activation.percentile {choice.activation.percentile}: it belongs to that method, and to no other"
    return None
