"""The demo model: a small LLaVA-1.5 of our own, trained on scenes of handwritten digits.

`checkpoint/` is an ordinary Hugging Face checkpoint directory that ships as package data. This
package knows how to draw its scenes, train it and score it; nothing here knows about ONNX or pruning.
"""

from __future__ import annotations

from pathlib import Path


def checkpoint_dir() -> Path:
    """The directory of the shipped checkpoint."""
    return Path(__file__).resolve().parent / "checkpoint"


def modules_dir() -> Path:
    """The directory of the shipped modules for method lvpruning."""
    return Path(__file__).resolve().parent / "modules"
