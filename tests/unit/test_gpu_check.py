"""tools/gpu_check.sh, which measures on machines that are lent for minutes, rehearsed on the CPU."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, **environment}
    return subprocess.run([str(ROOT / "tools" / "gpu_check.sh"), *arguments],
                          env=surroundings,
                          capture_output=True,
                          text=True,
                          check=False)


def results_of(folder: Path) -> dict[str, str]:
    lines = (folder / "gpu_check.txt").read_text(encoding="utf-8").splitlines()[1:-1]
    return {step: result for step, _, result in (line.split(maxsplit=2) for line in lines)}


def record_of(folder: Path) -> Any:
    return json.loads(next(folder.glob("gpu_check_*.json")).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_benchmarks_come_before_what_runs_beside_pressure(tmp_path: Path) -> None:
    steps = ("machine", "build", "conformance", "bench", "bench_ll", "pytest", "pressure")
    finished = run(tmp_path, "--device", "cpu", *steps, GPU_CHECK_BESIDE="1", GPU_CHECK_PRESSURE_S="1",
                   GPU_CHECK_TESTS="tests/unit/test_config.py", GPU_CHECK_COMMIT="abc")  # yapf: disable
    assert finished.returncode == 0, finished.stdout + finished.stderr
    passed = dict.fromkeys(steps, "pass") | {"conformance": "left out: it needs a GPU"}
    assert results_of(tmp_path) == passed
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8
    record = record_of(tmp_path)
    assert {step["step"]: step["result"] for step in record["steps"]} == passed
    assert record["commit"] == "abc"
    assert record["command"] == ("GPU_CHECK_BESIDE=1 GPU_CHECK_PRESSURE_S=1 GPU_CHECK_TESTS=tests/unit/test_config.py "
                                 f"tools/gpu_check.sh --device cpu {' '.join(steps)}")
    verdicts = {step["step"]: step["verdicts"] for step in record["steps"]}
    assert "passed in" in verdicts["pytest"][-1]
    assert [verdict.split()[1:4] for verdict in verdicts["pressure"]] == [["rounds", "of", "4"]] * 2
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("2*.json"))]
    assert [report["benchmark"] for report in reports] == ["intranode", "low-latency"]
    assert all(report["commit"] == "abc" and report["rows"] for report in reports)
    assert {row["routing"] for row in reports[0]["rows"]} == {"uniform", "hot-rank"}
    assert "rounds of 4 calls with equal bits" in (tmp_path / "pressure.log").read_text(encoding="utf-8")
    assert "combine BF16" in finished.stdout, "the figures are printed"


def test_a_step_that_hangs_is_ended_and_the_rest_is_said_not_to_have_run(tmp_path: Path) -> None:
    test = tmp_path / "test_that_hangs.py"
    test.write_text("import time\ndef test(): time.sleep(100)\n", encoding="utf-8")
    finished = run(tmp_path / "out", "--device", "cpu", "pytest", "machine", GPU_CHECK_TESTS=str(test),
                   GPU_CHECK_BUDGET_S="8")  # yapf: disable
    assert finished.returncode == 1
    found = results_of(tmp_path / "out")
    assert found["pytest"].startswith("FAIL: ended after")
    assert found["machine"] == "not run: no time left"
    assert [step["result"] for step in record_of(tmp_path / "out")["steps"]] == list(found.values())


@pytest.mark.slow
def test_figures_that_were_measured_before_the_limit_come_back(tmp_path: Path) -> None:
    many = ",".join(["1"] * 2000)
    finished = run(tmp_path, "--device", "cpu", "bench", GPU_CHECK_BENCH=f"--tokens {many}", GPU_CHECK_BUDGET_S="12")
    assert finished.returncode == 1
    assert results_of(tmp_path)["bench"].startswith("FAIL: ended after")
    report = json.loads(next(tmp_path.glob("2*.json")).read_text(encoding="utf-8"))
    assert report["rows"]
    assert "ended early" in report["notices"][0]


@pytest.mark.slow
def test_pressure_outlives_its_command_and_is_collected_by_another(tmp_path: Path) -> None:
    surroundings = {"GPU_CHECK_STATE": str(tmp_path / "state"), "GPU_CHECK_PRESSURE_S": "1", "GPU_CHECK_SEED": "5"}
    started = run(tmp_path / "first", "--device", "cpu", "pressure_start", **surroundings)
    assert results_of(tmp_path / "first") == {"pressure_start": "pass"}, started.stdout
    again = run(tmp_path / "second", "--device", "cpu", "pressure_start", **surroundings)
    assert again.returncode == 1
    assert "on already" in again.stdout
    collected = run(tmp_path / "third", "--device", "cpu", "pressure_collect", **surroundings)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    for mode in ("high_throughput", "low_latency"):
        assert f"== {mode}, " in collected.stdout
    assert collected.stdout.count("exit status 0") == 2
    log = (tmp_path / "third" / "pressure.log").read_text(encoding="utf-8")
    assert log.count("with seed 5") == 2
    assert log.count("rounds of 4 calls with equal bits") == 2


def test_collected_pressure_that_failed_was_killed_or_never_started_is_a_failure(tmp_path: Path) -> None:
    state = tmp_path / "state"
    nothing = run(tmp_path / "out", "--device", "cpu", "pressure_collect", GPU_CHECK_STATE=str(state))
    assert nothing.returncode == 1
    assert "no pressure was started" in nothing.stdout
    state.mkdir()
    files = {"commit": "abc", "high_throughput.log": "other bits", "high_throughput.status": "1",
             "low_latency.log": "on its way"}  # yapf: disable
    for name, text in files.items():
        (state / name).write_text(f"{text}\n", encoding="utf-8")
    failed = run(tmp_path / "out", "--device", "cpu", "pressure_collect", GPU_CHECK_STATE=str(state))
    assert failed.returncode == 1
    assert "high_throughput, commit abc: exit status 1\nother bits\n" in failed.stdout
    assert "low_latency, commit abc: exit status none: it was killed\non its way\n" in failed.stdout


@pytest.mark.slow
def test_sanitized_programs_take_their_options(tmp_path: Path) -> None:
    finished = run(tmp_path, "--device", "cpu", "memcheck")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert results_of(tmp_path) == {"memcheck": "rehearsed without compute-sanitizer"}
    for what in ("dispatch and combine through slots", "the same with lent rows", "low latency"):
        assert f"{what}: clean" in finished.stdout
    log = (tmp_path / "gpu_check.log").read_text(encoding="utf-8")
    assert "combine logfmt" in log


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    finished = run(tmp_path, "pytst")
    assert finished.returncode == 2
    assert "no step 'pytst'" in finished.stderr


def test_pressure_leaves_its_state_in_the_tree_and_not_where_others_write(tmp_path: Path) -> None:
    """A fixed name in a shared folder may be another user's, and is removed before it is used."""
    tools = tmp_path / "tree" / "tools"
    tools.mkdir(parents=True)
    script = tools / "gpu_check.sh"
    script.write_text((ROOT / "tools" / "gpu_check.sh").read_text(encoding="utf-8"), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "GPU_CHECK_STATE"}
    ended = subprocess.run(["bash", str(script), "--device", "cpu", "pressure_collect"],
                           env={
                               **environment, "OUT": str(tmp_path / "out")
                           },
                           capture_output=True,
                           text=True,
                           check=False)
    assert f"no pressure was started: there is no {tmp_path}/tree/build/pressure" in ended.stdout
