"""How figures and tables are written in the documents."""
from __future__ import annotations

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
