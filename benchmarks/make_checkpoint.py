"""Writes a seeded random LLaVA-1.5 in the hub's own format, at any size, without ever holding more than a few MB of it.

    python benchmarks/make_checkpoint.py --size 7b --out DIR [--dtype float16] [--naming old] [--seed 0]
    python benchmarks/make_checkpoint.py --size sizes.json --out DIR

`--size` takes 7b, 13b or a JSON file: {"hidden": 2048, "intermediate": 5504, "layers": 24, "heads": 16}, and if wanted
kv_heads, vocabulary, context, vision_hidden, vision_intermediate, vision_layers, vision_heads, image_size, patch_size,
which are LLaVA-1.5's otherwise. `--naming old` gives keys and files as llava-hf has them, `new` as transformers 5
saves them; the weights are the same.

Weights are normal, by a table of 65,536 quantiles that random 16-bit words look up, each tensor's words seeded by
(seed, name): the same bytes everywhere. Spreads are 1/√(inputs), so that activations keep their size; branches add
1/√(2·layers) of theirs to the residual stream; queries and keys are wider, so that attention picks few rows out of
hundreds; token embeddings are narrow, so that the context and not the last token decides what comes next.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from hub_files import SIZES, Size, read_size, write_files

from tokprune.runtime.errors import UserError

DTYPES = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
SHARD_BYTES = 5_000_000_000
_CHUNK = 1 << 20  # values made at once; the last word of a chunk is used whole but in a tensor's last chunk
_SHARPNESS = 1.5  # of queries and keys: scores spread by its square
_EMBEDDING, _LOGITS = 0.3, 3.0  # spreads of token embeddings and of logits


@dataclass(frozen=True)
class Weight:
    """One tensor: its key as the hub names it, and the normal distribution it is drawn from."""

    name: str
    shape: tuple[int, ...]
    spread: float
    mean: float = 0.0

    @property
    def count(self) -> int:
        return int(np.prod(self.shape))


def weights(size: Size) -> Iterator[Weight]:
    """Every tensor, in the order of the hub's shards: tower, projector, decoder."""
    tower = "vision_tower.vision_model"
    width, inner = size.vision_hidden, size.vision_intermediate
    patches = (size.image_size // size.patch_size) ** 2
    yield Weight(f"{tower}.embeddings.class_embedding", (width,), 1.0)
    pixels = (3, size.patch_size, size.patch_size)
    yield Weight(f"{tower}.embeddings.patch_embedding.weight", (width, *pixels), float(np.prod(pixels)) ** -0.5)
    yield Weight(f"{tower}.embeddings.position_embedding.weight", (patches + 1, width), 0.3)
    yield from _layer_norm(f"{tower}.pre_layrnorm", width)
    for layer in range(size.vision_layers):
        at, branch = f"{tower}.encoder.layers.{layer}", (2 * size.vision_layers) ** -0.5
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            gain = {"v_proj": 1.0, "out_proj": branch}.get(name, _SHARPNESS)
            yield from _linear(f"{at}.self_attn.{name}", width, width, gain)
        yield from _layer_norm(f"{at}.layer_norm1", width)
        yield from _linear(f"{at}.mlp.fc1", inner, width, 1.0)
        yield from _linear(f"{at}.mlp.fc2", width, inner, branch)
        yield from _layer_norm(f"{at}.layer_norm2", width)
    yield from _layer_norm(f"{tower}.post_layernorm", width)

    hidden = size.hidden
    yield from _linear("multi_modal_projector.linear_1", hidden, width, 1.0)
    yield from _linear("multi_modal_projector.linear_2", hidden, hidden, 2 * _EMBEDDING)  # GELU halves what it gets

    model = "language_model.model"
    yield Weight(f"{model}.embed_tokens.weight", (size.vocabulary, hidden), _EMBEDDING)
    branch = (2 * size.layers) ** -0.5
    for layer in range(size.layers):
        at = f"{model}.layers.{layer}"
        yield _matrix(f"{at}.self_attn.q_proj", hidden, hidden, _SHARPNESS)
        yield _matrix(f"{at}.self_attn.k_proj", size.key_width, hidden, _SHARPNESS)
        yield _matrix(f"{at}.self_attn.v_proj", size.key_width, hidden, 1.0)
        yield _matrix(f"{at}.self_attn.o_proj", hidden, hidden, branch)
        yield _matrix(f"{at}.mlp.gate_proj", size.intermediate, hidden, 1.0)
        yield _matrix(f"{at}.mlp.up_proj", size.intermediate, hidden, 1.0)
        yield _matrix(f"{at}.mlp.down_proj", hidden, size.intermediate, branch)
        yield _norm(f"{at}.input_layernorm", hidden)
        yield _norm(f"{at}.post_attention_layernorm", hidden)
    yield _norm(f"{model}.norm", hidden)
    yield _matrix("language_model.lm_head", size.vocabulary, hidden, _LOGITS)


def _matrix(name: str, rows: int, columns: int, gain: float) -> Weight:
    return Weight(f"{name}.weight", (rows, columns), gain * columns**-0.5)


def _linear(name: str, rows: int, columns: int, gain: float) -> Iterator[Weight]:
    yield _matrix(name, rows, columns, gain)
    yield Weight(f"{name}.bias", (rows,), 0.02)


def _norm(name: str, width: int) -> Weight:
    return Weight(f"{name}.weight", (width,), 0.1, mean=1.0)


def _layer_norm(name: str, width: int) -> Iterator[Weight]:
    yield _norm(name, width)
    yield Weight(f"{name}.bias", (width,), 0.02)


def key(name: str, naming: str) -> str:
    """The hub's key, or what transformers 5 writes instead: its tower has one class less."""
    return name.replace("vision_tower.vision_model.", "vision_tower.") if naming == "new" else name


@cache
def _quantiles() -> npt.NDArray[np.float64]:
    upper = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)]
    return np.array([-value for value in reversed(upper)] + upper)


