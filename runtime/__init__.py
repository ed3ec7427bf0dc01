"""What goes onto the device: bundles, sessions, caches, generation, FLOPs, metrics and the command line.

Knows NumPy, Pillow, tokenizers, click and one engine library. Knows no torch, no transformers, no onnx
and no sibling folder of tokprune.
"""

from tokprune.runtime.errors import UserError
from tokprune.runtime.version import __version__

__all__ = ["UserError", "__version__"]
