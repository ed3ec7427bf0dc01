"""How fast two bundles decode, side by side: one decodes some tokens, then the other, again and again.

    python benchmarks/decode_speed.py FP32_BUNDLE INT8_BUNDLE [--rounds 20] [--tokens 8] [--threads 0]

Both are loaded, and read the same prompt with one grey image; each round then times ``--tokens`` decode steps of one
and of the other, the first of them in turns. What else runs on the machine slows both, so their ratio is steadier than
either time: it is taken round by round. Random weights do, since a step's cost does not depend on what it says. One
JSON line at the end: the median ratio, first bundle's time over the second's, and the 95 % interval of the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tokprune.runtime.chat import Model, load
from tokprune.runtime.metrics import bootstrap_interval
from tokprune.runtime.pipeline import Meter, State

QUESTION = "What is in the picture?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs=2, type=Path, metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8, help="decode steps of each in a round")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 leaves it to it")
    arguments = parser.parse_args()
    models = [load(path, engine="onnxruntime", threads=arguments.threads) for path in arguments.bundles]
    states = [_prompted(model) for model in models]
    for model, state in zip(models, states, strict=True):
        _decode(model, state, 1)  # warm up
    times: list[list[float]] = [[], []]
    for number in range(arguments.rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which].append(_decode(models[which], states[which], arguments.tokens))
    print(json.dumps(compare(times, arguments.tokens) | {"bundles": list(map(str, arguments.bundles))}))
    return 0


def compare(times: list[list[float]], tokens: int) -> dict:
    """Of seconds a round for each of the two: tokens a second, and the ratio of the pairs."""
    ratios = np.divide(times[0], times[1])
    return {
        "rounds": len(ratios),
        "tokens_per_round": tokens,
        "tokens_per_second_median": [float(np.median(np.divide(tokens, each))) for each in times],
        "ratio_median": float(np.median(ratios)),
        "ratio_mean": float(ratios.mean()),
        "ratio_mean_ci95": list(bootstrap_interval(ratios)),
    }


def _prompted(model: Model) -> State:
    """The prompt in the caches."""
    image = Image.new("RGB", (336, 336), "grey")
    state = model.pipeline.new_state()
    features = model.pipeline.encode_images(model.pixels([image]), Meter())
    model.pipeline.forward(state, [model.prompt(QUESTION, 1)], Meter(), image_features=features)
    return state


def _decode(model: Model, state: State, tokens: int) -> float:
    """Seconds of so many steps; each is fed the same token, whatever came out."""
    begin = time.perf_counter()
    for _ in range(tokens):
        model.pipeline.forward(state, [[model.pipeline.facts.eos_token_ids[0]]], Meter())
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
