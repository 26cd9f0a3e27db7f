"""Random programs of calls against the reference, for as long as asked. What fails is made small and printed as a test.

    python tests/fuzz.py --seconds 600                                        the executor, 4 ranks of one node
    python tests/fuzz.py --seconds 60 --device cuda --num-processes 2
    python tests/fuzz.py --num-processes 4 --ranks-per-node 2                 virtual nodes
    python tests/fuzz.py --seed 1234 --cases 1                                the case with that number again

The seed is the number of the first case; the case with number n is the same on every machine (fuzz_cases.make_case).
"""

import argparse
import contextlib
import datetime as dt
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from fuzz_cases import Case, Topology, make_case, play, test_of
from host_failure_cases import replaced
from pressure import REPORT_EVERY_S
from shrink import shrink
from utils import CaseFailed, Pool, Worker

from deep_ep import Buffer
from deep_ep._env import device_choice
from deep_ep.bench import results

CASE_DEADLINE_S = 60.0
LINES_OF_FAILURE = 12  # the end of a traceback
MOST_FINDINGS = 5  # then a campaign ends


@dataclass
class Finding:
    seed: int
    failure: str
    smallest: Optional[Case]  # None: alone, on fresh processes, the case does not fail
    attempts: int
    first_seed: int  # of the cases that these processes had played

    def __str__(self) -> str:
        if self.smallest is None:
            count = self.seed - self.first_seed + 1
            text = f"alone it does not fail; the cases before it: --seed {self.first_seed} --cases {count}"
        else:
            found = f"made small in {self.attempts} attempts, for FOUND in tests/test_fuzz.py:"
            text = f"{found}\n{test_of(self.smallest, self.seed)}"
        failure = "\n".join(self.failure.splitlines()[-LINES_OF_FAILURE:])
        return f"case {self.seed} failed:\n{failure}\n{text}"


@dataclass
class Report:
    num_cases: int = 0
    num_calls: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        return (f"{self.num_cases} cases with {self.num_calls} calls in {self.num_steps} steps, {self.seconds:.0f} s: "
                f"{len(self.findings)} failed")


class Campaign:
    """Plays cases on a pool of its own."""

    def __init__(self, topology: Topology, environment: Optional[dict[str, str]] = None, plant: str = "") -> None:
        nodes = {} if topology.is_one_node else {
            "DEEP_EP_RANKS_PER_NODE": str(topology.ranks_per_node),
            "DEEP_EP_RAIL_INTERFACE": "lo"
        }
        self._topology, self._plant = topology, plant
        self._pool = Pool(topology.num_processes, {**nodes, **(environment or {})})
        self._unit = 1 if topology.is_one_node else topology.ranks_per_node

    def failure_of(self, case: Case) -> tuple[str, int]:
        """How it fails, or "", and the number of steps."""
        try:
            found = self._pool.run(play_planted, case.num_ranks, case, self._plant, deadline_s=CASE_DEADLINE_S)
        except CaseFailed as error:
            return str(error), 0
        return "", found[0]

    def run(self,
            seed: int,
            seconds: float,
            num_cases: Optional[int] = None,
            least_cases: int = 0,
            shrink_seconds: float = 120.0) -> Report:
        report, started, first_seed = Report(), time.monotonic(), seed
        next_word = started + REPORT_EVERY_S

        def is_over() -> bool:
            if num_cases is not None or report.num_cases < least_cases:
                return report.num_cases == num_cases
            return time.monotonic() > started + seconds

        while len(report.findings) < MOST_FINDINGS and not is_over():
            number = seed + report.num_cases
            case = make_case(number, self._topology)
            failure, num_steps = self.failure_of(case)
            report.num_cases += 1
            report.num_calls += len(case.calls)
            report.num_steps += num_steps
            if time.monotonic() > next_word:
                print(f"{report.num_cases} cases after {time.monotonic() - started:.0f} s", flush=True)
                next_word += REPORT_EVERY_S
            if failure:
                print(f"case {number} failed", flush=True)
                report.findings.append(self.finding(number, case, failure, first_seed, shrink_seconds))
                first_seed = number + 1
        report.seconds = time.monotonic() - started
        return report

    def finding(self, seed: int, case: Case, failure: str, first_seed: int, seconds: float) -> Finding:
        """The processes are fresh ones now, and after each attempt that fails."""
        kinds = kinds_of(failure)

        def fails(candidate: Case) -> bool:
            return bool(kinds & kinds_of(self.failure_of(candidate)[0]))

        if not fails(case):
            return Finding(seed, failure, None, 1, first_seed)
        smallest, attempts = shrink(case, fails, self._unit, seconds=seconds)
        return Finding(seed, failure, smallest, attempts, first_seed)

    def close(self) -> None:
        self._pool.close()


