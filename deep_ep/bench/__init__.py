"""Benchmarks: `python -m deep_ep.bench intranode`. They measure and report; they never judge."""
