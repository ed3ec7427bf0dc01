"""LeverageTopK's ONNX body: is it exact, and what does it cost on this CPU?

Physics: at D < N it is about 20 thin products with X and 11 factorisations of a q x q matrix, all of them
small, so the time goes into operators' overhead; at 7B's width D = 4096 the Gram product is most of it
(2.7 GFLOP). Exactness: index sets against a float64 SVD, plain overlap and the margin rule. Methods are timed
in turn, round by round, so that another load on the machine hits all of them.

    python benchmarks/leverage.py [--cases 300] [--demo-images 0] [--timing-rounds 15]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import TensorProto, helper

from tokprune.plugins.leverage_topk import body, reference
from tokprune.plugins.topk import top_k
from tokprune.runtime import metrics

TOKENS, RANK, KEEPS = 576, 16, (64, 128, 192)
THREADS = 2
Array = npt.NDArray[np.float32]


def session(width: int, settings: body.Settings) -> onnxruntime.InferenceSession:
    """The op for X [I, 576, width] float32 at k = 64."""
    outputs = ("kept_indices", "scores")
    node, function = body.leverage_topk("x", outputs, TOKENS, width, KEEPS[0], rank=RANK, settings=settings)
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
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def synthetic(seed: int, width: int) -> Array:
    """FP16-rounded states [576, width]: decaying spectrum over noise, uneven rows, mostly three of 100x norm."""
    rng = np.random.Generator(np.random.Philox(seed))
    u, v = (np.linalg.qr(rng.standard_normal((rows, 128)))[0] for rows in (TOKENS, width))
    decay = (0.5, 0.75, 1.0, 1.5)[seed % 4]
    x = (u * np.exp(0.5 * rng.standard_normal((TOKENS, 1))) * np.arange(1, 129) ** -decay) @ v.T
    x = x / np.sqrt(np.mean(x**2)) + 0.1 * rng.standard_normal(x.shape)
    if seed % 8 < 6:
        x[rng.choice(TOKENS, 3, replace=False)] *= 100
    return x.astype(np.float16).astype(np.float32)


def demo_states(images: int) -> Iterator[Array]:
    """States [576, D] that enter layers 1 and 2 of the demo model, on held-out scenes."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from tokprune.export import demo
    from tokprune.export.demo.model import PROMPT
    from tokprune.export.demo.scenes import held_out_questions

    checkpoint = Path(demo.__path__[0]) / "checkpoint"
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    for _, scene, question in held_out_questions(images, seed=0):
        prompt = PROMPT.format(question=question.prompt)
        inputs = processor(images=Image.fromarray(scene.pixels), text=prompt, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        visual = inputs["input_ids"][0] == model.config.image_token_id
        for layer in (1, 2):
            yield states[layer][0, visual].float().numpy()


def exactness(cases: Iterator[Array], settings: body.Settings) -> dict[str, float]:
    """Shares over all cases and keeps. ``score_error``: largest error by the 64th score, 90th percentile."""
    sessions: dict[int, onnxruntime.InferenceSession] = {}
    equal, shared, errors = [], [], []
    for x in cases:
        width = x.shape[1]
        if width not in sessions:
            sessions[width] = session(width, settings)
        scores = sessions[width].run(["scores"], {"x": x[None]})[0][0]
        expected = reference.leverage_scores(x, rank=RANK)
        errors.append(np.abs(scores - expected).max() / np.sort(expected)[-KEEPS[0]])
        for keep in KEEPS:
            kept = top_k(scores, keep)
            equal.append(metrics.kept_equal_margin(kept, expected))
            shared.append(metrics.kept_overlap(kept, top_k(expected, keep)))
    return {
        "cases": len(errors),
        "equal_within_margin": float(np.mean(equal)),
        "overlap": float(np.mean(shared)),
        "score_error_p90": float(np.percentile(errors, 90)),
        "score_error_max": float(np.max(errors)),
    }


def timing(width: int, settings: body.Settings, rounds: int) -> dict[str, float]:
    """Milliseconds, the median and (suffix _min) the least of ``rounds``, of the op and of what it replaces."""
    x = synthetic(0, width)
    tensor, run = torch.from_numpy(x), session(width, settings)
    methods: dict[str, Callable[[], object]] = {
        "onnx": lambda: run.run(None, {"x": x[None]}),
        "gram_eigh": lambda: torch.linalg.eigh(tensor @ tensor.T),
        "gram": lambda: tensor @ tensor.T,
        "svd": lambda: torch.linalg.svd(tensor, full_matrices=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            if turn:  # the first is to warm up
                taken[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: float(np.median(times)) for name, times in taken.items()}
    return medians | {f"{name}_min": min(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="synthetic cases, a tenth of them at width 4096")
    parser.add_argument("--demo-images", type=int, default=0, help="questions to the demo model, two cases each")
    parser.add_argument("--timing-rounds", type=int, default=15)
    parser.add_argument("--rounds", type=int, nargs="*", default=[body.Settings().rounds])
    parser.add_argument("--oversampling", type=int, nargs="*", default=[body.Settings().oversampling])
    parser.add_argument("--purifications", type=int, nargs="*", default=[body.Settings().purifications])
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    widths = [4096 if seed % 10 == 0 else (160, 192)[seed // 4 % 2] for seed in range(asked.cases)]
    cases = [synthetic(seed, width) for seed, width in enumerate(widths)]
    if asked.demo_images:
        cases += demo_states(asked.demo_images)
    table: list[dict[str, float]] = []
    for rounds in asked.rounds:
        for oversampling in asked.oversampling:
            for purifications in asked.purifications:
                settings = body.Settings(rounds, oversampling, purifications)
                found = exactness(iter(cases), settings)
                table.append({"rounds": rounds, "oversampling": oversampling, "purifications": purifications} | found)
                print("  ".join(f"{key} {value:.5g}" for key, value in table[-1].items()), flush=True)
    times = {width: timing(width, body.Settings(), asked.timing_rounds) for width in (160, 192, 4096)}
    for width, by_method in times.items():
        print(f"{TOKENS} x {width}: " + "  ".join(f"{name} {ms:.2f} ms" for name, ms in by_method.items()))
    print(json.dumps({"tokens": TOKENS, "rank": RANK, "exactness": table, "timing_ms": times}))


if __name__ == "__main__":
    main()
