"""NVSHMEM on this machine, the engine `nvshmem` that is built for it, and when it carries bytes between nodes.

`python -m deep_ep build-nvshmem` compiles the engine with nvcc alone. NVSHMEM's device code is compiled in, so a
library fits the versions that csrc/rail/nvshmem/versions.h says. It is not part of the wheel: torch brings an NVSHMEM
whose headers may not be redistributed.
"""

import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import deep_ep_cpp
from deep_ep import _env
from deep_ep._peers import Place
from deep_ep_cpp import Error, InvalidArgument

logger = logging.getLogger("deep_ep")
ENGINES = ("nvshmem", "host")  # of csrc/rail
HOST_LIBRARY = "libnvshmem_host.so.3"
ENGINE_PREFIX = "libdeep_ep_nvshmem-"
INSTALL = "pip install nvidia-nvshmem-cu13 (or -cu12: that of your CUDA), or set NVSHMEM_DIR to where it is"
ENTRY = "rail/nvshmem/library.cu"
# The folders that the library includes something from (but no simt/): a change there needs another library. setup.py
# puts the same into the wheel.
SOURCE_FOLDERS = ("core", "device", "kernels", "layout", "rail")
DEFAULT_ARCHITECTURES = ("90", )
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-rdc=true", "-cudart", "static",
         "-Xcompiler=-fPIC,-fvisibility=hidden")


@dataclass(frozen=True)
class Installation:
    """Headers, device library and host library of one NVSHMEM."""

    folder: Path
    version: tuple[int, int, int]

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def device_library(self) -> Path:
        return self.folder / "lib" / "libnvshmem_device.a"

    @property
    def host_library(self) -> Path:
        return self.folder / "lib" / HOST_LIBRARY

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def open_installation(folder: Path) -> Installation:
    """Raises Error that names what is missing in the folder."""
    found = Installation(folder, (0, 0, 0))
    header = next(iter(sorted(found.include.rglob("nvshmem_version.h"))), None)
    for path in (found.include / "nvshmem.h", header, found.device_library, found.host_library):
        if path is None or not path.exists():
            raise Error(f"NVSHMEM in {folder}: there is no {path or 'include/**/nvshmem_version.h'}; {INSTALL}")
    assert header is not None  # noqa: S101 - for mypy
    text = header.read_text(encoding="utf-8", errors="replace")
    parts = [re.search(rf"define NVSHMEM_VENDOR_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    numbers = [int(part.group(1)) for part in parts if part is not None]
    if len(numbers) != 3:
        raise Error(f"NVSHMEM in {folder}: {header} does not tell its version; 3.4.5 is the oldest that is tried")
    return Installation(folder, (numbers[0], numbers[1], numbers[2]))


def find_folder() -> Optional[Path]:
    """NVSHMEM_DIR, or the folder of the PyPI package; None: neither."""
    given = _env.nvshmem_dir()
    if given is not None:
        return given
    folder = _env.nvshmem_package()
    return None if folder is None else Path(folder)


def find_installation() -> Installation:
    """Raises Error with what to install where there is none, or an incomplete one."""
    folder = find_folder()
    if folder is None:
        raise Error(f"NVSHMEM was not found: {INSTALL}")
    return open_installation(folder)


def source_folder() -> Path:
    """csrc/ of the checkout, or the copy that the wheel brings along."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / ENTRY).exists():
            return folder
    raise Error(
        f"the sources of the engine nvshmem are not in {package}: install deep_ep from its wheel or its checkout")


def sources() -> list[str]:
    """What is compiled, from source_folder(); headers are found from there."""
    root = source_folder()
    kernels = sorted(str(path.relative_to(root)) for path in (root / "kernels" / "internode").glob("*.c[uc]"))
    launch = [f"device/cuda/{name}.cc" for name in ("cuda_error", "driver", "guard", "launch_kernel")]
    return [ENTRY, *kernels, *launch]


def _read_sources() -> Iterator[bytes]:
    root = source_folder()
    for folder in SOURCE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".h", ".cu", ".cc") and "simt" not in path.parts:
                yield str(path.relative_to(root)).encode()
                yield path.read_bytes()


def engine_key() -> str:
    """Of everything in this package that the library is made of: kernels and extension must agree about it."""
    digest = hashlib.sha256(repr(sorted(definitions().items())).encode())
    for part in _read_sources():
        digest.update(part)
    return digest.hexdigest()[:12]


def definitions() -> dict[str, int]:
    """What the extension was compiled with, and the library must be too."""
    build = deep_ep_cpp.get_build()
    return {
        "EP_WITH_CUDA": 1,
        "EP_TOPK_IDX_BITS": int(build["topk_idx_bits"]),
        "EP_DISABLE_SM90_FEATURES": int(build["cuda"] and not build["sm90_features"]),
        "EP_DISABLE_AGGRESSIVE_PTX": int(build["cuda"] and not build["cache_hints"]),
    }


def engine_folders() -> list[Path]:
    """Where built libraries are looked for: with the package, then in the user's cache."""
    cache = _env.cache_folder()
    beside = Path(__file__).resolve().parent / "lib"
    return [beside] if cache is None else [beside, cache / "nvshmem"]


def engine_files(folders: Optional[list[Path]] = None) -> list[Path]:
    """Libraries that were built from what this package is, the newest NVSHMEM first."""
    key = engine_key()
    found = [
        path for folder in (engine_folders() if folders is None else folders)
        for path in folder.glob(f"{ENGINE_PREFIX}*-{key}.so")
    ]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)[:3]], reverse=True)


