"""What ONNX Runtime and NVIDIA's builder make of the graph form that quantised matrices have, at the usual block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from products import COLUMNS, NAME, TYPES, product

from tokprune.calibration.graph import put_dequantize, restored_matrices
from tokprune.runtime import ort
from tokprune.runtime.engines import compiler, versions


@pytest.mark.parametrize("base", TYPES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
class TestForm:
    def test_is_valid(self, tmp_path: Path, precision: str, base: str) -> None:
        path, _ = product(tmp_path, precision, base)
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]
        assert {value.name for value in model.graph.initializer} == {f"{NAME}.codes", f"{NAME}.scales"}
        assert model.opset_import[0].version == (21 if precision == "int4" else 20)

    def test_is_read_back(self, tmp_path: Path, precision: str, base: str) -> None:
        path, restored = product(tmp_path, precision, base)
        ((name, block, found),) = restored_matrices(ir.load(path))
        assert (name, block) == (NAME, 256 if precision == "int8" else 128)
        np.testing.assert_array_equal(found, restored)

    def test_is_read_back_from_linked_files(self, tmp_path: Path, precision: str, base: str) -> None:
        path, restored = product(tmp_path, precision, base)
        (tmp_path / "link").hardlink_to(tmp_path / "data")
        ((_, _, found),) = restored_matrices(ir.load(path))
        np.testing.assert_array_equal(found, restored)

    def test_onnx_runtime_joins_it(self, tmp_path: Path, precision: str, base: str) -> None:
        """One product of codes, in FP32 here; else the whole matrix would be dequantised in every call."""
        path, restored = product(tmp_path, precision, base)
        x = np.random.default_rng(1).standard_normal((5, COLUMNS)).astype(TYPES[base][1])
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", str(ort.BLOCK))
        session = onnxruntime.InferenceSession(path, options, providers=[ort.CPU])
        (y,) = session.run(None, {"x": x})
        # FP32: sums of 256 products; FP16: the result's own rounding
        np.testing.assert_allclose(y, x.astype(np.float32) @ restored.T, atol=1e-4 if base == "fp32" else 0.05)
        kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert kinds - {"Cast"} == {"MatMulNBits"}

    @pytest.mark.skipif(compiler.missing_modules(versions.RTX) != [], reason="needs the extra rtx")
    def test_nvidia_builds_it(self, tmp_path: Path, precision: str, base: str) -> None:
        path, _ = product(tmp_path, precision, base)
        report = compiler.build(path, tmp_path / "engine", [{"x": ((1, COLUMNS), (4, COLUMNS), (64, COLUMNS))}])
        assert report.refusals == ()
        assert (tmp_path / "engine").stat().st_size > 0


def test_a_weight_that_is_read_otherwise(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", NAME], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4]) for name in "xy")
    weights = numpy_helper.from_array(np.zeros((4, 4), np.float32), NAME)
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "graph", [x], [y], [weights])))
    tensor = ir.ExternalTensor("data", 0, 16, ir.DataType.INT8, shape=ir.Shape((4, 4)), name="c", base_dir=tmp_path)
    with pytest.raises(ValueError, match="not by one Transpose"):
        put_dequantize(model, model.graph.initializers[NAME], tensor, tensor)
