"""A product as quantised bundles have it, of one small matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from tokprune.calibration.graph import put_dequantize
from tokprune.calibration.rounding import pack_int4, restore_matrix, round_matrix

ROWS, COLUMNS = 48, 256  # [out, in]
NAME = "language_model.layers.0.mlp.up_proj.weight"
TYPES = {"fp32": (TensorProto.FLOAT, "float32"), "fp16": (TensorProto.FLOAT16, "float16")}


def product(
    folder: Path, precision: str, base: str, columns: int = COLUMNS, int4_block: int = 128
) -> tuple[Path, np.ndarray]:
    """``graph.onnx``, x · Wᵀ with W rounded, and Ŵ [out, in]."""
    kind, dtype = TYPES[base]
    weights = np.random.default_rng(0).standard_normal((ROWS, columns)).astype(dtype)
    nodes = [helper.make_node("Transpose", [NAME], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, kind, ["rows", size]) for name, size in (("x", columns), ("y", ROWS)))
    graph = helper.make_graph(nodes, "graph", [x], [y], [numpy_helper.from_array(weights, NAME)])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    model.graph[0].outputs[0].shape = ir.Shape((columns, ROWS))
    model.graph[0].outputs[0].type = ir.TensorType(model.graph.inputs[0].dtype)
    block = columns if precision == "int8" else int4_block
    found = round_matrix([weights], (ROWS, columns), precision, block, dtype)
    codes, scales = np.ascontiguousarray(found.codes.T), np.ascontiguousarray(found.scales.T)
    data = pack_int4(codes) if precision == "int4" else codes
    if precision == "int8":
        scales = scales[0]
    (folder / "data").write_bytes(data.tobytes() + scales.tobytes())
    integer = ir.DataType.INT4 if precision == "int4" else ir.DataType.INT8
    tensors = [
        ir.ExternalTensor("data", at, size, one, shape=ir.Shape(shape), name=name, base_dir=folder)
        for at, size, one, shape, name in (
            (0, data.nbytes, integer, codes.shape, "c"),
            (data.nbytes, scales.nbytes, ir.DataType.from_numpy(scales.dtype), scales.shape, "s"),
        )
    ]
    put_dequantize(model, model.graph.initializers[NAME], *tensors)
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx", restore_matrix(found.codes, found.scales)
