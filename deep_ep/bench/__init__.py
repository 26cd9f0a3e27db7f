"""Benchmarks: `python -m deep_ep bench intranode` or `low-latency`. They measure and report; they never judge."""
