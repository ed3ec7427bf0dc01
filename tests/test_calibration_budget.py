"""Budgets, and the search for the fewest parts that have to stay, on costs that are made up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tokprune.calibration.budget import Budget, Found, dearest_first, parse_budget, search
from tokprune.calibration.sensitivity import Cost
from tokprune.calibration.trial import Difference
from tokprune.runtime.errors import UserError

COSTS = {"a": 0.1, "b": 0.5, "c": 0.01, "d": 0.2}  # KL of each part
ORDER = ["b", "d", "a", "c"]


def difference(kl: float) -> Difference:
    return Difference(100, 300, 1 - kl, 1 - kl / 2, kl)


class Meter:
    """Says what the parts that are not kept cost together, and counts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, kept: Sequence[str]) -> Difference:
        self.asked.append(tuple(kept))
        return difference(sum(cost for part, cost in COSTS.items() if part not in kept))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("agreement=0.99", Budget("agreement", 0.99)),
        ("top1=1", Budget("top1", 1.0)),
        ("kl=1e-3", Budget("kl", 0.001)),
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "kl", "kl=", "kl=-1", "kl=0", "kl=inf", "kl=nan", "agreement=99", "agreement=0", "loss=1", "top1=x"]
)
def test_no_budget(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget .* is none: give agreement=0.99"):
        parse_budget(text)


def test_limits_hold_at_their_value() -> None:
    found = difference(0.1)
    for name, limit in (("agreement", 0.9), ("top1", 0.95), ("kl", 0.1)):
        worse = limit + (-1e-9 if name == "kl" else 1e-9)
        assert Budget(name, limit).holds(found)
        assert not Budget(name, worse).holds(found)


def test_dearest_first() -> None:
    """By KL a byte: "d" costs less than "b" but saves little."""
    costs = {part: Cost(difference(kl), 10 if part == "d" else 100, (1, 1), (1, 1)) for part, kl in COSTS.items()}
    assert dearest_first(costs) == ["d", "b", "a", "c"]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1.0, 0), (0.81, 0), (0.32, 1), (0.31, 1), (0.3, 2), (0.11, 2), (0.1, 3), (0.01, 3)],
)
def test_fewest(limit: float, kept: int) -> None:
    """What is left of 0.81 when 0, 1, 2 and 3 of them are kept: 0.81, 0.31, 0.11, 0.01."""
    meter = Meter()
    found = search(ORDER, [Budget("kl", limit + 1e-9)], meter)
    assert found.kept == tuple(ORDER[:kept])
    assert found.met
    assert found.difference.kl_mean == pytest.approx(sum(COSTS[part] for part in ORDER[kept:]))
    assert found.kept in meter.asked  # what is said has been measured
    assert len(meter.asked) == len(set(meter.asked)) <= 3


def test_all_budgets_hold() -> None:
    found = search(ORDER, [Budget("kl", 0.5), Budget("agreement", 0.95)], Meter())
    assert found.kept == ("b", "d", "a")


def test_budget_that_cannot_be_met() -> None:
    """One part is rounded in any case: what is found is the nearest."""
    found = search(ORDER, [Budget("kl", 0.001)], Meter())
    assert found == Found(("b", "d", "a"), difference(COSTS["c"]), False)


def test_parts_that_stay_in_any_case() -> None:
    meter = Meter()
    found = search(ORDER, [Budget("kl", 0.32)], meter, ["c"])
    assert found.kept == ("c", "b")
    assert all(asked[0] == "c" for asked in meter.asked)
    assert search(ORDER, [Budget("kl", 0.32)], Meter(), ORDER).kept == tuple(ORDER)


@pytest.mark.parametrize(
    ("prompt", "token", "speed"), [((8.0, 2.0), (1.0, 1.0), 15 / 9), ((0.0, 0.0), (0.0, 0.0), 1.0)]
)
def test_speed_up(prompt: tuple[float, float], token: tuple[float, float], speed: float) -> None:
    """Of a prompt and the 7 tokens behind an answer's first."""
    assert Cost(difference(0), 1, prompt, token).speed_up == speed
