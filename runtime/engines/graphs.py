"""Work of a stream recorded as a CUDA graph, to be launched as a whole, again and again.

By what CUDA 12.6 and 13 both have. Knows no engine: who records sees to it that shapes and memory stay as they were.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

from tokprune.runtime.engines.cuda import Memory

_THREAD_LOCAL = 1  # cudaStreamCaptureMode: what other threads do is not our matter


class GraphFailed(Exception):
    """No graph could be made, or launched; why, in words."""


class Graph:
    """What ``enqueue`` puts on the stream of ``memory``: recorded, not run. Destroyed by `close`, or with the object.

    Raises GraphFailed, also from ``enqueue`` itself; the stream is then as it was before.
    """

    def __init__(self, memory: Memory, enqueue: Callable[[], None]) -> None:
        self._library = memory.cuda.handle
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._stream = ctypes.c_void_p(memory.stream.ptr)
        recorded, self._graph, nodes = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        try:
            self._call("cudaStreamBeginCapture", self._stream, ctypes.c_int(_THREAD_LOCAL))
            try:
                enqueue()
            except BaseException:  # the stream is to be as it was
                self._library.cudaStreamEndCapture(self._stream, ctypes.byref(recorded))
                self._library.cudaGetLastError()
                raise
            self._call("cudaStreamEndCapture", self._stream, ctypes.byref(recorded))
            self._call("cudaGraphGetNodes", recorded, None, ctypes.byref(nodes))
            if not nodes.value:  # as was seen where an engine worked on another stream than its caller's
                raise GraphFailed("nothing was recorded")
            flags = ctypes.c_ulonglong(0)
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(self._graph), recorded, flags)
        finally:
            if recorded:
                self._library.cudaGraphDestroy(recorded)
        self.close = weakref.finalize(self, self._library.cudaGraphExecDestroy, self._graph)
        self.close.atexit = False

    def launch(self) -> None:
        """Run it, behind what is on the stream. Raises GraphFailed."""
        self._call("cudaGraphLaunch", self._graph, self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetLastError()  # or who asks next for an error is told this one
            said = self._library.cudaGetErrorString(ctypes.c_int(status)).decode()
            raise GraphFailed(f"{name}: {said}, error {status}")
