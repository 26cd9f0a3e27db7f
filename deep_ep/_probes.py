"""What a machine says of itself: the driver, NVLink, networks, and the limits of a container. For the doctor.

Imports nothing of this package, because the doctor runs where that does not import. A probe returns what it found, or
None where there is nothing to ask; what cannot be read is left out. Paths are module constants, so that tests can fake
a machine.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

NVML = "libnvidia-ml.so.1"
CUDA_DRIVER = "libcuda.so.1"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
STATUS_FILE = Path("/proc/self/status")
NAMESPACES = Path("/proc/self/ns")
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
SHM_MOUNT = Path("/dev/shm")  # noqa: S108 - asked for its size, and whether it can be written
INTERFACES = Path("/sys/class/net")
RDMA_DEVICES = Path("/sys/class/infiniband")
NVSHMEM = "nvshmem_host"
NVSHMEM_PACKAGE = "nvidia.nvshmem"
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/run/systemd/container"),
                   Path("/var/run/secrets/kubernetes.io"))
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NO_LIMIT = 1 << 60  # version 1 of cgroups writes a number near 2^63

BITS_PER_BYTE = 8
_MAX_LINKS = 18
_P2P_READ, _P2P_NVLINK = 0, 2  # NVML_P2P_CAPS_INDEX_*
_P2P_OK, _P2P_UNKNOWN = 0, 6  # NVML_P2P_STATUS_*
_TEXT_BYTES = 96
_FABRIC_HANDLES = 128  # CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
_FABRIC_STATES = ("not supported", "not started", "in progress", "completed")  # NVML_GPU_FABRIC_STATE_*


def read_text(path: Path) -> Optional[str]:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


class _FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t"""

    _fields_ = (("cluster_uuid", ctypes.c_ubyte * 16), ("status", ctypes.c_int), ("clique_id", ctypes.c_uint),
                ("state", ctypes.c_ubyte))


class NvmlError(Exception):
    """NVML is there and does not answer."""


class Nvml:
    """The few questions to the driver's management library that the doctor has. A context manager.

    Raises OSError where there is no such library, and NvmlError where it fails.
    """

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL(NVML)

    def __enter__(self) -> "Nvml":  # noqa: PYI034 - typing_extensions comes with torch, which may be missing
        self._call("nvmlInit_v2")
        return self

    def __exit__(self, *_: object) -> None:
        self._library.nvmlShutdown()

    def driver_version(self) -> str:
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call("nvmlSystemGetDriverVersion", text, _TEXT_BYTES)
        return text.value.decode()

    def devices(self) -> list[ctypes.c_void_p]:
        """Every GPU of the machine, whatever CUDA_VISIBLE_DEVICES says."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        handles = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            handles.append(handle)
        return handles

    def num_active_links(self, device: ctypes.c_void_p) -> int:
        return sum(self._is_link_active(device, link) for link in range(_MAX_LINKS))

    def uuid(self, device: ctypes.c_void_p) -> str:
        """GPU-xxxxxxxx-xxxx-..."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call("nvmlDeviceGetUUID", device, text, _TEXT_BYTES)
        return text.value.decode()

    def joined_by_nvlink(self, first: ctypes.c_void_p, second: ctypes.c_void_p) -> bool:
        return self._p2p_status(first, second, _P2P_NVLINK) == _P2P_OK

    def is_cut_off(self, first: ctypes.c_void_p, second: ctypes.c_void_p) -> bool:
        """Whether the driver says that the one cannot read the other's memory."""
        return self._p2p_status(first, second, _P2P_READ) not in (_P2P_OK, _P2P_UNKNOWN)

    def _p2p_status(self, first: ctypes.c_void_p, second: ctypes.c_void_p, capability: int) -> int:
        status = ctypes.c_int()
        self._call("nvmlDeviceGetP2PStatus", first, second, ctypes.c_int(capability), ctypes.byref(status))
        return status.value

    def fabric_state(self, device: ctypes.c_void_p) -> Optional[str]:
        """Whether NVSwitch knows the GPU: one of `_FABRIC_STATES`, or None where there is nothing to ask."""
        info = _FabricInfo()
        try:
            self._call("nvmlDeviceGetGpuFabricInfo", device, ctypes.byref(info))
        except NvmlError:  # older drivers, and GPUs without NVSwitch
            return None
        if not 0 < info.state < len(_FABRIC_STATES):
            return None
        return _FABRIC_STATES[info.state] + (f" with error {info.status}" if info.status else "")

    def _is_link_active(self, device: ctypes.c_void_p, link: int) -> bool:
        is_active = ctypes.c_uint()
        # Fails for a link that this GPU does not have.
        failed = self._library.nvmlDeviceGetNvLinkState(device, ctypes.c_uint(link), ctypes.byref(is_active))
        return failed == 0 and is_active.value == 1

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            error = getattr(self._library, name)(*arguments)
        except AttributeError as missing:
            raise NvmlError(f"{NVML} has no {name}") from missing
        if error != 0:
            raise NvmlError(f"{name} returned {error}")


