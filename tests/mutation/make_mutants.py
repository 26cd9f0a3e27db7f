#!/usr/bin/env python3
"""Writes a copy of the kernels in which every ordering and every wait can be switched off, one at a time, at run time.

    make_mutants.py SOURCE_ROOT OUTPUT_ROOT

Each release, acquire, barrier and wait of csrc/kernels and csrc/device/algo becomes a call into `mutant.h` with a number;
`mutant::active` chooses the one that is weakened. OUTPUT_ROOT/mutants.json lists the numbers with file, line, kind and source line; a system-scope ordering
counts twice, the second time (number + 1000) with its scope narrowed to one GPU.
The copy is only compiled for the executor, and only for the mutation test.
"""
import dataclasses
import json
import pathlib
import re
import sys

NARROW = 1000
FOLDERS = ('csrc/kernels', 'csrc/device/algo')


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to look for, and what to put in its place; `{id}` is the mutant's number."""
    kind: str
    pattern: str
    replacement: str


ORDER = r'(?:prim::)?Order::'
SCOPE = r'(?:prim::)?Scope::(kGpu|kSys)'
RULES = (
    Rule('release store', rf'prim::store<{ORDER}kRelease, {SCOPE}>\(', r'mutant::store<{id}, prim::Scope::\1>('),
    Rule('acquire load', rf'prim::load<{ORDER}kAcquire, {SCOPE}>\(', r'mutant::load<{id}, prim::Scope::\1>('),
    Rule('acq_rel add', rf'prim::fetch_add<{ORDER}kAcqRel, {SCOPE}>\(', r'mutant::fetch_add<{id}, prim::Scope::\1>('),
    Rule('warp barrier', r'(?<!\w)__syncwarp\(\);', r'mutant::sync_warp<{id}>();'),
    Rule('block barrier', r'(?<!\w)__syncthreads\(\);', r'mutant::sync_threads<{id}>();'),
    Rule('wait', r'(?:algo::|= |return |\|\| )(wait_at_least)\(', r' mutant::wait<{id}>('),
    Rule('wait', r'c\.ring\.wait\(', r'mutant::ring_wait<{id}>(c.ring, '),
    Rule('wait', r'has_row && seen >= flag\.expected', r'has_row && (mutant::is_active<{id}>() || seen >= flag.expected)'),
)
# `return test.flag == nullptr || wait_at_least(` and `is_ready &= wait_at_least(` keep what stands before the call.
KEEP_PREFIX = re.compile(r'^(= |return |\|\| )')


def next_number(mutants: list[dict[str, object]]) -> int:
    """Numbers of plain mutants are consecutive."""
    return 1 + sum(1 for mutant in mutants if int(str(mutant['id'])) < NARROW)


def weaken(text: str, path: str, mutants: list[dict[str, object]]) -> str:
    """Applies every rule to one file; appends what it found to `mutants`."""
    for rule in RULES:

        def replace(match: re.Match[str], rule: Rule = rule) -> str:
            line = match.string.count('\n', 0, match.start()) + 1
            number = next_number(mutants)
            mutants.append({'id': number, 'file': path, 'line': line, 'kind': rule.kind})
            if rule.replacement.endswith(r'prim::Scope::\1>(') and match.group(1) == 'kSys':
                mutants.append({'id': NARROW + number, 'file': path, 'line': line, 'kind': f'scope of {rule.kind}'})
            prefix = KEEP_PREFIX.match(match.group(0))
            kept = prefix.group(0) if prefix else ''
            return kept + match.expand(rule.replacement.replace('{id}', str(number))).lstrip()

        text = re.sub(rule.pattern, replace, text)
    return text


def main() -> None:
    source_root, output_root = (pathlib.Path(argument) for argument in sys.argv[1:3])
    mutants: list[dict[str, object]] = []
    for folder in FOLDERS:
        for path in sorted((source_root / folder).rglob('*')):
            if path.suffix not in ('.h', '.cu'):
                continue
            relative = path.relative_to(source_root)
            target = output_root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            text = weaken(path.read_text(), str(relative), mutants)
            if 'mutant::' in text:
                text = text.replace('#pragma once', '#pragma once\n#include "mutation/mutant.h"', 1) \
                    if '#pragma once' in text else '#include "mutation/mutant.h"\n' + text
            target.write_text(text)
    (output_root / 'mutants.json').write_text(json.dumps(mutants, indent=1))


if __name__ == '__main__':
    main()
