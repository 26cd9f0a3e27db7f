"""What the doctor says of networks, on machines that are folders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deep_ep import doctor

probes = doctor.probes


def told_of_networks() -> str:
    return "\n".join(map(str, doctor.check_network()))


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def test_nics_and_their_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a machine with InfiniBand, a bond of two ports for RoCE, a virtual NIC, and interfaces that lead nowhere."""
    net = write_tree(
        tmp_path / "net", {
            "eth0/speed": "-1", "eth0/operstate": "up", "eth0/device/vendor": "0x1af4",
            "ens1/speed": "200000", "ens1/operstate": "up", "ens1/device/vendor": "0x15b3",
            "ens2/speed": "200000", "ens2/operstate": "down", "ens2/device/vendor": "0x15b3",
            "bond0/speed": "400000", "bond0/operstate": "up", "bond0/bonding/slaves": "ens1 ens2",
            "lo/operstate": "unknown", "docker0/operstate": "up"})  # yapf: disable
    rdma = write_tree(
        tmp_path / "rdma", {
            "mlx5_0/ports/1/state": "4: ACTIVE", "mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
            "mlx5_0/ports/1/link_layer": "InfiniBand",
            "mlx5_1/ports/1/state": "2: INIT", "mlx5_1/ports/1/rate": "2.5 Gb/sec (1X SDR)",
            "mlx5_1/ports/1/link_layer": "InfiniBand",
            "mlx5_2/ports/1/state": "1: DOWN", "mlx5_2/ports/1/rate": "40 Gb/sec (4X QDR)",
            "mlx5_2/ports/1/link_layer": "Ethernet",
            "mlx5_bond_0/ports/1/state": "4: ACTIVE", "mlx5_bond_0/ports/1/rate": "200 Gb/sec (4X HDR)",
            "mlx5_bond_0/ports/1/link_layer": "Ethernet", "mlx5_bond_0/ports/1/gid_attrs/ndevs/0": "bond0"
        })  # yapf: disable
    monkeypatch.setattr(probes, "INTERFACES", net)
    monkeypatch.setattr(probes, "RDMA_DEVICES", rdma)
    told = told_of_networks()
    for part in ("network: bond0 400 Gb/s, up; ens1 200 Gb/s, up; ens2 200 Gb/s, down; eth0 rate unknown, up",
                 "mlx5_0 port 1 400 Gb/s InfiniBand, ACTIVE", "mlx5_bond_0 port 1 400 Gb/s Ethernet, ACTIVE",
                 "[note] RDMA mlx5_1: port 1 is INIT\n       fix: start a subnet manager",
                 "[note] RDMA mlx5_2: port 1 is DOWN\n       fix: ip link set up"):
        assert part in told, part
    assert "docker0" not in told


def test_a_machine_without_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And one whose NIC tells nothing of itself."""
    monkeypatch.setattr(probes, "INTERFACES", tmp_path / "none")
    monkeypatch.setattr(probes, "RDMA_DEVICES", tmp_path / "none")
    assert "no interface that reaches other machines" in told_of_networks()
    monkeypatch.setattr(probes, "RDMA_DEVICES", write_tree(tmp_path, {"efa_0/ports/1/speed": ""}))
    assert "efa_0 port 1 rate unknown unknown, unknown" in told_of_networks()


@pytest.mark.parametrize("place", ["loader", "package", "nowhere"])
def test_nvshmem(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(probes.ctypes.util, "find_library", lambda _: "lib.so.3" if place == "loader" else None)

    def find_spec(name: str) -> Any:
        if place == "nowhere":
            raise ModuleNotFoundError(name)
        return SimpleNamespace(submodule_search_locations=["/site-packages/nvidia/nvshmem"])

    monkeypatch.setattr(probes.importlib.util, "find_spec", find_spec)
    where = {"loader": "lib.so.3", "package": "/site-packages/nvidia/nvshmem", "nowhere": "not found"}[place]
    assert doctor.check_nvshmem()[0].text.startswith(where)


NVSHMEM_FIX = "python -m deep_ep build-nvshmem"


@pytest.mark.parametrize(("kind", "requested", "is_built", "has_nic", "level", "says", "fix"), [
    ("cpu", "", False, True, "ok", "'host' (TCP) carries rows; it listens on eth7: 'nvshmem' works on GPUs only", ""),
    ("cuda", "host", True, True, "ok", "DEEP_EP_RAIL=host", ""),
    ("cuda", "", True, True, "ok", "'nvshmem' carries rows: libdeep_ep_nvshmem-3.4.5-0.so", ""),
    ("cuda", "", False, False, "ok", "'nvshmem' is not built", ""),
    ("cuda", "", False, True, "note", "is not built, though this machine has RDMA", NVSHMEM_FIX),
    ("cuda", "nvshmem", False, False, "broken", "'nvshmem' is not built", NVSHMEM_FIX),
])
def test_rail(monkeypatch: pytest.MonkeyPatch, kind: str, requested: str, is_built: bool, has_nic: bool, level: str,
              says: str, fix: str) -> None:
    ports = [probes.RdmaPort("mlx5_0", "1", "InfiniBand", "ACTIVE", 400.0)] if has_nic else []
    monkeypatch.setattr("deep_ep._env.device_choice", lambda: (kind, ""))
    monkeypatch.setattr("deep_ep._nvshmem.engine_files", lambda: [Path("libdeep_ep_nvshmem-3.4.5-0.so")]
                        if is_built else [])
    monkeypatch.setattr(probes, "rdma_ports", lambda: ports)
    native = SimpleNamespace(get_environment=lambda: {"rail": requested, "rail_interface": "eth7"})
    for folder in (Path("/opt/nvshmem"), None):
        monkeypatch.setattr("deep_ep._nvshmem.find_folder", lambda folder=folder: folder)
        found, = doctor.check_rail(native)
        assert (found.level, found.subject) == (level, "rail")
        assert says in found.text
        assert found.fix.endswith(fix)
        assert ("pip install nvidia-nvshmem" in found.fix) == (folder is None and fix != "")
