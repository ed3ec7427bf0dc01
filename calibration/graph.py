"""How a graph reads a rounded matrix: ``DequantizeLinear`` in the place of the weight's ``Transpose``.

    codes [in, out], scales → DequantizeLinear → MatMul
    what it is multiplied with → QuantizeLinear → DequantizeLinear → MatMul      where activations are rounded too

INT8: scales [out], axis 1, opset 20. INT4: scales [in / block, out], axis 0, ``block_size``; opset 21 is the first that
has them. The layout is the one that TensorRT documents (blocks along the first axis of a 2-D constant) and that ONNX
Runtime joins to one product; with [out, in] under a ``Transpose`` it would dequantise the whole matrix in every call.
Activations: INT8, one scale, zero point 0. Each product has a pair of its own, even of one tensor: ONNX Runtime's CPU
provider makes an integer product only of a pair that no other reads. Knows graphs; rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from tokprune.calibration.rounding import restore_matrix, unpack_int4
from tokprune.runtime.recipe import Activation

INT4_OPSET = 21
ZERO_POINT = "activations.zero_point"
TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}


def codes_name(matrix: str) -> str:
    """The initializer with the codes of the matrix of that name."""
    return f"{matrix}.codes"


def scales_name(matrix: str) -> str:
    """The initializer with its scales."""
    return f"{matrix}.scales"


def activation_name(matrix: str) -> str:
    """The initializer with the scale of the tensor that this matrix is the first to be multiplied with."""
    return f"{matrix}.activation"


def products(model: ir.Model) -> Iterator[tuple[str, ir.Value, ir.Node]]:
    """(name of the matrix, its weight or its codes, MatMul) of each product with one, in the graph's order."""
    for node in model.graph:
        reader = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if reader is not None and reader.op_type in ("Transpose", "DequantizeLinear"):
            weight = reader.inputs[0]
            if weight is not None and weight.is_initializer():
                yield str(weight.name).removesuffix(codes_name("")), weight, node


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


def put_activations(model: ir.Model, activations: Mapping[str, Activation]) -> None:
    """Have each product with one of the matrices, by name, round what they are multiplied with to INT8.

    Matrices that read one tensor share its scale. Raises ValueError if such ones ask for several.
    """
    graph = model.graph
    scales: dict[ir.Value, tuple[ir.Value, float]] = {}
    zero = _constant(ZERO_POINT, np.zeros((), np.int8))
    for matrix, _, product in list(products(model)):
        if matrix not in activations:
            continue
        source = product.inputs[0]
        assert source is not None
        assert source.dtype is not None
        wanted = activations[matrix].scale
        if source not in scales:
            scales[source] = _constant(activation_name(matrix), np.array(wanted, source.dtype.numpy())), wanted
            graph.register_initializer(scales[source][0])
        scale, found = scales[source]
        if found != wanted:
            raise ValueError(f"{matrix} asks for the scale {wanted}, another reader of the same tensor for {found}")
        if ZERO_POINT not in graph.initializers:
            graph.register_initializer(zero)
        codes = ir.Value(name=f"{matrix}.entering.codes", shape=source.shape, type=ir.TensorType(ir.DataType.INT8))
        restored = ir.Value(name=f"{matrix}.entering", shape=source.shape, type=source.type)
        pair = (("QuantizeLinear", source, codes), ("DequantizeLinear", codes, restored))
        nodes = [ir.Node("", kind, [read, scale, zero], outputs=[written]) for kind, read, written in pair]
        graph.insert_before(product, nodes)
        product.replace_input_with(0, restored)


def _constant(name: str, data: np.ndarray) -> ir.Value:
    tensor = ir.tensor(data, name=name)
    return ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def activation_scales(model: ir.Model) -> dict[str, float]:
    """The scale of what each matrix is multiplied with, by matrix, where that is rounded."""
    found = {}
    for matrix, _, product in products(model):
        pair = product.inputs[0].producer() if product.inputs[0] is not None else None
        if pair is not None and pair.op_type == "DequantizeLinear":
            assert pair.inputs[1] is not None
            assert pair.inputs[1].const_value is not None
            found[matrix] = float(pair.inputs[1].const_value.numpy())
    return found


def restored_matrices(model: ir.Model) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, block, Ŵ [out, in] FP32) of each matrix that the graph dequantises, one at a time."""
    for name, codes, product in products(model):
        reader = product.inputs[1].producer() if product.inputs[1] is not None else None
        if reader is not None and reader.op_type == "DequantizeLinear":
            scales = reader.inputs[1]
            assert scales is not None
            rows = read_tensor(codes).T  # [out, in]
            widths = read_tensor(scales)
            widths = widths[:, None] if widths.ndim == 1 else widths.T  # [out, in / block]
            yield name, rows.shape[1] // widths.shape[1], restore_matrix(rows, widths)


def read_tensor(value: ir.Value) -> np.ndarray:
    """The data of an initializer. onnx_ir would refuse linked files, which a bundle that was cut has."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)  # as all weights of a quantised bundle
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        data = file.read(tensor.nbytes)
    if tensor.dtype == ir.DataType.INT4:
        return unpack_int4(np.frombuffer(data, np.uint8), tensor.shape.numpy())
    return np.frombuffer(data, tensor.dtype.numpy()).reshape(tensor.shape.numpy())
