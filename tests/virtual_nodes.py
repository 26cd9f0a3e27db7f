"""Nodes for tests: runs of ranks of this machine, joined as several machines would be (DEEP_EP_RANKS_PER_NODE)."""

import os
from dataclasses import dataclass

import pytest
import torch
from utils import Pool, device

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
