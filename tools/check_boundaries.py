#!/usr/bin/env python3
"""Checks what no compiler checks: which layer may know which, and where delicate things may be done.

Run without arguments it reads the tracked and new files of this repository, prints `file:line: rule: what is wrong`,
and exits 1 if there was any. docs/architecture.md explains the layers; each rule below says why it is there.
"""
from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

# From the bottom up: a layer may include itself and those before it.
LAYERS = ('core', 'layout', 'device', 'algo', 'comm', 'bench', 'rail', 'kernels', 'runtime', 'bindings')
# Which of the two devices, and which engine, these are of is decided by the include path.
SEAM_INCLUDES = {
    'csrc/device/prim.h': 'prim_impl.h',
    'csrc/device/launch.h': 'launch_impl.h',
    'csrc/rail/rail.h': 'rail_impl.h'
}
# A library of its own, for NVSHMEM and CUDA alone, and where its kernels join those of the extension.
NVSHMEM_LIBRARY = ('csrc/rail/nvshmem/library.cu', 'csrc/rail/nvshmem/rail_impl.h')
NVSHMEM_KERNELS = ('csrc/kernels/nvshmem_kernels.h', 'csrc/kernels/internode/nvshmem_kernels.cc',
                   'csrc/runtime/buffer.cc')
WARN_LINES, MAX_LINES = 500, 700

NATIVE_SUFFIXES = ('.h', '.cc', '.cpp', '.cu', '.cuh')
CODE_SUFFIXES = (*NATIVE_SUFFIXES, '.py', '.pyi', '.sh', '.cmake')
TEXT_SUFFIXES = (*CODE_SUFFIXES, '.md', '.toml', '.txt', '.json', '.yml', '.yaml', '.cfg', '.in')
TEXT_NAMES = ('Makefile', 'run', '.clang-format', '.gitignore')


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    rule: str
    message: str
    is_error: bool = True

    def __str__(self) -> str:
        kind = '' if self.is_error else ' (warning)'
        return f'{self.path}:{self.line}: {self.rule}{kind}: {self.message}'


@dataclass(frozen=True)
class Source:
    """A file as the rules see it: its lines, and the same lines without comments and string contents."""
    path: str
    lines: tuple[str, ...]
    code: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        return self.path.startswith('csrc/') and self.path.endswith(NATIVE_SUFFIXES)

    def matches(self, pattern: str) -> Iterator[tuple[int, str]]:
        """Line numbers and matched text in the code."""
        for number, line in enumerate(self.code, 1):
            if found := re.search(pattern, line):
                yield number, found.group(0).strip()


Rule = Callable[[Source], Iterable[Finding]]
PathTest = Callable[[str], bool]

NATIVE_TOKENS = re.compile(
    r"""(?P<include>^[ \t]*\#[ \t]*include[ \t]*(?:"[^"\n]*"|<[^>\n]*>))
      | (?P<comment>//[^\n]*|/\*.*?\*/)
      | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])')""", re.MULTILINE | re.DOTALL | re.VERBOSE)


def strip_native(text: str) -> str:
    """C++ without comments and without the contents of its strings, line by line where it was."""

    def replace(match: re.Match[str]) -> str:
        if match.lastgroup == 'include':
            return match.group(0)
        return '""' if match.lastgroup == 'text' else '\n' * match.group(0).count('\n')

    return NATIVE_TOKENS.sub(replace, text)


def strip_python(text: str) -> str:
    """Python without its comments (strings stay: the patterns that are looked for do not occur in prose)."""
    return re.sub(r'(?m)#.*$', '', text)


def make_source(path: str, text: str) -> Source:
    if path.endswith(NATIVE_SUFFIXES):
        code = strip_native(text)
    elif path.endswith(('.py', '.pyi')):
        code = strip_python(text)
    else:
        code = text
    return Source(path, tuple(text.split('\n')), tuple(code.split('\n')))


