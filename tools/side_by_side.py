"""Our figures beside those of other libraries: table and plot of the README, and a section of
docs/performance/figures.md.

Ours are those of our own newest runs on the machine that the other libraries were measured on: as callers get it (a
Buffer of the hint's size) and lent (`DEEP_EP_LEND_BYTES`). The others come from benchmarks/results/libraries/.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from figures import NOTHING, RECORDS, time_of, to_markdown
from svg import Picture

Report = dict[str, Any]
Named = tuple[str, Report]

OTHERS = {"v1": "DeepEP V1", "v2": "DeepEP V2", "ncclep": "NCCL EP"}
PLAIN, LENT = "this library, as callers get it", "this library, lent"
FLOOR = "wire floor"
COLUMNS = (*OTHERS.values(), PLAIN, LENT, FLOOR)
TOKENS = {"intranode": 4096, "low-latency": 128}


@dataclass(frozen=True)
class Operation:
    """What is compared: a name for readers, and what our runs and the others' call it."""
    title: str
    benchmark: str
    ours: str
    theirs: str
    is_fresh: bool = False


DISPATCH_FP8 = Operation("FP8 dispatch, cached", "intranode", "dispatch FP8 cached", "dispatch_fp8_cached")
DISPATCH_BF16 = Operation("BF16 dispatch, cached", "intranode", "dispatch BF16 cached", "dispatch_bf16_cached")
COMBINE = Operation("BF16 combine", "intranode", "combine BF16", "combine_bf16")
FRESH_FP8 = Operation("FP8 dispatch, fresh", "intranode", "dispatch FP8", "dispatch_fp8", is_fresh=True)
FRESH_BF16 = Operation("BF16 dispatch, fresh", "intranode", "dispatch BF16", "dispatch_bf16", is_fresh=True)
LAYOUT = Operation("layout (before a fresh dispatch)", "intranode", "layout", "layout")
LOW_LATENCY_FP8 = Operation("low latency: FP8 dispatch", "low-latency", "dispatch FP8", "ll_dispatch_fp8")
LOW_LATENCY_BF16 = Operation("low latency: BF16 dispatch", "low-latency", "dispatch BF16", "ll_dispatch_bf16")
LOW_LATENCY_COMBINE = Operation("low latency: BF16 combine", "low-latency", "combine BF16", "ll_combine_bf16")

# NCCL EP has no fresh dispatch: there a new routing is an update of its handle, and a dispatch.
FRESH_OF_NCCL_EP = {"dispatch_fp8": "dispatch_fp8_worst", "dispatch_bf16": "dispatch_bf16_worst"}

SHOWN = ((DISPATCH_FP8, 16), (DISPATCH_BF16, 16), (COMBINE, 16), (DISPATCH_FP8, 24), (DISPATCH_BF16, 24), (COMBINE, 24),
         (FRESH_FP8, 16), (FRESH_BF16, 16), (LAYOUT, 0), (LOW_LATENCY_FP8, 0), (LOW_LATENCY_BF16,
                                                                                0), (LOW_LATENCY_COMBINE, 0))
DRAWN = (("High throughput: 4096 tokens per rank, hidden 7168, top-8 of 256 experts, 16 SMs",
          (DISPATCH_FP8, DISPATCH_BF16, COMBINE), 16, (*OTHERS.values(), PLAIN, LENT)),
         ("Low latency: 128 tokens per rank, hidden 7168, top-8 of 288 experts",
          (LOW_LATENCY_FP8, LOW_LATENCY_BF16, LOW_LATENCY_COMBINE), 0,
          (OTHERS["v1"], OTHERS["ncclep"], PLAIN)))  # yapf: disable


@dataclass(frozen=True)
class Runs:
    """Our newest runs on one kind of machine; a kind of run that was not made is None."""
    plain: Named | None
    lent: Named | None
    low_latency: Named | None


@dataclass(frozen=True)
class Sources(Runs):
    """The files that are compared, and ours of another machine with as many GPUs that are newer."""
    libraries: Named
    newer: tuple[str, Runs] | None = None


