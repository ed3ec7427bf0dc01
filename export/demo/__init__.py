"""The demo model: a small LLaVA-1.5 of our own, trained on scenes of handwritten digits.

`checkpoint/` is an ordinary Hugging Face checkpoint directory that ships as package data, and so do LVPruning's
modules for it in `modules/`, as `tokprune train` wrote them. This
package knows how to draw its scenes, train it and score it; nothing here knows about ONNX or pruning.
"""

from __future__ import annotations

from pathlib import Path


def checkpoint_dir() -> Path:
    """The directory of the shipped checkpoint."""
    return Path(__file__).resolve().parent / "checkpoint"


MODULES = ("default", "early")  # lvpruning's: for the default stages; for 24 tokens from the first layer on, guided


def modules_dir(name: str = "default") -> Path:
    """The directory of one of the shipped ``MODULES``."""
    return Path(__file__).resolve().parent / "modules" / name