def kinds_of(failure: str) -> set[str]:
    """What went wrong, without numbers and places: the same for a case and a smaller one with the same fault."""
    if failure.startswith("no result"):
        return {"no result"}
    parts = re.split(r"^rank \d+: ", failure, flags=re.MULTILINE)
    last_lines = [part.strip().splitlines()[-1] for part in parts if part.strip()]
    return {re.sub(r"\d+", "#", ":".join(line.split(":")[:2])) for line in last_lines}


# Planted faults: what shows that all this finds something


def play_planted(worker: Worker, case: Case, plant: str) -> int:
    with PLANTS[plant]() if plant else contextlib.nullcontext():
        return play(worker, case)


@contextlib.contextmanager
def stale_row() -> Iterator[None]:
    """A dispatch with a handle that leaves the last of several rows as the first."""
    dispatch = Buffer.dispatch

    def planted(self: Any, x: Any, handle: Any = None, *args: Any, **options: Any) -> Any:
        result = dispatch(self, x, handle, *args, **options)
        rows = result[0][0] if isinstance(result[0], tuple) else result[0]
        if handle is not None and rows.shape[0] > 1:
            rows[-1] = rows[0]
        return result

    with replaced(Buffer, "dispatch", planted):
        yield


@contextlib.contextmanager
def lost_weight() -> Iterator[None]:
    """A low-latency combine with a hook, for rows of more than two entries, that takes the last weight for nothing."""
    combine = Buffer.low_latency_combine

    def planted(self: Any, x: Any, topk_idx: Any, topk_weights: Any, *args: Any, **options: Any) -> Any:
        if options.get("return_recv_hook") and topk_idx.shape[1] > 2:
            topk_weights = topk_weights.clone()
            topk_weights[:, -1] = 0
        return combine(self, x, topk_idx, topk_weights, *args, **options)

    with replaced(Buffer, "low_latency_combine", planted):
        yield


PLANTS = {"stale_row": stale_row, "lost_weight": lost_weight}

# As a script


def record_of(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """As those of tools/gpu_check.sh, for benchmarks/results/checks."""
    device = args.device or device_choice()[0]
    command = " ".join(sys.argv[1:]).replace(f" --save {args.save}", "")
    return {
        "date":
        dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit":
        os.environ.get("GPU_CHECK_COMMIT") or results.find_commit(),
        "command":
        f"python tests/fuzz.py {command}",
        "machine":
        dict(results.describe_machine(device)) | {
            "num_gpus": torch.cuda.device_count() if device == "cuda" else 0
        },
        "num_ranks":
        args.num_processes,
        "steps": [{
            "step": "fuzz",
            "seconds": round(report.seconds),
            "result": "fail" if report.findings else "pass",
            "verdicts": [str(report), *map(str, report.findings)]
        }]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Random programs of calls, checked against the reference")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="so many instead of for so long")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what the library would take")
    parser.add_argument("--num-processes", type=int, default=4)
    parser.add_argument("--ranks-per-node", type=int, default=0, help="of virtual nodes; 0: one node")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--shrink-seconds", type=float, default=120.0)
    parser.add_argument("--plant", choices=sorted(PLANTS), default="", help="break the library, to see it found")
    parser.add_argument("--save", type=Path, metavar="FILE", help="what was found, as JSON")
    args = parser.parse_args()
    if args.ranks_per_node and args.num_processes % args.ranks_per_node:
        parser.error("--num-processes must be a multiple of --ranks-per-node")
    if args.device:
        os.environ["DEEP_EP_DEVICE"] = args.device
    campaign = Campaign(Topology(args.num_processes, args.ranks_per_node), plant=args.plant)
    report = campaign.run(args.seed, args.seconds, args.cases, args.shrink_seconds)
    campaign.close()
    for finding in report.findings:
        print(finding, flush=True)
    print(report)
    if args.save:
        args.save.write_text(json.dumps(record_of(args, report), indent=2) + "\n")
    sys.exit(bool(report.findings))


if __name__ == "__main__":
    main()
