"""Sessions on TensorRT's engines: one for any segment, and one for decoders, which has caches in place.

Whoever makes them sees to it that engine and segment belong together. See `session.Session`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tokprune.runtime import names
from tokprune.runtime.engines import versions
from tokprune.runtime.engines.caches import Caches
from tokprune.runtime.engines.cuda import DeviceTensor, Memory, Pieces
from tokprune.runtime.engines.graphs import Graph, GraphFailed
from tokprune.runtime.engines.profiles import DECODE, PREFILL
from tokprune.runtime.engines.slot import SegmentEngine
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import SegmentFacts

Shape = tuple[int, ...]
GRAPHS = "TOKPRUNE_CUDA_GRAPHS"  # in the environment: 0 for none, to compare, or where one is suspected


class EngineSession:
    """One engine and its context. Its own memory is what all contexts share: they take turns."""

    def __init__(
        self, memory: Memory, logger: Any, engine: Any, context: Any, facts: SegmentEngine, segment: SegmentFacts
    ) -> None:
        self._memory, self._logger, self._facts = memory, logger, facts
        self._engine, self._context = engine, context  # the one must not go before the other
        self._outputs = {tensor.name: np.dtype(tensor.dtype) for tensor in segment.outputs}
        self._profile: str | None = None
        # what the context has been told
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._needed = 0  # bytes, for those shapes

    def run(self, feeds: Mapping[str, DeviceTensor], outputs: Sequence[str], spare: int = 0) -> dict[str, DeviceTensor]:
        self._set_shapes({name: tensor.shape for name, tensor in feeds.items()})
        given = {name: self._memory.empty(self._shape_of(name), dtype) for name, dtype in self._outputs.items()}
        self._bind({**feeds, **given})
        self._enqueue()
        self._memory.stream.synchronize()  # its time is its own, and so are its errors
        return {name: given[name] for name in outputs}

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        """Tell the context what it will be given, in the profile that takes it. Raises UserError if none does."""
        if shapes == self._shapes:
            return
        self._shapes, self._addresses = {}, {}  # until all is told, nothing is known
        self._choose_profile(shapes)
        for name, shape in shapes.items():
            self._check(self._context.set_input_shape(name, shape), f"{name} of shape {list(shape)}")
        self._needed = versions.context_bytes(self._context)
        self._shapes = shapes

    def _shape_of(self, output: str) -> Shape:
        return tuple(self._context.get_tensor_shape(output))

    def _bind(self, tensors: Mapping[str, DeviceTensor]) -> bool:
        """Tell the context where everything is; whether it was told the same before, for the same shapes."""
        scratch = self._memory.scratch(self._needed)
        addresses = {name: tensor.address for name, tensor in tensors.items()} | {"": scratch.ptr}
        if addresses == self._addresses:
            return True
        self._addresses = {}
        for name, tensor in tensors.items():
            self._check(self._context.set_tensor_address(name, tensor.address), f"an address for {name}")
        self._context.set_device_memory(scratch.ptr, scratch.allocated_nbytes)
        self._addresses = addresses
        return False

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._memory.stream.ptr), "to run")

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> None:
        """Decode's if the call is one row behind a cache. Raises UserError if no profile takes the shapes."""
        profiles = list(self._facts.profiles)
        fault = ""
        for profile in sorted(profiles, key=(DECODE, PREFILL).index):
            wrong = next((item for item in shapes.items() if not self._takes(profile, *item)), None)
            if wrong is None:
                if profile != self._profile:
                    index = profiles.index(profile)
                    switched = self._context.set_optimization_profile_async(index, self._memory.stream.ptr)
                    self._check(switched, f"profile {profile}")
                    self._profile = profile
                return
            name, shape = wrong
            ranges = self._facts.profiles[profile][name]
            fault = f"{name} of shape {list(shape)}, its engine takes {list(ranges[0])} to {list(ranges[2])}"
        raise UserError(
            f"{self._facts.name} was given {fault}: ask for less at a time, or export with greater limits and build "
            "engines anew"
        )

    def _takes(self, profile: str, name: str, shape: Shape) -> bool:
        ranges = self._facts.profiles[profile].get(name)
        if ranges is None:  # no open axes
            return True
        return all(least <= dim <= most for least, dim, most in zip(ranges[0], shape, ranges[2], strict=True))

    def _check(self, done: bool, what: str) -> None:
        """What TensorRT answers to a call that it takes is True."""
        if not done:
            self._shapes, self._addresses = {}, {}  # whatever it was told, it is to be told again
            raise UserError(
                f"TensorRT refused {what} in {self._facts.name} ({self._logger.last}): build the engines again with "
                "tokprune build"
            )


