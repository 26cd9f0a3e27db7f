"""Says what is built, what this machine has, what does not fit together, and how to mend it. Run it first.

    python -m deep_ep doctor [--json]

Also runs as a plain file, for when `import deep_ep` fails. Exit status: 0, nothing is broken (notes may stand); 1,
something is; 2, the command was not understood. With --json: a list of objects with level, subject, text and fix.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

GIB = 1 << 30
LITTLE_MEMORY_BYTES = GIB // 4
MEMORY_INFO = Path("/proc/meminfo")
OLDEST_TORCH = (2, 1)
LITTLE_SHM_BYTES = GIB
SHM_SUBJECT = "/dev/shm"  # noqa: S108 - a name in the report
START_FABRIC_MANAGER = "sudo systemctl start nvidia-fabricmanager (its version must be the driver's), then try again"
ANY_INTERFACE = "the interface that reaches MASTER_ADDR"
INSTALL_FIX = "build and install the package for this Python: pip install . (README.md)"


@dataclass
class Finding:
    """One line of the report. `level`: ok, note (works, worth knowing) or broken (with a fix)."""

    level: str
    subject: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": " ok ", "note": "note", "broken": "FAIL"}[self.level]
        return f"[{mark}] {self.subject}: {self.text}" + (f"\n       fix: {self.fix}" if self.fix else "")


def _load(name: str) -> Any:
    """The module, or the exception that importing it raised."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is what we report
        return error


def _load_probes() -> ModuleType:
    """deep_ep/_env.py as a file, because the package may be what does not import."""
    spec = importlib.util.spec_from_file_location("_deep_ep_probes", Path(__file__).with_name("_env.py"))
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - for mypy: it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


probes = _load_probes()


def _guarded(subject: str, check: Callable[..., list[Finding]], *arguments: Any) -> list[Finding]:
    """A probe that fails is a line of the report; the others still run."""
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001 - see _load
        return [Finding("note", subject, f"cannot tell: {type(error).__name__}: {error}")]


