#!/usr/bin/env python3
"""Writes the figures of benchmarks/results/*.json into the documents.

- docs/performance/figures.md, between its two markers: the newest run of each benchmark, machine and number of ranks,
  the runs of tools/gpu_check.sh kept in benchmarks/results/checks, the other libraries in benchmarks/results/libraries,
  and first a list of all of these;
- README.md, between its two markers, and docs/pictures/side_by_side.svg: our newest runs beside the other libraries.

tools/render_benchmarks.py               rewrite all three
tools/render_benchmarks.py --check       fail when one of them does not say what the files say
tools/render_benchmarks.py --plots       first make the plots that are missing beside the files (needs matplotlib)
tools/render_benchmarks.py --text FILE   print what the page would show of these files, and write nothing
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable

from figures import RECORDS, Table, bring_up_to_date, number, time_of, to_markdown
from side_by_side import Named, draw, find_sources, render_readme, render_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "performance" / "figures.md"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "side_by_side.svg"
BEGIN = "<!-- begin: made by tools/render_benchmarks.py -->"
END = "<!-- end -->"

HEADER = ("operation", "tokens", "SMs", "chained µs", "fresh µs", "queued µs", "remote MB", "GB/s", "ceiling GB/s",
          "share")
HOST_HEADER = ("host µs per call", "CPU time", "wall", "waited for counts")
PROFILE_HEADER = ("kernels of", "budget", "span µs", "SMs and µs of each")
# A sweep has hundreds of rows: of more than these, those of one size are shown.
MOST_ROWS = 70
SHOWN_TOKENS = {"intranode": 4096, "internode": 4096, "low-latency": 128}
SHOWN_SMS = 16
SLOW_LINK = 10  # GB/s

Row = dict[str, Any]


def newest(reports: list[Named]) -> list[Named]:
    """Of each benchmark, machine, number of ranks and settings the last run, by file name and report."""
    found: dict[Any, Named] = {}
    for name, report in sorted(reports, key=lambda named: str(named[1]["date"])):
        machine, has_graphs = report["machine"].get("gpu", "CPU"), any(is_graph(row) for row in report["rows"])
        shares = report["num_devices"] < report["num_ranks"] and not report["ranks_as_threads"]
        key = (report["benchmark"], machine, report["num_ranks"], report["ranks_as_threads"], shares
               and has_graphs, settings_of(report))
        found[key] = name, report
    return [found[key] for key in sorted(found, key=str)]


def settings_of(report: dict[str, Any]) -> str:
    """The package's own variables, as one types them before a command."""
    settings = report.get("environment", {})
    return " ".join(f"{name}={value}" for name, value in settings.items()
                    if name.startswith("DEEP_EP_") and value != "automatic")


def is_graph(row: Row) -> bool:
    return "graph" in row["operation"].split()


def select_rows(report: dict[str, Any]) -> list[Row]:
    """All rows of a short run; of a sweep those of one size, skewed routing with one SM budget, and so on."""
    rows: list[Row] = report["rows"]
    tokens, budgets = {row["num_tokens"] for row in rows}, {row["num_sms"] for row in rows}
    wanted = SHOWN_TOKENS[report["benchmark"]]
    shown_tokens = wanted if wanted in tokens else max(tokens)
    shown_sms = (0, SHOWN_SMS if SHOWN_SMS in budgets else max(budgets))
    narrower: list[Callable[[Row], bool]] = [
        lambda row: row["num_tokens"] == shown_tokens,
        lambda row: row["routing"] == "uniform" or row["num_sms"] in shown_sms,
        lambda row: row["routing"] == "uniform",
        lambda row: row["num_sms"] in shown_sms,
    ]
    for is_shown in narrower:
        if len(rows) > MOST_ROWS:
            rows = [row for row in rows if is_shown(row)]
    return rows


def with_routing(row: Row) -> str:
    return str(row["operation"]) if row["routing"] == "uniform" else f"{row['operation']}, {row['routing']} routing"


