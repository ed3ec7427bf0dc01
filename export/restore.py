"""PyTorch with a quantised bundle's numbers: its matrices restored to FP32, what was folded, its rounded activations.

With it parity tests the implementation alone; what rounding itself changes is for consistency to say.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from tokprune.calibration.graph import activation_scales, read_tensor, restored_matrices
from tokprune.export.weights import canonical
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import Recipe
from tokprune.runtime.weights import HEAD, first_row, is_head, layer_of


def bundle_matrices(bundle: Bundle, recipe: Recipe) -> Iterator[tuple[str, np.ndarray]]:
    """(name, Ŵ [out, in] FP32) of each matrix that the bundle dequantises, one at a time.

    Raises UserError if they are not those of ``recipe``; of layers that are not there it may speak.
    """
    wanted = {
        matrix.name: (matrix.shape, matrix.record.block)
        for matrix in recipe.rounded
        if (layer_of(matrix.name) or 0) < bundle.manifest.model.layers
    }
    for segment in bundle.manifest.segments:
        for name, block, matrix in restored_matrices(ir.load(bundle.file(segment.file))):
            if wanted.pop(name, None) != (matrix.shape, block):
                raise UserError(f"{bundle.file(segment.file)} has not {name} as the recipe says: quantise it again")
            yield name, matrix
    if wanted:
        where = bundle.file(names.RECIPE_FILE)
        raise UserError(f"{where} speaks of {next(iter(wanted))}, which no graph dequantises: quantise it again")


def folded_tensors(bundle: Bundle, recipe: Recipe) -> Iterator[tuple[str, np.ndarray]]:
    """(name, FP32) of each other tensor that quantising has changed, as the bundle has it.

    Raises UserError if one is not there; of layers that are not there the recipe may speak.
    """
    wanted = {name for name in recipe.folded if (layer_of(name) or 0) < bundle.manifest.model.layers}
    for segment in bundle.manifest.segments:
        initializers = ir.load(bundle.file(segment.file)).graph.initializers
        for name in sorted(wanted & set(initializers)):
            yield name, read_tensor(initializers[name]).astype(np.float32)
            wanted.remove(name)
    if wanted:
        where = bundle.file(names.RECIPE_FILE)
        raise UserError(f"{where} speaks of {min(wanted)}, which no graph reads: quantise the bundle again")


def entering_scales(bundle: Bundle, recipe: Recipe) -> dict[str, float]:
    """The scale of what each matrix is multiplied with, by name, where that is rounded to INT8.

    Raises UserError if the graphs have other ones than ``recipe``.
    """
    found: dict[str, float] = {}
    for segment in bundle.manifest.segments:
        found |= activation_scales(ir.load(bundle.file(segment.file)))
    activations = {matrix.name: matrix.record.activation for matrix in recipe.rounded}
    layers = bundle.manifest.model.layers
    said = {name: each.scale for name, each in activations.items() if each and (layer_of(name) or 0) < layers}
    if found != said:
        name = min(name for name in {*found, *said} if found.get(name) != said.get(name))
        raise UserError(
            f"{bundle.path} rounds what {name} is multiplied with by {found.get(name)}, its recipe says "
            f"{said.get(name)}: quantise it again"
        )
    return found


def rounded_twin(model: LlavaForConditionalGeneration, bundle: Bundle, recipe: Recipe) -> LlavaForConditionalGeneration:
    """``model`` with all that quantising has made of ``bundle``; the tensors that it left alone are shared."""
    changed = itertools.chain(bundle_matrices(bundle, recipe), folded_tensors(bundle, recipe))
    twin = with_matrices(model, changed)
    places = {canonical(name): name for name, _ in twin.named_parameters()}
    for name, scale in entering_scales(bundle, recipe).items():
        module = twin.get_submodule(places[name].rpartition(".")[0])
        module.register_forward_pre_hook(functools.partial(_round_entering, scale))
    return twin


def _round_entering(scale: float, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A linear layer's input between QuantizeLinear and DequantizeLinear: half to even, as both sides have it."""
    entering, *rest = args
    return (entering / scale).round().clamp(-128, 127) * scale, *rest


def with_matrices(
    model: LlavaForConditionalGeneration, matrices: Iterable[tuple[str, np.ndarray]]
) -> LlavaForConditionalGeneration:
    """A model that shares every tensor with ``model`` but ``matrices``, by canonical name."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    places = {canonical(name): name for name, _ in twin.named_parameters()}
    for name, matrix in _whole(matrices):
        path, _, attribute = places[name].rpartition(".")
        setattr(twin.get_submodule(path), attribute, nn.Parameter(torch.from_numpy(matrix), requires_grad=False))
    return twin


def _whole(matrices: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """``matrices`` with the pieces of a split head as one."""
    pieces = {}
    for name, matrix in matrices:
        if is_head(name):
            pieces[first_row(name)] = matrix
        else:
            yield name, matrix
    if pieces:
        yield HEAD, np.concatenate([pieces[row] for row in sorted(pieces)])
