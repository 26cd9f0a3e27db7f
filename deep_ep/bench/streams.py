"""What TCP alone carries between the ranks of a rail: equal chunks to each peer and from it at once, over sockets."""
from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Callable

import torch
from typing_extensions import Self

from deep_ep.bench.ranks import Ranks

CHUNK_BYTES = 256 << 10  # as the engine `host` likes them
TIMEOUT_S = 60.0  # of each wait for a peer: one that has died is an error here, as it is for the engine


class PlainStreams:
    """A connection to each of `peers`, who name this rank too. Collective; of ranks of one machine.

    Raises TimeoutError where a peer says nothing for `TIMEOUT_S`.
    """

    def __init__(self, ranks: Ranks, peers: list[int], bytes_per_peer: int, is_pinned: bool) -> None:
        self._stack = ExitStack()
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=ranks.size))
        listener.settimeout(TIMEOUT_S)
        ports = ranks.allgather(listener.getsockname()[1])
        connections = [self._call(ports[peer]) for peer in peers if peer < ranks.rank]
        connections += [self._stack.enter_context(listener.accept()[0]) for peer in peers if peer > ranks.rank]
        # One moves a rank's bytes out, another moves bytes in.
        self._ways: list[tuple[Callable[[socket.socket, memoryview], None], socket.socket, memoryview]] = []
        for connection in connections:
            connection.settimeout(TIMEOUT_S)  # an accepted one has none of its listener's
            for way in (_send, _receive):
                data = torch.zeros(bytes_per_peer, dtype=torch.uint8, pin_memory=is_pinned)
                self._ways.append((way, connection, data.numpy().data))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(len(self._ways)))

    def _call(self, port: int) -> socket.socket:
        return self._stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))

    def exchange(self, _: int) -> None:
        """Sends all bytes to each peer, and receives as many."""
        for moved in [self._pool.submit(move, connection, data) for move, connection, data in self._ways]:
            moved.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()


def _send(connection: socket.socket, data: memoryview) -> None:
    for begin in range(0, len(data), CHUNK_BYTES):
        connection.sendall(data[begin:begin + CHUNK_BYTES])


def _receive(connection: socket.socket, data: memoryview) -> None:
    begin = 0
    while begin < len(data):
        count = connection.recv_into(data[begin:begin + CHUNK_BYTES])
        if count == 0:
            raise ConnectionError("a rank has ended")
        begin += count
