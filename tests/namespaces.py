"""Hosts on one machine, as far as TCP can tell: network namespaces that a bridge joins. Needs root, no `ip` command."""
from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from typing_extensions import Self

CLONE_NEWNET = 0x40000000
# Of linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h and veth.h.
NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 1, 4, 0x200, 0x400
NLMSG_ERROR, RTM_NEWLINK, RTM_NEWADDR = 2, 16, 20
IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_PID = 3, 10, 18, 19
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFF_UP = 1
# Interfaces get numbers of our own, so nobody has to look them up.
LOOPBACK, RAIL, BRIDGE, FIRST_PORT = 1, 5, 6, 10


def attribute(kind: int, *parts: bytes) -> bytes:
    value = b"".join(parts)
    return (struct.pack("=HH", 4 + len(value), kind) + value).ljust(4 + -(-len(value) // 4) * 4, b"\0")


def link(number: int, flags: int = 0) -> bytes:
    """The head of a message about an interface."""
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, number, flags, flags)


def named(name: str) -> bytes:
    return attribute(IFLA_IFNAME, name.encode(), b"\0")


@contextmanager
def inside(pid: int) -> Iterator[None]:
    """This thread, in the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(file: int) -> None:
        if libc.setns(file, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            enter(home)
    finally:
        os.close(home)


class Namespace:
    """A network namespace, as long as the process lives that was started for it."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(["unshare", "--net", "cat"],
                                        stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._netlink: socket.socket | None = None
        try:
            self._keeper.stdin.write(b"unshared\n")
            self._keeper.stdin.flush()
        except BrokenPipeError:
            pass  # it says why
        if not self._keeper.stdout.readline():
            _, errors = self._keeper.communicate()
            raise OSError(errors.decode().strip() or "unshare has failed")
        with inside(self.pid):
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    @property
    def pid(self) -> int:
        return self._keeper.pid

    @property
    def prefix(self) -> list[str]:
        """Of a command that is to run in it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def ask(self, kind: int, flags: int, body: bytes) -> None:
        """A request to the kernel, and its answer."""
        assert self._netlink is not None
        flags |= NLM_F_REQUEST | NLM_F_ACK
        self._netlink.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        answer = self._netlink.recv(1 << 16)
        error = -struct.unpack_from("=i", answer, 16)[0]
        if struct.unpack_from("=H", answer, 4)[0] != NLMSG_ERROR or error != 0:
            raise OSError(error, f"netlink: {os.strerror(error)}")

    def make(self, number: int, name: str, kind: str, *more: bytes, data: bytes = b"") -> None:
        info = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, kind.encode(), b"\0"),
                         attribute(IFLA_INFO_DATA, data) if data else b"")
        self.ask(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, link(number) + named(name) + info + b"".join(more))

    def switch_on(self, number: int) -> None:
        self.ask(RTM_NEWLINK, 0, link(number, IFF_UP))

    def set_master(self, number: int, master: int) -> None:
        """0: none."""
        self.ask(RTM_NEWLINK, 0, link(number) + attribute(IFLA_MASTER, struct.pack("=I", master)))

    def set_address(self, number: int, address: str) -> None:
        value = socket.inet_aton(address)
        self.ask(
            RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL,
            struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, number) + attribute(IFA_LOCAL, value) +
            attribute(IFA_ADDRESS, value))

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
        self._keeper.communicate()


class Namespaces:
    """A namespace for each host, and one for the bridge between them."""

    def __init__(self, num_hosts: int) -> None:
        self.failure: str | None = None
        self._all: list[Namespace] = []
        try:
            self._make(num_hosts)
        except OSError as error:
            self.failure = str(error)
            self.close()

    def _make(self, num_hosts: int) -> None:
        if os.geteuid() != 0:
            raise OSError("they need root")
        self._bridge = self._start()
        self._bridge.make(BRIDGE, "bridge", "bridge")
        self._bridge.switch_on(BRIDGE)
        self._hosts = [self._start() for _ in range(num_hosts)]
        for number, host in enumerate(self._hosts):
            peer = link(RAIL) + named("rail0") + attribute(IFLA_NET_NS_PID, struct.pack("=I", host.pid))
            port = FIRST_PORT + number
            self._bridge.make(port, f"port{number}", "veth", data=attribute(VETH_INFO_PEER, peer))
            self._bridge.set_master(port, BRIDGE)
            self._bridge.switch_on(port)
            host.set_address(RAIL, self.address(number))
            host.switch_on(LOOPBACK)
            host.switch_on(RAIL)

    def _start(self) -> Namespace:
        self._all.append(Namespace())
        return self._all[-1]

    @staticmethod
    def address(host: int) -> str:
        return f"10.231.7.{host + 1}"

    def cut(self, host: int) -> None:
        """The link goes down, on the side that the host does not see: nothing is told, nothing arrives any more."""
        self._bridge.set_master(FIRST_PORT + host, 0)

    def enter(self, host: int) -> list[str]:
        """The prefix of a command that is to run on that host."""
        return self._hosts[host].prefix

    def close(self) -> None:
        while self._all:
            self._all.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
