"""What is measured: configurations, their names, and the grid that is run unless others are named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokprune.export.lvpruning.modules import Modules, load_modules
from tokprune.runtime import names
from tokprune.runtime.bundle import sha256
from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.plan import Plan, lvpruning_stages, make_plan, parse_rank, parse_stage

TRAINING_FREE = ("lofi", "fastv", "random", "uniform")
RANK = "8"  # the default of tokprune-export
SINGLES = {0: (64, 24, 16), 1: (64, 32, 16), 2: (64, 16), 4: (16,)}  # keeps of one-stage plans by layer


@dataclass(frozen=True)
class Configuration:
    """A plan with a name, METHOD-STAGES[-rRANK][-sSEED], as lofi-1:346,2:230-r8; ``modules`` for lvpruning only."""

    name: str
    plan: Plan
    modules: Modules | None = None
    digest: str = ""  # of the modules: trained again, they are another configuration

    @property
    def stages(self) -> str:
        """The plan's stages as they are in names."""
        return stages_text((stage.layer, stage.keep) for stage in self.plan.stages)


def named(name: str, facts: ModelFacts) -> Configuration:
    """The configuration of that name. Raises UserError for a plan that the model does not have."""
    method, _, rest = name.partition("-")
    stages, *extras = rest.split("-")
    given = {extra[0]: extra[1:] for extra in extras}
    plan = make_plan(
        method,
        [parse_stage(stage, facts.vision.tokens) for stage in stages.split(",") if stage],
        layers=facts.layers,
        visual_tokens=facts.vision.tokens,
        rank=parse_rank(given["r"]) if "r" in given else None,
        seed=int(given.get("s", 0)),
    )
    return Configuration(name, plan)


def trained(directory: Path, facts: ModelFacts) -> list[Configuration]:
    """What a directory of lvpruning's modules is for; a single module also keeps the other counts of the grid."""
    modules, digest = load_modules(directory), sha256(directory / names.MODULES_FILE)[:8]
    own = [(stage.layer, stage.keep) for stage in modules.stages]
    layer, keep = own[0]
    others = [other for other in SINGLES.get(layer, ()) if other != keep] if len(own) == 1 else []
    found = []
    for stages in [own, *([(layer, other)] for other in others)]:
        plan = make_plan(
            "lvpruning", stages, layers=facts.layers, visual_tokens=facts.vision.tokens, module=modules.module
        )
        found.append(Configuration(f"lvpruning-{stages_text(stages)}", plan, modules, digest))
    return found


def stages_text(stages: Iterable[tuple[int, int]]) -> str:
    """L:K,L:K."""
    return ",".join(f"{layer}:{keep}" for layer, keep in stages)


def default_grid(facts: ModelFacts) -> list[str]:
    """Names of the training-free configurations of the published study; made for the demo model's eight layers.

    Its questions are answered mostly within layers 0 and 1, so there are most points there. lofi's ranks and random's
    draws vary where few tokens are kept, and all methods stand at the stages that lvpruning's modules have.
    """
    three = stages_text(lvpruning_stages(facts.layers, facts.vision.tokens))
    stages = [f"{layer}:{keep}" for layer, keeps in SINGLES.items() for keep in keeps] + [three]
    grid = ["none"]
    for text in stages:
        for method in TRAINING_FREE:
            if method != "fastv" or not text.startswith("0:"):  # fastv scores by the layer before
                grid.append(f"{method}-{text}" + {"lofi": f"-r{RANK}", "random": "-s0"}.get(method, ""))
    grid += [f"lofi-1:16-r{rank}" for rank in (4, 16, 32)]
    grid += [f"random-{text}-s{seed}" for text in ("0:64", "1:16") for seed in (1, 2)]
    return grid
