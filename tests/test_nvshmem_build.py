"""`python -m deep_ep build-nvshmem` against real NVSHMEMs, and which of the results go with which, without a GPU.

What needs GPUs is in tests/test_rail_nvshmem.py.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deep_ep import Error, _env, _nvshmem

pytestmark = pytest.mark.timeout(900)  # two compilers at work for a minute each, where nobody else is
ROOT = Path(__file__).resolve().parent.parent
OLD, NEW = "3.4.5", "3.8.0"  # what torch brings, and one on the other side of 3.5.19
LOAD = "import sys; from pathlib import Path; from deep_ep import _nvshmem; print(_nvshmem.load([Path(sys.argv[1])]))"


def get_nvshmem(version: str) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    command = [str(ROOT / "tools" / "get_toolkit.sh"), f"nvshmem-{version}"]
    found = subprocess.run(command,
                           env={
                               **os.environ, "PYTHON": sys.executable
                           },
                           check=False,
                           capture_output=True,
                           text=True)
    if found.returncode != 0 and "CI" not in os.environ:
        pytest.skip(f"NVSHMEM {version} cannot be had from PyPI here: {found.stderr.strip().splitlines()[-1:]}")
    assert found.returncode == 0, found.stderr
    return Path(found.stdout.strip())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The library that each version gives, in a folder of its own; made from what the wheel has of the sources."""
    folders = {version: tmp_path_factory.mktemp(version) for version in (OLD, NEW)}
    sources = tmp_path_factory.mktemp("csrc")
    for name in _nvshmem.SOURCE_FOLDERS:
        shutil.copytree(ROOT / "csrc" / name, sources / name, ignore=shutil.ignore_patterns("simt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_nvshmem, "source_folder", lambda: sources)
        patch.setenv("NVCC_APPEND_FLAGS", "-Xcicc -O1 -Xptxas -O1")  # nothing runs on a GPU here
        for version, folder in folders.items():
            _nvshmem.build(folder, ["90"], get_nvshmem(version))
    return folders


def load(host: str, folder: Path) -> str:
    """In a process of its own, which has no NVSHMEM yet. What it says, or its error."""
    env = {**os.environ, "NVSHMEM_DIR": str(get_nvshmem(host))}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)],
                          env=env,
                          check=False,
                          capture_output=True,
                          text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLD, NEW])
def test_library_loads_with_the_nvshmem_that_it_was_built_with(engines: dict[str, Path], version: str) -> None:
    assert load(version, engines[version]) == f"{version} (engine built with {version})"


@pytest.mark.slow
@pytest.mark.parametrize(("host", "built", "reason"), [(NEW, OLD, "3.5.19 changed"), (OLD, NEW, "older one")])
def test_library_of_another_nvshmem_is_refused(engines: dict[str, Path], host: str, built: str, reason: str) -> None:
    said = load(host, engines[built])
    assert f"no library of the engine nvshmem fits NVSHMEM {host} here" in said
    assert f"built with NVSHMEM {built}" in said
    assert reason in said
    assert "`python -m deep_ep build-nvshmem`" in said


@pytest.mark.slow
@pytest.mark.parametrize("host", [OLD, NEW])
def test_of_two_libraries_the_one_that_fits_is_taken(engines: dict[str, Path], tmp_path: Path, host: str) -> None:
    for folder in engines.values():
        for path in folder.iterdir():
            (tmp_path / path.name).symlink_to(path)
    assert load(host, tmp_path) == f"{host} (engine built with {host})"


@pytest.mark.slow
def test_library_shows_nothing_but_its_entry(engines: dict[str, Path]) -> None:
    """What it has of NVSHMEM's device library and of the CUDA runtime meets no other copy in the process."""
    for folder in engines.values():
        listed = subprocess.run(["nm", "-D", "--defined-only", *map(str, folder.iterdir())],
                                check=True,
                                capture_output=True,
                                text=True).stdout
        names = {line.split()[-1] for line in listed.splitlines() if line and line.split()[-2] in ("T", "D", "B", "R")}
        assert names == {"deep_ep_nvshmem_library"}


def test_missing_nvshmem_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVSHMEM_DIR", raising=False)
    monkeypatch.setattr(_env, "NVSHMEM_PACKAGE", "deep_ep.no_such_package")
    with pytest.raises(Error, match=r"NVSHMEM was not found: pip install nvidia-nvshmem-cu13 .*NVSHMEM_DIR"):
        _nvshmem.find_installation()


def test_incomplete_nvshmem_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    with pytest.raises(Error, match=r"there is no .*include/nvshmem\.h; pip install"):
        _nvshmem.find_installation()


def test_version_is_read_from_the_headers(tmp_path: Path) -> None:
    (tmp_path / "include" / "non_abi").mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    for path in ("include/nvshmem.h", "lib/libnvshmem_device.a", "lib/libnvshmem_host.so.3"):
        (tmp_path / path).touch()
    header = tmp_path / "include" / "non_abi" / "nvshmem_version.h"
    header.write_text("#define NVSHMEM_VENDOR_MAJOR_VERSION 3\n#define NVSHMEM_VENDOR_MINOR_VERSION 6\n"
                      "#define NVSHMEM_VENDOR_PATCH_VERSION 5\n")
    assert _nvshmem.open_installation(tmp_path).version_text == "3.6.5"
    header.write_text("nothing")
    with pytest.raises(Error, match="does not tell its version"):
        _nvshmem.open_installation(tmp_path)


def test_missing_compiler_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvshmem._env, "nvcc_candidates", lambda: ["/nowhere/nvcc"])
    with pytest.raises(Error, match=r"no nvcc was found: install the CUDA toolkit .*CUDA_HOME"):
        _nvshmem.find_nvcc()


def test_command_says_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    assert _nvshmem.build_command(tmp_path, []) == 1
    assert capsys.readouterr().err.startswith(f"build-nvshmem: NVSHMEM in {tmp_path}: there is no")


def test_nothing_built_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / f"{_nvshmem.ENGINE_PREFIX}3.4.5-0123456789ab.so").touch()  # of another version of deep_ep
    with pytest.raises(Error,
                       match=r"not built \(for this version of deep_ep\): run `python -m deep_ep build-nvshmem`"):
        _nvshmem.load([tmp_path])


def test_newest_library_is_tried_first(tmp_path: Path) -> None:
    names = [
        f"{_nvshmem.ENGINE_PREFIX}{version}-{_nvshmem.engine_key()}.so" for version in ("3.10.0", "3.8.0", "3.4.5")
    ]
    for name in sorted(names):
        (tmp_path / name).touch()
    assert [path.name for path in _nvshmem.engine_files([tmp_path])] == names