@dataclass(frozen=True)
class Line:
    operation: Operation
    num_sms: int
    us: dict[str, float]  # by column; what was not measured is not there

    def cells(self) -> tuple[str, ...]:
        least = time_of(min((us for name, us in self.us.items() if name != FLOOR), default=0.0))
        shown = {name: time_of(self.us.get(name, 0.0)) for name in COLUMNS}
        marked = [f"**{cell}**" if name != FLOOR and name in self.us and cell == least else cell
                  for name, cell in shown.items()]  # yapf: disable
        return (self.operation.title, str(self.num_sms or NOTHING), *marked)


def find_sources(folder: Path, reports: Iterable[Named]) -> Sources | None:
    """The newest file of other libraries, and our newest runs on the same kind of machine; None: no such file."""
    files = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    if not files:
        return None
    libraries = max(files, key=lambda named: str(named[1]["date"]))
    reports = list(reports)
    ours = newest_runs(reports, libraries[1]["machine"])
    return Sources(ours.plain, ours.lent, ours.low_latency, libraries, find_newer(reports, ours.plain))


def newest_runs(reports: Iterable[Named], machine: str) -> Runs:
    ours = [named for named in reports if is_on(named[1], machine)]
    return Runs(newest_of(ours, "intranode", is_plain), newest_of(ours, "intranode", is_lending),
                newest_of(ours, "low-latency", is_plain))


def find_newer(reports: list[Named], plain: Named | None) -> tuple[str, Runs] | None:
    """Of the machine with our newest run, where that is newer than `plain` and of as many GPUs."""
    if plain is None:
        return None
    same = [named for named in reports
            if named[1].get("num_ranks") == named[1].get("num_devices") == plain[1]["num_devices"]
            and "gpu" in named[1]["machine"]]  # yapf: disable
    newest = newest_of(same, "intranode", is_plain)
    if newest is None or newest[1]["date"] <= plain[1]["date"]:
        return None
    machine = gpus_of(newest[1])
    return machine, newest_runs(reports, machine)


def is_on(report: Report, machine: str) -> bool:
    """Was this run made on such a machine ("2 x NVIDIA H100 80GB HBM3, ..."), one rank on each GPU?"""
    return machine.startswith(gpus_of(report)) and int(report["num_ranks"]) == int(report["num_devices"])


def gpus_of(report: Report) -> str:
    return f"{report['num_devices']} x {report['machine'].get('gpu', 'CPU')}"


def newest_of(reports: Iterable[Named], benchmark: str, is_wanted: Callable[[Report], bool]) -> Named | None:
    kept = [(name, report) for name, report in reports
            if report["benchmark"] == benchmark and is_wanted(report) and any(row["num_tokens"] == TOKENS[benchmark]
                                                                              for row in report["rows"])]
    return max(kept, key=lambda named: str(named[1]["date"]), default=None)


def is_plain(report: Report) -> bool:
    """Nothing of ours was set in the environment. "automatic": what a Buffer does by itself."""
    settings = report.get("environment", {})
    return not any(name.startswith("DEEP_EP_") and value != "automatic" for name, value in settings.items())


def is_lending(report: Report) -> bool:
    return str(report.get("environment", {}).get("DEEP_EP_LEND_BYTES", "0")) not in ("0", "automatic")


def make_lines(sources: Sources) -> list[Line]:
    return [make_line(sources, operation, num_sms) for operation, num_sms in SHOWN]


def us_of_runs(runs: Runs, operation: Operation, num_sms: int) -> dict[str, float]:
    is_intranode = operation.benchmark == "intranode"
    columns = ((PLAIN, runs.plain if is_intranode else runs.low_latency), (LENT, runs.lent if is_intranode else None))
    return {column: us for column, source in columns if source and (us := us_of_report(source[1], operation, num_sms))}


def make_line(sources: Sources, operation: Operation, num_sms: int) -> Line:
    us = {name: us for key, name in OTHERS.items() if (us := us_of_library(sources, key, operation, num_sms))}
    us |= us_of_runs(sources, operation, num_sms)
    plain = sources.plain if operation.benchmark == "intranode" else sources.low_latency
    if plain and not operation.is_fresh and (floor := floor_of(plain[1], operation, num_sms)):
        us[FLOOR] = floor
    return Line(operation, num_sms, us)


