"""Dispatch and combine across nodes, against the reference.

    pytest tests/test_internode.py
    python tests/test_internode.py --num-processes 4 --ranks-per-node 2 --num-tokens 128 --hidden 7168
    torchrun --nnodes 2 --nproc_per_node 8 ... tests/test_internode.py --num-tokens 4096

Nodes are virtual ones here (DEEP_EP_RANKS_PER_NODE), joined over loopback, or over NVSHMEM where
DEEP_EP_RAIL=nvshmem asks for it. Under torchrun they are the machines.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import failure_cases as failures
import host_failure_cases as host_failures
import internode_cases as cases
import intranode_cases as same_cases
import lending_cases as lending
import modes
import pressure
import pytest
from high_throughput_trips import FP8, Trips, even, uneven
from namespaces import Namespaces
from pending_call import How
from utils import BUFFER_TIMEOUT_S, Group, Pool, device
from virtual_nodes import HAS_TCP, Nodes, virtual_nodes
from workload import ROUTINGS, Workload


class TestTrips(Trips):

    @pytest.fixture
    def group(self, two: Pool) -> Group:
        return Group(two, 4)


# Shapes


@pytest.mark.parametrize("topology", ["2x1", "3x1", "2x2", "3x2", "4x2"])
def test_topology(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(same_cases.whole_trip, num_ranks, Workload(uneven(num_ranks), seed=num_ranks), None, 1)
    pool.run(same_cases.reused_handle, num_ranks, Workload(uneven(num_ranks), hidden=264, num_topk=4, seed=num_ranks))


def test_any_topk_and_expert_count(two: Pool) -> None:
    """Also more than 32 entries, and more than there are experts."""
    two.run(same_cases.trips, 4, [
        Workload((7, 9, 1, 4), 64, topk, experts, seed=topk)
        for topk, experts in ((1, 1), (2, 3), (8, 64), (11, 4), (33, 2))
    ])


def test_routings(two: Pool) -> None:
    """-1, duplicates, all tokens to one rank of the last node, all nodes, nothing at all."""
    two.run(same_cases.trips, 6, [Workload((20, 1, 0, 33, 8, 2), routing=routing) for routing in ROUTINGS])


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


@pytest.mark.parametrize("topology", ["2x1", "2x2"])
def test_destroyed_in_any_order(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(cases.destroyed_in_any_order, num_ranks, Workload(uneven(num_ranks), hidden=64))


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


@pytest.mark.gpu
def test_graph_replays_with_a_handle(two: Pool) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
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


def test_random_calls_under_pressure(nodes: Nodes) -> None:
    for topology in ("2x1", "3x1"):
        pool, num_ranks = nodes.pool(topology)
        found = pool.run(pressure.run, num_ranks, pressure.Sizes(9, 128, 4, 3, 4), seed=1, seconds=0.0, least_rounds=4)
        assert [rounds for rounds, _ in found] == [4] * num_ranks


@pytest.mark.parametrize("ranks", [(1, 3, 4, 6)])
def test_sub_groups(two: Pool, ranks: tuple[int, ...]) -> None:
    two.run(same_cases.sub_groups, len(ranks), Workload(even(len(ranks), 6)), ranks=ranks)


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
