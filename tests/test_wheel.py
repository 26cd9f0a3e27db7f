"""The wheel of `make wheel`, in an environment that has nothing but it and a torch."""
from __future__ import annotations

import email.parser
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

from deep_ep import _nvshmem

ROOT = Path(__file__).resolve().parents[1]
PLAIN_LIBRARIES = {
    'libc.so.6', 'libm.so.6', 'libpthread.so.0', 'libdl.so.2', 'librt.so.1', 'libgcc_s.so.1', 'ld-linux-x86-64.so.2',
    'ld-linux-aarch64.so.1'
}  # yapf: disable


@pytest.fixture(scope='module')
def wheel() -> Path:
    tag = f'cp{sys.version_info.major}{sys.version_info.minor}'
    found = sorted((ROOT / 'dist').glob(f'deep_ep-*-{tag}-*.whl'), key=lambda path: path.stat().st_mtime)
    if not found:
        message = f'no wheel for {tag} in dist: make wheel'
        if os.environ.get('CI'):
            pytest.fail(message)
        pytest.skip(message)
    print(f'\n[wheel] {found[-1].name}: {found[-1].stat().st_size / 1e6:.2f} MB')
    return found[-1]


@pytest.fixture(scope='module')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel. torch and what it needs come from the outer environment, without its
    import hooks (of an editable deep_ep), behind the environment's own packages."""
    folder = tmp_path_factory.mktemp('wheel') / 'venv'
    venv.create(folder, with_pip=False)
    python = folder / 'bin' / 'python'
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python', str(python), 'install', '-q',
               '--no-index', '--no-deps', str(wheel)]  # yapf: disable
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    site = next(folder.glob('lib/python*/site-packages'))
    outer = [path for path in {sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), *sys.path}
             if path.endswith('site-packages')]  # yapf: disable
    (site / 'outer_torch.pth').write_text('\n'.join(sorted(outer)) + '\n')
    return python


def run_in(python: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in {'PYTHONPATH', 'PYTHONHOME'}}
    environment.update({'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', **variables})
    return subprocess.run([str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=280, check=False)  # yapf: disable


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_tag_is_what_auditwheel_finds(wheel: Path) -> None:
    assert re.search(r'-manylinux_2_\d+_(x86_64|aarch64)(\.manylinux\w+)*\.whl$', wheel.name), wheel.name
    run = subprocess.run([sys.executable, '-m', 'auditwheel', 'show', str(wheel)], capture_output=True, text=True,
                         check=False)  # yapf: disable
    assert run.returncode == 0, run.stderr
    found = re.search(r'"(manylinux_2_\d+_\w+?)"', run.stdout)
    assert found is not None, run.stdout
    assert found.group(1) in wheel.name


def test_the_sources_of_the_engine_for_nvshmem_are_inside(wheel: Path) -> None:
    """tests/test_nvshmem_build.py shows that they suffice."""
    folders = [ROOT / 'csrc' / folder for folder in _nvshmem.SOURCE_FOLDERS]
    sources = {
        f'deep_ep/{path.relative_to(ROOT)}'
        for folder in folders
        for path in folder.rglob('*') if path.suffix in {'.h', '.cc', '.cu'} and 'simt' not in path.parts
    }
    held = {name for name in names_in(wheel) if name.startswith('deep_ep/csrc/')}
    assert {name for name in held if not name.endswith('/')} == sources  # auditwheel lists folders too


def test_nothing_is_needed_but_the_c_library(wheel: Path, tmp_path: Path) -> None:
    """No toolkit, no compiler, no NVSHMEM, no libstdc++, no version of torch."""
    from elftools.elf.elffile import ELFFile
    assert not any('.libs/' in name for name in names_in(wheel))
    extension = next(name for name in names_in(wheel) if name.endswith('.so'))
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(extension, tmp_path)
        metadata = email.parser.Parser().parsestr(
            archive.read(next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))).decode())
    with Path(path).open('rb') as file:
        dynamic = ELFFile(file).get_section_by_name('.dynamic')
        needed = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == 'DT_NEEDED'}
        exported = {symbol.name for symbol in ELFFile(file).get_section_by_name('.dynsym').iter_symbols()
                    if symbol['st_shndx'] != 'SHN_UNDEF'}  # yapf: disable
    assert needed <= PLAIN_LIBRARIES
    assert exported == {'PyInit_deep_ep_cpp'}
    unconditional = [line for line in metadata.get_all('Requires-Dist', []) if 'extra ==' not in line]
    assert unconditional == []


def test_stub_types_and_licences_are_inside(wheel: Path) -> None:
    names = names_in(wheel)
    assert not any(name.startswith('deep_ep_bench_cpp') for name in names)  # of the benchmarks, for builds from source
    assert {'deep_ep_cpp.pyi', 'deep_ep/py.typed', 'deep_ep/doctor.py', 'deep_ep/_env.py'} <= names
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in names if '.dist-info/licenses/' in name}
    for name, says in (('LICENSE', 'MIT License'), ('NOTICE.txt', 'Boost.Context'), ('boost.txt', 'Boost Software'),
                       ('pybind11.txt', 'Redistribution and use'), ('gcc-runtime-exception.txt',
                                                                    'RUNTIME LIBRARY'), ('cuda-eula.txt', 'NVIDIA')):
        assert says in texts[name], name
    assert not any(name.startswith(('tests/', 'tools/', 'csrc/')) for name in names)


def test_it_imports_and_says_what_it_is(installed: Path, tmp_path: Path) -> None:
    code = (
        'import time; import torch; start = time.perf_counter(); import deep_ep; took = time.perf_counter() - start\n'
        'import deep_ep_cpp; print(deep_ep.__file__, deep_ep_cpp.__file__, deep_ep_cpp.cuda_versions()[0])\n'
        'assert deep_ep.supports("cuda") and deep_ep.supports("sm90") and deep_ep.supports("lending")\n'
        'print(f"import after torch: {took * 1e3:.0f} ms")')
    run = run_in(installed, tmp_path, '-c', code)
    assert run.returncode == 0, run.stderr
    package, extension, runtime = run.stdout.splitlines()[0].split()
    for path in (package, extension):
        assert Path(path).is_relative_to(installed.parents[1]), 'another deep_ep was imported'
    assert int(runtime) // 1000 == 12, 'the driver floor that README promises is that of CUDA 12'
    print(f'\n[wheel] {run.stdout.splitlines()[1]}')


def test_the_quick_start_of_the_readme_runs_from_it(installed: Path, tmp_path: Path) -> None:
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / 'quickstart.py').write_text(code.group(1))
    start = time.monotonic()
    run = run_in(installed, tmp_path, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                 'quickstart.py')  # yapf: disable
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('sums right') == 2
    print(f'\n[wheel] README quick start, 2 ranks: {time.monotonic() - start:.1f} s')


def test_the_doctor_of_the_wheel_is_content(installed: Path, tmp_path: Path) -> None:
    run = run_in(installed, tmp_path, '-m', 'deep_ep.doctor')
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'has the runtime of CUDA 12' in run.stdout
