"""High-throughput dispatch and combine across virtual nodes: times, and the bytes that cross between nodes."""
from __future__ import annotations

from deep_ep.bench.ceiling import measure_ceilings
from deep_ep.bench.intranode import IntranodeBenchmark
from deep_ep.bench.mode import carried_by
from deep_ep.bench.routing import Shape, busiest_rail_copies
from deep_ep.bench.streams import PlainStreams
from deep_ep.bench.timing import median

CUDA_STREAM_BYTES, CPU_STREAM_BYTES = 64 << 20, 1 << 20
NUM_WARMUPS, NUM_REPEATS = 1, 7
OVER_TCP = "The ceiling is that of plain socket streams between the same ranks in the same run, both ways at once."
OVER_STORES = "The ceiling is that of plain stores to the other ranks in the same run, with the same number of SMs."
OWN_MEMORY = "There is no ceiling: ranks of different nodes share a GPU, so no link is between them."


class InternodeBenchmark(IntranodeBenchmark):
    """The same calls. Of their bytes those count that leave a node."""

    def run(self) -> None:
        self._ceilings = self._rail_ceilings()
        self._findings.keep()
        super().run()

    def _remote_copies(self, shape: Shape) -> int:
        return busiest_rail_copies(shape, self._options.seed, self._options.ranks_per_node)

    def _rail_ceilings(self) -> dict[int, float]:
        """GB/s that leave a rank, by number of SMs."""
        budgets = self._options.num_sms
        with self._buffer(budgets[0]) as buffer:
            engine = buffer.runtime.rail_name if buffer.runtime else ""
            self._settle()
        self._findings.notice(carried_by(engine))
        if engine.startswith("host"):
            self._findings.notice(OVER_TCP)
            return dict.fromkeys(budgets, self._plain_stream_rate())
        if not self._options.has_own_gpus:
            self._findings.notice(OWN_MEMORY)
            return dict.fromkeys(budgets, 0.0)
        self._findings.notice(OVER_STORES)
        return measure_ceilings(self._ranks, self._timer, budgets, self._device)

    def _plain_stream_rate(self) -> float:
        size, rank = self._options.ranks_per_node, self._ranks.rank
        peers = [peer for peer in range(rank % size, self._ranks.size, size) if peer != rank]
        num_bytes = CUDA_STREAM_BYTES if self._options.is_cuda else CPU_STREAM_BYTES
        with PlainStreams(self._ranks, peers, num_bytes, self._options.is_cuda) as streams:
            samples = self._timer.chained(streams.exchange, NUM_WARMUPS, NUM_REPEATS)
            self._ranks.barrier()
        return len(peers) * num_bytes / median(samples) / 1e3