def row_table(rows: list[Row]) -> Table:
    return HEADER, [(
        with_routing(row),
        f"{row['num_tokens']}",
        number(row["num_sms"], "d"),
        time_of(row["chained_us"]),
        time_of(row["fresh_us"]),
        time_of(row.get("queued_us", 0.0)),
        number(row["remote_bytes"] / 1e6, ".3g"),
        number(row["remote_gb_per_s"] if row["remote_bytes"] else 0.0, form_of_rate(row)),
        number(row["ceiling_gb_per_s"], form_of_rate(row)),
        number(row["share_of_ceiling"], ".2f"),
    ) for row in rows]


def form_of_rate(row: Row) -> str:
    """Links of GPUs carry hundreds of GB/s, TCP one or two."""
    return ".1f" if 0 < row["ceiling_gb_per_s"] < SLOW_LINK else ".0f"


def host_table(report: dict[str, Any]) -> Table:
    return HOST_HEADER, [(cost["operation"], f"{cost['cpu_us']:.1f}", f"{cost['wall_us']:.1f}",
                          number(cost["waited_us"], ".1f")) for cost in report.get("host", [])]


def profile_table(report: dict[str, Any]) -> Table:
    profiles = [profile for profile in report.get("profiles", []) if profile["routing"] == "uniform"]
    budgets = {profile["num_sms"] for profile in profiles}
    shown = SHOWN_SMS if SHOWN_SMS in budgets else max(budgets, default=0)
    return PROFILE_HEADER, [
        (f"{profile['operation']}, {profile['num_tokens']} tokens", number(profile["num_sms"],
                                                                           "d"), f"{profile['span_us']:.1f}",
         ", ".join(f"{kernel['name'].replace('_', ' ')}: {kernel['num_blocks']} SMs {kernel['us']:.1f}"
                   for kernel in profile["kernels"])) for profile in profiles if profile["num_sms"] in (0, shown)
    ]


def tables_of(report: dict[str, Any]) -> list[Table]:
    return [table for table in (row_table(select_rows(report)), host_table(report), profile_table(report)) if table[1]]


def to_text(table: Table) -> list[str]:
    lines = [table[0], *table[1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    ]


def title_of(report: dict[str, Any]) -> str:
    where = report["machine"].get("gpu", "CPU executor")
    how = " (threads that share one)" if report["ranks_as_threads"] else ""
    settings = report.get("environment", {})
    if "DEEP_EP_RANKS_PER_NODE" in settings:
        num_nodes = report["num_ranks"] // int(settings["DEEP_EP_RANKS_PER_NODE"])
        how += f" on {num_nodes} virtual nodes over {settings.get('DEEP_EP_RAIL', 'host')}"
    lends = ", lending" if settings.get("DEEP_EP_LEND_BYTES", "0") not in ("0", "automatic") else ""
    return f"{report['benchmark']}: {report['num_ranks']} ranks{how}, {where}{lends}"


def render_report(name: str, report: dict[str, Any], has_plot: bool) -> list[str]:
    machine, first = report["machine"], report["rows"][0]
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "cuda", "torch") if key in machine)
    shape = f"Hidden {first['hidden']}, top-{first['num_topk']} of {first['num_experts']} experts."
    num_shown, num_rows = len(select_rows(report)), len(report["rows"])
    shown = "" if num_shown == num_rows else f" {num_shown} of {num_rows} rows; all of them are in the file."
    source = f"{report['date'][:10]}, commit {report['commit']}, {versions}. [{name}]({RECORDS}/{name})"
    lines = [
        f"### {title_of(report)}", "", f"{shape} {source}{shown}", "",
        f"    {settings_of(report)} {report['command']}".replace("     ", "    "), ""
    ]
    if has_plot:
        lines += [f"![{title_of(report)}]({RECORDS}/{Path(name).with_suffix('.png').name})", ""]
    for notice in report["notices"]:
        lines += [f"**{notice}**", ""]
    for table in tables_of(report):
        lines += to_markdown(table)
    return lines


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def title_of_check(record: dict[str, Any]) -> str:
    machine = record["machine"]
    gpus = f"{machine['num_gpus']} x {machine['gpu']}" if "gpu" in machine else "CPU executor"
    return f"{record['num_ranks']} ranks, {gpus}"


