"""OpenVINO GenAI's VLMPipeline on what optimum-intel exports; its prefix cache off. In an environment of its own.

On a CPU with AMX OpenVINO computes "FP32" models in bfloat16, and keeps caches in 8 bits, unless it is told not to: the
contestant that is called FP32 sets both to f32, the others are left as they come.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from PIL import Image

from contest.task import Taken, Task

PREPROCESSOR = "preprocessor_config.json"


def convert(job: dict[str, Any]) -> None:
    """As its documentation says, with the weights of ``job["options"]``."""
    tool = Path(sys.executable).with_name("optimum-cli")
    command = [str(tool), "export", "openvino", "--model", job["path"], "--task", "image-text-to-text"]
    subprocess.run([*command, "--weight-format", job["options"]["weights"], job["to"]], check=True)
    # transformers 5 puts the image's mean and deviation elsewhere, where GenAI does not look: it would use others
    shutil.copy(Path(job["path"]) / PREPROCESSOR, job["to"])


def load(job: dict[str, Any]) -> Genai:
    return Genai(job)


def properties(job: dict[str, Any]) -> dict[str, Any]:
    """Of the CPU device: threads, and FP32 where that was asked for."""
    found: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["task"]["threads"]}
    if hint := job["options"]["hint"]:
        found |= {"INFERENCE_PRECISION_HINT": hint, "KV_CACHE_PRECISION": hint}
    return found


def first_logits(job: dict[str, Any], task: Task) -> tuple[np.ndarray, list[int]]:
    """By the same models in OpenVINO itself, GenAI gives no logits; the greedy tokens are GenAI's."""
    from transformers import AutoProcessor

    path, core = Path(job["path"]), openvino.Core()

    def compiled(name: str) -> Any:
        return core.compile_model(path / f"openvino_{name}_model.xml", "CPU", properties(job))

    processor = AutoProcessor.from_pretrained(path)
    batch = processor(text=task.prompt, images=_picture(job["images"][0]), return_tensors="np")
    ids = batch["input_ids"]
    states = compiled("text_embeddings")([ids])[0].copy()
    features = compiled("vision_embeddings")([batch["pixel_values"]])[0]
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    states[ids == image_token] = features.reshape(-1, states.shape[-1])
    feeds = {
        "inputs_embeds": states,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    logits = compiled("language")(feeds)["logits"][0, -1]
    return logits, load(job).answer(job["images"][0], task).tokens


class Tokens(openvino_genai.StreamerBase):
    """Collects ids, which results do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        self.ids += token if isinstance(token, list) else [token]
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None: ...


class Genai:
    """A loaded pipeline."""

    def __init__(self, job: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.VLMPipeline(job["path"], "CPU", scheduler_config=scheduler, **properties(job))
        self.versions = {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}
        weights = (Path(job["path"]) / "openvino_language_model.bin").stat().st_size
        # bytes of a cached number
        self.facts: dict[str, Any] = {"decode_bytes": weights, "cache_width": 4 if job["options"]["hint"] else 1}

    def answer(self, image: str, task: Task) -> Taken:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = task.new_tokens
        config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
        picture = openvino.Tensor(np.asarray(_picture(image))[None])
        prompt = task.prompt.replace("<image>\n", "<image>")  # it adds the line's end itself
        tokens = Tokens()
        result = self._pipeline.generate(prompt, images=[picture], generation_config=config, streamer=tokens)
        metrics = result.perf_metrics
        if metrics.get_num_input_tokens() != task.tokens:
            raise ValueError(f"GenAI made {metrics.get_num_input_tokens()} tokens of the prompt, not {task.tokens}")
        first, vision = metrics.get_ttft().mean, metrics.get_prepare_embeddings_duration().mean
        return Taken(first, vision, first - vision, metrics.get_tpot().mean, tokens.ids)


def _picture(image: str) -> Image.Image:
    with Image.open(image) as opened:
        return opened.convert("RGB")
