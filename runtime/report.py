"""What people read: aligned plain-text tables of a run, a verification, a benchmark, FLOPs and memory.

Takes the dicts that ``--json`` prints, so that both always say the same. Knows units; computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "-"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Align ``rows`` under ``headers``: the first column to the left, the others to the right.

    Raises ValueError if a row has not as many cells as there are headers.
    """
    lines = [[str(cell) for cell in line] for line in (headers, *rows)]
    for line in lines:
        if len(line) != len(headers):
            raise ValueError(f"row {line} has {len(line)} cells, the headers are {list(headers)}")
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(text)


def flops(count: float | None) -> str:
    """A FLOP count with the unit that suits it, at three digits: 8.66 TFLOP, 13.2 GFLOP."""
    return _optional(count, lambda v: _scale(v, (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)), "FLOP"))


def _scale(count: float, units: Sequence[tuple[str, float]], one: str) -> str:
    for unit, scale in units:
        if count >= scale:
            value = count / scale
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} {one}"


def milliseconds(value: float | None) -> str:
    """Milliseconds: two digits behind the point below 10, one above."""
    return _optional(value, lambda v: f"{v:.2f} ms" if v < 10 else f"{v:.1f} ms")


def megabytes(value: float | None) -> str:
    """Megabytes, whole."""
    return _optional(value, lambda v: f"{v:.0f} MB")


