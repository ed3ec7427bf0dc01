"""``quantize_within``: the smallest recipe that keeps within a budget of consistency, found by measuring.

All matrices are rounded, in a directory that goes away; what each part costs is measured on a mix of both bundles
(`calibration.mixed`), the dearest parts are put back until the rest keeps within the budget, and the bundle that comes
of it is measured as it will run, on other questions where there are some.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.calibration.budget import Budget, Found, dearest_first, search
from tokprune.calibration.mixed import part_of
from tokprune.calibration.scheme import Scheme
from tokprune.calibration.sensitivity import SCHEMA as SENSITIVITY_SCHEMA
from tokprune.calibration.sensitivity import (
    Cost,
    Sensitivity,
    bytes_saved,
    choose,
    measure,
    read_sensitivity,
    sensitivity_file,
    sensitivity_key,
)
from tokprune.calibration.trial import ANSWER, Difference, Trial
from tokprune.export.bundle import staged
from tokprune.export.quantize import check_base, write_quantized
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.chat import Model
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Manifest
from tokprune.runtime.recipe import BASE, Choice, Recipe

SENSITIVITY_FILE = "sensitivity.json"  # in the quantised bundle, what its recipe was chosen by
SIZE, SPEED = "size", "speed"
_ALL = "all"  # where everything is rounded, for a while


@dataclass(frozen=True)
class Wanted:
    """``purpose`` "size" rounds all that the budgets allow, "speed" of that only what was measured faster."""

    budgets: tuple[Budget, ...]
    purpose: str = SIZE
    samples: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """``found`` on the questions of the sensitivity; ``verified`` on ``questions``, ``fresh`` if these are others."""

    sensitivity: Sensitivity
    found: Found
    verified: Difference
    questions: tuple[int, ...]
    fresh: bool

    def record(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "kept": list(self.found.kept),
            "measured": self.found.difference.record(),
            "verified": self.verified.record() | {"questions": list(self.questions), "others": self.fresh},
            "parts": {
                part: dataclasses.asdict(cost) | {"speed_up": cost.speed_up}
                for part, cost in self.sensitivity.parts.items()
            },
        }


class BudgetMissed(Exception):
    """No recipe keeps within the budget; nothing was written. ``outcome`` is the nearest."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__("no recipe keeps within the budget")
        self.outcome = outcome


