"""A group of one, for what needs a Buffer but no peers."""

from typing import Any

import torch
from utils import device

from deep_ep import Buffer


class SingleRankComm:
    """mpi4py's interface for a single rank."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def allgather(self, item: Any) -> list[Any]:
        return [item]


def single_rank_buffer(num_nvl_bytes: int = 1 << 20, **options: Any) -> Buffer:
    return Buffer(None, num_nvl_bytes, comm=SingleRankComm(), **options)


def single_rank_dispatch(buffer: Buffer, num_tokens: int = 5, hidden: int = 16, **options: Any) -> Any:
    """dispatch of `num_tokens` ones among 4 experts, top-2, with options changed or added."""
    topk_idx = torch.arange(num_tokens * 2, device=device()).reshape(-1, 2) % 4
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    arguments: dict[str, Any] = {
        "x": torch.ones((num_tokens, hidden), dtype=torch.bfloat16, device=device()),
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": topk_idx,
        "topk_weights": torch.ones(topk_idx.shape, device=device()),
        **options
    }
    return buffer.dispatch(**arguments)
