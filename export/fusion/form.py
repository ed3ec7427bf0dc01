"""Which form of ``GroupQueryAttention`` is the faster one on this machine: measured, since processors differ.

In its flash form ONNX Runtime walks keys in blocks and tiles the queries; in the other it computes each head's products
whole. 616 rows of 16 heads took flash 1.6 times as long on a Xeon with AMX, and less than the other on a Zen 4 by two
threads, where a decode step's attention took half the time (docs/log.md). Both compute the same. Timed is what a usual
question asks of it, a prompt with an image and its answer, with the caches of the model's layers and no weights.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tokprune.export.fusion.attention import CAPACITY
from tokprune.export.fusion.rules import MICROSOFT
from tokprune.runtime.engines.fused import LENGTHS, PIECE, TOTAL
from tokprune.runtime.making import NO_FLASH, making_sessions
from tokprune.runtime.manifest import Manifest
from tokprune.runtime.memory import usual_work

ROUNDS = 5
CACHES = 64 << 20  # bytes that steps take turns on: more than processors keep to themselves


def measure_forms(manifest: Manifest) -> dict[str, float]:
    """Milliseconds of a usual question's attention, {"whole", "flash"}: the medians, taken in turns."""
    work = usual_work(manifest.model, manifest.limits.max_kv_capacity)
    facts = manifest.model
    shape = facts.heads, facts.kv_heads, facts.head_dim
    visual = [facts.vision.tokens, *(stage.keep for stage in manifest.plan.stages)]
    found = {"whole": 0.0, "flash": 0.0}
    set_by_user = os.environ.pop(NO_FLASH, None)  # it would make both the same
    try:
        for index, first, stop in manifest.plan.segments(facts.layers):
            rows = work.text_tokens + work.images * visual[index]
            for form, (prompt, step) in _times(shape, rows, stop - first).items():
                found[form] += (stop - first) * (prompt + work.new_tokens * step)
    finally:
        if set_by_user is not None:
            os.environ[NO_FLASH] = set_by_user
    return {form: round(ms, 3) for form, ms in found.items()}


def _times(shape: tuple[int, int, int], rows: int, layers: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of a prompt of ``rows`` and of one step behind it, in one layer."""
    heads, kv_heads, width = shape
    capacity = rows + 1
    count = min(layers, -(-CACHES // (2 * kv_heads * capacity * width * 4)))
    caches = [np.zeros((2, 1, kv_heads, capacity, width), np.float32) for _ in range(count)]
    states = np.random.default_rng(0).standard_normal((1, rows, heads * width)).astype(np.float32)
    forms = {form: _Attention(shape, form == "flash") for form in ("whole", "flash")}
    prompt = [(begin, min(begin + PIECE, rows)) for begin in range(0, rows, PIECE)]
    took: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for form, attention in forms.items():
            took[form].append(
                (attention.run(states, caches, prompt), attention.run(states, caches, [(rows, capacity)]))
            )
    prompts, steps = (
        {form: statistics.median(times[which] for times in each[1:]) for form, each in took.items()} for which in (0, 1)
    )
    return {form: (prompts[form], steps[form]) for form in forms}


class _Attention:
    """A graph of one node, with its caches in place as a decoder has them."""

    def __init__(self, shape: tuple[int, int, int], flash: bool) -> None:
        import onnxruntime

        self._ort, self._shape = onnxruntime, shape
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with making_sessions(flash=flash):
            self._session = onnxruntime.InferenceSession(_graph(shape), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()

    def run(self, states: np.ndarray, caches: list[np.ndarray], calls: list[tuple[int, int]]) -> float:
        """Milliseconds a cache of the rows [begin, end) of ``calls``, one call behind the other."""
        took = sum(self._call(states, cache, begin, end) for cache in caches for begin, end in calls)
        return 1e3 * took / len(caches)

    def _call(self, states: np.ndarray, cache: np.ndarray, begin: int, end: int) -> float:
        _, kv_heads, width = self._shape
        queries = states[:, : end - begin]
        out = np.empty_like(queries)
        held = [np.ascontiguousarray(array) for array in (queries, queries[..., : kv_heads * width])]
        given = {
            "query": held[0],
            "key": held[1],
            "value": held[1],
            "past_key": cache[0],
            "past_value": cache[1],
            LENGTHS: np.array([end - 1], np.int32),
            TOTAL: np.array([end], np.int32),
        }
        taken = {"out": out, "present_key": cache[0], "present_value": cache[1]}
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in (given | taken).items()}
        for name in given:
            self._binding.bind_ortvalue_input(name, values[name])
        for name in taken:
            self._binding.bind_ortvalue_output(name, values[name])
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


def _graph(shape: tuple[int, int, int]) -> bytes:
    heads, kv_heads, width = shape
    rows, cache = ["batch", "rows"], ["batch", kv_heads, CAPACITY, width]
    sizes = {"query": heads * width, "key": kv_heads * width, "value": kv_heads * width, "out": heads * width}

    def value(name: str) -> Any:
        if name in (LENGTHS, TOTAL):
            return helper.make_tensor_value_info(name, TensorProto.INT32, ["batch"] if name == LENGTHS else [1])
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [*rows, sizes[name]] if name in sizes else cache)

    inputs = ["query", "key", "value", "past_key", "past_value", LENGTHS, TOTAL]
    outputs = ["out", "present_key", "present_value"]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads}
    node = helper.make_node("GroupQueryAttention", inputs, outputs, domain=MICROSOFT, **attributes)
    graph = helper.make_graph([node], "attention", [*map(value, inputs)], [*map(value, outputs)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