def us_of_library(sources: Sources, key: str, operation: Operation, num_sms: int) -> float:
    """The median of its figures: kernels, or for a fresh call the time from one to the next. 0: not measured."""
    name = FRESH_OF_NCCL_EP.get(operation.theirs, operation.theirs) if key == "ncclep" else operation.theirs
    unit = "event_us" if operation.is_fresh else "kernel_us"
    found = [
        figure[unit] for figure in sources.libraries[1]["figures"]
        if figure["library"] == key and figure["op"] == name and figure.get("sms", 0) == num_sms and unit in figure
    ]
    return float(median(found)) if found else 0.0


def us_of_report(report: Report, operation: Operation, num_sms: int) -> float:
    """The same of a run of ours. 0: not measured."""
    entries, unit = (report["rows"], "chained_us") if operation.is_fresh else (report.get("profiles", []), "span_us")
    return next((float(entry[unit]) for entry in entries if is_entry(entry, operation, num_sms)), 0.0)


def floor_of(report: Report, operation: Operation, num_sms: int) -> float:
    """What the wire needs: remote bytes over the rate at which a bare kernel pushed rows, in µs. 0: not known."""
    row = next((row for row in report["rows"] if is_entry(row, operation, num_sms)), None)
    return row["remote_bytes"] / row["ceiling_gb_per_s"] / 1e3 if row and row["ceiling_gb_per_s"] else 0.0


def is_entry(entry: dict[str, Any], operation: Operation, num_sms: int) -> bool:
    wanted = (operation.ours, TOKENS[operation.benchmark], num_sms, "uniform")
    return (entry["operation"], entry["num_tokens"], entry["num_sms"], entry["routing"]) == wanted


README_HEAD = """\
µs on {machine} over NVLink, 2 ranks. Bold: the least of a row. Rows *cached* (the routing of an earlier call) and *low
latency* time the kernels of a call on the slowest rank. Rows *fresh* time whole calls, the wait for counts included.
"""
README_NOTES = """\
- 4096 tokens per rank, hidden 7168, top-8 of 256 experts. Low latency: 128 tokens, top-8 of 288. *As callers get it*: a
  `Buffer` of the hint's size. *Lent*: with `num_lend_bytes`, and a lent input of combine. *Wire floor*: remote bytes
  over the rate of a bare copy kernel. {nothing}: not measured.
- V2's kernels include copies on all SMs; its fresh dispatch includes the layout. NCCL EP's fresh dispatch updates its
  handle, then dispatches.
- Sources: this library {ours}; [the others]({results}/libraries/{name}) ({date}).
  [docs/benchmarks.md](docs/benchmarks.md) explains the figures.
"""
NEWER_HEAD = """\
Newer kernels were measured on {machine}, where the other libraries were not:
"""
SECTION_HEAD = """\
### Side by side: {machine}

{date}. {setting}. {work}. [{name}]({records}/libraries/{name})

{libraries}

Columns: {columns}.
"""


def links_of(runs: Runs, results: str) -> str:
    named_runs = {"as callers get it": runs.plain, "lent": runs.lent, "low latency": runs.low_latency}
    return ", ".join(f"[{kind}]({results}/{named[0]}) ({named[1]['date'][:10]}, commit {named[1]['commit'][:7]})"
                     for kind, named in named_runs.items() if named)


def render_newer(machine: str, runs: Runs, results: str) -> list[str]:
    lines = []
    for operation, num_sms in SHOWN:
        us = us_of_runs(runs, operation, num_sms)
        if us:
            cells = [time_of(us.get(column, 0.0)) for column in (PLAIN, LENT)]
            lines.append((operation.title, str(num_sms or NOTHING), *cells))
    table = to_markdown((("", "SMs", PLAIN, LENT), lines))
    return [NEWER_HEAD.format(machine=machine), *table, f"Sources: {links_of(runs, results)}.\n"]


def render_readme(sources: Sources, results: str) -> str:
    """The table of the README with its sources; `results` is where the files lie, seen from there."""
    name, content = sources.libraries
    notes = README_NOTES.format(nothing=NOTHING,
                                ours=links_of(sources, results),
                                results=results,
                                name=name,
                                date=content["date"])
    table = to_markdown((("", "SMs", *COLUMNS), [line.cells() for line in make_lines(sources)]))
    newer = render_newer(*sources.newer, results) if sources.newer else []
    return "\n".join([README_HEAD.format(machine=machine_of(sources)), *table, notes, *newer])


def machine_of(sources: Sources) -> str:
    """Number and name of the GPUs."""
    machine: str = sources.libraries[1]["machine"]
    return machine.partition(",")[0]


