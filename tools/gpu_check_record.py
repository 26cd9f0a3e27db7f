#!/usr/bin/env python3
"""Writes what a run of tools/gpu_check.sh found as JSON: machine, commit, command, each step and what it said.

tools/gpu_check_record.py FOLDER --commit C --command LINE --num-ranks N   reads gpu_check.txt, gpu_check.log and
                                      pressure.log there, writes gpu_check_<date>_<gpu>_x<ranks>.json beside them

tools/gpu_check.sh calls this at its end. docs/performance/figures.md shows files that are kept in
benchmarks/results/checks.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^==== (\w+) \(at most \d+ s\) ====$")
# The lines in which test runners, pressure and sanitizers say how it went.
VERDICT = re.compile(r"^(\[doctest\] test cases: .*|=* ?\d+ (passed|failed).*|\d+ rounds of .*|\d+ cases with .*"
                     r"|killed rank .*|.*: clean|.*: exit status \w+.*|=+ (RACECHECK|ERROR) SUMMARY: .*)$")


def verdicts_by_step(log: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    step = ""
    for line in log.splitlines():
        if heading := HEADING.match(line):
            step = heading[1]
        elif VERDICT.match(line):
            found.setdefault(step, []).append(line.strip("= "))
    return found


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the table, each with the verdicts of its step."""
    verdicts = verdicts_by_step((folder / "gpu_check.log").read_text(encoding="utf-8", errors="replace"))
    pressure = folder / "pressure.log"
    if pressure.exists():  # it ran beside the other steps, and has a log of its own
        lines = pressure.read_text(encoding="utf-8", errors="replace")
        verdicts.setdefault("pressure", verdicts_by_step(lines).get("", []))
    steps = []
    for line in (folder / "gpu_check.txt").read_text(encoding="utf-8").splitlines()[1:-1]:
        step, seconds, result = line.split(maxsplit=2)
        steps.append({
            "step": step,
            "seconds": int(seconds) if seconds.isdigit() else None,
            "result": result,
            "verdicts": verdicts.get(step, [])
        })
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("--num-ranks", type=int, required=True)
    parser.add_argument("--date", help="of a run that is over; default: now")
    parser.add_argument("--machine", type=Path, help="JSON that describes the machine of a run that is over")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from deep_ep.bench import results

    date = args.date or datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine: dict[str, Any] = (json.loads(args.machine.read_text(
        encoding="utf-8")) if args.machine else dict(results.describe_machine(args.device)))
    record = {
        "date": date,
        "commit": args.commit,
        "command": args.command,
        "machine": machine | {
            "num_gpus": args.num_gpus
        },
        "num_ranks": args.num_ranks,
        "steps": steps_of(args.folder)
    }
    name = f"gpu_check_{results.minute(date)}_{results.name_of(machine)}_x{args.num_ranks}.json"
    path = args.folder / name
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
