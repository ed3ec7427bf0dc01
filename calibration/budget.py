"""How much consistency may be given up, and the fewest parts to keep high for that. Knows numbers; measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokprune.calibration.sensitivity import Cost
from tokprune.calibration.trial import Difference
from tokprune.runtime.errors import UserError

LEAST, MOST = ("agreement", "top1"), ("kl",)


@dataclass(frozen=True)
class Budget:
    """At least an ``agreement`` or ``top1`` share, or at most a mean ``kl``."""

    name: str
    limit: float

    def value(self, found: Difference) -> float:
        """What is held against the limit."""
        return {"agreement": found.agreement, "top1": found.top1_agreement, "kl": found.kl_mean}[self.name]

    def holds(self, found: Difference) -> bool:
        return self.value(found) >= self.limit if self.name in LEAST else self.value(found) <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {'≥' if self.name in LEAST else '≤'} {self.limit:g}"


def parse_budget(text: str) -> Budget:
    """``agreement=0.99``, ``top1=0.995`` or ``kl=0.01``. Raises UserError for anything else."""
    name, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = -1.0
    if (name in LEAST and 0 < limit <= 1) or (name in MOST and 0 < limit < float("inf")):
        return Budget(name, limit)
    raise UserError(
        f"--budget {text} is none: give agreement=0.99, top1=0.99 (shares up to 1) or kl=0.01 (nats, over 0)"
    )


@dataclass(frozen=True)
class Found:
    """The parts that stay high, in the order in which they were kept, and what the rest changes; ``met`` the budget."""

    kept: tuple[str, ...]
    difference: Difference
    met: bool


def dearest_first(costs: Mapping[str, Cost]) -> list[str]:
    """Parts by the divergence that they cost for each byte that they save."""
    return sorted(costs, key=lambda part: -costs[part].difference.kl_mean / max(1, costs[part].bytes_saved))


def search(
    order: Sequence[str],
    budgets: Iterable[Budget],
    measure: Callable[[Sequence[str]], Difference],
    always: Sequence[str] = (),
) -> Found:
    """The fewest of ``order``, the dearest parts first, that have to stay high beside those of ``always``.

    ``measure`` says what the others change. Halves the range, as if keeping one more never made it worse; what is found
    has been measured. Of all parts at least one is rounded, so that a budget may not be met.
    """
    limits = list(budgets)
    order = [part for part in order if part not in always]
    seen: dict[int, Difference] = {}

    def holds(count: int) -> bool:
        if count not in seen:
            seen[count] = measure([*always, *order[:count]])
        return all(budget.holds(seen[count]) for budget in limits)

    low, high = 0, max(0, len(order) - 1)
    while low < high:
        middle = 0 if low == 0 and 0 not in seen else (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    met = holds(high)
    return Found((*always, *order[:high]), seen[high], met)
