#!/usr/bin/env python3
"""Runs every mutant and fails when one goes unnoticed that should not.

    run_mutants.py DRIVER MUTANTS_JSON [--jobs N] [--only ID ...] [--all-cases]

The driver first runs the kernels as they are, which must be clean, and says which case reaches which mutant's place.
Then each mutant runs the cases that reach it, quickest first, until one notices. Mutants that no test can notice are
listed, with the reason, in equivalent.json beside this file ("open": a scenario is missing); a listed one that is
noticed after all fails too, and so does an entry that matches nothing, so that the list stays true.
Listed ones run a few of their cases, since most of the time would go into what nothing shows; --all-cases runs all.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

TIMEOUT_S = 300
CASES_OF_A_LISTED_ONE = 12
RACE = 66
# The first race is enough, and nobody reads its text.
TSAN_OPTIONS = f'halt_on_error=1:exitcode={RACE}:symbolize=0:atexit_sleep_ms=0'
EQUIVALENT = pathlib.Path(__file__).with_name('equivalent.json')

Mutant = dict[str, Any]


def run(driver: str, *arguments: str) -> 'subprocess.CompletedProcess[str]':
    # ThreadSanitizer's shadow needs addresses that are not too random.
    under = ['setarch', platform.machine(), '-R']
    return subprocess.run([*under, driver, *arguments],
                          capture_output=True,
                          text=True,
                          timeout=TIMEOUT_S,
                          check=False,
                          env={
                              **os.environ, 'TSAN_OPTIONS': TSAN_OPTIONS
                          })


def cases_by_mutant(listing: str) -> dict[int, list[str]]:
    """From the driver's lines `case NAME MILLISECONDS ID ...`: the cases that reach each mutant, quickest first."""
    cases = [line.split()[1:] for line in listing.splitlines() if line.startswith('case ')]
    reaching: dict[int, list[str]] = {}
    for name, _, *numbers in sorted(cases, key=lambda case: int(case[1])):
        for number in numbers:
            reaching.setdefault(int(number), []).append(name)
    return reaching


def outcome(driver: str, mutant: Mutant, cases: list[str]) -> tuple[bool, str]:
    """Was it noticed, and how."""
    if not cases:
        return False, 'no case reaches it'
    try:
        done = run(driver, str(mutant['id']), *cases)
    except subprocess.TimeoutExpired:
        return True, 'ran into the time limit'
    if done.returncode == RACE:
        return True, 'race'
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode != 0, f'status {done.returncode} {lines[0][:140] if lines else ""}'


def matches(entry: dict[str, str], mutant: Mutant) -> bool:
    return all(mutant[key] == entry[key]
               for key in ('file', 'function', 'kind')) and entry.get('source', '') in mutant['source']


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('driver')
    parser.add_argument('mutants')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1)
    parser.add_argument('--only', type=int, nargs='*', help='run these alone, and say more')
    parser.add_argument('--all-cases', action='store_true', help='listed mutants run all cases that reach them too')
    arguments = parser.parse_args()
    mutants: list[Mutant] = json.loads(pathlib.Path(arguments.mutants).read_text())
    equivalent = json.loads(EQUIVALENT.read_text())
    start = time.monotonic()

    as_written = run(arguments.driver)
    if as_written.returncode != 0:
        print(f'the kernels fail as they are (status {as_written.returncode}):\n{as_written.stdout}{as_written.stderr}')
        return 1
    reaching = cases_by_mutant(as_written.stdout)
    chosen = [mutant for mutant in mutants if not arguments.only or mutant['id'] in arguments.only]

    def play(mutant: Mutant) -> tuple[bool, str]:
        is_listed = any(matches(entry, mutant) for entry in equivalent) and not arguments.all_cases
        cases = reaching.get(mutant['id'], [])
        return outcome(arguments.driver, mutant, cases[:CASES_OF_A_LISTED_ONE] if is_listed else cases)

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(play, chosen))

    failures = [
        f'equivalent.json: nothing is like {entry}' for entry in equivalent
        if not any(matches(entry, mutant) for mutant in mutants)
    ]
    counts = {'noticed': 0, 'equivalent': 0}
    for mutant, (noticed, how) in zip(chosen, outcomes):
        entry = next((entry for entry in equivalent if matches(entry, mutant)), None)
        where = f"{mutant['id']:4} {mutant['kind']:20} {mutant['file']}:{mutant['line']} {mutant['function']}"
        if noticed == (entry is not None):
            failures.append(f"{'noticed, though listed as equivalent' if noticed else 'UNNOTICED'}: {where}  ({how})")
        else:
            counts['noticed' if noticed else 'equivalent'] += 1
        print(f"{'noticed   ' if noticed else 'equivalent' if entry else 'UNNOTICED '} {where}  {how}")
    print(*failures, sep='\n')
    print(f"mutants: {counts['noticed']} noticed, {counts['equivalent']} equivalent, {len(failures)} failed, "
          f'in {time.monotonic() - start:.0f} s')
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
