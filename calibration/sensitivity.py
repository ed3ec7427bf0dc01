"""What each part of a model costs in consistency if it alone is rounded: measured, kept, and used again.

Kept in a file of the bundle, a part at a time, so that what was interrupted goes on where it was. Writes no bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokprune.calibration.mixed import part_of
from tokprune.calibration.statistics import FOLDER
from tokprune.calibration.trial import ANSWER, Difference, Trial
from tokprune.runtime.bundle import Bundle, sha256
from tokprune.runtime.data import Sample
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import read_as
from tokprune.runtime.recipe import Recipe

SCHEMA = 1


@dataclass(frozen=True)
class Cost:
    """Of a part: what rounding it alone changes, the bytes that it saves, and its time unrounded and rounded.

    Milliseconds, medians of runs in turns: of a prompt, images included, and of one token, which the tower has not.
    """

    difference: Difference
    bytes_saved: int
    prompt_ms: tuple[float, float]
    token_ms: tuple[float, float]

    @property
    def speed_up(self) -> float:
        """Of a prompt and `trial.ANSWER` tokens: the unrounded part's time over the rounded one's."""
        before, after = (
            prompt + (ANSWER - 1) * token for prompt, token in zip(self.prompt_ms, self.token_ms, strict=True)
        )
        return before / after if after else 1.0


@dataclass(frozen=True)
class Sensitivity:
    """All of a file. ``key`` is a hash of all that it follows from, ``questions`` numbers in the data."""

    schema: int
    key: str
    precision: str
    seed: int
    answer: int  # tokens of an answer at most
    questions: tuple[int, ...]
    parts: dict[str, Cost]

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def choose(count: int, samples: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the questions that costs are measured on, and of as many others, or as there are, to verify on.

    Where the data has no others they are the same. Raises UserError if it has not enough.
    """
    if not 1 <= samples <= count:
        raise UserError(f"{samples} questions were asked for, the data has {count}: ask for 1 to {count}")
    order = [int(number) for number in np.random.default_rng(seed).permutation(count)]
    first, others = order[:samples], order[samples : 2 * samples]
    return tuple(sorted(first)), tuple(sorted(others or first))


def sensitivity_key(base: Bundle, other: Bundle, samples: Sequence[Sample]) -> str:
    """SHA-256 of all that costs follow from: both bundles, and what is asked."""
    digests = {image: sha256(image) for sample in samples for image in sample.images}
    data = [(sample.prompt, [digests[image] for image in sample.images]) for sample in samples]
    bundles = [[file.sha256 for file in bundle.manifest.files] for bundle in (base, other)]
    return hashlib.sha256(json.dumps((SCHEMA, ANSWER, bundles, data)).encode()).hexdigest()


def bytes_saved(recipe: Recipe) -> dict[str, int]:
    """By part, what its rounded matrices take less than in the base."""
    width = 4 if recipe.base == "fp32" else 2
    saved: dict[str, int] = {}
    for matrix in recipe.rounded:
        part = part_of(matrix.name)
        saved[part] = saved.get(part, 0) + width * matrix.shape[0] * matrix.shape[1] - matrix.record.bytes
    return saved


def measure(trial: Trial, found: Sensitivity, recipe: Recipe, where: Path, progress: Callable[[], None]) -> Sensitivity:
    """Costs of all parts that ``recipe`` rounds. Those that ``found`` has are not measured again; each new one is kept
    in ``where`` at once. ``progress`` hears of each question asked.
    """
    saved = bytes_saved(recipe)
    missing = [part for part in saved if part not in found.parts]
    times = trial.time(missing) if missing else {}
    for part in missing:
        changed = trial.difference([part], progress)
        found.parts[part] = Cost(changed, saved[part], _medians(times[part].prompt), _medians(times[part].token))
        store(found, where)
    return dataclasses.replace(found, parts={part: found.parts[part] for part in saved})


def _medians(pair: tuple[list[float], list[float]]) -> tuple[float, float]:
    """0 of what was not run."""
    before, after = (float(np.median(times)) if times else 0.0 for times in pair)
    return before, after


def sensitivity_file(base: Bundle, key: str) -> Path:
    """Where costs are kept: in the bundle that they are of."""
    return base.path / FOLDER / f"sensitivity-{key[:16]}.json"


def read_sensitivity(where: Path, key: str) -> Sensitivity | None:
    """What was kept, whole or not; None if there is nothing of that ``key``. Raises UserError if it is damaged."""
    if not where.exists():
        return None
    try:
        data = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): delete it, it will be measured again") from None
    found: Sensitivity = read_as(Sensitivity, data, "sensitivity", str(where))
    return found if (found.schema, found.key) == (SCHEMA, key) else None


def store(found: Sensitivity, where: Path) -> None:
    """Keep ``found``, whole or not at all. Raises UserError if the bundle cannot be written to."""
    try:
        where.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=where.parent, prefix=".", delete=False, encoding="utf-8") as file:
            file.write(found.to_json())
        Path(file.name).replace(where)
    except OSError as error:
        raise UserError(
            f"what was measured cannot be kept in {where.parent} ({error.strerror}): copy the bundle to where it can"
        ) from None
