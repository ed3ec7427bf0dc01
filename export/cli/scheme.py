"""How matrices are rounded, on the command line: the options that ``quantize`` and ``export`` have in common."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click

from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.recipe import RANGES, SCHEMES, Choice

ROUND, SMOOTH = "round", "smoothquant"
THROUGH = ("pruned", "unpruned")
Command = TypeVar("Command", bound=Callable)


@dataclass(frozen=True)
class Asked:
    """What was said; None where nothing was."""

    scheme: str | None = None
    data: Path | None = None
    samples: int | None = None
    seed: int | None = None
    range: str | None = None
    through: str | None = None

    @property
    def form(self) -> Choice:
        """What becomes of each matrix that is rounded."""
        from tokprune.calibration.recipe import usual_form

        return usual_form(self.scheme or ROUND, self.range or "max")

    def refuse(self, why: str) -> None:
        """Raise UserError if anything was said."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                raise UserError(f"--{field.name} was given {why}")

    def check(self, choices: Mapping[str, Choice], precision: str, *, uses_data: bool = False) -> None:
        """Raise UserError for what does not go together.

        ``choices`` that look at activations need data; others need none, unless something else ``uses_data``.
        """
        if self.scheme == SMOOTH and precision != "int8":
            raise UserError(
                f"scheme '{SMOOTH}' rounds activations to INT8 as well, {precision} was asked for: choose --precision "
                "int8, or --scheme awq"
            )
        if self.range is not None and self.scheme != SMOOTH:
            raise UserError(
                f"--range was given for scheme '{self.scheme or ROUND}', which leaves activations as they are: drop it"
            )
        looks = any(choice.calibrated for choice in choices.values())
        if looks and self.data is None:
            scheme = f"scheme '{self.scheme}'" if self.scheme else "the recipe"
            raise UserError(
                f"{scheme} looks at activations, and --data was not given: give a file of JSON lines with image, "
                "prompt and answer"
            )
        if not looks and not uses_data:
            rest = dataclasses.replace(self, scheme=None)
            rest.refuse(f"for scheme '{ROUND}', which looks at no activations: drop it, or choose another --scheme")

    def scheme_of(self, bundle: Bundle, choices: Mapping[str, Choice]):
        """What `quantize` asks about the tensors of ``bundle``; None if ``choices`` look at no activations.

        Observes, with a progress bar. Raises UserError for data at fault.
        """
        from tokprune.calibration.calibrated import Calibrated
        from tokprune.calibration.observe import SAMPLES, Settings, observe
        from tokprune.runtime.data import read_samples

        if not any(choice.calibrated for choice in choices.values()):
            return None
        assert self.data is not None  # `check` saw to it
        samples = read_samples(self.data)
        count = min(SAMPLES, len(samples)) if self.samples is None else self.samples
        settings = Settings(count, self.seed or 0, self.through or THROUGH[0])
        with click.progressbar(length=count, label="observing samples", file=sys.stderr) as bar:
            statistics = observe(bundle, samples, settings, lambda done, total: bar.update(done - bar.pos))
        return Calibrated(bundle, choices, statistics)


def scheme_options(command: Command) -> Command:
    """Add the options; the command gets them by the names of `Asked`'s fields, ``seed`` being its own."""
    options = (
        click.option(
            "--scheme",
            type=click.Choice(SCHEMES),
            help="int8, int4: to nearest; by AWQ's search; or, int8 only, activations too, after SmoothQuant's "
            f"migration. [default: {ROUND}]",
        ),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="awq, smoothquant: JSON lines of image, prompt, answer to calibrate on. Not what is measured on.",
        ),
        click.option("--samples", type=click.IntRange(min=1), help="Of --data, drawn by seed. [default: 128, or all]"),
        click.option("--range", type=click.Choice(RANGES), help="smoothquant: of activations. [default: max]"),
        click.option(
            "--through",
            type=click.Choice(THROUGH),
            help="What is calibrated on: activations as they are, or as they would be if nothing were pruned. "
            f"[default: {THROUGH[0]}]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
