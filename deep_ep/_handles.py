"""What a dispatch leaves for combine and for later dispatches with the same routing, as a tuple of tensors: the handle.

Words: R ranks, N nodes of L ranks, T tokens of this rank, M rows that it received, F tokens that it forwards to its
node. Callers count on the order. Within a node:

  rank_prefix_matrix int32 [R, R]; [src][dst]: one past the last row that dst receives from src
  two tensors without data, of which this version has no use
  recv_src_idx int32 [M]; index of the received token at its source
  is_token_in_rank bool [T, R]
  send_head int32 [T, R]; position among the tokens sent to that rank, -1: not sent

Across nodes:

  is_token_in_rank bool [T, R]
  a tensor without data
  send_head int32 [T, R]
  a tensor without data
  rail_prefix int32 [N]; one past the last token that this rank forwards from the nodes up to that one
  rank_prefix_matrix int32 [R, L]; of the ranks of this node alone
  recv_rank_prefix int32 [R]; one past the last row that this rank receives from the ranks up to that one
  recv_src_idx int32 [M]
  send_rail_head int32 [T, N]; position among the tokens sent to that node, -1: not sent, or the own node
  rail_head int32 [F, L]; position of the forwarded token among those of its source at each rank, -1: not there
"""

from typing import Any, NamedTuple, Optional

import torch

from deep_ep import _checks
from deep_ep._checks import KnownTensors
from deep_ep._peers import HandlePart
from deep_ep._session import Session

INT32 = (torch.int32, )
Handle = tuple[torch.Tensor, ...]


class Rail(NamedTuple):
    """Where tokens stand that go to other nodes, or come from there."""

    prefix: torch.Tensor
    send_head: torch.Tensor
    head: torch.Tensor
    recv_rank_prefix: torch.Tensor  # for callers: no later call reads it


class Places(NamedTuple):
    """The tensors that a fresh dispatch writes, and that later calls with its handle read."""

    rank_prefix_matrix: torch.Tensor
    send_head: torch.Tensor
    rail: Optional[Rail]  # None: within a node

    def read_later(self) -> tuple[torch.Tensor, ...]:
        return self[:2] if self.rail is None else (*self[:2], *self.rail[:3])

    def written(self) -> tuple[torch.Tensor, ...]:
        return self[:2] if self.rail is None else (*self[:2], *self.rail)


class Handles:
    """Makes and reads the handles of one Buffer."""

    def __init__(self, session: Session) -> None:
        topology = session.topology
        self._session = session
        self._num_ranks, self._num_nodes = session.num_ranks, topology.num_nodes
        self._ranks_per_node = topology.ranks_per_node
        self._num_fields = 6 if topology.num_nodes == 1 else 10
        self._known = KnownTensors[tuple[int, int]]()  # send_head, rank_prefix_matrix, recv_src_idx: T, M
        self._known_rails = KnownTensors[int]()  # send_rail_head, rail_prefix, rail_head: T
        # In the place of the tensors of a handle that this version has no use for; no data, so all can share it.
        self._unused = torch.empty(session.num_ranks, 0, dtype=torch.int32, device=session.streams.device)

    def new_places(self, num_tokens: int, num_rail_rows: int) -> Places:
        """For a fresh dispatch. `num_rail_rows`: that rail_head is to hold, 0 where nobody knows yet."""
        make, num_ranks, num_nodes = self._session.empty[torch.int32], self._num_ranks, self._num_nodes
        rail = None
        if num_nodes > 1:
            rail = Rail(make(num_nodes), make(num_tokens, num_nodes), make(num_rail_rows, self._ranks_per_node),
                        make(num_ranks))
        return Places(make(num_ranks, self._ranks_per_node), make(num_tokens, num_ranks), rail)

    def make(self, places: Places, is_token_in_rank: torch.Tensor, recv_src_idx: torch.Tensor, num_tokens: int,
             num_rows: int) -> Handle:
        matrix, send_head, rail = places
        unused = self._unused
        self._known.add((num_tokens, num_rows), send_head, matrix, recv_src_idx)
        if rail is None:
            return matrix, unused, unused, recv_src_idx, is_token_in_rank, send_head
        self._known_rails.add(num_tokens, rail.send_head, rail.prefix, rail.head)
        return (is_token_in_rank, unused, send_head, unused, rail.prefix, matrix, rail.recv_rank_prefix, recv_src_idx,
                rail.send_head, rail.head)

    def read(self, handle: Any) -> tuple[Places, int, int]:
        """What is in the handle of a dispatch, also after a trip through save_for_backward; T and M."""
        if not isinstance(handle, (tuple, list)):
            raise TypeError(f"handle must be the tuple that dispatch returned, got {type(handle).__name__}")
        if len(handle) != self._num_fields:
            raise ValueError(f"handle must have {self._num_fields} tensors, got {len(handle)}")
        rail = None
        if len(handle) == 6:
            matrix, _, _, recv_src_idx, _, send_head = handle
        else:
            _, _, send_head, _, prefix, matrix, recv_rank_prefix, recv_src_idx, send_rail_head, rail_head = handle
            rail = Rail(prefix, send_rail_head, rail_head, recv_rank_prefix)
        known = self._known.find(send_head, matrix, recv_src_idx)
        if known is None:
            known = self._check(handle, matrix, send_head, recv_src_idx)
        if rail is not None and self._known_rails.find(rail.send_head, rail.prefix, rail.head) != known[0]:
            self._check_rail(rail, known[0])
        return Places(matrix, send_head, rail), known[0], known[1]

    def fact(self, places: Places) -> dict[str, Any]:
        """What tells a handle from others, for the comparison of calls. Waits for the device."""
        matrix = places.rank_prefix_matrix.tolist()
        if places.rail is None:
            return {"the rank_prefix_matrix of the handle": matrix}
        topology = self._session.topology
        sent = (places.send_head >= 0).sum(0).tolist()
        return {"the dispatch of the handle": HandlePart(sent, topology.nodes[topology.node][0], matrix)}

    def _check(self, handle: Any, matrix: torch.Tensor, send_head: torch.Tensor,
               recv_src_idx: torch.Tensor) -> tuple[int, int]:
        """T and M."""
        device, num_ranks = self._session.streams.device, self._num_ranks
        places = (0, 3, 5) if len(handle) == 6 else (5, 7, 2)
        for place, name, shape in zip(places, ("rank_prefix_matrix", "recv_src_idx", "send_head"),
                                      ((num_ranks, self._ranks_per_node), (None, ), (None, num_ranks))):
            _checks.check_tensor(f"handle[{place}] ({name})", handle[place], device, shape, INT32)
        known = send_head.shape[0], recv_src_idx.shape[0]
        self._known.add(known, send_head, matrix, recv_src_idx)
        return known

    def _check_rail(self, rail: Rail, num_tokens: int) -> None:
        device, num_nodes = self._session.streams.device, self._num_nodes
        _checks.check_tensor("handle[4] (rail_prefix)", rail.prefix, device, (num_nodes, ), INT32)
        _checks.check_tensor("handle[8] (send_rail_head)", rail.send_head, device, (num_tokens, num_nodes), INT32)
        _checks.check_tensor("handle[9] (rail_head)", rail.head, device, (None, self._ranks_per_node), INT32)
        self._known_rails.add(num_tokens, rail.send_head, rail.prefix, rail.head)
