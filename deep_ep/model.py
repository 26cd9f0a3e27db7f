"""What a call will take on machines that are not there: bytes for each link, what bounds it, the SMs that it needs.

    python -m deep_ep model --nodes 2 --ranks-per-node 8 --nic-gbps 400

A call of the high-throughput mode takes

    latency + first chunk + max(rail bytes / (0.9 * NIC), NVLink bytes / (share * NVLink), bytes / (SMs * rate of one))

without the rail's parts inside a node. Latencies, shares and rates are those of one node of two H200, measured and
fitted (tools/model_fit.py); 0.9 of the NIC is what every library reaches from four nodes on. What it says of several
nodes is a prediction: nothing here has run on a NIC. docs/performance/model.md has its errors on figures that others
published.

Counts are those of one rank in one direction; every rank has the same. A token crosses the rail once for each other
node that has one of its experts, and NVLink once for each rank there that is not its forwarder (within a node: not the
source). Sizes of slots come from the layouts that the kernels use.
"""

import functools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Optional

import deep_ep_cpp
from deep_ep import _env, calibrate
from deep_ep._high_throughput import LEAST_SUMS_SMS, LEAST_SUMS_TOKENS, MOST_SUMS_TOKENS
from deep_ep_cpp import InvalidArgument

FP8, BF16 = "fp8", "bf16"
DISPATCH, COMBINE = "dispatch", "combine"
FP8_GROUP = 128  # channels with one scale
BF16_BYTES = 2
FLAG_BYTES = 8
BULK_BYTES = 16  # sizes of puts are multiples of it
RAIL_WORDS = 2  # `entered` and `ended`, to each rail peer
RAIL_SHARE = 0.9  # of the NIC's rate
NVLINK_GB_PER_S = 340.0  # what leaves a GPU of 18 links when all copy to all
MOST_SMS = 20
OPERATIONS = ((DISPATCH, FP8), (DISPATCH, BF16), (COMBINE, BF16))
HIGH_THROUGHPUT, LOW_LATENCY = "high-throughput", "low-latency"
SCALING_RANKS = tuple(1 << i for i in range(1, 10))
LARGEST_NODE = 8
LENDING_PAIR = 2  # ranks of a group that lend each other the sums of a combine

# What a call moves, for even routing.


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


def low_latency_bytes(shape: Shape, nodes: Nodes, operation: str, kind: str, shares_rows: bool) -> tuple[float, float]:
    """Bytes that leave a rank over the rail and over NVLink in a low-latency call without a hook: a table for each
    rank, a row for each token and rank, and their flags. (docs/protocols/low_latency_nodes.md, messages 2f to 6f)

    `shares_rows`: a row of a dispatch crosses the rail once for each node, and its other ranks load it from the one
    that has it; of what leaves a rank over NVLink a part is then rows of other nodes.
    """
    is_combine = operation == COMBINE
    row, num_scales = row_bytes(shape.hidden, BF16 if is_combine else kind)
    copies = shape.num_tokens * distinct_ranks(shape, nodes)
    entries = shape.num_tokens * shape.num_topk
    table = _round_up(16 + 4 * entries + 4 * (entries if is_combine else shape.num_experts)) + FLAG_BYTES
    slot = _round_up(row + 4 * num_scales) + FLAG_BYTES
    num_others, num_neighbours = nodes.num_ranks - nodes.ranks_per_node, nodes.ranks_per_node - 1
    far_copies, near_copies = copies * num_others / nodes.num_ranks, copies * num_neighbours / nodes.num_ranks
    if shares_rows and not is_combine:
        near_copies += far_copies * num_neighbours / nodes.ranks_per_node
        far_copies = shape.num_tokens * distinct_nodes(shape, nodes) * (nodes.num_nodes - 1) / nodes.num_nodes
    words = table + FLAG_BYTES
    return far_copies * slot + num_others * words, near_copies * slot + num_neighbours * words


# What that takes.


