"""DEEP_EP_CHECK_CALLS: ranks whose arguments differ are told so, instead of reading each other's messages wrongly."""

from collections.abc import Iterator

import call_check_cases as cases
import pytest
from utils import Pool

SAME = "must be the same on every rank, got"
SENTENCES = (
    f"dispatch: the row size of x {SAME} 64 on rank(s) 0; 128 on rank(s) 1",
    f"dispatch: the columns of topk_idx {SAME} 0 on rank(s) 0; 2 on rank(s) 1",
    "dispatch: rank 1: num_tokens_per_rank must count the tokens in is_token_in_rank, which are [1, 1], got [0, 0]",
    "the same sequence of calls, got 'dispatch with a handle' on rank(s) 0; 'combine' on rank(s) 1",
    f"low_latency_dispatch: num_max_dispatch_tokens_per_rank {SAME} 4 on rank(s) 0; 8 on rank(s) 1",
    f"low_latency_dispatch: use_fp8 {SAME} True on rank(s) 0; False on rank(s) 1",
    f"low_latency_combine: use_logfmt {SAME} False on rank(s) 0; True on rank(s) 1",
)


@pytest.fixture(scope="module")
def checked_pool() -> Iterator[Pool]:
    pool = Pool(2, {"DEEP_EP_CHECK_CALLS": "1"})
    yield pool
    pool.close()


def test_different_calls_are_named(checked_pool: Pool) -> None:
    """num_max_dispatch_tokens_per_rank, among others, must match."""
    for messages in checked_pool.run(cases.different_calls, 2):
        assert len(messages) == len(SENTENCES)
        for message, sentence in zip(messages, SENTENCES):
            assert message.endswith(sentence)


# The last one: an exchange that was given up leaves the group of the processes unusable.
def test_an_absent_rank_is_named(checked_pool: Pool) -> None:
    message, _ = checked_pool.run(cases.absent_rank, 2)
    assert "never entered this call: rank 1" in message
