"""``quantize``: a bundle in FP32 or FP16 in, the same with its decoder layers' matrices in INT8 or INT4 out.

Weights are read from the bundle's files one at a time and written to new ones, so that memory stays near the largest
matrix and what is no longer needed is not carried along. Knows files and graphs; needs no torch.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tokprune.calibration.graph import TYPES, codes_name, put_dequantize, scales_name
from tokprune.calibration.recipe import SCHEMA, SCHEME, Matrix, Recipe, matrix_names
from tokprune.calibration.rounding import Rounded, pack_int4, round_matrix
from tokprune.export.bundle import describe_files, staged
from tokprune.export.memory import bundle_weights
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.contract import FLOAT_TYPES
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest
from tokprune.runtime.weights import BASES, MATRICES, block_size

WEIGHTS = "weights.data"  # all weights of a quantised bundle but an lvpruning module's
_PIECE = 16 << 20  # bytes read at a time
_ALIGNMENT = 64


def quantize(
    bundle: Bundle, out: Path, precision: str, progress: Callable[[str], None] = lambda layer: None
) -> tuple[Manifest, Recipe]:
    """Write ``bundle`` with its matrices in ``precision`` to ``out``, whole or not at all.

    ``progress`` hears of each decoder layer when its matrices are done. Raises UserError for a bundle that is
    quantised already or has a weight that is not finite, and for an ``out`` at fault.
    """
    found = bundle.manifest.precision
    if found not in BASES:
        raise UserError(
            f"the bundle {bundle.path} is in {found} already, {precision} is made from FP32 or FP16: "
            "give the bundle that it was made from"
        )
    if out.resolve() == bundle.path.resolve():
        raise UserError(f"--out {out} is the bundle itself, which would be lost: choose another --out")
    with staged(out) as stage:
        return write_quantized(bundle, stage, precision, progress)


def write_quantized(
    bundle: Bundle, stage: Path, precision: str, progress: Callable[[str], None] = lambda layer: None
) -> tuple[Manifest, Recipe]:
    """Write the bundle's quantised form into the directory ``stage``; see `quantize`."""
    base = bundle.manifest
    writer = _Writer(stage, precision, FLOAT_TYPES[base.base], progress)
    carried = {file.path for file in base.files}
    for segment in base.segments:
        model = ir.load(bundle.file(segment.file))
        read = writer.move(model, frozenset(matrix_names(base.model.layers)))
        if read:
            ir.save(model, stage / segment.file)
            carried -= {segment.file, *read}
    for path in sorted(carried):
        shutil.copyfile(bundle.file(path), stage / path)
    order = {name: at for at, name in enumerate(matrix_names(base.model.layers))}
    matrices = sorted(writer.matrices, key=lambda matrix: order[matrix.name])
    recipe = Recipe(SCHEMA, precision, base.base, SCHEME, tuple(matrices))
    (stage / names.RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
    written = [stage / path for path in (*carried, names.RECIPE_FILE, WEIGHTS)]
    written += [stage / segment.file for segment in base.segments]
    manifest = dataclasses.replace(
        base,
        precision=precision,
        files=describe_files(stage, set(written)),
        memory=bundle_weights(stage, base.segments),
    )
    (stage / names.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest, recipe


class _Writer:
    """Moves weights from graphs of one bundle into ``WEIGHTS`` of another, rounding matrices on the way."""

    def __init__(self, stage: Path, precision: str, scale_type: str, progress: Callable[[str], None]) -> None:
        self.matrices: list[Matrix] = []
        self._stage, self._precision, self._scale_type, self._progress = stage, precision, scale_type, progress
        self._placed: dict[tuple[str, int | None, int | None], int] = {}  # weights that several graphs read
        (stage / WEIGHTS).touch(exist_ok=False)

    def move(self, model: ir.Model, matrices: frozenset[str]) -> set[str]:
        """Move the weights of ``model``, in place; the files that they were in. Modules of lvpruning stay."""
        read = set()
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location == names.MODULES_FILE:
                continue
            read.add(str(tensor.location))
            if name in matrices and self._round(model, value, tensor):
                continue
            value.const_value = self._copy(tensor, name)
        return read

    def _round(self, model: ir.Model, value: ir.Value, tensor: ir.ExternalTensor) -> bool:
        """Round the matrix; False if it has to stay. Either way the recipe says so."""
        assert value.name is not None
        rows, columns = tensor.shape.numpy()
        block = block_size(columns, self._precision)
        if block is None:
            reason = f"its input of {columns} has no block of 16 to 128 weights"
            size = tensor.nbytes
            self._note(Matrix(value.name, (rows, columns), _base_of(tensor), None, None, size, reason))
            return False
        try:
            rounded = round_matrix(_rows(tensor), (rows, columns), self._precision, block, self._scale_type)
        except ValueError:
            raise UserError(
                f"{value.name} has a value that is not finite, for which there is no scale: give another model's bundle"
            ) from None
        codes, scales = self._store(value.name, rounded)
        put_dequantize(model, value, codes, scales)
        size = codes.nbytes + scales.nbytes
        self._note(Matrix(value.name, (rows, columns), self._precision, block, rounded.sqnr_db, size, None))
        return True

    def _note(self, matrix: Matrix) -> None:
        self.matrices.append(matrix)
        layer = matrix.name.removesuffix(next(name for name in MATRICES if matrix.name.endswith(name)))
        if sum(other.name.startswith(layer) for other in self.matrices) == len(MATRICES):
            self._progress(f"{layer.strip('.').rpartition('language_model.')[2]} in {self._precision}")

    def _store(self, name: str, rounded: Rounded) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Codes [in, out] and scales as `calibration.graph` lays them out."""
        rows, columns = rounded.codes.shape
        step = max(2, _PIECE // rows // 2 * 2)  # even, so that pairs of INT4 do not cross pieces
        turned = (np.ascontiguousarray(rounded.codes[:, at : at + step].T) for at in range(0, columns, step))
        if self._precision == "int4":
            pieces: Iterator[np.ndarray] = map(pack_int4, turned)
        else:
            pieces = turned
        codes = self._tensor(codes_name(name), self._append(pieces), (columns, rows), TYPES[self._precision])
        scales = rounded.scales[:, 0] if self._precision == "int8" else np.ascontiguousarray(rounded.scales.T)
        kind = ir.DataType.from_numpy(scales.dtype)
        return codes, self._tensor(scales_name(name), self._append(iter([scales])), scales.shape, kind)

    def _copy(self, tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
        key = (str(tensor.location), tensor.offset, tensor.length)
        if key not in self._placed:
            self._placed[key] = self._append(_pieces(tensor))
        return self._tensor(name, self._placed[key], tuple(tensor.shape), tensor.dtype)

    def _append(self, pieces: Iterator[np.ndarray]) -> int:
        """Write the pieces one behind the other to ``WEIGHTS``; where they begin."""
        with (self._stage / WEIGHTS).open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            for piece in pieces:
                file.write(piece.tobytes())
        return offset

    def _tensor(self, name: str, offset: int, shape: tuple, kind: ir.DataType) -> ir.ExternalTensor:
        tensor = ir.ExternalTensor(WEIGHTS, offset, None, kind, shape=ir.Shape(shape), name=name, base_dir=self._stage)
        return ir.ExternalTensor(
            WEIGHTS, offset, tensor.nbytes, kind, shape=ir.Shape(shape), name=name, base_dir=self._stage
        )


def _base_of(tensor: ir.ExternalTensor) -> str:
    return next(base for base, kind in FLOAT_TYPES.items() if kind == tensor.dtype.numpy().name)


def _rows(tensor: ir.ExternalTensor) -> Iterator[np.ndarray]:
    """The matrix in pieces of whole rows."""
    (_, columns), kind = tensor.shape.numpy(), tensor.dtype.numpy()
    for piece in _pieces(tensor, columns * kind.itemsize):
        yield piece.view(kind).reshape(-1, columns)


def _pieces(tensor: ir.ExternalTensor, unit: int = 1) -> Iterator[np.ndarray]:
    """The tensor's bytes, some ``_PIECE`` at a time, in multiples of ``unit``."""
    step = max(1, _PIECE // unit) * unit
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        for begin in range(0, tensor.nbytes, step):
            yield np.frombuffer(file.read(min(step, tensor.nbytes - begin)), np.uint8)
