"""Which engine carries bytes between nodes, and what is said about it (deep_ep/_nvshmem.py)."""
from __future__ import annotations

import logging

import pytest

from deep_ep import Error, InvalidArgument, _nvshmem
from deep_ep._peers import Place


def test_nvshmem_is_chosen_where_every_rank_can() -> None:
    assert _nvshmem.choose_engine("", ["", ""])[0] == "nvshmem"
    assert _nvshmem.choose_engine("nvshmem", ["", ""])[0] == "nvshmem"


def test_host_is_chosen_where_one_rank_cannot_and_the_reason_is_told() -> None:
    engine, reason = _nvshmem.choose_engine("", ["", "it is not built", ""])
    assert engine == "host"
    assert reason == "nvshmem is not possible on 1 of 3 ranks; rank 1: it is not built"


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert _nvshmem.choose_engine("host", ["DEEP_EP_RAIL=host"] * 2) == ("host", "DEEP_EP_RAIL=host")
    with pytest.raises(Error, match=r"DEEP_EP_RAIL=nvshmem: not possible on 1 of 2 ranks; rank 0: no GPU"):
        _nvshmem.choose_engine("nvshmem", ["no GPU", ""])
    with pytest.raises(InvalidArgument, match=r"expected 'nvshmem', 'host' or nothing .*'pigeons'"):
        _nvshmem.choose_engine("pigeons", ["", ""])


def test_nobody_looks_for_nvshmem_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvshmem, "load", lambda: pytest.fail("looked"))
    assert _nvshmem.obstacle("host", "cuda") == "DEEP_EP_RAIL=host"
    assert _nvshmem.obstacle("", "cpu") == "it works on GPUs only"


def test_obstacle_is_the_sentence_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:

    def load() -> str:
        raise Error("the engine nvshmem is not built")

    monkeypatch.setattr(_nvshmem, "load", load)
    assert _nvshmem.obstacle("", "cuda") == "the engine nvshmem is not built"
    monkeypatch.setattr(_nvshmem, "load", lambda: "3.4.5")
    assert _nvshmem.obstacle("", "cuda") == ""


def test_gpus_with_different_numbers_of_ranks_are_an_obstacle() -> None:
    """NVSHMEM 3.4.5 hangs: ranks that share a GPU meet in a barrier to which those with one of their own never come."""

    def shared(*devices: str) -> str:
        return _nvshmem.sharing_obstacle([Place("host", "name", device) for device in devices])

    assert shared("a", "b") == shared("a", "a", "b", "b") == shared("a", "a") == ""
    assert "different numbers of ranks, here 1 to 2" in shared("a", "b", "a")


def test_another_engine_is_tried_only_where_nvshmem_was_nobodys_wish_and_is_the_reason() -> None:
    failed = ["NVSHMEM: its initialization failed", "Buffer: connecting failed; rank 0: TransportError: NVSHMEM: its"]
    assert _nvshmem.can_do_without("nvshmem", "", lambda: failed)
    assert not _nvshmem.can_do_without("nvshmem", "", lambda: [failed[0], "out of memory"])
    assert not _nvshmem.can_do_without("nvshmem", "nvshmem", lambda: pytest.fail("asked"))
    assert not _nvshmem.can_do_without("host", "", lambda: pytest.fail("asked"))


def test_choice_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _nvshmem.tell_engine.cache_clear()
    with caplog.at_level(logging.INFO, logger="deep_ep"):
        for _ in range(2):
            _nvshmem.tell_engine("host", "because", "cuda")
    assert [(record.levelname, record.message) for record in caplog.records
            ] == [("WARNING", "between nodes, bytes are carried by the engine host: because")]
