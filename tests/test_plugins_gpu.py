"""The plugin objects' own enqueue on a GPU, against the float64 references. For `make gpu-check`.

Each run of the harness (plugins/harness) poisons the outputs first, runs 20 times and as a CUDA graph, and fails if a
bit differs.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from plugin_harness import compiled, harness, write_case

from tokprune.plugins.cross_attention_topk import body as cross_attention
from tokprune.plugins.cross_attention_topk import reference as cross_attention_reference
from tokprune.plugins.leverage_topk import body as leverage
from tokprune.plugins.leverage_topk import reference as leverage_reference
from tokprune.plugins.toolchain import NATIVE, find_headers
from tokprune.plugins.topk import top_k
from tokprune.runtime import metrics

pytestmark = pytest.mark.gpu

# A share of cases, and not all, because FP16 rows may lie so that float64's own k-th and next score differ by less
# than FP32 resolves; the issue asks for 99.5 % of 1,000.
CASES = int(os.environ.get("TOKPRUNE_GPU_CASES", "100"))
LEAST_EQUAL, AT_ONCE = 0.995, 50
SCORE_TOLERANCE = 1e-3  # leverage scores lie in 0..1


@pytest.fixture(scope="module")
def built() -> Path:
    return compiled(find_headers(), NATIVE)


def rows(seed: int, images: int, n: int, d: int, dtype: type) -> np.ndarray:
    """A decaying spectrum under uneven rows, three of them of 100 times the norm, as hidden states have."""
    rng = np.random.default_rng(seed)
    width = min(n, d)
    left, right = rng.standard_normal((images, n, width)), rng.standard_normal((images, width, d)) / np.sqrt(width)
    x = (left * np.arange(1, width + 1) ** -1.0) @ right
    x *= np.exp(0.3 * rng.standard_normal((images, n, 1)))
    x[:, rng.choice(n, min(3, n), replace=False)] *= 100
    return x.astype(dtype)


def run(built: Path, node: onnx.NodeProto, inputs: dict, folder: Path, *, under: tuple[str, ...] = ()):
    """(kept [I, k], scores [I, N], what the harness measured)."""
    (found,) = run_all(built, node, [inputs], folder, under=under)
    return found


def run_all(built: Path, node: onnx.NodeProto, cases: list[dict], folder: Path, *, under: tuple[str, ...] = ()):
    """What `run` gives, of each of ``cases``, in one process."""
    folders = [folder / str(number) for number in range(len(cases))]
    for each in folders:
        each.mkdir(exist_ok=True)
    paths = [write_case(each, node, inputs) for each, inputs in zip(folders, cases, strict=True)]
    done = harness(built, "run", *paths, under=under)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [{}] * len(cases) if under else [json.loads(line) for line in done.stdout.splitlines()]
    for each, inputs, numbers in zip(folders, cases, measured, strict=True):
        images, n = next(iter(inputs.values())).shape[:2]
        kept = np.fromfile(each / "kept", dtype=np.int64).reshape(images, -1)
        yield kept, np.fromfile(each / "scores", dtype=np.float32).reshape(images, n), numbers


class TestLeverageTopK:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize(
        ("images", "n", "d", "k", "options"),
        [
            (1, 576, 4096, 64, {"rank": 64}),
            (1, 576, 4096, 64, {"rank": 8}),
            (3, 576, 4096, 192, {"rank": 16}),
            (2, 37, 53, 5, {"rank": 7}),
            (1, 192, 5120, 64, {"energy": 0.9}),
            (1, 576, 160, 64, {"rank": 16}),
        ],
    )
    def test_is_the_reference(self, built: Path, images, n, d, k, options, dtype, tmp_path: Path):
        x = rows(1, images, n, d, dtype)
        kept, scores, _ = run(built, leverage.leverage_topk_node("X", ("a", "b"), k, **options), {"X": x}, tmp_path)
        for image in range(images):
            expected = leverage_reference.leverage_scores(x[image], **options)
            np.testing.assert_allclose(scores[image], expected, rtol=0, atol=SCORE_TOLERANCE)
            np.testing.assert_array_equal(kept[image], top_k(scores[image], k))
            assert metrics.kept_equal_margin(kept[image], expected)

    def test_kept_sets_of_many_cases(self, built: Path, tmp_path: Path):
        """Fresh rows at 7B's size, r = 64, FP16; TOKPRUNE_GPU_CASES says how many."""
        node = leverage.leverage_topk_node("X", ("a", "b"), 64, rank=64)
        equal, begin = 0, int.from_bytes(os.urandom(4), "big")
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy's products and decompositions run side by side
            for first in range(0, CASES, AT_ONCE):
                seeds = range(begin + first, begin + min(first + AT_ONCE, CASES))
                drawn = list(pool.map(lambda seed: rows(seed, 1, 576, 4096, np.float16), seeds))
                expected = pool.map(lambda x: leverage_reference.leverage_scores(x[0], rank=64), drawn)
                found = run_all(built, node, [{"X": x} for x in drawn], tmp_path)
                for (kept, _, _), scores in zip(found, expected, strict=True):
                    equal += metrics.kept_equal_margin(kept[0], scores)
        print(f"{equal} of {CASES} kept sets equal, seeds from {begin}")
        assert equal >= LEAST_EQUAL * CASES

    def test_zero(self, built: Path, tmp_path: Path):
        node = leverage.leverage_topk_node("X", ("a", "b"), 64, rank=8)
        kept, scores, _ = run(built, node, {"X": np.zeros((1, 576, 4096), np.float16)}, tmp_path)
        assert (scores == 0).all()
        np.testing.assert_array_equal(kept[0], np.arange(64))

    @pytest.mark.parametrize("rank", [8, 16, 64])
    def test_time(self, built: Path, rank: int, tmp_path: Path, record_property):
        """Told, not judged: what is fast enough is another device's other number."""
        node = leverage.leverage_topk_node("X", ("a", "b"), 64, rank=rank)
        _, _, measured = run(built, node, {"X": rows(1, 1, 576, 4096, np.float16)}, tmp_path)
        print(f"rank {rank}: {measured}")
        assert measured["us_graph"] > 0


