"""docs/migration.md quotes what this library says where DeepEP V1 says something else: what is raised."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from single_rank import single_rank_buffer, single_rank_dispatch
from utils import device

import deep_ep
from deep_ep import Buffer, Config, EventOverlap

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
LOW_LATENCY = {"low_latency_mode": True, "num_rdma_bytes": 1 << 20}
HIDDEN = 128


@pytest.fixture(scope="module")
def buffer() -> Iterator[Buffer]:
    """Both modes; no masks."""
    with single_rank_buffer(**LOW_LATENCY) as made:
        yield made


def rows(num_tokens: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(num_tokens, hidden, dtype=dtype, device=device())


def ids(num_tokens: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(num_tokens, 2, dtype=dtype, device=device())


def send(buffer: Buffer, x: torch.Tensor, num_max_tokens: int = 4, num_experts: int = 2, **options: Any) -> Any:
    return buffer.low_latency_dispatch(x, ids(len(x)), num_max_tokens, num_experts, **{"use_fp8": False} | options)


def destroyed_call() -> None:
    made = single_rank_buffer()
    made.destroy()
    made.get_dispatch_layout(ids(1), 2)


def sentence_of(error: BaseException) -> str:
    """As the page writes it: the tensors on the CPU, a number of bytes as N."""
    text = str(error).splitlines()[0].replace(f"on {device()}", "on cpu")
    return f"{type(error).__name__}: {re.sub(r'[0-9]{6,}', 'N', text)}"


# Each takes a Buffer and must raise a sentence of the page.
MISTAKES: dict[str, Callable[[Buffer], Any]] = {
    "neither group nor comm": lambda _: Buffer(None, 128),
    "bytes": lambda _: single_rank_buffer(num_nvl_bytes=100),
    "queue pairs": lambda _: single_rank_buffer(num_qps_per_rank=0),
    "odd SMs": lambda _: Buffer.set_num_sms(7),
    "chunk sizes": lambda _: Config(20, 256, 256, 6, 128),
    "row of 24 bytes": lambda b: single_rank_dispatch(b, 3, 12),
    "no layout": lambda b: single_rank_dispatch(b, 3, num_tokens_per_rank=None, is_token_in_rank=None),
    "half a top-k": lambda b: single_rank_dispatch(b, 3, topk_weights=None),
    "handle and top-k": lambda b: single_rank_dispatch(b, 3, handle=single_rank_dispatch(b, 3)[4]),
    "dtype of the ids": lambda b: b.get_dispatch_layout(ids(3, torch.int16), 2),
    "worst case without top-k":
        lambda b: single_rank_dispatch(b, 3, num_worst_tokens=4, topk_idx=None, topk_weights=None),
    "format of combine": lambda b: b.combine(rows(3, 16, torch.float16), single_rank_dispatch(b, 3, 16)[4]),
    "comm stream": lambda b: b.get_dispatch_layout(ids(3), 2, allocate_on_comm_stream=True),
    "no event": lambda _: EventOverlap(None).current_stream_wait(),
    "destroyed": lambda _: destroyed_call(),
    "low latency is off": lambda _: send(single_rank_buffer(), rows(3)),
    "hidden size": lambda b: send(b, rows(3, 136), use_fp8=True),
    "packed scales": lambda b: send(b, rows(3, 512), use_fp8=True, use_ue8m0=True),
    "too many tokens": lambda b: send(b, rows(5)),
    "T": lambda b: send(b, rows(5), 5000),
    "memory": lambda b: send(b, rows(3, 7168), 4096),
    "hook and event": lambda b: send(b, rows(3), async_finish=True, return_recv_hook=True),
    "masks": lambda b: b.low_latency_clean_mask_buffer(),
}  # yapf: disable


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_page_quotes_what_is_raised(buffer: Buffer, mistake: str) -> None:
    with pytest.raises((ValueError, TypeError, deep_ep.Error)) as caught:
        MISTAKES[mistake](buffer)
    quoted = f"`{sentence_of(caught.value)}`"
    assert quoted in PAGE.read_text(encoding="utf-8"), quoted


def test_every_quoted_sentence_is_tested(buffer: Buffer) -> None:
    """But those of other ranks, which tests with several ranks raise."""
    quoted = re.findall(r"`((?:ValueError|TypeError|Error|InvalidArgument): [^`]+)`", PAGE.read_text(encoding="utf-8"))
    said = set()
    for mistake in MISTAKES.values():
        with pytest.raises((ValueError, TypeError, deep_ep.Error)) as caught:
            mistake(buffer)
        said.add(sentence_of(caught.value))
    assert [sentence for sentence in quoted if sentence not in said] == []


@pytest.mark.parametrize(("num_ranks", "stated"), [(2, "221 MB"), (8, "488 MB")])
def test_the_sizes_of_high_throughput_are_those_stated(num_ranks: int, stated: str) -> None:
    hint = Buffer.get_dispatch_config(num_ranks).get_nvl_buffer_size_hint(7168 * 2, num_ranks)
    assert stated == f"{hint / 1e6:.0f} MB"
    assert stated in PAGE.read_text(encoding="utf-8")


def test_the_size_of_low_latency_is_the_one_stated() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288)
    assert f"{hint / 1e6:.0f} MB" == "30 MB"
    assert "30 MB" in PAGE.read_text(encoding="utf-8")
