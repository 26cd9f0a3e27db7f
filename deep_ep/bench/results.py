"""What a benchmark reports: rows of figures, and the machine and command they belong to."""
from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One measured operation. Times in microseconds: of many repeats, the slowest rank of each, then the median."""

    operation: str
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    routing: str
    num_sms: int
    chained_us: float
    fresh_us: float
    chained_p95_us: float
    fresh_p95_us: float
    remote_bytes: int  # of the busiest rank and direction, one copy per distinct remote rank; 0: nothing crosses a link
    ceiling_gb_per_s: float  # of the push kernel with the same SM budget; 0: not measured

    @property
    def remote_gb_per_s(self) -> float:
        return self.remote_bytes / self.chained_us / 1e3 if self.chained_us > 0 else 0.0

    @property
    def share_of_ceiling(self) -> float:
        return self.remote_gb_per_s / self.ceiling_gb_per_s if self.ceiling_gb_per_s > 0 else 0.0


@dataclass
class Report:
    """A run of one benchmark."""

    benchmark: str
    command: str
    device: str
    num_ranks: int
    num_devices: int
    is_threaded: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """What a reader has to know before comparing these figures with others."""
        found = []
        if self.device == "cpu":
            found.append("Measured on the CPU executor: these figures say nothing about the speed of a GPU.")
        elif self.is_threaded:
            found.append(f"{self.num_ranks} ranks run at the same time on one GPU, each on its own SMs: no link is "
                         "crossed. These are figures of the protocol and of the SMs, not of a wire.")
        elif self.num_devices < self.num_ranks:
            found.append(f"{self.num_ranks} ranks share {self.num_devices} GPU(s): no link is crossed, and the ranks "
                         "take turns. These figures say nothing about a machine with one GPU per rank.")
        return found

    def to_json(self, commit: str) -> dict[str, Any]:
        rows = [{
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in asdict(row).items()
        } | {
            "remote_gb_per_s": round(row.remote_gb_per_s, 2),
            "share_of_ceiling": round(row.share_of_ceiling, 4)
        } for row in self.rows]
        return {
            "format": FORMAT_VERSION,
            "benchmark": self.benchmark,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit or find_commit(),
            "command": self.command,
            "machine": describe_machine(self.device),
            "num_ranks": self.num_ranks,
            "num_devices": self.num_devices,
            "ranks_as_threads": self.is_threaded,
            "notices": self.notices,
            "rows": rows,
        }


def describe_machine(device: str) -> dict[str, str]:
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cpu": platform.machine()}
    if device == "cuda":
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown",
        }
    return machine


def find_commit() -> str:
    """The commit of the package in use, with '+changes' when the checkout differs from it; 'unknown' elsewhere."""
    root = str(Path(__file__).resolve().parents[2])
    commit = _first_line(["git", "-C", root, "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    has_changes = _first_line(["git", "-C", root, "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if has_changes else "")


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = found.stdout.splitlines() if found.returncode == 0 else []
    return lines[0].strip() if lines else ""


def save(report: Report, folder: Path, commit: str) -> Path:
    """Writes the report as JSON under a name that says when and where, and returns its path."""
    content = report.to_json(commit)
    gpu = re.sub(r"[^a-z0-9]+", "-", content["machine"].get("gpu", "cpu").lower()).strip("-")
    date = content["date"][:16].replace(":", "")
    ranks = f"{report.num_ranks}threads" if report.is_threaded else f"{report.num_ranks}"
    path = folder / f"{date}_{report.benchmark}_{gpu}_x{ranks}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


COLUMNS = ("operation", "tokens", "SMs", "chained us", "fresh us", "p95 us", "remote MB", "GB/s", "ceiling", "share")


def format_row(row: Row) -> tuple[str, ...]:
    has_bytes = row.remote_bytes > 0
    return (
        row.operation if row.routing == "uniform" else f"{row.operation} ({row.routing})",
        str(row.num_tokens),
        str(row.num_sms) if row.num_sms > 0 else "-",
        f"{row.chained_us:.1f}",
        f"{row.fresh_us:.1f}",
        f"{row.chained_p95_us:.1f}",
        f"{row.remote_bytes / 1e6:.3g}" if has_bytes else "-",
        f"{row.remote_gb_per_s:.1f}" if has_bytes else "-",
        f"{row.ceiling_gb_per_s:.1f}" if row.ceiling_gb_per_s > 0 else "-",
        f"{row.share_of_ceiling:.2f}" if row.share_of_ceiling > 0 else "-",
    )


def format_table(rows: list[Row]) -> str:
    cells = [COLUMNS, *(format_row(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(
        cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths)))
                     for line in cells)
