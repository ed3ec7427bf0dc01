"""Products with INT8 and INT4 matrices as ``MatMulNBits``, over codes in the layout that its kernels read.

ONNX Runtime would make it of DequantizeLinear and MatMul itself, at each load, on one core of a segment: of 16 layers,
1024 wide, 1 to 2.5 s. Here it is done once, and a load maps the file. What a matrix W ∈ ℝ^{out×in} becomes:

    codes   uint8 [out, ⌈in / b⌉, b · bits / 8], a code + 2^(bits − 1); of INT4 two a byte, the first in the lower half
    scales  FP32 [out · ⌈in / b⌉]

b is `BLOCK` for INT8, whose row's scale is repeated, and the bundle's own block for INT4; a last block that is not full
is filled up with zeros. Activations are rounded to INT8 too, b values to a scale (`LEVEL`), except where the graph
itself rounds them: such a product stays. Knows graphs and bytes; rounds no weight.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokprune.calibration.graph import codes_name, products, read_tensor, scales_name
from tokprune.calibration.rounding import pack_int4
from tokprune.export.fusion.rules import MICROSOFT

BLOCK = 128
LEVEL = 4  # accuracy_level: INT4's products take half the time that level 1 takes, INT8's a hundredth (docs/log.md)
_ALIGNMENT = 64


def put_blocks(model: ir.Model, file: Path, root: Path) -> bool:
    """Rewrite the products, in place, with codes and scales appended to ``file``, named as seen from ``root``.

    Whether there was any: ``file`` is written only then. Weights that nothing reads any more stay in the graph.
    """
    found = False
    for name, codes, product in list(products(model)):
        read = [node.producer() for node in product.inputs if node is not None]
        entering, restored = read[0], read[1]
        if restored is None or restored.op_type != "DequantizeLinear":
            continue
        if entering is not None and entering.op_type == "DequantizeLinear":
            continue
        scales = restored.inputs[1]
        assert scales is not None
        bits = 4 if codes.dtype == ir.DataType.INT4 else 8
        rows, widths = read_tensor(codes).T, read_tensor(scales)  # [out, in]
        block = BLOCK if widths.ndim == 1 else rows.shape[1] // len(widths)
        blocks, repeated = lay_out(rows, widths, bits, block)
        inputs = [product.inputs[0]]
        with file.open("ab") as out:
            for label, array in ((codes_name(name), blocks), (scales_name(name), repeated)):
                inputs.append(_append(model.graph, out, f"{label}.{block}", array, os.path.relpath(file, root), root))
        attributes = {
            "K": rows.shape[1],
            "N": rows.shape[0],
            "bits": bits,
            "block_size": block,
            "accuracy_level": LEVEL,
        }
        _replace(model.graph, product, inputs, attributes)
        found = True
    return found


def lay_out(
    rows: NDArray[np.int8], widths: NDArray[np.floating], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [out, in] and scales, [out] or [in / block, out], as above."""
    count, columns = rows.shape
    blocks = -(-columns // block)
    padded = np.zeros((count, blocks * block), np.int8)
    padded[:, :columns] = rows
    # in two's complement, a number that is half of its range larger is that with the other sign
    codes = padded.view(np.uint8) ^ np.uint8(0x80) if bits == 8 else pack_int4(padded) ^ np.uint8(0x88)
    scales = np.repeat(widths, blocks) if widths.ndim == 1 else widths.T.reshape(-1)
    return codes.reshape(count, blocks, block * bits // 8), scales.astype(np.float32)


def _append(graph: ir.Graph, out, name: str, array: np.ndarray, location: str, root: Path) -> ir.Value:
    """An initializer of ``graph`` over what is appended to the file."""
    out.write(bytes(-out.tell() % _ALIGNMENT))
    offset = out.tell()
    out.write(array.tobytes())
    kind, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    tensor = ir.ExternalTensor(location, offset, array.nbytes, kind, shape=shape, name=name, base_dir=root)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, product: ir.Node, inputs: list[ir.Value | None], attributes: dict[str, int]) -> None:
    old = product.outputs[0]
    new = ir.Value(shape=old.shape, type=old.type)
    node = ir.Node(
        MICROSOFT,
        "MatMulNBits",
        inputs,
        ir.convenience.convert_attributes(attributes),
        outputs=[new],
        name=product.name,
    )
    graph.insert_before(product, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(product, safe=True)
    new.name = old.name
