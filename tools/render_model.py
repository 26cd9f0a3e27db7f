#!/usr/bin/env python3
"""Writes what `python -m deep_ep model` says into docs/performance/model.md, between its two markers, beside what was
measured inside a node and what others have published of several; and the scaling that is drawn beside it.

tools/render_model.py            rewrite both; then `tools/render_benchmarks.py --plots` draws the picture anew
tools/render_model.py --check    fail when one of them is not what the model says
tools/render_model.py --fit      print the constants of deep_ep/model.py, fitted to the newest benchmarks (then name
                                 them in RECORDS)
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model_fit  # noqa: E402
from figures import NOTHING, Table, bring_up_to_date, time_of, to_markdown  # noqa: E402
from published import LOW_LATENCY, PUBLISHED, Published  # noqa: E402

from deep_ep import model  # noqa: E402
from deep_ep.model import BF16, COMBINE, DISPATCH, FP8, Nodes, Shape  # noqa: E402
from deep_ep_cpp import InvalidArgument  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance" / "model.md"
SCALING = {
    model.HIGH_THROUGHPUT: RESULTS / "model" / "scaling.json",
    model.LOW_LATENCY: RESULTS / "model" / "scaling_low_latency.json"
}
PICTURES = {mode: path.with_suffix(".png") for mode, path in SCALING.items()}
BEGIN = "<!-- begin: made by tools/render_model.py -->"
END = "<!-- end -->"
NIC_GB_PER_S = 50.0  # 400 Gb/s for each GPU
LINKS = model.Links(NIC_GB_PER_S)
TOKENS, DECODED = Shape(4096, 7168, 8, 256), Shape(128, 7168, 8, 256)
# What the constants of deep_ep/model.py are fitted to: runs as callers get them, and one that lends nothing. `--fit`
# fits newer ones.
AS_CALLED, SLOTS, LOW = "as called", "rows through slots", "low latency"
RECORDS = {
    AS_CALLED: "2026-11-28T2128_intranode_nvidia-h200_x2.json",
    SLOTS: "2026-11-28T2042_intranode_nvidia-h200_x2_slots.json",
    LOW: "2026-11-28T2129_low-latency_nvidia-h200_x2.json",
}
# Of these sizes there are figures of others with the same shape.
NODES = (2, 4, 8)
SHOWN = (2, 4)


def per_cent(error: float) -> str:
    return f"{100 * error:+.0f} %"


def name_of(operation: str, kind: str) -> str:
    return f"{kind.upper()} {operation}"


def kind_of(report: dict[str, Any]) -> str:
    """Which of RECORDS a run could be: on a GPU for each rank, inside a node, with no other variable that matters."""
    environment = {name: value for name, value in report.get("environment", {}).items() if name.startswith("DEEP_EP_")}
    lent = environment.pop("DEEP_EP_LEND_BYTES", "")
    environment.pop("DEEP_EP_RAIL_INTERFACE", None)  # inside a node there is no rail
    if environment or report["num_devices"] != report["num_ranks"] or "gpu" not in report["machine"]:
        return ""
    if "--ranks-per-node" in report["command"]:
        return ""
    kinds = {("intranode", "automatic"): AS_CALLED, ("intranode", "0"): SLOTS, (model.LOW_LATENCY, "automatic"): LOW}
    return kinds.get((report["benchmark"], lent), "")


def newest(kind: str) -> tuple[str, dict[str, Any]]:
    """The newest such run, by its date, that the constants can be fitted to."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if kind_of(report) != kind:
            continue
        with contextlib.suppress(InvalidArgument):  # too few SM budgets or sizes
            model_fit.measure(report)
            found.append((report["date"], path.name, report))
    _, name, report = max(found, key=lambda one: one[0])
    return name, report


def fitted(kind: str) -> tuple[str, dict[str, Any]]:
    """The record that the constants stand on."""
    report: dict[str, Any] = json.loads((RESULTS / RECORDS[kind]).read_text(encoding="utf-8"))
    return RECORDS[kind], report


def byte_table() -> Table:
    rows = []
    for num_nodes in (1, *NODES):
        nodes = Nodes(num_nodes, 8)
        cells = [f"{num_nodes} x 8", f"{model.distinct_nodes(TOKENS, nodes):.2f}",
                 f"{model.distinct_ranks(TOKENS, nodes):.2f}"]  # yapf: disable
        for operation, kind in model.OPERATIONS:
            moved = model.traffic(TOKENS, nodes, operation, kind, LINKS.chunk_bytes)
            cells += [f"{moved.rail_bytes / 1e6:.1f}", f"{moved.nvlink_bytes / 1e6:.1f}"]
        rows.append(tuple(cells))
    header = ["nodes x ranks", "distinct nodes", "distinct ranks"]
    for operation, kind in model.OPERATIONS:
        header += [f"{name_of(operation, kind)}: rail MB", "NVLink MB"]
    return tuple(header), rows


def measured_table(report: dict[str, Any]) -> Table:
    return ("one node", "tokens", "SMs", "measured µs", "model µs", "off"), [
        (one.operation, f"{one.num_tokens}", f"{one.num_sms}" if one.num_sms else "all", f"{one.measured_us:.1f}",
         f"{one.model_us:.1f}", per_cent(one.error)) for one in model_fit.compare(report)
    ]


def bound_of(one: Published) -> float:
    links = model.Links(one.nic_gb_per_s, one.nvlink_gb_per_s)
    shape = Shape(one.num_tokens, 7168, 8, one.num_experts, one.limit_nodes)
    return model.two_terms_us(shape, Nodes(one.num_nodes, 8), links, one.operation, one.kind)


