"""Config, its defaults by rank count, and the buffer sizes that it suggests."""

from collections.abc import Iterator
from typing import Any

import pytest

from deep_ep import Buffer, Config

HIDDEN_BYTES = 7168 * 2
# What V1 asked for (computed from its published formula).
V1_HINTS = [((20, 24, 256, 6, 128), 2, 83927552), ((20, 6, 256, 6, 128), 8, 335709824)]


@pytest.fixture
def restored_num_sms() -> Iterator[None]:
    before = Buffer.num_sms
    yield
    Buffer.num_sms = before


def test_arguments_by_position_and_name() -> None:
    Config(20, 24, 256, 6, 128)
    Config(num_sms=20,
           num_max_nvl_chunked_send_tokens=24,
           num_max_nvl_chunked_recv_tokens=256,
           num_max_rdma_chunked_send_tokens=6,
           num_max_rdma_chunked_recv_tokens=128)
    assert Config().num_sms == 20


@pytest.mark.parametrize("arguments", [(-1, ), (20, 0), (20, 6, 0), (20, 6, 256, 0), (20, 6, 256, 6, 0), (20, 256, 256),
                                       (20, 6, 256, 128, 128)])
def test_bad_arguments(arguments: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        Config(*arguments)


@pytest.mark.parametrize(("arguments", "name"), [((0, 2), "hidden_bytes"), ((1 << 62, 8), "hidden_bytes"),
                                                 ((1024, 0), "num_ranks"), ((1024, 1 << 20), "num_ranks")])
@pytest.mark.parametrize("hint", [Config.get_nvl_buffer_size_hint, Config.get_rdma_buffer_size_hint])
def test_bad_hints(hint: Any, arguments: tuple[int, ...], name: str) -> None:
    """Also where the bytes would not fit the number."""
    with pytest.raises(ValueError, match=name):
        hint(Config(), *arguments)


@pytest.mark.parametrize(("arguments", "num_ranks", "v1_bytes"), V1_HINTS)
def test_hint_is_for_slots_and_outputs(arguments: tuple[int, ...], num_ranks: int, v1_bytes: int) -> None:
    """At most half of V1's for slots, and as much as the outputs of 4096 tokens from each rank take, and an eighth.

    Two ranks lend the sums of combine too: 4096 rows more.
    """
    hint = Config(*arguments).get_nvl_buffer_size_hint(HIDDEN_BYTES, num_ranks)
    copies = num_ranks * (1 - (1 - 1 / num_ranks)**8)
    output_bytes = 4096 * (copies * (HIDDEN_BYTES + 8 * 12 + 4) + (HIDDEN_BYTES if num_ranks == 2 else 0))
    assert output_bytes * 1.1 < hint <= v1_bytes / 2 + output_bytes * 1.15
    assert hint % 128 == 0


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8, 13, 72])
def test_hint_for_any_rank_count(num_ranks: int) -> None:
    config = Buffer.get_dispatch_config(num_ranks)
    sizes = [config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) for hidden_bytes in (16, 5760, HIDDEN_BYTES)]
    assert sizes == sorted(sizes)
    assert all(size > 0 and size % 128 == 0 for size in sizes)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_no_rdma_bytes_within_a_node(num_ranks: int) -> None:
    assert Buffer.get_combine_config(num_ranks).get_rdma_buffer_size_hint(HIDDEN_BYTES, num_ranks) == 0


@pytest.mark.parametrize("make", [Buffer.get_dispatch_config, Buffer.get_combine_config])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 144, 160, 1000])
def test_default_for_every_rank_count(make: Any, num_ranks: int) -> None:
    assert make(num_ranks).num_sms == Buffer.num_sms


@pytest.mark.parametrize("num_ranks", [0, -3])
def test_default_for_no_ranks(num_ranks: int) -> None:
    with pytest.raises(ValueError, match="num_ranks"):
        Buffer.get_dispatch_config(num_ranks)


@pytest.mark.usefixtures("restored_num_sms")
def test_set_num_sms_affects_later_configs() -> None:
    Buffer.set_num_sms(12)
    assert Buffer.num_sms == 12
    assert Buffer.get_dispatch_config(4).num_sms == 12
