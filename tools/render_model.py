#!/usr/bin/env python3
"""Writes what `python -m deep_ep model` says into docs/performance/model.md, between its two markers, beside what was
measured inside a node and what others have published of several; and the scaling that is drawn beside it.

tools/render_model.py            rewrite both; then `tools/render_benchmarks.py --plots` draws the picture anew
tools/render_model.py --check    fail when one of them is not what the model says
tools/render_model.py --fit      print the constants of deep_ep/model.py, fitted to the newest benchmark (then name it
                                 in RECORDS)
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from figures import NOTHING, Table, bring_up_to_date, time_of, to_markdown  # noqa: E402
from published import LOW_LATENCY, PUBLISHED, Published  # noqa: E402

from deep_ep import model  # noqa: E402
from deep_ep.model import BF16, COMBINE, DISPATCH, FP8, Nodes, Shape  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance" / "model.md"
SCALING = RESULTS / "model" / "scaling.json"
PICTURE = SCALING.with_suffix(".png")
BEGIN = "<!-- begin: made by tools/render_model.py -->"
END = "<!-- end -->"
NIC_GB_PER_S = 50.0  # 400 Gb/s for each GPU
LINKS = model.Links(NIC_GB_PER_S)
TOKENS, DECODED = Shape(4096, 7168, 8, 256), Shape(128, 7168, 8, 256)
# What the constants of deep_ep/model.py are fitted to: runs as callers get them. `--fit` fits newer ones.
RECORDS = {
    "intranode": "2026-11-28T0313_intranode_nvidia-h100-80gb-hbm3_x2.json",
    "low-latency": "2026-11-28T0313_low-latency_nvidia-h100-80gb-hbm3_x2.json",
}
# Of these sizes there are figures of others with the same shape.
NODES = (2, 4, 8)
SHOWN = (2, 4)


def per_cent(error: float) -> str:
    return f"{100 * error:+.0f} %"


def name_of(operation: str, kind: str) -> str:
    return f"{kind.upper()} {operation}"


def newest_as_called(benchmark: str) -> tuple[str, dict[str, Any]]:
    """The newest run on a GPU for each rank with no variable of the package set, by its date."""
    found = []
    for path in sorted(RESULTS.glob(f"*_{benchmark}_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        set_by_hand = report.get("environment", {}).get("DEEP_EP_LEND_BYTES", "automatic") != "automatic"
        is_real = report["num_devices"] == report["num_ranks"] and "gpu" in report["machine"]
        if is_real and not set_by_hand and "environment" in report and model.compare(report):
            found.append((report["date"], path.name, report))
    _, name, report = max(found, key=lambda one: one[0])
    return name, report


def fitted(benchmark: str) -> tuple[str, dict[str, Any]]:
    """The record that the constants stand on."""
    report: dict[str, Any] = json.loads((RESULTS / RECORDS[benchmark]).read_text(encoding="utf-8"))
    return RECORDS[benchmark], report


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
         f"{one.model_us:.1f}", per_cent(one.error)) for one in model.compare(report)
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


def low_latency_table() -> Table:
    rows = []
    for num_nodes in NODES:
        nodes = Nodes(num_nodes, 8)
        cells = [f"{num_nodes} x 8"]
        for operation, kind in ((DISPATCH, FP8), (COMBINE, BF16)):
            one = model.predict_low_latency(DECODED, nodes, LINKS, operation, kind)
            cells += [f"**{one.time_us:.0f}**", one.bottleneck.name]
        cells += [LOW_LATENCY[source].get(num_nodes, NOTHING) for source in LOW_LATENCY]
        rows.append(tuple(cells))
    return ("nodes", "FP8 dispatch, predicted µs", "bound by", "BF16 combine, predicted µs", "bound by",
            *(f"{source}, dispatch / combine µs" for source in LOW_LATENCY)), rows


def render() -> str:
    lines = ["### Bytes out of one rank, 4096 tokens, hidden 7168, top-8 of 256 experts, uniform", ""]
    lines += to_markdown(byte_table())
    for benchmark in RECORDS:
        name, report = fitted(benchmark)
        machine = f"{report['num_ranks']} x {report['machine']['gpu']}"
        worst = max(abs(one.error) for one in model.compare(report))
        lines += [
            f"### Inside a node, {benchmark}: {machine}, {report['date'][:10]}", "",
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
    lines += ["### The same for low latency, 128 tokens, a copy for each rank", ""]
    lines += to_markdown(low_latency_table())
    lines += [
        "### From 2 to 512 ranks", "",
        f"![predicted time of a call over ranks](../../{PICTURE.relative_to(ROOT).as_posix()})", ""
    ]
    return "\n".join(lines)


def wanted_files() -> dict[Path, str]:
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the lines '{BEGIN}' and '{END}' in {PAGE}")
    scaling = json.dumps(model.scaling(model.HIGH_THROUGHPUT, TOKENS, LINKS), indent=2) + "\n"
    return {PAGE: f"{before}{BEGIN}\n\n{render()}\n{END}{after}", SCALING: scaling}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    if args.fit:
        name, report = newest_as_called("intranode")
        print(name, *(f"{operation}: {cost}" for operation, cost in model.measure(report).items()), sep="\n")
        return 0
    return bring_up_to_date(wanted_files(), ROOT, "tools/render_model.py", only_checks=args.check)


if __name__ == "__main__":
    sys.exit(main())