def published_table() -> Table:
    rows = []
    for one in PUBLISHED:
        bound = bound_of(one)
        rows.append((one.source, f"{one.num_nodes} x 8", f"{one.num_tokens}", name_of(one.operation, one.kind),
                     f"{one.us:.0f}", f"{bound:.0f}", per_cent(one.us / bound - 1)))
    return ("published", "nodes", "tokens", "call", "µs", "bound µs", "published / bound - 1"), rows


def prediction_table() -> Table:
    rows = []
    for num_nodes in SHOWN:
        for operation, kind in model.OPERATIONS:
            one = model.predict(TOKENS, Nodes(num_nodes, 8), LINKS, operation, kind)
            wanted = (num_nodes, operation, kind, TOKENS.num_tokens)
            others = [
                other for other in PUBLISHED
                if (other.num_nodes, other.operation, other.kind, other.num_tokens) == wanted
            ]
            best = min(others, key=lambda other: other.us)
            phases = {phase.name: phase.time_us for phase in one.phases}
            rows.append((f"{num_nodes} x 8", name_of(operation, kind), f"**{one.time_us:.0f}**", one.bottleneck.name,
                         f"{phases['rail']:.0f}", f"{phases['NVLink']:.0f}", f"{phases['SMs']:.0f}",
                         f"{one.fixed_us:.0f}", f"{one.num_sms}", f"{best.us:.0f} ({best.source})"))  # yapf: disable
    return ("nodes", "call, 4096 tokens", "predicted µs", "bound by", "rail µs", "NVLink µs", "SMs µs", "fixed µs",
            "SMs", "best published µs"), rows


SHARING = replace(LINKS, shares_rows=True)
FORMS = ((DISPATCH, FP8, LINKS, "a row for each rank"), (DISPATCH, FP8, SHARING, "a row for each node"),
         (COMBINE, BF16, LINKS, "a sum for each rank"))


def low_latency_table() -> Table:
    rows = []
    for num_nodes in NODES:
        cells = [f"{num_nodes} x 8"]
        for operation, kind, links, _ in FORMS:
            one = model.predict_low_latency(DECODED, Nodes(num_nodes, 8), links, operation, kind)
            cells += [f"**{one.time_us:.0f}**", f"{one.phases[0].num_bytes / 1e6:.2f}", one.bottleneck.name]
        cells += [LOW_LATENCY[source].get(num_nodes, NOTHING) for source in LOW_LATENCY]
        rows.append(tuple(cells))
    header = ["nodes"]
    for operation, kind, _, form in FORMS:
        header += [f"{name_of(operation, kind)}, {form}: predicted µs", "rail MB", "bound by"]
    return (*header, *(f"{source}, dispatch / combine µs" for source in LOW_LATENCY)), rows


def low_latency_scaling() -> dict[str, Any]:
    """Both forms of a dispatch beside each other."""
    report = model.scaling(model.LOW_LATENCY, DECODED, LINKS)
    rows = {(links.shares_rows, operation, kind): form for operation, kind, links, form in FORMS}
    found = []
    for links in (LINKS, SHARING):
        for row in model.scaling(model.LOW_LATENCY, DECODED, links)["rows"]:
            form = rows.get((links.shares_rows, row["operation"], row["kind"]))
            found += [{**row, "form": form}] if form else []
    return {**report, "rows": found}


def render() -> str:
    lines = ["### Bytes out of one rank, 4096 tokens, hidden 7168, top-8 of 256 experts, uniform", ""]
    lines += to_markdown(byte_table())
    for kind in RECORDS:
        name, report = fitted(kind)
        machine = f"{report['num_ranks']} x {report['machine']['gpu']}"
        worst = max(abs(one.error) for one in model_fit.compare(report))
        lines += [
            f"### Inside a node, {kind}: {machine}, {report['date'][:10]}", "",
            f"[{name}](../../benchmarks/results/{name}), queued. Largest error: {100 * worst:.1f} %.", ""
        ]
        lines += to_markdown(measured_table(report))
    lines += ["### What others have published, beside the bound of both terms", ""]
    lines += to_markdown(published_table())
    lines += [
        f"### Predictions for H100 with {time_of(8 * NIC_GB_PER_S)} Gb/s a GPU: high throughput", "",
        "**Nothing of this column of predictions was measured.** NVSHMEM with IBGDA, counts known.", ""
    ]
    lines += to_markdown(prediction_table())
    lines += ["### The same for low latency, 128 tokens, without a hook", ""]
    lines += to_markdown(low_latency_table())
    lines += [
        "### From 2 to 512 ranks", "",
        *(f"![{mode}: predicted time of a call over ranks](../../{path.relative_to(ROOT).as_posix()})\n"
          for mode, path in PICTURES.items())
    ]
    return "\n".join(lines)


def wanted_files() -> dict[Path, str]:
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the lines '{BEGIN}' and '{END}' in {PAGE}")
    reports = {
        model.HIGH_THROUGHPUT: model.scaling(model.HIGH_THROUGHPUT, TOKENS, LINKS),
        model.LOW_LATENCY: low_latency_scaling()
    }
    scalings = {SCALING[mode]: json.dumps(report, indent=2) + "\n" for mode, report in reports.items()}
    return {PAGE: f"{before}{BEGIN}\n\n{render()}\n{END}{after}", **scalings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    if args.fit:
        for kind in RECORDS:
            name, report = newest(kind)
            print(f"{kind}: {name}",
                  *(f"  {operation}: {cost}" for operation, cost in model_fit.measure(report).items()),
                  sep="\n")
        return 0
    return bring_up_to_date(wanted_files(), ROOT, "tools/render_model.py", only_checks=args.check)


if __name__ == "__main__":
    sys.exit(main())