def check_python() -> list[Finding]:
    return [Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")]


def check_torch(torch: Any) -> list[Finding]:
    if isinstance(torch, Exception):
        return [Finding("broken", "torch", f"does not import: {torch}", "pip install torch")]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return [
            Finding(
                "broken", "torch", f"{torch.__version__} is too old: deep_ep uses names that came with "
                f"{'.'.join(map(str, OLDEST_TORCH))}", "install a newer torch")
        ]
    return [Finding("ok", "torch", f"{torch.__version__}, built for {built_for}")]


def check_numpy(torch: Any) -> list[Finding]:
    """Asks torch: a NumPy that imports may still be one that this torch was not built for."""
    try:
        torch.empty(1).numpy()
    except RuntimeError as error:
        text = f"torch cannot use it ({error}), and torch.distributed needs it when a Buffer is built over a group"
        is_there = not isinstance(_load("numpy"), Exception)
        return [Finding("broken", "NumPy", text, "pip install 'numpy<2'" if is_there else "pip install numpy")]
    return [Finding("ok", "NumPy", "torch can use it")]


def check_extension(native: Any) -> list[Finding]:
    if isinstance(native, Exception):
        return [Finding("broken", "deep_ep_cpp", f"does not import: {native}", INSTALL_FIX)]
    kinds = "CPU executor" + (" and CUDA" if native.is_cuda_built() else " only")
    if native.is_cuda_built():
        kinds += " with SM90 features" if native.is_sm90_compiled() else " without SM90 features"
    found = [Finding("ok", "deep_ep_cpp", f"{kinds}, {native.topk_idx_bits()}-bit topk_idx_t, {native.__file__}")]
    try:
        values = ", ".join(f"{name}={value!r}" for name, value in native.get_environment().items())
    except Exception as error:  # noqa: BLE001 - see _load
        found.append(Finding("broken", "environment", str(error), "correct or unset the variable"))
    else:
        found.append(Finding("ok", "environment", values))
    return found


def check_package() -> list[Finding]:
    package = _load("deep_ep")
    if isinstance(package, Exception):
        return [Finding("broken", "deep_ep", f"does not import: {package}", INSTALL_FIX)]
    has = [name for name, is_here in package.features().items() if is_here]
    return [
        Finding("ok", "deep_ep", f"{package.__version__}, {Path(package.__file__).parent}"),
        Finding("ok", "features", ", ".join(has))
    ]


def check_driver(native: Any) -> list[Finding]:
    """The NVIDIA driver against the CUDA runtime that is compiled in."""
    runtime, served = native.cuda_versions()
    version = probes.driver_version()
    if runtime == 0:
        driver = f"NVIDIA driver {version}" if version else "no NVIDIA driver"
        return [Finding("ok", "driver", f"{driver}; deep_ep_cpp was built without CUDA and needs none")]
    complaint = native.describe_old_driver(runtime, served)
    if complaint:
        here = f"NVIDIA driver {version}: " if version else "no NVIDIA driver: "
        # Without any driver there is no GPU to lose.
        if version or served:
            return [Finding("broken", "driver", here + complaint, "update the NVIDIA driver")]
        return [Finding("note", "driver", here + complaint, "none if there is no GPU; else install the driver")]
    return [
        Finding(
            "ok", "driver", f"NVIDIA driver {version or '(version unknown)'} serves CUDA {_cuda(served)}; "
            f"deep_ep_cpp has the runtime of CUDA {_cuda(runtime)}")
    ]


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def check_nvlink() -> list[Finding]:
    """Of all GPUs of the machine, in NVML's order, whatever this process may see."""
    try:
        library = probes.Nvml()
    except OSError:
        return [Finding("ok", "NVLink", f"no {probes.NVML} here, so there is no NVIDIA driver to ask")]
    with library as nvml:
        links = probes.nvlink(nvml)
    if len(links.active) < 2:
        return [Finding("ok", "NVLink", f"{len(links.active)} GPU(s) in this machine, so nothing to join")]
    if links.is_complete:
        return [Finding("ok", "NVLink", f"joins all {len(links.active)} GPUs\n{links}")]
    return [
        Finding(
            "note", "NVLink", f"does not join all GPUs (- stands for PCIe or nothing); ranks work best on GPUs that "
            f"it joins\n{links}", "choose GPUs that it joins with CUDA_VISIBLE_DEVICES")
    ]


def check_gpus(torch: Any, native: Any) -> list[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda:
            return [Finding("note", "GPUs", "torch sees none: kernels run on the CPU executor, slowly",
                            "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES")]  # yapf: disable
        return [Finding("note", "GPUs", "torch is a CPU build: kernels run on the CPU executor, slowly",
                        "none if there is no GPU; else install a torch that is built for CUDA")]  # yapf: disable
    found = []
    if not native.is_cuda_built():
        found.append(
            Finding("broken", "GPUs", "there are GPUs, but deep_ep_cpp was built without CUDA",
                    "build it again where nvcc is on the PATH, or set CUDA_HOME; or choose DEEP_EP_DEVICE=cpu"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            Finding(
                "ok", f"GPU {index}", f"{properties.name}, SM{properties.major}{properties.minor}, "
                f"{properties.multi_processor_count} SMs, {free / GIB:.1f} of {total / GIB:.1f} GiB free"))
    return found + check_peer_access(torch)


def check_peer_access(torch: Any) -> list[Finding]:
    count = torch.cuda.device_count()
    cut = [
        f"{i}-{j}" for i in range(count) for j in range(count)
        if i != j and not torch.cuda.can_device_access_peer(i, j)
    ]
    if cut:
        return [
            Finding(
                "note", "peer access", f"these GPUs do not reach each other's memory: {', '.join(cut)}; ranks on them "
                "share host memory, at the rate of PCIe",
                "use GPUs that NVLink or PCIe peer-to-peer joins (nvidia-smi topo -p2p r), or one of each group")
        ]
    return [Finding("ok", "peer access", "every GPU reaches every other" if count > 1 else "one GPU, no peers")]


def check_fabric() -> list[Finding]:
    """Behind NVSwitch a GPU works only once the fabric manager has set it up."""
    try:
        library = probes.Nvml()
    except OSError:
        return []  # check_nvlink says so
    with library as nvml:
        states = [nvml.fabric_state(device) for device in nvml.devices()]
    known = [state for state in states if state is not None]
    if not known:
        return [Finding("ok", "NVSwitch fabric", "none, or the driver does not tell")]
    bad = [f"GPU {i}: {state}" for i, state in enumerate(states) if state not in (None, "completed")]
    if bad:
        return [Finding("note", "NVSwitch fabric", "not set up: " + "; ".join(bad), START_FABRIC_MANAGER)]
    return [Finding("ok", "NVSwitch fabric", f"set up for {len(known)} GPU(s)")]


def check_nvshmem() -> list[Finding]:
    found = probes.nvshmem_library()
    return [Finding("ok", "NVSHMEM", (found or "not found") + "; calls inside a node do not use it")]


def check_network() -> list[Finding]:
    """NICs and their rates, from sysfs. Calls inside a node use none."""
    interfaces, ports = probes.network_interfaces(), probes.rdma_ports()
    found = [
        Finding("ok", "network", "; ".join(map(str, interfaces)) or "no interface that reaches other machines"),
        Finding("ok", "RDMA", "; ".join(map(str, ports)) or "no RDMA device")
    ]
    return found + [_idle_port(port) for port in ports if port.state != "ACTIVE"]


def _idle_port(port: Any) -> Finding:
    fix = f"ip link set up its interface, or check the cable (ibstat {port.device})"
    if port.state == "INIT":
        fix = "start a subnet manager for this network (opensm, or the switch's)"
    return Finding("note", f"RDMA {port.device}", f"port {port.port} is {port.state}", fix)


def check_memory() -> list[Finding]:
    """Buffers on the CPU are anonymous shared memory: no mount is needed, only free memory."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError) as error:
        return [Finding("note", "memory", f"cannot tell how much is free: {error}")]
    text = f"{available / GIB:.1f} GiB free, {os.cpu_count()} CPUs"
    if available < LITTLE_MEMORY_BYTES:
        return [Finding("note", "memory", text + ": large Buffers on the CPU will not fit",
                        "end other processes, or make Buffers smaller (docs/guides/sizing.md)")]  # yapf: disable
    return [Finding("ok", "memory", text)]


def check_container() -> list[Finding]:
    """What a container or the system may withhold. Buffers on the CPU are memfd files that peers open under /proc."""
    inside = probes.container()
    found = [Finding("ok", "container", f"yes ({inside})" if inside else "none that shows")]
    names = [name for name in map(probes.namespace, ("ipc", "pid", "user")) if name]
    if names:
        found.append(
            Finding("ok", "namespaces",
                    ", ".join(names) + ": ranks in several containers must share ipc and pid (docker: --ipc, --pid)"))
    limit = probes.memory_limit()
    if limit is not None:
        found.append(
            Finding(
                "ok", "memory limit", f"{limit / GIB:.1f} GiB for this container or control group "
                "(Buffers on the CPU count, and heaps in host memory)"))
    return found


def check_limits() -> list[Finding]:
    # Opening a peer's descriptor under /proc is a read access, which the ptrace scope does not restrict.
    scope, seccomp = probes.ptrace_scope(), probes.status_field("Seccomp")
    filters = {"0": "off", "1": "strict", "2": "filtering system calls"}.get(seccomp or "", "unknown")
    memlock = probes.memlock_bytes()
    return [
        _check_shm(),
        Finding(
            "ok", "memlock", "unlimited" if memlock is None else
            f"{memlock / (1 << 20):.1f} MiB (the driver pins host memory without it; RDMA wants: ulimit -l unlimited)"),
        Finding(
            "ok", "seccomp", f"{filters}; ptrace scope {'not there' if scope is None else scope}: deep_ep needs "
            "memfd_create and /proc/PID/fd of the same user, and no ptrace")
    ]


def _check_shm() -> Finding:
    """Each rank keeps a page of 8 KiB there; without it peers must see each other's processes."""
    size = probes.shm_bytes()
    if size is None or not probes.is_shm_writable():
        return Finding("note", SHM_SUBJECT, ("not there" if size is None else "cannot be written") +
                       ": ranks find each other through /proc instead; NCCL and data loaders may fail",
                       "mount it (docker: --shm-size=1g; Kubernetes: an emptyDir with medium: Memory at /dev/shm)")
    if size < LITTLE_SHM_BYTES:
        return Finding(
            "note", SHM_SUBJECT, f"{size / (1 << 20):.0f} MiB: enough for deep_ep, which keeps 8 KiB for each rank "
            "there; NCCL and data loaders may need more", "docker: --shm-size=1g, or --ipc=host")
    return Finding("ok", SHM_SUBJECT, f"{size / GIB:.1f} GiB (deep_ep keeps 8 KiB for each rank there)")


def _find_heap(requested: str, topology: Any) -> Finding:
    """The way of bytes within a node."""
    device_kind, _ = importlib.import_module("deep_ep._env").device_choice()
    module = importlib.import_module("deep_ep._peers")
    placement, reason = module.choose_heap(requested, topology, device_kind)
    if device_kind != "cuda":
        return Finding("ok", "heap", f"host memory: {reason}")
    if placement == module.HOST:
        return Finding("note", "heap", f"host memory, which every GPU reaches over PCIe: {reason}",
                       "unset DEEP_EP_HEAP" if requested else "see the line `peer access`")
    return Finding("ok", "heap", f"GPU memory, over {_name_links(topology.ranks_per_node)}: {reason}")


def _name_links(num_gpus: int) -> str:
    """What joins the GPUs of a node that reach each other's memory."""
    if num_gpus == 1:
        return "nothing, as a node has one GPU"
    try:
        with probes.Nvml() as nvml:
            return "NVLink" if probes.nvlink(nvml).is_complete else "NVLink where there is one, else PCIe peer access"
    except (OSError, probes.NvmlError):
        return "NVLink or PCIe peer access"


def check_topology(native: Any) -> list[Finding]:
    """The nodes of a group with a rank on each GPU of this machine, and what could join it to others."""
    module = importlib.import_module("deep_ep._peers")
    environment = native.get_environment()
    ranks_per_node = int(environment["ranks_per_node"])
    try:
        topology = module.find_topology(0, module.places_of_this_machine(), ranks_per_node, environment["heap"])
    except (ValueError, RuntimeError) as error:
        return [Finding("note", "topology", f"a rank on each GPU of this machine would be refused: {error}",
                        "give ranks to equally many GPUs of each group (CUDA_VISIBLE_DEVICES), or set "
                        "DEEP_EP_RANKS_PER_NODE=1")]  # yapf: disable
    channels = probes.num_imex_channels()
    handles = probes.num_gpus_with_fabric_handles()
    fabric = f"{channels} IMEX channel(s)" if channels else "no IMEX channel"
    fabric += "" if handles is None else f", {handles} GPU(s) with fabric handles"
    return [
        Finding("ok", "topology", f"a rank on each GPU of this machine: {topology}"),
        _find_heap(environment["heap"], topology),
        Finding("ok", "multi-node NVLink", f"{fabric}; this version does not use it")
    ]


def check_rail(native: Any) -> list[Finding]:
    """What carries rows between this machine and others."""
    environment = native.get_environment()
    nvshmem = importlib.import_module("deep_ep._nvshmem")
    kind, _ = importlib.import_module("deep_ep._env").device_choice()
    requested = environment["rail"]
    tcp = f"between nodes 'host' (TCP) carries rows; it listens on {environment['rail_interface'] or ANY_INTERFACE}"
    if requested == "host" or kind != "cuda":
        reason = "DEEP_EP_RAIL=host" if requested == "host" else "'nvshmem' works on GPUs only"
        return [Finding("ok", "rail", f"{tcp}: {reason}")]
    engines = nvshmem.engine_files()
    if engines:
        return [Finding("ok", "rail", f"between nodes 'nvshmem' carries rows: {engines[0]}")]
    fix = ("" if nvshmem.find_folder() else nvshmem.INSTALL + "; then ") + "python -m deep_ep build-nvshmem"
    is_missed = any(port.state == "ACTIVE" for port in probes.rdma_ports())
    level = "broken" if requested == "nvshmem" else "note" if is_missed else "ok"
    reason = f"'nvshmem' is not built{', though this machine has RDMA' if is_missed else ''}"
    return [Finding(level, "rail", f"{tcp}: {reason}", "" if level == "ok" else fix)]


def check_round_trips(torch: Any) -> list[Finding]:
    """Ranks in processes of their own send tokens to each other and back, on every path that this machine has."""
    trip = importlib.import_module("deep_ep.bench.round_trip")
    kind, reason = importlib.import_module("deep_ep._env").device_choice()
    paths = [("CPU device, two processes", "cpu", [0, 0])]
    num_gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if num_gpus == 1:
        paths.append(("two ranks on one GPU", "cuda", [0, 0]))
    elif num_gpus > 1:
        paths.append((f"{num_gpus} GPUs, a rank on each", "cuda", list(range(num_gpus))))
    found = [Finding("ok", "device", f"{kind} ({reason})")]
    for name, device, gpus in paths:
        subject = f"round trip, {name}"
        outcome = trip.round_trip(device, gpus)
        if outcome.failures:
            found.append(
                Finding(
                    "broken", subject, "\n       ".join(outcome.failures),
                    "what the sentence says (docs/errors.md has more); DEEP_EP_DEVICE=cpu does without the GPU"
                    if device == "cuda" else "what the sentence says (docs/errors.md has more); this needs "
                    "memfd_create and /proc"))
        else:
            times = ", ".join(f"{name} {time_us:.0f} us" for name, time_us in outcome.times_us.items())
            nodes = trip.num_nodes(len(gpus))
            where = f" over {nodes} virtual nodes" if nodes > 1 else ""
            found.append(Finding("ok", subject, f"{trip.NUM_TOKENS} tokens there and back{where}: {times}"))
    return found


def _has_broken(found: list[Finding], *subjects: str) -> bool:
    return any(finding.level == "broken" and finding.subject in subjects for finding in found)


def examine() -> list[Finding]:
    """Everything, in the order in which one thing needs another."""
    torch, native = _load("torch"), _load("deep_ep_cpp")
    found = _guarded("python", check_python) + _guarded("torch", check_torch, torch)
    found += _guarded("deep_ep_cpp", check_extension, native) + _guarded("memory", check_memory)
    found += _guarded("container", check_container) + _guarded("limits", check_limits)
    found += _guarded("NVLink", check_nvlink) + _guarded("NVSwitch fabric", check_fabric)
    found += _guarded("network", check_network) + _guarded("NVSHMEM", check_nvshmem)
    if not isinstance(native, Exception):
        found += _guarded("driver", check_driver, native)
    if _has_broken(found, "torch", "deep_ep_cpp"):
        return found
    found += _guarded("NumPy", check_numpy, torch)
    found += _guarded("deep_ep", check_package) + _guarded("GPUs", check_gpus, torch, native)
    if _has_broken(found, "deep_ep", "environment"):
        return found
    found += _guarded("topology", check_topology, native) + _guarded("rail", check_rail, native)
    return found + _guarded("round trip", check_round_trips, torch)


def report(is_json: bool) -> int:
    """Prints what was found; the exit status."""
    found = examine()
    num_broken = sum(finding.level == "broken" for finding in found)
    if is_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print("\n".join(map(str, found)))
        print(f"{num_broken} problem(s)" if num_broken else "No problems found.")
    return 1 if num_broken else 0


def main(arguments: list[str]) -> int:
    """As a file of its own, where deep_ep may not import; `python -m deep_ep doctor` has the same option."""
    parser = argparse.ArgumentParser(prog="python -m deep_ep doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    return report(parser.parse_args(arguments).json)


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    # As a plain file, its folder comes first on the path, where modules of the package would hide others.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    if (folder.parent / "setup.py").exists():
        sys.path.insert(0, str(folder.parent))
    sys.exit(main(sys.argv[1:]))