def values(weight: Weight, dtype: str, seed: int) -> Iterator[np.ndarray]:
    """The tensor's values in the order of its bytes, chunk by chunk; bfloat16 as its bits in uint16."""
    table: np.ndarray = (weight.mean + weight.spread * _quantiles()).astype(np.float32)
    if dtype == "float16":
        table = table.astype(np.float16)
    elif dtype == "bfloat16":
        bits = table.view(np.uint32)
        table = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    digest = hashlib.sha256(weight.name.encode()).digest()
    words = np.random.SFC64(np.random.SeedSequence([seed, int.from_bytes(digest[:16], "little")]))
    for begin in range(0, weight.count, _CHUNK):
        count = min(_CHUNK, weight.count - begin)
        yield table[words.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]]


def shards(size: Size, dtype: str, limit: int) -> list[list[Weight]]:
    """Weights by shard, each filled up to ``limit`` bytes; a larger tensor has a shard of its own."""
    found: list[list[Weight]] = []
    room = 0
    for weight in weights(size):
        need = weight.count * DTYPES[dtype][1]
        if need > room:
            found.append([])
            room = limit
        found[-1].append(weight)
        room -= need
    return found


def write_shard(path: Path, shard: list[Weight], dtype: str, naming: str, seed: int) -> Iterator[int]:
    """Write one safetensors file; yields bytes written since the last time."""
    code, width = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in shard:
        end = offset + weight.count * width
        entry = {"dtype": code, "shape": weight.shape, "data_offsets": [offset, end]}
        header[key(weight.name, naming)] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in shard:
            for chunk in values(weight, dtype, seed):
                file.write(chunk)
                yield chunk.nbytes


def make_checkpoint(
    out: Path, size: Size, *, dtype: str = "float16", naming: str = "old", seed: int = 0, limit: int = SHARD_BYTES
) -> int:
    """Write the checkpoint to ``out``, which appears whole or not at all; returns the bytes of its weights.

    Raises UserError if ``out`` is there already, or has no place to be.
    """
    if out.exists() or not out.parent.is_dir():
        found = "is there already" if out.exists() else "has no parent directory"
        raise UserError(f"--out {out} {found}: give a new directory")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_files(temporary, size, dtype, naming)
    parts = shards(size, dtype, limit)
    total = sum(weight.count for part in parts for weight in part) * DTYPES[dtype][1]
    done, shown, where = 0, -1, {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        where.update({key(weight.name, naming): file for weight in part})
        for written in write_shard(temporary / file, part, dtype, naming, seed):
            done += written
            if 20 * done // total > shown:
                shown = 20 * done // total
                print(f"{file}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    temporary.rename(out)
    return total


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, print; 2 if what was asked for is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True, help=f"{', '.join(SIZES)}, or a JSON file of sizes")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--naming", choices=("old", "new"), default="old", help="the hub's, or transformers 5's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="of a file, at most")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        if options.seed < 0:
            raise UserError(f"seed {options.seed} was asked for: give 0 or a positive number")
        total = make_checkpoint(
            options.out,
            read_size(options.size),
            dtype=options.dtype,
            naming=options.naming,
            seed=options.seed,
            limit=options.shard_bytes,
        )
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begin
    print(json.dumps({"checkpoint": str(options.out), "weights_bytes": total, "seconds": round(seconds, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
