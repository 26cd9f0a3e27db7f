"""Processes that are joined by an engine alone (tests/cpp/rail/process)."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "rail"
PATIENCE_S = 120
ANSWERS = ("address ", "connected", "port ", "error ", "{")


def build_process() -> Path:
    """The program for the CPU."""
    return build_program("rail_process", FOLDER, "-DEP_CUDA=OFF")


def build_program(name: str, folder: Path, *options: str, environment: dict[str, str] | None = None) -> Path:
    """Built on first use, in a folder of its own, from what this checkout has."""
    configure = [
        "cmake", "-S",
        str(ROOT), "-B",
        str(folder), "-DEP_TESTS=ON", "-DEP_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release", *options
    ]
    jobs = str(len(os.sched_getaffinity(0)))
    for command in (configure, ["cmake", "--build", str(folder), "--target", name, "--parallel", jobs]):
        done = subprocess.run(command,
                              check=False,
                              capture_output=True,
                              text=True,
                              env={
                                  **os.environ,
                                  **(environment or {})
                              })
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder / "tests" / "cpp" / name


class RailGroup:
    """One process for each rank; `prefixes` are what each is started with, `options` those of the program."""

    def __init__(self,
                 program: Path,
                 num_ranks: int,
                 options: Sequence[str],
                 prefixes: Sequence[Sequence[str]] | None = None) -> None:
        self.has_bare_socket = "nvshmem" not in program.name
        self.processes = []
        for rank in range(num_ranks):
            prefix = [] if prefixes is None else list(prefixes[rank])
            command = [*prefix, str(program), "--rank", str(rank), "--num-ranks", str(num_ranks), *options]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def connect(self) -> None:
        """Passes the addresses on, as the group's exchange does elsewhere."""
        addresses = [self.hear(rank) for rank in range(len(self.processes))]
        for rank in range(len(self.processes)):
            for address in addresses:
                self.tell(rank, address)
        for rank in range(len(self.processes)):
            line = self.hear(rank)
            if line != "connected":
                raise RuntimeError(f"rank {rank}: {line}")

    def tell(self, rank: int, line: str) -> None:
        stdin = self.processes[rank].stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()

    def hear(self, rank: int) -> str:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        line = stdout.readline().rstrip("\n")
        while line and not line.startswith(ANSWERS):  # NVSHMEM says something of its own
            print(f"rank {rank}: {line}", file=sys.stderr)
            line = stdout.readline().rstrip("\n")
        if line.startswith("error "):
            raise RuntimeError(f"rank {rank}: {line.removeprefix('error ')}")
        return line

    def ask(self, rank: int) -> dict[str, Any]:
        """What a rank says about what it was told to do."""
        found: dict[str, Any] = json.loads(self.hear(rank))
        return found

    def run(self, command: str) -> list[dict[str, Any]]:
        for rank in range(len(self.processes)):
            self.tell(rank, command)
        if command.startswith("plain ") and self.has_bare_socket:
            self.tell(0, self.hear(1))  # where rank 1 listens
        return [self.ask(rank) for rank in range(len(self.processes))]

    def quit(self) -> list[int]:
        """Exit statuses."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.tell(rank, "quit")
        return [process.wait(PATIENCE_S) for process in self.processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
