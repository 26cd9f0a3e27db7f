"""The handle of a high-throughput dispatch, and which handles need no more checks."""

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


class KnownHandles:
    """Handles of earlier dispatches, known again by the identity of their tensors, which this does not keep alive.

    Their checks need not be made at each use: a handle is used at least once, often several times, for each dispatch.
    """

    MOST = 256

    def __init__(self) -> None:
        self._refs: dict[int, tuple[weakref.ref[torch.Tensor], ...]] = {}  # by id of send_head

    def add(self, handle: Handle) -> None:
        if len(self._refs) >= self.MOST:  # most of them are dead; those that are not are checked once more
            self._refs.clear()
        self._refs[id(handle.send_head)] = (weakref.ref(handle.send_head), weakref.ref(handle.rank_prefix_matrix),
                                            weakref.ref(handle.recv_src_idx))

    def __contains__(self, handle: Handle) -> bool:
        refs = self._refs.get(id(handle.send_head))
        return (refs is not None and refs[0]() is handle.send_head and refs[1]() is handle.rank_prefix_matrix
                and refs[2]() is handle.recv_src_idx)
