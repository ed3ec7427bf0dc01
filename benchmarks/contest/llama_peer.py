"""llama.cpp, by llama-cpp-python's bindings, on a GGUF file of the decoder. In an environment of its own.

Its vision tower is not used, and no tokenizer: it reads the prompt's embeddings, the image's features in them, which
PyTorch makes off the clock.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from contest.task import Taken, Task, greedy


def convert(job: dict[str, Any]) -> None:
    """Write the decoder's weights with llama.cpp's own writer and quantiser; q and k are permuted for its rotation."""
    import gguf
    from safetensors.numpy import load_file

    source, out = Path(job["path"]), Path(job["to"])
    text = json.loads((source / "config.json").read_text(encoding="utf-8"))["text_config"]
    heads, layers = text.get("num_attention_heads", 32), text.get("num_hidden_layers", 32)
    key_heads = text.get("num_key_value_heads", heads)
    out.mkdir()
    writer = gguf.GGUFWriter(out / "decoder.gguf", "llama")
    writer.add_context_length(text.get("max_position_embeddings", 4096))
    writer.add_embedding_length(text.get("hidden_size", 4096))
    writer.add_block_count(layers)
    writer.add_feed_forward_length(text.get("intermediate_size", 11008))
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(text.get("hidden_size", 4096) // heads)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[job["options"]["type"].upper()]
    for name, weight in load_file(source / "model.safetensors").items():
        if (target := _target(name)) is None:
            continue
        if target.endswith(("attn_q.weight", "attn_k.weight")):
            count = heads if "attn_q" in target else key_heads
            halves = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _target(name: str) -> str | None:
    """llama.cpp's name of a tensor of the hub's checkpoint, None of those outside the decoder."""
    if not name.startswith("language_model."):
        return None
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    middle = name.removeprefix("language_model.").removesuffix(".weight")
    if middle in whole:
        return f"{whole[middle]}.weight"
    layer, part = middle.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{parts[part.split('.')[-1]]}.weight"


def load(job: dict[str, Any]) -> Decoder:
    return Decoder(job)


class Decoder:
    """A loaded model, and a context that is cleared for each answer."""

    def __init__(self, job: dict[str, Any]) -> None:
        task, file = Task(**job["task"]), Path(job["path"]) / "decoder.gguf"
        self._embeddings = Path(job["options"]["embeddings"])
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        # with AMX's buffers for quantised weights 0.3.36 dies of SIGSEGV in its first llama_decode
        settings.use_extra_bufts = job["options"]["type"] == "f32"
        self._model = llama_cpp.llama_load_model_from_file(str(file).encode(), settings)  # maps the file
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = task.tokens + task.new_tokens
        params.n_threads = params.n_threads_batch = task.threads
        if job["options"]["type"] == "f32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.facts = {"decode_bytes": _decoder_bytes(file), "cache_width": 4 if job["options"]["type"] == "f32" else 2}

    def answer(self, image: str, task: Task) -> Taken:
        states = np.ascontiguousarray(np.load(self._embeddings / f"{Path(image).stem}.npy")[0])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        begin = time.perf_counter()
        logits = self._run(len(states), 0, states=states)
        first = int(logits.argmax())
        now = time.perf_counter()
        at = len(states)

        def step(token: int) -> int:
            nonlocal at
            at += 1
            return int(self._run(1, at - 1, token=token).argmax())

        tokens, decode = greedy(first, step, task.new_tokens)
        return Taken(None, None, 1e3 * (now - begin), decode, tokens, logits)

    def _run(self, count: int, begin: int, states: np.ndarray | None = None, token: int = 0) -> np.ndarray:
        """Logits [V] behind the last of ``count`` rows, which are ``states`` [S, D] or a token."""
        batch = llama_cpp.llama_batch_init(count, 0 if states is None else states.shape[1], 1)
        batch.n_tokens = count
        if states is None:
            batch.token[0] = token
        else:
            ctypes.memmove(batch.embd, states.ctypes.data, states.nbytes)
        for row in range(count):
            batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = begin + row, 1, 0
            batch.logits[row] = row == count - 1
        code = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        found = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._vocabulary,)).copy()


def _decoder_bytes(file: Path) -> int:
    """Of all tensors but the embedding table, of which a step reads one row."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors if tensor.name != "token_embd.weight")
