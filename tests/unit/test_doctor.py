"""The doctor finds the machine of the tests well, and broken parts broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import deep_ep
from deep_ep import doctor


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["round trip"]["level"] == "ok"
    assert deep_ep.__version__ in found["deep_ep"]["text"]


def test_missing_extension_has_a_fix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep_cpp", None)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "[FAIL] deep_ep_cpp: does not import" in printed
    assert "fix: " in printed


def test_runs_as_a_file_where_the_package_does_not_import(tmp_path: Path) -> None:
    """Without the extension `python -m deep_ep.doctor` cannot start, and the ImportError points to the file."""
    package = tmp_path / "deep_ep"
    package.mkdir()
    for name in ("doctor.py", "__init__.py"):
        (package / name).write_text((Path(deep_ep.__file__).parent / name).read_text())
    (tmp_path / "deep_ep_cpp.py").write_text("raise ImportError('built for another Python')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import deep_ep"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"python {package / 'doctor.py'}" in failed.stderr
    report = subprocess.run([sys.executable, str(package / "doctor.py")],
                            capture_output=True,
                            text=True,
                            check=False,
                            env={"PYTHONPATH": str(tmp_path)})
    assert report.returncode == 1
    assert "built for another Python" in report.stdout