class DecoderSession(EngineSession):
    """A decoder: what it gives for its caches is a `Caches`, the same for all of them, to be fed back.

    The engine sees C rows of which P are filled, so that the mask [B, P + S] becomes one of [B, C + S], zeros between.
    Decode steps have memory of their own for everything else, always the same; what they give is copied from there,
    and so outlives the next step. Until C changes, two steps then differ by the content of memory alone, and from the
    second on they are launched as a CUDA graph: the first is TensorRT's, to settle in with new shapes. A context that
    is given other shapes or addresses, by another conversation too, loses its graph: TensorRT's own state may change.
    """

    def __init__(
        self,
        memory: Memory,
        logger: Any,
        engine: Any,
        context: Any,
        facts: SegmentEngine,
        segment: SegmentFacts,
        remark: Callable[[str], None],
    ) -> None:
        """``remark`` is told, once, if there will be no graphs, and why."""
        super().__init__(memory, logger, engine, context, facts, segment)
        self._pasts = {tensor.name: tensor for tensor in segment.inputs if tensor.name.startswith("past_key_values.")}
        self._presents = [name for name in self._outputs if name.startswith("present.")]
        self._new = dict(map(names.beside_present, self._presents))  # by past
        self._small = {name: dtype for name, dtype in self._outputs.items() if name not in self._presents}
        self._own: dict[str, DeviceTensor] = {}  # of decode steps
        self._remark = remark
        self._graph: Graph | None = None  # of the shapes and addresses that the context has
        self._records = os.environ.get(GRAPHS) != "0"
        if not self._records:
            remark(f"decode steps of {facts.name} are launched kernel by kernel, as {GRAPHS}=0 asks")

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str], spare: int = 0) -> dict[str, Any]:
        batch, rows = feeds[names.POSITION_IDS].shape
        mask = feeds[names.ATTENTION_MASK]
        past = mask.shape[1] - rows
        given = {name: tensor for name, tensor in feeds.items() if name not in self._pasts}
        if past:
            caches = feeds[next(iter(self._pasts))]
            caches.make_room(past, rows)
            read, new, columns = caches.filled.tensors, caches.new_rows(rows), caches.filled.rows
        else:  # what is new is all that they hold
            caches = self._make_caches(batch, rows, rows + spare)
            read, new, columns = {name: feeds[name] for name in self._pasts}, caches.filled, 0
        shapes = {name: tensor.shape for name, tensor in {**given, **read}.items()}
        self._set_shapes(shapes | {names.ATTENTION_MASK: (batch, columns + rows)})
        is_step = self._profile == DECODE
        if is_step:
            given = {name: self._to_own(name, tensor) for name, tensor in given.items() if tensor is not mask}
        given[names.ATTENTION_MASK] = self._spread(mask, past, columns)
        small = {name: self._room(name, self._shape_of(name), dtype) for name, dtype in self._small.items()}
        written = {self._new[name]: tensor for name, tensor in new.tensors.items()}
        if self._bind({**given, **read, **small, **written}) and is_step:
            self._launch()
        else:
            self._drop_graph()
            self._enqueue()
        if past:
            caches.append(past, new)
        if is_step:
            small = {name: self._copied(tensor) for name, tensor in small.items() if name in outputs}
        self._memory.stream.synchronize()  # its time is its own, and so are its errors
        return {name: caches if name in self._presents else small[name] for name in outputs}

    def _launch(self) -> None:
        """Run a step that is as the last one was, by the graph that the first such step records."""
        try:
            if self._graph is None and self._records:
                self._graph = Graph(self._memory, self._enqueue_for_graph)
            if self._graph is not None:
                self._graph.launch()
                return
        except GraphFailed as error:
            self._drop_graph()
            self._records = False
            name = self._facts.name
            self._remark(f"decode steps of {name} are launched kernel by kernel, a CUDA graph of them failed ({error})")
        self._enqueue()

    def _enqueue_for_graph(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream.ptr):
            raise GraphFailed(f"TensorRT: {self._logger.last}")

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _make_caches(self, batch: int, rows: int, most: int) -> Caches:
        first = next(iter(self._pasts.values()))
        _, heads, _, width = first.shape
        assert isinstance(heads, int)
        assert isinstance(width, int)
        return Caches(self._memory, list(self._pasts), (batch, heads, width), np.dtype(first.dtype), rows, most)

    def _spread(self, mask: DeviceTensor, past: int, columns: int) -> DeviceTensor:
        """[B, P + S] → [B, C + S]: 0 for the ``columns`` that hold nothing."""
        if not past:
            return mask
        batch, total = mask.shape
        rows, item = total - past, mask.dtype.itemsize
        wide = self._room(names.ATTENTION_MASK, (batch, columns + rows), mask.dtype)
        for begin, end, width in ((0, 0, past), (past, columns, rows)):
            source = Pieces(mask.address + begin * item, total * item)
            target = Pieces(wide.address + end * item, (columns + rows) * item)
            self._memory.copy_pieces(target, source, width * item, batch)
        gap = Pieces(wide.address + past * item, (columns + rows) * item)
        self._memory.zero_pieces(gap, (columns - past) * item, batch)
        return wide

    def _room(self, name: str, shape: Shape, dtype: np.dtype) -> DeviceTensor:
        """Memory for a tensor of this call; a decode step's is the last one's where it has the shape."""
        if self._profile != DECODE:
            return self._memory.empty(shape, dtype)
        if name not in self._own or self._own[name].shape != shape:
            self._own[name] = self._memory.empty(shape, dtype)
        return self._own[name]

    def _to_own(self, name: str, tensor: DeviceTensor) -> DeviceTensor:
        return self._copied(tensor, self._room(name, tensor.shape, tensor.dtype))

    def _copied(self, tensor: DeviceTensor, target: DeviceTensor | None = None) -> DeviceTensor:
        target = target or self._memory.empty(tensor.shape, tensor.dtype)
        self._memory.copy(target, 0, tensor, 0, math.prod(tensor.shape))
        return target
