"""Rounding to INT8 and INT4 against formulas written out, and to the bit where integers are concerned."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tokprune.calibration.rounding import Rounded, pack_int4, restore_matrix, round_matrix, unpack_int4

MOST = {"int8": 127, "int4": 7}


def rounded(matrix: np.ndarray, precision: str, block: int, scale_type: str = "float16", rows: int = 3) -> Rounded:
    pieces = (matrix[at : at + rows] for at in range(0, len(matrix), rows))
    return round_matrix(pieces, matrix.shape, precision, block, scale_type)


def matrix(rows: int = 10, columns: int = 64, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, columns)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale_type", ["float32", "float16"])
@pytest.mark.parametrize(("precision", "block"), [("int8", 64), ("int4", 16), ("int4", 32), ("int4", 64)])
def test_each_weight_by_the_formula(precision: str, block: int, scale_type: str, dtype: str) -> None:
    """One weight at a time, in Python's numbers."""
    weights = matrix(dtype=dtype)
    found = rounded(weights, precision, block, scale_type)
    restored = restore_matrix(found.codes, found.scales)
    assert found.scales.dtype == scale_type
    assert found.scales.shape == (10, 64 // block)
    assert restored.dtype == np.float32
    for row in range(10):
        for at in range(0, 64, block):
            own = [float(weight) for weight in weights[row, at : at + block]]
            scale = np.dtype(scale_type).type(np.float32(max(map(abs, own))) / np.float32(MOST[precision]))
            assert found.scales[row, at // block] == scale
            for column, weight in enumerate(own, at):
                code = int(found.codes[row, column])
                assert abs(code) <= MOST[precision]
                # half a step, and what clipping by a scale rounded down may add: 2⁻¹¹ of the largest
                assert abs(weight - code * float(scale)) <= float(scale) * (0.5 + MOST[precision] / 2**11) * (1 + 1e-6)
                assert restored[row, column] == np.float32(code) * np.float32(scale)


def test_codes_are_these() -> None:
    """Half to even, both signs, the largest weight on the last code; a row of zeros."""
    weights = np.array([[127, -127, 0.5, 1.5, -2.5, 63], [0] * 6, [-254, 1, 2, 3, 4, 5]], np.float32)
    found = rounded(weights, "int8", 6)
    assert found.scales.tolist() == [[1], [1], [2]]
    assert found.codes.tolist() == [[127, -127, 0, 2, -2, 63], [0] * 6, [-127, 0, 1, 2, 2, 2]]


def test_weights_below_the_scales_type_become_zero() -> None:
    found = rounded(np.full((1, 16), 1e-9, np.float32), "int4", 16)
    assert found.scales.tolist() == [[1]]
    assert not found.codes.any()


@pytest.mark.parametrize("rows", [1, 4, 10, 99])
def test_pieces_do_not_matter(rows: int) -> None:
    whole, pieces = rounded(matrix(), "int4", 32, rows=10), rounded(matrix(), "int4", 32, rows=rows)
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    np.testing.assert_array_equal(whole.scales, pieces.scales)
    assert pieces.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-9)  # sums in another order


@pytest.mark.parametrize(("precision", "block", "floor"), [("int8", 512, 40), ("int4", 128, 18), ("int4", 32, 20)])
def test_sqnr(precision: str, block: int, floor: float) -> None:
    """Of normal weights: 42.6, 18.6 and 20.4 dB were measured; with a bit less it would be 6 dB fewer."""
    weights = matrix(64, 512)
    found = rounded(weights, precision, block)
    restored = restore_matrix(found.codes, found.scales).astype(np.float64)
    exact = 10 * math.log10(np.square(weights, dtype=np.float64).sum() / np.square(weights - restored).sum())
    assert found.sqnr_db == pytest.approx(exact, abs=1e-4)
    assert exact > floor


def test_nothing_lost_is_no_number() -> None:
    assert rounded(np.ones((2, 16), np.float32) * 7, "int4", 16).sqnr_db is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    weights = matrix()
    weights[7, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        rounded(weights, "int8", 64)


@pytest.mark.parametrize("count", [1, 2, 15, 16])
def test_packing_is_onnxs(count: int) -> None:
    codes = (np.arange(count, dtype=np.int8) % 15) - 7
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[count], raw_data=pack_int4(codes).tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)
    np.testing.assert_array_equal(unpack_int4(pack_int4(codes), (count,)), codes)
