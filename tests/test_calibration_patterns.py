"""Rounded activations in a graph: its form, ONNX Runtime's integer products against float64, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tokprune.calibration.graph import activation_scales, put_activations, put_dequantize
from tokprune.calibration.patterns import find_patterns
from tokprune.calibration.rounding import restore_matrix, round_matrix
from tokprune.runtime import ort
from tokprune.runtime.engines import compiler, versions
from tokprune.runtime.recipe import Activation

ROWS, COLUMNS = 48, 160  # [out, in]
NAMES = ("q.weight", "k.weight", "v.weight")
SCALE = 0.0251
TYPES = {"fp32": (TensorProto.FLOAT, "float32"), "fp16": (TensorProto.FLOAT16, "float16")}


def build(folder: Path, base: str, activations: bool = True) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Three products with one tensor, the last with a bias; their restored matrices [out, in]."""
    kind, dtype = TYPES[base]
    random = np.random.default_rng(0)
    nodes, weights = [], {}
    for name in NAMES:
        weights[name] = random.standard_normal((ROWS, COLUMNS)).astype(dtype)
        nodes += [helper.make_node("Transpose", [name], [f"{name}.t"], perm=[1, 0])]
        nodes += [helper.make_node("MatMul", ["x", f"{name}.t"], [f"{name}.y"])]
    nodes.append(helper.make_node("Add", ["v.weight.y", "bias"], ["v.biased"]))
    outputs = ["q.weight.y", "k.weight.y", "v.biased"]
    x, *ys = (
        helper.make_tensor_value_info(name, kind, ["batch", "rows", size])
        for name, size in (("x", COLUMNS), *((output, ROWS) for output in outputs))
    )
    constants = [*(numpy_helper.from_array(array, name) for name, array in weights.items())]
    constants.append(numpy_helper.from_array(np.arange(ROWS).astype(dtype), "bias"))
    graph = helper.make_graph(nodes, "graph", [x], ys, constants)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    restored = {}
    for name in NAMES:
        (transpose,) = [node for node, _ in model.graph.initializers[name].uses()]
        transpose.outputs[0].shape = ir.Shape((COLUMNS, ROWS))
        transpose.outputs[0].type = ir.TensorType(model.graph.inputs[0].dtype)
        found = round_matrix([weights[name]], (ROWS, COLUMNS), "int8", COLUMNS, dtype)
        restored[name] = restore_matrix(found.codes, found.scales)
        codes, scales = np.ascontiguousarray(found.codes.T), found.scales[:, 0]
        (folder / name).write_bytes(codes.tobytes() + scales.tobytes())
        tensors = [
            ir.ExternalTensor(
                name,
                at,
                array.nbytes,
                ir.DataType.from_numpy(array.dtype),
                shape=ir.Shape(array.shape),
                name="t",
                base_dir=folder,
            )
            for at, array in ((0, codes), (codes.nbytes, scales))
        ]
        put_dequantize(model, model.graph.initializers[name], *tensors)
    if activations:
        put_activations(model, {name: Activation(float(np.asarray(SCALE, dtype)), -3.2, 3.2) for name in NAMES})
    return model, restored


