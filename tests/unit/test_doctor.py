"""The doctor finds the machine of the tests well, and broken parts broken."""

import ast
import ctypes
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest

import deep_ep
import deep_ep_cpp
from deep_ep import doctor
from deep_ep._peers import Place
from deep_ep.bench import round_trip as trip


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    ping = found["round trip, CPU device, two processes"]
    assert ping["level"] == "ok"
    assert all(re.search(rf"{path} \d+ us", ping["text"]) for path in ("through slots", "lent", "low latency"))
    assert all(finding["level"] != "broken" for finding in found.values())
    assert deep_ep.__version__ in found["deep_ep"]["text"]


def test_missing_extension_has_a_fix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep_cpp", None)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "[FAIL] deep_ep_cpp: does not import" in printed
    assert "fix: " in printed


def test_runs_as_a_file_where_the_package_does_not_import(tmp_path: Path) -> None:
    """Without the extension `python -m deep_ep.doctor` cannot start, and the ImportError points to the file."""
    package = tmp_path / "deep_ep"
    package.mkdir()
    for name in ("doctor.py", "_env.py", "__init__.py"):
        (package / name).write_text((Path(deep_ep.__file__).parent / name).read_text())
    (tmp_path / "deep_ep_cpp.py").write_text("raise ImportError('built for another Python')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import deep_ep"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"python {package / 'doctor.py'}" in failed.stderr
    report = subprocess.run([sys.executable, str(package / "doctor.py")],
                            capture_output=True,
                            text=True,
                            check=False,
                            env={"PYTHONPATH": str(tmp_path)})
    assert report.returncode == 1
    assert "built for another Python" in report.stdout


def test_a_missing_torch_points_to_the_doctor() -> None:
    code = "import sys; sys.modules['torch'] = None; import deep_ep"
    environment = {**os.environ, "PYTHONPATH": str(Path(deep_ep.__file__).parents[1])}
    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "deep_ep: torch does not load" in failed.stderr
    assert f"python {Path(deep_ep.__file__).with_name('doctor.py')}" in failed.stderr


# Fake machines. The probes that the doctor uses are those of its own copy of the module.
probes = doctor.probes


def text_of(found: list[doctor.Finding]) -> str:
    return "\n".join(map(str, found))


def everywhere(_: int, __: int) -> bool:
    return True


def nowhere(_: int, __: int) -> bool:
    return False


class FakeNvml:
    """libnvidia-ml of a machine with `joined` pairs of GPUs; every function fails with `failing`'s error."""

    def __init__(self,
                 num_gpus: int,
                 num_links: int,
                 joined: Callable[[int, int], bool],
                 failing: str = "",
                 fabric: tuple[int, int] = (0, 0)) -> None:
        self._num_gpus, self._num_links, self._joined, self._failing = num_gpus, num_links, joined, failing
        self._fabric = fabric  # state and status

    def __getattr__(self, name: str) -> Any:
        function = type(self)._functions[name]
        return (lambda *_: 999) if name == self._failing else lambda *arguments: function(self, *arguments)

    def _init(self) -> int:
        return 0

    def _driver(self, text: Any, _: int) -> int:
        text.value = b"580.95.05"
        return 0

    def _count(self, count: Any) -> int:
        count._obj.value = self._num_gpus
        return 0

    def _handle(self, index: ctypes.c_uint, handle: Any) -> int:
        handle._obj.value = index.value + 100
        return 0

    def _link(self, _: ctypes.c_void_p, link: ctypes.c_uint, is_active: Any) -> int:
        is_active._obj.value = 1
        return 0 if link.value < self._num_links else 2

    def _p2p(self, first: ctypes.c_void_p, second: ctypes.c_void_p, kind: ctypes.c_int, status: Any) -> int:
        assert kind.value in (0, 2)  # reads, or NVLink
        assert first.value
        assert second.value
        status._obj.value = 0 if self._joined(first.value - 100, second.value - 100) else 4
        return 0

    def _uuid(self, device: ctypes.c_void_p, text: Any, _: int) -> int:
        text.value = f"GPU-{(device.value or 0) - 100}".encode()
        return 0

    def _fabric_info(self, _: ctypes.c_void_p, info: Any) -> int:
        info._obj.state, info._obj.status = self._fabric
        return 0

    _functions = {  # noqa: RUF012
        "nvmlInit_v2": _init,
        "nvmlShutdown": _init,
        "nvmlSystemGetDriverVersion": _driver,
        "nvmlDeviceGetCount_v2": _count,
        "nvmlDeviceGetHandleByIndex_v2": _handle,
        "nvmlDeviceGetNvLinkState": _link,
        "nvmlDeviceGetP2PStatus": _p2p,
        "nvmlDeviceGetUUID": _uuid,
        "nvmlDeviceGetGpuFabricInfo": _fabric_info
    }


def install_nvml(monkeypatch: pytest.MonkeyPatch, library: Optional[FakeNvml]) -> None:

    def load(name: str) -> FakeNvml:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(probes.ctypes, "CDLL", load)


def test_nvlink_between_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, FakeNvml(4, 18, everywhere))
    found = doctor.check_nvlink()
    assert found[0].level == "ok"
    assert "joins all 4 GPUs" in found[0].text
    assert "       GPU0  .     NV18  NV18  NV18" in found[0].text


