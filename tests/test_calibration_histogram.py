"""Ranges of activations, against brute force over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tokprune.calibration.histogram import BINS, METHODS, Histogram, find_range


def of(values: np.ndarray, pieces: int = 1) -> Histogram:
    histogram = Histogram()
    for piece in np.array_split(np.abs(values).astype(np.float32), pieces):
        histogram.add(piece)
    return histogram


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Mostly within 1, some outliers up to 40: what a range has to decide about."""
    random = np.random.default_rng(0)
    return np.concatenate([random.standard_normal(40_000), 40 * random.random(40)]).astype(np.float32)


def test_streamed_in_any_order_it_is_the_same(values: np.ndarray) -> None:
    whole, upwards = of(values), of(np.sort(np.abs(values)), 37)  # whose limit doubles time and again
    assert (whole.limit, upwards.limit) == (64.0, 64.0)
    np.testing.assert_array_equal(whole.counts, upwards.counts)
    expected, _ = np.histogram(np.abs(values), bins=BINS, range=(0, 64))
    np.testing.assert_array_equal(whole.counts, expected)


def test_max(values: np.ndarray) -> None:
    assert find_range(of(values), 39.9, "max") == 39.9


@pytest.mark.parametrize("percent", [99.0, 99.9, 100.0])
def test_percentile(values: np.ndarray, percent: float) -> None:
    largest = float(np.abs(values).max())
    found = find_range(of(values), largest, "percentile", percent)
    assert found == pytest.approx(np.quantile(np.abs(values), percent / 100), abs=2 * 64 / BINS)


def test_mse_is_the_best_of_all_ranges() -> None:
    """The found range's error, from the values, against 400 others': none is better by more than the grid is coarse."""
    values = np.append(np.random.default_rng(0).standard_normal(40_000), 8).astype(np.float32)
    largest = float(np.abs(values).max())

    def error(reach: float) -> float:
        scale = reach / 127
        return float(np.square(values - np.clip(np.rint(values / scale), -127, 127) * scale).sum())

    found = find_range(of(values), largest, "mse")
    assert found < 0.95 * largest  # it pays to clip the 8
    assert error(found) <= 1.02 * min(error(largest * share) for share in np.linspace(0.02, 1, 400))


def test_entropy_clips_rare_outliers(values: np.ndarray) -> None:
    assert 2 < find_range(of(values), float(np.abs(values).max()), "entropy") < 30


@pytest.mark.parametrize("method", METHODS)
def test_without_values(method: str) -> None:
    assert find_range(Histogram(), 0.0, method) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone(method: str) -> None:
    assert find_range(of(np.zeros(5)), 0.0, method) == 0.0


def test_unknown() -> None:
    with pytest.raises(ValueError, match="range 'median' is none of max"):
        find_range(Histogram(), 1.0, "median")
