"""Nodes from what ranks say about their machines, in tables rather than machines (pitfall 33)."""

import dataclasses
from pathlib import Path

import pytest

from deep_ep import Error, _peers
from deep_ep._peers import Place, find_topology, this_place, unreachable_gpus
from deep_ep._session import Request
from deep_ep.utils import check_nvlink_connections


def places(*hosts: str) -> list[Place]:
    return [Place(host, f"name-of-{host}", f"gpu-{rank}") for rank, host in enumerate(hosts)]


@pytest.mark.parametrize(("hosts", "nodes"), [
    ("a", ((0, ), )),
    ("aaaa", ((0, 1, 2, 3), )),
    ("aabb", ((0, 1), (2, 3))),
    ("bbaa", ((0, 1), (2, 3))),
    ("abc", ((0, ), (1, ), (2, ))),
    ("aaabbbcccddd", ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))),
    ("a" * 72 + "b" * 72, (tuple(range(72)), tuple(range(72, 144)))),
])
def test_hosts_make_nodes(hosts: str, nodes: tuple[tuple[int, ...], ...]) -> None:
    assert find_topology(0, places(*hosts)).nodes == nodes


@pytest.mark.parametrize(("ranks_per_node", "nodes"), [
    (1, ((0, ), (1, ), (2, ), (3, ))),
    (2, ((0, 1), (2, 3))),
    (4, ((0, 1, 2, 3), )),
    (8, ((0, 1, 2, 3), )),
])
def test_override_makes_virtual_nodes(ranks_per_node: int, nodes: tuple[tuple[int, ...], ...]) -> None:
    assert find_topology(0, places(*"aaaa"), ranks_per_node).nodes == nodes


def test_override_must_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match="DEEP_EP_RANKS_PER_NODE must divide the 4 ranks of the group, got 3"):
        find_topology(0, places(*"aaaa"), 3)


@pytest.mark.parametrize("rank", range(12))
def test_a_rank_knows_its_neighbours_and_its_rail(rank: int) -> None:
    topology = find_topology(rank, places(*"aaaabbbbcccc"))
    assert (topology.num_ranks, topology.num_nodes, topology.ranks_per_node) == (12, 3, 4)
    assert topology.node * topology.ranks_per_node + topology.index == rank
    assert sorted((*topology.neighbours, rank)) == [r for r in range(12) if r // 4 == rank // 4]
    assert sorted((*topology.rail_peers, rank)) == [r for r in range(12) if r % 4 == rank % 4]


@pytest.mark.parametrize(("hosts", "sentence"), [
    ("aaab", "every node must have equally many ranks, got ranks 0 to 2 on name-of-a; rank 3 on name-of-b"),
    ("abb", "every node must have equally many ranks, got rank 0 on name-of-a; ranks 1, 2 on name-of-b"),
    ("abab", "one after another.*, got ranks 0, 2 on name-of-a; ranks 1, 3 on name-of-b"),
    ("abcabc", "ranks 0, 3 on name-of-a; ranks 1, 4 on name-of-b; ranks 2, 5 on name-of-c"),
])
def test_nodes_that_do_not_fit_are_named(hosts: str, sentence: str) -> None:
    with pytest.raises(Error, match=sentence):
        find_topology(0, places(*hosts))


def with_islands(*islands: str) -> list[Place]:
    """Ranks on one host; a GPU reaches those of its own island alone, and each rank tells so."""
    everybody = list(enumerate("".join(islands)))
    beyond = {here: frozenset(f"gpu-{rank}" for rank, there in everybody if there != here) for _, here in everybody}
    return [Place("host", "box", f"gpu-{rank}", unreachable=beyond[island]) for rank, island in everybody]


def test_gpus_that_do_not_reach_each_other_share_host_memory() -> None:
    topology = find_topology(0, with_islands("aa", "bb"))
    assert topology.nodes == ((0, 1, 2, 3), )
    heap, reason = _peers.choose_heap("", topology, "cuda")
    assert heap == _peers.HOST
    assert reason.startswith("rank 0 (gpu-0) and rank 2 (gpu-2) do not reach each other's memory")


def test_gpus_that_reach_each_other_keep_their_own_memory() -> None:
    for topology in (find_topology(0, with_islands("aaaa")), find_topology(0, with_islands("aa", "bb"), 2)):
        assert _peers.choose_heap("", topology, "cuda")[0] == _peers.DEVICE


def test_the_heap_that_is_asked_for_is_taken() -> None:
    together, apart = find_topology(0, with_islands("aa")), find_topology(0, with_islands("ab"))
    assert _peers.choose_heap("host", together, "cuda") == (_peers.HOST, "DEEP_EP_HEAP=host")
    assert _peers.choose_heap("device", apart, "cuda") == (_peers.DEVICE, "DEEP_EP_HEAP=device")
    assert _peers.choose_heap("host", together, "cpu")[0] == _peers.DEVICE  # which is host memory there


def test_a_heap_on_the_host_is_told_once_and_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _peers.tell_heap.cache_clear()
    with caplog.at_level("INFO", logger="deep_ep"):
        for reason in ("rank 0 and rank 1 do not", "rank 0 and rank 1 do not", "DEEP_EP_HEAP=host"):
            _peers.tell_heap(_peers.HOST, reason)
    told = "within a node, bytes go through pinned host memory, at the rate of PCIe: "
    assert [(record.levelname, record.message)
            for record in caplog.records] == [("WARNING", told + "rank 0 and rank 1 do not"),
                                              ("INFO", told + "DEEP_EP_HEAP=host")]


def test_nothing_of_a_heap_on_the_host_is_lent_without_being_asked() -> None:
    automatic = Request(1 << 20, 0, None, False, 24, False, None, None)
    asked = dataclasses.replace(automatic, num_lend_bytes=256)
    assert [request.with_heap(_peers.HOST).num_lend_bytes for request in (automatic, asked)] == [0, 256]
    assert [request.with_heap(_peers.DEVICE).num_lend_bytes for request in (automatic, asked)] == [None, 256]


def test_with_a_heap_in_gpu_memory_such_gpus_are_no_node() -> None:
    topology = find_topology(0, with_islands("aa", "bb"), heap="device")
    assert topology.nodes == ((0, 1), (2, 3))
    assert topology.first_cut() is None
    assert "and from which GPUs reach each other's memory" in str(topology)
    assert find_topology(0, with_islands("abcd"), heap="device").nodes == ((0, ), (1, ), (2, ), (3, ))


def test_what_one_side_cannot_reach_is_not_reached() -> None:
    """A rank that sees its own GPU alone (CUDA_VISIBLE_DEVICES) knows nothing; its peer may."""
    blind, seeing = Place("host", "box", "gpu-0"), Place("host", "box", "gpu-1", unreachable=frozenset({"gpu-0"}))
    for pair in ((blind, seeing), (seeing, blind)):
        assert find_topology(0, pair, heap="device").num_nodes == 2
        assert find_topology(0, pair).first_cut() == (0, 1)


def test_reach_that_makes_unequal_nodes_names_the_ranks() -> None:
    with pytest.raises(Error, match="got ranks 0 to 2 on box; rank 3 on box"):
        find_topology(0, with_islands("aaa", "b"), heap="device")


def test_equal_gpu_names_of_two_hosts_are_two_gpus() -> None:
    """Identities are unique, but a peer's view of its own host says nothing about another."""
    first = Place("a", "a", "gpu-0", unreachable=frozenset({"gpu-1"}))
    assert find_topology(0, [first, Place("b", "b", "gpu-1")]).num_nodes == 2


def test_gpus_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:

    class Properties:
        """As torch's, of GPU 0 to 3."""

        def __init__(self, index: int) -> None:
            self.uuid = f"0000-{index}"

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", Properties)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda one, other: one // 2 == other // 2)
    # The driver knows all GPUs of the machine; of those that CUDA shows, CUDA's word counts.
    monkeypatch.setattr("deep_ep._peers._cut_off_from", lambda _: frozenset())
    assert unreachable_gpus(1, "GPU-0000-1") == {"GPU-0000-2", "GPU-0000-3"}
    monkeypatch.setattr("deep_ep._peers._cut_off_from", lambda _: frozenset({"GPU-0000-0", "GPU-hidden"}))
    assert unreachable_gpus(1, "GPU-0000-1") == {"GPU-0000-2", "GPU-0000-3", "GPU-hidden"}
    assert unreachable_gpus(1, "GPU-of another kind of name") == frozenset()
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: object())  # an older torch
    assert unreachable_gpus(1, "GPU-0000-1") == frozenset()


