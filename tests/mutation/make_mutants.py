#!/usr/bin/env python3
"""Writes a copy of the kernels in which every ordering and every wait can be weakened, one at a time, at run time.

    make_mutants.py SOURCE_ROOT OUTPUT_ROOT

The rules below say what counts as an ordering; they know primitives by their form, so a new kernel needs nothing here.
OUTPUT_ROOT/mutants.json lists the mutants: number, file, line, function, kind, source line. The copy is only compiled
for the executor, and only for the mutation test.
"""
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Callable, NamedTuple

COPIED = ('csrc/kernels', 'csrc/device/algo')
LEFT_ALONE = 'csrc/kernels/bench/'  # measures the wire; carries nothing that anybody reads

PREFIX = r'(?:(?:\w+|\[\w+\]|\(\))(?:\.|->|::))*'  # of a call: c.ring.wait, algo::wait_at_least
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"', re.S)
DEFINITION = re.compile(r'EP_(?:HOST_)?DEVICE\w*\s[\w\s:<>*&]*?(\w+)\(')
NARROWER = {'Sys': 'Gpu', 'Gpu': 'Cta'}
WITHOUT = {'Acquire': {'acquire': 'Relaxed'}, 'Release': {'release': 'Relaxed'},
           'AcqRel': {'acquire': 'Release', 'release': 'Acquire'}}  # yapf: disable


class Variant(NamedTuple):
    """One way to weaken a site. `write` makes the C++ from the text of the site's arguments."""
    kind: str
    write: Callable[[str], str]


class Site(NamedTuple):
    """Characters [start, end) of a file: an expression that the variants take the place of."""
    start: int
    end: int
    arguments: int  # where the arguments begin; they may hold sites of their own
    is_condition: bool  # variants are what to put before the expression: `<variant> || <site>`
    variants: list[Variant]


def closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one before `start`."""
    depth = 1
    for position in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError('a call that does not end')


def dropped(kind: str) -> Variant:
    return Variant(kind, lambda _: 'void()')


def orderings(code: str) -> Iterator[Site]:
    """prim:: or algo::anything<Order, Scope>(...): without its acquire, without its release, with a smaller scope."""
    pattern = r'(?<!\w)((?:prim|algo)::\w+)<\s*(?:prim::)?Order::k(\w+),\s*(?:prim::)?Scope::k(\w+)\s*>\('
    for match in re.finditer(pattern, code):
        name, order, scope = match.groups()
        if order == 'Relaxed':
            continue

        def call(order: str, scope: str, name: str = name) -> Callable[[str], str]:
            return lambda rest: f'{name}<prim::Order::k{order}, prim::Scope::k{scope}>({rest}'

        if name == 'prim::fence':
            variants = [dropped('fence')]
        else:
            short = name.split('::')[1]
            variants = [Variant(f'{lost} of {short}', call(left, scope)) for lost, left in WITHOUT[order].items()]
        if scope in NARROWER:
            variants.append(Variant(f'scope of {name.split("::")[1]}', call(order, NARROWER[scope])))
        yield Site(match.start(), closing(code, match.end()), match.end(), False, variants)


def packets(code: str) -> Iterator[Site]:
    """prim::store_packet<Scope>(...) and load_packet: with a smaller scope; a load, without a look at the epoch."""
    for match in re.finditer(r'prim::(store|load)_packet<(?:prim::)?Scope::k(\w+)>\(', code):
        name, scope = match.groups()
        variants = []
        if scope in NARROWER:
            call = f'prim::{name}_packet<prim::Scope::k{NARROWER[scope]}>('
            variants.append(Variant(f'scope of {name}_packet', lambda rest, call=call: call + rest))
        if name == 'load':
            head = match.group()
            variants.append(Variant('epoch of load_packet', lambda rest, head=head: f'({head}{rest}, true)'))
        yield Site(match.start(), closing(code, match.end()), match.end(), False, variants)


def statements(code: str) -> Iterator[Site]:
    """Barriers, proxy fences and waits for bulk copies: left out. A wait for a whole bulk copy: only for its read."""
    kinds = {
        r'(?<!\w)__syncwarp\(': 'warp barrier',
        r'(?<!\w)__syncthreads\(': 'block barrier',
        rf'(?<![\w.>:])(?<!void ){PREFIX}sync\(': 'group barrier',
        r'prim::barrier_sync\(': 'named barrier',
        r'prim::(?:fence_async_\w+|mbarrier_init_fence)\(': 'proxy fence',
        r'prim::bulk_wait(?:_read)?<\w+>\(': 'bulk wait',
        r'rail::confirm(?:_at)?\(': 'confirm',
    }
    for pattern, kind in kinds.items():
        for match in re.finditer(pattern, code):
            variants = [dropped(kind)]
            if 'bulk_wait<' in match.group():
                read_only = match.group().replace('bulk_wait<', 'bulk_wait_read<')
                variants.append(Variant('write of bulk wait', lambda rest, call=read_only: call + rest))
            yield Site(match.start(), closing(code, match.end()), match.end(), False, variants)


def waits(code: str, returns_bool: set[str]) -> Iterator[Site]:
    """Calls of functions that wait or look: left out, as if what they wait for had come."""
    for match in re.finditer(rf'(?<![\w.:>])({PREFIX})(wait\w*|is_set)\(', code):
        before = code[:match.start()].rstrip()
        if re.search(r'(?<!return)(?<!else)[\w>&*]$', before) and not before.endswith(('&&', '->')):
            continue  # a definition
        end = closing(code, match.end())
        is_statement = (before.endswith((';', '{', '}', ')', 'else'))) and code[end:].lstrip().startswith(';')
        if is_statement:
            yield Site(match.start(), end, match.end(), False, [dropped('wait')])
        elif match.group(2) in returns_bool:
            yield Site(match.start(), end, match.end(), True, [Variant('wait', lambda _: '')])
    for match in re.finditer(r'>=\s*((?:\w+(?:\.|->))*(?:expected|call))\b(?!\.)', code):
        value = match.group(1)
        yield Site(match.start(), match.end(), match.end(), False,
                   [Variant('flag test', lambda _, value=value: f'{value} * 0')])


def messages(code: str) -> Iterator[Site]:
    """What is posted to the rail: not posted, and said to be."""
    for match in re.finditer(r'(?<!\w)rail::(?:put|set|add)\(', code):
        yield Site(match.start(), closing(code, match.end()), match.end(), True, [Variant('message', lambda _: '')])


class Weakener:
    """Applies the rules file by file and numbers what they find."""

    def __init__(self, returns_bool: set[str]) -> None:
        self.mutants: list[dict[str, object]] = []
        self._returns_bool = returns_bool

    def weaken(self, text: str, path: str) -> str:
        code = COMMENT_OR_STRING.sub(lambda match: re.sub(r'[^\n]', ' ', match.group()), text)
        sites = [*orderings(code), *packets(code), *statements(code), *messages(code), *waits(code, self._returns_bool)]
        sites.sort(key=lambda site: (site.start, -site.end))
        numbered = [(site, [self._note(variant.kind, path, text, site.start) for variant in site.variants])
                    for site in sites]
        return self._rendered(text, 0, len(text), numbered)

    def _note(self, kind: str, path: str, text: str, position: int) -> int:
        line = text.count('\n', 0, position)
        functions = DEFINITION.findall(text[:position])
        self.mutants.append({
            'id': len(self.mutants) + 1,
            'kind': kind,
            'file': path,
            'line': line + 1,
            'function': functions[-1] if functions else '',
            'source': text.splitlines()[line].strip(),
        })
        return len(self.mutants)

    def _rendered(self, text: str, start: int, end: int, sites: list[tuple[Site, list[int]]]) -> str:
        """text[start:end] with its sites replaced, the inner ones too."""
        parts = []
        for site, ids in sites:
            if site.start < start or site.end > end:
                continue
            inner = [entry for entry in sites if entry[0].start >= site.arguments and entry[0].end <= site.end]
            rest = self._rendered(text, site.arguments, site.end, inner)
            parts += [text[start:site.start], self._replaced(site, ids, text[site.start:site.arguments], rest)]
            start = site.end
        return ''.join([*parts, text[start:end]])

    @staticmethod
    def _replaced(site: Site, ids: list[int], head: str, rest: str) -> str:
        if site.is_condition:
            return f'(mutant::is_active({ids[0]}) || {head}{rest})'
        if head.startswith('>='):
            return f'>= (mutant::is_active({ids[0]}) ? {site.variants[0].write(rest)} : {head[2:]})'
        weakened = ''.join(f'mutant::is_active({number}) ? {variant.write(rest)} : '
                           for number, variant in zip(ids, site.variants))
        original = head + rest
        return f'({weakened}{f"static_cast<void>({original})" if "? void()" in weakened else original})'


def with_include(text: str) -> str:
    include = '#include "mutation/mutant.h"\n'
    return text.replace('#pragma once\n', '#pragma once\n' + include, 1) if '#pragma once' in text else include + text


def main() -> None:
    source_root, output_root = (pathlib.Path(argument) for argument in sys.argv[1:3])
    files = [path for folder in COPIED for path in sorted((source_root / folder).rglob('*'))]
    texts = {str(path.relative_to(source_root)): path.read_text() for path in files if path.suffix in ('.h', '.cu')}
    weakener = Weakener({name for text in texts.values() for name in re.findall(r'\bbool (\w+)\(', text)})
    for relative, text in texts.items():
        weakened = text if relative.startswith(LEFT_ALONE) else weakener.weaken(text, relative)
        target = output_root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        new = with_include(weakened) if 'mutant::' in weakened else weakened
        if not target.exists() or target.read_text() != new:  # what is as it was is not compiled again
            target.write_text(new)
    (output_root / 'mutants.json').write_text(json.dumps(weakener.mutants, indent=1))


if __name__ == '__main__':
    main()
