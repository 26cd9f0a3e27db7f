"""The engine `nvshmem` between processes, on the GPUs of this machine: over NVLink or PCIe, without a NIC.

Needs NVSHMEM and nvcc. What can be said without a GPU: test_nvshmem_build.py, tests/cpp/rail/nvshmem_engine_test.cc.
"""
from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rail_group import ROOT, RailGroup, build_program

from deep_ep import Error, _nvshmem

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
# NVLink multicast is refused by many containers, and nothing here uses it.
SETTINGS = {"NVSHMEM_DISABLE_NVLS": "1"}
PATIENCE_S = 120


@pytest.fixture(scope="module")
def program() -> Callable[[str], Path]:
    """Builds a program of tests/cpp/device_cuda.cmake."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    try:
        installation = _nvshmem.find_installation()
        _nvshmem.find_nvcc()
    except Error as error:
        pytest.skip(str(error))
    architectures = ";".join(f"{code}-real" for code in _nvshmem.find_architectures())
    options = ("-DEP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    environment = {"NVSHMEM_DIR": str(installation.folder)}
    return lambda name: build_program(name, ROOT / "build" / "rail_nvshmem", *options, environment=environment)


def make_group(program: Path, **settings: str) -> RailGroup:
    prefix = ["env", *(f"{name}={value}" for name, value in {**SETTINGS, **settings}.items())]
    return RailGroup(program, 2, [], [prefix, prefix])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_conformance(program: Callable[[str], Path], tmp_path: Path, num_ranks: int) -> None:
    """More ranks than GPUs share them."""
    command = str(program("rail_conformance_nvshmem"))
    processes = [
        subprocess.Popen([command, str(rank), str(num_ranks), str(tmp_path)],
                         stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT,
                         text=True,
                         env={
                             **os.environ,
                             **SETTINGS
                         }) for rank in range(num_ranks)
    ]
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_ranks, "\n".join(said)


def test_streams(program: Callable[[str], Path]) -> None:
    with make_group(program("rail_process_nvshmem")) as group:
        group.connect()
        sent = [found["bytes"] for found in group.run("streams 200 4 20000")]
        assert all(count > 0 for count in sent)  # what arrived was compared there
        assert group.quit() == [0, 0]


def test_peer_that_no_transport_reaches_is_an_error(program: Callable[[str], Path]) -> None:
    """NVSHMEM itself would end the process, at its next call."""
    with make_group(program("rail_process_nvshmem"), NVSHMEM_DISABLE_P2P="1",
                    NVSHMEM_REMOTE_TRANSPORT="none") as group, pytest.raises(RuntimeError,
                                                                             match="no transport reaches every rank"):
        group.connect()