def layer_of(path: str) -> str | None:
    """The layer of a file given by its path below csrc/."""
    if path.startswith('device/algo/'):
        return 'algo'
    if '/' not in path:
        return 'bindings' if path.endswith('.cpp') else None
    top = path.split('/', 1)[0]
    return top if top in LAYERS else None


def check_include_order(source: Source) -> Iterator[Finding]:
    """A layer that knew those above it could be neither read, tested nor replaced alone."""
    if not source.is_native:
        return
    below = source.path.removeprefix('csrc/')
    own = layer_of(below)
    if own is None:
        yield Finding(source.path, 1, 'layer', f'belongs to no layer; the folders are {", ".join(LAYERS[:-1])}')
        return
    for number, line in enumerate(source.code, 1):
        found = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
        if not found or SEAM_INCLUDES.get(source.path) == found.group(1):
            continue
        included = found.group(1)
        layer = layer_of(included)
        if layer is None:
            yield Finding(source.path, number, 'include', f'"{included}" is not a path from csrc/')
        elif LAYERS.index(layer) > LAYERS.index(own):
            yield Finding(source.path, number, 'include-order', f'{own} may not include {layer} ("{included}")')


def check_backend_names(source: Source) -> Iterator[Finding]:
    """Everything but the makers of devices and engines sees a seam and not what is behind it."""
    if not source.is_native or layer_of(source.path.removeprefix('csrc/')) == 'bindings':
        return
    for number, line in enumerate(source.code, 1):
        found = re.match(r'\s*#\s*include\s*"(device/cuda|device/simt|rail/host|rail/nvshmem)/', line)
        if found is None or source.path in NVSHMEM_LIBRARY:
            continue
        if source.path in NVSHMEM_KERNELS and found.group(1) == 'rail/nvshmem':
            continue
        if source.path.startswith(f'csrc/{found.group(1)}/'):
            continue
        if source.path != 'csrc/rail/make_engine.cc' or not found.group(1).startswith('rail/'):
            yield Finding(source.path, number, 'seam', f'{found.group(1)} is included from outside it')


def forbid(rule: str, pattern: str, why: str, allowed: PathTest, applies: Callable[[Source], bool]) -> Rule:
    """A rule against a pattern in the code of some files."""

    def check(source: Source) -> Iterator[Finding]:
        if applies(source) and not allowed(source.path):
            for number, text in source.matches(pattern):
                yield Finding(source.path, number, rule, f'{text!r}: {why}')

    return check


def is_native(source: Source) -> bool:
    return source.is_native


def is_device_code(source: Source) -> bool:
    return source.is_native and source.path.startswith(('csrc/kernels/', 'csrc/device/algo/'))


def below(*places: str) -> PathTest:
    return lambda path: path.startswith(places)


RAW_DEVICE_WORDS = (r'\batomic[A-Z]\w*\s*\(|\b(std|cuda)::atomic\w*|\bclock(64)?\s*\(|\b__activemask\b|\bprintf\s*\('
                    r'|\bcooperative_groups\b|<<<|\b__threadfence\w*|\b__nanosleep\b|\b__trap\b|\bvolatile\b')


def check_size(source: Source) -> Iterator[Finding]:
    """A file that does not fit in a head is two files."""
    count = len(source.lines) - (source.lines[-1] == '')
    if source.path.endswith(CODE_SUFFIXES) and count > WARN_LINES:
        limit = MAX_LINES if count > MAX_LINES else WARN_LINES
        yield Finding(source.path, count, 'size', f'{count} lines, more than {limit}', is_error=count > MAX_LINES)


def check_machine_paths(source: Source) -> Iterator[Finding]:
    """A path of somebody's machine works nowhere else."""
    for number, line in enumerate(source.lines, 1):
        if found := re.search(r'(?<![\w./-])/(?:work|farm|root|home/\w+|Users/\w+)/\w+', line):
            yield Finding(source.path, number, 'machine-path', f'{found.group(0)!r} is a path of one machine')