def size(count: float | None) -> str:
    """Bytes with the unit that suits them, at three digits: 13.5 GB, 263 MB."""
    return _optional(count, lambda v: _scale(v, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B"))


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A share as a percentage, with its 95 % interval where there is one: 93.8 % [91.2, 96.1]. 100.0 % is all of it."""
    text = _optional(value, lambda v: "99.9 %" if 0.999 < v < 1 else f"{100 * v:.1f} %")
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def number(value: float | None) -> str:
    """A plain number with four significant digits."""
    return _optional(value, lambda v: f"{v:.4g}")


def _optional(value: float | None, spell: Any) -> str:
    return NOT_MEASURED if value is None else spell(value)


def pruning_lines(pruning: Mapping[str, Any]) -> list[str]:
    """One line a stage and image, or the reason why nothing was pruned."""
    if not pruning["applied"]:
        return [f"not pruned: {pruning['reason']}"]
    stages = pruning["stages"]
    lines = [f"layer {s['layer']}: kept {s['kept']} of {s['total']} visual tokens" for s in stages]
    if not any(s["image"] for s in stages):
        return lines
    return [f"image {s['image']}, {line}" for s, line in zip(stages, lines, strict=True)]


def run_report(result: Mapping[str, Any]) -> str:
    """What an answer of ``tokprune run`` took; the answer itself has been printed by then."""
    timing, counts = result["timing_ms"], result["flops"]
    rows = [(f"  {name}", milliseconds(value)) for name, value in timing["segments"].items()]
    rows = [
        ("first token", milliseconds(timing["ttft"])),
        *rows,
        ("each further token", milliseconds(timing["decode_per_token"])),
        ("peak memory", megabytes(result["peak_rss_mb"])),
        ("prefill", flops(counts["prefill"])),
        ("decode, each token", flops(counts["decode_per_token"])),
    ]
    head = f"engine {result['engine']}, {result['prompt_tokens']} prompt tokens"
    return "\n".join([head, *result["remarks"], *pruning_lines(result["pruning"]), "", table(rows, ("measured", ""))])


def flops_report(result: Mapping[str, Any]) -> str:
    """The FLOPs of ``tokprune flops``, segment by segment."""
    total = result["prefill_tflops"] * 1e12
    rows = [(name, flops(1e12 * t), percent(1e12 * t / total)) for name, t in result["segments"].items()]
    rows.append(("prefill", flops(total), percent(1.0)))
    rows.append(("prefill, unpruned", flops(1e12 * result["prefill_tflops_unpruned"]), ""))
    form_a, form_b = number(result["form_a_gflops_per_layer"]), number(result["form_b_tmacs"])
    lines = [
        f"{result['model']}, {result['plan']}",
        f"{result['text_tokens']} text and {result['visual_tokens']} visual tokens; selectors: {result['selectors']}",
        "",
        table(rows, ("segment", "FLOPs", "share")),
        "",
        f"saved in prefill: {percent(result['reduction'])}; in decoders and selectors: "
        f"{percent(result['decoder_reduction'])}",
        f"first decoded token: {flops(1e9 * result['decode_gflops_per_token'])}, "
        f"unpruned {flops(1e9 * result['decode_gflops_per_token_unpruned'])}",
        f"literature, form A: {form_a} G a layer (n = {result['form_a_n']} before pruning, text included)",
        f"literature, form B: {form_b} T multiply-adds (visual tokens only)",
    ]
    return "\n".join(lines)


def memory_report(result: Mapping[str, Any]) -> str:
    """The bytes of ``tokprune memory`` by segment, predicted peaks, and the modules that have room for them."""
    caches, activations = result["kv_bytes"], result["activation_bytes"]
    rows = [
        (name, size(weights), size(caches.get(name)), size(activations.get(name)))
        for name, weights in result["weights_bytes"].items()
    ]
    weights, cached = sum(result["weights_bytes"].values()), sum(caches.values())
    rows.append(("all", size(weights), size(cached), ""))
    largest = result["largest_weight"]
    lines = [
        f"{result['model']}, {result['plan']}; {precision_text(result)}",
        f"{result['text_tokens']} text and {result['visual_tokens']} visual tokens, {result['new_tokens']} new ones, "
        f"batch {result['batch']}",
        "",
        table(rows, ("segment", "weights", "KV cache", "activations")),
        "",
        f"KV cache, unpruned: {size(result['kv_bytes_unpruned'])}; with TensorRT: {size(result['kv_bytes_tensorrt'])}, "
        f"made for {result['max_kv_capacity']} tokens",
        f"largest weight: {largest['name']} of {largest['segment']}, {size(largest['bytes'])}",
        memory_verdict(result),
    ]
    return "\n".join(lines)


def precision_text(result: Mapping[str, Any]) -> str:
    """A precision, and what it is on where that is another: fp16; int4 on fp16."""
    precision, base = result["precision"], result["base"]
    return precision if precision == base else f"{precision} on {base}"


def memory_verdict(result: Mapping[str, Any]) -> str:
    """Predicted peaks, which Jetson modules have room for them, and what would fit those that have not."""
    peaks, fits = result["peak_bytes"], {True: "fits", False: "no"}
    modules = [(m["name"], size(m["available_bytes"]), fits[m["run"]], fits[m["build"]]) for m in result["modules"]]
    lines = [
        f"predicted peak: {size(peaks['onnxruntime_cpu'])} with ONNX Runtime on the CPU, "
        f"{size(peaks['tensorrt'])} with TensorRT, "
        f"{size(result['build_bytes'])} to build its engines",
        "",
        table(modules, ("TensorRT on", "has for it", "run", "build")),
        *(f"{m['name']}: {'; '.join(m['instead'])}" for m in result["modules"] if m["instead"]),
    ]
    return "\n".join(lines)


def parity_rows(parity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Our engine against PyTorch with the same pruning: what, and how much."""
    return [
        ("samples", str(parity["samples"])),
        ("max |Δlogit|", number(parity["max_abs_logit_diff"])),
        ("as a share of the largest", number(parity["max_rel_logit_diff"])),
        ("lowest cosine", number(parity["cosine_min"])),
        ("greedy tokens equal", percent(parity["greedy_agreement"])),
        ("kept tokens shared", percent(parity["kept_overlap"])),
        ("kept sets equal within the margin", percent(parity["kept_equal_margin"])),
    ]


def consistency_rows(consistency: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pruned model against the unpruned original: what, and how much; the IPR aside."""
    divergences = (number(consistency[key]) for key in ("kl_mean", "kl_median", "kl_p99"))
    return [
        ("samples", str(consistency["samples"])),
        ("answers equal", percent(consistency["agreement"], consistency["agreement_ci95"])),
        ("accuracy, unpruned", percent(consistency["accuracy_full"])),
        ("accuracy, pruned", percent(consistency["accuracy_pruned"])),
        ("correct → wrong", _count(consistency["correct_to_wrong"])),
        ("wrong → correct", _count(consistency["wrong_to_correct"])),
        ("wrong → other wrong", _count(consistency["wrong_to_other"])),
        ("McNemar p", number(consistency["mcnemar_p"])),
        ("top-1 tokens equal", percent(consistency["top1_agreement"])),
        ("KL mean / median / p99", " / ".join(divergences)),
    ]


def verify_report(result: Mapping[str, Any]) -> str:
    """Parity, consistency and gates of ``tokprune verify``; a part that was not asked for is left out."""
    parts = []
    if result.get("parity") is not None:
        parts.append(table(parity_rows(result["parity"]), ("parity", "")))
    if (consistency := result.get("consistency")) is not None:
        spectra = [
            (f"IPR in layer {entry['layer']}", f"{number(entry['full'])} → {number(entry['pruned'])}")
            for entry in consistency["ipr"]
        ]
        parts.append(table([*consistency_rows(consistency), *spectra], ("consistency", "")))
    if result["gates"]:
        rows = [
            (gate["name"], number(gate["limit"]), number(gate["value"]), verdict(gate["passed"]))
            for gate in result["gates"]
        ]
        parts.append(table(rows, ("gate", "limit", "value", "")))
    parts.append("\n".join([*result["remarks"], verdict(result["passed"])]))
    return "\n\n".join(parts)


def build_report(result: Mapping[str, Any]) -> str:
    """The engines of ``tokprune build``, or its fused graphs."""
    is_fused = any(s["difference"] is not None for s in result["segments"])
    rows = [
        (
            s["name"],
            "yes" if s["built"] else "no",
            f"{s['seconds']:.1f} s",
            size(s["bytes"]),
            f"{s['difference']:.1e}" if is_fused else ", ".join(s["profiles"]),
        )
        for s in result["segments"]
    ]
    last = "difference from neutral" if is_fused else "profiles"
    lines = [
        table(rows, ("segment", "built now", "took", "files" if is_fused else "engine", last)),
        "",
        f"{result['library']} {result['version']} for {result['arch']}, selector {result['selector']}; "
        f"{size(result['bytes'])} in {result['slot']}",
    ]
    return "\n".join(lines)


def bench_report(result: Mapping[str, Any]) -> str:
    """Times of ``tokprune bench``, and what of the theoretical saving has been realised."""
    peak = result["peak_tflops"]
    rows = [
        (
            s["name"],
            milliseconds(s["ms_median"]),
            milliseconds(s["ms_p90"]),
            flops(1e9 * s["gflops"]),
            f"{s['achieved_tflops']:.3g}",
            *([] if peak is None else [percent(s["peak_share"])]),
        )
        for s in result["segments"]
    ]
    headers = ("segment", "median", "p90", "FLOPs", "TFLOP/s", *([] if peak is None else ["of peak"]))
    lines = [
        *result["remarks"],
        table(rows, headers),
        "",
        *([] if peak is None else [f"peak: {peak:.1f} TFLOP/s, dense FP16 at the highest clock allowed now"]),
        f"selectors: {percent(result['selector_share'])} of prefill",
        f"decoder prefill, speed-up: {times(result['decoder_speedup'])}, "
        f"in theory {times(result['theoretical_decoder_speedup'])}; "
        f"{percent(result['realised_share'])} of the theoretical saving realised",
    ]
    return "\n".join(lines)


def _count(value: int | None) -> str:
    return NOT_MEASURED if value is None else str(value)


def times(value: float | None) -> str:
    return _optional(value, lambda v: f"{v:.2f}×")


def verdict(passed: bool) -> str:
    """How a gate, or all of them, came out."""
    return "passed" if passed else "FAILED"
