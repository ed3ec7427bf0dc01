"""Traced segments that all processes of a session share: tracing one takes seconds, whichever process does it.

Only what is traced is shared: weights are placed, graphs checked and bundles written for each export anew.
"""

import hashlib
import os
import pickle
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from tokprune.export.pipeline import export
from tokprune.export.trace import WEIGHT
from tokprune.runtime.manifest import Manifest


class SharedGraphs(dict[tuple, ir.Model]):
    """``Graphs`` that looks for a segment in ``folder`` too. Checkpoints of one config.json have the same graphs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, tuple)
        if not super().__contains__(key) and (file := self._file(key)).exists():
            graph, weights = pickle.loads(file.read_bytes())
            self[key] = ir.from_proto(onnx.ModelProto.FromString(graph))
            for name, source in weights.items():
                self[key].graph.initializers[name].meta[WEIGHT] = source
        return super().__contains__(key)

    def _keep(self) -> None:
        """Write down what an export has traced; its weights have places by now, as a file needs."""
        for key, model in self.items():
            if not (file := self._file(key)).exists():
                values = model.graph.initializers.items()
                weights = {name: value.meta[WEIGHT] for name, value in values if WEIGHT in value.meta}
                handle, written = tempfile.mkstemp(dir=self._folder)
                with os.fdopen(handle, "wb") as out:
                    pickle.dump((ir.to_proto(model).SerializeToString(), weights), out)
                Path(written).rename(file)  # another process may do the same: the last one stays

    def _file(self, key: tuple) -> Path:
        path, *rest = key
        return self._folder / hashlib.sha256((path / "config.json").read_bytes() + repr(rest).encode()).hexdigest()

    def export(self, *args, **options) -> Manifest:
        """`export` with these graphs."""
        try:
            manifest = export(*args, **options | {"graphs": self})
        except BaseException:
            self.clear()  # of what was traced just now, weights may have no places
            raise
        self._keep()
        return manifest
