"""tools/gpu_check.sh, which measures on machines that are lent for minutes, rehearsed on the CPU."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("*.json"))]
    assert [report["benchmark"] for report in reports] == ["intranode", "low-latency"]
    assert all(report["commit"] == "abc" and report["rows"] for report in reports)
    assert {row["routing"] for row in reports[0]["rows"]} == {"uniform", "hot-rank"}
    assert "rounds with equal bits" in (tmp_path / "pressure.log").read_text(encoding="utf-8")
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


@pytest.mark.slow
def test_figures_that_were_measured_before_the_limit_come_back(tmp_path: Path) -> None:
    many = ",".join(["1"] * 2000)
    finished = run(tmp_path, "--device", "cpu", "bench", GPU_CHECK_BENCH=f"--tokens {many}", GPU_CHECK_BUDGET_S="20")
    assert finished.returncode == 1
    assert results_of(tmp_path)["bench"].startswith("FAIL: ended after")
    report = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert report["rows"]
    assert "ended early" in report["notices"][0]


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    finished = run(tmp_path, "pytst")
    assert finished.returncode == 2
    assert "no step 'pytst'" in finished.stderr
