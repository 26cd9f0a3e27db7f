"""Every build variable of the README, by what it does to what is built.

The whole extension takes minutes; build.cpp alone, which holds what the bindings know of the build, takes seconds.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 600  # of one step, on a busy machine
BUILD_VARIABLES = ('TORCH_CUDA_ARCH_LIST', 'DISABLE_SM90_FEATURES', 'DISABLE_AGGRESSIVE_PTX_INSTRS', 'TOPK_IDX_BITS',
                   'NVSHMEM_DIR', 'CUDA_HOME', 'CUDA_PATH', 'CUDACXX', 'CMAKE_ARGS', 'MAX_JOBS')
FACTS = '''
import deep_ep_build as native, json
print(json.dumps({**native.get_build(), "topk_idx_t": str(native.topk_idx_t),
                  "is_cuda_built": native.is_cuda_built(), "is_sm90_compiled": native.is_sm90_compiled()}))
'''
KERNEL = '''
#include "device/prim.h"
namespace prim = deep_ep::prim;
__global__ void kernel(prim::Vec16* x) { if (prim::has_bulk_copy()) x[1] = prim::load_input(x); }
__global__ void hinted(prim::Vec16* x) { x[1] = prim::load_input(x); }
'''

pytestmark = pytest.mark.skipif(shutil.which('cmake') is None or shutil.which('ninja') is None,
                                reason='cmake and ninja are not on the PATH')
needs_nvcc = pytest.mark.skipif(shutil.which('nvcc') is None, reason='nvcc is not on the PATH')


def run(*command: Any, cwd: Path = ROOT, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    ended = subprocess.run([str(part) for part in command],
                           cwd=cwd,
                           env={
                               **inherited,
                               **environment
                           },
                           capture_output=True,
                           text=True,
                           timeout=DEADLINE_S,
                           check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def facts_of(folder: Path) -> Any:
    """What the module there says."""
    return json.loads(run(sys.executable, '-c', FACTS, cwd=folder))


def configure(folder: Path, *arguments: str, **environment: str) -> None:
    run('cmake', '-S', ROOT, '-B', folder, '-G', 'Ninja', '-DCMAKE_EXPORT_COMPILE_COMMANDS=ON',
        f'-DPython_EXECUTABLE={sys.executable}', f'-Dpybind11_DIR={pybind11.get_cmake_dir()}',
        f'-DEP_MODULE_DIR={folder}', *arguments, **environment)  # yapf: disable


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)


def test_of_a_cpu_build_by_setup_py(tmp_path: Path) -> None:
    """As pip does it, but for the target."""
    write_program(
        tmp_path / 'bin/cmake', f'''echo "$@" >>{tmp_path}/calls
exec {shutil.which("cmake")} $(echo "$@" | sed s/deep_ep_cpp/deep_ep_build/)''')
    run(sys.executable, 'setup.py', '-q', 'build_ext', '--build-lib', tmp_path / 'lib',
        PATH=f'{tmp_path / "bin"}:{os.environ["PATH"]}', DEEP_EP_BUILD_DIR=str(tmp_path / 'build'),
        CMAKE_ARGS='-DEP_CUDA=OFF', MAX_JOBS='3', TOPK_IDX_BITS='32')  # yapf: disable
    assert '--parallel 3' in (tmp_path / 'calls').read_text()
    assert facts_of(tmp_path / 'lib') == {
        'cuda': False, 'architectures': '', 'sm90_features': False, 'cache_hints': False, 'topk_idx_bits': 32,
        'topk_idx_t': 'torch.int32', 'is_cuda_built': False, 'is_sm90_compiled': False
    }  # yapf: disable


def ptx_of(folder: Path) -> str:
    """Of a kernel that is compiled as the CUDA half of that build is."""
    (folder / 'probe.cu').write_text(KERNEL)
    commands = json.loads((folder / 'compile_commands.json').read_text())
    command = next(item['command'] for item in commands if item['file'].endswith('device/cuda/probe.cu'))
    command = re.sub(r'"?--generate-code=\S+', '', command)
    command = re.sub(r' -c \S+ -o \S+| -x cu\b| -MF? \S+| -MT \S+| -MD', '', command)
    return run('sh', '-c', f'{command} -arch=sm_90 -ptx -x cu probe.cu -o -', cwd=folder)


@needs_nvcc
def test_of_a_cuda_build(tmp_path: Path) -> None:
    nvcc = tmp_path / 'toolkit/bin/nvcc'
    write_program(nvcc, f'exec {shutil.which("nvcc")} "$@"')
    configure(tmp_path, '-DEP_CUDA=ON', TORCH_CUDA_ARCH_LIST='8.0;9.0', CUDA_HOME=str(nvcc.parents[1]))
    run('cmake', '--build', tmp_path, '--target', 'deep_ep_build')
    assert facts_of(tmp_path) == {
        'cuda': True, 'architectures': '80-real 90-real', 'sm90_features': True, 'cache_hints': True,
        'topk_idx_bits': 64, 'topk_idx_t': 'torch.int64', 'is_cuda_built': True, 'is_sm90_compiled': True
    }  # yapf: disable
    assert f'EP_NVCC:FILEPATH={nvcc}' in (tmp_path / 'CMakeCache.txt').read_text()
    hinted = ptx_of(tmp_path)
    assert 'no_allocate' in hinted
    assert hinted.count('ld.global') == 2


@needs_nvcc
def test_of_a_cuda_build_without_features(tmp_path: Path) -> None:
    configure(tmp_path, '-DEP_CUDA=ON', TORCH_CUDA_ARCH_LIST='9.0+PTX', DISABLE_SM90_FEATURES='1',
              DISABLE_AGGRESSIVE_PTX_INSTRS='1', TOPK_IDX_BITS='32')  # yapf: disable
    run('cmake', '--build', tmp_path, '--target', 'deep_ep_build')
    assert facts_of(tmp_path) == {
        'cuda': True, 'architectures': '90', 'sm90_features': False, 'cache_hints': False, 'topk_idx_bits': 32,
        'topk_idx_t': 'torch.int32', 'is_cuda_built': True, 'is_sm90_compiled': False
    }  # yapf: disable
    plain = ptx_of(tmp_path)
    assert 'no_allocate' not in plain
    assert plain.count('ld.global') == 1, 'has_bulk_copy() is false at compile time'
