"""Inputs for dispatch and combine: the same on every process, so that each can work out what all others do."""

from dataclasses import dataclass, replace
from typing import Optional

import torch
from reference import Sent

ROUTINGS = ("random", "holes", "duplicates", "one_rank", "one_expert", "spread", "none")
SCALE_LAYOUTS = ("row", "column", "strided", "broadcast")


@dataclass(frozen=True)
class Workload:
    """Shapes and routing of one call on every rank of a group."""

    num_tokens: tuple[int, ...]  # by rank
    hidden: int = 512
    num_topk: int = 3
    experts_per_rank: int = 4
    routing: str = "random"
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    idx_dtype: torch.dtype = torch.int64
    num_scales: int = 0
    scale_dtype: torch.dtype = torch.float32
    scale_layout: str = "row"
    is_bit_noise: bool = False  # x: random bits instead of numbers

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_per_rank

    def generator(self, rank: int, purpose: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 64 + rank) * 16 + purpose)

    def next(self) -> "Workload":
        """The same shapes with other numbers."""
        return replace(self, seed=self.seed + 1)

    def topk_idx(self, rank: int) -> torch.Tensor:
        shape, generator = (self.num_tokens[rank], self.num_topk), self.generator(rank, 1)
        idx = torch.randint(0, self.num_experts, shape, generator=generator)
        if self.routing == "random" and self.num_topk <= self.num_experts and shape[0]:
            # As gates do it: distinct experts.
            idx = torch.rand((shape[0], self.num_experts), generator=generator).topk(self.num_topk).indices
        elif self.routing == "holes":
            idx[torch.rand(shape, generator=generator) < 0.6] = -1
        elif self.routing == "duplicates":
            idx = idx[:, :1].expand(shape).clone()
        elif self.routing == "one_rank":
            idx = idx % self.experts_per_rank + (self.num_ranks - 1) * self.experts_per_rank
        elif self.routing == "one_expert":
            idx = torch.full(shape, self.num_experts // 2)
        elif self.routing == "spread":
            first = torch.arange(shape[0])[:, None] + torch.arange(shape[1])[None] * self.experts_per_rank
            idx = first % self.num_experts
        elif self.routing == "none":
            idx = torch.full(shape, -1)
        return idx.to(self.idx_dtype)

    def x(self, rank: int) -> torch.Tensor:
        return random_rows(self.num_tokens[rank], self.hidden, self.dtype, self.generator(rank, 2), self.is_bit_noise)

    def scales(self, rank: int) -> Optional[torch.Tensor]:
        if self.num_scales == 0:
            return None
        shape = (self.num_tokens[rank], self.num_scales)
        bits = torch.randint(-2**31, 2**31, shape, generator=self.generator(rank, 3)).int()
        return lay_out(bits.view(self.scale_dtype), self.scale_layout)

    def sent(self) -> list[Sent]:
        return [
            Sent(self.x(rank), self.topk_idx(rank),
                 torch.rand((self.num_tokens[rank], self.num_topk), generator=self.generator(rank, 4)),
                 self.scales(rank)) for rank in range(self.num_ranks)
        ]

    def returned(self, num_rows: list[int]) -> list[torch.Tensor]:
        """What the experts of each rank answer."""
        return [
            random_rows(rows, self.combine_hidden, torch.bfloat16, self.generator(rank, 5))
            for rank, rows in enumerate(num_rows)
        ]

    def returned_weights(self, num_rows: list[int]) -> list[torch.Tensor]:
        return [
            torch.randn((rows, self.num_topk), generator=self.generator(rank, 6)) for rank, rows in enumerate(num_rows)
        ]

    def biases(self, rank: int, count: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            random_rows(self.num_tokens[rank], self.combine_hidden, torch.bfloat16, self.generator(rank, 7 + i))
            for i in range(count))

    @property
    def combine_hidden(self) -> int:
        return self.hidden if self.dtype.itemsize == 2 else -(-self.hidden // 8) * 8


def one_token_of(owner: int, num_ranks: int) -> list[Workload]:
    """Nobody else has any."""
    tokens = tuple(int(rank == owner) for rank in range(num_ranks))
    return [Workload(tokens, routing=routing) for routing in ("random", "one_rank", "none")]


def random_rows(rows: int,
                hidden: int,
                dtype: torch.dtype,
                generator: torch.Generator,
                is_bit_noise: bool = False) -> torch.Tensor:
    if is_bit_noise or dtype.itemsize == 1 or not dtype.is_floating_point:
        return torch.randint(0, 256, (rows, hidden * dtype.itemsize), generator=generator).to(torch.uint8).view(dtype)
    return torch.randn((rows, hidden), generator=generator).to(dtype)


def lay_out(scales: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides ('broadcast': one column for all, stride 0)."""
    if layout == "column":
        return scales.t().contiguous().t()
    if layout == "strided":
        wide = torch.zeros((scales.shape[0] * 2, scales.shape[1] * 3), dtype=scales.dtype)
        wide[::2, 1::3] = scales
        return wide[::2, 1::3]
    if layout == "broadcast":
        return scales[:, :1].expand(scales.shape)
    return scales.contiguous()
