#!/usr/bin/env python3
"""Lists the files that one dispatch is read in: from `Buffer.dispatch` to the store on the link and back.

    tools/dispatch_walk.py            one line a file, with its number of lines, and the totals
    tools/dispatch_walk.py --total    the totals alone

The dispatch is a fresh, synchronous one of BF16 rows through slots, within a node, on a GPU. docs/architecture.md walks
it in words. Counted are the modules of Python in which a function runs (seen with sys.setprofile), the files of the
host's native code that hold a function that runs or the class that it belongs to, and all that the two kernels include.
"""
from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [f'deep_ep/{name}.py' for name in ('buffer', '_high_throughput', '_session', '_tensors',
                                             '_streams', 'utils')]  # yapf: disable
HOST = [
    'deep_ep_cpp.pyi', 'csrc/deep_ep.cpp', 'csrc/bindings/record.h', 'csrc/runtime/buffer.h',
    'csrc/runtime/high_throughput.h', 'csrc/runtime/high_throughput.cc', 'csrc/runtime/connection.h',
    'csrc/runtime/connection.cc', 'csrc/runtime/plan.h', 'csrc/runtime/plan.cc', 'csrc/device/cuda/launch_kernel.cc'
]
KERNELS = ['csrc/kernels/intranode/notify_dispatch.cu', 'csrc/kernels/intranode/dispatch.cu']
INCLUDE_FOLDERS = ('csrc', 'csrc/device/cuda')  # as the build gives them to nvcc


def with_includes(paths: list[str], root: Path = ROOT) -> list[str]:
    """These files and all of ours that they include, in the order in which a reader meets them."""
    found: list[str] = []
    waiting = list(reversed(paths))
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', (root / path).read_text(encoding='utf-8'), re.M)
        candidates = [[f'{folder}/{name}' for folder in INCLUDE_FOLDERS] for name in names]
        waiting.extend(path for places in reversed(candidates) for path in places if (root / path).exists())
    return found


def num_lines(path: str) -> int:
    return len((ROOT / path).read_text(encoding='utf-8').splitlines())


def main(arguments: list[str]) -> int:
    walked = 0, 0
    for title, paths in (('Python', PYTHON), ('host', HOST), ('kernels', with_includes(KERNELS))):
        lines = [num_lines(path) for path in paths]
        walked = walked[0] + len(paths), walked[1] + sum(lines)
        if '--total' not in arguments:
            print(*(f'{number:6} {path}' for number, path in zip(lines, paths)), sep='\n')
        print(f'{sum(lines):6} lines in {len(paths)} files: {title}')
    print(f'{walked[1]:6} lines in {walked[0]} files in all')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
