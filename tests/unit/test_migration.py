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


# What is said, and what is done with a Buffer to hear it.
MISTAKES: dict[str, Callable[[Buffer], Any]] = {
    "ValueError: Either 'group' or 'comm' must be provided.": lambda _: Buffer(None, 128),
    "ValueError: num_nvl_bytes must be a multiple of 128, got 100": lambda _: single_rank_buffer(num_nvl_bytes=100),
    "ValueError: num_qps_per_rank must be greater than 0, got 0": lambda _: single_rank_buffer(num_qps_per_rank=0),
    "ValueError: new_num_sms must be a multiple of 2, got 7": lambda _: Buffer.set_num_sms(7),
    ("InvalidArgument: num_max_nvl_chunked_send_tokens must be less than num_max_nvl_chunked_recv_tokens, got "
     "256 and 256"): lambda _: Config(20, 256, 256, 6, 128),
    "ValueError: x must have rows of a positive multiple of 16 bytes, got 24 bytes (bfloat16 [3, 12] on cpu)":
        lambda b: single_rank_dispatch(b, 3, 12),
    ("ValueError: num_tokens_per_rank, is_token_in_rank must be given (take it from get_dispatch_layout) when "
     "handle is None"): lambda b: single_rank_dispatch(b, 3, num_tokens_per_rank=None, is_token_in_rank=None),
    "ValueError: topk_idx and topk_weights must be given together, got topk_idx without topk_weights":
        lambda b: single_rank_dispatch(b, 3, topk_weights=None),
    "ValueError: topk_idx and topk_weights must be None when a handle is given":
        lambda b: single_rank_dispatch(b, 3, handle=single_rank_dispatch(b, 3)[4]),
    "TypeError: topk_idx must have dtype int64 or int32, got int16 [3, 2] on cpu":
        lambda b: b.get_dispatch_layout(ids(3, torch.int16), 2),
    "ValueError: num_worst_tokens needs topk_idx and topk_weights: -1 in recv_topk_idx marks the unused rows":
        lambda b: single_rank_dispatch(b, 3, num_worst_tokens=4, topk_idx=None, topk_weights=None),
    "TypeError: x must have dtype bfloat16, got float16 [3, 16] on cpu":
        lambda b: b.combine(rows(3, 16, torch.float16), single_rank_dispatch(b, 3, 16)[4]),
    ("Error: get_dispatch_layout: allocate_on_comm_stream needs a previous_event with an event, and "
     "async_finish=True"): lambda b: b.get_dispatch_layout(ids(3), 2, allocate_on_comm_stream=True),
    ("Error: EventOverlap.current_stream_wait: there is no event (the call that returned this was synchronous, "
     "so its results are ready)"): lambda _: EventOverlap(None).current_stream_wait(),
    "Error: this Buffer was destroyed": lambda _: destroyed_call(),
    ("InvalidArgument: low_latency_dispatch: build the Buffer with low_latency_mode=True and num_rdma_bytes "
     "from get_low_latency_rdma_size_hint, got low_latency_mode=False"):
        lambda _: send(single_rank_buffer(), rows(3)),
    "ValueError: x must have a hidden size of a positive multiple of 128 with use_fp8, got 136":
        lambda b: send(b, rows(3, 136), use_fp8=True),
    ("ValueError: use_ue8m0 needs use_fp8=True and round_scale=True: it packs exponents, and only then are the "
     "scales powers of two; got use_fp8=True, round_scale=False"):
        lambda b: send(b, rows(3, 512), use_fp8=True, use_ue8m0=True),
    "ValueError: x must have at most num_max_dispatch_tokens_per_rank (4) rows, got 5": lambda b: send(b, rows(5)),
    "ValueError: num_max_dispatch_tokens_per_rank must be at most 4096, got 5000": lambda b: send(b, rows(5), 5000),
    ("InvalidArgument: num_rdma_bytes is too small for this call: expected at least N, got N (see "
     "Buffer.get_low_latency_rdma_size_hint)"): lambda b: send(b, rows(3, 7168), 4096),
    ("InvalidArgument: low_latency_dispatch: async_finish and return_recv_hook exclude each other; the hook "
     "says when to receive"): lambda b: send(b, rows(3), async_finish=True, return_recv_hook=True),
    ("InvalidArgument: low_latency_clean_mask_buffer: build the Buffer with enable_shrink=True, got "
     "enable_shrink=False"): lambda b: b.low_latency_clean_mask_buffer(),
}  # yapf: disable


@pytest.mark.parametrize("sentence", MISTAKES)
def test_what_is_said(buffer: Buffer, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError, deep_ep.Error)) as caught:
        MISTAKES[sentence](buffer)
    assert sentence_of(caught.value) == sentence


def test_the_page_quotes_what_is_said() -> None:
    quoted = re.findall(r"`((?:ValueError|TypeError|Error|InvalidArgument): [^`]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(quoted) > 5
    assert [sentence for sentence in quoted if sentence not in MISTAKES] == []


@pytest.mark.parametrize(("num_ranks", "stated"), [(2, "221 MB"), (8, "488 MB")])
def test_the_sizes_of_high_throughput_are_those_stated(num_ranks: int, stated: str) -> None:
    hint = Buffer.get_dispatch_config(num_ranks).get_nvl_buffer_size_hint(7168 * 2, num_ranks)
    assert stated == f"{hint / 1e6:.0f} MB"
    assert stated in PAGE.read_text(encoding="utf-8")


def test_the_size_of_low_latency_is_the_one_stated() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288)
    assert f"{hint / 1e6:.0f} MB" == "30 MB"
    assert "30 MB" in PAGE.read_text(encoding="utf-8")
