"""Kernel times of the low-latency mode as the profiler sees them, several times over, and nothing else: seconds a run.

    python benchmarks/low_latency_kernels.py --num-processes 2 --tokens 1,8,32,128,512
    python benchmarks/low_latency_kernels.py --num-processes 2 --ranks-as-threads      # share one GPU: no link

Calls are queued while the device sleeps, so that nothing of the host is in the kernel times. Phases of a call with a
hook have pauses between them in which all rows come. Figures are medians of the slowest rank: the median of all
rounds, and the least and the largest of a round; of a pair in a graph the span as well, from the first kernel's start
to the last one's end. To compare trees, start this script once for each with PYTHONPATH set to the tree and the same
file for --turn: they take turns, a round each.
"""
import argparse
import contextlib
import fcntl
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deep_ep import Buffer, _env
from deep_ep.bench.kernels import Profiler
from deep_ep.bench.low_latency import Workload, captured_pairs, profile_kernels
from deep_ep.bench.options import Options
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.results import Findings
from deep_ep.bench.routing import Shape
from deep_ep.bench.timing import Timer
from deep_ep.bench.workers import run_ranks

LET_OTHERS_IN_S = 0.05


@dataclass(frozen=True)
class KernelBenchmark:
    """One rank; `num_rounds` and `turn` as the arguments say."""

    ranks: Ranks
    options: Options
    device: torch.device
    findings: Findings
    num_rounds: int
    turn: str

    def run(self) -> None:
        profiler = Profiler(self.ranks, Timer(self.ranks, is_cuda=True), self.options)
        for num_tokens in self.options.num_tokens:
            with self.my_turn():
                options = self.options
                shape = Shape(options.num_ranks, num_tokens, options.hidden, options.num_topk, options.num_experts,
                              "uniform")
                num_bytes = Buffer.get_low_latency_rdma_size_hint(num_tokens, shape.hidden, shape.num_ranks,
                                                                  shape.num_experts)
                buffer = self.ranks.buffer(0, num_rdma_bytes=num_bytes, low_latency_mode=True)
                workload = Workload(buffer, shape, options, self.device)
                pairs = captured_pairs(self.ranks, options, workload) if options.can_capture else {}
            for _ in range(self.num_rounds):
                with self.my_turn():
                    profile_kernels(profiler, self.findings, workload, pairs)
            torch.cuda.synchronize()
            self.ranks.barrier()
            buffer.destroy()

    @contextlib.contextmanager
    def my_turn(self) -> Iterator[None]:
        """Alone on the machine, among those that have the same file."""
        with contextlib.ExitStack() as stack:
            if self.turn and self.ranks.rank == 0:
                lock = stack.enter_context(Path(self.turn).open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.ranks.barrier()
            yield
            torch.cuda.synchronize()
            self.ranks.barrier()
        time.sleep(LET_OTHERS_IN_S)


@dataclass(frozen=True)
class MakeBenchmark:
    """A KernelBenchmark for a rank, in another process too."""

    num_rounds: int
    turn: str

    def __call__(self, ranks: Ranks, options: Options, device: torch.device, findings: Findings) -> KernelBenchmark:
        return KernelBenchmark(ranks, options, device, findings, self.num_rounds, self.turn)


def report(findings: Findings) -> None:
    rounds = defaultdict(list)
    for profile in findings.profiles:
        rounds[profile.num_tokens, profile.operation].append(profile)
    for (num_tokens, operation), profiles in rounds.items():
        sums = [sum(kernel.us for kernel in profile.kernels) for profile in profiles]
        kernels = zip(*([kernel.us for kernel in profile.kernels] for profile in profiles))
        shown = " + ".join(f"{statistics.median(times):.2f}" for times in kernels)
        span = statistics.median(profile.span_us for profile in profiles)
        spanned = f"  span {span:.2f}" if operation.startswith("pair") else ""
        print(f"{num_tokens:4} {operation:32} {shown:>16}  ({min(sums):.2f} to {max(sums):.2f}){spanned}")
    for notice in findings.notices:
        print(notice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option, default in (("num-processes", 2), ("hidden", 7168), ("topk", 8), ("experts", 288), ("rounds", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--tokens", default="128", help="several, with commas")
    parser.add_argument("--ranks-as-threads", action="store_true")
    parser.add_argument("--turn", default="", help="a file that those share who take turns")
    parser.add_argument("--save", default="", help="a JSON file for all rounds")
    args = parser.parse_args()
    _env.set_device("cuda")
    if args.ranks_as_threads:
        _env.prepare_threaded_ranks()
    options = Options(num_ranks=args.num_processes,
                      is_cuda=True,
                      num_tokens=[int(word) for word in args.tokens.split(",")],
                      hidden=args.hidden,
                      num_topk=args.topk,
                      num_experts=args.experts,
                      routings=["uniform"],
                      num_sms=[],
                      num_warmups=0,
                      num_repeats=0,
                      num_sets=3,
                      seed=0,
                      with_graphs=True,
                      with_profile=True,
                      is_threaded=args.ranks_as_threads,
                      num_gpus=torch.cuda.device_count())
    findings = run_ranks(options, MakeBenchmark(args.rounds, args.turn))
    report(findings)
    if args.save:
        Path(args.save).write_text(json.dumps([asdict(profile) for profile in findings.profiles]), encoding="utf-8")


if __name__ == "__main__":
    main()