def load(folders: Optional[list[Path]] = None) -> str:
    """Brings NVSHMEM and the engine that fits it into this process; says which. Raises Error with what to do."""
    files = engine_files(folders)
    if not files:
        raise Error(
            "the engine nvshmem is not built (for this version of deep_ep): run `python -m deep_ep build-nvshmem`")
    folder = find_folder()
    host_library = "" if folder is None else str(folder / "lib" / HOST_LIBRARY)
    return str(
        deep_ep_cpp.load_nvshmem(host_library, [str(path) for path in files], _env.nvshmem_transport(),
                                 _env.is_ibgda_enabled()))


# Building it.


def find_nvcc() -> str:
    for candidate in _env.nvcc_candidates():
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise Error("no nvcc was found: install the CUDA toolkit of your torch's CUDA version, or set CUDA_HOME")


def find_architectures() -> tuple[str, ...]:
    """Those of the GPUs that this process sees."""
    import torch
    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURES
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(sorted({f"{gpu.major}{gpu.minor}" for gpu in gpus}))


def _run(command: Sequence[str], folder: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()
        errors = [line for line in said.splitlines() if re.search(r"\berror\b|fatal|undefined", line)]
        raise Error(f"{' '.join(command)}\nfailed: " + "\n".join(errors[:20] or said.splitlines()[-20:]))


def build(folder: Path, architectures: Sequence[str] = (), nvshmem: Optional[Path] = None) -> Path:
    """Compiles the library into `folder` and returns its path; `nvshmem`: where it is, instead of looking for it.

    Raises Error with what is missing, or with what nvcc says.
    """
    installation = find_installation() if nvshmem is None else open_installation(nvshmem)
    nvcc, root = find_nvcc(), source_folder()
    target = folder / f"{ENGINE_PREFIX}{installation.version_text}-{engine_key()}.so"
    codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in architectures or find_architectures()]
    includes = [str(root), str(root / "device" / "cuda"), str(root / "rail" / "nvshmem")]
    common = [
        nvcc, *FLAGS, *codes, *(f"-D{name}={value}" for name, value in definitions().items()),
        *(f"-I{include}" for include in includes), "-isystem",
        str(installation.include)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = sources()
        objects = [f"{Path(source).stem}.o" for source in files]
        commands = [[*common, "-x", "cu", "-c", str(root / source), "-o", name] for source, name in zip(files, objects)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda command: _run(command, scratch), commands))
        _run([
            nvcc, "-shared", *FLAGS, *codes, *objects, "-o", target.name,
            str(installation.device_library), f"-L{installation.host_library.parent}", f"-l:{HOST_LIBRARY}", "-Xlinker",
            "--exclude-libs,ALL,-z,defs"
        ], scratch)
        # In one step: another process may look for it, or build it too.
        unfinished = folder / f".{target.name}.{os.getpid()}"
        shutil.copy2(Path(scratch) / target.name, unfinished)
        unfinished.replace(target)
    return target