@dataclass(frozen=True)
class NodeCost:
    """An operation inside a node."""

    latency_us: float
    link_share: float  # of the ceiling of NVLink
    sm_gb_per_s: float

    def cost(self, nvlink_gb_per_s: float) -> calibrate.Cost:
        return calibrate.Cost(self.latency_us, self.link_share * nvlink_gb_per_s, self.sm_gb_per_s)


# Fitted by tools/model_fit.py to benchmarks of two H200 of 2026-11-28; shares are of NVLINK_GB_PER_S. Outputs of a
# dispatch are lent; rows of a combine go through slots, but between two ranks, which lend each other their sums.
NODE_COSTS = {DISPATCH: NodeCost(15.5, 0.98, 49.6), COMBINE: NodeCost(20.1, 0.74, 30.2)}
PAIR_COMBINE_COST = NodeCost(20.1, 0.95, 36.0)
LOW_LATENCY_COSTS = {DISPATCH: NodeCost(14.7, 0.72, 0.0), COMBINE: NodeCost(13.7, 0.72, 0.0)}


def lends_sums(num_ranks: int, num_tokens: int, num_sms: int) -> bool:
    """Are the rows of such a combine added where they are summed? Those of all others go through slots."""
    return (num_ranks == LENDING_PAIR and LEAST_SUMS_TOKENS <= num_tokens <= MOST_SUMS_TOKENS
            and num_sms >= LEAST_SUMS_SMS)


def node_cost(operation: str, num_ranks: int, num_tokens: int, num_sms: int) -> NodeCost:
    """Of the high-throughput mode, in a group of so many ranks."""
    has_lent_sums = operation == COMBINE and lends_sums(num_ranks, num_tokens, num_sms)
    return PAIR_COMBINE_COST if has_lent_sums else NODE_COSTS[operation]


@dataclass(frozen=True)
class Engine:
    """What carries bytes between nodes."""

    latency_us: float  # of a small message, from GPU to GPU
    chunk_bytes: int  # that it likes best on a NIC of 400 Gb/s; as csrc/rail has it
    is_scaled: bool = True  # by the rate of the NIC; see deep_ep._rail.rate


ENGINES = {
    "gpu": Engine(6.5, 128 << 10),  # NVSHMEM where the GPU posts (IBGDA), or reaches the memory
    "proxy": Engine(10.0, 512 << 10),  # NVSHMEM with a proxy thread
    "fencing-proxy": Engine(15.0, 1 << 20),  # and a fence before each signal
    "host": Engine(20.0, 256 << 10, is_scaled=False),  # TCP
}


@dataclass(frozen=True)
class Links:
    """Rates in one direction, of one rank, in 10^9 bytes a second."""

    nic_gb_per_s: float  # 0: there is one node
    nvlink_gb_per_s: float = NVLINK_GB_PER_S
    engine: str = "gpu"
    shares_rows: bool = False  # low latency: ranks may read rows in their neighbours' windows, see low_latency_bytes

    @property
    def chunk_bytes(self) -> int:
        engine = ENGINES[self.engine]
        return deep_ep_cpp.plan_chunk_bytes(engine.chunk_bytes, self.nic_gb_per_s if engine.is_scaled else 0.0)

    @property
    def rail_gb_per_s(self) -> float:
        return RAIL_SHARE * self.nic_gb_per_s


@dataclass(frozen=True)
class Phase:
    """A part of a call that goes on beside the others."""

    name: str
    num_bytes: float
    gb_per_s: float

    @property
    def time_us(self) -> float:
        return self.num_bytes / self.gb_per_s / 1e3 if self.num_bytes else 0.0


@dataclass(frozen=True)
class Prediction:
    """Of one call, on the rank whose phases they are."""

    operation: str
    kind: str
    phases: tuple[Phase, ...]
    fixed_us: float  # latencies and the first chunk
    num_sms: int  # 0: all
    chunk_bytes: int  # 0: no rail

    @property
    def bottleneck(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.time_us)

    @property
    def time_us(self) -> float:
        return self.fixed_us + self.bottleneck.time_us

    def report(self) -> dict[str, Any]:
        """As JSON."""
        phases = [{**asdict(phase), "time_us": phase.time_us} for phase in self.phases]
        return {**asdict(self), "phases": phases, "bottleneck": self.bottleneck.name, "time_us": self.time_us}


