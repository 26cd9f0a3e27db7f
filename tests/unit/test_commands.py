"""`python -m deep_ep`: its commands, their options, and the older names of the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from deep_ep import __main__ as command_line
from deep_ep import calibrate, doctor
from deep_ep.bench import command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [("deep_ep", ), ("deep_ep", "doctor"), ("deep_ep", "bench"), ("deep_ep.bench", ),
                                       ("deep_ep", "bench", "low-latency"), ("deep_ep.doctor", ),
                                       ("deep_ep", "calibrate"), ("deep_ep.calibrate", )])
def test_every_name_of_a_command_tells_how_it_is_used(arguments: tuple[str, ...]) -> None:
    told = run("-m", *arguments, "--help")
    assert told.returncode == 0 and not told.stderr
    wanted = " ".join(arguments).replace("deep_ep.", "deep_ep ")
    assert f"usage: python -m {wanted} " in told.stdout


def test_options_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(doctor, "report", lambda is_json: seen.append(is_json) or 0)
    monkeypatch.setattr(calibrate, "run", lambda reports, to: seen.append((reports, to)) or 3)
    assert command_line.main(["doctor", "--json"]) == 0
    assert command_line.main(["calibrate", "a", "b", "--to", "c"]) == 3
    assert seen == [True, ([Path("a"), Path("b")], Path("c"))]


@pytest.mark.parametrize(("given", "benchmark", "tokens"), [
    ([], "intranode", None),
    (["--tokens", "8"], "intranode", [8]),
    (["low-latency", "--tokens", "8,16"], "low-latency", [8, 16]),
])
def test_the_benchmark_is_intranode_where_none_is_named(monkeypatch: pytest.MonkeyPatch, given: list[str],
                                                        benchmark: str, tokens: object) -> None:
    seen: list[object] = []
    monkeypatch.setattr(command, "run", lambda args, arguments: seen.append(
        (args.benchmark, args.tokens, arguments[1])) or 0)
    assert command_line.main(["bench", *given]) == 0
    assert seen == [(benchmark, tokens, benchmark)]


@pytest.mark.parametrize("arguments", [[], ["nurse"], ["bench", "intranode", "--no-such"], ["calibrate"]])
def test_what_is_no_command_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(arguments)
    assert ended.value.code == 2 and "usage: python -m deep_ep" in capsys.readouterr().err
