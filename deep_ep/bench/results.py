"""What a benchmark reports: rows of figures, and the machine and command they belong to."""
from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 2


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
    queued_us: float = 0.0  # the device alone: the host had queued the calls before; 0: not measured

    @property
    def remote_gb_per_s(self) -> float:
        """By the device's own time where that was measured."""
        time_us = self.queued_us or self.chained_us
        return self.remote_bytes / time_us / 1e3 if time_us > 0 else 0.0

    @property
    def floor_us(self) -> float:
        """What the remote bytes take at the ceiling."""
        return self.remote_bytes / self.ceiling_gb_per_s / 1e3 if self.ceiling_gb_per_s > 0 else 0.0

    @property
    def share_of_ceiling(self) -> float:
        return self.remote_gb_per_s / self.ceiling_gb_per_s if self.ceiling_gb_per_s > 0 else 0.0


@dataclass(frozen=True)
class HostCost:
    """Microseconds of the thread that makes a call, without its wait for counts; median, slowest rank."""

    operation: str
    cpu_us: float
    wall_us: float
    waited_us: float  # wall time, left out of the other two


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call, as the profiler saw it: median of the calls, slowest rank."""

    name: str
    num_blocks: int  # one per SM that it holds, where there are fewer than SMs
    us: float


@dataclass(frozen=True)
class Profile:
    """The kernels of one operation, in their order."""

    operation: str
    num_tokens: int
    routing: str
    num_sms: int
    span_us: float  # from the first kernel's start to the last one's end
    kernels: list[Kernel]


@dataclass
class Findings:
    """What a rank has measured so far."""

    rows: list[Row] = field(default_factory=list)
    host: list[HostCost] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    heap: str = ""  # where the memory lies that ranks share: "device" or "host"
    failure: str = ""  # what ended the run early
    path: Path | None = None  # where to keep them

    def notice(self, sentence: str) -> None:
        """Says something once."""
        if sentence not in self.notices:
            self.notices.append(sentence)

    def keep(self) -> None:
        """Leaves everything in a file, whole at any time: the run may be ended from outside."""
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(asdict(replace(self, path=None))), encoding="utf-8")
            part.replace(self.path)

    @staticmethod
    def from_json(content: dict[str, Any]) -> Findings:
        profiles = [
            Profile(**{
                **profile, "kernels": [Kernel(**kernel) for kernel in profile["kernels"]]
            }) for profile in content["profiles"]
        ]
        return Findings(rows=[Row(**row) for row in content["rows"]],
                        host=[HostCost(**cost) for cost in content["host"]],
                        profiles=profiles,
                        notices=content["notices"],
                        heap=content["heap"],
                        failure=content["failure"])


@dataclass
class Report:
    """A run of one benchmark."""

    benchmark: str
    command: str
    device: str
    num_ranks: int
    num_devices: int
    is_threaded: bool = False
    environment: dict[str, str] = field(default_factory=dict)  # variables that may matter
    findings: Findings = field(default_factory=Findings)

    @property
    def notices(self) -> list[str]:
        """What a reader has to know before comparing these figures with others."""
        found = []
        if self.findings.failure:
            found.append(f"The run ended early ({self.findings.failure}): figures are missing.")
        if self.device == "cpu":
            found.append("Measured on the CPU executor: these figures say nothing about the speed of a GPU.")
        elif self.is_threaded:
            found.append(f"{self.num_ranks} ranks run at the same time on one GPU, each on its own SMs: no link is "
                         "crossed. These are figures of the protocol and of the SMs, not of a wire.")
        elif self.num_devices < self.num_ranks:
            found.append(f"{self.num_ranks} ranks share {self.num_devices} GPU(s): no link is crossed, and the ranks "
                         "take turns. These figures say nothing about a machine with one GPU per rank.")
        return found + self.findings.notices

    def to_json(self, commit: str) -> dict[str, Any]:
        rows = [
            rounded(asdict(row)) | {
                "remote_gb_per_s": round(row.remote_gb_per_s, 2),
                "share_of_ceiling": round(row.share_of_ceiling, 4)
            } for row in self.findings.rows
        ]
        return {
            "format": FORMAT_VERSION,
            "benchmark": self.benchmark,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit or find_commit(),
            "command": self.command,
            "environment": self.environment,
            "machine": describe_machine(self.device),
            "num_ranks": self.num_ranks,
            "num_devices": self.num_devices,
            "ranks_as_threads": self.is_threaded,
            "heap": self.findings.heap,
            "notices": self.notices,
            "rows": rows,
            "host": rounded([asdict(cost) for cost in self.findings.host]),
            "profiles": rounded([asdict(profile) for profile in self.findings.profiles]),
        }


def rounded(value: Any) -> Any:
    """Two digits after the point are more than a time is good for."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 2) if isinstance(value, float) else value


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


def minute(date: str) -> str:
    """Of an ISO date, as file names have it."""
    return date[:16].replace(":", "")


def name_of(machine: dict[str, Any]) -> str:
    """Its GPU, or "cpu", as file names have it."""
    return re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "cpu").lower()).strip("-")


def save(report: Report, folder: Path, commit: str) -> Path:
    """Writes the report as JSON under a name that says when and where, and returns its path."""
    content = report.to_json(commit)
    ranks = f"{report.num_ranks}threads" if report.is_threaded else f"{report.num_ranks}"
    path = folder / f"{minute(content['date'])}_{report.benchmark}_{name_of(content['machine'])}_x{ranks}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
