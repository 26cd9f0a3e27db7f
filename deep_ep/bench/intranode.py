"""High-throughput dispatch and combine inside one node: times, bytes, and the share of the wire ceiling."""
from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from deep_ep import Buffer, Config
from deep_ep.bench.ceiling import measure_ceilings
from deep_ep.bench.ranks import ProcessRanks, Ranks, ThreadMeeting, ThreadRanks
from deep_ep.bench.results import Row
from deep_ep.bench.routing import (
    Shape,
    busiest_remote_copies,
    choose_experts,
    count_copies,
)
from deep_ep.bench.timing import Call, Timer, median, percentile

try:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
except ImportError:
    tqdm = None

T = TypeVar("T")

SCALE_BLOCK = 128  # elements of an FP8 row that share a scale
GROUP_TIMEOUT = timedelta(minutes=5)
THREAD_POOL_BYTES = 4 << 30


@dataclass(frozen=True)
class Options:
    """What to measure; the lists are swept over in every combination."""

    num_ranks: int
    is_cuda: bool
    num_tokens: list[int]
    hidden: int
    num_topk: int
    num_experts: int
    routings: list[str]
    num_sms: list[int]
    num_warmups: int
    num_repeats: int
    num_sets: int
    seed: int
    with_graphs: bool
    is_threaded: bool = False  # ranks are threads that share one GPU


@dataclass(frozen=True)
class Operation:
    """One call to time. `row_bytes` of each remote copy; 0: it moves nothing between ranks."""

    name: str
    call: Call
    row_bytes: int
    num_sms: int
    is_capturable: bool = False


class Workload:
    """The inputs of one shape. Several sets of the same routing, used in turn, so that no cache holds the data."""

    def __init__(self, buffer: Buffer, shape: Shape, options: Options, device: torch.device) -> None:
        self.shape = shape
        self._buffer = buffer
        torch.manual_seed(options.seed * 1000 + buffer.rank)
        sizes = (shape.num_tokens, shape.hidden)
        self.topk_idx = choose_experts(shape, buffer.rank, options.seed).to(device)
        self._routing: dict[str, Any] = self._make_routing(device)
        self._bf16 = [torch.randn(sizes, dtype=torch.bfloat16, device=device) for _ in range(options.num_sets)]
        self.num_scales = (shape.hidden + SCALE_BLOCK - 1) // SCALE_BLOCK
        scales = torch.rand((shape.num_tokens, self.num_scales), device=device)
        self._fp8 = [(x.to(torch.float8_e4m3fn), scales) for x in self._bf16]

    def _make_routing(self, device: torch.device) -> dict[str, Any]:
        per_rank, _, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(self.topk_idx, self.shape.num_experts)
        return {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": is_in_rank,
            "num_tokens_per_expert": per_expert,
            "topk_idx": self.topk_idx,
            "topk_weights": torch.rand((self.shape.num_tokens, self.shape.num_topk), device=device),
        }

    def operations(self, num_sms: int) -> Iterator[Operation]:
        """Every operation of the mode. Collective: dispatches once to have handles."""
        Buffer.set_num_sms(num_sms)
        dispatch_config = Buffer.get_dispatch_config(self.shape.num_ranks)
        yield Operation("layout", self._layout, 0, 0, is_capturable=True)
        payloads: list[tuple[str, list[Any], int]] = [
            ("BF16", self._bf16, 2 * self.shape.hidden),
            ("FP8", self._fp8, self.shape.hidden + 4 * self.num_scales),
        ]
        for name, inputs, row_bytes in payloads:
            yield from self._dispatches(name, inputs, row_bytes, dispatch_config, num_sms)
        yield self._combine(dispatch_config, num_sms)

    def _layout(self, _: int) -> object:
        return self._buffer.get_dispatch_layout(self.topk_idx, self.shape.num_experts)

    def _dispatches(self, name: str, inputs: list[Any], row_bytes: int, config: Config,
                    num_sms: int) -> Iterator[Operation]:
        most_rows = self.shape.num_tokens * self.shape.num_ranks
        handle = self._fresh(inputs, config, 0, 0)[4]
        yield Operation(f"dispatch {name}", partial(self._fresh, inputs, config, 0), row_bytes, num_sms)
        yield Operation(f"dispatch {name} cached",
                        partial(self._cached, inputs, config, handle),
                        row_bytes,
                        num_sms,
                        is_capturable=True)
        yield Operation(f"dispatch {name} worst case",
                        partial(self._fresh, inputs, config, most_rows),
                        row_bytes,
                        num_sms,
                        is_capturable=True)

    def _fresh(self, inputs: list[Any], config: Config, num_worst_tokens: int, i: int) -> Any:
        return self._buffer.dispatch(inputs[i % len(inputs)],
                                     num_worst_tokens=num_worst_tokens,
                                     config=config,
                                     **self._routing)

    def _cached(self, inputs: list[Any], config: Config, handle: Any, i: int) -> object:
        return self._buffer.dispatch(inputs[i % len(inputs)], handle=handle, config=config)

    def _combine(self, dispatch_config: Config, num_sms: int) -> Operation:
        config = Buffer.get_combine_config(self.shape.num_ranks)
        received = [self._fresh(self._bf16, dispatch_config, 0, i) for i in range(len(self._bf16))]

        def combine(i: int) -> object:
            rows, _, weights, _, handle, _ = received[i % len(received)]
            return self._buffer.combine(rows, handle, topk_weights=weights, config=config)

        return Operation("combine BF16", combine, 2 * self.shape.hidden, num_sms, is_capturable=True)


