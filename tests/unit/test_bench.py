"""What the benchmark counts and writes. Its times are nobody's to check."""
from __future__ import annotations

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import same_as_collectives
from utils import Pool

import deep_ep_cpp
from deep_ep import _peers
from deep_ep.__main__ import build_parser, int_list, with_default_benchmark
from deep_ep.bench.ceiling import measure_ceilings
from deep_ep.bench.collectives import pack_topk, unpack_topk
from deep_ep.bench.command import command_of, make_options
from deep_ep.bench.graphs import capture_together
from deep_ep.bench.kernels import NUM_CALLS, make_profiler, read_trace, short_name
from deep_ep.bench.low_latency import row_bytes
from deep_ep.bench.plot import draw_times, plot_file
from deep_ep.bench.progress import show_progress
from deep_ep.bench.ranks import ThreadMeeting, ThreadRanks
from deep_ep.bench.results import Findings, HostCost, Kernel, Profile, Report, Row, save
from deep_ep.bench.routing import (
    ROUTINGS,
    Shape,
    busiest_rail_copies,
    busiest_remote_copies,
    choose_experts,
    count_copies,
)
from deep_ep.bench.streams import PlainStreams
from deep_ep.bench.tables import format_findings, format_table
from deep_ep.bench.timing import Timer


def make_shape(routing: str = "uniform", num_ranks: int = 4) -> Shape:
    return Shape(num_ranks=num_ranks, num_tokens=50, hidden=128, num_topk=4, num_experts=16, routing=routing)


def make_row(**changes: object) -> Row:
    row = Row(operation="dispatch BF16",
              num_tokens=8,
              hidden=128,
              num_topk=2,
              num_experts=4,
              routing="uniform",
              num_sms=4,
              chained_us=10.0,
              fresh_us=20.0,
              chained_p95_us=11.0,
              fresh_p95_us=21.0,
              remote_bytes=1_000_000,
              ceiling_gb_per_s=200.0)
    return replace(row, **changes)  # type: ignore[arg-type]


