"""Factors by channel: what they may not change, and what they are for, on planted activations."""

from __future__ import annotations

import numpy as np
import pytest

from tokprune.calibration.folding import Group
from tokprune.calibration.rounding import restore_matrix, round_matrix
from tokprune.calibration.search import Found, Target, fake_quantize, find_activation, find_factors
from tokprune.calibration.statistics import Seen
from tokprune.runtime.recipe import Choice, Range

NORM = Group(("a", "b"), ("norm.weight",), norm=True)
AWQ = Choice("int4", scheme="awq")
W8A8 = Choice("int8", scheme="smoothquant", alpha=0.5, activation=Range("max"))
BLOCKS = {"int4": 32, "int8": 64}


def planted(outliers: float, rows: int = 400) -> tuple[Seen, np.ndarray]:
    """Activations [rows, 64] of about 1, but for three channels ``outliers`` times as large; one is always 0."""
    random = np.random.default_rng(1)
    values = random.standard_normal((rows, 64)).astype(np.float32)
    values[:, [3, 17, 40]] *= outliers
    values[:, 9] = 0
    seen = Seen(64)
    seen.add(values, random)
    return seen, values


def targets(precision: str) -> dict[str, Target]:
    random = np.random.default_rng(2)
    shapes = {"a": (48, 64), "b": (16, 64)}
    return {
        n: Target(random.standard_normal(s).astype(np.float32), precision, BLOCKS[precision]) for n, s in shapes.items()
    }


def objective(seen: Seen, choice: Choice, found: Found, given: dict[str, Target]) -> float:
    """Σ ‖X Wᵀ − X̂ Ŵᵀ‖² in float64, from the formulas."""
    factors = np.ones(64) if found.factors is None else found.factors.astype(np.float64)
    entering = seen.sample / factors
    if found.activation is not None:
        scale = found.activation.scale
        entering = np.clip(np.rint(entering.astype(np.float32) / np.float32(scale)), -128, 127) * scale
    total = 0.0
    for target in given.values():
        changed = (target.weights * factors).astype(np.float32)
        rounded = round_matrix([changed], changed.shape, choice.precision, target.block, "float32")
        restored = restore_matrix(rounded.codes, rounded.scales).astype(np.float64)
        total += float(np.square(seen.sample.astype(np.float64) @ target.weights.T - entering @ restored.T).sum())
    return total


def find(choice: Choice, seen: Seen, given: dict[str, Target], group: Group = NORM) -> Found:
    norm = np.linspace(0.5, 2, 64).astype(np.float32)
    return find_factors(group, choice, seen, given, "float32", norm if group.norm else None)


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("outliers", [1.0, 30.0])
class TestAwq:
    def test_never_worse_than_rounding(self, outliers: float, precision: str) -> None:
        seen, _ = planted(outliers)
        given, choice = targets(precision), Choice(precision, scheme="awq")
        found = find(choice, seen, given)
        plain = objective(seen, choice, Found(None, None, None, {}), given)
        assert objective(seen, choice, found, given) <= plain * (1 + 1e-6)
        if outliers > 1:
            assert objective(seen, choice, found, given) < 0.5 * plain
            assert found.factors is not None
            assert found.factors[[3, 17, 40]].min() > np.delete(found.factors, [3, 17, 40]).max()

    def test_errors_are_those_of_the_objective(self, outliers: float, precision: str) -> None:
        seen, _ = planted(outliers)
        given, choice = targets(precision), Choice(precision, scheme="awq")
        found = find(choice, seen, given)
        energy = {n: float(np.square(seen.sample.astype(np.float64) @ t.weights.T).sum()) for n, t in given.items()}
        total = sum(found.errors[name] * energy[name] for name in given)
        assert total == pytest.approx(objective(seen, choice, found, given), rel=1e-3)


