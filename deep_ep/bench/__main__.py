"""`python -m deep_ep.bench intranode` or `low-latency`: a process for each rank, a table at the end, JSON on request."""
from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import deep_ep_cpp
from deep_ep import _env
from deep_ep.bench.intranode import Benchmark, IntranodeBenchmark, Options, read_rows, run_threads, run_worker
from deep_ep.bench.low_latency import LowLatencyBenchmark
from deep_ep.bench.results import Report, Row, format_table, save
from deep_ep.bench.routing import ROUTINGS


# What is measured where nothing else is asked for. The CPU executor runs the same code some thousand times slower.
@dataclass(frozen=True)
class Defaults:
    tokens: list[int]
    hidden: int
    experts: int
    repeats: int
    num_sms: int


# Before CUDA starts: a hardware queue for every stream, or one rank's kernel waits behind another's that waits for it; and
# no kernel is loaded late, which waits for the device.
THREADED_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}

BENCHMARKS: dict[str, type[Benchmark]] = {"intranode": IntranodeBenchmark, "low-latency": LowLatencyBenchmark}
# By benchmark: on CUDA, on the CPU. Low latency uses all SMs; its number is for the ceiling alone.
DEFAULTS = {
    "intranode": (Defaults([4096], hidden=7168, experts=256, repeats=30,
                           num_sms=16), Defaults([64], hidden=512, experts=32, repeats=3, num_sms=2)),
    "low-latency": (Defaults([2**i for i in range(10)], hidden=7168, experts=288, repeats=30,
                             num_sms=64), Defaults([1, 16], hidden=512, experts=32, repeats=3, num_sms=2)),
}


def int_list(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers with commas between, got {text!r}") from None
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers that are not negative, got {text!r}")
    return values


def routing_list(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ROUTINGS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(ROUTINGS)}, got {name!r}")
    return names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deep_ep.bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    intranode = commands.add_parser("intranode", help="high-throughput dispatch and combine inside one node")
    add_options(intranode)
    intranode.add_argument("--num-sms", type=int_list, help="SM budgets, even numbers; several: a sweep")
    low_latency = commands.add_parser("low-latency", help="low-latency dispatch and combine inside one node")
    add_options(low_latency)
    low_latency.set_defaults(num_sms=None)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-processes", type=int, default=0, help="ranks (default: one per GPU; 2 on the CPU)")
    parser.add_argument("--ranks-as-threads",
                        action="store_true",
                        help="all ranks in this process, at the same time on one GPU: protocol and SM throughput "
                        "without links")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tokens", type=int_list, help="tokens per rank; several, with commas: a sweep")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, help="of all ranks together")
    parser.add_argument("--routing", type=routing_list, default=["uniform"], help=", ".join(ROUTINGS))
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--input-sets", type=int, default=3, help="inputs used in turn, against cached data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", action="store_true", help="also time replays of CUDA graphs of the calls")
    parser.add_argument("--save",
                        nargs="?",
                        const=Path("benchmarks/results"),
                        type=Path,
                        metavar="FOLDER",
                        help="write the figures as JSON (default folder: %(const)s)")
    parser.add_argument("--commit", default="", help="for the JSON, where the package is not in a checkout")


def choose_device(wanted: str) -> str:
    if wanted == "auto":
        wanted = str(deep_ep_cpp.get_environment().get("device") or "")
    if wanted in ("cpu", "cuda"):
        return wanted
    return "cuda" if deep_ep_cpp.is_cuda_built() and torch.cuda.is_available() else "cpu"


def make_options(args: argparse.Namespace, is_cuda: bool) -> Options:
    defaults = DEFAULTS[args.benchmark][0 if is_cuda else 1]
    num_ranks = args.num_processes or (torch.cuda.device_count() if is_cuda else 2)
    num_experts = args.experts or defaults.experts
    return Options(num_ranks=num_ranks,
                   is_cuda=is_cuda,
                   num_tokens=args.tokens or defaults.tokens,
                   hidden=args.hidden or defaults.hidden,
                   num_topk=args.topk,
                   num_experts=(num_experts + num_ranks - 1) // num_ranks * num_ranks,
                   routings=args.routing,
                   num_sms=args.num_sms or [defaults.num_sms],
                   num_warmups=args.warmups if is_cuda else min(args.warmups, 1),
                   num_repeats=args.repeats or defaults.repeats,
                   num_sets=args.input_sets,
                   seed=args.seed,
                   with_graphs=args.graphs and is_cuda,
                   is_threaded=args.ranks_as_threads)


def command_of(arguments: list[str]) -> str:
    """What to type to measure the same again: without where the figures of this run went."""
    kept: list[str] = []
    skips_value = False
    for argument in arguments:
        is_value = skips_value and not argument.startswith("-")
        skips_value = argument in ("--save", "--commit")
        if not is_value and not argument.startswith(("--save", "--commit")):
            kept.append(argument)
    return shlex.join(["python", "-m", "deep_ep.bench", *kept])


def run_processes(options: Options, benchmark: type[Benchmark]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            run_worker,
            args=(options, folder, benchmark),
            nprocs=options.num_ranks)
        return read_rows(folder)


def num_devices(options: Options) -> int:
    if not options.is_cuda:
        return 0
    return 1 if options.is_threaded else min(options.num_ranks, torch.cuda.device_count())


def main(arguments: list[str]) -> int:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["intranode", *arguments]
    args = build_parser().parse_args(arguments)
    device = choose_device(args.device)
    _env.set_device(device)  # for the ranks
    if args.ranks_as_threads:
        os.environ.update(THREADED_ENVIRONMENT)
    options = make_options(args, device == "cuda")
    run = run_threads if options.is_threaded else run_processes
    rows = run(options, BENCHMARKS[args.benchmark])
    report = Report(benchmark=args.benchmark,
                    command=command_of(arguments),
                    device=device,
                    num_ranks=options.num_ranks,
                    num_devices=num_devices(options),
                    is_threaded=options.is_threaded,
                    rows=rows)
    print(
        f"{options.num_ranks} ranks, hidden {options.hidden}, top-{options.num_topk} of {options.num_experts} experts, "
        f"{options.num_repeats} repeats: median of the slowest rank")
    print(format_table(rows))
    for notice in report.notices:
        print(notice)
    if args.save is not None:
        print(f"saved {save(report, args.save, args.commit)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