def make_findings() -> Findings:
    kernels = [Kernel("notify_dispatch", 9, 5.0), Kernel("dispatch", 16, 180.0)]
    return Findings(rows=[make_row()],
                    host=[HostCost("combine BF16", 10.0, 12.0, 0.0)],
                    profiles=[Profile("dispatch BF16 worst case", 4096, "uniform", 16, 190.0, kernels)],
                    notices=["something to know"])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_copies_are_one_per_token_and_distinct_rank(routing: str) -> None:
    shape = make_shape(routing)
    copies = count_copies(shape, seed=3)
    for source in range(shape.num_ranks):
        expected = [0] * shape.num_ranks
        for experts in choose_experts(shape, source, seed=3).tolist():
            for rank in {expert // shape.num_local_experts for expert in experts if expert >= 0}:
                expected[rank] += 1
        assert copies[source].tolist() == expected


def test_routings_differ_in_what_they_are_named_for() -> None:
    hot = count_copies(make_shape("hot-rank"), seed=0).sum(0)
    assert hot.argmax() == 0
    assert hot[0] > 1.2 * hot[1:].max()
    assert (choose_experts(make_shape("dropped"), 0, seed=0) == -1).any()
    assert (choose_experts(make_shape("uniform"), 0, seed=0) >= 0).all()


def test_rail_copies_are_one_for_each_other_node() -> None:
    """Against a loop over tokens; both directions of a rail count."""
    for num_ranks, size, routing in ((4, 2, "uniform"), (6, 2, "hot-rank"), (3, 1, "dropped"), (2, 2, "uniform")):
        shape = Shape(num_ranks, 20, 128, 3, 12, routing)
        out, into = [0] * num_ranks, [0] * num_ranks
        for source in range(num_ranks):
            for experts in choose_experts(shape, source, 1).tolist():
                nodes = {expert // (shape.num_local_experts * size) for expert in experts if expert >= 0}
                for node in nodes - {source // size}:
                    out[source] += 1
                    into[node * size + source % size] += 1
        assert busiest_rail_copies(shape, 1, size) == max(out + into), (num_ranks, size)


def test_busiest_copies_look_at_both_directions_and_leave_out_a_rank_s_own() -> None:
    assert busiest_remote_copies(torch.tensor([[9, 1], [2, 9]])) == 2
    assert busiest_remote_copies(torch.tensor([[0, 5, 0], [0, 0, 0], [0, 5, 0]])) == 10
    assert busiest_remote_copies(torch.tensor([[7]])) == 0


def test_rates_follow_from_bytes_and_the_chained_time() -> None:
    row = make_row()
    assert row.remote_gb_per_s == pytest.approx(100.0)
    assert row.share_of_ceiling == pytest.approx(0.5)
    assert make_row(ceiling_gb_per_s=0.0).share_of_ceiling == 0
    assert row.floor_us == pytest.approx(5.0)
    assert "0.50" in format_table([row])


def test_rates_follow_from_the_device_s_own_time_where_there_is_one() -> None:
    assert make_row(queued_us=8.0).remote_gb_per_s == pytest.approx(125.0)


def test_the_recorded_command_does_not_say_where_the_figures_went() -> None:
    arguments = [
        "bench", "intranode", "--tokens", "8,16", "--save", "/somewhere", "--commit", "abc", "--graphs", "--save"
    ]
    assert command_of(arguments) == "python -m deep_ep bench intranode --tokens 8,16 --graphs"


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1.5"])
def test_a_list_of_numbers_is_checked(text: str) -> None:
    with pytest.raises(Exception, match="expected"):
        int_list(text)


def test_a_saved_report_says_what_it_was(tmp_path: Path) -> None:
    report = Report("intranode", "python -m deep_ep.bench", "cpu", num_ranks=2, num_devices=0, findings=make_findings())
    content = json.loads(save(report, tmp_path, commit="abc").read_text(encoding="utf-8"))
    assert content["commit"] == "abc"
    assert content["rows"][0]["share_of_ceiling"] == 0.5
    assert {"date", "command", "machine", "notices", "num_ranks"} <= content.keys()
    assert "nothing about the speed of a GPU" in content["notices"][0]


def test_ranks_that_share_a_gpu_are_pointed_out() -> None:
    report = Report("intranode", "", "cuda", num_ranks=4, num_devices=1)
    assert "share 1 GPU" in report.notices[0]
    assert Report("intranode", "", "cuda", num_ranks=4, num_devices=4).notices == []


def test_low_latency_rows_are_counted_as_they_are_sent() -> None:
    assert [row_bytes(name, 7168) for name in ("FP8", "BF16", "logfmt")] == [7392, 14336, 9408]


def test_findings_survive_the_file_that_a_rank_leaves(tmp_path: Path) -> None:
    findings = replace(make_findings(), path=tmp_path / "findings.json")
    findings.keep()
    content = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert Findings.from_json(content) == make_findings()


def test_every_part_of_the_findings_is_in_the_report_and_in_the_table(tmp_path: Path) -> None:
    report = Report("intranode", "", "cpu", num_ranks=2, num_devices=0, findings=make_findings())
    content = json.loads(save(report, tmp_path, commit="abc").read_text(encoding="utf-8"))
    assert content["host"] == [{"operation": "combine BF16", "cpu_us": 10.0, "wall_us": 12.0, "waited_us": 0.0}]
    assert content["profiles"][0]["kernels"][1] == {"name": "dispatch", "num_blocks": 16, "us": 180.0}
    assert "something to know" in content["notices"]
    table = format_findings(report.findings)
    assert "CPU time" in table
    assert "notify_dispatch 9 SMs 5.0, dispatch 16 SMs 180.0" in table


def test_a_run_that_ended_early_says_so(tmp_path: Path) -> None:
    report = Report("intranode", "", "cuda", 2, 2, findings=replace(make_findings(), failure="SystemExit: 124"))
    assert "ended early (SystemExit: 124)" in report.notices[0]


def parse(*arguments: str) -> Any:
    return make_options(build_parser().parse_args(with_default_benchmark(["bench", *arguments])), is_cuda=False)


def test_a_sweep_has_many_sizes_and_the_default_has_one() -> None:
    swept, default = parse("intranode", "--sweep"), parse("intranode")
    assert (min(swept.num_tokens), max(swept.num_tokens)) == (1, 8192)
    assert (min(swept.num_sms), max(swept.num_sms)) == (4, 32)
    assert len(swept.routings) == 2
    assert len(default.num_tokens) == len(default.num_sms) == len(default.routings) == 1
    assert parse("intranode", "--sweep", "--tokens", "7").num_tokens == [7]
    assert parse("low-latency", "--sweep").num_tokens[-1] == 512


def test_a_long_sweep_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(show_progress([1, 2, 3], is_shown=True)) == [1, 2, 3]
    assert "1 of 3 cases" in capsys.readouterr().err
    monkeypatch.setattr("deep_ep.bench.progress.SECONDS_BETWEEN_LINES", 0.0)
    assert list(show_progress([1, 2, 3], is_shown=True)) == [1, 2, 3]
    assert "2 of 3 cases" in capsys.readouterr().err
    assert list(show_progress([1, 2, 3], is_shown=False)) == [1, 2, 3]
    assert not capsys.readouterr().err


def entry_name(kernel: str) -> str:
    return f"void deep_ep::dev::entry<deep_ep::kernels::{kernel}>(deep_ep::kernels::Params)"


def test_kernels_get_the_names_of_their_folders() -> None:
    assert short_name(entry_name("notify_dispatch::(anonymous namespace)::Kernel")) == "notify_dispatch"
    assert short_name(entry_name("low_latency::combine::(anonymous namespace)::Kernel<true>")) == "low_latency combine"
    assert short_name("spin_kernel(long)") is None


def test_the_profiler_keeps_every_event_where_torch_can() -> None:
    profiler = make_profiler(torch.profiler.ProfilerActivity.CPU)
    profiler.start()
    torch.ones(3).sum()
    profiler.stop()
    assert getattr(profiler, "acc_events", True) is True
    assert profiler.events()


def test_a_trace_is_read_call_by_call_and_stream_by_stream() -> None:
    events: list[dict[str, Any]] = [{"cat": "kernel", "name": "spin_kernel(long)", "ts": 0, "dur": 5, "args": {}}]
    for stream, slowness in ((7, 1.0), (9, 2.0)):
        for call in range(NUM_CALLS):
            # The first call is not like the others.
            length = slowness * (100 if call == 0 else 10)
            for i, kernel in enumerate(("notify_dispatch::Kernel", "dispatch::Kernel")):
                events.append({
                    "cat": "kernel",
                    "name": entry_name(kernel),
                    "ts": 1000 * call + 300 * i,
                    "dur": length + i,
                    "args": {
                        "stream": stream,
                        "grid": [4 * (i + 1), 1, 1]
                    }
                })  # yapf: disable
    quick, slow = read_trace({"traceEvents": list(reversed(events))}, NUM_CALLS)[::-1]
    assert quick[0] == slow[0] == [("notify_dispatch", 4), ("dispatch", 8)]
    assert quick[1] == [[10.0] * (NUM_CALLS - 1), [11.0] * (NUM_CALLS - 1)]
    assert slow[2] == [321.0] * (NUM_CALLS - 1)
    assert read_trace({"traceEvents": events[:-1]}, NUM_CALLS)[0][1] == quick[1]


@pytest.mark.parametrize(("num_ranks", "routing"), [(2, "uniform"), (3, "dropped"), (4, "hot-rank")])
def test_collectives_give_what_the_library_gives(pool: Pool, num_ranks: int, routing: str) -> None:
    shape = Shape(num_ranks, 13, 128, 4, 4 * num_ranks, routing)
    pool.run(same_as_collectives, num_ranks, shape)


def test_packed_topk_is_unpacked_for_each_rank() -> None:
    idx, weights = torch.tensor([[5, -1, 2]]), torch.tensor([[0.5, 0.25, 0.125]])
    shape = Shape(2, 1, 8, 3, 8, "uniform")
    local, local_weights = unpack_topk(pack_topk(idx, weights), shape, rank=1)
    assert local.tolist() == [[1, -1, -1]]
    assert local_weights.tolist() == [[0.5, 0.0, 0.0]]


def run_benchmark(name: str, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """A small one on the CPU: what it saved, what it printed."""
    sizes = ["--hidden", "128", "--experts", "4", "--topk", "2", "--repeats", "1", "--input-sets", "1"]
    command = [sys.executable, "-m", "deep_ep", "bench", name, "--device", "cpu", "--num-processes", "2", *sizes]
    finished = subprocess.run([*command, *options, "--save", str(folder)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8")), finished.stdout


LOW_LATENCY_CALLS = ("dispatch FP8", "dispatch BF16", "combine BF16", "combine logfmt", "combine BF16 zero copy")


def test_the_low_latency_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    content, _ = run_benchmark("low-latency", tmp_path, "--tokens", "1,4")
    assert content["benchmark"] == "low-latency"
    names = [f"{call}{phase}" for call in LOW_LATENCY_CALLS for phase in ("", " send", " receive")]
    assert [(row["num_tokens"], row["operation"]) for row in content["rows"]] == [(t, n) for t in (1, 4) for n in names]
    assert all(row["chained_us"] > 0 for row in content["rows"])
    hooked = [f"{call}{how}" for call in LOW_LATENCY_CALLS for how in ("", " with hook")]
    assert [cost["operation"] for cost in content["host"]] == hooked


DISPATCHES = [f"dispatch {form}{how}" for form in ("BF16", "FP8") for how in ("", " cached", " worst case")]
COMBINES = [f"combine BF16{what}" for what in ("", " weights", " bias", " weights bias")]
COMPARED = [
    *(f"gloo {name}" for form in ("BF16", "FP8") for name in (f"all-to-all dispatch {form}",
                                                               f"all-to-all dispatch {form} cached",
                                                               f"all-gather dispatch {form}")),
    "gloo all-to-all combine BF16", "gloo reduce-scatter combine BF16"
]  # yapf: disable


def test_the_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    content, printed = run_benchmark("intranode", tmp_path, "--tokens", "8")
    assert [row["operation"] for row in content["rows"]] == ["layout", *DISPATCHES, *COMBINES, *COMPARED]
    assert all(row["chained_us"] > 0 and row["fresh_us"] > 0 for row in content["rows"])
    rows = {row["operation"]: row for row in content["rows"]}
    copies = busiest_remote_copies(count_copies(Shape(2, 8, 128, 2, 4, "uniform"), 0))
    assert rows["dispatch BF16"]["remote_bytes"] == rows["combine BF16"]["remote_bytes"] == copies * 256
    assert rows["gloo all-to-all dispatch FP8"]["remote_bytes"] == rows["dispatch FP8"]["remote_bytes"] == copies * 132
    assert rows["gloo reduce-scatter combine BF16"]["remote_bytes"] == 8 * 256  # every token to the other rank
    assert [cost["operation"] for cost in content["host"]] == ["layout", *DISPATCHES, *COMBINES]
    waited = {cost["operation"] for cost in content["host"] if cost["waited_us"] > 0}
    assert waited == {"dispatch BF16", "dispatch FP8"}, "only a fresh dispatch waits for counts"
    assert "combine BF16" in printed


def test_the_benchmark_across_nodes_counts_what_leaves_a_node(tmp_path: Path) -> None:
    content, _ = run_benchmark("internode", tmp_path, "--tokens", "8", "--num-processes", "4", "--ranks-per-node", "2")
    assert [row["operation"] for row in content["rows"]] == ["layout", *DISPATCHES, *COMBINES]
    copies = busiest_rail_copies(Shape(4, 8, 128, 2, 4, "uniform"), 0, 2)
    assert {row["remote_bytes"] for row in content["rows"] if "BF16" in row["operation"]} == {copies * 256}
    assert content["environment"]["DEEP_EP_RANKS_PER_NODE"] == "2"
    # Beside plain sockets, measured in the same run.
    assert all(row["ceiling_gb_per_s"] > 0 for row in content["rows"] if row["remote_bytes"] > 0)
    assert any("plain socket streams" in notice for notice in content["notices"])


def test_low_latency_is_measured_across_nodes_too(tmp_path: Path) -> None:
    content, _ = run_benchmark("low-latency", tmp_path, "--tokens", "4", "--num-processes", "2", "--ranks-per-node",
                               "1")
    assert content["environment"]["DEEP_EP_RANKS_PER_NODE"] == "1"
    assert "Between nodes, bytes are carried by the engine host." in content["notices"]
    assert all(row["ceiling_gb_per_s"] == 0 for row in content["rows"])


def test_ranks_that_are_threads_are_compared_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEP_EP_NUM_SMS", "2")
    content, _ = run_benchmark("intranode", tmp_path, "--tokens", "4", "--ranks-as-threads", "--num-sms", "2,4")
    assert [row["operation"] for row in content["rows"]] == ["layout", *(2 * [*DISPATCHES, *COMBINES])]
    assert content["environment"].get("DEEP_EP_NUM_SMS") == "2"
    assert any("comparison with torch.distributed is left out" in notice for notice in content["notices"])


class SlowDevice:
    """Stands for CUDA where there is none, and writes down what it is asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        device = self

        class Event:

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.log.append("mark")
                self.place = len(device.log)

            def elapsed_time(self, end: Any) -> float:
                return float(end.place - self.place)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("idle"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: self.log.append("sleep"))

    def call(self, i: int) -> None:
        self.log.append(f"call {i}")

    def send(self, i: int) -> Any:
        self.log.append(f"send {i}")
        return lambda: self.log.append(f"receive {i}")


def test_queued_calls_wait_behind_a_sleeping_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, timer = SlowDevice(monkeypatch), Timer(ThreadRanks(ThreadMeeting(1), 0), is_cuda=True)
    times = timer.queued(device.call, 1, 2)
    assert device.log == ["call 0", "idle", "sleep", "mark", "call 0", "mark", "call 1", "mark", "idle"]
    assert times == [2000.0, 2000.0]


def test_queued_phases_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    device, timer = SlowDevice(monkeypatch), Timer(ThreadRanks(ThreadMeeting(1), 0), is_cuda=True)
    times = timer.queued_phases(device.send, 1, 1)
    phases = ["mark", "send 0", "mark", "sleep", "mark", "receive 0", "mark", "sleep"]
    assert device.log == ["send 0", "receive 0", "idle", "sleep", *phases, "idle", "idle"]
    assert times == ([2000.0], [2000.0])


def test_an_empty_graph_is_not_measured() -> None:
    ranks = ThreadRanks(ThreadMeeting(1), 0)

    def capture_nothing() -> str:
        warnings.warn("The CUDA Graph is empty. This usually means that the graph was attempted", stacklevel=1)
        return "graph"

    assert capture_together(ranks, capture_nothing) is None
    assert capture_together(ranks, lambda: "graph") == "graph"


def test_what_was_measured_before_a_time_limit_is_saved(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "deep_ep.bench", "intranode", "--device", "cpu", "--num-processes", "2", "--tokens",
        ",".join(["1"] * 1000), "--hidden", "16", "--experts", "4", "--topk", "1", "--repeats", "1", "--save",
        str(tmp_path)
    ]  # yapf: disable
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "1 of 1000 cases" in line:
                break
        run.terminate()
        printed, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "ended early (SystemExit: ended from outside)" in printed
    content = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert content["rows"]
    assert content["notices"][0].startswith("The run ended early")


def test_a_report_can_be_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [make_row(num_tokens=tokens, num_sms=sms) for tokens in (8, 64) for sms in (4, 8)]
    for benchmark, chosen in (("intranode", rows), ("low-latency", [replace(row, num_sms=0) for row in rows])):
        report = Report(benchmark, "", "cpu", num_ranks=2, num_devices=0, findings=Findings(rows=chosen))
        path = save(report, tmp_path, commit="abc")
        assert plot_file(path).startswith("plotted")
        assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("remote_bytes", [0, 4096])
def test_one_size_without_budgets_is_a_picture_too(tmp_path: Path, remote_bytes: int) -> None:
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    row = replace(make_row(num_tokens=8, num_sms=0), remote_bytes=remote_bytes)
    path = save(Report("low-latency", "", "cpu", num_ranks=1, num_devices=0, findings=Findings(rows=[row])),
                tmp_path,
                commit="abc")
    assert plot_file(path).startswith("plotted")
    _, axes = mpl.pyplot.subplots()
    draw_times(axes, json.loads(path.read_text(encoding="utf-8")))
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.operation]
    mpl.pyplot.close("all")


@pytest.mark.parametrize("num_sizes", [1, 2, 3])
def test_two_sizes_are_bars_and_more_are_lines(num_sizes: int) -> None:
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    sizes = [8, 64, 512][:num_sizes]
    rows = [asdict(make_row(num_tokens=tokens, num_sms=4)) for tokens in sizes]
    _, axes = mpl.pyplot.subplots()
    draw_times(axes, {"rows": rows})
    assert len(axes.patches) == (num_sizes if num_sizes < 3 else 0)
    assert len(axes.get_lines()) == (0 if num_sizes < 3 else 1)
    mpl.pyplot.close("all")


def test_the_legend_hides_no_curve(tmp_path: Path) -> None:
    mpl = pytest.importorskip("matplotlib")
    drawn = []
    rows = [make_row(num_tokens=tokens, num_sms=sms) for tokens in (8, 64, 512) for sms in (4, 8, 16)]
    path = save(Report("intranode", "", "cpu", num_ranks=2, num_devices=0, findings=Findings(rows=rows)), tmp_path,
                "abc")
    with pytest.MonkeyPatch.context() as patch:
        mpl.use("Agg")
        patch.setattr(mpl.figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        plot_file(path)
    for axes in drawn[0].axes:
        drawn[0].draw_without_rendering()
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0


def test_a_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in plot_file(tmp_path / "any.json")


class _OtherRankHasNone:
    """Of two ranks, the other one has no deep_ep_bench_cpp."""
    rank, size = 0, 2

    def allgather(self, mine: Any) -> list[Any]:
        assert mine is True
        return [mine, False]


def test_ceilings_are_measured_where_every_rank_can() -> None:
    timer: Any = None  # not to be used
    ranks: Any = _OtherRankHasNone()
    assert measure_ceilings(ranks, timer, [4, 8], torch.device("cpu")) == {4: 0.0, 8: 0.0}


def test_benchmarks_are_no_part_of_the_product() -> None:
    assert not [name for name in dir(deep_ep_cpp.Buffer) if "bench" in name or "push" in name]


def test_plain_streams_end_where_a_peer_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep.bench.streams.TIMEOUT_S", 0.3)
    meeting = ThreadMeeting(2)

    def take_part(rank: int) -> str:
        ranks = ThreadRanks(meeting, rank)
        with PlainStreams(ranks, [1 - rank], 1 << 20, is_pinned=False) as streams:
            streams.exchange(0)
            ranks.barrier()
            try:
                if rank == 0:
                    streams.exchange(1)
            except TimeoutError:
                return "timed out"
            finally:
                ranks.barrier()
        return "ended"

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(take_part, range(2))) == ["timed out", "ended"]


def test_a_report_says_where_the_heap_is(tmp_path: Path) -> None:
    report = Report("intranode", "", "cpu", num_ranks=2, num_devices=0, findings=Findings(heap=_peers.HOST))
    assert json.loads(save(report, tmp_path, "abc").read_text())["heap"] == "host"
