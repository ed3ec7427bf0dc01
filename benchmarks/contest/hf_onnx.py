"""transformers' own ONNX exporter, fused for the CPU, in ONNX Runtime: language model, head, a decoder for steps.

It exports no vision tower for LLaVA, so embeddings with the image's features in them come from PyTorch, made off the
clock, and only prefill and decode are its own.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from contest.task import Taken, Task, greedy

COMPONENTS = ("language_model", "lm_head", "decode")


def convert(job: dict[str, Any]) -> None:
    """Export as its documentation says, dynamic and with its fusions for ONNX Runtime's CPU provider."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    processor = AutoProcessor.from_pretrained(job["path"])
    model = LlavaForConditionalGeneration.from_pretrained(job["path"], dtype=torch.float32)
    with Image.open(job["images"][0]) as opened:
        inputs = processor(text=job["task"]["prompt"], images=opened.convert("RGB"), return_tensors="pt")
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    OnnxExporter().export_for_generation(model, dict(inputs), config).save_pretrained(job["to"])


def load(job: dict[str, Any]) -> Exported:
    return Exported(Path(job["path"]), Path(job["options"]["embeddings"]), job["task"]["threads"])


class Exported:
    """The exported components. A cache's outputs are the next step's inputs, and never leave ONNX Runtime."""

    def __init__(self, path: Path, embeddings: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # sessions take turns
        self._embeddings = embeddings
        self._model, self._head, self._decode = (
            onnxruntime.InferenceSession(path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in COMPONENTS
        )
        self._feeds = [i.name for i in self._decode.get_inputs() if "past_key_values" in i.name]
        self._caches = [re.sub(r"^input\.", "", name) for name in self._feeds]
        self._presents = [re.sub(r"^input\.", "output.", name) for name in self._feeds]
        # of the embedding table, as large as the head, a step reads one row
        table = (path / "lm_head.onnx.data").stat().st_size
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self.facts: dict[str, Any] = {"decode_bytes": (path / "decode.onnx.data").stat().st_size - table}

    def answer(self, image: str, task: Task) -> Taken:
        embeddings = np.load(self._embeddings / f"{Path(image).stem}.npy")
        begin = time.perf_counter()
        logits, caches = self._prefill(embeddings)
        first = int(logits.argmax())
        now = time.perf_counter()
        position = embeddings.shape[1]

        def step(token: int) -> int:
            nonlocal caches, position
            feeds = {"input_ids": _value([[token]]), "position_ids": _value([[position]])}
            feeds |= dict(zip(self._feeds, caches, strict=True))
            logits, *caches = self._decode.run_with_ort_values(["logits", *self._presents], feeds)
            position += 1
            return int(logits.numpy()[0, -1].argmax())

        tokens, decode = greedy(first, step, task.new_tokens)
        return Taken(None, None, 1e3 * (now - begin), decode, tokens, logits)

    def _prefill(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        feeds = {
            "inputs_embeds": onnxruntime.OrtValue.ortvalue_from_numpy(embeddings),
            "position_ids": _value([list(range(embeddings.shape[1]))]),
        }
        hidden, *caches = self._model.run_with_ort_values(["last_hidden_state", *self._caches], feeds)
        last = np.ascontiguousarray(hidden.numpy()[:, -1:])
        return self._head.run(None, {"input": last})[0][0, -1], caches


def _value(ids: list[list[int]]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.array(ids, dtype=np.int64))
