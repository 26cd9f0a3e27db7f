"""The engine `host` between processes: over loopback, and between network namespaces where this machine allows any.

The summary says which: the tests of namespaces are skipped with the reason where there are none.
"""
from __future__ import annotations

import signal
from pathlib import Path

import pytest
from namespaces import Namespaces
from rail_group import RailGroup, build_process

pytestmark = pytest.mark.slow

NUM_MESSAGES, NUM_SLOTS, SLOT_BYTES = 200, 4, 20_000


@pytest.fixture(scope="module")
def program() -> Path:
    return build_process()


def make_group(program: Path, hosts: Namespaces, ranks_per_host: int, *options: str) -> RailGroup:
    """Ranks on two hosts, who find their interface by the address of the first."""
    prefixes = [hosts.enter(rank // ranks_per_host) for rank in range(2 * ranks_per_host)]
    return RailGroup(program, 2 * ranks_per_host, ["--reach", hosts.address(0), *options], prefixes)


def check_streams(group: RailGroup) -> None:
    sent = [found["bytes"] for found in group.run(f"streams {NUM_MESSAGES} {NUM_SLOTS} {SLOT_BYTES}")]
    assert all(count > 0 for count in sent)  # what arrived was compared there
    assert group.quit() == [0] * len(group.processes)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_streams_over_loopback(program: Path, num_ranks: int) -> None:
    with RailGroup(program, num_ranks, ["--interface", "lo"]) as group:
        group.connect()
        check_streams(group)


def test_streams_between_hosts(program: Path, hosts: Namespaces) -> None:
    with make_group(program, hosts, 2) as group:
        group.connect()
        check_streams(group)


def test_interface_is_chosen_by_name(program: Path, hosts: Namespaces) -> None:
    with make_group(program, hosts, 1, "--interface", "rail0") as group:
        group.connect()
        check_streams(group)


def test_interface_that_the_others_cannot_reach(program: Path, hosts: Namespaces) -> None:
    """Each host listens on its own loopback: the error names the address, and what to set."""
    options = ["--interface", "lo", "--timeout-s", "3"]
    named = pytest.raises(RuntimeError, match=r"rank [01]: rail: .*127\.0\.0\.1:.*DEEP_EP_RAIL_INTERFACE")
    with RailGroup(program, 2, options, [hosts.enter(0), hosts.enter(1)]) as group, named:
        group.connect()


def kill_and_watch(group: RailGroup) -> None:
    group.connect()
    for rank in (0, 1):
        group.tell(rank, "watch 100")
    group.processes[2].send_signal(signal.SIGKILL)
    for rank in (0, 1):
        found = group.ask(rank)
        assert "the connection to rank 2 at " in found["failure"]
        assert "its process has ended" in found["failure"] or "errno" in found["failure"]
    assert group.quit() == [0, 0, -signal.SIGKILL]


def test_peer_that_is_killed_is_named(program: Path) -> None:
    with RailGroup(program, 3, ["--interface", "lo"]) as group:
        kill_and_watch(group)


def test_link_that_goes_down_is_reported(program: Path, hosts: Namespaces) -> None:
    """Half open: neither side is told, only nothing comes any more."""
    with make_group(program, hosts, 1, "--timeout-s", "2") as group:
        group.connect()
        group.run("streams 10 4 1000")
        hosts.cut(1)
        for rank in (0, 1):
            group.tell(rank, "watch 100")
        for rank in (0, 1):
            failure = group.ask(rank)["failure"]
            assert f"the connection to rank {1 - rank} at {hosts.address(1 - rank)}:" in failure
            assert "(errno " in failure
        assert group.quit() == [0, 0]


def test_peer_that_stands_still_is_no_failure(program: Path) -> None:
    """Its system answers: that a process is slow is for the deadlines of calls to say."""
    with RailGroup(program, 2, ["--interface", "lo", "--timeout-s", "2"]) as group:
        group.connect()
        group.processes[1].send_signal(signal.SIGSTOP)
        group.tell(0, "watch 4")
        assert group.ask(0)["failure"] == ""
        group.processes[1].send_signal(signal.SIGCONT)
        check_streams(group)
