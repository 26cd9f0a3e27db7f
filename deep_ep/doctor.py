"""Says what is built, what this machine has, what does not fit together, and how to mend it.

    python -m deep_ep.doctor [--json]

Also runs as a plain file, for when `import deep_ep` fails. Exit status 1: something is broken.
"""

import argparse
import importlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
LITTLE_MEMORY_BYTES = GIB // 4
MEMORY_INFO = Path("/proc/meminfo")
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


def check_python() -> list[Finding]:
    return [Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")]


def check_torch(torch: Any) -> list[Finding]:
    if isinstance(torch, Exception):
        return [Finding("broken", "torch", f"does not import: {torch}", "pip install torch")]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    return [Finding("ok", "torch", f"{torch.__version__}, built for {built_for}")]


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
    return [Finding("ok", "deep_ep", f"{package.__version__}, {Path(package.__file__).parent}")]


def check_gpus(torch: Any, native: Any) -> list[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda:
            return [Finding("note", "GPUs", "torch sees none: kernels run on the CPU executor, slowly",
                            "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES")]  # yapf: disable
        return [Finding("note", "GPUs", "torch is a CPU build: kernels run on the CPU executor, slowly")]
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
            Finding("broken", "peer access", f"these GPUs do not reach each other's memory: {', '.join(cut)}",
                    "use GPUs that NVLink or PCIe peer-to-peer joins (nvidia-smi topo -p2p r), or one of each group")
        ]
    return [Finding("ok", "peer access", "every GPU reaches every other" if count > 1 else "one GPU, no peers")]


def check_memory() -> list[Finding]:
    """Buffers on the CPU are anonymous shared memory: no mount is needed, only free memory."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError) as error:
        return [Finding("note", "memory", f"cannot tell how much is free: {error}")]
    text = f"{available / GIB:.1f} GiB free, {os.cpu_count()} CPUs"
    if available < LITTLE_MEMORY_BYTES:
        return [Finding("note", "memory", text + ": large Buffers on the CPU will not fit")]
    return [Finding("ok", "memory", text)]


class _Alone:
    """The communicator of a single rank."""

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's names
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 1

    def allgather(self, item: Any) -> list[Any]:
        return [item]


def check_round_trip(torch: Any) -> list[Finding]:
    """One rank sends tokens to itself: the kernels load and run."""
    try:
        deep_ep = importlib.import_module("deep_ep")
        kind, reason = importlib.import_module("deep_ep._streams").device_choice()
        x = torch.arange(4 * 64, dtype=torch.bfloat16, device=kind).reshape(4, 64)
        topk_idx = torch.arange(4, device=kind).reshape(4, 1)
        with deep_ep.Buffer(None, 1 << 20, comm=_Alone()) as buffer:
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
            received = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, topk_idx,
                                       torch.ones(4, 1, device=kind))
            combined = buffer.combine(received[0], received[4])[0]
            is_same = torch.equal(combined, x)
    except Exception as error:  # noqa: BLE001 - see _load
        return [Finding("broken", "round trip", f"{type(error).__name__}: {error}",
                        "see docs/errors.md; DEEP_EP_DEVICE=cpu tries without the GPU")]  # yapf: disable
    if not is_same:
        return [Finding("broken", "round trip", f"wrong numbers on {kind}", "please report this machine")]
    return [Finding("ok", "round trip", f"dispatch and combine on {kind} ({reason})")]


def examine() -> list[Finding]:
    """Everything, in the order in which one thing needs another."""
    torch, native = _load("torch"), _load("deep_ep_cpp")
    found = check_python() + check_torch(torch) + check_extension(native) + check_memory()
    if any(finding.level == "broken" for finding in found if finding.subject in ("torch", "deep_ep_cpp")):
        return found
    found += check_package() + check_gpus(torch, native)
    if any(finding.level == "broken" for finding in found if finding.subject in ("deep_ep", "environment")):
        return found
    return found + check_round_trip(torch)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deep_ep.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    args = parser.parse_args(arguments)
    found = examine()
    num_broken = sum(finding.level == "broken" for finding in found)
    if args.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print("\n".join(map(str, found)))
        print(f"{num_broken} problem(s)" if num_broken else "No problems found.")
    return 1 if num_broken else 0


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    # As a plain file, its folder comes first on the path, where modules of the package would hide others.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    if (folder.parent / "setup.py").exists():
        sys.path.insert(0, str(folder.parent))
    sys.exit(main(sys.argv[1:]))