class TestSmoothQuant:
    def test_is_the_papers_formula(self) -> None:
        """s_j = max|x_j|^α / max|w_j|^(1−α) up to a common factor, which changes nothing; 1 where x_j is always 0."""
        seen, values = planted(30.0)
        given = targets("int8")
        found = find(W8A8, seen, given)
        assert found.factors is not None
        weights = np.abs(np.concatenate([target.weights for target in given.values()])).max(axis=0)
        used = np.arange(64) != 9
        expected = np.sqrt(np.abs(values).max(axis=0)[used] / weights[used])
        ratio = found.factors[used] / expected
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        assert (found.factors[9], found.alpha) == (1, 0.5)

    def test_halves_the_error_where_channels_stick_out(self) -> None:
        seen, _ = planted(30.0)
        given = targets("int8")
        plain = find(Choice("int8", activation=Range("max")), seen, given)
        assert plain.factors is None
        assert objective(seen, W8A8, find(W8A8, seen, given), given) < 0.5 * objective(seen, W8A8, plain, given)

    def test_searched(self) -> None:
        """Without an α the best is found, which is no worse than 0.5 nor than none."""
        seen, _ = planted(30.0)
        given = targets("int8")
        best = find(Choice("int8", scheme="smoothquant", activation=Range("max")), seen, given)
        others = [find(W8A8, seen, given), find(Choice("int8", activation=Range("max")), seen, given)]
        least = min(objective(seen, W8A8, other, given) for other in others)
        assert objective(seen, W8A8, best, given) <= least * (1 + 1e-6)

    def test_range_is_that_of_all_rows(self) -> None:
        """One row of 400 sticks out, and is not among the 128 that are kept."""
        seen, values = planted(1.0)
        big = np.full((1, 64), 50, np.float32)
        seen.count += 1
        seen.largest = np.maximum(seen.largest, big[0])
        seen.histogram.add(big)
        found = find_activation(W8A8, seen, np.full(64, 2, np.float32), "float32")
        assert found is not None
        assert found.high == 25
        assert found.scale == pytest.approx(25 / 127)
        assert np.abs(values).max() < 50


def test_without_takers_there_are_no_factors() -> None:
    seen, _ = planted(30.0)
    found = find(W8A8, seen, targets("int8"), Group(("a", "b")))
    assert (found.factors, found.alpha) == (None, None)
    assert found.activation is not None


def test_heads_that_share_values_share_factors() -> None:
    """Four query heads of 16 channels read two value heads."""
    seen, _ = planted(30.0)
    group = Group(("a", "b"), ("v",), shared=2, head_dim=16)
    found = find(W8A8, seen, targets("int8"), group)
    assert found.factors is not None
    heads = found.factors.reshape(2, 2, 16)
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    taken = group.take(found.factors)
    assert taken.shape == (32,)
    np.testing.assert_array_equal(group.spread(taken), found.factors)


def test_norms_of_fp16_lose_nothing() -> None:
    """What goes into the matrix is the inverse of what the weight was rounded to: their product is the weight."""
    seen, _ = planted(30.0)
    norm = np.linspace(0.5, 2, 64).astype(np.float16)
    found = find_factors(NORM, AWQ, seen, targets("int4"), "float16", norm)
    assert found.factors is not None
    folded = (norm.astype(np.float32) * (np.float32(1) / found.factors)).astype(np.float16)
    np.testing.assert_allclose(folded.astype(np.float64) * found.factors, norm, rtol=3e-7)


def test_dead_activations() -> None:
    seen = Seen(64)
    seen.add(np.zeros((5, 64), np.float32), np.random.default_rng(0))
    found = find(W8A8, seen, targets("int8"))
    assert found.activation is not None
    assert (found.activation.scale, found.activation.high) == (1.0, 0.0)
    assert set(found.errors.values()) == {0.0}


def test_fake_quantize() -> None:
    values = np.array([-200, -1.5, -0.5, 0.5, 1.5, 2.5, 200], np.float32)
    np.testing.assert_array_equal(fake_quantize(values, 1.0), [-128, -2, 0, 0, 2, 2, 127])