def capture(call: Call, num_sets: int) -> Call:
    """`call` as CUDA graphs, one for each input set, whose replay costs the host next to nothing."""
    call(0)
    torch.cuda.synchronize()
    graphs = []
    for i in range(num_sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(i)
        graphs.append(graph)

    def replay(i: int) -> None:
        graphs[i % num_sets].replay()

    return replay


class IntranodeBenchmark:
    """One rank of the benchmark."""

    def __init__(self, ranks: Ranks, options: Options, device: torch.device) -> None:
        self._ranks = ranks
        self._options = options
        self._device = device
        self._timer = Timer(ranks, options.is_cuda)

    def run(self) -> list[Row]:
        options = self._options
        # Threads share a GPU: there is no link.
        ceilings = (dict.fromkeys(options.num_sms, 0.0) if options.is_threaded else measure_ceilings(
            self._ranks, self._timer, options.num_sms, options.is_cuda))
        cases = list(itertools.product(options.num_tokens, options.routings, options.num_sms))
        rows: list[Row] = []
        for num_tokens, routing, num_sms in show_progress(cases, is_shown=self._ranks.rank == 0):
            shape = Shape(options.num_ranks, num_tokens, options.hidden, options.num_topk, options.num_experts, routing)
            rows += self._measure_shape(shape, num_sms, ceilings[num_sms])
        return rows

    def _measure_shape(self, shape: Shape, num_sms: int, ceiling: float) -> list[Row]:
        Buffer.set_num_sms(num_sms)
        row_bytes = 2 * shape.hidden
        configs = Buffer.get_dispatch_config(shape.num_ranks), Buffer.get_combine_config(shape.num_ranks)
        num_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, shape.num_ranks) for config in configs)
        remote_copies = busiest_remote_copies(count_copies(shape, self._options.seed))
        rows = []
        with self._ranks.buffer(num_bytes) as buffer:
            workload = Workload(buffer, shape, self._options, self._device)
            for operation in workload.operations(num_sms):
                rows.append(self._measure(operation, shape, remote_copies, ceiling))
                if self._options.is_threaded and operation.is_capturable:
                    rows.append(self._measure(operation, shape, remote_copies, ceiling, is_queued=True))
                elif self._options.with_graphs and operation.is_capturable:
                    graphs = capture(operation.call, self._options.num_sets)
                    replayed = Operation(f"{operation.name} graph", graphs, operation.row_bytes, operation.num_sms)
                    rows.append(self._measure(replayed, shape, remote_copies, ceiling))
            if self._options.is_cuda:
                torch.cuda.synchronize()
            self._ranks.barrier()
        return rows

    def _measure(self,
                 operation: Operation,
                 shape: Shape,
                 remote_copies: int,
                 ceiling: float,
                 is_queued: bool = False) -> Row:
        options = self._options
        time_chain = self._timer.queued if is_queued else self._timer.chained
        chained = time_chain(operation.call, options.num_warmups, options.num_repeats)
        fresh = self._timer.fresh(operation.call, options.num_warmups, options.num_repeats)
        return Row(operation=f"{operation.name} queued" if is_queued else operation.name,
                   num_tokens=shape.num_tokens,
                   hidden=shape.hidden,
                   num_topk=shape.num_topk,
                   num_experts=shape.num_experts,
                   routing=shape.routing,
                   num_sms=operation.num_sms,
                   chained_us=median(chained),
                   fresh_us=median(fresh),
                   chained_p95_us=percentile(chained, 95),
                   fresh_p95_us=percentile(fresh, 95),
                   remote_bytes=remote_copies * operation.row_bytes,
                   ceiling_gb_per_s=ceiling if operation.row_bytes > 0 else 0.0)


def show_progress(items: list[T], is_shown: bool) -> Iterable[T]:
    """A progress bar over a sweep, on one rank, where tqdm is installed (pip install deep_ep[bench])."""
    if tqdm is None or not is_shown or len(items) < 2:
        return items
    bar: Iterable[T] = tqdm(items, unit="case")
    return bar


class Benchmark(Protocol):
    """One rank of a benchmark."""

    def __init__(self, ranks: Ranks, options: Options, device: torch.device) -> None:
        ...

    def run(self) -> list[Row]:
        """Collective: measures everything."""


def run_worker(rank: int, options: Options, folder: str, benchmark: type[Benchmark]) -> None:
    """One process. Rank 0 leaves the rows, as JSON, in `folder`."""
    device = torch.device("cpu")
    if options.is_cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.num_ranks, timeout=GROUP_TIMEOUT)
    group = dist.new_group()
    try:
        rows = benchmark(ProcessRanks(group), options, device).run()
        if rank == 0:
            rows_path(folder).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def run_threads(options: Options, benchmark: type[Benchmark]) -> list[Row]:
    """Every rank is a thread of this process with a stream of its own; all use one device."""
    meeting = ThreadMeeting(options.num_ranks)
    with ThreadPoolExecutor(options.num_ranks) as pool:
        workers = [pool.submit(_run_thread, meeting, rank, options, benchmark) for rank in range(options.num_ranks)]
        return [worker.result() for worker in workers][0]


def _run_thread(meeting: ThreadMeeting, rank: int, options: Options, benchmark: type[Benchmark]) -> list[Row]:
    try:
        if not options.is_cuda:
            return benchmark(ThreadRanks(meeting, rank), options, torch.device("cpu")).run()
        device = torch.device("cuda", 0)
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            # Memory for later: an allocation may not go to the driver while a kernel waits for this rank.
            torch.empty(THREAD_POOL_BYTES, dtype=torch.uint8, device=device)
            return benchmark(ThreadRanks(meeting, rank), options, device).run()
    except BaseException:
        meeting.barrier.abort()
        raise


def rows_path(folder: str) -> Path:
    return Path(folder) / "rows.json"


def read_rows(folder: str) -> list[Row]:
    return [Row(**row) for row in json.loads(rows_path(folder).read_text(encoding="utf-8"))]