def render_check(name: str, record: dict[str, Any]) -> list[str]:
    return [
        f"### Check: {title_of_check(record)}", "",
        f"{record['date'][:10]}, commit {record['commit']}. [{name}]({RECORDS}/checks/{name})", "",
        *(f"    {line}" for line in record["command"].split("; ")), "", *(line for step in record["steps"]
                                                                          for line in render_step(step)), ""
    ]


def render_step(step: dict[str, Any]) -> list[str]:
    took = "" if step["seconds"] is None else f" ({step['seconds']} s)"
    return [f"- {step['step']}{took}: {step['result']}", *(f"  - `{verdict}`" for verdict in step["verdicts"])]


def read_reports(folder: Path) -> list[Named]:
    return [(path.name, read(path)) for path in sorted(folder.glob("*.json"))]


def render_index(folder: Path) -> str:
    """A line for each run of `render_results`."""
    shown = newest([named for named in read_reports(folder) if named[1]["rows"]])
    checks = [(path.name, read(path)) for path in sorted((folder / "checks").glob("*.json"))]
    runs = [(title_of(report), report["date"][:10], link_to(name)) for name, report in shown]
    runs += [(f"check: {title_of_check(record)}", record["date"][:10], link_to(f"checks/{name}"))
             for name, record in checks]
    return "\n".join(to_markdown((("run", "date", "record"), runs)))


def link_to(record: str) -> str:
    return f"[JSON]({RECORDS}/{record})"


def render_results(folder: Path) -> str:
    reports = read_reports(folder)
    sources = find_sources(folder / "libraries", reports)
    lines = ["### List", "", render_index(folder)] if reports else []
    lines += render_section(sources) if sources else []
    for name, report in newest([named for named in reports if named[1]["rows"]]):
        lines += render_report(name, report, (folder / name).with_suffix(".png").exists())
    for path in sorted((folder / "checks").glob("*.json")):
        lines += render_check(path.name, read(path))
    return "\n".join(lines) if lines else "No figures yet.\n"


def print_text(paths: list[Path]) -> None:
    for path in paths:
        report = read(path)
        if report["rows"]:
            print(f"\n{title_of(report)}: {len(select_rows(report))} of {len(report['rows'])} rows")
            for line in (settings_of(report), *report["notices"]):
                print(line, end="\n" if line else "")
            for table in tables_of(report):
                print("\n".join(to_text(table)))


def make_plots(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from deep_ep.bench.plot import plot_file

    for path in [*sorted(folder.glob("*.json")), *sorted((folder / "model").glob("*.json"))]:
        picture = path.with_suffix(".png")
        # What the model says changes; a record does not.
        if not picture.exists() or (path.parent != folder and picture.stat().st_mtime < path.stat().st_mtime):
            print(plot_file(path))


def replace_between_markers(page: str, content: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the lines '{BEGIN}' and '{END}' in README.md and in pages of docs")
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def wanted_files() -> dict[Path, str]:
    """What each document should be."""
    figures, readme = (path.read_text(encoding="utf-8") for path in (FIGURES, README))
    wanted = {FIGURES: replace_between_markers(figures, render_results(RESULTS))}
    sources = find_sources(RESULTS / "libraries", read_reports(RESULTS))
    if sources:
        results = RESULTS.relative_to(ROOT).as_posix()
        wanted[README] = replace_between_markers(readme, render_readme(sources, results))
        wanted[PICTURE] = draw(sources)
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", action="store_true")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.text:
        print_text(args.text)
        return 0
    if args.plots:
        make_plots(RESULTS)
    return bring_up_to_date(wanted_files(), ROOT, "tools/render_benchmarks.py", only_checks=args.check)


if __name__ == "__main__":
    sys.exit(main())