@pytest.mark.parametrize("base", TYPES)
class TestForm:
    def test_is_valid(self, tmp_path: Path, base: str) -> None:
        model, _ = build(tmp_path, base)
        ir.save(model, tmp_path / "graph.onnx")
        onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)
        assert model.graph.opset_imports[""] == 20  # what TensorRT 10.3 documents
        assert find_patterns(model) == {f"{name}.y": "W8A8" for name in NAMES}
        assert activation_scales(model) == dict.fromkeys(NAMES, float(np.asarray(SCALE, TYPES[base][1])))

    def test_runs_as_computed_in_float64(self, tmp_path: Path, base: str) -> None:
        """Values on ties, beyond the range, and of any size between; the products' sums are exact integers in FP32."""
        model, restored = build(tmp_path, base)
        ir.save(model, tmp_path / "graph.onnx")
        options = onnxruntime.SessionOptions()
        ort._keep_pairs(options)
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        dtype = TYPES[base][1]
        x = (2 * np.random.default_rng(1).standard_normal((2, 9, COLUMNS))).astype(dtype)
        scale = np.asarray(SCALE, dtype)
        x[0, 0, :5] = np.array([0.5, 1.5, -2.5, 400, -400]) * scale
        codes = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127)
        if base == "fp16":  # x / s is rounded to FP16 by some of ONNX Runtime's kernels: a tie may fall either way
            off = np.abs(x.astype(np.float64) / float(scale) % 1 - 0.5) < 0.05
            x[off] = (codes[off] * scale).astype(dtype)
            codes = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127)
        entering = codes.astype(np.float64) * float(scale)
        for found, name in zip(session.run(None, {"x": x}), NAMES, strict=True):
            expected = entering @ restored[name].T.astype(np.float64) + (name == "v.weight") * np.arange(ROWS)
            tolerance = 1e-6 if base == "fp32" else 4e-3
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())

    @pytest.mark.skipif(compiler.missing_modules(versions.RTX) != [], reason="needs the extra rtx")
    def test_nvidia_builds_it(self, tmp_path: Path, base: str) -> None:
        model, _ = build(tmp_path, base)
        ir.save(model, tmp_path / "graph.onnx")
        shapes = {"x": ((1, 1, COLUMNS), (1, 64, COLUMNS), (2, 128, COLUMNS))}
        report = compiler.build(tmp_path / "graph.onnx", tmp_path / "engine", [shapes])
        assert report.refusals == ()
        assert (tmp_path / "engine").stat().st_size > 0


def test_runs_in_integers(tmp_path: Path) -> None:
    """Three integer products, though one tensor is behind them; no matrix is dequantised."""
    model, _ = build(tmp_path, "fp32")
    ir.save(model, tmp_path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    ort._keep_pairs(options)
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 3
    assert kinds["MatMul"] == kinds["DequantizeLinear"] == 0


@pytest.mark.parametrize("may_overflow", [False, True])
def test_does_not_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_overflow: bool) -> None:
    """Largest codes of both signs side by side, which x86 without VNNI would saturate; by either choice of kernels."""
    monkeypatch.setattr(ort, "may_overflow", lambda: may_overflow)
    model, restored = build(tmp_path, "fp32")
    ir.save(model, tmp_path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    ort._keep_pairs(options)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    signs = np.sign(restored["q.weight"][0])
    x = (400 * SCALE * signs)[None, None].astype(np.float32)
    expected = np.clip(np.rint(x / np.float32(SCALE)), -128, 127).astype(np.float64) * np.float32(SCALE)
    (found, *_) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, expected @ restored["q.weight"].T.astype(np.float64), rtol=1e-6, atol=1e-4)


def test_one_tensor_has_one_scale(tmp_path: Path) -> None:
    model, _ = build(tmp_path, "fp32", activations=False)
    scales = {name: Activation(at, -1, 1) for at, name in enumerate(NAMES, 1)}
    with pytest.raises(ValueError, match=r"k\.weight asks for the scale 2, another reader of the same tensor for 1"):
        put_activations(model, scales)


def rename(model: ir.Model, kind: str, change: Callable[[ir.Node], None]) -> None:
    change(next(node for node in model.graph if node.op_type == kind))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: rename(model, "QuantizeLinear", lambda node: model.graph.outputs.append(node.outputs[0])),
        lambda model: rename(model, "MatMul", lambda node: node.replace_input_with(1, node.inputs[0])),
        lambda model: rename(
            model,
            "QuantizeLinear",
            lambda node: model.graph.initializers["activations.zero_point"].__setattr__(
                "const_value", ir.tensor(np.array(3, np.int8))
            ),
        ),
        lambda model: next(
            node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
        ).attributes.update({"axis": ir.AttrInt64("axis", 0)}),
        lambda model: model.graph.opset_imports.update({"": 12}),
    ],
    ids=["codes leave the graph", "no weight", "zero point", "scales along the input", "opset"],
)
def test_other_forms_are_named(tmp_path: Path, spoil: Callable[[ir.Model], None]) -> None:
    model, _ = build(tmp_path, "fp32")
    spoil(model)
    with pytest.raises(ValueError, match="is in no form that TensorRT fuses with a product"):
        find_patterns(model)


def test_weights_only(tmp_path: Path) -> None:
    model, _ = build(tmp_path, "fp32", activations=False)
    assert set(find_patterns(model).values()) == {"W8A16"}
