#!/usr/bin/env python3
"""How fast an engine carries chunks from one rank to another, beside what carries the same ones without it.

    python benchmarks/rail_rate.py [--chunk-kib 14,64,256,1024] [--save FOLDER]
    python benchmarks/rail_rate.py --program build/.../rail_process_cuda                      between kernels on GPUs
    python benchmarks/rail_rate.py --program build/.../rail_process_nvshmem --warps 1,12 --blocks 24      over NVSHMEM

Two processes on this machine. Both ways move equal chunks between equal slots of the two windows, in turns, in the same
run. `host`: the plain way is a blocking send and a blocking recv over loopback and nothing else; the engine adds a
ring, a thread on each side, a header and a flag for each chunk, and a kernel on each side that waits for flags.
`nvshmem`: the plain ways are a put of each chunk by a warp, or by a whole block, and one quiet at the end; the engine
adds the flags, and waits until a slot is free. The ratio is to the faster of the plain ways.
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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from rail_group import RailGroup, build_process  # noqa: E402 - needs the path above

from deep_ep.bench.results import find_commit  # noqa: E402

WINDOW_BYTES = 4 << 20  # of a stream, as a Buffer has it at least
FEWEST_SLOTS = 16
SMALLEST_STREAM_CHUNKS = 64


class Shape(NamedTuple):
    chunk_bytes: int
    num_warps: int  # of a block
    num_blocks: int

    @property
    def num_slots(self) -> int:
        """A multiple of the warps: each has slots of its own then."""
        workers = self.num_warps * self.num_blocks
        wanted = max(FEWEST_SLOTS, WINDOW_BYTES // self.chunk_bytes, 2 * workers)
        return -(-wanted // workers) * workers


def measure(group: RailGroup, shape: Shape, has_blocks: bool, stream_bytes: int, repeats: int) -> dict[str, Any]:
    """Bytes per second of each way, by turns; the receiver's clock runs from the start of both to its last chunk."""
    chunk_bytes = shape.chunk_bytes
    num_chunks = max(SMALLEST_STREAM_CHUNKS, stream_bytes // chunk_bytes)
    words = f"{num_chunks} {shape.num_slots} {chunk_bytes} {shape.num_warps} {shape.num_blocks}"
    rates: dict[str, list[float]] = {"rate": [], "plain": []}
    if has_blocks:
        rates["plain_blocks"] = []
    for _ in range(repeats + 1):
        for way, found in rates.items():
            seconds = max(rank["seconds"] for rank in group.run(f"{way} {words}"))
            found.append(num_chunks * chunk_bytes / seconds / 1e9)
    engine, plain, blocks = (rates.get(way, [])[1:] for way in ("rate", "plain", "plain_blocks"))  # the first warms up
    by_blocks = {"plain_blocks_gb_per_s": blocks, "plain_blocks_median": statistics.median(blocks)} if blocks else {}
    plain = max(plain, blocks, key=lambda rates: statistics.median(rates or [0.0]))
    return by_blocks | {
        "chunk_bytes": chunk_bytes,
        "num_warps": shape.num_warps,
        "num_blocks": shape.num_blocks,
        "num_chunks": num_chunks,
        "num_slots": shape.num_slots,
        "engine_gb_per_s": engine,
        "plain_gb_per_s": plain,  # of the faster way
        "engine_median": statistics.median(engine),
        "plain_median": statistics.median(plain),
        "ratio_of_medians": statistics.median(engine) / statistics.median(plain),
        "ratio_of_best": max(engine) / max(plain),
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'chunk':>10} {'blocks':>6} {'warps':>5} {'engine':>12} {'plain':>14} {'ratio':>7} {'of best':>8}")
    for row in rows:
        print(f"{row['chunk_bytes'] / 1024:>6.0f} KiB {row['num_blocks']:>6} {row['num_warps']:>5} "
              f"{row['engine_median']:>7.2f} GB/s "
              f"{row['plain_median']:>9.2f} GB/s "
              f"{row['ratio_of_medians']:>7.2f} {row['ratio_of_best']:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk-kib", default="14,64,256,1024", help="sizes of a chunk, separated by commas")
    parser.add_argument("--warps",
                        default="1",
                        help="warps of a block that send, each a stream of its own, separated by commas")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of such warps")
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
    shapes = [Shape(size, count, options.blocks) for count in warps for size in sizes]
    window_bytes = 4 * max(shape.num_slots * shape.chunk_bytes for shape in shapes) + (1 << 20)
    has_blocks = program.name == "rail_process_nvshmem"
    with RailGroup(program, 2, ["--interface", "lo", "--window-bytes", str(window_bytes)]) as group:
        group.connect()
        rows = [measure(group, shape, has_blocks, options.stream_mib << 20, options.repeats) for shape in shapes]
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
