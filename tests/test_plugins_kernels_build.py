"""The kernels under nvcc and under sanitizers, and the CPU emulation itself (cuda_host/): does it find faults?"""

import ctypes
import re
import subprocess

import numpy as np
import pytest
from cuda_host import host

from tokprune.plugins.toolchain import find_nvcc

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
RESULT = np.arange(1, 65) % 64  # of the kernel without a fault


def run_faulty(name: str, order: int = 0) -> tuple[int, str, np.ndarray]:
    """(status, message, out [64]) of one of the kernels in faulty.cpp."""
    out = np.zeros(64, np.float32)
    host.library().set_order(order)
    status = host.library().run_faulty(name.encode(), host.pointer(out))
    return status, host.library().last_error().decode(), out


class TestEmulation:
    @pytest.mark.parametrize("order", [0, 1, 7])
    def test_runs_what_has_no_fault(self, order):
        status, message, out = run_faulty("no race", order)
        assert (status, message) == (0, "")
        np.testing.assert_array_equal(out, RESULT)

    @pytest.mark.parametrize("name", ["race", "race of blocks"])
    def test_a_race_gives_other_bits_in_another_order(self, name):
        outs = {run_faulty(name, order)[2].tobytes() for order in (0, 1)}
        assert len(outs) == 2

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missed barrier", "wait for ever: 0 has ended; 1 is at faulty.cpp"),
            ("other barrier", "wait at different barriers: faulty.cpp"),
            ("missed shuffle", "wait for ever: 0 is at faulty.cpp"),
            ("partial mask", "without all of its lanes"),
            ("never waited for", "ends before its asynchronous copies"),
            ("misaligned", "no multiple of 16"),
            ("out of bounds", "writes behind its shared memory"),
        ],
    )
    def test_faults_end_the_launch_and_are_named(self, name, message):
        status, found, _ = run_faulty(name)
        assert status != 0
        assert message in found
        assert run_faulty("no race")[0] == 0  # the next launch is not hurt

    def test_shared_memory_holds_nan_until_it_is_written(self):
        assert np.isnan(run_faulty("uninitialised")[2]).all()

    def test_asynchronous_copies_land_when_they_are_waited_for(self):
        assert np.isnan(run_faulty("not waited for")[2][0])

    def test_more_shared_memory_has_to_be_asked_for_and_has_a_limit(self):
        with_shared = host.library().run_with_shared
        with_shared.argtypes = [ctypes.c_size_t, ctypes.c_bool]
        assert with_shared(48 << 10, False) == 0
        assert with_shared((48 << 10) + 4, False) != 0
        assert with_shared((48 << 10) + 4, True) == 0
        assert with_shared((99 << 10) + 4, True) != 0


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    sources = [*host.KERNELS, *host.EMULATION, host.HERE / "sanitized.cpp"]
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
    program = host.compile_host(tmp_path / "sanitized", sources, *checks)
    # neither rows nor columns a multiple of anything; the last one's subspace is wide
    for sizes in ((2, 37, 22, 5, 3), (1, 70, 200, 70, 9), (1, 70, 102, 70, 40)):
        done = subprocess.run([program, *map(str, sizes)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [np.array(line.split(), dtype=int) for line in done.stdout.splitlines()]
        images, n, _, k, _ = sizes
        for kept in (rows for line in lines for rows in line.reshape(images, k)):
            assert (np.diff(kept) > 0).all()
            assert 0 <= kept[0] <= kept[-1] < n
        assert len(lines) == 2


@pytest.mark.parametrize("source", host.KERNELS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("architecture", [80, pytest.param(ARCHITECTURES[1:], marks=pytest.mark.slow)])
def test_nvcc_compiles_without_warnings_or_spills(source, architecture, tmp_path):
    wanted = [architecture] if isinstance(architecture, int) else architecture
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in wanted]
    options = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2", "-c"]
    command = [str(find_nvcc()), *targets, *options, str(source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert {int(number) for _, number in kernels} == set(wanted)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(kernels)
    assert {(stores, loads) for _, stores, loads in spills} == {("0", "0")}
    # All shared memory is dynamic, and bounded where it is asked for (plugins/cuda/launch.cuh).
    assert not re.search(r"bytes smem", report)
