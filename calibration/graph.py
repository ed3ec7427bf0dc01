"""How a decoder's graph reads a rounded matrix: ``DequantizeLinear`` in the place of the weight's ``Transpose``.

    codes [in, out], scales → DequantizeLinear → MatMul

INT8: scales [out], axis 1, opset 20. INT4: scales [in / block, out], axis 0, ``block_size``; opset 21 is the first that
has them. The layout is the one that TensorRT documents (blocks along the first axis of a 2-D constant) and that ONNX
Runtime joins to one product; with [out, in] under a ``Transpose`` it would dequantise the whole matrix in every call.
Knows graphs; rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from tokprune.calibration.rounding import restore_matrix, unpack_int4

INT4_OPSET = 21
TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}


def codes_name(matrix: str) -> str:
    """The initializer with the codes of the matrix of that name."""
    return f"{matrix}.codes"


def scales_name(matrix: str) -> str:
    """The initializer with its scales."""
    return f"{matrix}.scales"


def put_dequantize(model: ir.Model, weight: ir.Value, codes: ir.ExternalTensor, scales: ir.ExternalTensor) -> None:
    """Have ``model`` read ``codes`` and ``scales``, laid out as above, where it reads the transposed ``weight``.

    Raises ValueError if anything but a ``Transpose`` reads the weight.
    """
    graph = model.graph
    assert weight.name is not None
    readers = [node for node, _ in weight.uses()]
    if [node.op_type for node in readers] != ["Transpose"]:
        raise ValueError(f"{weight.name} is read by {[node.op_type for node in readers]}, not by one Transpose")
    (transpose,) = readers
    inputs = []
    for name, tensor in ((codes_name(weight.name), codes), (scales_name(weight.name), scales)):
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        inputs.append(value)
    attributes = {"axis": 1}
    if codes.dtype == ir.DataType.INT4:
        attributes = {"axis": 0, "block_size": codes.shape.numpy()[0] // scales.shape.numpy()[0]}
        graph.opset_imports[""] = max(INT4_OPSET, graph.opset_imports[""])
    old = transpose.outputs[0]
    new = ir.Value(shape=old.shape, type=old.type)
    node = ir.Node(
        "",
        "DequantizeLinear",
        inputs,
        ir.convenience.convert_attributes(attributes),
        outputs=[new],
        name=f"{weight.name}.dequantize",
    )
    graph.insert_before(transpose, node)
    old.replace_all_uses_with(new)
    graph.remove(transpose, safe=True)
    new.name = old.name
    del graph.initializers[weight.name]


def restored_matrices(model: ir.Model) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, block, Ŵ [out, in] FP32) of each matrix that the graph dequantises, one at a time."""
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            codes, scales = node.inputs[0], node.inputs[1]
            assert codes is not None
            assert scales is not None
            rows = _read(codes).T  # [out, in]
            widths = _read(scales)
            widths = widths[:, None] if widths.ndim == 1 else widths.T  # [out, in / block]
            name = str(codes.name).removesuffix(codes_name(""))
            yield name, rows.shape[1] // widths.shape[1], restore_matrix(rows, widths)


def _read(value: ir.Value) -> np.ndarray:
    """The data of an initializer. onnx_ir would refuse linked files, which a bundle that was cut has."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)  # as `put_dequantize` made it
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        data = file.read(tensor.nbytes)
    if tensor.dtype == ir.DataType.INT4:
        return unpack_int4(np.frombuffer(data, np.uint8), tensor.shape.numpy())
    return np.frombuffer(data, tensor.dtype.numpy()).reshape(tensor.shape.numpy())
