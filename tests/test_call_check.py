"""DEEP_EP_CHECK_CALLS: ranks whose arguments differ are told so, instead of reading each other's messages wrongly."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import call_check_cases as cases
import pytest
from utils import Pool, device

SAME = "must be the same on every rank, got"
SENTENCES = (
    f"dispatch: the row size of x {SAME} 64 on rank(s) 0; 128 on rank(s) 1",
    f"dispatch: the columns of topk_idx {SAME} 0 on rank(s) 0; 2 on rank(s) 1",
    "dispatch: rank 1: num_tokens_per_rank must count the tokens in is_token_in_rank, which are [1, 1], got [0, 0]",
    f"the rank_prefix_matrix of the handle {SAME} [[1, 1], [2, 2]] on rank(s) 0; [[2, 0], [4, 0]] on rank(s) 1",
    f"the rank_prefix_matrix of the handle {SAME} [[1, 1], [2, 2]] on rank(s) 0; [[2, 0], [4, 0]] on rank(s) 1",
    f"the Buffer, by order of construction on this group, {SAME} 1 on rank(s) 0; 2 on rank(s) 1",
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


def test_an_absent_rank_is_named(checked_pool: Pool) -> None:
    message, _ = checked_pool.run(cases.absent_rank, 2)
    assert "never entered this call: rank 1" in message


@pytest.mark.skipif(device().type != "cpu", reason="has nothing to do with the device")
def test_a_comparison_that_was_given_up_does_not_outlive_the_program(tmp_path: Path) -> None:
    """Its thread ended the process at exit: "terminate called without an active exception"."""
    environment = {**os.environ, "DEEP_EP_CHECK_CALLS": "1", "DEEP_EP_TIMEOUT_SECS": "2", "DEEP_EP_DEVICE": "cpu"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", cases.AT_EXIT,
                          str(rank), str(tmp_path / "store")],
                         env=environment,
                         stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT,
                         text=True) for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [7, 7], outputs
    assert "caught: " in outputs[0]
