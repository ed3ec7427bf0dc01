"""A training under way, on disk: one safetensors file beside the modules to be. Knows no model and no data.

It holds the modules' weights and AdamW's moments, and in its header, as JSON, the step and the settings. One file
that is renamed into place is whole whenever the process ends.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokprune.runtime.errors import UserError

_NOTE = "tokprune.train"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where a training stands. ``recent`` are the last steps' figures, ``scaler`` the loss scaling's state."""

    step: int
    seconds: float
    recent: list[dict[str, Any]]
    scaler: dict[str, Any]


def state_path(out: Path) -> Path:
    """Where the training of the modules ``out`` keeps its state."""
    return out.with_name(f"{out.name}.state.safetensors")


def save_state(
    path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], progress: Progress
) -> None:
    """Write the state, whole or not at all; at least one step was taken."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in modules.named_parameters():
        tensors[f"weights.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
        taken = float(optimizer.state[parameter]["step"])  # fewer than steps where loss scaling skipped one
    note = json.dumps({"settings": settings, "taken": taken, **vars(progress)})
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={_NOTE: note})
    os.replace(partial, path)


def load_state(
    path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Progress | None:
    """Put the state at ``path`` into modules and optimizer; None if there is none.

    Raises UserError if it was saved under other ``settings``, naming the first, or is damaged.
    """
    if not path.exists():
        return None
    again = "give --restart to begin again"
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads(file.metadata()[_NOTE])
            for key, asked in settings.items():
                found = note["settings"].get(key)
                if found != asked:
                    raise UserError(
                        f"the training under way at {path} has {key} {found}, {asked} was asked for: "
                        f"ask for the same, or {again}"
                    )
            with torch.no_grad():
                for name, parameter in modules.named_parameters():
                    parameter.copy_(file.get_tensor(f"weights.{name}"))
                    moments = {key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in _MOMENTS}
                    optimizer.state[parameter] = {"step": torch.tensor(note["taken"]), **moments}
            return Progress(note["step"], note["seconds"], note["recent"], note["scaler"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"the state {path} of a training under way cannot be read ({error}): {again}") from None