def quantize_within(
    bundle: Bundle,
    out: Path,
    precision: str,
    choices: Mapping[str, Choice],
    samples: Sequence[Sample],
    wanted: Wanted,
    scheme: Callable[[Mapping[str, Choice]], Scheme | None] = lambda choices: None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> tuple[Manifest, Recipe, Outcome]:
    """Write the quantised ``bundle`` of the smallest recipe within the budgets to ``out``, whole or not at all.

    ``choices`` are what would be written without a budget, ``scheme`` makes theirs. ``progress`` hears (step, done, of
    how many). Raises BudgetMissed, and UserError as `quantize` does or for too little data.
    """
    check_base(bundle, precision)
    if out.resolve() == bundle.path.resolve():
        raise UserError(f"--out {out} is the bundle itself, which would be lost: choose another --out")
    first, others = choose(len(samples), wanted.samples, wanted.seed)
    with staged(out) as stage:
        whole = stage / _ALL
        whole.mkdir()
        progress("rounding all matrices", 0, 1)
        manifest, recipe = write_quantized(bundle, whole, precision, choices, scheme(choices))
        other = Bundle(whole, manifest)
        sensitivity, found = _search(bundle, other, recipe, samples, first, wanted, progress)
        if len(found.kept) == len(sensitivity.parts):
            raise UserError(f"no part of the model was measured faster in {precision} here: quantise it for size")
        trial = Trial(bundle, other, [samples[number] for number in others])
        try:
            trial.answer(_steps(progress, "answers to verify on", len(others)))
            parts = list(sensitivity.parts)
            order = [*found.kept, *(part for part in dearest_first(sensitivity.parts) if part not in found.kept)]
            for count in range(len(found.kept), len(parts)):
                kept = order[:count]
                mixed = _keep(choices, kept, sensitivity, wanted)
                extras = {SENSITIVITY_FILE: sensitivity.to_json().encode()}
                manifest, recipe = write_quantized(bundle, stage, precision, mixed, scheme(mixed), extras=extras)
                step = "verifying" if count == len(found.kept) else f"verifying, {count} parts kept"
                model = Model(Bundle(stage, manifest), "onnxruntime")
                verified = trial.of(model, _steps(progress, step, len(others)))
                now = dataclasses.replace(found, kept=tuple(kept))
                outcome = Outcome(sensitivity, now, verified, others, others != first)
                if found.met and all(budget.holds(verified) for budget in wanted.budgets):
                    shutil.rmtree(whole)
                    return manifest, recipe, outcome
                del model
                for path in stage.iterdir():
                    if path != whole:
                        path.unlink()
                if not found.met:
                    break
        finally:
            trial.close()
        raise BudgetMissed(outcome)


def _search(
    bundle: Bundle,
    other: Bundle,
    recipe: Recipe,
    samples: Sequence[Sample],
    questions: tuple[int, ...],
    wanted: Wanted,
    progress: Callable[[str, int, int], None],
) -> tuple[Sensitivity, Found]:
    """What each part costs, and which ones have to stay."""
    own = [samples[number] for number in questions]
    key = sensitivity_key(bundle, other, own)
    where = sensitivity_file(bundle, key)
    fresh = Sensitivity(SENSITIVITY_SCHEMA, key, recipe.precision, wanted.seed, ANSWER, questions, {})
    known = read_sensitivity(where, key) or fresh
    trial = Trial(bundle, other, own)
    try:
        trial.answer(_steps(progress, "answers of the unquantised bundle", len(own)))
        ahead = len(set(bytes_saved(recipe)) - set(known.parts))
        costs = measure(trial, known, recipe, where, _steps(progress, "cost of each part", ahead * len(own)))
        slow = [part for part, cost in costs.parts.items() if wanted.purpose == SPEED and cost.speed_up <= 1]

        def change(kept: Sequence[str]) -> Difference:
            rounded = [part for part in costs.parts if part not in kept]
            return trial.difference(rounded, _steps(progress, f"{len(rounded)} parts rounded", len(own)))

        return costs, search(dearest_first(costs.parts), wanted.budgets, change, slow)
    finally:
        trial.close()


def _steps(progress: Callable[[str, int, int], None], step: str, total: int) -> Callable[[], None]:
    """Count calls, and tell."""
    done = 0

    def one() -> None:
        nonlocal done
        done += 1
        progress(step, done, total)

    return one


def _keep(
    choices: Mapping[str, Choice], kept: Sequence[str], sensitivity: Sensitivity, wanted: Wanted
) -> dict[str, Choice]:
    """``choices`` with those parts in the base's precision, each with its reason."""
    found = {}
    for name, choice in choices.items():
        cost = sensitivity.parts.get(part_of(name))
        if choice.precision == BASE or cost is None:
            found[name] = choice
        elif part_of(name) in kept:
            found[name] = Choice(reason=f"stays, for {_why_kept(cost, wanted)}: alone {_alone(cost)}")
        else:
            found[name] = dataclasses.replace(choice, reason=f"{_why_rounded(cost, wanted)}; alone {_alone(cost)}")
    return found


def _why_kept(cost: Cost, wanted: Wanted) -> str:
    if wanted.purpose == SPEED and cost.speed_up <= 1:
        return "it was not measured faster"
    return " and ".join(map(str, wanted.budgets))


def _why_rounded(cost: Cost, wanted: Wanted) -> str:
    return "measured faster" if wanted.purpose == SPEED else f"saves {cost.bytes_saved / 1e6:.3g} MB"


def _alone(cost: Cost) -> str:
    changed = 1 - cost.difference.agreement
    return f"KL {cost.difference.kl_mean:.2g}, {100 * changed:.3g} % of answers changed, {cost.speed_up:.2f}× as fast"
