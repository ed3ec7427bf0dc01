"""Verdicts on Jetson modules: who fits, and what is said to those that do not."""

from __future__ import annotations

import pytest

from tokprune.runtime.flops import SEVEN_B, THIRTEEN_B
from tokprune.runtime.jetson import MODULES, available_bytes, capacity_that_fits, verdict
from tokprune.runtime.memory import MemoryPlan, Work, memory_plan
from tokprune.runtime.plan import Plan, Rank, Stage

AGX_64, AGX_32, NX, NANO = MODULES
LOFI = Plan("lofi", (Stage(2, 64),), Rank(8))


def seven(precision: str, plan: Plan = LOFI, **work: int) -> MemoryPlan:
    return memory_plan(SEVEN_B, plan, precision, Work(**work))


def test_usable_memory() -> None:
    assert available_bytes(NANO) == 6_600_000_000  # 7.6 GB usable, 1 GB reserved
    assert [module.ram // 10**9 for module in MODULES] == [64, 32, 16, 8]


@pytest.mark.parametrize(
    ("precision", "runs", "builds"),
    [
        ("fp32", "AGX Orin 64", ""),
        ("fp16", "AGX Orin 64, AGX Orin 32", "AGX Orin 64"),
        ("int8", "AGX Orin 64, AGX Orin 32, Orin NX 16", "AGX Orin 64, AGX Orin 32"),
        ("int4", "AGX Orin 64, AGX Orin 32, Orin NX 16, Orin Nano 8", "AGX Orin 64, AGX Orin 32, Orin NX 16"),
    ],
)
def test_7b_by_precision(precision: str, runs: str, builds: str) -> None:
    found = [verdict(seven(precision), module) for module in MODULES]
    assert ", ".join(one["name"] for one in found if one["run"]) == runs
    assert ", ".join(one["name"] for one in found if one["build"]) == builds


def test_says_what_would_fit() -> None:
    assert verdict(seven("fp16"), AGX_64)["instead"] == []
    assert verdict(seven("fp16"), NX)["instead"] == ["run: int8, 9.6 GB", "build: int4, 13.6 GB"]
    (run, build, head) = verdict(seven("fp16"), NANO)["instead"]
    assert run == "run: int4, 6.5 GB"
    assert build.startswith("build: no precision")
    assert head.startswith("export with --split-lm-head: 263 MB")
    assert "run: no precision fits" in verdict(memory_plan(THIRTEEN_B, Plan("none"), "fp16"), NANO)["instead"]


def test_keep_decides_where_caches_do() -> None:
    """Two prompts of 7B in INT4: unpruned their caches are too much for the smallest module."""
    work = Work(batch=2)
    pruned, full = (memory_plan(SEVEN_B, plan, "int4", work, capacity=2000) for plan in (LOFI, Plan("none")))
    assert verdict(pruned, NANO)["run"]
    assert not verdict(full, NANO)["run"]
    assert verdict(full, NANO)["instead"][0].startswith("run: batch 1 or exported with --max-kv-cache-capacity 1779 ")


def test_smaller_caches_that_fit_do_fit() -> None:
    plan = seven("int4", Plan("none"), batch=2)
    room = available_bytes(NANO)
    most = capacity_that_fits(plan, room)
    assert 740 < most < 4096  # the work's length, the model's context
    for capacity, fits in ((most, True), (most + 1, False)):
        made = memory_plan(SEVEN_B, Plan("none"), "int4", Work(batch=2), capacity=capacity)
        assert (made.tensorrt_bytes <= room) == fits
    run = f"run: exported with --max-kv-cache-capacity {most} instead of 4096"
    assert run in verdict(plan, NANO)["instead"]
    assert capacity_that_fits(seven("fp16"), room) == 0
