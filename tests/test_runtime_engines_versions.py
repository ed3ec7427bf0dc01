"""What differs between TensorRTs, with stand-ins for those that are not here; build tests have the real RTX one."""

from __future__ import annotations

import json
import types
from pathlib import Path

import fake_tensorrt
import pytest

from tokprune.runtime import UserError
from tokprune.runtime.engines import child, versions


class Builder:
    def create_network(self, flags: int) -> int:
        return flags


@pytest.mark.parametrize(("flags", "expected"), [({"STRONGLY_TYPED": 1}, 2), ({}, 0)], ids=["10.3", "without the flag"])
def test_networks_are_strongly_typed(flags, expected):
    trt = types.SimpleNamespace(NetworkDefinitionCreationFlag=types.SimpleNamespace(**flags))
    assert versions.create_network(trt, Builder()) == expected


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.2.0.19"])
def test_too_old(monkeypatch, version):
    fake_tensorrt.install(monkeypatch, version=version)
    with pytest.raises(UserError, match=rf"tensorrt {version} was found, 10\.3 or newer is needed: upgrade it"):
        versions.load(versions.TENSORRT)


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_new_enough(monkeypatch, version):
    trt = fake_tensorrt.install(monkeypatch, version=version)
    assert versions.load(versions.TENSORRT) is trt


def test_plugins_that_do_not_load():
    registry = types.SimpleNamespace(load_library=lambda path: None)
    with pytest.raises(UserError, match=r"x\.so cannot be loaded as a library of plugins"):
        versions.load_plugins(types.SimpleNamespace(get_plugin_registry=lambda: registry), Path("x.so"))


def test_contexts_need_the_greediest_profiles_memory():
    sizes = [5, 9, 7]
    engine = types.SimpleNamespace(
        num_optimization_profiles=3, get_device_memory_size_for_profile_v2=lambda profile: sizes[profile]
    )
    assert versions.context_bytes(engine) == 9


class TestLayers:
    """The account of an engine: TensorRT's own where it loads, else the network's with the reason."""

    LAYER = types.SimpleNamespace(name="a", type=types.SimpleNamespace(name="SHUFFLE"), num_outputs=0)
    NETWORK = types.SimpleNamespace(num_layers=1, get_layer=lambda index: TestLayers.LAYER)

    def report(self, loaded, inspect: bool = True) -> dict:
        trt = types.SimpleNamespace(
            Runtime=lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda engine: loaded),
            LayerInformationFormat=types.SimpleNamespace(JSON="json"),
        )
        logger = types.SimpleNamespace(kept=[(True, "out of memory")])
        return json.loads(child._layers(trt, self.NETWORK, b"engine", inspect, logger))

    def test_of_the_engine(self):
        inspector = types.SimpleNamespace(get_engine_information=lambda form: json.dumps({"as": form}))
        assert self.report(types.SimpleNamespace(create_engine_inspector=lambda: inspector)) == {"as": "json"}

    @pytest.mark.parametrize(("inspect", "reason"), [(True, "out of memory"), (False, "no device to load it on")])
    def test_of_the_network(self, inspect, reason):
        found = self.report(None, inspect)
        assert (found["layers_of"], found["reason"]) == ("network", reason)
        assert found["layers"] == [{"name": "a", "type": "SHUFFLE", "outputs": []}]
