"""The pruning plan: which decoder layers prune, to how many visual tokens, by which method.

Knows no graph and no weights. A plan is checked where it is made, so that every later reader may trust it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokprune.runtime.errors import UserError

# Chosen by measured consistency on the demo model (docs/consistency.md), not quoted from a paper.
DEFAULT_LAYER, DEFAULT_KEEP, DEFAULT_RANK = 2, "64", "8"
METHODS = ("lofi", "lvpruning", "fastv", "random", "uniform", "none")


@dataclass(frozen=True)
class Stage:
    """One pruning step: of the visual rows that enter decoder layer ``layer``, ``keep`` go on."""

    layer: int
    keep: int


@dataclass(frozen=True)
class Rank:
    """Rank of the leverage scores: ``components`` of them, or the fewest that hold ``energy`` of Σσ².

    Exactly one of the two is set; ``energy`` lies in (0, 1).
    """

    components: int | None = None
    energy: float | None = None

    def __str__(self) -> str:
        return str(self.components) if self.components is not None else str(self.energy)


@dataclass(frozen=True)
class Module:
    """Sizes of LVPruning's module, one a stage: its inner width, attention heads (of width / heads), MLP width."""

    width: int
    heads: int
    intermediate: int


@dataclass(frozen=True)
class Plan:
    """``stages`` with ascending layers and keeps that never grow; none at all is the unpruned model."""

    method: str
    stages: tuple[Stage, ...] = ()
    rank: Rank | None = None  # lofi only
    seed: int = 0  # random only
    module: Module | None = None  # lvpruning only

    def __str__(self) -> str:
        steps = ", ".join(f"{s.keep} visual tokens from layer {s.layer} on" for s in self.stages)
        return f"{self.method}: {steps}" if steps else "none: all visual tokens"

    def segments(self, layers: int) -> Iterator[tuple[int, int, int]]:
        """Yield (decoder index, first layer, last layer + 1) of each decoder segment that has layers.

        A stage at layer 0 leaves decoder_0 without layers; it is then not there at all.
        """
        edges = [0, *(s.layer for s in self.stages), layers]
        for index, (first, stop) in enumerate(itertools.pairwise(edges)):
            if first < stop:
                yield index, first, stop


def make_plan(
    method: str,
    stages: Sequence[tuple[int, int]],
    *,
    layers: int,
    visual_tokens: int,
    rank: Rank | None = None,
    seed: int = 0,
    module: Module | None = None,
) -> Plan:
    """Check (layer, keep) pairs against a model of ``layers`` decoder layers and N ``visual_tokens``.

    Raises UserError naming what was asked, what the model has and what is allowed.
    """
    if method not in METHODS:
        raise UserError(f"method '{method}' is unknown: choose one of {', '.join(METHODS)}")
    if method == "none":
        if stages:
            raise UserError("method 'none' prunes nothing, but stages were given: drop --stage, --layer and --keep")
        return Plan("none")
    if not stages:
        raise UserError(f"method '{method}' needs at least one stage: give --layer and --keep, or --stage L:K")
    if seed < 0:
        raise UserError(f"seed {seed} was asked for: give 0 or a positive number")
    before_layer, before_keep = -1, visual_tokens
    for layer, keep in stages:
        if not 0 <= layer < layers:
            raise UserError(
                f"layer {layer} was asked for, but the decoder has {layers} layers: choose 0 to {layers - 1}"
            )
        if layer <= before_layer:
            raise UserError(
                f"stage {layer}:{keep} comes after a stage at layer {before_layer}: give stages with ascending layers"
            )
        if not 1 <= keep <= before_keep:
            raise UserError(
                f"stage {layer}:{keep} asks to keep {keep} of {before_keep} visual tokens: choose 1 to {before_keep}"
            )
        if method == "lofi":
            _check_rank(rank, before_keep, layer)
        if method == "fastv" and layer == 0:
            raise UserError(
                "method 'fastv' scores by the attention of the layer before, and layer 0 has none: choose 1 or more"
            )
        before_layer, before_keep = layer, keep
    if method == "lvpruning":
        _check_module(module)
    return Plan(
        method,
        tuple(Stage(layer, keep) for layer, keep in stages),
        rank if method == "lofi" else None,
        seed if method == "random" else 0,
        module if method == "lvpruning" else None,
    )


def lvpruning_stages(layers: int, visual_tokens: int) -> list[tuple[int, int]]:
    """LVPruning's default stages for a decoder of ``layers``: 10 % of the visual tokens are left from the middle on.

    For 32 layers they are 1, 8 and 16, keeping 60, 40 and 10 %: with 36 text tokens LLaVA-1.5-7B's prefill takes
    62.1 % fewer FLOPs, the paper's figure (arXiv 2501.13652, whose layers and shares are not known to us). Other
    depths scale; where two stages meet in a very shallow decoder, the one that keeps less stays.
    """
    stages: dict[int, int] = {}
    for depth, share in ((1 / 32, 0.6), (1 / 4, 0.4), (1 / 2, 0.1)):
        stages[max(1, round(depth * layers))] = max(1, round(share * visual_tokens))
    return sorted(stages.items())


def default_module(hidden: int) -> Module:
    """LVPruning's module for a hidden size D: about D / 16 wide, in heads of 32."""
    width = max(64, round(hidden / 1024) * 64)
    return Module(width, width // 32, 4 * width)


def _check_module(module: Module | None) -> None:
    if module is None:
        raise UserError("method 'lvpruning' needs trained modules: give --modules, as 'tokprune train' writes them")
    if min(module.width, module.heads, module.intermediate) < 1 or module.width % module.heads:
        raise UserError(
            f"modules of width {module.width} with {module.heads} heads and an MLP of {module.intermediate} were asked "
            "for: choose positive sizes, and a width that the heads divide"
        )


def _check_rank(rank: Rank | None, tokens: int, layer: int) -> None:
    if rank is None or (rank.components is None) == (rank.energy is None):
        raise UserError("method 'lofi' needs a rank: give --rank as an integer, or as a fraction of the energy")
    if rank.components is not None and not 1 <= rank.components < tokens:
        raise UserError(
            f"rank {rank.components} was asked for at layer {layer}, where {tokens} visual tokens are left: "
            f"choose 1 to {tokens - 1}, since at full rank every leverage score is 1"
        )
    if rank.energy is not None and not 0 < rank.energy < 1:
        raise UserError(f"rank {rank.energy} is no fraction of the energy: choose one between 0 and 1")


def parse_keep(text: str, visual_tokens: int) -> int:
    """Read ``--keep``: a count, or with a point a fraction 0 < f < 1 of ``visual_tokens``, rounded, at least 1."""
    value = _number(text, "--keep")
    if isinstance(value, int):
        return value
    if not 0 < value < 1:
        raise UserError(f"--keep {text} is neither a count nor a fraction between 0 and 1 of the tokens kept")
    return max(1, round(value * visual_tokens))


def parse_rank(text: str) -> Rank:
    """Read ``--rank``: an integer number of components, or with a point a fraction of the energy."""
    value = _number(text, "--rank")
    return Rank(components=value) if isinstance(value, int) else Rank(energy=value)


def parse_stage(text: str, visual_tokens: int) -> tuple[int, int]:
    """Read ``--stage L:K`` into (layer, keep)."""
    layer, colon, keep = text.partition(":")
    if not colon or not layer.strip().isdecimal():
        raise UserError(f"--stage {text} does not have the form L:K: give for example --stage 2:64")
    return int(layer), parse_keep(keep, visual_tokens)


def _number(text: str, option: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {text} is no number: give an integer or a fraction between 0 and 1") from None
