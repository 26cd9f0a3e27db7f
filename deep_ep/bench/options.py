"""What a benchmark is asked to measure."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The lists are swept over in every combination."""

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
    with_graphs: bool = False
    with_comparison: bool = False  # with torch.distributed
    with_profile: bool = False
    is_threaded: bool = False  # ranks are threads that share one GPU
    num_gpus: int = 0
    ranks_per_node: int = 0  # of virtual nodes; 0: the ranks share one

    @property
    def has_own_gpus(self) -> bool:
        return self.is_cuda and not self.is_threaded and self.num_gpus >= self.num_ranks

    @property
    def can_queue(self) -> bool:
        """Whether all ranks' kernels run at the same time: then queued calls show what the device alone takes."""
        return self.has_own_gpus or (self.is_cuda and self.is_threaded)

    @property
    def can_capture(self) -> bool:
        """Threads of one process cannot capture graphs side by side; their queued calls say the same."""
        return self.with_graphs and self.is_cuda and not self.is_threaded
