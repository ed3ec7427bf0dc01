"""Products over blocks of codes: the bytes that ONNX Runtime would make at each load, and what they are worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from products import TYPES, product

from tokprune.export.fusion.blocks import BLOCK, LEVEL, put_blocks
from tokprune.export.fusion.build import build_fused
from tokprune.export.quantize import quantize
from tokprune.runtime.bundle import open_bundle
from tokprune.runtime.ort import CPU, INTEGER
from tokprune.runtime.session import make_backend

CASES = [("int8", 256, 256), ("int8", 200, 200), ("int4", 256, 128), ("int4", 96, 32)]  # precision, in, block


def rewritten(path: Path) -> Path:
    model = ir.load(path)
    assert put_blocks(model, path.parent / "slot.data", path.parent)
    ir.save(model, path.with_name("blocks.onnx"))
    return path.with_name("blocks.onnx")


def session(path: Path, to: Path | None = None) -> onnxruntime.InferenceSession:
    """Joined as ONNX Runtime does it itself, by the level and block of fused graphs."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(LEVEL))
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", str(BLOCK))
    options.log_severity_level = 3
    if to is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(to)
    return onnxruntime.InferenceSession(path, options, providers=[CPU])


def node_of(path: Path) -> tuple[dict[str, int], list[np.ndarray]]:
    """Attributes and constants of the one product."""
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    attributes = {attribute.name: attribute.i for attribute in node.attribute if attribute.i}
    return attributes, [tensors[name].reshape(-1) for name in node.input[1:3]]


class TestLayout:
    @pytest.mark.parametrize(("precision", "columns", "block"), CASES)
    def test_the_bytes_are_onnx_runtimes_own(self, precision, columns, block, tmp_path):
        """Which joins the neutral form at each load; we keep what it makes, a last block that is not full included."""
        path, _ = product(tmp_path, precision, "fp32", columns, block)
        session(path, tmp_path / "joined.onnx")
        wanted, constants = node_of(tmp_path / "joined.onnx")
        found, ours = node_of(rewritten(path))
        assert found == wanted
        for mine, theirs in zip(ours, constants, strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype

    @pytest.mark.parametrize(("precision", "columns", "block"), CASES)
    @pytest.mark.parametrize("base", TYPES)
    def test_the_numbers_are_the_matrix_s(self, precision, columns, block, base, tmp_path):
        """Rows that rounding to INT8 leaves as they are, ±127 in each block: only sums in FP32 are left to differ."""
        path, restored = product(tmp_path, precision, base, columns, block)
        if base == "fp16":  # `widen` comes first in a build: products are in FP32 by then
            graph = onnx.load(path, load_external_data=False)
            for value in (*graph.graph.input, *graph.graph.output):
                value.type.tensor_type.elem_type = TensorProto.FLOAT
            onnx.save(graph, path)
        x = np.random.default_rng(1).integers(-126, 127, (3, columns)).astype(np.float32)
        x[:, ::32] = 127
        (y,) = session(rewritten(path)).run(None, {"x": x})
        wanted = x.astype(np.float64) @ restored.T.astype(np.float64)
        np.testing.assert_allclose(y, wanted, atol=2e-6 * np.abs(x).sum(axis=1).max() * np.abs(restored).max())

    def test_a_product_of_rounded_activations_stays(self, tmp_path):
        path, _ = product(tmp_path, "int8", "fp32")
        model = onnx.load(path, load_external_data=False)
        zero, scale = np.zeros((), np.int8), np.float32(0.02)
        model.graph.initializer.extend([numpy_helper.from_array(zero, "zero"), numpy_helper.from_array(scale, "scale")])
        pair = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["restored"]),
        ]
        dequantize, last = model.graph.node
        last.input[0] = "restored"
        nodes = [*pair, dequantize, last]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, path)
        rewrite = ir.load(path)
        assert not put_blocks(rewrite, tmp_path / "slot.data", tmp_path)
        assert [node.op_type for node in rewrite.graph][-1] == "MatMul"
        assert not (tmp_path / "slot.data").exists()


@pytest.fixture(scope="module")
def built(tiny_bundle, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "bundle"
    quantize(open_bundle(tiny_bundle("lofi")), path, "int4")
    build_fused(open_bundle(path))
    return path


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "bundle")


class TestSlot:
    def test_no_matrix_is_joined_at_loading(self, built):
        (folder,) = (built / "engines").iterdir()
        kinds = [node.op_type for name in ("decoder_0", "decoder_1") for node in ir.load(folder / f"{name}.onnx").graph]
        assert kinds.count("MatMulNBits") > 0
        assert not {"DequantizeLinear", "MatMul"} & set(kinds)
        record = json.loads((folder / "slot.json").read_text())
        weights = {each["name"]: each["weights"] for each in record["segments"]}
        assert weights["vision_encoder"] is None
        for name in ("decoder_0", "decoder_1"):
            assert weights[name]["size"] == (folder / f"{name}.data").stat().st_size

    def test_that_activations_are_rounded_is_said(self, built):
        """INT4's neutral graphs are exact, these are not."""
        opened = open_bundle(built)
        for engine, said in (("auto", True), ("onnxruntime-neutral", False)):
            backend = make_backend(engine, opened)
            backend.load_all(opened, opened.manifest.segments)
            assert (INTEGER in backend.remarks) == said

    @pytest.mark.parametrize("what", ["missing", "cut", "altered"])
    def test_damaged_codes_are_not_used(self, what, bundle):
        (folder,) = (bundle / "engines").iterdir()
        file = folder / "decoder_1.data"
        data = file.read_bytes()
        file.unlink()
        if what != "missing":
            file.write_bytes(data[:-1] if what == "cut" else bytes([data[0] ^ 1]) + data[1:])
        backend = make_backend("auto", open_bundle(bundle))
        assert "fused" not in backend.name
        assert any("decoder_1.data" in remark and "--target cpu" in remark for remark in backend.remarks)
        result = build_fused(open_bundle(bundle))
        assert [each["built"] for each in result["segments"]] == [False, False, True]
        assert file.read_bytes() == data

    def test_it_answers_wherever_the_bundle_is_moved(self, bundle, tmp_path, call):
        """The graph names the file by its place in the bundle."""
        moved = bundle.rename(tmp_path / "moved")
        done = call("run", moved, "--prompt", "What is here?", "--max-new-tokens", "2", "--json")
        assert json.loads(done.out)["engine"].endswith("fused graphs")
