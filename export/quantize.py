"""``quantize``: a bundle in FP32 or FP16 in, the same with matrices in INT8 or INT4 out.

Weights are read from the bundle's files one at a time and written to new ones, so that memory stays near the largest
matrix and what is no longer needed is not carried along. Knows files and graphs; needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from tokprune.calibration.graph import TYPES, codes_name, put_activations, put_dequantize, scales_name
from tokprune.calibration.recipe import usual_choices
from tokprune.calibration.rounding import Rounded, pack_int4, round_matrix
from tokprune.calibration.scheme import Change, Scheme
from tokprune.export.bundle import describe_files, staged
from tokprune.export.memory import bundle_weights
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.contract import FLOAT_TYPES
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest
from tokprune.runtime.recipe import BASE, SCHEMA, Activation, Choice, Matrix, Recipe, Record, chosen_groups
from tokprune.runtime.weights import BASES, block_size, first_row, group_of, is_head, matrix_names

WEIGHTS = "weights.data"  # all weights of a quantised bundle but an lvpruning module's
_PIECE = 16 << 20  # bytes read at a time
_SMALL = 1 << 20  # of what is computed with: twice as fast, since what numpy makes on the way stays in the cache
_ALIGNMENT = 64


def quantize(
    bundle: Bundle,
    out: Path,
    precision: str,
    choices: Mapping[str, Choice] | None = None,
    scheme: Scheme | None = None,
    progress: Callable[[str], None] = lambda group: None,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[Manifest, Recipe]:
    """Write ``bundle`` with its matrices in ``precision``, or as ``choices`` say, to ``out``, whole or not at all.

    ``choices`` are for all of `find_matrices`; None is `usual_choices`. ``scheme`` is asked where they look at
    activations. ``progress`` hears of each of `chosen_groups` that is done, ``extras`` are files that go along. Raises
    UserError for a bundle that is quantised already or has a weight that is not finite, and for an ``out`` at fault.
    """
    check_base(bundle, precision)
    if out.resolve() == bundle.path.resolve():
        raise UserError(f"--out {out} is the bundle itself, which would be lost: choose another --out")
    if choices is None:
        choices = usual_choices(list(find_matrices(bundle)), precision)
    with staged(out) as stage:
        return write_quantized(bundle, stage, precision, choices, scheme, progress, extras)


def check_base(bundle: Bundle, precision: str) -> None:
    """Raise UserError if the bundle is no base, from which ``precision`` is made."""
    found = bundle.manifest.precision
    if found not in BASES:
        raise UserError(
            f"the bundle {bundle.path} is in {found} already, {precision} is made from FP32 or FP16: "
            "give the bundle that it was made from"
        )


def find_matrices(bundle: Bundle) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of all matrices that can be rounded, by name, in the recipe's order."""
    found: dict[str, tuple[int, int]] = {}
    for segment in bundle.manifest.segments:
        for name, value in ir.load(bundle.file(segment.file)).graph.initializers.items():
            if value.shape is not None and len(value.shape) == 2:
                rows, columns = value.shape.numpy()
                found[name] = (rows, columns)
    heads = sorted(filter(is_head, found), key=first_row)
    return {name: found[name] for name in (*matrix_names(bundle.manifest.model), *heads)}


