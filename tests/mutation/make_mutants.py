#!/usr/bin/env python3
"""Writes a copy of the kernels in which every ordering and every wait can be switched off, one at a time, at run time.

    make_mutants.py SOURCE_ROOT OUTPUT_ROOT

Each release, acquire, barrier and wait of csrc/kernels and csrc/device/algo gets a number, and `mutant::active` chooses
the one that is weakened. OUTPUT_ROOT/mutants.json lists the numbers with file, line, kind and source line; a
system-scope ordering counts twice, the second time (number + 1000) with its scope narrowed to one GPU. The copy is only
compiled for the executor, and only for the mutation test.
"""
import json
import pathlib
import re
import sys
from typing import Callable, NamedTuple

COPIED = ('csrc/kernels', 'csrc/device/algo')
WEAKENED = ('csrc/kernels/intranode/', 'csrc/kernels/layout/', 'csrc/kernels/low_latency/', 'csrc/device/algo/')
NARROW = 1000

ORDER = r'(?:prim::)?Order::'
SCOPE = r'(?:prim::)?Scope::(kGpu|kSys|kCta)'
CALL_END = '<call>'  # the rest of the call, to its closing parenthesis


class Rule(NamedTuple):
    """What to look for, and what to put in its place; `{id}` is the mutant's number, `<call>` the matched call."""
    kind: str
    pattern: str
    replacement: str
    has_scope: bool = False


RULES = (
    Rule('release store', rf'prim::store<{ORDER}kRelease,\s*{SCOPE}>\(', r'mutant::store<{id}, prim::Scope::\1>(',
         True),
    Rule('acquire load', rf'prim::load<{ORDER}kAcquire,\s*{SCOPE}>\(', r'mutant::load<{id}, prim::Scope::\1>(', True),
    Rule('acq_rel add', rf'prim::fetch_add<{ORDER}kAcqRel,\s*{SCOPE}>\(', r'mutant::fetch_add<{id}, prim::Scope::\1>('),
    Rule('fence', rf'prim::fence<{ORDER}kAcqRel,\s*{SCOPE}>\(\);', r'mutant::fence<{id}, prim::Scope::\1>();', True),
    Rule('warp barrier', r'(?<!\w)__syncwarp\(\);', r'mutant::sync_warp<{id}>();'),
    Rule('block barrier', r'(?<!\w)__syncthreads\(\);', r'mutant::sync_threads<{id}>();'),
    Rule('wait', r'(?<![\w:])(?<!bool )(?:algo::)?wait_at_least\(', '(mutant::is_active<{id}>() || <call>)'),
    Rule('wait', r'c\.ring\.wait\(', '(mutant::is_active<{id}>() || <call>)'),
    Rule('wait', r'seen >= flag\.expected', '(mutant::is_active<{id}>() || seen >= flag.expected)'),
)


class Weakener:
    """Applies the rules file by file and numbers what it finds."""

    def __init__(self) -> None:
        self.mutants: list[dict[str, object]] = []
        self._last_id = 0

    def weaken(self, text: str, path: str) -> str:
        lines = text.splitlines()
        for rule in RULES:
            text = self._apply(rule, text, path, lines)
        return text

    def _apply(self, rule: Rule, text: str, path: str, lines: list[str]) -> str:
        position = 0
        while match := re.compile(rule.pattern).search(text, position):
            end = closing(text, match.end()) if CALL_END in rule.replacement else match.end()
            new = self._replacement(rule, match, text[match.start():end])
            line = text.count('\n', 0, match.start())
            self._note(rule, path, line, lines[line].strip(), match)
            text = text[:match.start()] + new + text[end:]
            position = match.start() + len(new)
        return text

    def _replacement(self, rule: Rule, match: re.Match[str], call: str) -> str:
        self._last_id += 1
        numbered = rule.replacement.replace('{id}', str(self._last_id))
        return numbered.replace(CALL_END, call) if CALL_END in numbered else match.expand(numbered)

    def _note(self, rule: Rule, path: str, line: int, source: str, match: re.Match[str]) -> None:
        site = {'file': path, 'line': line + 1, 'source': source}
        self.mutants.append({'id': self._last_id, 'kind': rule.kind, **site})
        if rule.has_scope and match.group(1) == 'kSys':
            self.mutants.append({'id': NARROW + self._last_id, 'kind': f'scope of {rule.kind}', **site})


def closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one before `start`."""
    depth = 1
    for position in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError('a call that does not end')


def with_include(text: str) -> str:
    include = '#include "mutation/mutant.h"\n'
    return text.replace('#pragma once\n', '#pragma once\n' + include, 1) if '#pragma once' in text else include + text


def write_copy(source_root: pathlib.Path, output_root: pathlib.Path, change: Callable[[str, str], str]) -> None:
    for folder in COPIED:
        for path in sorted((source_root / folder).rglob('*')):
            if path.suffix not in ('.h', '.cu'):
                continue
            relative = path.relative_to(source_root)
            text = path.read_text()
            if str(relative).startswith(WEAKENED):
                text = change(text, str(relative))
            target = output_root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(with_include(text) if 'mutant::' in text else text)


def main() -> None:
    source_root, output_root = (pathlib.Path(argument) for argument in sys.argv[1:3])
    weakener = Weakener()
    write_copy(source_root, output_root, weakener.weaken)
    (output_root / 'mutants.json').write_text(json.dumps(weakener.mutants, indent=1))


if __name__ == '__main__':
    main()
