"""Runs a benchmark on every rank: one process for each, or one thread."""
from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Protocol

import torch
import torch.distributed as dist

from deep_ep.bench.options import Options
from deep_ep.bench.ranks import ProcessRanks, Ranks, ThreadMeeting, ThreadRanks
from deep_ep.bench.results import Findings

GROUP_TIMEOUT = timedelta(minutes=5)
POOLED_SHARE = 0.7  # of a GPU that threads share, for what torch allocates in them


class Benchmark(Protocol):
    """One rank of a benchmark."""

    def __init__(self, ranks: Ranks, options: Options, device: torch.device, findings: Findings) -> None:
        ...

    def run(self) -> None:
        """Collective: measures everything, and adds it to the findings as it goes."""


MakeBenchmark = Callable[[Ranks, Options, torch.device, Findings], Benchmark]


def run_ranks(options: Options, benchmark: MakeBenchmark) -> Findings:
    """What rank 0 found. When the run is ended early: what it had found by then, said in a notice."""
    return run_threads(options, benchmark) if options.is_threaded else run_processes(options, benchmark)


def run_processes(options: Options, benchmark: MakeBenchmark) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        path = findings_path(folder)
        failure = ""
        processes: Any = torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _run_process,
            args=(options, folder, benchmark),
            nprocs=options.num_ranks,
            join=False)
        try:
            while not processes.join():
                pass
        except BaseException as error:
            for process in processes.processes:
                process.kill()
            if not path.exists():
                raise
            failure = f"{type(error).__name__}: {error}".strip()
        findings = Findings.from_json(json.loads(path.read_text(encoding="utf-8")))
        findings.failure = failure
        return findings


def findings_path(folder: str) -> Path:
    return Path(folder) / "findings.json"


def _run_process(rank: int, options: Options, folder: str, benchmark: MakeBenchmark) -> None:
    """One process. Rank 0 leaves what it has found so far, as JSON, in `folder`."""
    device = torch.device("cpu")
    if options.is_cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.num_ranks, timeout=GROUP_TIMEOUT)
    try:
        findings = Findings(path=findings_path(folder) if rank == 0 else None)
        benchmark(ProcessRanks(dist.new_group()), options, device, findings).run()
        findings.keep()
    finally:
        dist.destroy_process_group()


def run_threads(options: Options, benchmark: MakeBenchmark) -> Findings:
    """Every rank is a thread of this process with a stream of its own; all use one device."""
    meeting, found = ThreadMeeting(options.num_ranks), [Findings() for _ in range(options.num_ranks)]
    pool_bytes = int(torch.cuda.mem_get_info(0)[0] * POOLED_SHARE) // options.num_ranks if options.is_cuda else 0
    with ThreadPoolExecutor(options.num_ranks) as pool:
        workers = [
            pool.submit(_run_thread, meeting, rank, options, benchmark, found[rank], pool_bytes)
            for rank in range(options.num_ranks)
        ]
        try:
            for worker in workers:
                worker.result()
        except BaseException as error:
            meeting.barrier.abort()
            if not found[0].rows:
                raise
            found[0].failure = f"{type(error).__name__}: {error}".strip()
    return found[0]


def _run_thread(meeting: ThreadMeeting, rank: int, options: Options, benchmark: MakeBenchmark, findings: Findings,
                pool_bytes: int) -> None:
    try:
        ranks = ThreadRanks(meeting, rank)
        if not options.is_cuda:
            benchmark(ranks, options, torch.device("cpu"), findings).run()
            return
        device = torch.device("cuda", 0)
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            # Memory for later: an allocation may not go to the driver while a kernel waits for this rank.
            torch.empty(pool_bytes, dtype=torch.uint8, device=device)
            benchmark(ranks, options, device, findings).run()
    except BaseException:
        meeting.barrier.abort()
        raise
