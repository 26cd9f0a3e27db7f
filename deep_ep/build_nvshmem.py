"""`python -m deep_ep build-nvshmem`: compiles the engine `nvshmem` for the NVSHMEM of this machine, with nvcc alone.

NVSHMEM's device code is compiled in, so a library fits the versions that csrc/rail/nvshmem/versions.h says. It is not
part of the wheel: torch brings an NVSHMEM whose headers may not be redistributed.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deep_ep import _env, _nvshmem
from deep_ep_cpp import Error

DEFAULT_ARCHITECTURES = ("90", )
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-rdc=true", "-cudart", "static",
         "-Xcompiler=-fPIC,-fvisibility=hidden")


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


def build(folder: Path, architectures: Sequence[str] = (), nvshmem: Path | None = None) -> Path:
    """Compiles the library into `folder` and returns its path; `nvshmem`: where it is, instead of looking for it.

    Raises Error with what is missing, or with what nvcc says.
    """
    installation = _nvshmem.find_installation() if nvshmem is None else _nvshmem.open_installation(nvshmem)
    nvcc, root = find_nvcc(), _nvshmem.source_folder()
    target = folder / f"{_nvshmem.ENGINE_PREFIX}{installation.version_text}-{_nvshmem.engine_key()}.so"
    codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in architectures or find_architectures()]
    includes = [str(root), str(root / "device" / "cuda"), str(root / "rail" / "nvshmem")]
    common = [
        nvcc, *FLAGS, *codes, *(f"-D{name}={value}" for name, value in _nvshmem.definitions().items()),
        *(f"-I{include}" for include in includes), "-isystem",
        str(installation.include)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sources = _nvshmem.sources()
        objects = [f"{Path(source).stem}.o" for source in sources]
        commands = [[*common, "-x", "cu", "-c", str(root / source), "-o", name]
                    for source, name in zip(sources, objects)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda command: _run(command, scratch), commands))
        _run([
            nvcc, "-shared", *FLAGS, *codes, *objects, "-o", target.name,
            str(installation.device_library), f"-L{installation.host_library.parent}", f"-l:{_nvshmem.HOST_LIBRARY}",
            "-Xlinker", "--exclude-libs,ALL,-z,defs"
        ], scratch)
        # In one step: another process may look for it, or build it too.
        unfinished = folder / f".{target.name}.{os.getpid()}"
        shutil.copy2(Path(scratch) / target.name, unfinished)
        unfinished.replace(target)
    return target


def run(to: Path | None, architectures: Sequence[str]) -> int:
    """The command. The exit status."""
    try:
        folder = to or _nvshmem.engine_folders()[-1]
        built = build(folder, architectures)
        print(f"built {built}")
        print(f"it loads: NVSHMEM {_nvshmem.load([folder])}")
    except Error as error:
        print(f"build-nvshmem: {error}", file=sys.stderr)
        return 1
    return 0
