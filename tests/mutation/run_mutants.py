#!/usr/bin/env python3
"""Runs the driver once for every mutant and fails when one goes unnoticed that should not.

    run_mutants.py DRIVER MUTANTS_JSON [--jobs N]

Mutants that no test can notice are listed, with the reason, in equivalent.json beside this file; a listed one that is
noticed after all fails too, so that the list stays true.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

TIMEOUT_S = 120
# The first race is enough, and nobody reads its text.
TSAN_OPTIONS = 'halt_on_error=1:exitcode=66:symbolize=0:atexit_sleep_ms=0'
EQUIVALENT = pathlib.Path(__file__).with_name('equivalent.json')


def is_noticed(driver: str, number: int) -> tuple[bool, str]:
    try:
        done = subprocess.run([driver, str(number)],
                              capture_output=True,
                              text=True,
                              timeout=TIMEOUT_S,
                              check=False,
                              env={
                                  **os.environ, 'TSAN_OPTIONS': TSAN_OPTIONS
                              })
    except subprocess.TimeoutExpired:
        return True, 'ran into the time limit'
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    summary = next((line for line in lines if 'SUMMARY' in line), lines[0] if lines else '')
    return done.returncode != 0, f'exit status {done.returncode}: {summary[:160]}'


def reason_for(mutant: dict[str, object], equivalent: list[dict[str, str]]) -> str:
    """Why this mutant cannot be noticed; empty when it must be."""
    for entry in equivalent:
        if entry['file'] == mutant['file'] and entry['kind'] == mutant['kind'] and entry['source'] in str(
                mutant['source']):
            return entry['why']
    return ''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('driver')
    parser.add_argument('mutants')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    mutants = json.loads(pathlib.Path(arguments.mutants).read_text())
    equivalent = json.loads(EQUIVALENT.read_text())

    noticed, how = is_noticed(arguments.driver, 0)
    if noticed:
        print(f'the kernels fail as they are: {how}')
        return 1
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(lambda mutant: is_noticed(arguments.driver, mutant['id']), mutants))
    failed = 0
    for mutant, (noticed, how) in zip(mutants, outcomes, strict=True):
        reason = reason_for(mutant, equivalent)
        is_wrong = noticed == bool(reason)
        failed += is_wrong
        state = ('noticed' if noticed else 'UNNOTICED') + (' though listed as equivalent' if noticed and reason else '')
        print(f"{'FAIL' if is_wrong else 'ok  '} {mutant['id']:4} {state:10} {mutant['kind']:24} "
              f"{mutant['file']}:{mutant['line']}  {reason or how}")
    print(f'{len(mutants) - failed} passed, {failed} failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
