#!/usr/bin/env python3
"""Shows whether two trees have the same kernels, for changes that must not change the machine code.

    tools/machine_code.py                      a line for each kernel of this tree: size in bytes, hash, name
    tools/machine_code.py FOLDER               only the kernels that differ from those of the tree in FOLDER
    tools/machine_code.py --only low_latency   sources whose path contains this
    tools/machine_code.py --arch sm_80         another architecture than sm_90

nvcc compiles, no GPU is needed. A kernel that differs by the order of a few instructions differs here too:
`nvdisasm -c` (PyPI: nvidia-cuda-nvdisasm) on the two .cubin files, in build/machine_code of each tree, shows by how
much.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CUBINS = Path('build/machine_code')
# As csrc/CMakeLists.txt gives them to nvcc for the table of kernels without NVSHMEM.
FLAGS = [
    '-std=c++20', '-O3', '-DNDEBUG', '--expt-relaxed-constexpr', '-DEP_DISABLE_AGGRESSIVE_PTX=0',
    '-DEP_DISABLE_SM90_FEATURES=0', '-DEP_TOPK_IDX_BITS=64', '-DEP_WITH_CUDA=1', '-Icsrc', '-Icsrc/device/cuda',
    '-Icsrc/rail/host'
]


class Kernel(NamedTuple):
    name: str
    num_bytes: int
    digest: str


def compile_kernels(tree: Path, source: str, arch: str) -> list[Kernel]:
    cubin = tree / CUBINS / f'{source.replace("/", "_")}.{arch}.cubin'
    cubin.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(['nvcc', *FLAGS, '-cubin', f'-arch={arch}', source, '-o', str(cubin)], cwd=tree, check=True)
    return sorted(kernels_in(cubin.read_bytes()))


def kernels_in(elf: bytes) -> list[Kernel]:
    """The sections of code of a 64-bit ELF file."""
    sections_at, = struct.unpack_from('<Q', elf, 0x28)
    entry_bytes, num_sections, names_idx = struct.unpack_from('<HHH', elf, 0x3A)
    headers = [struct.unpack_from('<IIQQQQ', elf, sections_at + i * entry_bytes) for i in range(num_sections)]
    names_at = headers[names_idx][4]
    found = []
    for name_at, _, _, _, offset, num_bytes in headers:
        name = elf[names_at + name_at:elf.index(b'\0', names_at + name_at)].decode()
        if name.startswith('.text.'):
            code = elf[offset:offset + num_bytes]
            found.append(Kernel(name.removeprefix('.text.'), num_bytes, hashlib.sha256(code).hexdigest()[:12]))
    return found


def all_kernels(tree: Path, only: str, arch: str) -> dict[str, list[Kernel]]:
    sources = sorted(str(path.relative_to(tree)) for path in (tree / 'csrc/kernels').rglob('*.cu'))
    sources = [source for source in sources if only in source]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(lambda source: compile_kernels(tree, source, arch), sources)))


def short(name: str) -> str:
    """A mangled name without what all kernels have in theirs."""
    return re.sub(r'^_ZN7deep_ep3dev\d+\w+?_backend5entryI', '', name)[:100]


def show(source: str, sign: str, kernels: list[Kernel]) -> None:
    for kernel in kernels:
        print(f'{sign}{source} {kernel.num_bytes:7} {kernel.digest} {short(kernel.name)}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('other', nargs='?', type=Path, help='the tree to compare with')
    parser.add_argument('--only', default='', help='a part of the paths of the sources')
    parser.add_argument('--arch', default='sm_90')
    options = parser.parse_args()
    ours = all_kernels(ROOT, options.only, options.arch)
    if options.other is None:
        for source, kernels in ours.items():
            show(source, '', kernels)
        return 0
    theirs = all_kernels(options.other.resolve(), options.only, options.arch)
    num_differing = 0
    for source in sorted(ours.keys() | theirs.keys()):
        new, old = ours.get(source, []), theirs.get(source, [])
        differing = [kernel for kernel in new if kernel not in old]
        num_differing += len(differing)
        show(source, '- ', [kernel for kernel in old if kernel not in new])
        show(source, '+ ', differing)
    print(f'{num_differing} of {sum(map(len, ours.values()))} kernels differ')
    return 1 if num_differing else 0


if __name__ == '__main__':
    sys.exit(main())