def test_nvlink_between_some_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, FakeNvml(4, 4, lambda i, j: i // 2 == j // 2))
    found = doctor.check_nvlink()
    assert found[0].level == "note"
    assert "       GPU2  -     -     .     NV4" in found[0].text


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_nothing_to_join(monkeypatch: pytest.MonkeyPatch, num_gpus: int) -> None:
    install_nvml(monkeypatch, FakeNvml(num_gpus, 18, nowhere))
    assert doctor.check_nvlink()[0].level == "ok"


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvml(monkeypatch, None)
    monkeypatch.setattr(probes, "DRIVER_FILE", tmp_path / "none")
    assert doctor.check_nvlink()[0].level == "ok"
    assert probes.driver_version() is None


def test_gpus_that_the_driver_says_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, FakeNvml(4, 0, lambda i, j: i // 2 == j // 2))
    assert probes.gpus_cut_off_from("GPU-1") == {"GPU-2", "GPU-3"}
    assert probes.gpus_cut_off_from("GPU-of another machine") == frozenset()
    for library in (None, FakeNvml(4, 0, nowhere, failing="nvmlDeviceGetP2PStatus")):
        install_nvml(monkeypatch, library)
        assert probes.gpus_cut_off_from("GPU-1") == frozenset()


def test_the_driver_file_speaks_where_nvml_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024")
    monkeypatch.setattr(probes, "DRIVER_FILE", version)
    for library in (None, FakeNvml(1, 0, nowhere, failing="nvmlInit_v2")):
        install_nvml(monkeypatch, library)
        assert probes.driver_version() == "550.54.15"


@pytest.mark.parametrize("failing", sorted(FakeNvml._functions))
def test_a_failing_nvml_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    install_nvml(monkeypatch, FakeNvml(2, 18, everywhere, failing=failing))
    found = doctor._guarded("NVLink", doctor.check_nvlink)
    assert found[0].level in ("note", "ok")
    assert doctor._guarded("NVSwitch fabric", doctor.check_fabric)[0].level in ("note", "ok")
    if failing in ("nvmlDeviceGetCount_v2", "nvmlDeviceGetP2PStatus"):
        assert f"{failing} returned 999" in found[0].text


@pytest.mark.parametrize(("fabric", "level", "says"), [
    ((0, 0), "ok", "none, or the driver does not tell"),
    ((3, 0), "ok", "set up for 2 GPU(s)"),
    ((2, 0), "note", "GPU 0: in progress; GPU 1: in progress"),
    ((3, 999), "note", "GPU 1: completed with error 999"),
    ((9, 0), "ok", "the driver does not tell"),
])
def test_nvswitch_fabric(monkeypatch: pytest.MonkeyPatch, fabric: tuple[int, int], level: str, says: str) -> None:
    install_nvml(monkeypatch, FakeNvml(2, 18, everywhere, fabric=fabric))
    found = doctor.check_fabric()
    assert found[0].level == level
    assert says in found[0].text
    assert ("nvidia-fabricmanager" in found[0].fix) == (level == "note")


def native_with(runtime: int, served: int) -> Any:
    return SimpleNamespace(cuda_versions=lambda: (runtime, served), describe_old_driver=deep_ep_cpp.describe_old_driver)


@pytest.mark.parametrize(("runtime", "served", "version", "level", "says"), [
    (12040, 13000, "580.95.05", "ok", "serves CUDA 13.0; deep_ep_cpp has the runtime of CUDA 12.4"),
    (12040, 12000, "525.60.13", "ok", "serves CUDA 12.0"),
    (12040, 11040, "470.57.02", "broken", "needs NVIDIA driver 525.60.13 or newer"),
    (13000, 12080, "570.86.15", "broken", "needs NVIDIA driver 580.65.06 or newer"),
    (12040, 0, None, "note", "this machine has none"),
    (0, 0, None, "ok", "built without CUDA"),
])
def test_driver_against_build(monkeypatch: pytest.MonkeyPatch, runtime: int, served: int, version: Optional[str],
                              level: str, says: str) -> None:
    monkeypatch.setattr(probes, "driver_version", lambda: version)
    found = doctor.check_driver(native_with(runtime, served))
    assert found[0].level == level
    assert says in found[0].text
    assert (found[0].fix != "") == (level != "ok")


def test_limits_of_a_narrow_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark, limit, status, scope = (tmp_path / name for name in ("mark", "limit", "status", "scope"))
    mark.touch()
    limit.write_text(f"{2 << 30}\n")
    status.write_text("Name:\tpython\nSeccomp:\t2\n")
    scope.write_text("1\n")
    monkeypatch.setattr(probes, "CONTAINER_MARKS", (mark, ))
    monkeypatch.setattr(probes, "MEMORY_LIMITS", (tmp_path / "none", limit))
    monkeypatch.setattr(probes, "STATUS_FILE", status)
    monkeypatch.setattr(probes, "PTRACE_SCOPE", scope)
    monkeypatch.setattr(probes.os, "statvfs", lambda _: SimpleNamespace(f_frsize=4096, f_blocks=16384))
    monkeypatch.setattr(probes.resource, "getrlimit", lambda _: (64 << 10, 64 << 10))
    told = text_of(doctor.check_container() + doctor.check_limits())
    for part in (f"yes ({mark})", "memory limit: 2.0 GiB", "[note] /dev/shm: 64 MiB", "fix: docker: --shm-size=1g",
                 "memlock: 0.1 MiB", "filtering system calls; ptrace scope 1", "ipc:["):
        assert part in told, part


def environment_of(ranks_per_node: str, heap: str = "", rail: str = "") -> SimpleNamespace:
    variables = {"ranks_per_node": ranks_per_node, "heap": heap, "rail": rail, "rail_interface": ""}
    return SimpleNamespace(get_environment=lambda: variables)


def test_topology_of_islands_and_of_virtual_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    def places(*islands: str) -> list[Place]:
        gpus = list(enumerate("".join(islands)))
        beyond = {here: frozenset(f"gpu-{rank}" for rank, there in gpus if there != here) for _, here in gpus}
        return [Place("boot", "box", f"gpu-{rank}", unreachable=beyond[island]) for rank, island in gpus]

    monkeypatch.setattr("deep_ep._peers.places_of_this_machine", lambda: places("aabb"))
    monkeypatch.setattr(doctor.probes, "IMEX_CHANNELS", tmp_path)
    monkeypatch.setattr(doctor.probes, "num_gpus_with_fabric_handles", lambda: 4)
    (tmp_path / "channel0").touch()
    monkeypatch.setattr("deep_ep._env.device_choice", lambda: ("cuda", ""))
    install_nvml(monkeypatch, FakeNvml(4, 4, lambda i, j: i // 2 == j // 2))
    told = text_of(doctor.check_topology(environment_of("0")))
    assert "4 ranks on 1 node" in told
    assert "[note] heap: host memory, which every GPU reaches over PCIe: rank 0 (gpu-0) and rank 2 (gpu-2)" in told
    told = text_of(doctor.check_topology(environment_of("0", heap="device", rail="host")))
    assert "4 ranks on 2 nodes" in told
    assert "heap: GPU memory, over NVLink where there is one, else PCIe peer access: DEEP_EP_HEAP=device" in told
    assert "multi-node NVLink: 1 IMEX channel(s), 4 GPU(s) with fabric handles; this version does not use it" in told
    told = text_of(doctor.check_topology(environment_of("1")))
    assert "4 ranks on 4 nodes, DEEP_EP_RANKS_PER_NODE" in told
    assert "heap: GPU memory, over nothing, as a node has one GPU" in told
    monkeypatch.setattr("deep_ep._peers.places_of_this_machine", lambda: places("aaab"))
    monkeypatch.setattr(doctor.probes, "IMEX_CHANNELS", tmp_path / "nothing")
    told = text_of(doctor.check_topology(environment_of("0", heap="device")))
    assert "would be refused: Buffer: every node must have equally many ranks, got ranks 0 to 2 on box" in told


def test_fabric_handles_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CUDA_DRIVER", "no-driver.so")
    assert probes.num_gpus_with_fabric_handles() is None


def test_limits_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATUS_FILE", "NAMESPACES", "PTRACE_SCOPE", "SHM_MOUNT"):
        monkeypatch.setattr(probes, name, tmp_path / "none")
    monkeypatch.setattr(probes, "MEMORY_LIMITS", ())
    monkeypatch.setattr(probes, "CONTAINER_MARKS", ())
    monkeypatch.setattr(probes.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told = text_of(doctor.check_container() + doctor.check_limits())
    for part in ("container: none that shows", "[note] /dev/shm: not there", "memlock: unlimited",
                 "unknown; ptrace scope not there"):
        assert part in told, part


def test_a_shared_memory_mount_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probes, "SHM_MOUNT", tmp_path)
    monkeypatch.setattr(probes.os, "access", lambda *_: False)
    found = doctor._check_shm()
    assert found.level == "note"
    assert "cannot be written" in found.text
    assert "--shm-size" in found.fix


def torch_with(num_gpus: int, reaches: Callable[[int, int], bool] = everywhere, cuda: Optional[str] = "13.0") -> Any:
    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda),
                           cuda=SimpleNamespace(is_available=lambda: num_gpus > 0,
                                                device_count=lambda: num_gpus,
                                                get_device_properties=lambda _: properties,
                                                mem_get_info=lambda _: (60 << 30, 80 << 30),
                                                can_device_access_peer=reaches))


def test_gpus_and_their_peers() -> None:
    native = SimpleNamespace(is_cuda_built=lambda: True)
    found = doctor.check_gpus(torch_with(2), native)
    assert [finding.level for finding in found] == ["ok", "ok", "ok"]
    told = text_of(found)
    assert "GPU 1: H100, SM90, 132 SMs, 60.0 of 80.0 GiB free" in told
    assert "every GPU reaches every other" in told
    found = doctor.check_gpus(torch_with(4, lambda i, j: i // 2 == j // 2), native)
    assert found[-1].level == "note"
    assert "0-2, 0-3, 1-2" in found[-1].text
    assert "share host memory, at the rate of PCIe" in found[-1].text
    assert "nvidia-smi topo -p2p r" in found[-1].fix


def test_gpus_that_torch_or_the_build_does_not_serve() -> None:
    found = doctor.check_gpus(torch_with(1), SimpleNamespace(is_cuda_built=lambda: False))
    assert found[0].level == "broken"
    assert "DEEP_EP_DEVICE=cpu" in found[0].fix
    assert "CUDA_VISIBLE_DEVICES" in doctor.check_gpus(torch_with(0), None)[0].fix
    assert "CPU build" in doctor.check_gpus(torch_with(0, cuda=None), None)[0].text


def test_a_note_of_what_works_slowly_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, FakeNvml(2, 4, nowhere))
    assert "CUDA_VISIBLE_DEVICES" in doctor.check_nvlink()[0].fix
    assert "install a torch" in doctor.check_gpus(torch_with(0, cuda=None), None)[0].fix


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    monkeypatch.setattr(doctor, "MEMORY_INFO", info)
    assert "cannot tell" in doctor.check_memory()[0].text
    info.write_text("MemTotal: 1000 kB\nMemAvailable: 1000 kB\n")
    assert doctor.check_memory()[0].level == "note"
    assert "sizing.md" in doctor.check_memory()[0].fix
    info.write_text(f"MemAvailable: {8 << 20} kB\n")
    assert "8.0 GiB free" in doctor.check_memory()[0].text


def test_a_malformed_variable_has_a_fix() -> None:

    def get_environment() -> dict[str, Any]:
        raise deep_ep_cpp.InvalidArgument("DEEP_EP_TIMEOUT_SECS: expected seconds, got 'soon'")

    native = SimpleNamespace(is_cuda_built=lambda: False,
                             topk_idx_bits=lambda: 64,
                             __file__="x.so",
                             get_environment=get_environment)
    found = doctor.check_extension(native)[-1]
    assert (found.level, found.fix) == ("broken", "correct or unset the variable")


# Of the report: checks that it makes itself, and what they need.
CHECKS = sorted(name for name in vars(doctor) if name.startswith("check_") and name != "check_peer_access")


@pytest.mark.parametrize("check", CHECKS)
def test_a_failing_check_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                 check: str) -> None:

    def fail(*_: object) -> Any:
        raise RuntimeError("the probe broke")

    monkeypatch.setattr(doctor, "check_round_trips", lambda _: [])  # takes seconds
    monkeypatch.setattr(doctor, check, fail)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.count("cannot tell: RuntimeError: the probe broke") == 1


def test_failing_probes_are_lines_of_the_report(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:

    def fail(*_: object) -> Any:
        raise RuntimeError("the probe broke")

    for name in ("container", "shm_bytes", "driver_version", "Nvml", "network_interfaces", "nvshmem_library"):
        monkeypatch.setattr(probes, name, fail)
    monkeypatch.setattr(trip, "round_trip", fail)
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("cannot tell: RuntimeError: the probe broke") == 8  # NVLink and the fabric both ask NVML


def test_whatever_is_broken_or_noted_has_a_fix() -> None:
    """But for what cannot be told."""
    tree = ast.parse(Path(doctor.__file__).read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding"
    ]
    to_mend = [
        call for call in calls
        if getattr(call.args[0], "value", "") in ("broken", "note") and "cannot tell" not in ast.unparse(call)
    ]
    assert len(to_mend) > 15
    assert [call.lineno for call in to_mend if len(call.args) < 4] == []


@pytest.mark.parametrize(("levels", "status"), [(["ok", "note"], 0), (["ok", "broken"], 1)])
def test_the_exit_status_is_the_same_in_both_forms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                   levels: list[str], status: int) -> None:
    found = [doctor.Finding(level, "subject", "text", "fix") for level in levels]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert doctor.main(["--json"]) == status
    assert [set(entry) for entry in json.loads(capsys.readouterr().out)] == [{"level", "subject", "text", "fix"}] * 2
    assert doctor.main([]) == status
    assert capsys.readouterr().out.rstrip().endswith("1 problem(s)" if status else "No problems found.")


def test_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__version__="2.0.1+cu118", version=SimpleNamespace(cuda="11.8"))
    found = doctor.check_torch(old)
    assert found[0].level == "broken"
    assert "2.1" in found[0].text
    assert doctor.check_torch(SimpleNamespace(__version__="2.13.0a0+git", version=old.version))[0].level == "ok"


@pytest.mark.parametrize(("installed", "fix"), [(None, "pip install numpy"),
                                                (SimpleNamespace(), "pip install 'numpy<2'")])  # yapf: disable
def test_a_numpy_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch, installed: Any, fix: str) -> None:
    """None is there, or one of another major version than torch was built for. The round trip does not need it."""

    def numpy(_: Any) -> Any:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setitem(sys.modules, "numpy", installed)
    monkeypatch.setattr("torch.Tensor.numpy", numpy)
    monkeypatch.setattr(doctor, "check_round_trips", lambda _: [])  # takes seconds
    found = {finding.subject: finding for finding in doctor.examine()}
    assert (found["NumPy"].level, found["NumPy"].fix) == ("broken", fix)
    assert "Numpy is not available" in found["NumPy"].text


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, [("cpu", [0, 0])]), (1, [("cpu", [0, 0]), ("cuda", [0, 0])]),
                                                    (3, [("cpu", [0, 0]), ("cuda", [0, 1, 2])])])
