"""What the machine can do at most: FP32 and bfloat16 products, reading memory. A job of each round, like the others.

A limit is the best of several libraries at several shapes, so that no contestant's own kernels set it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from contest.task import Taken, Task

# [rows, inner, columns]: the reference's tower and decoder MLPs, and a square
SHAPES = ((577, 1024, 4096), (616, 1024, 2816), (2048, 2048, 2048))


def load(job: dict[str, Any]) -> Limits:
    torch.set_num_threads(job["task"]["threads"])
    return Limits(job["task"]["threads"], **job["options"])


class Limits:
    """Answers like a contestant; what it found is among its facts.

    Each kernel runs for ``seconds``; ``working_sets`` are the bytes that are read, of which caches may hold some.
    """

    def __init__(self, threads: int, seconds: float, working_sets: list[int]) -> None:
        self.versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
        gemm = max(
            max(_torch_flops(shape, torch.float32, seconds), _ort_flops(shape, threads, seconds)) for shape in SHAPES
        )
        self.facts = {
            "gemm_fp32": gemm,
            "gemm_bf16": max(_torch_flops(shape, torch.bfloat16, seconds) for shape in SHAPES),
            "read": {str(size): _read(size, seconds) for size in working_sets},
        }

    def answer(self, image: str, task: Task) -> Taken:
        return Taken(None, None, None, 0.0)


def _best_seconds(kernel: Callable[[], object], seconds: float) -> float:
    kernel()
    best, until = float("inf"), time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until:
        kernel()
        best = min(best, time.perf_counter() - begin)
    return best


def _torch_flops(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> float:
    m, k, n = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    return 2 * m * k * n / _best_seconds(lambda: torch.mm(a, b.T, out=out), seconds)


def _ort_flops(shape: tuple[int, int, int], threads: int, seconds: float) -> float:
    """Of a session with one product, its matrix constant and packed ahead."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [m, k])],
        [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [m, n])],
        [onnx.numpy_helper.from_array(rng.standard_normal((k, n), dtype=np.float32), "b")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"a": rng.standard_normal((m, k), dtype=np.float32)}
    return 2 * m * k * n / _best_seconds(lambda: session.run(None, feeds), seconds)


def _read(size: int, seconds: float) -> float:
    """Bytes a second of a working set of ``size`` bytes: a sum, or a matrix-vector product, as decoding is."""
    matrix = torch.ones(size // 4096, 1024)
    vector = torch.ones(1024)
    kernels = (matrix.sum, lambda: torch.mv(matrix, vector))
    return matrix.nbytes / min(_best_seconds(kernel, seconds) for kernel in kernels)
