"""CUDA that is not there: its memory is the host's, and all work is done when it is asked for.

In place of Polygraphy's wrapper of the runtime. A graph's work is done when it is launched; nothing but an engine may
run while one is recorded. Memory is NaN when it is new, and whatever is read or written must lie in one piece of it.
"""

from __future__ import annotations

import ctypes
import types
from collections import Counter

from polygraphy.exception import PolygraphyException

POISON = 0xFF  # NaN in every width of float
ALIGNMENT = 256  # of CUDA's memory, and what TensorRT wants of tensors
NO_MEMORY = "CUDA Error: 2. To figure out what this means, refer to a page."


class FakeCuda:
    """In place of Polygraphy's wrapper of the CUDA runtime; ``limit`` is the memory of the GPU.

    ``fails`` holds the status that a function for graphs is to give, ``calls`` how often each was called; ``graphs``
    what was recorded, ``executable`` what was made of it, both until they are destroyed.
    """

    def __init__(self, capability=(8, 7), limit=1 << 30) -> None:
        self.limit, self.memory, self.copied, self.synchronized = limit, {}, Counter(), 0
        self.fails, self.calls, self.last_error = {}, Counter(), 0
        self.recording, self.invalid, self.graphs, self.executable = None, False, {}, {}
        values = {13: 1_300_000, 16: 16, 75: capability[0], 76: capability[1]}
        self.handle = types.SimpleNamespace(
            cudaGetDeviceCount=lambda out: self._give(out, 1),
            cudaDeviceGetAttribute=lambda out, key, device: self._give(out, values[key]),
            cudaMemGetInfo=lambda free, total: self._give(free, self.free_bytes) or self._give(total, limit),
            cudaMemcpy2DAsync=self._copy_pieces,
            cudaMemset2DAsync=self._set_pieces,
            cudaStreamBeginCapture=self._call("cudaStreamBeginCapture", self._begin),
            cudaStreamEndCapture=self._call("cudaStreamEndCapture", self._end),
            cudaGraphGetNodes=lambda graph, nodes, count: self._give(count, len(self.graphs[graph.value])),
            cudaGraphInstantiateWithFlags=self._call("cudaGraphInstantiateWithFlags", self._instantiate),
            cudaGraphLaunch=self._call("cudaGraphLaunch", self._launch),
            cudaGraphDestroy=lambda graph: self.graphs.pop(graph.value) and 0,
            cudaGraphExecDestroy=lambda graph: self.executable.pop(graph.value) and 0,
            cudaGetLastError=self._take_error,
            cudaGetErrorString=lambda status: f"what {status.value} means".encode(),
        )

    def _call(self, name, function):
        """``function``, counted, and failing as ``fails`` has it; a recording ends all the same."""

        def call(*arguments) -> int:
            self.calls[name] += 1
            self.recording = None if name in self.fails else self.recording
            self.last_error = self.fails.get(name) or function(*arguments)
            return self.last_error

        return call

    def _begin(self, stream, mode) -> int:
        assert (stream.value, mode.value, self.recording) == (77, 1, None)
        self.recording, self.invalid = [], False
        return 0

    def _end(self, stream, out) -> int:
        assert stream.value == 77
        recorded, self.recording = self.recording, None
        if self.invalid:
            return 901
        self.graphs[1000 + self.calls["cudaStreamEndCapture"]] = recorded
        return self._give(out, 1000 + self.calls["cudaStreamEndCapture"])

    def _instantiate(self, out, graph, flags) -> int:
        assert flags.value == 0
        self.executable[graph.value + 1000] = self.graphs[graph.value]
        return self._give(out, graph.value + 1000)

    def _launch(self, graph, stream) -> int:
        assert (stream.value, self.recording) == (77, None)
        for work in self.executable[graph.value]:
            work()
        return 0

    def _take_error(self) -> int:
        taken, self.last_error = self.last_error, 0
        return taken

    def put(self, work) -> None:
        """Run ``work``, or record it."""
        assert not self.last_error, "an error of another is taken for its own"
        work() if self.recording is None else self.recording.append(work)

    @staticmethod
    def _give(out, value) -> int:
        out._obj.value = value
        return 0

    @property
    def free_bytes(self) -> int:
        return self.limit - sum(len(buffer) for buffer in self.memory.values())

    def check(self, status) -> None:
        assert status == 0

    def malloc(self, nbytes) -> int:
        assert self.recording is None
        if nbytes > self.free_bytes:
            raise PolygraphyException(NO_MEMORY)
        room = (ctypes.c_ubyte * (nbytes + ALIGNMENT))()
        buffer = (ctypes.c_ubyte * nbytes).from_buffer(room, -ctypes.addressof(room) % ALIGNMENT)
        ctypes.memset(buffer, POISON, nbytes)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address) -> None:
        assert self.recording is None
        assert self.memory.pop(address, None) is not None or not address

    def create_stream(self) -> int:
        return 77

    def stream_synchronize(self, stream) -> None:
        assert stream == 77
        assert self.recording is None
        self.synchronized += 1

    def memcpy(self, dst, src, nbytes, kind, stream_ptr=None) -> None:
        assert stream_ptr == 77
        assert self.recording is None  # from memory that may be swapped; and we record engines only
        name = {1: "to device", 2: "to host", 3: "on device"}[kind.value]
        if kind.value in (1, 3):
            self.check_held(dst, nbytes)
        if kind.value in (2, 3):
            self.check_held(src, nbytes)
        self.copied[name] += nbytes
        ctypes.memmove(dst, src, nbytes)

    def _copy_pieces(self, dst, dpitch, src, spitch, width, height, kind, stream) -> int:
        assert (kind.value, stream.value, self.recording) == (3, 77, None)
        target, source = self._pieces(dst, dpitch, width, height), self._pieces(src, spitch, width, height)
        ends = [(each[0], each[-1] + width.value) for each in (target, source)]
        assert ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0], "pieces overlap"
        self.copied["on device"] += width.value * height.value
        for to, begin in zip(target, source, strict=True):
            ctypes.memmove(to, begin, width.value)
        return 0

    def _set_pieces(self, dst, pitch, value, width, height, stream) -> int:
        assert (stream.value, self.recording) == (77, None)
        for begin in self._pieces(dst, pitch, width, height):
            ctypes.memset(begin, value.value, width.value)
        return 0

    def _pieces(self, address, pitch, width, height) -> range:
        """Where each piece begins; all lie in one piece of memory that is held."""
        assert 0 < width.value <= pitch.value
        begins = range(address.value, address.value + height.value * pitch.value, pitch.value)
        self.check_held(address.value, begins[-1] + width.value - address.value)
        return begins

    def check_held(self, address, nbytes) -> None:
        assert any(start <= address and address + nbytes <= start + len(held) for start, held in self.memory.items())
