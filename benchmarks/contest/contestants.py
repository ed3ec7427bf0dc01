"""Who takes part: each contestant's name, where its file comes from, what it may be compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokprune.runtime.plan import Plan, Rank, make_plan

# of ours: what `tokprune quantize` is told besides the bundles. Heads too, as OpenVINO and llama.cpp have them; w8a8 is
# calibrated on {data}.
QUANTIZED = {
    "int8": ["--precision", "int8", "--lm-head", "int8"],
    "int4": ["--precision", "int4", "--lm-head", "int8"],
    "w8a8": ["--precision", "int8", "--lm-head", "int8", "--scheme", "smoothquant", "--data", "{data}"],
}
PRECISIONS = ("fp32", *QUANTIZED)


@dataclass(frozen=True)
class Pruning:
    """One stage, or none: ``keep`` visual tokens from decoder ``layer`` on."""

    method: str = "none"
    layer: int = 0
    keep: int = 0

    def __str__(self) -> str:
        return f"{self.method}-{self.layer}-{self.keep}" if self.keep else "none"

    @property
    def options(self) -> dict[str, Any]:
        """As workers read it; rank 8 is tokprune's default."""
        return {"method": self.method, "stages": [(self.layer, self.keep)] if self.keep else [], "rank": 8}

    def plan(self, layers: int, tokens: int) -> Plan:
        return plan_of(self.options, layers, tokens)


@dataclass(frozen=True)
class Contestant:
    """``module`` is its file in this package; ``environment`` the one that it needs, "" for tokprune's own.

    ``computes`` is the precision of its products: only equals are compared.
    """

    name: str
    module: str
    precision: str
    computes: str
    pruning: Pruning = Pruning()
    environment: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"


def contestants(layer: int, keeps: list[int], has_slot: bool) -> list[Contestant]:
    """All of them, ours first. Without the CPU slot only the neutral graphs run, in every precision."""
    prunings = [Pruning(), *(Pruning("lofi", layer, keep) for keep in keeps)]
    found = []
    for graphs in ("slot", "neutral") if has_slot else ("neutral",):
        full = graphs == "slot" or not has_slot
        for precision in PRECISIONS if full else ("fp32",):
            for pruning in prunings if full else prunings[:2]:
                name = f"{pruning}-{precision}-{graphs}"
                computes = "int8" if precision == "w8a8" else precision
                found.append(Contestant(name, "ours", precision, computes, pruning, options={"graphs": graphs}))
    fastv = Pruning("fastv", layer, keeps[0])
    found.append(Contestant("pytorch", "pytorch", "fp32", "fp32", options=Pruning().options))
    found.append(Contestant(f"pytorch-{fastv}", "pytorch", "fp32", "fp32", fastv, options=fastv.options))
    found.append(Contestant("hf-onnx", "hf_onnx", "fp32", "fp32", note="no vision tower: prefill and decode only"))
    for name, weights, hint in (("fp32", "fp32", "f32"), ("int8", "int8", ""), ("bf16", "fp32", "")):
        computes = "bf16" if name == "bf16" else weights
        options = {"weights": weights, "hint": hint}
        note = "" if hint else "its default precision of activations, bfloat16 where the CPU has it"
        found.append(
            Contestant(f"openvino-{name}", "openvino_peer", name, computes, Pruning(), "openvino", options, note)
        )
    for name, precision in (("f32", "fp32"), ("q8_0", "int8")):
        note = "no vision tower: prefill and decode only"
        options = {"type": name}
        peer = Contestant(f"llama.cpp-{name}", "llama_peer", precision, precision, Pruning(), "llama", options, note)
        found.append(peer)
    return found


def plan_of(options: dict[str, Any], layers: int, tokens: int) -> Plan:
    """The plan of a pruning's options, for a model of so many layers and visual tokens."""
    if not options["stages"]:
        return Plan("none")
    rank = Rank(components=options["rank"]) if options["method"] == "lofi" else None
    return make_plan(options["method"], options["stages"], layers=layers, visual_tokens=tokens, rank=rank)
