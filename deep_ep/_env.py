"""What this process and this machine have: the environment, this build and the device; the driver, NVLink and networks.

DEEP_EP_* variables are read by csrc/core/env.cc, all others of this package here. The doctor runs this file where torch
or the package does not import: functions import what they need of those. A probe of the machine returns what it found,
or None where there is nothing to ask; what cannot be read is left out. Its paths are module constants, so that tests
can fake a machine.
"""

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import deep_ep_cpp


def nvshmem_qp_depth() -> int:
    """NVSHMEM_QP_DEPTH: entries of a queue pair; low-latency users set it before they build a Buffer."""
    return int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))


def nvshmem_dir() -> Optional[Path]:
    """NVSHMEM_DIR: where NVSHMEM is installed; None: the PyPI package, if there is one."""
    given = os.environ.get("NVSHMEM_DIR")
    return Path(given) if given else None


def nvshmem_transport() -> str:
    """NVSHMEM_REMOTE_TRANSPORT: what NVSHMEM was told to use between nodes; empty: its default."""
    return os.environ.get("NVSHMEM_REMOTE_TRANSPORT", "").strip().lower()


def is_ibgda_enabled() -> bool:
    """NVSHMEM_IB_ENABLE_IBGDA."""
    return os.environ.get("NVSHMEM_IB_ENABLE_IBGDA", "").strip().lower() in ("1", "true", "yes", "on")


def nvcc_candidates() -> list[str]:
    """CUDACXX, CUDA_HOME, CUDA_PATH, then the usual places, as cmake/EpCuda.cmake looks for the compiler."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    given = os.environ.get("CUDACXX")
    return [*([given] if given else []), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]


def visible_devices() -> list[str]:
    """CUDA_VISIBLE_DEVICES: the physical GPUs behind torch's device numbers; empty when all are visible."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def master_address() -> str:
    """MASTER_ADDR: a host that every rank of torch.distributed reaches; empty where nobody has set it.

    Read when it is needed, as programs set it after they have imported this package.
    """
    return os.environ.get("MASTER_ADDR", "").strip()


def lend_bytes() -> Optional[int]:
    """DEEP_EP_LEND_BYTES: what a Buffer lends when its caller does not say; None: a part of num_nvl_bytes."""
    import deep_ep_cpp
    num_bytes = int(deep_ep_cpp.get_environment()["lend_bytes"])
    return None if num_bytes == deep_ep_cpp.Buffer.LEND_PART_OF_DATA else num_bytes


def cost_model() -> str:
    """DEEP_EP_COST_MODEL: a file, "off", or nothing."""
    import deep_ep_cpp
    return str(deep_ep_cpp.get_environment()["cost_model"])


def cache_folder() -> Optional[Path]:
    """XDG_CACHE_HOME: where this package keeps what it has measured. None: this user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "deep_ep"
    except RuntimeError:  # HOME is not set, and no entry of the user database says it
        return None


def set_device(device: str) -> None:
    """Chooses the device, 'cpu' or 'cuda', of processes that this one starts (its own too, before it has looked)."""
    os.environ["DEEP_EP_DEVICE"] = device


def set_ranks_per_node(ranks_per_node: int) -> None:
    """Makes virtual nodes of the ranks, in processes that this one starts."""
    os.environ["DEEP_EP_RANKS_PER_NODE"] = str(ranks_per_node)


def prepare_threaded_ranks() -> None:
    """Before CUDA starts, where ranks are threads that share a GPU.

    Every stream gets a hardware queue, or one rank's kernel waits behind another's that waits for it; and no kernel is
    loaded late, which waits for the device.
    """
    os.environ.update({"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"})


def speed_settings() -> dict[str, str]:
    """What is set that may change a measured time, for reports: of this package, and of NCCL."""
    harmless = ("DEEP_EP_DEVICE", "DEEP_EP_TIMEOUT_SECS")
    found = {
        name: value
        for name, value in sorted(os.environ.items()) if name.startswith(("DEEP_EP_", "NCCL_")) and name not in harmless
    }
    # Always: reports from before lending was the rule do not have it.
    return {"DEEP_EP_LEND_BYTES": "automatic"} | found


@functools.cache
def device_choice() -> tuple[str, str]:
    """('cuda' or 'cpu', why), decided once per process."""
    import torch

    import deep_ep_cpp
    requested = deep_ep_cpp.get_environment()["device"]
    if requested == "cpu":
        return "cpu", "DEEP_EP_DEVICE=cpu"
    obstacle = ""
    if not torch.cuda.is_available():
        obstacle = "torch.cuda.is_available() is False"
    elif not deep_ep_cpp.is_cuda_built():
        obstacle = "deep_ep_cpp was built without CUDA"
    if not obstacle:
        return "cuda", "a GPU is available"
    if requested == "cuda":
        raise deep_ep_cpp.Error(f"DEEP_EP_DEVICE=cuda, but {obstacle}; run `python -m deep_ep doctor`")
    return "cpu", obstacle


@functools.cache
def native_device(index: int) -> "deep_ep_cpp.Device":
    import deep_ep_cpp
    return deep_ep_cpp.Device(index)


__version__ = "1.4.0.dev0"  # the build reads it from here

FEATURES = {
    "high_throughput": "dispatch and combine inside a node",
    "low_latency": "low_latency_dispatch and low_latency_combine inside a node",
    "internode": "the high-throughput mode across nodes",
    "low_latency_internode": "the low-latency mode across nodes",
    "lending": "num_lend_bytes and Buffer.lend: peers write and read tensors in place",
    "worst_case": "num_worst_tokens: a dispatch that the host does not wait for",
    "cuda_graphs": "calls that can be captured",
    "fp8": "low_latency_dispatch with use_fp8, and FP8 rows with scales in dispatch",
    "logfmt": "low_latency_combine with use_logfmt",
    "shrink": "masked ranks: enable_shrink and its calls",
    "on_failure": "Buffer(on_failure=...): failures are told even where only graphs are replayed",
    "wait_counters": "Buffer.get_wait_counters and Buffer.dump_waits: which rank was late, at which stage, how often",
    "call_checks": "DEEP_EP_CHECK_CALLS",
    "cpu": "the CPU device",
    "cuda": "the CUDA device is compiled in (there may be no GPU)",
    "sm90": "code that uses the features of SM90 and newer GPUs is compiled in",
}


def features() -> dict[str, bool]:
    """Every feature that this version knows by name, and whether this build has it."""
    import deep_ep_cpp
    found = dict.fromkeys(FEATURES, True)
    found["cuda"] = found["cuda_graphs"] = bool(deep_ep_cpp.is_cuda_built())
    found["sm90"] = bool(deep_ep_cpp.is_sm90_compiled())
    return found


def supports(feature: str) -> bool:
    """Whether this build has a feature. Names that it does not know are not there: False.

    So `getattr(deep_ep, "supports", lambda name: False)("lending")` works with every library of this interface. The
    names are in docs/api.md. It says what the build has; what the machine has is for `python -m deep_ep doctor`.

    Raises TypeError when `feature` is not a str.
    """
    if not isinstance(feature, str):
        raise TypeError(f"feature must be a str, got {type(feature).__name__}")
    return features().get(feature, False)


# What the machine says of itself.

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