def build_command(to: Optional[Path], architectures: Sequence[str]) -> int:
    """The command. The exit status."""
    try:
        folder = to or engine_folders()[-1]
        built = build(folder, architectures)
        print(f"built {built}")
        print(f"it loads: NVSHMEM {load([folder])}")
    except Error as error:
        print(f"build-nvshmem: {error}", file=sys.stderr)
        return 1
    return 0


# The choice between the engines, the same on every rank.


def obstacle(requested: str, device_kind: str) -> str:
    """Why this rank cannot use the engine nvshmem, or does not look whether it can; empty: it can."""
    if requested == "host":
        return "DEEP_EP_RAIL=host"
    if device_kind != "cuda":
        return "it works on GPUs only"
    try:
        load()
    except Error as error:
        return str(error)
    return ""


def sharing_obstacle(places: Sequence[Place]) -> str:
    """Why no rank of the group can use the engine nvshmem, where ranks share GPUs; empty: they may."""
    sharing = Counter((place.host, place.device) for place in places)
    if len(set(sharing.values())) <= 1:
        return ""
    counts = sorted(set(sharing.values()))
    return f"NVSHMEM never begins where GPUs have different numbers of ranks, here {counts[0]} to {counts[-1]}"


def choose_engine(requested: str, obstacles: Sequence[str]) -> tuple[str, str]:
    """The engine, and why. `requested`: DEEP_EP_RAIL; `obstacles`: by rank.

    Raises Error where they do not go together.
    """
    if requested not in ("", *ENGINES):
        raise InvalidArgument(f"DEEP_EP_RAIL: expected 'nvshmem', 'host' or nothing (automatic), got {requested!r}")
    hindered = {rank: text for rank, text in enumerate(obstacles) if text}
    if not hindered:
        return "nvshmem", "it is built, and fits the NVSHMEM of every rank"
    if requested == "host":
        return "host", "DEEP_EP_RAIL=host"
    rank, text = next(iter(hindered.items()))
    if requested == "nvshmem":
        raise Error(
            f"DEEP_EP_RAIL=nvshmem: not possible on {len(hindered)} of {len(obstacles)} ranks; rank {rank}: {text}")
    return "host", f"nvshmem is not possible on {len(hindered)} of {len(obstacles)} ranks; rank {rank}: {text}"


def rail_rate(engine: str, nic_rates: Sequence[Optional[float]], ranks_per_node: int) -> float:
    """10^9 bytes a second that the NICs carry for a rank, on the machine where that is least; 0: unknown.

    nic_rates: of each rank's machine. The engine host carries what its threads can, whatever the NIC.
    """
    known = [nic_rate for nic_rate in nic_rates if nic_rate is not None]
    return min(known) / ranks_per_node if engine == "nvshmem" and len(known) == len(nic_rates) else 0.0


def can_do_without(engine: str, requested: str, gather_errors: Callable[[], list[str]]) -> bool:
    """Whether ranks that could not build a Buffer over `engine` are to try another. Collective, where nobody asked for
    it: a rank fails for a reason of its own, or for that of another."""
    return engine == "nvshmem" and not requested and all("NVSHMEM" in error for error in gather_errors())


@functools.cache
def tell_engine(engine: str, reason: str, device_kind: str) -> None:
    """Once in a process. TCP where GPUs may have something faster is worth a warning."""
    level = logging.WARNING if engine == "host" and device_kind == "cuda" else logging.INFO
    logger.log(level, "between nodes, bytes are carried by the engine %s: %s", engine, reason)
