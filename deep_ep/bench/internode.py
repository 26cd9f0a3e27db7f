"""High-throughput dispatch and combine across virtual nodes: times, and the bytes that cross between nodes."""
from __future__ import annotations

from deep_ep.bench.intranode import IntranodeBenchmark
from deep_ep.bench.routing import Shape, busiest_rail_copies


class InternodeBenchmark(IntranodeBenchmark):
    """The same calls. Of their bytes those count that leave a node."""

    has_ceiling = False  # the engine's rate: benchmarks/rail_rate.py

    def _remote_copies(self, shape: Shape) -> int:
        return busiest_rail_copies(shape, self._options.seed, self._options.ranks_per_node)
