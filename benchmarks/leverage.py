"""LeverageTopK's ONNX body: is it exact, does it repeat bit for bit, and what does it cost on this CPU?

Physics: at D < N it is about 20 thin products with X and 12 eliminations in a q x q matrix, all of them small,
so the time goes into operators' overhead; at 7B's width D = 4096 the products are most of it (1.4 GFLOP at rank
8), and what they replace, an SVD or an eigensolver on XXᵀ, works in many passes over a matrix 576 wide.
Exactness: index sets against a float64 SVD, plain overlap and the margin rule. Methods are timed in turn, round
by round, so that another load on the machine hits all of them; speed is the median of each round's ratios.

    python benchmarks/leverage.py [--cases 300] [--timing-rounds 15]

Half of the cases are states that enter layers 0, 2 and 4 of the demo model, half are synthetic at D = 4096.
Prints tables, and at the end one JSON line with each bar's verdict. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import TensorProto, helper

from tokprune.plugins.leverage_topk import body, reference
from tokprune.plugins.topk import top_k
from tokprune.runtime import metrics
from tokprune.runtime.leverage import Settings

TOKENS, RANKS, KEEPS, LAYERS, WIDTHS = 576, (8, 16), (64, 128, 192), (0, 2, 4), (160, 1024, 4096)
EQUAL, OVERLAP = 0.995, 0.98  # bars of exactness: shares of cases and keeps within the margin rule, of the kept rows
FASTER_THAN_SVD = {1024: 4.0, 4096: 8.0}  # bars of speed, beside "no slower than Gram + eigh" at these widths
THREADS = 2
Array = npt.NDArray[np.float32]


def session(width: int, rank: int, settings: Settings) -> onnxruntime.InferenceSession:
    """The op for X [I, 576, width] float32 at k = 64."""
    outputs = ("kept_indices", "scores")
    node, function = body.leverage_topk("x", outputs, TOKENS, width, KEEPS[0], rank=rank, settings=settings)
    graph = helper.make_graph(
        [node],
        "select",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["I", TOKENS, width])],
        [
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, ["I", KEEPS[0]]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["I", TOKENS]),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(body.DOMAIN, body.VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it slows what is timed next
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def nodes(width: int, rank: int) -> int:
    """Nodes of the function, constants left out: on a CPU they are the cost at small widths."""
    function = body.leverage_topk_function(TOKENS, width, KEEPS[0], rank=rank)
    return sum(node.op_type != "Constant" for node in function.node)


def synthetic(seed: int, width: int) -> Array:
    """FP16-rounded states [576, width]: decaying spectrum over noise, uneven rows, three of them of 100x norm."""
    rng = np.random.Generator(np.random.Philox(seed))
    u, v = (np.linalg.qr(rng.standard_normal((rows, 128)))[0] for rows in (TOKENS, width))
    decay = (0.5, 0.75, 1.0, 1.5)[seed % 4]
    x = (u * np.exp(0.5 * rng.standard_normal((TOKENS, 1))) * np.arange(1, 129) ** -decay) @ v.T
    x = x / np.sqrt(np.mean(x**2)) + 0.1 * rng.standard_normal(x.shape)
    x[rng.choice(TOKENS, 3, replace=False)] *= 100
    return x.astype(np.float16).astype(np.float32)


def demo_states() -> Iterator[Array]:
    """States [576, D] that enter LAYERS of the demo model, held-out scene by scene."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from tokprune.export import demo
    from tokprune.export.demo.model import PROMPT
    from tokprune.export.demo.scenes import held_out_questions

    checkpoint = Path(demo.__path__[0]) / "checkpoint"
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    seen: set[bytes] = set()
    for _, scene, question in held_out_questions(100_000, seed=0):
        pixels = scene.pixels.tobytes()
        if pixels in seen:  # several questions to one scene: visual rows stand before the text and do not see it
            continue
        seen.add(pixels)
        prompt = PROMPT.format(question=question.prompt)
        inputs = processor(images=Image.fromarray(scene.pixels), text=prompt, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        visual = inputs["input_ids"][0] == model.config.image_token_id
        for layer in LAYERS:
            yield states[layer][0, visual].float().numpy()


def cases(count: int) -> Iterator[tuple[str, Array]]:
    """(group, X) of ``count`` cases, demo states and synthetic ones in turn."""
    demo = islice(demo_states(), (count + 1) // 2)
    for index, x in enumerate(demo):
        yield "demo", x
        if 2 * index + 1 < count:
            yield "synthetic 4096", synthetic(index, 4096)


def exactness(count: int, settings: Settings) -> list[dict[str, object]]:
    """Shares over a group's cases and KEEPS, and whether two sessions and a repeated run gave the same bytes.

    ``score_error``: largest error by the 64th score, 90th percentile and maximum over cases.
    """
    sessions: dict[tuple[int, int], list[onnxruntime.InferenceSession]] = {}
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for index, (group, x) in enumerate(cases(count)):
        u, sigma = reference.left_singular(x)
        for rank in RANKS:
            pair = sessions.setdefault((x.shape[1], rank), [])
            while len(pair) < 2:
                pair.append(session(x.shape[1], rank, settings))
            kept, scores = pair[0].run(None, {"x": x[None]})
            again = [run.run(None, {"x": x[None]}) for run in pair]
            expected = reference.scores_of(u, sigma, rank=rank)
            into = found.setdefault((group, rank), {"equal": [], "overlap": [], "error": [], "repeats": []})
            into["repeats"].append(all(a.tobytes() == kept.tobytes() for a, _ in again))
            into["repeats"].append(all(b.tobytes() == scores.tobytes() for _, b in again))
            into["error"].append(np.abs(scores[0] - expected).max() / np.sort(expected)[-KEEPS[0]])
            for keep in KEEPS:
                rows = top_k(scores[0], keep)
                into["equal"].append(metrics.kept_equal_margin(rows, expected))
                into["overlap"].append(metrics.kept_overlap(rows, top_k(expected, keep)))
        print(f"\rcase {index + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [
        {
            "states": group,
            "rank": rank,
            "cases": len(values["error"]),
            "equal_within_margin": float(np.mean(values["equal"])),
            "overlap": float(np.mean(values["overlap"])),
            "score_error_p90": float(np.percentile(values["error"], 90)),
            "score_error_max": float(np.max(values["error"])),
            "deterministic": all(values["repeats"]),
        }
        for (group, rank), values in found.items()
    ]


def timing(width: int, rank: int, settings: Settings, rounds: int) -> dict[str, float]:
    """Medians over ``rounds``: milliseconds of the op and of what it replaces, how many times faster it is."""
    x = synthetic(0, width)
    tensor, run = torch.from_numpy(x), session(width, rank, settings)
    methods: dict[str, Callable[[], object]] = {
        "onnx": lambda: run.run(None, {"x": x[None]}),
        "gram_eigh": lambda: torch.linalg.eigh(tensor @ tensor.T),
        "svd": lambda: torch.linalg.svd(tensor, full_matrices=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            if turn:  # the first is to warm up
                taken[name].append(1e3 * (time.perf_counter() - start))
        print(f"\r576 x {width}, rank {rank}: round {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    times = {name: np.array(values) for name, values in taken.items()}
    row: dict[str, float] = {"width": width, "rank": rank, "nodes": nodes(width, rank)}
    row |= {f"{name}_ms": float(np.median(values)) for name, values in times.items()}
    row |= {f"{name}_min_ms": float(values.min()) for name, values in times.items()}
    return row | {f"{name}_ratio": float(np.median(times[name] / times["onnx"])) for name in ("gram_eigh", "svd")}


def bars(exact: list[dict[str, object]], times: list[dict[str, float]]) -> dict[str, bool]:
    """Each bar, passed or not."""
    passed = {
        f"equal within margin in {EQUAL:.1%}": all(float(str(row["equal_within_margin"])) >= EQUAL for row in exact),
        f"overlap {OVERLAP}": all(float(str(row["overlap"])) >= OVERLAP for row in exact),
        "same bytes": all(bool(row["deterministic"]) for row in exact),
    }
    for row in times:
        width, rank = int(row["width"]), int(row["rank"])
        if width in FASTER_THAN_SVD:
            bar = FASTER_THAN_SVD[width]
            passed[f"{bar:g}x faster than SVD, 576 x {width}, rank {rank}"] = row["svd_ratio"] >= bar
            passed[f"no slower than Gram + eigh, 576 x {width}, rank {rank}"] = row["gram_eigh_ratio"] >= 1
    return passed


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--timing-rounds", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--oversampling", type=int, default=default.oversampling)
    parser.add_argument("--purifications", type=int, default=default.purifications)
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    settings = Settings(asked.rounds, asked.oversampling, asked.purifications)
    times = [timing(width, rank, settings, asked.timing_rounds) for width in WIDTHS for rank in RANKS]
    exact = exactness(asked.cases, settings)
    passed = bars(exact, times)
    for row in [*exact, *times]:
        print("  ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in row.items()))
    for bar, held in passed.items():
        print(f"{'pass' if held else 'FAIL'}  {bar}")
    print(json.dumps({"tokens": TOKENS, "exactness": exact, "timing": times, "bars": passed}))
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
