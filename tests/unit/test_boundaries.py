"""Every rule of tools/check_boundaries.py is broken once here, and found; and the tree itself breaks none."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load_checker():
    spec = importlib.util.spec_from_file_location('check_boundaries', ROOT / 'tools' / 'check_boundaries.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


checker = _load_checker()


def rules_broken_by(path: str, text: str) -> list[str]:
    return [finding.rule for finding in checker.check([checker.make_source(path, text)])]


@pytest.mark.parametrize(('path', 'include'), [
    ('csrc/core/env.h', 'layout/heap.h'),
    ('csrc/layout/heap.h', 'device/prim.h'),
    ('csrc/device/runtime.h', 'device/algo/ring.h'),
    ('csrc/device/algo/ring.h', 'comm/heap.h'),
    ('csrc/comm/heap.h', 'kernels/params.h'),
    ('csrc/kernels/params.h', 'runtime/buffer.h'),
    ('csrc/runtime/buffer.h', 'deep_ep.cpp'),
])
def test_a_layer_that_includes_one_above_it_is_found(path: str, include: str) -> None:
    assert rules_broken_by(path, f'#include "{include}"\n') == ['include-order']


@pytest.mark.parametrize(('path', 'include'), [
    ('csrc/runtime/buffer.h', 'kernels/params.h'),
    ('csrc/kernels/params.h', 'device/algo/watch.h'),
    ('csrc/device/prim.h', 'prim_impl.h'),
    ('csrc/device/launch.h', 'launch_impl.h'),
    ('csrc/deep_ep.cpp', 'device/simt/device.h'),
    ('csrc/device/cuda/guard.cc', 'device/cuda/guard.h'),
])
def test_a_layer_may_include_itself_and_those_below(path: str, include: str) -> None:
    assert rules_broken_by(path, f'#include "{include}"\n') == []


BROKEN = [
    ('layer', 'csrc/helpers/string.h', 'int x;'),
    ('include', 'csrc/core/env.cc', '#include "env.h"'),
    ('include', 'csrc/kernels/params.h', '#include "prim_impl.h"'),
    ('seam', 'csrc/comm/heap.cc', '#include "device/simt/device.h"'),
    ('seam', 'csrc/runtime/buffer.cc', '#include "device/cuda/device.h"'),
    ('seam', 'csrc/device/simt/device.cc', '#include "device/cuda/guard.h"'),
    ('asm', 'csrc/kernels/layout/count.cu', 'asm("trap;");'),
    ('asm', 'csrc/device/simt/context.cc', '__asm__("nop");'),
    ('torch', 'csrc/deep_ep.cpp', '#include <torch/extension.h>'),
    ('torch', 'csrc/runtime/buffer.h', '#include <c10/cuda/CUDAStream.h>'),
    ('pybind', 'csrc/runtime/buffer.h', '#include <pybind11/pybind11.h>'),
    ('cuda-header', 'csrc/comm/heap.cc', '#include <cuda_runtime.h>'),
    ('getenv', 'csrc/comm/heap.cc', 'const char* home = std::getenv("HOME");'),
    ('cudacc', 'csrc/device/algo/group.h', '#if defined(__CUDACC__)'),
    ('cuda-arch', 'csrc/kernels/intranode/combine.cu', '#if __CUDA_ARCH__ >= 900'),
    ('raw-device', 'csrc/kernels/layout/count.cu', 'atomicAdd(p, 1);'),
    ('raw-device', 'csrc/kernels/layout/count.cu', 'const auto now = clock64();'),
    ('raw-device', 'csrc/kernels/layout/count.cu', 'const unsigned lanes = __activemask();'),
    ('raw-device', 'csrc/kernels/layout/count.cu', 'printf("here\\n");'),
    ('raw-device', 'csrc/kernels/layout/count.cu', 'namespace cg = cooperative_groups;'),
    ('raw-device', 'csrc/kernels/layout/count.cu', 'kernel<<<1, 32>>>();'),
    ('raw-device', 'csrc/device/algo/ring.h', 'cuda::atomic_ref<int> tail(t);'),
    ('raw-device', 'csrc/device/algo/ring.h', '__threadfence_system();'),
    ('raw-device', 'csrc/device/algo/ring.h', 'volatile int* tail;'),
    ('nvshmem-internal', 'csrc/rail/nvshmem/rail_impl.h', 'nvshmemi_ibgda_quiet(pe);'),
    ('nvshmem-internal', 'csrc/rail/nvshmem/library.cu', '#include <non_abi/device/pt-to-pt/ibgda_device.cuh>'),
    ('shared-atomic', 'csrc/device/algo/ring.h',
     'prim::fetch_add<prim::Order::kRelaxed, prim::Scope::kSys>(word, 1u);'),
    ('shared-atomic', 'csrc/kernels/layout/count.cu', 'compare_swap<Order::kAcqRel, Scope::kSys>(word, 0u, 1u);'),
    ('environ', 'deep_ep/buffer.py', "depth = os.environ.get('DEPTH')"),
    ('environ', 'deep_ep/buffer.py', 'from os import path, environ'),
    ('environ', 'deep_ep/buffer.py', "depth = os.getenv('DEPTH')"),
    ('conflict', 'docs/testing.md', '<' * 7 + ' HEAD'),
    ('conflict', 'csrc/core/env.cc', '>' * 7 + ' main'),
    ('machine-path', 'docs/testing.md', 'cd /' + 'work/project'),
    ('machine-path', 'tools/run.sh', 'cp x /' + 'home/me/x'),
]


@pytest.mark.parametrize(('rule', 'path', 'text'), BROKEN)
def test_what_breaks_a_rule_is_found(rule: str, path: str, text: str) -> None:
    assert rules_broken_by(path, text + '\n') == [rule]


@pytest.mark.parametrize(('path', 'text'), [
    ('csrc/device/cuda/prim_impl.h', 'asm volatile("fence;"); // by design'),
    ('csrc/device/cuda/device.cc', '#include <cuda_runtime.h>'),
    ('csrc/core/env.cc', 'const char* text = std::getenv(name);'),
    ('csrc/device/compiler.h', '#if defined(__CUDACC__)'),
    ('csrc/kernels/layout/count.cu', '// no atomicAdd(): ranks come from scans'),
    ('csrc/kernels/layout/count.cu', '/* kernel<<<>>> is\n   launched elsewhere */ int x;'),
    ('csrc/kernels/layout/count.cu', 'const char* name = "printf(%d)";'),
    ('csrc/kernels/layout/count.cu', 'const auto now = prim::clock_ns();'),
    ('csrc/device/algo/ring.h', 'prim::fetch_add<prim::Order::kRelaxed, prim::Scope::kGpu>(word, 1u);'),
    ('csrc/runtime/failure_report.cc', 'std::snprintf(text, sizeof(text), "%d", 1);'),
    ('deep_ep/_env.py', "os.environ.get('DEEP_EP_DEVICE')"),
    ('deep_ep/buffer.py', '# os.environ is read elsewhere'),
    ('examples/launcher.py', "os.environ.setdefault('MASTER_PORT', '0')"),
    ('docs/testing.md', 'see docs/work/notes and https://example.org/home/me/x'),
])
def test_what_is_allowed_is_not_reported(path: str, text: str) -> None:
    assert rules_broken_by(path, text + '\n') == []


@pytest.mark.parametrize(('num_lines', 'is_found', 'is_error'), [(500, False, False), (501, True, False),
                                                                 (700, True, False), (701, True, True)])
def test_long_files_are_warned_about_then_refused(num_lines: int, is_found: bool, is_error: bool) -> None:
    findings = checker.check([checker.make_source('csrc/core/long.cc', 'int x;\n' * num_lines)])
    assert [(f.rule, f.is_error) for f in findings] == ([('size', is_error)] if is_found else [])


def test_two_headers_of_one_name_are_found_among_kernels() -> None:
    paths = ['csrc/kernels/intranode/context.h', 'csrc/kernels/internode/context.h', 'csrc/rail/host/ring.h']
    found = checker.check([checker.make_source(path, '') for path in [*paths, 'csrc/device/algo/ring.h']])
    assert [(finding.rule, finding.path) for finding in found] == [('header-name', paths[1])]


def test_a_finding_names_its_line() -> None:
    source = checker.make_source('csrc/core/a.cc', '/* one\n two */\n#include "core/b.h"\nint y = getenv("A");\n')
    assert [(f.path, f.line) for f in checker.check([source])] == [('csrc/core/a.cc', 4)]


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='not a git checkout')
def test_this_repository_keeps_its_boundaries() -> None:
    sources = checker.read_sources(ROOT, checker.list_files(ROOT))
    assert [str(f) for f in checker.check(sources) if f.is_error] == []
