"""Metrics: against scipy, numpy.linalg.svd and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokprune.runtime import metrics
from tokprune.runtime.verification import (
    ConsistencySample,
    consistency_summary,
    gates,
    parity_sample,
    parity_summary,
)

RNG = np.random.default_rng(7)


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            (" Yes.", "yes"),
            ("A  red\nball !", "a red ball"),
            ("3.5", "3.5"),
            ("STRASSE", "straße".casefold()),
            ("?", ""),
        ],
    )
    def test_normalise(self, text: str, normal: str) -> None:
        assert metrics.normalise_answer(text) == normal

    def test_flips(self) -> None:
        #        kept right, lost, won,  other wrong, same wrong, right but for spelling
        full = ["a", "a", "b", "b", "b", "A."]
        pruned = ["a", "b", "a", "c", "b", "a"]
        assert metrics.count_flips(full, pruned, ["a"] * 6) == metrics.Flips(1, 1, 1)

    def test_flips_need_equal_lengths(self) -> None:
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            metrics.count_flips(["a", "b"], ["a"], ["a", "b"])


class TestStatistics:
    @pytest.mark.parametrize(("lost", "won"), [(0, 1), (5, 0), (3, 9), (9, 3), (7, 7), (40, 61), (700, 800)])
    def test_mcnemar_is_the_exact_binomial_test(self, lost: int, won: int) -> None:
        stats = pytest.importorskip("scipy.stats")
        expected = stats.binomtest(lost, lost + won, 0.5).pvalue
        assert metrics.mcnemar_p(lost, won) == pytest.approx(expected, rel=1e-9)  # scipy's own rounding

    def test_mcnemar_by_hand(self) -> None:
        assert metrics.mcnemar_p(0, 0) == 1.0
        assert metrics.mcnemar_p(0, 5) == 2 / 2**5
        assert metrics.mcnemar_p(1, 5) == 2 * (1 + 6) / 2**6

    def test_bootstrap_of_a_share_is_binomial(self) -> None:
        # resampling 0/1 values draws from Binomial(n, p̂)/n; 2000 draws place a 2.5 % quantile within 0.02 here
        stats = pytest.importorskip("scipy.stats")
        values = [1] * 150 + [0] * 50
        expected = stats.binom.ppf([0.025, 0.975], 200, 0.75) / 200
        assert metrics.bootstrap_interval(values) == pytest.approx(expected, abs=0.02)

    def test_bootstrap_is_repeatable_in_blocks(self) -> None:
        values = RNG.normal(size=3001)  # more than one block of resamples
        low, high = metrics.bootstrap_interval(values)
        assert (low, high) == metrics.bootstrap_interval(values)
        half = 1.96 * values.std() / math.sqrt(3001)
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)

    def test_bootstrap_without_spread_or_values(self) -> None:
        assert metrics.bootstrap_interval([1, 1, 1]) == (1.0, 1.0)
        with pytest.raises(ValueError, match="needs a list of values"):
            metrics.bootstrap_interval([])

    @pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (187, 200)])
    def test_wilson(self, successes: int, trials: int) -> None:
        stats = pytest.importorskip("scipy.stats")
        expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert metrics.wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_wilson_needs_trials(self) -> None:
        with pytest.raises(ValueError, match="at least one trial"):
            metrics.wilson_interval(0, 0)


class TestCorrelation:
    @pytest.mark.parametrize("levels", [3, 10, 1000])  # many ties, some, none or few
    def test_spearman_is_scipys(self, levels: int) -> None:
        stats = pytest.importorskip("scipy.stats")
        x, noise = RNG.integers(levels, size=(2, 50))
        for y in (noise, x + noise, -(x**3)):
            expected = stats.spearmanr(x, y).statistic
            assert metrics.spearman(x, y) == pytest.approx(expected, abs=1e-13)  # float64, 50 products

    def test_average_ranks_by_hand(self) -> None:
        assert metrics.average_ranks([5.0, 1.0, 5.0, math.inf, 5.0]).tolist() == [3, 1, 3, 5, 3]

    def test_spearman_by_hand(self) -> None:
        assert metrics.spearman([1, 2, 3, 4], [0.1, 1e3, 1e6, math.inf]) == pytest.approx(1)
        assert metrics.spearman([1, 2, 3], [3, 1, 2]) == pytest.approx(
            1 - 6 * (4 + 1 + 1) / (3 * 8)
        )  # 1 − 6Σd²/n(n²−1)

    @pytest.mark.parametrize("y", [[2.0, 2.0, 2.0], [1.0, math.nan, 2.0]])
    def test_spearman_that_is_not_defined(self, y: list[float]) -> None:
        assert math.isnan(metrics.spearman([1, 2, 3], y))
        assert all(math.isnan(end) for end in metrics.spearman_interval([1, 2, 3], y))

    def test_spearman_needs_pairs(self) -> None:
        with pytest.raises(ValueError, match="3 and 2 values"):
            metrics.spearman([1, 2, 3], [1, 2])

    def test_interval_covers_the_true_correlation(self) -> None:
        # of 20 such intervals 19 cover on average; 16 or fewer would, with Binomial(20, 0.95), once in 60 seeds
        true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's ρ of a bivariate normal with Pearson's r = 0.6
        generator = np.random.default_rng(3)
        covered = 0
        for _ in range(20):
            a, b = generator.normal(size=(2, 60))
            low, high = metrics.spearman_interval(a, 0.6 * a + 0.8 * b)
            covered += low <= true <= high
            assert 0.1 < high - low < 0.7  # about 2 · 1.96 · 0.1
        assert covered >= 17


class TestLogits:
    def test_kl_is_the_relative_entropy(self) -> None:
        special = pytest.importorskip("scipy.special")
        p, q = RNG.normal(scale=5, size=(2, 4, 3, 50)).astype(np.float32)
        expected = special.rel_entr(
            special.softmax(p.astype(np.float64), axis=-1), special.softmax(q.astype(np.float64), axis=-1)
        ).sum(axis=-1)
        found = metrics.kl_divergence(p, q)
        assert found.shape == (4, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-10)  # float64, sums of 50 terms

    def test_kl_by_hand(self) -> None:
        p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
        assert float(metrics.kl_divergence(p, q)) == pytest.approx(0.25 * math.log(2), rel=1e-14)

    def test_kl_of_large_shifted_and_excluded_logits(self) -> None:
        p = np.array([1000.0, 990.0, -math.inf])
        assert float(metrics.kl_divergence(p, p - 5000)) == 0.0
        assert float(metrics.kl_divergence(p, [-math.inf, 0.0, 0.0])) == math.inf
        assert np.isnan(metrics.kl_divergence([math.nan, 0.0], [0.0, 0.0]))

    def test_top1(self) -> None:
        assert metrics.top1_matches([[0, 2, 1], [3, 3, 0]], [[0, 1, 0], [1, 2, 0]]).tolist() == [True, False]

    def test_cosine(self) -> None:
        found = metrics.cosine([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]], [[6.0, 8.0], [0.0, 2.0], [-1.0, -1.0]])
        np.testing.assert_allclose(found, [1, 0, -1], atol=1e-15)
        assert np.isnan(metrics.cosine([0.0, 0.0], [1.0, 0.0]))

    def test_max_abs_diff(self) -> None:
        assert metrics.max_abs_diff([1.0, 5.0], [2.5, 5.5]) == 1.5
        assert math.isnan(metrics.max_abs_diff([1.0, math.inf], [2.5, math.inf]))
        assert math.isnan(metrics.max_abs_diff([1.0, math.inf], [2.5, 1.0]))
        with pytest.raises(ValueError, match=r"\(1, 2\) and \(2,\)"):
            metrics.max_abs_diff([[1.0, 2.0]], [1.0, 2.0])  # would broadcast


class TestRepresentations:
    @pytest.mark.parametrize("shape", [(12, 40), (40, 12), (1, 9), (9, 1)])
    def test_ipr_is_that_of_the_singular_values(self, shape: tuple[int, int]) -> None:
        h = RNG.normal(size=shape) @ np.diag(np.linspace(0.1, 3, shape[1]))
        share = np.linalg.svd(h, compute_uv=False) ** 2
        share /= share.sum()
        assert metrics.ipr(h) == pytest.approx(float((share**2).sum()), rel=1e-12)

    def test_ipr_limits(self) -> None:
        assert metrics.ipr(np.eye(8, 20)) == pytest.approx(1 / 8)
        assert metrics.ipr(np.outer([1, 2, 3], [4, 5])) == pytest.approx(1)
        # FP16 values whose squares FP16 could not hold
        assert metrics.ipr(np.full((3, 5), 60000, dtype=np.float16)) == pytest.approx(1)

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_ipr_needs_a_spectrum(self, value: float) -> None:
        with pytest.raises(ValueError, match="no singular spectrum"):
            metrics.ipr(np.full((2, 3), value))

    def test_overlap(self) -> None:
        assert metrics.kept_overlap([0, 2, 4, 6], [0, 1, 2, 3]) == 0.5

    def test_margin_forgives_near_ties_only(self) -> None:
        scores = [1.0, 0.5, 0.5 - 4e-4, 0.4, 0.1]
        assert metrics.kept_equal_margin([0, 1], scores)
        assert metrics.kept_equal_margin([0, 2], scores)  # within 1e-3 of 0.5
        assert not metrics.kept_equal_margin([0, 2], scores, margin=1e-4)
        assert not metrics.kept_equal_margin([0, 3], scores)
        assert not metrics.kept_equal_margin([1, 2], scores)
        assert not metrics.kept_equal_margin([1, 0], scores)  # not ascending
        assert not metrics.kept_equal_margin([0, 0], scores)
        assert not metrics.kept_equal_margin([0, 5], scores)
        assert metrics.kept_equal_margin([0, 1, 2, 3, 4], scores)

    def test_margin_of_log_odds_is_absolute(self) -> None:
        scores = [-1.0, -3.0, -3.0 - 4e-4, -3.0 - 4e-3]  # negative, as where less than half is to be kept
        assert not metrics.kept_equal_margin([0, 2], scores)  # the relative rule leaves negative scores no room
        assert metrics.kept_equal_margin([0, 1], scores, log_odds=True)
        assert metrics.kept_equal_margin([0, 2], scores, log_odds=True)
        assert not metrics.kept_equal_margin([0, 3], scores, log_odds=True)
        assert metrics.kept_equal_margin([1], [-1.0, 1e-9, 0.0], log_odds=True)  # a k-th best of zero

    def test_margin_with_dropped_rows(self) -> None:
        """A row that the stage before dropped has no score, and is never a right answer."""
        scores = [1.0, math.nan, 0.5, 0.4]
        assert metrics.kept_equal_margin([0, 2], scores)
        assert not metrics.kept_equal_margin([0, 1], scores)
        assert metrics.kept_equal_margin([0, 2, 3], scores)

    def test_margin_where_nearly_all_scores_are_zero(self) -> None:
        assert metrics.kept_equal_margin([0, 2], [1.0, 1e-10, 0.0, 3e-10])

    def test_realised_share(self) -> None:
        assert metrics.realised_share(60, 100, 2, 10) == pytest.approx(0.5)
        assert metrics.realised_share(120, 100, 2, 10) == pytest.approx(-0.25)
        assert metrics.realised_share(60, 100, 10, 10) is None


def shifted(reference: np.ndarray, position: int, token: int, by: float) -> np.ndarray:
    logits = reference.copy()
    logits[position, token] += by
    return logits


REFERENCE = np.array([[4.0, 1, 0], [0, 4, 1], [1, 0, 4]])
SCORES = [0.9, 0.5, 0.4999, 0.1]
SAME, NEAR, FAR = ([0, 1], [0, 1], SCORES), ([0, 2], [0, 1], SCORES), ([0, 3], [0, 1], SCORES)


class TestParity:
    def test_sample(self) -> None:
        found = parity_sample(shifted(REFERENCE, 1, 2, 3.5), REFERENCE, [SAME, NEAR])
        assert (found.positions, found.greedy_matches, found.first_divergence) == (3, 2, 1)
        assert found.max_abs_logit_diff == 3.5
        assert found.cosine_min == pytest.approx((16 + 4.5) / math.sqrt(17 * (16 + 4.5**2)))
        assert (found.kept_overlap, found.kept_equal, found.kept_equal_margin) == (0.75, False, True)

    def test_sample_without_stages(self) -> None:
        found = parity_sample(REFERENCE, REFERENCE, [])
        assert (found.kept_overlap, found.kept_equal, found.kept_equal_margin) == (1.0, True, True)
        assert found.first_divergence is None

    def test_summary_separates_other_kept_sets(self) -> None:
        samples = [
            parity_sample(shifted(REFERENCE, 0, 0, 0.25), REFERENCE, [SAME]),
            parity_sample(shifted(REFERENCE, 2, 0, 8.0), REFERENCE, [NEAR]),
            parity_sample(shifted(REFERENCE, 1, 0, 1.0), REFERENCE, [FAR]),
        ]
        found = parity_summary(samples)
        assert (found["samples"], found["positions"]) == (3, 9)
        assert (found["max_abs_logit_diff"], found["max_abs_logit_diff_all"]) == (0.25, 8.0)
        assert found["cosine_min"] == samples[0].cosine_min > found["cosine_min_all"] == samples[1].cosine_min
        assert found["greedy_agreement"] == pytest.approx(8 / 9)
        assert found["first_divergence"] == 2
        assert (found["kept_equal"], found["kept_equal_margin"]) == pytest.approx((1 / 3, 2 / 3))
        assert (found["kept_overlap"], found["kept_overlap_min"]) == pytest.approx((2 / 3, 0.5))

    def test_no_equal_kept_set_leaves_no_difference(self) -> None:
        found = parity_summary([parity_sample(REFERENCE, REFERENCE, [FAR])])
        assert found["max_abs_logit_diff"] is None
        assert found["max_abs_logit_diff_all"] == 0.0

    @pytest.mark.parametrize("order", [1, -1])
    def test_one_nan_is_never_hidden_by_other_samples(self, order: int) -> None:
        broken = parity_sample(shifted(REFERENCE, 0, 0, math.nan), REFERENCE, [SAME])
        fine = parity_sample(REFERENCE, REFERENCE, [SAME])
        found = parity_summary([broken, fine][::order])
        assert (found["max_abs_logit_diff"], found["cosine_min"], found["not_finite"]) == (None, None, 1)
        assert (found["max_abs_logit_diff_all"], found["cosine_min_all"]) == (None, None)
        assert [gate["passed"] for gate in gates(found, None, max_logit_diff=1.0)] == [False, False]

    def test_summary_needs_samples(self) -> None:
        with pytest.raises(ValueError, match="at least one sample"):
            parity_summary([])


class TestConsistency:
    def test_summary(self) -> None:
        samples = [
            ConsistencySample("Red", "red.", "red", [0.0, 0.1], [True, True]),
            ConsistencySample("red", "blue", "red", [0.4], [False]),
            ConsistencySample("one", "two", "three", [0.2], [True]),
            ConsistencySample("left", "right", None, [0.3], [True]),
        ]
        found = consistency_summary(samples, [{"layer": 2, "full": 0.5, "pruned": 0.6}])
        assert (found["samples"], found["positions"], found["labelled"]) == (4, 5, 3)
        assert found["agreement"] == 0.25
        assert found["agreement_ci95"] == [0.0, 0.75]  # quantiles of Binomial(4, ¼)/4
        assert found["agreement_wilson95"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
        assert (found["accuracy_full"], found["accuracy_pruned"]) == pytest.approx((2 / 3, 1 / 3))
        assert (found["correct_to_wrong"], found["wrong_to_correct"], found["wrong_to_other"]) == (1, 0, 1)
        assert found["mcnemar_p"] == 1.0
        assert found["top1_agreement"] == 0.8
        assert (found["kl_mean"], found["kl_median"]) == pytest.approx((0.2, 0.2))
        assert found["kl_p99"] == pytest.approx(0.3 + 0.96 * 0.1)
        assert found["ipr"] == [{"layer": 2, "full": 0.5, "pruned": 0.6}]

    def test_without_reference_answers(self) -> None:
        found = consistency_summary([ConsistencySample("a", "a", None, [0.0], [True])])
        keys = ["accuracy_full", "accuracy_pruned", "correct_to_wrong", "wrong_to_correct", "wrong_to_other"]
        assert [found[key] for key in [*keys, "mcnemar_p"]] == [None] * 6
        assert (found["agreement"], found["labelled"]) == (1.0, 0)

    def test_without_positions_or_finite_divergence(self) -> None:
        assert consistency_summary([ConsistencySample("a", "a", None, [], [])])["kl_mean"] is None
        found = consistency_summary([ConsistencySample("a", "a", None, [0.0, math.inf, 0.0], [True] * 3)])
        assert (found["kl_mean"], found["kl_median"]) == (None, 0.0)

    def test_needs_samples(self) -> None:
        with pytest.raises(ValueError, match="at least one sample"):
            consistency_summary([])


class TestGates:
    PARITY = {"max_abs_logit_diff": 0.01, "not_finite": 0}  # noqa: RUF012
    CONSISTENCY = {"agreement": 0.9, "kl_mean": 0.2}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("limits", "passed"),
        [
            ({"min_agreement": 0.9}, True),
            ({"min_agreement": 0.91}, False),
            ({"max_kl": 0.2}, True),
            ({"max_kl": 0.19}, False),
            ({"max_logit_diff": 0.01}, True),
            ({"max_logit_diff": 0.0099}, False),
        ],
    )
    def test_limits_are_inclusive(self, limits: dict[str, float], passed: bool) -> None:
        finite, gate = gates(self.PARITY, self.CONSISTENCY, **limits)
        assert finite == {"name": "not_finite", "limit": 0, "value": 0, "passed": True}
        [(name, limit)] = limits.items()
        assert (gate["name"], gate["limit"], gate["passed"]) == (name, limit, passed)

    def test_a_gate_without_a_value_fails(self) -> None:
        found = gates(None, None, min_agreement=0.5, max_kl=1.0, max_logit_diff=1.0)
        assert [(gate["value"], gate["passed"]) for gate in found] == [(None, False)] * 3

    def test_no_gate_was_asked_for(self) -> None:
        assert gates(None, self.CONSISTENCY) == []
