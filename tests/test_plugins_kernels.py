"""LeverageTopK's CUDA kernels against the float64 reference, run on this CPU (cuda_host/), and compiled by nvcc.

What a CPU cannot show: time, and what the tensor cores' own summing adds to the error. Scores are compared at MARGIN,
as those of the ONNX body are (test_plugins_leverage_topk.py).
"""

import ctypes

import numpy as np
import pytest
from cuda_host import host
from leverage import demo_states, synthetic
from test_plugins_gpu import rows
from test_plugins_leverage_topk import assert_matches, hidden_states, with_gap

from tokprune.plugins.leverage_topk import reference
from tokprune.plugins.topk import top_k
from tokprune.runtime import metrics
from tokprune.runtime.leverage import Settings

DTYPES = ("float32", "float16", "bfloat16")


def as_dtype(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """``x`` as the kernels take it, bfloat16 by its bits, and the values that it then has."""
    if dtype != "bfloat16":
        return x.astype(dtype), x.astype(dtype)
    bits = ((x.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


class TestAgainstTheReference:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("n", "d", "k", "rank"),
        [(112, 160, 64, 16), (37, 53, 5, 7), (53, 37, 20, 1), (31, 400, 31, 6), (64, 9, 1, 9), (90, 100, 30, 40)],
    )
    def test_sizes_and_dtypes(self, dtype, n, d, k, rank):
        x, values = as_dtype(hidden_states(1, n, d, np.float32), dtype)
        kept, scores = host.leverage_topk(x[None], k, rank=rank)
        assert_matches(kept[0], scores[0], values, k, rank=rank)

    def test_width_and_rows_of_7b(self):
        """N = 576, D = 4096, FP16, three rows of 100 times the norm."""
        x = synthetic(1, 4096)
        u, sigma = reference.left_singular(x)
        for rank in (8, 16, 64):
            kept, scores = host.leverage_topk(x.astype(np.float16)[None], 64, rank=rank)
            expected = reference.scores_of(u, sigma, rank=rank)
            np.testing.assert_array_equal(kept[0], top_k(scores[0], 64))
            assert np.abs(scores[0] - expected).max() < metrics.MARGIN * np.sort(expected)[-64]
            for keep in (64, 128, 192):
                assert metrics.kept_equal_margin(top_k(scores[0], keep), expected), (rank, keep)

    @pytest.mark.slow
    def test_kept_sets_of_cases_as_the_gpu_check_draws_them(self):
        for seed in range(12):
            x = rows(seed, 1, 576, 4096, np.float16)
            expected = reference.leverage_scores(x[0], rank=64)
            _, scores = host.leverage_topk(x, 64, rank=64)
            for keep in (64, 128, 192):
                assert metrics.kept_equal_margin(top_k(scores[0], keep), expected), (seed, keep)

    @pytest.mark.parametrize("decay", [0.5, 1.0, 1.5])
    def test_massive_rows_do_not_drown_the_others(self, decay):
        for factor in (1, 1000):  # λ_1/λ_16 up to 1e7
            x = hidden_states(factor, 240, 160, np.float32, decay, factor=factor)
            expected = reference.leverage_scores(x, rank=16)
            kept, _ = host.leverage_topk(x[None], 96, rank=16)
            assert metrics.kept_equal_margin(kept[0], expected)
            assert metrics.kept_overlap(kept[0], top_k(expected, 96)) >= 0.98

    def test_states_of_the_demo_model(self):
        states = demo_states()
        for x in (next(states) for _ in range(3)):  # layers 0, 2 and 4
            expected = reference.leverage_scores(x, rank=8)
            kept, _ = host.leverage_topk(x[None], 64, rank=8)
            assert metrics.kept_equal_margin(kept[0], expected)

    @pytest.mark.parametrize("gap", [0.05, 5e-4])
    def test_small_gap_at_a_large_rank(self, gap):
        x = with_gap(7, 160, 200, 64, gap)
        kept, scores = host.leverage_topk(x[None], 40, rank=64)
        assert_matches(kept[0], scores[0], x, 40, rank=64)

    @pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
    def test_energy(self, energy):
        x = hidden_states(3, 100, 48, np.float32, massive=0)
        kept, scores = host.leverage_topk(x[None], 20, energy=energy, settings=Settings(max_rank=24))
        assert_matches(kept[0], scores[0], x, 20, energy=energy, max_rank=24)

    @pytest.mark.parametrize(
        "case", ["zero rows", "duplicate rows", "low rank", "low rank, wide", "zero", "huge", "tiny", "largest FP16"]
    )
    def test_degenerate_input(self, case):
        x = hidden_states(4, 100, 48, np.float32)
        if case == "zero rows":
            x[::3] = 0
        elif case == "duplicate rows":
            x[50:] = x[:50]
        elif case.startswith("low rank"):
            rng = np.random.Generator(np.random.Philox(5))
            d = 1024 if "wide" in case else 48
            scale = np.array([100, 30, 10, 1, 0.3])
            x = ((rng.standard_normal((100, 5)) * scale) @ rng.standard_normal((5, d))).astype(np.float32)
        elif case == "zero":
            x[:] = 0
        elif case == "tiny":
            x = (x * 1e-12).astype(np.float32)
        else:
            x = np.clip(x * 2000, -65000, 65000) if case == "huge" else np.full_like(x, 65504)
            assert np.square(x.astype(np.float64)).sum(axis=1).max() > 65504
            x = x.astype(np.float16)
        kept, scores = host.leverage_topk(x[None], 20, rank=8)
        assert_matches(kept[0], scores[0], x, 20, rank=8)


class TestRunning:
    def test_images_do_not_mix(self):
        x = np.stack([hidden_states(seed, 72, 40, np.float32) for seed in range(3)])
        kept, scores = host.leverage_topk(x, 20, rank=8)
        for image in range(3):
            assert_matches(kept[image], scores[image], x[image], 20, rank=8)
            alone_kept, alone = host.leverage_topk(x[image : image + 1], 20, rank=8)
            assert alone.tobytes() == scores[image].tobytes()
            assert alone_kept.tobytes() == kept[image].tobytes()

    @pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 20}, {"energy": 0.9}])
    def test_any_order_of_threads_and_blocks_gives_the_same_bits(self, options):
        x = np.stack([hidden_states(seed, 72, 200, np.float16) for seed in range(2)])
        runs = [host.leverage_topk(x, 20, order=order, **options) for order in (0, 0, 1, 7)]
        assert len({(kept.tobytes(), scores.tobytes()) for kept, scores in runs}) == 1

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_that_are_not_aligned_give_the_same_bits(self, dtype):
        x, _ = as_dtype(hidden_states(6, 70, 64, np.float32), dtype)
        moved = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
        moved[:] = x
        assert moved.ctypes.data % 16
        aligned, other = (host.leverage_topk(rows[None], 9, rank=8)[1] for rows in (x, moved))
        assert other.tobytes() == aligned.tobytes()

    def test_what_is_not_finite_shows_in_the_scores(self):
        x = hidden_states(2, 80, 60, np.float32)
        x[7, 3] = np.nan
        kept, scores = host.leverage_topk(x[None], 20, rank=8)
        assert np.isnan(scores).any()
        assert (np.diff(kept[0]) > 0).all()
        assert 0 <= kept[0, 0] <= kept[0, -1] < 80

    @pytest.mark.parametrize("rank", [8, 40])
    def test_purification_ends_once_the_projector_is_one(self, rank):
        x = hidden_states(2, 80, 60, np.float32)
        runs = [host.leverage_topk(x[None], 20, rank=rank, settings=Settings(purifications=n)) for n in (45, 90)]
        assert len({(kept.tobytes(), scores.tobytes()) for kept, scores in runs}) == 1

    def test_another_seed_is_another_start_for_the_same_scores(self):
        x = hidden_states(2, 80, 60, np.float32)
        runs = [host.leverage_topk(x[None], 20, rank=8, settings=Settings(seed=seed)) for seed in (0, 1)]
        first, second = (scores[0] for _, scores in runs)
        assert first.tobytes() != second.tobytes()
        np.testing.assert_allclose(first, second, rtol=metrics.MARGIN, atol=1e-5)

    @pytest.mark.parametrize(
        "change",
        [
            {"images": 0}, {"images": 65536}, {"n": 1}, {"n": 4097}, {"d": 0}, {"k": 0}, {"k": 65}, {"rank": 64},
            {"rank": -1}, {"rank": 0}, {"energy": 0.5}, {"rank": 0, "energy": 1.0}, {"rounds": 0},
            {"purifications": 0}, {"oversampling": -1}, {"oversampling": 128, "d": 256, "n": 256},
        ],
    )  # fmt: skip
    def test_refuses_sizes_that_it_does_not_take(self, change):
        call = host.leverage_call((1, 64, 64), 64, rank=8)
        for name, value in change.items():
            setattr(call, name, value)
        assert host.library().leverage_workspace(ctypes.byref(call)) == 0
        assert host.library().leverage(ctypes.byref(call), 0, None, None, None, None) == host.INVALID_VALUE

    def test_refuses_another_type(self):
        call = host.leverage_call((1, 64, 64), 64, rank=8)
        assert host.library().leverage(ctypes.byref(call), 3, None, None, None, None) == host.INVALID_VALUE

    def test_workspace_grows_with_images(self):
        sizes = []
        for images in (1, 2, 7):
            call = host.leverage_call((images, 576, 4096), 64, rank=64)
            sizes.append(host.library().leverage_workspace(ctypes.byref(call)))
        assert sizes == [sizes[0], 2 * sizes[0], 7 * sizes[0]]
        assert sizes[0] % 256 == 0
        assert sizes[0] < 16 << 20
