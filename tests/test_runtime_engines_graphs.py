"""CUDA graphs of work on a stream, with a GPU that is not there (``fake_cuda``)."""

from __future__ import annotations

import types

import fake_tensorrt
import pytest

from tokprune.runtime.engines import cuda
from tokprune.runtime.engines.graphs import Graph, GraphFailed


@pytest.fixture
def fake(monkeypatch):
    return fake_tensorrt.install(monkeypatch).cuda


def test_records_then_runs_as_often_as_launched(fake):
    done = []
    graph = Graph(cuda.Memory(), lambda: [fake.put(lambda: done.append(1)), fake.put(lambda: done.append(2))])
    assert done == []
    graph.launch()
    graph.launch()
    assert done == [1, 2, 1, 2]
    assert (len(fake.graphs), len(fake.executable)) == (0, 1)
    graph.close()
    assert not fake.executable


def test_destroyed_once(fake):
    graph = Graph(cuda.Memory(), lambda: fake.put(print))
    graph.close()
    del graph  # which would destroy it again
    assert not fake.executable


def test_nothing_recorded(fake):
    with pytest.raises(GraphFailed, match="nothing was recorded"):
        Graph(cuda.Memory(), lambda: None)
    assert not fake.graphs


@pytest.mark.parametrize("error", [GraphFailed("no"), KeyboardInterrupt()])
def test_what_fails_while_it_records_leaves_the_stream_as_it_was(fake, error):
    def fail() -> None:
        fake.put(print)
        raise error

    with pytest.raises(type(error)):
        Graph(cuda.Memory(), fail)
    assert (fake.recording, fake.graphs, fake.last_error) == (None, {}, 0)


def test_the_real_library_has_what_is_called():
    """And gives its reasons in words: without a GPU, or for the stream that cannot be recorded."""
    library = cuda._runtime()
    memory = types.SimpleNamespace(cuda=library, stream=types.SimpleNamespace(ptr=None))
    with pytest.raises(GraphFailed, match=r"cudaStreamBeginCapture: [A-Za-z ]{10,}, error \d+"):
        Graph(memory, lambda: None)
    for name in (
        "cudaMemcpy2DAsync",
        "cudaMemset2DAsync",
        "cudaStreamEndCapture",
        "cudaGraphGetNodes",
        "cudaGraphInstantiateWithFlags",
        "cudaGraphLaunch",
        "cudaGraphDestroy",
        "cudaGraphExecDestroy",
    ):
        assert getattr(library.handle, name)
