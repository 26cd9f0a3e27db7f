#!/usr/bin/env python3
"""Writes the records of arguments into deep_ep_cpp.pyi, from what the extension says of them (csrc/kernels/params.h).

Without arguments the stub is rewritten; with --check it is compared, and the exit status is 1 if it is not up to date.
"""
from __future__ import annotations

import sys
from pathlib import Path

STUB = Path(__file__).parents[1] / 'deep_ep_cpp.pyi'
BEGIN = '# -- Records of arguments: written by tools/render_stub.py from csrc/kernels/params.h'
END = '# -- End of the records'
PYTHON_TYPES = {'bool': 'bool', 'address': 'Address', 'two addresses': 'tuple[Address, Address]'}  # the others: int

Fields = tuple[tuple[str, str, str], ...]


def find_base(name: str, records: dict[str, Fields]) -> str | None:
    """The record that one extends: all its fields come first in the other."""
    fields = records[name]
    for other, first in records.items():
        if other != name and fields[:len(first)] == first:
            return other
    return None


def render_record(name: str, records: dict[str, Fields]) -> str:
    fields, base = records[name], find_base(name, records)
    first = f'base: {base} = ..., /, ' if base else ''
    lines = [f'class _{name}({f"_{base}" if base else "TypedDict"}, total=False):']
    for field, kind, meaning in fields[len(records[base]) if base else 0:]:
        lines.append(f'    {field}: {PYTHON_TYPES.get(kind, "int")}  # {kind}{"; " if meaning else ""}{meaning}')
    lines += [
        '',
        f'class {name}:',
        '    FIELDS: Tuple[Tuple[str, str, str], ...]',
        f'    def __init__(self, {first}**fields: Unpack[_{name}]) -> None: ...',
        f'    def replace(self, **fields: Unpack[_{name}]) -> {name}: ...',
    ]
    return '\n'.join(lines)


def render() -> str:
    """The whole stub, with the records as the extension has them."""
    import deep_ep_cpp

    before, rest = STUB.read_text().split(BEGIN)
    _, after = rest.split(END)
    records = {name: member.FIELDS for name, member in vars(deep_ep_cpp).items() if hasattr(member, 'FIELDS')}
    return f'{before}{BEGIN}\n\n' + '\n\n'.join(render_record(name, records) for name in records) + f'\n\n{END}{after}'


def main(arguments: list[str]) -> int:
    if arguments not in ([], ['--check']):
        print(__doc__, file=sys.stderr)
        return 2
    text = render()
    if text == STUB.read_text():
        return 0
    if arguments:
        print(f'{STUB.name} is not what the extension has; run tools/render_stub.py', file=sys.stderr)
        return 1
    STUB.write_text(text)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
