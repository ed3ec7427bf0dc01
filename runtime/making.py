"""What is set in the whole process while ONNX Runtime makes sessions, by however many threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# ONNX Runtime reads it when it makes a session. Which form of GroupQueryAttention is the faster one depends on the
# processor (export/fusion/form.py); what flash saves of memory, [heads, piece, rows so far], is small.
NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"

_lock = threading.Lock()
_inside = 0
_until = contextlib.ExitStack()  # what the first one in has set


@contextlib.contextmanager
def making_sessions(flash: bool = False) -> Iterator[None]:
    """Freed blocks go back to the system, and attention has its ``flash`` form or not; until the last one leaves.

    Of several at once, the first one's form is all the others'.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _until.enter_context(_giving_back())
            _until.enter_context(_with_flash(flash))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _until.close()


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
    """Blocks from 1 MB on are mapped by themselves, and go back to the system when freed.

    glibc raises that size, to 32 MB at most, once such a block has been freed; the weights that ONNX Runtime converts
    while it loads then leave gaps: a 7B in INT4 took 8.2 GB with them, 6.1 GB without. Other libraries have no such
    setting. Afterwards it is at those 32 MB: glibc does not go back to choosing.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


@contextlib.contextmanager
def _with_flash(wanted: bool) -> Iterator[None]:
    """What the user has set stays."""
    if NO_FLASH in os.environ:
        yield
        return
    os.environ[NO_FLASH] = "0" if wanted else "1"
    try:
        yield
    finally:
        del os.environ[NO_FLASH]
