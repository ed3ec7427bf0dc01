"""A checkpoint's tensors where they lie: names, types and byte ranges in its safetensors files. Reads no weight.

A safetensors file begins with the length of its header, 8 bytes little-endian, and the header, JSON; "data_offsets"
count from the header's end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokprune.runtime.errors import UserError

SIZES = {"F16": 2, "BF16": 2, "F32": 4}  # bytes of the types that weights may have
_HEADER_LIMIT = 100 << 20  # bytes; safetensors' own
# what older transformers versions saved, and no model reads
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Stored:
    """One tensor: ``length`` bytes at ``offset`` of ``file``, row-major; ``dtype`` as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def rows(self, begin: int, end: int) -> Stored:
        """Rows [begin, end) of the first axis."""
        row = self.length // self.shape[0]
        return Stored(
            self.file, self.dtype, (end - begin, *self.shape[1:]), self.offset + begin * row, row * (end - begin)
        )


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises UserError if it is no whole one."""
    try:
        with path.open("rb") as file:
            start = 8 + (length := int.from_bytes(file.read(8), "little"))
            if length > _HEADER_LIMIT:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if type(dtype) is not str or any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
                raise ValueError(f"it makes no sense at {name}")
            found[name] = Stored(path, dtype, shape, start + begin, end - begin)
        end = start
        for tensor in sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.length)):
            if tensor.offset != end or tensor.length < 0:
                raise ValueError("its tensors overlap or leave gaps")
            end += tensor.length
        if (size := path.stat().st_size) != end:
            raise ValueError(f"it has {size} bytes, its header speaks of {end}")
    except FileNotFoundError:
        raise UserError(f"{path.parent} lacks its shard {path.name}: fetch the checkpoint again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): fetch the checkpoint again") from None
    return found


def canonical(key: str) -> str:
    """One name for what hub checkpoints and transformers 4 and 5 name differently.

    "language_model.model.layers.0.…" and "model.language_model.layers.0.…" become "language_model.layers.0.…",
    "language_model.lm_head.weight" "lm_head.weight", "vision_tower.vision_model.…" "vision_tower.…".
    """
    key = key.removeprefix("model.")
    for old, new in (
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


class Weights:
    """The tensors of a checkpoint by canonical name."""

    def __init__(self, path: Path, shards: Iterable[Path]) -> None:
        """Read the headers of ``shards``. Raises UserError for a shard at fault, or a tensor that is there twice."""
        self._path = path
        self._tensors: dict[str, Stored] = {}
        self._keys: dict[str, str] = {}  # as the checkpoint spells them
        for shard in shards:
            for key, tensor in read_header(shard).items():
                name = canonical(key)
                if name.endswith(_COMPUTED):
                    continue
                if name in self._tensors:
                    raise UserError(
                        f"the checkpoint {path} has {key} twice, also as {self._keys[name]}: fetch the checkpoint again"
                    )
                self._tensors[name], self._keys[name] = tensor, key

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def check(self, expected: Mapping[str, tuple[int, ...]], *, tied: bool = False) -> None:
        """Raise UserError unless the checkpoint has exactly the tensors ``expected``, by canonical name.

        With ``tied``, the embedding may stand for a head that is not there.
        """
        if tied and "lm_head.weight" not in self._tensors and "language_model.embed_tokens.weight" in self._tensors:
            self._tensors["lm_head.weight"] = self._tensors["language_model.embed_tokens.weight"]
            self._keys["lm_head.weight"] = self._keys["language_model.embed_tokens.weight"]
        missing = [name for name in expected if name not in self._tensors]
        if missing:
            self._refuse("lacks", missing)
        surplus = [self._keys[name] for name in self._tensors if name not in expected]
        if surplus:
            self._refuse("has, beyond its architecture,", surplus)
        for name, shape in expected.items():
            stored = self._tensors[name]
            if stored.shape != shape:
                raise UserError(
                    f"the checkpoint {self._path} has {self._keys[name]} with the shape {list(stored.shape)}, its "
                    f"config.json says {list(shape)}: it is no whole LLaVA-1.5 checkpoint"
                )
            if stored.dtype not in SIZES:
                raise UserError(
                    f"the checkpoint {self._path} has {self._keys[name]} in {stored.dtype}, only "
                    f"{', '.join(SIZES)} are read: give the checkpoint as it was before quantization"
                )
            if stored.length != math.prod(shape) * SIZES[stored.dtype]:
                raise UserError(f"{stored.file} contradicts itself at {self._keys[name]}: fetch the checkpoint again")

    def _refuse(self, what: str, names: list[str]) -> None:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"the checkpoint {self._path} {what} {names[0]}{more}: it is no whole LLaVA-1.5 checkpoint")
