"""The examples themselves, small, on two processes, and what happens when one of them fails."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import decode_loop
import expert_parallel as ep
import launcher
import moe_layer
import moe_lm


@pytest.fixture(name="library")
def _library() -> None:
    pytest.importorskip("deep_ep", reason="the extension is not built", exc_type=ImportError)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, None), (2, 1), (4, 2)])
def test_layer_over_ranks_equals_the_dense_layer(num_ranks: int, ranks_per_node: int | None) -> None:
    """Also in several nodes, which round in other places."""
    sizes = moe_layer.Sizes(num_tokens=33, hidden=64, ffn_hidden=48, num_experts=12, num_topk=3)
    workers = launcher.make_workers(moe_layer.run_rank, num_ranks, (sizes, 1, ranks_per_node))
    reports = list(launcher.run(workers, "cpu", ranks_per_node))
    traffic = {name: report for name, report in reports if isinstance(report, moe_layer.RankReport)}
    differences = dict(report for _, report in reports if isinstance(report, tuple))
    assert traffic["rank 0"].sent[1] == traffic["rank 1"].received[0]
    assert sorted(differences) == ["gradient of input", "gradient of router", "gradients of experts", "output"]
    for name, (difference, value, norm) in differences.items():
        assert difference <= moe_layer.TOLERANCE_MAX * value, name
        assert norm <= moe_layer.TOLERANCE_NORM, name


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("num_tokens", [5, 1])
def test_decode_loop_equals_the_dense_layers(num_tokens: int) -> None:
    """An odd number of sequences, so that micro-batches differ; and one alone, whose second micro-batch is missing."""
    sizes = decode_loop.Sizes(num_tokens=num_tokens, hidden=64, ffn_hidden=48, num_experts=6, num_topk=3, num_layers=2)
    reports = list(launcher.run(launcher.make_workers(decode_loop.run_rank, 2, (sizes, 2)), "cpu"))
    final = {name: report for name, report in reports if not isinstance(report, str)}
    assert sorted(final) == ["rank 0", "rank 1"]
    assert decode_loop.print_verdict(final, 2)
    assert all(report.largest_value > 1 for report in final.values())


@pytest.mark.usefixtures("library")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [["--num-processes", "2"], ["--num-processes", "4", "--ranks-per-node", "2"]])
def test_language_model_over_ranks_has_the_losses_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         ranks: list[str]) -> None:
    monkeypatch.setattr(moe_lm, "OUT", tmp_path)
    monkeypatch.setattr(moe_lm.Settings, "num_new_tokens", 3)
    assert moe_lm.main([*ranks, "--device", "cpu", "--steps", "3"]) == 0
    report = json.loads((tmp_path / "moe_lm.json").read_text())
    assert len(report["losses_ranks"]) == len(report["losses_one_rank"]) == 3
    assert report["text_ranks"].startswith(moe_lm.PROMPT)


def _overlap_as_documented(context: launcher.Context) -> None:
    dispatcher = ep.Dispatcher(ep.make_buffer(context.group, 64))
    buffer = dispatcher.buffer
    x = torch.randn(16, 64).to(torch.bfloat16)
    received = dispatcher.dispatch(x, torch.arange(16).unsqueeze(1) % 2, torch.ones(16, 1), num_experts=2)
    start = buffer.capture()
    x_back, _, done = buffer.combine(received.x,
                                     received.handle,
                                     previous_event=start,
                                     async_finish=True,
                                     allocate_on_comm_stream=True)
    with done:
        shared = x.float().square()
    context.report(bool(torch.equal(x_back + shared, x + shared)))
    dispatcher.destroy()


@pytest.mark.usefixtures("library")
def test_the_overlap_that_docs_training_shows() -> None:
    reports = list(launcher.run(launcher.make_workers(_overlap_as_documented, 2), "cpu"))
    assert sorted(reports) == [("rank 0", True), ("rank 1", True)]


def _fail_on_rank_1(context: launcher.Context) -> None:
    if context.rank == 1:
        raise ValueError("planted")
    time.sleep(60)


def _die_on_rank_1(context: launcher.Context) -> None:
    if context.rank == 1:
        os.abort()
    time.sleep(60)


@pytest.mark.parametrize(("function", "message"), [(_fail_on_rank_1, "rank 1 failed:.*ValueError: planted"),
                                                   (_die_on_rank_1, "rank 1 ended by SIGABRT")])
def test_one_failing_rank_stops_the_others(function: Any, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(launcher.WorkerError, match=f"(?s){message}"):
        list(launcher.run(launcher.make_workers(function, 2), "cpu"))
    assert time.monotonic() - start < 50, "waited for the rank that sleeps"


def test_an_unavailable_gpu_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert launcher.resolve_device("auto") == "cpu"
    with pytest.raises(SystemExit, match="PyTorch sees no GPU"):
        launcher.resolve_device("cuda")
