"""The handle of a high-throughput dispatch, and which tensors need no more checks."""

import weakref
from typing import NamedTuple

import torch


class Handle(NamedTuple):
    """What a dispatch leaves for combine and for later dispatches with the same routing (R ranks, N tokens, M rows)."""

    rank_prefix_matrix: torch.Tensor  # int32 [R, R]; [src][dst]: one past the last row that dst receives from src
    channel_prefix_matrix: torch.Tensor  # int32 [R, 0]: kept for its place in the tuple
    recv_channel_prefix_matrix: torch.Tensor  # int32 [R, 0]: kept for its place in the tuple
    recv_src_idx: torch.Tensor  # int32 [M]; index of the received token at its source
    is_token_in_rank: torch.Tensor  # bool [N, R]
    send_head: torch.Tensor  # int32 [N, R]; position among the tokens sent to that rank, -1: not sent


class KnownTensors:
    """Tensors that were checked together or made here, known again by their identity; this does not keep them alive.

    A layout is used once for each dispatch and a handle at least once, and the checks of either take 2 us.
    """

    MOST = 256

    def __init__(self) -> None:
        self._refs: dict[int, tuple[weakref.ref[torch.Tensor], ...]] = {}  # by id of the first tensor

    def add(self, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> None:
        if len(self._refs) >= self.MOST:  # most of them are dead; those that are not are checked once more
            self._refs.clear()
        self._refs[id(first)] = (weakref.ref(first), weakref.ref(second), weakref.ref(third))

    def has(self, first: object, second: object, third: object) -> bool:
        refs = self._refs.get(id(first))
        return refs is not None and refs[0]() is first and refs[1]() is second and refs[2]() is third
