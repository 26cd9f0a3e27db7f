"""Thin glue between setuptools and CMake: CMakeLists.txt is the one description of the native build.

Environment: MAX_JOBS (parallel compiles), CMAKE_ARGS (more arguments to the configure step), DEEP_EP_BUILD_DIR (the
CMake build folder, to be kept and shared between builds), and what cmake/EpOptions.cmake and cmake/EpCuda.cmake read.
"""
from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.install import install

ROOT = Path(__file__).resolve().parent
STUB = 'deep_ep_cpp.pyi'
BENCH = 'deep_ep_bench_cpp'  # of deep_ep.bench; for those who work in a checkout
# What `python -m deep_ep build-nvshmem` compiles, for packages that are not a checkout (deep_ep/_nvshmem.py).
ENGINE_FOLDERS = ('core', 'device', 'kernels', 'layout', 'rail')
ENGINE_SUFFIXES = ('.h', '.cc', '.cu')
LICENCES = ['LICENSE', 'licenses/*.txt', 'build/wheel/licenses/*.txt']  # the last is of tools/make_wheel.sh


def find_version() -> str:
    """`1.3.0.dev0+abc1234` in a checkout; what the archive says in an unpacked source archive."""
    base = re.search(r'__version__ = "(.+)"', (ROOT / 'deep_ep' / '_env.py').read_text()).group(1)
    if (ROOT / '.git').exists():
        command = ['git', 'rev-parse', '--short=7', 'HEAD']
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return f'{base}+{found.stdout.strip()}' if found.returncode == 0 else base
    info = ROOT / 'PKG-INFO'
    archived = re.search(r'^Version: (.+)$', info.read_text(), re.M) if info.exists() else None
    return archived.group(1) if archived else base


def find_tool(name: str, bin_dir_name: str) -> str | None:
    """The path of cmake or ninja: on the PATH, or in the PyPI package of that name."""
    found = shutil.which(name)
    if found is None:
        try:
            found = shutil.which(name, path=getattr(importlib.import_module(name), bin_dir_name))
        except (ImportError, AttributeError):
            return None
    return found


def missing_tools() -> list[str]:
    """What pip has to bring because the machine lacks it."""
    missing = [] if find_tool('cmake', 'CMAKE_BIN_DIR') else ['cmake>=3.22']
    return missing + ([] if find_tool('ninja', 'BIN_DIR') else ['ninja'])


def engine_sources() -> list[Path]:
    return sorted(path for folder in ENGINE_FOLDERS for path in (ROOT / 'csrc' / folder).rglob('*')
                  if path.suffix in ENGINE_SUFFIXES and 'simt' not in path.parts)


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # not even its parent
        return False


class CMakeBuild(build_ext):
    """Configures and builds the target deep_ep_cpp, and puts its type stub beside it.

    For an editable install CMake writes into the checkout itself, so that `cmake --build` is enough after a change.
    """

    is_in_source = False

    def run(self) -> None:
        self.is_in_source = bool(self.inplace)  # setuptools' run() hides it from what it calls
        super().run()

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: see above."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: not there when setup.py is only asked for metadata.

        output_dir = ROOT if self.is_in_source else Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(os.environ.get('DEEP_EP_BUILD_DIR') or self.build_temp).resolve()
        cmake = find_tool('cmake', 'CMAKE_BIN_DIR') or 'cmake'
        ninja = find_tool('ninja', 'BIN_DIR')
        # Everything that may come from a temporary build environment is passed anew each time.
        configure = [
            cmake, '-S',
            str(ROOT), '-B',
            str(build_dir), f'-DPython_EXECUTABLE={sys.executable}', f'-Dpybind11_DIR={pybind11.get_cmake_dir()}',
            f'-DEP_MODULE_DIR={output_dir}', f'-DCMAKE_BUILD_TYPE={"Debug" if self.debug else "Release"}'
        ]
        if ninja:
            configure += ['-G', 'Ninja', f'-DCMAKE_MAKE_PROGRAM={ninja}']
        configure += shlex.split(os.environ.get('CMAKE_ARGS', ''))
        jobs = os.environ.get('MAX_JOBS') or str(len(os.sched_getaffinity(0)))
        self.spawn(configure)
        targets = [ext.name, BENCH] if self.is_in_source else [ext.name]
        self.spawn([cmake, '--build', str(build_dir), '--target', *targets, '--parallel', jobs])
        if self.is_in_source:
            return
        shutil.copy2(ROOT / STUB, output_dir)
        for source in engine_sources():
            target = output_dir / 'deep_ep' / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        self.build_engine(output_dir)

    def build_engine(self, output_dir: Path) -> None:
        """The engine nvshmem, where NVSHMEM is: NVSHMEM_DIR, or the PyPI package beside this setuptools."""
        is_asked_for = bool(os.environ.get('NVSHMEM_DIR'))
        if not is_asked_for and not is_there('nvidia.nvshmem'):
            return
        if not is_there('torch'):  # the package imports it, and an isolated build environment has none
            self.warn('no torch in this build environment: for calls across nodes over NVSHMEM, run `python -m deep_ep '
                      'build-nvshmem` once this package is installed, or build with --no-build-isolation')
            return
        command = [sys.executable, '-m', 'deep_ep', 'build-nvshmem', '--to', str(output_dir / 'deep_ep' / 'lib')]
        environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(output_dir), *sys.path])}
        # Modules are copied after extensions, and this needs both.
        self.run_command('build_py')
        if subprocess.run(command, cwd=output_dir, env=environment, check=False).returncode != 0:
            if is_asked_for:
                raise RuntimeError('NVSHMEM_DIR is set, and the engine nvshmem cannot be built: see above')
            self.warn('the engine nvshmem was not built: see above; `python -m deep_ep build-nvshmem` tries again')

    def get_outputs(self) -> list[str]:
        if self.inplace:
            return super().get_outputs()
        package = Path(self.build_lib)
        copied = [package / 'deep_ep' / source.relative_to(ROOT) for source in engine_sources()]
        built = (package / 'deep_ep' / 'lib').glob('*.so')
        return [*super().get_outputs(), *map(str, [package / STUB, *copied, *built])]


class Install(install):
    """`python setup.py install` without the egg machinery, which would also download dependencies by its own rules."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.single_version_externally_managed = True

    def run(self) -> None:
        super().run()
        if self.root is None:  # Not on behalf of a wheel. Lets `pip uninstall` find every file.
            egg_info = Path(self.get_finalized_command('install_egg_info').target)
            files = [os.path.relpath(path, egg_info) for path in self.get_outputs()]
            (egg_info / 'installed-files.txt').write_text('\n'.join(files) + '\n')


setup(version=find_version(),
      license_files=LICENCES,
      packages=find_packages(include=['deep_ep', 'deep_ep.*']),
      package_data={'deep_ep': ['py.typed', '*.pyi']},
      ext_modules=[Extension('deep_ep_cpp', sources=[])],
      cmdclass={
          'build_ext': CMakeBuild,
          'install': Install
      },
      setup_requires=missing_tools())
