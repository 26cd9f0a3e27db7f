"""Nodes from what ranks say about their machines, in tables rather than machines (pitfall 33)."""

from pathlib import Path

import pytest

from deep_ep import Error
from deep_ep._topology import Place, find_topology, this_place
from deep_ep.utils import check_nvlink_connections


def places(*hosts: str) -> list[Place]:
    return [Place(host, f"name-of-{host}", f"gpu-{rank}") for rank, host in enumerate(hosts)]


@pytest.mark.parametrize(("hosts", "nodes"), [
    ("a", ((0, ), )),
    ("aaaa", ((0, 1, 2, 3), )),
    ("aabb", ((0, 1), (2, 3))),
    ("abab", ((0, 2), (1, 3))),
    ("baa", ((0, ), (1, 2))),
])
def test_hosts_make_nodes(hosts: str, nodes: tuple[tuple[int, ...], ...]) -> None:
    assert find_topology(places(*hosts)).nodes == nodes


@pytest.mark.parametrize(("ranks_per_node", "nodes"), [
    (1, ((0, ), (1, ), (2, ), (3, ))),
    (2, ((0, 1), (2, 3))),
    (3, ((0, 1, 2), (3, ))),
    (8, ((0, 1, 2, 3), )),
])
def test_override_makes_virtual_nodes(ranks_per_node: int, nodes: tuple[tuple[int, ...], ...]) -> None:
    assert find_topology(places(*"aaaa"), ranks_per_node).nodes == nodes


def test_equal_host_names_are_not_one_host() -> None:
    """Containers and clones share names; the identity decides."""
    same_name = [Place(host, "worker", "gpu") for host in ("boot-1", "boot-2")]
    assert find_topology(same_name).num_nodes == 2


def test_printed_form_names_hosts_and_devices() -> None:
    text = str(find_topology(places(*"ab")))
    assert "2 ranks on 2 node(s)" in text
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
    text = str(find_topology([Place("boot", "box-1", "gpu-0"), Place("boot", "box-2", "gpu-1")]))
    assert "1 node(s)" in text
    assert "box-1, box-2: ranks 0 (gpu-0), 1 (gpu-1)" in text


def test_nodes_that_are_a_guess_are_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep._topology.BOOT_ID", Path("/nowhere"))
    text = str(find_topology([this_place("gpu-0"), Place("other", "box", "gpu-1")]))
    assert "2 node(s), told apart by host name, because /nowhere cannot be read on every rank" in text