@dataclass(frozen=True)
class Links:
    """NVLink between the GPUs of the machine, in NVML's order. `joined[i][j]`: GPUs i and j reach each other by it."""

    active: tuple[int, ...]
    joined: tuple[tuple[bool, ...], ...]

    @property
    def is_complete(self) -> bool:
        return all(all(row) for row in self.joined)

    def __str__(self) -> str:
        """As a matrix: NV and the number of links that are up, or `-`."""
        names = [f"GPU{i}" for i in range(len(self.active))]
        rows = [["", *names]]
        for i, row in enumerate(self.joined):
            cells = ["." if i == j else f"NV{self.active[i]}" if is_joined else "-" for j, is_joined in enumerate(row)]
            rows.append([names[i], *cells])
        return "\n".join("       " + " ".join(f"{cell:<5}" for cell in row).rstrip() for row in rows)


def nvlink(nvml: Nvml) -> Links:
    devices = nvml.devices()
    joined = tuple(
        tuple(first is second or nvml.joined_by_nvlink(first, second) for second in devices) for first in devices)
    return Links(tuple(nvml.num_active_links(device) for device in devices), joined)


def gpus_cut_off_from(uuid: str) -> frozenset[str]:
    """The GPUs of this machine, by UUID, whose memory the driver says that GPU cannot read; also hidden ones."""
    try:
        with Nvml() as nvml:
            devices = {nvml.uuid(device): device for device in nvml.devices()}
            own = devices.pop(uuid, None)
            return frozenset(other for other, device in devices.items()
                             if own is not None and nvml.is_cut_off(own, device))
    except (OSError, NvmlError):
        return frozenset()


def driver_version() -> Optional[str]:
    """Of the NVIDIA kernel driver; None where there is none."""
    try:
        with Nvml() as nvml:
            return nvml.driver_version()
    except (OSError, NvmlError):
        found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", read_text(DRIVER_FILE) or "")
        return found.group(1) if found else None


def container() -> Optional[str]:
    """What says that this is a container."""
    for mark in CONTAINER_MARKS:
        if mark.exists():
            return str(mark)
    return None


def memory_limit() -> Optional[int]:
    """Bytes that the control group may use; None: no limit."""
    for path in MEMORY_LIMITS:
        text = read_text(path)
        if text is not None and text.isdigit() and int(text) < NO_LIMIT:
            return int(text)
    return None


def num_imex_channels() -> int:
    """Channels over which processes of several hosts may share GPU memory (multi-node NVLink)."""
    try:
        return sum(1 for _ in IMEX_CHANNELS.iterdir())
    except OSError:
        return 0


def num_gpus_with_fabric_handles() -> Optional[int]:
    """GPUs whose driver can export memory to other hosts; None without a driver, or where it does not know of it."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    found = 0
    for index in range(count.value):
        device, is_supported = ctypes.c_int(), ctypes.c_int()
        if (driver.cuDeviceGet(ctypes.byref(device), index) != 0
                or driver.cuDeviceGetAttribute(ctypes.byref(is_supported), _FABRIC_HANDLES, device) != 0):
            return None
        found += is_supported.value
    return found


def shm_bytes() -> Optional[int]:
    """The size of the mount /dev/shm."""
    try:
        found = os.statvfs(SHM_MOUNT)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks


def memlock_bytes() -> Optional[int]:
    """How much memory this process may pin; None: any amount."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def status_field(name: str) -> Optional[str]:
    """A line of /proc/self/status."""
    found = re.search(rf"^{name}:\s*(.*)$", read_text(STATUS_FILE) or "", re.M)
    return found.group(1) if found else None


def ptrace_scope() -> Optional[int]:
    text = read_text(PTRACE_SCOPE)
    return int(text) if text is not None and text.isdigit() else None


