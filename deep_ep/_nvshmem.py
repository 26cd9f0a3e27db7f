"""NVSHMEM on this machine, and the libraries of the engine `nvshmem` that deep_ep/build_nvshmem.py has built for it."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import deep_ep_cpp
from deep_ep import _env, _probes
from deep_ep_cpp import Error

HOST_LIBRARY = "libnvshmem_host.so.3"
ENGINE_PREFIX = "libdeep_ep_nvshmem-"
INSTALL = "pip install nvidia-nvshmem-cu13 (or -cu12: that of your CUDA), or set NVSHMEM_DIR to where it is"
ENTRY = "rail/nvshmem/library.cu"
# The folders that the library includes something from (but no simt/): a change there needs another library. setup.py
# puts the same into the wheel.
SOURCE_FOLDERS = ("core", "device", "kernels", "layout", "rail")


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
    folder = _probes.nvshmem_package()
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
