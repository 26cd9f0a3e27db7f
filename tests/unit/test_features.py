"""`deep_ep.supports`: callers of several versions ask it, so its names stay."""

import re
from pathlib import Path

import pytest

import deep_ep
import deep_ep_cpp
from deep_ep import _env

API_PAGE = Path(__file__).resolve().parents[2] / "docs/api.md"


def test_what_is_here_is_supported_and_what_is_to_come_is_not() -> None:
    for name in ("high_throughput", "internode", "low_latency", "lending", "worst_case", "fp8", "logfmt", "shrink",
                 "cpu"):
        assert deep_ep.supports(name) is True, name
    assert deep_ep.supports("low_latency_internode") is True


def test_a_name_that_this_version_does_not_know_is_not_supported() -> None:
    assert deep_ep.supports("a feature of next year") is False
    assert deep_ep.supports("") is False


def test_a_name_is_a_str() -> None:
    with pytest.raises(TypeError, match="feature must be a str, got int"):
        deep_ep.supports(90)  # type: ignore[arg-type]


@pytest.mark.parametrize(("is_cuda", "is_sm90"), [(False, False), (True, False), (True, True)])
def test_devices_are_those_of_the_build(monkeypatch: pytest.MonkeyPatch, is_cuda: bool, is_sm90: bool) -> None:
    monkeypatch.setattr(deep_ep_cpp, "is_cuda_built", lambda: is_cuda)
    monkeypatch.setattr(deep_ep_cpp, "is_sm90_compiled", lambda: is_sm90)
    assert deep_ep.supports("cuda") is deep_ep.supports("cuda_graphs") is is_cuda
    assert deep_ep.supports("sm90") is is_sm90


def test_the_api_page_lists_every_name() -> None:
    section = API_PAGE.read_text().split("## Features")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.M)
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(_env.FEATURES)