def test_equal_host_names_are_not_one_host() -> None:
    """Containers and clones share names; the identity decides."""
    same_name = [Place(host, "worker", "gpu") for host in ("boot-1", "boot-2")]
    assert find_topology(0, same_name).num_nodes == 2


def test_printed_form_names_hosts_and_devices() -> None:
    text = str(find_topology(0, places(*"ab")))
    assert "2 ranks on 2 nodes" in text
    assert "name-of-b: ranks 1 (gpu-1)" in text


def test_two_looks_at_this_machine_agree() -> None:
    assert this_place("gpu") == this_place("gpu")


class Group:
    """As much of a ProcessGroup as the check looks at."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(("kind", "name"), [("cpu", "none"), ("cuda", "NVIDIA H200")])
def test_nvlink_check_passes_without_pcie_cards(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.setattr("deep_ep.utils.device_choice", lambda: (kind, ""))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    check_nvlink_connections(Group(8))  # type: ignore[arg-type]


def test_nvlink_check_knows_what_a_bridge_can_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep.utils.device_choice", lambda: ("cuda", ""))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-PCIE-40GB")
    with pytest.raises(Error, match="the group has 4 ranks"):
        check_nvlink_connections(Group(4))  # type: ignore[arg-type]


def test_containers_of_one_machine_are_all_named() -> None:
    text = str(find_topology(0, [Place("boot", "box-1", "gpu-0"), Place("boot", "box-2", "gpu-1")]))
    assert "1 node" in text
    assert "box-1, box-2: ranks 0 (gpu-0), 1 (gpu-1)" in text


def test_nodes_that_are_a_guess_are_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep._peers.BOOT_ID", Path("/nowhere"))
    text = str(find_topology(0, [this_place("gpu-0"), Place("other", "box", "gpu-1")]))
    assert "2 nodes, told apart by host name, because /nowhere cannot be read on every rank" in text