def is_shm_writable() -> bool:
    return os.access(SHM_MOUNT, os.W_OK | os.X_OK)


@dataclass(frozen=True)
class Interface:
    """A network interface with hardware behind it, or a bond of such."""

    name: str
    is_up: bool
    gbps: Optional[float]  # None: the driver does not tell (virtual machines)

    def __str__(self) -> str:
        return f"{self.name} {_rate(self.gbps)}, {'up' if self.is_up else 'down'}"


@dataclass(frozen=True)
class RdmaPort:
    device: str
    port: str
    link_layer: str  # InfiniBand, Ethernet (RoCE) or what the driver calls it (EFA: Unspecified)
    state: str  # ACTIVE, INIT, DOWN, ...
    gbps: Optional[float]

    def __str__(self) -> str:
        return f"{self.device} port {self.port} {_rate(self.gbps)} {self.link_layer}, {self.state}"


def _rate(gbps: Optional[float]) -> str:
    return "rate unknown" if gbps is None else f"{gbps:g} Gb/s"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _bonded(interface: Path) -> list[Path]:
    """The interfaces that a bond joins."""
    return [INTERFACES / name for name in (read_text(interface / "bonding" / "slaves") or "").split()]


def _interface_gbps(interface: Path) -> Optional[float]:
    members = _bonded(interface)
    if members:
        known = [rate for rate in map(_interface_gbps, members) if rate is not None]
        return sum(known) if known else None
    mbps = read_text(interface / "speed") or ""
    return int(mbps) / 1000 if mbps.isdigit() and int(mbps) > 0 else None  # -1, or an error: unknown


def network_interfaces() -> list[Interface]:
    """Those that may reach other machines: no loopback, bridge or tunnel."""
    return [
        Interface(path.name,
                  read_text(path / "operstate") == "up", _interface_gbps(path)) for path in _entries(INTERFACES)
        if (path / "device").exists() or _bonded(path)
    ]


def rdma_ports() -> list[RdmaPort]:
    """Ports of the RDMA NICs. The rate of a bonded port is that of the bond: the device tells one of its links."""
    found = []
    for device in _entries(RDMA_DEVICES):
        for port in _entries(device / "ports"):
            rate = re.match(r"[\d.]+", read_text(port / "rate") or "")
            gbps = float(rate.group()) if rate else None
            interface = INTERFACES / (read_text(port / "gid_attrs" / "ndevs" / "0") or "none")
            if _bonded(interface):
                gbps = _interface_gbps(interface) or gbps
            state = (read_text(port / "state") or "unknown").split(": ")[-1]
            found.append(RdmaPort(device.name, port.name, read_text(port / "link_layer") or "unknown", state, gbps))
    return found


def nic_gb_per_s(names: Sequence[str] = ()) -> Optional[float]:
    """What the RDMA NICs of this machine that are up carry in one direction, in sum, in GB/s; None: unknown.

    names: which devices count; empty: all. Raises ValueError for a name that no device has.
    """
    all_ports = rdma_ports()
    unknown = sorted(set(names) - {port.device for port in all_ports})
    if unknown:
        devices = ", ".join(dict.fromkeys(port.device for port in all_ports)) or "none"
        raise ValueError(f"no RDMA device {', '.join(map(repr, unknown))} (this machine has: {devices})")
    ports = [port for port in all_ports if port.state == "ACTIVE" and (not names or port.device in names)]
    known = [port.gbps for port in ports if port.gbps is not None]
    return sum(known) / BITS_PER_BYTE if known else None


def nvshmem_library() -> Optional[str]:
    """Where NVSHMEM's host library is: what the loader finds, or the PyPI package's folder."""
    found = ctypes.util.find_library(NVSHMEM)
    if found is not None:
        return found
    return nvshmem_package()


def nvshmem_package() -> Optional[str]:
    """The folder of the PyPI package."""
    try:
        package = importlib.util.find_spec(NVSHMEM_PACKAGE)
    except (ImportError, ValueError):  # no package `nvidia`
        return None
    folders = package.submodule_search_locations if package is not None else None
    return next(iter(folders), None) if folders else None


def namespace(kind: str) -> Optional[str]:
    """The namespace (ipc, pid, ...) of this process: two containers that print the same one share it."""
    try:
        return str((NAMESPACES / kind).readlink())
    except OSError:
        return None