def test_a_round_trip_on_each_path(monkeypatch: pytest.MonkeyPatch, num_gpus: int, expected: list[Any]) -> None:
    made: list[tuple[str, list[int]]] = []

    def round_trip(device: str, gpus: list[int]) -> trip.Outcome:
        made.append((device, gpus))
        return trip.Outcome(["rank 1: no way"]) if device == "cuda" else trip.Outcome([], {"lent": 123.4})

    monkeypatch.setattr(trip, "round_trip", round_trip)
    monkeypatch.setattr("deep_ep._env.device_choice", lambda: ("cuda" if num_gpus else "cpu", "as told"))
    torch = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: num_gpus))
    found = doctor.check_round_trips(torch)
    assert made == expected
    assert [finding.level for finding in found[1:]] == ["ok", "broken"][:len(expected)]
    assert "there and back: lent 123 us" in found[1].text


def test_a_round_trip_between_virtual_nodes_takes_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEP_EP_RANKS_PER_NODE", "1")  # of the processes that it starts
    outcome = trip.round_trip("cpu", [0, 0])
    assert outcome.failures == []
    assert set(outcome.times_us) == {"through slots", "lent", "low latency"}


def test_a_rank_that_fails_is_named_and_its_peer_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = trip.round_trip("no such device", [0, 0]).failures
    assert len(failures) == 2
    assert "no such device" in failures[0]


def test_an_old_driver_is_told_by_the_error(tmp_path: Path) -> None:
    """The runtime meets a library that says it is the driver of CUDA 11.4."""
    if deep_ep_cpp.cuda_versions()[0] == 0:
        pytest.skip("built without CUDA")
    source = tmp_path / "libcuda.c"
    source.write_text("int cuInit(unsigned flags) { return 0; }\n"
                      "int cuDriverGetVersion(int *version) { *version = 11040; return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    code = "import deep_ep_cpp; print(deep_ep_cpp.cuda_versions()); deep_ep_cpp.Device(0)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "11040)" in run.stdout
    assert "CudaError" in run.stderr
    assert "cudaErrorInsufficientDriver" in run.stderr
    assert "or newer, and this machine's serves CUDA 11.4" in run.stderr