def check_conflict_marks(source: Source) -> Iterator[Finding]:
    """Committed by accident, they may sit in a comment or a document where no compiler looks."""
    for number, line in enumerate(source.lines, 1):
        if line.startswith(('<' * 7 + ' ', '>' * 7 + ' ')):
            yield Finding(source.path, number, 'conflict', 'a mark that a merge left behind')


RULES: tuple[Rule, ...] = (
    check_include_order,
    check_backend_names,
    forbid('asm', r'\basm\s*(volatile|goto)?\s*\(|\b__asm(__)?\b', 'inline assembly lives in csrc/device/cuda',
           below('csrc/device/cuda/'), is_native),
    forbid('torch', r'#\s*include\s*[<"](torch|ATen|c10)\b', 'the native code does not know torch', below(), is_native),
    forbid('pybind', r'#\s*include\s*[<"]pybind11\b', 'only the bindings know Python',
           lambda path: layer_of(path.removeprefix('csrc/')) == 'bindings', is_native),
    forbid('cuda-header', r'#\s*include\s*<(cuda|nvshmem|cub|thrust)', 'CUDA headers live in csrc/device/cuda',
           below('csrc/device/cuda/', *NVSHMEM_LIBRARY), is_native),
    forbid('getenv', r'\b(secure_)?getenv\b', 'the environment is read in csrc/core/env.cc', below('csrc/core/env.cc'),
           is_native),
    forbid('cudacc', r'\b__CUDACC__\b', 'csrc/device/compiler.h asks the compiler', below('csrc/device/compiler.h'),
           is_native),
    forbid('cuda-arch', r'\b__CUDA_ARCH\w*', 'differences between GPUs are hidden by csrc/device/cuda',
           below('csrc/device/cuda/'), is_native),
    forbid('raw-device', RAW_DEVICE_WORDS, 'kernels ask prim:: for it', below(), is_device_code),
    forbid('nvshmem-internal', r'\bnvshmemi_\w+|\bibgda_\w+|#\s*include\s*<(non_abi|internal|device|device_host)\w*/',
           "only NVSHMEM's public interface stays as it is between versions", below(), is_native),
    forbid('shared-atomic', r'\b(fetch_\w+|compare_swap)<[^>]*\bkSys\b',
           'the heap may be host memory, where GPUs have no atomics: every word of it has one writer', below(),
           is_device_code),
    forbid('environ', r'\bos\.(environ|getenv)\b|from\s+os\s+import\b.*\b(environ|getenv)\b',
           'the package reads the environment in deep_ep/_env.py', below('deep_ep/_env.py'),
           lambda source: source.path.startswith('deep_ep/') and source.path.endswith('.py')),
    check_size,
    check_machine_paths,
    check_conflict_marks,
)


def check_header_names(sources: Iterable[Source]) -> Iterator[Finding]:
    """Two headers of one name are told apart by nothing when they are spoken of."""
    known: dict[str, str] = {}
    for source in sources:
        name = source.path.rsplit('/', 1)[-1]
        if is_device_code(source) and name.endswith('.h') and known.setdefault(name, source.path) != source.path:
            yield Finding(source.path, 1, 'header-name', f'{known[name]} has this name')


def check(sources: Iterable[Source]) -> list[Finding]:
    listed = list(sources)
    findings = [finding for source in listed for rule in RULES for finding in rule(source)]
    return [*findings, *check_header_names(listed)]


def read_sources(root: Path, paths: Sequence[str]) -> Iterator[Source]:
    for path in paths:
        file = root / path
        if file.is_file() and (path.endswith(TEXT_SUFFIXES) or file.name in TEXT_NAMES):
            yield make_source(path, file.read_text(encoding='utf-8', errors='replace'))


def list_files(root: Path) -> list[str]:
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    return sorted(set(
        subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()))


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    findings = check(read_sources(root, list_files(root)))
    for finding in findings:
        print(finding)
    return int(any(finding.is_error for finding in findings))


if __name__ == '__main__':
    sys.exit(main())
