"""Jetson modules: what memory each has, whether a memory plan fits it, and what would fit instead.

Knows nothing of the device it runs on. No figure here was measured on a Jetson: RAM is the vendor's, the rest are
assumptions that are stated where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokprune.runtime.memory import MemoryPlan, memory_plan
from tokprune.runtime.weights import PRECISIONS


@dataclass(frozen=True)
class JetsonModule:
    """``ram`` in bytes, shared by CPU and GPU."""

    name: str
    ram: int


MODULES = (
    JetsonModule("AGX Orin 64", 64 * 10**9),
    JetsonModule("AGX Orin 32", 32 * 10**9),
    JetsonModule("Orin NX 16", 16 * 10**9),
    JetsonModule("Orin Nano 8", 8 * 10**9),
)
# Of Orin Nano's 8 GB about 7.6 are usable; the same share is assumed of the others.
USABLE_SHARE = 0.95
# Assumed: system without desktop, Python, CUDA context, TensorRT's libraries.
RESERVED_BYTES = 10**9
# On modules of 8 GB a contiguous 1 GiB was seen to fail for an LM head; from a quarter of that on splitting it is
# advised, which is a guess.
SMALL_RAM, CONTIGUOUS_BYTES = 8 * 10**9, 250 * 10**6


def available_bytes(module: JetsonModule) -> int:
    """What is left for weights, caches and activations."""
    return round(USABLE_SHARE * module.ram) - RESERVED_BYTES


def verdict(plan: MemoryPlan, module: JetsonModule) -> dict[str, Any]:
    """Whether TensorRT runs ``plan`` on ``module`` and builds its engines there; if not, ``instead`` says what does."""
    room = available_bytes(module)
    run, build = plan.tensorrt_bytes <= room, plan.build_bytes <= room
    return {
        "name": module.name,
        "available_bytes": room,
        "run": run,
        "build": build,
        "instead": list(_instead(plan, module, room, run, build)),
    }


def memory_record(plan: MemoryPlan) -> dict[str, Any]:
    """The object that ``tokprune memory --json`` prints: the plan, and each module's verdict on it."""
    return plan.record() | {"modules": [verdict(plan, module) for module in MODULES]}


def _instead(plan: MemoryPlan, module: JetsonModule, room: int, run: bool, build: bool) -> Iterator[str]:
    lower = PRECISIONS[PRECISIONS.index(plan.precision) + 1 :]
    smaller = [memory_plan(plan.facts, plan.plan, precision, plan.work, None, plan.capacity) for precision in lower]
    if not run:
        found = [*_smaller_caches(plan, room)]
        fitting = next((other for other in smaller if capacity_that_fits(other, room)), None)
        if fitting is not None:
            whole = fitting.tensorrt_bytes <= room
            how = f", {fitting.tensorrt_bytes / 1e9:.1f} GB" if whole else f" exported with {_shorter(fitting, room)}"
            found.append(fitting.precision + how)
        yield "run: " + (" or ".join(found) or "no precision fits")
    if not build:
        fitting = next((other for other in smaller if other.build_bytes <= room), None)
        if fitting is not None:
            yield f"build: {fitting.precision}, {fitting.build_bytes / 1e9:.1f} GB"
        else:
            yield "build: no precision, only shorter segments, with a stage more"
    head = plan.weights[-1]
    if module.ram <= SMALL_RAM and head.largest_bytes >= CONTIGUOUS_BYTES:
        yield f"export with --split-lm-head: {head.largest_bytes / 1e6:.0f} MB in one piece may not be had"


def _smaller_caches(plan: MemoryPlan, room: int) -> Iterator[str]:
    batches = (replace(plan.work, batch=batch) for batch in range(plan.work.batch - 1, 0, -1))
    fewer = (
        memory_plan(plan.facts, plan.plan, plan.precision, work, plan.weights, plan.capacity, plan.base)
        for work in batches
    )
    fitting = next((other for other in fewer if other.tensorrt_bytes <= room), None)
    if fitting is not None:
        yield f"batch {fitting.work.batch}"
    if capacity_that_fits(plan, room):
        yield f"exported with {_shorter(plan, room)}"


def _shorter(plan: MemoryPlan, room: int) -> str:
    return f"--max-kv-cache-capacity {capacity_that_fits(plan, room)} instead of {plan.capacity}"


def capacity_that_fits(plan: MemoryPlan, room: int) -> int:
    """The greatest capacity of KV caches with which ``plan`` runs in ``room`` bytes; 0 if its work then has no room."""
    least, most = plan.work.length(plan.facts), plan.capacity
    if replace(plan, capacity=least).tensorrt_bytes > room:
        return 0
    while least < most:  # peaks grow with the capacity
        middle = (least + most + 1) // 2
        if replace(plan, capacity=middle).tensorrt_bytes <= room:
            least = middle
        else:
            most = middle - 1
    return least
