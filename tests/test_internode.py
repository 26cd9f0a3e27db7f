"""Dispatch and combine across nodes, against the reference.

    pytest tests/test_internode.py
    python tests/test_internode.py --num-processes 4 --ranks-per-node 2 --num-tokens 128 --hidden 7168
    torchrun --nnodes 2 --nproc_per_node 8 ... tests/test_internode.py --num-tokens 4096

Nodes are virtual ones here (DEEP_EP_RANKS_PER_NODE), joined over loopback, or over NVSHMEM where
DEEP_EP_RAIL=nvshmem asks for it. Under torchrun they are the machines.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import failure_cases as failures
import host_failure_cases as host_failures
import internode_cases as cases
import intranode_cases as same_cases
import lending_cases as lending
import modes
import pressure
import pytest
import torch
from namespaces import Namespaces
from pending_call import How
from test_intranode import even, uneven
from utils import BUFFER_TIMEOUT_S, Pool, device
from workload import ROUTINGS, SCALE_LAYOUTS, Workload, one_token_of

FP8 = torch.float8_e4m3fn
HAS_TCP = os.environ.get("DEEP_EP_RAIL") != "nvshmem"


@dataclass
class Nodes:
    """Pools whose processes are virtual nodes of one rank, and of two."""

    of_one: Pool
    of_two: Pool

    def close(self) -> None:
        self.of_one.close()
        self.of_two.close()

    def pool(self, topology: str) -> tuple[Pool, int]:
        """The processes for "nodes x ranks", and how many."""
        num_nodes, ranks_per_node = map(int, topology.split("x"))
        num_gpus = torch.cuda.device_count() if device().type == "cuda" else 1
        if not HAS_TCP and num_nodes * ranks_per_node % num_gpus != 0:
            pytest.skip("NVSHMEM wants as many ranks on each GPU")
        return self.of_one if ranks_per_node == 1 else self.of_two, num_nodes * ranks_per_node


def virtual_nodes(ranks_per_node: int, **environment: str) -> dict[str, str]:
    return {"DEEP_EP_RANKS_PER_NODE": str(ranks_per_node), "DEEP_EP_RAIL_INTERFACE": "lo", **environment}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with contextlib.closing(Nodes(Pool(3, virtual_nodes(1)), Pool(8, virtual_nodes(2)))) as made:
        yield made


# Shapes


@pytest.mark.parametrize("topology", ["2x1", "3x1", "2x2", "3x2", "4x2"])
def test_topology(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(same_cases.whole_trip, num_ranks, Workload(uneven(num_ranks), seed=num_ranks), None, 1)
    pool.run(same_cases.reused_handle, num_ranks, Workload(uneven(num_ranks), hidden=264, num_topk=4, seed=num_ranks))


def test_any_hidden_size(two: Pool) -> None:
    hiddens = (8, 24, 120, 520, 1000, 2880, 7168)
    two.run(same_cases.trips, 4, [Workload((5, 3, 4, 0), hidden=hidden, seed=hidden) for hidden in hiddens])


def test_any_topk_and_expert_count(two: Pool) -> None:
    """Also more than 32 entries, and more than there are experts."""
    two.run(same_cases.trips, 4, [
        Workload((7, 9, 1, 4), 64, topk, experts, seed=topk)
        for topk, experts in ((1, 1), (2, 3), (8, 64), (11, 4), (33, 2))
    ])


@pytest.mark.parametrize("has_topk", [True, False])
def test_topk_dtypes_and_none(two: Pool, has_topk: bool) -> None:
    for idx_dtype in (torch.int32, torch.int64):
        work = Workload(uneven(4), idx_dtype=idx_dtype, routing="holes")
        two.run(same_cases.whole_trip, 4, work, How(has_topk=has_topk))


def test_routings(two: Pool) -> None:
    """-1, duplicates, all tokens to one rank of the last node, all nodes, nothing at all."""
    two.run(same_cases.trips, 6, [Workload((20, 1, 0, 33, 8, 2), routing=routing) for routing in ROUTINGS])


def test_expert_alignment(two: Pool) -> None:
    for alignment in (2, 128):
        two.run(same_cases.whole_trip, 4, Workload((9, 14, 2, 5)), How(expert_alignment=alignment))


def test_every_subset_of_empty_ranks(two: Pool) -> None:
    two.run(same_cases.empty_subsets, 4, Workload((5, 2, 9, 1), hidden=64))


@pytest.mark.parametrize("owner", [0, 3])
def test_one_token_in_total(two: Pool, owner: int) -> None:
    two.run(same_cases.trips, 4, one_token_of(owner, num_ranks=4))


# Payloads


def test_random_bits_arrive_exactly(two: Pool) -> None:
    two.run(same_cases.raw_rows, 4, 512, "bfloat16")
    for dtype_name in ("uint8", "float32", "float64"):
        two.run(same_cases.raw_rows, 4, 48, dtype_name)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_scales_of_any_layout(two: Pool, scale_dtype: torch.dtype) -> None:
    two.run(same_cases.one_byte_trip, 4, [
        Workload((6, 0, 9, 1), hidden, 3, 4, "random", num_scales, FP8, torch.int64, num_scales, scale_dtype, layout)
        for layout in SCALE_LAYOUTS for hidden, num_scales in ((128, 1), (2880, 23))
    ])


def test_scales_without_topk(two: Pool) -> None:
    two.run(same_cases.scaled_trip, 4, Workload((6, 4, 3, 3), dtype=torch.uint8, num_scales=3), How(has_topk=False))


# Modes


@pytest.mark.parametrize("topology", ["2x1", "2x2"])
def test_worst_case(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(same_cases.worst_case_tail, num_ranks, Workload(uneven(num_ranks, 15), hidden=64))
    pool.run(same_cases.cached_after_worst_case, num_ranks, Workload(uneven(num_ranks, 11)))
    work = Workload(uneven(num_ranks, 9), dtype=FP8, num_scales=4)
    pool.run(same_cases.scaled_trip, num_ranks, work, How(worst_factor=2))


def test_too_few_worst_rows_is_an_error(two: Pool) -> None:
    messages = two.run(failures.too_few_worst_rows, 4)
    assert any("num_worst_tokens" in message for message in messages), messages


@pytest.mark.parametrize("num_biases", [0, 2])
def test_combine_adds_bias(two: Pool, num_biases: int) -> None:
    two.run(same_cases.whole_trip, 4, Workload((9, 0, 17, 3), hidden=264), None, num_biases)


@pytest.mark.parametrize("is_async", [False, True])
def test_two_dispatches_in_flight(two: Pool, is_async: bool) -> None:
    two.run(same_cases.two_in_flight, 4, Workload((12, 5, 9, 2)), is_async)


def test_two_buffers_side_by_side(two: Pool) -> None:
    two.run(same_cases.two_buffers, 4, Workload((4, 8, 2, 1)))


@pytest.mark.parametrize("topology", ["2x1", "2x2"])
def test_destroyed_in_any_order(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(cases.destroyed_in_any_order, num_ranks, Workload(uneven(num_ranks), hidden=64))


def test_autograd_round_trip(two: Pool) -> None:
    two.run(same_cases.autograd_round_trip, 4, Workload((4, 8, 0, 3), hidden=64))


def test_names_of_v1(two: Pool) -> None:
    two.run(cases.other_names, 4, Workload((4, 8, 0, 3), hidden=64))


@pytest.mark.parametrize("topology", ["2x1", "2x2"])
def test_what_v1_is_tested_for(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(cases.as_v1_is_tested, num_ranks, 37, 256, 4 * num_ranks)


@pytest.mark.parametrize("how", [How(lends=True), How(worst_factor=2), How(is_async=True, lends=True)])
def test_outputs_are_lent(two: Pool, how: How) -> None:
    for found in two.run(lending.outputs_are_lent, 4, Workload((9, 3, 5, 14)), how):
        assert all(found)


def test_some_ranks_lend_and_others_do_not(two: Pool) -> None:
    two.run(cases.some_lend, 4, Workload((9, 3, 0, 14)))


# Events


def test_async(two: Pool) -> None:
    for on_comm_stream in (False, True):
        how = How(is_async=True, on_comm_stream=on_comm_stream)
        two.run(same_cases.whole_trip, 4, Workload((8, 3, 12, 5)), how, 1)


def test_chained_events(two: Pool) -> None:
    two.run(same_cases.chained_events, 4, Workload(uneven(4), routing="holes"))


def test_inputs_may_be_freed_after_an_async_call(two: Pool) -> None:
    two.run(same_cases.freed_inputs, 4, Workload((30, 20, 25, 9), hidden=256))


@pytest.mark.gpu
def test_graph_replays(two: Pool) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    two.run(same_cases.graph_replays, 4, Workload((12, ) * 4, hidden=256))
    two.run(cases.cached_graph_replays, 4, Workload((9, 14, 2, 5), hidden=256))


# Windows and repetition


@pytest.mark.parametrize(("topology", "num_slots"), [("2x1", 1), ("2x2", 1), ("3x2", 2)])
def test_windows_wrap(nodes: Nodes, topology: str, num_slots: int) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(cases.tiny_windows, num_ranks, Workload(even(num_ranks, 40), hidden=72, num_topk=2), num_slots)


def test_too_small_window_is_an_error(two: Pool) -> None:
    for message in two.run(cases.too_small_window, 4):
        assert "num_rdma_bytes is too small for this dispatch" in message


def test_changing_shapes_back_to_back(two: Pool) -> None:
    two.run(same_cases.many_shapes, 4, 20, 2, 1 << 22)


def test_repeats_are_bitwise_equal(two: Pool) -> None:
    two.run(same_cases.bitwise_repeats, 4, Workload((30, 12, 25, 18), num_topk=6), 4)


def test_random_calls_under_pressure(nodes: Nodes) -> None:
    for topology in ("2x1", "3x1"):
        pool, num_ranks = nodes.pool(topology)
        found = pool.run(pressure.run, num_ranks, pressure.Sizes(9, 128, 4, 3, 4), seed=1, seconds=0.0, least_rounds=4)
        assert [rounds for rounds, _ in found] == [4] * num_ranks


@pytest.mark.parametrize("ranks", [(1, 3, 4, 6)])
def test_sub_groups(two: Pool, ranks: tuple[int, ...]) -> None:
    two.run(same_cases.sub_groups, len(ranks), Workload(even(len(ranks), 6)), ranks=ranks)


def test_late_rank(two: Pool) -> None:
    two.run(same_cases.late_rank, 4, Workload((5, 9, 2, 7)), 2)


# What is said


def test_bad_arguments(two: Pool) -> None:
    two.run(cases.bad_arguments, 4, Workload((5, 9, 2, 7)))


def test_repr_names_nodes_and_engine(two: Pool) -> None:
    for rank, text in enumerate(two.run(cases.described, 4)):
        assert f"rank {rank} of 4" in text
        assert f"node {rank // 2} of 2 with 2 rank(s)" in text
        assert f"rail: {'host (TCP, 127.0.0.1:' if HAS_TCP else 'nvshmem ('}" in text


def test_different_calls_are_named() -> None:
    pool = Pool(4, virtual_nodes(2, DEEP_EP_CHECK_CALLS="1"))
    for layout, handle in pool.run(cases.different_calls, 4):
        assert "rank 0: num_tokens_per_rdma_rank must count the tokens in is_token_in_rank, which are" in layout
        assert "the dispatch of the handle must be the same on every rank, got one by which other rows come" in handle
    pool.close()


# Failures


@pytest.mark.parametrize(("absent", "step"), [(3, "dispatch"), (0, "combine")])
def test_absent_rank_is_named(two: Pool, absent: int, step: str) -> None:
    messages = two.run(failures.absent_rank, 4, Workload((4, 6, 5, 3)), absent, step)
    assert messages[absent] is None
    for rank, message in enumerate(messages):
        assert rank == absent or f"rank {absent} of node {absent // 2}" in message, messages


def test_killed_rank_is_named(two: Pool) -> None:
    """Its connection ends: nobody waits for a deadline. NVSHMEM does not tell."""
    victim = 3
    found = two.run(cases.killed_in_another_node, 4, Workload((4, 6, 2, 3)), victim, dying=(victim, ))
    for rank, result in enumerate(found):
        if rank != victim:
            message, took = result
            assert f"rank {victim}" in message, found
            assert took < (15 if HAS_TCP else 2 * BUFFER_TIMEOUT_S), found


@pytest.mark.parametrize("failing", [0, 3])
def test_dispatch_that_one_rank_cannot_finish(two: Pool, failing: int) -> None:
    """Its counts are out and its memory is not there: every rank is told by whom, and why."""
    messages = two.run(host_failures.unfinished_dispatch, 4, MemoryError("simulated"), failing, False)
    for message in messages:
        assert f"rank {failing}" in message, messages
        assert "MemoryError: simulated" in message, messages


# As a script


def test_script_makes_virtual_nodes() -> None:
    command = [
        sys.executable, __file__, "--num-processes", "2", "--ranks-per-node", "1", "--num-tokens", "8", "--hidden"
    ]
    done = subprocess.run([*command, "64"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 2 nodes, DEEP_EP_RANKS_PER_NODE" in done.stdout
    assert done.stdout.count(": passed") == 6


# Two hosts, as far as TCP can tell


def start_members(hosts: Namespaces, ranks_per_host: int, *command: str) -> list[subprocess.Popen[str]]:
    """A process for each rank, as torchrun would start them on two machines."""
    found = []
    for rank in range(2 * ranks_per_host):
        host, local_rank = divmod(rank, ranks_per_host)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(2 * ranks_per_host),
            "MASTER_ADDR": hosts.address(0),
            "MASTER_PORT": "29517",
            "GLOO_SOCKET_IFNAME": "rail0",
            "DEEP_EP_RAIL": "host",
            # Both run on one kernel, by which nodes are found.
            "DEEP_EP_RANKS_PER_NODE": str(ranks_per_host)
        }
        found.append(
            subprocess.Popen([*hosts.enter(host), sys.executable, *command],
                             env={
                                 **os.environ,
                                 **environment
                             },
                             stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE,
                             text=True))
    return found


def stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_between_hosts(hosts: Namespaces) -> None:
    """The script, as on two machines: its ranks find each other by the address of the first."""
    processes = start_members(hosts, 2, __file__, "--num-tokens", "24", "--hidden", "512", "--num-experts", "16")
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4
        assert "4 ranks on 2 nodes" in outputs[0]
        assert outputs[0].count(": passed") == 6
        assert outputs[1:] == ["", "", ""]
    finally:
        stop(processes)


def test_link_that_goes_down(hosts: Namespaces) -> None:
    """Half open: neither side is told. Every rank ends by itself, and names a rank of the other node."""
    member = str(Path(__file__).with_name("internode_member.py"))
    processes = start_members(hosts, 2, member)
    try:
        for rank, process in enumerate(processes):
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())["ready"]
            assert f"{hosts.address(rank // 2)}:" in ready  # the engine listens where the other host reaches it
        hosts.cut(1)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        for rank, output in enumerate(outputs):
            found = json.loads(output)
            others = (2, 3) if rank < 2 else (0, 1)
            assert any(f"rank {other} " in found["failure"] for other in others), outputs
            assert f"rank {rank} of node {rank // 2}: " in found["failure"], outputs
            assert found["took"] < 20, outputs
            assert found["released"] < 10, outputs
    finally:
        stop(processes)


def main() -> None:
    parser = modes.make_parser("Dispatch and combine across nodes, checked against the reference")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="of virtual nodes; not under torchrun")
    args = parser.parse_args()
    modes.run(args, parser, virtual_nodes(args.ranks_per_node), has_members=True)


if __name__ == "__main__":
    main()
