"""Stores what a benchmark has measured as the cost model of this kind of machine.

    python -m deep_ep bench intranode --tokens 128,512,2048,8192 --num-sms 4,8,16,24 --save out
    python -m deep_ep calibrate out/*_intranode_*.json

From then on, calls without a `config` use no more SMs than they need, up to `Buffer.num_sms`. Calibrate again with
DEEP_EP_LEND_BYTES=0 for Buffers that lend nothing. DEEP_EP_COST_MODEL names another file, or "off".
"""

import json
import sys
from pathlib import Path
from typing import Any, Optional

from deep_ep import _cost_model
from deep_ep._cost_model import CostModel
from deep_ep_cpp import InvalidArgument


def calibrate(report: dict[str, Any], to: Optional[Path]) -> tuple[Path, str, CostModel]:
    """Fits and stores; returns the file, the way of receiving that was measured, and the model."""
    if report.get("benchmark") != "intranode":
        raise InvalidArgument(f"expected figures of the intranode benchmark, got {report.get('benchmark')!r}")
    num_ranks, rows = report["num_ranks"], report["rows"]
    link = 0.0 if report["ranks_as_threads"] else max((row["ceiling_gb_per_s"] for row in rows), default=0.0)
    costs = {
        operation: _cost_model.fit(_cost_model.samples_of(rows, operation, num_ranks), link)
        for operation in _cost_model.OPERATIONS
    }
    way = "slots" if report.get("environment", {}).get("DEEP_EP_LEND_BYTES", "0") == "0" else "lent"
    path = to or _cost_model.default_path(report["machine"].get("gpu", ""), num_ranks)
    if path is None:
        raise InvalidArgument("this user has no home folder to store it in: set XDG_CACHE_HOME, or give --to")
    model = CostModel(costs)
    source = {key: report[key] for key in ("date", "commit", "command", "machine", "num_ranks", "ranks_as_threads")}
    _cost_model.store(path, way, model, source, replaces_damaged=to is None)
    return path, way, model


def run(reports: list[Path], to: Optional[Path]) -> int:
    """The exit status."""
    for report in reports:
        try:
            path, way, model = calibrate(json.loads(report.read_text(encoding="utf-8")), to)
        except (InvalidArgument, KeyError, json.JSONDecodeError) as error:
            print(f"{report}: {error}", file=sys.stderr)
            return 1
        print(f"{report} -> {path} ({way})")
        for operation, cost in model.costs.items():
            print(f"  {operation}: {cost.latency_us:.1f} us + max(remote bytes / {cost.link_gb_per_s:.0f} GB/s, "
                  f"bytes / (SMs * {cost.sm_gb_per_s:.1f} GB/s))")
    return 0


if __name__ == "__main__":
    from deep_ep.__main__ import main
    sys.exit(main(["calibrate", *sys.argv[1:]]))
