#!/usr/bin/env python3
"""How fast an engine carries chunks from one rank to another, beside what carries the same ones without it.

    python benchmarks/rail_rate.py [--chunk-kib 14,64,256,1024] [--save FOLDER]
    python benchmarks/rail_rate.py --program build/.../rail_process_cuda                      between kernels on GPUs
    python benchmarks/rail_rate.py --program build/.../rail_process_nvshmem --warps 1,16      over NVSHMEM

Two processes on this machine. Both ways move equal chunks between equal slots of the two windows, in turns, in the same
run. `host`: the plain way is a blocking send and a blocking recv over loopback and nothing else; the engine adds a
ring, a thread on each side, a header and a flag for each chunk, and a kernel on each side that waits for flags.
`nvshmem`: the plain way is a put of each chunk and one quiet at the end; the engine adds the flags, and waits until a
slot is free.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from rail_group import RailGroup, build_process  # noqa: E402 - needs the path above

from deep_ep.bench.results import find_commit  # noqa: E402

WINDOW_BYTES = 4 << 20  # of a stream, as a Buffer has it at least
FEWEST_SLOTS = 16
SMALLEST_STREAM_CHUNKS = 64


def slots_of(chunk_bytes: int, num_warps: int) -> int:
    """A multiple of the warps: each has slots of its own then."""
    wanted = max(FEWEST_SLOTS, WINDOW_BYTES // chunk_bytes, 4 * num_warps)
    return -(-wanted // num_warps) * num_warps


def measure(group: RailGroup, chunk_bytes: int, num_warps: int, stream_bytes: int, repeats: int) -> dict[str, Any]:
    """Bytes per second of each way, by turns; the receiver's clock runs from the start of both to its last chunk."""
    num_chunks = max(SMALLEST_STREAM_CHUNKS, stream_bytes // chunk_bytes)
    num_slots = slots_of(chunk_bytes, num_warps)
    shape = f"{num_chunks} {num_slots} {chunk_bytes} {num_warps}"
    rates: dict[str, list[float]] = {"rate": [], "plain": []}
    for _ in range(repeats + 1):
        for way, found in rates.items():
            seconds = max(rank["seconds"] for rank in group.run(f"{way} {shape}"))
            found.append(num_chunks * chunk_bytes / seconds / 1e9)
    engine, plain = rates["rate"][1:], rates["plain"][1:]  # the first of each warms up
    return {
        "chunk_bytes": chunk_bytes,
        "num_warps": num_warps,
        "num_chunks": num_chunks,
        "num_slots": num_slots,
        "engine_gb_per_s": engine,
        "plain_gb_per_s": plain,
        "engine_median": statistics.median(engine),
        "plain_median": statistics.median(plain),
        "ratio_of_medians": statistics.median(engine) / statistics.median(plain),
        "ratio_of_best": max(engine) / max(plain),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'chunk':>10} {'warps':>5} {'engine':>12} {'plain':>14} {'ratio':>7} {'of best':>8}")
    for row in rows:
        print(f"{row['chunk_bytes'] / 1024:>6.0f} KiB {row['num_warps']:>5} {row['engine_median']:>7.2f} GB/s "
              f"{row['plain_median']:>9.2f} GB/s "
              f"{row['ratio_of_medians']:>7.2f} {row['ratio_of_best']:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk-kib", default="14,64,256,1024", help="sizes of a chunk, separated by commas")
    parser.add_argument("--warps", default="1", help="warps that send, each a stream of its own, separated by commas")
    parser.add_argument("--stream-mib", type=int, default=512, help="how much a stream carries")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--program",
                        type=Path,
                        help="rail_process, rail_process_cuda or rail_process_nvshmem; built when left out")
    parser.add_argument("--save", type=Path, help="a folder for the JSON")
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    program = options.program or build_process()
    sizes = [int(size) * 1024 for size in options.chunk_kib.split(",")]
    warps = [int(count) for count in options.warps.split(",")]
    shapes = [(size, count) for count in warps for size in sizes]
    window_bytes = 4 * max(slots_of(*shape) * shape[0] for shape in shapes) + (1 << 20)
    with RailGroup(program, 2, ["--interface", "lo", "--window-bytes", str(window_bytes)]) as group:
        group.connect()
        rows = [measure(group, *shape, options.stream_mib << 20, options.repeats) for shape in shapes]
        group.quit()
    show(rows)
    if options.save:
        now = dt.datetime.now(tz=dt.timezone.utc)
        record = {
            "benchmark": "rail_rate",
            "date": now.isoformat(timespec="seconds"),
            "commit": options.commit or find_commit(),
            "command": " ".join(sys.argv),
            "program": program.name,
            "machine": platform.platform(),
            "num_cpus": os.cpu_count(),
            "rows": rows,
        }
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{now:%Y-%m-%dT%H%M}_rail_rate_{program.name}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
