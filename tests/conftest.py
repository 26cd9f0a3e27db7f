"""Makes `reference`, `utils` and the case modules importable, and owns the worker processes that tests share."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

from namespaces import Namespaces  # noqa: E402 - needs the path above
from utils import Pool  # noqa: E402 - the same
from virtual_nodes import Nodes, virtual_nodes  # noqa: E402 - the same


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight processes, in groups of any smaller size. Started on first use, replaced after a failure."""
    shared = Pool(num_processes=8)
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with contextlib.closing(Nodes(Pool(4, virtual_nodes(1)), Pool(8, virtual_nodes(2)))) as made:
        yield made


@pytest.fixture
def two(nodes: Nodes) -> Pool:
    """Nodes of two ranks."""
    return nodes.of_two


@pytest.fixture
def hosts() -> Iterator[Namespaces]:
    """Two hosts, as far as TCP can tell."""
    with Namespaces(2) as namespaces:
        if namespaces.failure is not None:
            pytest.skip(f"no network namespaces here ({namespaces.failure}): tested over loopback alone")
        yield namespaces
