"""Findings as tables for a terminal."""
from __future__ import annotations

from collections.abc import Sequence

from deep_ep.bench.results import Findings, HostCost, Profile, Row

COLUMNS = ("operation", "tokens", "SMs", "chained us", "fresh us", "queued us", "p95 us", "remote MB", "GB/s",
           "ceiling", "share")
HOST_COLUMNS = ("host us per call", "CPU time", "wall", "waited for counts")
PROFILE_COLUMNS = ("kernels", "tokens", "budget", "span us", "SMs held and us of each")


def format_findings(findings: Findings) -> str:
    tables = [format_table(findings.rows)]
    if findings.host:
        tables.append(align(HOST_COLUMNS, [host_cells(cost) for cost in findings.host]))
    if findings.profiles:
        tables.append(align(PROFILE_COLUMNS, [profile_cells(profile) for profile in findings.profiles]))
    return "\n\n".join(tables)


def format_table(rows: list[Row]) -> str:
    return align(COLUMNS, [row_cells(row) for row in rows])


def align(header: Sequence[str], lines: list[tuple[str, ...]]) -> str:
    cells = [tuple(header), *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths)))
                     for line in cells)


def number(value: float, form: str) -> str:
    return format(value, form) if value > 0 else "-"


def with_routing(name: str, routing: str) -> str:
    return name if routing == "uniform" else f"{name} ({routing})"


def row_cells(row: Row) -> tuple[str, ...]:
    return (
        with_routing(row.operation, row.routing),
        str(row.num_tokens),
        number(row.num_sms, "d"),
        f"{row.chained_us:.1f}",
        f"{row.fresh_us:.1f}",
        number(row.queued_us, ".1f"),
        f"{row.chained_p95_us:.1f}",
        number(row.remote_bytes / 1e6, ".3g"),
        number(row.remote_gb_per_s, ".1f"),
        number(row.ceiling_gb_per_s, ".1f"),
        number(row.share_of_ceiling, ".2f"),
    )


def host_cells(cost: HostCost) -> tuple[str, ...]:
    return cost.operation, f"{cost.cpu_us:.1f}", f"{cost.wall_us:.1f}", number(cost.waited_us, ".1f")


def profile_cells(profile: Profile) -> tuple[str, ...]:
    kernels = ", ".join(f"{kernel.name} {kernel.num_blocks} SMs {kernel.us:.1f}" for kernel in profile.kernels)
    return (with_routing(profile.operation,
                         profile.routing), str(profile.num_tokens), number(profile.num_sms,
                                                                           "d"), f"{profile.span_us:.1f}", kernels)
