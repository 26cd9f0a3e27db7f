#!/usr/bin/env python3
"""Writes the figures of benchmarks/results/*.json into docs/benchmarks.md, between its two markers.

tools/render_benchmarks.py            rewrite the page
tools/render_benchmarks.py --check    fail when the page does not say what the files say
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- begin: made by tools/render_benchmarks.py -->"
END = "<!-- end -->"

NOTHING = "\u2013"
HEADER = ("operation", "tokens", "SMs", "chained µs", "fresh µs", "remote MB", "GB/s", "ceiling GB/s", "share")


def render_row(row: dict[str, Any]) -> str:
    has_bytes = row["remote_bytes"] > 0
    has_ceiling = row["ceiling_gb_per_s"] > 0
    cells = (
        row["operation"] if row["routing"] == "uniform" else f"{row['operation']}, {row['routing']} routing",
        f"{row['num_tokens']}",
        f"{row['num_sms']}" if row["num_sms"] else NOTHING,
        f"{row['chained_us']:.0f}",
        f"{row['fresh_us']:.0f}",
        f"{row['remote_bytes'] / 1e6:.1f}" if has_bytes else NOTHING,
        f"{row['remote_gb_per_s']:.0f}" if has_bytes else NOTHING,
        f"{row['ceiling_gb_per_s']:.0f}" if has_ceiling else NOTHING,
        f"{row['share_of_ceiling']:.2f}" if has_ceiling else NOTHING,
    )
    return f"| {' | '.join(cells)} |"


def render_report(report: dict[str, Any], name: str) -> list[str]:
    machine = report["machine"]
    first = report["rows"][0]
    where = machine.get("gpu", "CPU executor")
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "cuda", "torch") if key in machine)
    shape = f"Hidden {first['hidden']}, top-{first['num_topk']} of {first['num_experts']} experts."
    source = f"{report['date'][:10]}, commit {report['commit']}, {versions}. [{name}](../benchmarks/results/{name})"
    lines = [
        f"### {report['benchmark']}: {report['num_ranks']} ranks, {where}",
        "",
        f"{shape} {source}",
        "",
        f"    {report['command']}",
        "",
    ]
    for notice in report["notices"]:
        lines += [f"**{notice}**", ""]
    lines += [f"| {' | '.join(HEADER)} |", f"| --- |{' ---: |' * (len(HEADER) - 1)}"]
    return [*lines, *map(render_row, report["rows"]), ""]


def render_results(folder: Path) -> str:
    lines: list[str] = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["rows"]:
            lines += render_report(report, path.name)
    return "\n".join(lines) if lines else "No figures yet.\n"


def replace_between_markers(page: str, content: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name}: expected the lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    wanted = replace_between_markers(page, render_results(RESULTS))
    if args.check:
        if page != wanted:
            print("docs/benchmarks.md is out of date: run tools/render_benchmarks.py", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
