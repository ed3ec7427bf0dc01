"""Caches of decoders on a GPU that is not there: what an engine would read, and where."""

from __future__ import annotations

import ctypes

import fake_tensorrt
import numpy as np
import pytest

from tokprune.runtime.engines import caches, cuda, profiles
from tokprune.runtime.engines.caches import Caches

NAMES = ["0.key", "0.value", "1.key", "1.value", "2.key"]


@pytest.fixture
def memory(monkeypatch) -> cuda.Memory:
    fake_tensorrt.install(monkeypatch)
    monkeypatch.setattr(profiles, "BUCKET", 8)
    return cuda.Memory()


def write(tensor: cuda.DeviceTensor, array: np.ndarray) -> None:
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
    ctypes.memmove(tensor.address, array.ctypes.data, array.nbytes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("shape", "block", "blocks"),
    [
        ((1, 2, 64), 1 << 20, 1),
        ((3, 2, 64), 2 * 3 * 2 * 64 * 4 * 30, None),  # two of FP32 to a block, four of FP16
        ((1, 2, 16), 1 << 20, 5),  # which could not begin side by side where a tensor may
    ],
)
def test_rows_come_one_behind_another(memory, monkeypatch, dtype, shape, block, blocks):
    """A prompt, some steps, a later turn, and steps to the last row that there is room for."""
    monkeypatch.setattr(caches, "BLOCK", block)
    batch, heads, width = shape
    rng = np.random.default_rng(0)
    rows, most = 5, 30
    made = Caches(memory, NAMES, shape, np.dtype(dtype), rows, most)
    assert blocks is None or len(made.filled.blocks) == blocks
    held = {name: rng.standard_normal((batch, heads, rows, width)).astype(dtype) for name in NAMES}
    for name, tensor in made.filled.tensors.items():
        write(tensor, held[name])
    first = made.filled.tensors[NAMES[0]].address
    for count in (1, 1, 1, 9, 1, 2, *[1] * 10):
        new = made.new_rows(count)
        for name, tensor in new.tensors.items():
            array = rng.standard_normal((batch, heads, count, width)).astype(dtype)
            write(tensor, array)
            held[name] = np.concatenate([held[name], array], axis=2)
        made.make_room(rows, count)
        made.append(rows, new)
        rows += count
        assert made.filled.rows == min(-(-rows // 8) * 8, most)
        assert made.filled.tensors[NAMES[0]].address == first
        for name, tensor in made.filled.tensors.items():
            found = memory.download(tensor)
            np.testing.assert_array_equal(found[:, :, :rows], held[name])
            assert not found[:, :, rows:].any()  # NaN would be something
    assert rows == most


def test_memory_is_taken_once_and_given_back(memory):
    made = Caches(memory, NAMES, (2, 2, 64), np.dtype(np.float16), 3, 40)
    taken = memory.held_bytes
    assert taken == len(NAMES) * 2 * 2 * 40 * 64 * 2
    one = made.new_rows(1)
    assert made.new_rows(1) is one
    for rows in range(3, 40):
        made.make_room(rows, 1)
        made.append(rows, one)
    again = memory.held_bytes
    del made, one
    Caches(memory, NAMES, (2, 2, 64), np.dtype(np.float16), 9, 40).new_rows(1)
    assert memory.held_bytes == again


def test_more_rows_than_there_is_room_for(memory):
    made = Caches(memory, NAMES, (1, 2, 64), np.dtype(np.float16), 3, 4)
    with pytest.raises(AssertionError, match="5 rows, room for 4"):
        made.make_room(3, 2)
