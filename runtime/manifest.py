"""The manifest of a bundle, ``tokprune.json``: what it holds, as checked data classes.

Knows JSON and the words of the design; opens no graph and no weight. Reading is strict: an unknown or
missing key is an error that names it, so that a manifest is never half understood.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import Plan

SCHEMA = 5
T = TypeVar("T")


@dataclass(frozen=True)
class VisionFacts:
    """The vision tower and projector, as far as they are used (layers behind the feature layer are not)."""

    image_size: int
    patch_size: int
    layers: int  # that run; CLIP-L/14-336 has 24, LLaVA-1.5 reads behind the 23rd
    hidden: int
    intermediate: int
    heads: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """Visual tokens N of one image (the class token is dropped)."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ModelFacts:
    """What runtime and reports must know of a LLaVA-1.5: a Llama decoder behind a CLIP tower."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int  # positions the decoder was made for, prompt and answer together
    vision: VisionFacts
    image_token_id: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptFormat:
    """How turns become text. A question with an image is ``user.format(text=image + question)``.

    For LLaVA-1.5: image "<image>\\n", user "USER: {text} ", assistant "ASSISTANT:".
    """

    image: str
    user: str
    assistant: str


@dataclass(frozen=True)
class TensorFacts:
    """A graph input or output. ``shape`` holds integers, and axis names for what is dynamic."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str  # as NumPy spells it


@dataclass(frozen=True)
class FlopsTerm:
    """``coefficient`` · Π axis^power FLOPs (2 per multiply-add)."""

    coefficient: int
    powers: dict[str, int]


@dataclass(frozen=True)
class SegmentFacts:
    """One ONNX graph. ``layers`` is [first, stop) for a decoder, else None; ``flops`` sums its terms.

    ``plugin_file`` is the same graph for TensorRT with our plugin, of a selector whose method has an operator.
    """

    name: str
    file: str
    layers: tuple[int, int] | None
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    flops: tuple[FlopsTerm, ...]
    plugin_file: str | None = None

    def count_flops(self, **axes: int) -> int:
        """FLOPs of one run at the given lengths, named as the axes in ``names``."""
        total = 0
        for term in self.flops:
            product = term.coefficient
            for axis, power in term.powers.items():
                product *= axes[axis] ** power
            total += product
        return total


@dataclass(frozen=True)
class SegmentWeights:
    """Weights that one segment's graph reads, in bytes; ``largest`` names the greatest one, a contiguous allocation."""

    segment: str
    total: int
    largest: str
    largest_bytes: int


@dataclass(frozen=True)
class FileFacts:
    """A file of the bundle: path relative to it, with forward slashes; size in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Limits:
    """The largest call that a bundle, and each engine made from it, is for.

    Lengths are those of the longest sequence of a batch, counted as if nothing were pruned.
    """

    max_batch: int  # sequences at a time
    max_input_length: int  # rows of one call, N for each image among them
    max_kv_capacity: int  # rows of prompts and answers together


@dataclass(frozen=True)
class Manifest:
    """All of ``tokprune.json``; ``segments`` are in the order of prefill.

    ``precision`` is that of the decoder layers' matrices, "fp32", "fp16", "int8" or "int4"; ``base`` that of everything
    else, activations included, "fp32" or "fp16".
    """

    schema: int
    tools: dict[str, str]
    source: dict[str, str]
    model: ModelFacts
    plan: Plan
    precision: str
    base: str
    prompt: PromptFormat
    limits: Limits
    segments: tuple[SegmentFacts, ...]
    files: tuple[FileFacts, ...]
    memory: tuple[SegmentWeights, ...]  # of each segment, in their order

    def segment(self, name: str) -> SegmentFacts:
        """The segment of that name; KeyError if the plan has none."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise KeyError(name)

    def to_json(self) -> str:
        """The manifest as it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a manifest; ``where`` names its file in errors. Raises UserError.

        Whether its parts fit one another is for ``contract.check_manifest`` to say.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers too long, and nesting too deep, for Python
            raise UserError(f"{where} is not valid JSON ({error}): export the bundle again") from None
        found = data.get("schema") if isinstance(data, dict) else None
        if type(found) is not int or found != SCHEMA:
            raise UserError(
                f"{where} has schema version {found}, this tokprune reads version {SCHEMA}: "
                "export the bundle again with this version"
            )
        return read_as(cls, data, "manifest", where)


def read_as(kind: Any, data: Any, key: str, where: str) -> Any:
    """Convert plain JSON ``data`` to ``kind``: a data class, or one of the types that they are made of."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if _fits(option, data):
                return read_as(option, data, key, where)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(data, dict):
        hints = typing.get_type_hints(kind)
        wrong = set(hints) ^ set(data)
        if not wrong:
            return kind(**{name: read_as(hint, data[name], f"{key}.{name}", where) for name, hint in hints.items()})
        key = f"{key}.{sorted(wrong)[0]}"
    elif origin is tuple and isinstance(data, list):
        if args[-1] is Ellipsis:
            return tuple(read_as(args[0], item, f"{key}[{i}]", where) for i, item in enumerate(data))
        if len(args) == len(data):
            return tuple(
                read_as(a, item, f"{key}[{i}]", where) for i, (a, item) in enumerate(zip(args, data, strict=True))
            )
    elif origin is dict and isinstance(data, dict):
        return {name: read_as(args[1], item, f"{key}.{name}", where) for name, item in data.items()}
    elif isinstance(kind, type) and _fits(kind, data):
        return float(data) if kind is float else data
    raise UserError(f"{where} has an unexpected or missing value at {key}: export the bundle again")


def _fits(kind: Any, data: Any) -> bool:
    if kind is float:
        return isinstance(data, (int, float)) and not isinstance(data, bool)
    if kind is int:
        return isinstance(data, int) and not isinstance(data, bool)
    origin = typing.get_origin(kind)
    if origin is tuple:
        return isinstance(data, list)
    if dataclasses.is_dataclass(kind) or origin is dict:
        return isinstance(data, dict)
    return isinstance(data, kind)