def render_section(sources: Sources) -> list[str]:
    """Every figure of the libraries' file, ours of the same session included."""
    name, content = sources.libraries
    keys = list(content["libraries"])
    libraries = "\n".join(f"- `{key}`: {text}" for key, text in content["libraries"].items())
    lines = [
        SECTION_HEAD.format(machine=machine_of(sources),
                            date=content["date"],
                            setting=content["machine"],
                            work=content["work"],
                            name=name,
                            records=RECORDS,
                            libraries=libraries,
                            columns=content["columns"])
    ]
    for unit in ("kernel_us", "event_us"):
        lines += to_markdown(((f"`{unit}`", "SMs", *keys), library_rows(content["figures"], keys, unit)))
    return lines


def library_rows(figures: list[dict[str, Any]], keys: list[str], unit: str) -> list[tuple[str, ...]]:
    cases = sorted({(figure["mode"], figure["op"], figure.get("sms", 0)) for figure in figures if unit in figure})
    rows = []
    for mode, operation, num_sms in cases:
        cells = []
        for key in keys:
            found = [
                figure[unit] for figure in figures
                if (figure["library"], figure["mode"], figure["op"],
                    figure.get("sms", 0)) == (key, mode, operation, num_sms) and unit in figure
            ]
            cells.append(time_of(median(found)) if found else NOTHING)
        rows.append((operation, str(num_sms or NOTHING), *cells))
    return rows


WIDTH, LABELS_WIDTH, PANEL_GAP, MARGIN = 860, 200, 14, 16
ROW, BAR = 25, 17
FIGURE_WIDTH = 42
ROLES = {PLAIN: "first", LENT: "third"}


def draw(sources: Sources) -> str:
    """The plot of the README: a panel for each operation, a bar for each library."""
    machine = machine_of(sources)
    height = sum(74 + ROW * len(names) for *_, names in DRAWN) + 50
    picture = Picture(WIDTH, height, f"Dispatch and combine on {machine}",
                      "Bars of the time of a call's kernels for each library; the figures are those of the table.")
    picture.text(MARGIN, 28, f"µs of a call's kernels on {machine}: less is better", bold=True, size=15)
    top = 46
    for title, operations, num_sms, names in DRAWN:
        draw_block(picture, top, title, names, [make_line(sources, operation, num_sms) for operation in operations])
        top += 74 + ROW * len(names)
    return picture.render()


def draw_block(picture: Picture, top: float, title: str, names: tuple[str, ...], lines: list[Line]) -> None:
    """Panels side by side, of one scale."""
    picture.text(MARGIN, top + 14, title, "faint")
    for i, name in enumerate(names):
        is_ours = name in ROLES
        picture.text(MARGIN + LABELS_WIDTH - 12, top + 60 + i * ROW, name, "ink" if is_ours else "faint", anchor="end",
                     size=12, bold=is_ours)  # yapf: disable
    width = (WIDTH - 2 * MARGIN - LABELS_WIDTH - PANEL_GAP * (len(lines) - 1)) / len(lines)
    most = max(us for line in lines for us in line.us.values())
    for i, line in enumerate(lines):
        draw_panel(picture, MARGIN + LABELS_WIDTH + i * (width + PANEL_GAP), top + 24, names, line,
                   (width - FIGURE_WIDTH) / most)


def draw_panel(picture: Picture, x: float, top: float, names: tuple[str, ...], line: Line, scale: float) -> None:
    picture.text(x, top + 12, line.operation.title.removeprefix("low latency: "), size=12.5, bold=True)
    bottom = top + 22 + ROW * len(names)
    for i, name in enumerate(names):
        us, y = line.us.get(name, 0.0), top + 23 + i * ROW
        picture.box(x, y, round(us * scale, 1), BAR, ROLES.get(name, "other"), radius=2)
        picture.text(x + round(us * scale, 1) + 5, y + 13, time_of(us), size=12)
    if FLOOR in line.us:
        floor = x + round(line.us[FLOOR] * scale, 1)
        picture.line(floor, top + 19, floor, bottom, "ink", dashed=True)
        picture.text(floor, bottom + 12, f"{FLOOR} {time_of(line.us[FLOOR])}", "faint", size=10.5, anchor="middle")
