"""Trained modules on disk: a directory of ``modules.safetensors`` and ``modules.json``, read and written strictly.

Tensors are FP32 and named ``stages.{index of the stage}.{name of the parameter in SelectorModule}``. The JSON file
says for which model, stages and sizes they are, and, under "training", how they came about: free facts that no
reader relies on. Knows no model and no training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tokprune.export.bundle import staged
from tokprune.export.lvpruning.module import SelectorModule
from tokprune.runtime import names
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.plan import Module, Stage, make_plan

SCHEMA, METHOD = 1, "lvpruning"
_AGAIN = "train them again with 'tokprune train'"


@dataclass(frozen=True)
class Modules:
    """One trained module a stage, for models of this name, hidden size, depth and number of visual tokens."""

    name: str
    hidden: int
    layers: int
    visual_tokens: int
    stages: tuple[Stage, ...]
    module: Module
    weights: dict[str, np.ndarray]  # float32, named stages.{i}.{parameter}
    training: dict[str, Any] = field(default_factory=dict)

    def of_stage(self, index: int) -> dict[str, np.ndarray]:
        """Weights of one stage's module by parameter name."""
        prefix = f"stages.{index}."
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}


def weight_shapes(hidden: int, module: Module, stages: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a modules file."""
    with torch.device("meta"):
        parameters = list(SelectorModule(hidden, module).named_parameters())
    return {f"stages.{index}.{name}": tuple(p.shape) for index in range(stages) for name, p in parameters}


def check_modules_out(out: Path) -> None:
    """Raise UserError if ``out`` exists and is neither an empty directory nor one of modules and nothing else."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is not a directory: choose another --out")
    found = {path.name for path in out.iterdir()}
    foreign = sorted(found - {names.MODULES_FILE, names.MODULES_INFO_FILE})
    if foreign:
        raise UserError(
            f"--out {out} holds {foreign[0]}, which is no part of trained modules and would be lost: "
            "move it away, or choose another --out"
        )


def save_modules(path: Path, modules: Modules) -> None:
    """Write the directory ``path``, whole or not at all; modules that are there are replaced.

    Raises UserError as `check_modules_out` does, and where the file system refuses.
    """
    with staged(path, check_modules_out) as stage:
        write_modules(stage, modules)


def write_modules(directory: Path, modules: Modules) -> None:
    """Write the two files into a ``directory`` that is there, for callers who see to its appearing whole."""
    info = {
        "schema": SCHEMA,
        "method": METHOD,
        "model": {
            "name": modules.name,
            "hidden": modules.hidden,
            "layers": modules.layers,
            "visual_tokens": modules.visual_tokens,
        },
        "stages": [asdict(stage) for stage in modules.stages],
        "module": asdict(modules.module),
        "training": modules.training,
    }
    # not ``save_file``, whose files only their owner may read
    weights = {name: np.ascontiguousarray(weight, np.float32) for name, weight in modules.weights.items()}
    (directory / names.MODULES_FILE).write_bytes(save(weights))
    (directory / names.MODULES_INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def load_modules(path: Path) -> Modules:
    """Read a directory of modules. Raises UserError naming the file, key or tensor that is not as it must be."""
    where = path / names.MODULES_INFO_FILE
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"the modules directory {path} {found}: give one that 'tokprune train' wrote")
    info = _keys(_json(where), ("schema", "method", "model", "stages", "module", "training"), "", where)
    if info["schema"] != SCHEMA or isinstance(info["schema"], bool) or info["method"] != METHOD:
        raise UserError(
            f"{where} has schema {info['schema']!r} and method {info['method']!r}, this version reads schema {SCHEMA} "
            f"of {METHOD}: {_AGAIN}"
        )
    model = _keys(info["model"], ("name", "hidden", "layers", "visual_tokens"), "model.", where)
    if not isinstance(model["name"], str) or not isinstance(info["training"], dict):
        raise UserError(f"{where} has a model.name that is no text, or a training that is no object: {_AGAIN}")
    hidden, layers, tokens = (_size(model, key, "model.", where) for key in ("hidden", "layers", "visual_tokens"))
    sizes = _keys(info["module"], ("width", "heads", "intermediate"), "module.", where)
    module = Module(**{key: _size(sizes, key, "module.", where) for key in sizes})
    if not isinstance(info["stages"], list):
        raise UserError(f"{where} has stages that are no list: {_AGAIN}")
    pairs = []
    for index, stage in enumerate(info["stages"]):
        name = f"stages.{index}."
        _keys(stage, ("layer", "keep"), name, where)
        pairs.append((_size(stage, "layer", name, where, least=0), _size(stage, "keep", name, where)))
    try:
        plan = make_plan(METHOD, pairs, layers=layers, visual_tokens=tokens, module=module)
    except UserError as error:
        raise UserError(f"{where} contradicts itself ({error}): {_AGAIN}") from None
    weights = _weights(path / names.MODULES_FILE, weight_shapes(hidden, module, len(pairs)))
    return Modules(model["name"], hidden, layers, tokens, plan.stages, module, weights, info["training"])


def check_fits(modules: Modules, facts: ModelFacts) -> None:
    """Raise UserError unless ``modules`` were trained for a model of these sizes."""
    for what, ours, models in (
        ("hidden size", modules.hidden, facts.hidden),
        ("number of decoder layers", modules.layers, facts.layers),
        ("number of visual tokens", modules.visual_tokens, facts.vision.tokens),
    ):
        if ours != models:
            raise UserError(
                f"the modules were trained for {modules.name}, whose {what} is {ours}, but that of {facts.name} is "
                f"{models}: train modules for it with 'tokprune train'"
            )


def _json(where: Path) -> Any:
    try:
        return json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where.parent} has no {where.name}: give a directory that 'tokprune train' wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): {_AGAIN}") from None


def _keys(data: Any, keys: tuple[str, ...], prefix: str, where: Path) -> dict[str, Any]:
    """``data``, if it is an object with exactly these keys."""
    if not isinstance(data, dict):
        raise UserError(f"{where} has no object {prefix.rstrip('.') or 'at its top'}: {_AGAIN}")
    for key in keys:
        if key not in data:
            raise UserError(f"{where} lacks {prefix}{key}: {_AGAIN}")
    for key in data:
        if key not in keys:
            raise UserError(f"{where} has {prefix}{key}, which this version does not know: {_AGAIN}")
    return data


def _size(data: Mapping[str, Any], key: str, prefix: str, where: Path, least: int = 1) -> int:
    value = data[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where} has {value!r} as {prefix}{key}, an integer from {least} on is needed: {_AGAIN}")
    return value


def _weights(where: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    try:
        weights = load_file(where)
    except FileNotFoundError:
        raise UserError(f"{where.parent} has no {where.name}: give a directory that 'tokprune train' wrote") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:  # the last two: a dtype that NumPy has not
        raise UserError(f"{where} is no whole safetensors file ({error}): {_AGAIN}") from None
    for name, shape in shapes.items():
        if name not in weights:
            raise UserError(f"{where} lacks the tensor {name}: {_AGAIN}")
        found = weights[name]
        if found.shape != shape or found.dtype != np.float32:
            raise UserError(
                f"{where} has {name} as {found.dtype} {list(found.shape)}, float32 {list(shape)} is needed: {_AGAIN}"
            )
        if not np.isfinite(found).all():
            raise UserError(f"{where} has values in {name} that are not finite: {_AGAIN}")
    for name in weights:
        if name not in shapes:
            raise UserError(f"{where} has the tensor {name}, which belongs to no stage: {_AGAIN}")
    return weights