def cross_attention_case(seed: int, images: int, n: int, m: int, width: int, inner: int) -> dict[str, np.ndarray]:
    """Inputs in the operator's order; the last image has text rows that only fill up."""
    rng = np.random.default_rng(seed)
    shapes = {"v": (images, n, width), "q": (images, n, width), "k": (images, m, width), "u": (images, m, width)}
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    valid = np.ones((images, m), dtype=bool)
    valid[-1, max(1, m // 2) :] = False
    inputs["text_valid"] = valid
    sizes = {"o_proj": (width, width), "up_proj": (inner, width), "down_proj": (width, inner), "head": (2, width)}
    for name in cross_attention_reference.WEIGHTS:
        layer, _, kind = name.partition(".")
        if layer.endswith("norm"):
            value = rng.uniform(0.5, 2, width)
        elif kind == "bias":
            value = rng.standard_normal(sizes[layer][0])
        else:
            value = rng.standard_normal(sizes[layer]) / np.sqrt(sizes[layer][1])
        inputs[name] = value.astype(np.float32)
    return inputs


class TestCrossAttentionTopK:
    @pytest.mark.parametrize(
        ("images", "n", "m", "width", "heads", "inner", "k"),
        [
            (1, 576, 36, 64, 2, 256, 64),
            (3, 192, 80, 256, 8, 1024, 64),
            (2, 37, 5, 24, 3, 50, 5),
            (1, 20, 1, 16, 16, 8, 20),
        ],
    )
    def test_is_the_reference(self, built: Path, images, n, m, width, heads, inner, k, tmp_path: Path):
        inputs = cross_attention_case(1, images, n, m, width, inner)
        node = cross_attention.cross_attention_topk_node(
            cross_attention.ROWS, "valid", cross_attention_reference.WEIGHTS, ("a", "b"), k, heads=heads
        )
        kept, scores, measured = run(built, node, inputs, tmp_path)
        print(measured)
        weights = {name: inputs[name] for name in cross_attention_reference.WEIGHTS}
        for image, valid in enumerate(inputs["text_valid"]):
            visual = [inputs[name][image] for name in ("v", "q")]
            text = [inputs[name][image, valid] for name in ("k", "u")]
            expected = cross_attention_reference.row_scores(*visual, *text, weights, heads)
            np.testing.assert_allclose(scores[image], expected, rtol=0, atol=1e-4)  # log-odds of the order of 10
            np.testing.assert_array_equal(kept[image], top_k(scores[image], k))
            assert metrics.kept_equal_margin(kept[image], expected, log_odds=True)


class TestSanitizer:
    """`compute-sanitizer` finds stray reads and writes, races, and reads of what nothing wrote."""

    @pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
    @pytest.mark.parametrize(("op", "rank"), [("LeverageTopK", 8), ("LeverageTopK", 40), ("CrossAttentionTopK", None)])
    def test_clean(self, built: Path, op: str, rank: int | None, tool: str, tmp_path: Path):
        sanitizer = shutil.which("compute-sanitizer")
        assert sanitizer, "compute-sanitizer is not on PATH: install it beside nvcc (apt install cuda-sanitizer-…)"
        if op == "LeverageTopK":
            node = leverage.leverage_topk_node("X", ("a", "b"), 9, rank=rank)
            inputs = {"X": rows(1, 2, 75, 130, np.float16)}
        else:
            inputs = cross_attention_case(1, 2, 37, 9, 32, 50)
            node = cross_attention.cross_attention_topk_node(
                cross_attention.ROWS, "valid", cross_attention_reference.WEIGHTS, ("a", "b"), 9, heads=4
            )
        run(built, node, inputs, tmp_path, under=(sanitizer, "--tool", tool, "--error-exitcode", "9"))