LEAST_SMS = 8  # across nodes, whatever the model says: nothing was measured there


def _enough_sms(nodes: Nodes, most: int, time_us: Callable[[int], float]) -> int:
    enough = calibrate.enough_sms(most, time_us)
    return enough if nodes.num_nodes == 1 else min(most, max(enough, LEAST_SMS))


def _phases(moved: Traffic, nodes: Nodes, links: Links, cost: calibrate.Cost, num_sms: int) -> tuple[Phase, ...]:
    phases = [Phase("NVLink", moved.nvlink_bytes, cost.link_gb_per_s),
              Phase("SMs", moved.sm_bytes, num_sms * cost.sm_gb_per_s)]  # yapf: disable
    rail = [Phase("rail", moved.rail_bytes, links.rail_gb_per_s)] if nodes.num_nodes > 1 else []
    return tuple(rail + phases)


def _rail_fixed_us(links: Links, chunk_bytes: int) -> float:
    """The first chunk has the rail for itself, and the last one NVLink."""
    chunk_us = chunk_bytes / 1e3 * (1 / links.rail_gb_per_s + 1 / links.nvlink_gb_per_s)
    return ENGINES[links.engine].latency_us + chunk_us


def predict(shape: Shape,
            nodes: Nodes,
            links: Links,
            operation: str,
            kind: str,
            most_sms: int = MOST_SMS,
            num_sms: Optional[int] = None) -> Prediction:
    """A call of the high-throughput mode whose counts are known. num_sms: None: as few as do not make it slower."""
    chunk_bytes = links.chunk_bytes if nodes.num_nodes > 1 else 0
    moved = traffic(shape, nodes, operation, kind, chunk_bytes)
    rail_us = _rail_fixed_us(links, chunk_bytes) if nodes.num_nodes > 1 else 0.0

    def with_sms(count: int) -> Prediction:
        cost = node_cost(operation, nodes.num_ranks, shape.num_tokens, count).cost(links.nvlink_gb_per_s)
        fixed_us = cost.latency_us + rail_us
        return Prediction(operation, kind, _phases(moved, nodes, links, cost, count), fixed_us, count, chunk_bytes)

    return with_sms(num_sms or _enough_sms(nodes, most_sms, lambda count: with_sms(count).time_us))


def predict_low_latency(shape: Shape, nodes: Nodes, links: Links, operation: str, kind: str) -> Prediction:
    """Both phases of a low-latency call, without a hook."""
    rail_bytes, nvlink_bytes = low_latency_bytes(shape, nodes, operation, kind, links.shares_rows)
    cost = LOW_LATENCY_COSTS[operation].cost(links.nvlink_gb_per_s)
    phases = [Phase("NVLink", nvlink_bytes, cost.link_gb_per_s)]
    fixed_us = cost.latency_us
    if nodes.num_nodes > 1:
        phases.insert(0, Phase("rail", rail_bytes, links.rail_gb_per_s))
        fixed_us += ENGINES[links.engine].latency_us
    return Prediction(operation, kind, tuple(phases), fixed_us, 0, 0)


def predict_all(mode: str, shape: Shape, nodes: Nodes, links: Links, most_sms: int = MOST_SMS) -> list[Prediction]:
    """Each operation and format of a mode."""
    if mode == LOW_LATENCY:
        return [predict_low_latency(shape, nodes, links, *operation) for operation in OPERATIONS]
    return [predict(shape, nodes, links, *operation, most_sms) for operation in OPERATIONS]


