"""Sessions of a graph's pieces in ONNX Runtime, as many at a time as fit. Knows pieces; not what they are run for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from tokprune.calibration.pieces import Piece
from tokprune.runtime.bundle import Bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.making import making_sessions
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.session import Tensor


class Sessions:
    """Holds some ``budget`` bytes of weights, or one piece. To make room, what was not used for longest goes first."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._loaded: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()  # the last used one at the end

    def run(
        self,
        bundle: Bundle,
        segment: SegmentFacts,
        at: Hashable,
        piece: Piece,
        options: Callable[[], Any],
        wanted: Sequence[str],
        values: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """The outputs ``wanted`` of the ``piece`` known as ``at``, which is loaded with ``options`` if it is not there.

        Raises UserError if ONNX Runtime cannot load or run it.
        """
        where = bundle.file(segment.file)
        session = self._session(bundle, where, at, piece, options)
        try:
            return session.run_with_ort_values(list(wanted), {name: values[name] for name in piece.inputs})
        except Exception as error:  # ONNX Runtime's exceptions have no narrower base
            raise UserError(f"ONNX Runtime cannot run {where} ({error}): export the bundle again") from error

    def _session(self, bundle: Bundle, where: Path, at: Hashable, piece: Piece, options: Callable[[], Any]) -> Any:
        if at not in self._loaded:
            while self._loaded and piece.size + sum(size for size, _ in self._loaded.values()) > self._budget:
                self._loaded.popitem(last=False)
            chosen = options()
            folder = str(bundle.path.resolve())
            chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            try:
                with making_sessions():
                    session = onnxruntime.InferenceSession(piece.graph, chosen, providers=["CPUExecutionProvider"])
            except Exception as error:  # as above
                raise UserError(f"ONNX Runtime cannot load {where} ({error}): export the bundle again") from error
            self._loaded[at] = (piece.size, session)
        self._loaded.move_to_end(at)
        return self._loaded[at][1]
