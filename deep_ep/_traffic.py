"""What a call moves, for even routing: tokens over the rail and over NVLink, and their bytes. Arithmetic alone.

Counts are those of one rank in one direction; every rank has the same. A token crosses the rail once for each other
node that has one of its experts, and NVLink once for each rank there that is not its forwarder (within a node: not the
source). Sizes of slots come from the layouts that the kernels use. docs/performance/model.md explains all of it.
"""

import math
from dataclasses import dataclass

import deep_ep_cpp

FP8, BF16 = "fp8", "bf16"
FORMATS = (FP8, BF16)
DISPATCH, COMBINE = "dispatch", "combine"
FP8_GROUP = 128  # channels with one scale
BF16_BYTES = 2
FLAG_BYTES = 8
BULK_BYTES = 16  # sizes of puts are multiples of it
RAIL_WORDS = 2  # `entered` and `ended`, to each rail peer


@dataclass(frozen=True)
class Shape:
    """One call. `limit_nodes`: a token's experts lie in at most so many nodes; 0: anywhere."""

    num_tokens: int  # of each rank
    hidden: int
    num_topk: int
    num_experts: int  # of all ranks
    limit_nodes: int = 0


@dataclass(frozen=True)
class Nodes:
    """How the ranks are placed."""

    num_nodes: int
    ranks_per_node: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


def share_reached(num_experts: int, num_here: int, num_topk: int) -> float:
    """The probability that `num_topk` different experts of `num_experts`, each as likely, touch a given `num_here`."""
    return 1.0 - math.comb(num_experts - num_here, num_topk) / math.comb(num_experts, num_topk)


def _reached(shape: Shape, nodes: Nodes, num_here: int, num_places: int) -> float:
    """Places of `num_here` experts each that a token reaches, of `num_places` in the nodes that it may choose."""
    limit = min(shape.limit_nodes or nodes.num_nodes, nodes.num_nodes)
    num_experts = shape.num_experts // nodes.num_nodes * limit
    return num_places * limit * share_reached(num_experts, num_here, shape.num_topk)


def distinct_nodes(shape: Shape, nodes: Nodes) -> float:
    """Nodes that a token reaches, the own one among them: an expectation."""
    return _reached(shape, nodes, shape.num_experts // nodes.num_nodes, 1)


def distinct_ranks(shape: Shape, nodes: Nodes) -> float:
    """Ranks that a token reaches, the own one among them: an expectation."""
    return _reached(shape, nodes, shape.num_experts // nodes.num_ranks, nodes.ranks_per_node)


def row_bytes(hidden: int, kind: str) -> tuple[int, int]:
    """Of a token's row; and scales that go with it."""
    return (hidden, hidden // FP8_GROUP) if kind == FP8 else (BF16_BYTES * hidden, 0)


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one call, in one direction: what it sends in a dispatch, what it receives in a combine."""

    rail_tokens: float  # over the rail
    rail_slot: int  # bytes of each
    rail_bytes: float  # with counts, flags and padding: what the engine is asked to carry
    nvlink_rows: float
    nvlink_slot: int
    nvlink_bytes: float
    rows: float  # that end at a rank, from everywhere
    sm_bytes: float  # that the SMs of a rank move, what stays in it included

    @property
    def rail_payload_bytes(self) -> float:
        return self.rail_tokens * self.rail_slot


def traffic(shape: Shape, nodes: Nodes, operation: str, kind: str, chunk_bytes: int) -> Traffic:
    """`kind`: of rows in a dispatch; a combine sends bfloat16. `chunk_bytes`: of a put between nodes."""
    is_combine = operation == COMBINE
    row, num_scales = row_bytes(shape.hidden, BF16 if is_combine else kind)
    rail_slot, nvlink_slot, counts = deep_ep_cpp.wire_sizes(row_bytes=row,
                                                            num_topk=shape.num_topk,
                                                            num_scales=num_scales,
                                                            ranks_per_node=nodes.ranks_per_node,
                                                            num_local_experts=shape.num_experts // nodes.num_ranks,
                                                            is_combine=is_combine)
    num_peers = nodes.num_nodes - 1
    rail_tokens = shape.num_tokens * distinct_nodes(shape, nodes) * num_peers / nodes.num_nodes
    rows = shape.num_tokens * distinct_ranks(shape, nodes)
    nvlink_rows = rows * (nodes.ranks_per_node - 1) / nodes.ranks_per_node
    per_peer = FLAG_BYTES * RAIL_WORDS + (0 if is_combine else counts + FLAG_BYTES)
    num_chunks = math.ceil(rail_tokens * rail_slot / chunk_bytes) if num_peers else 0
    rail_bytes = rail_tokens * rail_slot + num_peers * per_peer + num_chunks * FLAG_BYTES
    return Traffic(rail_tokens, rail_slot, rail_bytes, nvlink_rows, nvlink_slot, nvlink_rows * nvlink_slot, rows,
                   rows * nvlink_slot + rail_tokens * rail_slot)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // BULK_BYTES) * BULK_BYTES


def low_latency_bytes(shape: Shape, nodes: Nodes, operation: str, kind: str) -> tuple[float, float]:
    """Bytes that leave a rank over the rail and over NVLink in a low-latency call without a hook: a table for each
    rank, a row for each token and rank, and their flags. (docs/protocols/low_latency_nodes.md, messages 2f to 6f)"""
    is_combine = operation == COMBINE
    row, num_scales = row_bytes(shape.hidden, BF16 if is_combine else kind)
    copies = shape.num_tokens * distinct_ranks(shape, nodes)
    entries = shape.num_tokens * shape.num_topk
    table = _round_up(16 + 4 * entries + 4 * (entries if is_combine else shape.num_experts)) + FLAG_BYTES
    slot = _round_up(row + 4 * num_scales) + FLAG_BYTES
    num_others, num_neighbours = nodes.num_ranks - nodes.ranks_per_node, nodes.ranks_per_node - 1
    over_rail = copies * num_others / nodes.num_ranks * slot + num_others * (table + FLAG_BYTES)
    return over_rail, copies * num_neighbours / nodes.num_ranks * slot + num_neighbours * (table + FLAG_BYTES)