def two_terms_us(shape: Shape, nodes: Nodes, links: Links, operation: str, kind: str) -> float:
    """The bound that any library has: bytes of rows and scales alone, at 0.9 of the NIC or all of NVLink."""
    row, num_scales = row_bytes(shape.hidden, BF16 if operation == COMBINE else kind)
    moved = traffic(shape, nodes, operation, kind, links.chunk_bytes)
    bytes_of_row = row + 4 * num_scales
    rail = Phase("rail", moved.rail_tokens * bytes_of_row, links.rail_gb_per_s)
    return max(rail.time_us, Phase("NVLink", moved.nvlink_rows * bytes_of_row, links.nvlink_gb_per_s).time_us)


# The choice of Buffers


@dataclass(frozen=True)
class CostsAcrossNodes(calibrate.CostModel):
    """SM budgets of calls between nodes, where nobody has calibrated."""

    nodes: Nodes
    links: Links

    def budget(self, operation: str, most: int, num_bytes: int, num_ranks: int) -> int:
        """SMs for a call that moves so many bytes of rows, evenly over all ranks; at most `most`."""
        del num_ranks  # they are those of `nodes`
        return _budget_across_nodes(self.nodes, self.links, operation, most, num_bytes)


# What calls have where nobody says it: the host knows neither experts nor, in a combine, top-k when it chooses.
USUAL_TOPK, USUAL_EXPERTS = 8, 8  # experts of a rank


@functools.lru_cache(maxsize=4096)
def _budget_across_nodes(nodes: Nodes, links: Links, operation: str, most: int, num_bytes: int) -> int:
    shape = Shape(1, 0, USUAL_TOPK, USUAL_EXPERTS * nodes.num_ranks)
    rows = distinct_ranks(shape, nodes)
    share_on_rail = distinct_nodes(shape, nodes) * (nodes.num_nodes - 1) / nodes.num_nodes / rows
    nvlink_bytes = num_bytes * (nodes.ranks_per_node - 1) / nodes.ranks_per_node
    rail_bytes = num_bytes * share_on_rail
    cost = NODE_COSTS[operation].cost(links.nvlink_gb_per_s)
    fixed_us = cost.latency_us + _rail_fixed_us(links, links.chunk_bytes)
    bare = replace(cost, latency_us=0.0)
    rail_us = rail_bytes / links.rail_gb_per_s / 1e3
    return _enough_sms(nodes, most,
                       lambda count: fixed_us + max(rail_us, bare.time_us(count, num_bytes + rail_bytes, nvlink_bytes)))


def costs_across_nodes(num_nodes: int, ranks_per_node: int, rail_gb_per_s: float) -> CostsAcrossNodes:
    return CostsAcrossNodes({}, Nodes(num_nodes, ranks_per_node), Links(rail_gb_per_s))


# Scaling


