"""Tensors that need no more checks are known by identity, and others are checked however alike they are."""

import gc

import pytest
import torch
from single_rank import single_rank_buffer, single_rank_dispatch
from utils import device

from deep_ep import Buffer
from deep_ep._tensors import KnownTensors


def tensors() -> list[torch.Tensor]:
    return [torch.zeros(4, dtype=torch.int32) for _ in range(3)]


@pytest.mark.parametrize("place", range(3))
def test_with_another_tensor_they_are_not_known(place: int) -> None:
    known, made = KnownTensors[str](), tensors()
    known.add("found", *made)
    assert known.find(*made) == "found"
    made[place] = made[place].clone()
    assert known.find(*made) is None


def test_they_are_not_kept_alive_nor_mistaken() -> None:
    """An address that is used again is not the tensor that was there."""
    known = KnownTensors[str]()
    for _ in range(2 * KnownTensors.MOST):
        made = tensors()
        assert known.find(*made) is None
        known.add("found", *made)
        assert known.find(*made) == "found"
        del made
    assert len(known._entries) <= KnownTensors.MOST


def make_layout(buffer: Buffer) -> dict[str, torch.Tensor]:
    topk_idx = torch.arange(10, device=device()).reshape(-1, 2) % 4
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    return {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}


@pytest.mark.parametrize("name", ["num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank"])
def test_a_layout_that_was_good_does_not_vouch_for_its_parts(name: str) -> None:
    with single_rank_buffer() as buffer:
        layout = make_layout(buffer)
        single_rank_dispatch(buffer, **layout)
        layout[name] = layout[name].to(torch.int64)
        with pytest.raises(TypeError, match=name):
            single_rank_dispatch(buffer, **layout)


def test_a_known_layout_must_still_fit_the_tokens() -> None:
    with single_rank_buffer() as buffer:
        layout = make_layout(buffer)
        with pytest.raises(ValueError, match=r"is_token_in_rank must have shape \[6, 1\]"):
            single_rank_dispatch(buffer, 6, **layout)


def test_a_bad_handle_is_refused_every_time() -> None:
    with single_rank_buffer() as buffer:
        recv_x, _, _, _, handle, _ = single_rank_dispatch(buffer)
        bad = (*handle[:5], handle[5].to(torch.int64))
        gc.collect()
        for _ in range(2):
            with pytest.raises(TypeError, match="send_head"):
                buffer.combine(recv_x, bad)
        buffer.combine(recv_x, handle)
