"""How figures and tables are written in the documents."""
from __future__ import annotations

import sys
from pathlib import Path

NOTHING = "\u2013"
RECORDS = "../../benchmarks/results"  # seen from docs/performance/figures.md
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def number(value: float, form: str) -> str:
    return format(value, form) if value > 0 else NOTHING


def time_of(us: float) -> str:
    return number(us, ".0f" if us >= 100 else ".1f")


def to_markdown(table: Table) -> list[str]:
    header, lines = table
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}", *rows, ""]


def says(path: Path, content: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == content


def bring_up_to_date(wanted: dict[Path, str], root: Path, tool: str, only_checks: bool) -> int:
    """Writes the files that say something else, or tells which they are; the exit status of the tool."""
    stale = {path: content for path, content in wanted.items() if not says(path, content)}
    for path, content in stale.items():
        if only_checks:
            print(f"{path.relative_to(root)} is out of date: run {tool}", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return int(only_checks and bool(stale))