def placed(num_ranks: int) -> Nodes:
    """Nodes of eight, or one that is smaller."""
    per_node = min(num_ranks, LARGEST_NODE)
    return Nodes(num_ranks // per_node, per_node)


def scaling(mode: str, shape: Shape, links: Links, most_sms: int = MOST_SMS) -> dict[str, Any]:
    """Predictions from 2 to 512 ranks, as a report that tools/render_benchmarks.py --plots draws. All ranks
    have the same number of experts, so there are more of them where they do not divide."""
    rows = []
    for num_ranks in SCALING_RANKS:
        enough = replace(shape, num_experts=-(-shape.num_experts // num_ranks) * num_ranks)
        rows += [{"num_ranks": num_ranks, "num_experts": enough.num_experts, **prediction.report()}
                 for prediction in predict_all(mode, enough, placed(num_ranks), links, most_sms)]  # yapf: disable
    return {"benchmark": "model", "mode": mode, "shape": asdict(shape), "links": asdict(links), "rows": rows}


# The command


def links_of(args: Namespace) -> Links:
    """From the options, and where they are silent from sysfs. Raises InvalidArgument where that does not tell."""
    shares_rows = args.row_for_each_node or args.engine == "host"
    rest = (args.nvlink_gb_per_s, args.engine, shares_rows)
    if args.nodes == 1 and not args.scaling:
        return Links(0.0, *rest)
    if args.nic_gbps is not None:
        return Links(args.nic_gbps / _env.BITS_PER_BYTE, *rest)
    try:
        total = _env.nic_gb_per_s(args.nics)
    except ValueError as error:
        raise InvalidArgument(f"--nics: {error}") from error
    if total is None:
        raise InvalidArgument("this machine has no RDMA NIC that is up and tells its rate: give --nic-gbps, the rate "
                              "of a rank's NICs in Gb/s (400 for one ConnectX-7 a GPU)")
    num_sharing = LARGEST_NODE if args.scaling else args.ranks_per_node
    return Links(total / num_sharing, *rest)


def lines_of(predictions: Iterable[Prediction]) -> list[str]:
    """A table for people."""
    lines = []
    for one in predictions:
        budget = f"{one.num_sms} SMs" if one.num_sms else "all SMs"
        chunks = f", chunks of {one.chunk_bytes >> 10} KiB" if one.chunk_bytes else ""
        lines.append(f"{one.operation} {one.kind.upper()}: {one.time_us:.0f} us with {budget}{chunks}; "
                     f"bound by {one.bottleneck.name}")
        fixed = "latencies, first chunk" if one.chunk_bytes else "latencies"
        lines.append(f"  {fixed:<24}{'':>10}{'':>12}{one.fixed_us:>9.1f} us")
        lines += [f"  {phase.name:<24}{phase.num_bytes / 1e6:>7.2f} MB{phase.gb_per_s:>7.0f} GB/s"
                  f"{phase.time_us:>9.1f} us" for phase in one.phases]  # yapf: disable
    return lines


def _check_shape(shape: Shape, nodes: Nodes) -> None:
    if shape.hidden % FP8_GROUP:
        raise InvalidArgument(
            f"--hidden must be a multiple of {FP8_GROUP}, the elements of an FP8 scale, got {shape.hidden}")
    in_reach = shape.num_experts
    if shape.limit_nodes:
        in_reach = shape.num_experts // nodes.num_nodes * min(shape.limit_nodes, nodes.num_nodes)
    if shape.num_topk > in_reach:
        raise InvalidArgument(
            f"--topk must be at most the {in_reach} experts that a token may reach, got {shape.num_topk}")


def run(args: Namespace) -> int:
    """The exit status."""
    shape = Shape(args.tokens, args.hidden, args.topk, args.experts, args.limit_nodes)
    nodes = Nodes(args.nodes, args.ranks_per_node)
    try:
        if shape.num_experts % nodes.num_ranks and not args.scaling:
            raise InvalidArgument(f"--experts must be a multiple of the {nodes.num_ranks} ranks, got {args.experts}")
        _check_shape(shape, nodes)
        links = links_of(args)
    except InvalidArgument as error:
        print(error, file=sys.stderr)
        return 1
    if args.scaling:
        content: Any = scaling(args.mode, shape, links, args.most_sms)
        lines = [f"{row['num_ranks']:>4} ranks  {row['operation']:<9}{row['kind'].upper():<5}{row['time_us']:>8.0f} us"
                 f"  {row['bottleneck']}" for row in content["rows"]]  # yapf: disable
    else:
        predictions = predict_all(args.mode, shape, nodes, links, args.most_sms)
        content = {"shape": asdict(shape), "nodes": asdict(nodes), "links": asdict(links),
                   "predictions": [prediction.report() for prediction in predictions]}  # yapf: disable
        title = (f"{args.mode}, {nodes.num_nodes} x {nodes.ranks_per_node} ranks, NIC {links.nic_gb_per_s:g} GB/s, "
                 f"NVLink {links.nvlink_gb_per_s:g} GB/s, for each rank and direction (a prediction)")
        lines = [title, *lines_of(predictions)]
    text = json.dumps(content, indent=2) if args.json else "\n".join(lines)
    if args.save is not None:
        try:
            Path(args.save).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"--save: {error}", file=sys.stderr)
            return 1
    print(text)
    return 0
