"""PyTorch with a quantised bundle's matrices: what the bundle computes with, restored to FP32, in transformers' model.

With it parity tests the implementation alone; what rounding itself changes is for consistency to say.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from tokprune.calibration.graph import restored_matrices
from tokprune.calibration.recipe import Recipe
from tokprune.export.weights import canonical
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError


def bundle_matrices(bundle: Bundle, recipe: Recipe) -> Iterator[tuple[str, np.ndarray]]:
    """(name, Ŵ [out, in] FP32) of each matrix that the bundle's decoders dequantise, one at a time.

    Raises UserError if they are not those of ``recipe``; of layers that are not there it may speak.
    """
    wanted = {
        matrix.name: (matrix.shape, matrix.block)
        for matrix in recipe.rounded
        if int(matrix.name.split(".")[2]) < bundle.manifest.model.layers
    }
    for segment in bundle.manifest.segments:
        if segment.layers is None:
            continue
        for name, block, matrix in restored_matrices(ir.load(bundle.file(segment.file))):
            if wanted.pop(name, None) != (matrix.shape, block):
                raise UserError(f"{bundle.file(segment.file)} has not {name} as the recipe says: quantise it again")
            yield name, matrix
    if wanted:
        where = bundle.file(names.RECIPE_FILE)
        raise UserError(f"{where} speaks of {next(iter(wanted))}, which no graph dequantises: quantise it again")


def with_matrices(
    model: LlavaForConditionalGeneration, matrices: Iterable[tuple[str, np.ndarray]]
) -> LlavaForConditionalGeneration:
    """A model that shares every tensor with ``model`` but ``matrices``, by canonical name."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    places = {canonical(name): name for name, _ in twin.named_parameters()}
    for name, matrix in matrices:
        path, _, attribute = places[name].rpartition(".")
        setattr(twin.get_submodule(path), attribute, nn.Parameter(torch.from_numpy(matrix), requires_grad=False))
    return twin