def write_quantized(
    bundle: Bundle,
    stage: Path,
    precision: str,
    choices: Mapping[str, Choice],
    scheme: Scheme | None = None,
    progress: Callable[[str], None] = lambda group: None,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[Manifest, Recipe]:
    """Write the bundle's quantised form into the directory ``stage``; see `quantize`."""
    base = bundle.manifest
    writer = Writer(stage, FLOAT_TYPES[base.base], choices, scheme, progress)
    carried = {file.path for file in base.files}
    for segment in base.segments:
        model = ir.load(bundle.file(segment.file))
        read = writer.move(model)
        if read:
            ir.save(model, stage / segment.file)
            carried -= {segment.file, *read}
    for path in sorted(carried):
        shutil.copyfile(bundle.file(path), stage / path)
    for path, data in extras.items():
        (stage / path).write_bytes(data)
    matrices = tuple(writer.matrices[name] for name in choices)
    recipe = Recipe(SCHEMA, precision, base.base, tuple(sorted(writer.folded)), matrices)
    (stage / names.RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
    written = [stage / path for path in (*carried, *extras, names.RECIPE_FILE, WEIGHTS)]
    written += [stage / segment.file for segment in base.segments]
    manifest = dataclasses.replace(
        base,
        precision=precision,
        files=describe_files(stage, set(written)),
        memory=bundle_weights(stage, base.segments),
    )
    (stage / names.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest, recipe


class Writer:
    """Moves weights from graphs of one bundle into ``WEIGHTS`` of another, rounding matrices on the way.

    ``matrices`` are those that it has come by, ``folded`` the other tensors that the scheme has changed.
    """

    def __init__(
        self,
        stage: Path,
        scale_type: str,
        choices: Mapping[str, Choice],
        scheme: Scheme | None = None,
        progress: Callable[[str], None] = lambda group: None,
    ) -> None:
        self.matrices: dict[str, Matrix] = {}
        self.folded: set[str] = set()
        self._stage, self._scale_type, self._choices = stage, scale_type, choices
        self._scheme, self._progress = scheme, progress
        self._ahead = {group: set(matrices) for group, matrices in chosen_groups(choices).items()}
        self._placed: dict[tuple[str, int | None, int | None], int] = {}  # weights that several graphs read
        (stage / WEIGHTS).touch(exist_ok=False)

    def move(self, model: ir.Model) -> set[str]:
        """Move the weights of ``model``, in place; the files that they were in. Modules of lvpruning stay."""
        read = set()
        activations: dict[str, Activation] = {}
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location == names.MODULES_FILE:
                continue
            read.add(str(tensor.location))
            change = None if self._scheme is None else self._scheme.change(name)
            if name not in self._choices or not self._round(model, value, tensor, change):
                value.const_value = self._copy(tensor, name) if change is None else self._fold(tensor, name, change)
            elif (activation := self.matrices[name].record.activation) is not None:
                activations[name] = activation
        put_activations(model, activations)
        return read

    def _round(self, model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor, change: Change | None) -> bool:
        """Round the matrix; False if it has to stay. Either way the recipe says so."""
        assert value.name is not None
        name, choice, precision = value.name, self._choices[value.name], self._choices[value.name].precision
        rows, columns = tensor.shape.numpy()
        shape = rows, columns
        block = None if precision == BASE else choice.block or block_size(columns, precision)
        if self._scheme is None and choice.calibrated:
            raise UserError(
                f"{name} is to be rounded as its activations ask for ({choice.scheme}): give data to see them"
            )
        alpha = None if self._scheme is None else self._scheme.alpha(name)
        if block is None:
            reason = None if precision == BASE else f"its input of {columns} has no block of 16 to 128 weights"
            record = Record(_base_of(tensor), None, alpha, None, None, tensor.nbytes, reason)
            self._note(Matrix(name, shape, choice, record))
            return False
        try:
            rounded = round_matrix(_rows(tensor, change), shape, precision, block, self._scale_type)
        except ValueError:
            raise UserError(
                f"{name} has a value that is not finite, for which there is no scale: give another model's bundle"
            ) from None
        codes, scales = self._store(name, rounded, precision)
        put_dequantize(model, value, codes, scales)
        size = codes.nbytes + scales.nbytes
        activation = None if self._scheme is None else self._scheme.activation(name)
        output = None if self._scheme is None else self._scheme.output_sqnr_db(name)
        record = Record(precision, block, alpha, activation, rounded.sqnr_db, size, None, output)
        self._note(Matrix(name, shape, choice, record))
        return True

    def _note(self, matrix: Matrix) -> None:
        self.matrices[matrix.name] = matrix
        group = group_of(matrix.name)
        ahead = self._ahead.get(group, set())
        if matrix.name in ahead:
            ahead.remove(matrix.name)
            if not ahead:
                self._progress(f"{group} in {matrix.choice.precision}")

    def _store(self, name: str, rounded: Rounded, precision: str) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Codes [in, out] and scales as `calibration.graph` lays them out."""
        rows, columns = rounded.codes.shape
        step = max(2, _PIECE // rows // 2 * 2)  # even, so that pairs of INT4 do not cross pieces
        turned = (np.ascontiguousarray(rounded.codes[:, at : at + step].T) for at in range(0, columns, step))
        pieces: Iterator[np.ndarray] = map(pack_int4, turned) if precision == "int4" else turned
        codes = self._tensor(codes_name(name), self._append(pieces), (columns, rows), TYPES[precision])
        scales = rounded.scales[:, 0] if precision == "int8" else np.ascontiguousarray(rounded.scales.T)
        kind = ir.DataType.from_numpy(scales.dtype)
        return codes, self._tensor(scales_name(name), self._append(iter([scales])), scales.shape, kind)

    def _copy(self, tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
        key = (str(tensor.location), tensor.offset, tensor.length)
        if key not in self._placed:
            self._placed[key] = self._append(_pieces(tensor))
        return self._tensor(name, self._placed[key], tuple(tensor.shape), tensor.dtype)

    def _fold(self, tensor: ir.ExternalTensor, name: str, change: Change) -> ir.ExternalTensor:
        """Copy what is not rounded as the scheme changes it."""
        kind = tensor.dtype.numpy()
        self.folded.add(name)
        pieces = (_as_type(piece, kind, name) for piece in _rows(tensor, change))
        return self._tensor(name, self._append(pieces), tuple(tensor.shape), tensor.dtype)

    def _append(self, pieces: Iterator[np.ndarray]) -> int:
        """Write the pieces one behind the other to ``WEIGHTS``; where they begin."""
        with (self._stage / WEIGHTS).open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            for piece in pieces:
                file.write(piece.tobytes())
        return offset

    def _tensor(self, name: str, offset: int, shape: tuple, kind: ir.DataType) -> ir.ExternalTensor:
        size = math.ceil(kind.itemsize * math.prod(shape))
        return ir.ExternalTensor(WEIGHTS, offset, size, kind, shape=ir.Shape(shape), name=name, base_dir=self._stage)


def _as_type(values: np.ndarray, kind: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = values.astype(kind)
    lost = np.isinf(found) & np.isfinite(values)
    if lost.any():
        raise UserError(
            f"{name} gets the value {values[lost][0]:.6g}, which {kind} cannot hold: quantise an FP32 bundle"
        )
    return found


def _base_of(tensor: ir.ExternalTensor) -> str:
    return next(base for base, kind in FLOAT_TYPES.items() if kind == tensor.dtype.numpy().name)


def _rows(tensor: ir.ExternalTensor, change: Change | None = None) -> Iterator[np.ndarray]:
    """The tensor in pieces of whole rows, as ``change`` has them, then in FP32."""
    (_, *columns), kind = tensor.shape.numpy(), tensor.dtype.numpy()
    begin = 0
    for piece in _pieces(tensor, math.prod(columns) * kind.itemsize, _SMALL):
        rows = piece.view(kind).reshape(-1, *columns)
        yield rows if change is None else change.apply(rows, begin)
        begin += len(rows)


def _pieces(tensor: ir.ExternalTensor, unit: int = 1, most: int = _PIECE) -> Iterator[np.ndarray]:
    """The tensor's bytes, some ``most`` at a time, in multiples of ``unit``."""
    step = max(1, most // unit) * unit
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        for begin in range(0, tensor.nbytes, step):
            yield np.frombuffer(file.read(min(step, tensor.nbytes - begin)), np.uint8)
