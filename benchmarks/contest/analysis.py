"""What the rounds say: medians with intervals, shares of the machine's limits, logits compared, the bars of issue 7.

Times are ms, memory bytes, rates per second. A contestant that did not run is a row with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from contest.contestants import Contestant
from tokprune.runtime import flops, memory, metrics, names
from tokprune.runtime.manifest import ModelFacts

Row = dict[str, Any]
LEVEL = 0.95


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """{median, low, high, n}; low to high holds the median with 95 % if the values are independent and n ≥ 6.

    By order statistics: as many values are cut off at each end as that leaves room for, none below 6.
    """
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    n, cut = len(found), 0
    while cut + 1 <= (n - 1) // 2 and 1 - 2 * sum(math.comb(n, i) for i in range(cut + 2)) / 2**n >= LEVEL:
        cut += 1
    return {"median": float(np.median(found)), "low": found[cut], "high": found[n - 1 - cut], "n": n}


def compared(logits: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """First-token logits [V] against those of PyTorch in FP32: differences relative to the greatest |logit|."""
    difference = np.abs(logits.astype(np.float64) - reference)
    cosine = float(logits @ reference / np.linalg.norm(logits) / np.linalg.norm(reference))
    return {
        "max_abs": float(difference.max()),
        "max_rel": float(difference.max() / np.abs(reference).max()),
        "cosine": cosine,
        "top1": bool(logits.argmax() == reference.argmax()),
    }


def limits(rounds: Sequence[Row]) -> Row:
    """The best of all rounds: a limit is not missed by a busy moment."""
    facts = [result["facts"] for result in rounds]
    read = {int(size): max(fact["read"][size] for fact in facts) for size in facts[0]["read"]}
    return {key: max(fact[key] for fact in facts) for key in ("gemm_fp32", "gemm_bf16")} | {"read": read}


def row(
    contestant: Contestant,
    made: Row,
    rounds: Sequence[Row],
    checked: Row,
    machine: Row,
    facts: ModelFacts,
    task: Row,
) -> Row:
    """One contestant's figures over all its rounds."""
    answers = [answer for result in rounds for answer in result["answers"]]
    plan = contestant.pruning.plan(facts.layers, facts.vision.tokens)
    text = task["tokens"] - facts.vision.tokens
    counted = flops.closed_form(facts, plan).prefill(text)
    vision = counted.pop(names.VISION_ENCODER)
    decoder = sum(counted.values())
    last = rounds[-1]["facts"]
    # a step reads its weights, and the caches as they are halfway through the answer
    work = memory.Work(text, task["new_tokens"] // 2, 1)
    caches = sum(memory.kv_bytes(facts, plan, "fp32", work).values()) * last.get("cache_width", 4) // 4
    read = last["decode_bytes"] + caches
    times = {key: spread(answer[key] for answer in answers) for key in ("ttft", "vision", "prefill", "decode")}
    found: Row = {
        **missing(contestant, None),
        "versions": rounds[-1]["versions"],
        "facts": last,
        **{f"{key}_ms": value for key, value in times.items()},
        "tokens_per_s": spread(1e3 / answer["decode"] for answer in answers),
        "load_s": spread(result["load_s"] for result in rounds),
        "import_s": spread(result["import_s"] for result in rounds),
        "peak_bytes": max(result["peak_bytes"] or 0 for result in rounds) or None,
        "convert_s": made["seconds"],
        "convert_cpu_s": made["cpu_s"],
        "convert_peak_bytes": made["peak_bytes"],
        "size_bytes": made["size_bytes"],
        "vision_flops": vision,
        "prefill_flops": decoder,
        "decode_read_bytes": read,
        "logits": checked,
        "rounds": [_round(result) for result in rounds],
    }
    peak = machine.get({"fp32": "gemm_fp32", "bf16": "gemm_bf16"}.get(contestant.computes, ""))
    found["vision_share"] = _share(vision, times["vision"], peak)
    found["prefill_share"] = _share(decoder, times["prefill"], peak)
    found["decode_share"] = _share(read, times["decode"], _nearest(machine["read"], read))
    return found


def missing(contestant: Contestant, reason: str | None) -> Row:
    """What is known of a contestant before it runs, and why it does not; None where it does."""
    return {
        "name": contestant.name,
        "precision": contestant.precision,
        "computes": contestant.computes,
        "pruning": str(contestant.pruning),
        "is_ours": contestant.is_ours,
        "note": contestant.note,
        "reason": reason,
    }


def _round(result: Row) -> Row:
    """Medians of one round, so that contestants can be paired."""
    keys = ("ttft", "vision", "prefill", "decode")
    found = {key: spread(answer[key] for answer in result["answers"]) for key in keys}
    return {key: value and value["median"] for key, value in found.items()}


def _share(amount: float, ms: dict[str, float] | None, limit: float | None) -> float | None:
    return None if ms is None or limit is None else 1e3 * amount / ms["median"] / limit


def _nearest(read: dict[int, float], size: float) -> float:
    return read[min(read, key=lambda known: abs(math.log(known / size)))]


def ratio(mine: Row, other: Row, time: Callable[[Row], float | None]) -> dict[str, float] | None:
    """mine / other of a time, paired by round: {median, low, high, n} of the rounds' ratios."""
    pairs = [(time(a), time(b)) for a, b in zip(mine["rounds"], other["rounds"], strict=False)]
    return spread(a / b for a, b in pairs if a is not None and b is not None)


def saved(pruned: Row, full: Row) -> dict[str, float] | None:
    """The share of decoder and selector FLOPs' saving that the clock shows, by round."""
    pairs = [(a["prefill"], b["prefill"]) for a, b in zip(pruned["rounds"], full["rounds"], strict=False)]
    shares = (metrics.realised_share(a, b, pruned["prefill_flops"], full["prefill_flops"]) for a, b in pairs)
    return spread(shares)
