"""The bars of issue 7, each with its figure from one interleaved run, met or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from contest.analysis import ratio, saved

Row = dict[str, Any]


def bars(rows: Sequence[Row], machine: Row, layer: int, keep: int) -> list[Row]:
    """[{bar, target, value, met, against}]; ``met`` is None where one of the two did not run.

    Peers are those that compute the same: all tokens, in the precision of the row. The pruned peer stands beside them.
    """
    ran = {row["name"]: row for row in rows if row["reason"] is None}
    graphs = "slot" if any(row["name"].endswith("-slot") for row in rows) else "neutral"
    full, pruned = ran.get(f"none-fp32-{graphs}"), ran.get(f"lofi-{layer}-{keep}-fp32-{graphs}")
    int8, int4, w8a8 = (ran.get(f"none-{precision}-{graphs}") for precision in ("int8", "int4", "w8a8"))
    peers = [row for row in ran.values() if not row["is_ours"] and row["pruning"] == "none"]
    fp32 = [row for row in peers if row["computes"] == "fp32"]
    plan = f"lofi {layer}:{keep}"
    found = [
        _bar(
            f"decoder prefill, {plan}: realised share",
            "≥ 0.90",
            pruned and full and saved(pruned, full),
            _at_least(0.9),
        )
    ]
    for key, what, most in (("prefill", "decoder prefill", 0.40), ("ttft", "time to first token", 0.75)):
        best = _best(fp32, f"{key}_ms")
        value = pruned and best and ratio(pruned, best, lambda times, key=key: times[key])
        found.append(_bar(f"{what}, {plan}, against the best peer's", f"≤ {most:.2f}×", value, _most(most), best))
    found += _unpruned(full, fp32, machine)
    best = _best(fp32, "decode_ms")
    # rates, so the other one's time over ours
    value = full and best and ratio(best, full, lambda times: times["decode"])
    found.append(
        _bar("decode FP32 at full context, against the best FP32 peer", "≥ 1.00×", value, _at_least(1.0), best)
    )
    rival = ran.get("openvino-int8")
    for name, own in (("INT8", int8), ("W8A8", w8a8)):
        value = own and rival and ratio(rival, own, lambda times: times["decode"])
        found.append(_bar(f"decode {name} against OpenVINO INT8", "≥ 1.00×", value, _at_least(1.0), rival))
    for name, own in (("none", w8a8), (plan, ran.get(f"lofi-{layer}-{keep}-w8a8-{graphs}"))):
        value = own and rival and ratio(own, rival, lambda times: times["ttft"])
        found.append(
            _bar(f"time to first token W8A8, {name}, against OpenVINO INT8", "≤ 1.00×", value, _most(1.0), rival)
        )
    value = int4 and int8 and ratio(int8, int4, lambda times: times["decode"])
    found.append(_bar("decode INT4 against our INT8", "≥ 1.20×", value, _at_least(1.2), int8))
    found += _memory([row for row in ran.values() if row["name"].endswith(graphs)], peers)
    loads = [row["load_s"]["median"] for row in ran.values() if row["name"].endswith(graphs)]
    found.append(_bar("bundle to ready, warm, the slowest of ours", "≤ 1.5 s", _one(loads and max(loads)), _most(1.5)))
    return found


def _unpruned(full: Row | None, peers: Sequence[Row], machine: Row) -> list[Row]:
    """Vision and unpruned prefill together: against the GEMM limit, and against each peer."""

    def both(times: Row) -> float | None:
        return None if times["vision"] is None or times["prefill"] is None else times["vision"] + times["prefill"]

    def median(row: Row) -> float | None:
        return row["vision_ms"] and row["prefill_ms"] and row["vision_ms"]["median"] + row["prefill_ms"]["median"]

    share = None
    if full is not None:
        amount = full["vision_flops"] + full["prefill_flops"]
        share = _one(1e3 * amount / median(full) / machine["gemm_fp32"])
    whole = [peer for peer in peers if median(peer) is not None]
    best = min(whole, key=median, default=None)
    value = full and best and ratio(full, best, both)
    what = "vision + unpruned prefill FP32"
    return [
        _bar(f"{what}, share of the GEMM limit", "≥ 0.80", share, _at_least(0.8)),
        _bar(f"{what}, against the fastest peer", "≤ 1.00×", value, _most(1.0), best),
    ]


def _memory(ours: Sequence[Row], peers: Sequence[Row]) -> list[Row]:
    """Peak memory over what cannot be done without; and over the leanest peer of the same precision."""
    over = [row["peak_bytes"] / row["facts"]["least_bytes"] for row in ours if row["peak_bytes"]]
    what = "peak memory, generation included"
    found = [
        _bar(f"{what}, of weights + KV + largest activation", "≤ 1.25×", _one(over and max(over)), _most(1.25)),
    ]
    # OpenVINO's INT8 has an INT8 tower, which ours has as W8A8
    for precision, own in (("fp32", "fp32"), ("int8", "w8a8")):
        mine = next((row for row in ours if row["name"].startswith(f"none-{own}")), None)
        # one without a tower needs less
        rivals = [peer for peer in peers if peer["precision"] == precision and peer["peak_bytes"] and peer["ttft_ms"]]
        best = min(rivals, key=lambda peer: peer["peak_bytes"], default=None)
        value = _one(mine and best and mine["peak_bytes"] / best["peak_bytes"])
        found.append(
            _bar(f"{what}, {precision.upper()}, against the leanest peer", "< 1.00×", value, _below(1.0), best)
        )
    return found


def _bar(
    bar: str, target: str, value: dict[str, float] | None, met: Callable[[float], bool], against: Row | None = None
) -> Row:
    value = value or None
    return {
        "bar": bar,
        "target": target,
        "value": value,
        "met": None if value is None else met(value["median"]),
        "against": against and against["name"],
    }


def _one(value: float | None) -> dict[str, float] | None:
    return {"median": value, "low": value, "high": value, "n": 1} if value else None


def _best(rows: Sequence[Row], key: str) -> Row | None:
    return min((row for row in rows if row[key]), key=lambda row: row[key]["median"], default=None)


def _most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


def _below(limit: float) -> Callable[[float], bool]:
    return lambda value: value < limit


def _at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit
