"""`python -m deep_ep doctor|bench|calibrate|model|build-nvshmem`: one command, and all its options."""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from deep_ep.bench.routing import ROUTINGS

BENCHMARKS = {
    "intranode": "high-throughput dispatch and combine inside one node",
    "internode": "high-throughput dispatch and combine across virtual nodes of this machine",
    "low-latency": "low-latency dispatch and combine inside one node"
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
    """Of everything but where its figures go. A command's `run` takes the parsed arguments and returns the exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m deep_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is built, what this machine has, and how to mend what is amiss")
    add_doctor_options(doctor)
    bench = commands.add_parser("bench", help="times of the operations on this machine (intranode where none is named)")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    for name, text in BENCHMARKS.items():
        add_bench_options(benchmarks.add_parser(name, help=text), name)
    calibrate = commands.add_parser("calibrate", help="stores what the intranode benchmark has measured, for Buffers")
    add_calibrate_options(calibrate)
    model = commands.add_parser("model", help="what calls will take across nodes: bytes, bottleneck, times, SMs")
    add_model_options(model)
    builder = commands.add_parser("build-nvshmem", help="compiles the engine nvshmem, for several nodes, against the "
                                  "NVSHMEM that is installed here (needs nvcc)")  # yapf: disable
    add_build_nvshmem_options(builder)
    return parser


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print findings as JSON")


def add_bench_options(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.set_defaults(num_sms=None, no_comparison=True, ranks_as_threads=False)
    if benchmark != "low-latency":
        parser.add_argument("--num-sms", type=int_list, help="SM budgets, even numbers; several: a sweep")
    if benchmark == "intranode":
        parser.add_argument("--no-comparison", action="store_true", default=False, help="leave torch.distributed out")
    parser.add_argument("--num-processes", type=int, default=0, help="ranks (default: one per GPU; 2 on the CPU)")
    if benchmark != "intranode":
        ranks_per_node = 1 if benchmark == "internode" else 0
        parser.add_argument("--ranks-per-node",
                            type=int,
                            default=ranks_per_node,
                            help="of each virtual node; 0: the ranks share one (default: %(default)s)")
    if benchmark != "internode":
        parser.add_argument("--ranks-as-threads",
                            action="store_true",
                            help="all ranks in this process, at the same time on one GPU: protocol and SM throughput "
                            "without links")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tokens", type=int_list, help="tokens per rank; several, with commas: a sweep")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, help="of all ranks together")
    parser.add_argument("--routing", type=routing_list, help=", ".join(ROUTINGS))
    parser.add_argument("--sweep", action="store_true", help="many sizes, SM budgets and routings: minutes")
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--input-sets", type=int, default=3, help="inputs used in turn, against cached data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", action="store_true", help="also time replays of CUDA graphs of the calls")
    parser.add_argument("--profile",
                        action="store_true",
                        help="also each kernel's own time and SMs, by torch's profiler, at one size")
    parser.add_argument("--save",
                        nargs="?",
                        const=Path("benchmarks/results"),
                        type=Path,
                        metavar="FOLDER",
                        help="write the figures as JSON (default folder: %(const)s)")
    parser.add_argument("--commit", default="", help="for the JSON, where the package is not in a checkout")


def add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", type=Path, help="JSON of `python -m deep_ep bench intranode --save`")
    parser.add_argument("--to", type=Path, help="the file to store it in (default: where Buffers look)")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def positive_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return rate


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=("high-throughput", "low-latency"), default="high-throughput")
    parser.add_argument("--nodes", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument("--ranks-per-node", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=positive_int, default=4096, help="of each rank (default: %(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=7168, help="elements of a row (default: %(default)s)")
    parser.add_argument("--topk", type=positive_int, default=8, help="experts of a token (default: %(default)s)")
    parser.add_argument("--experts", type=positive_int, default=256, help="of all ranks (default: %(default)s)")
    parser.add_argument("--limit-nodes",
                        type=positive_int,
                        default=0,
                        help="a token's experts lie in at most so many nodes (default: uniform over all)")
    parser.add_argument("--nic-gbps",
                        type=positive_rate,
                        help="Gb/s in one direction of a rank's NICs (default: from sysfs, of the RDMA NICs here that "
                        "are up, a bond with all its links, shared by the ranks of a node)")
    parser.add_argument("--nics",
                        type=lambda text: text.split(","),
                        default=[],
                        metavar="NAMES",
                        help="which of them count, e.g. mlx5_0,mlx5_1")
    parser.add_argument(
        "--nvlink-gb-per-s",
        type=positive_rate,
        default=340.0,
        help="GB/s that leave a GPU when all copy to all (default: %(default)s, of 18 links of NVLink 4)")
    parser.add_argument("--row-for-each-node",
                        action="store_true",
                        help="low latency: a row of a dispatch crosses once for each node, as over nvshmem where CUDA "
                        "orders a NIC's writes for all devices (default: once for each rank; with --engine host: "
                        "once for each node)")
    parser.add_argument("--engine",
                        choices=("gpu", "proxy", "fencing-proxy", "host"),
                        default="gpu",
                        help="who posts to the NIC (default: %(default)s, IBGDA)")
    parser.add_argument("--most-sms", type=positive_int, default=20, help="default: %(default)s")
    parser.add_argument("--scaling", action="store_true", help="from 2 to 512 ranks, in nodes of 8, instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON there")


def add_build_nvshmem_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: where Buffers look, in the user's cache")
    parser.add_argument("--arch",
                        default="",
                        help="compute capabilities, e.g. 90,100 (default: those of the GPUs here, else 90)")


def with_default_benchmark(arguments: list[str]) -> list[str]:
    """`bench` alone, or with options only, is the intranode benchmark."""
    if arguments[:1] != ["bench"]:
        return arguments
    rest = arguments[1:]
    names_one = rest and (not rest[0].startswith("-") or rest[0] in ("-h", "--help"))
    return arguments if names_one else ["bench", "intranode", *rest]


def main(arguments: list[str]) -> int:
    """The exit status. A command is imported when it is asked for: one that fails does not stand in another's way."""
    arguments = with_default_benchmark(arguments)
    args = build_parser().parse_args(arguments)
    if args.command == "doctor":
        from deep_ep import doctor
        return doctor.report(args.json)
    if args.command == "bench":
        from deep_ep.bench import command
        return command.run(args, arguments)
    if args.command == "build-nvshmem":
        from deep_ep import _nvshmem
        return _nvshmem.build_command(args.to, [arch for arch in args.arch.split(",") if arch])
    if args.command == "model":
        from deep_ep import model
        return model.run(args)
    from deep_ep import calibrate
    return calibrate.run(args.reports, args.to)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
